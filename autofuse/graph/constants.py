"""What a graph may take for constant: a model's weights, which nothing launched shortly before it writes."""

from __future__ import annotations

import torch
from torch._guards import TracingContext
from torch.fx import Node

from autofuse.graph.recognise.nodes import is_call, is_getitem

__all__ = ["is_constant"]

aten = torch.ops.aten
_VIEWS = (
    aten.permute.default,
    aten.reshape.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.squeeze.dim,
    aten.t.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.view.default,
)


def is_constant(node: Node) -> bool:
    """Whether ``node`` is a view of a parameter or buffer of the model that the graph does not write.

    AOTAutograd knows these as static inputs, whose memory CUDA graphs do not copy. A constant of the graph itself is
    one as well.
    """
    base = node
    while (is_getitem(base) or any(is_call(base, view) for view in _VIEWS)) and isinstance(base.args[0], Node):
        base = base.args[0]
    if base.op == "get_attr":
        return _share_memory(node, base)
    return base.op == "placeholder" and _is_static(base) and _share_memory(node, base) and not _is_written(base)


def _is_static(placeholder: Node) -> bool:
    context = TracingContext.try_get()
    if context is None or context.fw_metadata is None:
        return False
    inputs = placeholder.graph.find_nodes(op="placeholder")
    static = set(context.fw_metadata.static_input_indices)
    return any(node is placeholder for index, node in enumerate(inputs) if index in static)


def _share_memory(view: Node, base: Node) -> bool:
    """A reshape may have to copy: then a kernel of the graph writes what it returns."""
    first, second = view.meta.get("val"), base.meta.get("val")
    if view is base:
        return True
    if not isinstance(first, torch.Tensor) or not isinstance(second, torch.Tensor):
        return False
    return first.untyped_storage()._cdata == second.untyped_storage()._cdata


def _is_written(base: Node) -> bool:
    """Whether a node may write to ``base`` or a view of it. What is not known counts as writing."""
    todo = [base]
    while todo:
        for user in todo.pop().users:
            if user.op == "output":
                continue
            if is_getitem(user) or any(is_call(user, view) for view in _VIEWS):
                todo.append(user)
            elif not isinstance(user.target, torch._ops.OpOverload) or user.target._schema.is_mutable:
                return True
    return False
