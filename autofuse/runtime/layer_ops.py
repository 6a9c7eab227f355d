"""Fused operators that find a layer's cache by its name, as vLLM's own do, and then call the op that has a kernel.

They are no ``FusedOp``: they have no problem, no search space and no kernel of their own. Their arguments are those of
the op that they call, but for what the layer has.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from autofuse.ops import FusedOp, get_op
from autofuse.runtime.vllm_context import LeftToVllmError, head_caches, latent_cache, layer_name_type, layer_text

__all__ = ["by_name_op", "define"]

logger = logging.getLogger("autofuse.runtime")

_KEY = "CompositeExplicitAutograd"


@dataclass(frozen=True)
class _LayerOp:
    """How an op is called with a layer's name.

    It returns the op's results, and the empty tensor by which vLLM lets attention wait for the write. Where a kernel
    must not write the layer's cache (see ``vllm_context``) the op's reference computes the results, without a cache,
    and vLLM's operator is called with them, which skips what is to be skipped.

    Attributes:
        op: the op's name.
        found: those of its arguments that the layer has, one after the other in its schema.
        named: what stands for them in a call, as a schema has it; ``{layer}`` is the type of layers' names.
        find: arguments by name → ``found`` by name, None left out. Raises LeftToVllmError.
        unfused: arguments that are others where vLLM writes.
        ask: (arguments by name, results): calls vLLM's operator.
    """

    op: str
    found: tuple[str, ...]
    named: str
    find: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    unfused: Mapping[str, Any]
    ask: Callable[[Mapping[str, Any], Sequence[torch.Tensor]], None]
    _warned: set[str] = field(default_factory=set)

    @property
    def name(self) -> str:
        return f"{self.op}_by_name"

    def schema(self, layer: str) -> str:
        """Without the name, for layers' names of this type."""
        arguments, results = self._fused.schema[1:].split(") -> (")
        own = arguments.split(", ")
        first = next(place for place, each in enumerate(own) if _name_of(each) == self.found[0])
        own[first : first + len(self.found)] = [self.named.format(layer=layer)]
        return f"({', '.join(own)}) -> ({results[:-1]}, Tensor)"

    def run(self, *args: Any) -> tuple[torch.Tensor, ...]:
        given = self._by_name(args)
        try:
            results = self._call(*self._arguments({**given, **self.find(given)}))
        except LeftToVllmError as left:
            self._warn(given["layer_name"], str(left))
            results = self._fused.reference(*self._arguments({**given, **self.unfused})[:-1])
            self.ask(given, results)
        return (*results, results[1].new_empty(0))

    def fake(self, *args: Any) -> tuple[torch.Tensor, ...]:
        results = self._fused.fake(*self._arguments(self._by_name(args))[:-1])
        return (*results, results[1].new_empty(0))

    @cached_property
    def _fused(self) -> FusedOp:
        return get_op(self.op)

    @cached_property
    def _call(self) -> Any:
        return getattr(torch.ops.autofuse, self.op).default

    @cached_property
    def _own_names(self) -> tuple[str, ...]:
        return tuple(argument.name for argument in torch._C.parse_schema(self.name + self.schema("str")).arguments)

    @cached_property
    def _defaults(self) -> Mapping[str, Any]:
        arguments = torch._C.parse_schema(self.op + self._fused.schema).arguments
        return {argument.name: argument.default_value for argument in arguments}

    def _by_name(self, args: Sequence[Any]) -> dict[str, Any]:
        """PyTorch leaves out trailing arguments that are defaults."""
        return dict(zip(self._own_names, args, strict=False))

    def _arguments(self, values: Mapping[str, Any]) -> list[Any]:
        """The op's, the plan included."""
        return [values.get(name, default) for name, default in self._defaults.items()]

    def _warn(self, layer: Any, why: str) -> None:
        """Once for each reason."""
        if why and why not in self._warned:
            self._warned.add(why)
            logger.warning("%s leaves the cache of %s to vLLM: %s", self.op, layer_text(layer), why)


def _name_of(argument: str) -> str:
    """Of ``Tensor(a!)? k_cache``, ``k_cache``."""
    return argument.split(" ")[-1].partition("=")[0]


# ---- the ops --------------------------------------------------------------------------------------------------------


def _find_latent(given: Mapping[str, Any]) -> Mapping[str, Any]:
    return latent_cache(given["layer_name"], given["kv_cache_dtype"], given["k_scale"], given["q_pe"].dtype)


def _write_latent(given: Mapping[str, Any], results: Sequence[torch.Tensor]) -> None:
    own = (given[name] for name in ("layer_name", "kv_cache_dtype", "k_scale"))
    torch.ops.vllm.unified_mla_kv_cache_update(given["kv_c"], results[1].unsqueeze(1), *own)


def _find_heads(given: Mapping[str, Any]) -> Mapping[str, Any]:
    return head_caches(given["layer_name"], given["k"])


def _write_heads(given: Mapping[str, Any], results: Sequence[torch.Tensor]) -> None:
    torch.ops.vllm.unified_kv_cache_update(results[1], given["v"], given["layer_name"])


def _latent_op(op: str) -> _LayerOp:
    return _LayerOp(
        op=op,
        found=("slot_mapping", "kv_cache", "k_pe_cache", "kv_scale"),
        named="{layer} layer_name, str kv_cache_dtype, Tensor k_scale",
        find=_find_latent,
        unfused={},
        ask=_write_latent,
    )


_OPS = {
    each.op: each
    for each in (
        _latent_op("mla_rope_kv_cache_cat"),
        _latent_op("mla_q_absorb_rope_kv_cache"),
        _LayerOp(
            op="rope_kv_cache",
            found=("slot_mapping", "k_cache", "v_cache", "k_scale", "v_scale"),
            named="{layer} layer_name",
            find=_find_heads,
            unfused={"return_k": True},
            ask=_write_heads,
        ),
    )
}


# ---- as PyTorch knows them ------------------------------------------------------------------------------------------


class _Definitions:
    def __init__(self) -> None:
        self._library = torch.library.Library("autofuse", "FRAGMENT")
        self._defined: dict[tuple[str, str], Any] = {}

    def get(self, op: _LayerOp, layer: str) -> Any:
        """The operator for names of a type, which is defined when it is first asked for."""
        if (op.name, layer) not in self._defined:
            overload = "default" if layer == "str" else "layer"
            name = op.name if layer == "str" else f"{op.name}.{overload}"
            self._library.define(name + op.schema(layer), tags=(torch.Tag.pt2_compliant_tag,))
            self._library.impl(name, op.run, _KEY)
            torch.library.register_fake(f"autofuse::{name}", op.fake, lib=self._library)
            self._defined[op.name, layer] = getattr(getattr(torch.ops.autofuse, op.name), overload)
        return self._defined[op.name, layer]


_definitions = _Definitions()


def define() -> None:
    """Defines the operators, for names that are strings and for those of the type that vLLM's operators take.

    Called when autofuse is imported, and before a graph is compiled or taken from Inductor's cache: from PyTorch 2.11
    on vLLM's names are of a class that it registers with PyTorch, of which no schema can be written before that.
    """
    for op in _OPS.values():
        _definitions.get(op, "str")
        by_name_op(op.op)


def by_name_op(op: str) -> Any:
    """The operator that calls ``op`` on a layer's cache, for names of the type that vLLM's operators take."""
    return _definitions.get(_OPS[op], layer_name_type())
