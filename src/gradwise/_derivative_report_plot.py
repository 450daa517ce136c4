"""The picture of a `DerivativeReport`."""

from typing import Any

import numpy as np

from gradwise._derivative_report import CANNOT_TELL, DO_NOT_USE, SMALLER, USE, DerivativeReport

_COLORS = {USE: "#2a7f3f", SMALLER: "#b8860b", DO_NOT_USE: "#b22222", CANNOT_TELL: "#555555"}
_MOST_POINTS, _MOST_BARS, _MOST_OUTPUTS = 2000, 20, 6


def draw(report: DerivativeReport, axes: Any = None) -> Any:
    """Draw the report into two axes, or a new figure; see `DerivativeReport.plot`."""
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        if error.name is not None and not error.name.startswith("matplotlib"):
            raise
        msg = 'DerivativeReport.plot needs matplotlib; install it with: pip install "gradwise[plot]"'
        raise ModuleNotFoundError(msg, name="matplotlib") from error
    if axes is None:
        figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained", width_ratios=(3, 2))
    else:
        figure = axes[0].figure
    _draw_differences(report, axes[0])
    _draw_importance(report, axes[1])
    return figure


def _draw_differences(report: DerivativeReport, axes: Any) -> None:
    n_outputs = report.actual.shape[1] if report.actual.size else 0
    for index in range(min(n_outputs, _MOST_OUTPUTS)):
        predicted, actual = report.predicted[:, index], report.actual[:, index]
        known = ~np.isnan(actual)
        size = float(np.std(actual[known])) or 1.0
        # A fixed draw: the same report gives the same picture.
        rows = np.flatnonzero(known)[:: max(1, int(known.sum()) // _MOST_POINTS)]
        label = f"output {index}" if n_outputs > 1 else "pairs of near samples"
        axes.plot(predicted[rows] / size, actual[rows] / size, ".", markersize=4, alpha=0.6, label=label)
    if n_outputs:
        limit = max(abs(bound) for bound in axes.get_ylim())
        axes.plot([-limit, limit], [-limit, limit], color="black", linewidth=1, label="all is well")
        axes.legend(loc="best", fontsize="small")
    axes.set_xlabel("difference predicted by the derivatives (std)")
    axes.set_ylabel("difference of the values (std)")
    kinds = dict.fromkeys(finding.kind for finding in report.findings if finding.kind != "input hardly matters")
    title = report.verdict + (": " + ", ".join(kinds) if kinds else "")
    axes.set_title(title, color=_COLORS[report.verdict], fontsize="medium")


def _draw_importance(report: DerivativeReport, axes: Any) -> None:
    shares = np.sqrt(np.mean([check.importance for check in report.outputs], axis=0))
    order = np.argsort(shares)[::-1][:_MOST_BARS]
    places = np.arange(len(order))
    axes.barh(places, 100 * shares[order], color="#4c72b0")
    axes.set_yticks(places, [f"input {column}" for column in order], fontsize="small")
    axes.invert_yaxis()
    axes.set_xlabel("share of the derivatives' size (%)")
    axes.set_title("how much each input matters", fontsize="medium")
