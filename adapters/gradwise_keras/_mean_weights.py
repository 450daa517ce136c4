"""MeanWeights: the mean weights of a `PopulationGradient` for whoever reads weights during `fit`."""

from typing import Any

import keras

from gradwise_keras._optimizer import PopulationGradient, population_gradient_of

__all__ = ["MeanWeights"]


class MeanWeights(keras.callbacks.Callback):
    """Shows validation, checkpoints and the other callbacks the mean weights of a `PopulationGradient`.

    Put it before the callbacks that read weights. The first gradient of the next epoch is then one at the mean.

    Examples
    --------
    >>> from gradwise.keras import MeanWeights
    >>> callbacks = [MeanWeights()]  # then ModelCheckpoint, EarlyStopping, ...
    """

    def _optimizer(self) -> PopulationGradient:
        given: Any = getattr(self.model, "optimizer", None)
        optimizer = population_gradient_of(given)
        if optimizer is None:
            msg = (
                "MeanWeights needs a model that is compiled with a PopulationGradient. Received: "
                f"optimizer={type(given).__name__}"
            )
            raise ValueError(msg)
        return optimizer

    def on_train_begin(self, logs: Any = None) -> None:
        """Fail early with another optimizer; a member that was saved stays where it is."""
        del logs
        self._optimizer()

    def on_test_begin(self, logs: Any = None) -> None:
        """Before validation."""
        del logs
        self._optimizer().restore_mean()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Before other callbacks of the end of an epoch."""
        del epoch, logs
        self._optimizer().restore_mean()
