"""fuse_quant: a quantisation by itself, where Inductor or an operator would run it as a kernel of its own anyway."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from autofuse.graph.blocks import Found, QuantBlock
from autofuse.graph.fusions.attn_quant import quantised, replace_quantised
from autofuse.graph.fusions.base import Fusion, Site
from autofuse.graph.moves import RefusedError, check_no_mutation
from autofuse.graph.recognise.nodes import is_call, keeps_order, product, shape, tensor
from autofuse.graph.rewrite import Replacement, rows_as_matrix
from autofuse.graph.rows import Rows, is_stored, matrix_of, rows_of, viewable_as_rows

__all__ = ["Quant", "QuantSite"]

aten = torch.ops.aten


@dataclass(frozen=True)
class QuantSite(Site):
    """A site of ``fp8_group_quant`` without a norm.

    Attributes:
        quant: what it is.
        rows: where its input comes from.
    """

    quant: QuantBlock
    rows: Rows

    def tensors(self) -> Mapping[int, torch.Tensor]:
        return {0: matrix_of(self.rows)}

    def note(self) -> str:
        return self.quant.rounding


class Quant(Fusion):
    """Takes a quantisation of rows that are in memory, for readers that want its results there.

    Where Inductor computes the rows, or what is made of the results, in the kernel that quantises, there is no site: a
    kernel for the quantisation alone would only be one more.
    """

    name = "fuse_quant"
    op = "fp8_group_quant"
    level = 1

    def match(self, found: Found) -> list[Site]:
        rows = [(quant, rows_of(quant.input)) for quant in found.quants()]
        return [_site(quant, source) for quant, source in rows if source is not None and _is_apart(quant, source)]

    def rewrite(self, graph: Graph, site: Site, plan: str) -> None:
        assert isinstance(site, QuantSite)
        quant = site.quant
        new = Replacement(graph, before=min(quant.outputs), like=quant.output)
        with new:
            fused = new.call(
                torch.ops.autofuse.fp8_group_quant.default,
                rows_as_matrix(new, site.rows),
                quant.scale,
                None,
                0.0,
                False,
                quant.format.group,
                quant.format.ue8m0,
                int(quant.format.layout),
                plan,
            )
            results = quantised(new, fused, quant, sized=quant.input)
        replace_quantised(new, quant, results, views=site.rows.views)


def _site(quant: QuantBlock, rows: Rows) -> QuantSite:
    value = tensor(quant.input)
    assert value is not None
    refusal: str | None = None
    try:
        _check(quant, rows)
    except RefusedError as refused:
        refusal = str(refused)
    return QuantSite(
        fusion=Quant.name,
        op=Quant.op,
        params=(("dtype", quant.dtype), ("width", rows.width), ("norm", False), *quant.format.params),
        tokens=product(shape(quant.input)[:-1]),
        device=value.device,
        blocks=(quant,),
        refusal=refusal,
        quant=quant,
        rows=rows,
    )


def _check(quant: QuantBlock, rows: Rows) -> None:
    """Raises RefusedError where the op cannot take it."""
    if rows.width != quant.width:
        raise RefusedError(f"its rows {quant.input} have {rows.width} columns, those that it quantises {quant.width}")
    if (why := viewable_as_rows(rows.base)) is not None:
        raise RefusedError(why)
    scale = None if quant.scale is None else tensor(quant.scale)
    value = tensor(quant.input)
    if scale is not None and value is not None and scale.device != value.device:
        raise RefusedError("its operands are on different devices")
    check_no_mutation({*rows.views, *quant.nodes})


def _is_apart(quant: QuantBlock, rows: Rows) -> bool:
    """Whether it is a kernel of its own: an operator, or generated code that reads and writes memory."""
    if not all(_is_generated(node) for node in quant.nodes):
        return True
    return is_stored(rows.base) and not any(_is_generated(user) for user in _readers(quant))


def _readers(quant: QuantBlock) -> Iterator[Node]:
    """What reads the results, behind views."""
    todo = [user for output in quant.outputs for user in output.users if user not in quant.nodes]
    while todo:
        user = todo.pop()
        if keeps_order(user) or is_call(user, aten.permute.default):
            todo += user.users
        else:
            yield user


def _is_generated(node: Node) -> bool:
    """Whether Inductor generates code for ``node``, rather than call an operator."""
    return node.op == "call_function" and not is_stored(node)
