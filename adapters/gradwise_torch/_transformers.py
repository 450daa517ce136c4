"""A mixin for the Trainer of Hugging Face Transformers: several members of the population on every batch."""

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer

from gradwise._population import Population
from gradwise_torch._population import PopulationGradient

__all__ = ["PopulationTrainerMixin"]

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object  # a mixin: the Trainer, or a subclass of it, comes after it


class PopulationTrainerMixin(_Base):
    """Trains with the mean gradient of `population_size` members on every batch; put it before the Trainer.

    ``class MyTrainer(PopulationTrainerMixin, Trainer)`` is the whole change. The Trainer's optimizer, its own or that
    from ``optimizers=``, is wrapped in a `PopulationGradient` when training starts. Every micro-batch then runs the
    Trainer's `training_step` once per member, so that a step costs `population_size` passes; gradient accumulation,
    clipping, mixed precision, schedulers, evaluation and checkpoints come after, see the mean gradient and the mean
    weights, and need no other setting. Resuming is exact: the noise is a function of the seed and of counters that
    are saved with the optimizer's state.

    For one member per batch, at the cost of plain training, no mixin is needed:
    ``Trainer(..., optimizers=(PopulationGradient(optimizer, model), None))``.

    Parameters
    ----------
    *args, **kwargs
        Those of the Trainer.
    population_size, sigma, scale, noise, antithetic, perturb, norm_statistics, on_nonfinite, share_masks
        See `PopulationGradient`.
    seed : int, optional
        Seed of the noise; by default the one in the Trainer's arguments.

    Attributes
    ----------
    population : PopulationGradient or None
        The wrapper, with its `statistics`. None until training starts.

    Raises
    ------
    TypeError
        If the Trainer comes before the mixin, whose `training_step` would then never run; if `optimizers` holds a
        `PopulationGradient` already.
    ValueError
        A value that `PopulationGradient` does not take; some only when training starts.

    Notes
    -----
    The loss that is logged is the mean over the members. What a `compute_loss` of your own logs or counts, it logs and
    counts once per member; ``total_flos`` counts every batch once, as does the count of input tokens.

    Examples
    --------
    >>> import tempfile, torch
    >>> from transformers import Trainer, TrainingArguments
    >>> from gradwise.torch.transformers import PopulationTrainerMixin
    >>> class Regression(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.linear = torch.nn.Linear(3, 1)
    ...     def forward(self, x, labels=None):
    ...         y = self.linear(x)
    ...         return {"loss": torch.nn.functional.mse_loss(y, labels), "y": y}
    >>> class PopulationTrainer(PopulationTrainerMixin, Trainer):
    ...     pass
    >>> rows = [{"x": x, "labels": x.sum(0, keepdim=True)} for x in torch.randn(16, 3)]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     args = TrainingArguments(folder, max_steps=2, report_to="none", disable_tqdm=True, use_cpu=True)
    ...     trainer = PopulationTrainer(Regression(), args, train_dataset=rows, population_size=4, sigma=0.1)
    ...     trainer.train().global_step
    {'train_runtime': ...}
    2
    >>> trainer.population.statistics.members
    4
    """

    def __init__(
        self,
        *args: Any,
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
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.population is not None:
            msg = (
                "`optimizers` must hold a plain optimizer, which PopulationTrainerMixin wraps itself; got a "
                "PopulationGradient. Pass its inner optimizer, or use the Trainer without the mixin"
            )
            raise TypeError(msg)
        self._population_settings: dict[str, Any] = {
            "population_size": population_size,
            "sigma": sigma,
            "scale": scale,
            "noise": noise,
            "antithetic": antithetic,
            "perturb": perturb,
            "norm_statistics": norm_statistics,
            "on_nonfinite": on_nonfinite,
            "seed": self.args.seed if seed is None else seed,
            "share_masks": share_masks,
        }
        Population(population_size, sigma, scale, noise, antithetic)  # its errors now, not after the data are loaded

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        if Trainer in order and order.index(Trainer) < order.index(PopulationTrainerMixin):
            msg = (
                "PopulationTrainerMixin must come before the Trainer among the bases: "
                f"`class {cls.__name__}(PopulationTrainerMixin, Trainer)`"
            )
            raise TypeError(msg)

    @property
    def population(self) -> PopulationGradient | None:
        """The optimizer's wrapper, from under what Accelerate puts around it; None until training starts."""
        optimizer: Any = self.optimizer
        while isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
        return optimizer if isinstance(optimizer, PopulationGradient) else None

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """The Trainer's optimizer, wrapped."""
        optimizer = super().create_optimizer(model)
        if self.population is None:
            model = self.model if model is None else model
            self.optimizer = PopulationGradient(optimizer, model, **self._population_settings)
        return self.optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The Trainer's own, once per member: the mean of their losses; the mean of their gradients in ``.grad``."""
        assert self.population is not None
        step = super().training_step
        # Each member gets a copy, because `compute_loss` takes the labels out of it.
        return self.population._accumulate(lambda: step(model, copy.copy(inputs), num_items_in_batch), model)
