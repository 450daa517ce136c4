"""A progress bar for long fits, on request."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["progress"]


@contextmanager
def progress(n_steps: int, *, show: bool, label: str = "training") -> Iterator[Callable[[float], None] | None]:
    """Yield what to call with the loss after every step; None if nothing is to be shown.

    Raises
    ------
    ModuleNotFoundError
        If `show` and rich is not installed.
    """
    if not show:
        yield None
        return
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ModuleNotFoundError as error:
        msg = '`verbose=True` shows a progress bar, which needs rich; install it with: pip install "gradwise[plot]"'
        raise ModuleNotFoundError(msg, name="rich") from error
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3g}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bar:
        task = bar.add_task(label, total=n_steps, loss=float("nan"))
        yield lambda loss: bar.update(task, advance=1, loss=loss)
