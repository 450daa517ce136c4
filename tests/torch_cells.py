"""Models, inner optimizers and hand-written reference loops for the tests of the torch population gradient.

The references use plain torch and the core's noise, one obvious statement after the other, and nothing of the adapter.
"""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradwise import Population

Batch = tuple[Tensor, Tensor]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 5, batch_first=True)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.reshape(len(x), 2, 3))[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(6, 2, dim_feedforward=8, dropout=0.1, batch_first=True)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x.unsqueeze(1)).mean(1))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(6, 2)
        self.unused = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Linear(6, 8).to(torch.bfloat16)
        self.high = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.high(torch.tanh(self.low(x.to(torch.bfloat16))).float())


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    model[0].requires_grad_(False)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "batchnorm": lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2)),
    "dropout": lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 2)),
    "lstm": Recurrent,
    "attention": Attention,
    "tied": Tied,
    "frozen": frozen,
    "unused": Unused,
    "mixed": Mixed,
}

INNERS: dict[str, Callable[[list[Any]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adam-foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "adam-fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=4),
}


def make(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS[name]()


def batches(count: int = 3, rows: int = 12) -> list[Batch]:
    generator = torch.Generator().manual_seed(7)
    return [
        (torch.randn(rows, 6, generator=generator), torch.randn(rows, 2, generator=generator)) for _ in range(count)
    ]


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def perturb_by_hand(
    parameters: Sequence[Tensor], population: Population, *, step: int, member: int, paired: bool, rank: int = 0
) -> list[Tensor]:
    """Move the weights to a member, out of place and by the formula; return the mean."""
    mean = [p.detach().clone() for p in parameters]
    for index, p in enumerate(parameters):
        if p.ndim < 2 or not p.requires_grad:
            continue
        wide = p.detach().float() if p.dtype == torch.bfloat16 else p.detach()
        noise = population.unit_noise(
            tuple(p.shape),
            step=step,
            member=member,
            tensor=index,
            rank=rank,
            paired=paired,
            dtype=str(wide.dtype).split(".")[1],
        )
        sigma = population.sigma_at(step)
        with torch.no_grad():
            p.copy_(
                torch.addcmul(
                    wide, torch.from_numpy(noise), sigma * (torch.linalg.norm(wide) / math.sqrt(wide.numel()))
                )
            )
    return mean


def put(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for p, value in zip(parameters, values, strict=True):
            p.copy_(value)


def reference_closure_step(
    model: nn.Module, inner: torch.optim.Optimizer, population: Population, batch: Batch, step: int
) -> Tensor:
    """One K-member step by hand: frozen noise, scales and masks, averaged gradients and statistics."""
    parameters = [p for group in inner.param_groups for p in group["params"]]
    masks = torch.get_rng_state()
    first_end: list[Tensor] = []
    at_start = [p.detach().clone() for p in parameters]

    def population_closure() -> Tensor:
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        gradients: list[Any] = []
        losses: list[Tensor] = []
        statistics: dict[str, Tensor] = {}
        for member in range(population.size):
            torch.set_rng_state(masks)
            for name, b in model.named_buffers():
                b.copy_(buffers[name])
            here = [p.detach().clone() for p in parameters]
            for index, p in enumerate(parameters):  # the scale is that at the start of the step, not of the evaluation
                if p.ndim >= 2 and p.requires_grad:
                    wide = at_start[index].float() if p.dtype == torch.bfloat16 else at_start[index]
                    kind = str(wide.dtype).split(".")[1]
                    noise = population.unit_noise(tuple(p.shape), step=step, member=member, tensor=index, dtype=kind)
                    scale = population.sigma_at(step) * (torch.linalg.norm(wide) / math.sqrt(wide.numel()))
                    with torch.no_grad():
                        p.copy_(torch.addcmul(here[index].to(wide.dtype), torch.from_numpy(noise), scale))
            inner.zero_grad()
            with torch.enable_grad():
                loss = loss_of(model, batch)
                loss.backward()
            losses.append(loss.detach())
            first_end.append(torch.get_rng_state())
            count = member + 1
            for index, p in enumerate(parameters):
                if member == 0:
                    gradients.append(None if p.grad is None else p.grad.clone())
                elif p.grad is not None:
                    gradients[index] = torch.lerp(gradients[index], p.grad, 1 / count)
            for name, b in model.named_buffers():
                if member == 0:
                    statistics[name] = b.clone()
                elif b.is_floating_point():
                    statistics[name] = statistics[name] + (1 / count) * (b - statistics[name])
            put(parameters, here)
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
        for name, b in model.named_buffers():
            b.copy_(statistics[name])
        mean = losses[0]
        for count, loss in enumerate(losses[1:], start=2):
            mean = mean + (1 / count) * (loss - mean)
        return mean

    loss = inner.step(population_closure)  # type: ignore[arg-type] - torch's stub wants a float
    torch.set_rng_state(first_end[0])
    return loss


def reference_loop_step(
    model: nn.Module, inner: torch.optim.Optimizer, population: Population, micro_batches: list[Batch], step: int
) -> None:
    """One step of the unchanged loop by hand: one independent member per micro-batch."""
    parameters = [p for group in inner.param_groups for p in group["params"]]
    for member, batch in enumerate(micro_batches):
        mean = perturb_by_hand(parameters, population, step=step, member=member, paired=False)
        loss_of(model, batch).backward()
        put(parameters, mean)
    inner.step()
    inner.zero_grad()


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    """Everything a step may touch: parameters, buffers, inner state, torch's and Python's random streams."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    state = [value for entry in inner.state_dict()["state"].values() for value in entry.values()]
    return [
        *[p.detach().clone() for p in model.parameters()],
        *[b.clone() for b in model.buffers()],
        *state,
        torch.get_rng_state(),
        random.getstate(),
    ]


def assert_same(left: Any, right: Any) -> None:
    """Equal bit for bit."""
    if isinstance(left, Tensor):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    elif isinstance(left, list):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    else:
        assert left == right
