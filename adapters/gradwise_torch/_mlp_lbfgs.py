"""L-BFGS as a generator: it asks for losses and gradients, so that one program can serve many problems at once."""

from collections.abc import Callable, Generator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Minimum", "lbfgs", "minimise_all"]

Floats = NDArray[np.float64]
Search = Generator[Floats, tuple[float, Floats], "Minimum"]

# Of the strong Wolfe conditions: Nocedal & Wright, Numerical Optimization (2006), section 3.5.
_DECREASE, _CURVATURE = 1e-4, 0.9
_LINE_SEARCH = 20
# Gains are judged over this many iterations: L-BFGS often rests for a few on its way down.
_WINDOW = 10
# Of a loss in units of the variance of y. A noise-free target is fitted ever better, and nobody need be told so.
_NEGLIGIBLE = 1e-5


class Minimum(NamedTuple):
    """Where an optimiser stopped."""

    theta: Floats
    loss: float
    loss_curve: list[float]
    """After every iteration."""
    converged: bool


def lbfgs(theta: Floats, *, max_iter: int, tol: float, memory: int, report: Callable[[float], None] | None) -> Search:
    """Minimise by limited-memory BFGS (Nocedal & Wright, algorithm 7.5) with a strong Wolfe line search.

    Yields weight vectors and must be sent their loss and gradient; returns a `Minimum`. It has converged when ten
    iterations gained less than `tol` times the loss, when the gradient is zero, or when rounding lets no step gain; at
    `max_iter`, when ten iterations gained less than 1e-5.

    Parameters
    ----------
    theta : array of shape (n_parameters,)
        Where to start; left as it is.
    max_iter : int
        Most iterations.
    tol : float
        Least relative gain over ten iterations.
    memory : int
        Number of remembered pairs.
    report : callable, optional
        Receives the loss after every iteration.
    """
    loss, gradient = yield theta
    pairs: list[tuple[Floats, Floats, float]] = []
    curve: list[float] = []
    for _ in range(max_iter):
        size = float(np.linalg.norm(gradient))
        if size == 0:
            return Minimum(theta, loss, curve, True)
        direction = _direction(gradient, pairs)
        slope = float(gradient @ direction)
        if not slope < 0:  # rounding has spoilt the pairs
            pairs.clear()
            direction, slope = -gradient, -size * size
        first = 1.0 if pairs else min(1.0, 1.0 / size)
        found = yield from _line_search(theta, loss, slope, direction, first)
        if found is None:
            if not pairs:
                return Minimum(theta, loss, curve, True)
            pairs.clear()  # once more, downhill
            continue
        step, loss, new = found
        move, change = step * direction, new - gradient
        curvature = float(move @ change)
        if curvature > 1e-12 * float(change @ change):
            pairs.append((move, change, curvature))
            del pairs[:-memory]
        theta, gradient = theta + move, new
        curve.append(loss)
        if report is not None:
            report(loss)
        if len(curve) > _WINDOW and curve[-1 - _WINDOW] - loss <= tol * curve[-1 - _WINDOW]:
            return Minimum(theta, loss, curve, True)
    settled = len(curve) > _WINDOW and curve[-1 - _WINDOW] - loss <= _NEGLIGIBLE
    return Minimum(theta, loss, curve, settled)


def _direction(gradient: Floats, pairs: list[tuple[Floats, Floats, float]]) -> Floats:
    """Minus the inverse Hessian, as the pairs have it, times the gradient: the two-loop recursion."""
    direction = -gradient
    shares: list[float] = []
    for move, change, curvature in reversed(pairs):
        share = float(move @ direction) / curvature
        direction -= share * change
        shares.append(share)
    if pairs:
        _, change, curvature = pairs[-1]
        direction *= curvature / float(change @ change)
    for (move, change, curvature), share in zip(pairs, reversed(shares), strict=True):
        direction += (share - float(change @ direction) / curvature) * move
    return direction


class _Point(NamedTuple):
    step: float
    loss: float
    slope: float


def _line_search(
    theta: Floats, loss: float, slope: float, direction: Floats, step: float
) -> Generator[Floats, tuple[float, Floats], tuple[float, float, Floats] | None]:
    """Find a step with the strong Wolfe conditions; after 20 tries the best one that gains, None if none does."""
    low = _Point(0.0, loss, slope)
    high: _Point | None = None
    best: tuple[float, float, Floats] | None = None
    for _ in range(_LINE_SEARCH):
        value, gradient = yield theta + step * direction
        point = _Point(step, value, float(gradient @ direction))
        if not np.isfinite(value) or value > loss + _DECREASE * step * slope or (low.step > 0 and value >= low.loss):
            high = point
        else:
            if best is None or value < best[1]:
                best = step, value, gradient
            if abs(point.slope) <= -_CURVATURE * slope:
                return step, value, gradient
            if high is None:
                if point.slope < 0:
                    low, step = point, step * 2.5
                    continue
                low, high = point, low
            else:
                if point.slope * (high.step - low.step) >= 0:
                    high = low
                low = point
        if abs((high.step - low.step) * slope) <= 1e-16 * abs(loss):  # no step in between gains more than rounding
            break
        step = _between(low, high)
    return best


def _between(low: _Point, high: _Point) -> float:
    """Minimiser of the cubic through two points and their slopes, within the middle 80 % of the interval."""
    width = high.step - low.step
    share = 0.1
    if np.isfinite(high.loss) and np.isfinite(high.slope):
        mean = 3 * (low.loss - high.loss) / width + low.slope + high.slope
        under = mean * mean - low.slope * high.slope
        if under >= 0:
            root = float(np.sign(width)) * under**0.5
            denominator = high.slope - low.slope + 2 * root
            if denominator != 0:
                share = 1 - (high.slope + root - mean) / denominator
        else:
            share = 0.5
    return low.step + min(max(share, 0.1), 0.9) * width


def minimise_all(objective: Callable[[Floats], tuple[Floats, Floats]], searches: list[Search]) -> list[Minimum]:
    """Run searches side by side: each has its own line searches, their points are evaluated in one call.

    Parameters
    ----------
    objective : callable
        From weight vectors of shape (members, n_parameters) to losses (members,) and gradients (members, n_parameters);
        always called with all members, so that it may treat them differently.
    searches : list of generators from `lbfgs`
        One for each member.
    """
    points = np.stack([next(search) for search in searches])
    found: dict[int, Minimum] = {}
    while len(found) < len(searches):
        losses, gradients = objective(points)
        for member, search in enumerate(searches):
            if member not in found:
                try:
                    points[member] = search.send((float(losses[member]), gradients[member]))
                except StopIteration as stop:
                    found[member] = stop.value
    return [found[member] for member in range(len(searches))]
