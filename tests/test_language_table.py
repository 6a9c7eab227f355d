"""The table of template languages: what a tuned database says of both, and both timed side by side."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

import language_table
from autofuse.cache_db import Trial, TunedDatabase, Winner
from autofuse.ops import Config, Problem, get_op
from autofuse.ops.languages import CPP, TRITON
from autofuse.targets import Target
from tiny_effort import TINY

GPU = Target("cuda", "sm_90a", "NVIDIA H200")
PROBLEM = Problem.parse("mla_dual_rms_norm(dtype=fp32,q_lora_rank=96,kv_lora_rank=64,cast_before_weight=0)")
OP = get_op(PROBLEM.op)


def trial(config: Config, time_us: float) -> Trial:
    source = OP.source_hash("cuda", config)
    return Trial(GPU, PROBLEM, 4, config, source, "ok", "", time_us)


def test_the_best_of_each_language_is_a_row(tmp_path: Path) -> None:
    in_cpp = next(iter(OP.kernels["cuda"].space.configs(PROBLEM, 4)))
    in_triton = list(OP.triton_kernels["cuda"].space.configs(PROBLEM, 4))[:2]
    with TunedDatabase(tmp_path / "tuned.db") as database:
        for each in (trial(in_cpp, 2.0), trial(in_triton[0], 3.0), trial(in_triton[1], 2.5)):
            database.record_trial(each)
        source = OP.source_hash("cuda", in_cpp)
        database.record_winner(Winner(GPU, PROBLEM, 4, in_cpp, source, 2.1, 0.1, "eager", 4.2, 2.0, 1.9, 2.1))
        lone = replace(trial(in_cpp, 2.0), tokens=8)
        database.record_trial(lone)
        database.record_winner(Winner(GPU, PROBLEM, 8, in_cpp, source, 2.1, 0.1, "eager", 4.2, 2.0, 1.9, 2.1))
    (row,) = language_table.rows_of(tmp_path / "tuned.db")["rows"]  # of T=8 there is one language alone
    assert row["us"] == {CPP: 2.0, TRITON: 2.5}
    assert row["configs"] == {CPP: str(in_cpp), TRITON: str(in_triton[1])}
    assert (row["winner"], row["winner_us"], row["tokens"]) == (CPP, 2.1, 4)


def test_both_are_timed_side_by_side() -> None:
    one, other = list(OP.kernel_source("cpu").space.configs(PROBLEM, 4))[:2]
    row = {"problem": str(PROBLEM), "tokens": 4, "configs": {CPP: str(one), TRITON: str(other)}}
    language_table.measure(row, torch.device("cpu"), TINY)
    low, high = row["interval"]
    assert 0 < low <= row["ratio"] <= high
    assert all(time_us > 0 for time_us in row["us"].values())
    assert "host_us" not in row  # on a CPU a call is the kernel


def test_how_much_longer_the_host_is_busy() -> None:
    rows = [{"host_us": {CPP: 5.0, TRITON: 5.0 + more}} for more in (0.5, -0.25, 0.75)]
    assert language_table.host_difference({"rows": rows}) == (
        "a call in Triton keeps the host +0.50 µs longer, at most +0.75"
    )
    assert language_table.host_difference({"rows": [{}]}) == "host times were not measured"
