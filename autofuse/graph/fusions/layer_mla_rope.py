"""fuse_rope_kvcache_cat_mla, where vLLM's operator finds the latent cache by its layer's name.

The cache and the slots are no tensors of the graph then. The fused operator finds them in the same way, and returns
what vLLM's returned so that attention comes after it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from torch.fx import Node

from autofuse.graph.blocks import Found, HeadRows, LatentUpdateBlock
from autofuse.graph.fusions.base import Site
from autofuse.graph.fusions.mla_rope_kv_cache_cat import (
    MlaRopeKvCacheCat,
    MlaRopeSite,
    activations,
    check_site,
    site_of,
)
from autofuse.graph.fusions.rope_pairs import RopePair, pair_ropes
from autofuse.graph.heads import HeadSource, SharedValues
from autofuse.graph.moves import RefusedError
from autofuse.graph.recognise.custom_ops import operator_name
from autofuse.graph.recognise.layer_calls import LATENT_UPDATE
from autofuse.graph.recognise.nodes import concrete, dtype_of, keeps_order, product, same_size, shape
from autofuse.graph.rewrite import Replacement
from autofuse.runtime.layer_ops import by_name_op
from autofuse.runtime.vllm_context import cache_kind

__all__ = ["LayerMlaRope", "LayerMlaRopeSite", "check_no_other_layer_call", "viewed_read"]


@dataclass(frozen=True)
class LayerMlaRopeSite(MlaRopeSite):
    """A site of ``mla_rope_kv_cache_cat``, whose cache is known by the layer's name.

    Attributes:
        update: the write; None only while the site is made.
    """

    update: LatentUpdateBlock | None = None

    @property
    def results(self) -> list[Node]:
        return [*super().results, self.latent.output]

    @property
    def needed(self) -> list[Node]:
        update = self.latent
        names = [update.layer_name] if isinstance(update.layer_name, Node) else []
        return [*super().needed, update.k_scale, *names]

    def hoist(self) -> tuple[Node, ...]:
        check_no_other_layer_call(self.first, self.latent.output)
        return super().hoist()

    @property
    def latent(self) -> LatentUpdateBlock:
        assert self.update is not None
        return self.update


class LayerMlaRope(MlaRopeKvCacheCat):
    """Joins the rotations of an MLA layer with vLLM's write of its latent, and with what makes its query whole."""

    needs = (LATENT_UPDATE,)

    def match(self, found: Found) -> list[Site]:
        updates = found.latent_updates()
        if not updates:
            return []
        pairs = [(pair, _update_of(pair, updates)) for pair in found.once(pair_ropes)[0] if pair.key_write is None]
        return [_site(pair, update) for pair, update in pairs if update is not None]

    def call(
        self, new: Replacement, shared: SharedValues, site: MlaRopeSite, plan: str
    ) -> tuple[Node, list[tuple[Node, Node]]]:
        assert isinstance(site, LayerMlaRopeSite)
        update = site.latent
        arguments: dict[str, Any] = {
            **activations(new, shared, site),
            "layer_name": update.layer_name,
            "kv_cache_dtype": update.kv_cache_dtype,
            "k_scale": update.k_scale,
            "q_scale": None,
            "is_neox": site.pair.q.is_neox,
            "deinterleave": site.pair.q.reordered,
            "plan": plan,
        }
        op = by_name_op(self.op)
        given = (arguments.get(argument.name, argument.default_value) for argument in op._schema.arguments)
        fused = new.call(op, *given)
        return fused, [(update.output, new.getitem(fused, 2))]


def _update_of(pair: RopePair, updates: list[LatentUpdateBlock]) -> LatentUpdateBlock | None:
    """The write of the rotated key, if there is just one."""
    reads = {read.node for read in pair.k.reads}
    mine = [update for update in updates if viewed_read(update.k_pe, reads) is not None]
    return mine[0] if len(mine) == 1 else None


def viewed_read(node: Node, reads: set[Node]) -> Node | None:
    """Which of ``reads`` has the elements of ``node`` in their order."""
    while node not in reads and keeps_order(node):
        node = node.args[0]  # type: ignore[assignment]
    return node if node in reads else None


def _site(pair: RopePair, update: LatentUpdateBlock) -> LayerMlaRopeSite:
    base = site_of(pair)
    own = {field.name: getattr(base, field.name) for field in fields(base)}
    site = LayerMlaRopeSite(**{**own, "blocks": (*base.blocks, update)}, update=update)
    if site.refusal is not None:
        return site
    try:
        site = _with_latent(site)
        check_site(site)
    except RefusedError as refused:
        return replace(site, refusal=str(refused))
    return site


def check_no_other_layer_call(first: Node, update: Node) -> None:
    """The write moves up to the first rotation. What it passes may be an operator that reads the same cache, which no
    argument tells. Raises RefusedError.
    """
    node = first
    while node is not update:
        name = operator_name(node)
        if name is not None and name.startswith("vllm::"):
            raise RefusedError(f"{node} ({name}) comes before the update, and may find the same layer")
        node = node.next


def _with_latent(site: LayerMlaRopeSite) -> LayerMlaRopeSite:
    """The site, with the latent's rows and the kind of its cache. Raises RefusedError."""
    update, q = site.latent, site.pair.q
    width = concrete(shape(update.kv_c)[-1])
    if len(shape(update.kv_c)) != 2 or width is None or dtype_of(update.kv_c) != q.dtype:
        what = f"{dtype_of(update.kv_c)} {list(shape(update.kv_c))}"
        raise RefusedError(f"the latent {update.kv_c} is {what}, not {q.dtype} [T, kv_lora_rank]")
    if not same_size(shape(update.kv_c)[0], site.tokens) or not same_size(
        product(shape(update.k_pe)[:-1]), site.tokens
    ):
        raise RefusedError(f"the latent {update.kv_c}, {list(shape(update.kv_c))}, has not as many tokens as the key")
    kind = cache_kind(update.kv_cache_dtype, q.dtype)
    if kind is None:
        raise RefusedError(f"the cache is of dtype {update.kv_cache_dtype!r}, which the op does not write")
    params = {**dict(site.params), "latent_dim": width, "cache": kind}
    return replace(
        site,
        params=tuple(params.items()),
        kv_c=HeadSource(HeadRows(update.kv_c, 0), shape(update.kv_c)[:-1], (0,), None, width),
    )
