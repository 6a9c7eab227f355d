"""fuse_mla_q_absorb: what fuse_rope_kvcache_cat_mla joins, and the product that takes the query to the latent space.

MLA's decoding multiplies the part of each head's query that is not rotated by the head's W_UK (DeepSeek-V2 technical
report, section 2.1.2) and puts the result in front of the rotated part. The sites are those of
``fuse_rope_kvcache_cat_mla`` whose first columns are such a product; where both are faster, the one that saves more is
kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch.fx import Node

from autofuse.graph.blocks import AbsorbedQueryBlock, Found
from autofuse.graph.constants import is_constant
from autofuse.graph.fusions.base import Site
from autofuse.graph.fusions.layer_mla_rope import LayerMlaRope
from autofuse.graph.fusions.mla_rope_kv_cache_cat import MlaRopeKvCacheCat, MlaRopeSite
from autofuse.graph.heads import HeadSource
from autofuse.graph.moves import RefusedError
from autofuse.graph.recognise.axes import Axes, regrouped
from autofuse.graph.recognise.nodes import concrete, is_call, keeps_order, shape, tensor

__all__ = ["LayerMlaQAbsorb", "MlaQAbsorb"]

aten = torch.ops.aten

_NAME = "fuse_mla_q_absorb"
_OP = "mla_q_absorb_rope_kv_cache"
_LEVEL = 3


class MlaQAbsorb(MlaRopeKvCacheCat):
    """Joins the query's product with W_UK, its rotation and the key's, the write of the latent, and the query's cat."""

    name = _NAME
    op = _OP
    level = _LEVEL

    def match(self, found: Found) -> list[Site]:
        return _absorbing(super().match(found))


class LayerMlaQAbsorb(LayerMlaRope):
    """The same, where vLLM's operator finds the latent cache by its layer's name."""

    name = _NAME
    op = _OP
    level = _LEVEL

    def match(self, found: Found) -> list[Site]:
        return _absorbing(super().match(found))


def _absorbing(sites: Sequence[Site]) -> list[Site]:
    """Those of the sites whose query is absorbed, with the product."""
    return [absorbing for site in sites if (absorbing := _with_product(site)) is not None]


def _with_product(site: Site) -> Site | None:
    assert isinstance(site, MlaRopeSite)
    if site.cat is None or site.q_nope is None:
        return None
    chain = _up_to_product(site.q_nope.rows.node)
    if chain is None:
        return None
    product = chain[-1]
    absorbed = AbsorbedQueryBlock(chain[0], tuple(reversed(chain)), product)
    site = replace(
        site,
        fusion=_NAME,
        op=_OP,
        params=(
            *site.params,
            ("qk_nope_dim", concrete(shape(absorbed.rows)[2])),
            ("w_constant", is_constant(absorbed.weight)),
        ),
        blocks=(*site.blocks, absorbed),
        absorbed=absorbed,
    )
    if site.refusal is not None:
        return site
    assert site.q_nope is not None
    try:
        _check_readers(site, chain)
        _check_axes(site.q_nope, chain)
        _check_operands(site, absorbed)
        site.hoist()
    except RefusedError as refused:
        return replace(site, refusal=str(refused))
    return site


def _up_to_product(node: Any) -> list[Node] | None:
    """``node`` and what it is a view of, up to a product of batches of matrices; None if there is none."""
    chain: list[Node] = [node]
    while not is_call(chain[-1], aten.bmm.default):
        if not (keeps_order(chain[-1]) or is_call(chain[-1], aten.permute.default)):
            return None
        chain.append(chain[-1].args[0])  # type: ignore[arg-type]
    return chain


def _check_readers(site: MlaRopeSite, chain: Sequence[Node]) -> None:
    """Raises RefusedError where the product must be computed for others too."""
    for node, reader in zip(chain, [site.cat, *chain], strict=False):
        others = [user for user in node.users if user is not reader]
        if others:
            what = ", ".join("the graph's output" if user.op == "output" else str(user) for user in others)
            raise RefusedError(f"{node}, the absorbed part of the query, is also read by {what}")


def _check_axes(q_nope: HeadSource, chain: Sequence[Node]) -> None:
    """Raises RefusedError unless the product's matrices are the query's heads, its rows the tokens, in order."""
    sizes, columns = shape(chain[0]), len(q_nope.frame)
    axes: Axes | None = tuple((axis,) if concrete(size) != 1 else () for axis, size in enumerate(sizes))
    for view, above in pairwise(chain):
        assert axes is not None
        if is_call(view, aten.permute.default):
            order = [dim % len(axes) for dim in view.args[1]]  # type: ignore[operator, union-attr]
            axes = tuple(axes[order.index(dim)] for dim in range(len(order)))
        else:
            axes = regrouped([axis for dim in axes for axis in dim], sizes, shape(above))
        if axes is None:
            break
    heads = () if q_nope.heads_at is None else (q_nope.heads_at,)
    meant = [tuple(at for at in dim if concrete(sizes[at]) != 1) for dim in (heads, q_nope.tokens_at, (columns,))]
    if axes is None or [*axes] != meant:
        raise RefusedError(
            f"the matrices of the product {chain[-1]}, {list(shape(chain[-1]))}, are not the heads of the query "
            f"{chain[0]}, {list(sizes)}, or its rows not the tokens"
        )


def _check_operands(site: MlaRopeSite, absorbed: AbsorbedQueryBlock) -> None:
    """Raises RefusedError for operands that the op does not take."""
    dtype = site.pair.q.dtype
    for node in (absorbed.rows, absorbed.weight):
        value = tensor(node)
        assert value is not None
        if value.dtype != dtype:
            raise RefusedError(
                f"{node}, a factor of the product {absorbed.product}, is {value.dtype}, the query {dtype}"
            )
        if value.device != site.device:
            raise RefusedError(f"{node}, a factor of the product {absorbed.product}, is on {value.device}")
        if concrete(value.shape[-1]) is None:
            raise RefusedError(f"the width of {node}, {list(value.shape)}, is not known while compiling")
        if concrete(value.stride(-1)) != 1:
            raise RefusedError(f"the last dimension of {node} is not contiguous: strides {list(value.stride())}")
