"""A call and its pullback, on the three backends: the only module here that knows them apart.

Reverse mode only: torch differentiates forward mode through layer and batch normalisation wrongly, and silently.
"""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
from keras import ops

__all__ = ["Pullback", "call_with_pullback", "outside_compilation", "random_streams"]

# A tensor of whichever backend runs; Keras has no static type for it.
Tensor = Any


class Pullback(NamedTuple):
    """What a call returned, and the way back to its input."""

    outputs: Tensor
    pull_back: Callable[[Tensor], Tensor | None]
    """From cotangents of the shape of `outputs` to the product of the shape of x; None if x does not reach them."""
    losses: list[Tensor]
    """What `add_loss` collected in a scope of its own (JAX), for the caller to add again."""


def call_with_pullback(
    call: Callable[[Tensor], Tensor], x: Tensor, model: keras.Model, *, collect_losses: bool, check: bool
) -> Pullback:
    """Run ``call(x)``, which runs `model`, so that products with its Jacobian can be taken afterwards.

    State that the call updates (statistics, seeds) is updated once. The products can be differentiated again.

    Parameters
    ----------
    call : callable
    x : Tensor of shape (batch, ...)
    model : keras.Model
        Built.
    collect_losses : bool
        Whether what layers pass to `add_loss` is wanted.
    check : bool
        On JAX, whether to look for outputs that x does not reach: that takes a second trace.
    """
    backend = keras.config.backend()
    if backend == "tensorflow":
        return _tensorflow(call, x)
    if backend == "torch":
        return _torch(call, x)
    if backend == "jax":
        return _jax(call, x, model, collect_losses=collect_losses, check=check)
    msg = f"gradwise needs the TensorFlow, JAX or torch backend of Keras. Received: backend={backend!r}"
    raise ValueError(msg)


def outside_compilation(function: Callable[..., Any]) -> Callable[..., Any]:
    """On the torch backend, make torch.compile step around `function`: it cannot differentiate a derivative."""
    if keras.config.backend() != "torch":
        return function
    from gradwise_torch._double_backward import outside_compilation as torch_outside_compilation

    return torch_outside_compilation(function)


def random_streams(x: Tensor) -> Any:
    """Where the backend's global random streams stand, to `rewind()` them; None where layers have their own."""
    if keras.config.backend() != "torch":
        return None
    from gradwise_torch._random import RandomStreams

    return RandomStreams([x.device], only_torch=True)  # which a Dropout layer without a seed draws from


def _tensorflow(call: Callable[[Tensor], Tensor], x: Tensor) -> Pullback:
    import tensorflow as tf

    # persistent: one product for each output
    with _exact_moments, tf.GradientTape(persistent=True) as tape:
        x = tf.identity(x)
        tape.watch(x)
        outputs = call(x)
    return Pullback(outputs, lambda cotangents: tape.gradient(outputs, x, output_gradients=cotangents), [])


class _ExactMoments:
    """Within it, `tf.nn.moments` is exact to all orders.

    TensorFlow holds the mean constant inside the variance. That is right for first derivatives and, silently, wrong for
    second ones: 1.3 % of a training gradient through LayerNormalization in a small test. Replicas are traced in several
    threads, so the last one to leave puts TensorFlow's own function back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._original: Any = None

    def __enter__(self) -> None:
        import tensorflow as tf

        with self._lock:
            if self._inside == 0:
                self._original, tf.nn.moments = tf.nn.moments, _moments
            self._inside += 1

    def __exit__(self, *args: object) -> None:
        import tensorflow as tf

        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                tf.nn.moments = self._original


_exact_moments = _ExactMoments()


def _moments(x: Tensor, axes: Any, shift: Any = None, keepdims: bool = False, name: Any = None) -> Any:
    """Mean and variance, with the arguments of `tf.nn.moments`, which does not use `shift` either."""
    import tensorflow as tf

    del shift, name
    mean: Any = tf.reduce_mean(x, axes, keepdims=True)
    variance: Any = tf.reduce_mean(tf.math.squared_difference(x, mean), axes, keepdims=True)
    return (mean, variance) if keepdims else (tf.squeeze(mean, axes), tf.squeeze(variance, axes))


def _torch(call: Callable[[Tensor], Tensor], x: Tensor) -> Pullback:
    import torch

    from gradwise_torch._double_backward import differentiable_kernels

    trainable = torch.is_grad_enabled()
    # enable_grad alone is not enough in inference mode: tensors made there never require gradients.
    recording = torch.inference_mode(False) if torch.is_inference_mode_enabled() else torch.enable_grad()
    with recording, differentiable_kernels():
        leaf = (x.clone() if x.is_inference() else x.detach()).requires_grad_()
        outputs = call(leaf.clone())  # a clone, so that a first layer that works in place does not overwrite the leaf

    def pull_back(cotangents: Tensor) -> Tensor | None:
        if not outputs.requires_grad:
            return None
        (product,) = torch.autograd.grad(
            outputs, leaf, cotangents, create_graph=trainable, retain_graph=True, allow_unused=True
        )
        return product

    if trainable or not isinstance(outputs, torch.Tensor):
        return Pullback(outputs, pull_back, [])
    return Pullback(outputs.detach(), pull_back, [])


def _jax(
    call: Callable[[Tensor], Tensor], x: Tensor, model: keras.Model, *, collect_losses: bool, check: bool
) -> Pullback:
    import jax

    # Tracers of the inner trace must not leak: whatever the call writes goes to a scope of its own, and comes out of
    # the trace as an auxiliary result.
    state = [*model.trainable_variables, *model.non_trainable_variables]
    values = [(variable, variable.value) for variable in state]

    def traced(x: Tensor) -> tuple[Tensor, tuple[list[Tensor], list[Tensor]]]:
        with keras.StatelessScope(values, collect_losses=collect_losses) as scope:
            outputs = call(x)
            losses = list(scope.losses)
            if collect_losses:  # forget the ids of inner tracers, which another tensor may have later
                model._clear_losses()
        return outputs, ([scope.get_current_value(variable) for variable in model.non_trainable_variables], losses)

    outputs, pull_back, (updated, losses) = jax.vjp(traced, x, has_aux=True)
    if check and not _reaches(lambda x, cotangents: jax.vjp(traced, x, has_aux=True)[1](cotangents)[0], x, outputs):
        return Pullback(outputs, lambda _: None, losses)
    for variable, value in zip(model.non_trainable_variables, updated, strict=True):
        variable.assign(value)
    return Pullback(outputs, lambda cotangents: pull_back(cotangents)[0], losses)


def _reaches(product: Callable[[Tensor, Tensor], Tensor], x: Tensor, cotangents: Tensor) -> bool:
    """Whether ``product(x, cotangents)`` depends on the cotangents; JAX gives zeros where others give None."""
    import jax

    jaxpr = jax.make_jaxpr(product)(x, ops.zeros_like(cotangents)).jaxpr
    reached = {id(jaxpr.invars[1])}
    for equation in jaxpr.eqns:
        if any(id(variable) in reached for variable in equation.invars):
            reached.update(map(id, equation.outvars))
    return any(id(variable) in reached for variable in jaxpr.outvars)
