"""PopulationGradient: any torch optimizer, stepping with the mean gradient over perturbed copies of the weights."""

import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradwise._population import Population
from gradwise._statistics import PopulationStatistics
from gradwise_torch._amp import forget_scaling, loss_scaling, scaled_step
from gradwise_torch._batch_optimizer import BatchOptimizer
from gradwise_torch._gradients import AddedGradients, ClosureGradients, MemberGradients
from gradwise_torch._member_loop import MemberLoop
from gradwise_torch._population_arguments import check_arguments
from gradwise_torch._seeds import choose_seed
from gradwise_torch._shards import local_of
from gradwise_torch._trainer_closures import is_loop_body

__all__ = ["PopulationGradient"]

_LIVING: "weakref.WeakSet[PopulationGradient]" = weakref.WeakSet()


class PopulationGradient(BatchOptimizer):
    r"""Steps an optimizer with a non-local gradient: the mean over a population of perturbed copies of the weights.

    "Population" as in evolution strategies. With unit noise :math:`\varepsilon_i` and :math:`s` the scale of a tensor,

    .. math:: g = \frac1K \sum_{i=1}^{K} \nabla L(\theta + \sigma s(\theta)\, \varepsilon_i)

    is what `inner_optimizer` then steps with, from the unperturbed :math:`\theta`. For the exact mean this is the
    gradient of the loss smoothed over the neighbourhood; its error falls as :math:`1/\sqrt{K}`, and antithetic pairs
    remove the odd orders. Not a cheap default: ``step(closure)`` costs `population_size` passes. The idea is that of
    Sakai et al. (arXiv 2010.12260), of which only the abstract was available; SmoothOut (arXiv 1805.07898) and LPF-SGD
    are an earlier and a later form of the same estimator.

    Four ways in. **Unchanged loop** (`model` given): every training-mode forward sees a member, every ``step()``
    happens at the mean; one pass per step, so micro-batches, ranks and consecutive steps form the population.
    **Closure**: ``step(closure)`` runs the closure once per member on one batch. **Batch** (`model` given):
    ``backward(loss_fn, *batch)`` fills ``.grad``, vectorised or with the batch sharded over the members; the fastest.
    **By hand**: ``with optimizer.member(i):``.

    With `model` given, a Lightning module in automatic optimization is an unchanged loop: the closure that the Trainer
    passes to ``step`` is its own, and runs once.

    Parameters
    ----------
    inner_optimizer : torch.optim.Optimizer
        The instance that takes the steps. Its groups and its state stay its own; a group may set its own ``"sigma"``.
    model : nn.Module, optional
        The module whose forward the loop calls (the DDP wrapper, the compiled module). Needed for the unchanged loop,
        and for BatchNorm statistics to count once per step when a closure is used.
    population_size : int
        Members per ``step(closure)``. Ignored by the unchanged loop.
    sigma : float or callable of int
        Size of the noise relative to `scale`, or a schedule of it over steps. The default changes little and does
        little harm. With a closure, trainings that go on until the network over-fits gain more at 0.2; trainings that
        end before, and the unchanged loop, bear no more than 0.1 (``docs/population-study.md``).
    scale : {"rms", "filter", "absolute"}
        Noise relative to the root mean square of each tensor, of each slice along its first axis, or in weight units.
    noise : {"gaussian", "rademacher"}
        Distribution of the noise.
    antithetic : bool
        Pair members with opposite noise, where they share a batch.
    perturb : callable, optional
        ``perturb(name, parameter) -> bool`` chooses tensors; by default those with at least two dimensions. `name` is
        the model's, else ``"group.index"``. Frozen, integer, quantised and sparse tensors are never perturbed.
    norm_statistics : {"mean", "recalibrate"}
        BatchNorm statistics of a ``step(closure)``: the average of the members' updates as one update, or one extra
        forward at the mean weights.
    on_nonfinite : {"raise", "skip"}
        What a member with a NaN or infinite loss does to ``step(closure)``.
    seed : int, optional
        Seed of the noise. By default ``torch.initial_seed()``, plus one for each living wrapper that has that already;
        the lowest of those of the processes where `model` is in DistributedDataParallel or sharded.
    share_masks : bool
        Whether members that share a batch also share its dropout masks. Either way torch's random stream ends up where
        one plain step leaves it.

    Raises
    ------
    TypeError, ValueError
        Bad arguments, by name; a `model` that does not own the perturbed parameters; no parameters at all; different
        seeds in processes that hold shards of one model.

    Examples
    --------
    >>> import torch
    >>> from gradwise.torch import PopulationGradient
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Linear(3, 1)
    >>> x, y = torch.randn(16, 3), torch.randn(16, 1)
    >>> optimizer = PopulationGradient(torch.optim.SGD(model.parameters(), lr=0.1), model, sigma=0.1)
    >>> for _ in range(3):  # the loop itself is unchanged
    ...     loss = torch.nn.functional.mse_loss(model(x), y)
    ...     loss.backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = torch.nn.functional.mse_loss(model(x), y)
    ...     loss.backward()
    ...     return loss
    >>> mean_loss = optimizer.step(closure)  # eight members on this batch
    >>> 1 / 8 < optimizer.statistics.agreement <= 1
    True
    """

    # A GradScaler then always calls our step, also when it skips, so that the mean comes back either way.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        inner_optimizer: Optimizer,
        model: nn.Module | None = None,
        *,
        population_size: int = 8,
        sigma: float | Callable[[int], float] = 0.1,
        scale: Literal["rms", "filter", "absolute"] = "rms",
        noise: Literal["gaussian", "rademacher"] = "gaussian",
        antithetic: bool = True,
        perturb: Callable[[str, Tensor], bool] | None = None,
        norm_statistics: Literal["mean", "recalibrate"] = "mean",
        on_nonfinite: Literal["raise", "skip"] = "raise",
        seed: int | None = None,
        share_masks: bool = True,
    ) -> None:
        check_arguments(inner_optimizer, model, perturb, norm_statistics, on_nonfinite)
        self.inner_optimizer = inner_optimizer
        population = Population(
            size=population_size,
            sigma=sigma,
            scale=scale,
            noise=noise,
            antithetic=antithetic,
            seed=choose_seed(seed, [living.population.seed for living in _LIVING], model, self._parameters()),
        )
        self._norm_statistics: Literal["mean", "recalibrate"] = norm_statistics
        self._on_nonfinite: Literal["raise", "skip"] = on_nonfinite
        self._share_masks = share_masks
        self._skipped = 0
        self._warned_no_member = False
        self._set_up(model, population, perturb)
        _LIVING.add(self)

    def _counters(self) -> dict[str, int]:
        return {
            "step": self._step,
            "member": self._streams,
            "skipped": self._skipped,
            "seed": self.population.seed,
        }

    def _set_counters(self, counters: dict[str, int]) -> None:
        self._step = counters.get("step", self._step)
        self._streams = counters.get("member", self._streams)
        self._skipped = counters.get("skipped", self._skipped)
        self.population = replace(self.population, seed=counters.get("seed", self.population.seed))

    def __getstate__(self) -> dict[str, Any]:
        return self._asleep()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._awake()
        _LIVING.add(self)

    def __repr__(self) -> str:
        return f"PopulationGradient({self.population}\n{self.inner_optimizer!r})"

    # -- steps ---------------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step of the inner optimizer at the mean weights.

        Parameters
        ----------
        closure : callable, optional
            The torch contract: zeroes the gradients, computes the loss, calls backward, returns the loss. It runs once
            per member, and again for each evaluation the inner optimizer asks for (LBFGS).

        Returns
        -------
        Tensor, float or None
            Mean of the members' losses, detached: not the loss at the mean weights. None without a closure.

        Raises
        ------
        RuntimeError
            A closure under a GradScaler, or where FSDP2 is told to keep gradients back; a step inside ``member()``;
            weights written to while a member was in place; a member that would begin in the capture of a CUDA graph.
        ValueError
            A member's loss is not finite, and `on_nonfinite` is "raise".
        """
        try:
            self._check_not_by_hand("step")
            self.end_member()
            if closure is not None and loss_scaling(self):
                msg = (
                    "`closure` must be None under a GradScaler, which unscales gradients only once, after the closure. "
                    "Use the unchanged loop (pass `model`, call scaler.step(optimizer)), or bfloat16 without a scaler"
                )
                raise RuntimeError(msg)
            counts = closure is not None or not self._only_makes_state()
            if closure is None:
                if counts:
                    self._check_saw_member()
                loss = scaled_step(self, self.inner_optimizer, self._parameters())
            elif self.model is not None and is_loop_body(closure):
                loss = self.inner_optimizer.step(self._body_of_loop(closure))
            else:
                loss = self._step_with(closure)
        except BaseException:
            forget_scaling(self)
            raise
        self._selection.exclude_sparse(self._parameters())
        self._step += counts
        self._streams = 0
        self._saw_member = False
        return loss

    def _accumulate(self, closure: Callable[[], Any], model: nn.Module) -> Any:
        """`backward` for trainers that call backward themselves: one batch, the mean gradient added to ``.grad``.

        `closure` runs `model` (ours, or what the trainer has put around it: DDP), and neither zeroes gradients nor
        steps; clipping and ``step()`` come after. Every call has members of its own until the next step.
        """
        self._check_not_by_hand("_accumulate")
        self.end_member()
        self._saw_member = True
        members = self._closure_of_members(closure, AddedGradients, model)
        self._streams += self.population.streams(self.population.size, paired=True)
        return members()

    def _body_of_loop(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """A trainer's closure: its forward starts a member, the same one at every call, which ends with it."""
        first = self._streams

        def evaluate() -> Any:
            self._streams = first
            try:
                loss = closure()
            finally:
                self.end_member()
            self._check_saw_member()
            return loss

        return evaluate

    def _step_with(self, closure: Callable[[], Any]) -> Any:
        members = self._closure_of_members(closure, ClosureGradients)
        return self.inner_optimizer.step(members)

    def _closure_of_members(
        self, closure: Callable[[], Any], gradients: type[MemberGradients], model: nn.Module | None = None
    ) -> Callable[[], Any]:
        """What evaluates `closure` at every member and leaves the mean gradient: the same function at every call."""
        calls: list[tuple[Any, ...]] = []
        loop = MemberLoop(
            lambda *_: closure(),
            self._perturbation(first=self._streams, paired=True),
            self._parameters(),
            gradients,
            sizes=[1] * self.population.size,
            masks="shared" if self._share_masks else "fresh",
            model=self.model if model is None else model,
            on_nonfinite=self._on_nonfinite,
            clean_forward=None if self._norm_statistics == "mean" else lambda: self._clean_forward(calls),
        )

        def evaluate() -> Any:
            skipped = loop.skipped
            with self._exclusively():
                if self._norm_statistics == "recalibrate" and self._event is not None:
                    calls.clear()
                    self._event.record_calls(calls)
                try:
                    return loop()
                finally:
                    if self._event is not None:
                        self._event.record_calls(None)
                    self._record = loop.record
                    self._skipped += loop.skipped - skipped

        return evaluate

    @torch.no_grad()
    def _clean_forward(self, calls: list[tuple[Any, ...]]) -> None:
        """Repeat the forwards of one member, of which every member made the same, at the mean weights."""
        assert self.model is not None
        assert self._event is not None
        first = calls[: len(calls) // self.population.size]
        calls.clear()
        self._event.record_calls(None)
        for args, kwargs, autocast in first:
            with autocast:
                self.model(*args, **kwargs)
        self._event.record_calls(calls)

    @property
    def statistics(self) -> PopulationStatistics:
        """What the members of the last step said; reading it syncs with the device.

        On several machines: what this process's own members said, before DistributedDataParallel averages anything.
        Average it over the processes yourself for a log; `skipped` is the same in all of them. Where every member is
        reduced (sharded models, the first step of ``static_graph=True``, a DDP wrapper that `model` is not or does not
        hold), `agreement` and `sharpness` are those of gradients that are averages over the processes already.
        """
        return self._record.read(skipped=self._skipped)

    def _only_makes_state(self) -> bool:
        """Whether this is the step by which a distributed checkpoint makes the inner state: of nothing, at rate 0."""
        still = not self._saw_member and all("lr" in group and float(group["lr"]) == 0 for group in self.param_groups)
        return still and not any(p.grad is not None and bool(local_of(p.grad).any()) for p in self._parameters())

    def _check_saw_member(self) -> None:
        if self.model is not None and not self._saw_member and not self._warned_no_member:
            self._warned_no_member = True
            warnings.warn(
                "this step saw no member of the population: since the last one, `model` has had no training-mode "
                "forward with gradients, or a newer PopulationGradient wraps it. Pass the module that the loop calls "
                "(the DDP wrapper, the compiled module)",
                UserWarning,
                stacklevel=4,
            )
