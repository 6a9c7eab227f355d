"""The comparison of ways of timing: its layer computes the layer, and its table says what each way's winner loses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import bench_timing
from autofuse.cache_db import TunedDatabase, Winner
from autofuse.ops import get_op
from autofuse.runtime.plan import Plan
from autofuse.targets import target_of
from autofuse.tuner.budgets import Effort
from bench_timing import ABSORB, BACK_TO_BACK, BEHIND, LAYER, NORMS, OPS, V_UP
from mla_layer import SMALL, mla_layer

CPU = torch.device("cpu")
TOKENS = 3


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


def test_its_layer_computes_the_layer() -> None:
    layer = bench_timing.layers(SMALL, TOKENS, CPU)[0]
    known = bench_timing.problems(SMALL, layer)
    assert [get_op(name).name for name in known] == list(OPS)
    target = target_of(CPU)
    plans: dict[str, str | None] = {
        name: str(Plan(target.arch, problem, ((TOKENS, get_op(name).default_config("cpu", problem, TOKENS)),)))
        for name, problem in known.items()
    }
    weights, inputs, instead = layer
    before = inputs.kv_cache.clone()
    out, query = bench_timing.layer_call(SMALL, plans)(*layer)
    cache = inputs.kv_cache.clone()
    inputs.kv_cache.copy_(before)
    expected, expected_query = mla_layer(SMALL, weights, inputs, core=False)
    for ours, theirs in ((out, expected), (query, expected_query), (cache, inputs.kv_cache)):
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.05, atol=0.05)
    assert not torch.equal(cache, before)
    # Without an op the layer goes on with what was drawn, and the op does not run.
    inputs.kv_cache.copy_(before)
    _, query = bench_timing.layer_call(SMALL, {**plans, ABSORB: None})(*layer)
    assert query is instead.query
    assert torch.equal(inputs.kv_cache, before)


def test_a_row_has_each_config_in_each_way(tiny: Effort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_timing, "ROUNDS", 2)
    monkeypatch.setattr(bench_timing, "SETS", 2)
    problem = bench_timing.problems(SMALL, bench_timing.layers(SMALL, TOKENS, CPU)[0])[NORMS]
    op = get_op(NORMS)
    default = op.default_config("cpu", problem, TOKENS)
    won = next(each for each in op.kernel_source("cpu").space.configs(problem, TOKENS) if each != default)
    with TunedDatabase(tmp_path / "tuned.db") as database:
        figures = (1.0, 0.1, "compile", 2.0, 2.0, 1.9, 2.1)
        database.record_winner(Winner(target_of(CPU), problem, TOKENS, won, op.source_hash("cpu"), *figures))
    row = bench_timing.measured_row(NORMS, SMALL, TOKENS, CPU, tiny, 4, tmp_path / "tuned.db")
    assert (row["op"], row["tokens"], row["problem"]) == (NORMS, TOKENS, str(problem))
    assert len(row["us"]) == 4
    assert next(iter(row["us"])) == str(won)
    assert all(set(times) == {LAYER, BACK_TO_BACK} and times[BACK_TO_BACK] > 0 for times in row["us"].values())
    assert row["layer_without_us"] > 0


def test_the_table_says_what_the_winner_of_each_way_takes_in_the_layer() -> None:
    def times(layer: float, alone: float, behind: float) -> dict[str, float]:
        return {LAYER: layer, BACK_TO_BACK: alone, BEHIND: behind}

    rows: list[dict[str, Any]] = [
        {"op": V_UP, "tokens": 1, "us": {"a": times(3.0, 1.0, 2.0), "b": times(2.5, 1.5, 1.5)}},
        {"op": NORMS, "tokens": 64, "us": {"a": times(1.0, 2.0, 3.0), "b": times(1.25, 1.0, 2.0)}},
    ]
    lines = bench_timing.table({"rows": rows}).splitlines()[2:]
    assert lines == [
        "| `mla_dual_rms_norm` | 64 | 2 | 1.00 | +0.25 | +0.25 |",
        "| `mla_v_up_quant` | 1 | 2 | 2.50 | +0.50 | 0 |",
    ]
