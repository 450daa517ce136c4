"""GradientEnhancedMLPRegressor: a feed-forward network for scikit-learn that learns from derivatives as well."""

import warnings
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import _check_sample_weight, validate_data

from gradwise_torch._mlp_activations import PIECEWISE_LINEAR
from gradwise_torch._mlp_data import Derivatives, as_targets, prepare, rows_first
from gradwise_torch._mlp_fitted import FittedNetwork
from gradwise_torch._mlp_network import Architecture
from gradwise_torch._mlp_noise import choose_weight
from gradwise_torch._mlp_objective import Objective
from gradwise_torch._mlp_parameters import check_parameters
from gradwise_torch._mlp_training import Settings, best_of, train
from gradwise_torch._mlp_validation import hold_out

__all__ = ["GradientEnhancedMLPRegressor"]

Floats = NDArray[np.float64]


class GradientEnhancedMLPRegressor(FittedNetwork):
    """Feed-forward network that learns from values and, where they are known, from their derivatives.

    Minimises ``mean (f - y)**2 + derivative_weight * L + alpha / n * sum W**2`` in standardised units: inputs and
    outputs are divided by their standard deviations, derivatives are transformed by the chain rule. L is the loss of
    `GradientMatching`, so at weight 1 a relative error of the derivatives counts like one of the values; W are the
    weights without biases, and `alpha` means what it means in scikit-learn's `MLPRegressor` (both terms of its
    objective are half of these). Predictions do not depend on the units of X and y. With ``dydx=None`` it is an
    ordinary regularised network. The same `random_state` and sizes give the same initial weights with and without
    derivatives.

    Not for targets with kinks or jumps, which a smooth network rounds, nor for derivatives with errors of about half
    their size: use a small weight, "auto", or none. Tens to thousands of rows suit "lbfgs", more suit "adam".

    Parameters
    ----------
    hidden_layer_sizes : int or tuple of int, default (64, 64)
        Units of each hidden layer.
    activation : {"silu", "tanh", "softplus", "gelu", "sin", "logistic", "relu", "identity"}, default "silu"
        Derivatives of a network of "relu" are constant between kinks, which matching cannot move: a warning says so.
    solver : {"lbfgs", "adam"}, default "lbfgs"
        L-BFGS with a strong Wolfe line search on all rows; or Adam on mini-batches, with a learning rate that rises to
        `learning_rate_init` in the first tenth of the steps and falls to 0 along half a cosine.
    derivative_weight : float or "auto", default 1.0
        Weight of the derivative loss. 0 skips the derivatives, which are then not even looked at. "auto" estimates how
        noisy they are and weighs them accordingly, see Notes; a dozen rows is the least that it can judge by.
    alpha : float, default 1e-4
        L2 penalty, in standardised units.
    scale : {"block", "per_input", "none"}, default "block"
        Of the derivative loss, see `GradientMatching`. "none" matches raw derivatives, relative to the variance of y.
    derivative_loss : {"mse", "huber"}, default "mse"
        "huber" grows linearly beyond the size of a typical derivative.
    max_iter : int, default 500
        Iterations of L-BFGS, or epochs of Adam.
    tol : float, default 1e-3
        L-BFGS stops when ten iterations gain less than this fraction of the loss; early stopping counts an epoch as a
        gain if the validation loss falls by this fraction.
    batch_size : int or "auto", default "auto"
        Rows of a mini-batch of Adam; "auto" is ``min(256, n)``.
    learning_rate_init : float, default 0.01
        Peak of Adam's learning rate.
    early_stopping : bool, default False
        Adam only: hold out rows, stop when the loss of their values stays, and keep the best epoch's weights.
    validation_fraction : float, default 0.1
        Fraction of rows held out by `early_stopping`.
    n_iter_no_change : int, default 10
        Epochs without gain before `early_stopping` stops.
    n_restarts : int, default 1
        Initial weights tried for each member; the one with the least training loss stays.
    n_estimators : int, default 1
        Members of an ensemble that differ in their initial weights, trained in one vectorised program. Predictions are
        their means, `return_std` their standard deviations.
    dydx_layout : {"sklearn", "jenn"}, default "sklearn"
        "jenn" takes and returns arrays with samples last, as the `jenn` package does: X (n_inputs, n),
        y (n_outputs, n), dydx (n_outputs, n_inputs, n).
    dtype : {"float64", "float32"}, default "float64"
        Of the network; L-BFGS keeps its vectors in float64.
    warm_start : bool, default False
        Continue with the weights, and in the units, of the last fit.
    random_state : int, RandomState instance or None, default None
        Of initial weights, batches and held-out rows. None draws from numpy's global stream, as in scikit-learn;
        torch's is never touched.
    verbose : bool, default False
        Show a progress bar (needs rich).

    Attributes
    ----------
    n_iter_ : int
        Iterations or epochs of the longest member.
    loss_ : float
        Final training loss, with the penalty, without unit; the mean over members.
    loss_curve_ : list of float
        Training loss after each iteration or epoch (Adam: of the batches, without the penalty); the mean over members.
    converged_ : bool
        Whether all members' losses had settled within `max_iter`: by `tol`, or because the last ten iterations gained
        less than 1e-5 (of the variance of y). Adam has no such test: True if its cycle ended, or early stopping stopped
        it, at a finite loss.
    derivative_weight_ : float
        The weight used; 0 without derivatives.
    derivative_noise_ : float
        Noise of the derivatives relative to their size, as "auto" estimated it; NaN otherwise.
    weights_ : array of shape (n_estimators, n_parameters)
        Weights of the members, in standardised units.
    n_features_in_, n_outputs_ : int
        Numbers of inputs and outputs.

    Notes
    -----
    ``derivative_weight="auto"`` takes the largest of 1, 0.1, 0.01, 0.001 and 0 whose error of held-out values (mean
    squared, 4 folds of rows, fits of up to 150 iterations) is within one standard error of the least; the standard
    error is that of the paired differences over rows. The 20 fits are one vectorised program, about two seconds for 50
    rows and two layers of 32. `derivative_noise_` is the root mean square of the held-out residuals of the derivatives
    at that weight, relative to that of the derivatives: their noise and the error of the fit together. Not a weight by
    maximum likelihood: a network that interpolates leaves no residuals that tell noise from signal.

    A row, with its values and derivatives, is what a fold or a validation split holds out. The statistics of X are
    those of all rows used, with `X_dydx`. The gradient is the chain rule written out, in about half of the time that
    autograd's double backward takes for small networks.

    torch's number of threads is left alone. Small fits have nothing to share out: on a busy machine
    ``torch.set_num_threads(1)`` can make an ensemble many times as fast.

    Examples
    --------
    >>> import numpy as np
    >>> from gradwise.torch import GradientEnhancedMLPRegressor
    >>> X = np.linspace(-3, 3, 7)[:, None]
    >>> model = GradientEnhancedMLPRegressor((32,), tol=0.01, random_state=0)
    >>> _ = model.fit(X, np.sin(X[:, 0]), dydx=np.cos(X))
    >>> bool(np.abs(model.predict([[0.5]]) - np.sin(0.5)) < 0.01)
    True
    >>> bool(np.abs(model.predict_jacobian([[0.5]]) - np.cos(0.5)) < 0.02)
    True
    """

    n_iter_: int
    loss_: float
    loss_curve_: list[float]
    converged_: bool
    derivative_weight_: float
    derivative_noise_: float

    def __init__(
        self,
        hidden_layer_sizes: Any = (64, 64),
        activation: str = "silu",
        solver: str = "lbfgs",
        derivative_weight: float | str = 1.0,
        *,
        alpha: float = 1e-4,
        scale: str = "block",
        derivative_loss: str = "mse",
        max_iter: int = 500,
        tol: float = 1e-3,
        batch_size: int | str = "auto",
        learning_rate_init: float = 0.01,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 10,
        n_restarts: int = 1,
        n_estimators: int = 1,
        dydx_layout: str = "sklearn",
        dtype: str = "float64",
        warm_start: bool = False,
        random_state: Any = None,
        verbose: bool = False,
    ) -> None:
        self.hidden_layer_sizes = hidden_layer_sizes
        self.activation = activation
        self.solver = solver
        self.derivative_weight = derivative_weight
        self.alpha = alpha
        self.scale = scale
        self.derivative_loss = derivative_loss
        self.max_iter = max_iter
        self.tol = tol
        self.batch_size = batch_size
        self.learning_rate_init = learning_rate_init
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.n_restarts = n_restarts
        self.n_estimators = n_estimators
        self.dydx_layout = dydx_layout
        self.dtype = dtype
        self.warm_start = warm_start
        self.random_state = random_state
        self.verbose = verbose

    def fit(
        self,
        X: Any,
        y: Any,
        dydx: Any = None,
        sample_weight: Any = None,
        *,
        mask: Any = None,
        X_dydx: Any = None,
    ) -> Self:
        """Train on values `y` and, where known, derivatives `dydx`.

        Parameters
        ----------
        X : array-like of shape (n, n_inputs)
        y : array-like of shape (n,) or (n, n_outputs)
        dydx : array-like of shape (n, n_inputs) for one output, or (n, n_outputs, n_inputs), optional
            Derivatives, in units of y per unit of X. NaN means unknown.
        sample_weight : array-like of shape (n,), optional
            Non-negative weights of the rows, of values and derivatives alike. A weight of 2 is a row given twice.
        mask : boolean array-like of the shape of `dydx`, optional
            False means unknown.
        X_dydx : array-like of shape (rows, n_inputs), optional
            Other points, at which only derivatives are known; `dydx` then has their rows.

        Returns
        -------
        GradientEnhancedMLPRegressor
            The fitted estimator itself.

        Raises
        ------
        ValueError
            If a parameter or a shape is wrong (one that merely broadcasts is), or a value is not finite.
        TypeError
            If `mask` is not boolean.
        """
        hidden = check_parameters(self)
        X, y, dydx, mask, X_dydx = rows_first(self.dydx_layout, X, y, dydx, mask, X_dydx)
        checked: Any = validate_data(self, X, y, dtype=np.float64, multi_output=True, y_numeric=True)
        X, y = checked[0], np.asarray(checked[1], dtype=np.float64)
        outputs = y.reshape(len(y), -1)
        weight = None
        if sample_weight is not None:
            weight = _check_sample_weight(sample_weight, X, dtype=np.float64)
            if np.any(weight < 0) or not weight.sum() > 0:
                msg = "`sample_weight` must have no negative entries and a positive sum"
                raise ValueError(msg)
        derivatives = self._derivatives(X, outputs.shape[1], dydx, weight, mask, X_dydx)
        random = check_random_state(self.random_state)
        architecture = Architecture((X.shape[1], *hidden, outputs.shape[1]), self.activation)
        starts, scaler, n_restarts = self._starts(architecture, random)
        shuffle = int(random.randint(2**31))
        held_out = None
        shared = X_dydx is None
        if self.solver == "adam" and self.early_stopping:
            split = hold_out(len(X), self.validation_fraction, shuffle)
            X, outputs, weight, derivatives, held_out = split.apply(X, outputs, weight, derivatives, shared=shared)
        data, scaler = prepare(X, outputs, weight, derivatives, scale=self.scale, shared=shared, scaler=scaler)
        dtype = torch.float64 if self.dtype == "float64" else torch.float32
        used, noise = 0.0 if derivatives is None else self.derivative_weight, float("nan")
        if used == "auto":
            choice = choose_weight(architecture, data, alpha=self.alpha, loss=self.derivative_loss, seed=shuffle)
            used, noise = choice.weight, choice.noise
        objective = Objective(
            architecture,
            data,
            derivative_weight=float(used),
            alpha=self.alpha,
            loss=self.derivative_loss,
            dtype=dtype,
        )
        settings = Settings(
            solver=self.solver,
            max_iter=int(self.max_iter),
            tol=float(self.tol),
            batch_size=min(256, len(X)) if self.batch_size == "auto" else int(self.batch_size),
            learning_rate=float(self.learning_rate_init),
            patience=int(self.n_iter_no_change),
            verbose=bool(self.verbose),
            seed=shuffle,
        )
        validation = None if held_out is None else held_out.loss(architecture, scaler, dtype)
        members = best_of(train(objective, starts, settings, validation), n_restarts)
        self.architecture_, self.scaler_ = architecture, scaler
        self.weights_ = np.stack([member.theta for member in members])
        self.loss_ = float(np.mean([member.loss for member in members]))
        self.n_iter_ = max(len(member.loss_curve) for member in members)
        # Members that stopped earlier keep their last loss.
        curves = [
            member.loss_curve + member.loss_curve[-1:] * (self.n_iter_ - len(member.loss_curve)) for member in members
        ]
        self.loss_curve_ = [float(np.mean(losses)) for losses in zip(*curves, strict=False)]
        self.converged_ = all(member.converged for member in members)
        self.derivative_weight_, self.derivative_noise_ = float(used), float(noise)
        self.n_outputs_, self.flat_ = outputs.shape[1], y.ndim == 1
        if not self.converged_:
            msg = f"training had not converged after {self.n_iter_} iterations; raise `max_iter` (or `tol`)"
            warnings.warn(msg, ConvergenceWarning, stacklevel=2)
        return self

    def _derivatives(
        self, X: Floats, n_outputs: int, dydx: Any, weight: Floats | None, mask: Any, X_dydx: Any
    ) -> Derivatives | None:
        if dydx is None:
            for name, value in (("mask", mask), ("X_dydx", X_dydx)):
                if value is not None:
                    msg = f"`{name}` must come with `dydx`; got no derivatives"
                    raise ValueError(msg)
            return None
        if self.derivative_weight == 0:
            return None
        where: Any = X
        if X_dydx is not None:
            where, weight = validate_data(self, X_dydx, dtype=np.float64, reset=False), None
        name = "X" if X_dydx is None else "X_dydx"
        derivatives = as_targets(dydx, mask, where, weight, n_outputs, name=name)
        if derivatives is not None and self.activation in PIECEWISE_LINEAR:
            msg = (
                f"a network of {self.activation!r} is piecewise linear: matching derivatives cannot move its kinks. "
                'Use a smooth activation, for example "silu"'
            )
            warnings.warn(msg, UserWarning, stacklevel=3)
        return derivatives

    def _starts(self, architecture: Architecture, random: np.random.RandomState) -> tuple[Floats, Any, int]:
        """Initial weights of all restarts of all members, whose units to keep, and how many restarts a member has."""
        seeds = random.randint(2**31, size=self.n_estimators * self.n_restarts)
        if not (self.warm_start and hasattr(self, "weights_")):
            return np.stack([architecture.initial(int(seed)) for seed in seeds]), None, self.n_restarts
        if architecture != self.architecture_ or len(self.weights_) != self.n_estimators:
            msg = "`warm_start` must keep inputs, outputs, layers, activation and `n_estimators`; set it to False"
            raise ValueError(msg)
        return self.weights_, self.scaler_, 1
