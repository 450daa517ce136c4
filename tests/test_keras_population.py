"""PopulationCallback against a training loop by hand, and against plain `fit` where sigma is 0."""

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest
import torch
from keras_cells import (
    ATOL,
    BACKEND,
    KERAS_WARNING,
    MODELS,
    RTOL,
    WIDE,
    assert_same,
    assign,
    batches_of,
    compiled,
    data,
    fit,
    floats,
    numpy_of,
    ops,
    state_of,
    streams,
    train_by_hand,
    weights_of,
)

import gradwise._noise
import gradwise_keras._noise
from gradwise import Population
from gradwise._noise import key_words
from gradwise.keras import PopulationCallback
from gradwise.torch import PopulationGradient
from gradwise_keras._noise import Noise

SIZE = 2 if BACKEND == "jax" else 4  # where the loop over members is compiled, every one of them is

# What differs by backend; the others, on torch, where nothing has to be compiled.
SPECIAL = ["regularized", "batch_norm", "dropout", "unseeded dropout", "embedding"]
NAMES = list(MODELS) if BACKEND == "torch" else SPECIAL

pytestmark = pytest.mark.filterwarnings(KERAS_WARNING)


def assert_as_by_hand(
    name: str,
    *,
    optimizer: Any = None,
    rows: int = 10,
    epochs: int = 1,
    sharded: bool = False,
    perturb: Any = None,
    schedule: Any = None,
    **how: Any,
) -> None:
    """Train twice in the widest floats, and compare weights, state and what the members said."""
    how = {"sigma": 0.3, "seed": 5, **how}
    callback = PopulationCallback(how.pop("size", SIZE), sharded=sharded, perturb=perturb, **how)
    with floats(WIDE):
        x, y = data(rows)
        one, other = (compiled(name, optimizer=None if optimizer is None else optimizer()) for _ in range(2))
        for model in (one, other):
            model(x[:1])  # builds what is not
            model.optimizer.build(model.trainable_variables)
        assign(other.variables, [numpy_of(variable) for variable in one.variables])
        history = fit(one, x, y, callback, epochs=epochs)
        said = train_by_hand(
            other,
            batches_of(x, y, epochs=epochs),
            callback.population,
            sharded=sharded,
            perturb=perturb,
            sigma=schedule,
        )
        left, right = ({key: v for key, v in state_of(m).items() if "metric" not in key} for m in (one, other))
        assert_same(left, right, rtol=RTOL, atol=ATOL)
    steps = len(said.loss) // epochs
    last = slice(len(said.loss) - steps, None)
    assert history["loss"][-1] == pytest.approx(np.average(said.loss[last], weights=said.rows[last]), rel=1e-5)
    assert history["population_agreement"][-1] == pytest.approx(np.mean(said.agreement[last]), rel=1e-4)
    assert history["population_spread"][-1] == pytest.approx(np.mean(said.spread[last]), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "unseeded dropout"])
def test_trains_as_the_loop_by_hand(name: str) -> None:
    assert_as_by_hand(name)


@pytest.mark.parametrize("name", ["batch_norm", "dropout"])
def test_shards_train_as_the_loop_by_hand(name: str) -> None:
    """10 rows are batches of 4, 4 and 2, the last with fewer rows than members; 11 have a member with two of three."""
    assert_as_by_hand(name, rows=10 if name == "dropout" else 11, sharded=True, size=2 if name == "batch_norm" else 4)


@pytest.fixture
def same_rewrites() -> Iterator[None]:
    """TensorFlow's graph optimizer reorders sums and products, and not alike in two programs: BatchNorm's last bits."""
    if BACKEND != "tensorflow":
        yield
        return
    import tensorflow as tf

    options = tf.config.optimizer
    options.set_experimental_options({"arithmetic_optimization": False})
    yield
    options.set_experimental_options({"arithmetic_optimization": True})


@pytest.mark.parametrize(
    "name", [name for name in NAMES if BACKEND != "jax" or name in ("batch_norm", "unseeded dropout")]
)
@pytest.mark.usefixtures("same_rewrites")
def test_sigma_zero_is_plain_fit(name: str) -> None:
    one, other = compiled(name), compiled(name)
    x, y = data()
    states, histories, ends = [], [], []
    for model in (one, other):
        keras.utils.set_random_seed(2)
        callbacks = [PopulationCallback(SIZE, 0.0, seed=0)] if model is one else []
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


