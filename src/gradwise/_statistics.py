"""How members combine, and what their disagreement says."""

import math
from dataclasses import dataclass
from typing import Any, TypeVar

__all__ = ["PopulationStatistics", "gradient_agreement", "running_mean", "sharpness"]

ArrayT = TypeVar("ArrayT", bound=Any)


@dataclass(frozen=True)
class PopulationStatistics:
    """What the members of one step said; NaN where the mode of training cannot know.

    Of a tensor with more than 131072 weights, `agreement`, `sharpness` and `relative_sigma` of a loop over members see
    a contiguous eighth (or about 65536 weights, if that is more), which is drawn anew for every step.

    Attributes
    ----------
    loss_mean : float
        Mean of the members' losses. Not the loss at the mean weights.
    loss_spread : float
        Standard deviation (divided by n) of the members' losses, in units of the loss.
    agreement : float
        ``|mean g|^2 / mean |g|^2`` over the members' gradients, from 1 / members (independent) to 1 (equal). NaN, like
        `sharpness`, where a closure adds to earlier gradients (or zeroes them in place, which looks the same).
    sharpness : float
        ``E[z . g(w + z)] / 2`` over the members' perturbations z: how much the loss rises on average around the mean
        weights. Exact for quadratics, where it is ``tr(H Cov z) / 2``; in units of the loss.
    relative_sigma : float
        ``|z| / |w|`` of the perturbed tensors of the step's first member as stored, after rounding to their dtype.
    members : int
        Members that counted in the step.
    skipped : int
        Members dropped for a non-finite loss since the optimizer was made (or loaded).
    """

    loss_mean: float = math.nan
    loss_spread: float = math.nan
    agreement: float = math.nan
    sharpness: float = math.nan
    relative_sigma: float = math.nan
    members: int = 0
    skipped: int = 0


def running_mean(mean: ArrayT, value: ArrayT, fraction: float) -> ArrayT:
    """Mean of the values so far from the mean of all but the last, and the last.

    Computes ``mean + fraction * (value - mean)``, which for equal values is exact in floating point at every count;
    ``sum / count`` is not. That is what makes sigma=0 equal the plain optimizer bit for bit. ``torch.lerp`` computes
    the same in one pass.

    Parameters
    ----------
    mean, value : array or float of the same shape
        Ignored and new value; `mean` does not matter when `fraction` is 1.
    fraction : float
        The weight of the last value among all so far: 1 / count where all count the same.

    Returns
    -------
    array or float
        In the units of `value`.

    Examples
    --------
    >>> from gradwise._statistics import running_mean
    >>> mean = 0.1
    >>> for count in range(2, 8):
    ...     mean = running_mean(mean, 0.1, 1 / count)
    >>> mean == 0.1, sum([0.1] * 7) / 7 == 0.1
    (True, False)
    """
    return value if fraction == 1 else mean + fraction * (value - mean)


def gradient_agreement(mean_square_norm: float, square_norms: list[float], sizes: list[int] | None = None) -> float:
    """``|mean g|^2 / mean |g|^2``, from the squared norm of the members' mean gradient and of each gradient.

    1 when all gradients are equal (or all zero), about 1 / members when they are independent. `sizes` is how much each
    counts in both means; all the same by default.
    """
    if not square_norms:
        return math.nan
    sizes = sizes or [1] * len(square_norms)
    mean_of_squares = math.fsum(n * size for n, size in zip(square_norms, sizes, strict=True)) / sum(sizes)
    return mean_square_norm / mean_of_squares if mean_of_squares else 1.0


def sharpness(mean_projection: float) -> float:
    """Mean rise of the loss over the population, from the mean of the members' ``z . g(w + z)``.

    For a quadratic loss with Hessian H and perturbations of mean zero, ``E[L(w + z)] - L(w) = E[z'Hz] / 2`` and
    ``E[z . g(w + z)] = E[z'Hz]``; so half the mean of the projections, exact there whatever the loss at w.
    """
    return mean_projection / 2


def spread(values: list[float]) -> float:
    """Standard deviation, divided by n."""
    if not values:
        return math.nan
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
