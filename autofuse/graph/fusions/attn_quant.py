"""fuse_attn_quant: MLA's value up-projection and the quantisation of its result, in one kernel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.fx import Graph, Node

from autofuse.graph.blocks import Found, HeadwiseLinearBlock, QuantBlock
from autofuse.graph.constants import is_constant
from autofuse.graph.fakes import layout_view
from autofuse.graph.fusions.base import Fusion, Site
from autofuse.graph.moves import RefusedError, check_no_mutation
from autofuse.graph.recognise.nodes import concrete, tensor
from autofuse.graph.rewrite import Replacement, tokens_first
from autofuse.ops.quant import NVFP4, ScaleLayout

__all__ = ["AttnQuant", "AttnQuantSite"]


@dataclass(frozen=True)
class AttnQuantSite(Site):
    """A site of ``mla_v_up_quant``.

    Attributes:
        linear: o_latent times W_UV.
        quant: of its result.
        between: the views from the one to the other.
        w_constant: whether W_UV is a weight of the model.
    """

    linear: HeadwiseLinearBlock
    quant: QuantBlock
    between: tuple[Node, ...]
    w_constant: bool

    @cached_property
    def nodes(self) -> frozenset[Node]:
        return super().nodes | {*self.between}

    def tensors(self) -> Mapping[int, torch.Tensor]:
        latent, weight = tensor(self.linear.rows), tensor(self.linear.weight)
        assert latent is not None
        assert weight is not None
        return {0: layout_view(latent, lambda rows: rows.transpose(0, 1)), 1: weight}

    def note(self) -> str:
        return self.quant.rounding


class AttnQuant(Fusion):
    """Joins a product per head with the quantisation that alone reads it."""

    name = "fuse_attn_quant"
    op = "mla_v_up_quant"
    level = 3

    def match(self, found: Found) -> list[Site]:
        by_node = {node: linear for linear in found.headwise_linears() for node in linear.in_order}
        return [_site(by_node[quant.input], quant) for quant in found.quants() if quant.input in by_node]

    def rewrite(self, graph: Graph, site: Site, plan: str) -> None:
        assert isinstance(site, AttnQuantSite)
        linear, quant = site.linear, site.quant
        new = Replacement(graph, before=min(quant.outputs), like=quant.output)
        with new:
            fused = new.call(
                torch.ops.autofuse.mla_v_up_quant.default,
                tokens_first(new, linear.rows),
                linear.weight,
                quant.scale,
                quant.format.group,
                quant.format.ue8m0,
                int(quant.format.layout),
                site.w_constant,
                plan,
            )
            results = quantised(new, fused, quant, sized=linear.rows)
        replace_quantised(new, quant, results, views=(*linear.nodes, *site.between, linear.rows))


def quantised(new: Replacement, fused: Node, quant: QuantBlock, sized: Node) -> list[Node]:
    """The results of a fused op, [T, width] and its scales, in the shapes of ``quant``'s outputs."""
    results = [new.reshape_like(new.getitem(fused, 0), quant.output, sized=sized)]
    if quant.scales is not None:
        scales = new.getitem(fused, 1)
        # NVFP4's scales, and those that are not row-major, are recognised in the op's own shape only.
        own_shape = quant.format.group == NVFP4 or quant.format.layout != ScaleLayout.ROW_MAJOR
        results.append(scales if own_shape else new.reshape_like(scales, quant.scales, sized=sized))
    return results


def replace_quantised(new: Replacement, quant: QuantBlock, results: list[Node], views: tuple[Node, ...]) -> None:
    """Gives the users of ``quant``'s outputs the results; erases the block, and those of ``views`` left unread."""
    if quant.scales is not None:
        quant.scales.replace_all_uses_with(results[1])
    new.replace(quant, results[0], views)


def _site(linear: HeadwiseLinearBlock, quant: QuantBlock) -> AttnQuantSite:
    between = linear.in_order[1 : linear.in_order.index(quant.input) + 1]
    value = tensor(linear.product)
    assert value is not None
    w_constant = is_constant(linear.weight)
    refusal: str | None = None
    try:
        _check_readers(linear, quant)
        _check_operands(linear, quant)
        check_no_mutation({linear.product, *between, *quant.nodes})
    except RefusedError as refused:
        refusal = str(refused)
    return AttnQuantSite(
        fusion=AttnQuant.name,
        op=AttnQuant.op,
        params=(
            ("dtype", linear.dtype),
            ("heads", linear.heads),
            ("kv_lora_rank", linear.inner),
            ("v_head_dim", linear.outer),
            *quant.format.params,
            ("w_constant", w_constant),
        ),
        tokens=linear.tokens,
        device=value.device,
        blocks=(linear, quant),
        refusal=refusal,
        linear=linear,
        quant=quant,
        between=between,
        w_constant=w_constant,
    )


def _check_readers(linear: HeadwiseLinearBlock, quant: QuantBlock) -> None:
    """Of the product's views, only the last may have several readers: the quantisation's own nodes."""
    others = [user for user in quant.input.users if user not in quant.nodes]
    if others:
        what = ", ".join("the graph's output" if user.op == "output" else str(user) for user in others)
        raise RefusedError(f"{quant.input}, that is quantised, is also read by {what}")


def _check_operands(linear: HeadwiseLinearBlock, quant: QuantBlock) -> None:
    rows, weight = tensor(linear.rows), tensor(linear.weight)
    assert rows is not None
    assert weight is not None
    if quant.format.group and linear.outer % quant.format.group:
        raise RefusedError(f"groups of {quant.format.group} span heads, which have {linear.outer} columns each")
    if quant.format.layout != ScaleLayout.ROW_MAJOR and quant.width != linear.heads * linear.outer:
        raise RefusedError(f"its rows have {quant.width} columns, not those of all heads")
    scale = None if quant.scale is None else tensor(quant.scale)
    if len({value.device for value in (rows, weight, scale) if value is not None}) != 1:
        raise RefusedError("its operands are on different devices")
    for node, value in ((linear.rows, rows), (linear.weight, weight)):
        if concrete(value.stride(-1)) != 1:
            raise RefusedError(f"the last dimension of {node} is not contiguous: strides {list(value.stride())}")
