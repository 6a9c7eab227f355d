"""Which rotations are one attention's query and key, and which cache writes are of its key and value."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from autofuse.graph.blocks import Angles, CacheWriteBlock, Found, HeadRows, NearMiss, RMSNormBlock, RopeBlock, RopeRead
from autofuse.graph.heads import HeadSource, angle_nodes
from autofuse.graph.moves import RefusedError, check_movable, check_no_mutation
from autofuse.graph.recognise.axes import Axes, regrouped
from autofuse.graph.recognise.nodes import (
    concrete,
    dtype_of,
    is_call,
    is_getitem,
    keeps_order,
    product,
    same_size,
    same_value,
    shape,
    tensor,
)
from autofuse.graph.rows import linear_of

__all__ = [
    "RopePair",
    "base_of",
    "check_alike",
    "check_caches",
    "check_order",
    "check_scale",
    "frames_of",
    "is_latent",
    "pair_ropes",
    "returns_key",
    "scale_of",
    "value_rows",
]

aten = torch.ops.aten

_MOST_LINEARS = 3
"""From a query upwards: MLA's goes through the norm of a latent."""
_VIEWS = (
    aten.select.int,
    aten.permute.default,
    aten.transpose.int,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unbind.int,
    aten.expand.default,
)


@dataclass(frozen=True)
class RopePair:
    """The rotations of one attention, and the writes of its key and value.

    Attributes:
        key_write: writes rows of which ``key_part`` is the rotated key; None if nothing does.
        value_write: the write beside that, to the same slots; None if there is none, or if it is not clear which.
        between: the views between the rotated key and its write, if nobody else reads them.
        unclear: why it is not clear which write is the value's.
    """

    q: RopeBlock
    k: RopeBlock
    key_write: CacheWriteBlock | None = None
    key_part: int = 0
    value_write: CacheWriteBlock | None = None
    between: tuple[Node, ...] = ()
    unclear: str = ""

    @property
    def spared(self) -> dict[Node, Node]:
        return {node: where.node for rope in (self.q, self.k) for node, where in rope.spared}

    def root_of(self, write: CacheWriteBlock) -> Node:
        """Whose storage a write's cache lies in: what it was before the other write, if it follows that."""
        before = next((other for other in self.writes if other.output is write.root), None)
        return write.root if before is None else before.root

    @property
    def writes(self) -> tuple[CacheWriteBlock, ...]:
        return tuple(write for write in (self.key_write, self.value_write) if write is not None)


def pair_ropes(found: Found) -> tuple[list[RopePair], list[NearMiss]]:
    """The rotations of each attention; and rotations that look as if they belonged together, but are unclear."""
    norms = {norm.output: norm for norm in found.rms_norms()}
    written = _written(found)
    writes = _Writes(found, norms, written)
    pairs: list[RopePair] = []
    misses: list[NearMiss] = []
    for group, why in _groups(found.ropes(), norms):
        if why:
            misses.append(NearMiss("rope_kv_cache", group[0].output, why))
            continue
        q, k = _roles(group, written)
        pairs.append(_with_writes(q, k, written, writes))
    return pairs, misses


def _groups(ropes: list[RopeBlock], norms: dict[Node, RMSNormBlock]) -> list[tuple[list[RopeBlock], str]]:
    """(rotations that belong together, "" if they are two, else why it is unclear)"""
    groups: list[tuple[list[RopeBlock], str]] = []
    by_call: dict[Node, list[RopeBlock]] = defaultdict(list)
    left: list[RopeBlock] = []
    for rope in ropes:
        by_call[rope.call[0]].append(rope) if rope.call else left.append(rope)
    for call, group in by_call.items():
        groups.append((group, "" if len(group) == 2 else f"{call} rotates a query without a key"))
    origins = {rope.output: _activations(rope.input.node, norms) for rope in left}
    while left:
        first = left.pop(0)
        alike = [rope for rope in left if _same_angles(rope.angles, first.angles)]
        mine = origins[first.output]
        near = [rope for rope in alike if mine & origins[rope.output] or (not mine and not origins[rope.output])]
        for rope in near:
            left.remove(rope)
        if len(near) == 1:
            groups.append(([first, near[0]], ""))
        elif near:
            made = ", ".join(str(rope.output) for rope in [first, *near])
            groups.append(
                ([first, *near], f"{made} are rotated by the same angles: which are query and key is unclear")
            )
        else:
            groups.append(([first], "nothing else of the same activations is rotated by the same angles"))
    return groups


