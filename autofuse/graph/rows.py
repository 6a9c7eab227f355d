"""Where the rows of a block's input come from: which columns of which tensor, made by which linear."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from autofuse.graph.fakes import fake_mode_of, on_layouts
from autofuse.graph.recognise.nodes import concrete, is_call, is_getitem, is_view, shape, tensor

__all__ = ["Linear", "Rows", "is_stored", "linear_of", "matrix_of", "rows_of", "splits_into_heads", "viewable_as_rows"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Rows:
    """Columns ``[offset, offset + width)`` of ``base``, all its leading dimensions being tokens.

    Attributes:
        base: the first node upwards that is no view.
        views: the views between ``base`` and the block, in graph order.
    """

    base: Node
    offset: int
    width: int
    views: tuple[Node, ...]

    def __str__(self) -> str:
        return f"columns {self.offset} to {self.offset + self.width} of {self.base}"

    @property
    def base_width(self) -> int | None:
        return concrete(shape(self.base)[-1])

    @property
    def whole(self) -> bool:
        return self.offset == 0 and self.width == self.base_width


@dataclass(frozen=True)
class Linear:
    """A matrix product of activations with a weight: its node, and the node of the activations without their views."""

    node: Node
    activations: Node


def rows_of(node: Node) -> Rows | None:
    """Follows reshapes, splits and slices of the last dimension upwards. None if the width is not known."""
    width = concrete(shape(node)[-1]) if shape(node) else None
    if width is None:
        return None
    offset = 0
    views: list[Node] = []
    while True:
        step = _above(node)
        if step is None:
            return Rows(node, offset, width, tuple(reversed(views)))
        above, passed, shift = step
        views += passed
        offset += shift
        node = above


def _above(node: Any) -> tuple[Node, list[Node], int] | None:
    """(the node above a view, the views passed, by how many columns it shifts); None at the end."""
    if is_view(node):
        return node.args[0], [node], 0
    if is_getitem(node):
        split, index = node.args
        offset = _split_offset(split, index)
        return None if offset is None else (split.args[0], [node, split], offset)
    if is_call(node, aten.slice.Tensor) and not node.kwargs:
        base, dim, start, _, step = _with_defaults(node, (None, 0, 0, None, 1))
        width = concrete(shape(base)[-1])
        start = 0 if start is None else start
        if width is None or step != 1 or not isinstance(start, int) or dim not in (-1, len(shape(base)) - 1):
            return None
        return base, [node], min(start if start >= 0 else max(width + start, 0), width)
    return None


def _with_defaults(node: Node, defaults: tuple[Any, ...]) -> tuple[Any, ...]:
    """The positional arguments of ``node``, those that it leaves out included."""
    return (*node.args, *defaults[len(node.args) :])


def _split_offset(split: Any, index: Any) -> int | None:
    """The first column of part ``index`` if ``split`` splits the last dimension into parts of known width."""
    if not is_call(split, aten.split_with_sizes.default, aten.split.Tensor):
        return None
    base, sizes, dim = _with_defaults(split, (None, None, split.kwargs.get("dim", 0)))
    if dim not in (-1, len(shape(base)) - 1):
        return None
    if isinstance(sizes, int):
        return sizes * index
    before = sizes[:index]
    return sum(before) if all(isinstance(size, int) for size in before) else None


_LINEARS: dict[Any, int] = {
    aten.mm.default: 0,
    aten.addmm.default: 1,
    aten.linear.default: 0,
    aten._scaled_mm.default: 0,
}
"""Which argument is the activations."""


def linear_of(base: Node) -> Linear | None:
    """The linear that computes ``base``, or None."""
    activations = _LINEARS.get(base.target) if base.op == "call_function" else None
    node: Any = None if activations is None else base.args[activations]
    if not isinstance(node, Node):
        return None
    while is_view(node):
        node = node.args[0]
    return Linear(base, node)


def is_stored(base: Node) -> bool:
    """Whether Inductor has ``base`` in memory anyway: an input, or what an operator computes that it calls as it is.

    All else it would compute within the kernel that reads it; taking that reader away would cost what it saves.
    """
    if base.op in ("placeholder", "get_attr") or linear_of(base) is not None or is_call(base, aten.bmm.default):
        return True
    made: Any = base.args[0] if is_getitem(base) else base
    target = made.target
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace not in ("aten", "prims")
    return isinstance(target, torch._ops.HigherOrderOperator)


def splits_into_heads(output: Node, but: Collection[Node] = ()) -> Node | None:
    """The first reshape that cuts the rows of ``output`` into pieces, as attention heads do; None if there is none.

    Args:
        but: nodes that cut rows for another reason.
    """
    todo = [output]
    while todo:
        node = todo.pop()
        for user in node.users:
            if user in but:
                continue
            if is_view(user):
                todo.append(user)
            elif is_call(user, aten.reshape.default, aten.view.default) and user.args[0] is node:
                before, after = concrete(shape(node)[-1]), concrete(shape(user)[-1])
                if before is not None and after is not None and after < before:
                    return user
    return None


def matrix_of(rows: Rows) -> torch.Tensor:
    """The layout of the rows as [T, width], as ``on_layouts`` says, a strided view of their base. The base is
    ``viewable_as_rows``.
    """
    value = tensor(rows.base)
    assert value is not None
    with on_layouts(value):
        matrix = value.view(-1, value.shape[-1])
        return matrix if rows.whole else matrix.narrow(1, rows.offset, rows.width)


def viewable_as_rows(base: Node) -> str | None:
    """Why ``base`` cannot be seen as [T, N] with contiguous rows without a copy; None if it can."""
    value = tensor(base)
    if value is None:
        return f"{base} is no tensor"
    if fake_mode_of([value]) is None:
        return f"{base} has no fake tensor"
    with on_layouts(value):
        if concrete(value.stride()[-1]) != 1:
            return f"the last dimension of {base} is not contiguous"
        try:
            value.view(-1, value.shape[-1])
        except (RuntimeError, ValueError):
            return f"{base} cannot be seen as rows without a copy"
    return None
