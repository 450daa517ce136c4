"""Gradient matching through the Trainer's `compute_loss`, as `examples/hf_trainer.py` does it."""

from pathlib import Path
from typing import Any

import hf_trainer as example
import pytest
import torch
from torch import Tensor, nn
from torch_cells import assert_same
from transformers_cells import weights_of

from gradwise.torch import GradientMatching

DATA = example.surface(24, seed=0)
COLUMNS: dict[str, Any] = {"remove_unused_columns": False, "label_names": ["y", "dydx"], "use_cpu": True}


def trainer_for(model: example.Surrogate, folder: Path, **settings: Any) -> example.MatchingTrainer:
    rows = example.rows_of(DATA)
    args = example.arguments(str(folder), **({"max_steps": 6, "learning_rate": 5e-3} | COLUMNS | settings))
    return example.MatchingTrainer(model, args, train_dataset=rows, eval_dataset=rows)


def trained(folder: Path, **settings: Any) -> list[Tensor]:
    model = example.make_surrogate(1.0, DATA)
    trainer_for(model, folder, **settings).train()
    return weights_of(model)


def loss_by_hand(model: example.Surrogate, data: dict[str, Tensor]) -> Tensor:
    """Values, and derivatives by a loop over the outputs; the scale as the core's formula has it."""
    x = data["x"].clone().requires_grad_()
    y = model(x)
    (slopes,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    spread, variance = DATA["x"].var(0, correction=0), DATA["y"].var(correction=0)
    target = data["dydx"][:, 0]
    scale = variance / (spread * DATA["dydx"][:, 0] ** 2).sum(1).mean()
    return nn.functional.mse_loss(y, data["y"]) + scale * (spread * (slopes - target) ** 2).sum(1).mean()


def test_one_step_is_that_by_hand(tmp_path: Path) -> None:
    """Also with accumulation: the mean over the micro-batches, which the Trainer divides by their number."""
    model = example.make_surrogate(1.0, DATA)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    settings: dict[str, Any] = {"gradient_accumulation_steps": 3, "max_grad_norm": 0, "optim": "sgd", "max_steps": 1}
    # 24 rows in three micro-batches are one epoch, so that their order does not matter.
    settings |= {"lr_scheduler_type": "constant", "learning_rate": 0.1, "per_device_train_batch_size": 8}
    trainer_for(model, tmp_path, **settings).train()
    twin = example.make_surrogate(1.0, DATA)
    twin.load_state_dict(start)
    loss_by_hand(twin, DATA).backward()
    for got, parameter in zip(weights_of(model), twin.parameters(), strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(got, parameter.detach() - 0.1 * parameter.grad, rtol=1e-5, atol=1e-6)


def test_bf16_is_near_and_compiling_changes_nothing(tmp_path: Path) -> None:
    plain = trained(tmp_path)
    start = weights_of(example.make_surrogate(1.0, DATA))
    compiled = trained(tmp_path, torch_compile=True, torch_compile_backend="aot_eager")
    assert_same(compiled, plain)
    half = trained(tmp_path, bf16=True)
    way = torch.cat([(a - b).flatten() for a, b in zip(plain, start, strict=True)])
    difference = torch.cat([(a - b).flatten() for a, b in zip(half, plain, strict=True)])
    assert 0 < difference.norm() < 0.2 * way.norm()  # Adam's first steps are signs, which rounding may turn


def test_evaluation_and_prediction(tmp_path: Path) -> None:
    model = example.make_surrogate(1.0, DATA)
    trainer = trainer_for(model, tmp_path, per_device_eval_batch_size=24)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss_by_hand(model, DATA).item(), rel=1e-5)
    predicted: Any = trainer.predict(example.rows_of(DATA)).predictions  # type: ignore[arg-type] - a list
    torch.testing.assert_close(torch.as_tensor(predicted), model(DATA["x"]).detach())


def test_checkpoints_hold_the_scales_and_resuming_is_exact(tmp_path: Path) -> None:
    straight = example.make_surrogate(1.0, DATA)
    trainer_for(straight, tmp_path, save_strategy="steps", save_steps=3).train()
    resumed = example.Surrogate()  # unfitted: without the scales of the checkpoint, it would warn and use others
    resumed.matching = GradientMatching(1.0)
    trainer_for(resumed, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(weights_of(resumed), weights_of(straight))
    left, right = resumed.state_dict(), straight.state_dict()
    assert_same([left["matching.scales.jacobian_scale"]], [right["matching.scales.jacobian_scale"]])


def test_derivatives_help_the_surrogate(tmp_path: Path) -> None:
    errors = [example.regress(weight, str(tmp_path), num_train_epochs=150, use_cpu=True) for weight in (0.0, 1.0)]
    assert errors[1] < 0.6 * errors[0]  # 0.14 and 0.39


@pytest.mark.parametrize("kind", ["unchanged", "members"])
def test_the_classifier_learns(kind: str, tmp_path: Path) -> None:
    scores = example.classify(kind, str(tmp_path), max_steps=40, use_cpu=True)
    assert scores["eval_loss"] < 0.68  # guessing: 0.69
