"""The tuning job: it remembers everything, measures nothing twice, and lets no wrong kernel win."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planting import tune_here

import autofuse
from autofuse.cache_db import Captured, TunedDatabase, Winner
from autofuse.errors import AutofuseError, BadInput, TargetUnavailable, UnsupportedCall
from autofuse.ops import Config, Problem, get_op
from autofuse.targets import target_of
from autofuse.tuner import api, bench
from autofuse.tuner.baselines import compiled_reference
from autofuse.tuner.bench import Bench
from autofuse.tuner.budgets import Effort
from autofuse.tuner.job import Bucket, BucketDone, Event, TrialDone, tune_buckets
from autofuse.tuner.measure import Runner, Timing
from autofuse.tuner.racing import Race
from autofuse.tuner.verify import WrongResult, verify

CPU = torch.device("cpu")
NORMS = get_op("mla_dual_rms_norm")
EditKernels = Callable[[str, str, str], None]


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the worker process adds has a file of its own."""
    tune_here(monkeypatch)


def norms(q: int = 96, kv: int = 40) -> Problem:
    return NORMS.make_problem(dtype="bf16", q_lora_rank=q, kv_lora_rank=kv, cast_before_weight=True)


def tune(database: TunedDatabase, effort: Effort, problem: Problem, tokens: int = 4, **options: Any) -> list[Winner]:
    return tune_buckets([Bucket(problem, tokens)], CPU, database, effort, **options)


def rows(database: TunedDatabase, problem: Problem, tokens: int = 4) -> list[Any]:
    return database.trials(target_of(CPU), problem, tokens, NORMS.source_hash("cpu"))


# The job


def test_tuning_leaves_trials_baselines_and_a_winner(device: torch.device, tiny: Effort) -> None:
    problem = norms()
    events: list[Event] = []
    with TunedDatabase() as database:
        (winner,) = tune_buckets([Bucket(problem, 4)], device, database, tiny, on_event=events.append)
        trials = database.trials(target_of(device), problem, 4, NORMS.source_hash(device.type))
        assert database.winner(target_of(device), problem, 4) == winner
        baselines = database.baselines(target_of(device), problem, 4)
        assert database.provenance(winner.provenance)["torch"] == torch.__version__
    assert [trial.status for trial in trials] == ["ok"] * tiny.trials
    assert winner.config in {trial.config for trial in trials}
    assert baselines.keys() == {"eager", "compile"} | ({"graph"} if device.type == "cpu" else set())
    assert winner.baseline_us == min(baseline.time_us for baseline in baselines.values())
    assert sum(isinstance(event, TrialDone) for event in events) == tiny.trials
    assert isinstance(events[-1], BucketDone)
    assert replace(events[-1], disturbances=()) == BucketDone(Bucket(problem, 4), winner, measured=True)


@pytest.mark.parametrize("name", ["rope_kv_cache", "mla_rope_kv_cache_cat"])
def test_generated_code_is_called_alone_whatever_the_order_in_which_inputs_are_used(name: str) -> None:
    op = get_op(name)
    args = op.example_args(op.sweep_problems()[0], 3, CPU, torch.Generator().manual_seed(1))
    compiled, generated = compiled_reference(op, args)
    assert generated is not None
    compiled(*args)  # once more, for gradients: that graph is another one
    for result, expected in zip(generated(*args), op.unfused(*args), strict=True):
        torch.testing.assert_close(result.float(), expected.float(), rtol=0.02, atol=0.02)


def test_tuning_twice_measures_nothing_twice(tiny: Effort) -> None:
    events: list[Event] = []
    with TunedDatabase() as database:
        first = tune(database, tiny, norms())
        before = rows(database, norms())
        again = tune(database, tiny, norms(), on_event=events.append)
        assert rows(database, norms()) == before
    assert again == first
    assert events[-1] == BucketDone(Bucket(norms(), 4), first[0], measured=False)
    assert not any(isinstance(event, TrialDone) for event in events)


