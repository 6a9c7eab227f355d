"""How a node's columns follow from its inputs': arithmetic, pieces of rows, views and complex numbers."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import numpy as np
import torch
from torch.fx import Node

from autofuse.graph.recognise.nodes import concrete, constant, dtype_of, is_call, same_size, same_sizes, shape, tensor
from autofuse.graph.recognise.readings import SIGN, Reading, alike_terms, product_of, sum_of

__all__ = ["FLOATS", "MOST_COLUMNS", "REARRANGES", "RULES", "SPLITS", "VIEWS", "Reader"]

aten = torch.ops.aten
prims = torch.ops.prims

MOST_COLUMNS = 16384
"""Wider rows are not read."""
_MOST_COMPUTED = 2048
"""Arithmetic on wider rows is not read: they are no heads."""
_WIDENING = {
    torch.bfloat16: (torch.float32, torch.float64),
    torch.float16: (torch.float32, torch.float64),
    torch.float32: (torch.float64,),
}
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.complex64)

SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int)
"""What gives parts of its first argument, as items."""
_RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)


class Reader(Protocol):
    """What rules ask of ``Columns``."""

    def read(self, node: Any) -> Reading | None: ...

    def plain(self, node: Any) -> Reading | None: ...

    def heads(self, node: Node, of: Reading, heads: int) -> Reading | None: ...

    def function(self, node: Node, of: Reading, key: tuple[Hashable, ...], lead: tuple[Any, ...]) -> Reading: ...


Rule = Callable[[Reader, Node], "Reading | None"]


# ---- arithmetic -----------------------------------------------------------------------------------------------------


def _unary(columns: Reader, node: Node) -> Reading | None:
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


def _neg(columns: Reader, node: Node) -> Reading | None:
    of = columns.read(node.args[0])
    if of is None:
        return None
    terms = of.terms.copy()
    terms[..., SIGN] *= -1
    return Reading(terms, of.lead, of.is_complex)


def _cast(columns: Reader, node: Node) -> Reading | None:
    """Casts that lose nothing are none; of sums and products, the rounding is left to whoever asks for the dtype."""
    to, before = dtype_of(node), dtype_of(node.args[0])
    of = columns.read(node.args[0])
    if of is None or before not in FLOATS or to not in FLOATS:
        return None
    if of.is_plain and to != before and to not in _WIDENING.get(before, ()):
        return columns.function(node, of, ("cast", str(to)), _lead(node, of))
    return of


def _lead(node: Node, of: Reading) -> tuple[Any, ...]:
    """The sizes of the dimensions of ``node`` before those that ``of`` has read."""
    return tuple(shape(node)[: len(shape(node)) - len(of.dims)])


def _mul(columns: Reader, node: Node) -> Reading | None:
    if len(node.args) != 2 or node.kwargs:
        return None
    if any(constant(arg) is not None or shape(arg) == () for arg in node.args):
        return _unary(columns, node)
    one, other = (columns.plain(arg) for arg in node.args)
    if one is None or other is None or one.dims != other.dims or one.is_complex != other.is_complex:
        return None
    if math.prod(one.dims) > _MOST_COMPUTED:
        return None
    if one.is_complex:
        real, imaginary = one.terms[..., 0, :, :], one.terms[..., 1, :, :]
        other_real, other_imaginary = other.terms[..., 0, :, :], other.terms[..., 1, :, :]
        minus = product_of(imaginary, other_imaginary)
        minus[..., SIGN] *= -1
        parts = [
            sum_of(product_of(real, other_real), minus),
            sum_of(product_of(real, other_imaginary), product_of(imaginary, other_real)),
        ]
        terms = np.stack(parts, axis=-3)
    else:
        terms = product_of(one.terms, other.terms)
    return Reading(terms, max(one.lead, other.lead), one.is_complex)


def _add(columns: Reader, node: Node) -> Reading | None:
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
    if math.prod(one.dims) > _MOST_COMPUTED:
        return None
    right = other.terms.copy()
    if is_call(node, aten.sub.Tensor):
        right[..., SIGN] *= -1
    return Reading(sum_of(one.terms, right), one.lead)


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


def _slice(columns: Reader, node: Node) -> Reading | None:
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
    return of.rearranged(of.terms[index])


def _select(columns: Reader, node: Node) -> Reading | None:
    where = _along(node, 0, 1)
    of = None if where is None else columns.read(where[0])
    if where is None or of is None or not isinstance(node.args[2], int):
        return None
    if where[1] < of.lead:
        return _leading(columns, node)
    if len(of.dims) == 1:
        return None
    return of.rearranged(np.take(of.terms, node.args[2], axis=where[1] - of.lead))


def _getitem(columns: Reader, node: Node) -> Reading | None:
    """A part of a split, or of what was unbound."""
    split, index = node.args
    if not is_call(split, *SPLITS):
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
        return of.rearranged(np.take(of.terms, index, axis=axis)) if len(of.dims) > 1 else None
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
    return of.rearranged(of.terms[piece])


def _cat(columns: Reader, node: Node) -> Reading | None:
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
    if sum(part.dims[axis] for part in found) > MOST_COLUMNS:
        return None
    alone = first.alone if all(part.alone == first.alone for part in found) else None
    return Reading(np.concatenate(alike_terms(*found), axis=axis), first.lead, alone=alone)


def _copy(columns: Reader, node: Node) -> Reading | None:
    """What ``a[...] = b`` leaves in ``a``."""
    into, what = node.args[:2]
    if not _alike(into, what) or dtype_of(into) != dtype_of(what):
        return None
    return columns.read(what)


def _slice_scatter(columns: Reader, node: Node) -> Reading | None:
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
    before, what = alike_terms(into, piece)
    terms = before.copy()
    chosen = (slice(None),) * axis + (slice(start, end, step),)
    if terms[chosen].shape != what.shape:
        return None
    terms[chosen] = what
    return Reading(terms, into.lead)


# ---- views ----------------------------------------------------------------------------------------------------------


def _leading(columns: Reader, node: Node) -> Reading | None:
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


def _unsqueeze(columns: Reader, node: Node) -> Reading | None:
    of, dim = columns.read(node.args[0]), node.args[1]
    if of is None or not isinstance(dim, int):
        return None
    dim = dim if dim >= 0 else dim + len(shape(node))
    if dim <= of.lead:
        return _leading(columns, node)
    if len(of.dims) > 1:
        return None
    return of.rearranged(np.expand_dims(of.terms, dim - of.lead))


def _squeeze(columns: Reader, node: Node) -> Reading | None:
    where = _along(node, 0, 1)
    of = None if where is None else columns.read(where[0])
    if where is None or of is None:
        return None
    if where[1] < of.lead:
        return _leading(columns, node)
    axis = where[1] - of.lead
    if len(of.dims) == 1 or of.dims[axis] != 1:
        return None
    return of.rearranged(np.take(of.terms, 0, axis=axis))


def _reshape(columns: Reader, node: Node) -> Reading | None:
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
            return of.rearranged(of.terms.reshape(parts, 2, *of.terms.shape[1:]))
        return columns.heads(node, of, parts)
    if len(after) == len(before) - 1 and same_sizes(before[:-2], after[:-1]):
        if (repeated := _repeated(columns, above)) is not None:
            return repeated
        of = columns.read(above)
        if of is None or len(of.dims) != 2:
            return None
        return of.rearranged(of.terms.reshape(-1, *of.terms.shape[2:]))
    return None


def _repeated(columns: Reader, node: Any) -> Reading | None:
    """The reading of ``cat([x, x], -1)``, which comes as a reshape of x expanded beside itself: ``node``."""
    while is_call(node, aten.clone.default):
        node = node.args[0]
    above: Any = node.args[0] if is_call(node, aten.expand.default) else None
    if not is_call(above, aten.unsqueeze.default) or above.args[1] not in (-2, len(shape(above)) - 2):
        return None
    of, times = columns.read(above.args[0]), concrete(shape(node)[-2])
    if of is None or len(of.dims) != 1 or times is None or times * of.dims[0] > MOST_COLUMNS:
        return None
    if not same_sizes(shape(node)[:-2], shape(above)[:-2]):
        return None
    return of.rearranged(np.concatenate([of.terms] * times))


def _permute(columns: Reader, node: Node) -> Reading | None:
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
    return of.rearranged(of.terms.transpose(*axes, *rest))


def _expand(columns: Reader, node: Node) -> Reading | None:
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
    return of.rearranged(np.broadcast_to(of.terms, (*sizes, *rest)))


def _repeat(columns: Reader, node: Node) -> Reading | None:
    """Rows that stand side by side several times; as with ``repeat`` itself, dimensions may be added before them."""
    of, times = columns.plain(node.args[0]), node.args[1]
    if of is None or not isinstance(times, (list, tuple)) or len(of.dims) != 1 or of.is_complex:
        return None
    if any(time != 1 for time in times[:-1]) or not isinstance(times[-1], int):
        return None
    if not 0 < times[-1] * of.dims[0] <= MOST_COLUMNS:
        return None
    added = len(times) - len(shape(node.args[0]))
    if added:
        of = columns.function(node, of, (str(aten.unsqueeze.default), "0", str(added)), _lead(node, of))
    return of.rearranged(np.tile(of.terms, (times[-1], 1, 1)))


def _same(columns: Reader, node: Node) -> Reading | None:
    return columns.read(node.args[0])


# ---- complex numbers ------------------------------------------------------------------------------------------------


def _as_complex(columns: Reader, node: Node) -> Reading | None:
    of = columns.plain(node.args[0])
    if of is None or len(of.dims) != 2 or of.dims[1] != 2:
        return None
    return Reading(of.terms, of.lead, is_complex=True)


def _as_real(columns: Reader, node: Node) -> Reading | None:
    of = columns.read(node.args[0])
    return None if of is None or not of.is_complex else Reading(of.terms, of.lead)


_ARITHMETIC: dict[Any, Rule] = {
    **dict.fromkeys((aten.cos.default, aten.sin.default, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar), _unary),
    aten.mul.Tensor: _mul,
    aten.add.Tensor: _add,
    aten.sub.Tensor: _add,
    aten.view_as_complex.default: _as_complex,
    aten.view_as_real.default: _as_real,
}
REARRANGES: dict[Any, Rule] = {
    operator.getitem: _getitem,
    aten.neg.default: _neg,
    prims.convert_element_type.default: _cast,
    aten._to_copy.default: _cast,
    aten.to.dtype: _cast,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
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
}
"""What rearranges, negates or casts the columns of its first argument."""
VIEWS: dict[Any, Rule] = {
    **REARRANGES,
    aten.cat.default: _cat,
    aten.copy.default: _copy,
    aten.slice_scatter.default: _slice_scatter,
}
"""What rearranges, negates or casts columns, and combines none."""
RULES: dict[Any, Rule] = {**_ARITHMETIC, **VIEWS}
"""How a node's columns follow from its inputs'. What is in no rule is a source."""
