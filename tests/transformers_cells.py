"""Tiny text models, data and Trainers for the tests of the Hugging Face integration. Nothing is downloaded."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
)

LEARNING_RATE = 1e-2
VOCABULARY = 40


def bert(dropout: float = 0.1) -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=8,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    config.num_labels = 3
    return BertForSequenceClassification(config)


def gpt2(dropout: float = 0.0, seed: int = 0) -> GPT2LMHeadModel:
    """A causal language model whose output layer is its embedding (tied), and whose loss counts tokens."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=8,
        n_embd=16,
        n_layer=2,
        n_head=2,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def sentences(rows: int = 32, seed: int = 0) -> list[dict[str, Tensor]]:
    """Random tokens, and a class that depends on them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, VOCABULARY, (rows, 8), generator=generator)
    return [{"input_ids": row, "labels": row[0] % 3} for row in tokens]


def texts(rows: int = 32, seed: int = 0) -> list[dict[str, Tensor]]:
    """Random tokens of which some need not be predicted, so that batches count different numbers of them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, VOCABULARY, (rows, 8), generator=generator)
    ignored = torch.rand(rows, 8, generator=generator) < 0.3
    ignored[:, 0] = True  # nothing predicts the first one; whether the Trainer counts it has changed between versions
    return [
        {"input_ids": row, "labels": row.masked_fill(skip, -100)} for row, skip in zip(tokens, ignored, strict=True)
    ]


def arguments(folder: Path | str, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "save_strategy": "no",
        "learning_rate": LEARNING_RATE,
    }
    return TrainingArguments(**(settings | changes))


class Witness:
    """Keeps the weights that every training forward of `model` computes with."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: list[list[Tensor]] = []

        def look(module: nn.Module, args: Any) -> None:
            if module.training and torch.is_grad_enabled():
                self.seen.append(weights_of(model))

        next(iter(model.children())).register_forward_pre_hook(look)  # inside of the model's own hooks


class RecordingTrainer(Trainer):
    """Keeps its batches in `batches`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batches: list[dict[str, Tensor]] = []

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        self.batches.append({name: value.clone() for name, value in inputs.items()})
        return super().training_step(model, inputs, num_items_in_batch)


def momentum(model: nn.Module) -> torch.optim.SGD:
    """For comparisons up to rounding: Adam turns the rounding of a zero gradient (keys' biases) into a full step."""
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def weights_of(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def token_loss(model: nn.Module, batch: dict[str, Tensor], tokens: int) -> Tensor:
    """Sum over the predicted tokens of a micro-batch, over the number of tokens in the whole step."""
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum") / tokens


def tokens_of(batches: list[dict[str, Tensor]]) -> int:
    return sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
