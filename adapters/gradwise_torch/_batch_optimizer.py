"""Members of a batch that the optimizer is given: one after the other, at once, or each on rows of its own."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from gradwise_torch._batch_work import BatchWork, Way
from gradwise_torch._batches import Batch
from gradwise_torch._members import MemberOptimizer
from gradwise_torch._paths import PATHS, automatic_path, obstacle

__all__ = ["BatchOptimizer"]

LossFunction = Callable[..., Tensor]


class BatchOptimizer(MemberOptimizer):
    """Adds `backward` and `step_batch` to an optimizer that has members."""

    _ways: dict[Any, Way]  # by path and loss function
    _norm_statistics: Literal["mean", "recalibrate"]
    _on_nonfinite: Literal["raise", "skip"]
    _share_masks: bool
    _skipped: int

    def backward(
        self,
        loss_fn: LossFunction,
        /,
        *batch: Any,
        sharded: bool = False,
        vectorize: Literal["auto", "loop", "vmap", "compile"] = "auto",
        **named_batch: Any,
    ) -> Tensor:
        """Add the mean gradient of the population to ``.grad``, as ``loss.backward()`` adds that of one model.

        Clipping, accumulation over several batches and ``scaler.scale`` (inside `loss_fn`) therefore work as they
        always do, and so must ``zero_grad``. Every call has members of its own until the next step. With a `model` in
        DistributedDataParallel, processes average the mean of their members once, after the last one, and not at all
        inside of its ``no_sync``.

        Parameters
        ----------
        loss_fn : callable
            ``loss_fn(model, *batch, **named_batch)`` returns the mean loss over the batch, a tensor of one number, and
            does not call backward. `model` is the one given to the optimizer, with a member's weights.
        *batch, **named_batch
            Tensors, or lists, tuples and dicts of them.
        sharded : bool
            Whether each member sees rows of its own instead of the whole batch: about the cost of one pass. All
            tensors with axes must then have the rows first. Shards count by their number of rows; with fewer rows than
            members, there are as many members as rows. BatchNorm sees the shards (ghost batches).
        vectorize : {"auto", "loop", "vmap", "compile"}
            One member after the other; all at once by ``torch.func.vmap``, with the memory of all; the same compiled,
            which takes a while at the first call and for each new batch size or `loss_fn`. "auto" chooses by the sizes
            and compiles only for a model that is compiled. A path that the model does not allow is replaced, with one
            warning. Dropout draws other masks on the vectorised paths than in a loop, and what the model or the loss
            function keeps of its intermediate results (lists, attributes) is of no use outside.

        Returns
        -------
        Tensor
            Mean of the members' losses, detached: not the loss at the mean weights.

        Raises
        ------
        ValueError
            The optimizer has no model; a loss is not finite and `on_nonfinite` is "raise"; the tensors of a sharded
            batch differ in their first axis.
        TypeError
            A loss that is not one number; a sharded batch with objects whose rows are not known.
        RuntimeError
            Called inside ``member()``, where FSDP2 is told to keep gradients back, or in the capture of a CUDA graph.

        Examples
        --------
        >>> import torch
        >>> from gradwise.torch import PopulationGradient
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = PopulationGradient(torch.optim.SGD(model.parameters(), lr=0.1), model)
        >>> def loss_fn(model, x, y):
        ...     return torch.nn.functional.mse_loss(model(x), y)
        >>> x, y = torch.randn(16, 3), torch.randn(16, 1)
        >>> loss = optimizer.backward(loss_fn, x, y)
        >>> _ = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        >>> optimizer.step()
        >>> optimizer.zero_grad()
        """
        model = self._check_backward(loss_fn, vectorize)
        whole = Batch.of(batch, named_batch)
        shards = whole.shards(self.population.size) if sharded else []
        self.end_member()
        work = BatchWork(
            model,
            loss_fn,
            whole,
            shards,
            sizes=[shard.rows() for shard in shards] if sharded else [1] * self.population.size,
            perturbation=self._perturbation(first=self._streams, paired=not sharded),
            parameters=self._parameters(),
            of_model=list(model.parameters()),
            on_nonfinite=self._on_nonfinite,
            share_masks=self._share_masks,
            recalibrate=self._norm_statistics == "recalibrate",
        )
        self._streams += self.population.streams(len(work.sizes), paired=not sharded)
        self._saw_member = True
        try:
            with self._exclusively():
                return self._work_along(work, vectorize)
        finally:
            self._record = work.record
            self._skipped += work.skipped

    def step_batch(
        self,
        loss_fn: LossFunction,
        /,
        *batch: Any,
        sharded: bool = False,
        vectorize: Literal["auto", "loop", "vmap", "compile"] = "auto",
        **named_batch: Any,
    ) -> Tensor:
        """``backward(...)``, then ``step()``; zeroing the gradients stays with the loop, as for every optimizer.

        Parameters
        ----------
        loss_fn, *batch, sharded, vectorize, **named_batch
            See `backward`.

        Returns
        -------
        Tensor
            Mean of the members' losses, detached.
        """
        loss = self.backward(loss_fn, *batch, sharded=sharded, vectorize=vectorize, **named_batch)
        self.step()
        return loss

    def _work_along(self, work: BatchWork, vectorize: str) -> Tensor:
        """Try the paths from the one that was asked for down to the loop, which always goes."""
        first = (
            automatic_path(work.model, work.of_model, work.batch.length(), sharded=work.sharded)
            if vectorize == "auto"
            else vectorize
        )
        failures: list[tuple[Way, str]] = []
        loss: Tensor | None = None
        for path in {"compile": ("compile", "vmap"), "vmap": ("vmap",)}.get(first, ()):
            way = self._ways.setdefault((path, work.sharded, _code_of(work.loss_fn)), Way(path))
            if way.refused:
                continue
            reason = obstacle(work.model, work.parameters, work.of_model, sharded=work.sharded)
            if reason is None:
                with self._event.unhooked(work.model) if self._event else nullcontext():
                    loss, reason = work.all_at_once(way)
            if reason is None:
                break
            failures.append((way, reason))
        if loss is None:
            loss = work.one_by_one()
        for way, _ in failures:  # only now: an error of the user's own has been raised by the loop
            way.refused = True
        if failures:
            msg = "; ".join(f'vectorize="{way.path}" is not possible here ({reason})' for way, reason in failures)
            warnings.warn(
                f"{msg}. Another way is taken, which has the same result up to rounding", UserWarning, stacklevel=3
            )
        return loss

    def _check_backward(self, loss_fn: Any, vectorize: Any) -> nn.Module:
        self._check_not_by_hand("backward")
        if self.model is None:
            msg = "`model` must be given to PopulationGradient for backward(loss_fn, ...): it calls loss_fn(model, ...)"
            raise ValueError(msg)
        if not callable(loss_fn):
            msg = f"`loss_fn` must be a callable loss_fn(model, *batch) -> loss; got {type(loss_fn).__name__}"
            raise TypeError(msg)
        if vectorize not in PATHS:
            msg = f"`vectorize` must be one of {PATHS}; got {vectorize!r}"
            raise ValueError(msg)
        return self.model


def _code_of(function: Any) -> Any:
    """What stays the same where a training loop makes a lambda or a partial anew for every step."""
    while isinstance(function, partial):
        function = function.func
    return getattr(function, "__code__", type(function))
