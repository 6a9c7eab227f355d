"""Models by name or config: what one rank of them has to tune, and what is said where that cannot be told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autofuse.cli.app import run
from autofuse.errors import BadInput
from autofuse.models import ARCHITECTURES, PRESETS, checked_config, per_rank
from autofuse.tuner.api import model_buckets

LLAMA = {"model_type": "llama", "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}


def problems(model: Any, tp: int = 1) -> list[str]:
    return [str(bucket.problem) for bucket in model_buckets(model, [1], tp=tp)]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_whole_and_gives_something_to_tune(name: str) -> None:
    assert checked_config(PRESETS[name], name) == PRESETS[name]
    assert problems(name)
    assert problems(name, tp=2)


def test_models_of_one_shape_give_the_same_problems() -> None:
    assert problems("deepseek-r1") == problems("deepseek-v3")
    assert problems("mistral-7b") == problems("llama-3-8b")
    assert not any("dual_rms_norm" in text for text in problems("deepseek-v2-lite"))  # no query latent


def test_a_rank_has_its_share_of_the_heads_and_whole_latents() -> None:
    whole, share = problems("deepseek-v3"), problems("deepseek-v3", tp=8)
    assert len(whole) == len(share) == 8
    assert [text.replace("heads=128", "heads=16").replace("width=16384", "width=2048") for text in whole] == share
    assert "q_lora_rank=1536" in share[0]


@pytest.mark.parametrize(("tp", "heads", "kv_heads"), [(1, 32, 8), (4, 8, 2), (8, 4, 1), (16, 2, 1)])
def test_key_value_heads_that_are_fewer_than_the_ranks_are_on_several(tp: int, heads: int, kv_heads: int) -> None:
    for text in problems(LLAMA, tp):
        assert f"heads={heads},kv_heads={kv_heads},head_dim=128," in text


@pytest.mark.parametrize(
    ("changes", "tp", "message"),
    [
        ({}, 3, "has 32 heads, which 3 ranks cannot share equally: choose another --tp"),
        ({"num_key_value_heads": 6}, 4, "has 6 key/value heads, which 4 ranks cannot share equally"),
        ({"num_attention_heads": "many"}, 2, "num_attention_heads is 'many', not a whole number from 1"),
        ({"num_attention_heads": None}, 2, "lacks num_attention_heads"),
        ({}, 0, "--tp 0: there is at least one rank"),
    ],
)
def test_heads_that_cannot_be_shared_are_refused(changes: dict[str, Any], tp: int, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        per_rank({**LLAMA, **changes}, tp, "the model")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama", "hidden_size": 4096}, "lacks num_attention_heads, which the config of a llama model"),
        ({"model_type": "qwen3", "num_attention_heads": 8}, "lacks head_dim or hidden_size"),
        (
            {"model_type": "deepseek_v3", "num_attention_heads": 128, "kv_lora_rank": 512},
            "lacks qk_nope_head_dim, qk_rope_head_dim, v_head_dim",
        ),
        (
            {"model_type": "bert", "num_attention_heads": 12, "hidden_size": 768},
            "unknown architecture, model_type 'bert'",
        ),
        ({"model_type": "lama"}, "did you mean llama?"),
        ({"model_type": ["llama"]}, "unknown architecture"),
        ({}, "has no use for"),
    ],
)
def test_a_config_from_which_nothing_can_be_told_is_one_line(
    config: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], database_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    assert run(["tune", "--model", str(path), "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("autofuse: error: ")
    assert message in line
    assert not database_path.exists()


def test_the_architectures_are_those_of_transformers() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    assert set(ARCHITECTURES) - {"kimi_k2"} <= set(CONFIG_MAPPING_NAMES)  # Kimi-K2 has its own file
