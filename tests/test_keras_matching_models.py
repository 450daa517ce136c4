"""WithDerivatives: exact derivatives of any model, trained by Keras's own fit."""

import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers
from keras_matching_cells import (
    BATCH_NORM_WARNING,
    KERAS_WARNING,
    OwnStep,
    architecture,
    mlp,
    numpy_of,
    one_by_one,
    one_step,
    smooth_data,
    weights_of,
)

from gradwise._matching import gradient_matching_loss
from gradwise._matching_scale import matching_scale
from gradwise_keras._matching_loss import GradientMatching
from gradwise_keras._with_derivatives import WithDerivatives

pytestmark = [pytest.mark.filterwarnings(KERAS_WARNING), pytest.mark.filterwarnings(BATCH_NORM_WARNING)]

BACKEND = keras.config.backend()
NAMES = ["functional", "rank one", "subclassed", "image", "lstm", "attention"]


def compiled(model: keras.Model, matching: Any = None, rate: float = 1.0, **options: Any) -> Any:
    wrapped: Any = WithDerivatives(model)
    loss = {"y": "mse", "dydx": GradientMatching() if matching is None else matching}
    wrapped.compile(keras.optimizers.SGD(rate), loss=loss, **options)
    return wrapped


def targets_of(y: Any, dydx: Any) -> dict[str, Any]:
    return {"y": y, "dydx": dydx}


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_are_exact_and_trainable(name: str) -> None:
    model, shape = architecture(name)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, *shape)).astype("float32")
    wrapped: Any = WithDerivatives(model)
    outputs = wrapped.predict_on_batch(x)
    y = model.predict_on_batch(x)
    np.testing.assert_allclose(outputs["y"], y, rtol=1e-5, atol=1e-6)
    n_outputs = 1 if y.ndim == 1 else y.shape[1]
    assert outputs["dydx"].shape == (x.shape if n_outputs == 1 else (3, n_outputs, *shape))
    truth = one_by_one(model, x)
    np.testing.assert_allclose(outputs["dydx"].reshape(truth.shape), truth, atol=2e-3)
    # Second derivatives: the slope of the loss along the gradient that one step applies.
    targets = targets_of(rng.normal(size=y.shape), rng.normal(size=outputs["dydx"].shape))
    wrapped.compile(keras.optimizers.SGD(1.0), loss={"y": "mse", "dydx": GradientMatching(scale="none")})
    before = weights_of(wrapped)
    gradient = one_step(wrapped, x, targets)
    norm = np.sqrt(sum(np.sum(part**2) for part in gradient))
    losses = []
    for step in (3e-3, -3e-3):
        for variable, weight, part in zip(wrapped.trainable_weights, before, gradient, strict=True):
            variable.assign(weight + step * part / norm)
        losses.append(wrapped.test_on_batch(x, targets, return_dict=True)["loss"])
    assert (losses[0] - losses[1]) / 6e-3 == pytest.approx(norm, rel=5e-3)  # step**2 and float32 losses


@pytest.mark.skipif(BACKEND != "tensorflow", reason="of TensorFlow")
def test_tensorflow_gets_its_moments_back() -> None:
    import tensorflow as tf

    original = tf.nn.moments
    seen = []

    def look(x: Any) -> Any:
        seen.append(tf.nn.moments)
        return x

    model = keras.Sequential([keras.Input((3,)), layers.Lambda(look), layers.Dense(1)])
    WithDerivatives(model)(np.ones((2, 3)))
    assert seen[-1] is not original
    assert tf.nn.moments is original
    with pytest.raises(ValueError, match="`model` must return values of shape"):
        WithDerivatives(keras.Sequential([keras.Input((2, 3)), layers.Dense(1)]))(np.ones((2, 2, 3)))
    assert tf.nn.moments is original


def with_batch_norm() -> Any:
    keras.utils.set_random_seed(0)
    stack = [layers.Dense(8, "tanh"), layers.BatchNormalization(momentum=0.5), layers.Dense(2)]
    return keras.Sequential([keras.Input((3,)), *stack])


