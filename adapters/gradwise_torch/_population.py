"""PopulationGradient: any torch optimizer, stepping with the mean gradient over perturbed copies of the weights."""

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradwise._population import Population
from gradwise._statistics import PopulationStatistics
from gradwise_torch._amp import forget_scaling, loss_scaling, scaled_step
from gradwise_torch._closure import PopulationClosure
from gradwise_torch._hooks import MemberEvent
from gradwise_torch._selection import Selection
from gradwise_torch._statistics import MemberRecord
from gradwise_torch._weights import Entry, Weights
from gradwise_torch._wrapper import OptimizerWrapper

__all__ = ["PopulationGradient"]

_LIVING: "weakref.WeakSet[PopulationGradient]" = weakref.WeakSet()


class PopulationGradient(OptimizerWrapper):
    r"""Steps an optimizer with a non-local gradient: the mean over a population of perturbed copies of the weights.

    "Population" as in evolution strategies. With unit noise :math:`\varepsilon_i` and :math:`s` the scale of a tensor,

    .. math:: g = \frac1K \sum_{i=1}^{K} \nabla L(\theta + \sigma s(\theta)\, \varepsilon_i)

    is what `inner_optimizer` then steps with, from the unperturbed :math:`\theta`. For the exact mean this is the
    gradient of the loss smoothed over the neighbourhood; its error falls as :math:`1/\sqrt{K}`, and antithetic pairs
    remove the odd orders. Not a cheap default: ``step(closure)`` costs `population_size` passes. The idea is that of
    Sakai et al. (arXiv 2010.12260), of which only the abstract was available; SmoothOut (arXiv 1805.07898) and LPF-SGD
    are an earlier and a later form of the same estimator.

    Three ways in. **Unchanged loop** (`model` given): every training-mode forward sees a member, every ``step()``
    happens at the mean; one pass per step, so micro-batches, ranks and consecutive steps form the population.
    **Closure**: ``step(closure)`` runs the closure once per member on one batch. **By hand**:
    ``with optimizer.member(i):``.

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
        Size of the noise relative to `scale`, or a schedule of it over steps.
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
        Seed of the noise. By default ``torch.initial_seed()``, plus one for each living wrapper that has that already.
    share_masks : bool
        Whether members that share a batch also share its dropout masks. Either way torch's random stream ends up where
        one plain step leaves it.

    Raises
    ------
    TypeError, ValueError
        Bad arguments, by name; a `model` that does not own the perturbed parameters; no parameters at all.

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
        _check_arguments(inner_optimizer, model, perturb, norm_statistics, on_nonfinite)
        self.inner_optimizer = inner_optimizer
        self.model = model
        self.population = Population(
            size=population_size,
            sigma=sigma,
            scale=scale,
            noise=noise,
            antithetic=antithetic,
            seed=_free_seed() if seed is None else seed,
        )
        self._selection = Selection(model, perturb)
        self._norm_statistics: Literal["mean", "recalibrate"] = norm_statistics
        self._on_nonfinite: Literal["raise", "skip"] = on_nonfinite
        self._share_masks = share_masks
        self._weights = Weights()
        self._step = 0  # the second word of every noise key
        self._in_loop = False  # whether the member in place is the unchanged loop's
        self._loop_member = 0  # members that the unchanged loop has started since the last step
        self._skipped = 0
        self._saw_member = self._warned_no_member = False
        self._awake()

    def _awake(self) -> None:
        """What neither pickles nor copies: hooks, weak references, and the marks by which a member is known."""
        self._register()
        self._record = MemberRecord()
        self._gradients: list[Any] = []
        self._suspended = 0
        self._by_hand = False
        self._weights.refresh()
        weakref.finalize(self, self._weights.abandon).atexit = False
        _LIVING.add(self)
        self._event = None if self.model is None else MemberEvent.of(self.model)
        if self._event is not None:
            self._event.join(self)
        self._entries()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero the gradients and end the member, unless its forward still waits for its backward.

        ``loss = model(x)``, then ``zero_grad()``, then ``loss.backward()`` is a common order; weights that moved in
        between would make that backward fail.
        """
        waiting = not self._gradient_arrived() and self._event is not None and self._event.forward_pending()
        self.inner_optimizer.zero_grad(set_to_none)
        if waiting:
            self._gradients = _marks(self._parameters())
        else:
            self.end_member()

    def _before_state(self) -> None:
        self.end_member()

    def _counters(self) -> dict[str, int]:
        return {
            "step": self._step,
            "member": self._loop_member,
            "skipped": self._skipped,
            "seed": self.population.seed,
        }

    def _set_counters(self, counters: dict[str, int]) -> None:
        self._step = counters.get("step", self._step)
        self._loop_member = counters.get("member", self._loop_member)
        self._skipped = counters.get("skipped", self._skipped)
        self.population = replace(self.population, seed=counters.get("seed", self.population.seed))

    def __getstate__(self) -> dict[str, Any]:
        transient = {"_record", "_gradients", "_suspended", "_by_hand", "_event", "step"}  # step: patched by schedulers
        return {
            name: value
            for name, value in self.__dict__.items()
            if name not in transient and not name.startswith(("_optimizer_", "_zero_grad_"))
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._awake()

    def __repr__(self) -> str:
        return f"PopulationGradient({self.population}\n{self.inner_optimizer!r})"

    # -- steps ---------------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override] - torch overloads it
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
            A closure under a GradScaler; a step inside ``member()``; weights written to while a member was in place.
        ValueError
            A member's loss is not finite, and `on_nonfinite` is "raise".
        """
        try:
            if self._by_hand:
                msg = "`step` must be called at the mean weights; leave `with optimizer.member(i):` first"
                raise RuntimeError(msg)
            if closure is not None and loss_scaling(self):
                msg = (
                    "`closure` must be None under a GradScaler, which unscales gradients only once, after the closure. "
                    "Use the unchanged loop (pass `model`, call scaler.step(optimizer)), or bfloat16 without a scaler"
                )
                raise RuntimeError(msg)
            self.end_member()
            if closure is None:
                self._check_saw_member()
                loss = scaled_step(self, self.inner_optimizer, self._parameters())
            else:
                loss = self._step_with(closure)
        except BaseException:
            forget_scaling(self)
            raise
        self._selection.exclude_sparse(self._parameters())
        self._step += 1
        self._loop_member = 0
        self._saw_member = False
        return loss

    def _step_with(self, closure: Callable[[], Any]) -> Any:
        calls: list[tuple[Any, ...]] = []
        population_closure = PopulationClosure(
            closure,
            self._weights,
            self._entries(),
            self._parameters(),
            self.population,
            step=self._step,
            rank=_rank(),
            model=self.model,
            on_nonfinite=self._on_nonfinite,
            share_masks=self._share_masks,
            clean_forward=None if self._norm_statistics == "mean" else lambda: self._clean_forward(calls),
        )
        with self._suspend_hooks():
            if self._norm_statistics == "recalibrate" and self._event is not None:
                self._event.record_calls(calls)
            try:
                return self.inner_optimizer.step(population_closure)  # type: ignore[arg-type] - None, as a closure may
            finally:
                if self._event is not None:
                    self._event.record_calls(None)
                self._record = population_closure.record
                self._skipped += self._record.skipped

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

    # -- members -------------------------------------------------------------------------------------------------------

    @contextmanager
    def member(self, index: int) -> Iterator[None]:
        """Weights of one member, in place, for the duration of a ``with``; the mean is copied back on the way out.

        Never touches ``.grad``: gradients of several members add up there, as those of several batches do.

        Parameters
        ----------
        index : int
            From 0 to ``population_size - 1``. With antithetic noise, members 2i and 2i + 1 are a pair.
        """
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < self.population.size:
            msg = (
                f"`index` must be an integer from 0 to {self.population.size - 1} (population_size - 1); got {index!r}"
            )
            raise ValueError(msg)
        self._check_not_by_hand("member")
        self.end_member()
        entries = self._entries()
        self._enter(entries, member=index, paired=True)
        self._by_hand = self._saw_member = True
        try:
            with self._suspend_hooks():
                yield
        finally:
            self._by_hand = False
            self._weights.leave()

    @contextmanager
    def mean(self) -> Iterator[None]:
        """The mean weights for the duration of a ``with``, in which training-mode forwards start no member either."""
        self._check_not_by_hand("mean")
        self.end_member()
        with self._suspend_hooks():
            yield

    def eval(self) -> None:
        """End the member: the weights are the mean until the next training-mode forward."""
        self.end_member()

    def train(self) -> None:
        """Do nothing; the counterpart of `eval` for trainers that call both."""

    @property
    def statistics(self) -> PopulationStatistics:
        """What the members of the last step said; reading it syncs with the device."""
        return self._record.read(skipped=self._skipped)

    # -- what the hooks of the unchanged loop call --------------------------------------------------------------------

    @property
    def hooks_suspended(self) -> bool:
        """Whether forwards are somebody else's business: inside a closure, ``member()`` or ``mean()``."""
        return self._suspended > 0

    def wants_member(self) -> bool:
        """Whether the next training-mode forward begins a member: there is none, or this one has its gradient."""
        return not self._in_loop or self._gradient_arrived()

    def start_member(self) -> None:
        """Replace the member in place, if any, by the next one."""
        self.end_member()
        if self._loop_member == 0:
            self._record = MemberRecord()
        entries = self._entries()
        self._gradients = _marks(self._parameters())
        self._enter(entries, member=self._loop_member, paired=False)
        self._in_loop = True
        self._loop_member += 1
        self._saw_member = True
        self._record.members += 1
        self._record.moments.append(self._weights.moments())

    def end_member(self) -> None:
        """Bring the mean back if the unchanged loop has a member in place."""
        if self._in_loop:
            self._in_loop = False
            self._weights.leave()

    def mean_of(self, parameter: Tensor) -> Tensor | None:
        """The mean of a tensor that is perturbed at the moment."""
        return self._weights.mean_of(parameter)

    # -- small print ---------------------------------------------------------------------------------------------------

    def _enter(self, entries: list[Entry], *, member: int, paired: bool) -> None:
        scales = self._weights.scales(entries, self.population, self._step)
        self._weights.enter(
            entries, scales, self.population, step=self._step, member=member, rank=_rank(), paired=paired
        )

    def _entries(self) -> list[Entry]:
        """The tensors to perturb, looked up again where parameters have joined, frozen or thawed."""
        entries = self._selection.entries(self.inner_optimizer)
        if self._event is not None and self.model is not None:
            self._event.watch(self.model, [entry.parameter for entry in entries])
        return entries

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _gradient_arrived(self) -> bool:
        """Whether a gradient has been accumulated since the member began."""
        parameters = self._parameters()
        return len(parameters) != len(self._gradients) or any(
            parameter.grad is not None
            and (mark is None or mark[0]() is not parameter.grad or mark[1] != parameter.grad._version)
            for parameter, mark in zip(parameters, self._gradients, strict=True)
        )

    @contextmanager
    def _suspend_hooks(self) -> Iterator[None]:
        self._suspended += 1
        try:
            yield
        finally:
            self._suspended -= 1

    def _check_not_by_hand(self, name: str) -> None:
        if self._by_hand:
            msg = f"`{name}` must not be entered inside `with optimizer.member(i):`; leave that one first"
            raise RuntimeError(msg)

    def _check_saw_member(self) -> None:
        if self.model is not None and not self._saw_member and not self._warned_no_member:
            self._warned_no_member = True
            warnings.warn(
                "this step saw no member of the population: since the last one, `model` has had no training-mode "
                "forward with gradients. Pass the module that the loop calls (the DDP wrapper, the compiled module)",
                UserWarning,
                stacklevel=4,
            )


def _marks(parameters: list[Tensor]) -> list[Any]:
    """Gradients as they are now, by identity and version, without keeping them alive."""
    return [None if p.grad is None else (weakref.ref(p.grad), p.grad._version) for p in parameters]


def _free_seed() -> int:
    taken = {optimizer.population.seed for optimizer in _LIVING}
    seed = torch.initial_seed() % 2**63
    while seed in taken:
        seed += 1
    return seed


def _rank() -> int:
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def _check_arguments(inner_optimizer: Any, model: Any, perturb: Any, norm_statistics: Any, on_nonfinite: Any) -> None:
    if not isinstance(inner_optimizer, Optimizer) or isinstance(inner_optimizer, PopulationGradient):
        got = inner_optimizer.__name__ if isinstance(inner_optimizer, type) else type(inner_optimizer).__name__
        msg = (
            "`inner_optimizer` must be an instance of a torch optimizer, such as "
            f"torch.optim.AdamW(model.parameters()); got {got}"
        )
        raise TypeError(msg)
    if not any(group["params"] for group in inner_optimizer.param_groups):
        msg = "`inner_optimizer` must have parameters; its groups are empty. Build it from model.parameters()"
        raise ValueError(msg)
    if model is not None and not isinstance(model, nn.Module):
        msg = f"`model` must be a torch.nn.Module or None; got {type(model).__name__}"
        raise TypeError(msg)
    if perturb is not None and not callable(perturb):
        msg = f"`perturb` must be a callable perturb(name, parameter) -> bool, or None; got {perturb!r}"
        raise TypeError(msg)
    if norm_statistics not in ("mean", "recalibrate"):
        msg = f'`norm_statistics` must be "mean" or "recalibrate"; got {norm_statistics!r}'
        raise ValueError(msg)
    if norm_statistics == "recalibrate" and model is None:
        msg = '`norm_statistics="recalibrate"` needs `model`, whose forward it repeats at the mean weights'
        raise ValueError(msg)
    if on_nonfinite not in ("raise", "skip"):
        msg = f'`on_nonfinite` must be "raise" or "skip"; got {on_nonfinite!r}'
        raise ValueError(msg)
