"""A small class-conditional GAN (AC-GAN, Odena et al. 2017) whose discriminator may have one more loss term."""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .digits import CLASSES, PIXELS

__all__ = ["Average", "Discriminator", "Generator", "Run", "Settings", "Step", "Term", "train"]


@dataclass(frozen=True)
class Settings:
    """What all arms share, as found with the plain GAN alone (docs/generative.md)."""

    latent: int = 32
    width: int = 192
    batch: int = 64
    generator_rate: float = 5e-4
    discriminator_rate: float = 2e-3
    betas: tuple[float, float] = (0.5, 0.99)
    eta: float = 9.0
    """Of the average of the generator's weights: it spans about a share ``1 / (1 + eta)`` of the steps so far."""
    class_weight: float = 0.3
    """Of both networks' class losses."""


class Generator(nn.Module):
    """Images of given classes from Gaussian noise."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        width = settings.width
        self.latent = settings.latent
        self.body = nn.Sequential(
            nn.Linear(self.latent + CLASSES, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, PIXELS),
            nn.Tanh(),
        )

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Images, rows of 64 pixels from -1 to 1."""
        return self.body(torch.cat([noise, nn.functional.one_hot(labels, CLASSES).float()], 1))

    @torch.no_grad()
    def sample(self, labels: Tensor, *, seed: int) -> Tensor:
        """Images of `labels`; the same noise for the same seed."""
        random = torch.Generator().manual_seed(seed)
        return self(torch.randn(len(labels), self.latent, generator=random), labels)


class Discriminator(nn.Module):
    """A logit that says "real" and centred logits of the classes, on the same features; smooth, for its derivatives."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        width = settings.width
        self.body = nn.Sequential(nn.Linear(PIXELS, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.real = nn.Linear(width, 1)
        self.classes = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logit of "real", shape (batch, 1), and of the classes, (batch, 10)."""
        features = self.body(x)
        logits = self.classes(features)
        return self.real(features), logits - logits.mean(1, keepdim=True)


class Average:
    """Average of a network's weights and statistics with polynomial decay (Shamir & Zhang 2013).

    Step k gets the share ``(1 + eta) / (k + eta)``, which suits runs of every length: no horizon has to be chosen.
    """

    def __init__(self, network: Generator, eta: float) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False).eval()
        self.eta, self.steps = eta, 0
        self._pairs = [
            [entry for entry in module.state_dict().values() if entry.is_floating_point()]
            for module in (self.network, network)
        ]

    @torch.no_grad()
    def update(self) -> None:
        """Count the weights as they are now."""
        self.steps += 1
        share = (1 + self.eta) / (self.steps + self.eta)
        for mean, now in zip(*self._pairs, strict=True):
            mean.lerp_(now, share)

    def copy(self) -> Generator:
        """The averaged network as it is now."""
        return copy.deepcopy(self.network)


class Step(NamedTuple):
    """What a loss term of the discriminator may use."""

    x: Tensor
    """Real images, which require gradients."""
    rows: Tensor
    """Which of the training images they are."""
    labels: Tensor
    real: Tensor
    """The discriminator's logit of "real" at `x`, (batch, 1)."""
    logits: Tensor
    """Its centred class logits at `x`, (batch, 10)."""
    fake: Tensor
    """Generated images, without graph."""
    discriminator: Discriminator
    random: torch.Generator
    """For what only the term draws."""


Term = Callable[[Step], Tensor]


@dataclass
class Run:
    """Averaged generators, as they were at given steps and process seconds."""

    at_steps: dict[int, Generator] = field(default_factory=dict)
    at_seconds: dict[float, Generator] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0


def train(
    x: Tensor,
    labels: Tensor,
    *,
    seed: int,
    term: Term | None = None,
    settings: Settings | None = None,
    steps: Sequence[int] = (),
    seconds: Sequence[float] = (),
) -> Run:
    """Train a GAN until all of `steps` and `seconds` (of process time) are reached.

    Weights, batches and noise depend on `seed` alone: runs of one seed differ by `term` only.

    Parameters
    ----------
    x : Tensor of shape (n, 64)
        Real images.
    labels : Tensor of shape (n,)
        Their classes.
    seed : int
        Of everything random.
    term : callable, optional
        Added to the discriminator's loss.
    settings : Settings, optional
        Sizes and rates.
    steps, seconds : sequence
        When to keep the averaged generator, in rising order.
    """
    settings = settings or Settings()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator, discriminator = Generator(settings), Discriminator(settings)
    average = Average(generator, settings.eta)
    draws, own = (torch.Generator().manual_seed(2 * seed + i) for i in range(2))
    rates = {generator: settings.generator_rate, discriminator: settings.discriminator_rate}
    generator_step, discriminator_step = (
        torch.optim.Adam(network.parameters(), lr=rate, betas=settings.betas, fused=True)
        for network, rate in rates.items()
    )
    run = Run()
    later = list(seconds)
    start = time.process_time()
    while later or run.steps < max(steps, default=0):
        rows = torch.randint(len(x), (settings.batch,), generator=draws)
        classes = torch.randint(CLASSES, (settings.batch,), generator=draws)
        noise = torch.randn(settings.batch, settings.latent, generator=draws)
        real_x = x[rows].requires_grad_(term is not None)
        fake_x = generator(noise, classes)

        fake = fake_x.detach()
        outputs, logits = discriminator(torch.cat([real_x, fake]))  # one pass: it has no batch statistics
        real, logits = outputs[: settings.batch], logits[: settings.batch]
        loss = nn.functional.softplus(torch.cat([-real, outputs[settings.batch :]])).mean() * 2
        loss = loss + settings.class_weight * nn.functional.cross_entropy(logits, labels[rows])
        if term is not None:
            loss = loss + term(Step(real_x, rows, labels[rows], real, logits, fake, discriminator, own))
        discriminator_step.zero_grad()
        loss.backward()
        discriminator_step.step()

        discriminator.requires_grad_(False)
        outputs, logits = discriminator(fake_x)
        loss = nn.functional.softplus(-outputs).mean()
        loss = loss + settings.class_weight * nn.functional.cross_entropy(logits, classes)
        generator_step.zero_grad()
        loss.backward()
        generator_step.step()
        discriminator.requires_grad_(True)

        average.update()
        run.steps += 1
        if run.steps in steps:
            run.at_steps[run.steps] = average.copy()
        run.seconds = time.process_time() - start
        while later and run.seconds >= later[0]:
            run.at_seconds[later.pop(0)] = average.copy()
    return run
