"""What `check_derivatives` says of wrong signs, wrong units and noise, and what to do about them."""

import numpy as np

from gradwise._check_derivatives_pairs import Estimate
from gradwise._derivative_report import Finding

_FACTORS = {
    180 / np.pi: "degrees in a radian",
    1000.0: "kilo",
    1e6: "mega",
    100.0: "percent or centi",
    10.0: "a power of ten",
    2 * np.pi: "2 pi",
    2.54: "centimetres in an inch",
    3.28084: "feet in a metre",
    3.6: "km/h in a m/s",
    4.184: "joules in a calorie",
    27.2114: "electronvolts in a hartree",
    1.889726: "bohr in an angstrom",
    51.422: "eV/angstrom in a hartree/bohr",
}


def factor_finding(
    slope: Estimate, *, wrong_units: bool, factor: float, column: int | None, output: int | None
) -> Finding:
    """Derivatives that must be multiplied by `slope`, of one column or of all."""
    where = "dydx" if column is None else f"dydx[..., {column}]"
    kind = " and ".join(["wrong sign"] * (slope.value < 0) + ["wrong units"] * wrong_units)
    sign = "-" if slope.value < 0 else ""
    if not wrong_units:
        return Finding(
            "wrong sign",
            f"values fall where {where} says that they rise",
            f"change the sign: {where} *= -1",
            output=output,
            input=column,
        )
    size = max(factor, 1 / factor)
    nearest = min(_FACTORS, key=lambda known: abs(np.log(size / known)))
    close = abs(size / nearest - 1) < min(0.08, 3 * slope.error / factor + 0.02)
    hint = f" (near {nearest:.4g}: {_FACTORS[nearest]})" if close else ""
    act = f"*= {sign}{factor:.4g}" if factor > 1 else f"/= {sign}{1 / factor:.4g}"
    too = "small" if factor > 1 else "large"
    return Finding(
        kind,
        f"{where} is too {too} by a factor of {size:.4g}{hint}" + (", with the wrong sign" if sign else ""),
        f"check the units of both y and x, then for example {where} {act}",
        output=output,
        input=column,
    )


def noise_finding(noise: float, hopeless: bool, output: int | None) -> Finding:
    """Derivatives with this relative noise."""
    what = f"derivatives scatter by about {100 * noise:.0f} % of their size more than the values allow"
    return Finding(
        "hopeless noise" if hopeless else "noise",
        f"{what}: noise, rows that are mixed up, or variation that is finer than the distances between samples",
        "do without them, or average or smooth them"
        if hopeless
        else f"use derivative_weight={suggested_weight(noise):.2g}, or a robust loss",
        output=output,
    )


def suggested_weight(noise: float) -> float:
    """Weight of derivatives with this relative noise: ``1 / (1 + (noise / 0.03)**2)``.

    The inverse of a variance; 0.03 is where measured optima lie, see `docs/check_derivatives.md`.
    """
    return 1 / (1 + (noise / 0.03) ** 2)
