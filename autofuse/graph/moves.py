"""Which nodes may be moved up: pure ones, with no mutation on their way."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Node

__all__ = ["RefusedError", "check_movable", "check_no_mutation", "nodes_to_hoist"]

_PURE_PYTHON_MODULES = ("_operator", "builtins", "math", operator.__name__)


class RefusedError(Exception):
    """A match that must not be fused; the message says why."""


def _is_sized_arithmetic(target: Any) -> bool:
    return getattr(target, "__module__", None) in _PURE_PYTHON_MODULES or target in (
        torch.sym_int,
        torch.sym_max,
        torch.sym_min,
    )


def _mutates(node: Node) -> bool:
    """Whether ``node`` may write to a tensor that another node reads. What is not known counts as writing."""
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    if node.op != "call_function":
        return True
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    # The functional wrappers that AOT puts around mutating operators return new tensors.
    name = getattr(node.target, "__name__", "")
    return not (_is_sized_arithmetic(node.target) or "functional" in name)


def _movable(node: Node) -> bool:
    if node.op == "get_attr":
        return True
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        tags = node.target.tags
        return not node.target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in tags
    return _is_sized_arithmetic(node.target)


def check_movable(node: Node, before: Node) -> None:
    """Raises RefusedError if ``node`` must stay where it is, and so cannot be moved above ``before``."""
    if not _movable(node):
        raise RefusedError(f"{node} ({node.target}) cannot be moved above {before}")


def nodes_to_hoist(needed: Iterable[Node], before: Node) -> tuple[Node, ...]:
    """What must be moved above ``before`` so that ``needed`` can be read there, in graph order.

    Raises RefusedError if one of them depends on ``before`` or must not be moved.
    """
    hoisted: set[Node] = set()
    todo = list(needed)
    while todo:
        node = todo.pop()
        if node < before or node in hoisted:
            continue
        if node is before:
            raise RefusedError(f"one of its inputs depends on the result {before} of the other half")
        check_movable(node, before)
        hoisted.add(node)
        todo += node.all_input_nodes
    return tuple(sorted(hoisted))


def check_no_mutation(nodes: Iterable[Node]) -> None:
    """Raises RefusedError if anything between the first and the last of ``nodes`` may write to a tensor."""
    span = [*nodes]
    node = first = min(span)
    last = max(span)
    while True:
        if _mutates(node):
            raise RefusedError(f"{node} ({node.target}) may write to a tensor between {first} and {last}")
        if node is last:
            return
        node = node.next
