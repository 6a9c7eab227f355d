"""What the fused ops with RoPE and KV caches take: rows of heads, angles, slots and caches, made of what a graph has.

Heads are [T, H, D], views wherever a graph keeps them; a token is one of all tokens of the batch. Tables of angles,
positions and slots are small: they are made once for all sites that have the same.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import TracebackType
from typing import Any

import torch
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2
from torch.fx import Graph, Node

from autofuse.graph.blocks import Angles, CacheWriteBlock, HeadRows, RopeBlock, RopeRead, Slots
from autofuse.graph.fakes import fake_mode_of, on_layouts
from autofuse.graph.moves import RefusedError, nodes_to_hoist
from autofuse.graph.recognise.nodes import concrete, dtype_of, product, same_size, shape, tensor
from autofuse.graph.rewrite import Replacement

__all__ = [
    "CacheArgument",
    "HeadSource",
    "SharedValues",
    "angle_nodes",
    "call_writing",
    "head_positions",
    "hoisted_first",
    "replace_rope",
    "replace_spared",
    "slot_nodes",
    "slots_of",
    "table_dtype",
    "table_of",
    "to_read",
]

aten = torch.ops.aten
prims = torch.ops.prims

Call = Callable[..., Any]
"""``Replacement.call``, or the same on tensors, where a copy is an error."""


@dataclass(frozen=True)
class HeadSource:
    """Rows that become [T, H, width].

    Attributes:
        rows: where they are.
        frame: their dimensions but the last, the heads among them.
        tokens_at: which of these are tokens, in the order in which T counts them.
        heads_at: which are the heads; None if each token has one.
        views: what is applied to ``rows.node`` first.
    """

    rows: HeadRows
    frame: tuple[Any, ...]
    tokens_at: tuple[int, ...]
    heads_at: int | None
    width: int
    views: tuple[Node, ...] = ()
    _fakes: dict[bool, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def heads(self) -> int:
        """H. Raises RefusedError if it is not known while compiling."""
        heads = 1 if self.heads_at is None else concrete(self.frame[self.heads_at])
        if heads is None:
            raise RefusedError(f"the number of heads, {self.frame}, is not known while compiling")
        return heads

    @property
    def tokens(self) -> tuple[Any, ...]:
        return tuple(self.frame[dim] for dim in self.tokens_at)

    def columns(self, first: int, width: int) -> HeadSource:
        """Some columns of each head."""
        rows = HeadRows(self.rows.node, self.rows.first + first, self.rows.heads, self.rows.stride)
        return HeadSource(rows, self.frame, self.tokens_at, self.heads_at, width, self.views)

    def build(self, call: Call, node: Any, flat: bool = False) -> Any:
        """[T, H, width] of what ``rows.node`` is; ``flat``: [T, width], where H is 1."""
        dims = 2 if flat else 3
        for view in self.views:
            node = call(view.target, node, *view.args[1:])
        rows = self.rows
        last = concrete(_sizes(node)[-1])
        assert last is not None
        begin = rows.first
        if rows.heads:
            if len(_sizes(node)) != 2:
                node = call(aten.reshape.default, node, [-1, last])
            whole = rows.heads * rows.stride
            # The last head's row may reach beyond the end: then the rows begin where the first head's does.
            start = begin if begin + whole <= last else begin - begin % rows.stride
            if start + whole > last:
                raise RefusedError(f"{rows.heads} heads of {rows.stride} columns do not lie in {rows.node}")
            if (start, whole) != (0, last):
                node = call(aten.slice.Tensor, node, 1, start, start + whole)
            begin, last = begin - start, rows.stride
            if not flat:
                node = call(aten.reshape.default, node, [-1, rows.heads, last])
        else:
            for _ in range(len(self.frame) + 1 - len(_sizes(node))):
                node = call(aten.unsqueeze.default, node, 0)
            order = [*self.tokens_at, *([] if self.heads_at is None else [self.heads_at]), len(self.frame)]
            if order != sorted(order):
                node = call(aten.permute.default, node, order)
            if len(order) != dims or (self.heads_at is None and not flat):
                node = call(aten.reshape.default, node, [-1, last] if flat else [-1, self.heads, last])
        if (begin, self.width) != (0, last):
            node = call(aten.slice.Tensor, node, dims - 1, begin, begin + self.width)
        return node

    def fake(self, flat: bool = False) -> torch.Tensor:
        """The layout of what is built, as ``on_layouts`` says. Raises RefusedError if that would be a copy."""
        if flat not in self._fakes:
            value = tensor(self.rows.node)
            self._fakes[flat] = _without_copy(
                lambda call: self.build(call, value, flat),
                [value, *map(tensor, self.views)],
                f"{self.rows.node} cannot be seen as heads",
            )
        return self._fakes[flat]


def _without_copy(function: Callable[[Call], Any], values: Sequence[Any], what: str) -> Any:
    """The layout of the result of ``function(call)``, whose calls copy nothing. Raises RefusedError.

    Args:
        values: tensors and sizes that the calls are made with.
    """
    if fake_mode_of(values) is None:
        raise RefusedError(f"{what}: it has no fake tensor")

    def call(target: Any, *args: Any, **kwargs: Any) -> Any:
        if target is aten.reshape.default:
            target = aten.view.default
        args, kwargs = torch.fx.map_arg((args, kwargs), lambda arg: arg.meta["val"])
        return target(*args, **kwargs)

    with on_layouts(*values):
        try:
            return function(call)
        except (RuntimeError, ValueError):
            raise RefusedError(f"{what} without a copy") from None


def _sizes(value: Any) -> tuple[Any, ...]:
    return shape(value) if isinstance(value, Node) else tuple(value.shape)


def to_read(new: Replacement, result: Node, read: RopeRead, source: HeadSource, offset: int = 0) -> Node:
    """A fused op's result [T, H, D] as ``read`` has it: its columns, counted from ``offset``, in its dimensions."""
    first, width = read.first + offset, read.width
    node, sized = read.node, source.rows.node
    if read.folded:
        return new.reshape_like(result, node, sized)
    if (first, width) != (0, shape(result)[-1]):
        result = new.call(aten.slice.Tensor, result, 2, first, first + width)
    order = [*source.tokens_at, *([] if source.heads_at is None else [source.heads_at]), len(source.frame)]
    if order != sorted(order):
        sizes = [*source.tokens, *([] if source.heads_at is None else [source.heads]), width]
        result = new.reshape(result, sizes, sized)
        result = new.call(aten.permute.default, result, [order.index(dim) for dim in range(len(order))])
    return new.reshape_like(result, node, sized)


