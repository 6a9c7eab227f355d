"""An exported file pins what is compiled: neither a database nor what is measured later changes it."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
from deciding import CPU, compared, decide, tuned, winner

import autofuse
from autofuse.cache_db import TunedDatabase, default_path, export_database
from autofuse.errors import AutofuseError, BadInput
from autofuse.graph import pinned
from autofuse.graph.decide import Knowledge
from autofuse.graph.settings import PLAN_VARIABLE, Settings
from autofuse.ops import Constraint, get_op
from autofuse.ops.problem import Config
from autofuse.targets import target_of


@pytest.fixture(params=["plan.jsonl", "plan.db"])
def plan(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An export that fuses at T=64, beside a database that does not."""
    monkeypatch.delenv(PLAN_VARIABLE, raising=False)
    tuned(winner(64, 2.0))
    with TunedDatabase(default_path(), read_only=True) as database:
        path = export_database(database, tmp_path / request.param, winners_only=True).path
    tuned(winner(64, 0.5))
    return path


def test_a_pinned_file_decides_and_the_database_does_not(plan: Path) -> None:
    assert not decide(64).fuses
    before = plan.read_bytes()
    decision = decide(64, {"autofuse.plan": str(plan)})
    assert decision.fuses
    assert plan.read_bytes() == before
    default_path().unlink()
    assert decide(64, {"autofuse.plan": plan}).plan == decision.plan
    assert not default_path().exists()


def test_what_is_pinned_stands_for_itself_in_inductors_cache(plan: Path) -> None:
    settings, _ = Settings.parse({"autofuse.plan": str(plan)})
    pinned = str(Knowledge.of(CPU, settings))
    tuned(winner(1, 3.0))
    assert str(Knowledge.of(CPU, settings)) == pinned != str(Knowledge.of(CPU, Settings()))


def test_what_the_file_lacks_is_left_alone_and_not_remembered(plan: Path) -> None:
    assert decide(1 << 14, {"autofuse.plan": str(plan)}).rule == "untuned"
    with TunedDatabase(default_path(), read_only=True) as database:
        assert database.captured() == []


def test_a_winner_over_eager_code_brings_what_it_was_compared_with(plan: Path) -> None:
    compared(winner(64, 2.0, baseline="eager"))
    with TunedDatabase(default_path(), read_only=True) as database:
        export_database(database, plan, winners_only=True, overwrite=True)
    assert decide(64, {"autofuse.plan": str(plan)}).fuses


def test_a_plan_can_be_loaded_for_the_whole_process(plan: Path) -> None:
    assert autofuse.load_plan(plan) == [target_of(CPU)]
    assert decide(64).fuses
    assert autofuse.load_plan(None) == []
    assert not decide(64).fuses


def test_what_is_no_plan_is_refused_at_once(plan: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is no file; name one that `autofuse export` wrote"):
        Settings.parse({"autofuse.plan": str(tmp_path / "absent.jsonl")})
    with pytest.raises(BadInput, match="nothing else is to run"):
        Settings.parse({"autofuse.plan": str(plan), "autofuse.untuned": "tune"})
    (tmp_path / "notes.jsonl").write_text("notes\n")
    with pytest.raises(AutofuseError, match="not valid JSON"):
        autofuse.load_plan(tmp_path / "notes.jsonl")
    assert not decide(64).fuses


def test_a_plan_that_is_damaged_leaves_the_graph_unfused_with_one_warning(
    plan: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan.write_bytes(plan.read_bytes()[: plan.stat().st_size // 2 + 1])
    with caplog.at_level(logging.WARNING, "autofuse"):
        assert not any(decide(64, {"autofuse.plan": str(plan)}).fuses for _ in range(2))
    assert len(caplog.records) == 1


def test_a_config_outside_the_search_space_does_not_run(plan: Path) -> None:
    tuned(winner(64, 2.0, config=Config.of(UNROLL=77)))
    with TunedDatabase(default_path(), read_only=True) as database:
        export_database(database, plan, overwrite=True)
    assert not decide(64, {"autofuse.plan": str(plan)}).fuses


@pytest.mark.parametrize("fewer", ["values", "rules"])
def test_what_one_autofuse_left_out_is_there_for_another(
    fewer: str, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other has a machine with other values to choose from, or is an earlier one with stricter rules."""
    best = winner(1, 2.0)
    tuned(winner(64, 2.0), replace(best, config=Config.of(best.config, UNROLL=4)))
    with TunedDatabase(default_path(), read_only=True) as database:
        export_database(database, plan, winners_only=True, overwrite=True)
    op = get_op("mla_dual_rms_norm")
    kernel = op.kernel_source("cpu")
    if fewer == "values":
        tunables = (replace(each, values=tuple({*each.values} - {4})) for each in kernel.space.tunables)
        space = replace(kernel.space, tunables=tuple(tunables))
    else:
        rule = Constraint("it was not thought of", lambda config, *_: config["UNROLL"] < 4)
        space = replace(kernel.space, constraints=(*kernel.space.constraints, rule))
    options = {"autofuse.plan": str(plan)}
    with monkeypatch.context() as patch:
        patch.setattr(type(op), "kernels", {**op.kernels, "cpu": replace(kernel, space=space)})
        if fewer == "rules":
            patch.setattr(pinned, "sources_hash", lambda: "of an earlier autofuse")
        assert [decide(tokens, options).fuses for tokens in (64, 1)] == [True, False]
    assert [decide(tokens, options).fuses for tokens in (64, 1)] == [True, True]
    made = pinned.pinned_database(plan)
    written = made.stat().st_mtime_ns
    assert (pinned.pinned_database(plan), made.stat().st_mtime_ns) == (made, written)
