"""Finds rows that PyTorch's arithmetic rotates in pairs, all of their columns.

Each search starts where pairs are put together (``cat``, ``stack``, an assignment to a slice), goes on to the first
node whose columns, read one by one, are rotated, and from there back to what is rotated and to the angles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.fx import Graph, Node

from autofuse.graph.blocks import Angles, NearMiss
from autofuse.graph.recognise.column_rules import REARRANGES, SPLITS
from autofuse.graph.recognise.columns import Columns, Source
from autofuse.graph.recognise.nodes import (
    cast_source,
    concrete,
    dtype_of,
    is_call,
    same_size,
    same_sizes,
    shape,
    tensor,
)
from autofuse.graph.recognise.readings import COLUMN, FACTOR, FACTOR_COLUMN, SIGN, SOURCE, Reading

__all__ = [
    "FLOATS",
    "KEEP_ORDER",
    "RESHAPES",
    "SIZE_ONE",
    "OffError",
    "Rotation",
    "angles_of_table",
    "find_rotations",
    "held",
    "is_table",
]

aten = torch.ops.aten

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)
SIZE_ONE = (aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.alias.default)
KEEP_ORDER = frozenset(map(str, (*SIZE_ONE, *RESHAPES)))
"""Functions of sources that keep all elements in their order."""
_MOST_STEPS_DOWN = 6
"""From the ``cat`` of a negated half to the rotated rows: a reshape, a product, a sum, a cast."""
_ON_THE_WAY = (
    *RESHAPES,
    aten.mul.Tensor,
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.view_as_real.default,
    aten.unsqueeze.default,
)
_MAY_HOLD_SUMS = (
    aten.copy.default,
    aten.slice_scatter.default,
    aten.view_as_real.default,
    aten.view_as_complex.default,
)
_COMPUTES = (aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.neg.default, aten.cat.default)


class OffError(Exception):
    """It looked like RoPE, but the message says what is off."""


@dataclass(frozen=True)
class Rotation:
    """Rows that arithmetic rotates, all of their columns.

    Attributes:
        core: the node that holds the result.
        rows, first: what is rotated: these columns of this node.
        own: the nodes between, and the core.
    """

    core: Node
    rows: Node
    first: int
    width: int
    is_neox: bool
    reordered: bool
    angles: Angles
    own: tuple[Node, ...]


@dataclass(frozen=True)
class _Pairing:
    """How the columns of a reading are paired. ``cos`` and ``sin``: (source, its columns), one for each pair."""

    source: int
    first: int
    is_neox: bool
    reordered: bool
    cos: tuple[int, np.ndarray]
    sin: tuple[int, np.ndarray]


def find_rotations(graph: Graph, columns: Columns) -> tuple[list[Rotation], list[NearMiss]]:
    """All rotations of a post-grad graph, and what came close to being one."""
    sums = _Sums()
    rotations: dict[Node, Rotation] = {}
    near_misses: dict[Node, NearMiss] = {}
    for anchor in _anchors(graph):
        found, off = _first_rotated(columns, sums, anchor)
        if found is not None and (core := _cast_back(found[0])) not in rotations:
            try:
                rotations[core] = _rotation(columns, core, found[1])
            except OffError as error:
                off = (core, str(error))
        if off is not None:
            near_misses[off[0]] = NearMiss("RoPE", *off)
    return list(rotations.values()), list(near_misses.values())


def _anchors(graph: Graph) -> list[Node]:
    """Where pairs are put together."""
    targets = (aten.cat.default, aten.slice_scatter.default, aten.view_as_real.default)
    return sorted(node for target in targets for node in graph.find_nodes(op="call_function", target=target))


class _Sums:
    """Which nodes may hold sums in each column, as rotated rows do: a look at a few targets, that spares a reading."""

    def __init__(self) -> None:
        self._known: dict[Node, bool] = {}

    def __contains__(self, node: Node) -> bool:
        chain = [node]  # which may be long: no recursion
        while chain[-1] not in self._known and is_call(chain[-1], *REARRANGES, *SPLITS):
            above: Any = chain[-1].args[0]
            if not isinstance(above, Node):
                break
            chain.append(above)
        top = chain[-1]
        found = self._known[top] if top in self._known else self._find(top)
        self._known.update(dict.fromkeys(chain, found))
        return found

    def _find(self, node: Node) -> bool:
        if is_call(node, aten.cat.default):
            parts: Any = node.args[0]
            return all(part in self for part in parts)
        if is_call(node, aten.mul.Tensor):
            return dtype_of(node) == torch.complex64
        return is_call(node, aten.add.Tensor, aten.sub.Tensor, *_MAY_HOLD_SUMS)


def _first_rotated(
    columns: Columns, sums: _Sums, anchor: Node
) -> tuple[tuple[Node, _Pairing] | None, tuple[Node, str] | None]:
    """(the first node from ``anchor`` on that holds rotated rows, how); else, if one came close, (that, why not)."""
    off: tuple[Node, str] | None = None
    todo, seen = [(anchor, 0)], {anchor}
    while todo:
        node, steps = todo.pop(0)
        reading = columns.read(node) if node in sums else None
        try:
            pairing = None if reading is None else _pairing(columns, node, reading)
            if pairing is not None:
                return (node, pairing), None
        except OffError as error:
            off = off or (node, str(error))
        if steps == _MOST_STEPS_DOWN:
            continue
        for user in node.users:
            if user not in seen and (is_call(user, *_ON_THE_WAY) or cast_source(user, torch.float32) is node):
                seen.add(user)
                todo.append((user, steps + 1))
    return None, off


def _cast_back(core: Node) -> Node:
    """Fp32 arithmetic ends with a cast."""
    users = list(core.users)
    if len(users) == 1 and dtype_of(core) == torch.float32:
        to = dtype_of(users[0])
        if to in (torch.bfloat16, torch.float16) and cast_source(users[0], to) is core:
            return users[0]
    return core


def _pairing(columns: Columns, node: Node, reading: Reading) -> _Pairing | None:
    """How the columns of ``node`` are paired; None if they are nothing of the kind. Raises OffError."""
    if len(reading.dims) != 1 or reading.is_complex or reading.terms.shape[-2] != 2 or reading.dims[0] % 2:
        return None
    terms = reading.terms
    if not (terms[:, :, SIGN].all() and terms[:, :, FACTOR].all()):
        return None
    for source in _roles(columns, terms, reading, node):
        found = _paired(columns, terms, source)
        if found is not None:
            return found
    return None


def _roles(columns: Columns, terms: np.ndarray, reading: Reading, node: Node) -> list[int]:
    """The sources that may be what is rotated: those that every product has; the likeliest first.

    Rotation is a product of complex numbers: which factor is the angle, arithmetic alone does not tell. Angles are the
    same for all heads, or come from a table or a cosine.
    """
    both = terms[:, :, (SOURCE, FACTOR)]
    candidates = [int(s) for s in np.unique(both[0]) if ((both == s).sum(axis=2) == 1).all()]
    lead = shape(node)[: reading.lead]
    whole = [s for s in candidates if _broadcasts(columns.sources[s].lead, lead, whole=True)]
    return sorted(whole, key=lambda source: _is_angle(columns.chain(source)))


def _is_angle(chain: list[Source]) -> bool:
    functions = {source.key[0] for source in chain}
    return bool(functions & {str(aten.cos.default), str(aten.sin.default)}) or is_call(
        chain[-1].node, aten.index.Tensor, aten.embedding.default, aten.index_select.default, aten.polar.default
    )


def _paired(columns: Columns, terms: np.ndarray, source: int) -> _Pairing | None:
    """How ``source`` is rotated in pairs; None if its columns are not paired at all. Raises OffError."""
    # Each term as (sign, column of what is rotated, the angle's source, its column).
    swapped = terms[:, :, FACTOR] == source
    rows = np.where(swapped, terms[:, :, FACTOR_COLUMN], terms[:, :, COLUMN])
    angle = np.where(swapped, terms[:, :, SOURCE], terms[:, :, FACTOR])
    angle_column = np.where(swapped, terms[:, :, COLUMN], terms[:, :, FACTOR_COLUMN])
    sign = terms[:, :, SIGN]
    base, half = int(rows.min()), len(terms) // 2
    every = np.arange(half)
    orders = {True: (every, every + half), False: (2 * every, 2 * every + 1)}
    for is_neox, (p, q) in orders.items():
        for out_neox, (one, other) in orders.items():
            # out[one] = x[p] cos - x[q] sin; out[other] = x[q] cos + x[p] sin.
            at_p = np.where(rows[one, 0] == base + p, 0, 1)
            at_q = np.where(rows[other, 0] == base + q, 0, 1)
            if not (
                (rows[one, at_p] == base + p).all()
                and (rows[one, 1 - at_p] == base + q).all()
                and (rows[other, at_q] == base + q).all()
                and (rows[other, 1 - at_q] == base + p).all()
            ):
                continue
            signs = np.stack([sign[one, at_p], sign[one, 1 - at_p], sign[other, at_q], sign[other, 1 - at_q]])
            if not (signs == [[1], [-1], [1], [1]]).all():
                backwards = (signs == [[1], [1], [1], [-1]]).all()
                raise OffError("it rotates backwards" if backwards else "the signs of its products make no rotation")
            cos, sin = (angle[one, at_p], angle_column[one, at_p]), (angle[one, 1 - at_p], angle_column[one, 1 - at_p])
            also = (
                (angle[other, at_q], angle_column[other, at_q]),
                (angle[other, 1 - at_q], angle_column[other, 1 - at_q]),
            )
            for name, here, there in (("cosine", cos, also[0]), ("sine", sin, also[1])):
                if not all((a == b).all() for a, b in zip(here, there, strict=True)):
                    made = columns.sources[int(here[0][0])].node
                    raise OffError(f"whether both columns of a pair have the same {name} is not known, it is {made}'s")
                if (here[0] != here[0][0]).any():
                    raise OffError(f"its {name}s come from several tensors")
            reordered = is_neox != out_neox and half > 1
            return _Pairing(source, base, is_neox, reordered, (int(cos[0][0]), cos[1]), (int(sin[0][0]), sin[1]))
    return None


def _rotation(columns: Columns, core: Node, pairing: _Pairing) -> Rotation:
    reading = columns.read(core)
    assert reading is not None
    width = reading.dims[0]
    source = columns.sources[pairing.source]
    found = held(source, pairing.first, width)
    if found is None:
        raise OffError(f"no node holds the rows that it rotates, columns {pairing.first} and on of {source.node}")
    rows, first = found
    result, core = core, _without_ones(core, (*shape(rows)[:-1], width))
    if dtype_of(rows) not in FLOATS or dtype_of(core) != dtype_of(rows):
        raise OffError(f"its result {core} is {dtype_of(core)}, its input {rows} {dtype_of(rows)}")
    if not _broadcasts(shape(rows)[:-1], shape(core)[:-1], whole=True):
        raise OffError(f"its input {rows} is {list(shape(rows))}, its result {list(shape(core))}")
    return Rotation(
        core=core,
        rows=rows,
        first=first,
        width=width,
        is_neox=pairing.is_neox,
        reordered=pairing.reordered,
        angles=_angles(columns, pairing, shape(result)[:-1], shape(core)[:-1]),
        own=tuple(sorted({*_own(columns, result, rows, pairing), core})),
    )


def _without_ones(core: Node, sizes: tuple[Any, ...]) -> Node:
    """Angles may have had more dimensions than the rows; the result then loses them again."""
    users = list(core.users)
    if len(shape(core)) > len(sizes) and len(users) == 1 and is_call(users[0], *RESHAPES, *SIZE_ONE):
        return users[0] if same_sizes(shape(users[0]), sizes) else core
    return core


def held(source: Source, first: int, width: int, before: Node | None = None) -> tuple[Node, int] | None:
    """(the narrowest node that holds columns [first, first + width) of ``source``, which of its columns is the first)

    With ``before`` only nodes above that one count.
    """
    best: tuple[int, Node, int] | None = None
    wanted = first + np.arange(width)
    for node, held in source.plain:
        at = np.flatnonzero(held == first)[:1].tolist()
        if not at or (before is not None and not node < before) or (best is not None and len(held) >= best[0]):
            continue
        if np.array_equal(held[at[0] : at[0] + width], wanted):
            best = (len(held), node, at[0])
    return None if best is None else best[1:]


def _own(columns: Columns, core: Node, rows: Node, pairing: _Pairing) -> tuple[Node, ...]:
    """The nodes between ``rows`` and ``core`` that nobody else reads. Raises OffError where others read what was
    computed there.
    """
    angles = {pairing.cos[0], pairing.sin[0]}
    inner, todo = {core}, [core]
    while todo:
        for node in todo.pop().all_input_nodes:
            if node not in inner and rows < node and not _is_only(columns, node, angles):
                inner.add(node)
                todo.append(node)
    own: set[Node] = set()
    for node in sorted(inner, reverse=True):
        others = [user for user in node.users if user not in own]
        if node is core or not others:
            own.add(node)
        elif is_call(node, *_COMPUTES):
            what = "an output of the graph" if others[0].op == "output" else f"used by {others[0]}"
            raise OffError(f"its intermediate {node} is also {what}")
    return tuple(sorted(own))


def _is_only(columns: Columns, node: Node, sources: set[int]) -> bool:
    """Whether a node is made of the angles, and so is no part of the rotation."""
    reading = columns.read(node)
    if reading is None or not reading.is_plain:
        return False
    if reading.alone is not None:
        return reading.alone in sources
    return not sources.isdisjoint(np.unique(reading.terms[..., SOURCE]).tolist())


# ---- angles ---------------------------------------------------------------------------------------------------------


def _angles(columns: Columns, pairing: _Pairing, whole: tuple[Any, ...], frame: tuple[Any, ...]) -> Angles:
    """The angles of rows ``whole``, of which ``frame`` lacks leading dimensions of size 1."""
    cos, sin = (columns.sources[source] for source, _ in (pairing.cos, pairing.sin))
    if not same_sizes(cos.lead, sin.lead):
        raise OffError(f"its cosines are {list(cos.lead)}, its sines {list(sin.lead)}")
    if not _broadcasts(cos.lead, whole):
        raise OffError(f"its angles are {list(cos.lead)}, its rows {list(whole)}")
    sizes = ((1,) * (len(whole) - len(cos.lead)) + cos.lead)[len(whole) - len(frame) :]
    table = _table(columns, pairing, sizes)
    if table is not None:
        return angles_of_table(*table, len(pairing.cos[1]), sizes)
    identity = "|".join(
        f"{_before_views(columns, source)}:{held.tobytes().hex()}" for source, held in (pairing.cos, pairing.sin)
    )
    return Angles(
        identity, len(pairing.cos[1]), sizes, cos=_strided(cos, pairing.cos[1]), sin=_strided(sin, pairing.sin[1])
    )


def angles_of_table(table: Node, positions: Node, pairs: int, sizes: tuple[Any, ...]) -> Angles:
    return Angles(f"rows {positions} of {table}", pairs, sizes, table=table, positions=positions)


def _before_views(columns: Columns, source: int) -> int:
    """A source before dimensions were added: a layer's query and key may do that differently."""
    return next(at for at in columns.chain_ids(source) if columns.sources[at].key[0] not in KEEP_ORDER)


