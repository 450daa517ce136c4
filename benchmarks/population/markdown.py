"""Markdown of the population study: sections, tables, effects as text."""

from collections.abc import Iterable, Sequence

from population.inference import Effect, effect

__all__ = ["both_ends", "section", "shown", "table"]

DIGITS = {"log_loss": 3, "scaled_log_loss": 3, "mse": 4, "cosine": 3}  # of an endpoint; all others are points


def section(title: str, *parts: str) -> str:
    """A heading and what is below it."""
    return "\n\n".join([f"## {title}", *filter(None, parts)])


def shown(found: Effect | Sequence[float] | None, endpoint: str = "f1") -> str:
    """Mean and half-width of the interval, bold where it leaves out zero; nothing if there are no two values."""
    if not isinstance(found, Effect):
        found = effect(found) if found is not None and len(found) > 1 else None
    if found is None or found.pairs < 2:
        return ""
    digits = DIGITS.get(endpoint, 2)
    mean = round(found.mean, digits) + 0.0  # not -0.00
    text = f"{mean:+.{digits}f} ± {found.half_width:.{digits}f}"
    return f"**{text}**" if found.is_clear else text


def both_ends(found: Effect) -> str:
    """Mean and interval, bold where it leaves out zero."""
    return f"**{found}**" if found.is_clear else str(found)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Of text; the first column is the one of names."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
