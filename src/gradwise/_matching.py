"""The gradient-matching loss: how far predicted input derivatives are from known ones."""

import math
from typing import Any

# Arrays of any namespace `xp`: numpy, torch, keras.ops and jax.numpy share no static type.
Array = Any

LOSSES = ("mse", "huber")
REDUCTIONS = ("mean", "sum", "none")


def gradient_matching_loss(
    predicted: Array,
    target: Array,
    *,
    mask: Array | None = None,
    sample_weight: Array | None = None,
    scale: Array | None = None,
    loss: str = "mse",
    threshold: Array | float = 1.0,
    xp: Any,
) -> Array:
    """Mean squared distance between predicted and known input derivatives (Sobolev training).

    Computes ``mean_i mean_o sum_j r_ioj**2`` with ``r = scale * (predicted - target)``: a sum over inputs, a mean over
    samples and outputs, as a mean squared error averages outputs. With unknown entries or weights it is the weighted
    mean over the known entries, times `n_inputs`. It is zero if and only if all known derivatives are equal (where
    `scale` is not zero). Not for derivatives of parameters: "gradient matching" in data-set condensation is something
    else.

    Parameters
    ----------
    predicted : array of shape (batch, n_outputs, n_inputs)
        The model's derivatives of outputs with respect to inputs, in units of y per unit of x.
    target : array of shape (batch, n_outputs, n_inputs)
        Known derivatives, in the same units. NaN means unknown.
    mask : boolean array of shape (batch, n_outputs, n_inputs), optional
        False means unknown. Unknown entries are selected away, never multiplied by zero, so that what stands there
        (NaN as well) reaches neither the loss nor its gradient. With nothing known the loss is 0.
    sample_weight : array of shape (batch,), or of the shape of `predicted`, optional
        Non-negative weights of samples, or of entries, without unit; only their ratios matter. A weight of zero
        removes what it weighs.
    scale : array of shape (n_outputs, n_inputs), optional
        Brings a derivative to the units of y, for example the standard deviation of each input. Default 1.
    loss : {"mse", "huber"}, default "mse"
        "huber" replaces ``r**2`` by ``2 * threshold * abs(r) - threshold**2`` beyond the threshold.
    threshold : float or array of shape (n_outputs,), default 1.0
        Where "huber" turns linear, in units of `scale` times a derivative.
    xp : module
        The array namespace: `numpy`, `torch`, `keras.ops` or `jax.numpy`.

    Returns
    -------
    array of shape ()
        The loss, in squared units of `scale` times a derivative.

    Raises
    ------
    ValueError
        If a shape is not exactly the one above (a shape that merely broadcasts is an error), or `loss` is unknown.
    TypeError
        If `mask` is not boolean.

    Examples
    --------
    >>> import numpy as np
    >>> from gradwise import gradient_matching_loss
    >>> target = np.zeros((2, 1, 3))
    >>> predicted = target + np.array([1.0, 2.0, 2.0])
    >>> float(gradient_matching_loss(predicted, target, xp=np))
    9.0
    >>> target[0] = np.nan  # the first sample's derivatives are unknown
    >>> float(gradient_matching_loss(predicted, target, xp=np))
    9.0
    """
    shape = _shape(predicted)
    if len(shape) != 3:
        msg = f"`predicted` must have shape (batch, n_outputs, n_inputs); got {shape}"
        raise ValueError(msg)
    for name, array, expected in (
        ("target", target, shape),
        ("mask", mask, shape),
        ("sample_weight", sample_weight, shape if _per_entry(sample_weight) else shape[:1]),
        ("scale", scale, shape[1:]),
    ):
        if array is not None and _shape(array) != expected:
            msg = f"`{name}` must have shape {expected} to go with `predicted` of shape {shape}; got {_shape(array)}"
            raise ValueError(msg)
    if _shape(threshold) not in {(), shape[1:2]}:
        msg = f"`threshold` must be a number or have shape {shape[1:2]}; got {_shape(threshold)}"
        raise ValueError(msg)
    if mask is not None and "bool" not in str(mask.dtype):
        msg = f"`mask` must be boolean; got {mask.dtype}. Pass `mask != 0`"
        raise TypeError(msg)
    check_choice("loss", loss, LOSSES)
    known = known_entries(target, mask=mask, sample_weight=sample_weight, xp=xp)
    numerators = matching_numerators(
        predicted, target, known=known, sample_weight=sample_weight, scale=scale, loss=loss, threshold=threshold, xp=xp
    )
    total = known_weight(target, known, sample_weight=sample_weight, xp=xp)
    return reduce_terms(numerators, total, factor=shape[2], reduction="mean", xp=xp)


def known_entries(target: Array, *, mask: Array | None, sample_weight: Array | None, xp: Any) -> Array:
    """Which entries of `target` count: neither NaN nor masked, of samples with a positive weight; booleans."""
    known = target == target  # False for NaN, on every namespace
    if mask is not None:
        known = known & mask
    if sample_weight is not None:  # a removed sample may have an infinite prediction, and 0 * inf is NaN too
        known = known & (_weight_of_entries(sample_weight, xp) > 0)
    return known


