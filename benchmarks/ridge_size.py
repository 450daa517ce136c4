"""Seconds and memory of `GradientEnhancedRidge` at 10,000 features or a million rows, one thread.

Each case runs in a process of its own, whose peak memory before and after the fit is compared.
Run: ``python benchmarks/ridge_size.py``; prints the table of ``docs/ridge.md`` and writes ``out/ridge_size.json``.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from reports import markdown, write_json
from rich.progress import track
from sklearn.preprocessing import PolynomialFeatures

from gradwise import GradientEnhancedRidge

__all__ = ["CASES", "measure", "table"]

# samples, inputs, degree of the polynomial
CASES = ((100, 10_000, 1), (1_000, 10_000, 1), (1_000_000, 20, 1), (1_000_000, 10, 2))


def measure(n: int, n_inputs: int, degree: int) -> dict[str, Any]:
    """Fit one made-up data set."""
    rng = np.random.default_rng(0)
    X, slope = rng.standard_normal((n, n_inputs)), rng.standard_normal(n_inputs) / n_inputs**0.5
    linear = X @ slope
    y, dydx = linear**degree, np.empty((n, n_inputs))
    for start in range(0, n, 10_000):
        part = slice(start, start + 10_000)
        dydx[part] = (degree * linear[part] ** (degree - 1))[:, None] * slope
        dydx[part] += 0.1 * rng.standard_normal(dydx[part].shape)
    basis = PolynomialFeatures(degree, include_bias=False) if degree > 1 else None
    GradientEnhancedRidge(basis=basis).fit(X[:50, :5], y[:50], dydx[:50, :5])  # imports, allocations
    before = _peak()
    start = time.process_time()
    model = GradientEnhancedRidge(basis=basis).fit(X, y, dydx)
    seconds = time.process_time() - start
    features = model.coef_.size
    return {
        "samples": n,
        "inputs": n_inputs,
        "features": features,
        "seconds": seconds,
        "data_mb": (X.nbytes + y.nbytes + dydx.nbytes) / 2**20,
        "extra_mb": max(0.0, _peak() - before),
        "stacked_mb": n * (1 + n_inputs) * features * 8 / 2**20,
    }


def table(results: list[dict[str, Any]]) -> str:
    """As Markdown."""
    header = ["samples", "inputs", "features", "seconds", "data, MB", "memory of the fit, MB", "stacked matrix, GB"]
    rows = [
        [f"{r[k]:,}" for k in ("samples", "inputs", "features")]
        + [f"{r['seconds']:.2g}", f"{r['data_mb']:.0f}", f"{r['extra_mb']:.0f}", f"{r['stacked_mb'] / 1024:.2g}"]
        for r in results
    ]
    return markdown(header, rows)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measure(*map(int, sys.argv[1:]))))
        return
    results: list[dict[str, Any]] = []
    for case in track(CASES, description="sizes"):
        command = [sys.executable, __file__, *map(str, case)]
        results.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    write_json(Path("out/ridge_size.json"), results)
    print(table(results))


if __name__ == "__main__":
    main()
