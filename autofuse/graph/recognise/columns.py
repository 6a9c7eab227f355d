"""What each column of a tensor is made of: a symbolic reading of the last dimension.

RoPE is written in dozens of ways: halves or even and odd columns, ``cat``, ``stack``, negated halves, complex numbers,
cosines for each pair or for each element. All of them compute ``± x[p] · cos[i] ± x[q] · sin[i]`` for each column. So
a graph is read column by column, upwards from a node, until something is met that is no such arithmetic: that is a
*source*, and its columns are what others are made of. Two readings are equal where their arrays are. Rows that are
written into a buffer and read from there again are read as what they are.

A reading costs a few operations on small NumPy arrays, and each node is read once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from autofuse.graph.recognise.nodes import concrete, constant, dtype_of, is_call, same_size, same_sizes, shape, tensor

__all__ = ["Columns", "Reading", "Source"]

aten = torch.ops.aten
prims = torch.ops.prims

_MOST_COLUMNS = 16384
"""Wider rows are not read."""
_MOST_COMPUTED = 2048
"""Arithmetic on wider rows is not read: they are no heads."""
_MOST_STEPS = 64
"""How far a reading goes upwards: RoPE has about 25."""
_WIDENING = {
    torch.bfloat16: (torch.float32, torch.float64),
    torch.float16: (torch.float32, torch.float64),
    torch.float32: (torch.float64,),
}
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.complex64)

_RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)

# Fields of a term.
SIGN, SOURCE, COLUMN, FACTOR, FACTOR_COLUMN = range(5)


@dataclass(frozen=True)
class Reading:
    """The columns of a node.

    Attributes:
        terms: int32 [*dims, 1 or 2, 5]: each column is the sum of terms (sign, source, column, source, column): a
            product of a source's column and of another's, or of nothing (0). A term of sign 0 is none. ``dims`` are the
            node's last dimensions, one or two; of a complex node there is one more, real and imaginary part.
        lead: how many of the node's dimensions come before those.
        is_complex: whether the node is.
    """

    terms: np.ndarray
    lead: int
    is_complex: bool = False

    @property
    def dims(self) -> tuple[int, ...]:
        """The sizes of the dimensions that were read."""
        return self.terms.shape[: -3 if self.is_complex else -2]

    def is_plain(self) -> bool:
        """Whether each column is a source's, and nothing else."""
        return self.terms.shape[-2] == 1 and not self.terms[..., FACTOR].any()

    def two_terms(self) -> np.ndarray:
        """The terms, two for each column."""
        if self.terms.shape[-2] == 2:
            return self.terms
        return np.concatenate([self.terms, np.zeros_like(self.terms)], axis=-2)


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
        rule = _RULES.get(node.target) if node.op == "call_function" else None
        reading = None
        if rule is not None and self._steps < _MOST_STEPS and dtype_of(node) in _FLOATS:
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
        if width is None or not 0 < width <= _MOST_COLUMNS or dtype_of(node) not in _FLOATS:
            return None
        is_complex = dtype_of(node) == torch.complex64
        parts = [self.source((node.name, part), node, None, sizes[:-1]) for part in range(1 + is_complex)]
        terms = np.zeros((width, len(parts), 1, 5), np.int32)
        terms[..., SIGN] = 1
        terms[:, :, 0, SOURCE] = parts
        terms[..., COLUMN] = np.arange(width)[:, None, None]
        reading = Reading(terms if is_complex else terms[:, 0], len(sizes) - 1, is_complex)
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
        if not of.is_plain() or of.is_complex or of.dims[0] % heads:
            return None
        terms = of.terms[:, 0].reshape(heads, -1, 5)
        one = terms[0].copy()
        steps = terms[min(1, heads - 1), :, COLUMN] - one[:, COLUMN]
        if (terms[..., SIGN] != 1).any() or (terms[..., SOURCE] != one[:, SOURCE]).any():
            return None
        if (terms[..., COLUMN] != one[:, COLUMN] + steps * np.arange(heads)[:, None]).any():
            return None
        lead = (*shape(node)[: of.lead], heads)
        for source in np.unique(one[:, SOURCE]):
            chosen = terms[0, :, SOURCE] == source
            if (steps[chosen] != steps[chosen][0]).any():
                return None
            one[chosen, SOURCE] = self.source(("heads", heads, int(steps[chosen][0])), node, int(source), lead)
        return Reading(one[:, None], len(lead))

    def define(self, node: Node, reading: Reading) -> None:
        """Says what a node's columns are; before anything below it is read."""
        self._readings[node] = reading
        self._remember_plain(node, reading)

    def plain(self, node: Any) -> Reading | None:
        """The reading of ``node`` if it is one of columns alone, else as if it were a source."""
        reading = self.read(node)
        if reading is None or reading.is_plain():
            return reading
        return self._leaf(node)

    def function(self, node: Node, of: Reading, key: tuple[Hashable, ...], lead: tuple[Any, ...]) -> Reading:
        """A reading of ``node`` whose columns are those of a plain one, each after the function ``key``."""
        terms = of.terms.copy()
        for source, sign in {(int(a), int(b)) for a, b in _pairs(of.terms[..., SOURCE], of.terms[..., SIGN])}:
            chosen = (of.terms[..., SOURCE] == source) & (of.terms[..., SIGN] == sign)
            of_what = source if sign > 0 else self.source(("neg",), node, source, self.sources[source].lead)
            terms[..., SOURCE][chosen] = self.source(key, node, of_what, lead)
        terms[..., SIGN] = 1
        return Reading(terms, len(lead), of.is_complex)

    def _remember_plain(self, node: Node, reading: Reading) -> None:
        if len(reading.dims) != 1 or not reading.dims[0] or not reading.is_plain():
            return
        for part in (0, 1) if reading.is_complex else (None,):
            terms = reading.terms[:, 0] if part is None else reading.terms[:, part, 0]
            source = self.sources[int(terms[0, SOURCE])]
            alone = (terms[:, SOURCE] == terms[0, SOURCE]).all() and (terms[:, SIGN] == 1).all()
            if alone and dtype_of(node) == source.dtype:
                source.plain.append((node, terms[:, COLUMN]))


