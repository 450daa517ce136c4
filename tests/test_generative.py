"""The generative example: its scores are right, its arms differ in the loss term only, and the study runs."""

import io
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from generative.acgan import Average, Discriminator, Generator, Run, Settings, Step, train
from generative.digits import CLASSES, Classifier, Split, split, train_classifier
from generative.scores import frechet_distance, kernel_distance, precision_recall, score
from generative.terms import ARMS, Arm, Data
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from gradwise.torch import value_and_jacobian

SMALL = Settings(width=16, batch=8)
BY_NAME = {arm.name: arm for arm in ARMS}


@pytest.fixture(scope="module")
def parts() -> Split:
    return split(0)


@pytest.fixture(scope="module")
def data(parts: Split) -> Data:
    x, labels = parts.x[:200], parts.labels[:200]
    return Data(x, labels, train_classifier(x, labels, seed=0, steps=30), 0)


# -- scores ------------------------------------------------------------------------------------------------------------


def test_kernel_distance_equals_a_double_loop() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(7, 3)), rng.normal(size=(5, 3)) + 0.5

    def k(u: NDArray[np.float64], v: NDArray[np.float64]) -> float:
        return (sum(s * t for s, t in zip(u, v, strict=True)) / 3 + 1) ** 3

    def within(c: NDArray[np.float64]) -> float:
        pairs = [k(u, v) for i, u in enumerate(c) for j, v in enumerate(c) if i != j]
        return sum(pairs) / len(pairs)

    between = sum(k(u, v) for u in a for v in b) / (len(a) * len(b))
    assert kernel_distance(a, b) == pytest.approx(within(a) + within(b) - 2 * between, rel=1e-12)  # rounding


def test_kernel_distance_is_unbiased() -> None:
    rng = np.random.default_rng(0)
    same = np.array([kernel_distance(*rng.normal(size=(2, 10, 2))) for _ in range(4000)])
    assert abs(same.mean()) < 3 * same.std() / len(same) ** 0.5
    # One dimension, N(0, 1) and N(m, 1): (1 + xy)^3 = sum_k C(3, k) x^k y^k compares the first three moments.
    m = 0.5
    moments, shifted = np.array([1, 0, 1, 0]), np.array([1, m, 1 + m**2, 3 * m + m**3])
    exact = (np.array([1, 3, 3, 1]) * (moments - shifted) ** 2).sum()
    other = np.array([kernel_distance(rng.normal(size=(10, 1)), m + rng.normal(size=(10, 1))) for _ in range(20000)])
    assert abs(other.mean() - exact) < 3 * other.std() / len(other) ** 0.5
    assert exact > 10 * other.std() / len(other) ** 0.5  # so that the line before says something


def test_frechet_distance_of_gaussians_is_the_closed_form() -> None:
    rng = np.random.default_rng(0)
    z = rng.normal(size=(500, 3))
    z -= z.mean(0)
    z = z @ np.linalg.inv(np.linalg.cholesky(np.cov(z, rowvar=False)).T)  # sample moments exactly 0 and I
    shift = np.array([1.0, -2.0, 0.5])
    # Commuting covariances: the distance of means plus that of standard deviations.
    scaled = z * [1.0, 2.0, 3.0]
    assert frechet_distance(z, scaled + shift) == pytest.approx((shift**2).sum() + 0 + 1 + 4, rel=1e-9)
    # Any covariances: tr (S T)^(1/2) from the eigenvalues of the product, which is not symmetric.
    mixed = z @ rng.normal(size=(3, 3))
    s, t = np.cov(scaled, rowvar=False), np.cov(mixed, rowvar=False)
    cross = np.real(np.sqrt(np.linalg.eigvals(s @ t).astype(complex))).sum()
    assert frechet_distance(scaled, mixed) == pytest.approx(np.trace(s) + np.trace(t) - 2 * cross, rel=1e-9)
    flat = z * [1.0, 1.0, 0.0]  # a feature that never varies
    assert frechet_distance(flat, flat) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(z[:, :1], 3 * z[:, :1]) == pytest.approx(4, rel=1e-9)


def test_precision_and_recall_of_known_clouds() -> None:
    rng = np.random.default_rng(0)
    one, two = rng.uniform(size=(100, 2)), rng.uniform(size=(100, 2)) + 10
    both = np.concatenate([one[:50], two[:50]])
    assert precision_recall(one, two) == (0, 0)
    assert precision_recall(one, one) == (1, 1)
    # Both clouds are real, one is generated: what is generated is real; half of what is real is never generated.
    precision, recall = precision_recall(both, one)
    assert precision > 0.9
    assert recall == pytest.approx(0.5, abs=0.05)
    # Half of what is generated is not real.
    precision, recall = precision_recall(one, both)
    assert precision == pytest.approx(0.5, abs=0.05)
    assert recall > 0.9
    # Radii by hand, k = 1: that of the real points 0, 1, 10 is 1, 1, 9, that of the generated 5, 30, 32 is 25, 2, 2.
    real, generated = (np.array(points, dtype=float)[:, None] for points in ([0, 1, 10], [5, 30, 32]))
    assert precision_recall(real, generated, k=1) == (1 / 3, 1)


