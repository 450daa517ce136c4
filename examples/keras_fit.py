"""Population gradient in Keras's `fit`, on scikit-learn's handwritten digits: two lines more (marked below).

100 real scans to train on, 1,697 to test on, nothing tuned on either. Every method starts from the same weights and
sees the same batches. Runs on the installed backend; choose among several with ``KERAS_BACKEND``:
``KERAS_BACKEND=jax python examples/keras_fit.py``. Takes a minute or two.
"""

# ruff: noqa: E402 - Keras reads its backend when it is imported
import importlib.util
import os
from dataclasses import dataclass
from typing import Any

BACKENDS = ("tensorflow", "jax", "torch")
if "KERAS_BACKEND" not in os.environ:
    os.environ["KERAS_BACKEND"] = next(name for name in BACKENDS if importlib.util.find_spec(name))

import keras
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from gradwise.keras import PopulationCallback  # the first line more

TRAINING_ROWS, BATCH, EPOCHS, SEEDS = 100, 20, 20, 3


@dataclass(frozen=True)
class Method:
    """One row of the comparison; `passes` is its cost per step in forward-backward passes."""

    name: str
    passes: int = 1
    population: dict[str, Any] | None = None
    epochs: int = EPOCHS


METHODS = (
    Method("AdamW"),
    Method("AdamW, 8 times the steps", 8, epochs=8 * EPOCHS),
    Method("8 members, sigma 0 (control)", 8, {"sigma": 0.0}),
    Method("8 members, sigma 0.1 (default)", 8, {}),
    Method("8 members, sigma 0.1, sharded", 1, {"sharded": True}),
    Method("1 member a step, sigma 0.1", 1, {"population_size": 1, "antithetic": False}),
)


def split(seed: int) -> list[Any]:
    """Training and test images as rows of 64 pixels from 0 to 1, training and test labels."""
    images, labels = load_digits(return_X_y=True)
    return train_test_split(
        (images / 16).astype("float32"), labels, train_size=TRAINING_ROWS, stratify=labels, random_state=seed
    )


def make_model() -> Any:
    """A small network, as one would write and compile it."""
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(128, activation="relu"), keras.layers.Dense(10)])
    model.compile(
        optimizer=keras.optimizers.AdamW(3e-3),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def train(method: Method, seed: int, train_x: np.ndarray, train_y: np.ndarray) -> Any:
    """Train one model; `fit` is called as in any script."""
    keras.utils.set_random_seed(seed)
    model = make_model()
    population = [] if method.population is None else [PopulationCallback(**method.population, seed=seed)]
    model.fit(
        train_x,
        train_y,
        batch_size=BATCH,
        epochs=method.epochs,
        verbose=0,
        callbacks=population,  # the second: callbacks=[PopulationCallback()]
    )
    return model


def score(model: Any, x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Accuracy in percent and log-loss in nats."""
    results = model.evaluate(x, y, batch_size=len(x), verbose=0, return_dict=True)
    return 100 * results["accuracy"], results["loss"]


def run(method: Method, seed: int) -> tuple[float, float]:
    """Scores of one method on the test data of one seed."""
    train_x, test_x, train_y, test_y = split(seed)
    return score(train(method, seed, train_x, train_y), test_x, test_y)


if __name__ == "__main__":
    cells = [(method, seed) for method in METHODS for seed in range(SEEDS)]
    scores = [run(*cell) for cell in track(cells, description=f"digits, Keras on {keras.config.backend()}")]
    means = np.reshape(scores, (len(METHODS), SEEDS, 2)).mean(axis=1)
    table = Table("100 digits", "passes", "accuracy, %", "log-loss", caption=f"means over {SEEDS} seeds, test data")
    for method, (accuracy, loss) in zip(METHODS, means, strict=True):
        table.add_row(method.name, f"{method.passes}x", f"{accuracy:.2f}", f"{loss:.4f}")
    Console().print(table)
