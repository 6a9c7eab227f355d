"""fuse_rope_kvcache: RoPE of an attention's query and key, and the writes of key and value to the cache, as one op."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch.fx import Graph, Node

from autofuse.graph.blocks import Found, HeadRows, NearMiss, RMSNormBlock
from autofuse.graph.fusions.base import Fusion, Site
from autofuse.graph.fusions.rope_pairs import (
    RopePair,
    base_of,
    check_alike,
    check_order,
    check_scale,
    frames_of,
    is_latent,
    pair_ropes,
    returns_key,
    scale_of,
    value_rows,
)
from autofuse.graph.heads import (
    CacheArgument,
    HeadSource,
    SharedValues,
    angle_nodes,
    call_writing,
    head_positions,
    hoisted_first,
    replace_rope,
    replace_spared,
    slot_nodes,
    slots_of,
    table_dtype,
    table_of,
)
from autofuse.graph.moves import RefusedError
from autofuse.graph.recognise.nodes import is_call, keeps_order, product, same_size, tensor
from autofuse.graph.rewrite import Replacement
from autofuse.graph.rows import is_stored

__all__ = ["RopeKvCache", "RopeKvCacheSite", "activations", "check_site", "site_of"]

aten = torch.ops.aten


@dataclass(frozen=True)
class RopeKvCacheSite(Site):
    """A site of ``rope_kv_cache``.

    Attributes:
        pair: the rotations and the writes.
        q, k: their rows; v: the value's, None if nothing is cached.
        norms: of q and of k over their heads, that are computed with them; none or two.
    """

    pair: RopePair
    q: HeadSource | None
    k: HeadSource | None
    v: HeadSource | None
    norms: tuple[RMSNormBlock, ...]

    @cached_property
    def nodes(self) -> frozenset[Node]:
        return super().nodes | {*self.pair.between}

    @property
    def first(self) -> Node:
        return min(self.results)

    @property
    def spared(self) -> Mapping[Node, Node]:
        return self.pair.spared

    def hoist(self) -> tuple[Node, ...]:
        """What must move above the first of its results. Raises RefusedError where it must not be one call there."""
        return check_order(self.pair, self.results, self.needed, self.nodes)

    @property
    def results(self) -> list[Node]:
        """What it computes for others."""
        return [node for block in (self.pair.q, self.pair.k, *self.pair.writes) for node in block.outputs]

    @property
    def returns_key(self) -> bool:
        """Whether anybody but the write reads the rotated key."""
        return returns_key(self.pair)

    @cached_property
    def caches(self) -> list[CacheArgument]:
        named = zip(("k_cache", "v_cache"), self.pair.writes, strict=False)
        return [CacheArgument(name, write, self.pair.root_of(write)) for name, write in named]

    @property
    def needed(self) -> list[Node]:
        """What must come before it."""
        sources = [source.rows.node for source in (self.q, self.k, self.v) if source is not None]
        writes = [node for write in self.pair.writes for node in (self.pair.root_of(write), *slot_nodes(write.slots))]
        return [*sources, *angle_nodes(self.pair.q.angles), *writes, *(norm.weight for norm in self.norms)]

    def tensors(self) -> Mapping[int, torch.Tensor]:
        assert self.q is not None
        assert self.k is not None
        found = {0: self.q.fake(), 1: self.k.fake()}
        if self.v is not None:
            found[2] = self.v.fake()
        if self.pair.q.angles.table is not None:
            found[4] = self.pair.q.angles.table.meta["val"]
        found.update((6 + place, cache.fake()) for place, cache in enumerate(self.caches))
        found.update((11 + place, norm.weight.meta["val"]) for place, norm in enumerate(self.norms))
        return found


class RopeKvCache(Fusion):
    """Joins the rotations of q and k of an attention with the writes of k and v, where there are any."""

    name = "fuse_rope_kvcache"
    op = "rope_kv_cache"
    level = 2

    def match(self, found: Found) -> list[Site]:
        norms = {norm.output: norm for norm in found.rms_norms()}
        return [site_of(pair, norms) for pair in found.once(pair_ropes)[0] if not is_latent(pair)]

    def near_misses(self, found: Found) -> list[NearMiss]:
        return found.once(pair_ropes)[1]

    def rewrite(self, graph: Graph, site: Site, plan: str) -> None:
        assert isinstance(site, RopeKvCacheSite)
        pair, q, k = site.pair, site.q, site.k
        assert q is not None
        assert k is not None
        first = site.first
        hoist = site.hoist()
        spared, new = (Replacement(graph, before=first, like=pair.q.output) for _ in range(2))
        shared = SharedValues(graph, new, first)
        with shared, spared, new:
            kept = [each for rope in (pair.q, pair.k) for each in replace_spared(spared, rope)]
            fused, others = self.call(new, shared, site, plan)
            results = [
                *replace_rope(new, pair.q, q, new.getitem(fused, 0)),
                *(replace_rope(new, pair.k, k, new.getitem(fused, 1)) if site.returns_key else []),
                *kept,
                *others,
            ]
            hoist = shared.with_later(hoist)
            early = hoisted_first(spared, hoist, first)
        spared.hoist(early)
        new.hoist(node for node in hoist if node not in early)
        new.redirect(results)
        new.erase(site.nodes)

    def call(
        self, new: Replacement, shared: SharedValues, site: RopeKvCacheSite, plan: str
    ) -> tuple[Node, list[tuple[Node, Node]]]:
        """(the fused op; what it replaces beside the rotations, and by what)"""
        pair, write = site.pair, site.pair.key_write
        slots, from_end = (None, False) if write is None else slots_of(shared, write.slots, write)
        fused, caches = call_writing(
            new,
            torch.ops.autofuse.rope_kv_cache.default,
            {
                **activations(new, shared, site),
                "slot_mapping": slots,
                "k_scale": scale_of(pair.key_write, pair.q.dtype),
                "v_scale": scale_of(pair.value_write, pair.q.dtype),
                "slots_from_end": from_end,
                "plan": plan,
            },
            site.caches,
        )
        return fused, [(cache.write.output, caches[cache.root]) for cache in site.caches]


def activations(new: Replacement, shared: SharedValues, site: RopeKvCacheSite) -> dict[str, Any]:
    """The fused op's arguments, but for the caches and the plan."""
    pair, q, k = site.pair, site.q, site.k
    assert q is not None
    assert k is not None
    fused_k = k.build(new.call, k.rows.node)
    return {
        "q": q.build(new.call, q.rows.node),
        "k": fused_k,
        "v": fused_k if site.v is None else site.v.build(new.call, site.v.rows.node),
        "positions": head_positions(shared, pair.q.angles, q),
        "cos_sin_cache": table_of(shared, pair.q.angles),
        "q_scale": None,
        "q_weight": site.norms[0].weight if site.norms else None,
        "k_weight": site.norms[1].weight if site.norms else None,
        "eps": site.norms[0].eps if site.norms else 0.0,
        "is_neox": pair.q.is_neox,
        "return_k": site.returns_key,
        "deinterleave": pair.q.reordered,
    }


