"""fuse_norm_quant: an RMSNorm and the quantisation of its result in one kernel, with MLA's other norm where it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.fx import Graph, Node

from autofuse.graph.blocks import Found, QuantBlock, RMSNormBlock
from autofuse.graph.fusions.attn_quant import quantised, replace_quantised
from autofuse.graph.fusions.base import Fusion, Site
from autofuse.graph.fusions.mla_dual_rms_norm import DualNormSite, MlaDualRMSNorm
from autofuse.graph.moves import RefusedError, check_no_mutation
from autofuse.graph.recognise.nodes import keeps_order, product, same_size, shape, tensor
from autofuse.graph.rewrite import Replacement, rows_as_matrix
from autofuse.graph.rows import Rows, is_stored, matrix_of, rows_of, viewable_as_rows
from autofuse.ops.quant import ScaleLayout

__all__ = ["DualNormQuantSite", "MlaDualNormQuant", "NormQuant", "NormQuantSite"]


@dataclass(frozen=True)
class NormQuantSite(Site):
    """A site of ``fp8_group_quant`` with a norm.

    Attributes:
        norm: of the rows.
        rows: where they come from.
        quant: of the normed rows.
        between: the views from the one to the other.
    """

    norm: RMSNormBlock
    rows: Rows
    quant: QuantBlock
    between: tuple[Node, ...]

    @cached_property
    def nodes(self) -> frozenset[Node]:
        return super().nodes | {*self.between}

    def tensors(self) -> Mapping[int, torch.Tensor]:
        weight = tensor(self.norm.weight)
        assert weight is not None
        return {0: matrix_of(self.rows), 2: weight}

    def note(self) -> str:
        return self.quant.rounding


class NormQuant(Fusion):
    """Joins an RMSNorm with the quantisation that alone reads it."""

    name = "fuse_norm_quant"
    op = "fp8_group_quant"
    level = 1

    def match(self, found: Found) -> list[Site]:
        return [
            _site(norm, rows, quant, between)
            for norm, quant, between in _quantised_norms(found)
            if (rows := rows_of(norm.input)) is not None
        ]

    def rewrite(self, graph: Graph, site: Site, plan: str) -> None:
        assert isinstance(site, NormQuantSite)
        norm, quant = site.norm, site.quant
        new = Replacement(graph, before=min(quant.outputs), like=quant.output)
        with new:
            fused = new.call(
                torch.ops.autofuse.fp8_group_quant.default,
                rows_as_matrix(new, site.rows),
                quant.scale,
                norm.weight,
                norm.eps,
                norm.cast_before_weight,
                quant.format.group,
                quant.format.ue8m0,
                int(quant.format.layout),
                plan,
            )
            results = quantised(new, fused, quant, sized=norm.input)
        replace_quantised(new, quant, results, views=(*site.rows.views, *norm.nodes, *site.between))


@dataclass(frozen=True)
class DualNormQuantSite(DualNormSite):
    """A site of ``mla_dual_rms_norm_quant``.

    Attributes:
        quant: of the normed query latent.
        between: the views from the one to the other.
    """

    quant: QuantBlock
    between: tuple[Node, ...]

    @cached_property
    def nodes(self) -> frozenset[Node]:
        return super().nodes | {*self.between}

    def note(self) -> str:
        return self.quant.rounding


class MlaDualNormQuant(Fusion):
    """Joins the two norms of an MLA layer with the quantisation that alone reads the normed query latent."""

    name = "fuse_norm_quant"
    op = "mla_dual_rms_norm_quant"
    level = 1

    def match(self, found: Found) -> list[Site]:
        quants = {norm: (quant, between) for norm, quant, between in _quantised_norms(found)}
        pairs = [pair for pair in MlaDualRMSNorm().pairs(found) if pair.q in quants]
        return [_dual_site(pair, *quants[pair.q]) for pair in pairs if not quants[pair.q][0].format.needs_scale]

    def rewrite(self, graph: Graph, site: Site, plan: str) -> None:
        assert isinstance(site, DualNormQuantSite)
        hoist = site.hoist()
        quant = site.quant
        new = Replacement(graph, before=min(site.q.output, site.kv.output), like=quant.output)
        with new:
            fused = new.call(
                torch.ops.autofuse.mla_dual_rms_norm_quant.default,
                rows_as_matrix(new, site.q_rows),
                site.q.weight,
                rows_as_matrix(new, site.kv_rows),
                site.kv.weight,
                site.q.eps,
                site.kv.eps,
                site.q.cast_before_weight,
                quant.format.group,
                quant.format.ue8m0,
                int(quant.format.layout),
                plan,
            )
            sized = min(site.q, site.kv, key=lambda block: block.output).input
            results = quantised(new, fused, quant, sized)
            latent = new.reshape_like(new.getitem(fused, 2), site.kv.output, sized)
        new.hoist(hoist)
        replace_quantised(new, quant, results, views=(*site.q_rows.views, *site.q.nodes, *site.between))
        new.replace(site.kv, latent, site.kv_rows.views)


def _quantised_norms(found: Found) -> list[tuple[RMSNormBlock, QuantBlock, tuple[Node, ...]]]:
    """Norms, quantisations of their results, and the views between."""
    norms = {norm.output: norm for norm in found.rms_norms()}
    pairs = []
    for quant in found.quants():
        between, node = [], quant.input
        while node not in norms and keeps_order(node):
            between.append(node)
            node = node.args[0]  # type: ignore[assignment]
        if node in norms:
            pairs.append((norms[node], quant, tuple(reversed(between))))
    return pairs


def _dual_site(pair: DualNormSite, quant: QuantBlock, between: tuple[Node, ...]) -> DualNormQuantSite:
    refusal = pair.refusal
    try:
        _check_between(pair.q, quant, between)
        check_no_mutation({*pair.nodes, *pair.q_rows.views, *pair.kv_rows.views, *quant.nodes})
    except RefusedError as refused:
        refusal = refusal or str(refused)
    return DualNormQuantSite(
        fusion=MlaDualNormQuant.name,
        op=MlaDualNormQuant.op,
        params=(*pair.params, *quant.format.params),
        tokens=pair.tokens,
        device=pair.device,
        blocks=(*pair.blocks, quant),
        refusal=refusal,
        q=pair.q,
        kv=pair.kv,
        q_rows=pair.q_rows,
        kv_rows=pair.kv_rows,
        quant=quant,
        between=between,
    )


def _site(norm: RMSNormBlock, rows: Rows, quant: QuantBlock, between: tuple[Node, ...]) -> NormQuantSite:
    value = tensor(norm.input)
    assert value is not None
    refusal: str | None = None
    try:
        _check(norm, rows, quant, between)
    except RefusedError as refused:
        refusal = str(refused)
    return NormQuantSite(
        fusion=NormQuant.name,
        op=NormQuant.op,
        params=(
            ("dtype", norm.dtype),
            ("width", norm.width),
            ("norm", True),
            ("cast_before_weight", norm.cast_before_weight),
            *quant.format.params,
        ),
        tokens=product(shape(norm.input)[:-1]),
        device=value.device,
        blocks=(norm, quant),
        refusal=refusal,
        norm=norm,
        rows=rows,
        quant=quant,
        between=between,
    )


def _check_between(norm: RMSNormBlock, quant: QuantBlock, between: tuple[Node, ...]) -> None:
    """Raises RefusedError unless the quantisation is all that reads the norm, and reads whole rows."""
    own = {*between, *quant.nodes}
    for node in (norm.output, *between):
        others = [user for user in node.users if user not in own]
        if others:
            what = ", ".join("the graph's output" if user.op == "output" else str(user) for user in others)
            raise RefusedError(f"the normed rows, {node}, are also read by {what}")
    if quant.format.group and norm.width % quant.format.group:
        raise RefusedError(f"groups of {quant.format.group} span rows, which have {norm.width} columns each")
    if quant.format.layout != ScaleLayout.ROW_MAJOR and quant.width != norm.width:
        raise RefusedError(f"the norm's rows have {norm.width} columns, the quantisation's {quant.width}")


def _check(norm: RMSNormBlock, rows: Rows, quant: QuantBlock, between: tuple[Node, ...]) -> None:
    """Raises RefusedError where the two must not be one."""
    _check_between(norm, quant, between)
    if not is_stored(rows.base):
        raise RefusedError(f"its rows are computed by {rows.base}, which Inductor joins with the norm")
    if (why := viewable_as_rows(rows.base)) is not None:
        raise RefusedError(why)
    weight, value = tensor(norm.weight), tensor(norm.input)
    scale = None if quant.scale is None else tensor(quant.scale)
    if weight is None or not same_size(weight.stride(0), 1):
        raise RefusedError(f"the weight {norm.weight} is not contiguous")
    if len({each.device for each in (weight, value, scale) if each is not None}) != 1:
        raise RefusedError("its operands are on different devices")
    check_no_mutation({*norm.nodes, *rows.views, *between, *quant.nodes})
