"""How the gradient-matching loss weighs inputs and outputs: scales from training data."""

from typing import Any, NamedTuple

from gradwise._matching import Array, check_choice

SCALES = ("block", "per_input", "none")

# The floor of "per_input" as a fraction of the largest input's signal. Without one, an input that hardly matters gets
# an enormous weight (WaterFlow: error 1.0 instead of 0.002).
_FLOOR = 0.1


class MatchingScale(NamedTuple):
    """What the loss needs to know of the training data."""

    scale: Array
    """Shape (n_outputs, n_inputs), in units of x: times a derivative it is in units of y."""
    threshold: Array
    """Shape (n_outputs,), in units of y: the size of one typical scaled entry, where "huber" turns linear."""


def standard_deviation(values: Array, *, xp: Any) -> Array:
    """Standard deviation of each column, exactly 0 for a constant one, shape (n_columns,)."""
    # Shifted by the first row: a constant column is then exactly 0, and a large mean costs no precision.
    shifted = values - values[:1]
    # Not xp.std: torch divides by n - 1, numpy by n.
    return xp.sqrt(xp.mean(xp.square(shifted - xp.mean(shifted, axis=0)), axis=0))


def matching_scale(
    x: Array, y: Array | None, target: Array, *, mask: Array | None = None, scale: str = "block", xp: Any
) -> MatchingScale:
    """Scale and Huber threshold of the gradient-matching loss, from training data.

    With standard deviations sigma_x, sigma_y and ``D_o = n_inputs * mean(sigma_xj**2 * target_ioj**2)`` over the known
    entries of output o (the variance of y to first order in x):

    * "block": ``sigma_yo * sigma_xj / sqrt(D_o)``, one number for a whole output's derivatives;
    * "per_input": ``sigma_yo * sigma_xj / (c_oj * sqrt(n_inputs))``, where ``c_oj`` is ``sigma_xj * rms_i(target_ioj)``
      but at least a tenth of its largest over j;
    * "none": 1.

    An output whose known derivatives are all zero keeps ``sigma_xj``. An input that is constant in `x` has scale 0: no
    step along it ever happens; if all inputs are, sigma_x is taken as 1.

    Parameters
    ----------
    x : array of shape (n, n_inputs)
    y : array of shape (n, n_outputs) or None
        None (or constant columns) takes ``sigma_yo**2 = D_o``.
    target : array of shape (n, n_outputs, n_inputs)
        Derivatives; NaN means unknown.
    mask : boolean array of the shape of `target`, optional
        False means unknown.
    scale : {"block", "per_input", "none"}
    xp : module
        The array namespace.

    Returns
    -------
    MatchingScale
    """
    check_choice("scale", scale, SCALES)
    _, n_outputs, n_inputs = target.shape
    if scale == "none":
        return MatchingScale(xp.zeros_like(target[0]) + 1.0, xp.zeros_like(target[0, :, 0]) + 1.0)
    sigma_x = standard_deviation(x, xp=xp)
    if not bool(xp.sum(sigma_x) > 0):
        sigma_x = sigma_x + 1.0
    squares, count = _known_squares(target, mask, xp)
    weighted = xp.square(sigma_x) * squares  # (n_outputs, n_inputs): sums over samples of (sigma_x * target)**2
    first_order = n_inputs * _divide(xp.sum(weighted, axis=1), xp.sum(count, axis=1), 0.0, xp)  # D_o
    sigma_y = _sigma_y(y, first_order, xp)
    if scale == "block":
        factor = _divide(sigma_y, xp.sqrt(first_order), 1.0, xp)
        scales = xp.reshape(factor, (n_outputs, 1)) * sigma_x
    else:
        signal = xp.sqrt(_divide(weighted, count, 0.0, xp))
        # stack of a list, not xp.max(signal, axis=1): torch also returns the indices.
        largest = xp.reshape(xp.stack([xp.max(row) for row in signal]), (n_outputs, 1))
        typical = xp.maximum(signal, _FLOOR * largest) * n_inputs**0.5
        scales = _divide(xp.reshape(sigma_y, (n_outputs, 1)) + xp.zeros_like(typical), typical, 1.0, xp) * sigma_x
    return MatchingScale(scales, positive_or_one(sigma_y / n_inputs**0.5, xp))


