"""PopulationCallback under the Trainer: K members per batch, everything else as without it."""

import importlib
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_cells import (
    BATCHES,
    WARNINGS,
    Loader,
    Regression,
    Seen,
    adamw,
    assert_near,
    by_hand,
    equal,
    trainer,
    weights,
)
from torch import Tensor, nn

from gradwise import Population
from gradwise.torch import PopulationGradient
from gradwise.torch.lightning import PopulationCallback

pytestmark = [pytest.mark.filterwarnings(warning) for warning in WARNINGS]


def fit(folder: Path, module: Any, callbacks: list[Any], **options: Any) -> Any:
    fitting = trainer(folder, callbacks=callbacks, **options)
    fitting.fit(module, Loader())
    return fitting


# -- sigma 0 is the bare Trainer ---------------------------------------------------------------------------------------


def scheduled(module: nn.Module) -> Any:
    optimizer = adamw(module)
    return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), "interval": "step"}]


def lbfgs(module: nn.Module) -> Any:
    return torch.optim.LBFGS(module.parameters(), lr=0.1, max_iter=3)


class Skipping(Regression):
    """Returns None for one batch, which tells the Trainer to skip it."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx == 1 else loss


BARE: dict[str, tuple[Any, dict[str, Any]]] = {
    "clipped": (lambda: Regression(scheduled, noisy=True), {"gradient_clip_val": 0.1, "max_epochs": 2}),
    "accumulated": (lambda: Regression(adamw, noisy=True), {"accumulate_grad_batches": 2}),
    "bf16": (lambda: Regression(adamw, noisy=True), {"precision": "bf16"}),
    "fp16": (lambda: Regression(adamw, noisy=True), {"gradient_clip_val": 0.1, "precision": "fp16"}),
    "fused": (lambda: Regression(lambda m: adamw(m, fused=True), noisy=True), {}),
    "LBFGS": (lambda: Regression(lbfgs), {}),  # members share their masks over all evaluations of a step, bare ones not
    "skipping": (lambda: Skipping(adamw, noisy=True), {}),
}


@pytest.mark.parametrize("case", BARE)
@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_sigma_0_equals_the_bare_trainer_bit_for_bit(case: str, tmp_path: Path) -> None:
    make, options = BARE[case]
    results: list[Any] = []
    for callbacks in ([], [PopulationCallback(3, sigma=0.0, antithetic=False)]):
        module = make()
        torch.manual_seed(1)
        fitting = fit(tmp_path, module, callbacks, **options)
        state = fitting.optimizers[0].state_dict()["state"]
        results.append(
            {
                "weights": weights(module),
                "buffers": list(module.buffers()),
                "state": [v for s in state.values() for v in s.values() if isinstance(v, Tensor)],
                "stream": [torch.get_rng_state()],
                "norms": [torch.tensor(module.norms).nan_to_num(math.inf, math.inf)],  # the mean of infinities is NaN
                "logged": fitting.callback_metrics,
                "calls": len(module.losses),
            }
        )
    bare, ours = results
    assert ours.pop("calls") == 3 * bare.pop("calls") - 2 * (case == "skipping")
    logged = ours.pop("logged"), bare.pop("logged")
    if case != "skipping":  # there, three members have logged and then one that found nothing to do
        torch.testing.assert_close(*logged)  # to rounding: Lightning sums before it divides
    for name in bare:
        assert equal(bare[name], ours[name]), name


# -- the members -------------------------------------------------------------------------------------------------------

BY_HAND: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"clip": 0.1},
    "accumulated": {"accumulate": 2, "clip": 0.1},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16", "clip": 0.1, "accumulate": 2},
    "fused": {},
}


@pytest.mark.parametrize("case", BY_HAND)
def test_steps_are_those_of_a_loop_over_members_by_hand(case: str, tmp_path: Path) -> None:
    options = BY_HAND[case]
    module, seen = Regression(lambda m: adamw(m, fused=case == "fused")), Seen()
    fitting = fit(
        tmp_path,
        module,
        [seen, PopulationCallback(4, sigma=0.3, seed=5)],
        precision=options.get("precision", "fp32"),
        gradient_clip_val=options.get("clip"),
        accumulate_grad_batches=options.get("accumulate", 1),
    )
    expected, losses = by_hand(Population(4, sigma=0.3, seed=5), members=4, paired=True, **options)
    assert_near(weights(module), expected, options.get("precision", "fp32"))
    steps = math.ceil(len(BATCHES) / options.get("accumulate", 1))
    assert fitting.global_step == len(module.norms) == steps
    assert len(module.losses) == 4 * len(BATCHES)
    # outputs["loss"] is divided by the number of accumulated batches, as Lightning does
    assert seen.outputs == pytest.approx([loss / options.get("accumulate", 1) for loss in losses], rel=1e-2)


def test_a_second_order_optimizer_sees_one_function_per_step(tmp_path: Path) -> None:
    population = PopulationCallback(2, sigma=0.3, seed=5)
    module = Regression(lbfgs, noisy=True)
    fit(tmp_path, module, [population], max_steps=1)
    pairs = module.losses[::2], module.losses[1::2]
    assert len(module.losses) > 4  # LBFGS has evaluated more than once, with two members each
    means = [sum(pair) / 2 for pair in zip(*pairs, strict=True)]
    assert means == sorted(means, reverse=True)  # with noise or masks of their own, evaluations would go up and down
    assert population.statistics.members == 2


def test_a_schedule_counts_the_steps_of_the_trainer(tmp_path: Path) -> None:
    asked: list[int] = []

    def sigma(step: int) -> float:
        asked.append(step)
        return 0.1

    fit(tmp_path, Regression(adamw), [PopulationCallback(2, sigma)], accumulate_grad_batches=2)
    assert set(asked) == {0, 1, 2}


# -- nothing stays -----------------------------------------------------------------------------------------------------


def state_of(module: Any) -> list[Any]:
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) + len(m._state_dict_hooks) for m in module.modules()]
    return [set(vars(module)), hooks]


def test_nothing_is_on_the_module_and_nothing_stays_on_the_trainer(tmp_path: Path) -> None:
    class Watching(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            while_training.append(state_of(pl_module))

    while_training: list[Any] = []
    after: list[Any] = []
    for own in ([], [PopulationCallback(2)]):
        module = Regression(adamw)
        fitting = trainer(tmp_path, callbacks=[*own, Watching()], max_steps=1)
        at_start = set(vars(fitting.fit_loop.epoch_loop.automatic_optimization))
        fitting.fit(module, Loader())
        assert set(vars(fitting.fit_loop.epoch_loop.automatic_optimization)) == at_start
        after.append(state_of(module))
    assert while_training[0] == while_training[1]
    assert after[0] == after[1]


class Broken(Regression):
    broken = True

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if self.broken and len(self.losses) == 4:  # the second member of the second batch
            raise KeyError("the user's own")
        return loss


def test_after_an_exception_in_a_member_the_weights_are_the_mean_and_training_can_go_on(tmp_path: Path) -> None:
    module, population, seen = Broken(adamw), PopulationCallback(2, sigma=0.3, seed=5), Seen()
    with pytest.raises(KeyError, match="the user's own"):
        fit(tmp_path, module, [population, seen])
    assert equal(weights(module), seen.after_batch[0])
    loop = module.trainer.fit_loop.epoch_loop.automatic_optimization
    assert "_make_closure" not in vars(loop)
    assert population.statistics.skipped == 0  # can be read
    module.broken = False
    fit(tmp_path, module, [population])
    assert population.statistics.members == 2


def test_fit_again_and_other_stages(tmp_path: Path) -> None:
    module, population = Regression(adamw), PopulationCallback(2, sigma=0.3)
    module.test_step = module.validation_step = lambda batch, batch_idx: module.loss(batch)
    fitting = trainer(tmp_path, callbacks=[population])
    fitting.fit(module, Loader(), Loader())
    fitting.fit_loop.max_epochs = 2
    fitting.fit(module, Loader(), Loader())
    assert fitting.global_step == 2 * len(BATCHES)
    assert len(module.losses) == 4 * len(BATCHES)
    mean = weights(module)
    fitting.test(module, Loader(), verbose=False)
    fitting.validate(module, Loader(), verbose=False)
    assert equal(weights(module), mean)
    trainer(tmp_path, callbacks=[population], fast_dev_run=True).fit(module, Loader(), Loader())
    assert len(module.losses) == 4 * len(BATCHES) + 2


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.")  # the ModelCheckpoint is not needed again
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    def run(seed: int, callbacks: Any = (), ckpt_path: Any = None) -> tuple[list[Tensor], Any, Any]:
        torch.manual_seed(seed)
        module = Regression(scheduled)
        torch.manual_seed(seed)
        population = PopulationCallback(2, sigma=lambda step: 0.2 / (1 + step))
        fitting = trainer(
            tmp_path, callbacks=[population, *callbacks], enable_checkpointing=bool(callbacks), max_epochs=2
        )
        fitting.fit(module, Loader(), ckpt_path=ckpt_path)
        return weights(module), fitting.optimizers[0].state_dict(), population.state_dict()

    whole, state, own = run(1, [ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)])
    for step in (3, 5, 7):  # within an epoch, between two epochs, within the second
        resumed, resumed_state, resumed_own = run(2, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert equal(whole, resumed)
        assert resumed_own == own == {"seed": 1, "skipped": 0}
        torch.testing.assert_close(resumed_state, state, rtol=0, atol=0)
    saved = torch.load(tmp_path / "step=10.ckpt", weights_only=True)
    assert equal(list(saved["state_dict"].values()), whole)


# -- what is shown -----------------------------------------------------------------------------------------------------


def test_what_log_shows(tmp_path: Path) -> None:
    module = Regression(adamw)
    fitting = fit(tmp_path, module, [PopulationCallback(4, sigma=0.3, log_statistics=True)])
    shown = fitting.callback_metrics
    assert float(shown["loss_epoch"]) == pytest.approx(sum(module.losses) / len(module.losses))
    assert float(shown["loss_step"]) == pytest.approx(module.losses[-1])
    assert float(shown["population_loss_mean"]) == pytest.approx(sum(module.losses[-4:]) / 4)
    assert float(shown["population_members"]) == 4
    assert 0.25 < float(shown["population_agreement"]) <= 1


class Plain(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Any:  # nothing that a compiler could not go through
        return self.loss(batch)


def test_a_compiled_module(tmp_path: Path) -> None:
    module = Plain(adamw)
    fit(tmp_path, torch.compile(module, backend="eager"), [PopulationCallback(4, sigma=0.3, seed=5)])
    expected, _ = by_hand(Population(4, sigma=0.3, seed=5), members=4, paired=True)
    assert_near(weights(module), expected)


# -- what is refused ---------------------------------------------------------------------------------------------------


def manual(module: Regression) -> Any:
    module.automatic_optimization = False
    return adamw(module)


REFUSED: dict[str, tuple[Any, str]] = {
    "manual optimization": (manual, "`automatic_optimization` must be True"),
    "wrapped twice": (lambda module: PopulationGradient(adamw(module), module), "must return a plain optimizer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    optimizers_of, message = REFUSED[case]
    with pytest.raises((TypeError, ValueError), match=message):
        fit(tmp_path, Regression(optimizers_of), [PopulationCallback()])


@pytest.mark.parametrize(
    ("options", "name"),
    [({"population_size": 3}, "population_size"), ({"sigma": -1.0}, "sigma"), ({"on_nonfinite": "ignore"}, "on_nonf")],
)
def test_bad_arguments_are_refused_at_construction(options: Any, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        PopulationCallback(**options)


class Absent:
    """Finds no Lightning, as where it is not installed."""

    def find_spec(self, name: str, *args: Any) -> None:
        if name == "lightning":
            raise ModuleNotFoundError(name=name)


def test_without_lightning_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = "lightning", "gradwise.torch.lightning", "gradwise_torch._lightning"
    for name in [name for name in sys.modules if name.startswith("lightning.") or name in ours]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    with pytest.raises(ModuleNotFoundError, match=r"pip install .gradwise\[lightning\]"):
        importlib.import_module("gradwise.torch.lightning")


def test_the_example(tmp_path: Path) -> None:
    import lightning_fit as example

    plain, wrapped, members, control = (example.run(method, 0, epochs=10) for method in example.METHODS)
    assert control == plain
    assert plain not in (wrapped, members)
    assert min(wrapped["accuracy"], members["accuracy"]) > 80  # of ten classes; AdamW reaches 87 in as many epochs
