"""PopulationGradient: any Keras optimizer, one member of the population per step."""

from collections.abc import Callable
from typing import Any, Literal

import keras

from gradwise._population import Population
from gradwise_keras._backend import assign_here, no_gradients, ops, outside_graph
from gradwise_keras._perturbation import Perturbation
from gradwise_keras._seeds import default_seed
from gradwise_keras._selection import Perturb, perturbed
from gradwise_keras._training_step import counter_of

__all__ = ["PopulationGradient", "population_gradient_of"]


@keras.saving.register_keras_serializable(package="gradwise")
class PopulationGradient(keras.optimizers.Optimizer):
    r"""Steps an optimizer with the gradient of one perturbed copy of the weights at a time.

    Every step moves the weights back to their mean :math:`\theta`, lets `inner_optimizer` step there with the gradient
    it is given, and moves them to the next member, :math:`\theta + \sigma s(\theta)\,\varepsilon`, where the next
    gradient is taken. Consecutive steps form the population: one pass per step, with the noise of
    `PopulationCallback`. With ``gradient_accumulation_steps`` of `inner_optimizer`, each of them is a member.

    Prefer `PopulationCallback`, with ``population_size=1`` for one pass per step, where `fit` is called: it never
    leaves a member in place. This optimizer is for training loops that call ``optimizer.apply``, and for trainers that
    take no callback. **Between steps the weights are those of a member.** They are the mean before the first step, at
    the end of `fit`, and after `restore_mean`, which `MeanWeights` calls before validation and at the end of an epoch.

    Parameters
    ----------
    inner_optimizer : keras.optimizers.Optimizer or str
        Takes the steps; learning rate, clipping, weight decay and moving averages are its own.
    sigma : float or callable, default 0.1
        Size of the noise, in units of `scale`. A callable receives the step as a scalar tensor, as a
        `keras.optimizers.schedules.LearningRateSchedule` does.
    scale : {"rms", "filter", "absolute"}
        Noise relative to the root mean square of each tensor, of each slice along its last axis, or in weight units.
    noise : {"gaussian", "rademacher"}
        Distribution of the noise.
    perturb : callable, optional
        ``perturb(path, variable) -> bool`` chooses variables; by default those with at least two axes.
    seed : int, optional
        Seed of the noise; see `PopulationCallback`. Saved with the optimizer.
    name : str, optional
        As of any Keras optimizer.

    Raises
    ------
    TypeError, ValueError
        Bad arguments, by name.

    Notes
    -----
    The mean is an optimizer variable, so that saved and resumed training goes on bit for bit; it takes the memory of
    the perturbed weights once. Weights that are written to while they are the mean (``set_weights`` between fits) are
    taken as they are; what is written over a member is lost at the next step: call `restore_mean` before. The first
    gradient after the mean was in place is one at the mean. With sigma 0 training equals `inner_optimizer`'s, bit for
    bit.

    Examples
    --------
    >>> import keras, numpy as np
    >>> from gradwise.keras import MeanWeights, PopulationGradient
    >>> keras.utils.set_random_seed(0)
    >>> x = np.random.default_rng(0).normal(size=(64, 3)).astype("float32")
    >>> y = x.sum(1, keepdims=True)
    >>> model = keras.Sequential([keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(1)])
    >>> model.compile(optimizer=PopulationGradient("adam", sigma=0.1), loss="mse")
    >>> history = model.fit(x, y, epochs=2, verbose=0, validation_data=(x, y), callbacks=[MeanWeights()])
    >>> bool(np.isclose(history.history["val_loss"][-1], model.evaluate(x, y, verbose=0)))
    True
    """

    def __init__(
        self,
        inner_optimizer: Any,
        sigma: float | Callable[[Any], Any] = 0.1,
        *,
        scale: Literal["rms", "filter", "absolute"] = "rms",
        noise: Literal["gaussian", "rademacher"] = "gaussian",
        perturb: Perturb | None = None,
        seed: int | None = None,
        name: str | None = None,
    ) -> None:
        if not isinstance(inner_optimizer, keras.optimizers.Optimizer | str | dict):
            msg = f"`inner_optimizer` must be an optimizer or the name of one. Received: {inner_optimizer=}"
            raise TypeError(msg)
        inner_optimizer = keras.optimizers.get(inner_optimizer)
        if isinstance(inner_optimizer, PopulationGradient):
            msg = (
                f"`inner_optimizer` must not be a PopulationGradient. Received: inner_optimizer={inner_optimizer.name}"
            )
            raise TypeError(msg)
        if isinstance(inner_optimizer, keras.optimizers.LossScaleOptimizer):  # which would scale once more than unscale
            msg = (
                "`inner_optimizer` must not be a LossScaleOptimizer. Received: inner_optimizer="
                f"{inner_optimizer.name}. Use LossScaleOptimizer(PopulationGradient(optimizer)), as `compile` does for "
                "mixed_float16"
            )
            raise TypeError(msg)
        if perturb is not None and not callable(perturb):
            msg = f"`perturb` must be a callable perturb(path, variable) -> bool. Received: perturb={perturb!r}"
            raise TypeError(msg)
        super().__init__(learning_rate=0.0, name=name)
        self.inner_optimizer = inner_optimizer
        self.population = Population(
            size=1,
            sigma=sigma,
            scale=scale,
            noise=noise,
            antithetic=False,
            seed=default_seed() if seed is None else seed,
        )
        self._perturb = perturb

    def build(self, variables: list[Any]) -> None:
        """Make the variables that keep the mean of `variables`."""
        if self.built:
            return
        chosen = perturbed(variables, self._perturb)
        moved = [variables[index] for index in chosen]
        # Filled by the first step: what is assigned here is lost where TensorFlow builds while it traces.
        self._means = [self.add_variable_from_reference(variable, name="mean") for variable in moved]
        # Of the type of Keras's counters: TensorFlow keeps 32-bit integers off GPUs, out of reach of XLA.
        self._away = self.add_variable(shape=(), dtype="int", name="away_from_mean")
        with outside_graph():
            # Not a list of our own: Keras takes variables in an optimizer's lists for the optimizer's.
            self._perturbation = Perturbation(self.population, moved, chosen, paired=False)
        self.inner_optimizer.build(variables)
        super().build(variables)

    @property
    def variables(self) -> list[Any]:
        """Own variables and the inner optimizer's."""
        return [*self._variables, *self.inner_optimizer.variables]

    def set_weights(self, weights: list[Any]) -> None:
        """Set the values of `variables`."""
        own = len(self._variables)
        super().set_weights(weights[:own])
        self.inner_optimizer.set_weights(weights[own:])

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        """Step from the mean with gradients that were taken at a member, and go to the next member."""
        if len(grads) == 0:  # as any Keras optimizer
            return
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)  # of what may be an iterator
        if not self.built:
            if trainable_variables is None:
                msg = (
                    "`trainable_variables` must be given to an optimizer that is not built. Received: None. "
                    "Call `build(trainable_variables)` first"
                )
                raise ValueError(msg)
            with keras.name_scope(self.name, caller=self):
                self.build(trainable_variables)
        with no_gradients():
            for variable, mean in zip(self._perturbation.variables, self._current_means(), strict=True):
                assign_here(variable, mean)
            self.inner_optimizer.apply(grads, trainable_variables)
            means = [ops.copy(variable.value) for variable in self._perturbation.variables]
            for kept, mean in zip(self._means, means, strict=True):
                assign_here(kept, mean)
            weights = self._perturbation.at(counter_of(self.inner_optimizer).value, means)(0)
            for variable, value in zip(self._perturbation.variables, weights, strict=True):
                assign_here(variable, value)
            assign_here(self._away, ops.ones((), self._away.dtype))

    def _current_means(self) -> list[Any]:
        away = self._away.value > 0
        return [
            ops.where(away, kept.value, variable.value)
            for kept, variable in zip(self._means, self._perturbation.variables, strict=True)
        ]

    def restore_mean(self) -> None:
        """Bring the mean back, bit for bit, until the next step; outside of compiled functions."""
        if not self.built:
            return
        if self._away._value is None:
            msg = "`restore_mean` needs the variables that JAX's `fit` took away; call `model.jax_state_sync()` first"
            raise RuntimeError(msg)
        for variable, mean in zip(self._perturbation.variables, self._current_means(), strict=True):
            variable.assign(mean)
        self._away.assign(0)

    def finalize_variable_values(self, var_list: list[Any]) -> None:
        """At the end of `fit`: the mean, or what the inner optimizer makes of it (a moving average)."""
        if self.built and self._away._value is None:  # lost, on JAX: the first step of `fit` raised
            return
        self.restore_mean()
        self.inner_optimizer.finalize_variable_values(var_list)

    def scale_loss(self, loss: Any) -> Any:
        """The inner optimizer's scale of the loss."""
        return self.inner_optimizer.scale_loss(loss)

    @property
    def loss_scale_factor(self) -> Any:
        """The inner optimizer's: a LossScaleOptimizer around takes it away."""
        return self.inner_optimizer.loss_scale_factor

    @loss_scale_factor.setter
    def loss_scale_factor(self, factor: Any) -> None:
        if "inner_optimizer" in vars(self):  # not from Keras's constructor
            self.inner_optimizer.loss_scale_factor = factor

    def exclude_from_weight_decay(self, var_list: Any = None, var_names: Any = None) -> None:
        """Exclude variables from the inner optimizer's weight decay."""
        self.inner_optimizer.exclude_from_weight_decay(var_list, var_names)

    @property
    def iterations(self) -> Any:
        """The inner optimizer's steps."""
        return self.inner_optimizer.iterations

    @property
    def learning_rate(self) -> Any:
        """The inner optimizer's learning rate."""
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        self.inner_optimizer.learning_rate = learning_rate

    def get_config(self) -> dict[str, Any]:
        """All arguments."""
        serialize = keras.saving.serialize_keras_object
        return {
            "inner_optimizer": serialize(self.inner_optimizer),
            "sigma": serialize(self.population.sigma),
            "scale": self.population.scale,
            "noise": self.population.noise,
            "perturb": serialize(self._perturb),
            "seed": self.population.seed,
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> "PopulationGradient":
        """The optimizer that `get_config` described."""
        objects = {
            name: keras.saving.deserialize_keras_object(config[name], custom_objects=custom_objects)
            for name in ("inner_optimizer", "sigma", "perturb")
        }
        return cls(**{**config, **objects})


def population_gradient_of(optimizer: Any) -> PopulationGradient | None:
    """The PopulationGradient that `optimizer` is, or that a LossScaleOptimizer has inside; None if there is none."""
    while optimizer is not None and not isinstance(optimizer, PopulationGradient):
        optimizer = getattr(optimizer, "inner_optimizer", None)
    return optimizer
