"""Rules of `check_derivatives`: what the statistics of one output allow to say, and what they do not."""

from typing import NamedTuple

import numpy as np
from scipy import stats  # pyright: ignore[reportMissingTypeStubs] - ships no types

from gradwise._check_derivatives_findings import factor_finding, noise_finding
from gradwise._check_derivatives_pairs import Estimate, PairStatistics, jackknife_error
from gradwise._derivative_report import CANNOT_TELL, DO_NOT_USE, SMALLER, USE, Finding

# A finding needs an error of such a probability or less, by the t distribution of the jackknife.
_SIGNIFICANCE = 1e-4
# Corrected derivatives must explain this much of the differences: without positive evidence nothing is accused.
_MOST_UNEXPLAINED = 0.3
# Noise can be told from unresolved variation only where the values themselves are this predictable.
_PREDICTABLE, _WELL_PREDICTABLE = 0.8, 0.9
# In a grid a fast oscillation looks like a slow one with derivatives of wrong size and sign: what is accused there must
# turn by less than 0.14 radians a step, or the values must be this predictable.
_GRID_TURNING, _GRID_PREDICTABLE = 0.02, 0.995
_FEWEST_FOR_NOISE = 9  # samples more than inputs
_NOTEWORTHY, _HOPELESS = 0.1, 0.6  # relative noise


class Judgement(NamedTuple):
    """What is said about one output."""

    verdict: str
    findings: list[Finding]
    noise: float
    """Relative noise that is established, 0 if none is."""
    most_noise: float
    """The largest relative noise that the data allow."""


def judge(
    statistics: PairStatistics, n: int, predictable: float, derivative_noise: float, output: int | None
) -> Judgement:
    """Judge one output.

    Parameters
    ----------
    statistics : PairStatistics
    n : int
        Number of samples.
    predictable : float
        Share of the variance of the values that is predictable from other samples.
    derivative_noise : float
        `typical_noise` of the derivatives.
    output : int, optional
        Which output the findings name.
    """
    n_inputs = len(statistics.columns)
    bound = critical_value(n, n_inputs)
    if not np.isfinite(bound):
        return Judgement(CANNOT_TELL, [], 0.0, np.inf)
    findings = (
        _arrangement(statistics, bound, output)
        or _scale(statistics, bound, output)
        or _columns(statistics, bound, output)
        or _rows(statistics, bound, predictable, output)
    )
    most = _most_noise(statistics, derivative_noise)
    if findings:
        return Judgement(DO_NOT_USE, findings, 0.0, most)
    enough = n - n_inputs > _FEWEST_FOR_NOISE * (4 if statistics.regular else 1)
    noise = _noise(statistics, bound, predictable, derivative_noise) if enough else 0.0
    if noise >= _NOTEWORTHY:
        hopeless = noise >= _HOPELESS
        return Judgement(DO_NOT_USE if hopeless else SMALLER, [noise_finding(noise, hopeless, output)], noise, most)
    slope = statistics.slope
    near_one = slope.value - bound * slope.error > 0.5 and slope.value + bound * slope.error < 1.5
    explains = statistics.unexplained.value < 0.5 and 0.5 < slope.value < 2 and slope.value > bound * slope.error
    return Judgement(USE if near_one or explains else CANNOT_TELL, [], 0.0, most)


def _band(statistics: PairStatistics) -> float:
    """The factor by which curvature alone may bring a slope away from 1.

    For a sine or an exponential function over one step the slope is sqrt(t) / atan(sqrt(t)) or sqrt(t) / atanh(sqrt(t))
    with t the `turning`; powers that start from zero reach a factor of 4 at t = 1.
    """
    return 1.5 + 2.5 * statistics.turning


def _arrangement(statistics: PairStatistics, bound: float, output: int | None) -> list[Finding]:
    orders = {"later": "np.roll(dydx, 1, axis=0)", "earlier": "np.roll(dydx, -1, axis=0)", "reversed": "dydx[::-1]"}
    best = min(orders, key=lambda name: statistics.others[name].value)
    if not _better(statistics, best, bound):
        return []
    message = f"derivatives fit the values if their rows are taken as {orders[best]}"
    return [Finding("misaligned rows", message, f"line the rows up: dydx = {orders[best]}", output)]


def _better(statistics: PairStatistics, name: str, bound: float) -> bool:
    other, gain = statistics.others[name].value, statistics.improvement[name]
    return (
        other < min(_MOST_UNEXPLAINED, statistics.unexplained.value / 3, 1 - statistics.correlation**2)
        and gain.value > bound * gain.error
    )


def transposed(statistics: list[PairStatistics], n: int) -> list[Finding]:
    """Find that the transposed Jacobian, the arrangement "transposed" of all outputs, explains the values and not J."""
    if not statistics or any("transposed" not in output.others for output in statistics):
        return []
    given = sum(output.unexplained.value for output in statistics)
    other = sum(output.others["transposed"].value for output in statistics)
    replicates = [output.replicates["transposed"] for output in statistics]
    if len({len(replicate) for replicate in replicates}) > 1:  # other rows are known for other outputs
        return []
    error = float(jackknife_error(np.sum(replicates, axis=0)))
    bound = critical_value(n, len(statistics[0].columns))
    if other < given / 3 and other + bound * error < 0.5 * len(statistics):
        remedy = "dydx = dydx.swapaxes(1, 2)"
        return [Finding("transposed", "values fit the transposed Jacobian and not the one given", remedy)]
    return []


