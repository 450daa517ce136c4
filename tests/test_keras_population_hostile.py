"""PopulationCallback where users push: own training steps, faults, callbacks, several fits, odd data."""

import contextlib
import copy
import math
import pickle
import threading
from typing import Any

import keras
import numpy as np
import pytest
from keras_cells import (
    BACKEND,
    KERAS_WARNING,
    Fails,
    Subclassed,
    assert_same,
    assign,
    batches_of,
    compiled,
    data,
    fit,
    numpy_of,
    ops,
    sequential,
    state_of,
    train_by_hand,
    weights_of,
)

from gradwise import Population
from gradwise.keras import PopulationCallback, PopulationGradient

pytestmark = pytest.mark.filterwarnings(KERAS_WARNING)

X, Y = data()


def population(size: int = 2, sigma: Any = 0.3, **options: Any) -> PopulationCallback:
    return PopulationCallback(size, sigma, **{"seed": 5, **options})


# -- training steps of the user's own ----------------------------------------------------------------------------------


class Guided(keras.Model):
    """The training step of Keras's guides, in the form of each backend; `twist` is what goes wrong in it."""

    twist = ""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.hidden = keras.layers.Dense(4, "tanh")
        self.final = keras.layers.Dense(2)

    def call(self, x: Any, training: bool = False) -> Any:
        return self.final(self.hidden(x))

    def _logs(self, y: Any, y_pred: Any, loss: Any) -> dict[str, Any]:
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss)
            else:
                metric.update_state(y, y_pred)
        return {metric.name: metric.result() for metric in self.metrics}

    def train_step(self, *args: Any) -> Any:
        return {"tensorflow": self.step_tensorflow, "torch": self.step_torch, "jax": self.step_jax}[BACKEND](*args)

    def step_tensorflow(self, batch: Any) -> Any:
        import tensorflow as tf

        x, y = batch[0], batch[1]
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss: Any = self.compute_loss(y=y, y_pred=y_pred)
        gradients: Any = tape.gradient(loss, self.trainable_variables)
        if self.twist != "never":
            self.optimizer.apply(gradients, self.trainable_variables)
        if self.twist == "twice":
            self.optimizer.apply(gradients, self.trainable_variables)
        if self.twist == "assigns":
            self.trainable_variables[0].assign(ops.clip(self.trainable_variables[0], -0.1, 0.1))
        return self._logs(y, y_pred, loss)

    def step_torch(self, batch: Any) -> Any:
        import torch

        x, y = batch[0], batch[1]
        self.zero_grad()
        y_pred = self(x, training=True)
        loss: Any = self.compute_loss(y=y, y_pred=y_pred)
        loss.backward()
        gradients = [v.value.grad for v in self.trainable_weights]
        with torch.no_grad():
            if self.twist != "never":
                self.optimizer.apply(gradients, self.trainable_weights)
            if self.twist == "twice":
                self.optimizer.apply(gradients, self.trainable_weights)
            if self.twist == "assigns":
                self.trainable_variables[0].assign(ops.clip(self.trainable_variables[0], -0.1, 0.1))
        return self._logs(y, y_pred, loss)

    def compute_loss_and_updates(
        self, trainable: Any, non_trainable: Any, x: Any, y: Any, training: bool = False
    ) -> Any:
        called: Any = self.stateless_call(trainable, non_trainable, x, training=training)
        y_pred, non_trainable = called
        return self.compute_loss(x, y, y_pred), (y_pred, non_trainable)

    def step_jax(self, state: Any, batch: Any) -> Any:
        import jax

        trainable, non_trainable, optimizer, metrics = state
        x, y = batch[0], batch[1]
        grad = jax.value_and_grad(self.compute_loss_and_updates, has_aux=True)
        (loss, (y_pred, non_trainable)), gradients = grad(trainable, non_trainable, x, y, training=True)
        if self.twist != "never":
            trainable, optimizer = self.optimizer.stateless_apply(optimizer, gradients, trainable)
        if self.twist == "twice":
            trainable, optimizer = self.optimizer.stateless_apply(optimizer, gradients, trainable)
        if self.twist == "assigns":
            trainable = [ops.clip(trainable[0], -0.1, 0.1), *trainable[1:]]
        with keras.StatelessScope(state_mapping=list(zip(self.metrics_variables, metrics, strict=True))) as scope:
            logs = self._logs(y, y_pred, loss)
        metrics = [scope.get_current_value(v) for v in self.metrics_variables]
        return logs, (trainable, non_trainable, optimizer, metrics)