def replace_rope(new: Replacement, block: RopeBlock, source: HeadSource, result: Node) -> list[tuple[Node, Node]]:
    """(each read of a rotation, what takes its place)"""
    return [(read.node, to_read(new, result, read, source)) for read in block.reads]


def replace_spared(new: Replacement, block: RopeBlock) -> list[tuple[Node, Node]]:
    """(each node that reads what a rotation left as it was, what takes its place)"""
    pairs = []
    for node, where in block.spared:
        sizes, width = shape(node), concrete(shape(node)[-1])
        assert width is not None
        result, last = where.node, len(shape(where.node)) - 1
        if where.heads:
            lead = tuple(range(len(sizes) - 2))
            result = HeadSource(where, sizes[:-1], lead, len(sizes) - 2, width).build(new.call, where.node)
        elif (where.first, width) != (0, concrete(shape(where.node)[-1])):
            result = new.call(aten.slice.Tensor, where.node, last, where.first, where.first + width)
        pairs.append((node, new.reshape_like(result, node, where.node)))
    return pairs


def hoisted_first(spared: Replacement, hoist: Sequence[Node], first: Node) -> tuple[Node, ...]:
    """Of ``hoist``, what the new nodes of ``replace_spared`` read, and so must come before them. The rest comes after:
    some of it reads what they replace. Raises RefusedError.
    """
    early = nodes_to_hoist(spared.inputs, before=first)
    if not {*early} <= {*hoist}:
        raise RefusedError("what a rotation leaves as it was is computed after what it is needed for")
    return early


# ---- small values that sites share ----------------------------------------------------------------------------------


