"""fuse_attn_quant, for attention that vLLM runs as one operator: it quantises its own output.

vLLM's attention operators take ``output_scale`` and ``output_block_scale``. Given a quantised output buffer and one of
these, they write what the quantisation behind them would have written; which format it is they see from the tensors'
dtypes and shapes. No kernel of ours takes part.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2
from torch.fx import Graph, Node

from autofuse.graph.blocks import AttentionBlock, Found, NearMiss, QuantBlock
from autofuse.graph.fusions.attn_quant import replace_quantised
from autofuse.graph.fusions.base import Fusion, Site
from autofuse.graph.moves import RefusedError, check_no_mutation, nodes_to_hoist
from autofuse.graph.recognise.layer_calls import ATTENTION
from autofuse.graph.recognise.nodes import concrete, is_getitem, keeps_order, product, tensor
from autofuse.graph.rewrite import Replacement
from autofuse.ops.binding import Result
from autofuse.ops.quant import NVFP4, STATIC, QuantFormat, ScaleLayout
from autofuse.runtime.vllm_context import OUTPUT_FORMATS, layer_text, output_formats

__all__ = ["LayerAttnQuant", "LayerAttnQuantSite"]

aten = torch.ops.aten
_GROUP_ARGUMENTS = ("quant_group_size", "quant_scale_ue8m0", "quant_col_major", "quant_tma_aligned")


@dataclass(frozen=True)
class LayerAttnQuantSite(Site):
    """A call of an attention operator that can quantise its output.

    Attributes:
        attention: the call.
        quant: of its output.
        between: the views from the one to the other.
    """

    attention: AttentionBlock
    quant: QuantBlock
    between: tuple[Node, ...]

    @property
    def anchor(self) -> Node:
        return self.quant.output

    @cached_property
    def nodes(self) -> frozenset[Node]:
        return super().nodes | {*self.between}

    @property
    def first(self) -> Node:
        return self.attention.output

    def note(self) -> str:
        return self.quant.rounding


class LayerAttnQuant(Fusion):
    """Lets an attention operator of vLLM quantise its output, where a quantisation alone reads that."""

    name = "fuse_attn_quant"
    op = ""
    level = 3
    needs = ATTENTION

    def match(self, found: Found) -> list[Site]:
        by_output = {attention.output: attention for attention in found.attentions()}
        if not by_output:
            return []
        supported = output_formats()
        sites: list[Site] = []
        for quant in found.quants():
            chain = _up(quant.input)
            if chain[-1] in by_output:
                sites.append(_site(by_output[chain[-1]], quant, tuple(chain[:-1]), supported))
        return sites

    def near_misses(self, found: Found) -> list[NearMiss]:
        """Quantisations of an attention's output in a format that its operator does not know."""
        by_output = {attention.output: attention for attention in found.attentions()}
        misses = []
        for miss in found.near_misses if by_output else ():
            read = [_up(node)[-1] for node in miss.node.all_input_nodes]
            attention = next((by_output[node] for node in read if node in by_output), None)
            if attention is not None and miss.block == "quantisation":
                why = f"{_name(attention)} cannot quantise its output so: {miss.reason}"
                misses.append(NearMiss(self.name, miss.node, why))
        return misses

    def rewrite(self, graph: Graph, site: Site, plan: str) -> None:
        assert isinstance(site, LayerAttnQuantSite)
        attention, quant = site.attention, site.quant
        hoist = _check_order(attention, quant)
        new = Replacement(graph, before=attention.call, like=quant.output)
        with new:
            sized = _query(attention)
            values, scales = _buffers(new, attention, quant.format, sized)
            bases = [values] if scales is None else [values, scales]
            arguments: dict[str, Any] = {
                **attention.args,
                "output_scale": quant.scale,
                "_output_base_index": 0,
                "_output_block_scale_base_index": None if scales is None else 1,
            }
            if scales is not None and quant.format.group != NVFP4:
                layout = quant.format.layout
                given = (quant.format.group, quant.format.ue8m0, layout != ScaleLayout.ROW_MAJOR)
                arguments.update(zip(_GROUP_ARGUMENTS, (*given, layout == ScaleLayout.TMA_ALIGNED), strict=True))
            call = new.call(auto_functionalized_v2, attention.op, **arguments, _all_bases=bases)
            first = max(len(attention.op._schema.returns), 1)
            results = [new.reshape_like(new.getitem(call, first), quant.output, sized)]
            if quant.scales is not None:
                assert scales is not None
                written = new.getitem(call, first + 1)
                own = quant.format.group == NVFP4 or quant.format.layout != ScaleLayout.ROW_MAJOR
                results.append(written if own else new.reshape_like(written, quant.scales, sized))
        new.hoist(hoist)
        replace_quantised(new, quant, results, views=(*site.between, *attention.nodes))


def _up(node: Node) -> list[Node]:
    """``node`` and what it is a view of, upwards."""
    chain = [node]
    while keeps_order(chain[-1]):
        chain.append(chain[-1].args[0])  # type: ignore[arg-type]
    return chain


def _name(attention: AttentionBlock) -> str:
    return attention.op._schema.name


def _query(attention: AttentionBlock) -> Node:
    """The operator's first argument, [T, …]."""
    return attention.args[attention.op._schema.arguments[0].name]