def known_weight(target: Array, known: Array, *, sample_weight: Array | None, xp: Any) -> Array:
    """Sum the weights of the known entries: the denominator of the loss, shape ()."""
    zeros = xp.zeros_like(target)
    ones = zeros + 1.0
    if sample_weight is not None:
        ones = ones * _weight_of_entries(sample_weight, xp)
    return xp.sum(xp.where(known, ones, zeros))


def matching_numerators(
    predicted: Array,
    target: Array,
    *,
    known: Array | None,
    sample_weight: Array | None,
    scale: Array | None,
    loss: str,
    threshold: Array | float,
    xp: Any,
) -> Array:
    """Weight times loss of the known entries, 0 for others; shape (batch, ...), for `reduce_terms` to sum.

    `scale` may also be (batch, n_outputs, n_inputs) and `threshold` (batch, n_outputs), for rows that differ by sample;
    `sample_weight` is (batch,) or of the shape of `predicted`.
    `known` comes from `known_entries`; None says that all entries are known, which saves passes over them.
    """
    if known is None:
        residual = predicted - target
    else:
        zeros = xp.zeros_like(predicted)
        # Both selections are needed: 0 * NaN is NaN, so a NaN must not enter even an operation that is discarded.
        residual = xp.where(known, predicted - xp.where(known, target, zeros), zeros)
    if scale is not None:
        residual = scale * residual
    if loss == "huber":
        size = xp.abs(residual)
        limit: Array = threshold
        if len(_shape(threshold)) > 0:
            limit = limit[..., None]
        # r**2 inside and 2 t |r| - t**2 beyond in one product, so that no branch overflows: c = min(|r|, t).
        clipped = xp.where(size < limit, size, xp.zeros_like(size) + limit)
        entries = clipped * (2 * size - clipped)
    else:
        entries = xp.square(residual)
    # Summed here only where it saves a pass: most calls need a single sum over everything, in `reduce_terms`.
    if sample_weight is None:
        return entries
    return sample_weight * (entries if _per_entry(sample_weight) else xp.sum(entries, axis=(1, 2)))


def reduce_terms(numerators: Array, known: Array | float, *, reduction: str, factor: float = 1.0, xp: Any) -> Array:
    """Divide sums of numerators, of shape (batch, ...), by the total weight of known entries; times `factor`.

    0 where nothing is known. The unweighted mean of the "none" terms is the "mean", their sum the "sum". A caller that
    shares the batch with other processes passes ``known = global weight / number of processes``; averaging the
    processes' gradients, as data parallel training does, then gives the gradient of the global mean.
    """
    # The numerators are zero where nothing is known, so any non-zero denominator does.
    if isinstance(known, (int, float)):
        known = known if known > 0 else 1.0
    else:
        known = xp.where(known > 0, known, xp.zeros_like(known) + 1.0)
    # First among constants, so that the graph of the numerators grows by one operation.
    share = factor / known
    if reduction == "mean":
        return xp.sum(numerators) * share
    batch, *others = _shape(numerators)
    if reduction == "sum":
        return xp.sum(numerators) * (batch * share)
    terms = xp.sum(numerators, axis=tuple(range(1, 1 + len(others)))) if others else numerators
    return terms * (batch * share)


def gradient_norms(jacobian: Array, *, xp: Any) -> Array:
    """Euclidean norm over the inputs, with a zero (not NaN) derivative at a zero gradient, shape (batch, n_outputs)."""
    squares = xp.sum(xp.square(jacobian), axis=-1)
    positive = squares > 0
    # The inner `where` keeps sqrt away from 0, where its derivative is infinite and inf * 0 is NaN.
    roots = xp.sqrt(xp.where(positive, squares, xp.zeros_like(squares) + 1.0))
    return xp.where(positive, roots, xp.zeros_like(roots))


def gradient_norm_loss(jacobian: Array, target_norm: Array | float, *, xp: Any) -> Array:
    """Mean squared distance of per-sample gradient norms from their targets (gradient penalty).

    Computes ``mean_i mean_o (norm_j(J_ioj) - target_norm)**2``: one norm per sample and output, never one of the whole
    batch. `target_norm` is a number or an array of shape (batch, n_outputs), in units of y per unit of x.
    """
    norms = gradient_norms(jacobian, xp=xp)[..., None]
    target = (xp.zeros_like(norms[..., 0]) + target_norm)[..., None]
    return gradient_matching_loss(norms, target, xp=xp)


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        msg = f"`{name}` must be one of {', '.join(map(repr, choices))}; got {value!r}"
        raise ValueError(msg)


def check_non_negative(name: str, value: float) -> float:
    """Return `value` as a float, or raise ValueError unless it is finite and not negative."""
    number = float(value)
    if not (math.isfinite(number) and number >= 0):
        msg = f"`{name}` must be finite and not negative; got {value!r}"
        raise ValueError(msg)
    return number


def _shape(array: Array) -> tuple[int, ...]:
    return tuple(getattr(array, "shape", ()))


def _per_entry(sample_weight: Array | None) -> bool:
    return len(_shape(sample_weight)) > 1


def _weight_of_entries(sample_weight: Array, xp: Any) -> Array:
    return sample_weight if _per_entry(sample_weight) else xp.reshape(sample_weight, (-1, 1, 1))
