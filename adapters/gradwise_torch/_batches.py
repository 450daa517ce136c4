"""Batches as pytrees: which of their leaves are rows, and how those are shared out to members."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["Batch"]


@dataclass(frozen=True)
class Batch:
    """The arguments of a loss function: leaves, and the tree they belong to.

    Attributes
    ----------
    leaves : list
        In the order of the tree.
    tree : TreeSpec
        Of ``(args, kwargs)``.
    """

    leaves: list[Any]
    tree: Any

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Batch":
        """The batch made of positional and keyword arguments."""
        return cls(*pytree.tree_flatten((args, kwargs)))

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The positional and keyword arguments again."""
        return pytree.tree_unflatten(self.leaves, self.tree)

    def rows(self) -> int:
        """Length of the first axis, which all arrays with at least one axis must share; 0 if there are none."""
        lengths = {len(leaf) for leaf in self.leaves if _has_rows(leaf)}
        if len(lengths) > 1:
            shapes = [tuple(leaf.shape) for leaf in self.leaves if _has_rows(leaf)]
            msg = (
                f"`batch` must have the same first axis in all tensors to be sharded; got shapes {shapes}. Bind what "
                "is not a batch with functools.partial(loss_fn, ...)"
            )
            raise ValueError(msg)
        return lengths.pop() if lengths else 0

    def length(self) -> int:
        """Length of the first axis of the first array, whatever the others have; 0 if there is none."""
        return next((len(leaf) for leaf in self.leaves if _has_rows(leaf)), 0)

    def shards(self, members: int) -> list["Batch"]:
        """At most `members` parts of the rows, each with one at least, sizes equal or one apart (large ones first)."""
        rows = self.rows()
        args, kwargs = self.arguments()
        if rows > 1 and any(_is_list_of(rows, node) for node in _containers((args, kwargs))):
            msg = (
                f"`batch` holds a list of {rows} things that are not tensors, as many as there are rows, and lists are "
                "not shared out. Pass tensors, or split the batch yourself and use `with optimizer.member(i):`"
            )
            raise TypeError(msg)
        for leaf in self.leaves:
            if not (_has_rows(leaf) or _is_shared(leaf)):
                msg = (
                    f"`batch` must consist of tensors to be sharded; got a {type(leaf).__name__}, whose rows are not "
                    "known. Pass its tensors (a dict of them will do), or sharded=False"
                )
                raise TypeError(msg)
        if not rows:
            msg = "`batch` must hold at least one tensor with rows to be sharded; got none"
            raise ValueError(msg)
        members = min(members, rows)
        starts = [member * (rows // members) + min(member, rows % members) for member in range(members + 1)]
        return [
            Batch([leaf[a:b] if _has_rows(leaf) else leaf for leaf in self.leaves], self.tree)
            for a, b in pairwise(starts)
        ]


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, Tensor | np.ndarray) and leaf.ndim > 0


def _is_shared(leaf: Any) -> bool:
    """What every member gets whole: settings, generators, teachers."""
    kinds = (Tensor, np.ndarray, np.generic, str, bytes, bool, int, float, complex, type(None), nn.Module)
    functions = (FunctionType, BuiltinFunctionType, MethodType, partial, type)
    return isinstance(leaf, (*kinds, *functions, torch.dtype, torch.device, torch.Generator))


def _containers(tree: Any) -> Iterator[Any]:
    """All lists and tuples of a tree, whatever depth."""
    if isinstance(tree, list | tuple):
        yield tree
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    for child in children:
        yield from _containers(child)


def _is_list_of(rows: int, node: Any) -> bool:
    return isinstance(node, list) and len(node) == rows and not any(_has_rows(x) or _children(x) for x in node)


def _children(node: Any) -> bool:
    return isinstance(node, list | tuple | dict)