def _strided(source: Source, wanted: np.ndarray) -> tuple[Node, int, int]:
    """(a node, the first and the step of its columns that are ``wanted`` of ``source``)"""
    for node, held in source.plain:
        at = np.flatnonzero(held == wanted[0])
        for step in (1, 2):
            end = 0 if not at.size else int(at[0]) + step * (len(wanted) - 1) + 1
            if at.size and end <= len(held) and (held[at[0] : end : step] == wanted).all():
                return node, int(at[0]), step
    raise OffError(f"its angles are scattered over the columns of {source.node}")


def _table(columns: Columns, pairing: _Pairing, sizes: tuple[Any, ...]) -> tuple[Node, Node] | None:
    """(cos_sin_cache, positions) if each token's angles are a row of a table: R/2 cosines, then as many sines."""
    pairs = len(pairing.cos[1])
    chains = [columns.chain(source) for source, _ in (pairing.cos, pairing.sin)]
    row = chains[0][-1].node
    if chains[1][-1].node is not row or any(_changes_values(source) for chain in chains for source in chain[:-1]):
        return None
    every = np.arange(pairs)
    if not ((pairing.cos[1] == every).all() and (pairing.sin[1] == pairs + every).all()):
        return None
    table, positions = _row_of_table(row)
    if table is None or positions is None or concrete(shape(table)[1]) != 2 * pairs:
        return None
    many = tuple(size for size in sizes if concrete(size) != 1)
    indexed = tuple(size for size in shape(positions) if concrete(size) != 1)
    return (table, positions) if same_sizes(many, indexed) else None


