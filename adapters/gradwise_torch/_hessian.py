"""Products of a model's Hessians with directions, for each sample, by two backward passes."""

import torch
from torch import Tensor

from gradwise_torch._autograd_graph import graph_leaves
from gradwise_torch._double_backward import not_differentiable
from gradwise_torch._linearize import Linearization
from gradwise_torch._sharded_models import before_forward, gather_before

__all__ = ["hessian_products"]


def hessian_products(linearization: Linearization, tangents: Tensor, chosen: Tensor | None, n_outputs: int) -> Tensor:
    """``H_io v_id``, derivatives of gradients along directions, shape (batch, n_rows, n_directions * n_inputs).

    Reverse over reverse: one backward pass for each output, and one for each of its directions. Not forward over
    reverse, which torch gets wrong through layer normalisation, silently. If rows of x share an output (atoms of one
    energy), H and v are those of the whole structure, and its product with v has a row for each atom.

    Parameters
    ----------
    linearization : Linearization
    tangents : Tensor of shape (batch, n_directions, n_inputs)
    chosen : integer Tensor of shape (batch, n_rows), optional
        Which outputs, for each sample; all by default.
    n_outputs : int

    Raises
    ------
    ValueError
        If no gradient depends on x: the model is linear in x.
    RuntimeError
        If torch cannot differentiate the model twice.
    """
    primal = linearization.primal
    batch, n_directions, n_inputs = tangents.shape
    n_rows = n_outputs if chosen is None else chosen.shape[1]
    directions = [v.to(primal.dtype).reshape(primal.shape) for v in tangents.unbind(1)]
    if linearization.probes is not None:
        directions = [v.clone().requires_grad_() for v in directions]
        linearization.probes.extend(directions)
    products: list[Tensor] = []
    curved = n_rows * n_directions == 0
    for k in range(n_rows):
        gradient = linearization.pull_back(linearization.cotangents(k, chosen, n_outputs), last=False, twice=True)
        for d, v in enumerate(directions):
            last = k == n_rows - 1 and d == n_directions - 1
            product = _derivative_along(linearization, gradient, v, last=last)
            curved = curved or product is not None
            product = primal.new_zeros((batch, n_inputs)) if product is None else product
            products.append(product.reshape(batch, n_inputs))
    if not curved:
        msg = (
            "second derivatives of `model` must not all be zero whatever its weights; got a model that is linear in "
            "`x`. Match first derivatives, or use a smooth activation (tanh, softplus, GELU, SiLU)"
        )
        raise ValueError(msg)
    if not products:
        return primal.new_zeros((batch, n_rows, n_directions * n_inputs))
    return torch.cat(products, dim=1).reshape(batch, n_rows, n_directions * n_inputs)


def _derivative_along(linearization: Linearization, gradient: Tensor, v: Tensor, *, last: bool) -> Tensor | None:
    if not gradient.requires_grad:
        return None
    create_graph = linearization.create_graph
    # A once_differentiable function connects its derivatives to leaves of its own, behind an operation that raises.
    others = [] if linearization.probes is None else graph_leaves(gradient)
    try:
        product, *_ = torch.autograd.grad(
            gradient,
            [linearization.primal, *others],
            before_forward(linearization.sharded, v.to(gradient.dtype), gradient)
            if create_graph
            else v.to(gradient.dtype),
            create_graph=create_graph,
            retain_graph=create_graph or linearization.keep_graph or not last,
            allow_unused=True,
        )
    except (RuntimeError, NotImplementedError) as error:
        raise not_differentiable(error, times="twice, three times to train") from error
    if product is not None:
        gather_before(linearization.sharded, product)
    return product
