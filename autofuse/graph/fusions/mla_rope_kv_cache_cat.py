"""fuse_rope_kvcache_cat_mla: RoPE of MLA's query and key, the write of its latent, and the query's cat, as one op."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch
from torch.fx import Graph, Node

from autofuse.graph.blocks import AbsorbedQueryBlock, CacheWriteBlock, Found, HeadRows, RopeRead
from autofuse.graph.fakes import layout_view
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
    to_read,
)
from autofuse.graph.moves import RefusedError
from autofuse.graph.recognise.nodes import concrete, is_call, product, same_size, same_sizes, shape, tensor
from autofuse.graph.rewrite import Replacement, tokens_first
from autofuse.graph.rows import is_stored

__all__ = ["MlaRopeKvCacheCat", "MlaRopeSite", "activations", "check_site", "latent_sites", "site_of"]

aten = torch.ops.aten


@dataclass(frozen=True)
class MlaRopeSite(Site):
    """A site of ``mla_rope_kv_cache_cat``, or, where the query is absorbed, of ``mla_q_absorb_rope_kv_cache``.

    Attributes:
        pair: the rotations and the writes.
        q_nope: the columns of the query that are not rotated, None if they are elsewhere; ``q_pe``: the others.
        k_pe: the key's rows, and kv_c: the latent's, None if nothing is cached.
        cat: what puts q_nope and the rotated q_pe side by side, if they do not lie so.
        absorbed: what makes q_nope, if the op does that too.
    """

    pair: RopePair
    q_nope: HeadSource | None
    q_pe: HeadSource | None
    kv_c: HeadSource | None
    k_pe: HeadSource | None
    cat: Node | None
    absorbed: AbsorbedQueryBlock | None = None

    @cached_property
    def nodes(self) -> frozenset[Node]:
        return super().nodes | {*self.pair.between, *([] if self.cat is None else [self.cat])}

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
        found = [node for block in (self.pair.q, self.pair.k, *self.pair.writes) for node in block.outputs]
        if self.cat is None:
            return found
        return [*(node for node in found if node is not self.pair.q.output), self.cat]

    @property
    def returns_key(self) -> bool:
        """Whether anybody but what it replaces reads the rotated key."""
        return any(user not in self.nodes for read in self.pair.k.reads for user in read.node.users)

    @cached_property
    def caches(self) -> list[CacheArgument]:
        latent, apart = _caches(self.pair)
        named = [("kv_cache", latent), ("k_pe_cache", apart)]
        return [
            CacheArgument(name, write, self.pair.root_of(write), dims=(0, 1, 3))
            for name, write in named
            if write is not None
        ]

    @property
    def needed(self) -> list[Node]:
        """What must come before it."""
        sources = (None if self.absorbed else self.q_nope, self.q_pe, self.kv_c, self.k_pe)
        factors = [self.absorbed.rows, self.absorbed.weight] if self.absorbed else []
        writes = [node for write in self.pair.writes for node in (self.pair.root_of(write), *slot_nodes(write.slots))]
        rows = (s.rows.node for s in sources if s is not None)
        return [*rows, *factors, *angle_nodes(self.pair.q.angles), *writes]

    def tensors(self) -> Mapping[int, torch.Tensor]:
        heads, latents = {"q_pe": self.q_pe, "q_nope": self.q_nope}, {"kv_c": self.kv_c, "k_pe": self.k_pe}
        found = {name: source.fake() for name, source in heads.items() if source is not None}
        found.update({name: source.fake(flat=True) for name, source in latents.items() if source is not None})
        if self.absorbed is not None:
            found["q_nope"] = layout_view(self.absorbed.rows.meta["val"], lambda rows: rows.transpose(0, 1))
            found["w_uk"] = self.absorbed.weight.meta["val"]
        if self.pair.q.angles.table is not None:
            found["cos_sin_cache"] = self.pair.q.angles.table.meta["val"]
        found.update({cache.name: cache.fake() for cache in self.caches})
        places = _argument_places(self.op)
        return {places[name]: value for name, value in found.items()}


@cache
def _argument_places(op: str) -> Mapping[str, int]:
    """The arguments of a fused op, by their index in its schema."""
    arguments = getattr(torch.ops.autofuse, op).default._schema.arguments
    return {argument.name: index for index, argument in enumerate(arguments)}


class MlaRopeKvCacheCat(Fusion):
    """Joins the rotations of an MLA layer with the write of its latent, and with what makes its query whole."""

    name = "fuse_rope_kvcache_cat_mla"
    op = "mla_rope_kv_cache_cat"
    level = 2

    def match(self, found: Found) -> list[Site]:
        return [*found.once(latent_sites)]

    def rewrite(self, graph: Graph, site: Site, plan: str) -> None:
        assert isinstance(site, MlaRopeSite)
        pair, q_pe, k_pe = site.pair, site.q_pe, site.k_pe
        assert q_pe is not None
        assert k_pe is not None
        first = site.first
        hoist = site.hoist()
        spared, new = (Replacement(graph, before=first, like=pair.q.output) for _ in range(2))
        shared = SharedValues(graph, new, first)
        with shared, spared, new:
            kept = [each for rope in (pair.q, pair.k) for each in replace_spared(spared, rope)]
            fused, others = self.call(new, shared, site, plan)
            query = new.getitem(fused, 0)
            if site.cat is None:
                results = replace_rope(new, pair.q, q_pe, query)
            else:
                whole = RopeRead(site.cat, 0, concrete(shape(site.cat)[-1]) or 0, folded=False)
                results = [(site.cat, to_read(new, query, whole, q_pe))]
            if site.returns_key:
                rotated = new.call(aten.unsqueeze.default, new.getitem(fused, 1), 1)
                results += replace_rope(new, pair.k, k_pe, rotated)
            results += [*kept, *others]
            hoist = shared.with_later(hoist)
            early = hoisted_first(spared, hoist, first)
        spared.hoist(early)
        new.hoist(node for node in hoist if node not in early)
        new.redirect(results)
        new.erase(site.nodes)

    def call(
        self, new: Replacement, shared: SharedValues, site: MlaRopeSite, plan: str
    ) -> tuple[Node, list[tuple[Node, Node]]]:
        """(the fused op, whose first results are query and rotated k_pe; what else it replaces, and by what)"""
        latent = _caches(site.pair)[0]
        slots, from_end = (None, False) if latent is None else slots_of(shared, latent.slots, latent)
        fused, caches = call_writing(
            new,
            getattr(torch.ops.autofuse, self.op).default,
            {
                **activations(new, shared, site),
                "slot_mapping": slots,
                "kv_scale": scale_of(latent, site.pair.q.dtype),
                "q_scale": None,
                "is_neox": site.pair.q.is_neox,
                "deinterleave": site.pair.q.reordered,
                "slots_from_end": from_end,
                "plan": plan,
            },
            site.caches,
        )
        return fused, [(cache.write.output, caches[cache.root]) for cache in site.caches]


def activations(new: Replacement, shared: SharedValues, site: MlaRopeSite) -> dict[str, Any]:
    """The fused op's arguments that say what query and key are made of, and by which angles they are rotated."""
    q_pe, k_pe = site.q_pe, site.k_pe
    assert q_pe is not None
    assert k_pe is not None
    key = k_pe.build(new.call, k_pe.rows.node, flat=True)
    kv_c = key if site.kv_c is None else site.kv_c.build(new.call, site.kv_c.rows.node, flat=True)
    return {
        **_in_front(new, site),
        "q_pe": q_pe.build(new.call, q_pe.rows.node),
        "kv_c": kv_c,
        "k_pe": key,
        "positions": head_positions(shared, site.pair.q.angles, q_pe),
        "cos_sin_cache": table_of(shared, site.pair.q.angles),
    }


