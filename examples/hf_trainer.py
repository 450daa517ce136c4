"""Both ideas in Hugging Face's Trainer: a text classifier with a population gradient, a surrogate with derivatives.

It shows the wiring and, for the surrogate, what derivatives are worth; one run of the classifier says nothing about the
population gradient. Everything is made here: random weights from a configuration, sentences of random tokens, an
analytic function. Nothing is downloaded. Run: ``python examples/hf_trainer.py``; takes about a quarter of a minute.
"""

import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from gradwise.torch import GradientMatching, PopulationGradient
from gradwise.torch.transformers import PopulationTrainerMixin

VOCABULARY, LENGTH = 20, 12


class PopulationTrainer(PopulationTrainerMixin, Trainer):
    """Four members, or as many as asked for, on every batch."""


class Surrogate(nn.Module):
    """A regression network. The scales of the derivatives are part of it, so that checkpoints hold them."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
        self.matching = GradientMatching()

    def forward(self, x: Tensor) -> Tensor:
        """Values only; gradient matching differentiates them itself."""
        return self.network(x)


class MatchingTrainer(Trainer):
    """Adds the derivatives to the loss; columns "x", "y" and "dydx" come from the data."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Values and derivatives from one forward pass; also what `evaluate` and `predict` call."""
        del num_items_in_batch  # this is a mean over the batch: the Trainer divides by the accumulation steps
        matching: Any = getattr(self.model, "matching")  # noqa: B009 - `model` may be DDP around it
        y, derivative_loss = matching.with_values(model, inputs["x"], inputs["dydx"])
        loss = mse_loss(y, inputs["y"]) + derivative_loss
        return (loss, {"y": y}) if return_outputs else loss


def arguments(folder: str, **settings: Any) -> TrainingArguments:
    """Small batches, no reports, no checkpoints; no pinned memory, of which torch warns where there is no GPU."""
    common: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False}
    common |= {"per_device_train_batch_size": 16, "save_strategy": "no"}
    return TrainingArguments(folder, **(common | settings))


def sentences(rows: int, seed: int) -> list[dict[str, Tensor]]:
    """Random tokens; the class is whether most of them are from the upper half of the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (rows, LENGTH), generator=generator)
    labels = ((tokens >= VOCABULARY // 2).sum(1) > LENGTH // 2).long()
    return [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels, strict=True)]


def make_classifier() -> BertForSequenceClassification:
    """A small BERT with random weights."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=LENGTH,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    return BertForSequenceClassification(config)


def accuracy(prediction: Any) -> dict[str, float]:
    """What `evaluate` adds to the loss."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def classify(kind: str, folder: str, **settings: Any) -> dict[str, float]:
    """Train a classifier: "plain", "unchanged" (one member per batch) or "members" (four); its scores on new data."""
    model = make_classifier()
    inner = torch.optim.AdamW(model.parameters(), lr=2e-3)
    common: dict[str, Any] = {
        "model": model,
        "args": arguments(folder, **settings),
        "train_dataset": sentences(512, seed=0),
        "eval_dataset": sentences(512, seed=1),
        "compute_metrics": accuracy,
    }
    if kind == "members":
        trainer = PopulationTrainer(**common, optimizers=(inner, None), population_size=4, sigma=0.1)
    elif kind == "unchanged":
        trainer = Trainer(**common, optimizers=(PopulationGradient(inner, model, sigma=0.1, seed=0), None))
    else:
        trainer = Trainer(**common, optimizers=(inner, None))
    trainer.train()
    return trainer.evaluate()


def surface(rows: int, seed: int) -> dict[str, Tensor]:
    """Points in a square, ``sin(2 x0) * x1``, and its derivatives of shape (rows, 1, 2)."""
    x = 4 * torch.rand(rows, 2, generator=torch.Generator().manual_seed(seed)) - 2
    y = torch.sin(2 * x[:, :1]) * x[:, 1:]
    dydx = torch.stack([2 * torch.cos(2 * x[:, 0]) * x[:, 1], torch.sin(2 * x[:, 0])], dim=1)
    return {"x": x, "y": y, "dydx": dydx[:, None]}


def rows_of(data: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """One dictionary per row, as the Trainer wants them."""
    return [dict(zip(data, row, strict=True)) for row in zip(*data.values(), strict=True)]


def make_surrogate(weight: float, train: dict[str, Tensor]) -> Surrogate:
    """A network with random weights, and the scales of the training data; weight 0 leaves the derivatives out."""
    torch.manual_seed(0)
    model = Surrogate()
    model.matching = GradientMatching(weight).fit(train["x"], train["y"], train["dydx"])
    return model


def regress(weight: float, folder: str, **settings: Any) -> float:
    """Train a surrogate on 48 points; its relative error at new ones."""
    train, test = surface(48, seed=0), surface(1000, seed=1)
    model = make_surrogate(weight, train)
    # Without the first, the Trainer drops what `forward` does not name; the second are the targets of `evaluate`.
    columns: dict[str, Any] = {"remove_unused_columns": False, "label_names": ["y", "dydx"]}
    trainer = MatchingTrainer(
        model, arguments(folder, learning_rate=5e-3, **columns, **settings), train_dataset=rows_of(train)
    )
    trainer.train()
    predicted: Any = trainer.predict(rows_of(test)).predictions  # type: ignore[arg-type] - a list will do
    return ((torch.as_tensor(predicted) - test["y"]).norm() / test["y"].norm()).item()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as output:
        for name in ("plain", "unchanged", "members"):
            scores = classify(name, output, num_train_epochs=3)
            print(f"{name}: accuracy {scores['eval_accuracy']:.3f}, loss {scores['eval_loss']:.3f}")
        for weight in (0.0, 1.0):
            error = regress(weight, output, num_train_epochs=150)
            print(f"derivative weight {weight}: relative error {error:.3f}")
