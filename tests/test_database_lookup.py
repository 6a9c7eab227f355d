"""Which winner answers for which number of tokens."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from dataclasses import replace
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import pytest

from autofuse.cache_db import Snapshot, TunedDatabase, Winner, explain_lookup
from autofuse.errors import BadInput, DatabaseError
from autofuse.ops.buckets import RANGE_BUCKETS, buckets_serving
from autofuse.ops.problem import Config, Problem
from autofuse.targets.base import Target

H200 = Target("cuda", "sm_90a", "NVIDIA H200")
H100 = Target("cuda", "sm_90a", "NVIDIA H100 80GB HBM3")
GH200 = Target("cuda", "sm_90a", "NVIDIA GH200 480GB")
A100 = Target("cuda", "sm_80", "NVIDIA A100-SXM4-80GB")
PROBLEM = Problem("mla_dual_rms_norm", (("dtype", "bf16"), ("q_lora_rank", 1536)))


def winner(tokens: int, **changes: Any) -> Winner:
    made = Winner(H200, PROBLEM, tokens, Config.of(ROWS=1), "abc", 1.03, 0.02, "compile", 2.15, 2.09, 2.01, 2.16)
    return replace(made, **changes)


def snapshot(*winners: Winner) -> Snapshot:
    return Snapshot(Path("tuned.db"), True, H200, winners)


TUNED = snapshot(winner(1), winner(64), winner(2048))


@pytest.mark.parametrize(
    ("tokens", "rule", "answering"),
    [
        (64, "exact", [64]),
        (2048, "exact", [2048]),
        (65, "between", [2048, 64]),
        (63, "between", [64, 1]),
        (2049, "nearest", [2048]),
        (4096, "nearest", [2048]),
        (4097, "untuned", []),
        (0, "nearest", [1]),
    ],
)
def test_a_static_call(tokens: int, rule: str, answering: list[int]) -> None:
    answer = TUNED.lookup(PROBLEM, tokens, tokens, "abc")
    assert (answer.rule, [known.tokens for known in answer.winners]) == (rule, answering)


@pytest.mark.parametrize(
    ("low", "high", "answering"),
    [
        (2, 64, [64]),
        (1, 64, [1, 64]),
        (64, 65, [64, 2048]),
        (65, 2048, [2048]),
        (2049, 4096, [2048]),
        (0, 4096, [1, 64, 2048]),
    ],
)
def test_a_range_is_answered_by_every_bucket_that_serves_it(low: int, high: int, answering: list[int]) -> None:
    answer = TUNED.lookup(PROBLEM, low, high, "abc")
    assert (answer.rule, [known.tokens for known in answer.winners]) == ("range", answering)


@pytest.mark.parametrize(
    ("tuned", "low", "high", "to_tune"),
    [
        ([1], 2048, 2048, "2048"),
        ([1], 2, 2**31, "64,1024,8192"),
        ([1], 3, 3, "3"),
        ([64], 31, 31, "31"),
        ([64], 1, 64, "1"),
        ([1, 64, 1024], 2, 2**31, "8192"),
        ([1, 8192], 2, 2**31, "64,1024"),
        ([2048], 2049, 9999, "8192"),
    ],
)
def test_what_was_tuned_far_from_the_call_does_not_answer_and_what_to_tune_is_said(
    tuned: list[int], low: int, high: int, to_tune: str
) -> None:
    answer = snapshot(*map(winner, tuned)).lookup(PROBLEM, low, high, "abc")
    assert (answer.rule, answer.winners, answer.beats_baseline) == ("untuned", (), False)
    assert f"which is T={', '.join(map(str, tuned))}: " in answer.reason
    assert f"`autofuse tune --problem '{PROBLEM}' --tokens {to_tune}`" in answer.reason


@pytest.mark.parametrize(
    ("tuned", "low", "high", "rule"),
    [
        ([1], 2, 2, "nearest"),
        ([64], 32, 32, "nearest"),
        ([8192], 1 << 20, 1 << 20, "nearest"),
        ([64, 1024, 8192], 2, 2**31, "range"),
        ([128, 4096], 2, 2**31, "range"),
        ([1, 16], 1, 16, "range"),
        ([8192], 100_000, 200_000, "range"),
    ],
)
def test_what_was_tuned_near_the_call_or_where_bandwidth_binds_answers(
    tuned: list[int], low: int, high: int, rule: str
) -> None:
    assert snapshot(*map(winner, tuned)).lookup(PROBLEM, low, high, "abc").rule == rule


def test_tuning_at_the_buckets_that_serve_a_call_always_makes_it_answered() -> None:
    edges = sorted({max(edge + step, 0) for edge in (0, *RANGE_BUCKETS, 1 << 20, 1 << 31) for step in (-1, 0, 1)})
    for low, high in combinations_with_replacement(edges, 2):
        for known in ((), (1,), (700,), (1 << 20,)):
            tuned = sorted({*known, *buckets_serving(low, high)})
            assert snapshot(*map(winner, tuned)).lookup(PROBLEM, low, high, "abc").winners, (low, high, tuned)


def test_the_reason_is_a_sentence_with_the_figures() -> None:
    assert TUNED.lookup(PROBLEM, 64, 64, "abc").reason == (
        "tuned at T=64 on cuda:sm_90a:NVIDIA H200: 1.03 µs against 2.15 µs (compile), 2.09×"
    )


def test_between_two_buckets_both_must_beat_their_baselines() -> None:
    noisy = snapshot(winner(1, gain=1.02, gain_low=0.98, gain_high=1.06), winner(64))
    assert noisy.lookup(PROBLEM, 64, 64, "abc").beats_baseline
    answer = noisy.lookup(PROBLEM, 8, 8, "abc")
    assert not answer.beats_baseline
    assert "not faster beyond the noise (0.98–1.06×)" in answer.reason


def test_winners_of_another_kernel_version_are_passed_over() -> None:
    mixed = snapshot(winner(48, source_hash="old"), winner(64))
    assert [known.tokens for known in mixed.buckets(PROBLEM, "abc")] == [64]
    assert mixed.lookup(PROBLEM, 48, 48, "abc").rule == "nearest"


def test_only_stale_winners_ask_for_tuning_again() -> None:
    answer = TUNED.lookup(PROBLEM, 64, 64, "def")
    assert (answer.rule, answer.winners, answer.beats_baseline) == ("stale", (), False)
    assert "T=1, 64, 2048" in answer.reason
    assert "`autofuse tune` again" in answer.reason


def test_an_unknown_problem_is_named() -> None:
    other = replace(PROBLEM, op="rope_kv_cache")
    answer = TUNED.lookup(other, 64, 64, "abc")
    assert (answer.rule, answer.winners) == ("untuned", ())
    assert answer.reason == f"{other} was never tuned on {H200}: run `autofuse tune`"


def test_a_range_that_is_none_is_refused() -> None:
    with pytest.raises(BadInput, match="not a range"):
        TUNED.lookup(PROBLEM, 64, 1, "abc")


def test_an_absent_database_is_an_empty_snapshot(tmp_path: Path) -> None:
    absent = Snapshot.load(tmp_path / "tuned.db", H200)
    assert (absent.present, absent.winners) == (False, ())
    assert absent.digest == snapshot().digest
    assert list(tmp_path.iterdir()) == []


def test_what_was_looked_up_outlives_the_database(tmp_path: Path) -> None:
    other = replace(PROBLEM, params=(("dtype", "fp16"),))
    with TunedDatabase(tmp_path / "tuned.db") as database:
        for problem in (PROBLEM, other):
            database.record_winner(winner(64, problem=problem))
        expected = database.digest(H200)
    loaded = Snapshot.load(tmp_path / "tuned.db", H200)
    assert loaded.lookup(PROBLEM, 64, 64, "abc").rule == "exact"
    (tmp_path / "tuned.db").unlink()
    assert loaded.lookup(PROBLEM, 63, 64, "abc").rule == "range"
    assert loaded.digest == expected
    with pytest.raises(DatabaseError, match="does not exist"):
        loaded.lookup(other, 64, 64, "abc")


def test_the_same_question_is_answered_from_memory() -> None:
    assert TUNED.lookup(PROBLEM, 64, 64, "abc") is TUNED.lookup(PROBLEM, 64, 64, "abc")


def test_what_was_written_by_hand_is_found_out(tmp_path: Path) -> None:
    with TunedDatabase(tmp_path / "tuned.db") as database:
        database.record_winner(winner(64))
        before = database.digest(H200)
    with closing(sqlite3.connect(tmp_path / "tuned.db")) as connection:
        connection.executescript("UPDATE winners SET gain = 2.0")
    loaded = Snapshot.load(tmp_path / "tuned.db", H200)
    assert loaded.digest == snapshot(winner(64, gain=2.0)).digest != before
    with TunedDatabase(tmp_path / "tuned.db") as database:
        database.record_winner(winner(64))
        assert database.digest(H200) == before


def test_a_candidate_decides_nothing_and_is_named() -> None:
    only = snapshot(winner(64, standing="candidate"))
    answer = only.lookup(PROBLEM, 64, 64, "abc")
    assert (answer.rule, answer.winners) == ("candidate", ())
    assert "was imported for T=64" in answer.reason
    assert "`autofuse tune`, or import it with --trust" in answer.reason
    assert only.digest == snapshot().digest
    assert any(line.startswith("candidate: T=64") for line in explain_lookup(only, PROBLEM, 64, 64, "abc"))


def test_what_is_trusted_says_so() -> None:
    assert "as imported" in snapshot(winner(64, standing="trusted")).lookup(PROBLEM, 64, 64, "abc").reason


@pytest.mark.parametrize(
    ("target", "tuned", "alike"),
    [
        (H200, H100, True),
        (H200, A100, False),
        (H200, Target("hip", "sm_90a", "AMD"), False),
        (Target("hip", "gfx942", "AMD Instinct MI300X"), Target("hip", "gfx942", "AMD Instinct MI325X"), True),
        (Target("cpu", "x86-64-v4", "EPYC"), Target("cpu", "x86-64-v4", "Xeon"), False),
    ],
    ids=lambda value: str(value),
)
@pytest.mark.parametrize("in_memory", [True, False])
def test_another_gpu_of_the_same_arch_lends_its_config_and_decides_nothing(
    tmp_path: Path, target: Target, tuned: Target, alike: bool, in_memory: bool
) -> None:
    with TunedDatabase(tmp_path / "tuned.db") as database:
        database.record_winner(winner(64, target=tuned))
    known = Snapshot.load(tmp_path / "tuned.db", target)
    if in_memory:
        known = Snapshot(Path("tuned.db"), True, target, [winner(64, target=tuned)])
    answer = known.lookup(PROBLEM, 64, 64, "abc")
    assert (answer.winners, answer.beats_baseline) == ((), False)
    assert answer.rule == ("same_arch" if alike else "untuned")
    assert [lent.target for lent in answer.elsewhere] == ([tuned] if alike else [])
    assert answer.reason.startswith(f"{PROBLEM} was never tuned on {target}: run `autofuse tune`")
    there = f"; on another GPU of the same arch, which decides nothing here: tuned at T=64 on {tuned}: 1.03 µs"
    assert (there in answer.reason) == alike
    told = explain_lookup(known, PROBLEM, 64, 64, "abc")
    assert (f"same arch: T=64 on {tuned}, not measured here" in told) == alike
    assert told[-1] == "faster here: no"


def test_what_was_tuned_here_answers_before_another_gpu() -> None:
    known = snapshot(winner(1), winner(64, target=H100))
    assert known.lookup(PROBLEM, 2, 2, "abc").rule == "nearest"
    beyond = known.lookup(PROBLEM, 64, 64, "abc")
    assert (beyond.rule, beyond.elsewhere[0].target) == ("same_arch", H100)
    assert f"further than a factor of 2 from what was tuned on {H200}" in beyond.reason
    assert known.winners == (winner(1),)


def test_of_several_gpus_the_better_rule_lends_and_then_the_later_measurement() -> None:
    early, late = "2026-01-31T12:00:00Z", "2026-02-01T12:00:00Z"
    near = winner(65, target=GH200, measured_at=late)
    assert snapshot(winner(64, target=H100, measured_at=early), near).lookup(PROBLEM, 64, 64, "abc").elsewhere == (
        winner(64, target=H100, measured_at=early),
    )
    both = snapshot(winner(64, target=H100, measured_at=late), winner(64, target=GH200, measured_at=early))
    assert both.lookup(PROBLEM, 64, 64, "abc").elsewhere[0].target == H100


@pytest.mark.parametrize("unfit", [{"source_hash": "old"}, {"standing": "candidate"}, {"tokens": 4096}], ids=str)
def test_another_gpu_lends_only_what_would_answer_there(unfit: dict[str, Any]) -> None:
    lent = winner(**{"tokens": 64, "target": H100, **unfit})
    assert snapshot(lent).lookup(PROBLEM, 64, 64, "abc").rule == "untuned"


def test_a_candidate_or_a_stale_winner_is_named_beside_what_another_gpu_lends() -> None:
    for own, words in (
        ({"standing": "candidate"}, "was imported for T=64"),
        ({"source_hash": "old"}, "another version"),
    ):
        answer = snapshot(winner(64, **own), winner(64, target=H100)).lookup(PROBLEM, 64, 64, "abc")
        assert answer.rule == "same_arch"
        assert words in answer.reason


def test_the_digest_covers_other_gpus_of_the_same_arch_alone(tmp_path: Path) -> None:
    digests = []
    for target in (H200, A100, H100, GH200):
        with TunedDatabase(tmp_path / "tuned.db") as database:
            database.record_winner(winner(64, target=target))
            rows = database.winners()
        digests.append(Snapshot.load(tmp_path / "tuned.db", H200).digest)
        assert digests[-1] == snapshot(*rows).digest
    assert digests[0] == digests[1] == snapshot(winner(64)).digest
    assert len({*digests}) == 3
    with closing(sqlite3.connect(tmp_path / "tuned.db")) as connection, connection:
        connection.execute("UPDATE winners SET gain = 2.0 WHERE target = ?", [str(H100)])
    assert Snapshot.load(tmp_path / "tuned.db", H200).digest not in digests


def test_a_lower_database_lends_where_the_upper_ones_cannot(layers: tuple[Path, Path, Path]) -> None:
    with TunedDatabase(layers[2]) as database:
        database.record_winner(winner(512, target=H100, source_hash="new"))
    answer = Snapshot.load(layers[0], H200).lookup(PROBLEM, 512, 512, "new")
    assert (answer.rule, answer.layer, answer.elsewhere[0].tokens) == ("same_arch", 2, 512)
    assert "another version of its kernel" in answer.reason


@pytest.fixture
def layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path, Path]:
    """A user's database over two of a site, which nobody may write."""
    paths = (tmp_path / "mine.db", tmp_path / "site" / "upper.db", tmp_path / "site" / "lower.db")
    for path, tokens, time_us in zip(paths, (1, 64, 2048), (1.0, 2.0, 3.0), strict=True):
        with TunedDatabase(path) as database:
            database.record_winner(winner(tokens, time_us=time_us))
    monkeypatch.setenv("AUTOFUSE_DB_PATH", os.pathsep.join(map(str, paths[1:])))
    return paths


