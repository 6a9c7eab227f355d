"""Keeps the eps of an RMSNorm a constant under ``dynamic=True``.

Dynamo makes every Python float that a module holds an input of a dynamic graph, as if it were to change from call to
call. An eps never does, and no kernel takes it from a tensor. Dynamo itself has a way back, for floats that cannot stay
symbolic: name them and trace again, with a guard on their values. That way is taken here for floats that are added to
something whose reciprocal root is taken.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Graph, Node

from autofuse.graph.notice import logger

__all__ = ["specialise_eps"]

_ADDS = (operator.add, torch.add, "add")
_ROOTS = (torch.rsqrt, torch.sqrt, "rsqrt", "sqrt")


def specialise_eps(graph: Graph) -> None:
    """Makes Dynamo trace again if ``graph`` takes an eps as an input; else returns.

    Raises TensorifyScalarRestartAnalysis, which Dynamo expects of a backend.
    """
    names = {name for node in graph.nodes if node.op == "placeholder" and (name := _symbol_of_eps(node))}
    if not names:
        return
    try:
        from torch._dynamo.exc import TensorifyScalarRestartAnalysis
        from torch._dynamo.symbolic_convert import TensorifyState

        names = {name for name in names if not TensorifyState.should_specialize(name)}
        for name in names:
            TensorifyState.specialize(name)
    except (ImportError, AttributeError) as error:
        logger.info("eps stays an input of the graph: %s", error)
        return
    if names:
        logger.debug("tracing again with %s constant", ", ".join(sorted(names)))
        raise TensorifyScalarRestartAnalysis


def _symbol_of_eps(placeholder: Node) -> str | None:
    """The name of the float symbol that ``placeholder`` carries, if that float is used as an eps."""
    value = placeholder.meta.get("example_value")
    items = list(placeholder.users)
    memo = getattr(value, "item_memo", None)
    if not isinstance(memo, torch.SymFloat) or not items or any(item.target != "item" for item in items):
        return None
    if not any(_is_eps(user, item) for item in items for user in item.users):
        return None
    return getattr(memo.node._expr, "name", None)


def _is_eps(user: Node, item: Node) -> bool:
    """Whether ``user`` is ``x + item`` under a root, or a call of an RMSNorm of PyTorch's that takes ``item``."""
    if user.target is torch.nn.functional.rms_norm or user.target is torch.rms_norm:
        return True
    return user.target in _ADDS and any(root.target in _ROOTS for root in _through_casts(user))


def _through_casts(node: Node) -> Iterator[Any]:
    for user in node.users:
        if user.target in ("to", "float"):
            yield from user.users
        else:
            yield user
