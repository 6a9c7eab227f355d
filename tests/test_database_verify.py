"""Winners are checked again: what agrees is as if measured here, what does not is marked, what is wrong never wins."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planting import PROBLEM as FAULTY
from planting import impatient, plant

from autofuse.cache_db import TIMED, Baseline, Captured, Trial, TunedDatabase, Winner, export_database, import_into
from autofuse.cli.app import run
from autofuse.cli.marks import Marks
from autofuse.errors import CompileError, TargetUnavailable
from autofuse.ops import Config, get_op
from autofuse.targets import target_of, toolchain
from autofuse.tuner import recheck as module
from autofuse.tuner.budgets import Effort
from autofuse.tuner.disturbance import Comparison
from autofuse.tuner.failures import CandidateFailed
from autofuse.tuner.job import Bucket, known_of, provenance_of
from autofuse.tuner.measure import Timing
from autofuse.tuner.recheck import AGREES_WITHIN, Checked, agrees, recheck

CPU = torch.device("cpu")
TARGET = target_of(CPU)
OP = get_op("mla_dual_rms_norm")
PROBLEM = OP.make_problem(dtype="fp32", q_lora_rank=64, kv_lora_rank=32, cast_before_weight=True)
CONFIG = OP.default_config("cpu", PROBLEM, 4)
HERE = OP.source_hash("cpu")
OLD = "2026-01-31T12:00:00Z"
WINNER = Winner(TARGET, PROBLEM, 4, CONFIG, HERE, 10.0, 0.1, "compile", 20.0, 2.0, 1.95, 2.05, measured_at=OLD)


class FakeBench:
    """A bench whose calls take as long as they are told to, and fail if they are told to."""

    times_us: dict[str, float]
    failure: CandidateFailed | None
    noise: list[float]
    disturbances: tuple[str, ...] = ()

    def __init__(self, device: torch.device, effort: Effort) -> None:
        self.compared = 0

    def __enter__(self) -> FakeBench:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def open(self, *_: object) -> None:
        pass

    def verify(self, config: Config) -> float:
        if self.failure is not None:
            raise self.failure
        return 0.25

    def baselines(self, compiled: bool) -> list[str]:
        return [kind for kind in self.times_us if kind != "config" and (compiled or kind == "eager")]

    def interleave(self, subjects: list[Config | str], rounds: int, seed: int) -> Comparison:
        spread = self.noise[min(seed, len(self.noise)) - 1]
        timings = []
        for subject in subjects:
            time_us = self.times_us[subject if isinstance(subject, str) else "config"]
            wobble = (spread if isinstance(subject, str) else 0.0) / rounds
            timings.append(Timing(tuple(time_us * (1 + wobble * (each - rounds / 2)) for each in range(rounds))))
        return Comparison(tuple(timings), self.disturbances)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> type[FakeBench]:
    """Twice as fast as compiled code, whose times spread by 2 %."""
    monkeypatch.setattr(FakeBench, "times_us", {"eager": 40.0, "compile": 20.0, "config": 10.0}, raising=False)
    monkeypatch.setattr(FakeBench, "failure", None, raising=False)
    monkeypatch.setattr(FakeBench, "noise", [0.02], raising=False)
    monkeypatch.setattr(FakeBench, "disturbances", ())
    monkeypatch.setattr(module, "IsolatedBench", FakeBench)
    return FakeBench


@pytest.fixture
def database(tmp_path: Path) -> TunedDatabase:
    return TunedDatabase(tmp_path / "tuned.db")


def put(database: TunedDatabase, **changes: Any) -> Winner:
    """A winner as it was measured here, unless it is to be another."""
    provenance = database.record_provenance({**provenance_of(CPU), **changes.pop("software", {})})
    return database.record_winner(replace(WINNER, provenance=provenance, **changes))


def check(database: TunedDatabase, effort: Effort) -> Checked:
    (winner,) = database.every(Winner, candidates=True)
    (checked,) = recheck([winner], CPU, database, effort)
    return checked


def test_what_agrees_and_was_measured_here_stays_as_it_is(
    database: TunedDatabase, tiny: Effort, bench: type[FakeBench]
) -> None:
    before = put(database)
    checked = check(database, tiny)
    assert (checked.verdict, checked.before) == ("agrees", before)
    assert checked.now is not None
    assert checked.now.gain == pytest.approx(2.0, abs=0.05)
    assert (database.winners(), database.every(Baseline), database.captured()) == ([before], [], [])


@pytest.mark.parametrize(
    "doubt", [{"standing": "candidate"}, {"standing": "trusted"}, {"software": {"compiler": "an older one"}}], ids=str
)
def test_what_agrees_loses_its_mark(
    database: TunedDatabase, tiny: Effort, bench: type[FakeBench], doubt: dict[str, Any]
) -> None:
    before = put(database, **doubt)
    assert Marks(database).of(before)
    assert check(database, tiny).verdict == "agrees"
    (now,) = database.winners()
    assert (Marks(database).of(now), now.standing, now.config) == ("", "own", CONFIG)
    assert now.measured_at > OLD
    assert {kind: one.time_us for kind, one in database.baselines(TARGET, PROBLEM, 4).items()}.keys() == {
        "eager",
        "compile",
    }
    (trial,) = database.trials(TARGET, PROBLEM, 4, HERE)
    assert (trial.status, trial.error, trial.standing) == ("ok", 0.25, "own")
    assert database.captured() == []


@pytest.mark.parametrize("standing", ["own", "trusted", "candidate"])
def test_what_is_not_as_recorded_is_marked_and_decides_by_its_present_figures_until_it_is_tuned_again(
    database: TunedDatabase, tiny: Effort, bench: type[FakeBench], standing: str
) -> None:
    put(database, standing=standing, gain=4.0, gain_low=3.9, gain_high=4.1)
    assert check(database, tiny).verdict == "disputed"
    (now,) = database.winners()
    assert (now.standing, now.gain) == ("disputed", pytest.approx(2.0, abs=0.05))
    assert Marks(database).of(now) == "disputed: measured again, not as recorded"
    assert [(site.problem, site.tokens_low, site.tokens_high) for site in database.captured()] == [(PROBLEM, 4, 4)]
    assert not known_of(database, TARGET, Bucket(PROBLEM, 4), provenance_of(CPU)).fresh
    assert check(database, tiny).verdict == "agrees"
    assert database.winners()[0].standing == "own"


@pytest.mark.parametrize(("disturbances", "verdict"), [((), "agrees"), (("other work on the CPU",), "unchecked")])
def test_another_gain_contradicts_none_that_was_timed_in_another_way(
    database: TunedDatabase,
    tiny: Effort,
    bench: type[FakeBench],
    disturbances: tuple[str, ...],
    verdict: str,
) -> None:
    before = put(database, gain=4.0, gain_low=3.9, gain_high=4.1, software={TIMED: "in another way"})
    assert Marks(database).of(before) == "suspect: autofuse timed in another way"
    bench.disturbances = disturbances
    assert check(database, tiny).verdict == verdict
    (now,) = database.winners()
    if verdict == "unchecked":
        assert now == before
    else:
        assert (now.standing, now.gain, Marks(database).of(now)) == ("own", pytest.approx(2.0, abs=0.05), "")
    assert database.captured() == []


@pytest.mark.parametrize(
    ("recorded", "now", "same"),
    [
        ((1.95, 2.05), (2.0, 2.1), True),
        ((1.95, 2.05), (2.05 * AGREES_WITHIN - 0.01, 2.3), True),
        ((1.95, 2.05), (2.05 * AGREES_WITHIN + 0.01, 2.3), False),
        ((1.95, 2.05), (1.5, 1.95 / AGREES_WITHIN - 0.01), False),
        ((1.01, 1.05), (0.99, 1.03), False),
        ((0.95, 1.05), (0.99, 1.03), True),
    ],
)
def test_two_gains_agree_if_their_intervals_nearly_meet_and_both_say_the_same(
    recorded: tuple[float, float], now: tuple[float, float], same: bool
) -> None:
    pair = [replace(WINNER, gain=sum(each) / 2, gain_low=each[0], gain_high=each[1]) for each in (recorded, now)]
    assert agrees(*pair) == agrees(*reversed(pair)) == same


def test_the_fastest_unfused_code_of_now_counts(database: TunedDatabase, tiny: Effort, bench: type[FakeBench]) -> None:
    put(database, baseline="eager")
    bench.times_us = {"eager": 20.0, "compile": 11.0, "config": 10.0}
    checked = check(database, tiny)
    assert checked.now is not None
    assert (checked.verdict, checked.now.baseline) == ("disputed", "compile")


def test_the_steadiest_measurement_counts(database: TunedDatabase, tiny: Effort, bench: type[FakeBench]) -> None:
    put(database)
    bench.noise = [1.5, 0.02, 1.5]
    checked = check(database, tiny)
    assert checked.now is not None
    assert checked.now.gain_high / checked.now.gain_low < 1.1


def test_unsteady_times_agree_with_anything_and_change_nothing(
    database: TunedDatabase, tiny: Effort, bench: type[FakeBench]
) -> None:
    before = put(database, standing="trusted")
    bench.noise = [1.5]
    checked = check(database, tiny)
    assert (checked.verdict, checked.status) == ("unchecked", "")
    assert "the times are unsteady" in checked.message
    assert (database.winners(), database.every(Trial), database.captured()) == ([before], [], [])


@pytest.mark.parametrize(("gain", "verdict"), [(4.0, "unchecked"), (2.0, "agrees")])
def test_while_other_work_goes_on_a_gain_can_agree_but_not_be_disputed(
    database: TunedDatabase, tiny: Effort, bench: type[FakeBench], gain: float, verdict: str
) -> None:
    before = put(database, standing="trusted", gain=gain, gain_low=gain - 0.05, gain_high=gain + 0.05)
    bench.disturbances = ("other work on the CPU",)
    checked = check(database, tiny)
    assert (checked.verdict, checked.disturbances) == (verdict, ("other work on the CPU",))
    (now,) = database.winners()
    assert (now == before) == (verdict == "unchecked")
    if now != before:
        assert database.provenance(now.provenance)["disturbances"] == "other work on the CPU"


@pytest.mark.parametrize("status", ["wrong", "crashed", "launch_error", "timed_out"])
def test_what_fails_is_no_winner_any_more_nor_again(
    database: TunedDatabase, tiny: Effort, bench: type[FakeBench], tmp_path: Path, status: str
) -> None:
    with TunedDatabase(tmp_path / "there.db") as there:
        there.record_winner(WINNER)
        exported = export_database(there, tmp_path / "there.jsonl")
    put(database)
    put(database, time_us=9.0)  # so that there is one before
    bench.failure = CandidateFailed(CONFIG, status, "as planted")
    checked = check(database, tiny)
    assert (checked.verdict, checked.status, checked.message) == ("failed", status, "as planted")
    assert database.winners() == []
    (trial,) = database.every(Trial)
    assert (trial.status, trial.config) == (status, CONFIG)
    assert [site.problem for site in database.captured()] == [PROBLEM]
    assert database.roll_back(TARGET, PROBLEM, 4) is None
    done = import_into(database, exported.path, trust=True)
    assert (done.wins, dict(done.left_out)) == ((), {"winners of configs that failed here": 1})
    assert database.every(Winner, candidates=True) == []


def test_a_rollback_passes_over_what_failed_since(database: TunedDatabase) -> None:
    other = next(c for c in OP.kernel_source("cpu").space.configs(PROBLEM, 4) if c != CONFIG)
    for config, time_us in ((other, 3.0), (CONFIG, 2.0), (other, 1.0)):
        database.record_winner(replace(WINNER, config=config, time_us=time_us))
    database.record_trial(Trial(TARGET, PROBLEM, 4, CONFIG, HERE, "wrong"))
    back = database.roll_back(TARGET, PROBLEM, 4)
    assert back is not None
    assert (back.config, back.time_us) == (other, 3.0)
    assert database.history() == []


@pytest.mark.parametrize(
    "failure",
    [CandidateFailed(CONFIG, "out_of_memory", "others hold it"), CandidateFailed("eager", "launch_error", "no eager")],
    ids=["memory", "baseline"],
)
def test_what_is_not_the_configs_fault_changes_nothing(
    database: TunedDatabase, tiny: Effort, bench: type[FakeBench], failure: CandidateFailed
) -> None:
    before = put(database)
    bench.failure = failure
    assert check(database, tiny).verdict == "unchecked"
    assert (database.winners(), database.every(Trial), database.captured()) == ([before], [], [])


def test_a_config_outside_the_space_is_not_run(database: TunedDatabase, tiny: Effort, bench: type[FakeBench]) -> None:
    put(database, config=Config.of(CONFIG, TASK_ROWS=5))
    checked = check(database, tiny)
    assert (checked.verdict, checked.status) == ("failed", "")
    assert "is outside the search space" in checked.message
    assert (database.winners(), database.every(Trial)) == ([], [])


def test_a_compiler_that_fails_for_all_is_to_blame_and_one_config_that_fails_is(
    database: TunedDatabase, tiny: Effort, bench: type[FakeBench], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = {4, 8}

    def compile_one(self: Any, spec: Any, arch: str) -> Any:
        if next(order) in broken:
            raise CompileError("no such header")
        return real(self, spec, arch)

    kind = type(toolchain("cpu"))
    real = kind.compile
    monkeypatch.setattr(kind, "compile", compile_one)
    winners = [put(database, tokens=tokens) for tokens in (4, 8)]
    order = iter((4, 8))
    with pytest.raises(TargetUnavailable, match="no winner compiles, the first for: no such header"):
        recheck(winners, CPU, database, tiny)
    assert (database.winners(), database.every(Trial)) == (winners, [])
    broken.discard(8)
    monkeypatch.setattr("os.cpu_count", lambda: 1)  # one thread: in order
    order = iter((4, 8))
    assert [each.verdict for each in recheck(winners, CPU, database, tiny)] == ["failed", "agrees"]
    assert [winner.tokens for winner in database.winners()] == [8]


@pytest.mark.parametrize(("fault", "status"), [("NaN", "wrong"), ("write to address 8", "crashed"), ("none", "")])
def test_a_kernel_is_found_out_by_running_it(
    database: TunedDatabase,
    tiny: Effort,
    edit_kernels: Callable[[str, str, str], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    fault: str,
    status: str,
) -> None:
    planted = plant(edit_kernels, monkeypatch, tmp_path)
    planted.choose(CPU, "none", fault)
    config = Config.of(FAULT=planted.names(CPU).index(fault))
    source = get_op("faulty").source_hash("cpu")
    put(database, problem=FAULTY, tokens=12, config=config, source_hash=source)
    checked = check(database, impatient(tiny, 60.0))
    assert checked.status == status
    assert (checked.verdict == "failed") == bool(status)
    assert bool(database.winners()) == (not status)


def test_the_command_checks_what_this_machine_can_and_says_so_by_its_exit_code(
    database: TunedDatabase, bench: type[FakeBench], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["verify", "--database", str(database.path), "--device", "cpu"]
    assert run(arguments) == 0
    assert "There is nothing to check" in capsys.readouterr().out
    put(database)
    put(database, tokens=8, standing="candidate")
    put(database, tokens=16, source_hash="0ld")
    assert run([*arguments, "--marked"]) == 0
    told = capsys.readouterr()
    assert "1 agrees" in told.out
    assert "1 left out, stale: the kernel changed: `autofuse tune`" in told.out
    assert "T=8: agrees: 2.00× [" in told.err
    assert "T=4" not in told.err
    put(database, standing="trusted", gain=9.0, gain_low=8.9, gain_high=9.1)
    assert run([*arguments, "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert [(each["verdict"], each["before"]["tokens"]) for each in facts["checked"]] == [
        ("disputed", 4),
        ("agrees", 8),
    ]
    assert facts["left_out"] == {"stale: the kernel changed": 1}


def test_the_command_refuses_what_is_no_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", "--database", str(tmp_path / "no.db")]) == 2
    assert not (tmp_path / "no.db").exists()
    assert run(["verify", "--op", "no_op"]) == 2
    assert run(["verify", "--effort", "none"]) == 2


def test_what_was_checked_before_an_interrupt_is_kept(
    database: TunedDatabase, bench: type[FakeBench], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for tokens in (4, 8):
        put(database, tokens=tokens, standing="trusted")

    def verify(self: FakeBench, config: Config) -> float:
        if database.winner(TARGET, PROBLEM, 4).standing == "own":  # type: ignore[union-attr]
            raise KeyboardInterrupt
        return 0.1

    monkeypatch.setattr(bench, "verify", verify)
    assert run(["verify", "--database", str(database.path), "--device", "cpu"]) == 130
    assert "stopped; 1 of 2 winners are checked" in capsys.readouterr().err
    assert [winner.standing for winner in database.winners()] == ["own", "trusted"]
    assert database.captured(TARGET) == list[Captured]()
