"""A pre-flight report on derivatives, from the data alone."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gradwise._check_derivatives_findings import suggested_weight
from gradwise._check_derivatives_pairs import (
    PairStatistics,
    leave_one_out,
    near_pairs,
    pair_statistics,
    typical_noise,
)
from gradwise._check_derivatives_rules import judge
from gradwise._check_derivatives_rules import transposed as transposed_finding
from gradwise._derivative_report import CANNOT_TELL, DO_NOT_USE, SMALLER, USE, DerivativeReport, Finding, OutputCheck
from gradwise._targets import training_data

Floats = NDArray[np.float64]

_SEVERITY = (DO_NOT_USE, SMALLER, CANNOT_TELL, USE)
# An input with less than this share of the derivatives' mean square (one percent of their size) hardly matters.
_UNIMPORTANT = 1e-4


def check_derivatives(X: ArrayLike, y: ArrayLike, dydx: ArrayLike) -> DerivativeReport:
    """Report, before any training, on whether derivatives belong to the data and can be trusted.

    For pairs of near samples the difference of values is compared with its prediction by the derivatives at both
    ends, ``y_j - y_i ~ (dydx_i + dydx_j) / 2 . (x_j - x_i)``, which is exact for quadratic functions. The slope of one
    against the other tells signs and units, for all inputs together and for each; its part that depends on the row
    tells whether rows are lined up, and by how much noise lowers it. Standard errors come from a jackknife over
    samples. Nothing is accused without evidence: a wrong sign is found where *reversed* derivatives explain the values,
    not where the given ones fail, which they do as well if samples are farther apart than the function bends. Then the
    verdict is "cannot tell". It is also "cannot tell" for fewer than ``n_inputs + 4`` samples.

    Not a proof: errors that cancel in differences, in a few rows only, or in inputs of little influence pass; noise
    below some 10 to 50 % is seen only where values are well predictable; and exact derivatives of ripples that are
    finer than the distances between samples look, and act, like noise. See `docs/check_derivatives.md` for measured
    rates. Costs a few seconds at most: large data are judged on 1,000 samples and their nearest neighbours.

    Parameters
    ----------
    X : array of shape (n, n_inputs)
        Inputs, in any units.
    y : array of shape (n,) or (n, n_outputs)
        Values.
    dydx : array of shape (n, n_outputs, n_inputs), or (n, n_inputs) for one output
        Derivatives, in units of y per unit of x; NaN means unknown (samples with some NaN are left out for the output,
        inputs that are NaN everywhere are taken as having no influence). The layouts (n, n_inputs, n_outputs) and
        (n_outputs, n_inputs, n) are recognised, and reported.

    Returns
    -------
    DerivativeReport
        With `verdict`, suggested `derivative_weight`, `findings` that each name a remedy, `plot()`; as text by `str`.

    Raises
    ------
    ValueError
        If shapes do not belong together, or a value is not finite (NaN in `dydx` excepted).

    Examples
    --------
    >>> import numpy as np
    >>> from gradwise import check_derivatives
    >>> X = np.random.default_rng(0).uniform(-2, 2, (40, 2))
    >>> y = np.sin(X[:, 0]) * X[:, 1]
    >>> dydx = np.column_stack([np.cos(X[:, 0]) * X[:, 1], np.sin(X[:, 0])])
    >>> check_derivatives(X, y, dydx).verdict
    'use'
    >>> report = check_derivatives(X, y, -dydx)
    >>> report.verdict, report.findings[0].kind
    ('do not use', 'wrong sign')
    >>> print(report.findings[0])
    wrong sign: values fall where dydx says that they rise. To do: change the sign: dydx *= -1.
    """
    inputs, outputs = training_data(X, y)
    values = outputs.reshape(len(outputs), -1)
    jacobian, findings = _jacobian(dydx, inputs, outputs)
    scale_x, scale_y = _positive(inputs.std(axis=0)), _positive(values.std(axis=0))
    standard = (inputs - inputs.mean(axis=0)) / scale_x
    centred = (values - values.mean(axis=0)) / scale_y
    n, n_outputs, n_inputs = jacobian.shape
    swapped = jacobian.swapaxes(1, 2) * scale_x / scale_y[:, None] if n_outputs == n_inputs > 1 else None
    jacobian = jacobian * scale_x / scale_y[:, None]

    measured: list[_Measured] = []
    for index in range(n_outputs):
        label = None if n_outputs == 1 else index
        known = ~np.isnan(jacobian[:, index])
        missing = ~known.any(axis=0)
        findings += [
            Finding("unknown", f"no derivative with respect to input {column} is known", "nothing", label, int(column))
            for column in np.flatnonzero(missing)
        ]
        rows = (known | missing).all(axis=1)
        part = np.where(missing, 0.0, jacobian[rows, index])
        other = None if swapped is None or missing.any() else swapped[rows, index]
        measured.append(_measure(standard[rows], centred[rows, index], part, other))
    transposed = transposed_finding([m.statistics for m in measured if m.statistics is not None], n)
    # What the outputs would say for themselves follows from the transposition.
    judged = [m.judge(None if n_outputs == 1 else index) for index, m in enumerate(measured)]
    checks = [check for check, _ in judged]
    for _, found in judged:
        findings += [] if transposed else found
    accused = {finding.input for finding in findings}  # an input with wrong units may seem to have no influence
    findings = transposed + findings + [finding for finding in _unimportant(checks) if finding.input not in accused]
    verdict = DO_NOT_USE if transposed else min((check.verdict for check in checks), key=_SEVERITY.index)
    if any(finding.kind == "transposed" for finding in findings):
        verdict = DO_NOT_USE
    noises = [check.noise for check in checks]
    differences = [(m.predicted, m.actual) for m in measured]
    weight = {DO_NOT_USE: 0.0, SMALLER: suggested_weight(max(noises))}.get(verdict, 1.0)
    longest = max(len(actual) for _, actual in differences)
    predicted, actual = (
        np.column_stack([np.pad(pair[k], (0, longest - len(pair[k])), constant_values=np.nan) for pair in differences])
        * scale_y
        for k in (0, 1)
    )
    return DerivativeReport(verdict, weight, tuple(findings), tuple(checks), longest, predicted, actual)


class _Measured(NamedTuple):
    """What is known of one output before it is judged."""

    n: int
    importance: Floats
    statistics: PairStatistics | None = None
    predictable: float = np.nan
    derivative_noise: float = np.inf
    predicted: Floats = np.empty(0)
    actual: Floats = np.empty(0)

    def judge(self, label: int | None) -> tuple[OutputCheck, list[Finding]]:
        """Verdict with its numbers, and findings."""
        numbers = self.statistics
        if numbers is None:
            return OutputCheck(CANNOT_TELL, importance=self.importance), []
        judgement = judge(numbers, self.n, self.predictable, self.derivative_noise, label)
        check = OutputCheck(
            judgement.verdict,
            explained=1 - numbers.unexplained.value,
            slope=numbers.slope.value,
            slope_error=numbers.slope.error,
            alignment=numbers.alignment.value,
            alignment_error=numbers.alignment.error,
            predictable=self.predictable,
            noise=judgement.noise,
            most_noise=judgement.most_noise,
            importance=self.importance,
        )
        return check, judgement.findings


def _measure(X: Floats, y: Floats, J: Floats, swapped: Floats | None) -> _Measured:
    """Compare one output, of shape (n,), with derivatives of shape (n, n_inputs), all without units."""
    power = np.square(J).mean(axis=0) if len(J) else np.zeros(J.shape[1])
    importance = power / (power.sum() or 1.0)
    pairs = near_pairs(X) if len(X) >= X.shape[1] + 4 else None
    if pairs is None:
        return _Measured(len(X), importance)
    others = {"later": np.roll(J, 1, axis=0), "earlier": np.roll(J, -1, axis=0), "reversed": J[::-1]}
    if swapped is not None and not np.isnan(swapped).any():
        others["transposed"] = swapped
    statistics = pair_statistics(X, y, J, others, pairs)
    if statistics is None:
        return _Measured(len(X), importance)
    prediction = leave_one_out(X, np.column_stack([y, J]))
    step = X[pairs.second] - X[pairs.first]
    return _Measured(
        len(X),
        importance,
        statistics,
        float(prediction.predictable[0]),
        typical_noise(prediction.residuals[:, 1:], float(power.sum())),
        0.5 * ((J[pairs.first] + J[pairs.second]) * step).sum(axis=1),
        y[pairs.second] - y[pairs.first],
    )


def _jacobian(dydx: ArrayLike, inputs: Floats, outputs: Floats) -> tuple[Floats, list[Finding]]:
    """Derivatives of shape (n, n_outputs, n_inputs), and a finding if they came in another layout."""
    jacobian = np.asarray(dydx, dtype=np.float64)
    n, n_inputs = inputs.shape
    n_outputs = 1 if outputs.ndim == 1 else outputs.shape[1]
    if np.isinf(jacobian).any():
        msg = "`dydx` must be finite or NaN, which means unknown; got a value that is not"
        raise ValueError(msg)
    if jacobian.shape == (n, n_outputs, n_inputs) or (n_outputs == 1 and jacobian.shape == (n, n_inputs)):
        return jacobian.reshape(n, n_outputs, n_inputs), []
    for shape, axes, remedy in (
        ((n, n_inputs, n_outputs), (0, 2, 1), "dydx.swapaxes(1, 2)"),
        ((n_outputs, n_inputs, n), (2, 0, 1), "np.moveaxis(dydx, 2, 0)"),
    ):
        if jacobian.shape == shape:
            message = f"`dydx` has shape {shape} instead of {(n, n_outputs, n_inputs)}; the rest was checked after that"
            return jacobian.transpose(axes), [Finding("transposed", message, f"dydx = {remedy}")]
    single = f" or ({n}, {n_inputs})" if n_outputs == 1 else ""
    msg = f"`dydx` must have shape {(n, n_outputs, n_inputs)}{single} to go with X and y; got {jacobian.shape}"
    raise ValueError(msg)


def _unimportant(checks: list[OutputCheck]) -> list[Finding]:
    """Inputs that hardly matter to any output."""
    share = np.max([check.importance for check in checks], axis=0)
    if not np.any(share > 0):
        return []
    return [
        Finding(
            "input hardly matters",
            f"input {column} has {100 * np.sqrt(share[column]):.2g} % of the derivatives' size",
            'nothing with scale="block"; avoid weights that divide by each input\'s own size, or drop the input',
            input=int(column),
        )
        for column in np.flatnonzero(share < _UNIMPORTANT)
    ]


def _positive(values: Floats) -> Floats:
    return np.where(values > 0, values, 1.0)
