"""Models by name: the parts of their Hugging Face configs that decide which problems they make."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autofuse.errors import BadInput

__all__ = ["ARCHITECTURES", "PRESETS", "checked_config", "model_config", "per_rank"]

_MLA = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}

_DEEPSEEK_V3 = {"model_type": "deepseek_v3", "q_lora_rank": 1536, "num_attention_heads": 128, **_MLA}


def _gqa(model_type: str, heads: int, kv_heads: int, head_dim: int = 128) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
    }


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "deepseek-v2": {"model_type": "deepseek_v2", "q_lora_rank": 1536, "num_attention_heads": 128, **_MLA},
    "deepseek-v2-lite": {"model_type": "deepseek_v2", "q_lora_rank": None, "num_attention_heads": 16, **_MLA},
    "deepseek-v3": _DEEPSEEK_V3,
    "deepseek-r1": _DEEPSEEK_V3,
    "kimi-k2": {"model_type": "kimi_k2", "q_lora_rank": 1536, "num_attention_heads": 64, **_MLA},
    "llama-3-8b": _gqa("llama", 32, 8),
    "llama-3-70b": _gqa("llama", 64, 8),
    "qwen3-8b": _gqa("qwen3", 32, 8),
    "mistral-7b": _gqa("mistral", 32, 8),
    "phi-3-mini": _gqa("phi3", 32, 32, 96),
}

_LATENT = ("deepseek_v2", "deepseek_v3", "kimi_k2")
_LATENT_FIELDS = ("num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_GROUPED = (
    *("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "phi", "phi3", "gemma", "gemma2"),
    *("granite", "olmo", "starcoder2", "stablelm", "glm", "glm4", "cohere", "cohere2"),
)

ARCHITECTURES = (*_LATENT, *_GROUPED)
"""The ``model_type`` of the models whose problems can be told from their config alone."""


def model_config(model: Any) -> Mapping[str, Any]:
    """The config of a preset's name, a path to a ``config.json``, or a Hugging Face model or config.

    Raises BadInput.
    """
    if isinstance(model, str):
        if model in PRESETS:
            return PRESETS[model]
        path = Path(model)
        if path.suffix == ".json" or path.exists():
            return _read(path)
        close = difflib.get_close_matches(model, PRESETS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise BadInput(f"model {model!r} is no preset ({', '.join(PRESETS)}) and no path to a config.json{hint}")
    config = getattr(model, "config", model)
    if hasattr(config, "to_dict"):
        return config.to_dict()
    if isinstance(config, Mapping):
        return config
    raise BadInput(f"a model is a preset's name, a path, or a Hugging Face model or config, not {type(model).__name__}")


def checked_config(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """``config``, if its architecture's problems can be told from it; one without ``model_type`` is taken as it is.

    Args: name: of the model, for messages.

    Raises BadInput for another architecture, and for a field that is missing.
    """
    kind = config.get("model_type")
    if kind is None:
        return config
    if kind not in ARCHITECTURES:
        close = difflib.get_close_matches(str(kind), ARCHITECTURES, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise BadInput(
            f"{name} is of an unknown architecture, model_type {kind!r}{hint} (known: {', '.join(ARCHITECTURES)}); "
            "`autofuse capture` finds what a program of yours has to tune"
        )
    needed = [_LATENT_FIELDS] if kind in _LATENT else [("num_attention_heads",), ("head_dim", "hidden_size")]
    missing = [field for field in needed[0] if not config.get(field)]
    missing += [" or ".join(fields) for fields in needed[1:] if not any(map(config.get, fields))]
    if missing:
        raise BadInput(f"{name} lacks {', '.join(missing)}, which the config of a {kind} model has")
    return config


def per_rank(config: Mapping[str, Any], tp: int, name: str) -> Mapping[str, Any]:
    """The config of what one of ``tp`` ranks computes under tensor parallelism: its share of the heads.

    Key/value heads that are fewer than the ranks are there on several of them, as in vLLM; latents are on all.

    Args: name: of the model, for messages.

    Raises BadInput where the heads cannot be shared equally.
    """
    if tp < 1:
        raise BadInput(f"--tp {tp}: there is at least one rank")
    if tp == 1:
        return config
    heads = config.get("num_attention_heads")
    if heads is None:
        raise BadInput(f"{name} lacks num_attention_heads, which --tp {tp} would share among the ranks")
    kv_heads = config.get("num_key_value_heads") or heads
    for field, count in (("num_attention_heads", heads), ("num_key_value_heads", kv_heads)):
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise BadInput(f"{name}: {field} is {count!r}, not a whole number from 1")
    if heads % tp:
        raise BadInput(f"{name} has {heads} heads, which {tp} ranks cannot share equally: choose another --tp")
    if kv_heads % tp and tp % kv_heads:
        raise BadInput(f"{name} has {kv_heads} key/value heads, which {tp} ranks cannot share equally")
    shared = {**config, "num_attention_heads": heads // tp, "num_key_value_heads": max(kv_heads // tp, 1)}
    if not config.get("head_dim") and isinstance(config.get("hidden_size"), int):
        shared["head_dim"] = config["hidden_size"] // heads  # what the ops would take from all heads
    return shared


def _read(path: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"model config {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise BadInput(f"model config {path} is not JSON: {error}") from None
    except RecursionError:
        raise BadInput(f"model config {path} is nested too deeply for a model's config") from None
    if not isinstance(config, dict):
        raise BadInput(f"model config {path} is not a JSON object")
    return config
