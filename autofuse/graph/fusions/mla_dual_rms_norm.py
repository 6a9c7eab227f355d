"""fuse_mla_dual_rms_norm: the norms of the query latent and the key-value latent of one MLA layer, in one kernel."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from autofuse.graph.blocks import Found, RMSNormBlock
from autofuse.graph.fusions.base import Fusion, Site
from autofuse.graph.moves import RefusedError, check_no_mutation, nodes_to_hoist
from autofuse.graph.recognise.nodes import product, same_size, shape, tensor
from autofuse.graph.rewrite import Replacement, rows_as_matrix
from autofuse.graph.rows import Rows, linear_of, rows_of, splits_into_heads, viewable_as_rows

__all__ = ["DualNormSite", "MlaDualRMSNorm"]


@dataclass(frozen=True)
class _Half:
    """A norm, and where its rows come from."""

    block: RMSNormBlock
    rows: Rows


@dataclass(frozen=True)
class DualNormSite(Site):
    """A site of ``mla_dual_rms_norm``.

    Attributes:
        q: the norm of the query latent.
        kv: the norm of the key-value latent.
        hoist: what must be moved above the first of the two results.
    """

    q: RMSNormBlock
    kv: RMSNormBlock
    q_rows: Rows
    kv_rows: Rows
    hoist: tuple[Node, ...]


class MlaDualRMSNorm(Fusion):
    """Pairs two RMSNorms over parts of one tensor, or over the results of two linears of the same activations."""

    name = "fuse_mla_dual_rms_norm"
    op = "mla_dual_rms_norm"
    level = 1

    def match(self, found: Found) -> list[Site]:
        return [_site(q, kv) for q, kv in _pairs(found.rms_norms())]

    def rewrite(self, graph: Graph, site: Site, plan: str) -> None:
        assert isinstance(site, DualNormSite)
        first = min((site.q, site.kv), key=lambda block: block.output)
        new = Replacement(graph, before=first.output, like=site.q.output)
        with new:
            q_c = rows_as_matrix(new, site.q_rows)
            kv_c = rows_as_matrix(new, site.kv_rows)
            fused = new.call(
                torch.ops.autofuse.mla_dual_rms_norm.default,
                q_c,
                site.q.weight,
                kv_c,
                site.kv.weight,
                site.q.eps,
                site.kv.eps,
                site.q.cast_before_weight,
                plan,
            )
            results = [
                new.reshape_like(new.getitem(fused, index), block.output, sized=first.input)
                for index, block in enumerate((site.q, site.kv))
            ]
        new.hoist(site.hoist)
        new.replace(site.q, results[0], site.q_rows.views)
        new.replace(site.kv, results[1], site.kv_rows.views)


def _pairs(blocks: list[RMSNormBlock]) -> list[tuple[_Half, _Half]]:
    """The two norms of each MLA layer: (q, kv)."""
    halves = [_Half(block, rows) for block in blocks if (rows := rows_of(block.input)) is not None]
    pairs = []
    by_base: dict[Node, list[_Half]] = defaultdict(list)
    for half in halves:
        by_base[half.rows.base].append(half)
    single: dict[Node, list[_Half]] = defaultdict(list)
    for base, group in by_base.items():
        linear = linear_of(base)
        if len(group) == 2:
            first, second = sorted(group, key=lambda half: half.rows.offset)
            if first.rows.offset + first.rows.width <= second.rows.offset and _is_latent_pair(first, second):
                pairs.append((first, second))
        elif len(group) == 1 and linear is not None:
            single[linear.activations].append(group[0])
    for group in single.values():
        if len(group) == 2 and (pair := _roles(*group)) is not None and _is_latent_pair(*pair):
            pairs.append(pair)
    return pairs


def _roles(one: _Half, other: _Half) -> tuple[_Half, _Half] | None:
    """(q, kv) of the results of two linears; None if neither is a latent beside a RoPE part nor the narrower."""
    latents = [half for half in (one, other) if not half.rows.whole and half.rows.offset == 0]
    if len(latents) == 1:
        kv = latents[0]
        q = other if kv is one else one
        return (q, kv) if q.rows.whole else None
    if one.rows.whole == other.rows.whole and one.rows.width != other.rows.width:
        q, kv = (one, other) if one.rows.width > other.rows.width else (other, one)
        return q, kv
    return None


def _is_latent_pair(q: _Half, kv: _Half) -> bool:
    """No latent is cut into heads right after its norm; the queries and keys of attention with QK-norm are."""
    return all(splits_into_heads(half.block.output) is None for half in (q, kv))


def _site(q: _Half, kv: _Half) -> DualNormSite:
    tokens = product(shape(q.block.input)[:-1])
    value = tensor(q.block.input)
    assert value is not None
    refusal: str | None = None
    hoist: tuple[Node, ...] = ()
    try:
        _check_alike(q.block, kv.block)
        hoist = _check_order(q, kv)
    except RefusedError as refused:
        refusal = str(refused)
    return DualNormSite(
        fusion=MlaDualRMSNorm.name,
        op=MlaDualRMSNorm.op,
        params=(
            ("dtype", q.block.dtype),
            ("q_lora_rank", q.block.width),
            ("kv_lora_rank", kv.block.width),
            ("cast_before_weight", q.block.cast_before_weight),
        ),
        tokens=tokens,
        device=value.device,
        blocks=(q.block, kv.block),
        refusal=refusal,
        q=q.block,
        kv=kv.block,
        q_rows=q.rows,
        kv_rows=kv.rows,
        hoist=hoist,
    )


def _check_alike(q: RMSNormBlock, kv: RMSNormBlock) -> None:
    values = [tensor(node) for node in (q.input, kv.input, q.weight, kv.weight)]
    if q.dtype != kv.dtype:
        raise RefusedError(f"the norms differ in dtype: {q.dtype} and {kv.dtype}")
    if len({value.device for value in values if value is not None}) != 1:
        raise RefusedError("the norms and their weights are on different devices")
    if q.cast_before_weight != kv.cast_before_weight:
        raise RefusedError("one norm casts before its weight, the other after")
    if not same_size(product(shape(q.input)[:-1]), product(shape(kv.input)[:-1])):
        raise RefusedError(f"the norms differ in tokens: {list(shape(q.input))} and {list(shape(kv.input))}")
    for weight in (q.weight, kv.weight):
        value = tensor(weight)
        if value is None or not same_size(value.stride(0), 1):
            raise RefusedError(f"the weight {weight} is not contiguous")


def _check_order(q: _Half, kv: _Half) -> tuple[Node, ...]:
    """What must move above the first of the two results; raises RefusedError where that is not allowed."""
    for half in (q, kv):
        if (why := viewable_as_rows(half.rows.base)) is not None:
            raise RefusedError(why)
    first = min(q.block.output, kv.block.output)
    hoist = nodes_to_hoist((q.rows.base, q.block.weight, kv.rows.base, kv.block.weight), before=first)
    touched = {*q.block.nodes, *q.rows.views, *kv.block.nodes, *kv.rows.views, *hoist}
    check_no_mutation(touched)
    return hoist
