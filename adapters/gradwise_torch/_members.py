"""Which weights the parameters hold: the mean, a member entered by hand, or the unchanged loop's member."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from gradwise._population import Population
from gradwise_torch._hooks import MemberEvent
from gradwise_torch._perturbation import Perturbation
from gradwise_torch._selection import Selection
from gradwise_torch._shards import version_of
from gradwise_torch._statistics import MemberRecord
from gradwise_torch._weights import Entry, Weights
from gradwise_torch._wrapper import OptimizerWrapper

__all__ = ["MemberOptimizer"]


class MemberOptimizer(OptimizerWrapper):
    """An optimizer wrapper that can move its parameters to a member of the population and back to the mean.

    The hooks of a `MemberEvent` call `wants_member`, `start_member` and `end_member`: the rules of the unchanged loop.
    """

    def _set_up(
        self, model: nn.Module | None, population: Population, perturb: Callable[[str, Tensor], bool] | None
    ) -> None:
        self.model = model
        self.population = population
        self._selection = Selection(model, perturb)
        self._weights = Weights()
        self._step = 0  # the second word of every noise key
        self._streams = 0  # of the noise, used since the last step
        self._saw_member = False
        self._awake()

    def _awake(self) -> None:
        """What neither pickles nor copies: hooks, weak references, and the marks by which a member is known."""
        self._register()
        self._record = MemberRecord()
        self._marks: list[Any] = []
        self._watched: list[Entry] | None = None
        self._by_hand = False
        self._retired = False
        self._ways: dict[Any, Any] = {}
        self._weights.refresh()
        self._selection.forget()
        weakref.finalize(self, self._weights.abandon).atexit = False
        self._event = None if self.model is None else MemberEvent.of(self.model)
        entries = self._entries()
        if self._event is not None:
            self._event.join(self, [entry.parameter for entry in entries])

    def _asleep(self) -> dict[str, Any]:
        """State for pickle and deepcopy: all but what `_awake` makes, and the `step` that schedulers patch."""
        transient = {"_record", "_marks", "_watched", "_by_hand", "_retired", "_ways", "_event", "step"}
        return {
            name: value
            for name, value in self.__dict__.items()
            if name not in transient and not name.startswith(("_optimizer_", "_zero_grad_"))
        }

    # -- for users -----------------------------------------------------------------------------------------------------

    @contextmanager
    def member(self, index: int) -> Iterator[None]:
        """Weights of one member, in place, for the duration of a ``with``; the mean is copied back on the way out.

        Never touches ``.grad``: gradients of several members add up there, as those of several batches do.

        Parameters
        ----------
        index : int
            From 0 to ``population_size - 1``. With antithetic noise, members 2i and 2i + 1 are a pair.
        """
        last = self.population.size - 1
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index <= last:
            msg = f"`index` must be an integer from 0 to {last} (population_size - 1); got {index!r}"
            raise ValueError(msg)
        self._check_not_by_hand("member")
        self.end_member()
        with self._exclusively():
            try:
                self._enter(self._perturbation(paired=True), index)
                yield
            finally:
                self._weights.leave()

    @contextmanager
    def mean(self) -> Iterator[None]:
        """The mean weights for the duration of a ``with``, in which training-mode forwards start no member either."""
        self._check_not_by_hand("mean")
        self.end_member()
        with self._suspended_hooks():
            yield

    def eval(self) -> None:
        """End the member: the weights are the mean until the next training-mode forward."""
        self.end_member()

    def train(self) -> None:
        """Do nothing; the counterpart of `eval` for trainers that call both."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero the gradients and end the member, unless its forward still waits for its backward.

        ``loss = model(x)``, then ``zero_grad()``, then ``loss.backward()`` is a common order; weights that moved in
        between would make that backward fail.
        """
        waiting = not self._gradient_arrived() and self._event is not None and self._event.forward_pending()
        self.inner_optimizer.zero_grad(set_to_none)
        if waiting:
            self._marks = _marks_of(self._parameters())
        else:
            self.end_member()

    # -- for the hooks of the unchanged loop ---------------------------------------------------------------------------

    @property
    def hooks_suspended(self) -> bool:
        """Whether forwards are none of our business: in closures, ``member()`` and ``mean()``, or once replaced."""
        return self._retired or self._event is None or self._event.suspended > 0

    def perturbs(self, parameters: list[Tensor]) -> bool:
        """Whether one of `parameters` is among those this optimizer perturbs."""
        mine = {id(entry.parameter) for entry in self._entries()}
        return any(id(parameter) in mine for parameter in parameters)

    def retire(self) -> None:
        """Leave the unchanged loop to a newer wrapper of the same parameters (a notebook cell that is run again)."""
        self.end_member()
        self._retired = True
        self._saw_member = False

    def wants_member(self) -> bool:
        """Whether the next training-mode forward begins a member: there is none, or this one has its gradient."""
        return not self._in_loop or self._gradient_arrived()

    def start_member(self) -> None:
        """Replace the member in place, if any, by the next one."""
        self.end_member()
        self._marks = _marks_of(self._parameters())
        self._enter(self._perturbation(paired=False), self._streams)
        self._streams += 1

    def end_member(self) -> None:
        """Bring the mean back if the unchanged loop has a member in place."""
        if self._in_loop:
            self._weights.leave()

    def mean_of(self, parameter: Tensor) -> Tensor | None:
        """The mean of a tensor that is perturbed at the moment."""
        return self._weights.mean_of(parameter)

    # -- small print ---------------------------------------------------------------------------------------------------

    @property
    def _in_loop(self) -> bool:
        """Whether the member in place is the unchanged loop's, or one that an interrupt has left behind."""
        return self._weights.in_place and not self._by_hand

    def _before_state(self) -> None:
        self.end_member()

    def _perturbation(self, *, first: int = 0, paired: bool) -> Perturbation:
        """The members of this step, around the weights as they are now."""
        return Perturbation(
            self._weights,
            self._entries(),
            self.param_groups,
            self.population,
            step=self._step,
            first=first,
            paired=paired,
            rank=self._selection.rank,
            gathered=self._selection.gathered,
        )

    def _enter(self, perturbation: Perturbation, member: int) -> None:
        perturbation.enter(member)
        if not self._saw_member:
            self._record = MemberRecord()
            self._record.relative_sizes = perturbation.relative_sizes()
            self._saw_member = True
        self._record.add_member()

    def _entries(self) -> list[Entry]:
        """The tensors to perturb, looked up again where parameters have joined, frozen or thawed."""
        entries = self._selection.entries(self.param_groups)
        if entries is not self._watched and self._event is not None and self.model is not None:
            self._event.watch(self.model, [entry.parameter for entry in entries])
            self._watched = entries  # a walk over all modules, which is not for every forward
        return entries

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _gradient_arrived(self) -> bool:
        """Whether a gradient has been accumulated since the member began."""
        parameters = self._parameters()
        return len(parameters) != len(self._marks) or any(
            parameter.grad is not None
            and (mark is None or mark[0]() is not parameter.grad or mark[1] != version_of(parameter.grad))
            for parameter, mark in zip(parameters, self._marks, strict=True)
        )

    @contextmanager
    def _suspended_hooks(self) -> Iterator[None]:
        """Let the forwards of the model be, whichever optimizer's members they would start."""
        if self._event is None:
            yield
            return
        self._event.suspended += 1
        try:
            yield
        finally:
            self._event.suspended -= 1

    @contextmanager
    def _exclusively(self) -> Iterator[None]:
        """Let nobody else move the weights of this optimizer: no hook, and no call of the user's."""
        try:
            self._by_hand = True
            with self._suspended_hooks():
                yield
        finally:
            self._by_hand = False
            self._weights.leave()  # again: a Ctrl-C may have come just as whoever entered was about to

    def _check_not_by_hand(self, name: str) -> None:
        if self._by_hand:
            msg = (
                f"`{name}` must not be called while another member of the same optimizer is in place: inside "
                "`with optimizer.member(i):`, a closure or a loss function"
            )
            raise RuntimeError(msg)


def _marks_of(parameters: list[Tensor]) -> list[Any]:
    """Gradients as they are now, by identity and version, without keeping them alive."""
    return [None if p.grad is None else (weakref.ref(p.grad), version_of(p.grad)) for p in parameters]