class Tracked(Guided):
    """With a loss tracker of its own, as in the guides, beside that of `compile`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.tracker = keras.metrics.Mean(name="loss")

    def _logs(self, y: Any, y_pred: Any, loss: Any) -> dict[str, Any]:
        self.tracker.update_state(loss)
        return {"loss": self.tracker.result(), "twice": 2 * loss, "count": 1}


class Raw(Guided):
    """Without metrics."""

    def _logs(self, y: Any, y_pred: Any, loss: Any) -> dict[str, Any]:
        return {"loss": loss}


def guided(kind: type[Guided] = Guided, twist: str = "", **options: Any) -> Any:
    keras.utils.set_random_seed(0)
    model = kind()
    model.twist = twist
    model(X[:1])
    model.compile(optimizer=keras.optimizers.SGD(0.1), loss="mse", **options)
    return model


@pytest.mark.parametrize("kind", [Guided, Tracked, Raw])
def test_training_steps_of_the_guides(kind: type[Guided]) -> None:
    metrics = ["mae"] if kind is Guided else None
    model, other = guided(kind, metrics=metrics), guided(kind)
    history = fit(model, X[:8], Y[:8], population())
    said = train_by_hand(other, batches_of(X[:8], Y[:8]), Population(2, 0.3, seed=5))
    for weights, expected in zip(weights_of(model), weights_of(other), strict=True):
        np.testing.assert_allclose(weights, expected, rtol=1e-4, atol=1e-6)
    mean = said.loss[-1] if kind is Raw else np.mean(said.loss)
    assert history["loss"][0] == pytest.approx(mean, rel=1e-5)
    if kind is Guided:
        assert "mae" in history
    if kind is Tracked:
        assert history["twice"][0] == pytest.approx(2 * said.loss[-1], rel=1e-5)
        assert history["count"] == [1]
    if kind is Raw:  # no metric was told the loss
        assert math.isnan(history["population_spread"][0])
    else:
        assert history["population_spread"][0] == pytest.approx(np.mean(said.spread), rel=1e-3)


@pytest.mark.parametrize(
    ("twist", "message"),
    [
        ("twice", "`train_step` must apply the optimizer once"),
        ("never", "`train_step` must apply its gradients with `model.optimizer`"),
        ("assigns", "`train_step` must leave trainable weights to `model.optimizer`"),
    ],
)
def test_training_steps_that_cannot_be_a_member(twist: str, message: str) -> None:
    model = guided(twist=twist)
    before = weights_of(model)
    with pytest.raises(ValueError, match=message):
        fit(model, X, Y, population())
    for weights, value in zip(weights_of(model), before, strict=True):
        np.testing.assert_array_equal(weights, value)


# -- faults ------------------------------------------------------------------------------------------------------------


class At(keras.callbacks.Callback):
    """Does something at a moment of training, once."""

    def __init__(self, moment: str, act: Any, batch: int = 1) -> None:
        super().__init__()
        self.left = 1

        def hook(at: int = 0, logs: Any = None) -> None:
            if self.left and (at == batch or "batch" not in moment):
                self.left -= 1
                act(self.model)

        setattr(self, moment, hook)


def fail(model: Any) -> None:
    raise RuntimeError("on purpose")


def twin(model: Any, **options: Any) -> Any:
    """A model that stands where `model` does, and never had a population."""
    other = compiled(**options)
    for each in (model, other):
        each.optimizer.build(each.trainable_variables) if not each.optimizer.built else None
    assign(other.variables, [numpy_of(variable) for variable in model.variables])
    assign(other.optimizer.variables, [numpy_of(variable) for variable in model.optimizer.variables])
    return other


def assert_weights(model: Any, expected: list[Any]) -> None:
    for weights, value in zip(weights_of(model), expected, strict=True):
        np.testing.assert_array_equal(weights, value)


@pytest.mark.parametrize(
    ("moment", "order"),
    [("on_train_begin", "after"), ("on_train_batch_begin", "after"), ("on_train_batch_end", "before")],
)
def test_another_callback_raises(moment: str, order: str) -> None:
    model = compiled(metrics=None)
    before: list[Any] = []

    def act(model: Any) -> None:
        before.extend(weights_of(model))
        fail(model)

    callbacks = [population(), At(moment, act)]
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(model, X, Y, *(callbacks if order == "after" else reversed(callbacks)))
    assert_weights(model, before)
    other = twin(model, metrics=None)
    history = fit(model, X, Y)
    fit(other, X, Y)
    assert_same(state_of(model), state_of(other))
    assert set(history) == {"loss"}


def test_data_raises() -> None:
    model = compiled()
    before: list[Any] = []

    def batches() -> Any:
        yield X[:4], Y[:4]
        yield X[:4], Y[:4]
        raise RuntimeError("on purpose")

    keep = At("on_train_batch_end", lambda model: before.extend(weights_of(model)))
    with pytest.raises(Exception, match="on purpose"):
        fit(model, batches(), None, population(), keep, steps_per_epoch=4, shuffle=False)
    assert_weights(model, before)
    other = twin(model)
    fit(model, X, Y)
    fit(other, X, Y)
    assert_same(state_of(model), state_of(other))


@pytest.mark.parametrize("again", ["plain", "population"])
def test_step_raises(again: str) -> None:
    """In the second batch, on TensorFlow inside the compiled loop over members."""
    model = compiled(loss=Fails())
    bad = Y.copy()
    bad[5] = np.inf
    before: list[Any] = weights_of(model)
    keep = At("on_train_batch_end", lambda model: (before.clear(), before.extend(weights_of(model))), batch=0)
    callback = population(4)
    with pytest.raises(Exception, match="on purpose"):
        fit(model, X, bad, callback, keep)
    assert_weights(model, before)
    if BACKEND == "jax":
        return  # whose compiled steps do not raise
    other = twin(model, loss=Fails())
    fit(model, X, Y, *([] if again == "plain" else [callback]))
    fit(other, X, Y, *([] if again == "plain" else [population(4)]))
    assert_same(state_of(model), state_of(other))


# -- several fits, several callbacks -----------------------------------------------------------------------------------


def test_second_fits() -> None:
    """Two fits are one fit of twice the epochs; so with a fresh callback, and after `compile`."""
    whole, same, fresh = (compiled() for _ in range(3))
    fit(whole, X, Y, population(), epochs=2)
    callback = population()
    for _ in range(2):
        fit(same, X, Y, callback)
        fit(fresh, X, Y, population())
    assert_same(state_of(same), state_of(whole))
    assert_same(state_of(fresh), state_of(whole))


def test_a_callback_follows_compile() -> None:
    callback = population()
    model, other = compiled(), compiled()
    fit(model, X, Y, callback)
    fit(other, X, Y, population())
    model.compile(optimizer=keras.optimizers.Adam(0.01), loss="mae")
    other.compile(optimizer=keras.optimizers.Adam(0.01), loss="mae")
    fit(model, X, Y, callback)
    fit(other, X, Y, population())
    assert_same(state_of(model), state_of(other))


def test_plain_fits_around() -> None:
    model, other = compiled(), compiled()
    fit(model, X, Y, population())
    fit(other, X, Y, population())
    function = model.train_function
    fit(model, X, Y)
    model.train_on_batch(X[:4], Y[:4])
    assert model.train_function is function
    fresh = twin(other)
    fit(fresh, X, Y)
    fresh.train_on_batch(X[:4], Y[:4])
    assert_same(state_of(model), state_of(fresh))


def test_two_callbacks_in_one_fit_are_an_error() -> None:
    model = compiled()
    with pytest.raises(ValueError, match="one PopulationCallback"):
        fit(model, X, Y, population(), population())
    fit(model, X, Y, population())  # and not what a fit that broke off left behind


def test_members_of_members_are_refused() -> None:
    model = compiled()
    model.compile(optimizer=PopulationGradient("sgd"), loss="mse")
    with pytest.raises(ValueError, match="PopulationGradient"):
        fit(model, X, Y, population())


def test_a_callback_may_train_in_between() -> None:
    """Its own batch is plain; what comes after has its population."""
    seen: list[float] = []
    model = compiled()

    def train(model: Any) -> None:
        model.train_on_batch(X[:2], Y[:2])

    def look(batch: int, logs: Any) -> None:
        seen.append(logs.get("population_agreement", -1))

    fit(
        model,
        X,
        Y,
        population(),
        At("on_train_batch_end", train, batch=0),
        keras.callbacks.LambdaCallback(on_train_batch_end=look),
    )
    assert len(seen) == 3
    assert min(seen) > 0


def test_evaluate_and_predict_with_the_callback_are_plain() -> None:
    model = compiled()
    with_callback = model.evaluate(X, Y, verbose=0, callbacks=[population()])
    assert with_callback == model.evaluate(X, Y, verbose=0)
    np.testing.assert_array_equal(model.predict(X, verbose=0, callbacks=[population()]), model.predict(X, verbose=0))


# -- what is left behind -----------------------------------------------------------------------------------------------


def attributes(model: Any) -> list[set[str]]:
    optimizer = model.optimizer
    return [set(vars(each)) for each in (model, optimizer, *model.layers, *model.metrics)]


@pytest.mark.parametrize("broken", [False, True])
def test_nothing_is_left_behind(broken: bool) -> None:
    model, other = compiled(), compiled()
    for each in (model, other):
        fit(each, X, Y)
    callbacks = [population(), *([At("on_train_batch_end", fail)] if broken else [])]
    try:
        fit(model, X, Y, *callbacks)
    except RuntimeError:
        assert broken
    if broken:
        fit(model, X, Y)
    assert attributes(model) == attributes(other)
    assert "train_step" not in vars(model)
    assert type(model.train_function) is type(other.train_function)


def test_models_are_copied_and_saved_during_and_after_fit(tmp_path: Any) -> None:
    """What is saved is the mean, bit for bit."""
    model = compiled()
    means: list[Any] = []
    kept: list[Any] = []

    def save(model: Any) -> None:
        model.save(tmp_path / "during.keras")
        means.append(weights_of(model))
        kept.append(copy.deepcopy(model))
        kept.append(pickle.loads(pickle.dumps(model)))
        kept.append(keras.models.load_model(tmp_path / "during.keras"))

    fit(model, X, Y, population(), At("on_train_batch_end", save))
    for other in kept:
        for weights, mean in zip(weights_of(other), means[0], strict=True):
            np.testing.assert_array_equal(weights, mean)
        fit(other, X, Y)
    clone = keras.models.clone_model(model)
    clone.compile("sgd", "mse")
    fit(clone, X, Y)
    copy.deepcopy(model).fit(X, Y, verbose=0)


def test_callbacks_are_copied() -> None:
    callback = population()
    for other in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        fit(compiled(), X, Y, other)
    if BACKEND == "jax":
        return  # compiles long
    fit(compiled(), X, Y, callback)
    one, other = compiled(), compiled()
    again = copy.deepcopy(pickle.loads(pickle.dumps(callback)))
    fit(one, X, Y, callback)
    fit(other, X, Y, again)
    assert_same(state_of(one), state_of(other))


# -- precision, optimizers, callbacks of Keras -------------------------------------------------------------------------


@contextlib.contextmanager
def policy(name: str) -> Any:
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


@pytest.mark.parametrize("how", ["global"] if BACKEND == "jax" else ["global", "explicit", "bfloat16"])
def test_mixed_precision(how: str) -> None:
    """The scaled loss is unscaled, and sigma 0 is plain."""
    inner = {"explicit": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=8.0)}
    with policy({"global": "mixed_float16", "explicit": "float32", "bfloat16": "mixed_bfloat16"}[how]):
        models = [compiled(optimizer=inner.get(how, lambda: None)(), metrics=None) for _ in range(3)]
    assert isinstance(models[0].optimizer, keras.optimizers.LossScaleOptimizer) == (how != "bfloat16")
    fit(models[0], X, Y, population(sigma=0.0))
    fit(models[1], X, Y)
    assert_same(state_of(models[0]), state_of(models[1]), rtol=1e-2 if BACKEND == "jax" else 1e-6, atol=1e-6)
    start = weights_of(models[2])
    fit(models[2], X, Y, population())
    assert not np.array_equal(start[0], weights_of(models[2])[0])


def test_infinite_gradients_skip_the_step() -> None:
    model = compiled(optimizer=keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=8.0))
    before = weights_of(model)
    bad = np.full_like(Y, np.inf)
    fit(model, X[:4], bad[:4], population())
    assert_weights(model, before)
    assert float(numpy_of(model.optimizer.dynamic_scale)) == 4.0
    assert int(numpy_of(model.optimizer.iterations)) == 0
    fit(model, X[:4], Y[:4], population())
    assert int(numpy_of(model.optimizer.iterations)) == 1
    assert np.all(np.isfinite(weights_of(model)[0]))


class Looks(keras.callbacks.Callback):
    """Weights at every moment that has the model's."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[Any]]] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.seen.append(("batch", weights_of(self.model)))

    def on_test_begin(self, logs: Any = None) -> None:
        self.seen.append(("test", weights_of(self.model)))

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        assert {"population_agreement", "population_spread", "val_loss"} <= set(logs)
        assert "val_population_agreement" not in logs
        self.seen.append(("epoch", weights_of(self.model)))


