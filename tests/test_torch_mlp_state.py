"""The MLP regressor as an object: saving, copying, continuing, random streams, and what it must not touch."""

import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV

from gradwise.torch import GradientEnhancedMLPRegressor

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


def sample(n: int = 12) -> tuple[Any, Any, Any]:
    x = np.random.default_rng(0).uniform(-1, 1, (n, 2))
    y = np.sin(3 * x[:, 0]) * x[:, 1]
    return x, y, np.stack([3 * np.cos(3 * x[:, 0]) * x[:, 1], np.sin(3 * x[:, 0])], axis=1)


def network(**parameters: Any) -> GradientEnhancedMLPRegressor:
    return GradientEnhancedMLPRegressor(**{"hidden_layer_sizes": (8,), "max_iter": 15, "random_state": 0} | parameters)


@pytest.mark.parametrize(
    "parameters",
    [{}, {"n_estimators": 3, "dtype": "float32"}, {"dydx_layout": "jenn"}, {"hidden_layer_sizes": [4, np.int64(3)]}],
)
def test_save_and_load_are_exact(parameters: dict[str, Any], tmp_path: Path) -> None:
    x, y, dydx = sample()
    data = (x.T, y[None], dydx.T[None]) if "dydx_layout" in parameters else (x, y, dydx)
    model = network(**parameters).fit(*data)
    model.save(tmp_path / "model.pt")
    loaded = GradientEnhancedMLPRegressor.load(tmp_path / "model.pt")
    np.testing.assert_array_equal(loaded.predict(data[0]), model.predict(data[0]))
    np.testing.assert_array_equal(loaded.predict_jacobian(data[0]), model.predict_jacobian(data[0]))
    assert loaded.get_params() == model.get_params()
    for name in ("n_iter_", "loss_", "loss_curve_", "converged_", "n_features_in_", "n_outputs_"):
        assert getattr(loaded, name) == getattr(model, name)


def test_names_of_features_survive(tmp_path: Path) -> None:
    import pandas as pd

    x, y, _ = sample()
    frame = pd.DataFrame(x, columns=["speed", "height"])
    model = network().fit(frame, y)
    model.save(tmp_path / "model.pt")
    loaded: Any = GradientEnhancedMLPRegressor.load(tmp_path / "model.pt")
    np.testing.assert_array_equal(loaded.predict(frame), model.predict(frame))
    assert loaded.feature_names_in_.tolist() == ["speed", "height"]


class Trap:
    def __reduce__(self) -> Any:
        return sys.exit, ("executed",)


def test_loading_executes_nothing(tmp_path: Path) -> None:
    torch.save({"format": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(pickle.UnpicklingError):
        GradientEnhancedMLPRegressor.load(tmp_path / "trap.pt")
    torch.save({"format": "other"}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="must be a file that"):
        GradientEnhancedMLPRegressor.load(tmp_path / "other.pt")


def test_what_cannot_be_saved_says_so(tmp_path: Path) -> None:
    x, y, _ = sample()
    model = network(random_state=np.random.RandomState(0)).fit(x, y)
    with pytest.raises(TypeError, match=r"`random_state` must be .* Use `set_params"):
        model.save(tmp_path / "model.pt")


def test_pickle_joblib_and_clone() -> None:
    x, y, dydx = sample()
    model = network(n_estimators=2).fit(x, y, dydx)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model)).predict(x), model.predict(x))
    file = io.BytesIO()
    joblib.dump(model, file)
    file.seek(0)
    np.testing.assert_array_equal(joblib.load(file).predict(x), model.predict(x))
    copy: Any = clone(model)
    assert not hasattr(copy, "weights_")
    np.testing.assert_array_equal(copy.fit(x, y, dydx).predict(x), model.predict(x))


def test_grid_search_passes_derivatives_by_fold() -> None:
    x, y, dydx = sample(16)
    search = GridSearchCV(network(), {"alpha": [1e-4, 1e-2]}, cv=2).fit(x, y, dydx=dydx)
    assert search.best_params_["alpha"] in {1e-4, 1e-2}