def _same_angles(one: Angles, other: Angles) -> bool:
    if one.identity == other.identity:
        return True
    if one.table is not None and other.table is not None:
        return same_value(one.table, other.table) and same_value(one.positions, other.positions)
    if one.cos is None or other.cos is None or one.sin is None or other.sin is None:
        return False
    return all(a[1:] == b[1:] and same_value(a[0], b[0]) for a, b in ((one.cos, other.cos), (one.sin, other.sin)))


def _activations(node: Node, norms: dict[Node, RMSNormBlock]) -> set[Node]:
    """What the linears above ``node`` read, through views and norms."""
    found: set[Node] = set()
    above: Any = node
    while isinstance(above, Node) and len(found) < _MOST_LINEARS:
        linear = linear_of(above)
        if linear is not None:
            found.add(linear.activations)
            above = linear.activations
        elif above in norms:
            above = norms[above].input
        elif keeps_order(above) or is_getitem(above) or is_call(above, *_VIEWS):
            above = above.args[0]
        else:
            break
    return found


def _roles(group: Sequence[RopeBlock], written: dict[Node, tuple[CacheWriteBlock, int]]) -> tuple[RopeBlock, RopeBlock]:
    """(query, key): the key is what is cached; else what has fewer heads."""
    one, other = group
    if one.call and other.call:
        return (one, other) if one.call[1] == "query" else (other, one)
    cached = [any(read.node in written for read in rope.reads) for rope in (one, other)]
    if cached[0] != cached[1]:
        return (other, one) if cached[0] else (one, other)
    sizes = [concrete(_heads_product(rope, beside)) for rope, beside in ((one, other), (other, one))]
    if sizes[0] is not None and sizes[1] is not None and sizes[0] < sizes[1]:
        return other, one
    return one, other


def _heads_product(rope: RopeBlock, beside: RopeBlock) -> Any:
    """The product of those dimensions that the two do not share."""
    shared = [*beside.frame]
    sizes = []
    for size in rope.frame:
        match = next((index for index, other in enumerate(shared) if same_size(size, other)), None)
        if match is None:
            sizes.append(size)
        else:
            shared.pop(match)
    return product(sizes)


# ---- writes ---------------------------------------------------------------------------------------------------------


def _written(found: Found) -> dict[Node, tuple[CacheWriteBlock, int]]:
    """A rotation's read → the write whose rows come from it, and which part of these it is."""
    reads = {read.node for rope in found.ropes() for read in rope.reads}
    written: dict[Node, tuple[CacheWriteBlock, int]] = {}
    for write in found.cache_writes():
        ways = [write]
        if write.joined:
            cat = write.parts[0]
            ways.append(replace(write, parts=write.joined, nodes=tuple(sorted({*write.nodes, cat}))))
        for way in ways:
            chains = [(place, _views_up_to(part, reads)) for place, part in enumerate(way.parts)]
            ends = [(place, chain[-1]) for place, chain in chains if chain is not None]
            for place, read in ends:
                written.setdefault(read, (way, place))
            if ends:
                break
    return written


def _views_up_to(part: Node, reads: set[Node]) -> list[Node] | None:
    """``part``, and the nodes above that it is a view of, down to one of ``reads``; None if that is not so."""
    chain: list[Node] = [part]
    while chain[-1] not in reads:
        node = chain[-1]
        if not (keeps_order(node) or is_call(node, aten.permute.default)):
            return None
        above = node.args[0]
        assert isinstance(above, Node)
        chain.append(above)
    return chain


