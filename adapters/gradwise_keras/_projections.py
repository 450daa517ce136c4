"""Which outputs a sample is matched at, when not all of them are."""

from typing import Any

import keras

from gradwise_keras._backend import ops

__all__ = ["DerivativeLossTracker", "draw_outputs"]

Tensor = Any


class DerivativeLossTracker(keras.metrics.Mean):
    """Mean of the derivative loss, and the number of training steps ever.

    The number lives in a metric because metrics are the only state that Keras hands to `compute_loss` on JAX, and that
    compiled steps update on all backends.
    """

    def __init__(self, name: str = "derivative_loss") -> None:
        super().__init__(name=name)
        self.calls = self.add_variable(shape=(), initializer="zeros", dtype="int32", name="calls")

    def next_call(self) -> Tensor:
        """The number of calls before this one."""
        calls = ops.copy(self.calls.value)
        self.calls.assign(calls + 1)
        return calls

    def reset_state(self) -> None:
        """Forget the mean, but not the number of calls: the next epoch must not draw as the last one did."""
        for variable in self.variables:
            if variable is not self.calls:
                variable.assign(ops.zeros(variable.shape, dtype=variable.dtype))


class _Key(keras.random.SeedGenerator):
    """A key that Keras's random functions take for a stream: counter-based, so that no stream is touched."""

    def __init__(self, key: Tensor) -> None:
        self.key = key

    def next(self, ordered: bool = True) -> Tensor:  # noqa: ARG002 - Keras's signature
        return self.key


def draw_outputs(key: tuple[int, Tensor], batch: Any, n_outputs: int, n_rows: int) -> Tensor:
    """Distinct outputs for each sample, uniformly and without replacement, integers of shape (batch, n_rows)."""
    seed, call = key
    # Scattered, because torch's backend adds the two numbers: seeds 0 and 1 would draw alike, one step apart.
    scattered = seed * 2654435761 % 2**31
    counter = ops.stack([ops.convert_to_tensor(scattered, dtype="int32"), ops.cast(call, "int32")])
    # Keras wants another integer type for seeds on each backend.
    noise = keras.random.uniform((batch, n_outputs), dtype="float32", seed=_Key(ops.cast(counter, _seed_dtype())))
    return ops.top_k(noise, n_rows, sorted=False)[1]  # the largest of independent numbers: any subset is as likely


def _seed_dtype() -> str:
    return {"tensorflow": "int64", "jax": "uint32", "torch": "int32"}[keras.config.backend()]