def test_retuning_measures_again(tiny: Effort) -> None:
    events: list[Event] = []
    with TunedDatabase() as database:
        tune(database, tiny, norms())
        tune(database, tiny, norms(), retune=True, on_event=events.append)
    assert sum(isinstance(event, TrialDone) for event in events) == tiny.trials


def test_an_interrupted_job_keeps_its_rows_and_goes_on_from_there(tiny: Effort) -> None:
    def interrupt_after(count: int) -> Callable[[Event], None]:
        seen: list[Event] = []

        def on_event(event: Event) -> None:
            seen.append(event)
            if sum(isinstance(each, TrialDone) for each in seen) == count:
                raise KeyboardInterrupt

        return on_event

    events: list[Event] = []
    with TunedDatabase() as database:
        with pytest.raises(KeyboardInterrupt):
            tune(database, tiny, norms(), on_event=interrupt_after(3))
        kept = rows(database, norms())
        assert len(kept) == 3
        tune(database, tiny, norms(), on_event=events.append)
        assert {trial.config for trial in kept} < {trial.config for trial in rows(database, norms())}
    assert sum(isinstance(event, TrialDone) for event in events) == tiny.trials - 3


def test_a_changed_kernel_is_tuned_anew(tiny: Effort, edit_kernels: EditKernels) -> None:
    problem = norms(q=136)
    with TunedDatabase() as database:
        (old,) = tune(database, tiny, problem)
        edit_kernels("mla_dual_rms_norm.cpp", "Params p = *params;", "Params p = *params;  // as before")
        (new,) = tune(database, tiny, problem)
    assert new.source_hash != old.source_hash


