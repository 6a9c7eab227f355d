"""Several files of measurements become one: whichever order they come in, and never by the lower time."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice, permutations
from pathlib import Path
from typing import Any

import pytest

from autofuse.cache_db import Baseline, Trial, TunedDatabase, Winner, export_database, merge_exports, read_export
from autofuse.cli.app import run
from autofuse.errors import BadInput
from autofuse.ops import get_op
from autofuse.targets.base import Target

H200 = Target("cuda", "sm_90a", "NVIDIA H200")
H100 = Target("cuda", "sm_90a", "NVIDIA H100 80GB HBM3")
OP = get_op("mla_dual_rms_norm")
PROBLEM = OP.make_problem(dtype="bf16", q_lora_rank=1536, kv_lora_rank=512, cast_before_weight=True)
HERE = OP.source_hash("cuda")
ONE, OTHER = islice(OP.kernel_source("cuda").space.configs(PROBLEM, 64), 2)
EARLY, LATE = "2026-01-31T12:00:00Z", "2026-02-01T12:00:00Z"
WINNER = Winner(H200, PROBLEM, 64, ONE, HERE, 1.03, 0.02, "compile", 2.15, 2.09, 2.01, 2.16, measured_at=EARLY)
TRIAL = Trial(H200, PROBLEM, 64, ONE, HERE, "ok", time_us=1.03, error=0.2, measured_at=EARLY)
FORMATS = pytest.mark.parametrize("suffix", [".jsonl", ".db"])


def export(path: Path, *records: Any, host: str = "") -> Path:
    """An export of a database with these rows; with provenance where there is a host."""
    with TunedDatabase(path.with_suffix(".tuned")) as database:
        provenance = database.record_provenance({"host": host}) if host else ""
        for record in records:
            database.record(replace(record, provenance=provenance))
        return export_database(database, path).path


def winners(path: Path) -> list[Winner]:
    return [record for record in read_export(path).records if isinstance(record, Winner)]


@FORMATS
def test_a_merge_of_one_is_that_one_and_of_several_does_not_depend_on_their_order(tmp_path: Path, suffix: str) -> None:
    baseline = Baseline(H200, PROBLEM, 64, "compile", 2.15, 0.1, measured_at=EARLY)
    failed = replace(TRIAL, tokens=1, config=OTHER, status="timed_out", time_us=None, measured_at=LATE)
    files = [
        export(tmp_path / f"a{suffix}", TRIAL, baseline, WINNER, host="a"),
        export(tmp_path / f"b{suffix}", replace(WINNER, config=OTHER, measured_at=LATE), failed, host="b"),
        export(tmp_path / f"c{suffix}", replace(WINNER, target=H100), replace(baseline, time_us=2.2), host="c"),
    ]
    merge_exports(files[:1], tmp_path / f"one{suffix}")
    assert (tmp_path / f"one{suffix}").read_bytes() == files[0].read_bytes()
    merged = set()
    for number, order in enumerate(permutations([*files, files[0]])):
        summary, _ = merge_exports(order, tmp_path / f"{number}{suffix}")
        assert summary.counts == {"trials": 2, "baselines": 1, "winners": 2}
        merged.add(summary.path.read_bytes())
    assert len(merged) == 1
    assert {known["host"] for known in read_export(tmp_path / f"0{suffix}").provenance.values()} <= {"a", "b", "c"}


LOWER_TIME = {"config": OTHER, "time_us": 0.5, "gain": 4.3, "gain_low": 4.2, "gain_high": 4.4}


@pytest.mark.parametrize(
    ("better", "worse", "why"),
    [
        ({}, {"source_hash": "0ld", "measured_at": LATE}, "another version of the kernel"),
        ({"verified": True}, {"measured_at": LATE, "host": "b"}, "no trial in these files says that it was verified"),
        ({"host": "a"}, {"measured_at": LATE}, "does not say where it was measured"),
        ({"measured_at": LATE}, {}, "was measured earlier"),
    ],
    ids=["source", "verification", "provenance", "time"],
)
def test_of_two_winners_the_better_founded_one_stays_and_never_the_faster_one(
    tmp_path: Path, better: dict[str, Any], worse: dict[str, Any], why: str
) -> None:
    made = []
    for name, base, changes in (("a", {}, better), ("b", LOWER_TIME, worse)):
        facts = {**base, **changes}
        host, verified = facts.pop("host", ""), facts.pop("verified", False)
        made.append(export(tmp_path / f"{name}.jsonl", replace(WINNER, **facts), *[TRIAL] * verified, host=host))
    for number, order in enumerate(permutations(made)):
        summary, (settled,) = merge_exports(order, tmp_path / f"{number}.jsonl")
        (kept,) = winners(summary.path)
        assert (kept.config, settled.kept, settled.dropped.config) == (ONE, kept, OTHER)
        assert why in settled.why


def test_a_config_that_one_file_found_wrong_does_not_win(tmp_path: Path) -> None:
    first = export(tmp_path / "a.jsonl", replace(TRIAL, measured_at=LATE), replace(WINNER, measured_at=LATE))
    second = export(tmp_path / "b.jsonl", replace(TRIAL, status="wrong", time_us=None, message="off by 2"))
    third = export(tmp_path / "c.jsonl", replace(WINNER, config=OTHER))
    for number, order in enumerate(permutations([first, second, third])):
        summary, (settled,) = merge_exports(order, tmp_path / f"{number}.jsonl")
        (kept,) = winners(summary.path)
        assert (kept.config, settled.dropped.config, settled.why) == (OTHER, ONE, "its config was found wrong")
        (trial,) = (record for record in read_export(summary.path).records if isinstance(record, Trial))
        assert trial.status == "wrong"
    _, (settled,) = merge_exports([first, second], tmp_path / "none.jsonl")
    assert (settled.kept, winners(tmp_path / "none.jsonl")) == (None, [])


def test_rows_of_ops_that_are_not_here_go_along(tmp_path: Path) -> None:
    later = replace(WINNER, problem=replace(PROBLEM, op="op_of_a_later_autofuse"))
    path = export(tmp_path / "a.jsonl", later)
    merge_exports([path, export(tmp_path / "b.jsonl", WINNER)], tmp_path / "out.jsonl")
    assert len(winners(tmp_path / "out.jsonl")) == 2


def test_a_file_that_an_import_would_refuse_is_refused_by_name(tmp_path: Path) -> None:
    good = export(tmp_path / "a.jsonl", WINNER)
    bad = export(tmp_path / "b.jsonl", replace(WINNER, config=type(ONE).of(ONE, ROWS=77)))
    with pytest.raises(BadInput, match=r"b\.jsonl: config .*ROWS=77 is not one of"):
        merge_exports([good, bad], tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_the_command_writes_one_file_and_tells_what_is_not_in_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [
        str(export(tmp_path / "a.jsonl", TRIAL, WINNER)),
        str(export(tmp_path / "b.jsonl", replace(WINNER, **LOWER_TIME))),
    ]
    assert run(["merge", *files, "-o", str(tmp_path / "out.jsonl")]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert f"Wrote {tmp_path / 'out.jsonl'}: 1 trials, 1 winners" in told
    assert "Winners that are not in it" in told
    assert str(OTHER) in told
    assert run(["merge", *files, "-o", str(tmp_path / "out.jsonl")]) == 2
    assert "it exists" in capsys.readouterr().err
    assert run(["merge", *files, "-o", files[0], "--overwrite"]) == 2
    assert "onto itself" in capsys.readouterr().err
    assert run(["merge", *files, "-o", str(tmp_path / "out.jsonl"), "--overwrite", "--json"]) == 0
    (dropped,) = json.loads(capsys.readouterr().out)["dropped"]
    assert (dropped["kept"]["config"], dropped["dropped"]["config"]) == (str(ONE), str(OTHER))
