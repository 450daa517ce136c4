"""The Keras 3 side of gradwise (TensorFlow, JAX and torch backends); import it as `gradwise.keras`."""