def _pairs(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The different pairs of elements: [pairs, 2]."""
    first = (one.flat[0], other.flat[0])
    if (one == first[0]).all() and (other == first[1]).all():
        return np.array([first])
    return np.unique(np.stack([one.ravel(), other.ravel()], axis=1), axis=0)


_Rule = Callable[[Columns, Node], "Reading | None"]


# ---- arithmetic -----------------------------------------------------------------------------------------------------


def _unary(columns: Columns, node: Node) -> Reading | None:
    """A function of one tensor, element by element, such as a cosine, or a product with a number."""
    inputs = [arg for arg in node.all_input_nodes if tensor(arg) is not None and shape(arg) != ()]
    if len(inputs) != 1 or not _alike(inputs[0], node):
        return None
    of = columns.plain(inputs[0])
    if of is None or of.terms.shape[0] > _MOST_COMPUTED:
        return None
    if of.is_complex and not is_call(node, aten.mul.Tensor, aten.mul.Scalar):
        return None
    # Nodes among the other arguments (sizes, values without dimensions) count by name.
    rest = tuple("x" if arg is inputs[0] else str(arg) for arg in node.args)
    return columns.function(node, of, (str(node.target), *rest, str(sorted(node.kwargs.items()))), _lead(node, of))


def _alike(one: Any, other: Any) -> bool:
    """Whether two nodes have the same shape."""
    return same_sizes(shape(one), shape(other))


def _neg(columns: Columns, node: Node) -> Reading | None:
    of = columns.read(node.args[0])
    if of is None:
        return None
    terms = of.terms.copy()
    terms[..., SIGN] *= -1
    return Reading(terms, of.lead, of.is_complex)


def _cast(columns: Columns, node: Node) -> Reading | None:
    """Casts that lose nothing are none; of sums and products, the rounding is left to whoever asks for the dtype."""
    to, before = dtype_of(node), dtype_of(node.args[0])
    of = columns.read(node.args[0])
    if of is None or before not in _FLOATS or to not in _FLOATS:
        return None
    if of.is_plain() and to != before and to not in _WIDENING.get(before, ()):
        return columns.function(node, of, ("cast", str(to)), _lead(node, of))
    return of


def _lead(node: Node, of: Reading) -> tuple[Any, ...]:
    """The sizes of the dimensions of ``node`` before those that ``of`` has read."""
    return tuple(shape(node)[: len(shape(node)) - len(of.dims)])


def _mul(columns: Columns, node: Node) -> Reading | None:
    if len(node.args) != 2 or node.kwargs:
        return None
    if any(constant(arg) is not None or shape(arg) == () for arg in node.args):
        return _unary(columns, node)
    one, other = (columns.plain(arg) for arg in node.args)
    if one is None or other is None or one.dims != other.dims or one.is_complex != other.is_complex:
        return None
    if np.prod(one.dims) > _MOST_COMPUTED:
        return None
    if one.is_complex:
        real, imaginary = one.terms[..., 0, :, :], one.terms[..., 1, :, :]
        other_real, other_imaginary = other.terms[..., 0, :, :], other.terms[..., 1, :, :]
        minus = _product(imaginary, other_imaginary)
        minus[..., SIGN] *= -1
        parts = [
            _sum(_product(real, other_real), minus),
            _sum(_product(real, other_imaginary), _product(imaginary, other_real)),
        ]
        terms = np.stack(parts, axis=-3)
    else:
        terms = _product(one.terms, other.terms)
    return Reading(terms, max(one.lead, other.lead), one.is_complex)


def _product(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    terms = one.copy()
    terms[..., SIGN] *= other[..., SIGN]
    terms[..., FACTOR] = other[..., SOURCE]
    terms[..., FACTOR_COLUMN] = other[..., COLUMN]
    return terms


def _sum(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.concatenate([one, other], axis=-2)


def _add(columns: Columns, node: Node) -> Reading | None:
    """Sums and differences of two single terms."""
    if len(node.args) != 2 or node.kwargs:
        return None
    if any(constant(arg) is not None or shape(arg) == () for arg in node.args):
        return _unary(columns, node)
    one, other = (columns.read(arg) for arg in node.args)
    if one is None or other is None or one.dims != other.dims or one.is_complex or other.is_complex:
        return None
    if one.terms.shape[-2] == 2 or other.terms.shape[-2] == 2 or one.lead != other.lead:
        return None
    if np.prod(one.dims) > _MOST_COMPUTED:
        return None
    right = other.terms.copy()
    if is_call(node, aten.sub.Tensor):
        right[..., SIGN] *= -1
    return Reading(_sum(one.terms, right), one.lead)


# ---- pieces of rows -------------------------------------------------------------------------------------------------


def _along(node: Node, default: int, place: int) -> tuple[Any, int] | None:
    """(the input of ``node``, the dimension it is about, counted from the first)"""
    inputs = node.args[0]
    dim = node.args[place] if len(node.args) > place else node.kwargs.get("dim", default)
    if not isinstance(dim, int) or not isinstance(inputs, Node):
        return None
    return inputs, dim if dim >= 0 else dim + len(shape(inputs))


def _bounds(node: Node, place: int) -> tuple[Any, Any, Any]:
    """Start, end and step of a slice, which are the arguments of ``node`` from ``place`` on."""
    given: tuple[Any, ...] = node.args[place:]
    defaults: tuple[Any, ...] = (None, None, 1)
    start, end, step = (*given, *defaults[len(given) :])
    return start, end, step


def _are_constant(*bounds: Any) -> bool:
    return all(bound is None or isinstance(bound, int) for bound in bounds)


def _slice(columns: Columns, node: Node) -> Reading | None:
    where = _along(node, 0, 1)
    of = None if where is None else columns.read(where[0])
    if where is None or of is None or node.kwargs:
        return None
    dim = where[1]
    if dim < of.lead:
        return _leading(columns, node)
    start, end, step = _bounds(node, 2)
    if not _are_constant(start, end, step):
        return None
    index = (slice(None),) * (dim - of.lead) + (slice(start, end, step),)
    return Reading(of.terms[index], of.lead, of.is_complex)


def _select(columns: Columns, node: Node) -> Reading | None:
    where = _along(node, 0, 1)
    of = None if where is None else columns.read(where[0])
    if where is None or of is None or not isinstance(node.args[2], int):
        return None
    if where[1] < of.lead:
        return _leading(columns, node)
    if len(of.dims) == 1:
        return None
    return Reading(np.take(of.terms, node.args[2], axis=where[1] - of.lead), of.lead, of.is_complex)


def _getitem(columns: Columns, node: Node) -> Reading | None:
    """A part of a split, or of what was unbound."""
    split, index = node.args
    if not is_call(split, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int):
        return None
    assert isinstance(split, Node)
    assert isinstance(index, int)
    unbinds = is_call(split, aten.unbind.int)
    where = _along(split, 0, 1 if unbinds else 2)
    of = None if where is None else columns.read(where[0])
    if where is None or of is None:
        return None
    axis = where[1] - of.lead
    if axis < 0:
        return None
    if unbinds:
        return Reading(np.take(of.terms, index, axis=axis), of.lead, of.is_complex) if len(of.dims) > 1 else None
    sizes: Any = split.args[1]
    total = of.dims[axis]
    bounds = (
        list(range(0, total, sizes))
        if isinstance(sizes, int)
        else [sum(sizes[:part]) for part in range(len(sizes))]
        if all(isinstance(size, int) for size in sizes)
        else []
    )
    if index >= len(bounds):
        return None
    piece = (slice(None),) * axis + (slice(bounds[index], [*bounds, total][index + 1]),)
    return Reading(of.terms[piece], of.lead, of.is_complex)


def _cat(columns: Columns, node: Node) -> Reading | None:
    parts: Any = node.args[0]
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    readings = [columns.read(part) for part in parts]
    first = readings[0]
    if first is None or any(part is None for part in readings) or not isinstance(dim, int):
        return None
    dim = dim if dim >= 0 else dim + len(shape(node))
    axis = dim - first.lead
    found: list[Reading] = [part for part in readings if part is not None]
    if axis < 0 or any(part.lead != first.lead or part.is_complex for part in found):
        return None
    if any(part.dims[:axis] + part.dims[axis + 1 :] != first.dims[:axis] + first.dims[axis + 1 :] for part in found):
        return None
    if sum(part.dims[axis] for part in found) > _MOST_COLUMNS:
        return None
    return Reading(np.concatenate(_alike_terms(*found), axis=axis), first.lead)


def _alike_terms(*readings: Reading) -> list[np.ndarray]:
    """The terms of all, with as many for each column as any of them has."""
    if len({reading.terms.shape[-2] for reading in readings}) == 1:
        return [reading.terms for reading in readings]
    return [reading.two_terms() for reading in readings]


def _copy(columns: Columns, node: Node) -> Reading | None:
    """What ``a[...] = b`` leaves in ``a``."""
    into, what = node.args[:2]
    if not _alike(into, what) or dtype_of(into) != dtype_of(what):
        return None
    return columns.read(what)


def _slice_scatter(columns: Columns, node: Node) -> Reading | None:
    into, piece = columns.read(node.args[0]), columns.read(node.args[1])
    dim = node.args[2] if len(node.args) > 2 else 0
    start, end, step = _bounds(node, 3)
    if into is None or piece is None or not isinstance(dim, int) or piece.lead != into.lead:
        return None
    if not _are_constant(start, end, step):
        return None
    axis = (dim if dim >= 0 else dim + len(shape(node))) - into.lead
    if axis != len(into.dims) - 1:
        return None
    before, what = _alike_terms(into, piece)
    terms = before.copy()
    chosen = (slice(None),) * axis + (slice(start, end, step),)
    if terms[chosen].shape != what.shape:
        return None
    terms[chosen] = what
    return Reading(terms, into.lead)


# ---- views ----------------------------------------------------------------------------------------------------------


def _leading(columns: Columns, node: Node) -> Reading | None:
    """A view that leaves the columns as they are, and only rearranges the dimensions before them."""
    inputs = node.args[0]
    of = columns.plain(inputs)
    if of is None or len(shape(node)) < len(of.dims):
        return None
    lead = _lead(node, of)
    if not all(same_size(a, b) for a, b in zip(shape(node)[len(lead) :], of.dims, strict=True)):
        return None
    rest = tuple(str(arg) for arg in node.args[1:])
    return columns.function(node, of, (str(node.target), rest), lead)


def _unsqueeze(columns: Columns, node: Node) -> Reading | None:
    of, dim = columns.read(node.args[0]), node.args[1]
    if of is None or not isinstance(dim, int):
        return None
    dim = dim if dim >= 0 else dim + len(shape(node))
    if dim <= of.lead:
        return _leading(columns, node)
    if len(of.dims) > 1:
        return None
    return Reading(np.expand_dims(of.terms, dim - of.lead), of.lead, of.is_complex)


def _squeeze(columns: Columns, node: Node) -> Reading | None:
    where = _along(node, 0, 1)
    of = None if where is None else columns.read(where[0])
    if where is None or of is None:
        return None
    if where[1] < of.lead:
        return _leading(columns, node)
    axis = where[1] - of.lead
    if len(of.dims) == 1 or of.dims[axis] != 1:
        return None
    return Reading(np.take(of.terms, 0, axis=axis), of.lead, of.is_complex)


def _reshape(columns: Columns, node: Node) -> Reading | None:
    """Rows stay as they are, two of the last dimensions become one, or the last one becomes pairs or heads."""
    above: Any = node.args[0]
    if is_call(above, *_RESHAPES) and _alike(above.args[0], node):
        return columns.read(above.args[0])  # there and back
    before, after = shape(above), shape(node)
    if not before or not after:
        return None
    if same_size(before[-1], after[-1]):
        of = columns.read(above)
        if of is None or (len(of.dims) > 1 and not _alike(above, node)):
            return None
        return of if _alike(above, node) else _leading(columns, node)
    if len(after) == len(before) + 1 and same_sizes(before[:-1], after[:-2]):
        parts, size = concrete(after[-2]), concrete(after[-1])
        of = columns.read(above)
        if of is None or len(of.dims) > 1 or parts is None or size is None:
            return None
        if size == 2:  # neighbours, as GPT-J pairs them
            return Reading(of.terms.reshape(parts, 2, *of.terms.shape[1:]), of.lead, of.is_complex)
        return columns.heads(node, of, parts)
    if len(after) == len(before) - 1 and same_sizes(before[:-2], after[:-1]):
        if (repeated := _repeated(columns, above)) is not None:
            return repeated
        of = columns.read(above)
        if of is None or len(of.dims) != 2:
            return None
        return Reading(of.terms.reshape(-1, *of.terms.shape[2:]), of.lead, of.is_complex)
    return None


def _repeated(columns: Columns, node: Any) -> Reading | None:
    """The reading of ``cat([x, x], -1)``, which comes as a reshape of x expanded beside itself: ``node``."""
    while is_call(node, aten.clone.default):
        node = node.args[0]
    above: Any = node.args[0] if is_call(node, aten.expand.default) else None
    if not is_call(above, aten.unsqueeze.default) or above.args[1] not in (-2, len(shape(above)) - 2):
        return None
    of, times = columns.read(above.args[0]), concrete(shape(node)[-2])
    if of is None or len(of.dims) != 1 or times is None or times * of.dims[0] > _MOST_COLUMNS:
        return None
    if not same_sizes(shape(node)[:-2], shape(above)[:-2]):
        return None
    return Reading(np.concatenate([of.terms] * times), of.lead, of.is_complex)


def _permute(columns: Columns, node: Node) -> Reading | None:
    of: Any = columns.read(node.args[0])
    if of is None:
        return None
    order: Any = node.args[1]
    if is_call(node, aten.transpose.int):
        one, other = node.args[1], node.args[2]
        order = list(range(len(shape(node))))
        order[one], order[other] = order[other], order[one]
    order = [dim % len(shape(node)) for dim in order]
    if order[of.lead :] == list(range(of.lead, len(order))):
        return _leading(columns, node)
    if order[: of.lead] != list(range(of.lead)):
        return None
    axes = [dim - of.lead for dim in order[of.lead :]]
    rest = range(len(axes), of.terms.ndim)
    return Reading(of.terms.transpose(*axes, *rest), of.lead, of.is_complex)


def _expand(columns: Columns, node: Node) -> Reading | None:
    of: Any = columns.read(node.args[0])
    if of is None:
        return None
    before, after = shape(node.args[0]), shape(node)
    count = len(of.dims)
    if all(same_size(a, b) for a, b in zip(before[-count:], after[-count:], strict=True)):
        return _leading(columns, node)
    sizes: list[Any] = [concrete(size) for size in after[-count:]]
    if len(before) != len(after) or not all(same_size(a, b) for a, b in zip(before[:-count], after, strict=False)):
        return None
    if any(size is None or (old not in (1, size)) for size, old in zip(sizes, of.dims, strict=True)):
        return None
    rest = of.terms.shape[count:]
    return Reading(np.broadcast_to(of.terms, (*sizes, *rest)), of.lead, of.is_complex)


def _repeat(columns: Columns, node: Node) -> Reading | None:
    """Rows that stand side by side several times; as with ``repeat`` itself, dimensions may be added before them."""
    of, times = columns.plain(node.args[0]), node.args[1]
    if of is None or not isinstance(times, (list, tuple)) or len(of.dims) != 1 or of.is_complex:
        return None
    if any(time != 1 for time in times[:-1]) or not isinstance(times[-1], int):
        return None
    if not 0 < times[-1] * of.dims[0] <= _MOST_COLUMNS:
        return None
    added = len(times) - len(shape(node.args[0]))
    if added:
        of = columns.function(node, of, (str(aten.unsqueeze.default), "0", str(added)), _lead(node, of))
    return Reading(np.tile(of.terms, (times[-1], 1, 1)), of.lead)


def _same(columns: Columns, node: Node) -> Reading | None:
    return columns.read(node.args[0])


# ---- complex numbers ------------------------------------------------------------------------------------------------


def _as_complex(columns: Columns, node: Node) -> Reading | None:
    of = columns.plain(node.args[0])
    if of is None or len(of.dims) != 2 or of.dims[1] != 2:
        return None
    return Reading(of.terms, of.lead, is_complex=True)


def _as_real(columns: Columns, node: Node) -> Reading | None:
    of = columns.read(node.args[0])
    return None if of is None or not of.is_complex else Reading(of.terms, of.lead)


_RULES: dict[Any, _Rule] = {
    operator.getitem: _getitem,
    **dict.fromkeys((aten.cos.default, aten.sin.default, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar), _unary),
    aten.neg.default: _neg,
    aten.mul.Tensor: _mul,
    aten.add.Tensor: _add,
    aten.sub.Tensor: _add,
    prims.convert_element_type.default: _cast,
    aten._to_copy.default: _cast,
    aten.to.dtype: _cast,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    torch.ops.aten.cat.default: _cat,
    aten.copy.default: _copy,
    aten.slice_scatter.default: _slice_scatter,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _leading,
    **dict.fromkeys(_RESHAPES, _reshape),
    aten.permute.default: _permute,
    aten.transpose.int: _permute,
    aten.expand.default: _expand,
    aten.repeat.default: _repeat,
    aten.clone.default: _same,
    aten.alias.default: _same,
    aten.view_as_complex.default: _as_complex,
    aten.view_as_real.default: _as_real,
}
"""How a node's columns follow from its inputs'. What is in no rule is a source."""
