"""What `check_derivatives` found: verdict, findings with remedies, text and plot."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

USE = "use"
SMALLER = "use with a smaller weight"
DO_NOT_USE = "do not use"
CANNOT_TELL = "cannot tell"


@dataclass(frozen=True)
class Finding:
    """One thing that is worth knowing.

    Attributes
    ----------
    kind : str
        "wrong sign", "wrong units" (or both, joined by " and "), "transposed", "misaligned rows", "noise",
        "hopeless noise", "input hardly matters" or "unknown".
    message : str
        What was found.
    remedy : str
        What to do about it.
    output, input : int or None
        The output and input that it concerns; None means all of them.
    """

    kind: str
    message: str
    remedy: str
    output: int | None = None
    input: int | None = None

    def __str__(self) -> str:
        where = "" if self.output is None else f" (output {self.output})"
        return f"{self.kind}{where}: {self.message}. To do: {self.remedy}."


@dataclass(frozen=True)
class OutputCheck:
    """The numbers behind the verdict on one output; none has a unit.

    Attributes
    ----------
    verdict : str
        As of the report.
    explained : float
        Share of the differences between near samples that the derivatives predict (1: all, 0: nothing, negative:
        worse than nothing).
    slope, slope_error : float
        Of differences against predicted ones, with a jackknife standard error: 1 if all is well.
    alignment, alignment_error : float
        The same for what the derivatives' deviations from their mean predict: 0 if rows are mixed up.
    predictable : float
        Share of the variance of y that a kernel regression predicts for samples left out. Where it is low the samples
        are too few to tell.
    noise, most_noise : float
        Relative noise of the derivatives that is established (0 if none) and the largest that the data allow.
    importance : array of shape (n_inputs,)
        Share of each input in the mean square of ``dydx * std(x)``.
    """

    verdict: str
    explained: float = np.nan
    slope: float = np.nan
    slope_error: float = np.nan
    alignment: float = np.nan
    alignment_error: float = np.nan
    predictable: float = np.nan
    noise: float = 0.0
    most_noise: float = np.inf
    importance: Floats = field(default_factory=lambda: np.empty(0))


@dataclass(frozen=True)
class DerivativeReport:
    """Result of `check_derivatives`; `str` makes a text of it, `plot` a picture.

    Attributes
    ----------
    verdict : str
        "use", "use with a smaller weight", "do not use" or "cannot tell": the worst of the outputs' in this order: do
        not use, use with a smaller weight, cannot tell, use.
    derivative_weight : float
        Suggested weight: 1 for "use" and "cannot tell", 0 for "do not use".
    findings : tuple of Finding
        What was found, the worst first.
    outputs : tuple of OutputCheck
        The numbers behind it, for each output.
    n_pairs : int
        How many pairs of near samples were compared.
    predicted, actual : array of shape (n_pairs, n_outputs)
        Differences of y between near samples, in units of y: as the derivatives predict them and as they are.
    """

    verdict: str
    derivative_weight: float
    findings: tuple[Finding, ...]
    outputs: tuple[OutputCheck, ...]
    n_pairs: int
    predicted: Floats
    actual: Floats

    def __str__(self) -> str:
        weight = f" (derivative_weight={self.derivative_weight:.2g})" if self.verdict == SMALLER else ""
        lines = [f"Derivatives: {self.verdict}{weight}. Compared on {self.n_pairs} pairs of near samples."]
        lines += [f"- {finding}" for finding in self.findings]
        several = len(self.outputs) > 1
        for index, check in enumerate(self.outputs):
            if np.isnan(check.explained):
                continue
            name = f"Output {index}: {check.verdict}; " if several else ""
            lines.append(
                f"{name}{_percent(check.explained)} of the differences explained, slope "
                f"{check.slope:.3g} +- {check.slope_error:.2g} (1 is right), values {_percent(check.predictable)} "
                f"predictable without derivatives, {_noise_text(check)}."
            )
        if self.verdict == CANNOT_TELL:
            lines.append(
                "The samples are too few, too far apart or too noisy to judge the derivatives, in their favour or "
                "against them. Compare with finite_difference_jacobian at a few samples if the function can be called, "
                "or let cross-validation choose the weight."
            )
        return "\n".join(lines)

    def plot(self, axes: Any = None) -> Any:
        """Draw differences as they are against those predicted, and how much each input matters.

        Parameters
        ----------
        axes : pair of matplotlib Axes, optional
            Where to draw; by default in a new figure.

        Returns
        -------
        Figure
            The matplotlib figure.

        Raises
        ------
        ModuleNotFoundError
            Without matplotlib: ``pip install "gradwise[plot]"``.
        """
        from gradwise._derivative_report_plot import draw

        return draw(self, axes)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %" if share > 0 else "none"


def _noise_text(check: OutputCheck) -> str:
    if check.noise > 0:
        return f"relative noise about {_percent(check.noise)}"
    if np.isfinite(check.most_noise) and check.most_noise < 1:
        return f"relative noise at most {_percent(check.most_noise)}"
    return "relative noise unknown"
