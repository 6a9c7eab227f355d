"""Calls of custom operators, as post-grad graphs hold them: plainly, or made functional where they write.

PyTorch wraps an operator that writes into its arguments in ``auto_functionalized`` (version 1) or
``auto_functionalized_v2``: what the operator wrote is then item 1, 2, … of the call's result, in the order of the
schema. Version 2 names whole buffers, and says which part of its buffer each argument is.

Operators are told apart by name, so that nobody need have vLLM installed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._higher_order_ops.auto_functionalize import auto_functionalized, auto_functionalized_v2
from torch.fx import Graph, Node

from autofuse.graph.recognise.nodes import is_call, is_getitem, same_size, tensor

__all__ = ["CustomCall", "Written", "custom_calls", "layout_of", "made_for", "operator_name"]

aten = torch.ops.aten
_EMPTY = (aten.empty.memory_format, aten.empty_strided.default, aten.new_empty.default, aten.new_empty_strided.default)

Layout = tuple[tuple[Any, ...], tuple[Any, ...], Any]
"""Sizes, strides and storage offset, in elements."""


@dataclass(frozen=True)
class Written:
    """What a call wrote into one argument.

    Attributes:
        before: the buffer before the call.
        item: the buffer after it, an item of the call's result; None if nobody reads it.
        layout: of the argument within its buffer; None if it is the whole of it.
    """

    before: Node
    item: Node | None
    layout: Layout | None

    def value(self) -> Node | None:
        """The node that holds the argument after the call; None if there is none, or not exactly one."""
        if self.item is None or self.layout is None:
            return self.item
        views = [user for user in self.item.users if _has_layout(user, self.layout)]
        return views[0] if len(views) == 1 and len(self.item.users) == 1 else None


@dataclass(frozen=True)
class CustomCall:
    """One call of a custom operator.

    Attributes:
        node: that calls.
        name: e.g. ``_C::rms_norm``; with its overload if that is not the default, e.g. ``_C::scaled_fp4_quant.out``.
        args: those that are only read, by name, defaults included.
        written: the arguments that are written, by name; None for one that was None.
    """

    node: Node
    name: str
    args: Mapping[str, Any]
    written: Mapping[str, Written | None]

    def results(self) -> dict[int, Node]:
        """The items of a call that returns several tensors, by their index."""
        return {user.args[1]: user for user in self.node.users if is_getitem(user)}  # type: ignore[misc]

    def own_nodes(self) -> list[Node]:
        """The call, its items, and the buffers that were made for it alone."""
        made = [node for each in self.written.values() if each is not None for node in made_for(each.before)]
        return [*made, self.node, *(user for user in self.node.users if is_getitem(user))]


def custom_calls(graph: Graph) -> Iterator[CustomCall]:
    """All calls of operators that are not PyTorch's own, in graph order."""
    plain: set[int] = set()  # PyTorch's own operators by their ids: asking for a name takes longer, and most are
    for node in graph.nodes:
        if node.op != "call_function" or id(node.target) in plain:
            continue
        if node.target in (auto_functionalized, auto_functionalized_v2):
            call = _functional(node)
            if call is not None:
                yield call
        elif isinstance(node.target, torch._ops.OpOverload) and node.target.namespace not in ("aten", "prims"):
            schema = node.target._schema
            if not schema.is_mutable:
                yield CustomCall(node, _name(node.target), _by_name(schema, node.args, node.kwargs), {})
        else:
            plain.add(id(node.target))


def operator_name(node: Node) -> str | None:
    """The operator that a node calls, plainly or made functional, if it is not PyTorch's own: ``namespace::name``."""
    if node.op != "call_function":
        return None
    target = node.args[0] if node.target in (auto_functionalized, auto_functionalized_v2) else node.target
    is_custom = isinstance(target, torch._ops.OpOverload) and target.namespace not in ("aten", "prims")
    return target._schema.name if is_custom else None  # type: ignore[union-attr]


def layout_of(node: Node) -> Layout | None:
    value = tensor(node)
    return None if value is None else (tuple(value.shape), tuple(value.stride()), value.storage_offset())


def _functional(node: Node) -> CustomCall | None:
    op: Any = node.args[0]
    if not isinstance(op, torch._ops.OpOverload):
        return None
    schema = op._schema
    first = 1 if len(schema.returns) < 2 else len(schema.returns)  # of the results that are written arguments
    items = {user.args[1]: user for user in node.users if is_getitem(user)}
    names = [arg.name for arg in schema.arguments if arg.is_write]
    given = dict(node.kwargs)
    written: dict[str, Written | None] = {}
    if node.target is auto_functionalized:
        for place, name in enumerate(names, start=first):
            before = given.pop(name, None)
            written[name] = Written(before, items.get(place), None) if isinstance(before, Node) else None
    else:
        bases: Any = given.pop("_all_bases")
        for name in names:
            view = {key: given.pop(f"_{name}_{key}") for key in _VIEW_KEYS if f"_{name}_{key}" in given}
            index: Any = view.pop("base_index", None)
            if index is None:
                written[name] = None
                continue
            layout = _layout_in_base(view, bases[index])
            written[name] = Written(bases[index], items.get(first + index), layout)
    return CustomCall(node, _name(op), _by_name(schema, (), given, leave_out=names), written)


_VIEW_KEYS = (
    *("base_index", "alias", "size", "stride", "storage_offset"),
    *("slice_dim", "slice_start", "slice_end"),
)


def _layout_in_base(view: Mapping[str, Any], base: Node) -> Layout | None:
    """Where the argument lies, as version 2 says it; sizes may be nodes there."""
    known = {
        key: torch.fx.map_arg(value, lambda node: node.meta["val"]) for key, value in view.items() if key != "alias"
    }
    if not known:
        return None
    whole = layout_of(base)
    assert whole is not None
    if "slice_dim" not in known:
        return tuple(known["size"]), tuple(known["stride"]), known["storage_offset"]
    sizes, strides, offset = whole
    dim, start, end = known["slice_dim"], known["slice_start"], known["slice_end"]
    sizes = (*sizes[:dim], end - start, *sizes[dim + 1 :])
    return sizes, strides, offset + start * strides[dim]


def _has_layout(node: Node, layout: Layout) -> bool:
    own = layout_of(node)
    if own is None or len(own[0]) != len(layout[0]):
        return False
    pairs = [*zip(own[0], layout[0], strict=True), *zip(own[1], layout[1], strict=True), (own[2], layout[2])]
    return all(same_size(one, other) for one, other in pairs)


def made_for(buffer: Node) -> list[Node]:
    """The nodes that make an uninitialised buffer, if it has but one reader; else none."""
    made: list[Node] = []
    node: Any = buffer
    while isinstance(node, Node) and len(node.users) == 1:
        made.append(node)
        if is_call(node, *_EMPTY):
            return made
        if not is_call(node, aten.permute.default, aten.as_strided.default, aten.slice.Tensor):
            return []
        node = node.args[0]
    return []


def _name(op: torch._ops.OpOverload) -> str:
    return op._schema.name + (f".{op._schema.overload_name}" if op._schema.overload_name else "")


def _by_name(schema: torch.FunctionSchema, args: Any, kwargs: Mapping[str, Any], leave_out: Any = ()) -> dict[str, Any]:
    """Arguments by name, defaults filled in."""
    names = [arg.name for arg in schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return {arg.name: given.get(arg.name, arg.default_value) for arg in schema.arguments if arg.name not in leave_out}