def test_callbacks_and_validation_see_the_mean(tmp_path: Any) -> None:
    """The mean is that of a loop by hand with the same population; validation is `evaluate` there."""
    model, other = compiled(optimizer=keras.optimizers.SGD(0.1)), compiled(optimizer=keras.optimizers.SGD(0.1))
    looks = Looks()
    checkpoint = keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.weights.h5", save_weights_only=True)
    history = fit(
        model, X[:8], Y[:8], population(), looks, checkpoint, validation_data=(X, Y), validation_batch_size=10
    )
    for batch, (moment, weights) in zip(batches_of(X[:8], Y[:8]), looks.seen, strict=False):
        train_by_hand(other, [batch], Population(2, 0.3, seed=5))
        assert moment == "batch"
        for value, expected in zip(weights, weights_of(other), strict=True):
            np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-6)
    for moment, weights in looks.seen[2:]:
        assert moment != "batch"
        assert_weights(model, weights)
    assert model.evaluate(X, Y, batch_size=10, verbose=0)[0] == pytest.approx(history["val_loss"][0], rel=1e-6)
    other.load_weights(tmp_path / "1.weights.h5")
    assert_weights(other, weights_of(model))


def test_the_usual_callbacks(tmp_path: Any) -> None:
    model = compiled(optimizer=keras.optimizers.SGD(0.05))
    best: list[Any] = []
    low = math.inf

    def keep(epoch: int, logs: Any) -> None:
        nonlocal low
        if logs["val_loss"] < low:
            low = logs["val_loss"]
            best[:] = weights_of(model)

    history = fit(
        model,
        X,
        Y,
        population(sigma=1.0),
        keras.callbacks.LambdaCallback(on_epoch_end=keep),
        keras.callbacks.EarlyStopping(patience=2, restore_best_weights=True),
        keras.callbacks.ReduceLROnPlateau(monitor="population_spread", mode="min", patience=0, min_delta=1e9),
        keras.callbacks.CSVLogger(str(tmp_path / "log.csv")),
        keras.callbacks.TerminateOnNaN(),
        keras.callbacks.BackupAndRestore(tmp_path / "backup"),
        validation_split=0.3,
        epochs=6,
    )
    assert_weights(model, best)
    assert history["learning_rate"][0] > history["learning_rate"][-1]
    assert "population_agreement" in (tmp_path / "log.csv").read_text()


