"""What each column of a tensor is made of: a symbolic reading of the last dimension.

RoPE is written in dozens of ways: halves or even and odd columns, ``cat``, ``stack``, negated halves, complex numbers,
cosines for each pair or for each element. All of them compute ``± x[p] · cos[i] ± x[q] · sin[i]`` for each column. So
a graph is read column by column, upwards from a node, until something is met that is no such arithmetic: that is a
*source*, and its columns are what others are made of. Two readings are equal where their arrays are. Rows that are
written into a buffer and read from there again are read as what they are.

A reading costs a few operations on small NumPy arrays, and each node is read once.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from autofuse.graph.recognise.column_rules import FLOATS, MOST_COLUMNS, REARRANGES, RULES, SPLITS, VIEWS, Reader
from autofuse.graph.recognise.nodes import concrete, dtype_of, shape
from autofuse.graph.recognise.readings import COLUMN, SIGN, SOURCE, Reading, different_pairs, plain_terms

__all__ = ["Columns", "Source"]

aten = torch.ops.aten

_MOST_STEPS = 64
"""How far a reading goes upwards: RoPE has about 25."""


@dataclass
class Source:
    """Something that columns are taken from: a node, or a function of another source, column by column.

    Attributes:
        node: what the first source above is computed by.
        above: the source that this is a function of; None for a node's own columns.
        key: the function.
        lead: the dimensions before the columns.
        dtype: of the columns.
        plain: the nodes that hold columns of this source alone, and which: [width], in the order they were read.
    """

    node: Node
    above: int | None
    key: tuple[Hashable, ...]
    lead: tuple[Any, ...]
    dtype: torch.dtype | None
    plain: list[tuple[Node, np.ndarray]] = field(default_factory=list)


class Columns:
    """Readings of one graph, made as they are asked for."""

    def __init__(self) -> None:
        self.sources: list[Source] = [None]  # type: ignore[list-item]  # 0 stands for no source
        self._interned: dict[Hashable, int] = {}
        self._readings: dict[Node, Reading | None] = {}
        self._leaves: dict[Node, Reading | None] = {}
        self._plain: dict[Node, Reading | None] = {}
        self._steps = 0

    def read(self, node: Any) -> Reading | None:
        """The reading of ``node``; None if it has no columns, too many, or not a known number of them."""
        if not isinstance(node, Node):
            return None
        if node not in self._readings:
            self._readings[node] = self._read(node)
        return self._readings[node]

    def chain_ids(self, source: int) -> list[int]:
        """A source, what it is a function of, and so on."""
        found = []
        at: int | None = source
        while at is not None:
            found.append(at)
            at = self.sources[at].above
        return found

    def chain(self, source: int) -> list[Source]:
        return [self.sources[at] for at in self.chain_ids(source)]

    def after(self, source: int, functions: Sequence[tuple[Hashable, ...]]) -> int | None:
        """``source`` after ``functions``, the last of which comes first; None if nothing is made so."""
        at: int | None = source
        for key in reversed(functions):
            at = self._interned.get((at, key))
        return at

    # ---- sources ----------------------------------------------------------------------------------------------------

    def _read(self, node: Node) -> Reading | None:
        rule = RULES.get(node.target) if node.op == "call_function" else None
        reading = None
        if rule is not None and self._steps < _MOST_STEPS and dtype_of(node) in FLOATS:
            self._steps += 1
            try:
                reading = rule(self, node)
            finally:
                self._steps -= 1
        if reading is None:
            return self._leaf(node)
        self._remember_plain(node, reading)
        return reading

    def _leaf(self, node: Node) -> Reading | None:
        """The node's columns as a source."""
        if node not in self._leaves:
            self._leaves[node] = self._made_leaf(node)
        return self._leaves[node]

    def _made_leaf(self, node: Node) -> Reading | None:
        sizes = shape(node)
        width = concrete(sizes[-1]) if sizes else None
        if width is None or not 0 < width <= MOST_COLUMNS or dtype_of(node) not in FLOATS:
            return None
        is_complex = dtype_of(node) == torch.complex64
        parts = [self.source((node.name, part), node, None, sizes[:-1]) for part in range(1 + is_complex)]
        terms = [plain_terms(part, np.arange(width)) for part in parts]
        reading = (
            Reading(np.stack(terms, axis=1), len(sizes) - 1, is_complex)
            if is_complex
            else Reading(terms[0], len(sizes) - 1, alone=parts[0])
        )
        self._remember_plain(node, reading)
        return reading

    def source(self, key: tuple[Hashable, ...], node: Node, above: int | None, lead: tuple[Any, ...]) -> int:
        """The source of that key, made by ``node`` where it is new."""
        whole = (above, key)
        if whole not in self._interned:
            self._interned[whole] = len(self.sources)
            bottom = node if above is None else self.sources[above].node
            self.sources.append(Source(bottom, above, key, lead, dtype_of(node)))
        return self._interned[whole]

    def heads(self, node: Node, of: Reading, heads: int) -> Reading | None:
        """A reading of ``node``, whose rows are the equal parts of the plain rows ``of``; None if the parts differ."""
        if not of.is_plain or of.is_complex or of.dims[0] % heads:
            return None
        terms = of.terms[:, 0].reshape(heads, -1, 5)
        one = terms[0].copy()
        steps = terms[min(1, heads - 1), :, COLUMN] - one[:, COLUMN]
        if of.alone is None and ((terms[..., SIGN] != 1).any() or (terms[..., SOURCE] != one[:, SOURCE]).any()):
            return None
        if (terms[..., COLUMN] != one[:, COLUMN] + steps * np.arange(heads)[:, None]).any():
            return None
        lead = (*shape(node)[: of.lead], heads)
        made: int | None = None
        for source in np.unique(one[:, SOURCE]) if of.alone is None else (of.alone,):
            chosen = terms[0, :, SOURCE] == source
            step = int(steps[chosen][0])
            if (steps[chosen] != step).any():
                return None
            made = self.source(("heads", heads, step), node, int(source), lead)
            one[chosen, SOURCE] = made
        return Reading(one[:, None], len(lead), alone=None if of.alone is None else made)

    def forget(self, nodes: Collection[Node]) -> None:
        """Forgets what was read of these nodes and of what is made of their columns."""
        below, todo = set(nodes), [*nodes]
        while todo:
            # What no rule reads is a source, whatever it is made of.
            new = {user for user in todo.pop().users if user.target in RULES or user.target in SPLITS} - below
            below |= new
            todo += new
        for known in (self._readings, self._leaves, self._plain):
            for node in below & known.keys():
                del known[node]
        for source in self.sources[1:]:
            source.plain = [each for each in source.plain if each[0] not in below]

    def is_new(self, node: Any) -> bool:
        """Whether no column of ``node`` is one of a source that was read so far, as far as is known without reading."""
        while isinstance(node, Node) and node.op == "call_function" and node not in self._readings:
            if node.target in (aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor):
                # A product or sum of columns, or a source of its own.
                return len(node.args) == 2 and all(shape(arg) for arg in node.args)
            if node.target not in REARRANGES and node.target not in SPLITS:
                return node.target not in RULES
            node = node.args[0]
        return False

    def define(self, node: Node, reading: Reading) -> None:
        """Says what a node's columns are; before anything below it is read, or after that is forgotten."""
        self._readings[node] = reading
        self._remember_plain(node, reading)

    def plain(self, node: Any) -> Reading | None:
        """The reading of ``node`` if it is one of columns alone, else as if it were a source."""
        if not isinstance(node, Node):
            return None
        if node not in self._plain:
            reading = self.read(node)
            if reading is not None and not reading.is_plain:
                reading = self._plain_view(node) or self._leaf(node)
            self._plain[node] = reading
        return self._plain[node]

    def _plain_view(self, node: Node) -> Reading | None:
        """The plain reading of a node that rearranges columns, of inputs that are read as if they were sources: the
        halves of a product are columns of one node then. None if it is no such node.
        """
        rule = VIEWS.get(node.target) if node.op == "call_function" else None
        if rule is None or self._steps >= _MOST_STEPS:
            return None
        self._steps += 1
        try:
            reading = rule(_Plainly(self), node)
        finally:
            self._steps -= 1
        if reading is None or not reading.is_plain:
            return None
        self._remember_plain(node, reading)
        return reading

    def function(self, node: Node, of: Reading, key: tuple[Hashable, ...], lead: tuple[Any, ...]) -> Reading:
        """A reading of ``node`` whose columns are those of a plain one, each after the function ``key``."""
        terms = of.terms.copy()
        if of.alone is not None:
            made = self.source(key, node, of.alone, lead)
            terms[..., SOURCE] = made
            return Reading(terms, len(lead), of.is_complex, made)
        for source, sign in {(int(a), int(b)) for a, b in different_pairs(of.terms[..., SOURCE], of.terms[..., SIGN])}:
            chosen = (of.terms[..., SOURCE] == source) & (of.terms[..., SIGN] == sign)
            of_what = source if sign > 0 else self.source(("neg",), node, source, self.sources[source].lead)
            terms[..., SOURCE][chosen] = self.source(key, node, of_what, lead)
        terms[..., SIGN] = 1
        return Reading(terms, len(lead), of.is_complex)

    def _remember_plain(self, node: Node, reading: Reading) -> None:
        if len(reading.dims) != 1 or not reading.dims[0] or not reading.is_plain:
            return
        if reading.alone is not None:
            source = self.sources[reading.alone]
            if dtype_of(node) == source.dtype:
                source.plain.append((node, reading.terms[:, 0, COLUMN]))
            return
        for part in (0, 1) if reading.is_complex else (None,):
            terms = reading.terms[:, 0] if part is None else reading.terms[:, part, 0]
            source = self.sources[int(terms[0, SOURCE])]
            alone = (terms[:, SOURCE] == terms[0, SOURCE]).all() and (terms[:, SIGN] == 1).all()
            if alone and dtype_of(node) == source.dtype:
                source.plain.append((node, terms[:, COLUMN]))


class _Plainly(Reader):
    """Readings for a rule that is to see sources where there is arithmetic."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns

    def read(self, node: Any) -> Reading | None:
        return self._columns.plain(node)

    plain = read

    def heads(self, node: Node, of: Reading, heads: int) -> Reading | None:
        return self._columns.heads(node, of, heads)

    def function(self, node: Node, of: Reading, key: tuple[Hashable, ...], lead: tuple[Any, ...]) -> Reading:
        return self._columns.function(node, of, key, lead)