class _Writes:
    """The writes to caches of a graph, and what is asked of them again for each attention."""

    def __init__(
        self, found: Found, norms: dict[Node, RMSNormBlock], rotated: dict[Node, tuple[CacheWriteBlock, int]]
    ) -> None:
        of_ropes = {_place(write) for write, _ in rotated.values()}
        every = found.cache_writes()
        self.of_values = [each for each in every if _place(each) not in of_ropes and len(each.parts) == 1]
        """Those of one part that is not rotated."""
        self._norms = norms
        self._origins: dict[Node, set[Node]] = {}

    def origin(self, node: Node) -> set[Node]:
        """What the linears above ``node`` read."""
        if node not in self._origins:
            self._origins[node] = _activations(node, self._norms)
        return self._origins[node]


def _with_writes(
    q: RopeBlock,
    k: RopeBlock,
    written: dict[Node, tuple[CacheWriteBlock, int]],
    writes: _Writes,
) -> RopePair:
    mine = [written[read.node] for read in k.reads if read.node in written]
    if not mine:
        return RopePair(q, k)
    if len({write.output for write, _ in mine}) > 1:
        return RopePair(q, k, *mine[0], unclear=f"the rotated key {k.output} is written to several caches")
    key_write, part = mine[0]
    if len(key_write.parts) > 1:
        return RopePair(q, k, key_write, part, between=_between(k, key_write, part))
    beside = [write for write in writes.of_values if _same_slots(write, key_write)]
    if key_write.call is not None or any(write.call is not None for write in beside):
        beside = [write for write in beside if write.call is key_write.call]
    if len(beside) > 1:
        origin = writes.origin(k.input.node)
        beside = [write for write in beside if origin & writes.origin(write.parts[0])]
    if len(beside) != 1:
        what = "no write" if not beside else f"{len(beside)} writes"
        return RopePair(q, k, key_write, part, unclear=f"there is {what} beside that of the key to the same slots")
    return RopePair(q, k, key_write, part, beside[0], _between(k, key_write, part))


def _between(k: RopeBlock, write: CacheWriteBlock, part: int) -> tuple[Node, ...]:
    chain = _views_up_to(write.parts[part], {read.node for read in k.reads})
    assert chain is not None
    own = set(write.nodes)
    found: list[Node] = []
    for node in chain[:-1]:
        if any(user not in own for user in node.users):
            break
        own.add(node)
        found.append(node)
    return tuple(found)


def _place(write: CacheWriteBlock) -> tuple[Node, str]:
    """Tells writes apart, also two that one call makes to one tensor."""
    return write.output, str(write.layout[2])


def _same_slots(one: CacheWriteBlock, other: CacheWriteBlock) -> bool:
    a, b = one.slots, other.slots
    return (
        (a.per_block, a.skips_negative) == (b.per_block, b.skips_negative)
        and same_value(a.index, b.index)
        and (a.blocks is b.blocks or same_value(a.blocks, b.blocks))
        and all(same_size(x, y) for x, y in zip(one.layout[0][:2], other.layout[0][:2], strict=True))
    )


# ---- tokens and heads -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Frame:
    tokens_at: tuple[int, ...]
    heads_at: int | None


def frames_of(pair: RopePair) -> tuple[HeadSource, HeadSource]:
    """The query's and the key's rows as [T, H, D], tokens in the order in which the caches count them.

    Raises RefusedError.
    """
    q, k = pair.q, pair.k
    frame = _frame_of_written(pair) if pair.key_write is not None else _frame_of_read(k, q)
    if frame.heads_at is not None and not same_size(k.angles.sizes[frame.heads_at], 1):
        raise RefusedError(f"the angles of {k.output} differ from head to head")
    k_source = HeadSource(k.input, k.frame, frame.tokens_at, frame.heads_at, k.width)
    tokens = k_source.tokens
    if len(q.frame) == len(k.frame) and (q.heads_at is None or q.heads_at == frame.heads_at):
        candidates = [(frame.tokens_at, frame.heads_at)]
    else:
        candidates = [(tuple(d for d in range(len(q.frame)) if d != at), at) for at in _heads_candidates(q)]
    for tokens_at, heads_at in candidates:
        q_source = HeadSource(q.input, q.frame, tokens_at, heads_at, q.width)
        if len(q_source.tokens) == len(tokens) and all(
            same_size(a, b) for a, b in zip(q_source.tokens, tokens, strict=True)
        ):
            if heads_at is not None and not same_size(q.angles.sizes[heads_at], 1):
                raise RefusedError(f"the angles of {q.output} differ from head to head")
            return q_source, k_source
    raise RefusedError(
        f"the query {q.output} is {list(q.frame)}, the key {k.output} {list(k.frame)}: not the same tokens"
    )