class SharedValues:
    """Values that several sites of a graph need, each made once, as early as may be.

    Leaving the ``with`` block by an exception removes what was made in it.
    """

    def __init__(self, graph: Graph, new: Replacement, before: Node) -> None:
        self._graph = graph
        self._new = new
        self._before = before
        self._made: list[tuple[Replacement, dict[Hashable, Node], Hashable]] = []
        self._later: list[Node] = []

    def __enter__(self) -> SharedValues:
        return self

    def __exit__(
        self, error: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            return
        for replacement, known, key in reversed(self._made):
            replacement.__exit__(error, value, trace)
            del known[key]

    def with_later(self, hoist: Sequence[Node]) -> tuple[Node, ...]:
        """``hoist``, and what must also move up: values that were made for sites further down. Raises RefusedError."""
        return tuple(sorted({*hoist, *nodes_to_hoist(self._later, before=self._before)}))

    def get(self, key: Hashable, inputs: Sequence[Node], build: Callable[[Replacement], Node]) -> Node:
        """The value ``build`` makes of ``inputs``, for all who ask with this key and these inputs."""
        last = max(inputs)
        known: dict[Hashable, Node] = last.meta.setdefault("autofuse_shared", {})
        if key in known:
            self._later += [] if known[key] < self._before else [known[key]]
        elif not last < self._before:
            return build(self._new)  # what it is made of must be moved first
        else:
            place = last.next
            while place.op in ("placeholder", "get_attr"):
                place = place.next
            early = Replacement(self._graph, before=place, like=last)
            with early:
                known[key] = build(early)
            self._made.append((early, known, key))
        return known[key]


# ---- angles ---------------------------------------------------------------------------------------------------------


def angle_nodes(angles: Angles) -> list[Node]:
    """What the angles are made of."""
    made = (angles.table, angles.positions, angles.cos and angles.cos[0], angles.sin and angles.sin[0])
    return [node for node in made if node is not None]


def table_of(shared: SharedValues, angles: Angles) -> Node:
    """[P, R]: cosines, then sines."""
    if angles.table is not None:
        return angles.table
    assert angles.cos is not None
    assert angles.sin is not None
    cos, sin = angles.cos, angles.sin

    def build(new: Replacement) -> Node:
        halves = []
        for part, (node, first, step) in enumerate((cos, sin)):
            width, count = concrete(shape(node)[-1]), angles.pairs
            if dtype_of(node) == torch.complex64:
                node = new.call(aten.select.int, new.call(aten.view_as_real.default, node), len(shape(node)), part)
            if (first, count * step) != (0, width) or step != 1:
                last = len(shape(node)) - 1
                node = new.call(aten.slice.Tensor, node, last, first, first + step * (count - 1) + 1, step)
            halves.append(node)
        rows = new.call(aten.cat.default, halves, -1)
        return new.call(aten.reshape.default, rows, [-1, 2 * angles.pairs])

    return shared.get(("table", angles.identity), [cos[0], sin[0]], build)


def table_dtype(angles: Angles) -> torch.dtype | None:
    """The dtype of ``table_of``."""
    if angles.table is not None:
        return dtype_of(angles.table)
    assert angles.cos is not None
    dtype = dtype_of(angles.cos[0])
    return torch.float32 if dtype == torch.complex64 else dtype


def head_positions(shared: SharedValues, angles: Angles, source: HeadSource) -> Node:
    """[T], int64: each token's row of the table."""
    kept = [dim for dim in range(len(source.frame)) if dim != source.heads_at]
    sizes = [angles.sizes[dim] for dim in kept]
    tokens = [source.frame[dim] for dim in kept]
    order = [kept.index(dim) for dim in source.tokens_at]
    anchor = angles.positions
    if anchor is None:
        assert angles.cos is not None
        anchor = angles.cos[0]
    expands = not all(same_size(a, b) for a, b in zip(sizes, tokens, strict=True))

    def build(new: Replacement) -> Node:
        assert anchor is not None
        device = anchor.meta["val"].device
        if angles.positions is not None:
            node = angles.positions
        elif concrete(product(sizes)) == 1:
            count = _number(new, tokens, source.rows.node)
            return new.call(aten.full.default, [count], 0, dtype=torch.int64, device=device)
        else:
            node = _counted(new, _number(new, sizes, anchor), device)
        if expands or order != sorted(order):
            node = new.reshape(node, sizes, anchor)
            node = new.call(aten.expand.default, node, new.numbers(tokens, source.rows.node)) if expands else node
            node = new.call(aten.permute.default, node, order) if order != sorted(order) else node
            node = new.call(aten.clone.default, node, memory_format=torch.contiguous_format)
        return node if len(shape(node)) == 1 else new.call(aten.reshape.default, node, [-1])

    inputs = [anchor, *([source.rows.node] if expands and any(concrete(size) is None for size in tokens) else [])]
    key = ("positions", angles.identity, tuple(map(str, tokens)), tuple(order), tuple(map(str, sizes)))
    return shared.get(key, inputs, build)


def _number(new: Replacement, sizes: Sequence[Any], sized: Node) -> Any:
    """The product of sizes, as an argument."""
    known = [number for size in sizes if (number := concrete(size)) is not None]
    count: Any = product(known)
    for size in sizes:
        if concrete(size) is None:
            number = new.size(size, sized)
            count = number if isinstance(count, int) and count == 1 else new.call(operator.mul, count, number)
    return count


def _counted(new: Replacement, count: Any, device: torch.device) -> Node:
    """0, 1, 2, …"""
    return new.call(prims.iota.default, count, start=0, step=1, dtype=torch.int64, device=device, requires_grad=False)


# ---- slots and caches -----------------------------------------------------------------------------------------------


def slot_nodes(slots: Slots) -> list[Node]:
    return [slots.index, *([] if slots.blocks is None else [slots.blocks])]


def slots_of(shared: SharedValues, slots: Slots, write: CacheWriteBlock) -> tuple[Node, bool]:
    """(int64: block · block_size + row of each token; whether negative ones count from the end of the cache, or else
    are of tokens of which nothing is written)
    """
    index = slots.index
    as_given = slots.blocks is None and not slots.per_block and len(shape(index)) == 1
    if slots.skips_negative or (as_given and dtype_of(index) == torch.int64):
        return index, not slots.skips_negative
    blocks, rows = write.layout[0][:2]

    def build(new: Replacement) -> Node:
        if slots.per_block or slots.blocks is not None:
            many, size = new.numbers((blocks, rows), write.root)
            row = _from_end(new, index, size)
            if slots.blocks is not None:
                block = _from_end(new, slots.blocks, many)
                inside = new.call(aten.bitwise_and.Tensor, _within(new, row, size), _within(new, block, many))
            else:
                inside = _within(new, row, size)
                block = _counted(new, many, index.meta["val"].device)
                block = new.call(aten.unsqueeze.default, block, 1)
            row = new.call(aten.add.Tensor, new.call(aten.mul.Tensor, block, size), row)
            outside = new.call(aten.full.default, [], -1, dtype=torch.int64, device=index.meta["val"].device)
            found = new.call(aten.where.self, inside, row, outside)
        else:
            total = _number(new, (blocks, rows), write.root)
            found = _from_end(new, index, total)
        return found if len(shape(found)) == 1 else new.call(aten.reshape.default, found, [-1])

    inputs = [index, *([slots.blocks] if slots.blocks is not None else [])]
    if any(concrete(size) is None for size in (blocks, rows)):
        inputs.append(write.root)
    return shared.get(("slots", str(slots), str(blocks), str(rows)), inputs, build), False


def _from_end(new: Replacement, index: Node, size: Any) -> Node:
    """Negative indices count from the end, as PyTorch's do."""
    return new.call(aten.where.self, new.call(aten.lt.Scalar, index, 0), new.call(aten.add.Tensor, index, size), index)


def _within(new: Replacement, index: Node, size: Any) -> Node:
    return new.call(aten.bitwise_and.Tensor, new.call(aten.ge.Scalar, index, 0), new.call(aten.lt.Scalar, index, size))


@dataclass(frozen=True)
class CacheArgument:
    """A cache that a fused op writes to.

    Attributes:
        name: the argument's.
        root: whose storage the cache lies in; ``write``'s root, or what another write of the same call made that of.
        dims: which dimensions of the layout the argument has.
    """

    name: str
    write: CacheWriteBlock
    root: Node
    dims: tuple[int, ...] = (0, 1, 2, 3)

    def fake(self) -> torch.Tensor:
        """The layout of the argument, as ``on_layouts`` says. Raises RefusedError."""
        return self._fake

    @cached_property
    def _fake(self) -> torch.Tensor:
        value = tensor(self.root)
        assert value is not None
        if concrete(value.storage_offset()) != 0 and not self.is_whole:
            raise RefusedError(f"the cache {self.root} lies within another tensor")
        sizes, strides, offset = self.layout
        return _without_copy(
            lambda call: call(aten.as_strided.default, value, sizes, strides, offset),
            [value, *sizes, *strides, offset],
            f"{self.root} cannot be seen as a cache",
        )

    @property
    def is_whole(self) -> bool:
        """Whether the argument is ``root`` as it is."""
        return self.write.whole and len(self.dims) == len(shape(self.root))

    @property
    def layout(self) -> tuple[list[Any], list[Any], Any]:
        sizes, strides, offset = self.write.layout
        return [sizes[dim] for dim in self.dims], [strides[dim] for dim in self.dims], offset


def call_writing(
    new: Replacement, op: Any, arguments: Mapping[str, Any], caches: Sequence[CacheArgument]
) -> tuple[Node, dict[Node, Node]]:
    """(a call of ``op``, what holds each cache's root after it)

    The call is functional, as PyTorch itself wraps an operator that writes: what comes after the pass makes it write in
    place, or copies where that would be wrong. A post-grad graph must be functional until then.
    """
    roots = list(dict.fromkeys(cache.root for cache in caches))
    kwargs: dict[str, Any] = dict(arguments)
    for name in (arg.name for arg in op._schema.arguments if arg.is_write):
        cache = next((each for each in caches if each.name == name), None)
        kwargs[f"_{name}_base_index"] = None if cache is None else roots.index(cache.root)
        if cache is not None and not cache.is_whole:
            sizes, strides, offset = cache.layout
            kwargs[f"_{name}_size"] = new.numbers(sizes, cache.root)
            kwargs[f"_{name}_stride"] = new.numbers(strides, cache.root)
            kwargs[f"_{name}_storage_offset"] = new.size(offset, cache.root)
    node = new.call(auto_functionalized_v2, op, **kwargs, _all_bases=roots)
    results = len(op._schema.returns)
    return node, {root: new.getitem(node, results + index) for index, root in enumerate(roots)}
