"""Derivatives of a model's outputs with respect to its inputs: exact, for any module or function, and trainable."""

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from gradwise_torch._autograd_graph import graph_nodes
from gradwise_torch._batch_coupling import coupled_layers, couples_rows, owner, running_statistics, warn_once
from gradwise_torch._double_backward import differentiable_kernels, outside_compilation
from gradwise_torch._linearize import Model, check_input, check_output, count_outputs, first_pass, linearize, replayed

__all__ = ["jvp", "teacher_jacobian", "value_and_jacobian", "vjp"]


@outside_compilation
def value_and_jacobian(model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs of a model and their exact derivatives with respect to its inputs.

    Computes ``y = model(x)`` and ``J[i, o, j] = d y[i, o] / d x[i, j]`` by one forward pass and one backward pass for
    each output. If gradients are enabled both can be differentiated again (for training); under `no_grad` or
    `inference_mode` both come back detached. Not for thousands of outputs: see the `projections` of
    `GradientMatching`.

    Batch normalisation in training mode couples the rows of a batch: y is then what ``model(x)`` gives, and J comes
    from a second forward pass with the running statistics and the same dropout masks; a warning says so once.

    Parameters
    ----------
    model : callable
        A module (compiled or not) or any function of one tensor that treats the rows of a batch independently.
    x : Tensor of shape (batch, ...)
        Floating-point inputs of any rank.

    Returns
    -------
    y : Tensor of shape (batch,) or (batch, ...)
        What the model returns.
    jacobian : Tensor of shape (batch, n_outputs, n_inputs)
        Derivatives, in units of y per unit of x, where `n_outputs` and `n_inputs` are the products of the shapes after
        the batch. An output that does not vary with x has zeros.

    Raises
    ------
    ValueError
        If y does not depend on x at all, or has another number of rows.
    TypeError
        If x or y is not a floating-point tensor.
    NotImplementedError
        If the model has recurrent layers on cuDNN, and gradients are enabled or the layers are in eval mode.

    Examples
    --------
    >>> import torch
    >>> from gradwise.torch import value_and_jacobian
    >>> y, jacobian = value_and_jacobian(lambda x: x**2, torch.tensor([[1.0, 3.0]]))
    >>> jacobian.shape
    torch.Size([1, 2, 2])
    >>> jacobian.tolist()
    [[[2.0, 0.0], [0.0, 6.0]]]
    """
    trainable = torch.is_grad_enabled()
    with linearize(model, x, values=True, create_graph=trainable, keep_graph=trainable) as linearization:
        jacobian = linearization.rows(None, count_outputs(linearization.outputs, x))
        # One row is what autograd returned, which may share memory with the model's tensors; several are a new tensor.
        return linearization.values, jacobian.clone() if jacobian.shape[1] == 1 else jacobian


@outside_compilation
def vjp(func: Model, primals: Tensor | tuple[Tensor], cotangents: Tensor | tuple[Tensor]) -> tuple[Tensor, Tensor]:
    """Outputs of a model and one vector-Jacobian product for each sample.

    Computes ``y = func(x)`` and ``sum_o u[i, o] * d y[i, o] / d x[i, j]``, by one forward and one backward pass. Can
    be trained through if gradients are enabled. Batch normalisation is treated as in `value_and_jacobian`.

    Parameters
    ----------
    func : callable
        A module or function of one tensor.
    primals : Tensor of shape (batch, ...)
        The inputs x. A tuple of one tensor will do, as torch.func has it; here and below.
    cotangents : Tensor of the shape of y
        The vectors u, in units of something per unit of y.

    Returns
    -------
    y : Tensor
        What `func` returns.
    product : Tensor of the shape of `primals`
        The products, in units of u times y per unit of x.

    Raises
    ------
    ValueError
        If `cotangents` does not have exactly the shape of y, or y does not depend on x.

    Examples
    --------
    >>> import torch
    >>> from gradwise.torch import vjp
    >>> y, product = vjp(torch.sin, torch.zeros(1, 2), torch.tensor([[1.0, 5.0]]))
    >>> product.tolist()
    [[1.0, 5.0]]
    """
    primals, cotangents = _single("primals", primals), _single("cotangents", cotangents)
    trainable = torch.is_grad_enabled()
    with linearize(func, primals, values=True, create_graph=trainable, keep_graph=trainable) as linearization:
        if cotangents.shape != linearization.outputs.shape:
            shape = tuple(linearization.outputs.shape)
            msg = f"`cotangents` must have the shape of the outputs, {shape}; got {tuple(cotangents.shape)}"
            raise ValueError(msg)
        cotangents = cotangents.clone() if cotangents.is_inference() else cotangents
        return linearization.values, linearization.pull_back(cotangents.to(linearization.outputs.dtype), last=True)


@outside_compilation
def jvp(func: Model, primals: Tensor | tuple[Tensor], tangents: Tensor | tuple[Tensor]) -> tuple[Tensor, Tensor]:
    """Outputs of a model and one Jacobian-vector product for each sample, by forward-mode differentiation.

    Computes ``y = func(x)`` and ``sum_j d y[i, o] / d x[i, j] * v[i, j]`` in one pass, whatever the number of outputs.
    Not for training models with layer normalisation: torch differentiates forward mode through it wrongly and silently
    (the gradient is 30 to 50 % off), so that is refused. Batch normalisation is treated as in `value_and_jacobian`.

    Parameters
    ----------
    func : callable
        A module or function of one tensor.
    primals : Tensor of shape (batch, ...)
        The inputs x. A tuple of one tensor will do, as torch.func has it; here and below.
    tangents : Tensor of the shape of `primals`
        The directions v, in units of x (or of x per unit of something).

    Returns
    -------
    y : Tensor
        What `func` returns.
    product : Tensor of the shape of y
        The derivatives along v, in units of y for v in units of x.

    Raises
    ------
    ValueError
        If `tangents` does not have exactly the shape of `primals`.
    RuntimeError
        If gradients are enabled and would be silently wrong. Use `value_and_jacobian` or `vjp`.

    Examples
    --------
    >>> import torch
    >>> from gradwise.torch import jvp
    >>> y, product = jvp(torch.sin, torch.zeros(1, 2), torch.tensor([[1.0, 5.0]]))
    >>> product.tolist()
    [[1.0, 5.0]]
    """
    primals, tangents = _single("primals", primals), _single("tangents", tangents)
    check_input("primals", primals)
    if tangents.shape != primals.shape:
        msg = f"`tangents` must have the shape of `primals`, {tuple(primals.shape)}; got {tuple(tangents.shape)}"
        raise ValueError(msg)
    trainable = torch.is_grad_enabled()
    layers = coupled_layers(func)
    if layers:
        warn_once(func)
    values, streams = first_pass(func, primals) if layers else (None, None)
    inference = torch.is_inference_mode_enabled()
    _load_forward_mode()
    with (
        torch.inference_mode(False),
        torch.set_grad_enabled(trainable),
        differentiable_kernels(),
        running_statistics(layers),
        replayed(streams),
    ):
        x, v = (tensor.clone() if inference else tensor for tensor in (primals, tangents.to(primals.dtype)))
        result: tuple[Any, ...] = torch.func.jvp(lambda x: check_output(func(x.clone())), (x,), (v,))
    y, product = result
    if trainable and (_crosses_layer_norm(product) or couples_rows(product)):
        msg = (
            "a forward-mode derivative through layer or batch normalisation must not be trained: torch gets its "
            "gradient wrong, silently. Use `value_and_jacobian` or `vjp`, or call under `torch.no_grad()`"
        )
        raise RuntimeError(msg)
    return (y if values is None else values), product


@outside_compilation
def teacher_jacobian(model: Model, x: Tensor) -> Tensor:
    """Derivatives of a trained model in evaluation mode, as targets for another one.

    Computes the Jacobian of `value_and_jacobian` with every layer in eval mode, detached. Training flags are put back,
    layer by layer. Not for a teacher with kinks (ReLU): between them its derivatives are constant.

    Parameters
    ----------
    model : callable
        The trained model.
    x : Tensor of shape (batch, ...)
        Where to take the derivatives.

    Returns
    -------
    Tensor of shape (batch, n_outputs, n_inputs)
        Derivatives without graph, in units of y per unit of x.

    Raises
    ------
    ValueError
        If the outputs do not depend on x.

    Examples
    --------
    >>> import torch
    >>> from gradwise.torch import teacher_jacobian
    >>> teacher = torch.nn.Linear(2, 1)
    >>> targets = teacher_jacobian(teacher, torch.zeros(5, 2))
    >>> targets.shape, targets.requires_grad, teacher.training
    (torch.Size([5, 1, 2]), False, True)
    """
    module = owner(model)
    layers: list[nn.Module] = [] if module is None else [layer for layer in module.modules() if layer.training]
    try:
        for layer in layers:
            layer.training = False
        with torch.no_grad():
            return value_and_jacobian(model, x)[1]
    finally:
        for layer in layers:
            layer.training = True


def _single(name: str, value: Tensor | tuple[Tensor]) -> Tensor:
    if not isinstance(value, tuple):
        return value
    if len(value) != 1:
        msg = f"`{name}` must be one tensor; got {len(value)}. Close over the others: `lambda x: f(x, z)`"
        raise ValueError(msg)
    return value[0]


@cache
def _load_forward_mode() -> None:
    """Let torch import its forward-mode rules, without the DeprecationWarning that it gives itself for them."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


def _crosses_layer_norm(tensor: Tensor) -> bool:
    return any("LayerNorm" in node.name() for node in graph_nodes(tensor))