def _heads_candidates(rope: RopeBlock) -> list[int]:
    if rope.heads_at is not None:
        return [rope.heads_at]
    return [dim for dim in range(len(rope.frame)) if same_size(rope.angles.sizes[dim], 1)]


def _frame_of_read(k: RopeBlock, q: RopeBlock) -> _Frame:
    """Without a cache that tells, the heads are where query and key differ, or what lies closest in memory."""
    if k.heads_at is not None:
        heads_at: int | None = k.heads_at
    else:
        free = [dim for dim in range(len(k.frame)) if same_size(k.angles.sizes[dim], 1)]
        if len(k.frame) == len(q.frame):
            free = [d for d in free if not same_size(k.frame[d], q.frame[d])] or free
        elif len(k.frame) < len(q.frame):
            free = [d for d in free if concrete(k.frame[d]) == 1]
        many = [dim for dim in free if concrete(k.frame[dim]) != 1] or free
        heads_at = min(many, key=lambda dim: _stride(q if len(q.frame) == len(k.frame) else k, dim)) if many else None
    return _Frame(tuple(dim for dim in range(len(k.frame)) if dim != heads_at), heads_at)


def _stride(rope: RopeBlock, dim: int) -> float:
    value = tensor(rope.input.node)
    missing = 0 if value is None else len(rope.frame) + 1 - value.dim()
    if value is None or dim < missing or missing < 0 or rope.input.heads:
        return float("inf")
    stride = concrete(value.stride(dim - missing))
    return float("inf") if stride is None else stride


def _frame_of_written(pair: RopePair) -> _Frame:
    """Tokens and heads of the key as its write has them."""
    k, write = pair.k, pair.key_write
    assert write is not None
    chain = _views_up_to(write.parts[pair.key_part], {read.node for read in k.reads})
    assert chain is not None
    read = next(read for read in k.reads if read.node is chain[-1])
    axes = _axes(k, read, chain)
    rows = list(write.tokens_at)
    heads: tuple[int, ...] = ()
    columns = len(k.frame)
    if axes is None or axes[-1] not in ((columns,), (*axes[-1][:-1], columns)):
        raise RefusedError(f"how the rows of {write.output} come from the rotated key is not clear")
    if pair.key_part == 0 and write.heads_at is not None:
        heads = axes[write.heads_at]
    elif pair.key_part:
        rows = [dim for dim in range(len(axes) - 1) if axes[dim]]
    tokens = [axis for dim in rows for axis in axes[dim]]
    if axes[-1] != (columns,) or len(heads) > 1:
        raise RefusedError(f"the rows of {write.output} are not the heads of the rotated key")
    left = [dim for dim in range(columns) if dim not in (*tokens, *heads)]
    if any(concrete(k.frame[dim]) != 1 for dim in left):
        raise RefusedError(f"the rows of {write.output} lack dimensions of the rotated key")
    if not tokens and not heads and left and k.heads_at is None:
        # One token: sizes of 1 do not tell tokens from heads, but the query's heads may.
        alike = len(k.frame) == len(pair.q.frame)
        many = [dim for dim in left if alike and concrete(pair.q.frame[dim]) != 1]
        place = (*many, *left[1:], None)[0]
        return _Frame(tuple(dim for dim in left if dim != place), place)
    heads_at = heads[0] if heads else k.heads_at if k.heads_at in left else left[0] if left else None
    if k.heads_at is not None and heads_at != k.heads_at:
        raise RefusedError(f"the heads of {write.output} are not those of the rotated key")
    return _Frame((*tokens, *(dim for dim in left if dim != heads_at)), heads_at)


