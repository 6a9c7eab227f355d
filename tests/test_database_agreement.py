"""How far two tunings agree: by the times that each recorded, and by what one file measured of both configs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from autofuse.cache_db import TIMED, Trial, TunedDatabase, Winner, agreement, compare, read_export
from autofuse.cache_db.agreement import Pair
from autofuse.cli.app import run
from autofuse.ops import Config, get_op
from autofuse.targets import Target

H200 = Target("cuda", "sm_90a", "NVIDIA H200")
OP = get_op("mla_dual_rms_norm")
PROBLEM = OP.make_problem(dtype="bf16", q_lora_rank=1536, kv_lora_rank=512, cast_before_weight=True)
HERE = OP.source_hash("cuda")
FIRST, SECOND = islice(OP.kernel_source("cuda").space.configs(PROBLEM, 64), 2)
MONDAY, FRIDAY = "2026-01-26T12:00:00Z", "2026-01-30T12:00:00Z"


def winner(config: Config = FIRST, tokens: int = 64, **changes: Any) -> Winner:
    made = Winner(H200, PROBLEM, tokens, config, HERE, 1.0, 0.01, "compile", 2.0, 2.0, 1.98, 2.02, measured_at=MONDAY)
    return replace(made, **changes)


def trial(config: Config, time_us: float | None, status: str = "ok", **changes: Any) -> Trial:
    made = Trial(H200, PROBLEM, 64, config, HERE, status, time_us=time_us, measured_at=MONDAY)
    return replace(made, **changes)


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, *records: Any) -> Path:
        with TunedDatabase(tmp_path / name) as database:
            for record in records:
                database.record(record)
        return tmp_path / name

    return write


def pair_of(a: Path, b: Path) -> Pair:
    (pair,) = compare(read_export(a), read_export(b)).both
    return pair


def test_times_are_compared_as_each_file_says(write: Write) -> None:
    pair = pair_of(write("a.db", winner()), write("b.db", winner(SECOND, time_us=1.25)))
    assert (pair.ratio, pair.same_config, pair.config_ratio) == (1.25, False, None)
    assert agreement([pair]).close_times == 0


@pytest.mark.parametrize(("time_us", "within"), [(1.019, True), (1.021, False), (0.981, True), (0.979, False)])
def test_times_are_within_the_noise_where_both_intervals_meet(time_us: float, within: bool) -> None:
    """Each interval reaches 1 % to either side."""
    assert Pair(winner(), winner(SECOND, time_us=time_us)).within_noise is within


def test_what_one_file_measured_of_both_configs_says_whether_the_choice_matters(write: Write) -> None:
    a = write("a.db", winner(), trial(FIRST, 1.0), trial(SECOND, 1.01))
    b = write("b.db", winner(SECOND, time_us=1.25), trial(FIRST, 1.3), trial(SECOND, 1.25))
    pair = pair_of(a, b)
    assert (pair.in_a, pair.in_b) == (pytest.approx(1.01), pytest.approx(1.25 / 1.3))
    assert pair.config_ratio == pytest.approx((1.01 * 1.25 / 1.3) ** 0.5)
    alone = pair_of(a, write("c.db", winner(SECOND, time_us=1.25)))
    assert (alone.in_a, alone.in_b, alone.config_ratio) == (pytest.approx(1.01), None, pytest.approx(1.01))


def test_a_config_that_was_dropped_for_being_slow_counts_and_an_untimed_one_does_not(write: Write) -> None:
    b = write("b.db", winner(SECOND))
    assert pair_of(write("a.db", winner(), trial(FIRST, 1.0), trial(SECOND, 1.4, "pruned")), b).config_ratio == 1.4
    assert pair_of(write("c.db", winner(), trial(FIRST, 1.0), trial(SECOND, None, "pruned")), b).config_ratio is None


def test_a_trial_of_another_version_of_the_kernel_says_nothing(write: Write) -> None:
    a = write("a.db", winner(), trial(FIRST, 1.0), trial(SECOND, 1.4, source_hash="0ld"))
    assert pair_of(a, write("b.db", winner(SECOND))).config_ratio is None


def test_a_trial_that_one_file_has_from_the_other_is_no_measurement_of_its_own(write: Write) -> None:
    a = write("a.db", winner(), trial(FIRST, 1.0), trial(SECOND, 1.4))
    b = write("b.db", winner(SECOND, time_us=1.3), trial(SECOND, 1.4))
    assert pair_of(a, b).config_ratio is None
    again = write("c.db", winner(SECOND, time_us=1.3), trial(SECOND, 1.4, measured_at=FRIDAY))
    assert pair_of(a, again).config_ratio == 1.4


def test_a_winner_that_failed_in_the_other_file_is_told(write: Write) -> None:
    a = write("a.db", winner(), trial(FIRST, 1.0), trial(SECOND, None, "wrong"))
    pair = pair_of(a, write("b.db", winner(SECOND)))
    assert (pair.failed, pair.config_ratio) == (("wrong in A",), None)
    assert agreement([pair]).failed == (pair,)


SLOWER = {"gain": 0.9, "gain_low": 0.88, "gain_high": 0.92}
UNSURE = {"gain": 1.01, "gain_low": 0.98, "gain_high": 1.04}


@pytest.mark.parametrize(
    ("changes", "same_choice", "contradicts"), [({}, True, False), (UNSURE, False, False), (SLOWER, False, True)]
)
def test_fused_against_unfused_is_a_disagreement_and_beyond_both_intervals_a_contradiction(
    changes: dict[str, float], same_choice: bool, contradicts: bool
) -> None:
    for pair in (Pair(winner(), winner(**changes)), Pair(winner(**changes), winner())):
        assert (pair.same_choice, pair.contradicts) == (same_choice, contradicts)
        assert agreement([pair]).disagree == (() if same_choice else (pair,))


def test_the_sum_counts_each_bucket_once_and_names_the_worst(write: Write) -> None:
    a = write(
        "a.db",
        winner(tokens=1),
        *(winner(), trial(FIRST, 1.0), trial(SECOND, 1.015)),
        winner(tokens=1024),
        winner(tokens=8192),
    )
    b = write(
        "b.db",
        winner(tokens=1, time_us=1.01),
        winner(SECOND, time_us=1.1),
        winner(SECOND, tokens=1024, time_us=0.8),
    )
    found = compare(read_export(a), read_export(b))
    assert [pair.a.tokens for pair in found.both] == [1, 64, 1024]
    summed = agreement(found.both)
    assert (summed.buckets, summed.close_times, summed.same_configs) == (3, 1, 1)
    assert (summed.compared, summed.close_configs) == (1, 1)
    assert summed.worst_time is not None
    assert summed.worst_config is not None
    assert (summed.worst_time.a.tokens, summed.worst_config.a.tokens) == (1024, 64)


def test_nothing_in_common_comes_to_nothing() -> None:
    assert agreement([]).worst_time is None
    assert agreement([]).buckets == 0


def test_the_command_tells_of_each_bucket_and_sums_up(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    a = write("a.db", winner(tokens=1), winner(), trial(FIRST, 1.0), trial(SECOND, 1.015), winner(tokens=2048))
    b = write("b.db", winner(tokens=1), winner(SECOND, time_us=1.1), winner(SECOND, tokens=2048, **SLOWER))
    assert run(["diff", str(a), str(b)]) == 1
    text = capsys.readouterr().out
    (row,) = (line for line in text.splitlines() if line.split()[:1] == ["64"])
    assert "1.100   beyond noise" in row
    assert "1.015 in A" in row
    assert "Times: within 2% of each other in 2 of 3 buckets; at worst B ÷ A is 1.100 (" in text
    assert "Configs: the same in 1; within 2% by one file's measurements in 1 of 1; at worst B ÷ A is 1.015 (" in text
    assert "; 1 that no file measured both of" in text
    assert "Fused or not: 2 of 3 agree" in text
    assert f"{PROBLEM} at T=2048 on {H200}: only A, against the other's interval: 2.00× [1.98, 2.02], 0.90×" in text


def test_times_that_were_taken_in_different_ways_are_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, time_us, ways in (("a.db", 1.0, ({}, {})), ("b.db", 1.3, ({TIMED: "behind stand-ins"}, {}))):
        with TunedDatabase(tmp_path / name) as database:
            for tokens, fields in zip((1, 64), ways, strict=True):
                provenance = database.record_provenance({"driver": "580", **fields})
                database.record(winner(tokens=tokens, time_us=time_us, provenance=provenance))
    files = str(tmp_path / "a.db"), str(tmp_path / "b.db")
    apart, alike = compare(*map(read_export, map(Path, files))).both
    assert (apart.timed_alike, alike.timed_alike) == (False, True)
    assert agreement([apart, alike]).worst_time == alike
    assert (agreement([apart]).close_times, agreement([apart]).worst_time) == (0, None)
    assert run(["diff", *files]) == 1
    text = capsys.readouterr().out
    rows = {line.split()[0]: line for line in text.splitlines() if line.split()[:1] in (["1"], ["64"])}
    assert "1.300   timed otherwise" in rows["1"]
    assert "1.300   beyond noise" in rows["64"]
    assert "Timed in different ways: 1 of 2 buckets, whose times cannot be compared\n" in text
    assert "Times: within 2% of each other in 0 of 1 buckets; at worst B ÷ A is 1.300 (" in text


def test_the_command_gives_programs_the_same(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    a = write("a.db", winner(tokens=1), winner(), trial(FIRST, 1.0), trial(SECOND, 1.015))
    b = write("b.db", winner(tokens=1), winner(SECOND, time_us=1.1))
    assert run(["diff", str(a), str(b), "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    (changed,) = facts["changed"]
    assert (changed["a"]["tokens"], changed["ratio"], changed["within_noise"]) == (64, 1.1, False)
    assert (changed["config_ratio_in_a"], changed["config_ratio_in_b"]) == (1.015, None)
    summed = facts["agreement"]
    assert (summed["buckets"], summed["close_times"], summed["close"], summed["disagree"]) == (2, 1, 0.02, [])
    assert summed["worst_time"] == summed["worst_config"] == changed
