"""A potential energy surface from energies, and forces along a few normal modes.

A chain of six atoms between two walls, with Morse bonds: a small molecule as spectroscopists see it. Its stiff, high
modes hardly move at room temperature, so codes that compute anharmonic spectra displace a molecule along the soft modes
only, and know the forces along those. What is known is ``-dE/dq_k`` for a few directions, not the gradient: `tangents`
and `target_jvp`. Fair opponents are more energies: twice as many cost what an adjoint code asks for forces, five times
as many what central differences along two modes do.
Run: ``python examples/normal_modes.py``; all of it, with ten seeds: ``make bench-second-order``.
"""

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from gradwise.torch import GradientMatching, value_and_jacobian

Array = npt.NDArray[np.float64]

ATOMS = 6
DEPTH, STEEPNESS = 4.5, 1.9  # of a bond: eV, 1 / Angstrom
MASSES = np.array([1.0, 12.0, 12.0, 16.0, 12.0, 1.0])  # of the atoms, in atomic units of mass
TEMPERATURE = 0.3  # eV: well into the anharmonic range


@dataclass(frozen=True)
class Method:
    """What a network is trained by: energies at so many points, and forces along the softest modes."""

    name: str
    modes: int = 0
    decay: float = 0.0
    valuations: int = 1  # training points for each point of the others


METHODS = (
    Method("energies"),
    Method("energies, 2 times as many", valuations=2),
    Method("energies, 5 times as many", valuations=5),
    Method("energies, forces along 2 modes", modes=2),
    Method("energies, all 6 forces", modes=ATOMS),
)


def energy(u: Array) -> tuple[Array, Array]:
    """Energy of shape (n,) in eV, and its gradient of shape (n, 6) in eV / Angstrom, at displacements u (Angstrom)."""
    stretch = np.diff(u, axis=1, prepend=0.0, append=0.0)  # of the seven bonds, those to the walls included
    remains = np.exp(-STEEPNESS * stretch)
    pull = 2 * DEPTH * STEEPNESS * (1 - remains) * remains
    return (DEPTH * (1 - remains) ** 2).sum(axis=1), pull[:, :-1] - pull[:, 1:]


def normal_modes() -> tuple[Array, Array]:
    """Squared frequencies, ascending, and displacements of the modes as columns, ``modes.T @ M @ modes == 1``."""
    force_constants = 2 * DEPTH * STEEPNESS**2 * (2 * np.eye(ATOMS) - np.eye(ATOMS, k=1) - np.eye(ATOMS, k=-1))
    roots = np.sqrt(MASSES)
    squares, vectors = np.linalg.eigh(force_constants / np.outer(roots, roots))
    return squares, vectors / roots[:, None]


def sample(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Displacements from the harmonic distribution at `TEMPERATURE`, energies (n, 1) and gradients (n, 6)."""
    squares, modes = normal_modes()
    amplitudes = np.random.default_rng(seed).normal(size=(count, ATOMS)) * np.sqrt(TEMPERATURE / squares)
    u = amplitudes @ modes.T
    values, gradients = energy(u)
    return torch.tensor(u), torch.tensor(values)[:, None], torch.tensor(gradients)


class Amplitudes(nn.Module):
    """Displacements to amplitudes of the modes, in units of their harmonic standard deviation."""

    matrix: Tensor

    def __init__(self) -> None:
        super().__init__()
        squares, modes = normal_modes()
        self.register_buffer("matrix", torch.tensor(np.linalg.inv(modes).T * np.sqrt(squares / TEMPERATURE)))

    def forward(self, u: Tensor) -> Tensor:
        """Amplitudes of shape (n, 6), without unit."""
        return u @ self.matrix


def train(
    method: Method, data: tuple[Tensor, Tensor, Tensor], seed: int, iterations: int = 300
) -> tuple[nn.Module, float]:
    """Fit a tanh network by L-BFGS; returns it, and the seconds of one core that this took."""
    u, values, gradients = data
    torch.manual_seed(seed)
    layers = nn.Linear(ATOMS, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
    model = nn.Sequential(Amplitudes(), *layers).double()
    # Directions (n, modes, 6), the same at every geometry; dE/dq_k = sum_j dE/du_j du_j/dq_k.
    modes = torch.tensor(normal_modes()[1][:, : method.modes].T)
    tangents = modes.expand(len(u), -1, -1)
    slopes = (gradients @ modes.T)[:, None]  # minus the forces, (n, 1 output, modes)
    matching = GradientMatching()
    if method.modes:
        matching.fit(u, values, target_jvp=slopes)
    weights = [weight for weight in model.parameters() if weight.ndim > 1]
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=iterations, max_eval=2 * iterations, line_search_fn="strong_wolfe",
        tolerance_grad=0, tolerance_change=0,
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        if method.modes:
            predicted, loss = matching.with_values(model, u, tangents=tangents, target_jvp=slopes)
            loss = loss + mse_loss(predicted, values)
        else:
            loss = mse_loss(model(u), values)
        loss = loss + method.decay / len(u) * sum((weight.square().sum() for weight in weights), torch.zeros(()))
        loss.backward()
        return loss

    start = time.process_time()
    optimizer.step(closure)
    return model, time.process_time() - start


def score(model: nn.Module, test: tuple[Tensor, Tensor, Tensor]) -> dict[str, float]:
    """Root mean square errors, relative to the standard deviation: energy, and forces of all six modes."""
    u, values, gradients = test
    modes = torch.tensor(normal_modes()[1])
    with torch.no_grad():
        predicted, jacobian = value_and_jacobian(model, u)
    pairs = {"energy": (predicted, values), "forces": (jacobian[:, 0] @ modes, gradients @ modes)}
    return {name: ((a - b).square().mean().sqrt() / b.std()).item() for name, (a, b) in pairs.items()}


def run(seed: int, points: int = 60, iterations: int = 300) -> dict[str, dict[str, float]]:
    """Errors of every method, with the same initial weights."""
    test = sample(2000, 10_000)
    return {
        method.name: score(train(method, sample(points * method.valuations, seed), seed, iterations)[0], test)
        for method in METHODS
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    runs = [run(seed) for seed in range(3)]
    print(f"{'60 geometries, 3 seeds; relative errors of':44s} {'energy':>8s} {'forces':>8s}")
    for method in METHODS:
        errors = [np.exp(np.mean([np.log(r[method.name][key]) for r in runs])) for key in ("energy", "forces")]
        print(f"{method.name:44s} " + " ".join(f"{error:8.4f}" for error in errors))