def _row_of_table(row: Node) -> tuple[Node | None, Node | None]:
    table: Any = None
    positions: Any = None
    if is_call(row, aten.index.Tensor):
        table, indices = row.args
        positions = indices[0] if isinstance(indices, (list, tuple)) and len(indices) == 1 else None
    elif is_call(row, aten.embedding.default) and len(row.args) == 2:
        table, positions = row.args
    elif is_call(row, aten.index_select.default) and row.args[1] == 0:
        table, positions = row.args[0], row.args[2]
    return (table, positions) if is_table(table) and dtype_of(positions) == torch.int64 else (None, None)


def is_table(node: Any) -> bool:
    value = tensor(node)
    return value is not None and value.dim() == 2 and concrete(value.stride(1)) == 1


def _changes_values(source: Source) -> bool:
    """Whether a function does more than round, or add dimensions before the columns."""
    return source.key[0] not in ("cast", *KEEP_ORDER)


def _broadcasts(sizes: Sequence[Any], to: Sequence[Any], whole: bool = False) -> bool:
    """Whether ``sizes`` broadcasts to ``to``; ``whole``: but for leading dimensions of size 1, they are the same."""
    missing = len(to) - len(sizes)
    if missing < 0:
        return False
    if whole:
        return all(concrete(size) == 1 for size in to[:missing]) and same_sizes(sizes, to[missing:])
    return all(concrete(a) == 1 or same_size(a, b) for a, b in zip(sizes, to[missing:], strict=True))