def test_later_epochs_need_no_earlier_ones() -> None:
    history = fit(compiled(), X, Y, population(), epochs=3, initial_epoch=2)
    assert len(history["population_agreement"]) == 1


# -- data --------------------------------------------------------------------------------------------------------------


def sources() -> dict[str, Any]:
    class Dataset(keras.utils.PyDataset):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Any:
            return X[4 * index : 4 * index + 4], Y[4 * index : 4 * index + 4]

    def generator() -> Any:
        while True:
            yield from ((X[at : at + 4], Y[at : at + 4]) for at in (0, 4, 8))

    import torch

    def frame() -> Any:
        return torch.utils.data.TensorDataset(torch.tensor(X), torch.tensor(Y))

    return {
        "PyDataset": lambda: (Dataset(), {"shuffle": False}),
        "generator": lambda: (generator(), {"steps_per_epoch": 3, "shuffle": False}),
        "DataLoader": lambda: (torch.utils.data.DataLoader(frame(), batch_size=4), {"shuffle": False}),
    }


@pytest.mark.parametrize(("source", "sharded"), [("PyDataset", False), ("generator", True), ("DataLoader", False)])
def test_sources_of_data(source: str, sharded: bool) -> None:
    one, other = compiled(), compiled()
    batches, options = sources()[source]()
    fit(one, batches, None, population(4, sharded=sharded), **options)
    fit(other, X, Y, population(4, sharded=sharded))
    assert_same(state_of(one), state_of(other), rtol=1e-6, atol=1e-7)


