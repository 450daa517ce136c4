"""What the three backends of Keras do differently, as far as moving weights is concerned."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import keras
import numpy as np

__all__ = [
    "BACKEND",
    "WORD",
    "TorchBuffers",
    "TorchStreams",
    "after",
    "as_word",
    "assign_here",
    "copies",
    "dense",
    "detached",
    "gradients",
    "loop",
    "loops_slowly",
    "no_gradients",
    "ops",
    "outside_graph",
    "patched",
]

BACKEND: str = keras.config.backend()

ops: Any = keras.ops  # whose annotations allow None nearly everywhere

# Arithmetic of 32-bit words needs 64 bits, or 32 without a sign: JAX has only those by default, the others only these.
_WORD_DTYPE = "uint32" if BACKEND == "jax" else "int64"
WORD: Any = np.uint32(2**32 - 1) if BACKEND == "jax" else 2**32 - 1


def as_word(values: Any) -> Any:
    """`values` in a type that ``gradwise._noise.window_draw`` can compute with."""
    if ops.is_tensor(values):
        return ops.cast(values, _WORD_DTYPE)
    return ops.convert_to_tensor(np.asarray(values).astype(_WORD_DTYPE))


def assign_here(variable: Any, value: Any) -> Any:
    """Assign without telling other replicas: what all of them compute alike needs no mean over them.

    ``variable.assign`` of a mirrored TensorFlow variable averages over the replicas, which costs a reduction for each
    tensor and is not always exact. Returns what `after` can wait for.
    """
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.raw_ops.AssignVariableOp(resource=variable.handle, value=value)
    variable.assign(value)
    return None


def after(operations: list[Any]) -> AbstractContextManager[Any]:
    """Where what TensorFlow computes waits for assignments: by itself it orders only those to one variable."""
    if BACKEND != "tensorflow":
        return nullcontext()
    import tensorflow as tf

    return tf.control_dependencies([operation for operation in operations if operation is not None])


def copies(variable: Any) -> tuple[Any, ...]:
    """TensorFlow's own variables behind one of Keras: one for each replica."""
    return getattr(variable.value, "values", (variable.value,))


def dense(gradient: Any) -> Any:
    """A gradient as a tensor of its own: TensorFlow's embeddings give sparse ones, torch's parameters keep theirs."""
    if gradient is None:
        return None
    if BACKEND == "torch":
        return gradient.detach().clone()
    if BACKEND == "tensorflow":
        import tensorflow as tf

        if isinstance(gradient, tf.IndexedSlices):
            rows: Any = gradient.dense_shape
            return tf.math.unsorted_segment_sum(gradient.values, gradient.indices, rows[0])
    return gradient


def loops_slowly() -> bool:
    """Whether a compiled loop runs much slower than its iterations written out: XLA's convolutions on CPUs, 8 times."""
    if BACKEND != "jax":
        return False
    import jax

    return jax.default_backend() == "cpu"


def loop(begin: int, end: int, body: Callable[[Any, Any], Any], carry: Any, *, unroll: bool) -> Any:
    """``carry = body(i, carry)`` for i from `begin` to `end`, compiled once where the backend compiles."""
    if unroll or BACKEND == "torch" or end - begin < 2:
        for i in range(begin, end):
            carry = body(i, carry)
        return carry
    if BACKEND == "jax":
        return ops.fori_loop(begin, end, body, carry)
    import tensorflow as tf

    # One at a time: the body moves weights in place.
    variables = tf.constant(begin), carry
    return tf.while_loop(
        lambda i, _: i < end, lambda i, carry: (i + 1, body(i, carry)), variables, parallel_iterations=1
    )[1]


def no_gradients() -> AbstractContextManager[Any]:
    """Where torch records no graph."""
    return gradients(enabled=False)


def gradients(*, enabled: bool = True) -> AbstractContextManager[Any]:
    """Where torch records a graph, or not."""
    if BACKEND != "torch":
        return nullcontext()
    import torch

    return torch.set_grad_enabled(enabled)


def detached(value: Any) -> Any:
    """`value` without torch's graph."""
    return value.detach() if hasattr(value, "detach") else value


def outside_graph(model: Any = None) -> AbstractContextManager[Any]:
    """Where variables can be made, on the model's devices if one is given, also while TensorFlow traces a step."""
    if BACKEND != "tensorflow":
        return nullcontext()
    import tensorflow as tf

    stack = ExitStack()
    stack.enter_context(tf.init_scope())
    if model is not None:
        stack.enter_context(model.distribute_strategy.scope())
    return stack


@contextmanager
def patched(target: Any, **attributes: Any) -> Iterator[None]:
    """Attributes of one object replaced for a while; what the object had itself comes back."""
    own = {name: vars(target)[name] for name in attributes if name in vars(target)}
    for name, value in attributes.items():
        object.__setattr__(target, name, value)  # past the setters of Keras, which track what they see
    try:
        yield
    finally:
        for name in attributes:
            if name in own:
                object.__setattr__(target, name, own[name])
            else:
                object.__delattr__(target, name)


class TorchBuffers:
    """Buffers of the torch modules inside a model, which are state but no variables; none on other backends."""

    def __init__(self, model: Any) -> None:
        self._buffers: dict[int, Any] = {}
        if BACKEND == "torch":
            wrappers = [
                layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.TorchModuleWrapper)
            ]
            self._buffers = {id(buffer): buffer for wrapper in wrappers for buffer in wrapper.module.buffers()}
        self._start = self.values()

    def __contains__(self, key: int) -> bool:
        return key in self._buffers

    def values(self) -> dict[int, Any]:
        """Copies of what they hold, by id."""
        return {key: buffer.clone() for key, buffer in self._buffers.items()}

    def write(self, values: dict[int, Any]) -> None:
        """Give those of `values` theirs, and the others what they held at first."""
        for key, buffer in self._buffers.items():
            buffer.copy_(values.get(key, self._start[key]))


class TorchStreams:
    """Where torch's random streams stand, from which dropout without a seed draws; nothing on other backends."""

    def __init__(self) -> None:
        self._streams: Any = None
        if BACKEND == "torch":
            import torch

            from gradwise_torch._random import RandomStreams

            devices = [torch.device("cuda", torch.cuda.current_device())] if torch.cuda.is_initialized() else []
            self._streams = RandomStreams(devices, only_torch=True)

    def rewind(self) -> None:
        """Go back to there."""
        if self._streams is not None:
            self._streams.rewind()