SETTINGS: dict[str, dict[str, Any]] = {
    "filter": {"scale": "filter", "name": "convolution"},
    "absolute": {"scale": "absolute", "sigma": 0.05},
    "rademacher": {"noise": "rademacher", "antithetic": False, "size": 3},
    "odd shards": {"antithetic": False, "size": 3, "sharded": True, "rows": 8},
    "perturb": {"perturb": lambda path, variable: "first" in path, "name": "functional"},
    "schedule": {
        "sigma": keras.optimizers.schedules.InverseTimeDecay(0.25, 1, 1.0),
        "schedule": lambda step: 0.25 / (1.0 + step),
    },
    "adam": {"optimizer": lambda: keras.optimizers.AdamW(0.01)},
    "accumulation": {"optimizer": lambda: keras.optimizers.SGD(0.1, gradient_accumulation_steps=2), "epochs": 2},
    "clipping": {"optimizer": lambda: keras.optimizers.SGD(0.5, global_clipnorm=0.1, use_ema=True, ema_momentum=0.5)},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_train_as_the_loop_by_hand(setting: str) -> None:
    options = dict(SETTINGS[setting])
    assert_as_by_hand(options.pop("name", "sequential"), **{"rows": 8, **options})


def test_several_inputs_outputs_and_weights() -> None:
    keras.utils.set_random_seed(0)
    models: list[Any] = []
    for _ in range(2):
        keras.utils.set_random_seed(0)
        a, b = keras.Input((3,), name="a"), keras.Input((2,), name="b")
        h = keras.layers.Concatenate()([keras.layers.Dense(3, "tanh")(a), b])
        outputs = {"u": keras.layers.Dense(2, name="u")(h), "v": keras.layers.Dense(1, name="v")(h)}
        models.append(keras.Model({"a": a, "b": b}, outputs))
        models[-1].compile(keras.optimizers.SGD(0.1), {"u": "mse", "v": "mae"}, loss_weights={"u": 1.0, "v": 0.5})
    x, y = data(8)
    inputs, targets = {"a": x, "b": y}, {"u": y, "v": y[:, :1]}
    weight = np.arange(8, dtype="float32") / 4
    callback = PopulationCallback(2, 0.3, sharded=True, seed=5)
    fit(models[0], inputs, targets, callback, sample_weight={"u": weight, "v": weight})
    batches = batches_of(inputs, targets, {"u": weight, "v": weight})
    train_by_hand(models[1], batches, callback.population, sharded=True)
    for weights, expected in zip(weights_of(models[0]), weights_of(models[1]), strict=True):
        np.testing.assert_allclose(weights, expected, rtol=1e-4, atol=1e-6)


def test_class_weight_is_sample_weight() -> None:
    x, y = data(8)
    label = (y[:, 0] > 0).astype("int32")
    one, other = (
        compiled(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=None) for _ in "ab"
    )
    callback = PopulationCallback(2, 0.3, seed=5)
    fit(one, x, label, callback, class_weight={0: 0.5, 1: 2.0})
    train_by_hand(other, batches_of(x, label, np.where(label, 2.0, 0.5).astype("float32")), callback.population)
    for weights, expected in zip(weights_of(one), weights_of(other), strict=True):
        np.testing.assert_allclose(weights, expected, rtol=1e-4, atol=1e-6)


# -- noise -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
@pytest.mark.parametrize("chunk", [None, 7])
def test_noise_is_that_of_the_core(kind: Any, chunk: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, at small and huge steps, in tensors of one window and of several."""
    if chunk is not None:
        key_words.cache_clear()
        for module in (gradwise._noise, gradwise_keras._noise):
            monkeypatch.setattr(module, "CHUNK", chunk)
    population = Population(size=4, noise=kind, seed=2**63 + 1)
    shapes, indices = [(3, 5), (), (2, 1, 20), (0, 2)], [0, 3, 7, 9]
    noise = Noise(population, shapes, indices, streams=2)
    for step in (0, 1, 2**31 - 1) if BACKEND == "jax" else (0, 1, 2**31, 2**32 - 1):
        for stream in (0, 1):
            drawn = noise.at(ops.convert_to_tensor(step)).unit(stream)
            for tensor, shape, index in zip(drawn, shapes, indices, strict=True):
                expected = population.unit_noise(shape, step=step, member=2 * stream, tensor=index)
                np.testing.assert_array_equal(numpy_of(tensor), expected.astype("float32"))
    key_words.cache_clear()


def test_seeds() -> None:
    def run(seed: int | None, **options: Any) -> Any:
        model = compiled()
        fit(model, *data(8), PopulationCallback(2, 0.3, seed=seed, **options))
        return weights_of(model)[0]

    np.testing.assert_array_equal(run(1), run(1))
    assert not np.array_equal(run(1), run(2))
    keras.utils.set_random_seed(4)
    assert PopulationCallback().population.seed == 4


@pytest.mark.parametrize("resumed", ["model", "weights"] if BACKEND == "torch" else ["model"])
def test_resume_is_exact(resumed: str, tmp_path: Any) -> None:
    x, y = data(8)
    whole, first = compiled("batch_norm"), compiled("batch_norm")
    fit(whole, x, y, PopulationCallback(2, 0.3, seed=5), epochs=2)
    fit(first, x, y, PopulationCallback(2, 0.3, seed=5))
    if resumed == "model":
        first.save(tmp_path / "half.keras")
        second: Any = keras.models.load_model(tmp_path / "half.keras")
    else:
        first.save_weights(tmp_path / "half.weights.h5")
        second = compiled("batch_norm")
        second.optimizer.build(second.trainable_variables)
        second.load_weights(tmp_path / "half.weights.h5")
    fit(second, x, y, PopulationCallback(2, 0.3, seed=5))
    for weights, expected in zip(weights_of(second), weights_of(whole), strict=True):
        np.testing.assert_array_equal(weights, expected)


# -- ways to compute ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(BACKEND == "torch", reason="it has no other loop than Python's")
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_the_compiled_loop_equals_the_loop_in_python(sharded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """7 rows for 4 members: shards of 2, 2, 2 and 1, of which the loop has two."""
    states, histories = [], []
    for slow in (True, False):
        monkeypatch.setattr("gradwise_keras._installation.loops_slowly", lambda slow=slow: slow)
        model = compiled("dropout" if sharded else "batch_norm")
        histories.append(fit(model, *data(7), PopulationCallback(4, 0.3, sharded, seed=5), batch_size=7, epochs=2))
        states.append(state_of(model))
    assert_same(*states, rtol=1e-5, atol=1e-6)
    for name, values in histories[0].items():
        assert values == pytest.approx(histories[1][name], rel=1e-4)


WAYS: dict[str, dict[str, Any]] = {
    "eagerly": {"run_eagerly": True},
    "xla": {"jit_compile": True},
    "not xla": {"jit_compile": False},
    "executions": {"steps_per_execution": 3},
}


@pytest.mark.parametrize("way", {"torch": ["eagerly"], "jax": ["eagerly", "executions"]}.get(BACKEND, list(WAYS)))
def test_ways_to_run_agree(way: str) -> None:
    # Not dropout: XLA draws other numbers on TensorFlow.
    one, other = compiled("batch_norm"), compiled("batch_norm", **WAYS[way])
    for model in (one, other):
        fit(model, *data(), PopulationCallback(2, 0.3, seed=5))
    assert_same(state_of(one), state_of(other), rtol=1e-5, atol=1e-6)


def test_sigma_zero_is_exact_where_nothing_is_compiled() -> None:
    states = []
    for callbacks in ([PopulationCallback(4, 0.0)], []):
        model = compiled("batch_norm", run_eagerly=True)
        fit(model, *data(), *callbacks)
        states.append(state_of(model))
    assert_same(*states)


# -- parity ------------------------------------------------------------------------------------------------------------


class InKerasLayout(torch.nn.Module):
    def __init__(self, weights: list[Any]) -> None:
        super().__init__()
        self.values = torch.nn.ParameterList([torch.nn.Parameter(torch.tensor(w)) for w in weights])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w, b, v, c = self.values
        return torch.tanh(x @ w + b) @ v + c


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
def test_parity_with_torch(noise: Any) -> None:
    x, y = data(12)
    model = compiled(optimizer=keras.optimizers.SGD(0.1))
    module = InKerasLayout(weights_of(model))
    fit(model, x, y, PopulationCallback(4, 0.3, noise=noise, seed=5))
    inner = torch.optim.SGD(module.parameters(), lr=0.1)
    optimizer = PopulationGradient(inner, population_size=4, sigma=0.3, noise=noise, seed=5)
    for at in range(0, 12, 4):

        def closure(at: int = at) -> torch.Tensor:
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(module(torch.tensor(x[at : at + 4])), torch.tensor(y[at : at + 4]))
            loss.backward()
            return loss

        optimizer.step(closure)
    for weights, expected in zip(weights_of(model), module.values, strict=True):
        np.testing.assert_allclose(weights, expected.detach().numpy(), rtol=1e-5, atol=1e-6)
