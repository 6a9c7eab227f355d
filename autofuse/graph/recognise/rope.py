"""Finds RoPE: rows whose columns are rotated in pairs, by angles that depend on the token.

PyTorch's arithmetic in any order (halves or neighbours, ``cat`` or ``stack``, negated halves, complex numbers) is read
column by column (``columns.py``); vLLM's operator is known by name. From there on, both are followed to where the
rotated rows are read: perhaps beside columns that were not rotated, perhaps from a buffer they were written back into.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.fx import Graph, Node

from autofuse.graph.blocks import Angles, Found, HeadRows, NearMiss, RopeBlock, RopeRead
from autofuse.graph.recognise.columns import Columns
from autofuse.graph.recognise.custom_ops import CustomCall, Written, custom_calls, layout_of
from autofuse.graph.recognise.nodes import concrete, dtype_of, is_call, same_sizes, shape
from autofuse.graph.recognise.readings import COLUMN, SIGN, SOURCE, Reading, plain_terms
from autofuse.graph.recognise.rotation import (
    FLOATS,
    KEEP_ORDER,
    RESHAPES,
    SIZE_ONE,
    OffError,
    Rotation,
    angles_of_table,
    find_rotations,
    held,
    is_table,
)

__all__ = ["find_ropes"]

aten = torch.ops.aten

_OPERATOR = "_C::rotary_embedding"  # vLLM's
_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default)
_SCATTERS = (aten.slice_scatter.default, aten.copy.default)
_ROTATED = "rotated"  # the key of a source


def find_ropes(graph: Graph) -> Found:
    """All RoPEs in a post-grad graph, partial ones and those on slices included, and what came close to being one."""
    columns = Columns()
    rotations, near_misses = find_rotations(graph, columns)
    calls = [call for call in custom_calls(graph) if call.name == _OPERATOR]
    columns.forget([*(rotation.core for rotation in rotations), *(call.node for call in calls)])
    followed: list[_Followed] = []
    for rotation in rotations:
        followed.append(_Followed(columns, rotation.core, [_rotated_by_arithmetic(columns, rotation)]))
    for call in calls:
        try:
            followed.append(_Followed(columns, call.node, _rotated_by_operator(columns, call)))
        except OffError as error:
            near_misses.append(NearMiss("RoPE", call.node, str(error)))
    blocks: list[RopeBlock] = []
    for each in followed:
        try:
            blocks += each.blocks()
        except OffError as error:
            near_misses.append(NearMiss("RoPE", each.at, str(error)))
    near_misses.sort(key=lambda miss: miss.node)
    return Found(tuple(sorted(blocks, key=lambda block: block.output)), tuple(near_misses))


# ---- rotated rows as sources of columns -----------------------------------------------------------------------------


@dataclass
class _Rotated:
    """Rotated rows, and where they are read.

    Attributes:
        at: the node that rotates.
        frame, heads_at, rows, width, is_neox, reordered, angles: as of a ``RopeBlock``, before the result is followed
            to where it is read; ``rows`` is its input.
        rotary: (first, number) of the rotated columns of a head.
        by_heads: the result, a source of columns whose rows are heads.
        folded: the result, a source whose rows are all heads of a token; None if ``rows`` has its heads apart.
        above: (source, column) of what is rotated, by heads.
        own: nodes that belong to the rotation.
        call: as of a ``RopeBlock``.
        reads: as of a ``RopeBlock``.
    """

    at: Node
    frame: tuple[Any, ...]
    heads_at: int | None
    rows: HeadRows
    width: int
    rotary: tuple[int, int]
    is_neox: bool
    reordered: bool
    angles: Angles
    by_heads: int
    folded: int | None
    above: tuple[int, int]
    own: tuple[Node, ...]
    call: tuple[Node, str] | None = None
    reads: list[RopeRead] = field(default_factory=list)

    def in_buffer(self) -> tuple[int, np.ndarray, np.ndarray]:
        """(the result as a source, which columns of ``rows`` it replaces, by which of its own)"""
        heads, within = np.arange(max(self.rows.heads, 1))[:, None], np.arange(self.width)
        at = heads * self.rows.stride + self.rows.first + within
        return self.folded or self.by_heads, at.ravel(), (heads * self.width + within).ravel()


def _rotated_by_arithmetic(columns: Columns, rotation: Rotation) -> _Rotated:
    frame = shape(rotation.core)[:-1]
    source = columns.source((_ROTATED, rotation.core.name), rotation.core, None, frame)
    rows = columns.plain(rotation.rows)
    assert rows is not None
    one = _Rotated(
        at=rotation.core,
        frame=frame,
        heads_at=None,
        rows=HeadRows(rotation.rows, rotation.first),
        width=rotation.width,
        rotary=(0, rotation.width),
        is_neox=rotation.is_neox,
        reordered=rotation.reordered,
        angles=rotation.angles,
        by_heads=source,
        folded=None,
        above=_one_source(rows, rotation.first, rotation.width),
        own=rotation.own,
    )
    terms = plain_terms(source, np.arange(rotation.width))
    columns.define(rotation.core, Reading(terms, len(frame), alone=source))
    return one


def _rotated_by_operator(columns: Columns, call: CustomCall) -> list[_Rotated]:
    """What a call of ``_C::rotary_embedding`` rotates: the query, and the key unless there is none."""
    args = call.args
    table, positions, width = args["cos_sin_cache"], args["positions"], args["head_size"]
    if args.get("inverse"):
        raise OffError("it rotates backwards")
    if not is_table(table) or dtype_of(positions) != torch.int64:
        raise OffError(f"its table {table} or its positions {positions} are of another kind")
    size, offset = concrete(shape(table)[1]), args.get("rope_dim_offset") or 0
    if size is None or not isinstance(width, int) or offset + size > width:
        raise OffError(f"its heads have {width} columns, of which {size} are rotated from {offset} on")
    found: dict[Node, list[_Rotated]] = {}
    for name, written in call.written.items():
        if written is not None and written.item is not None:
            one = _argument(columns, call, name, written, size)
            one.rotary = (offset, size)
            found.setdefault(written.item, []).append(one)
    for item, parts in found.items():
        before = columns.plain(parts[0].rows.node)
        assert before is not None
        terms = before.terms.copy()
        for one in parts:
            source, at, held = one.in_buffer()
            terms[at] = plain_terms(source, held)
        columns.define(item, Reading(terms, before.lead))
    return [one for parts in found.values() for one in parts]


def _argument(columns: Columns, call: CustomCall, name: str, written: Written, rotary_dim: int) -> _Rotated:
    """An argument [..., heads · width] or [..., heads, width], for positions [...], that may be a part of a buffer."""
    positions, width, buffer = call.args["positions"], call.args["head_size"], written.before
    rows, whole, part = columns.plain(buffer), layout_of(buffer), written.layout or layout_of(buffer)
    assert whole is not None
    assert part is not None
    off = OffError(
        f"its {name}, {list(part[0])} in {buffer} {list(whole[0])}, is no heads of {width} for each position"
    )
    lead, tokens = len(whole[0]) - 1, len(shape(positions))
    shift = concrete(part[2] - whole[2])
    inner, steps = ([concrete(size) for size in sizes[lead:]] for sizes in part[:2])
    if rows is None or len(rows.dims) != 1 or shift is None or None in inner or None in steps:
        raise off
    if not all(same_sizes(a[:lead], b[:lead]) for a, b in zip(whole[:2], part[:2], strict=True)):
        raise off
    if not same_sizes(shape(positions), part[0][:tokens]) or not inner or steps[-1] != 1:
        raise off
    last = inner[-1] or 0
    if lead == tokens + 1 and inner == [width]:
        heads, stride, frame = 0, 0, part[0][:lead]
    elif lead == tokens and len(inner) == 1 and last and last % width == 0:
        heads, stride, frame = last // width, width, (*part[0][:lead], last // width)
    elif lead == tokens and len(inner) == 2 and last == width:
        heads, stride, frame = inner[0] or 0, steps[0] or 0, (*part[0][:lead], inner[0])
    else:
        raise off
    at = (shift + np.arange(max(heads, 1))[:, None] * stride + np.arange(width)).ravel()
    if at[0] < 0 or at[-1] >= rows.dims[0]:
        raise off
    before: Reading | None = Reading(rows.terms[at], rows.lead)
    folded = None
    source = columns.source((_ROTATED, call.node.name, name), buffer, None, shape(buffer)[:-1])
    if heads:
        assert before is not None
        folded, before = source, columns.heads(buffer, before, heads)
        source = columns.source(("heads", heads, width if heads > 1 else 0), buffer, folded, frame)
    if before is None:
        raise off
    return _Rotated(
        at=call.node,
        frame=tuple(frame),
        heads_at=len(frame) - 1,
        rows=HeadRows(buffer, shift, heads, stride),
        width=width,
        rotary=(0, width),
        is_neox=call.args["is_neox"],
        reordered=False,
        angles=angles_of_table(call.args["cos_sin_cache"], positions, rotary_dim // 2, (*shape(positions), 1)),
        by_heads=source,
        folded=folded,
        above=_one_source(before, 0, width),
        own=(call.node, *call.node.users),
        call=(call.node, name),
    )


def _one_source(reading: Reading, first: int, width: int) -> tuple[int, int]:
    """(the source, its first column) of ``width`` columns that are one piece of it."""
    terms = reading.terms[first : first + width, 0]
    source, column = int(terms[0, SOURCE]), int(terms[0, COLUMN])
    if (terms[:, SOURCE] != source).any() or (terms[:, COLUMN] != column + np.arange(width)).any():
        raise OffError("the rows that it rotates are put together from several tensors")
    return source, column


# ---- following them to where they are read --------------------------------------------------------------------------


class _Followed:
    """The rotated rows of one rotation, or of one call, on their way to their readers."""

    def __init__(self, columns: Columns, at: Node, rotated: list[_Rotated]) -> None:
        self.at = at
        self._columns = columns
        self._rotated = rotated
        self._seen: set[Node] = set()
        self._spared: list[Node] = []

    def blocks(self) -> list[RopeBlock]:
        """One for each rotated argument that is read. Raises OffError."""
        starts = [self.at] if self.at is self._rotated[0].own[-1] else [n for n in self._rotated[0].own if n != self.at]
        todo = starts
        while todo:
            node = todo.pop()
            if node not in self._seen:
                self._seen.add(node)
                todo += self._visit(node)
        spared = tuple((node, self._elsewhere(node)) for node in self._spared)
        blocks = [self._block(one) for one in self._rotated if one.reads]
        return [replace(block, spared=spared) if index == 0 else block for index, block in enumerate(blocks)]

    def _visit(self, node: Node) -> list[Node]:
        """Notes what ``node`` holds, and returns which of its readers are to be visited."""
        one, read = self._held_by(node)
        if one is None and read is None and self._holds_nothing_rotated(node):
            self._spared.append(node)
            return []
        if one is None or read is None:
            # A buffer that the rows were written into: what is cut out of it counts.
            onward = []
            for user in node.users:
                if not (_cuts(user, node) or is_call(user, *SIZE_ONE, *RESHAPES, aten.slice_scatter.default)):
                    what = "is an output of the graph" if user.op == "output" else f"is read by {user}"
                    raise OffError(f"{node}, a buffer with rotated rows and others, {what}")
                onward += _through(user)
            return onward
        if read.width > one.width and all(_cuts(user, node) for user in node.users):
            return [further for user in node.users for further in _through(user)]
        onward = [user for user in node.users if self._goes_on(user, node)]
        if len(onward) < len(node.users):
            one.reads.append(read)
        return onward

    def _goes_on(self, user: Node, node: Node) -> bool:
        """Whether rotated rows are written back by ``user``, or put beside columns that were not rotated."""
        if _scatters(user, node):
            return True
        if is_call(user, aten.cat.default):
            parts: Any = user.args[0]
            return not any(map(self._columns.is_new, parts)) and self._held_by(user)[0] is not None
        return is_call(user, *SIZE_ONE, *RESHAPES) and any(
            _scatters(further, user) or self._goes_on(further, user) for further in user.users
        )

    def _held_by(self, node: Node) -> tuple[_Rotated | None, RopeRead | None]:
        """Whose rotated rows ``node`` holds, whole, perhaps beside columns of what was rotated."""
        reading = self._columns.read(node)
        if reading is None or len(reading.dims) != 1 or not reading.is_plain or reading.is_complex:
            return None, None
        terms = reading.terms[:, 0]
        if (terms[:, SIGN] != 1).any():
            return None, None
        for one in self._rotated:
            for source in np.unique(terms[:, SOURCE]).tolist():
                read = self._of(one, node, terms, source)
                if read is not None:
                    return one, read
        return None, None

    def _of(self, one: _Rotated, node: Node, terms: np.ndarray, source: int) -> RopeRead | None:
        ids = self._columns.chain_ids(source)
        for result, width, folded in ((one.by_heads, one.width, False), (one.folded, one.width * one.rows.heads, True)):
            if result is None or result not in ids:
                continue
            views = [self._columns.sources[i].key for i in ids[: ids.index(result)]]
            if any(view[0] not in KEEP_ORDER for view in views):
                return None
            at = np.flatnonzero(terms[:, SOURCE] == source)
            if len(at) != width or (terms[at, COLUMN] != np.arange(width)).any() or at[-1] - at[0] + 1 != width:
                return None
            others = np.delete(np.arange(len(terms)), at)
            if others.size:
                beside = self._columns.after(one.above[0], views)
                straight = terms[others, COLUMN] == one.above[1] + others - at[0]
                if folded or (terms[others, SOURCE] != beside).any() or not straight.all():
                    return None
            return RopeRead(node, -int(at[0]), len(terms), folded)
        return None

    def _holds_nothing_rotated(self, node: Node) -> bool:
        reading = self._columns.read(node)
        if reading is None or len(reading.dims) != 1 or not reading.is_plain:
            return False
        for source in np.unique(reading.terms[..., SOURCE]).tolist():
            bottom = self._columns.chain(source)[-1]
            if bottom.key[0] == _ROTATED or bottom.node in self._seen:
                return False
        return True

    def _elsewhere(self, node: Node) -> HeadRows:
        """Where the rows of ``node`` are to be had before the rotation."""
        reading = self._columns.read(node)
        assert reading is not None
        return self._held_before(*_one_source(reading, 0, reading.dims[0]), reading.dims[0])

    def _held_before(self, source: int, first: int, width: int) -> HeadRows:
        """Where columns of a source are, before the rotation: in rows of their own, or in rows of several heads."""
        found = self._columns.sources[source]
        rows = held(found, first, width, before=self.at)
        if rows is not None:
            return HeadRows(*rows)
        if found.key[0] == "heads" and found.above is not None:
            _, heads, stride = found.key
            assert isinstance(heads, int)
            assert isinstance(stride, int)
            row = held(self._columns.sources[found.above], first, (heads - 1) * stride + width, before=self.at)
            if row is not None:
                return HeadRows(*row, heads, stride)
        raise OffError(f"no node before it holds columns {first} to {first + width} of {found.node}")

    def _block(self, one: _Rotated) -> RopeBlock:
        low = min(read.first for read in one.reads)
        high = max(read.first + (one.width if read.folded else read.width) for read in one.reads)
        rows = replace(one.rows, first=one.rows.first + low)
        if not rows.heads:
            rows = self._held_before(one.above[0], one.above[1] + low, high - low)
        others = {read.node for other in self._rotated if other is not one for read in other.reads}
        reads = tuple(sorted((replace(read, first=read.first - low) for read in one.reads), key=lambda r: r.node))
        return RopeBlock(
            output=reads[0].node,
            nodes=tuple(sorted({*one.own, *self._seen, *(read.node for read in reads)} - others)),
            frame=one.frame,
            heads_at=one.heads_at,
            input=rows,
            width=high - low,
            rotary_first=one.rotary[0] - low,
            rotary_dim=one.rotary[1],
            is_neox=one.is_neox,
            reordered=one.reordered,
            dtype=_dtype(rows.node),
            angles=one.angles,
            reads=reads,
            call=one.call,
        )


def _cuts(user: Node, node: Node) -> bool:
    """Whether ``user`` takes some columns of ``node``, or writes them into a buffer."""
    if is_call(user, aten.slice.Tensor, *_SPLITS):
        place = 1 if is_call(user, aten.slice.Tensor) else 2
        dim = user.args[place] if len(user.args) > place else user.kwargs.get("dim", 0)
        return dim in (-1, len(shape(node)) - 1)
    if is_call(user, *RESHAPES):
        before, after = concrete(shape(node)[-1]), concrete(shape(user)[-1])
        if before is not None and after is not None and after < before:
            return True  # into heads
        return bool(user.users) and all(
            is_call(further, *RESHAPES) and same_sizes(shape(further), shape(node)) for further in user.users
        )
    return _scatters(user, node)


def _scatters(user: Node, node: Node) -> bool:
    return is_call(user, *_SCATTERS) and user.args[1] is node and user.args[0] is not node


def _through(user: Node) -> list[Node]:
    return list(user.users) if is_call(user, *_SPLITS) else [user]


def _dtype(node: Node) -> torch.dtype:
    dtype = dtype_of(node)
    if dtype not in FLOATS:
        raise OffError(f"its rows {node} are {dtype}")
    assert dtype is not None
    return dtype