def _axes(k: RopeBlock, read: RopeRead, chain: Sequence[Node]) -> Axes | None:
    """For each dimension of the first of ``chain`` the dimensions of the key's frame that it is made of; columns are
    the one after the last.
    """
    columns = len(k.frame)
    sizes = [*k.frame, read.width]
    if read.folded:
        sizes[-1] = k.width
    node = chain[-1]
    axes = regrouped(
        [dim for dim in range(columns + 1) if concrete(sizes[dim]) != 1 or dim == columns], sizes, shape(node)
    )
    for view in reversed(chain[:-1]):
        if axes is None:
            return None
        if is_call(view, aten.permute.default):
            order: Any = view.args[1]
            axes = tuple(axes[dim] for dim in order)
        else:
            axes = regrouped([axis for dim in axes for axis in dim], sizes, shape(view))
    return axes


# ---- whether it is allowed ------------------------------------------------------------------------------------------


def is_latent(pair: RopePair) -> bool:
    """Whether a pair is MLA's: a query rotated only at its end, or a key that is cached beside a latent."""
    if pair.q.rotary_first or any(len(write.parts) > 1 for write in pair.writes):
        return True
    return pair.value_write is not None and not same_size(shape(pair.value_write.parts[0])[-1], pair.k.width)


def base_of(node: Node) -> Node:
    """What ``node`` is a view of."""
    while keeps_order(node) or is_getitem(node) or is_call(node, *_VIEWS):
        node = node.args[0]  # type: ignore[assignment]
    return node


def check_alike(pair: RopePair) -> None:
    """Raises RefusedError where the two rotations are not one operation."""
    q, k = pair.q, pair.k
    if pair.unclear:
        raise RefusedError(pair.unclear)
    for what, one, other in (
        ("dtypes", q.dtype, k.dtype),
        ("rotary dimensions", q.rotary_dim, k.rotary_dim),
        ("styles", _style(q), _style(k)),
    ):
        if one != other:
            raise RefusedError(f"the rotations of q and k have different {what}: {one} and {other}")
    if q.is_neox and q.reordered:
        raise RefusedError(f"{q.output} pairs halves of its input but neighbours of its result, which no op does")
    tensors = [node.meta["val"] for node in (q.input.node, k.input.node, *angle_nodes(q.angles))]
    if len({value.device for value in tensors}) > 1:
        raise RefusedError("q, k and their angles are on different devices")


def _style(rope: RopeBlock) -> str:
    """What is paired, and, if that is another, as what the pairs are written."""
    pairs, others = ("halves", "neighbours") if rope.is_neox else ("neighbours", "halves")
    return f"{pairs} to {others}" if rope.reordered else pairs


def value_rows(pair: RopePair, k: HeadSource) -> HeadSource | None:
    """The rows that are written beside the key; None if nothing is. Raises RefusedError."""
    write = pair.value_write
    if write is None:
        return None
    part = write.parts[0]
    sizes = shape(part)
    width = concrete(sizes[-1])
    assert width is not None
    v = HeadSource(HeadRows(part, 0), sizes[:-1], write.tokens_at, write.heads_at, width)
    if dtype_of(part) != pair.q.dtype:
        raise RefusedError(f"the value {part} is {dtype_of(part)}, the query {pair.q.dtype}")
    if not same_size(product(v.tokens), product(k.tokens)):
        raise RefusedError(f"the value {part}, {list(sizes)}, has not as many tokens as the key")
    return v


def returns_key(pair: RopePair) -> bool:
    """Whether anybody but the write to the cache reads the rotated key."""
    own = {node for write in pair.writes for node in write.nodes} | {*pair.between, *pair.k.nodes, *pair.q.nodes}
    return any(user not in own for read in pair.k.reads for user in read.node.users)


