"""Noise relative to the weights: the gradient with its scale held constant against the one that differentiates it.

With perturbation ``z = sigma * rms(w) * e``, the derivative of ``L(w + z)`` with respect to w is either ``g`` (scale
held constant) or ``g + w (g . z) / |w|^2`` (scale differentiated: a pull towards zero that grows with the curvature).
Paired seeds, last epoch, test data used for nothing else, sigma = 0 as control; small training sets of scikit-learn's
digits; AdamW, SGD, and SGD with weight decay, which asks whether an ordinary pull towards zero does the same.
Run: ``python benchmarks/relative_noise.py [seeds]``; writes ``out/relative_noise.json``. Results: benchmarks/README.md.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from gradwise.torch import PopulationGradient

INNERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "sgd, weight decay": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3),
}
STEPS, MEMBERS = 300, 8


def radial_pull(mean: Tensor, gradient: Tensor, z: Tensor) -> Tensor:
    """What differentiating the scale adds to a member's gradient: ``w (g . z) / |w|^2``."""
    return mean * (gradient * z).sum() / mean.square().sum()


def run(inner: str, rows: int, sigma: float, differentiated: bool, seed: int) -> tuple[float, float]:
    """Test accuracy (%) and log-loss (nats) after the last step."""
    x, y = load_digits(return_X_y=True)
    parts = train_test_split(x, y, train_size=rows, stratify=y, random_state=seed)
    train_x, test_x, train_y, test_y = (torch.tensor(part) for part in parts)
    train_x, test_x = train_x.float() / 16, test_x.float() / 16
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = PopulationGradient(INNERS[inner](model.parameters()), sigma=sigma, population_size=MEMBERS, seed=seed)
    weights = [p for p in model.parameters() if p.ndim >= 2]
    batches = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        rows_now = torch.randint(len(train_x), (64,), generator=batches)
        optimizer.zero_grad()
        mean = [w.detach().clone() for w in weights]
        pulls = [torch.zeros_like(w) for w in weights]
        previous: list[Tensor] = [torch.zeros_like(w) for w in weights]
        for member in range(MEMBERS):
            with optimizer.member(member):
                (nn.functional.cross_entropy(model(train_x[rows_now]), train_y[rows_now]) / MEMBERS).backward()
                for i, w in enumerate(weights):
                    assert w.grad is not None
                    pulls[i] += radial_pull(mean[i], w.grad - previous[i], w.detach() - mean[i])
                    previous[i] = w.grad.clone()
        if differentiated:
            for w, pull in zip(weights, pulls, strict=True):
                assert w.grad is not None
                w.grad += pull
        optimizer.step()
    with torch.no_grad():
        logits = model(test_x)
        loss = nn.functional.cross_entropy(logits, test_y).item()
    return 100 * (logits.argmax(1) == test_y).double().mean().item(), loss


def main() -> None:
    seeds = range(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
    cells = [(inner, rows, sigma) for inner in INNERS for rows in (100, 300) for sigma in (0.0, 0.1, 0.3)]
    table = Table(
        "inner", "rows", "sigma", "accuracy: constant", "differentiated", "log-loss: constant", "differentiated", "p"
    )
    results = []
    for inner, rows, sigma in track(cells, description="relative noise"):
        variants = (False,) if sigma == 0 else (False, True)
        scores = {v: np.array([run(inner, rows, sigma, v, seed) for seed in seeds]) for v in variants}
        constant, other = scores[False], scores.get(True)
        p = math.nan
        if other is not None:
            _, p = stats.wilcoxon(constant[:, 1], other[:, 1])
        results.append(
            {
                "inner": inner,
                "rows": rows,
                "sigma": sigma,
                "constant": constant.tolist(),
                "differentiated": None if other is None else other.tolist(),
                "p_log_loss": p,
            }
        )
        described = [describe(constant[:, 0], 2), describe(other if other is None else other[:, 0], 2)]
        described += [describe(constant[:, 1], 4), describe(other if other is None else other[:, 1], 4)]
        table.add_row(inner, str(rows), str(sigma), *described, f"{p:.3f}")
    Console(width=140).print(table)
    out = Path("out")
    out.mkdir(exist_ok=True)
    (out / "relative_noise.json").write_text(json.dumps(results, indent=1))


def describe(values: np.ndarray | None, digits: int) -> str:
    if values is None:
        return "-"
    return f"{values.mean():.{digits}f} ± {values.std(ddof=1) / len(values) ** 0.5:.{digits}f}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
