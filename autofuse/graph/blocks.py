"""The building blocks that recognisers find in a graph. All dialects of a block give the same dataclass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch.fx import Node

from autofuse.ops.quant import QuantFormat

__all__ = [
    "AbsorbedQueryBlock",
    "Angles",
    "AttentionBlock",
    "Block",
    "CacheWriteBlock",
    "Found",
    "HeadRows",
    "HeadsUpdateBlock",
    "HeadwiseLinearBlock",
    "LatentUpdateBlock",
    "NearMiss",
    "QuantBlock",
    "RMSNormBlock",
    "RopeBlock",
    "RopeRead",
    "Slots",
]

_T = TypeVar("_T")
_B = TypeVar("_B", bound="Block")


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

    @property
    def outputs(self) -> tuple[Node, ...]:
        """All nodes of the block that others may read."""
        return (self.output,)


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
class QuantBlock(Block):
    """A quantisation of rows, in one of the formats of ``autofuse.ops.quant``. ``output`` holds the values.

    Attributes:
        input: the elements of the rows in order, [T, width] in any shape.
        format: of the values and scales.
        scales: what holds the scales that were found, in any shape (but [T, width / group] if they are not row-major);
            None where nobody reads them, or where there are none (static FP8).
        scale: the scale (static FP8) or global scale (NVFP4) that was given: one fp32 value. Else None.
        width: N of the rows, a multiple of the format's group.
        dtype: of input.
        rounding: how its roundings may differ from those that the format is defined by; "" if they are the same. No
            value differs by more than one unit in the last place of FP8, next to a tie.
    """

    input: Node
    format: QuantFormat
    scales: Node | None
    scale: Node | None
    width: int
    dtype: torch.dtype
    rounding: str

    @property
    def outputs(self) -> tuple[Node, ...]:
        return (self.output,) if self.scales is None else (self.output, self.scales)


@dataclass(frozen=True)
class HeadwiseLinearBlock(Block):
    """Each head's rows times the head's own matrix, and the heads side by side: ``[T, N, K] × [N, K, V] → [T, N, V]``.

    MLA's W_UV (the attention's output) and W_UK (the absorbed query) are such products.

    Attributes:
        product: the ``bmm``: [N, T, K] × [N, K, V].
        in_order: ``output`` and the views after it, each the only reader of the one before: all hold the product's
            elements in the order [T, N, V].
        tokens: T, an int or a SymInt.
        heads, inner, outer: N, K, V.
        dtype: of both factors.
    """

    product: Node
    in_order: tuple[Node, ...]
    tokens: int | torch.SymInt
    heads: int
    inner: int
    outer: int
    dtype: torch.dtype

    @property
    def rows(self) -> Node:
        """[N, T, K], strided in any way."""
        return self.product.args[0]  # type: ignore[return-value]

    @property
    def weight(self) -> Node:
        """[N, K, V], strided in any way."""
        return self.product.args[1]  # type: ignore[return-value]


@dataclass(frozen=True)
class AbsorbedQueryBlock(Block):
    """The part of MLA's query that is not rotated, taken to the latent space: each head's rows times its W_UK.

    ``output`` holds the product in the query's own dimensions; the block is the product and the views after it.

    Attributes:
        product: the ``bmm``: [N, T, P] × [N, P, L].
    """

    product: Node

    @property
    def rows(self) -> Node:
        """[N, T, P], strided in any way."""
        return self.product.args[0]  # type: ignore[return-value]

    @property
    def weight(self) -> Node:
        """[N, P, L], strided in any way."""
        return self.product.args[1]  # type: ignore[return-value]


@dataclass(frozen=True)
class Angles:
    """The cosines and sines of a rotary embedding, one of each for each token and pair of columns.

    Attributes:
        identity: equal for two angles of one graph only if these are the same.
        pairs: R/2, of columns.
        sizes: of the dimensions before the columns, as many as the rotated rows have; 1 where they do not vary.
        table: [P, R], contiguous rows: a token's R/2 cosines, then as many sines; None if the graph has no such table.
        positions: int64, the tokens' rows in ``table``; of ``sizes``, but for dimensions of size 1.
        cos, sin: where there is no table: (node, its first column, the step between its columns that count); one
            complex node for both holds cosines as real, sines as imaginary parts.
    """

    identity: str
    pairs: int
    sizes: tuple[Any, ...]
    table: Node | None = None
    positions: Node | None = None
    cos: tuple[Node, int, int] | None = None
    sin: tuple[Node, int, int] | None = None


@dataclass(frozen=True)
class HeadRows:
    """Rows that are heads, as a graph holds them: some columns of the rows of a node.

    Attributes:
        first: the column of the first head's first element.
        heads: how many heads lie side by side in the last dimension of ``node``; 0 if each row is a head.
        stride: columns from head to head.
    """

    node: Node
    first: int
    heads: int = 0
    stride: int = 0


@dataclass(frozen=True)
class RopeRead:
    """A node that holds rotated rows, or some of their columns, and is read by others.

    Attributes:
        first, width: which columns of each head's result.
        folded: whether the heads of a token lie side by side in its last dimension.
    """

    node: Node
    first: int
    width: int
    folded: bool


@dataclass(frozen=True)
class RopeBlock(Block):
    """Rows of heads, some columns of which are rotated in pairs (RoPE), while the others stay as they are.

    The result has ``frame`` dimensions and ``width`` columns; it is read at ``reads``, the first of which is
    ``output``.

    Attributes:
        frame: the dimensions of the rows: tokens and heads, in any order.
        heads_at: which of these are the heads; None if that is not known from the block alone.
        input: the rows before rotation. ``frame`` is its node's dimensions but the last, after more of size 1, and
            before the number of heads if these lie side by side.
        width: of a head in the result.
        rotary_first, rotary_dim: which columns of the result are rotated.
        is_neox: column i is paired with i + rotary_dim / 2 (NeoX), else even with odd neighbours (GPT-J).
        reordered: the result is paired the other way: Hugging Face's DeepSeek-V3 turns neighbours into halves.
        dtype: of input and result.
        call: the operator's call and its argument's name, if an operator rotates.
        spared: (node, where): what others read from a buffer that the rows were written back into, though nothing was
            written there, and where the same rows are to be had.
    """

    frame: tuple[Any, ...]
    heads_at: int | None
    input: HeadRows
    width: int
    rotary_first: int
    rotary_dim: int
    is_neox: bool
    reordered: bool
    dtype: torch.dtype
    angles: Angles
    reads: tuple[RopeRead, ...]
    call: tuple[Node, str] | None = None
    spared: tuple[tuple[Node, HeadRows], ...] = ()

    @property
    def outputs(self) -> tuple[Node, ...]:
        return (*(read.node for read in self.reads), *(node for node, _ in self.spared))


@dataclass(frozen=True)
class Slots:
    """Which rows of a cache tokens are written to.

    Attributes:
        index: int64. With ``per_block`` [S]: each block's rows, for the tokens (block, s). Else, of the tokens' shape:
            a row counted from the first block's first, or, with ``blocks``, within its block.
        blocks: the tokens' blocks, of the tokens' shape.
        skips_negative: negative ones are of padded tokens, and nothing is written; else they count from the end.
    """

    index: Node
    blocks: Node | None = None
    per_block: bool = False
    skips_negative: bool = False


@dataclass(frozen=True)
class CacheWriteBlock(Block):
    """Rows that are written into a KV cache. ``output`` holds ``root`` after that.

    Attributes:
        root: what holds the cache before: an input of the graph or whatever the graph made.
        layout: (sizes, strides, offset) of the cache as [blocks, block_size, heads, width] in ``root``'s storage.
        whole: whether that is ``root`` as it is.
        parts: what lies side by side in a row.
        selected: (dimension, index) of ``root`` that the cache is all of, if it is one of several in a tensor.
        joined: what a ``cat`` that is read by the write alone puts side by side; empty if there is no such ``cat``.
        tokens_at, heads_at: which dimensions of the first part are tokens, in their order, and which is the heads, if
            any is; the last is the columns. The others are as the first, or lack the heads.
        slots: where to.
        dtype: of the cache.
        not_in_place: why ``root`` itself must not be written to; "" if it may be.
        call: the operator's call, if one writes; it may write another cache.
        scale: what the operator calls the cache's dtype, and its scale.
    """

    root: Node
    layout: tuple[tuple[Any, ...], tuple[Any, ...], Any]
    whole: bool
    parts: tuple[Node, ...]
    tokens_at: tuple[int, ...]
    heads_at: int | None
    slots: Slots
    dtype: torch.dtype
    not_in_place: str
    selected: tuple[int, int] | None = None
    joined: tuple[Node, ...] = ()
    call: Node | None = None
    scale: tuple[str, Node] | None = None


@dataclass(frozen=True)
class AttentionBlock(Block):
    """A call of one of vLLM's attention operators that writes its output as the model computes it, unquantised.

    ``output`` holds what it wrote; the block is the call and the buffer that was made for it.

    Attributes:
        call: the functional call.
        op: the operator.
        args: those that are only read, by name, defaults included. ``layer_name`` is a string, or a node that holds one
            of vLLM's ``LayerName``.
        sizes: of the operator's argument ``output``: [T, width] or [T, heads, head_size].
        whole: whether that is all of ``output``, in order.
        fresh: whether the buffer that it wrote was uninitialised and is nobody else's.
    """

    call: Node
    op: torch._ops.OpOverload
    args: Mapping[str, Any]
    sizes: tuple[Any, ...]
    whole: bool
    fresh: bool


@dataclass(frozen=True)
class LatentUpdateBlock(Block):
    """A write to an MLA layer's cache that vLLM finds by the layer's name when it runs.

    ``output`` is empty: attention reads it so as to come after the write.

    Attributes:
        kv_c: [T, kv_lora_rank].
        k_pe: [T, 1, qk_rope_head_dim] or [T, qk_rope_head_dim].
        layer_name: a string, or a node that holds one of vLLM's ``LayerName``.
        kv_cache_dtype: what vLLM calls the cache's dtype.
        k_scale: one fp32 value.
    """

    kv_c: Node
    k_pe: Node
    layer_name: Any
    kv_cache_dtype: str
    k_scale: Node


@dataclass(frozen=True)
class HeadsUpdateBlock(Block):
    """A write to the cache of a GQA or MHA layer that vLLM finds by the layer's name when it runs.

    ``output`` is empty: attention reads it so as to come after the write.

    Attributes:
        key, value: [T, KV, head_size].
        layer_name: a string, or a node that holds one of vLLM's ``LayerName``.
    """

    key: Node
    value: Node
    layer_name: Any


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
    _asked: dict[Callable[..., Any], Any] = field(default_factory=dict, repr=False, compare=False)

    def once(self, function: Callable[[Found], _T]) -> _T:
        """``function(self)``, which several fusions ask for."""
        if function not in self._asked:
            self._asked[function] = function(self)
        return cast(_T, self._asked[function])

    def __add__(self, other: Found) -> Found:
        return Found(self.blocks + other.blocks, self.near_misses + other.near_misses)

    def of_kind(self, kind: type[_B]) -> list[_B]:
        """The blocks of one class."""
        return cast(list[_B], [*self.once(_by_kind).get(kind, ())])

    def rms_norms(self) -> list[RMSNormBlock]:
        return self.of_kind(RMSNormBlock)

    def quants(self) -> list[QuantBlock]:
        return self.of_kind(QuantBlock)

    def headwise_linears(self) -> list[HeadwiseLinearBlock]:
        return self.of_kind(HeadwiseLinearBlock)

    def ropes(self) -> list[RopeBlock]:
        return self.of_kind(RopeBlock)

    def cache_writes(self) -> list[CacheWriteBlock]:
        return self.of_kind(CacheWriteBlock)

    def attentions(self) -> list[AttentionBlock]:
        return self.of_kind(AttentionBlock)

    def latent_updates(self) -> list[LatentUpdateBlock]:
        return self.of_kind(LatentUpdateBlock)

    def heads_updates(self) -> list[HeadsUpdateBlock]:
        return self.of_kind(HeadsUpdateBlock)


def _by_kind(found: Found) -> dict[type[Block], list[Block]]:
    kinds: dict[type[Block], list[Block]] = {}
    for block in found.blocks:
        kinds.setdefault(type(block), []).append(block)
    return kinds
