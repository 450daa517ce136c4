"""Models, losses and hand-written references for the tests of `PopulationGradient.backward`, all in float64."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from gradwise import Population
from gradwise.torch import PopulationGradient

LossFunction = Callable[..., Tensor]
SIZE = 4


class Layers(nn.Module):
    """A list of modules in a python loop, one of them used twice, and a buffer."""

    offset: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.GroupNorm(2, 6), nn.Linear(6, 6)])
        self.head = nn.Linear(6, 2)
        self.register_buffer("offset", torch.linspace(-1, 1, 6))

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.layers, self.layers[0]):
            x = torch.tanh(layer(x)) + self.offset
        return self.head(x)


class Tied(nn.Module):
    """An embedding whose weight is the head's as well."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.middle = nn.Linear(24, 4)
        self.head = nn.Linear(4, 5)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x.abs() * 3).long().clamp(max=4)
        return self.head(self.middle(self.embedding(tokens).flatten(1)))[:, :2]


class FrozenAndUnused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.unused, self.used = nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(torch.tanh(self.frozen(x)))


def mse(model: Any, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.mse_loss(model(x), y)


def twice(model: Any, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.mse_loss(model(x) * model(-x), y)


def ridge(model: Any, x: Tensor, y: Tensor) -> Tensor:
    return mse(model, x, y) + 0.1 * sum(p.square().sum() for p in model.parameters())


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


def batchnorm() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))


def dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.4), nn.Tanh(), nn.Linear(8, 2))


def cnn() -> nn.Module:
    convolution, more = nn.Conv2d(1, 3, 2, padding=1), nn.Conv2d(3, 4, 2)
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), convolution, nn.MaxPool2d(2, 1), nn.ReLU(), more, nn.Flatten(), nn.Linear(8, 2)
    )


def transformer() -> nn.Module:
    block = nn.TransformerEncoderLayer(6, 2, dim_feedforward=8, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Unflatten(1, (1, 6)), block, nn.Flatten(), nn.Linear(6, 2))


def reparametrised() -> nn.Module:
    return nn.Sequential(weight_norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 2))


CELLS: dict[str, tuple[Callable[[], nn.Module], LossFunction]] = {
    "mlp": (mlp, mse),
    "cnn": (cnn, mse),
    "transformer": (transformer, mse),
    "layers": (Layers, mse),
    "tied": (Tied, mse),
    "frozen-unused": (FrozenAndUnused, mse),
    "weight-norm": (reparametrised, mse),
    "called-twice": (mlp, twice),
    "ridge": (mlp, ridge),
}


def data(rows: int = 12, seed: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    kind = {"generator": generator, "dtype": torch.float64}
    return torch.randn(rows, 6, **kind), torch.randn(rows, 2, **kind)


def fresh(make: Callable[[], nn.Module], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return make().double()


def sgd(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, **options})


def wrapped(make: Callable[[], nn.Module] = mlp, **options: Any) -> tuple[Any, PopulationGradient]:
    model = fresh(make)
    optimizer = PopulationGradient(
        sgd(model), model, **{"population_size": SIZE, "sigma": 0.2, "seed": 3, "antithetic": True, **options}
    )
    torch.manual_seed(11)  # the masks
    return model, optimizer


def population(**options: Any) -> Population:
    return Population(**{"size": SIZE, "sigma": 0.2, "seed": 3, **options})


def shards_of(batch: Sequence[Tensor], sizes: Sequence[int]) -> list[tuple[Tensor, ...]]:
    """The rows in order, so many for each."""
    return list(zip(*[leaf.split(list(sizes)) for leaf in batch], strict=True))


def by_hand(
    model: Any,
    loss_fn: LossFunction,
    batches: Sequence[Sequence[Any]],
    members: Population,
    *,
    weights: Sequence[float] | None = None,
    paired: bool = True,
    step: int = 0,
    first: int = 0,
    sigma_of: Callable[[int], float] | None = None,
) -> tuple[Tensor, list[Tensor | None]]:
    """Loss and gradients of members with a batch each: formulas only, with copies of the mean put back.

    `weights` are what each counts (equal by default), `first` is the index of the first member in its step,
    ``sigma_of(index of a parameter)`` stands for groups with a sigma of their own.
    """
    parameters = list(model.parameters())
    mean = [p.detach().clone() for p in parameters]
    shares = [1 / len(batches)] * len(batches) if weights is None else weights
    total = torch.zeros((), dtype=torch.float64)
    gradients: list[Tensor | None] = [None] * len(parameters)
    for member, (batch, share) in enumerate(zip(batches, shares, strict=True), start=first):
        for index, (p, w) in enumerate(zip(parameters, mean, strict=True)):
            if p.ndim >= 2 and p.requires_grad:
                noise = members.unit_noise(tuple(p.shape), step=step, member=member, tensor=index, paired=paired)
                sigma = members.sigma_at(step) if sigma_of is None else sigma_of(index)
                axes = tuple(range(1, p.ndim))
                scale = {
                    "rms": w.square().mean().sqrt(),
                    "filter": w.square().mean(axes, keepdim=True).sqrt(),
                    "absolute": torch.ones((), dtype=w.dtype),
                }[members.scale]
                with torch.no_grad():
                    p.copy_(w + sigma * scale * torch.from_numpy(noise))
        loss = loss_fn(model, *batch)
        trainable = [p for p in parameters if p.requires_grad]
        found = iter(torch.autograd.grad(loss, trainable, allow_unused=True))
        for index, p in enumerate(parameters):
            gradient = next(found) if p.requires_grad else None
            if gradient is not None:
                so_far = gradients[index]
                gradients[index] = share * gradient if so_far is None else so_far + share * gradient
        total = total + share * loss.detach()
        with torch.no_grad():
            for p, w in zip(parameters, mean, strict=True):
                p.copy_(w)
    return total, gradients


def gradients_of(model: Any) -> list[Tensor | None]:
    return [p.grad for p in model.parameters()]


def assert_close(left: Any, right: Any, rtol: float = 1e-10) -> None:
    """Lists of tensors or None: equal up to the order of float64 sums."""
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=rtol, atol=1e-12)
