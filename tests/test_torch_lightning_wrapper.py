"""PopulationGradient returned from configure_optimizers: one member per batch, in automatic and manual optimization."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
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
from gradwise.torch import GradientMatching, PopulationGradient

pytestmark = [pytest.mark.filterwarnings(warning) for warning in WARNINGS]


def wrapped(module: nn.Module, **options: Any) -> PopulationGradient:
    return PopulationGradient(adamw(module), module, **{"sigma": 0.3, "seed": 5, **options})


def fit(folder: Path, module: Any, *, validate: bool = False, **options: Any) -> Any:
    fitting = trainer(folder, **options)
    fitting.fit(module, Loader(), Loader() if validate else None)
    return fitting


class Validated(Regression):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))


class Manual(Regression):
    """One of the loops in Lightning's documentation on manual optimization."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        optimizer.step()
        optimizer.zero_grad()


CASES: dict[str, tuple[type[Regression], dict[str, Any]]] = {
    "automatic": (Regression, {}),
    "clipped": (Regression, {"clip": 0.1}),
    "accumulated": (Regression, {"accumulate": 2, "clip": 0.1}),
    "bf16": (Regression, {"precision": "bf16"}),
    "fp16": (Regression, {"precision": "fp16", "accumulate": 2}),
    "manual": (Manual, {}),
    "manual bf16": (Manual, {"precision": "bf16"}),
    "manual fp16": (Manual, {"precision": "fp16"}),
}


def run(case: str, folder: Path, optimizers_of: Any, **more: Any) -> tuple[Regression, Any]:
    kind, options = CASES[case]
    names = {"clip": "gradient_clip_val", "accumulate": "accumulate_grad_batches"}
    module = kind(optimizers_of, **more)
    torch.manual_seed(1)
    return module, fit(folder, module, **{names.get(name, name): value for name, value in options.items()})


@pytest.mark.parametrize("case", CASES)
def test_sigma_0_equals_the_bare_optimizer_bit_for_bit(case: str, tmp_path: Path) -> None:
    bare, ours = (
        run(case, tmp_path, optimizers_of, noisy=True) for optimizers_of in (adamw, lambda m: wrapped(m, sigma=0.0))
    )
    assert equal(weights(bare[0]), weights(ours[0]))
    assert equal(list(bare[0].buffers()), list(ours[0].buffers()))
    assert bare[0].losses == ours[0].losses  # as many, and with the same masks


@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_one_member_per_batch_by_hand(case: str, tmp_path: Path) -> None:
    module, fitting = run(case, tmp_path, wrapped)
    expected, losses = by_hand(Population(8, sigma=0.3, seed=5), members=1, paired=False, **CASES[case][1])
    assert_near(weights(module), expected, CASES[case][1].get("precision", "fp32"))
    assert module.losses == pytest.approx(losses, rel=1e-2)  # one pass per batch, whatever `population_size` says
    assert fitting.optimizers[0].statistics.members == (2 if "accumulate" in CASES[case][1] else 1) - (
        CASES[case][1].get("accumulate") == 2  # the last batch of five steps alone
    )


