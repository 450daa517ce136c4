"""How far generated images are from real ones, in the features of a network that neither has seen: KID and others."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import linalg
from scipy.spatial.distance import cdist

__all__ = ["Scores", "frechet_distance", "kernel_distance", "precision_recall", "score"]

Array = NDArray[np.float64]


class Scores(NamedTuple):
    """Of two samples of the same size."""

    kid: float
    frechet: float
    precision: float
    recall: float


def kernel_distance(real: Array, generated: Array) -> float:
    """Kernel inception distance (Binkowski et al. 2018): the unbiased squared MMD with the kernel ``(x.y / d + 1)^3``.

    Its mean is 0 if both samples come from one distribution, at every sample size, so it may be negative.

    Parameters
    ----------
    real, generated : array of shape (n, d) and (m, d)
        Features.

    Returns
    -------
    float
        Means of the kernel over the pairs within each sample, diagonal left out, less twice that between them.
    """
    d = real.shape[1]

    def kernel(a: Array, b: Array) -> Array:
        return (a @ b.T / d + 1) ** 3

    def within(a: Array) -> float:
        k = kernel(a, a)
        return float((k.sum() - np.trace(k)) / (len(a) * (len(a) - 1)))

    return within(real) + within(generated) - 2 * float(kernel(real, generated).mean())


def frechet_distance(real: Array, generated: Array) -> float:
    """Squared Frechet distance of two Gaussians with the samples' moments: ``|m - n|^2 + tr(S + T - 2 (S T)^(1/2))``.

    Biased upwards by about ``1 / n``: only samples of equal size may be compared.
    """
    means = real.mean(0) - generated.mean(0)
    s, t = (np.atleast_2d(np.cov(a, rowvar=False)) for a in (real, generated))
    # The eigenvalues of S T are those of the symmetric S^(1/2) T S^(1/2): no complex rounding, singular S allowed.
    values, vectors = linalg.eigh(s)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.sqrt(np.clip(linalg.eigvalsh(root @ t @ root), 0, None)).sum()
    return float(means @ means + np.trace(s) + np.trace(t) - 2 * cross)


def precision_recall(real: Array, generated: Array, *, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019).

    Precision is the share of generated points within some real point's distance to its k-th nearest real neighbour;
    recall is the same with the roles exchanged.
    """

    def covered(points: Array, balls: Array) -> float:
        radii = np.sort(cdist(balls, balls), axis=1)[:, k]  # column 0 is the point itself
        return float((cdist(points, balls) <= radii).any(1).mean())

    return covered(generated, real), covered(real, generated)


def score(real: Array, generated: Array) -> Scores:
    """All four, of samples of equal size.

    Raises
    ------
    ValueError
        If the samples differ in shape: Frechet distance, precision and recall depend on the size.
    """
    if real.shape != generated.shape:
        msg = f"`generated` must have the shape of `real`, {real.shape}; got {generated.shape}"
        raise ValueError(msg)
    precision, recall = precision_recall(real, generated)
    return Scores(kernel_distance(real, generated), frechet_distance(real, generated), precision, recall)