def test_the_rounds_that_choose_a_config_do_not_judge_it(tiny: Effort, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[list[Runner]] = []

    def pretend(prepared: Sequence[Runner], rounds: int, seed: int = 0) -> list[Timing]:
        timed.append(list(prepared))
        chooses = len(timed) == 1
        return [Timing((2.0 + (index != 1 if chooses else index),) * rounds) for index in range(len(prepared))]

    monkeypatch.setattr(bench, "interleave", pretend)
    with TunedDatabase() as database:
        (winner,) = tune(database, tiny, norms())
        finalists = [trial.config for trial in rows(database, norms())][: tiny.finalists]
    choosing, judging = timed
    assert len(choosing) == tiny.finalists == 2
    assert judging[-1] is choosing[1]
    assert not set(judging[:-1]) & set(choosing)
    assert winner.config == finalists[1]
    assert (winner.time_us, winner.baseline_us) == (1.0 + len(judging), 2.0)


def test_on_a_busy_machine_only_the_judgement_is_made_again(tiny: Effort, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def unsteady(prepared: Sequence[Runner], rounds: int, seed: int = 0) -> list[Timing]:
        sizes.append(len(prepared))
        return [Timing(tuple(1.0 + (index + seed) % 3 for index in range(rounds))) for _ in prepared[:-1]] + [
            Timing((2.0,) * rounds)
        ]

    monkeypatch.setattr(bench, "interleave", unsteady)
    with TunedDatabase() as database:
        tune(database, replace(tiny, attempts=3), norms())
    assert sizes == [2, 4, 4, 4]  # two finalists, then the chosen one beside three baselines


def test_without_a_working_inductor_the_baseline_is_eager_alone(
    tiny: Effort, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        raise RuntimeError("no working C++ compiler\nand much more")

    monkeypatch.setattr("autofuse.tuner.baselines.compile_fx", broken)
    with TunedDatabase() as database:
        (winner,) = tune(database, tiny, norms())
        assert database.baselines(target_of(CPU), norms(), 4).keys() == {"eager"}
    assert winner.baseline == "eager"
    (record,) = [each for each in caplog.records if each.name == "autofuse.tuner"]
    assert record.levelname == "WARNING"
    assert "no baseline through torch.compile" in record.message
    assert "no working C++ compiler" in record.message
    assert "\n" not in record.message


# Failures are rows


def test_a_wrong_kernel_never_wins(tiny: Effort, edit_kernels: EditKernels) -> None:
    problem = norms(q=144)
    edit_kernels("rms_norm.h", "sum / WIDTH", "sum * 1.05f / WIDTH")
    with TunedDatabase() as database:
        assert tune(database, tiny, problem) == []
        trials = rows(database, problem)
        assert database.winners() == []
    assert {trial.status for trial in trials} == {"wrong"}
    assert "times the tolerance from the reference" in trials[0].message


def test_a_kernel_that_forgets_a_row_is_wrong(tiny: Effort, edit_kernels: EditKernels) -> None:
    problem = norms(q=152)
    edit_kernels("mla_dual_rms_norm.cpp", "first + TASK_ROWS : p.tokens", "first + TASK_ROWS : p.tokens - 1")
    with TunedDatabase() as database:
        tune(database, tiny, problem)
        assert {trial.status for trial in rows(database, problem)} == {"wrong"}


def test_where_no_config_compiles_the_compilers_words_are_an_error_and_no_row(
    tiny: Effort, edit_kernels: EditKernels
) -> None:
    problem = norms(q=160)
    edit_kernels("mla_dual_rms_norm.cpp", "const Params p = *params;", "const Params p = *params; no_such_name();")
    with TunedDatabase() as database:
        with pytest.raises(TargetUnavailable, match=r"no config of mla_dual_rms_norm.* compiles.*no_such_name"):
            tune(database, tiny, problem)
        assert database.failures() == []


@pytest.mark.parametrize("retune", [False, True])
def test_a_compiler_that_compiles_nothing_spoils_nothing(
    retune: bool, tiny: Effort, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    problem = norms(q=184 + 16 * retune)
    with TunedDatabase() as database:
        if retune:
            tune(database, tiny, problem)
        before = rows(database, problem)
        with monkeypatch.context() as broken:
            broken.setenv("XDG_CACHE_HOME", str(tmp_path))
            broken.setenv("CXX", shutil.which("false") or "/bin/false")
            with pytest.raises(TargetUnavailable, match=r"false does not compile mla_dual_rms_norm\.cpp"):
                tune(database, tiny, problem, retune=retune)
        assert rows(database, problem) == before
        tune(database, tiny, problem)
        assert [trial.status for trial in rows(database, problem)] == ["ok"] * tiny.trials


def test_what_failed_elsewhere_is_tried_again(tiny: Effort) -> None:
    problem, whole = norms(q=208), replace(tiny, exhaustive_up_to=100)
    with TunedDatabase() as database:
        tune(database, whole, problem, 1)
        kept, *_, again = rows(database, problem, 1)
        other = database.record_provenance({"compiler": "another one"})
        failure = replace(again, status="compile_error", time_us=None, provenance=other)
        database.record_trial(failure)
        database.record_trial(replace(kept, provenance=other))
        events: list[Event] = []
        tune(database, whole, problem, 1, on_event=events.append)
        assert [event.trial.config for event in events if isinstance(event, TrialDone)] == [again.config]
        database.record_trial(replace(failure, provenance=again.provenance))
        events.clear()
        tune(database, whole, problem, 1, on_event=events.append)
    assert not any(isinstance(event, TrialDone) for event in events)


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), MemoryError(), TargetUnavailable("the device is gone")])
@pytest.mark.parametrize("retune", [False, True])
def test_what_is_no_fault_of_the_config_leaves_its_row_as_it_was(
    fault: BaseException, retune: bool, tiny: Effort, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*args: Any) -> None:
        (during,) = [trial for trial in rows(database, norms()) if "the process died" in trial.message]
        assert during.status == "launch_error"
        raise fault

    with TunedDatabase() as database:
        if retune:
            tune(database, tiny, norms())
        before = rows(database, norms())
        monkeypatch.setattr(Bench, "verify", stopped)
        with pytest.raises(type(fault)):
            tune(database, tiny, norms(), retune=retune)
        assert rows(database, norms()) == before


def test_one_config_that_fails_leaves_the_others_to_win(tiny: Effort, edit_kernels: EditKernels) -> None:
    problem = norms(q=168)
    broken = "#if VECTOR_BYTES == 32\n#error not this one\n#endif\nstruct Params"
    edit_kernels("mla_dual_rms_norm.cpp", "struct Params", broken)
    with TunedDatabase() as database:
        (winner,) = tune(database, replace(tiny, exhaustive_up_to=100), problem)
        statuses = {trial.config["VECTOR_BYTES"]: trial.status for trial in rows(database, problem)}
    assert statuses == {32: "compile_error", 64: "ok"}
    assert winner.config["VECTOR_BYTES"] == 64


@pytest.mark.parametrize("time_us", [0.0, -1.0, math.nan, math.inf])
def test_a_time_that_cannot_be_is_a_failure(time_us: float, tiny: Effort, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = Bench.time

    def time(self: Bench, config: Config, best: Config | None) -> Race:
        wrong = config == default
        return Race(Timing((time_us, time_us))) if wrong else timed(self, config, best)

    default = NORMS.default_config("cpu", norms(), 4)
    monkeypatch.setattr(Bench, "time", time)
    with TunedDatabase() as database:
        (winner,) = tune(database, tiny, norms())
        (failed,) = [trial for trial in rows(database, norms()) if trial.status != "ok"]
    assert (failed.config, failed.status, failed.message) == (default, "wrong", f"a call cannot take {time_us} µs")
    assert winner.config != default


def test_a_finalist_whose_time_cannot_be_loses_its_place(tiny: Effort, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(prepared: Sequence[Runner], rounds: int, seed: int = 0) -> list[Timing]:
        calls.append(len(prepared))
        first = -1.0 if len(calls) == 1 else 1.0
        return [Timing((first + index,) * rounds) for index in range(len(prepared))]

    calls: list[int] = []
    monkeypatch.setattr(bench, "interleave", broken)
    with TunedDatabase() as database:
        (winner,) = tune(database, tiny, norms())
        trials = rows(database, norms())
    assert calls == [2, 2, 4]
    (dropped,) = [trial for trial in trials if trial.status != "ok"]
    assert (dropped.status, dropped.message) == ("wrong", "a call cannot take -1.0 µs")
    assert winner.config != dropped.config


def test_no_compiler_is_an_error_and_no_row(tiny: Effort, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with TunedDatabase() as database:
        with pytest.raises(TargetUnavailable, match="CXX='no-such-compiler'"):
            tune(database, tiny, norms(q=176))
        assert rows(database, norms(q=176)) == []


# Verification


def broken_by(change: Callable[[list[torch.Tensor], tuple[Any, ...]], None]) -> Callable[..., Any]:
    def call(*args: Any) -> tuple[torch.Tensor, ...]:
        results = list(NORMS.reference(*args))
        change(results, args)
        return tuple(results)

    return call


def test_the_reference_is_right(tiny: Effort) -> None:
    assert verify(NORMS, norms(), 8, NORMS.reference, CPU, tiny) <= 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda results, args: results[1][-1:].mul_(1.02), "result 1 is .* times the tolerance"),
        (lambda results, args: results[0][0, :1].fill_(float("nan")), "result 0 is inf times the tolerance"),
        (lambda results, args: results.__setitem__(0, torch.empty_like(results[0])), "result 0 is inf"),
        (lambda results, args: args[2][0, :1].add_(1), "times the tolerance|input .* was changed"),
        (
            lambda results, args: args[0].as_strided((8,), (args[0].stride(0),), args[0].shape[1]).zero_(),
            "beside an input",
        ),
    ],
    ids=["a wrong row", "a NaN", "an unwritten result", "a changed input", "a write beside a view"],
)
def test_verification_catches(change: Any, message: str, tiny: Effort) -> None:
    with pytest.raises(WrongResult, match=message):
        verify(NORMS, norms(), 8, broken_by(change), CPU, tiny)


# From what a person asks to buckets


def test_tune_from_python_returns_the_winners(tiny: Effort) -> None:
    config = {"q_lora_rank": 96, "kv_lora_rank": 40}
    winners = autofuse.tune(config, tokens=[4], device="cpu", effort=tiny)
    assert [(winner.problem, winner.tokens) for winner in winners] == [(norms(), 4)]


@pytest.mark.parametrize("text", ["", "1,,x", "0", "-3", "1e9", "1.5", "1 2", "٣", "9" * 30, "1048577"])
def test_malformed_tokens_are_refused(text: str) -> None:
    with pytest.raises(BadInput, match=r"^tokens "):
        api.parse_tokens(text)


def test_tokens_may_be_a_list() -> None:
    assert api.parse_tokens([64, 1, 64]) == (1, 64)
    with pytest.raises(BadInput, match="there are none"):
        api.parse_tokens([])


def test_a_problem_that_is_named_twice_is_tuned_once() -> None:
    named = [str(norms()), str(norms()), str(norms(104))]
    found = [(bucket.problem, bucket.tokens) for bucket in api.problem_buckets(named, [1, 64])]
    assert found == [(norms(), 1), (norms(), 64), (norms(104), 1), (norms(104), 64)]


def test_a_model_gives_its_problems_at_each_t() -> None:
    buckets = api.model_buckets("deepseek-v3", [1, 64], "fp16", ["mla_dual_rms_norm"])
    assert [(str(bucket.problem["dtype"]), bucket.tokens) for bucket in buckets] == [("fp16", 1), ("fp16", 64)]
    norms = ["mla_dual_rms_norm"]
    assert api.model_buckets(None, [1], ops=norms) == api.model_buckets("deepseek-v3", [1], ops=norms)  # one width


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("deepseek-v9", "did you mean deepseek-v"),
        ({"q_lora_rank": None, "kv_lora_rank": 512}, "has no use for mla_dual_rms_norm"),
        ({"q_lora_rank": "wide", "kv_lora_rank": 512}, "its config does not suit mla_dual_rms_norm"),
        (42, "not int"),
    ],
)
def test_models_without_problems_are_refused(model: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        api.model_buckets(model, [1])


def test_a_problem_must_be_complete_and_canonical() -> None:
    assert api.checked_problem(norms()) == norms()
    for text, message in {
        "mla_dual_rms_norm(dtype=bf16)": "lacks q_lora_rank",
        "mla_dual_rms_norm(dtype=fp32,q_lora_rank=96,kv_lora_rank=40,cast_before_weight=1)": "the nearest is",
        "mla_dual_rms_norm(dtype=bf16,q_lora_rank=x,kv_lora_rank=40,cast_before_weight=1)": "invalid literal",
        "mla_dual_rms(dtype=bf16)": "did you mean mla_dual_rms_norm",
    }.items():
        with pytest.raises(BadInput, match=message):
            api.checked_problem(Problem.parse(text))
    with pytest.raises(UnsupportedCall, match="dtype 'fp64'"):
        api.checked_problem(Problem.parse(str(norms()).replace("bf16", "fp64")))


@pytest.mark.parametrize(
    ("low", "high", "tokens"),
    [(16, 16, [16]), (0, 0, [1]), (2, 1 << 31, [64, 1024, 8192]), (2, 100, [64, 1024]), (9000, 1 << 31, [9000])],
)
def test_a_captured_site_needs_the_buckets_that_serve_it(low: int, high: int, tokens: list[int]) -> None:
    buckets = api.captured_buckets(Captured(target_of(CPU), norms(), low, high))
    assert [bucket.tokens for bucket in buckets] == tokens


def test_a_captured_site_is_forgotten_once_all_its_buckets_are_tuned(tiny: Effort) -> None:
    site = Captured(target_of(CPU), norms(), 4, 4)
    other = Captured(target_of(CPU), norms(q=48), 4, 4)
    with TunedDatabase() as database:
        for each in (site, other):
            database.record_captured(each)
        sites = {each: api.captured_buckets(each) for each in (site, other)}
        tune(database, tiny, norms(), on_event=api.forget_when_tuned(database, sites, lambda event: None))
        assert [each.problem for each in database.captured()] == [other.problem]


def test_tuning_in_another_process_says_what_went_wrong() -> None:
    problem = Problem("mla_dual_rms_norm", (("dtype", "bf16"),))
    with pytest.raises(AutofuseError) as failure:
        api.tune_site(problem, [1], CPU)
    assert str(failure.value) == f"tuning {problem} failed: problem {problem} lacks q_lora_rank"
