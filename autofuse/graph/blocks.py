"""The building blocks that recognisers find in a graph. All dialects of a block give the same dataclass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

__all__ = ["Block", "Found", "NearMiss", "RMSNormBlock"]


@dataclass(frozen=True)
class Block:
    """Base of all blocks.

    Attributes:
        output: the node that holds the block's result; it may have any users.
        nodes: all nodes that belong to the block and to nobody else, in graph order, ``output`` included. Replacing
            ``output`` makes all of them dead.
    """

    output: Node
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class RMSNormBlock(Block):
    """``input * rsqrt(mean(input²) + eps) * weight`` over the last dimension, in fp32, rounded once or twice.

    Attributes:
        input: [..., width], of the same dtype as ``output``.
        weight: [width], of the same dtype as ``output``.
        eps: added to the mean, inside the root.
        cast_before_weight: whether the normed rows are rounded to the output's dtype before they are multiplied by the
            weight. False for fp32, where nothing is rounded.
        width: N of the last dimension.
        dtype: of input, weight and output.
    """

    input: Node
    weight: Node
    eps: float
    cast_before_weight: bool
    width: int
    dtype: torch.dtype


@dataclass(frozen=True)
class NearMiss:
    """Something that looked like a block and is none.

    Attributes:
        block: what it looked like, e.g. ``RMSNorm``.
        node: the node by which it was found.
        reason: which condition failed, at which node.
    """

    block: str
    node: Node
    reason: str


@dataclass(frozen=True)
class Found:
    """What recognisers found in one graph."""

    blocks: tuple[Block, ...] = ()
    near_misses: tuple[NearMiss, ...] = ()

    def __add__(self, other: Found) -> Found:
        return Found(self.blocks + other.blocks, self.near_misses + other.near_misses)

    def rms_norms(self) -> list[RMSNormBlock]:
        return [block for block in self.blocks if isinstance(block, RMSNormBlock)]
