"""The Keras 3 side of gradwise (TensorFlow, JAX and torch backends); import it as `gradwise.keras`."""

from gradwise_keras._callback import PopulationCallback

__all__ = ["PopulationCallback"]

for _public in (PopulationCallback,):
    _public.__module__ = "gradwise.keras"  # where users find it: in reprs, pickles and saved models too
