"""Tiny models, and a way to compile them that stops before code is generated."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compiling import compile_unoptimised
from torch import nn

from autofuse.paths import cache_folder
from hf_models import HIDDEN, KV_RANK, Q_RANK, ROPE, VOCABULARY, decoder, deepseek, dynamic_cache, static_cache
from without_code import interpret, without_code_generation

__all__ = [
    "HIDDEN",
    "KV_RANK",
    "Q_RANK",
    "ROPE",
    "VOCABULARY",
    "MlaLatents",
    "RMSNorm",
    "decoder",
    "deepseek",
    "dynamic_cache",
    "isolate",
    "post_grad_graph",
    "static_cache",
    "without_code_generation",
]


class RMSNorm(nn.Module):
    """The norm as Hugging Face's models write it."""

    def __init__(self, width: int, dtype: torch.dtype, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(width, dtype=dtype))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class MlaLatents(nn.Module):
    """The down-projections and norms of an MLA layer, and what reads them: [..., HIDDEN] → two tensors.

    Args:
        joint: one projection for both latents and the RoPE part, as vLLM has it; else two, as Hugging Face.
    """

    def __init__(self, dtype: torch.dtype = torch.bfloat16, joint: bool = True, bias: bool = False) -> None:
        super().__init__()
        self.joint = joint
        widths = [Q_RANK + KV_RANK + ROPE] if joint else [Q_RANK, KV_RANK + ROPE]
        self.down = nn.ModuleList(nn.Linear(HIDDEN, width, bias=bias, dtype=dtype) for width in widths)
        self.q_norm = RMSNorm(Q_RANK, dtype)
        self.kv_norm = RMSNorm(KV_RANK, dtype)
        self.q_up = nn.Linear(Q_RANK, HIDDEN, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.joint:
            q, kv, rope = self.down[0](x).split([Q_RANK, KV_RANK, ROPE], dim=-1)
            q = self.q_up(self.q_norm(q))
        else:
            q = self.q_up(self.q_norm(self.down[0](x)))  # before the other projection, as in Hugging Face
            kv, rope = self.down[1](x).split([KV_RANK, ROPE], dim=-1)
        return q, torch.cat([self.kv_norm(kv), rope], dim=-1)


class _Keep:
    """A plain function of a pass that keeps a copy of the graph it is given: later passes change the graph itself."""

    def __init__(self) -> None:
        self.graph: torch.fx.Graph | None = None

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.graph = copy.deepcopy(graph)


def post_grad_graph(
    function: Callable[..., Any], *args: Any, dynamic: bool | None = False, reorder: bool = True
) -> torch.fx.Graph:
    """The graph of ``function`` as a post-grad pass sees it, for inference; without ``reorder`` in program order."""
    from torch._inductor.compile_fx import compile_fx

    keep = _Keep()
    with without_code_generation(), torch.no_grad():

        def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
            patches = {"post_grad_custom_post_pass": keep, "reorder_for_locality": reorder}
            return compile_fx(gm, inputs, inner_compile=interpret, config_patches=patches)

        torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)(*args)
    assert keep.graph is not None
    return keep.graph


def isolate(monkeypatch: Any, folder: Path, shared: Path | None = None) -> None:
    """Keeps a test's caches and database in ``folder``; reports in ``shared``, with the kernels that the run compiled.

    It is the graph that is tested, not its kernels: these are not optimised.
    """
    if shared is not None:
        kernels, link = cache_folder() / "kernels", shared / "autofuse" / "kernels"
        kernels.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.parent.mkdir(parents=True)
            link.symlink_to(kernels)
    for name, value in {
        "XDG_CACHE_HOME": shared or folder / "cache",
        "AUTOFUSE_DB": folder / "tuned.db",
        "TORCHINDUCTOR_CACHE_DIR": folder / "inductor",
    }.items():
        monkeypatch.setenv(name, os.fspath(value))
    compile_unoptimised(monkeypatch)