@pytest.mark.parametrize("solver", ["lbfgs", "adam"])
def test_global_state_is_untouched(solver: str) -> None:
    x, y, dydx = sample()
    settings: dict[str, Any] = {"solver": solver, "max_iter": 3}
    if solver == "lbfgs":
        settings["derivative_weight"] = "auto"
    reference = network(**settings).fit(x, y, dydx)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    numpy_before: Any = np.random.get_state()  # noqa: NPY002 - the global stream is what is looked at
    try:
        torch.set_default_dtype(torch.float16)
        model = network(**settings).fit(x, y, dydx)
        assert model.predict(x).dtype == np.float64
        np.testing.assert_array_equal(model.predict(x), reference.predict(x))
        with torch.no_grad():
            inside = network(**settings).fit(x, y, dydx)
        np.testing.assert_array_equal(inside.predict(x), reference.predict(x))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    numpy_after: Any = np.random.get_state()  # noqa: NPY002 - the global stream is what is looked at
    np.testing.assert_array_equal(numpy_after[1], numpy_before[1])
    assert torch.get_num_threads() == threads


def test_seeds_decide_everything() -> None:
    x, y, dydx = sample()
    for solver in ("lbfgs", "adam"):
        first, again, other = (
            network(solver=solver, random_state=seed).fit(x, y, dydx).predict(x) for seed in (0, 0, 1)
        )
        np.testing.assert_array_equal(first, again)
        assert not np.allclose(first, other)


def test_warm_start_continues_where_the_last_fit_ended() -> None:
    x, y, dydx = sample()
    model = network(warm_start=True, max_iter=40).fit(x, y, dydx)
    before = model.predict(x)
    losses = model.loss_curve_
    model.set_params(max_iter=1).fit(x, y, dydx)
    assert model.loss_ <= losses[-1]
    # The loss hardly changes in one iteration, though the data are in other units: units of the first fit are kept.
    shifted = network(warm_start=True, max_iter=40).fit(x, y, dydx)
    shifted.set_params(max_iter=1).fit(x[:9], y[:9], dydx[:9])
    assert np.abs(shifted.predict(x) - before).max() < 0.2 * y.std()
    with pytest.raises(ValueError, match="`warm_start` must keep"):
        model.set_params(hidden_layer_sizes=(9,)).fit(x, y, dydx)
    with pytest.raises(ValueError, match="`warm_start` must keep"):
        model.set_params(hidden_layer_sizes=(8,), n_estimators=2).fit(x, y, dydx)


@pytest.mark.parametrize("solver", ["lbfgs", "adam"])
def test_progress_bar_on_request(
    solver: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y, dydx = sample()
    quiet = network(solver=solver).fit(x, y, dydx)
    assert capsys.readouterr().out == ""
    shown = network(solver=solver, verbose=True).fit(x, y, dydx)
    assert "loss" in capsys.readouterr().out
    np.testing.assert_array_equal(shown.predict(x), quiet.predict(x))
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "gradwise\[plot\]"'):
        network(solver=solver, verbose=True).fit(x, y, dydx)


def test_importing_gradwise_torch_loads_no_estimator() -> None:
    code = (
        "import sys, gradwise.torch; late = {'sklearn', 'scipy', 'rich', 'joblib'} & set(sys.modules); "
        "assert not late, late; from gradwise.torch import SMTSurrogate; assert 'sklearn' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_predictions_in_blocks_are_predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, dydx = sample()
    model = network(n_estimators=2).fit(x, y, dydx)
    values, jacobian = model.predict(x), model.predict_jacobian(x)
    monkeypatch.setattr("gradwise_torch._mlp_fitted._BLOCK", 5 * 16)
    np.testing.assert_allclose(model.predict(x), values, rtol=1e-12)
    np.testing.assert_allclose(model.predict_jacobian(x), jacobian, rtol=1e-12)