def _in_front(new: Replacement, site: MlaRopeSite) -> dict[str, Any]:
    """The fused op's arguments that make the columns in front of the rotated ones."""
    absorbed, q_nope = site.absorbed, site.q_nope
    if absorbed is None:
        return {"q_nope": None if q_nope is None else q_nope.build(new.call, q_nope.rows.node)}
    return {
        "q_nope": tokens_first(new, absorbed.rows),
        "w_uk": absorbed.weight,
        "w_constant": dict(site.params)["w_constant"],
    }


def _caches(pair: RopePair) -> tuple[CacheWriteBlock | None, CacheWriteBlock | None]:
    """(the write of the latent, that of the rotated key if it has a cache of its own)"""
    if pair.key_write is not None and len(pair.key_write.parts) > 1:
        return pair.key_write, None
    return pair.value_write, pair.key_write


def latent_sites(found: Found) -> tuple[MlaRopeSite, ...]:
    return tuple(site_of(pair) for pair in found.once(pair_ropes)[0] if is_latent(pair))


def site_of(pair: RopePair) -> MlaRopeSite:
    value = tensor(pair.q.input.node)
    assert value is not None
    site = MlaRopeSite(
        fusion=MlaRopeKvCacheCat.name,
        op=MlaRopeKvCacheCat.op,
        params=(),
        tokens=product(pair.k.angles.sizes),
        device=value.device,
        blocks=(pair.q, pair.k, *pair.writes),
        refusal=None,
        pair=pair,
        q_nope=None,
        q_pe=None,
        kv_c=None,
        k_pe=None,
        cat=None,
    )
    try:
        site = _with_rows(site)
        check_site(site)
    except RefusedError as refused:
        return replace(site, refusal=str(refused))
    return site


