"""Finds calls of vLLM's operators that know their layer by its name: attention, and the updates of its cache."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from autofuse.graph.blocks import AttentionBlock, Found, HeadsUpdateBlock, LatentUpdateBlock
from autofuse.graph.recognise.custom_ops import CustomCall, Layout, custom_calls, made_for
from autofuse.graph.recognise.nodes import concrete, product, same_size, shape

__all__ = ["ATTENTION", "HEADS_UPDATE", "LATENT_UPDATE", "find_layer_calls"]

ATTENTION = ("vllm::unified_attention_with_output", "vllm::unified_mla_attention_with_output")
HEADS_UPDATE = "vllm::unified_kv_cache_update"
LATENT_UPDATE = "vllm::unified_mla_kv_cache_update"


def find_layer_calls(graph: Graph) -> Found:
    """All such calls in a post-grad graph; none of attention whose output is quantised already."""
    blocks: list[AttentionBlock | HeadsUpdateBlock | LatentUpdateBlock] = []
    for call in custom_calls(graph):
        if call.name == LATENT_UPDATE:
            blocks.append(_latent_update(call))
        elif call.name == HEADS_UPDATE:
            args = call.args
            blocks.append(HeadsUpdateBlock(call.node, (call.node,), args["key"], args["value"], args["layer_name"]))
        elif call.name in ATTENTION and (block := _attention(call)) is not None:
            blocks.append(block)
    return Found(tuple(blocks))


def _latent_update(call: CustomCall) -> LatentUpdateBlock:
    args = call.args
    return LatentUpdateBlock(
        output=call.node,
        nodes=(call.node,),
        kv_c=args["kv_c_normed"],
        k_pe=args["k_pe"],
        layer_name=args["layer_name"],
        kv_cache_dtype=args["kv_cache_dtype"],
        k_scale=args["k_scale"],
    )


def _attention(call: CustomCall) -> AttentionBlock | None:
    output = call.written["output"]
    if output is None or output.item is None or call.args["output_scale"] is not None:
        return None
    if call.written["output_block_scale"] is not None:
        return None
    op: Any = call.node.args[0]
    assert isinstance(op, torch._ops.OpOverload)
    made: list[Node] = made_for(output.before)
    return AttentionBlock(
        output=output.item,
        nodes=tuple(sorted({*made, call.node, output.item})),
        call=call.node,
        op=op,
        args=call.args,
        sizes=shape(output.before) if output.layout is None else output.layout[0],
        whole=output.layout is None or _is_all(output.layout, output.before),
        fresh=bool(made),
    )


def _is_all(layout: Layout, buffer: Node) -> bool:
    """Whether an argument is its buffer, seen in another shape."""
    sizes, strides, offset = layout
    contiguous: Any = 1
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if concrete(size) != 1 and not same_size(stride, contiguous):
            return False
        contiguous = contiguous * size
    return concrete(offset) == 0 and same_size(contiguous, product(shape(buffer)))
