"""The MLP regressor behind the calls of SMT, the Surrogate Modeling Toolbox."""

from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from gradwise_torch._mlp_regressor import GradientEnhancedMLPRegressor

__all__ = ["SMTSurrogate"]

Floats = NDArray[np.float64]


class SMTSurrogate:
    """GradientEnhancedMLPRegressor with the method names of SMT's surrogate models: a drop-in for `GENN` or `GEKPLS`.

    Any partial derivative may be missing, and derivatives may be known at other points than values, which are the same
    for all inputs. Not a subclass of SMT's `SurrogateModel`: it does not need `smt`, and prints nothing.

    Parameters
    ----------
    model : GradientEnhancedMLPRegressor, optional
        Parameters of the network, in layout "sklearn"; it is cloned, never fitted. By default one with 5
        members, so that there are variances, and `random_state` 0.

    Attributes
    ----------
    model_ : GradientEnhancedMLPRegressor
        The fitted network, after `train`.

    Examples
    --------
    >>> import numpy as np
    >>> from gradwise.torch import GradientEnhancedMLPRegressor, SMTSurrogate
    >>> xt = np.linspace(-3, 3, 7)[:, None]
    >>> network = GradientEnhancedMLPRegressor((32,), tol=0.01, n_estimators=2, random_state=0)
    >>> surrogate = SMTSurrogate(network)
    >>> surrogate.set_training_values(xt, np.sin(xt))
    >>> surrogate.set_training_derivatives(xt, np.cos(xt), 0)
    >>> surrogate.train()
    >>> surrogate.predict_values(xt).shape, surrogate.predict_derivatives(xt, 0).shape
    ((7, 1), (7, 1))
    >>> bool(surrogate.predict_variances(xt).max() < 0.01)
    True
    """

    def __init__(self, model: GradientEnhancedMLPRegressor | None = None) -> None:
        self.model = GradientEnhancedMLPRegressor(n_estimators=5, random_state=0) if model is None else model
        if self.model.dydx_layout != "sklearn":
            msg = f'`model` must have dydx_layout "sklearn"; got {self.model.dydx_layout!r}'
            raise ValueError(msg)
        self._values: tuple[Floats, Floats] | None = None
        self._derivatives: dict[int, tuple[Floats, Floats]] = {}

    def set_training_values(self, xt: Any, yt: Any) -> None:
        """Give values `yt` of shape (n,) or (n, ny) at `xt` of shape (n, nx)."""
        x, y = _matrix("xt", xt), _matrix("yt", yt)
        if len(x) != len(y):
            msg = f"`yt` must have one row for each of the {len(x)} rows of `xt`; got {len(y)}"
            raise ValueError(msg)
        self._values = x, y

    def set_training_derivatives(self, xt: Any, dyt_dxt: Any, kx: int) -> None:
        """Give derivatives with respect to input `kx` (from 0) at `xt`, of shape (n,) or (n, ny); NaN means unknown."""
        x, slopes = _matrix("xt", xt), _matrix("dyt_dxt", dyt_dxt)
        if len(x) != len(slopes):
            msg = f"`dyt_dxt` must have one row for each of the {len(x)} rows of `xt`; got {len(slopes)}"
            raise ValueError(msg)
        self._derivatives[_input("kx", kx, x.shape[1])] = x, slopes

    def train(self) -> None:
        """Fit a clone of `model`.

        Raises
        ------
        ValueError
            If there are no values, shapes contradict each other, or inputs have derivatives at different points.
        """
        from sklearn.base import clone

        if self._values is None:
            msg = "`set_training_values` must be called before `train`"
            raise ValueError(msg)
        x, y = self._values
        model = cast("GradientEnhancedMLPRegressor", clone(self.model))
        if not self._derivatives:
            self.model_ = model.fit(x, y)
            return
        where = next(iter(self._derivatives.values()))[0]
        dydx = np.full((len(where), y.shape[1], x.shape[1]), np.nan)
        for kx, (points, slopes) in self._derivatives.items():
            if not np.array_equal(points, where):
                msg = f"derivatives must be at the same points for all inputs; those for input {kx} are at others"
                raise ValueError(msg)
            if slopes.shape[1] != y.shape[1] or points.shape[1] != x.shape[1]:
                msg = f"derivatives for input {kx} must be of {y.shape[1]} outputs at points of {x.shape[1]} inputs"
                raise ValueError(msg)
            dydx[:, :, kx] = slopes
        same = np.array_equal(where, x)
        self.model_ = model.fit(x, y, dydx, X_dydx=None if same else where)

    def predict_values(self, x: Any) -> Floats:
        """Values at `x`, (n, ny)."""
        return self._fitted().predict(_matrix("x", x))

    def predict_derivatives(self, x: Any, kx: int) -> Floats:
        """Derivatives of the values with respect to input `kx`, (n, ny), in units of y per unit of x."""
        model = self._fitted()
        return model.predict_jacobian(_matrix("x", x))[:, :, _input("kx", kx, model.n_features_in_)]

    def predict_variances(self, x: Any) -> Floats:
        """Variances between the members of the ensemble, (n, ny); see `return_std` of the regressor."""
        return self._fitted().predict(_matrix("x", x), return_std=True)[1] ** 2

    def _fitted(self) -> GradientEnhancedMLPRegressor:
        if not hasattr(self, "model_"):
            msg = "`train` must be called before predictions"
            raise ValueError(msg)
        return self.model_


def _matrix(name: str, values: Any) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim not in {1, 2}:
        msg = f"`{name}` must have shape (n,) or (n, columns); got {array.shape}"
        raise ValueError(msg)
    return array.reshape(len(array), -1)


def _input(name: str, kx: int, n_inputs: int) -> int:
    if not 0 <= kx < n_inputs:
        msg = f"`{name}` must be from 0 to {n_inputs - 1}; got {kx}"
        raise ValueError(msg)
    return int(kx)
