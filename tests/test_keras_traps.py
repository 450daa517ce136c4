"""Silent traps of training Keras models by their derivatives: each is said once, and nothing else is."""

import contextlib
import warnings
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops
from keras_matching_cells import KERAS_WARNING, Subclassed, mlp, smooth_data

from gradwise_keras._attach import attach_gradient_matching
from gradwise_keras._matching_loss import GradientMatching
from gradwise_keras._traps import kinks_between_linear_parts
from gradwise_keras._with_derivatives import WithDerivatives

pytestmark = pytest.mark.filterwarnings(KERAS_WARNING)


def net(*middle: Any, activation: Any = None) -> Any:
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((3,)), layers.Dense(6, activation), *middle, layers.Dense(2)])


def functional(act: Any) -> Any:
    inputs = keras.Input((3,))
    return keras.Model(inputs, layers.Dense(2)(act(layers.Dense(6)(inputs))))


class Own(layers.Layer):
    """Unknown: it may be smooth."""

    def call(self, x: Any) -> Any:
        return ops.tanh(x)


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (lambda: net(activation="relu"), {"relu"}),
        (lambda: net(layers.LeakyReLU()), {"LeakyReLU"}),
        (lambda: net(layers.Activation("hard_tanh"), layers.PReLU()), {"hard_tanh", "PReLU"}),
        (lambda: net(activation=layers.ReLU()), {"ReLU"}),
        (lambda: net(layers.BatchNormalization(), layers.ReLU(), layers.Dropout(0.1)), {"ReLU"}),
        (lambda: functional(ops.relu), {"Relu"}),
        (lambda: functional(lambda h: ops.relu(h) + h), {"Relu"}),
        (lambda: keras.Sequential([net(activation="relu")]), {"relu"}),
        (lambda: net(), set()),  # linear: no kinks to move
        (lambda: net(activation="tanh"), set()),
        (lambda: net(activation="gelu"), set()),
        (lambda: net(layers.Dense(4, "relu"), layers.Dense(4, "silu")), set()),
        (lambda: net(layers.LayerNormalization(), layers.ReLU()), set()),
        (lambda: net(Own(), layers.ReLU()), set()),
        (lambda: functional(lambda h: ops.relu(h) * h), set()),
        (lambda: functional(lambda h: ops.softplus(ops.relu(h))), set()),
        (lambda: net(activation=lambda h: h**2), set()),
        (Subclassed, set()),
    ],
)
def test_what_is_linear_between_kinks(model: Any, names: set[str]) -> None:
    assert kinks_between_linear_parts(model()) == names


def ours(caught: list[warnings.WarningMessage]) -> list[str]:
    """Not Keras's own, which says on some backends that a variable has no gradient."""
    messages = [str(warning.message) for warning in caught]
    return [message for message in messages if "between kinks" in message or "of `model` is free" in message]


def wrapped_fit(model: Any, loss: Any, loss_weights: Any = None, times: int = 1) -> list[str]:
    x, y, dydx = smooth_data()
    wrapped: Any = WithDerivatives(model)
    wrapped.compile("sgd", loss=loss, loss_weights=loss_weights)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        for _ in range(times):
            wrapped.fit(x, {"y": y, "dydx": dydx}, batch_size=12, verbose=0)
    return ours(caught)


def attached_fit(model: Any, loss: Any, matching: GradientMatching | None = None) -> list[str]:
    x, y, dydx = smooth_data()
    model.compile("sgd", loss=loss)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        with attach_gradient_matching(model, matching):
            for _ in range(2):
                model.fit(x, {"y": y, "dydx": dydx}, batch_size=12, verbose=0)
    return ours(caught)


def test_kinks_are_said_once_by_fit() -> None:
    messages = wrapped_fit(net(activation="relu"), {"y": "mse", "dydx": "mse"}, times=2)
    assert len(messages) == 1
    assert "linear between kinks (relu)" in messages[0]
    assert "smooth activation" in messages[0]
    messages = attached_fit(net(activation="relu"), "mse")
    assert len(messages) == 1
    assert "linear between kinks (relu)" in messages[0]


def test_a_free_offset_is_said_once_by_fit() -> None:
    for loss, weights in (
        ({"dydx": GradientMatching()}, None),
        ({"y": None, "dydx": "mse"}, None),
        ({"y": "mse", "dydx": "mse"}, {"y": 0.0, "dydx": 1.0}),
    ):
        messages = wrapped_fit(mlp(), loss, weights, times=2)
        assert len(messages) == 1
        assert "the offset of `model` is free" in messages[0]
    model = mlp()
    model.compile("sgd", loss=None)
    x, y, dydx = smooth_data()
    warned = pytest.warns(UserWarning, match="the offset of `model` is free")
    refused = contextlib.suppress(ValueError)  # by Keras, on some backends: "No loss to compute"
    with attach_gradient_matching(model), warned, refused:
        model.fit(x, {"y": y, "dydx": dydx}, batch_size=12, verbose=0)


def test_no_false_alarms() -> None:
    assert wrapped_fit(mlp(), {"y": "mse", "dydx": GradientMatching()}) == []
    assert wrapped_fit(mlp(), {"y": "mse", "dydx": "mse"}, {"y": 1.0, "dydx": 0.5}) == []
    assert wrapped_fit(net(activation="relu"), {"y": "mse"}) == []  # derivatives are not trained
    assert attached_fit(mlp(), "mse") == []
    assert attached_fit(net(activation="relu"), "mse", GradientMatching(0.0)) == []


def test_derivatives_alone_indeed_leave_the_offset_where_it_was() -> None:
    x, y, dydx = smooth_data()
    model = mlp()
    model.layers[-1].bias.assign([3.0, -2.0])
    wrapped: Any = WithDerivatives(model)
    wrapped.compile("sgd", loss={"dydx": GradientMatching()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        wrapped.fit(x, {"y": y, "dydx": dydx}, epochs=3, verbose=0)
    np.testing.assert_array_equal(ops.convert_to_numpy(model.layers[-1].bias), [3.0, -2.0])