def site_of(pair: RopePair, norms: Mapping[Node, RMSNormBlock]) -> RopeKvCacheSite:
    value = tensor(pair.q.input.node)
    assert value is not None
    refusal: str | None = None
    q = k = v = None
    folded: tuple[RMSNormBlock, ...] = ()
    try:
        check_alike(pair)
        q, k = frames_of(pair)
        q, k, folded = _from_memory(q, k, norms)
        v = value_rows(pair, k)
    except RefusedError as refused:
        refusal = str(refused)
    site = RopeKvCacheSite(
        fusion=RopeKvCache.name,
        op=RopeKvCache.op,
        params=_params(pair, q, k, folded),
        tokens=product(pair.k.angles.sizes if k is None else k.tokens),
        device=value.device,
        blocks=(pair.q, pair.k, *pair.writes, *folded),
        refusal=refusal,
        pair=pair,
        q=q,
        k=k,
        v=v,
        norms=folded,
    )
    if refusal is None:
        try:
            check_site(site)
        except RefusedError as refused:
            return replace(site, refusal=str(refused))
    return site


def _params(
    pair: RopePair, q: HeadSource | None, k: HeadSource | None, norms: tuple[RMSNormBlock, ...]
) -> tuple[tuple[str, Any], ...]:
    if q is None or k is None:
        return ()
    cache = "none"
    if pair.key_write is not None:
        cache = "auto" if pair.key_write.dtype == pair.q.dtype else "fp8"
    return (
        ("dtype", pair.q.dtype),
        ("heads", q.heads),
        ("kv_heads", k.heads),
        ("head_dim", pair.q.width),
        ("rope_dim", pair.q.rotary_dim),
        ("neox", pair.q.is_neox),
        ("table", table_dtype(pair.q.angles)),
        ("cache", cache),
        ("qk_norm", bool(norms)),
        ("q_fp8", False),
        ("return_k", returns_key(pair)),
        ("deinterleave", pair.q.reordered),
    )


