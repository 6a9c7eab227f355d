"""Two tunings' winners side by side: what counts, what is said, and the exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import compare_tunings
from autofuse.cache_db import TunedDatabase, Winner
from autofuse.cache_db.agreement import Pair
from autofuse.errors import BadInput
from autofuse.ops import Config, Problem, get_op
from autofuse.targets import target_of

SCRIPT = Path(compare_tunings.__file__)
TARGET = target_of(torch.device("cpu"))
PROBLEM = Problem.parse("mla_dual_rms_norm(dtype=fp32,q_lora_rank=96,kv_lora_rank=64,cast_before_weight=0)")
OP = get_op(PROBLEM.op)
CONFIGS = list(OP.kernel_source("cpu").space.configs(PROBLEM, 4))[:2]


def winner(tokens: int, config: Config, gain: tuple[float, float, float] = (2.0, 1.9, 2.1), source: str = "") -> Winner:
    source = source or OP.source_hash("cpu", config)
    return Winner(TARGET, PROBLEM, tokens, config, source, 5.0, 0.1, "eager", 5.0 * gain[0], *gain)


def database(path: Path, *winners: Winner) -> Path:
    with TunedDatabase(path) as opened:
        for each in winners:
            opened.record_winner(each)
    return path


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments), "--device", "cpu", "--rounds", "5"]
    return subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), timeout=300)


def test_both_winners_are_timed_side_by_side(tmp_path: Path) -> None:
    one = database(tmp_path / "one.db", winner(4, CONFIGS[0]), winner(8, CONFIGS[0]), winner(16, CONFIGS[0]))
    two = database(tmp_path / "two.db", winner(4, CONFIGS[1]), winner(8, CONFIGS[0]))
    done = run(one, two, "--within", 1000, "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 buckets, 1 with the same config; 2 within ")
    content = json.loads((tmp_path / "out.json").read_text())
    by_tokens = {pair["tokens"]: pair for pair in content["pairs"]}
    assert by_tokens[8]["interval"] == [1.0, 1.0]
    low, high = by_tokens[4]["interval"]
    assert 0 < low <= by_tokens[4]["ratio"] <= high
    assert by_tokens[4]["ratio"] != 1.0
    assert content["torch"] == torch.__version__


def test_tunings_that_decide_otherwise_are_a_failure(tmp_path: Path) -> None:
    one = database(tmp_path / "one.db", winner(4, CONFIGS[0]), winner(8, CONFIGS[0]))
    two = database(tmp_path / "two.db", winner(4, CONFIGS[0], (0.8, 0.7, 0.9)), winner(8, CONFIGS[0], (1.0, 0.9, 1.1)))
    done = run(one, two)
    assert done.returncode == 1
    assert "1 of 1 decided apart" in done.stdout  # of T=8 one does not say


def test_what_cannot_be_compared_is_one_line(tmp_path: Path) -> None:
    one = database(tmp_path / "one.db", winner(4, CONFIGS[0]))
    stale = database(tmp_path / "stale.db", winner(4, CONFIGS[0], source="0" * 16))
    with pytest.raises(BadInput, match=r"no bucket of .* in common"):
        compare_tunings.in_common(one, stale, TARGET)
    with pytest.raises(BadInput, match=r"none\.db: there is no such file"):
        compare_tunings.in_common(one, tmp_path / "none.db", TARGET)
    done = run(one, stale)
    assert done.returncode == 1
    assert done.stderr.startswith("compare_tunings: ")
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_summary_names_the_worst() -> None:
    done = [
        compare_tunings.Measured(Pair(winner(t, CONFIGS[0]), winner(t, CONFIGS[0])), ratio)
        for t, ratio in ((1, 0.8), (2, 1.01))
    ]
    total = compare_tunings.summary(done, 0.02)
    assert (total["within"], total["worst_slower"]) == (1, 1 / 0.8)