def check_scale(write: CacheWriteBlock, dtype: torch.dtype) -> None:
    """Raises RefusedError for a cache of another dtype than the rows, but for fp8 with a scale."""
    if write.dtype == dtype:
        if write.scale is not None and write.scale[0] != "auto":
            raise RefusedError(f"the cache {write.root} is of dtype {write.scale[0]!r}")
        return
    if write.dtype != torch.float8_e4m3fn or write.scale is None or write.scale[0] not in ("fp8", "fp8_e4m3"):
        raise RefusedError(f"the cache {write.root} is {write.dtype}, what is written {dtype}")


def scale_of(write: CacheWriteBlock | None, dtype: torch.dtype) -> Node | None:
    return None if write is None or write.scale is None or write.dtype == dtype else write.scale[1]


def check_order(
    pair: RopePair, results: Sequence[Node], needed: Sequence[Node], own: frozenset[Node]
) -> tuple[Node, ...]:
    """What must move above the first of ``results``, in graph order; raises RefusedError where that is not allowed.

    Args:
        needed: what a fused op in that place reads.
        own: what it replaces.

    What reads rows that a rotation left as they were will read them where they were before.
    """
    first = min(results)
    check_caches(pair.writes, first)
    spared = pair.spared
    hoist: set[Node] = set()
    todo = [*needed]
    while todo:
        node = todo.pop()
        if node in spared:
            todo.append(spared[node])
        elif not node < first and node not in hoist:
            if node in own:
                raise RefusedError(f"what it needs depends on {node}, which it computes")
            check_movable(node, first)
            hoist.add(node)
            todo += node.all_input_nodes
    check_no_mutation({*own, *results, *hoist})
    return tuple(sorted(hoist))


def check_caches(writes: Sequence[CacheWriteBlock], first: Node) -> None:
    """Raises RefusedError where a cache must not be written to in place, or at ``first`` already."""
    own = {node for write in writes for node in write.nodes}
    after = {write.output for write in writes}
    for write in writes:
        if write.not_in_place:
            raise RefusedError(f"the cache is not written in place: {write.not_in_place}")
        for node in _readers(write.root):
            if node in own or (is_call(node, aten.copy_.default) and node.args[0] is write.root):
                continue
            if not node < first:
                raise RefusedError(f"the cache {write.root}, as it was before, is read by {node}")
    roots = [write.root for write in writes]
    if len(writes) == 2 and (roots[0] is roots[1] or after & {*roots}) and not _are_apart(*writes):
        raise RefusedError(f"one cache, {roots[0]}, is written to twice")


def _are_apart(one: CacheWriteBlock, other: CacheWriteBlock) -> bool:
    """Whether two caches in one tensor have no element in common."""
    if one.selected is not None and other.selected is not None:
        dims, indices = zip(one.selected, other.selected, strict=True)
        return dims[0] == dims[1] and min(indices) >= 0 and indices[0] != indices[1]
    first, second = sorted((_extent(one), _extent(other)))
    return 0 < first[1] <= second[0]


def _extent(write: CacheWriteBlock) -> tuple[int, int]:
    """(the first element of a cache in its root's storage, the one after the last); (0, 0) if they are not known."""
    sizes, strides, offset = write.layout
    known = [number for size in (*sizes, *strides, offset) if (number := concrete(size)) is not None]
    if len(known) < 9:
        return 0, 0
    span = sum((size - 1) * stride for size, stride in zip(known[:4], known[4:8], strict=True))
    return known[8], known[8] + span + 1


def _readers(root: Node) -> set[Node]:
    """All that read ``root``, through views too."""
    found: set[Node] = set()
    todo = list(root.users)
    while todo:
        node = todo.pop()
        if is_call(node, aten.sym_size.int, aten.sym_stride.int) or node in found:
            continue
        if keeps_order(node) or is_getitem(node) or is_call(node, *_VIEWS):
            todo += node.users
        else:
            found.add(node)
    return found
