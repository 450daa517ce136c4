"""What PopulationCallback puts in the place of the Trainer's closures. Needs nothing of Lightning."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from gradwise._statistics import PopulationStatistics
from gradwise_torch._gradients import ClosureGradients
from gradwise_torch._population import PopulationGradient

__all__ = ["MembersClosure", "TrainersPopulation"]


class TrainersPopulation(PopulationGradient):
    """A population around an optimizer that the Trainer steps: it only evaluates closures.

    Parameters
    ----------
    optimizer, module
        The Trainer's.
    wrapped : nn.Module
        What the Trainer's forwards go through: `module` or its DDP wrapper.
    skipped : int
        Members dropped so far.
    **options
        Those of `PopulationGradient`.
    """

    def __init__(
        self, optimizer: Optimizer, module: nn.Module, wrapped: nn.Module, *, skipped: int = 0, **options: Any
    ) -> None:
        self._wrapped = wrapped
        super().__init__(optimizer, module, **options)
        self._skipped = skipped

    def _awake(self) -> None:
        """No hooks: a forward outside of a closure (in another callback, say) is none of ours and sees the mean."""
        self.model = None
        super()._awake()

    def begin(self, step: int) -> "TrainersPopulation":
        """The Trainer's count of steps is ours, so that a resumed run has it whenever the checkpoint was written."""
        if step != self._step:
            self._step, self._streams = step, 0
        return self

    def closure_of_members(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """For one batch, with members of its own until the next step."""
        members = self._closure_of_members(closure, ClosureGradients, self._wrapped)
        self._streams += self.population.streams(self.population.size, paired=True)
        return members

    def reader(self) -> Callable[[], PopulationStatistics]:
        """What reads the statistics as they are now, later: an exception may have left the device in no state to."""
        return partial(self._record.read, skipped=self._skipped)

    def own_state(self) -> dict[str, Any]:
        """What a checkpoint needs beside the Trainer's own state."""
        return {"seed": self.population.seed, "skipped": self._skipped}


class MembersClosure:
    """Stands in for Lightning's closure of one batch and runs it once per member, each time it is called.

    Lightning hands it to ``optimizer_step`` (or calls it itself, where it accumulates, or under a GradScaler), and asks
    it for the outputs of ``training_step`` in the end.
    """

    def __init__(self, closure: Any, population: TrainersPopulation) -> None:
        self._closure = closure
        self._members = population.closure_of_members(closure)
        self._loss: Any = None

    def __call__(self) -> Any:
        self._loss = self._members()
        return self._loss

    def consume_result(self) -> Any:
        """Outputs of the last member, with the mean loss."""
        last = self._closure.consume_result()
        return last if self._loss is None else replace(last, closure_loss=self._loss)
