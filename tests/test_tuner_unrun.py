"""Configs that need not run: the same code as another, more shared memory than there is, spilled registers."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest
import torch
from planting import tune_here

from autofuse.cache_db import Trial, TunedDatabase, Winner
from autofuse.ops import Config, FusedOp, Problem, get_op
from autofuse.targets import Artifact, KernelSpec, Resources, Target, cpu, target_of
from autofuse.tuner import job
from autofuse.tuner.bench import Bench
from autofuse.tuner.budgets import Effort
from autofuse.tuner.job import Bucket, Event, TrialDone, _BucketTuning, tune_buckets

CPU = torch.device("cpu")
NORMS = get_op("mla_dual_rms_norm")


def norms(q: int = 120) -> Problem:
    return NORMS.make_problem(dtype="bf16", q_lora_rank=q, kv_lora_rank=40, cast_before_weight=True)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Counter[Config]:
    """How often each config was verified."""
    tune_here(monkeypatch)
    counts: Counter[Config] = Counter()
    verify, baselines = Bench.verify, Bench.baselines

    def counted(self: Bench, config: Config) -> float:
        counts[config] += 1
        return verify(self, config)

    monkeypatch.setattr(Bench, "verify", counted)
    monkeypatch.setattr(Bench, "baselines", lambda self, compiled: baselines(self, compiled=False))
    return counts


def tune(database: TunedDatabase, effort: Effort, events: list[Event] | None = None) -> list[Winner]:
    on_event = (lambda event: None) if events is None else events.append
    return tune_buckets([Bucket(norms(), 1)], CPU, database, replace(effort, exhaustive_up_to=100), on_event=on_event)


def trials(database: TunedDatabase) -> list[Any]:
    return database.trials(target_of(CPU), norms(), 1, NORMS.source_hash("cpu"))


def test_the_same_code_runs_once_and_is_one_finalist(
    ran: Counter[Config], tiny: Effort, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here UNROLL changes nothing that is compiled."""
    spec_of = NORMS.spec

    def spec(self: FusedOp, kind: str, problem: Problem, config: Config) -> KernelSpec:
        return spec_of(kind, problem, Config.of(config, UNROLL=1))

    monkeypatch.setattr(type(NORMS), "spec", spec)
    finalists: list[Any] = []
    choose = _BucketTuning._choose
    monkeypatch.setattr(
        _BucketTuning, "_choose", lambda self, configs: finalists.extend(configs) or choose(self, configs)
    )
    events: list[Event] = []
    with TunedDatabase() as database:
        tune(database, tiny, events)
        rows = trials(database)
    unlike = {tuple(pair for pair in row.config.pairs if pair[0] != "UNROLL") for row in rows}
    assert len(ran) == len(unlike) < len(rows) == sum(isinstance(event, TrialDone) for event in events)
    twins = [row for row in rows if row.config not in ran]
    assert {row.status for row in rows} == {"ok"}
    for twin in twins:
        (first,) = [row for row in rows if row.message == "" and twin.message == f"the same code as {row.config}"]
        assert (twin.time_us, twin.error) == (first.time_us, first.error)
    assert finalists
    assert set(finalists) <= set(ran)


def compiled_with(monkeypatch: pytest.MonkeyPatch, resources: dict[int, Resources]) -> None:
    """UNROLL → what the compiler says of it."""
    compile_one = cpu.CpuToolchain.compile

    def told(self: cpu.CpuToolchain, spec: KernelSpec, arch: str) -> Artifact:
        artifact = compile_one(self, spec, arch)
        return replace(artifact, resources=resources.get(int(spec.defines["UNROLL"]), Resources()))

    monkeypatch.setattr(cpu.CpuToolchain, "compile", told)


