"""A batch for every member: the whole one, or its share of the rows."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from keras import ops, tree

__all__ = ["Share", "shares"]


class Share(NamedTuple):
    """What one member sees."""

    data: Any
    size: Any
    """How much the member counts: 1, or its number of rows."""
    fraction: Any
    """`size` as a part of the sizes so far."""

    @property
    def empty(self) -> Any:
        """Whether there are fewer rows than members and this one gets none (but sees one, to have finite gradients)."""
        return False if isinstance(self.size, int) else self.size == 0


def shares(data: Any, members: int, *, sharded: bool) -> Iterator[Share]:
    """The batch for each of at most `members` members; the first one's fraction is the number 1.

    Rows are shared out in order, sizes equal or one apart, large ones first.
    """
    if not sharded:
        for member in range(members):
            yield Share(data, 1, 1 / (member + 1))
        return
    rows = _rows(data)
    if isinstance(rows, int):
        members = min(members, rows)
    for member in range(members):
        # Rounded up, so that the first member always has rows, also where their number is known only in the graph.
        begin, end = (-(-rows * i // members) for i in (member, member + 1))
        size = end - begin
        if not isinstance(rows, int):
            begin, end = ops.minimum(begin, rows - 1), ops.maximum(end, ops.minimum(begin, rows - 1) + 1)
        part = tree.map_structure(lambda leaf, b=begin, e=end: None if leaf is None else leaf[b:e], data)
        yield Share(part, size, 1 if member == 0 else size / end)


def _rows(data: Any) -> Any:
    lengths = [ops.shape(leaf)[0] for leaf in tree.flatten(data) if leaf is not None]
    known = {length for length in lengths if isinstance(length, int)}
    if len(known) > 1:
        msg = f"`sharded=True` needs batches whose arrays have equally many rows. Received: rows={sorted(known)}"
        raise ValueError(msg)
    return known.pop() if known else lengths[0]
