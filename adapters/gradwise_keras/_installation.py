"""How a population gets into `fit`: in the place of the model's compiled training function, as long as a fit lasts."""

from typing import Any

import keras

from gradwise._population import Population
from gradwise_keras._backend import BACKEND, loops_slowly, outside_graph, patched
from gradwise_keras._optimizer import population_gradient_of
from gradwise_keras._population_step import Members
from gradwise_keras._selection import Perturb, perturbed
from gradwise_keras._stateful_step import SavedWeights, stateful_step
from gradwise_keras._stateless_step import stateless_step

__all__ = ["PopulationFunction", "check_trainer"]


class PopulationFunction:
    """Stands in ``model.train_function`` and runs Keras's own training function around the population's step.

    Nothing else of the model is replaced, except ``train_step`` while the function runs. A call that was not announced
    for this fit comes from elsewhere, maybe after a fit that broke off: it puts the plain function back.

    Parameters
    ----------
    model : keras.Model
        Compiled, with a training function.
    population : Population
    perturb : callable or None
        See `PopulationCallback`.
    sharded : bool
    """

    def __init__(self, model: Any, population: Population, perturb: Perturb | None, *, sharded: bool) -> None:
        self.plain: Any = plain_function(model)
        self._expected = False
        self._fit: Any = None
        self._history: Any = None
        self._model, self._population, self._perturb, self._sharded = model, population, perturb, sharded
        self._inner = model.train_step
        self._saved: SavedWeights | None = None
        self._step: Any = None
        self._function: Any = None
        if model.built:
            with outside_graph(model):
                self._step = self._make_step()
        installed = model.train_function
        with patched(model, train_step=self._train_step):
            model.make_train_function(force=True)
        self._function = model.train_function
        model.train_function = installed

    def belongs_to(self, model: Any) -> bool:
        """Whether this was made for the model as it is compiled now."""
        return self._model is model and self.plain is plain_function(model)

    def install(self, fit: Any) -> None:
        """Take the place of the plain function for one fit, of which `fit` is an object that it alone has."""
        installed = self._model.train_function
        if isinstance(installed, PopulationFunction) and fit is not None and installed._fit is fit:
            msg = "`callbacks` must hold one PopulationCallback at most. Received: a second one"
            raise ValueError(msg)
        self._expected, self._fit, self._history = False, fit, _history(self._model)
        self._model.train_function = self

    def announce(self) -> None:
        """Expect to be called for a batch of the fit."""
        self._model.train_function = self  # a callback may have trained on a batch of its own
        self._expected = True

    def remove(self) -> None:
        """Put the plain function back, if this one is still there."""
        if self._model.train_function is self:
            self._model.train_function = self.plain

    def __call__(self, *args: Any) -> Any:
        """One execution: the arguments and results of Keras's function."""
        expected, self._expected = self._expected and _history(self._model) is self._history, False
        if not expected:
            self.remove()
            return self.plain(*args)
        try:
            with patched(self._model, train_step=self._train_step):
                return self._function(*args)
        except BaseException:
            if self._saved is not None:
                self._saved.rescue()
            if BACKEND == "jax":
                self._rescue(args[0])
            raise

    def _rescue(self, state: Any) -> None:
        # Keras has taken the values out of the variables, and puts back only what a step has returned.
        names = ("trainable_variables", "non_trainable_variables", "optimizer_variables", "metrics_variables")
        if not any(value.is_deleted() for values in state for value in values):
            self._model._jax_state = dict(zip(names, state, strict=True))

    def _train_step(self, *args: Any) -> Any:
        if self._step is None:  # TensorFlow builds models in the first trace
            self._model._symbolic_build(data_batch=args[-1])
            with outside_graph(self._model):
                self._step = self._make_step()
        return self._step(*args)

    def _make_step(self) -> Any:
        model = self._model
        chosen = perturbed(model.trainable_variables, self._perturb)
        variables = [model.trainable_variables[index] for index in chosen]
        members = Members(
            self._population,
            variables,
            chosen,
            metrics=model.metrics_variables,
            sharded=self._sharded,
            unroll=model.run_eagerly or loops_slowly(),
        )
        if BACKEND == "jax":
            return stateless_step(model, self._inner, members, chosen)
        self._saved = SavedWeights(variables)
        return stateful_step(model, self._inner, members, self._saved)


def _history(model: Any) -> Any:
    """What every fit has its own of, unless the user passes one."""
    return getattr(model, "history", None)


def plain_function(model: Any) -> Any:
    """The training function of a model without a population, also after a fit with one that broke off."""
    function = model.train_function
    return function.plain if isinstance(function, PopulationFunction) else function


def check_trainer(model: Any) -> None:
    """Raise if a model cannot be trained with a population."""
    if getattr(model, "optimizer", None) is None:
        msg = "`model` must be compiled with an optimizer to use PopulationCallback. Received: optimizer=None"
        raise ValueError(msg)
    if population_gradient_of(model.optimizer) is not None:
        msg = (
            "`model` must be compiled with a plain optimizer to use PopulationCallback. Received: "
            "a PopulationGradient, whose members would be perturbed again"
        )
        raise ValueError(msg)
    if BACKEND == "jax" and keras.config.is_nnx_enabled():
        msg = (
            "PopulationCallback cannot replace the training step of a model on JAX while NNX is enabled. Call "
            "`keras.config.set_nnx_enabled(False)`, or wrap the optimizer in gradwise.keras.PopulationGradient"
        )
        raise RuntimeError(msg)
