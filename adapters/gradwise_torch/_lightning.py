"""Lightning: K whole-batch members per optimizer step, by a callback; model and optimizer stay as they are."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from gradwise._statistics import PopulationStatistics
from gradwise_torch._lightning_members import MembersClosure, TrainersPopulation
from gradwise_torch._population import PopulationGradient

__all__ = ["PopulationCallback"]


class PopulationCallback(Callback):
    r"""Steps the module's own optimizer with the mean gradient over perturbed copies of its weights.

    With unit noise :math:`\varepsilon_i` and :math:`s` the scale of a tensor, every batch gives

    .. math:: g = \frac1K \sum_{i=1}^{K} \nabla L(\theta + \sigma s(\theta)\, \varepsilon_i)

    in ``.grad``, before Lightning unscales and clips it and steps, each of them once. See `PopulationGradient` for what
    the estimate is worth. It costs `population_size` passes per batch; for one pass per batch return
    ``PopulationGradient(optimizer, self)`` from ``configure_optimizers`` instead, without this callback.

    ``training_step``, ``on_before_zero_grad``, ``on_before_backward`` and ``on_after_backward`` run once per member,
    ``on_before_optimizer_step``, clipping and all others once. Outside of these passes the weights are the mean, so
    validation, checkpoints, early stopping and schedulers need no care. With ``accumulate_grad_batches=n`` every one of
    the n batches has K members of its own, n K passes per optimizer step. Under DDP every process has other members.

    What ``self.log`` in ``training_step`` shows: with ``on_epoch=True`` and the mean, the mean over members and
    batches; with ``on_step=True``, the last member's value; with ``reduce_fx="sum"``, K times too much. The loss that
    ``on_train_batch_end`` gets in `outputs` is the mean over the members; other entries are the last member's. Metric
    objects updated in ``training_step`` see every member.

    Lightning's tuner takes the callbacks off while it looks for a learning rate or a batch size. ``training_step`` may
    return None to skip a batch, if it does so for the first member.

    Parameters
    ----------
    population_size : int
        Members per batch.
    sigma : float or callable of int
        Size of the noise relative to `scale`, or a schedule of it over ``trainer.global_step``.
    scale : {"rms", "filter", "absolute"}
        Noise relative to the root mean square of each tensor, of each slice along its first axis, or in weight units.
    noise : {"gaussian", "rademacher"}
        Distribution of the noise.
    antithetic : bool
        Pair members with opposite noise.
    perturb : callable, optional
        ``perturb(name, parameter) -> bool`` chooses tensors by their names in the module; by default those with at
        least two dimensions.
    on_nonfinite : {"raise", "skip"}
        What a member with a NaN or infinite loss does: end the training, also where a GradScaler would only skip the
        step, or count for nothing.
    seed : int, optional
        Seed of the noise. By default ``torch.initial_seed()`` of the first process at the first ``fit``. Noise depends
        on it and on ``trainer.global_step``, and it is in the checkpoint.
    share_masks : bool
        Whether the members also share their dropout masks.
    log_statistics : bool
        Log ``population_loss_mean``, ``population_agreement`` and so on after every batch (see `statistics`), which
        costs a device sync. Of a batch that adds to earlier ones, `agreement` and `sharpness` are NaN; under a
        GradScaler, `sharpness` is that of the scaled loss.

    Raises
    ------
    TypeError, ValueError
        Bad arguments, by name. At ``fit``: manual optimization, an optimizer that is a `PopulationGradient` already, a
        strategy that accumulates gradients itself (DeepSpeed).

    Examples
    --------
    >>> import lightning, torch, warnings
    >>> warnings.filterwarnings("ignore", category=FutureWarning)  # Lightning 2.6 uses what torch 2.13 deprecates
    >>> from gradwise.torch.lightning import PopulationCallback
    >>> class Regression(lightning.LightningModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.net = torch.nn.Linear(3, 1)
    ...     def training_step(self, batch, batch_idx):
    ...         x, y = batch
    ...         return torch.nn.functional.mse_loss(self.net(x), y)
    ...     def configure_optimizers(self):
    ...         return torch.optim.SGD(self.parameters(), lr=0.1)
    >>> batches = torch.utils.data.TensorDataset(torch.randn(8, 4, 3), torch.randn(8, 4, 1))
    >>> population = PopulationCallback(population_size=4, sigma=0.1)
    >>> trainer = lightning.Trainer(
    ...     max_epochs=1, callbacks=[population], accelerator="cpu", logger=False, enable_checkpointing=False,
    ...     enable_progress_bar=False, enable_model_summary=False,
    ... )
    >>> trainer.fit(Regression(), torch.utils.data.DataLoader(batches, batch_size=None))
    >>> population.statistics.members
    4
    """

    def __init__(
        self,
        population_size: int = 8,
        sigma: float | Callable[[int], float] = 0.1,
        *,
        scale: Literal["rms", "filter", "absolute"] = "rms",
        noise: Literal["gaussian", "rademacher"] = "gaussian",
        antithetic: bool = True,
        perturb: Callable[[str, Tensor], bool] | None = None,
        on_nonfinite: Literal["raise", "skip"] = "raise",
        seed: int | None = None,
        share_masks: bool = True,
        log_statistics: bool = False,
    ) -> None:
        self._options: dict[str, Any] = {
            "population_size": population_size,
            "sigma": sigma,
            "scale": scale,
            "noise": noise,
            "antithetic": antithetic,
            "perturb": perturb,
            "on_nonfinite": on_nonfinite,
            "share_masks": share_masks,
        }
        # Bad arguments are an error here, not hours later: a trial, on a tensor that nobody misses.
        PopulationGradient(torch.optim.SGD([torch.zeros(1)]), seed=seed, **self._options)
        self._state = {} if seed is None else {"seed": seed}
        self._log_statistics = log_statistics
        self._population: TrainersPopulation | None = None
        self._read: Callable[[], PopulationStatistics] = PopulationStatistics
        self._uninstall: Callable[[], object] | None = None

    @property
    def statistics(self) -> PopulationStatistics:
        """What the members of the last batch said; reading it syncs with the device."""
        return self._read() if self._population is None else self._population.statistics

    # -- hooks of the Trainer ------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to give every batch its members."""
        self._check(trainer, pl_module)
        if "seed" not in self._state:
            self._state["seed"] = trainer.strategy.broadcast(torch.initial_seed() % 2**63)
        wrapped = trainer.strategy.model  # the module itself, or DDP around it
        population = self._population = TrainersPopulation(
            trainer.optimizers[0], pl_module, pl_module if wrapped is None else wrapped, **self._options, **self._state
        )
        # The one private name: the Trainer gives the closures of accumulated batches to nobody else.
        loop = trainer.fit_loop.epoch_loop.automatic_optimization
        make_closure = loop._make_closure

        def make_closure_of_members(*args: Any, **kwargs: Any) -> MembersClosure:
            return MembersClosure(make_closure(*args, **kwargs), population.begin(trainer.global_step))

        loop._make_closure = make_closure_of_members  # type: ignore[method-assign] - taken off again by `_leave`
        self._uninstall = lambda: vars(loop).pop("_make_closure", None)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the statistics, if that was asked for."""
        del trainer, outputs, batch, batch_idx
        if self._log_statistics:
            pl_module.log_dict({f"population_{name}": float(v) for name, v in asdict(self.statistics).items()})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the Trainer as it was."""
        del trainer, pl_module
        self._leave()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the Trainer as it was; the weights are the mean already."""
        del trainer, pl_module, exception
        self._leave()

    def state_dict(self) -> dict[str, Any]:
        """The seed and what was skipped; the step is the Trainer's, and a schedule of `sigma` is never in it."""
        return self._state if self._population is None else self._population.own_state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the noise of the run that is resumed."""
        self._state = dict(state_dict)

    # -- small print ---------------------------------------------------------------------------------------------------

    def _check(self, trainer: Trainer, module: LightningModule) -> None:
        if not module.automatic_optimization:
            msg = (
                "`automatic_optimization` must be True for PopulationCallback, which runs `training_step` once per "
                "member; got False. Return PopulationGradient(optimizer, self) from configure_optimizers instead, for "
                "one member per batch, or step it with a closure"
            )
            raise ValueError(msg)
        if isinstance(trainer.optimizers[0], PopulationGradient):
            msg = (
                "`configure_optimizers` must return a plain optimizer for PopulationCallback; got a "
                "PopulationGradient. Keep either the wrapper (one member per batch) or the callback"
            )
            raise TypeError(msg)
        if trainer.strategy.handles_gradient_accumulation:
            msg = (
                "`strategy` must leave the accumulation of gradients to the Trainer for PopulationCallback; got "
                f'{type(trainer.strategy).__name__}. Use another one, such as "ddp"'
            )
            raise ValueError(msg)

    def _leave(self) -> None:
        if self._uninstall is not None:
            self._uninstall()
            self._uninstall = None
        if self._population is not None:
            self._state = self._population.own_state()
            self._read = self._population.reader()
            self._population = None
