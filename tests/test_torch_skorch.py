"""skorch and scikit-learn's pipelines, by the examples that show them."""

import pickle
from typing import Any

import numpy as np
import pytest
import sklearn
import sklearn_pipeline
import skorch_digits as example
import torch
from sklearn.base import clone
from torch import Tensor, nn
from torch_cells import assert_same, reference_closure_step

from gradwise import Population
from gradwise.torch import PopulationGradient

ROWS = 60


def digits() -> tuple[Any, Any]:
    images, _, labels, _ = example.split()
    return images[:ROWS], labels[:ROWS]


def weights_of(pipeline: Any) -> list[Tensor]:
    return [p.detach().clone() for p in pipeline[-1].module_.parameters()]


def test_sigma_zero_equals_plain_skorch() -> None:
    results: list[Any] = []
    cells: list[dict[str, Any]] = [
        {"optimizer": torch.optim.AdamW},
        {"optimizer__sigma": 0.0, "optimizer__population_size": 4},
    ]
    for settings in cells:
        pipeline: Any = example.make_pipeline_of(**settings, max_epochs=2).fit(*digits())
        results.append([*weights_of(pipeline), pipeline[-1].history[:, "train_loss"], torch.get_rng_state()])
    assert_same(*results)


def test_every_step_has_its_members(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the loop by hand, on the batches that skorch made."""
    calls: list[Any] = []
    forward = example.Digits.forward
    monkeypatch.setattr(example.Digits, "forward", lambda self, x: calls.append(x.clone()) or forward(self, x))
    settings: dict[str, Any] = {"optimizer__sigma": 0.3, "optimizer": sgd, "optimizer__population_size": 4}
    images, labels = digits()
    pipeline: Any = example.make_pipeline_of(**settings, max_epochs=2).fit(images, labels)
    monkeypatch.undo()
    assert len(calls) == 2 * (ROWS // 20) * 4
    assert pipeline[-1].optimizer_.statistics.members == 4

    torch.manual_seed(0)
    twin = example.Digits()
    inner = torch.optim.SGD(twin.parameters(), lr=3e-3)
    scaled = torch.as_tensor(pipeline[0].transform(images))
    for step, x in enumerate(calls[::4]):
        assert torch.equal(x, scaled[step % 3 * 20 : step % 3 * 20 + 20])  # skorch does not shuffle
        y = torch.as_tensor(labels[step % 3 * 20 : step % 3 * 20 + 20])
        wanted = Labelled(twin, y)
        reference_closure_step(wanted, inner, Population(size=4, sigma=0.3, seed=0), (x, torch.zeros(())), step)
    for got, expected in zip(weights_of(pipeline), twin.parameters(), strict=True):
        torch.testing.assert_close(got, expected.detach(), rtol=1e-4, atol=1e-6)  # sums in another order


class Labelled(nn.Module):
    """A model whose mean squared output is the cross entropy: what the reference loop takes the gradient of."""

    def __init__(self, model: nn.Module, labels: Tensor) -> None:
        super().__init__()
        self.model, self.labels = model, labels

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.model(x), self.labels).sqrt()


def sgd(params: Any, lr: float, **settings: Any) -> PopulationGradient:
    return PopulationGradient(torch.optim.SGD(params, lr=lr), seed=0, **settings)


def test_nets_are_cloned_pickled_and_trained_further() -> None:
    images, labels = digits()
    pipeline: Any = example.make_pipeline_of(optimizer__sigma=0.3, max_epochs=2).fit(images, labels)
    again: Any = clone(pipeline)
    torch.manual_seed(0)
    again.fit(images, labels)
    assert_same(weights_of(again), weights_of(pipeline))
    copy = pickle.loads(pickle.dumps(pipeline))
    np.testing.assert_array_equal(copy.predict_proba(images), pipeline.predict_proba(images))
    for one in (copy, pipeline):  # with the optimizer's state, and members that go on where they were
        one[-1].partial_fit(one[0].transform(images), labels)
    assert_same(weights_of(copy), weights_of(pipeline))
    assert copy[-1].optimizer_._step == 12


def test_grid_search_over_sigma(monkeypatch: pytest.MonkeyPatch) -> None:
    sigmas: list[float] = []

    def noted(inner: Any, **settings: Any) -> PopulationGradient:
        sigmas.append(settings["sigma"])
        return PopulationGradient(inner, **settings)

    monkeypatch.setattr(example, "PopulationGradient", noted)
    images, test_images, labels, test_labels = example.split()
    found: Any = example.search(images, labels, max_epochs=3)
    best = found.best_params_["neuralnetclassifier__optimizer__sigma"]
    assert sorted(sigmas[:-1]) == sorted(3 * example.SIGMAS)  # three folds each
    assert sigmas[-1] == best  # and all rows with the best
    assert found.score(test_images, test_labels) > 0.3  # of ten classes, after thirty steps


def test_derivatives_through_a_pipeline() -> None:
    errors = {name: sklearn_pipeline.error(model) for name, model in sklearn_pipeline.pipelines().items()}
    assert errors["no scaler"] < 0.5 * errors["values alone"]
    assert errors["scaler, wrong derivatives"] > 2 * errors["no scaler"]
    reports = sklearn_pipeline.report()
    assert reports["no scaler"].verdict == "use"
    assert reports["scaler, wrong derivatives"].verdict == "do not use"


def test_grid_search_hands_each_fold_its_derivatives() -> None:
    found: Any = sklearn_pipeline.search()
    assert found.best_params_["model__derivative_weight"] > 0
    x, y, dydx = sklearn_pipeline.beam(20, seed=0)
    model = found.best_estimator_["model"]
    alone: Any = clone(model)
    alone.fit(x, y, dydx)
    np.testing.assert_allclose(model.predict(x), alone.predict(x), rtol=1e-12)
    # The chain rule through the scaler: the derivatives are in the units of x, whatever the model saw.
    steps = 1e-5 * (sklearn_pipeline.UPPER - sklearn_pipeline.LOWER)
    for j, step in enumerate(np.diag(steps)):
        slope = (model.predict(x + step) - model.predict(x - step)) / (2 * step[j])
        np.testing.assert_allclose(model.predict_jacobian(x)[:, j], slope, rtol=1e-4)
    with sklearn.config_context(enable_metadata_routing=True):
        routed: Any = clone(found.estimator)
        routed["model"].set_fit_request(dydx=True).set_params(derivative_weight=model.derivative_weight)
        np.testing.assert_allclose(routed.fit(x, y, dydx=dydx).predict(x), model.predict(x), rtol=1e-12)
