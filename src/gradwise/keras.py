"""gradwise for Keras 3 on TensorFlow, JAX or torch: pass a callback, wrap an optimizer or a model, or add a loss."""

try:
    from gradwise_keras import (
        GradientMatching,
        MeanWeights,
        PopulationCallback,
        PopulationGradient,
        WithDerivatives,
        attach_gradient_matching,
    )
except ModuleNotFoundError as error:
    if error.name != "keras":
        raise
    msg = 'gradwise.keras needs Keras 3 and one of its backends; install them with: pip install "gradwise[tensorflow]"'
    raise ModuleNotFoundError(msg, name="keras") from error

__all__ = [
    "GradientMatching",
    "MeanWeights",
    "PopulationCallback",
    "PopulationGradient",
    "WithDerivatives",
    "attach_gradient_matching",
]
