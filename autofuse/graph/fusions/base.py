"""What a fusion is: it combines recognised blocks into one fused op."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch.fx import Graph, Node

from autofuse.graph.blocks import Block, Found, NearMiss
from autofuse.graph.recognise.custom_ops import operator_name

__all__ = ["Fusion", "Site"]


@dataclass(frozen=True)
class Site:
    """One place of a graph where a fusion matches.

    Attributes:
        fusion: the fusion's name.
        op: the fused op's name.
        params: what the op makes its problem of; a tuple, so that sites can be compared.
        tokens: T, an int or a SymInt.
        device: where its tensors live.
        blocks: what it replaces. Where two sites share a node of theirs, only one of them is fused.
        refusal: why it must not be fused, though it matches; None if it may be.
    """

    fusion: str
    op: str
    params: tuple[tuple[str, Any], ...]
    tokens: int | torch.SymInt
    device: torch.device
    blocks: tuple[Block, ...]
    refusal: str | None

    @property
    def anchor(self) -> Node:
        """The node that stands for the site in reports."""
        return self.blocks[0].output

    @cached_property
    def nodes(self) -> frozenset[Node]:
        """All nodes that it replaces."""
        return frozenset(node for block in self.blocks for node in block.nodes)

    @property
    def first(self) -> Node:
        """The first of its blocks' outputs in the graph."""
        return min(output for block in self.blocks for output in block.outputs)

    @property
    def spared(self) -> Mapping[Node, Node]:
        """Those of its outputs that hold what the op leaves as it was, and what that is made of instead."""
        return {}

    @property
    def operators(self) -> frozenset[str]:
        """The custom operators among the nodes that it replaces, e.g. ``vllm::unified_mla_kv_cache_update``."""
        return frozenset(name for node in self.nodes if (name := operator_name(node)) is not None)

    def problem_params(self) -> Mapping[str, Any]:
        return dict(self.params)

    def tensors(self) -> Mapping[int, torch.Tensor]:
        """The layouts of the op's tensor arguments as ``Fusion.rewrite`` passes them, by their index in the schema.

        Only dtype, sizes, strides and offset of these tensors count.

        Only asked of a site that is not refused. What is left out is taken to be aligned for every kernel.
        """
        return {}

    def note(self) -> str:
        """What a user should know of fusing it, beside whether it is faster; "" if nothing."""
        return ""


class Fusion(ABC):
    """Finds the sites of one fused op in the blocks of a graph, and rewrites those that were decided.

    Attributes:
        name: its flag's name, e.g. ``fuse_mla_dual_rms_norm``.
        op: the fused op it becomes; "" for a rewrite of somebody else's call, which has no kernel of ours that could be
            measured: its flag alone decides. Its sites then name the operator that is called.
        level: the lowest level, 0 to 3, that turns it on.
        needs: operators of others, one of which is in each of its sites; empty if there are none such.
    """

    name: ClassVar[str]
    op: ClassVar[str]
    level: ClassVar[int]
    needs: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def match(self, found: Found) -> list[Site]:
        """All sites, those included that must not be fused (with their refusal). Changes nothing."""

    def near_misses(self, found: Found) -> list[NearMiss]:
        """Blocks that look as if they belonged together, but make no site, and why not. Changes nothing."""
        return []

    @abstractmethod
    def rewrite(self, graph: Graph, site: Site, plan: str) -> None:
        """Replaces a site that is not refused by the fused op running ``plan``.

        Sites that read its results have been rewritten before it, and may have moved nodes of it up: whether it is
        legal where its nodes are now is asked anew. Those whose results it reads are rewritten after it. Every new node
        gets its ``meta["val"]``. Whatever raises does so before the graph is changed.
        """
