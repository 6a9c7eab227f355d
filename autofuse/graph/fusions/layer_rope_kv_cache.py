"""fuse_rope_kvcache, where vLLM's operator finds the caches of key and value by their layer's name.

Caches, slots and scales are no tensors of the graph then. The fused operator finds them in the same way, and returns
what vLLM's returned so that attention comes after it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from torch.fx import Node

from autofuse.graph.blocks import Found, HeadRows, HeadsUpdateBlock, NearMiss
from autofuse.graph.fusions.base import Site
from autofuse.graph.fusions.layer_mla_rope import check_no_other_layer_call, viewed_read
from autofuse.graph.fusions.rope_kv_cache import RopeKvCache, RopeKvCacheSite, activations, check_site, site_of
from autofuse.graph.fusions.rope_pairs import RopePair, pair_ropes
from autofuse.graph.heads import HeadSource, SharedValues
from autofuse.graph.moves import RefusedError
from autofuse.graph.recognise.layer_calls import HEADS_UPDATE
from autofuse.graph.recognise.nodes import concrete, dtype_of, same_size, same_sizes, shape
from autofuse.graph.rewrite import Replacement
from autofuse.runtime.layer_ops import by_name_op
from autofuse.runtime.vllm_context import head_cache_kinds, layer_text

__all__ = ["LayerRopeKvCache", "LayerRopeKvCacheSite"]


@dataclass(frozen=True)
class LayerRopeKvCacheSite(RopeKvCacheSite):
    """A site of ``rope_kv_cache``, whose caches are known by the layer's name.

    Attributes:
        update: the write; None only while the site is made.
        between: the views from the rotated key to it, if nobody else reads them.
    """

    update: HeadsUpdateBlock | None = None
    between: tuple[Node, ...] = ()

    @cached_property
    def nodes(self) -> frozenset[Node]:
        return super().nodes | {*self.between}

    @property
    def results(self) -> list[Node]:
        return [*super().results, self.write.output]

    @property
    def needed(self) -> list[Node]:
        return [*super().needed, *([self.write.layer_name] if isinstance(self.write.layer_name, Node) else [])]

    @property
    def returns_key(self) -> bool:
        own = self.nodes
        return any(user not in own for read in self.pair.k.reads for user in read.node.users)

    def hoist(self) -> tuple[Node, ...]:
        check_no_other_layer_call(self.first, self.write.output)
        return super().hoist()

    @property
    def write(self) -> HeadsUpdateBlock:
        assert self.update is not None
        return self.update


class LayerRopeKvCache(RopeKvCache):
    """Joins the rotations of q and k of an attention with vLLM's write of k and v."""

    needs = (HEADS_UPDATE,)

    def match(self, found: Found) -> list[Site]:
        pairs = found.once(_pairs)
        norms = {norm.output: norm for norm in found.rms_norms()} if pairs else {}
        kinds = head_cache_kinds()
        return [_site(site_of(pair, norms), update, kinds) for pair, update in pairs]

    def near_misses(self, found: Found) -> list[NearMiss]:
        taken = [update for _, update in found.once(_pairs)]
        why = "its key is not the rotated key of just one query"
        return [NearMiss("KV-cache write", each.output, why) for each in found.heads_updates() if each not in taken]

    def call(
        self, new: Replacement, shared: SharedValues, site: RopeKvCacheSite, plan: str
    ) -> tuple[Node, list[tuple[Node, Node]]]:
        assert isinstance(site, LayerRopeKvCacheSite)
        arguments = {**activations(new, shared, site), "layer_name": site.write.layer_name, "plan": plan}
        op = by_name_op(self.op)
        given = (arguments.get(argument.name, argument.default_value) for argument in op._schema.arguments)
        fused = new.call(op, *given)
        return fused, [(site.write.output, new.getitem(fused, 2))]


