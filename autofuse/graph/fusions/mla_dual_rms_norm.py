"""fuse_mla_dual_rms_norm: the norms of the query latent and the key-value latent of one MLA layer, in one kernel."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import Graph, Node

from autofuse.graph.blocks import Found, NearMiss, RMSNormBlock
from autofuse.graph.fusions.base import Fusion, Site
from autofuse.graph.moves import RefusedError, check_no_mutation, nodes_to_hoist
from autofuse.graph.recognise.nodes import product, same_size, shape, tensor
from autofuse.graph.rewrite import Replacement, rows_as_matrix
from autofuse.graph.rows import Rows, linear_of, matrix_of, rows_of, splits_into_heads, viewable_as_rows

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
    """

    q: RMSNormBlock
    kv: RMSNormBlock
    q_rows: Rows
    kv_rows: Rows

    def hoist(self) -> tuple[Node, ...]:
        """What must be moved above the first of the two results. Raises RefusedError where that is not allowed."""
        needed = (self.q_rows.base, self.q.weight, self.kv_rows.base, self.kv.weight)
        hoist = nodes_to_hoist(needed, before=min(self.q.output, self.kv.output))
        check_no_mutation({*self.q.nodes, *self.q_rows.views, *self.kv.nodes, *self.kv_rows.views, *hoist})
        return hoist

    def tensors(self) -> Mapping[int, torch.Tensor]:
        weights = {index: tensor(node) for index, node in ((1, self.q.weight), (3, self.kv.weight))}
        return {
            0: matrix_of(self.q_rows),
            2: matrix_of(self.kv_rows),
            **{index: value for index, value in weights.items() if value is not None},
        }


class MlaDualRMSNorm(Fusion):
    """Pairs two RMSNorms over parts of one tensor, or over the results of two linears of the same activations."""

    name = "fuse_mla_dual_rms_norm"
    op = "mla_dual_rms_norm"
    level = 1

    def match(self, found: Found) -> list[Site]:
        return [*self.pairs(found)]

    def pairs(self, found: Found) -> list[DualNormSite]:
        """All sites, with their refusals."""
        return found.once(_sites)

    def near_misses(self, found: Found) -> list[NearMiss]:
        return found.once(_pair)[1]

    def rewrite(self, graph: Graph, site: Site, plan: str) -> None:
        assert isinstance(site, DualNormSite)
        hoist = site.hoist()
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
        new.hoist(hoist)
        new.replace(site.q, results[0], site.q_rows.views)
        new.replace(site.kv, results[1], site.kv_rows.views)


def _sites(found: Found) -> list[DualNormSite]:
    return [_site(q, kv) for q, kv in found.once(_pair)[0]]


def _pair(found: Found) -> tuple[list[tuple[_Half, _Half]], list[NearMiss]]:
    """The two norms of each MLA layer, (q, kv); and norms of one projection, or of one layer's, that are no such pair.

    Norms whose results are cut into heads are attention's QK-norm, and no near miss.
    """
    halves = [_Half(block, rows) for block in found.rms_norms() if (rows := rows_of(block.input)) is not None]
    groups = {node for quant in found.quants() for node in quant.nodes}
    pairs: list[tuple[_Half, _Half]] = []
    misses: list[NearMiss] = []
    by_base: dict[Node, list[_Half]] = defaultdict(list)
    for half in halves:
        by_base[half.rows.base].append(half)
    single: dict[Node, list[_Half]] = defaultdict(list)
    for base, group in by_base.items():
        linear = linear_of(base)
        if len(group) == 1:
            if linear is not None:
                single[linear.activations].append(group[0])
            continue
        first, second = sorted(group, key=lambda half: half.rows.offset)[:2]
        if len(group) > 2:
            why = f"{len(group)} norms read parts of {base}, and which two are those of q and kv is not known"
        elif first.rows.offset + first.rows.width > second.rows.offset:
            why = f"the columns of {base} that its two norms read overlap: {first.rows}, {second.rows}"
        else:
            why = ""
        if not why and _are_latents(group, groups):
            pairs.append((first, second))
        elif why and linear is not None and _are_latents(group, groups):
            misses.append(_near_miss(group, why))
    for activations, group in single.items():
        pair = _roles(*group) if len(group) == 2 else None
        if len(group) < 2 or not _are_latents(group, groups):
            continue
        if pair is not None:
            pairs.append(pair)
            continue
        parts = ", ".join(str(half.rows) for half in group)
        misses.append(
            _near_miss(
                group, f"which of the norms over projections of {activations} are q's and kv's is unclear: {parts}"
            )
        )
    return pairs, misses


def _near_miss(group: Sequence[_Half], why: str) -> NearMiss:
    return NearMiss(MlaDualRMSNorm.op, min(half.block.output for half in group), why)


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


def _are_latents(halves: Sequence[_Half], groups: Collection[Node]) -> bool:
    """No latent is cut into heads right after its norm; the queries and keys of attention with QK-norm are.

    Args:
        groups: nodes that cut rows into groups, to quantise them.
    """
    return all(splits_into_heads(half.block.output, groups) is None for half in halves)


def _site(q: _Half, kv: _Half) -> DualNormSite:
    tokens = product(shape(q.block.input)[:-1])
    value = tensor(q.block.input)
    assert value is not None
    site = DualNormSite(
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
        refusal=None,
        q=q.block,
        kv=kv.block,
        q_rows=q.rows,
        kv_rows=kv.rows,
    )
    try:
        _check_alike(q.block, kv.block)
        for half in (q, kv):
            if (why := viewable_as_rows(half.rows.base)) is not None:
                raise RefusedError(why)
        site.hoist()
    except RefusedError as refused:
        return replace(site, refusal=str(refused))
    return site


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