def directional_scale(
    y: Array | None, target_jvp: Array, *, mask: Array | None = None, scale: str = "block", xp: Any
) -> MatchingScale:
    """Scale and threshold for derivatives along given directions, which are in units of y already.

    Computes ``sigma_yo / rms(target_jvp_o)``, 1 if the targets are all zero. `target_jvp` has shape
    (n, n_outputs, n_directions); the returned scale has shape (n_outputs, 1).
    """
    n_outputs = target_jvp.shape[1]
    if scale == "none":
        ones = xp.zeros_like(target_jvp[0, :, 0]) + 1.0
        return MatchingScale(xp.reshape(ones, (n_outputs, 1)), ones)
    squares, count = _known_squares(target_jvp, mask, xp)
    mean_square = _divide(xp.sum(squares, axis=1), xp.sum(count, axis=1), 0.0, xp)
    sigma_y = _sigma_y(y, mean_square, xp)
    factor = _divide(sigma_y, xp.sqrt(mean_square), 1.0, xp)
    return MatchingScale(xp.reshape(factor, (n_outputs, 1)), positive_or_one(sigma_y, xp))


def second_order_scale(
    x: Array, y: Array | None, target: Array, *, mask: Array | None = None, scale: str = "block", xp: Any
) -> MatchingScale:
    """Scale and Huber threshold for products of Hessians with directions, from training data.

    With ``T_iodj``, the known product of sample i's Hessian of output o with its direction d, and standard deviations
    sigma_x, sigma_y, scale "block" makes the loss of output o

    ``sigma_yo**2 * mean_id sum_j sigma_xj**2 (Hv_iodj - T_iodj)**2 / mean_id sum_j sigma_xj**2 T_iodj**2``

    in squared units of y: a relative error of the second derivatives counts like a relative error of the values. It is
    `matching_scale` with every direction as one more sample, since H v differs from a gradient in the unit of v only,
    which cancels. For the same reason the lengths of all directions together do not matter, their ratios do.

    Parameters
    ----------
    x : array of shape (n, n_inputs)
    y : array of shape (n, n_outputs) or None
        None takes the mean square change of y to second order, for one step v and another of sigma_x, as sigma_y**2.
    target : array of shape (n, n_outputs, n_directions, n_inputs)
        Products H v, in units of y per unit of x for v in units of x; NaN means unknown.
    mask : boolean array of the shape of `target`, optional
        False means unknown.
    scale : {"block", "per_input", "none"}
        As for `matching_scale`; "per_input" is one number for each input j of H v, whatever the direction.
    xp : module
        The array namespace.

    Returns
    -------
    MatchingScale
        Of shapes (n_outputs, n_inputs) and (n_outputs,).
    """
    known = None if mask is None else _directions_as_samples(mask, xp)
    return matching_scale(x, y, _directions_as_samples(target, xp), mask=known, scale=scale, xp=xp)


def _directions_as_samples(products: Array, xp: Any) -> Array:
    n, n_outputs, n_directions, n_inputs = products.shape
    # stack of a list, not a transpose: numpy and torch name the axes differently.
    rows = xp.stack([products[:, o] for o in range(n_outputs)], axis=2)
    return xp.reshape(rows, (n * n_directions, n_outputs, n_inputs))


def _known_squares(target: Array, mask: Array | None, xp: Any) -> tuple[Array, Array]:
    """Sum of squares and number of the known entries, over the samples."""
    known = target == target  # False for NaN, on every namespace
    if mask is not None:
        known = known & mask
    zeros = xp.zeros_like(target)
    squares = xp.square(xp.where(known, target, zeros))
    return xp.sum(squares, axis=0), xp.sum(xp.where(known, zeros + 1.0, zeros), axis=0)


def _sigma_y(y: Array | None, variance: Array, xp: Any) -> Array:
    first_order = xp.sqrt(variance)
    if y is None:
        return first_order
    sigma_y = standard_deviation(y, xp=xp)
    return xp.where(sigma_y > 0, sigma_y, first_order)


def _divide(numerator: Array, denominator: Array, otherwise: float, xp: Any) -> Array:
    positive = denominator > 0
    ratio = numerator / xp.where(positive, denominator, xp.zeros_like(denominator) + 1.0)
    return xp.where(positive, ratio, xp.zeros_like(ratio) + otherwise)


def positive_or_one(values: Array, xp: Any) -> Array:
    return xp.where(values > 0, values, xp.zeros_like(values) + 1.0)
