"""The benchmark's tables, what is made of its results, and chains of the ops between matrix products."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from autofuse.errors import BadInput, TargetUnavailable
from autofuse.ops import OPS, Config, FusedOp, Problem, get_op
from autofuse.tuner.api import checked_problem
from autofuse.tuner.budgets import Effort
from autofuse.tuner.job import Bucket, BucketDone, BucketStarted, Event
from bench import running
from bench.chain import Chain, launched_plainly
from bench.showing import DOCUMENT, beginning, markdown, replace_generated, summary_lines
from bench.tables import PEERS, Results, Table, load_tables, summary
from bench_ops import chosen_tables

CPU = torch.device("cpu")
PROBLEM = Problem.parse("mla_dual_rms_norm(dtype=bf16,q_lora_rank=96,kv_lora_rank=40,cast_before_weight=1)")
TABLE = Table(
    name="norms",
    problem=PROBLEM,
    tokens=(1, 8192),
    about="narrow rows",
    device="NVIDIA H200",
    to_reach={"1": 2.0, "8192": 20.0},
    peers={"vLLM": {"1": 1.0, "8192": 40.0}},
    parts={"half of it": {"1": 0.1}},
)
FACTS = {
    "target": "cuda:sm_90a:NVIDIA H200",
    "provenance": {
        "source_hash": "now",
        "driver": "580",
        "torch": "2.11",
        "compiler": "NVRTC",
        "measured_at": "2026-01-02T03",
    },
}


def row(ours: float, **others: float) -> dict[str, Any]:
    return {"us": {"ours": ours, "eager": 90.0, "compile": 9.0, "floor": 0.5, **others}}


@pytest.fixture
def results(tmp_path: Path) -> Results:
    results = Results(tmp_path / "results")
    results.record(TABLE, 8192, row(25.0, compile=50.0, floor=20.0), FACTS)
    results.record(TABLE, 1, row(1.5, **{"compile+": 3.0}), FACTS)
    return results


def test_every_table_is_of_a_problem_that_its_op_knows() -> None:
    tables = load_tables()
    assert tables
    for table in tables:
        assert checked_problem(table.problem) == table.problem
        assert table.tokens
        for column in (*table.peers.values(), *table.parts.values()):
            assert set(map(int, column)) <= set(table.tokens)


def test_a_row_is_judged_by_the_best_that_computes_the_same(results: Results) -> None:
    verdict = TABLE.verdict(1, results.read("norms")["rows"]["1"])
    assert verdict is not None
    assert (verdict.best_peer, verdict.lead) == ("vLLM", pytest.approx(1 / 1.5))
    assert verdict.slower_than == ["vLLM"]
    assert verdict.miss is None
    assert verdict.bandwidth_share == pytest.approx(1 / 3)


def test_times_of_another_device_do_not_count(results: Results) -> None:
    verdict = TABLE.on("NVIDIA B200").verdict(1, results.read("norms")["rows"]["1"])
    assert verdict is not None
    assert (verdict.best_peer, verdict.lead, verdict.to_reach_us) == ("compile+", 2.0, None)


def test_on_another_device_a_table_has_the_rows_that_were_measured(results: Results) -> None:
    content = results.read("norms")
    assert TABLE.as_recorded(content) == TABLE
    elsewhere = {**content, "target": "cpu:x86-64-v3:AMD EPYC (2 threads)", "rows": {"64": row(1.0)}}
    assert TABLE.as_recorded(elsewhere).tokens == (64,)


def test_tokens_replace_those_of_the_tables() -> None:
    chosen = chosen_tables(Namespace(peers=PEERS, tables="", tokens="1,64", chain=False, markdown=False))
    assert {table.name for table in chosen} == {table.name for table in load_tables()}
    assert {table.tokens for table in chosen} == {(1, 64)}
    with pytest.raises(BadInput, match="not a list of numbers"):
        chosen_tables(Namespace(peers=PEERS, tables="", tokens="1,many", chain=False, markdown=False))


def test_the_summary_counts_failures_misses_and_slower_rows(results: Results) -> None:
    other = Table("other", PROBLEM, (4, 64), to_reach={"4": 1.0, "64": 1.0})
    results.record(other, 64, {"error": "LaunchError: too large"}, FACTS)
    found = summary([TABLE, other], results)
    assert found["rows"] == 4
    assert [(each["tokens"], each["error"]) for each in found["failed"]] == [
        (4, "was not measured"),
        (64, "LaunchError: too large"),
    ]
    assert [(each["tokens"], each["ratio"]) for each in found["missed"]] == [(8192, 1.25)]
    assert [(each["tokens"], each["peers"]) for each in found["slower_than_a_peer"]] == [
        (1, {"compile": 9.0, "compile+": 3.0, "vLLM": 1.0})
    ]
    assert found["geometric_mean_lead_up_to_256"] == pytest.approx(1 / 1.5)
    assert [each["share"] for each in found["bandwidth_share_from_8192"]] == [0.8]
    assert "  norms T=8192: 25 µs, to reach 20: +25.0%" in summary_lines(found)
    assert "  norms T=1: 1.5 µs, vLLM 1" in summary_lines(found)


def test_rows_of_other_kernels_and_failed_ones_are_not_kept(results: Results) -> None:
    results.record(TABLE, 8192, {"error": "died"}, FACTS)
    results.keep("norms", "now")
    assert list(results.read("norms")["rows"]) == ["1"]
    results.keep("norms", "another")
    assert results.read("norms")["rows"] == {}


def test_markdown_shows_what_was_measured_and_recorded(results: Results) -> None:
    unmeasured = replace(TABLE, name="not measured")
    text = markdown([TABLE, unmeasured], results)
    lines = text.splitlines()
    assert "2 rows, 0 failed" in lines
    assert "NVIDIA H200, driver 580, PyTorch 2.11, NVRTC, measured 2026-01-02." in lines
    assert (
        "| T | autofuse | to reach | eager | compile | compile+ | vLLM | (half of it) | best peer ÷ autofuse | floor | "
        "of bandwidth |" in lines
    )
    assert "| 1 | **1.5** | 2 | 90 | 9 | 3 | 1 | 0.1 | 0.67 vLLM | 0.5 | 33% |" in lines
    assert "| 8192 | **25** | 20 | 90 | 50 | – | 40 | – | 1.60 vLLM | 20 | 80% |" in lines


def test_the_document_shows_the_recorded_results() -> None:
    document = DOCUMENT.read_text(encoding="utf-8")
    for folder in ("h200", "cpu"):
        results = Results(PEERS.parents[1] / folder)
        tables = [table.as_recorded(results.read(table.name)) for table in load_tables()]
        generated = replace_generated(document, markdown(tables, results), beginning(tables, results))
        assert generated == document, f"run scripts/bench_ops.py --markdown --json benchmarks/{folder}"


def test_every_recorded_table_is_one_of_the_listed() -> None:
    names = {table.name: str(table.problem) for table in load_tables()}
    others = {"peers", "summary", "chain", "mla_layer", "ncu", "two_tunings", "search", "timing"}
    for path in PEERS.parent.glob("*.json"):
        if path.stem not in others and not path.stem.startswith("languages"):
            assert names.get(path.stem) == json.loads(path.read_text(encoding="utf-8"))["problem"]


def test_a_row_that_fails_does_not_cost_the_others(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    """At T=2 the op raises, T=3 cannot be tuned, T=4 has no config that runs, and the last table's op is unknown."""
    nobody = Table("unknown", Problem("no_such_op", ()), (1,))
    winner: Any = object()

    def tune(buckets: Sequence[Bucket], *_: Any, on_event: Callable[[Event], None]) -> None:
        for bucket in buckets:
            on_event(BucketStarted(bucket, 1))
            if bucket.tokens == 3:
                raise TargetUnavailable("nothing compiles")
            on_event(BucketDone(bucket, None if bucket.tokens == 4 else winner, True))

    def measured(*_: Any) -> dict[str, Any]:
        assert not torch.is_grad_enabled(), "Dynamo would compile the baselines again"
        if not results.has(TABLE, 3):  # the row before it
            raise RuntimeError("out of memory")
        return {**row(1.0), "seconds": {}}

    monkeypatch.setattr(running, "tune_buckets", tune)
    monkeypatch.setattr(running, "measured_row", measured)
    monkeypatch.setattr(running, "bandwidth", lambda *_: 1.0)
    monkeypatch.setattr(running, "facts", lambda *_: FACTS)
    monkeypatch.setattr(running, "rival_of", lambda *_: None)
    said: list[str] = []
    run = running.RowRun(CPU, Effort(), Any, results, say=said.append)
    assert run.run([(nobody, 1), *((TABLE, tokens) for tokens in (1, 2, 3, 4, 5))]) == 0
    rows = results.read("norms")["rows"]
    assert rows["1"]["us"]["ours"] == 1.5, "what is recorded is not measured again"
    assert [rows[key].get("error") for key in ("2", "3", "4", "5")] == [
        "RuntimeError: out of memory",
        "TargetUnavailable: nothing compiles",
        "no config is right and runs",
        None,
    ]
    assert "no_such_op" in results.read("unknown")["rows"]["1"]["error"]
    assert len(said) == 4


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_in_a_chain_every_call_depends_on_the_one_before(op: FusedOp) -> None:
    problem = op.sweep_problems()[0]
    config = op.default_config("cpu", problem, 5)
    first, again, shorter = (Chain(problem, 5, CPU, links=links) for links in (3, 3, 2))
    one = [result.clone() for result in first.run(config)]
    for result, same in zip(one, again.run(config), strict=True):
        assert torch.equal(result.contiguous().view(torch.uint8), same.contiguous().view(torch.uint8))
    assert not torch.equal(one[0].float(), shorter.run(config)[0].float())
    first.start.add_(1)
    assert not torch.equal(one[0].float(), first.run(config)[0].float())


def test_a_config_is_launched_plainly_with_the_fewest_changes() -> None:
    norms = get_op("mla_dual_rms_norm")
    plain = norms.default_config("cuda", PROBLEM, 1)
    for pdl, prefetch in ((1, 0), (1, 3), (2, 2), (0, 0)):
        assert launched_plainly(norms, PROBLEM, Config.of(plain, PDL=pdl, PREFETCH=prefetch)) == plain
