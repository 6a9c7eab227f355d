"""Tiny models, and a way to compile them that stops before code is generated."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch._inductor.compile_fx
from torch import nn
from torch._dynamo.utils import detect_fake_mode
from torch._inductor.virtualized import V

Q_RANK, KV_RANK, ROPE, HIDDEN, VOCABULARY = 48, 32, 8, 64, 64


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


def deepseek(version: int, layers: int = 3, bias: bool = False, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Hugging Face's DeepSeek-V2 or V3 for causal language modelling: true structure, tiny widths, random weights."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

    config_class, model_class = {
        2: (DeepseekV2Config, DeepseekV2ForCausalLM),
        3: (DeepseekV3Config, DeepseekV3ForCausalLM),
    }[version]
    config = config_class(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_shared_experts=1,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=layers - 1,
        q_lora_rank=Q_RANK,
        kv_lora_rank=KV_RANK,
        qk_rope_head_dim=ROPE,
        qk_nope_head_dim=16,
        v_head_dim=16,
        max_position_embeddings=64,
        attention_bias=bias,
    )
    torch.manual_seed(0)
    return model_class(config).to(dtype).eval()


def decoder(kind: str, layers: int = 2, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Hugging Face's model of that name (llama, mistral, phi3, qwen3): true structure, tiny widths, random weights.

    Phi-3 has one projection and rotates half of each head, Qwen3 norms its heads first.
    """
    import transformers

    name = {"llama": "Llama", "mistral": "Mistral", "phi3": "Phi3", "qwen3": "Qwen3"}[kind]
    extra: dict[str, Any] = {
        "mistral": {"sliding_window": None},
        "phi3": {"partial_rotary_factor": 0.5, "pad_token_id": 0, "eos_token_id": 1},
    }.get(kind, {})
    config = getattr(transformers, f"{name}Config")(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        **extra,
    )
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(config).to(dtype).eval()


def static_cache(model: nn.Module, prompt: torch.Tensor | None = None) -> Any:
    """A StaticCache for ``model``, filled with ``prompt`` if there is one."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=32)
    if prompt is not None:
        with torch.no_grad():
            model(prompt, past_key_values=cache, use_cache=True)
    return cache


def dynamic_cache(model: nn.Module, prompt: torch.Tensor | None = None) -> Any:
    """A DynamicCache for ``model``, which grows by ``cat``, filled with ``prompt`` if there is one."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    if prompt is not None:
        with torch.no_grad():
            model(prompt, past_key_values=cache, use_cache=True)
    return cache


def _interpret(gm: torch.fx.GraphModule, example_inputs: list[Any], **options: Any) -> Callable[..., Any]:
    """In place of Inductor's code generation: its post-grad passes, custom ones included, then plain FX."""
    from torch._inductor.fx_passes.post_grad import post_grad_passes, view_to_reshape

    with V.set_fake_mode(detect_fake_mode(example_inputs)):
        view_to_reshape(gm)
        post_grad_passes(gm, is_inference=options.get("is_inference", False))
    gm.graph.lint()
    gm.recompile()

    def run(args: list[Any]) -> Any:
        inputs = list(args)
        args.clear()
        return gm(*inputs)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


@contextmanager
def without_code_generation() -> Iterator[None]:
    """Everything of a compilation but Inductor's code generation and caches: tenths of a second, not seconds."""
    original = torch._inductor.compile_fx.compile_fx
    torch._dynamo.reset()
    torch._inductor.compile_fx.compile_fx = functools.partial(original, inner_compile=_interpret)
    try:
        with torch._functorch.config.patch(enable_autograd_cache=False):
            yield
    finally:
        torch._inductor.compile_fx.compile_fx = original


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
            return compile_fx(gm, inputs, inner_compile=_interpret, config_patches=patches)

        torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)(*args)
    assert keep.graph is not None
    return keep.graph


def isolate(monkeypatch: Any, folder: Path, shared: Path | None = None) -> None:
    """Keeps all caches and the database of a test in ``folder``; compiled kernels and reports in ``shared``."""
    for name, value in {
        "XDG_CACHE_HOME": shared or folder / "cache",
        "AUTOFUSE_DB": folder / "tuned.db",
        "TORCHINDUCTOR_CACHE_DIR": folder / "inductor",
    }.items():
        monkeypatch.setenv(name, os.fspath(value))
