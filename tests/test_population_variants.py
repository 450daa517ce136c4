"""Variants of the population that the study tries: with no change they are the library's; each changes one thing."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from population import variants
from population.arms import ARMS, VARIANTS, Arm
from population.cells import PRIMARY
from population.training import train
from population.variants import CHANGES, Change, Members, scale_invariant
from torch import nn

from gradwise import Population


@pytest.mark.parametrize(("way", "size"), [("closure", 4), ("unchanged", 1)])
@pytest.mark.parametrize("network", ["CNN", "ResNet"])
def test_without_a_change_they_are_the_library(
    monkeypatch: pytest.MonkeyPatch, way: str, size: int, network: str
) -> None:
    monkeypatch.setitem(variants.CHANGES, "none", Change())
    cell = PRIMARY[f"digits-200 {network}"].changed({"epochs": 2})
    written_out = Arm("variant", {"population_size": size, "sigma": 0.1, "change": "none"})
    library = train(cell, ARMS[way], 0).model.state_dict()
    for name, value in train(cell, written_out, 0).model.state_dict().items():
        torch.testing.assert_close(value, library[name], rtol=1e-5, atol=2e-6)
    assert all(set(arm.options) == {"population_size", "sigma", "change"} for arm in VARIANTS.values())


class Watched:
    """A small network with batch normalisation whose weights are looked at in every evaluation."""

    def __init__(self, change: Change, *, size: int = 1, sigma: float = 0.3, steps: int = 10) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
        self.x, self.y = torch.randn(16, 3), torch.randint(0, 2, (16,))
        self.weights = [parameter for parameter in self.model.parameters() if parameter.ndim == 2]
        population = Population(size, sigma, antithetic=size > 1, seed=1, scale=change.scale)
        self.members = Members(self.model, population, change, steps)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.losses: list[float] = []
        self.noises: list[list[torch.Tensor]] = []

    def gradients(self) -> None:
        """At the members of a step, whose losses and noises are kept."""
        means = [weight.detach().clone() for weight in self.weights]

        def evaluate() -> torch.Tensor:
            self.noises.append([weight.detach() - mean for weight, mean in zip(self.weights, means, strict=True)])
            self.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self.model(self.x), self.y)
            loss.backward()
            self.losses.append(float(loss.detach()))
            return loss

        self.members.gradients(evaluate)
        for weight, mean in zip(self.weights, means, strict=True):
            assert torch.equal(weight, mean)

    def step(self) -> None:
        """Gradients and a step."""
        self.gradients()
        norms = self.members.norms()
        self.optimizer.step()
        self.members.after(norms)


def test_scale_invariant_tensors_are_those_before_a_batch_normalisation() -> None:
    watched = Watched(CHANGES["scale-invariant tensors left out"])
    assert [id(one) for one in scale_invariant(watched.model)] == [id(watched.weights[0])]
    watched.step()
    first, last = watched.noises[0]
    assert not first.any()
    assert last.any()


def test_differentiated_scale_has_no_pull_along_a_scale_invariant_tensor() -> None:
    radial = {}
    for name in ("differentiated scale", "norms kept"):  # the second one has the plain gradient
        watched = Watched(CHANGES[name], size=4)
        watched.gradients()
        weight = watched.weights[0]
        assert weight.grad is not None
        radial[name] = float((weight.grad * weight.detach()).sum())
    assert abs(radial["differentiated scale"]) < 1e-6
    assert radial["norms kept"] < -1e-3  # a step makes the tensor longer


def test_norms_are_kept() -> None:
    lengths = {}
    for name in ("norms kept", "filter scale"):
        watched = Watched(CHANGES[name])
        before = float(watched.weights[0].detach().norm())
        for _ in range(5):
            watched.step()
        lengths[name] = float(watched.weights[0].detach().norm()) / before
    assert lengths["norms kept"] == pytest.approx(1, abs=1e-6)
    assert abs(lengths["filter scale"] - 1) > 1e-4


def test_one_layer_has_all_the_noise() -> None:
    watched = Watched(CHANGES["one layer per step"], sigma=0.1)
    chosen = []
    for _ in range(8):
        means = [weight.detach().clone() for weight in watched.weights]
        watched.step()
        moved = [index for index, noise in enumerate(watched.noises[-1]) if noise.any()]
        assert len(moved) == 1
        chosen += moved
        unit = watched.noises[-1][moved[0]] / means[moved[0]].square().mean().sqrt()
        assert 0.1 * math.sqrt(2) * 0.3 < float(unit.std()) < 0.1 * math.sqrt(2) * 2.5
    assert set(chosen) == {0, 1}


def test_noise_over_time() -> None:
    def cosines(name: str) -> np.ndarray:
        watched = Watched(CHANGES[name])
        for _ in range(40):
            watched.step()
        flat = [torch.cat([noise.flatten() for noise in step]) for step in watched.noises]
        return np.asarray([float(nn.functional.cosine_similarity(a, b, dim=0)) for a, b in pairwise(flat)])

    assert cosines("correlated in time").mean() > 0.7
    assert abs(cosines("filter scale").mean()) < 0.15
    mirrored = cosines("mirrored in time")
    assert mirrored[::2].max() < -0.99
    assert abs(mirrored[1::2].mean()) < 0.3


@pytest.mark.parametrize(("name", "first", "last"), [("growing sigma", 0.0, 1.8), ("shrinking sigma", 2.0, 0.2)])
def test_schedules(name: str, first: float, last: float) -> None:
    watched = Watched(CHANGES[name], steps=10)
    constant = Watched(replace(CHANGES[name], schedule="constant"), steps=10)
    for step in range(10):
        for one in (watched, constant):
            for weight in one.weights:  # the same ones, whatever was learnt
                weight.data.fill_(1.0)
            one.step()
        if step in (0, 9):
            ratio = {0: first, 9: last}[step]
            torch.testing.assert_close(watched.noises[step][1], ratio * constant.noises[step][1], rtol=1e-4, atol=1e-6)


def test_loss_weighted_members(monkeypatch: pytest.MonkeyPatch) -> None:
    watched, even = Watched(CHANGES["loss-weighted members"], size=4), Watched(Change(), size=4)
    own = []
    for member in range(4):
        single = Watched(Change(), size=4)
        monkeypatch.setattr(single.members, "_weights", lambda _, m=member: [float(k == m) for k in range(4)])
        single.gradients()
        own.append([parameter.grad for parameter in single.weights])
    watched.gradients()
    even.gradients()
    losses = np.asarray(watched.losses)
    weights = np.exp(-losses / losses.std())
    weights /= weights.sum()
    for index, weight in enumerate(watched.weights):
        parts = [w * gradients[index] for w, gradients in zip(weights, own, strict=True)]
        expected = torch.stack(parts).sum(0)
        torch.testing.assert_close(weight.grad, expected, rtol=1e-4, atol=1e-6)
        unweighted = even.weights[index].grad
        assert unweighted is not None
        assert not torch.allclose(unweighted, expected, rtol=1e-4, atol=1e-6)