def _from_memory(
    q: HeadSource, k: HeadSource, norms: Mapping[Node, RMSNormBlock]
) -> tuple[HeadSource, HeadSource, tuple[RMSNormBlock, ...]]:
    """The rows as they lie in memory: those of the norms over heads that the kernel computes as well.

    Raises RefusedError where Inductor would compute the rows on the way.
    """
    found = [_normed(source, norms) for source in (q, k)]
    folded: tuple[RMSNormBlock, ...] = ()
    if found[0] is not None and found[1] is not None:
        (q_norm, q), (k_norm, k) = found[0], found[1]
        if q_norm.eps != k_norm.eps:
            raise RefusedError(f"the norms of q and k have different eps, {q_norm.eps} and {k_norm.eps}")
        folded = (q_norm, k_norm)
    for source in (q, k):
        base = base_of(source.rows.node)
        if not is_stored(base):
            raise RefusedError(f"its rows are computed by {base}, which Inductor joins with the rotation")
    return q, k, folded


def _normed(source: HeadSource, norms: Mapping[Node, RMSNormBlock]) -> tuple[RMSNormBlock, HeadSource] | None:
    """(the norm over heads whose result is rotated, its input as the same rows); None if there is no such norm."""
    views: list[Node] = []
    node = source.rows.node
    while node not in norms and (keeps_order(node) or is_call(node, aten.permute.default)):
        views.append(node)
        node = node.args[0]  # type: ignore[assignment]
    norm = norms.get(node)
    if norm is None or source.rows.heads or source.rows.first or norm.width != source.width:
        return None
    if not norm.cast_before_weight and norm.dtype != torch.float32:
        return None
    if any(set(above.users) != {below} for above, below in pairwise([norm.output, *reversed(views)])):
        return None
    rows = HeadRows(norm.input, 0)
    return norm, HeadSource(rows, source.frame, source.tokens_at, source.heads_at, source.width, (*reversed(views),))


def check_site(site: RopeKvCacheSite) -> None:
    """Raises RefusedError where the site must not be one call."""
    pair, q, k, v = site.pair, site.q, site.k, site.v
    assert q is not None
    assert k is not None
    if pair.q.width != pair.k.width or pair.q.rotary_first or pair.k.rotary_first:
        raise RefusedError(
            f"q's heads have {pair.q.width} columns, rotated from {pair.q.rotary_first} on, k's {pair.k.width}, from "
            f"{pair.k.rotary_first} on: the op rotates the first columns of equally wide heads"
        )
    for name, write, source in (("key", pair.key_write, k), ("value", pair.value_write, v)):
        if write is None or source is None:
            continue
        heads, width = write.layout[0][2:]
        if not (same_size(heads, source.heads) and same_size(width, source.width)):
            raise RefusedError(f"the cache of the {name} has {heads} heads of {width}, the {name} {source.heads}")
        check_scale(write, pair.q.dtype)
    if v is not None and (v.heads, v.width) != (k.heads, k.width):
        raise RefusedError(f"the value has {v.heads} heads of {v.width}, the key {k.heads} of {k.width}")
    for cache in site.caches:
        cache.fake()
    for source in (q, k, v):
        if source is not None:
            source.fake()
    site.hoist()