def test_what_needs_more_shared_memory_than_there_is_fails_without_a_run(
    ran: Counter[Config], tiny: Effort, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled_with(monkeypatch, {4: Resources(shared_bytes=2000), 1: Resources(shared_bytes=1000)})
    monkeypatch.setattr(cpu.CpuToolchain, "most_shared_bytes", lambda self, arch: 1000)
    with TunedDatabase() as database:
        tune(database, tiny)
        rows = trials(database)
    failed = [row for row in rows if row.failed]
    assert {row.config["UNROLL"] for row in failed} == {4}
    assert {row.message for row in failed} == {"a block needs 2000 bytes of shared memory; it can have 1000"}
    assert {config["UNROLL"] for config in ran} == {1, 2}


@pytest.mark.parametrize("everywhere", [False, True])
def test_what_spills_is_not_run_where_another_does_not(
    everywhere: bool, ran: Counter[Config], tiny: Effort, monkeypatch: pytest.MonkeyPatch
) -> None:
    spills = Resources(spill_bytes=64)
    compiled_with(monkeypatch, dict.fromkeys((1, 2, 4), spills) if everywhere else {4: spills})
    with TunedDatabase() as database:
        (winner,) = tune(database, tiny)
        rows = trials(database)
    assert ({row.status for row in rows} == {"ok"}) == everywhere
    if not everywhere:
        pruned = [row for row in rows if row.status == "pruned"]
        assert {(row.config["UNROLL"], row.time_us) for row in pruned} == {(4, None)}
        assert pruned[0].message == "it spills 64 bytes of registers; it was not run"
        assert winner.config["UNROLL"] != 4
        assert 4 not in {config["UNROLL"] for config in ran}


def test_what_is_likely_fast_is_tried_after_the_default(tiny: Effort, monkeypatch: pytest.MonkeyPatch) -> None:
    guessing = replace(NORMS.kernels["cpu"], guess=lambda problem, tokens: {"UNROLL": 4})
    monkeypatch.setitem(NORMS.kernels, "cpu", guessing)  # type: ignore[arg-type]
    default = NORMS.default_config("cpu", norms(), 4)
    assert default["UNROLL"] != 4
    with TunedDatabase() as database:
        tuning = _BucketTuning(Bucket(norms(), 4), target_of(CPU), database, tiny, "", None, None, print)  # type: ignore[arg-type]
        assert tuning._first_configs() == [default, Config.of(default, UNROLL=4)]


def test_on_a_cpu_nothing_is_measured_while_others_compile(
    ran: Counter[Config], tiny: Effort, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[bool] = []
    first, compile_one = job._compiled_first, cpu.CpuToolchain.compile

    def slowly(self: cpu.CpuToolchain, spec: KernelSpec, arch: str) -> Artifact:
        time.sleep(0.05)  # also what is in the cache
        return compile_one(self, spec, arch)

    def looked(futures: Sequence[Future[Artifact]]) -> int:
        compiled.extend(future.done() for future in futures)
        return first(futures)

    monkeypatch.setattr(cpu.CpuToolchain, "compile", slowly)
    monkeypatch.setattr(job, "_compiled_first", looked)
    with TunedDatabase() as database:
        tune(database, tiny)
    assert len(compiled) > len(ran) > 1
    assert all(compiled)


def test_winners_of_what_is_most_alike_are_tried_first(tiny: Effort, monkeypatch: pytest.MonkeyPatch) -> None:
    tune_here(monkeypatch)
    here = target_of(CPU)
    elsewhere = Target("cpu", here.arch, "another CPU")
    configs = list(NORMS.kernel_source("cpu").space.configs(norms(), 64))
    default = NORMS.default_config("cpu", norms(), 4)
    same_t, near_t, other_width, other_cpu, other_kind, imported = [config for config in configs if config != default][
        :6
    ]

    def winner(target: Target, problem: Problem, tokens: int, config: Config) -> Winner:
        return Winner(target, problem, tokens, config, "old", 1.0, 0.0, "eager", 2.0, 2.0, 2.0, 2.0)

    with TunedDatabase() as database:
        database.record_winner(winner(here, norms(q=128), 64, other_width))
        database.record_winner(winner(elsewhere, norms(), 4, other_cpu))
        database.record_winner(winner(here, norms(), 16, near_t))
        database.record_winner(winner(here, norms(), 4, same_t))
        database.record_winner(winner(Target("cuda", "sm_90a", "NVIDIA H200"), norms(), 4, other_kind))
        of_others = {"status": "ok", "time_us": 1.0, "standing": "candidate"}
        database.record_trial(Trial(here, norms(), 4, imported, NORMS.source_hash("cpu"), **of_others))
        tuning = _BucketTuning(Bucket(norms(), 4), here, database, tiny, "", None, None, print)  # type: ignore[arg-type]
        assert tuning._first_configs() == [default, imported, same_t, near_t, other_cpu]
        fewer = replace(tiny, priors=2)
        tuning = _BucketTuning(Bucket(norms(), 4), here, database, fewer, "", None, None, print)  # type: ignore[arg-type]
        assert tuning._first_configs() == [default, imported, same_t]
