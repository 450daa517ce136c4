"""PopulationCallback against a training loop by hand, and against plain `fit` where sigma is 0."""

from typing import Any

import keras
import numpy as np
import pytest
from keras_cells import (
    ATOL,
    BACKEND,
    KERAS_WARNING,
    MODELS,
    RTOL,
    WIDE,
    assert_same,
    batches_of,
    compiled,
    data,
    fit,
    floats,
    state_of,
    streams,
    train_by_hand,
    weights_of,
)

from gradwise.keras import PopulationCallback

pytestmark = pytest.mark.filterwarnings(KERAS_WARNING)


def assert_as_by_hand(
    name: str,
    *,
    optimizer: Any = None,
    rows: int = 10,
    epochs: int = 1,
    sharded: bool = False,
    perturb: Any = None,
    **how: Any,
) -> None:
    """Train twice in the widest floats, and compare weights, state and what the members said."""
    how = {"sigma": 0.3, "seed": 5, **how}
    with floats(WIDE):
        x, y = data(rows)
        one, other = (compiled(name, optimizer=None if optimizer is None else optimizer()) for _ in range(2))
        other(x[:1])  # builds what is not
        for model in (one, other):
            keras.utils.set_random_seed(1)  # which sets torch's stream, that dropout without a seed draws from
            model.optimizer.build(model.trainable_variables) if model.built else None
            if model is one:
                callback = PopulationCallback(how.pop("size", 4), sharded=sharded, perturb=perturb, **how)
                if not one.built:
                    one(x[:1])
                    one.optimizer.build(one.trainable_variables)
                start = weights_of(one)
                history = fit(one, x, y, callback, epochs=epochs)
            else:
                for variable, value in zip(other.trainable_variables, start, strict=True):
                    variable.assign(value)
                said = train_by_hand(
                    other, batches_of(x, y, epochs=epochs), callback.population, sharded=sharded, perturb=perturb
                )
        state, expected = state_of(one), state_of(other)
        for both in (state, expected):
            for key in [key for key in both if key.startswith("metric")]:
                del both[key]
        assert_same(state, expected, rtol=RTOL, atol=ATOL)
    steps = len(said.loss) // epochs
    last = slice(len(said.loss) - steps, None)
    assert history["loss"][-1] == pytest.approx(np.average(said.loss[last], weights=said.rows[last]), rel=1e-5)
    assert history["population_agreement"][-1] == pytest.approx(np.mean(said.agreement[last]), rel=1e-4)
    assert history["population_spread"][-1] == pytest.approx(np.mean(said.spread[last]), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "unseeded dropout"])
def test_trains_as_the_loop_by_hand(name: str) -> None:
    assert_as_by_hand(name)


@pytest.mark.parametrize("name", ["sequential", "batch_norm", "dropout"])
def test_shards_train_as_the_loop_by_hand(name: str) -> None:
    """10 rows are batches of 4, 4 and 2, the last with fewer rows than members; 11 have a member with two of three."""
    assert_as_by_hand(name, rows=10 if name == "dropout" else 11, sharded=True, size=2 if name == "batch_norm" else 4)


@pytest.mark.parametrize("name", MODELS)
def test_sigma_zero_is_plain_fit(name: str) -> None:
    one, other = compiled(name), compiled(name)
    x, y = data()
    states, histories, ends = [], [], []
    for model in (one, other):
        keras.utils.set_random_seed(2)
        callbacks = [PopulationCallback(4, 0.0, seed=0)] if model is one else []
        if not model.built:
            model(x[:1])
        histories.append(fit(model, x, y, *callbacks, epochs=2))
        states.append(state_of(model))
        ends.append(streams())
    # XLA fuses the two programs differently; TensorFlow sums sparse gradients of embeddings in another order.
    rounding = {"rtol": 1e-5, "atol": 1e-6}
    exact = BACKEND != "jax" and not (BACKEND == "tensorflow" and name == "embedding")
    assert_same(*states, **({} if exact else rounding))
    assert ends[0] == ends[1]
    agreement, spread = (histories[0].pop(f"population_{said}") for said in ("agreement", "spread"))
    assert agreement == pytest.approx([1, 1], rel=1e-6)
    assert spread == [0, 0]
    if exact:
        assert histories[0] == histories[1]