def _with_rows(site: MlaRopeSite) -> MlaRopeSite:
    """The site, with the rows that it reads. Raises RefusedError."""
    pair = site.pair
    check_alike(pair)
    q, k = frames_of(pair)
    nope = pair.q.rotary_first
    if nope + pair.q.rotary_dim != pair.q.width or pair.k.rotary_dim != pair.k.width:
        raise RefusedError(
            f"of {pair.q.width} columns of q and {pair.k.width} of k, {pair.q.rotary_dim} are rotated, and not the last"
        )
    q_nope, q_pe, cat = (q.columns(0, nope) if nope else None), q.columns(nope, pair.q.rotary_dim), None
    if q_nope is None and (joined := _joined(pair, q)) is not None:
        q_nope, cat = joined
    latent, _ = _caches(pair)
    kv_c = None
    if pair.key_write is not None and latent is pair.key_write:
        part = latent.parts[0]
        width = concrete(shape(part)[-1])
        assert width is not None
        kv_c = HeadSource(HeadRows(part, 0), shape(part)[:-1], latent.tokens_at, latent.heads_at, width)
    elif latent is not None:
        kv_c = value_rows(pair, k)
    kind = "none"
    if latent is not None:
        kind = ("auto" if latent.dtype == pair.q.dtype else "fp8") + ("_apart" if pair.value_write is not None else "")
    return replace(
        site,
        params=(
            ("dtype", pair.q.dtype),
            ("heads", q.heads),
            ("nope_dim", 0 if q_nope is None else q_nope.width),
            ("rope_dim", pair.q.rotary_dim),
            ("latent_dim", k.width if kv_c is None else kv_c.width),
            ("neox", pair.q.is_neox),
            ("table", table_dtype(pair.q.angles)),
            ("cache", kind),
            ("deinterleave", pair.q.reordered),
        ),
        tokens=product(k.tokens),
        q_nope=q_nope,
        q_pe=q_pe,
        kv_c=kv_c,
        k_pe=k,
        cat=cat,
    )


def _joined(pair: RopePair, q: HeadSource) -> tuple[HeadSource, Node] | None:
    """(q_nope, the cat) where all that becomes of the rotated query is to stand behind other columns."""
    users = list(pair.q.output.users)
    if len(pair.q.reads) != 1 or pair.q.reads[0].folded or len(users) != 1 or not is_call(users[0], aten.cat.default):
        return None
    cat = users[0]
    parts: Any = cat.args[0]
    dim = cat.args[1] if len(cat.args) > 1 else cat.kwargs.get("dim", 0)
    if len(parts) != 2 or parts[1] is not pair.q.output or dim not in (-1, len(shape(cat)) - 1):
        return None
    nope, width = parts[0], concrete(shape(parts[0])[-1])
    if not same_sizes(shape(nope)[:-1], q.frame) or width is None or nope.meta["val"].dtype != pair.q.dtype:
        return None
    if not is_stored(base_of(nope)):
        return None
    return HeadSource(HeadRows(nope, 0), q.frame, q.tokens_at, q.heads_at, width), cat


def check_site(site: MlaRopeSite) -> None:
    """Raises RefusedError where the site must not be one call."""
    pair, k_pe, q_pe = site.pair, site.k_pe, site.q_pe
    assert k_pe is not None
    assert q_pe is not None
    for source in (k_pe, site.kv_c):
        if source is not None and source.heads != 1:
            raise RefusedError(f"{source.rows.node} has {source.heads} heads, a latent has one")
    for source in (q_pe, k_pe):
        base = base_of(source.rows.node)
        if not is_stored(base):
            raise RefusedError(f"its rows are computed by {base}, which Inductor joins with the rotation")
    latent, apart = _caches(pair)
    if pair.key_write is not None and latent is None:
        raise RefusedError("the rotated key is cached, but no latent beside it")
    for write, width in (
        (latent, (0 if site.kv_c is None else site.kv_c.width) + (0 if apart is not None else k_pe.width)),
        (apart, k_pe.width),
    ):
        if write is None:
            continue
        if len(write.parts) > 2 or (len(write.parts) == 2 and pair.key_part != 1):
            raise RefusedError(f"the rows of {write.output} are not the latent, then the rotated key")
        if not (same_size(write.layout[0][2], 1) and same_size(write.layout[0][3], width)):
            raise RefusedError(f"rows of the cache {write.root} have {write.layout[0][2:]} columns, not {width}")
        check_scale(write, pair.q.dtype)
    for argument in site.caches:
        argument.fake()
    for source, flat in ((site.q_nope, False), (q_pe, False), (site.kv_c, True), (k_pe, True)):
        if source is not None:
            source.fake(flat)
    site.hoist()
