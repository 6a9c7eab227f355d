"""Where in a model a node of a post-grad graph comes from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import takewhile
from typing import Any

import torch
from torch.fx import Graph, Node

__all__ = ["Origins"]

_PYTORCH = ("aten", "prims", "inductor_prims")
"""The namespaces of operators that plain PyTorch code becomes."""

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')


class Origins:
    """Module paths, source lines and dialects of nodes.

    Post-grad nodes have lost the modules that Dynamo's nodes carry, but keep the names of Dynamo's nodes; so the
    modules are read from Dynamo's graph before it is compiled.

    Args:
        modules: of Dynamo's nodes, by their names: the innermost module's path, and the library that its class is of.
    """

    def __init__(self, modules: Mapping[str, tuple[str, str]]) -> None:
        self._modules = dict(modules)

    @classmethod
    def of_dynamo_graph(cls, graph: Graph) -> Origins:
        modules = {}
        for node in graph.nodes:
            stack = node.meta.get("nn_module_stack")
            if stack:
                path, kind = next(reversed(stack.values()))
                name = kind if isinstance(kind, str) else kind.__module__
                modules[node.name] = (_tidy(str(path)), name.split(".")[0])
        return cls(modules)

    def module(self, nodes: Iterable[Node]) -> str:
        """The innermost module that all of ``nodes`` belong to, e.g. ``model.layers.0.self_attn``; "" if unknown."""
        paths = [path.split(".") for node in nodes if (path := self._module_of(node)[0])]
        if not paths:
            return ""
        return ".".join(names[0] for names in takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False)))

    def source(self, nodes: Iterable[Node]) -> str:
        """``file.py:440 in forward``, the line that made the first of ``nodes``; "" if unknown.

        Frames that end the stacks of all nodes alike are left out: the line inside a norm's own ``forward`` says less
        than the line that calls it.
        """
        stacks = [_FRAME.findall(str(node.meta.get("stack_trace") or "")) for node in nodes]
        if not stacks or not stacks[0]:
            return ""
        frames = stacks[0]
        while len(frames) > 1 and len(stacks) > 1 and all(stack and stack[-1] == frames[-1] for stack in stacks[1:]):
            frames = frames[:-1]
            stacks = [frames, *(stack[:-1] for stack in stacks[1:])]
        file, line, function = frames[-1]
        return f"{file.rsplit('/', 1)[-1]}:{line} in {function}"

    def dialect(self, nodes: Iterable[Node]) -> str:
        """What ``nodes`` are written in: the operators that are not PyTorch's own, else ``plain PyTorch`` and the
        library that holds it, e.g. ``plain PyTorch (transformers)``.
        """
        nodes = list(nodes)
        operators = {name: None for node in nodes for name in _operators(node)}
        if operators:
            return ", ".join(operators)
        libraries = {library: None for node in nodes if (library := self._module_of(node)[1])}
        return f"plain PyTorch ({', '.join(libraries)})" if libraries else "plain PyTorch"

    def _module_of(self, node: Node) -> tuple[str, str]:
        sources: Any = node.meta.get("from_node")
        while sources:
            found = self._modules.get(sources[0].name)
            if found is not None:
                return found
            sources = getattr(sources[0], "from_node", None)
        return "", ""


def _operators(node: Node) -> Iterator[str]:
    """The operator that ``node`` calls, if it is not PyTorch's own; behind auto_functionalized, too."""
    for target in (node.target, *node.args[:1]):
        if isinstance(target, torch._ops.OpOverload) and target.namespace not in _PYTORCH:
            yield str(target.name())


def _tidy(path: str) -> str:
    """``L['self'].model.layers[0]`` → ``model.layers.0``, as ``named_modules`` says it."""
    path = re.sub(r"^L\['self'\]\.?", "", path)
    path = re.sub(r"^L\['(\w+)'\]", r"\1", path)
    path = re.sub(r"\._modules\['(\w+)'\]", r".\1", path)
    path = re.sub(r"\[['\"]?(\w+)['\"]?\]", r".\1", path)
    return path.strip(".")
