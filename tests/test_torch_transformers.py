"""Hugging Face's Trainer with the population gradient: the unchanged loop, and the mixin with several members."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch_cells import assert_same, perturb_by_hand, put
from transformers import GPT2LMHeadModel, Trainer, TrainerCallback, get_linear_schedule_with_warmup
from transformers_cells import (
    LEARNING_RATE,
    RecordingTrainer,
    Witness,
    arguments,
    bert,
    gpt2,
    momentum,
    sentences,
    texts,
    token_loss,
    tokens_of,
    weights_of,
)

from gradwise import Population
from gradwise.torch import PopulationGradient
from gradwise.torch.transformers import PopulationTrainerMixin

SIGMA = 0.2
SEED = 3


class PopulationTrainer(PopulationTrainerMixin, RecordingTrainer):
    pass


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)


def unchanged(model: nn.Module, *, inner: Any = adamw, seed: int = SEED, **settings: Any) -> RecordingTrainer:
    """The Trainer, with nothing but an optimizer."""
    optimizer = PopulationGradient(inner(model), model, sigma=SIGMA, seed=seed)
    return RecordingTrainer(model=model, optimizers=(optimizer, None), **settings)


def members(model: nn.Module, *, inner: Any = adamw, seed: int = SEED, **settings: Any) -> Any:
    """The Trainer with the mixin."""
    population: dict[str, Any] = {"population_size": 4, "sigma": SIGMA, "seed": seed}
    return PopulationTrainer(model=model, optimizers=(inner(model), None), **population, **settings)


MODES: dict[str, Callable[..., Any]] = {"unchanged": unchanged, "members": members}


def population_of(trainer: Any) -> PopulationGradient:
    return trainer.optimizer.optimizer  # from under Accelerate's


def everything(trainer: Trainer) -> list[Any]:
    """Weights, the inner optimizer's state and schedule, torch's random stream, and what was logged."""
    optimizer: Any = trainer.optimizer
    inner = getattr(optimizer.optimizer, "inner_optimizer", optimizer.optimizer)
    state = inner.state_dict()
    logged = [{k: v for k, v in entry.items() if k in ("loss", "grad_norm")} for entry in trainer.state.log_history]
    return [
        *weights_of(trainer.model),  # type: ignore[arg-type] - typed as optional
        *[value for entry in state["state"].values() for value in entry.values()],
        [group["lr"] for group in state["param_groups"]],
        torch.get_rng_state(),
        logged,
    ]


def second_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum", label_smoothing=0.3) / (
        num_items_in_batch
    )


CELLS: dict[str, dict[str, Any]] = {
    "accumulation and clipping": {"gradient_accumulation_steps": 3, "max_grad_norm": 0.1},
    "bf16": {"bf16": True},
    "activation checkpointing": {"activation_checkpointing": True},
    "label smoothing": {"label_smoothing_factor": 0.2},
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
    "frozen embeddings": {},
    "own loss": {},
}


# torch's compiler looks at .grad of tensors of all kinds and hides its own warning, but not from "error".
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
@pytest.mark.parametrize("cell", CELLS)
def test_sigma_zero_equals_the_plain_trainer(cell: str, tmp_path: Path) -> None:
    settings = {"compute_loss_func": second_loss} if cell == "own loss" else {}

    def train(make: Callable[..., Any]) -> Trainer:
        model = bert(dropout=0.1)
        if cell == "frozen embeddings":
            model.bert.embeddings.requires_grad_(False)
        args = arguments(tmp_path, logging_steps=2, **CELLS[cell])
        trainer = make(model, args=args, train_dataset=sentences(), **settings)
        trainer.train()
        return trainer

    def plain(model: nn.Module, **settings: Any) -> Trainer:
        return RecordingTrainer(model=model, optimizers=(adamw(model), None), **settings)

    def wrapped(model: nn.Module, **settings: Any) -> Trainer:
        optimizer = PopulationGradient(adamw(model), model, sigma=0)
        return RecordingTrainer(model=model, optimizers=(optimizer, None), **settings)

    def mixed(model: nn.Module, **settings: Any) -> Trainer:
        return PopulationTrainer(
            model=model, optimizers=(adamw(model), None), population_size=3, antithetic=False, sigma=0, **settings
        )

    expected = everything(train(plain))
    assert_same(everything(train(wrapped)), expected)
    assert_same(everything(train(mixed)), expected)


def by_hand(start: GPT2LMHeadModel, batches: list[dict[str, Tensor]], *, per_step: int, size: int) -> list[Tensor]:
    """What the Trainer should do, without it: members, token counts over the whole step, clipping, schedule.

    Size 0 is the unchanged loop: one independent member per micro-batch.
    """
    parameters = list(start.parameters())
    inner = momentum(start)
    steps = [batches[i : i + per_step] for i in range(0, len(batches), per_step)]
    schedule = get_linear_schedule_with_warmup(inner, 0, len(steps))
    population = Population(size=size or 8, sigma=SIGMA, seed=SEED)
    for step, micro_batches in enumerate(steps):
        for index, batch in enumerate(micro_batches):
            for member in range(index * size, (index + 1) * size) if size else [index]:
                mean = perturb_by_hand(parameters, population, step=step, member=member, paired=size > 0)
                (token_loss(start, batch, tokens_of(micro_batches)) / (size or 1)).backward()
                put(parameters, mean)
        nn.utils.clip_grad_norm_(parameters, 0.5)
        inner.step()
        schedule.step()
        inner.zero_grad()
    return weights_of(start)


@pytest.mark.parametrize(("mode", "size"), [("unchanged", 0), ("members", 4)])
def test_training_is_that_of_a_loop_by_hand(mode: str, size: int, tmp_path: Path) -> None:
    """Also: every forward sees a member of its own."""
    model = gpt2()
    witness = Witness(model)
    args = arguments(tmp_path, gradient_accumulation_steps=2, max_grad_norm=0.5, lr_scheduler_type="linear")
    trainer = MODES[mode](model, inner=momentum, args=args, train_dataset=texts(24))
    trainer.train()
    batches = trainer.batches[:: size or 1]
    assert len(batches) == 6
    assert len(witness.seen) == 6 * (size or 1)
    moved = [seen[0] for seen in witness.seen]  # the embedding, which is also the output layer
    assert not any(torch.equal(a, b) for i, a in enumerate(moved) for b in moved[:i])
    assert population_of(trainer).statistics.members == (size or 2)  # of the last step, or the last micro-batch

    expected = by_hand(gpt2(), batches, per_step=2, size=size)
    for got, value in zip(weights_of(model), expected, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-6)  # sums in another order


class Visitor(TrainerCallback):
    """Evaluates and saves between the micro-batches of a step, and looks at what the model is then and after it."""

    def __init__(self, folder: Path, rows: list[dict[str, Tensor]]) -> None:
        self.trainer: Any = None
        self.rows = rows
        self.folder = folder
        self.mean: list[Tensor] = []
        self.visits = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.mean = weights_of(kwargs["model"])

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        if isinstance(self.trainer, PopulationTrainerMixin):
            assert_same(weights_of(model), self.mean)
        else:
            assert not torch.equal(weights_of(model)[0], self.mean[0])  # the member is still there
        self.trainer.save_model(str(self.folder / "between"))
        assert_same(weights_of(GPT2LMHeadModel.from_pretrained(self.folder / "between")), self.mean)
        result = self.trainer.evaluate()
        assert_same(weights_of(model), self.mean)
        clean = gpt2().eval()
        put(list(clean.parameters()), self.mean)
        with torch.no_grad():
            losses = [clean(**{k: v[None] for k, v in row.items()}).loss for row in self.rows]
        assert result["eval_loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)  # float32, in batches
        self.visits += 1


@pytest.mark.parametrize("mode", MODES)
def test_evaluation_and_checkpoints_see_the_mean_at_any_time(mode: str, tmp_path: Path) -> None:
    rows = [{k: v.clone() for k, v in row.items()} for row in texts(6, seed=1)]
    for row in rows:
        row["labels"] = torch.cat([torch.tensor([-100]), row["input_ids"][1:]])  # as many in each: the mean of means

    visitor = Visitor(tmp_path, rows)

    def train(visitors: list[Visitor]) -> Any:
        args = arguments(
            tmp_path,
            gradient_accumulation_steps=2,
            eval_strategy="steps",
            save_strategy="steps",
            eval_steps=2,
            save_steps=2,
            load_best_model_at_end=True,
            per_device_eval_batch_size=3,
        )
        trainer = MODES[mode](
            gpt2(),
            args=args,
            train_dataset=texts(24),
            eval_dataset=rows,
            callbacks=visitors,  # three steps
        )
        for visitor in visitors:
            visitor.trainer = trainer
        trainer.train()
        return trainer

    visited = train([visitor])
    assert visitor.visits == 3
    best = load_file(Path(visited.state.best_model_checkpoint) / "model.safetensors")
    assert best  # and what is in the model at the end, bit for bit:
    assert all(torch.equal(visited.model.state_dict()[name], value) for name, value in best.items())
    # Evaluating in the middle of a step changes neither members nor the training.
    assert_same(weights_of(train([]).model), weights_of(visited.model))


@pytest.mark.parametrize("mode", MODES)
def test_resuming_in_the_middle_of_an_epoch_is_exact(mode: str, tmp_path: Path) -> None:
    def make(seed: int, steps_saved: int) -> Any:
        args = arguments(
            tmp_path,
            gradient_accumulation_steps=2,
            num_train_epochs=2,  # of four steps each
            save_strategy="steps" if steps_saved else "no",
            save_steps=steps_saved or 1,
            logging_steps=1,
        )
        return MODES[mode](bert(dropout=0.2), args=args, train_dataset=sentences(), seed=seed)

    straight = make(SEED, 3)
    straight.train()
    resumed = make(SEED + 1, 0)  # another seed, as in another process: the checkpoint has the right one
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert len(resumed.batches) == (8 - 3) * 2 * (4 if mode == "members" else 1)
    left, right = everything(resumed), everything(straight)
    assert_same(left[:-1], right[:-1])
    assert left[-1] == right[-1]  # what was logged, with the part before in it
    torch.load(tmp_path / "checkpoint-3" / "optimizer.pt", weights_only=True)


class PoppingTrainer(RecordingTrainer):
    """Takes something out of the batch before the step, as custom Trainers do."""

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        assert inputs.pop("weight").shape == (4,)
        return super().training_step(model, inputs, num_items_in_batch)


class PoppingPopulationTrainer(PopulationTrainerMixin, PoppingTrainer):
    pass


def test_mixin_works_with_the_default_optimizer_and_custom_trainers(tmp_path: Path) -> None:
    rows = [{**row, "weight": torch.tensor(1.0)} for row in sentences(8)]
    args = arguments(tmp_path, remove_unused_columns=False, seed=11)
    other = nn.Linear(2, 2)
    living = PopulationGradient(torch.optim.SGD(other.parameters(), lr=0.1), seed=11)
    trainer = PoppingPopulationTrainer(bert(), args, train_dataset=rows, population_size=2)
    assert trainer.population is None
    trainer.train()
    population = population_of(trainer)
    assert trainer.population is population
    assert population.population.seed == living.population.seed == 11  # the arguments', whatever else has it
    assert isinstance(population.inner_optimizer, torch.optim.AdamW)
    assert len(population.param_groups) == 2  # with and without weight decay, as the Trainer makes them
    assert population._step == 2
    trainer.train()  # goes on with the same optimizer
    assert trainer.population is population
    assert population._step == 4


def test_mixin_wraps_anew_when_the_model_is_made_anew(tmp_path: Path) -> None:
    trainer: Any = PopulationTrainer(
        args=arguments(tmp_path, max_steps=1), model_init=lambda: bert(), train_dataset=sentences(4), population_size=2
    )
    trainer.train()
    first, weights = trainer.population, weights_of(trainer.model)
    trainer.train()
    assert trainer.population is not first
    assert_same(weights_of(trainer.model), weights)


def test_mixin_refuses_what_would_do_something_else(tmp_path: Path) -> None:
    wrong: list[type] = [Trainer, PopulationTrainerMixin]
    with pytest.raises(TypeError, match="must come before the Trainer"):
        type("Wrong", tuple(wrong), {})

    model = bert()
    optimizer = PopulationGradient(torch.optim.SGD(model.parameters(), lr=0.1), model)
    with pytest.raises(TypeError, match="`optimizers` must hold a plain optimizer"):
        PopulationTrainer(model, arguments(tmp_path), optimizers=(optimizer, None))
    with pytest.raises(ValueError, match="must be"):
        PopulationTrainer(model, arguments(tmp_path), population_size=0)