def _site(
    attention: AttentionBlock, quant: QuantBlock, between: tuple[Node, ...], supported: Any
) -> LayerAttnQuantSite:
    value = tensor(attention.output)
    assert value is not None
    refusal: str | None = None
    try:
        _check_readers(attention, quant, between)
        _check_buffer(attention)
        _check_format(attention, quant)
        _check_layer(attention, quant.format, supported)
        _check_order(attention, quant)
        check_no_mutation({attention.call, *between, *quant.nodes} - _before(attention.call, quant.nodes))
    except RefusedError as refused:
        refusal = str(refused)
    return LayerAttnQuantSite(
        fusion=LayerAttnQuant.name,
        op=_name(attention),
        params=quant.format.params,
        tokens=attention.sizes[0],
        device=value.device,
        blocks=(attention, quant),
        refusal=refusal,
        attention=attention,
        quant=quant,
        between=between,
    )


def _before(call: Node, nodes: tuple[Node, ...]) -> set[Node]:
    """Buffers that a quantisation's operator writes may have been made before."""
    return {node for node in nodes if node < call}


def _check_readers(attention: AttentionBlock, quant: QuantBlock, between: tuple[Node, ...]) -> None:
    own = {*quant.nodes, *between}
    for node in (attention.output, *between):
        others = [user for user in node.users if user not in own]
        if others:
            what = ", ".join("the graph's output" if user.op == "output" else str(user) for user in others)
            raise RefusedError(f"{node}, that is quantised, is also read by {what}")
    written = [user for user in attention.call.users if is_getitem(user) and user is not attention.output]
    if any(user.users for user in written):
        raise RefusedError(f"{attention.call} writes more than one buffer")


def _check_buffer(attention: AttentionBlock) -> None:
    if not attention.fresh:
        raise RefusedError(f"the buffer that {_name(attention)} writes is not its own, uninitialised one")
    if not attention.whole:
        raise RefusedError(f"{_name(attention)} writes a part of a buffer")


def _check_format(attention: AttentionBlock, quant: QuantBlock) -> None:
    form, width = quant.format, product(attention.sizes[1:])
    takes = {argument.name for argument in attention.op._schema.arguments}
    group_fp8 = form.group not in (STATIC, NVFP4)
    if group_fp8 and not takes.issuperset(_GROUP_ARGUMENTS):
        raise RefusedError(f"{_name(attention)} takes no quant_group_size: it writes static FP8 and NVFP4 only")
    if concrete(width) is None or (form.group and concrete(width) % form.group):  # type: ignore[operator]
        raise RefusedError(f"its rows of {width} columns are no whole number of groups of {form.group}")
    if (form.group == NVFP4 or form.layout != ScaleLayout.ROW_MAJOR) and quant.width != concrete(width):
        raise RefusedError(f"rows of {quant.width} columns are quantised, and {_name(attention)} writes {width}")
    if form.group == NVFP4 and concrete(attention.sizes[-1]) % 2:  # type: ignore[operator]
        raise RefusedError(f"its heads have {attention.sizes[-1]} columns, which are no whole bytes of NVFP4")


def _check_layer(attention: AttentionBlock, form: QuantFormat, supported: Any) -> None:
    """Raises RefusedError unless the layer's attention is known to write the format.

    A name that is an input of the graph may be another layer's in another call: then all layers must.
    """
    name = attention.args["layer_name"]
    if supported is None:
        raise RefusedError(f"whether {_name(attention)} can quantise is not known outside of vLLM's forward context")
    layers = list(supported) if isinstance(name, Node) else [layer_text(name)]
    for layer in layers or ["no layer"]:
        if form.group not in supported.get(layer, ()):
            raise RefusedError(f"the attention of {layer} does not write {OUTPUT_FORMATS[form.group]}")


def _check_order(attention: AttentionBlock, quant: QuantBlock) -> tuple[Node, ...]:
    """What must move above the call: the scale, where it is computed after it. Raises RefusedError."""
    return nodes_to_hoist([] if quant.scale is None else [quant.scale], before=attention.call)


def _buffers(new: Replacement, attention: AttentionBlock, form: QuantFormat, sized: Node) -> tuple[Node, Node | None]:
    """(for the values, in the shape of the operator's output; for the scales, None where there are none)"""
    width = concrete(product(attention.sizes[1:]))
    assert width is not None
    values, scales = form.results(width)
    device = attention.output.meta["val"].device
    sizes = new.numbers(attention.sizes, sized)
    if form.group == NVFP4:
        sizes[-1] //= 2
    return (
        new.call(aten.empty.memory_format, sizes, dtype=values.dtype, device=device, pin_memory=False),
        None if form.group == STATIC else _allocated(new, scales, sizes[0], device),
    )


def _allocated(new: Replacement, result: Result, tokens: Any, device: torch.device) -> Node:
    """``Result.allocate`` as nodes, for two dimensions."""
    rows, columns = _rounded_up(new, tokens, result.round_tokens), result.sizes[1]
    if not result.column_major:
        sizes = [rows, columns]
        return new.call(aten.empty.memory_format, sizes, dtype=result.dtype, device=device, pin_memory=False)
    strides = [1, _rounded_up(new, rows, result.column_major)]
    options = {"dtype": result.dtype, "device": device, "pin_memory": False}
    return new.call(aten.empty_strided.default, [rows, columns], strides, **options)


def _rounded_up(new: Replacement, number: Any, multiple: int) -> Any:
    """A number, or a node that holds one, rounded up."""
    if isinstance(number, int):
        return -(-number // multiple) * multiple
    if multiple == 1:
        return number
    whole = new.call(operator.floordiv, new.call(operator.add, number, multiple - 1), multiple)
    return new.call(operator.mul, whole, multiple)