def _pairs(found: Found) -> list[tuple[RopePair, HeadsUpdateBlock]]:
    """Rotations of a query and a key, and the write of that key. With as many heads of each, only the write tells which
    is which.
    """
    updates = found.heads_updates()
    pairs = []
    for pair in found.once(pair_ropes)[0] if updates else []:
        ways = [pair, replace(pair, q=pair.k, k=pair.q)] if pair.key_write is None else []
        written = [(way, mine) for way in ways if (mine := _updates_of(way, updates))]
        if len(written) == 1 and len(written[0][1]) == 1:
            pairs.append((written[0][0], written[0][1][0]))
    return pairs


def _updates_of(pair: RopePair, updates: list[HeadsUpdateBlock]) -> list[HeadsUpdateBlock]:
    reads = {read.node for read in pair.k.reads}
    return [update for update in updates if viewed_read(update.key, reads) is not None]


def _site(base: RopeKvCacheSite, update: HeadsUpdateBlock, kinds: Any) -> LayerRopeKvCacheSite:
    own: dict[str, Any] = {field.name: getattr(base, field.name) for field in fields(base)}
    own["blocks"] = (*base.blocks, update)
    site = LayerRopeKvCacheSite(**own, update=update, between=_between(base.pair, update))
    if site.refusal is not None:
        return site
    try:
        site = _with_cache(site, kinds)
        check_site(site)
    except RefusedError as refused:
        return replace(site, refusal=str(refused))
    return site


def _between(pair: RopePair, update: HeadsUpdateBlock) -> tuple[Node, ...]:
    reads = {read.node for read in pair.k.reads}
    own: list[Node] = [update.output]
    node = update.key
    while node not in reads and all(user in own for user in node.users):
        own.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return tuple(own[1:])


def _with_cache(site: LayerRopeKvCacheSite, kinds: Any) -> LayerRopeKvCacheSite:
    """The site, with the rows of the value and the kind of the cache. Raises RefusedError."""
    update, k = site.write, site.k
    assert k is not None
    order = [*k.tokens_at, *([] if k.heads_at is None else [k.heads_at])]
    sizes, width = shape(update.key), concrete(shape(update.key)[-1])
    rows = len(sizes) == 3 and same_size(sizes[0], site.tokens) and (concrete(sizes[1]), width) == (k.heads, k.width)
    if not rows or order != sorted(order):
        raise RefusedError(
            f"what is written, {update.key} {list(sizes)}, is not the rotated key [T, {k.heads}, {k.width}]"
        )
    if not same_sizes(shape(update.value), sizes) or dtype_of(update.value) != site.pair.q.dtype:
        what = f"{dtype_of(update.value)} {list(shape(update.value))}"
        raise RefusedError(f"the value {update.value} is {what}, not {site.pair.q.dtype} {list(sizes)}")
    assert width is not None
    params = {**dict(site.params), "cache": _cache_kind(site, kinds), "return_k": site.returns_key}
    value = HeadSource(HeadRows(update.value, 0), shape(update.value)[:-1], (0,), 1, width)
    return replace(site, params=tuple(params.items()), v=value)


def _cache_kind(site: LayerRopeKvCacheSite, kinds: Any) -> str:
    """The kind of the layer's cache. Raises RefusedError where a kernel must not write it.

    A name that is an input of the graph may be another layer's in another call: then all layers must be alike.
    """
    name = site.write.layer_name
    if kinds is None:
        raise RefusedError("what cache its layer has is not known outside of vLLM's forward context")
    layers = list(kinds) if isinstance(name, Node) else [layer_text(name)]
    found = set()
    for layer in layers or ["no layer"]:
        if layer not in kinds:
            raise RefusedError(f"the attention of {layer} writes its cache in a way of its own")
        kind = kinds[layer].kind(site.pair.q.dtype)
        if kind is None:
            raise RefusedError(f"the cache of {layer} is of dtype {kinds[layer].dtype!r}, which the op does not write")
        found.add(kind)
    if len(found) > 1:
        raise RefusedError(f"the layers' caches are of several kinds, {', '.join(sorted(found))}")
    return str(found.pop())
