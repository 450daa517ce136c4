"""A batch for every member: the whole one, or its share of the rows."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

from keras import tree

from gradwise_keras._backend import ops

__all__ = ["Share", "Shares"]


class Share(NamedTuple):
    """What one member sees."""

    data: Any
    size: Any
    """How much the member counts: 1, or its number of rows."""
    so_far: Any
    """The same of all members up to this one."""


class Shares:
    """How the batch goes to at most `members` members.

    Rows are shared out in order, sizes equal or one apart, large ones first. Where their number is known only in the
    graph, there may be fewer than members; those that get none see one, to have finite gradients, and count 0.

    Parameters
    ----------
    data : tree of tensors
        The batch.
    members : int
    sharded : bool
        Whether its rows are shared out.
    """

    def __init__(self, data: Any, members: int, *, sharded: bool) -> None:
        self._data, self._sharded = data, sharded
        self._rows = _rows(data) if sharded else members
        self.members = min(members, self._rows) if isinstance(self._rows, int) else members

    def first(self) -> Share:
        """What member 0 sees, which always has rows."""
        if not self._sharded:
            return Share(self._data, 1, 1)
        size = -(-self._rows // self.members)
        return Share(self._part(0, size), size, size)

    def alike(self) -> Iterator[tuple[int, int]]:
        """Ranges of the other members whose shares have one shape."""
        large = self._rows % self.members if isinstance(self._rows, int) else 0
        edges = [1, max(large, 1), self.members]
        return ((begin, end) for begin, end in pairwise(edges) if begin < end)

    def of(self, member: Any, begin: int) -> Share:
        """What a member after the first sees; it may be a tensor, in the range that begins with `begin`."""
        if not self._sharded:
            return Share(self._data, 1, member + 1)
        if isinstance(self._rows, int):
            size, large = divmod(self._rows, self.members)
            size += begin < large
            start = member * size + (0 if begin < large else large)
            return Share(self._part(start, size), size, start + size)
        size, large = self._rows // self.members, self._rows % self.members
        start, stop = (i * size + ops.minimum(i, large) for i in (member, member + 1))
        seen = ops.minimum(start, self._rows - 1)
        return Share(self._part(seen, ops.maximum(stop, seen + 1) - seen), stop - start, stop)

    def _part(self, start: Any, size: Any) -> Any:
        def rows_of(leaf: Any) -> Any:
            if leaf is None:
                return None
            if isinstance(start, int) or not isinstance(size, int):
                return leaf[start : start + size]
            return ops.slice(leaf, [start] + [0] * (len(leaf.shape) - 1), [size, *ops.shape(leaf)[1:]])

        return tree.map_structure(rows_of, self._data)


def _rows(data: Any) -> Any:
    lengths = [ops.shape(leaf)[0] for leaf in tree.flatten(data) if leaf is not None]
    known = {length for length in lengths if isinstance(length, int)}
    if len(known) > 1:
        msg = f"`sharded=True` needs batches whose arrays have equally many rows. Received: rows={sorted(known)}"
        raise ValueError(msg)
    return known.pop() if known else lengths[0]
