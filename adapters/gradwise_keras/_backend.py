"""What the three backends of Keras do differently, as far as moving weights is concerned."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import keras
import numpy as np

__all__ = ["WORD", "as_word", "assign_here", "dense", "no_gradients", "outside_graph", "patched", "rewound"]

BACKEND = keras.backend.backend()

# Arithmetic of 32-bit words needs 64 bits, or 32 without a sign: JAX has only those by default, the others only these.
_WORD_DTYPE = "uint32" if BACKEND == "jax" else "int64"
WORD: Any = np.uint32(2**32 - 1) if BACKEND == "jax" else 2**32 - 1


def as_word(values: Any) -> Any:
    """`values` in a type that ``gradwise._noise.window_draw`` can compute with."""
    if keras.ops.is_tensor(values):
        return keras.ops.cast(values, _WORD_DTYPE)
    return keras.ops.convert_to_tensor(np.asarray(values).astype(_WORD_DTYPE))


def assign_here(variable: Any, value: Any) -> None:
    """Assign without telling other replicas: what all of them compute alike needs no mean over them.

    ``variable.assign`` of a mirrored TensorFlow variable averages over the replicas, which costs a reduction for each
    tensor and is not always exact.
    """
    if BACKEND == "tensorflow":
        import tensorflow as tf

        tf.raw_ops.AssignVariableOp(resource=variable.handle, value=value)
    else:
        variable.assign(value)


def dense(gradient: Any) -> Any:
    """A gradient as a tensor of its own: TensorFlow's embeddings give sparse ones, torch's parameters keep theirs."""
    if gradient is None:
        return None
    if BACKEND == "torch":
        return gradient.detach().clone()
    if BACKEND == "tensorflow":
        import tensorflow as tf

        if isinstance(gradient, tf.IndexedSlices):
            return tf.math.unsorted_segment_sum(gradient.values, gradient.indices, gradient.dense_shape[0])
    return gradient


def no_gradients() -> AbstractContextManager[Any]:
    """Where torch records no graph."""
    if BACKEND == "torch":
        import torch

        return torch.no_grad()
    return nullcontext()


def outside_graph(model: Any) -> AbstractContextManager[Any]:
    """Where variables can be made that belong to the model's devices, also while TensorFlow traces a step."""
    if BACKEND != "tensorflow":
        return nullcontext()
    import tensorflow as tf

    stack = ExitStack()
    stack.enter_context(tf.init_scope())
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


def rewound() -> Any:
    """Torch's random streams, which dropout without a seed draws from, to be rewound; None on other backends."""
    if BACKEND != "torch":
        return None
    import torch

    from gradwise_torch._random import RandomStreams

    devices = [torch.device("cuda", torch.cuda.current_device())] if torch.cuda.is_initialized() else []
    return RandomStreams(devices, only_torch=True)
