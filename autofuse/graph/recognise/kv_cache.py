"""Finds writes to KV caches: ``index_put`` and its like, as functionalisation leaves them, and vLLM's operators.

``cache[:, :, positions] = k`` and ``index_copy_`` become one ``index_put``, whose result is copied into the graph's
input at the graph's end. A cache that is written through a view (``cache.view(-1, heads, size)[slots] = k``, or one of
two caches in one tensor) is followed to the tensor that it is a view of, and back.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from autofuse.graph.blocks import CacheWriteBlock, Found, NearMiss, Slots
from autofuse.graph.fakes import fake_mode_of, on_layouts
from autofuse.graph.recognise.custom_ops import CustomCall, Layout, Written, custom_calls, layout_of
from autofuse.graph.recognise.nodes import concrete, dtype_of, is_call, is_getitem, same_size, same_sizes, shape, tensor

__all__ = ["find_cache_writes"]

aten = torch.ops.aten

_CACHE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.uint8)
_RESHAPES = (aten.reshape.default, aten.view.default)


class _OffError(Exception):
    """It writes a cache, but the message says what is off."""


def find_cache_writes(graph: Graph) -> Found:
    """All writes of rows to KV caches in a post-grad graph, and what came close to being one."""
    blocks: list[CacheWriteBlock] = []
    near_misses: list[NearMiss] = []
    for node in graph.find_nodes(op="call_function", target=aten.index_put.default):
        try:
            block = _of_index_put(node, {block.output for block in blocks})
        except _OffError as off:
            # Whatever else is scattered into a tensor of the graph's own is no cache.
            if _root(node.args[0])[0].op == "placeholder":  # type: ignore[union-attr]
                near_misses.append(NearMiss("KV-cache write", node, str(off)))
            continue
        if block is not None:
            blocks.append(block)
    for call in custom_calls(graph):
        if call.name in _OPERATORS:
            try:
                blocks += _OPERATORS[call.name](call)
            except _OffError as off:
                near_misses.append(NearMiss("KV-cache write", call.node, str(off)))
    return Found(tuple(sorted(blocks, key=lambda block: block.output)), tuple(near_misses))


# ---- index_put ------------------------------------------------------------------------------------------------------


def _of_index_put(node: Node, written: set[Node]) -> CacheWriteBlock | None:
    """The write that ``node`` is, perhaps to a cache that others have ``written``; None if it is nothing of the kind.

    Raises _OffError.
    """
    cache, indices = node.args[:2]
    rows: Any = node.args[2]
    accumulates = len(node.args) > 3 and node.args[3]
    root, path = _root(cache, written)
    if root is None or dtype_of(node) not in _CACHE_DTYPES or not isinstance(indices, (list, tuple)):
        return None
    back = _back(root, path, node)
    why = _not_in_place(root, back[-1]) if back else f"{node} is read before it is put back into {root}"
    if accumulates or node.kwargs or (root.op == "placeholder" and not _is_written(root)):
        return None  # no cache, but a sum, or an index_put that leaves its input as it is
    given = [dim for dim, index in enumerate(indices) if index is not None]
    order, tokens_at, heads_at, slots = _places(shape(cache), [*indices], given)
    dims = len(shape(cache))
    expected = [*shape(cache)[: given[0]], *shape(slots.index), *shape(cache)[given[-1] + 1 :]]
    dropped: list[Node] = []
    if is_call(rows, *_RESHAPES) and len(rows.users) == 1 and same_sizes(expected, shape(rows.args[0])):
        dropped, rows = [rows], rows.args[0]  # assignment drops leading ones
    if not _fits(shape(rows), expected):
        raise _OffError(f"its rows {rows} are {list(shape(rows))}, not {expected}")
    if given == [0] and _merges_blocks(root, path, shape(cache)):
        # Rows counted through all blocks are slots; the cache is its root as it is.
        layout, whole = _layout(root, [], (0, 1, None if dims == 2 else 2, dims), dims + 1)
    else:
        layout, whole = _layout(root, path, order, dims)
    dtype = dtype_of(cache)
    assert dtype is not None
    if dtype_of(rows) != dtype:
        raise _OffError(f"its rows {rows} are {dtype_of(rows)}, the cache {dtype}")
    last = back[-1] if back else node
    return CacheWriteBlock(
        output=last,
        nodes=tuple(sorted({*path, *dropped, node, *back})),
        root=root,
        layout=layout,
        whole=whole,
        parts=(rows,),
        tokens_at=tokens_at,
        heads_at=heads_at,
        slots=slots,
        dtype=dtype,
        not_in_place=why,
        selected=_selected(path[0]) if path else None,
        joined=_joined(rows),
    )


def _places(
    sizes: Sequence[Any], indices: list[Any], given: list[int]
) -> tuple[tuple[int | None, ...], tuple[int, ...], int | None, Slots]:
    """(which dimension of the cache is blocks, rows, heads, columns; tokens; heads of what is written; where to)"""
    dims = len(sizes)
    nodes = [indices[dim] for dim in given]
    if not given or any(dtype_of(index) != torch.int64 for index in nodes):
        raise _OffError(f"its indices {list(map(str, nodes))} are no int64 tensors")
    rank = len(shape(nodes[0]))
    if given == [0, 1] and dims in (3, 4) and same_sizes(shape(nodes[0]), shape(nodes[1])):
        heads = None if dims == 3 else 2
        slots = _slots_of(nodes[0], nodes[1], sizes[1])
        return (0, 1, heads, dims - 1), tuple(range(rank)), None if heads is None else rank, slots
    if given == [0] and dims in (2, 3):
        heads = None if dims == 2 else 1
        return (None, 0, heads, dims - 1), tuple(range(rank)), None if heads is None else rank, Slots(nodes[0])
    if given in ([1], [2]) and rank == 1 and dims in (3, 4) and given[0] < dims - 1:
        row = given[0]
        heads = None if dims == 3 else 3 - row
        if dims == 3 and row == 2:
            raise _OffError(f"it writes columns of {list(sizes)}")
        return (0, row, heads, dims - 1), (0, row), heads, Slots(nodes[0], per_block=True)
    raise _OffError(f"it writes at dimensions {given} of {list(sizes)}")


def _fits(sizes: Sequence[Any], expected: Sequence[Any]) -> bool:
    """Whether rows of these sizes are written one by one. Two symbols for T may be two names: only one row would be
    written everywhere, and a symbol is never 1.
    """
    return len(sizes) == len(expected) and all(
        same_size(a, b) or (concrete(a) is None and concrete(b) is None and _never_one(a))
        for a, b in zip(sizes, expected, strict=True)
    )


def _never_one(size: Any) -> bool:
    if not isinstance(size, torch.SymInt):
        return False
    return bool(size.node.shape_env.bound_sympy(size.node.expr).lower >= 2)


def _merges_blocks(root: Node, path: Sequence[Node], sizes: Sequence[Any]) -> bool:
    """Whether the cache is ``root.flatten(0, 1)``."""
    whole = shape(root)
    return len(path) == 1 and is_call(path[0], *_RESHAPES) and same_sizes(whole[2:], sizes[1:])


def _slots_of(blocks: Node, index: Node, size: Any) -> Slots:
    """``cache[slots // size, slots % size]`` is written at ``slots``."""
    if is_call(blocks, aten.div.Tensor_mode) and is_call(index, aten.remainder.Scalar, aten.remainder.Tensor):
        floors = blocks.kwargs.get("rounding_mode") == "floor" and blocks.args[0] is index.args[0]
        by = (blocks.args[1], index.args[1])
        if floors and concrete(size) is not None and by == (concrete(size),) * 2:
            slots = blocks.args[0]
            assert isinstance(slots, Node)
            return Slots(slots)
    return Slots(index, blocks=blocks)


def _joined(rows: Any) -> tuple[Node, ...]:
    """What is put side by side for the write alone."""
    if not is_call(rows, aten.cat.default) or len(rows.users) != 1:
        return ()
    dim = rows.args[1] if len(rows.args) > 1 else rows.kwargs.get("dim", 0)
    return tuple(rows.args[0]) if dim in (-1, len(shape(rows)) - 1) else ()


# ---- the storage of a cache -----------------------------------------------------------------------------------------


def _root(cache: Any, written: Collection[Node] = ()) -> tuple[Node | None, list[Node]]:
    """(the node that ``cache`` is a view of, the views from there to ``cache``)"""
    path: list[Node] = []
    node: Any = cache
    while True:
        if node in written:
            return node, path[::-1]
        if is_call(node, *_RESHAPES, aten.unsqueeze.default, aten.squeeze.dim, aten.select.int):
            path.append(node)
            node = node.args[0]
        elif is_getitem(node) and is_call(node.args[0], aten.unbind.int):
            path.append(node)
            node = node.args[0].args[0]
        else:
            return (node if tensor(node) is not None else None), path[::-1]


def _back(root: Node, path: Sequence[Node], written: Node) -> list[Node]:
    """From what was written through the inverse of ``path`` to the whole of ``root``; [] if others read on the way."""
    nodes = [written]
    for view in reversed(path):
        users = list(nodes[-1].users)
        above = view.args[0].args[0] if is_getitem(view) else view.args[0]  # type: ignore[union-attr]
        user = users[0] if len(users) == 1 else None
        selects = is_getitem(view) or is_call(view, aten.select.int)
        fits = user is not None and same_sizes(shape(user), shape(above))
        if not fits or (selects and not _puts_back(user, view, nodes[-1], above)):
            return []
        if not selects and not is_call(user, *_RESHAPES, aten.unsqueeze.default, aten.squeeze.dim):
            return []
        assert user is not None
        nodes.append(user)
    return nodes


def _puts_back(user: Any, view: Node, written: Node, above: Any) -> bool:
    """Whether ``user`` is ``select_scatter`` of what ``view`` selected."""
    if not is_call(user, aten.select_scatter.default) or user.args[1] is not written:
        return False
    # The other writes of the call may have been put back already.
    return user.args[2:] == _selected(view) and (user.args[0] is above or _is_scatter_of(user.args[0], above))


def _selected(view: Node) -> tuple[int, int] | None:
    """(dimension, index) of a view that is one of several parts of a tensor."""
    dim: Any
    index: Any
    if is_getitem(view):
        unbind: Any = view.args[0]
        dim, index = (unbind.args[1] if len(unbind.args) > 1 else unbind.kwargs.get("dim", 0)), view.args[1]
    elif is_call(view, aten.select.int):
        dim, index = view.args[1:3]
    else:
        return None
    return (dim, index) if isinstance(dim, int) and isinstance(index, int) else None


def _is_scatter_of(node: Any, root: Any) -> bool:
    return is_call(node, aten.select_scatter.default) and (node.args[0] is root or _is_scatter_of(node.args[0], root))


def _is_written(root: Node) -> bool:
    return any(is_call(user, aten.copy_.default) and user.args[0] is root for user in root.users)


def _not_in_place(root: Node, after: Node) -> str:
    """Why the storage of ``root`` must not be written to: an input that keeps its contents; "" if it may be."""
    if root.op == "get_attr":
        return f"{root} is a constant of the graph"
    if root.op != "placeholder":
        return ""
    copies = [user for user in root.users if is_call(user, aten.copy_.default) and user.args[0] is root]
    if len(copies) != 1:
        return f"{root} is an input of the graph that is not written to"
    written: Any = copies[0].args[1]
    return "" if _comes_from(written, after) else f"{root} gets {written} in the end, not {after}"


def _comes_from(node: Any, after: Node) -> bool:
    """Whether ``node`` holds the cache after ``after``, and perhaps after further writes to it."""
    for _ in range(64):
        if node is after:
            return True
        if is_call(node, aten.index_put.default, aten.select_scatter.default, *_RESHAPES):
            inner = node.args[1] if is_call(node, aten.select_scatter.default) else node.args[0]
            if is_call(node, aten.select_scatter.default) and _comes_from(inner, after):
                return True
            node = node.args[0]
        elif is_getitem(node) and is_call(node.args[0], aten.unbind.int):
            node = node.args[0].args[0]
        else:
            return False
    return False


def _layout(root: Node, path: Sequence[Node], order: Sequence[int | None], dims: int) -> tuple[Layout, bool]:
    """(the cache as [blocks, rows, heads, columns] in the storage of ``root``, whether that is ``root`` itself)"""
    value = tensor(root)
    assert value is not None
    if fake_mode_of([value]) is None:
        raise _OffError(f"{root} has no fake tensor")
    with on_layouts(value, *map(tensor, path)):
        view: Any = value
        for node in path:
            if is_getitem(node):
                unbind: Any = node.args[0]
                view = torch.unbind(view, *unbind.args[1:], **unbind.kwargs)[node.args[1]]  # type: ignore[index]
            elif is_call(node, *_RESHAPES):
                try:
                    view = view.view(shape(node))
                except (RuntimeError, ValueError):
                    raise _OffError(f"{node} is a copy of {root}, no view") from None
            else:
                view = node.target(view, *node.args[1:])  # type: ignore[operator]
        assert view.dim() == dims
        sizes = tuple(1 if dim is None else view.shape[dim] for dim in order)
        strides = tuple(0 if dim is None else view.stride(dim) for dim in order)
        layout = (sizes, strides, view.storage_offset())
    if concrete(strides[-1]) != 1:
        raise _OffError(f"the last dimension of {root} is not contiguous")
    return layout, not path and [dim for dim in order if dim is not None] == list(range(dims))


# ---- vLLM's operators -----------------------------------------------------------------------------------------------


def _flash(call: CustomCall) -> list[CacheWriteBlock]:
    """``reshape_and_cache_flash``: key and value [T, heads, size] into caches [blocks, block_size, heads, size]."""
    args = call.args
    return [
        _of_operator(call, f"{name}_cache", (args[name],), args[f"{name[0]}_scale"], heads_at=1)
        for name in ("key", "value")
    ]


def _mla(call: CustomCall) -> list[CacheWriteBlock]:
    """``concat_and_cache_mla``: kv_c [T, L] and k_pe [T, R] into a cache [blocks, block_size, L + R]."""
    args = call.args
    if args.get("skip_scale") and args["kv_cache_dtype"] != "auto":
        raise _OffError("it leaves out the division by the cache's scale (skip_scale)")
    return [_of_operator(call, "kv_cache", (args["kv_c"], args["k_pe"]), args["scale"], heads_at=None)]


_OPERATORS: Mapping[str, Callable[[CustomCall], list[CacheWriteBlock]]] = {
    "_C_cache_ops::reshape_and_cache_flash": _flash,
    "_C_cache_ops::concat_and_cache_mla": _mla,
}


def _of_operator(
    call: CustomCall, name: str, parts: tuple[Node, ...], scale: Node, heads_at: int | None
) -> CacheWriteBlock:
    written = call.written[name]
    if written is None or written.item is None:
        raise _OffError(f"nobody reads its {name}")
    root, path = _root(written.before) if written.layout is None else (written.before, [])
    assert root is not None
    back = _back(root, path, written.item) if path else [written.item]
    if not back:
        raise _OffError(f"{written.item} is read before it is put back into {root}")
    layout, whole = _operator_layout(written, root, path, heads_at)
    dtype = dtype_of(root)
    if dtype not in _CACHE_DTYPES:
        raise _OffError(f"its {name} is {dtype}")
    assert dtype is not None
    return CacheWriteBlock(
        output=back[-1],
        nodes=tuple(sorted({*path, call.node, *back})),
        root=root,
        layout=layout,
        whole=whole,
        parts=parts,
        tokens_at=(0,),
        heads_at=heads_at,
        slots=Slots(call.args["slot_mapping"], skips_negative=True),
        dtype=dtype,
        not_in_place=_not_in_place(root, back[-1]),
        selected=_selected(path[0]) if path else None,
        call=call.node,
        scale=(call.args["kv_cache_dtype"], scale),
    )


def _operator_layout(written: Written, root: Node, path: Sequence[Node], heads_at: int | None) -> tuple[Layout, bool]:
    order = (0, 1, 2, 3) if heads_at is not None else (0, 1, None, 2)
    dims = 4 if heads_at is not None else 3
    whole = layout_of(written.before) if written.layout is None else written.layout
    assert whole is not None
    if len(whole[0]) != dims:
        raise _OffError(f"its cache {written.before} is {list(whole[0])}")
    if written.layout is None:
        layout, _ = _layout(root, path, order, dims)
        return layout, not path
    sizes, strides, offset = written.layout
    if concrete(strides[-1]) != 1:
        raise _OffError(f"the last dimension of {written.before} is not contiguous")
    return (
        tuple(1 if dim is None else sizes[dim] for dim in order),
        tuple(0 if dim is None else strides[dim] for dim in order),
        offset,
    ), False
