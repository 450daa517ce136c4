"""PopulationCallback: `fit` with the mean gradient over perturbed copies of the weights."""

import math
from collections.abc import Callable
from typing import Any, Literal

import keras

from gradwise._population import Population
from gradwise_keras._installation import PopulationFunction, check_trainer
from gradwise_keras._population_step import AGREEMENT, SPREAD
from gradwise_keras._seeds import default_seed
from gradwise_keras._selection import Perturb

__all__ = ["PopulationCallback"]


class PopulationCallback(keras.callbacks.Callback):
    r"""Trains with a non-local gradient: the mean over a population of perturbed copies of the weights.

    With unit noise :math:`\varepsilon_i` and :math:`s` the scale of a tensor,

    .. math:: g = \frac1K \sum_{i=1}^{K} \nabla L(\theta + \sigma s(\theta)\, \varepsilon_i)

    is what the model's optimizer then steps with, from the unperturbed :math:`\theta`: the model's own ``train_step``
    runs once per member, and its optimizer once. Model, optimizer and compiled losses stay as they are. The noise is
    that of `gradwise.torch.PopulationGradient`, whose docstring names the sources. Not a cheap default:
    `population_size` passes a step, and a graph that is compiled in as many times the time, unless `sharded`, which
    costs about one pass.

    Validation, checkpoints and all other callbacks see the unperturbed weights, bit for bit, also after an exception.

    Parameters
    ----------
    population_size : int, default 8
        Members per step. Even when `antithetic`.
    sigma : float or callable, default 0.1
        Size of the noise, in units of `scale`. A callable receives the optimizer's step as a scalar tensor, as a
        `keras.optimizers.schedules.LearningRateSchedule` does, inside the compiled step. Trainings that go on until
        the network over-fits gain more at 0.2; those that end before bear no more than 0.1
        (``docs/population-study.md``).
    sharded : bool, default False
        Every member sees its own part of the batch instead of all of it; members are then independent draws.
    scale : {"rms", "filter", "absolute"}
        Noise relative to the root mean square of each tensor, of each slice along its last axis (its output filters),
        or in weight units.
    noise : {"gaussian", "rademacher"}
        Distribution of the noise.
    antithetic : bool
        Members come in pairs with opposite noise.
    perturb : callable, optional
        ``perturb(path, variable) -> bool`` chooses among the trainable variables; by default those with at least two
        axes. Only floating-point ones are ever perturbed.
    seed : int, optional
        Seed of the noise; by default that of `keras.utils.set_random_seed`. Without either, training cannot be resumed
        exactly. The noise of a step depends on it and on ``optimizer.iterations``; no other random stream is touched.

    Raises
    ------
    ValueError, TypeError
        Bad arguments, by name; in `fit`, a second PopulationCallback, a model without an optimizer, or one whose
        ``train_step`` does not apply it once.
    RuntimeError
        In `fit`, on JAX with NNX enabled.

    Notes
    -----
    What else a step changes is counted once:

    * Metrics, statistics of batch normalisation and other floating-point state start each member from where they stood
      before the step, and end as the mean over the members. Logs are read from the averaged metrics.
    * Seeds and counters end where one plain step leaves them: members share their dropout masks.
    * With `sharded`, metrics count each row once, members draw dropout masks one after the other, and batch
      normalisation sees parts of the batch (ghost batches).

    Two entries join the logs, of the last step of each execution in between and as the mean of these for an epoch:
    ``population_agreement``, ``|mean g|^2 / mean |g|^2`` over the members' gradients, from 1 / members (independent) to
    1 (equal); and ``population_spread``, the standard deviation (divided by n) of their losses, NaN for a
    ``train_step`` without a metric named "loss". With several replicas each sees its own rows.

    With sigma 0 the result equals plain `fit` to the bit on TensorFlow and torch, and to a rounding where XLA compiles
    (JAX, ``jit_compile=True``) or TensorFlow's gradients are sparse (embeddings; they become dense). With `sharded`,
    losses must be means over rows, as Keras's are by default; a sum counts as a mean over members. Stateful random
    operations of TensorFlow (not Keras's) in custom layers differ between members.

    Examples
    --------
    >>> import keras, numpy as np
    >>> from gradwise.keras import PopulationCallback
    >>> keras.utils.set_random_seed(0)
    >>> x = np.random.default_rng(0).normal(size=(64, 3)).astype("float32")
    >>> y = x.sum(1, keepdims=True)
    >>> model = keras.Sequential([keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(1)])
    >>> model.compile(optimizer="adam", loss="mse")
    >>> history = model.fit(x, y, epochs=2, verbose=0, callbacks=[PopulationCallback(population_size=4)])
    >>> 1 / 4 < history.history["population_agreement"][-1] <= 1
    True
    """

    async_safe = True  # what happens at the end of a batch is an append

    def __init__(
        self,
        population_size: int = 8,
        sigma: float | Callable[[Any], Any] = 0.1,
        sharded: bool = False,
        *,
        scale: Literal["rms", "filter", "absolute"] = "rms",
        noise: Literal["gaussian", "rademacher"] = "gaussian",
        antithetic: bool = True,
        perturb: Perturb | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(sharded, bool):
            msg = f"`sharded` must be True or False. Received: sharded={sharded!r}"
            raise TypeError(msg)
        if perturb is not None and not callable(perturb):
            msg = f"`perturb` must be a callable perturb(path, variable) -> bool. Received: perturb={perturb!r}"
            raise TypeError(msg)
        self.population = Population(
            size=population_size,
            sigma=sigma,
            scale=scale,
            noise=noise,
            antithetic=antithetic,
            seed=default_seed() if seed is None else seed,
        )
        self.sharded = sharded
        self._perturb = perturb
        self._function: PopulationFunction | None = None
        self._seen: dict[str, list[float]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_function": None}  # which holds what the backend has compiled

    def on_train_begin(self, logs: Any = None) -> None:
        """Take the place of the model's training function."""
        del logs
        check_trainer(self.model)
        # What was compiled for an earlier fit will do, unless the model was compiled anew since.
        if self._function is None or not self._function.belongs_to(self.model):
            self._function = PopulationFunction(self.model, self.population, self._perturb, sharded=self.sharded)
        self._function.install(self.params)

    def on_train_end(self, logs: Any = None) -> None:
        """Give the place back."""
        del logs
        if self._function is not None:
            self._function.remove()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Start the means of the epoch."""
        del epoch, logs
        self._seen = {AGREEMENT: [], SPREAD: []}

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Announce a training step."""
        del batch, logs
        if self._function is not None:
            self._function.announce()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Take in what the members said."""
        del batch
        for name, values in self._seen.items():
            if logs and name in logs:
                values.append(float(logs[name]))

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Put the means of the epoch into its logs."""
        del epoch
        for name, values in self._seen.items():
            known = [value for value in values if math.isfinite(value)]
            if logs is not None and values:
                logs[name] = math.fsum(known) / len(known) if known else math.nan
