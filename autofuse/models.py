"""Models by name: the parts of their Hugging Face configs that decide which problems they make."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autofuse.errors import BadInput

__all__ = ["PRESETS", "model_config"]

_MLA = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "deepseek-v2": {"model_type": "deepseek_v2", "q_lora_rank": 1536, "num_attention_heads": 128, **_MLA},
    "deepseek-v3": {"model_type": "deepseek_v3", "q_lora_rank": 1536, "num_attention_heads": 128, **_MLA},
    "kimi-k2": {"model_type": "kimi_k2", "q_lora_rank": 1536, "num_attention_heads": 64, **_MLA},
    "llama-3-8b": {"model_type": "llama", "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
    "qwen3-8b": {"model_type": "qwen3", "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
}


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
