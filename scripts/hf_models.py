"""transformers' models with random weights: the true structure, but one layer of each kind and small widths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = [
    "CACHE_ROWS",
    "HIDDEN",
    "KV_RANK",
    "MODELS",
    "Q_RANK",
    "ROPE",
    "VOCABULARY",
    "decoder",
    "deepseek",
    "dynamic_cache",
    "static_cache",
]

Q_RANK, KV_RANK, ROPE, HIDDEN, VOCABULARY = 48, 32, 8, 64, 64
POSITIONS = 64
CACHE_ROWS = 32


def deepseek(
    version: int, layers: int = 3, bias: bool = False, dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> nn.Module:
    """DeepSeek-V2 or V3 for causal language modelling; the last layer has experts, the others are dense.

    Each token goes to all four experts: else rounding would decide to which, where two have nearly the same score, and
    what is equal but for rounding would differ by a whole expert.

    Args:
        changes: to the config.
    """
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

    config_class, model_class = {
        2: (DeepseekV2Config, DeepseekV2ForCausalLM),
        3: (DeepseekV3Config, DeepseekV3ForCausalLM),
    }[version]
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_shared_experts": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 4,
        "n_group": 2,
        "topk_group": 2,
        "first_k_dense_replace": layers - 1,
        "q_lora_rank": Q_RANK,
        "kv_lora_rank": KV_RANK,
        "qk_rope_head_dim": ROPE,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "max_position_embeddings": POSITIONS,
        "attention_bias": bias,
    }
    torch.manual_seed(0)
    return model_class(config_class(**{**sizes, **changes})).to(dtype).eval()


def decoder(kind: str, layers: int = 2, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> nn.Module:
    """The model of that name (llama, mistral, phi3, qwen3) for causal language modelling.

    Phi-3 has one projection and rotates half of each head, Qwen3 norms its heads first.

    Args:
        changes: to the config.
    """
    import transformers

    name = {"llama": "Llama", "mistral": "Mistral", "phi3": "Phi3", "qwen3": "Qwen3"}[kind]
    extra: dict[str, Any] = {
        "mistral": {"sliding_window": None},
        "phi3": {"partial_rotary_factor": 0.5, "pad_token_id": 0, "eos_token_id": 1},
    }.get(kind, {})
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": POSITIONS,
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**sizes, **extra, **changes})
    return getattr(transformers, f"{name}ForCausalLM")(config).to(dtype).eval()


def static_cache(model: nn.Module, prompt: torch.Tensor | None = None) -> Any:
    """A StaticCache for ``model``, filled with ``prompt`` if there is one."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=CACHE_ROWS)
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


def _yarn(mscale: float) -> dict[str, Any]:
    """The rotary embedding of DeepSeek's long contexts, for a quarter of ``POSITIONS``."""
    scaling = {"factor": 4.0, "original_max_position_embeddings": POSITIONS // 4}
    return {"rope_type": "yarn", "rope_theta": 1e4, "mscale": mscale, "mscale_all_dim": mscale, **scaling}


_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": POSITIONS // 4,
}

MODELS: dict[str, Callable[[torch.dtype], nn.Module]] = {
    "DeepSeek-V2-Lite": lambda dtype: deepseek(
        2, 2, dtype=dtype, q_lora_rank=None, n_group=1, topk_group=1, n_shared_experts=2, rope_parameters=_yarn(0.707)
    ),
    "DeepSeek-V3": lambda dtype: deepseek(3, 2, dtype=dtype, rope_parameters=_yarn(1.0)),
    "Kimi-K2": lambda dtype: deepseek(
        3, 2, dtype=dtype, n_group=1, topk_group=1, routed_scaling_factor=2.827, rope_parameters=_yarn(1.0)
    ),
    "Llama 3": lambda dtype: decoder("llama", 2, dtype, rope_parameters=_LLAMA3),
    "Qwen3": lambda dtype: decoder("qwen3", 2, dtype),
    "Mistral": lambda dtype: decoder("mistral", 2, dtype),
    "Phi-3": lambda dtype: decoder("phi3", 2, dtype),
}
"""Name → a function that makes the model, of two layers; always with the same weights."""
