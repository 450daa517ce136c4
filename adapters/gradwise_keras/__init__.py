"""The Keras 3 side of gradwise (TensorFlow, JAX and torch backends); import it as `gradwise.keras`."""

from gradwise_keras._callback import PopulationCallback
from gradwise_keras._optimizer import MeanWeights, PopulationGradient

__all__ = ["MeanWeights", "PopulationCallback", "PopulationGradient"]

for _public in (MeanWeights, PopulationCallback, PopulationGradient):
    _public.__module__ = "gradwise.keras"  # where users find it: in reprs, pickles and saved models too