@pytest.mark.parametrize(("tokens", "layer"), [(1, 0), (64, 1), (2048, 2)])
def test_the_uppermost_database_that_has_an_answer_answers(
    layers: tuple[Path, Path, Path], tokens: int, layer: int
) -> None:
    before = [path.read_bytes() for path in layers]
    answer = Snapshot.load(layers[0], H200).lookup(PROBLEM, tokens, tokens, "abc")
    assert (answer.rule, answer.winners[0].time_us) == ("exact", layer + 1.0)
    told = "\n".join(explain_lookup(Snapshot.load(layers[0], H200), PROBLEM, tokens, tokens, "abc"))
    assert all(f"database: {path}" in told for path in layers)
    assert [path.read_bytes() for path in layers] == before


def test_where_no_database_answers_the_users_own_says_why(layers: tuple[Path, Path, Path]) -> None:
    assert "which is T=1: " in Snapshot.load(layers[0], H200).lookup(PROBLEM, 10**6, 10**6, "abc").reason


def test_the_digest_covers_the_lower_databases(layers: tuple[Path, Path, Path]) -> None:
    before = Snapshot.load(layers[0], H200)
    with TunedDatabase(layers[2]) as database:
        database.record_winner(winner(4096))
    assert Snapshot.load(layers[0], H200).digest != before.digest
    assert Snapshot.load(layers[0], H200, alone=True).digest == snapshot(winner(1, time_us=1.0)).digest


def test_a_lower_database_that_is_broken_is_passed_over_with_a_warning(
    layers: tuple[Path, Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    layers[1].write_bytes(b"a note\n" * 999)
    for _ in range(2):
        assert Snapshot.load(layers[0], H200).lookup(PROBLEM, 2048, 2048, "abc").winners
    (record,) = caplog.records
    assert "a database of AUTOFUSE_DB_PATH is passed over" in record.message
    layers[2].unlink()
    assert Snapshot.load(layers[0], H200).lookup(PROBLEM, 1, 1, "abc").winners


def test_why_is_told_step_by_step() -> None:
    noisy = winner(2048, gain=1.01, gain_low=0.97, gain_high=1.05)
    told = "\n".join(
        explain_lookup(snapshot(winner(64), noisy, winner(1, source_hash="old")), PROBLEM, 100, 100, "abc")
    )
    for step in (
        "tuned.db",
        str(H200),
        str(PROBLEM),
        "tuned: T=64, 2048",
        "stale: the kernel changed",
        "  T=1: ",
        "rule: between",
    ):
        assert step in told
    assert "T=2048 does not beat compile by more than the noise: 1.01×, 95 % between 0.970× and 1.050×" in told
    assert told.endswith("faster here: no")