def test_shards_of_sequences_of_any_length() -> None:
    """Rows are known, lengths are not."""

    def model() -> Any:
        keras.utils.set_random_seed(0)
        stack = [keras.Input((None, 3)), keras.layers.Dense(4), keras.layers.GlobalAveragePooling1D()]
        made = keras.Sequential([*stack, keras.layers.Dense(2)])
        made.compile(keras.optimizers.SGD(0.1), "mse")
        return made

    rng = np.random.default_rng(0)
    batches = [(rng.normal(size=(4, length, 3)).astype("float32"), Y[:4]) for length in (2, 3, 5, 2)]
    one, other = model(), model()
    fit(one, (batch for batch in batches), None, population(sharded=True), steps_per_epoch=4, shuffle=False)
    train_by_hand(other, [(*batch, None) for batch in batches], Population(2, 0.3, seed=5), sharded=True)
    for weights, expected in zip(weights_of(one), weights_of(other), strict=True):
        np.testing.assert_allclose(weights, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(BACKEND == "tensorflow", reason="it does not know how many there are")
def test_unequal_rows_cannot_be_shared_out() -> None:
    a, b = keras.Input((3,)), keras.Input((2,))
    model = keras.Model([a, b], keras.layers.Dense(1)(a))
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="equally many rows"):
        fit(
            model,
            (batch for batch in [((X[:4], Y[:3]), Y[:4, :1])]),
            None,
            population(sharded=True),
            steps_per_epoch=1,
            shuffle=False,
        )


