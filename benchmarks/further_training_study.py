"""Does further training with a surrogate's derivatives help, and more than with its values? 10 paired seeds.

The arms of examples/further_training.py on three data sets, and the same for linear regression on quadratic features.
The weight decay of all networks is what serves the data alone best on other seeds, and what is added to the data has
weight 1. The linear arms choose penalty and weight by cross-validation with the surrogate fitted anew in each fold.
Run: ``PYTHONPATH=examples python benchmarks/further_training_study.py`` (ten minutes of one core; goes on where it was
stopped). Writes
out/further_training.jsonl, out/further_training.md and docs/images/further_training.png.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from further_training import (
    STEPS,
    Array,
    Data,
    GaussianProcess,
    arms,
    error,
    fitted,
    friedman,
    network,
    points_between,
    score,
    train,
)
from matching_wing_weight import LOWER, UPPER, sample, wing_weight
from reports import markdown
from rich.progress import track
from scipy.stats import wilcoxon
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.model_selection import KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures

from gradwise import GradientEnhancedRidge, estimate_gradients, finite_difference_jacobian

ROOT = Path(__file__).parent.parent
SEEDS, TUNING = tuple(range(10)), (100, 101)
DECAYS, WEIGHTS = (1e-3, 3e-3, 1e-2, 3e-2), (0.1, 1.0, 10.0)
ALPHAS = tuple(10.0**k for k in range(-3, 4))
DIABETES_TEST = 142
Cell = tuple[str, str, int, float]
Results = dict[Cell, dict[str, float]]


def wing(n: int, seed: int) -> Data:
    """Wing weight, 10 inputs, noise of 5 % of its spread; noiseless test data."""
    middle, half = (LOWER + UPPER) / 2, (UPPER - LOWER) / np.sqrt(12)
    X, test = sample(n, seed), sample(2000, 10_000 + seed)
    exact = wing_weight(X)[0]
    y = exact + 0.05 * exact.std() * np.random.default_rng(seed).standard_normal(n)
    mean, std = y.mean(), y.std()

    def simulator(u: Array) -> Array:
        return (wing_weight(u * half + middle)[0] - mean) / std

    inputs, test_inputs = (X - middle) / half, (test - middle) / half
    return Data(inputs, (y - mean) / std, test_inputs, simulator(test_inputs), simulator)


@cache
def _diabetes() -> tuple[Any, Any, Any]:
    X, y = load_diabetes(return_X_y=True)
    return X, y, np.random.default_rng(0).permutation(len(y))


def diabetes(n: int, seed: int) -> Data:
    """Patients; 142 are set aside for the test, and seeds that tune never see them."""
    X, y, order = _diabetes()
    test, rest = order[:DIABETES_TEST], order[DIABETES_TEST:]
    rest = rest[np.random.default_rng(seed).permutation(len(rest))]
    rows = rest[:n]
    judged = rest[n:] if seed in TUNING else test
    centre, spread, mean, std = X[rows].mean(0), X[rows].std(0), y[rows].mean(), y[rows].std()
    return Data(
        (X[rows] - centre) / spread, (y[rows] - mean) / std, (X[judged] - centre) / spread, (y[judged] - mean) / std
    )


DATA: dict[str, Callable[[int], Data]] = {
    "Friedman, n = 100": partial(friedman, 100),
    "wing weight, n = 50": partial(wing, 50),
    "diabetes, n = 100": partial(diabetes, 100),
}
LINEAR = ("data alone", "process: values", "process: values at n (1 + d) points", "process: derivatives")
LINEAR += ("estimate_gradients", "true derivatives")


def network_cell(name: str, seed: int, decay: float) -> dict[str, float]:
    """Errors of all arms, of what they start from, and of the surrogates."""
    data = DATA[name](seed)
    start, surrogates = fitted(data, seed, decay)
    scores = {"before": score(start, data)}
    scores |= {f"{model} itself": error(surrogates[model].values(data.test_X), data) for model in surrogates}
    for arm, targets in arms(data, surrogates, seed).items():
        scores[arm] = score(train(start, data, targets, decay=decay), data)
    return scores


def decay_cell(name: str, seed: int, decay: float) -> dict[str, float]:
    """Error of the network that everything starts from."""
    data = DATA[name](seed)
    torch.manual_seed(seed)
    return {"before": score(train(network(data.X.shape[1]), data, decay=decay), data)}


def linear_cell(name: str, seed: int) -> dict[str, float]:
    """Errors of quadratic regression; every arm chooses `alpha` and its weight by five folds."""
    data = DATA[name](seed)
    folds = list(KFold(5, shuffle=True, random_state=seed).split(data.X))
    sets = [(train_rows, test_rows, _linear_targets(data, train_rows, seed)) for train_rows, test_rows in folds]
    everything = np.arange(len(data.X))
    whole = _linear_targets(data, everything, seed)
    scores: dict[str, float] = {"process itself": error(whole["process"].values(data.test_X), data)}
    for arm in LINEAR:
        if arm not in whole:
            continue

        def validation(candidate: tuple[float, float], arm: str = arm) -> float:
            return sum(
                float(np.square(_linear_fit(data, rows, targets[arm], *candidate)(data.X[held]) - data.y[held]).sum())
                for rows, held, targets in sets
            )

        candidates = [(a, w) for a in ALPHAS for w in (WEIGHTS if arm != "data alone" else (1.0,))]
        scores[arm] = error(
            _linear_fit(data, everything, whole[arm], *min(candidates, key=validation))(data.test_X), data
        )
    return scores


def straight_cell(name: str, seed: int) -> dict[str, float]:
    """Error of ridge regression on the inputs themselves: quadratic features may be too many for the data."""
    data = DATA[name](seed)
    return {"data alone, straight": error(RidgeCV(ALPHAS).fit(data.X, data.y).predict(data.test_X), data)}


def _linear_targets(data: Data, rows: Any, seed: int) -> dict[str, Any]:
    """Points with values, or derivatives, for each arm, from these rows alone."""
    X, y = data.X[rows], data.y[rows]
    process = GaussianProcess(X, y, seed)
    more = np.concatenate([X, points_between(X, X.size, seed)])
    targets: dict[str, Any] = {
        "process": process,
        "data alone": None,
        "process: values": (X, process.values(X)),
        "process: values at n (1 + d) points": (more, process.values(more)),
        "process: derivatives": process.jacobian(X)[:, 0],
        "estimate_gradients": estimate_gradients(X, y),
    }
    if data.simulator is not None:
        targets["true derivatives"] = finite_difference_jacobian(data.simulator, X)[:, 0]
    return targets


def _linear_fit(data: Data, rows: Any, targets: Any, alpha: float, weight: float) -> Callable[[Array], Array]:
    X, y, basis = data.X[rows], data.y[rows], PolynomialFeatures(2, include_bias=False)
    if targets is None or isinstance(targets, tuple):
        points, values = targets or (X[:0], y[:0])
        model: Any = make_pipeline(basis, Ridge(alpha))
        # As in training: weight times the mean over the points beside the mean over the data.
        share = np.concatenate([np.ones(len(X)), np.full(len(points), weight * len(X) / max(len(points), 1))])
        model.fit(np.concatenate([X, points]), np.concatenate([y, values]), ridge__sample_weight=share)
        return model.predict
    return GradientEnhancedRidge(alpha, weight, basis=basis).fit(X, y, targets).predict


def best_decay(results: Results, name: str) -> float:
    """The decay with the least error on the seeds that tune."""
    return min(DECAYS, key=lambda d: np.mean([results["decay", name, seed, d]["before"] for seed in TUNING]))


def stages(results: Results) -> Iterator[tuple[str, list[tuple[Cell, Callable[[], dict[str, float]]]]]]:
    """Cells to compute; each stage needs the results of the one before."""
    yield (
        "decay",
        [
            (("decay", name, seed, d), partial(decay_cell, name, seed, d))
            for name in DATA
            for seed in TUNING
            for d in DECAYS
        ],
    )
    decays = {name: best_decay(results, name) for name in DATA}
    everything: list[tuple[Cell, Callable[[], dict[str, float]]]] = []
    for seed in SEEDS:
        for name in DATA:
            everything.append((("network", name, seed, 0.0), partial(network_cell, name, seed, decays[name])))
            everything.append((("linear", name, seed, 0.0), partial(linear_cell, name, seed)))
    yield "arms", everything
    yield "straight", [(("straight", n, seed, 0.0), partial(straight_cell, n, seed)) for n in DATA for seed in SEEDS]


def measure(path: Path) -> Results:
    """All cells, those of earlier runs included."""
    path.parent.mkdir(exist_ok=True)
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    results: Results = {tuple(line["cell"]): line["scores"] for line in lines}
    for stage, cells in stages(results):
        for cell, compute in track([c for c in cells if c[0] not in results], stage):
            results[cell] = compute()
            with path.open("a") as file:
                file.write(json.dumps({"cell": cell, "scores": results[cell]}) + "\n")
    return results


def _scores(results: Results, kind: str, name: str) -> dict[str, Array]:
    runs = [results[kind, name, seed, 0.0] for seed in SEEDS if (kind, name, seed, 0.0) in results]
    if kind == "linear":
        straight = [results["straight", name, seed, 0.0] for seed in SEEDS if (kind, name, seed, 0.0) in results]
        runs = [one | other for one, other in zip(straight, runs, strict=True)]
    return {arm: np.array([scores[arm] for scores in runs]) for arm in runs[0]}


def _ratio(scores: dict[str, Array], arm: str, to: str) -> str:
    ratio = np.log(scores[arm] / scores[to])
    test: Any = wilcoxon(ratio) if np.any(ratio != 0) else None
    p = 1.0 if test is None else test.pvalue
    return f"{np.exp(ratio.mean()):.2f} ({int((ratio < 0).sum())} of {len(ratio)}, p = {p:.2g})"


def tables(results: Results) -> str:
    """Markdown: errors by arm and data set, and the ratios that answer the question."""
    text = ""
    for kind in ("network", "linear"):
        scores = {name: _scores(results, kind, name) for name in DATA}
        rows = list(dict.fromkeys(arm for by_arm in scores.values() for arm in by_arm))
        text += markdown(
            [kind, *DATA],
            [
                [arm]
                + [
                    f"{by_arm[arm].mean():.3f} +- {by_arm[arm].std(ddof=1) / np.sqrt(len(by_arm[arm])):.3f}"
                    if arm in by_arm
                    else ""
                    for by_arm in scores.values()
                ]
                for arm in rows
            ],
        )
        comparisons = [
            ("process: derivatives", "data alone"),
            ("process: derivatives", "data alone, straight"),
            ("process: derivatives", "process: values"),
            ("process: derivatives", "process: values at n (1 + d) points"),
            ("process: derivatives", "process itself"),
            ("ensemble: derivatives", "data alone"),
            ("ensemble: derivatives", "ensemble: values"),
            ("ensemble: derivatives", "ensemble: values at n (1 + d) points"),
            ("ensemble: derivatives", "ensemble itself"),
            ("estimate_gradients", "data alone"),
            ("true derivatives", "data alone"),
        ]
        text += markdown(
            [f"{kind}: error ratio", *DATA],
            [
                [f"{arm} / {to}"]
                + [_ratio(by_arm, arm, to) if {arm, to} <= set(by_arm) else "" for by_arm in scores.values()]
                for arm, to in comparisons
                if any({arm, to} <= set(by_arm) for by_arm in scores.values())
            ],
        )
    return text


def picture(results: Results, path: Path) -> None:
    """Errors of all seeds, their mean as a bar."""
    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(DATA), figsize=(11, 4.6), layout="constrained")
    rows = list(dict.fromkeys(arm for name in DATA for arm in _scores(results, "network", name)))
    colors = {"process": "#c44e52", "ensemble": "#4c72b0"}
    for axis, name in zip(axes, DATA, strict=True):
        scores = _scores(results, "network", name)
        for place, arm in enumerate(rows):
            if arm not in scores:
                continue
            color = colors.get(arm.split(":")[0].split()[0], "#333333")
            axis.plot(scores[arm], np.full(len(scores[arm]), place), ".", color=color, alpha=0.4, markersize=5)
            axis.plot([scores[arm].mean()], [place], "|", color=color, markersize=14, markeredgewidth=2.5)
        axis.axvline(scores["data alone"].mean(), color="#333333", linewidth=0.8, linestyle=":")
        axis.set_yticks(range(len(rows)), rows if axis is axes[0] else [""] * len(rows), fontsize="small")
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.set_xlabel("test error (std of y)")
        axis.set_title(name, fontsize="medium")
    figure.suptitle(
        f"Further training of a network for {STEPS} steps ({len(SEEDS)} seeds, bar: mean, dotted: data alone)"
    )
    path.parent.mkdir(exist_ok=True, parents=True)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    SEEDS = SEEDS[: parser.parse_args().seeds]
    torch.set_num_threads(1)
    measured = measure(ROOT / "out" / "further_training.jsonl")
    summary = tables(measured)
    (ROOT / "out" / "further_training.md").write_text(summary)
    print(summary)
    picture(measured, ROOT / "docs" / "images" / "further_training.png")