def test_batch_normalisation_gives_derivatives_per_row() -> None:
    x, _, _ = smooth_data()
    model: Any = with_batch_norm()
    outputs = {key: numpy_of(value) for key, value in WithDerivatives(model)(x, training=True).items()}
    moving = [numpy_of(v) for v in model.non_trainable_weights]
    np.testing.assert_allclose(outputs["dydx"], one_by_one(model, x), atol=2e-3)
    twin: Any = with_batch_norm()
    np.testing.assert_allclose(outputs["y"], numpy_of(twin(x, training=True)), rtol=1e-5, atol=1e-6)
    for value, variable in zip(moving, twin.non_trainable_weights, strict=True):  # updated once
        np.testing.assert_allclose(value, numpy_of(variable), rtol=1e-6)


def test_batch_normalisation_trains_the_derivatives_of_the_moving_statistics() -> None:
    x, _, dydx = smooth_data()
    model: Any = WithDerivatives(with_batch_norm())
    loss = {"y": "mse", "dydx": GradientMatching(scale="none")}
    model.compile(keras.optimizers.SGD(1.0), loss=loss, loss_weights={"y": 0.0, "dydx": 1.0})
    before = weights_of(model)
    gradient = one_step(model, x, targets_of(np.zeros((12, 2)), dydx))
    norm = np.sqrt(sum(np.sum(part**2) for part in gradient))
    losses = []
    for step in (1e-2, -1e-2):  # with the statistics that the step left, held constant
        for variable, weight, part in zip(model.trainable_weights, before, gradient, strict=True):
            variable.assign(weight + step * part / norm)
        losses.append(model.test_on_batch(x, targets_of(np.zeros((12, 2)), dydx), return_dict=True)["loss"])
    assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(norm, rel=5e-3)  # step**2 and float32 losses


@pytest.mark.filterwarnings("default:`model` has batch normalisation:UserWarning")
def test_batch_normalisation_is_said_once_and_not_if_frozen() -> None:
    x, _, _ = smooth_data()
    model: Any = WithDerivatives(with_batch_norm())
    with pytest.warns(UserWarning, match="its input derivatives are taken with the moving statistics"):
        model(x, training=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="`model` has batch")
        model(x, training=True)
        frozen = with_batch_norm()
        frozen.layers[1].trainable = False
        np.testing.assert_allclose(
            numpy_of(WithDerivatives(frozen)(x, training=True)["dydx"]), one_by_one(frozen, x), atol=2e-3
        )


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("normalised", [False, True])
def test_values_and_derivatives_share_dropout_masks_and_draw_once(normalised: bool, seed: int | None) -> None:
    x = np.random.default_rng(0).normal(size=(20, 6)).astype("float32")
    stack: list[Any] = [layers.Dropout(0.5, seed=seed), layers.Dense(1, use_bias=False)]
    if normalised:  # with statistics 0 and 1, and a momentum that keeps them, this is the identity but for epsilon
        stack.append(layers.BatchNormalization(momentum=1.0, epsilon=1e-7))

    def build() -> Any:
        keras.utils.set_random_seed(0)
        return keras.Sequential([keras.Input((6,)), *[type(layer).from_config(layer.get_config()) for layer in stack]])

    model: Any = build()
    outputs = {key: numpy_of(value) for key, value in WithDerivatives(model)(x, training=True).items()}
    again = numpy_of(model(x, training=True))
    twin: Any = build()
    np.testing.assert_allclose(outputs["y"], numpy_of(twin(x, training=True)), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(again, numpy_of(twin(x, training=True)), rtol=1e-5, atol=1e-5)  # the next masks
    linear = np.sum(x * outputs["dydx"], axis=1)
    values = outputs["y"][:, 0]
    assert len(np.unique(np.round(outputs["dydx"][:, 0], 5))) == 2  # dropped or not
    if normalised:  # y is normalised by the batch, which is an increasing linear function of what went in
        assert np.corrcoef(values, linear)[0, 1] == pytest.approx(1.0, abs=1e-6)  # rounding
    else:
        np.testing.assert_allclose(values, linear, atol=1e-5)  # float32


def test_a_step_advances_state_as_a_plain_step_does() -> None:
    x, y, dydx = smooth_data()

    def build() -> Any:
        keras.utils.set_random_seed(0)
        stack = [layers.Dense(8, "tanh"), layers.BatchNormalization(), layers.Dropout(0.5, seed=3), layers.Dense(2)]
        return keras.Sequential([keras.Input((3,)), *stack])

    plain: Any = build()
    plain.compile(keras.optimizers.SGD(0.1), loss="mse")
    plain.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)
    wrapped: Any = WithDerivatives(build())
    wrapped.compile(
        keras.optimizers.SGD(0.1), loss={"y": "mse", "dydx": GradientMatching()}, loss_weights={"y": 1.0, "dydx": 0.0}
    )
    wrapped.fit(x, targets_of(y, dydx), batch_size=4, epochs=2, shuffle=False, verbose=0)
    for ours, theirs in zip(wrapped.model.variables, plain.variables, strict=True):
        np.testing.assert_allclose(numpy_of(ours), numpy_of(theirs), rtol=1e-5, atol=1e-6, err_msg=theirs.path)


