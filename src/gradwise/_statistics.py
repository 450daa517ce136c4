"""How members combine, and what their disagreement says."""

import math
from dataclasses import dataclass
from typing import Any, TypeVar

__all__ = ["PopulationStatistics", "gradient_agreement", "loss_spread", "running_mean", "sharpness"]

ArrayT = TypeVar("ArrayT", bound=Any)


@dataclass(frozen=True)
class PopulationStatistics:
    """What the members of one step said; NaN where the mode of training cannot know.

    Of a tensor with more than 131072 weights, `agreement`, `sharpness` and `relative_sigma` of a loop over members see
    a contiguous eighth (or about 65536 weights, if that is more), which is drawn anew for every step.

    Nothing is sent between processes for them: where processes have members of their own (DDP, replicas of HSDP), each
    sees its own. Of a tensor that is sharded (FSDP2, tensor parallelism), a process sees its shard, and takes the whole
    for as many times that as there are shards: `agreement` and `relative_sigma` are then ratios over a part of the
    numbers, and the mean of `sharpness` over the processes is that of the whole. `loss_mean` and `loss_spread` are
    those of the process's own rows.

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


def running_mean(mean: ArrayT, value: ArrayT, fraction: Any) -> ArrayT:
    """Mean of the values so far from the mean of all but the last, and the last.

    Computes ``mean + fraction * (value - mean)``, which for equal values is exact in floating point at every count;
    ``sum / count`` is not. That is what makes sigma=0 equal the plain optimizer bit for bit. ``torch.lerp`` computes
    the same in one pass.

    Parameters
    ----------
    mean, value : array or float of the same shape
        Ignored and new value; `mean` does not matter when `fraction` is 1.
    fraction : float or array of shape ()
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
    if isinstance(fraction, (int, float)) and fraction == 1:
        return value
    return mean + fraction * (value - mean)


def gradient_agreement(mean_square_norm: Any, square_norms: Any, *, sizes: Any, xp: Any) -> Any:
    """``|mean g|^2 / mean |g|^2``: 1 when all gradients are equal (or zero), about 1 / members when independent.

    Parameters
    ----------
    mean_square_norm : array of shape ()
        Squared norm of the members' mean gradient.
    square_norms : array of shape (members,)
        Squared norm of each member's gradient.
    sizes : array of shape (members,)
        How much each counts in both means.
    xp : module
        The array namespace.

    Returns
    -------
    array of shape ()
        Without unit.
    """
    mean_of_squares = xp.sum(square_norms * sizes) / xp.sum(sizes)
    ones = xp.zeros_like(mean_of_squares) + 1.0
    zero = mean_of_squares == 0  # not its opposite: NaN must come through
    return xp.where(zero, ones, mean_square_norm / xp.where(zero, ones, mean_of_squares))


def loss_spread(losses: Any, counted: Any, *, xp: Any) -> Any:
    """Standard deviation, divided by n, of the losses of the members that count; exactly 0 where all are equal.

    Parameters
    ----------
    losses : array of shape (members,)
    counted : boolean array of shape (members,)
        False for members that turned out to have no rows. The first one always counts.
    xp : module
        The array namespace.

    Returns
    -------
    array of shape ()
        In units of the loss.
    """
    zeros = xp.zeros_like(losses)
    count = xp.sum(xp.where(counted, zeros + 1.0, zeros))
    shifted = xp.where(counted, losses - losses[0], zeros)
    return xp.sqrt(xp.sum(xp.where(counted, xp.square(shifted - xp.sum(shifted) / count), zeros)) / count)


def sharpness(mean_projection: float) -> float:
    """Mean rise of the loss over the population, from the mean of the members' ``z . g(w + z)``.

    For a quadratic loss with Hessian H and perturbations of mean zero, ``E[L(w + z)] - L(w) = E[z'Hz] / 2`` and
    ``E[z . g(w + z)] = E[z'Hz]``; so half the mean of the projections, exact there whatever the loss at w.
    """
    return mean_projection / 2
