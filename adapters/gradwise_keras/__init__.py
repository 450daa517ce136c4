"""The Keras 3 side of gradwise (TensorFlow, JAX and torch backends); import it as `gradwise.keras`."""

from gradwise_keras._attach import attach_gradient_matching
from gradwise_keras._callback import PopulationCallback
from gradwise_keras._matching_loss import GradientMatching
from gradwise_keras._mean_weights import MeanWeights
from gradwise_keras._optimizer import PopulationGradient
from gradwise_keras._with_derivatives import WithDerivatives

__all__ = [
    "GradientMatching",
    "MeanWeights",
    "PopulationCallback",
    "PopulationGradient",
    "WithDerivatives",
    "attach_gradient_matching",
]

for _name in __all__:
    globals()[_name].__module__ = "gradwise.keras"  # where users find it: in reprs, pickles and saved models too