class Penalised(layers.Layer):
    def call(self, x: Any) -> Any:
        ops: Any = keras.ops
        self.add_loss(0.1 * ops.mean(x**2))
        return x


@pytest.mark.parametrize("normalised", [False, True])
def test_penalties_of_layers_count_once(normalised: bool) -> None:
    x, y, dydx = smooth_data()

    def build() -> Any:
        keras.utils.set_random_seed(0)
        stack = [layers.Dense(8, "tanh", kernel_regularizer="l2"), Penalised(), layers.Dense(2)]
        return keras.Sequential([keras.Input((3,)), *([layers.BatchNormalization()] if normalised else []), *stack])

    plain: Any = build()
    plain.compile(keras.optimizers.SGD(0.1), loss="mse")
    wrapped: Any = WithDerivatives(build())
    wrapped.compile(keras.optimizers.SGD(0.1), loss={"y": "mse"})
    for _ in range(3):
        ours = wrapped.train_on_batch(x, targets_of(y, dydx), return_dict=True)["loss"]
        assert ours == pytest.approx(plain.train_on_batch(x, y, return_dict=True)["loss"], rel=1e-5)  # float32
    for a, b in zip(wrapped.model.variables, plain.variables, strict=True):
        np.testing.assert_allclose(numpy_of(a), numpy_of(b), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision(policy: str) -> None:
    x, y, dydx = smooth_data()
    exact = numpy_of(WithDerivatives(mlp())(x)["dydx"])
    before = keras.config.dtype_policy()
    try:
        keras.config.set_dtype_policy(policy)
        wrapped: Any = compiled(mlp(), rate=0.05)
        outputs = wrapped(x)
        assert "float32" in str(outputs["dydx"].dtype)
        np.testing.assert_allclose(numpy_of(outputs["dydx"]), exact, atol=0.05)  # bfloat16: 8 bits
        losses = wrapped.fit(x, targets_of(y, dydx), epochs=30, verbose=0).history["loss"]
        assert losses[-1] < 0.7 * losses[0]
        assert isinstance(wrapped.optimizer, keras.optimizers.LossScaleOptimizer) == (policy == "mixed_float16")
    finally:
        keras.config.set_dtype_policy(before)


OPTIONS: list[dict[str, Any]] = [{"jit_compile": False}, {"jit_compile": True}, {"run_eagerly": True}]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler imports what torch deprecates,
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # and looks at tensors that have none
@pytest.mark.parametrize("options", [*OPTIONS, {"steps_per_execution": 2}], ids=str)
def test_ways_to_run_agree(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    if BACKEND == "torch":
        if "steps_per_execution" in options:
            pytest.skip("Keras does not support it there")
        import torch

        # Without inductor, whose import alone takes long; what cannot differentiate derivatives comes before it.
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    x, y, dydx = smooth_data(n=8)
    reference, other = (compiled(mlp(), rate=0.1, **o) for o in ({}, options))
    for model in (reference, other):
        model.fit(x, targets_of(y, dydx), batch_size=4, shuffle=False, verbose=0)
    for a, b in zip(weights_of(reference), weights_of(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # compilers round differently


def test_fit_evaluate_and_predict_give_what_the_core_gives() -> None:
    x, y, dydx = smooth_data(n=40)
    model: Any = mlp()
    wrapped: Any = WithDerivatives(model)
    wrapped.compile(
        keras.optimizers.SGD(0.0),
        loss={"y": "mse", "dydx": GradientMatching(scale="per_input")},
        loss_weights={"y": 2.0, "dydx": 0.5},
        metrics={"y": ["mae"], "dydx": ["mae"]},
    )
    weights = {"y": np.ones(40), "dydx": (np.arange(40) % 4 > 0).astype("float32")}
    history = wrapped.fit(
        x, targets_of(y, dydx), sample_weight=weights, validation_split=0.25, batch_size=30, verbose=0
    ).history
    predicted = wrapped.predict(x, verbose=0)
    np.testing.assert_allclose(predicted["y"], numpy_of(model(x)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(predicted["dydx"], one_by_one(model, x), atol=2e-3)
    train = slice(0, 30)
    known = np.broadcast_to(weights["dydx"][train, None, None] > 0, (30, 2, 3))
    scale = matching_scale(x[train], y[train], dydx[train], mask=known, scale="per_input", xp=np).scale

    def core(rows: slice, weight: Any) -> float:
        return float(
            gradient_matching_loss(predicted["dydx"][rows], dydx[rows], sample_weight=weight, scale=scale, xp=np)
        )

    expected = core(train, weights["dydx"][train])
    assert history["dydx_loss"][0] == pytest.approx(expected, rel=1e-4)  # float32
    assert history["val_dydx_loss"][0] == pytest.approx(core(slice(30, 40), weights["dydx"][30:]), rel=1e-4)
    mse = np.mean((predicted["y"][train] - y[train]) ** 2)
    assert history["loss"][0] == pytest.approx(2 * mse + 0.5 * expected, rel=1e-4)
    mean_error = np.mean(np.abs(predicted["dydx"] - dydx))
    logs = wrapped.evaluate(x, targets_of(y, dydx), verbose=0, return_dict=True)
    assert logs["dydx_mae"] == pytest.approx(mean_error, rel=1e-4)
    assert set(logs) == {"loss", "y_loss", "dydx_loss", "y_mae", "dydx_mae"}


def test_a_second_fit_of_the_scales_reaches_compiled_steps() -> None:
    x, y, dydx = smooth_data()
    matching = GradientMatching()
    wrapped: Any = compiled(mlp(), matching, rate=0.0)
    evaluate = {"verbose": 0, "return_dict": True}
    first = wrapped.fit(x, targets_of(y, dydx), verbose=0).history["dydx_loss"][0]
    # Once, not again, for other data; to rounding, as rows are shuffled.
    assert wrapped.fit(x, targets_of(2 * y, dydx), verbose=0).history["dydx_loss"][0] == pytest.approx(first, rel=1e-5)
    assert wrapped.evaluate(x, targets_of(y, dydx), **evaluate)["dydx_loss"] == pytest.approx(first, rel=1e-5)
    matching.fit(x, 2 * y, dydx)  # sigma_y**2 is four times as large, and so is the loss
    again = wrapped.fit(x, targets_of(y, dydx), verbose=0).history["dydx_loss"][0]
    assert again == pytest.approx(4 * first, rel=1e-5)
    assert wrapped.evaluate(x, targets_of(y, dydx), **evaluate)["dydx_loss"] == pytest.approx(again, rel=1e-5)


class Batches(keras.utils.PyDataset):
    def __init__(self, *arrays: Any) -> None:
        super().__init__()
        self.arrays = arrays

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        x, y, dydx = (array[4 * index : 4 * index + 4] for array in self.arrays)
        return x, targets_of(y, dydx)


@pytest.mark.parametrize("kind", ["pydataset", "tf.data", "loader"])
def test_datasets_set_the_scales_by_their_first_batch(kind: str) -> None:
    x, y, dydx = smooth_data()
    data: Any = Batches(x, y, dydx)
    if kind == "tf.data":
        import tensorflow as tf

        arrays: Any = (x, targets_of(y, dydx))
        data = tf.data.Dataset.from_tensor_slices(arrays).batch(4)
    if kind == "loader":
        import torch

        rows = [(a, targets_of(b, c)) for a, b, c in zip(x, y, dydx, strict=True)]
        data = torch.utils.data.DataLoader(rows, batch_size=4)  # pyright: ignore[reportArgumentType] - rows will do
    matching = GradientMatching()
    wrapped: Any = compiled(mlp(), matching, rate=0.1)
    with pytest.warns(UserWarning, match="the first batch of the training data sets its scales"):
        wrapped.fit(data, shuffle=False, verbose=0)
    assert matching.get_config() == GradientMatching().fit(x[:4], y[:4], dydx[:4]).get_config()


def test_a_generator_needs_a_fitted_loss() -> None:
    x, y, dydx = smooth_data()

    def generator() -> Any:
        while True:
            yield x, targets_of(y, dydx)

    with pytest.raises(ValueError, match=r"can be read only once. Call `matching.fit\(X, y, dydx\)`"):
        compiled(mlp()).fit(generator(), steps_per_epoch=2, verbose=0)
    for scale in ("block", "none"):  # raw derivatives have no scale to fit
        matching = GradientMatching(scale=scale)
        model: Any = compiled(mlp(), matching if scale == "none" else matching.fit(x, y, dydx), rate=0.0)
        loss = model.fit(generator(), steps_per_epoch=2, shuffle=False, verbose=0).history["loss"][0]
        assert loss == pytest.approx(compiled(mlp(), matching).evaluate(x, targets_of(y, dydx), verbose=0)[0], rel=1e-5)


def test_saving_the_wrapper_keeps_scales_and_optimizer(tmp_path: Path) -> None:
    x, y, dydx = smooth_data()
    wrapped: Any = WithDerivatives(mlp(), name="mine")
    wrapped.compile("adam", loss={"y": "mse", "dydx": GradientMatching(0.3)}, loss_weights={"y": 1.0, "dydx": 2.0})
    wrapped.fit(x, targets_of(y, dydx), epochs=2, verbose=0, shuffle=False)
    wrapped.save(tmp_path / "model.keras")
    loaded: Any = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded) is WithDerivatives
    assert loaded.name == "mine"
    for a, b in zip(*(model.predict(x, verbose=0).values() for model in [loaded, wrapped]), strict=True):
        np.testing.assert_array_equal(a, b)
    histories = [m.fit(x, targets_of(y, dydx), epochs=2, verbose=0, shuffle=False).history for m in (loaded, wrapped)]
    assert histories[0]["loss"] == pytest.approx(histories[1]["loss"], rel=1e-6)  # Adam's moments too


def test_the_model_itself_is_saved_without_gradwise(tmp_path: Path) -> None:
    x, y, dydx = smooth_data()
    wrapped: Any = compiled(mlp(), rate=0.1)
    wrapped.fit(x, targets_of(y, dydx), verbose=0)
    wrapped.model.save(tmp_path / "inner.keras")
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", numpy_of(wrapped.model(x)))
    code = (
        "import sys, warnings, numpy as np; warnings.simplefilter('ignore'); import keras;"
        "m = keras.models.load_model('inner.keras'); y = m.predict(np.load('x.npy'), verbose=0);"
        "np.testing.assert_allclose(y, np.load('y.npy'), rtol=1e-5, atol=1e-6);"
        "assert not any(name.startswith('gradwise') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)


def constant(x: Any) -> Any:
    return keras.ops.stop_gradient(x)


@pytest.mark.parametrize(
    ("build", "x", "message"),
    [
        (lambda: mlp(), np.ones((2, 3), "int32"), "`x` must be floating-point .* Received: x of dtype int32"),
        (lambda: mlp(), [np.ones((2, 3)), np.ones((2, 3))], "`x` must be one tensor"),
        (lambda: mlp(), {"a": np.ones((2, 3)), "b": np.ones((2, 3))}, "`x` must be one tensor"),
        (lambda: keras.Sequential([keras.Input((4, 3)), layers.Dense(2)]), np.ones((2, 4, 3)), "values of shape"),
        (
            lambda: keras.Sequential([keras.Input((3,)), layers.Lambda(constant, (3,)), layers.Dense(2)]),
            np.ones((2, 3)),
            "must depend on its inputs `x`",
        ),
    ],
)
def test_models_without_such_derivatives_are_errors(build: Any, x: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WithDerivatives(build())(x)


def test_misuse_is_named() -> None:
    x, y, dydx = smooth_data()
    with pytest.raises(ValueError, match=r"`model` must be a keras.Model. Received: model=<function"):
        WithDerivatives(constant)  # pyright: ignore[reportArgumentType] - that is the test
    wrapped: Any = WithDerivatives(mlp())
    for loss in (["mse", GradientMatching()], GradientMatching(), {"y": GradientMatching()}):
        with pytest.raises(ValueError, match="`loss` must"):
            wrapped.compile("sgd", loss=loss)
    with pytest.raises(ValueError, match="`loss_weights` must be a dict"):
        wrapped.compile("sgd", loss={"y": "mse", "dydx": GradientMatching()}, loss_weights=[1.0, 0.5])
    wrapped.compile("sgd", loss={"y": "mse", "dydx": GradientMatching()})
    for targets in (y, [y, dydx], {"y": y}, {"y": y, "dydx": dydx, "z": y}):
        with pytest.raises(ValueError, match=r'`y` must be a dict {"y": values, "dydx": derivatives}'):
            wrapped.fit(x, targets, verbose=0)
    negative = np.where(np.arange(12) == 3, -1.0, 1.0)
    with pytest.raises(ValueError, match=r"`sample_weight` must not be negative or NaN. Received: .* minimum -1.0"):
        wrapped.fit(x, targets_of(y, dydx), sample_weight=negative, verbose=0)


def test_derivatives_improve_a_small_surrogate() -> None:
    ratios = []
    for seed in range(2):
        x, y, dydx = smooth_data(n=20, n_outputs=1, seed=seed)
        new_x, new_y, _ = smooth_data(n=500, n_outputs=1, seed=seed)
        errors = []
        for weight in (0.0, 1.0):
            wrapped: Any = WithDerivatives(mlp(n_outputs=1, width=32, seed=seed))
            loss = {"y": "mse", "dydx": GradientMatching(weight)}
            wrapped.compile(keras.optimizers.Adam(0.02), loss=loss)
            again = [np.tile(a, (150, *[1] * (a.ndim - 1))) for a in (x, y, dydx)]  # cheaper than 150 epochs
            wrapped.fit(again[0], targets_of(*again[1:]), batch_size=20, epochs=2, shuffle=False, verbose=0)
            errors.append(np.mean((numpy_of(wrapped.model(new_x)) - new_y) ** 2))
        ratios.append(errors[0] / errors[1])
    assert min(ratios) > 2


def test_the_inner_model_may_have_its_own_train_step() -> None:
    x, y, dydx = smooth_data()
    inputs = keras.Input((3,))
    OwnStep.steps = 0
    wrapped: Any = compiled(OwnStep(inputs, layers.Dense(2)(inputs)), rate=0.1)
    wrapped.fit(x, targets_of(y, dydx), verbose=0)
    assert OwnStep.steps == 0  # the wrapper trains
