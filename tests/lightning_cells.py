"""A Lightning module, a short fit, and the same training by hand for the tests of both ways to train with Lightning."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch_cells import Batch, batches, perturb_by_hand, put

from gradwise import Population

BATCHES = batches(5)  # an odd number: with accumulation over two, the last batch steps alone

WARNINGS = (
    # torch 2.13 deprecates a class that Lightning 2.6 uses for its batches.
    "ignore:.isinstance.treespec, LeafSpec.:FutureWarning",
    # Advice on performance and on this tiny data set.
    "ignore:.*does not have many workers",
    "ignore:The number of training batches",
    # torch's own warning about GradScaler and schedulers, which Lightning's order provokes on a skipped step.
    "ignore:Detected call of `lr_scheduler.step",
)


class Regression(LightningModule):
    """Records what it was asked to do; `optimizers_of` makes the optimizer."""

    def __init__(self, optimizers_of: Callable[["Regression"], Any], *, noisy: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        middle = [nn.BatchNorm1d(8), nn.Dropout(0.3)] if noisy else []
        self.net = nn.Sequential(nn.Linear(6, 8), *middle, nn.Tanh(), nn.Linear(8, 2))
        self.optimizers_of = optimizers_of
        self.losses: list[float] = []
        self.norms: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: Batch) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        self.log("loss", loss, on_step=True, on_epoch=True, batch_size=1)
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.norms.append(float(nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])))

    def configure_optimizers(self) -> Any:
        return self.optimizers_of(self)


def adamw(module: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=0.05, **options)


class Loader:
    """Batches that remember, in a checkpoint, how many of them the epoch has had."""

    def __init__(self, data: Sequence[Batch] = BATCHES) -> None:
        self.data = data
        self.position = 0

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Batch]:
        start, self.position = self.position, 0
        for index in range(start, len(self.data)):
            self.position = (index + 1) % len(self.data)
            yield self.data[index]

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def trainer(folder: Path, precision: str = "fp32", **options: Any) -> Any:
    options = {"max_epochs": 1, "enable_checkpointing": False, **PRECISIONS[precision](), **options}
    return Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        log_every_n_steps=1,
        **options,
    )


def half() -> MixedPrecision:
    """float16 with a GradScaler on the CPU, whose first scale is so large that the first step overflows."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**17))


PRECISIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "fp32": dict,
    "bf16": lambda: {"precision": "bf16-mixed"},
    "fp16": lambda: {"plugins": [half()]},
}


class Seen(Callback):
    """Weights of the module at hooks of the Trainer, and the outputs of its batches."""

    def __init__(self) -> None:
        self.after_batch: list[list[Tensor]] = []
        self.in_validation: list[list[Tensor]] = []
        self.outputs: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.after_batch.append(weights(pl_module))
        self.outputs.append(float(outputs["loss"]))

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        self.in_validation.append(weights(pl_module))


def weights(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def assert_near(got: Sequence[Tensor], expected: Sequence[Tensor], precision: str = "fp32") -> None:
    """To rounding of the gradients, which Adam divides by their own size: in half precision it is coarse."""
    rtol, atol = (1e-4, 1e-5) if precision == "fp32" else (1e-2, 2e-3)
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)


def by_hand(
    population: Population,
    *,
    members: int,
    paired: bool,
    precision: str = "fp32",
    accumulate: int = 1,
    clip: float | None = None,
    ranks: int = 1,
    data: Sequence[Batch] = BATCHES,
    first: int = 0,
) -> tuple[list[Tensor], list[float]]:
    """One epoch in plain torch: the weights at its end, and the mean loss of the members of every batch."""
    module = Regression(adamw)
    parameters, inner = list(module.parameters()), adamw(module)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**17, enabled=precision == "fp16")
    autocast = torch.autocast("cpu", torch.float16 if precision == "fp16" else torch.bfloat16, precision != "fp32")
    groups = [data[i : i + accumulate * ranks] for i in range(0, len(data), accumulate * ranks)]
    losses: list[float] = []
    for step, group in enumerate(groups, start=first):
        inner.zero_grad()
        for index, batch in enumerate(group):
            micro, rank = divmod(index, ranks)
            of_batch: list[Tensor] = []
            for member in range(micro * members, (micro + 1) * members):
                mean = perturb_by_hand(parameters, population, step=step, member=member, paired=paired, rank=rank)
                with autocast:
                    loss = module.loss(batch)
                of_batch.append(loss.detach())
                gradients = torch.autograd.grad(scaler.scale(loss / accumulate), parameters)
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    part = gradient / (members * ranks)
                    parameter.grad = part if parameter.grad is None else parameter.grad + part
                put(parameters, mean)
            losses.append(float(torch.stack(of_batch).float().mean()))
        scaler.unscale_(inner)
        if clip is not None:
            nn.utils.clip_grad_norm_(parameters, clip)
        scaler.step(inner)
        scaler.update()
    return [p.detach() for p in parameters], losses
