"""Better gradients for models people already have."""

__version__ = "0.1.0"

__all__ = ["__version__"]