def test_score_is_all_four_and_wants_equal_sizes() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 30, 3))
    precision, recall = precision_recall(a, b)
    assert score(a, b) == (kernel_distance(a, b), frechet_distance(a, b), precision, recall)
    with pytest.raises(ValueError, match="`generated` must have the shape of `real`"):
        score(a, b[:-1])


# -- data and classifiers ----------------------------------------------------------------------------------------------


def test_parts_are_disjoint_and_make_up_the_digits(parts: Split) -> None:
    from sklearn.datasets import load_digits

    sizes = [len(parts.x), len(parts.scorer_x), len(parts.reference_x)]
    assert sizes == [1000, 400, 397]
    together = torch.cat([parts.x, parts.scorer_x, parts.reference_x])
    labels = torch.cat([parts.labels, parts.scorer_labels, parts.reference_labels])
    images, truth = load_digits(return_X_y=True)
    expected = sorted([*row, label] for row, label in zip((images / 8 - 1).tolist(), truth.tolist(), strict=True))
    assert sorted([*row, y] for row, y in zip(together.tolist(), labels.tolist(), strict=True)) == expected
    assert not torch.equal(split(1).x, parts.x)


def test_classifier_learns_and_is_centred(parts: Split) -> None:
    state = torch.random.get_rng_state()
    scorer = train_classifier(parts.scorer_x, parts.scorer_labels, seed=0, steps=300)
    assert torch.equal(torch.random.get_rng_state(), state)
    logits = scorer(parts.reference_x)
    assert (logits.argmax(1) == parts.reference_labels).double().mean() > 0.9
    torch.testing.assert_close(logits.mean(1), torch.zeros(len(logits)), atol=1e-5, rtol=0)
    features = scorer.features(parts.scorer_x)
    np.testing.assert_allclose(features.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(features.std(0, ddof=1), 1, rtol=1e-3)  # less the 1e-6 that keeps dead features finite


# -- training ----------------------------------------------------------------------------------------------------------


def weights(generator: Generator) -> list[Tensor]:
    return list(generator.state_dict().values())


def run_arm(arm: Arm, data: Data, weight: float) -> Run:
    return train(data.x, data.labels, seed=3, term=arm.build(data, weight), settings=SMALL, steps=(2, 5))


@pytest.mark.parametrize("arm", ARMS[1:], ids=lambda arm: arm.name)
def test_arms_differ_only_in_the_loss_term(arm: Arm, data: Data) -> None:
    plain = run_arm(ARMS[0], data, 0.0).at_steps
    for step, generator in run_arm(arm, data, 0.0).at_steps.items():
        for same, mine in zip(weights(plain[step]), weights(generator), strict=True):
            assert torch.equal(same, mine)
    changed = run_arm(arm, data, 1.0).at_steps[5]
    assert any(not torch.equal(a, b) for a, b in zip(weights(plain[5]), weights(changed), strict=True))


def test_global_random_stream_is_left_alone(data: Data) -> None:
    state = torch.random.get_rng_state()
    run_arm(BY_NAME["gradient penalty"], data, 1.0)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_generator_is_averaged() -> None:
    torch.manual_seed(0)
    network = Generator(SMALL)
    average = Average(network, eta=2.0)
    naive = [torch.zeros_like(p, dtype=torch.float64) for p in network.parameters()]
    for k in range(1, 6):
        with torch.no_grad():
            for p in network.parameters():
                p.normal_()
            network.state_dict()["body.1.running_mean"].fill_(k)
        average.update()
        share = 3 / (k + 2)
        naive = [(1 - share) * m + share * p.double() for m, p in zip(naive, network.parameters(), strict=True)]
    for mean, p in zip(naive, average.network.parameters(), strict=True):
        torch.testing.assert_close(p, mean.float(), rtol=1e-5, atol=1e-6)  # float32
    # Step k of n counts k (k + 1) under eta = 2.
    shares = np.array([k * (k + 1) for k in range(1, 6)])
    mean = (shares * np.arange(1, 6)).sum() / shares.sum()
    statistics = average.network.state_dict()["body.1.running_mean"]
    torch.testing.assert_close(statistics, torch.full((16,), mean).float())
    assert not average.network.training
    kept = average.copy()
    with torch.no_grad():
        for p in network.parameters():
            p.zero_()
    average.update()
    assert not any(torch.equal(p, q) for p, q in zip(kept.parameters(), average.network.parameters(), strict=True))


def test_last_average_is_kept_at_steps_and_seconds(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr("generative.acgan.time.process_time", lambda: next(clock))
    run = train(data.x, data.labels, seed=3, settings=SMALL, steps=(2, 5), seconds=(3.0, 6.5))
    assert (run.steps, run.seconds) == (7, 7)  # a tick a step: 6.5 s are over after the seventh
    again = train(data.x, data.labels, seed=3, settings=SMALL, steps=(3, 7))
    for kept, step in ((run.at_seconds[3.0], 3), (run.at_seconds[6.5], 7)):
        for a, b in zip(weights(kept), weights(again.at_steps[step]), strict=True):
            assert torch.equal(a, b)


# -- terms -------------------------------------------------------------------------------------------------------------


def step_of(data: Data, discriminator: Discriminator, rows: Tensor) -> Step:
    x = data.x[rows].requires_grad_()
    real, logits = discriminator(x)
    fake = torch.zeros_like(x).detach()
    return Step(x, rows, data.labels[rows], real, logits, fake, discriminator, torch.Generator().manual_seed(0))


class Taught(Discriminator):
    """Its class logits are those of the teacher plus constants, its "real" logit is linear with a slope of norm 1."""

    def __init__(self, teacher: Classifier) -> None:
        super().__init__(SMALL)
        self.teacher = teacher
        self.offset = torch.nn.Parameter(torch.ones(CLASSES))
        self.slope = torch.nn.Parameter(torch.full((64, 1), 1 / 8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x @ self.slope, self.teacher(x) + self.offset + 0 * self.slope.sum() * x.sum(1, keepdim=True)


def test_each_term_is_zero_where_it_is_fulfilled(data: Data) -> None:
    rows = torch.arange(20)
    step = step_of(data, Taught(data.teacher), rows)
    loss = {
        name: float(term(step).detach())
        for name, arm in BY_NAME.items()
        if (term := arm.build(data, 1.0, r1_weight=2.0)) is not None
    }
    assert loss["teacher gradients"] == pytest.approx(0, abs=1e-10)
    assert loss["teacher logits"] == pytest.approx(1, rel=1e-5)  # the offset
    assert loss["gradient penalty"] == pytest.approx(0, abs=1e-10)
    assert loss["R1"] == pytest.approx(1, rel=1e-5)  # |slope|^2
    assert loss["R1 + teacher gradients"] == pytest.approx(2, rel=1e-5)
    # Targets of zero leave the teacher's whole derivative: with all images and classes a relative error of 1.
    assert loss["zero class gradients"] > 0.01
    assert loss["shuffled gradients"] > 0.01
    assert loss["pixel differences"] > 0.01


def test_class_terms_are_relative_errors_in_units_of_the_logits(data: Data) -> None:
    torch.manual_seed(0)
    discriminator = Discriminator(SMALL)
    rows = torch.arange(len(data.x))
    teacher = value_and_jacobian(data.teacher, data.x)[1].detach()
    mine = value_and_jacobian(lambda x: discriminator(x)[1], data.x)[1].detach()
    variance, spread = data.teacher(data.x).var(0, unbiased=False), data.x.std(0, unbiased=False)
    order = torch.randperm(len(data.x), generator=torch.Generator().manual_seed(data.seed))
    targets = {
        "teacher gradients": teacher,
        "shuffled gradients": teacher[order],
        "zero class gradients": torch.zeros_like(teacher),
    }
    for name, target in targets.items():
        term = BY_NAME[name].build(data, 0.5)
        assert term is not None
        draws = torch.stack([term(step_of(data, discriminator, rows)).detach() for _ in range(200)])
        square = (spread * (mine - target)).square().sum(2).mean(0)
        exact = 0.5 * (variance * square / (spread * teacher).square().sum(2).mean(0)).mean()
        assert abs(draws.mean() - exact) < 4 * draws.std() / len(draws) ** 0.5, name  # one class of ten a draw
        assert draws.std() < exact, name


def test_pixel_differences_are_to_images_of_the_class(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    from generative import terms

    seen: list[tuple[Tensor, Tensor]] = []
    original = terms.GradientMatching.from_outputs

    def spy(self: object, y: Tensor, *, wrt: Tensor, target: Tensor) -> Tensor:
        seen.append((y, target))
        return original(self, y, wrt=wrt, target=target)  # type: ignore[arg-type] - `self` is a GradientMatching

    monkeypatch.setattr(terms.GradientMatching, "from_outputs", spy)
    term = BY_NAME["pixel differences"].build(data, 1.0)
    assert term is not None
    torch.manual_seed(0)
    rows = torch.arange(50)
    step = step_of(data, Discriminator(SMALL), rows)
    for _ in range(3):
        term(step)
    for y, target in seen:
        assert torch.equal(y[:, 0], step.logits[torch.arange(50), step.labels])
        for row, image in enumerate(target + step.x.detach()):
            near = (data.x - image).abs().amax(1) < 1e-5
            assert step.labels[row] in data.labels[near]
    assert not torch.equal(seen[0][1], seen[1][1])


# -- programs ----------------------------------------------------------------------------------------------------------


def test_example_draws_and_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from generative import train as example

    picture = tmp_path / "out" / "grid.png"
    results = example.main(["--steps", "3", "--out", str(picture)])
    assert set(results) == {"plain", "teacher gradients"}
    assert np.isfinite(list(results.values())).all()
    assert picture.stat().st_size > 5_000
    assert "same noise and labels" in capsys.readouterr().out


def test_example_is_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(__file__).parents[1] / "examples" / "generative" / "train.py"
    assert callable(runpy.run_path(str(path))["main"])


def test_holm_is_that_of_the_definition() -> None:
    from generative_study import differences, wilcoxon
    from scipy import stats

    rng = np.random.default_rng(0)
    base = rng.normal(size=10)
    pairs = {
        name: (base + shift + 0.5 * rng.normal(size=10), base)
        for name, shift in zip("abcd", (0, 1, 2, 0.3), strict=True)
    }
    result = differences(pairs)
    p = {name: float(wilcoxon(a - b).pvalue) for name, (a, b) in pairs.items()}
    running = 0.0
    for rank, name in enumerate(sorted(p, key=lambda name: p[name])):
        running = max(running, min(1.0, (len(p) - rank) * p[name]))
        assert result[name].p == p[name]
        assert result[name].holm == pytest.approx(running)
    d = pairs["a"][0] - pairs["a"][1]
    expected = stats.ttest_1samp(d, 0).confidence_interval()
    assert (result["a"].mean, result["a"].low, result["a"].high) == pytest.approx(
        (d.mean(), expected.low, expected.high)
    )


def test_study_runs_resumes_and_publishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import generative_study as study

    small = {"STEPS": 2, "SECONDS": (0.001, 0.01), "SEEDS": (0, 1), "TUNING_SEEDS": (2,), "DRAWS": 1}
    kept = tuple(BY_NAME[name] for name in ("plain", "teacher gradients", "R1", "R1 + teacher gradients"))
    small |= {"ARMS": kept, "OUT": tmp_path, "IMAGES": tmp_path / "images", "CELLS": tmp_path / "cells.jsonl"}
    for name, value in small.items():
        monkeypatch.setattr(study, name, value)
    seen: list[Tensor] = []

    def quick(x: Tensor, labels: Tensor, *, seed: int) -> Classifier:
        seen.append(x)
        return train_classifier(x, labels, seed=seed, steps=20)

    monkeypatch.setattr(study, "train_classifier", quick)
    study.problem.cache_clear()
    study.floor.cache_clear()
    study.main([])
    study.problem.cache_clear()
    teacher_x, scorer_x = seen[-2:]  # of the last seed
    parts = split(1)
    assert torch.equal(teacher_x, parts.x)
    assert torch.equal(scorer_x, parts.scorer_x)
    lines = [json.loads(line) for line in study.CELLS.read_text().splitlines()]
    assert len(lines) == 10 + 2 * 4
    for line in lines:
        assert np.isfinite(list(line["at_steps"].values())).all()
    tuned = [line for line in lines if line["phase"] == "tuning"]
    for arm in kept:
        mine = {line["weight"]: line["at_steps"]["kid"] for line in tuned if line["arm"] == arm.name}
        assert set(mine) == set(arm.weights)
        chosen = {line["weight"] for line in lines if line["phase"] == "final" and line["arm"] == arm.name}
        assert chosen == {min(mine, key=mine.__getitem__)}
    beside = {line["r1_weight"] for line in lines if line["arm"] == "R1 + teacher gradients"}
    assert beside == {line["weight"] for line in lines if line["phase"] == "final" and line["arm"] == "R1"}
    monkeypatch.setattr(study, "train", None)  # nothing is measured twice
    with Progress(console=Console(file=io.StringIO())) as progress:
        cells = study.Cells(study.CELLS)
        forwards, backwards = (
            study.final(cells, study.tune(cells, progress, reverse=reverse), progress, reverse=reverse)
            for reverse in (False, True)
        )
    assert forwards == backwards
    assert [cell["seed"] for cell in forwards["R1"]] == [0, 1]
    assert "| R1 + teacher gradients |" in (tmp_path / "generative.md").read_text()
    for name in ("generative", "generative_samples"):
        assert (tmp_path / "images" / f"{name}.png").stat().st_size > 10_000