def test_a_closure_of_the_users_own_runs_once_per_member(tmp_path: Path) -> None:
    class WithClosure(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer: Any = self.optimizers()

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = Regression.training_step(self, batch, batch_idx)
                self.manual_backward(loss)
                return loss

            optimizer.step(closure=closure)

    module = WithClosure(lambda m: wrapped(m, population_size=4))
    fit(tmp_path, module)
    expected, _ = by_hand(Population(4, sigma=0.3, seed=5), members=4, paired=True)
    assert_near(weights(module), expected)


def test_a_second_order_optimizer_sees_one_member_per_step(tmp_path: Path) -> None:
    def lbfgs(module: nn.Module) -> PopulationGradient:
        inner = torch.optim.LBFGS(module.parameters(), lr=0.1, max_iter=4)
        return PopulationGradient(inner, module, sigma=0.3, seed=5)

    module = Regression(lbfgs)
    fit(tmp_path, module, max_steps=1)
    assert len(module.losses) > 2
    assert module.losses == sorted(module.losses, reverse=True)


def test_an_exception_leaves_the_mean(tmp_path: Path) -> None:
    class Broken(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            if batch_idx == 2:
                raise KeyError("the user's own")
            return loss

    module, seen = Broken(wrapped), Seen()
    with pytest.raises(KeyError, match="the user's own"):
        fit(tmp_path, module, callbacks=[seen])
    assert equal(weights(module), seen.after_batch[1])


def test_a_forward_that_is_not_the_models_warns(tmp_path: Path) -> None:
    class Direct(Regression):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError

        def loss(self, batch: Any) -> Tensor:
            return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    with pytest.warns(UserWarning, match="saw no member of the population"):
        fit(tmp_path, Direct(wrapped), max_steps=1)
    module = Direct(lambda m: PopulationGradient(adamw(m), m.net, sigma=0.3, seed=5))
    fit(tmp_path, module)
    expected, _ = by_hand(Population(8, sigma=0.3, seed=5), members=1, paired=False)
    assert_near(weights(module), expected)


def test_clipping_under_a_scaler_is_refused_by_lightning(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit(tmp_path, Regression(wrapped), precision="fp16", gradient_clip_val=0.1)


# -- validation and checkpoints ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.")  # the ModelCheckpoint is not needed again
@pytest.mark.parametrize("accumulate", [1, 2])
def test_validation_and_checkpoints_have_the_mean_and_resume_is_exact(accumulate: int, tmp_path: Path) -> None:
    def run(seed: int, *callbacks: Any, ckpt_path: Any = None) -> Regression:
        torch.manual_seed(seed)
        module = Validated(lambda m: PopulationGradient(adamw(m), m, sigma=0.2))
        torch.manual_seed(seed)
        fitting = trainer(
            tmp_path,
            callbacks=list(callbacks),
            enable_checkpointing=bool(callbacks),
            max_epochs=2,
            val_check_interval=1,
            num_sanity_val_steps=0,
            accumulate_grad_batches=accumulate,
        )
        fitting.fit(module, Loader(), Loader(BATCHES[:1]), ckpt_path=ckpt_path)
        return module

    seen, saving = Seen(), ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    whole = run(1, seen, saving)
    mean = weights(Validated(adamw))
    for batch, (in_validation, after) in enumerate(zip(seen.in_validation, seen.after_batch, strict=True)):
        stepped = batch % 5 % accumulate == accumulate - 1 or batch % 5 == 4
        mean = after if stepped else mean
        assert equal(in_validation, mean)
        assert equal(after, mean) == stepped  # between two batches of one step, a member is in place
    steps = sorted(tmp_path.glob("step=*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))
    for path in steps:
        saved = torch.load(path, weights_only=True)
        assert any(equal(list(saved["state_dict"].values()), mean) for mean in seen.in_validation)
    for path in (steps[1], steps[len(steps) // 2 - 1], steps[-2]):
        assert equal(weights(run(2, ckpt_path=path)), weights(whole)), path


def test_fabric(tmp_path: Path) -> None:
    module = Regression(adamw)
    fabric = Fabric(accelerator="cpu", devices=1)
    model, optimizer = fabric.setup(module.net, wrapped(module.net))
    for batch in BATCHES:
        loss = nn.functional.mse_loss(model(batch[0]), batch[1])
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    expected, _ = by_hand(Population(8, sigma=0.3, seed=5), members=1, paired=False)
    assert_near(weights(module), expected)


# -- gradient matching -------------------------------------------------------------------------------------------------


def test_gradient_matching_in_training_and_validation_step(tmp_path: Path) -> None:
    class Matched(Regression):
        def __init__(self) -> None:
            super().__init__(adamw)
            self.matching = GradientMatching(scale="none")
            self.validated: list[Tensor] = []
            self.modes: list[bool] = []

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            y, loss = self.matching.with_values(self, batch[0], torch.zeros(12, 2, 6))
            return nn.functional.mse_loss(y, batch[1]) + loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.modes.append(torch.is_inference_mode_enabled())
            self.validated.append(self.matching(self, batch[0], torch.zeros(12, 2, 6)))

    module = Matched()
    fitting = fit(tmp_path, module, validate=True, num_sanity_val_steps=0)
    fitting.validate(module, Loader(), verbose=False)
    assert module.modes == [False] * len(BATCHES) + [True] * len(BATCHES)  # no_grad within fit, inference mode outside
    module.eval()
    losses = [module.matching(module, x, torch.zeros(12, 2, 6)).detach() for x, _ in BATCHES]
    torch.testing.assert_close(module.validated, 2 * losses)

    by_loop = Matched()
    optimizer = adamw(by_loop)
    for x, y in BATCHES:
        optimizer.zero_grad()
        x = x.clone().requires_grad_()
        out = by_loop.net(x)
        rows = [torch.autograd.grad(out[:, j].sum(), x, create_graph=True)[0] for j in range(2)]
        squares = torch.stack(rows, 1).square()
        matched = by_loop.matching(by_loop, x.detach(), torch.zeros(12, 2, 6)).detach()
        term = squares.sum(2).mean(0).sum()
        (nn.functional.mse_loss(out, y) + term * (matched / term.detach())).backward()
        optimizer.step()
    assert_near(weights(module), weights(by_loop))
