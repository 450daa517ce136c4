"""A model at one batch, ready for products with its Jacobian: one forward pass, whatever the model and the mode."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradwise_torch._batch_coupling import coupled_layers, owner, running_statistics, warn_once, warn_unseen
from gradwise_torch._double_backward import differentiable_kernels, refuse_cudnn_rnn
from gradwise_torch._hessian_norms import thrice_differentiable_norms
from gradwise_torch._random import RandomStreams
from gradwise_torch._sharded_models import (
    before_forward,
    gather_before,
    refuse_flattened,
    sharded_modules,
    taking_derivatives,
)
from gradwise_torch._static_graph import refuse_static_graph, refuse_static_outputs

__all__ = [
    "Linearization",
    "Model",
    "check_input",
    "check_output",
    "count_outputs",
    "first_pass",
    "linearize",
    "replayed",
]

Model = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Linearization:
    """A model at one batch, ready for products with its Jacobian."""

    primal: Tensor
    """What to differentiate with respect to, shape (batch, ...)."""
    outputs: Tensor
    """Outputs that depend on `primal`."""
    values: Tensor
    """What the model returned: `outputs`, unless derivatives needed a second forward pass."""
    create_graph: bool
    """Whether derivatives can be differentiated again."""
    keep_graph: bool
    """Whether somebody still needs the graph of `outputs` after the last derivative."""
    probes: list[Tensor] | None = field(default=None)
    """If a list, cotangents require gradients and are collected here.

    A once_differentiable function detaches its derivatives, silently, unless the cotangents require gradients.
    """
    sharded: tuple[Any, ...] = ()
    """The parts of the model that FSDP2 has sharded."""

    @property
    def n_inputs(self) -> int:
        """Number of inputs of a row."""
        return math.prod(self.primal.shape[1:])

    def pull_back(self, cotangents: Tensor, *, last: bool, twice: bool = False) -> Tensor:
        """Vector-Jacobian product, of the shape of `primal`; `twice` if it will be differentiated by `primal`."""
        if self.probes is not None:
            self.probes.append(cotangents.requires_grad_())
        if self.create_graph or twice:
            cotangents = before_forward(self.sharded, cotangents, self.outputs, self.values)
        # allow_unused: an output that the inputs do not reach gives None here and a clear error below.
        (product,) = torch.autograd.grad(
            self.outputs,
            self.primal,
            cotangents,
            create_graph=self.create_graph or twice,
            retain_graph=self.create_graph or twice or self.keep_graph or not last,
            allow_unused=True,
        )
        if product is None:
            raise _independent()
        gather_before(self.sharded, product)
        half = product.dtype.itemsize == 2
        return product.float() if half and torch.is_autocast_enabled(product.device.type) else product

    def cotangents(self, k: int, chosen: Tensor | None, n_outputs: int) -> Tensor:
        """What picks row k of `rows`: ones at an output of each sample."""
        if n_outputs == 1:
            return torch.ones_like(self.outputs)
        flat = self.outputs.new_zeros((self.primal.shape[0], n_outputs))
        if chosen is None:
            flat[:, k] = 1.0
        else:
            flat.scatter_(1, chosen if chosen.shape[1] == 1 else chosen[:, k : k + 1], 1.0)
        return flat if self.outputs.ndim == 2 else flat.reshape(self.outputs.shape)

    def rows(self, chosen: Tensor | None, n_outputs: int) -> Tensor:
        """Rows of each sample's Jacobian, shape (batch, n_rows, n_inputs); a single row may be a view.

        Parameters
        ----------
        chosen : integer Tensor of shape (batch, n_rows), optional
            Which outputs, for each sample; all by default.
        n_outputs : int
            How many outputs a sample has. With one output, `outputs` may have any shape: its sum is differentiated.
        """
        batch = self.primal.shape[0]
        n_rows = n_outputs if chosen is None else chosen.shape[1]
        # A plain loop: on CPU it beats vmap and is_grads_batched, and it needs nothing from the model's operations.
        products: list[Tensor] = []
        for k in range(n_rows):
            cotangents = self.cotangents(k, chosen, n_outputs)
            products.append(self.pull_back(cotangents, last=k == n_rows - 1).reshape(batch, 1, self.n_inputs))
        if len(products) == 1:
            return products[0]
        return torch.cat(products, dim=1) if products else self.primal.new_zeros((batch, 0, self.n_inputs))


@contextmanager
def linearize(
    model: Model,
    x: Tensor,
    *,
    values: bool,
    create_graph: bool,
    keep_graph: bool,
    check_callable: bool = True,
    probe: bool = False,
    second_order: bool = False,
) -> Iterator[Linearization]:
    """Run `model` once and keep what its derivatives need; take them inside the `with` block.

    Parameters
    ----------
    model : callable
    x : Tensor of shape (batch, ...)
    values : bool
        Whether `values` must be what ``model(x)`` returns, with its side effects on buffers. If not, batch
        normalisation in training mode costs no second forward pass and no update of its statistics.
    create_graph : bool
        Whether derivatives can be differentiated again.
    keep_graph : bool
        Whether `values` keep their graph.
    check_callable : bool
        Whether to look in the graph for what cannot be seen in `model`: batch normalisation if it is no module, and
        parameters that FSDP1 has flattened.
    probe : bool
        Whether to collect `probes`.
    second_order : bool
        Whether second derivatives are wanted, which the loss then differentiates once more.
    """
    check_input("x", x)
    refuse_static_graph(model)
    layers = coupled_layers(model)
    if layers:
        warn_once(model)
    refuse_cudnn_rnn(model, twice=create_graph)
    true_values, streams = first_pass(model, x) if layers and values else (None, None)
    without_batch_statistics = running_statistics(layers) if layers else nullcontext()
    norms_by_formula = thrice_differentiable_norms() if second_order else nullcontext()
    with _recording(), differentiable_kernels(), without_batch_statistics, norms_by_formula:
        connected = x.requires_grad and (create_graph or keep_graph)
        primal = x if connected else (x.clone() if x.is_inference() else x.detach()).requires_grad_()
        with nullcontext() if streams is None else replayed(streams):
            # A clone, so that a first layer that works in place does not overwrite what we differentiate by.
            outputs = check_output(model(primal.clone()))
        if not outputs.requires_grad:
            raise _independent()
        if check_callable and owner(model) is None:
            warn_unseen(outputs)
        if check_callable:
            refuse_flattened(outputs)
            refuse_static_outputs(outputs)
        kept = outputs if true_values is None else true_values
        sharded = sharded_modules(outputs)
        with taking_derivatives(sharded):
            yield Linearization(
                primal=primal,
                outputs=outputs,
                values=kept if keep_graph else kept.detach(),
                create_graph=create_graph,
                keep_graph=keep_graph and true_values is None,
                probes=[] if probe else None,
                sharded=sharded,
            )


def _recording() -> AbstractContextManager[object]:
    # enable_grad alone is not enough in inference mode: tensors made there never require gradients. Leaving that mode
    # enables gradients too.
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else torch.enable_grad()


Streams = tuple[RandomStreams, RandomStreams]


def first_pass(model: Model, x: Tensor) -> tuple[Tensor, Streams]:
    """What ``model(x)`` returns, and where the random streams stood before and after it."""
    module = owner(model)
    devices = [x.device, *([] if module is None else (parameter.device for parameter in module.parameters()))]
    before = RandomStreams(devices)
    values = check_output(model(x.clone()))
    return values, (before, RandomStreams(devices))


@contextmanager
def replayed(streams: Streams | None) -> Iterator[None]:
    """A second pass with the dropout masks of the first, which leaves the streams where one pass does."""
    if streams is None:
        yield
        return
    streams[0].rewind()
    try:
        yield
    finally:
        streams[1].rewind()


def count_outputs(outputs: Tensor, x: Tensor) -> int:
    """Number of outputs of a row, or ValueError if the rows of outputs and x do not correspond."""
    if outputs.ndim == 0 or outputs.shape[0] != x.shape[0]:
        msg = (
            f"the outputs of `model` must have one row for each of the {x.shape[0]} rows of `x`; got shape "
            f"{tuple(outputs.shape)}. For sums over atoms or nodes use `GradientMatching.from_outputs`"
        )
        raise ValueError(msg)
    return math.prod(outputs.shape[1:])


def check_input(name: str, x: Any) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        msg = (
            f"`{name}` must be a floating-point tensor; got {got}. For other inputs use `GradientMatching.from_outputs`"
        )
        raise TypeError(msg)
    if x.ndim == 0:
        msg = f"`{name}` must have a batch dimension; got a scalar"
        raise ValueError(msg)


def check_output(y: Any) -> Tensor:
    if not isinstance(y, Tensor):
        msg = f"`model` must return one tensor; got {type(y).__name__}. Pass a function: `lambda x: model(x).logits`"
        raise TypeError(msg)
    return y


def _independent() -> ValueError:
    return ValueError(
        "the outputs of `model` must depend on its inputs `x`; got outputs without a graph to them. Check for "
        "`detach`, `no_grad`, rounding or argmax inside the model"
    )