class Masks(keras.layers.Layer):
    """Keeps the masks of a dropout that has no seed."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = keras.layers.Dropout(0.5)
        self.kept: list[Any] = []

    def call(self, x: Any, training: bool = False) -> Any:
        mask = self.dropout(ops.ones((16, 16)), training=training)
        if (training and hasattr(x, "numpy")) or BACKEND == "torch":
            self.kept.append(numpy_of(mask))
        return x * ops.mean(mask)


@pytest.mark.skipif(BACKEND == "jax", reason="it traces also where it runs eagerly")
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_masks_are_shared_by_members_of_one_batch_alone(sharded: bool) -> None:
    masks = Masks()
    model = keras.Sequential([keras.Input((3,)), masks, keras.layers.Dense(2)])
    model.compile("sgd", "mse", run_eagerly=True)
    masks.kept.clear()
    fit(model, X[:8], Y[:8], population(sharded=sharded))
    first, second, third, fourth = masks.kept[-4:]
    assert np.array_equal(first, second) == np.array_equal(third, fourth) == (not sharded)
    assert not np.array_equal(first, third)


def test_unbuilt_subclassed_models() -> None:
    """Built by the first batch; the first step may be traced twice, and has one population."""
    keras.utils.set_random_seed(0)
    model = Subclassed()
    model.compile("sgd", "mse")
    history = fit(model, X, Y, population(), epochs=2)
    assert min(history["population_agreement"]) > 0
    assert int(numpy_of(model.optimizer.iterations)) == 6


def test_fit_in_a_thread() -> None:
    model, other = compiled(), compiled()
    thread = threading.Thread(target=lambda: fit(model, X, Y, population()))
    thread.start()
    thread.join()
    fit(other, X, Y, population())
    assert_same(state_of(model), state_of(other))


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "name", "error"),
    [
        ({"population_size": 3}, "population_size", ValueError),
        ({"population_size": 0}, "population_size", ValueError),
        ({"population_size": 2.0}, "population_size", ValueError),
        ({"sigma": -1}, "sigma", ValueError),
        ({"sigma": math.nan}, "sigma", ValueError),
        ({"sigma": "0.1"}, "sigma", TypeError),
        ({"sharded": 1}, "sharded", TypeError),
        ({"scale": "layer"}, "scale", ValueError),
        ({"noise": "uniform"}, "noise", ValueError),
        ({"perturb": ["kernel"]}, "perturb", TypeError),
        ({"seed": -1}, "seed", ValueError),
        ({"seed": 1.5}, "seed", ValueError),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], name: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"`{name}`"):
        PopulationCallback(**options)


def test_models_without_an_optimizer_are_refused() -> None:
    model: Any = sequential()
    model.compile(optimizer=None, loss="mse")
    with pytest.raises(ValueError, match="compiled with an optimizer"):
        fit(model, X, Y, population())


@pytest.mark.skipif(BACKEND != "torch", reason="a layer of torch")
def test_buffers_of_torch_modules_count_once() -> None:
    """As the statistics of Keras's own batch normalisation: sigma 0 is plain."""
    import torch

    models: list[Any] = []
    for callbacks in ([population(4, 0.0)], []):
        keras.utils.set_random_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
        wrapper = keras.layers.TorchModuleWrapper(module, output_shape=(None, 4))
        model = keras.Sequential([keras.Input((3,)), wrapper, keras.layers.Dense(2)])
        model.compile("sgd", "mse")
        fit(model, X, Y, *callbacks)
        models.append(module)
    for (name, value), expected in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        np.testing.assert_array_equal(value.numpy(), expected.numpy(), err_msg=name)