def critical_value(n: int, n_inputs: int) -> float:
    """How many jackknife standard errors make certain; infinitely many for few samples."""
    freedom = min(n, 30) - 1 if n_inputs == 1 else min(min(n, 30) - 1, n - 1 - n_inputs)
    if freedom < 2:
        return np.inf
    return float(stats.t.ppf(1 - _SIGNIFICANCE, freedom))  # pyright: ignore[reportUnknownMemberType]


def _scale(statistics: PairStatistics, bound: float, output: int | None) -> list[Finding]:
    slope = statistics.slope
    left = 1 - statistics.correlation**2
    if abs(slope.value) <= bound * slope.error or left > _MOST_UNEXPLAINED:
        return []
    if left > 2 * statistics.column_unexplained + 0.02 and len(statistics.columns) > 1:
        return []  # the columns need different factors
    factor = abs(slope.value)
    wrong_units = _beyond(slope, _band(statistics), bound)
    if slope.value > 0 and not wrong_units:
        return []
    if statistics.regular and _may_be_alias(statistics, slope, wrong_units=wrong_units):
        return []
    return [factor_finding(slope, wrong_units=wrong_units, factor=factor, column=None, output=output)]


def _may_be_alias(statistics: PairStatistics, slope: Estimate, *, wrong_units: bool) -> bool:
    """Whether a sine with less than two points in a period would look like this.

    One that turns by 2 a from point to point has the turning tan(a)**2 and the slope tan(a) / a, with a > pi / 2.
    """
    if wrong_units:
        return abs(slope.value) < 1 and statistics.turning > _GRID_TURNING
    return statistics.turning > 2.4 * slope.value**2


def _columns(statistics: PairStatistics, bound: float, output: int | None) -> list[Finding]:
    if len(statistics.columns) < 2 or statistics.column_unexplained > _MOST_UNEXPLAINED:
        return []
    if statistics.unexplained.value < 2 * statistics.column_unexplained:
        return []
    findings: list[Finding] = []
    for column, slope in enumerate(statistics.columns):
        if statistics.column_gain[column] < 0.05 or abs(slope.value - 1) <= bound * slope.error:
            continue
        wrong_units = _beyond(slope, _band(statistics), bound)
        if statistics.regular and _may_be_alias(statistics, slope, wrong_units=wrong_units):
            continue
        if (slope.value < 0 and -slope.value > bound * slope.error) or wrong_units:
            findings.append(
                factor_finding(slope, wrong_units=wrong_units, factor=abs(slope.value), column=column, output=output)
            )
    return findings


def _beyond(slope: Estimate, band: float, bound: float) -> bool:
    """Whether the size of a slope is certainly outside [1 / band, band]."""
    size, error = abs(slope.value), bound * slope.error
    return size - error > band or 0 < size + error < 1 / band


def _rows(statistics: PairStatistics, bound: float, predictable: float, output: int | None) -> list[Finding]:
    """Rows that have nothing to do with their derivatives, if these are of the right size."""
    certain = statistics.alignment.value + bound * statistics.alignment.error < 0.35
    if statistics.regular and predictable < _GRID_PREDICTABLE:
        return []
    # Where the mean derivative does most of the work, mixed-up rows are noise of a certain size: see `_noise`.
    if not certain or statistics.row_share < 0.25 or predictable < _PREDICTABLE or not 0.4 < statistics.power < 1.4:
        return []
    if statistics.row_share * statistics.power < 3 * (1 - predictable):
        return []  # what depends on the row is less than what the values leave open
    return [
        Finding(
            "misaligned rows",
            "derivatives have the right size but do not belong to the rows they stand in, no better than to others "
            "(or they are noise of that size)",
            "check that X, y and dydx were sorted, filtered and split together",
            output=output,
        )
    ]


def _noise(statistics: PairStatistics, bound: float, predictable: float, derivative_noise: float) -> float:
    """Relative noise that is certain, 0 if none.

    Noise in the predictor lowers the slope against the part that depends on the row, and noise in y does not. Curvature
    does too, hence the derivatives must also be less predictable from other samples than the values are.
    """
    alignment = statistics.alignment
    if predictable < (_GRID_PREDICTABLE if statistics.regular else _WELL_PREDICTABLE):
        return 0.0
    if derivative_noise**2 < 6 * (1 - predictable):  # derivatives are rougher than values, and there is noise in y
        return 0.0
    if alignment.value + bound * alignment.error > 1:
        return 0.0
    return min(derivative_noise, _attenuation_noise(statistics, alignment.value))


def _attenuation_noise(statistics: PairStatistics, slope: float) -> float:
    """Relative noise of derivatives that would lower the slope from 1 to `slope`."""
    # The mean of two rows' derivatives has half the variance of their noise.
    noise = max(0.0, 1 - slope) * statistics.row_share
    return float(np.sqrt(2 * noise / max(1 - noise, 1e-9)))


def _most_noise(statistics: PairStatistics, derivative_noise: float) -> float:
    if statistics.power == 0:
        return np.inf
    left = statistics.unexplained.value / statistics.power  # all of it blamed on the derivatives
    return float(min(derivative_noise, np.sqrt(2 * left / max(1 - left, 1e-9))))
