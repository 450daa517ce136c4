"""What an epoch of `fit` costs with a population and with derivatives, and what the first one costs, on each backend.

Ratios to the epoch of the same model under plain `fit` in the same process, medians of interleaved repeats; the first
epoch, with tracing and compiling, in seconds. Each backend runs in a process of its own.
Run: ``python benchmarks/keras_speed.py``; writes ``out/keras_speed.json`` and a Markdown table beside it.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BACKENDS = ("tensorflow", "jax", "torch")
BATCH, BATCHES = 64, 20
Fit = Callable[[], object]


def models() -> dict[str, tuple[Callable[[], Any], tuple[int, ...]]]:
    """Keras models by name: how to make them, and the shape of an input."""
    import keras
    from keras import layers

    def mlp() -> Any:
        return keras.Sequential([keras.Input((64,)), layers.Dense(128, activation="tanh"), layers.Dense(10)])

    def cnn() -> Any:
        x = inputs = keras.Input((16, 16, 3))
        x = layers.Conv2D(16, 3, padding="same")(x)
        for _ in range(3):
            y = layers.Conv2D(16, 3, padding="same")(layers.ReLU()(layers.BatchNormalization()(x)))
            x = layers.Add()([x, y])
        return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))

    return {"MLP 64-128-10": (mlp, (64,)), "residual CNN 16x16": (cnn, (16, 16, 3))}


def fits(make: Callable[[], Any], shape: tuple[int, ...], batches: int) -> dict[str, Fit]:
    """An epoch of each way of training, plain first."""
    import keras
    import numpy as np

    from gradwise.keras import GradientMatching, PopulationCallback, PopulationGradient, WithDerivatives

    rng = np.random.default_rng(0)
    x = rng.normal(size=(batches * BATCH, *shape)).astype("float32")
    y, dydx = rng.normal(size=(len(x), 10)).astype("float32"), rng.normal(size=x.shape).astype("float32")

    def fit(model: Any, optimizer: Any, targets: Any, *callbacks: Any, **compiled: Any) -> Fit:
        model.compile(optimizer=optimizer, **(compiled or {"loss": "mse"}))
        return lambda: model.fit(x, targets, batch_size=BATCH, verbose=0, callbacks=list(callbacks))

    sgd: dict[str, Any] = {"learning_rate": 1e-3, "momentum": 0.9}
    ways = {
        "plain": (),
        "8 members": (PopulationCallback(),),
        "8 members, sharded": (PopulationCallback(sharded=True),),
        "1 member": (PopulationCallback(1, antithetic=False),),
    }
    result = {name: fit(make(), keras.optimizers.SGD(**sgd), y, *callbacks) for name, callbacks in ways.items()}
    result["PopulationGradient"] = fit(make(), PopulationGradient(keras.optimizers.SGD(**sgd)), y)
    base = make()
    scalar = keras.Model(base.inputs, keras.ops.mean(base.outputs[0], axis=1, keepdims=True))
    result["plain, one output"] = fit(scalar, keras.optimizers.SGD(**sgd), y[:, :1])
    losses = {"y": "mse", "dydx": GradientMatching(scale="none")}
    derived = WithDerivatives(keras.models.clone_model(scalar))
    targets = {"y": y[:, :1], "dydx": dydx}
    result["WithDerivatives, one output"] = fit(derived, keras.optimizers.SGD(**sgd), targets, loss=losses)
    return result


def measured(
    backend: str, names: list[str] | None, repeats: int, batches: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Seconds of the first epoch and of a later one, by model and way; in a process with this backend."""
    from timing import interleaved

    result: dict[str, dict[str, dict[str, float]]] = {}
    for model, (make, shape) in models().items():
        if names and model not in names:
            continue
        steps = fits(make, shape, batches)
        first: dict[str, float] = {}
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            first[name] = time.perf_counter() - start
            print(f"{backend}: {model}, {name}: compiled", file=sys.stderr, flush=True)
        timings = interleaved(steps, repeats, floor=0)
        result[model] = {name: {"first": first[name], "later": timings[name].median} for name in steps}
    return result


def rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table: an epoch's cost as a ratio, the first epoch in seconds."""
    backends = list(results)
    body: list[list[str]] = []
    for model in results[backends[0]]:
        for name in results[backends[0]][model]:
            plain = "plain, one output" if "one output" in name else "plain"
            cells = [
                f"{times[name]['later'] / times[plain]['later']:.2f}x ({times[name]['first']:.1f} s)"
                for times in (results[backend][model] for backend in backends)
            ]
            body.append([model, name, *cells])
    return ["model", "way", *(f"{backend}: epoch (first)" for backend in backends)], body


def main(arguments: list[str] | None = None) -> None:
    """Measure every backend, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=BACKENDS)
    parser.add_argument("--models", nargs="+", help="names as in the table; all by default")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, default=BATCHES)
    parser.add_argument("--out", type=Path, default=Path("out/keras_speed.json"))
    parser.add_argument("--here", action="store_true", help="measure one backend in this process, as JSON")
    options = parser.parse_args(arguments)
    if options.here:
        print(json.dumps(measured(options.backends[0], options.models, options.repeats, options.batches)))
        return
    from reports import markdown, print_table, write_json
    from rich.console import Console

    results: dict[str, Any] = {}
    for backend in options.backends:
        command = [sys.executable, __file__, "--here", "--backends", backend]
        command += ["--repeats", str(options.repeats), "--batches", str(options.batches)]
        command += ["--models", *options.models] if options.models else []
        environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "2"}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        results[backend] = json.loads(done.stdout.splitlines()[-1])
    header, body = rows(results)
    write_json(options.out, results)
    options.out.with_suffix(".md").write_text(markdown(header, body))
    print_table(Console(width=150), header, body)


if __name__ == "__main__":
    main()
