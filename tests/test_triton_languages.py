"""A kernel's language is one more choice: configs, searches, rows and plans tell the two apart, and keep what was."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from html import escape
from pathlib import Path

import pytest

from autofuse.cache_db import Snapshot, Trial, TunedDatabase, Winner, explain_lookup, is_stale, rival_of
from autofuse.cache_db.kernels import NO_TRITON, STALE
from autofuse.cli.app import run
from autofuse.errors import UnsuitedPlan
from autofuse.ops import Config, get_op
from autofuse.ops import base as ops_base
from autofuse.ops.languages import CPP, TRITON, language_of
from autofuse.runtime.plan import Plan
from autofuse.targets import Target
from autofuse.targets import triton as triton_target
from autofuse.tuner.budgets import Effort
from autofuse.tuner.search import search_for

NORMS = get_op("mla_dual_rms_norm")
PROBLEM = NORMS.make_problem(dtype="bf16", q_lora_rank=1536, kv_lora_rank=512, cast_before_weight=True)
H200 = Target("cuda", "sm_90a", "NVIDIA H200")
PLAIN = NORMS.kernels["cuda"].default(PROBLEM, 64)
IN_TRITON = NORMS.triton_kernels["cuda"].default(PROBLEM, 64)


@pytest.fixture
def with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a Triton is that the kernels are written for."""
    monkeypatch.setattr(ops_base, "triton_unavailable", lambda: None)


@pytest.fixture
def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops_base, "triton_unavailable", lambda: "there is no triton")


def winner(config: Config, tokens: int = 64, **changes: object) -> Winner:
    source = NORMS.source_hash("cuda", config)
    made = Winner(H200, PROBLEM, tokens, config, source, 1.0, 0.1, "compile", 2.0, 2.0, 1.9, 2.1)
    return replace(made, **changes)  # type: ignore[arg-type]


def trial(config: Config, time_us: float, status: str = "ok") -> Trial:
    return Trial(H200, PROBLEM, 64, config, NORMS.source_hash("cuda", config), status, time_us=time_us)


# Configs and spaces


def test_a_config_that_names_no_language_is_of_the_cpp_kernel() -> None:
    assert (language_of(PLAIN), language_of(IN_TRITON)) == (CPP, TRITON)
    assert NORMS.kernel_source("cuda", PLAIN) is NORMS.kernels["cuda"]
    assert NORMS.kernel_source("cuda", IN_TRITON) is NORMS.triton_kernels["cuda"]


def test_each_space_refuses_the_others_configs() -> None:
    assert NORMS.kernels["cuda"].space.refusal(IN_TRITON, PROBLEM, 64)
    assert NORMS.triton_kernels["cuda"].space.refusal(PLAIN, PROBLEM, 64)


def test_a_config_in_triton_of_an_op_without_is_refused_by_its_only_space() -> None:
    op = get_op("mla_q_absorb_rope_kv_cache")
    assert op.kernel_source("cuda", IN_TRITON) is op.kernels["cuda"]


@pytest.mark.usefixtures("without_triton")
def test_without_triton_its_space_is_not_there() -> None:
    assert NORMS.kernel_sources("cuda") == (NORMS.kernels["cuda"],)
    assert NORMS.source_hashes("cuda") == (NORMS.source_hash("cuda"),)


@pytest.mark.parametrize("version", ["3.5.1", "3.10.0", "4.0", "unknown"])
def test_a_version_out_of_range_is_one_line(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_target, "_version", lambda: version)
    why = triton_target.triton_unavailable.__wrapped__()
    assert why is not None
    assert "\n" not in why
    assert version in why
    assert "3.6 to 3.9" in why


@pytest.mark.parametrize("version", ["3.6.0", "3.6.0+git1234", "3.9.1"])
def test_a_version_in_range_is_taken(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_target, "_version", lambda: version)
    assert triton_target.triton_unavailable.__wrapped__() is None


@pytest.mark.parametrize("version", [None, "3.5.1"])
def test_doctor_says_in_one_line_that_triton_is_not_used(
    version: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(triton_target, "_version", lambda: version)
    why = triton_target.triton_unavailable.__wrapped__()
    monkeypatch.setattr(triton_target, "triton_unavailable", lambda: why)
    run(["doctor"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "triton:" in line]
    assert f"not used: {why}" in line


# The search


def test_both_languages_are_searched_in_turns_with_an_effort_each() -> None:
    kernels = (NORMS.kernels["cuda"], NORMS.triton_kernels["cuda"])
    effort = Effort(exhaustive_up_to=0, trials=16, startup_trials=4, batch=4)
    search = search_for(kernels, PROBLEM, 64, {}, [PLAIN, IN_TRITON], effort, seed=0)
    assert search.total == 32
    seen: list[Config] = []
    languages = []
    for batch in search.batches():
        languages.append({language_of(config) for config in batch})
        seen += batch
        for config in batch:
            search.tell(config, 2.0 if config["PDL"] else 3.0)
    assert len(set(seen)) == 32
    assert languages == [{CPP}, {TRITON}, {CPP}, {TRITON}, {CPP}, {CPP}]  # Triton's batches are twice as large
    assert seen[0] == PLAIN
    assert IN_TRITON in seen[4:12]
    spaces = {CPP: kernels[0].space, TRITON: kernels[1].space}
    assert all(spaces[language_of(config)].refusal(config, PROBLEM, 64) is None for config in seen)


def test_a_search_in_triton_ends_around_its_best_as_well() -> None:
    kernels = (NORMS.triton_kernels["cuda"],)
    effort = Effort(
        exhaustive_up_to=0, trials=60, startup_trials=4, batch=1, polish=0, triton_fewest=10, triton_settled=9.0
    )
    counts = {}
    for polish in (0, 6):
        search = search_for(kernels, PROBLEM, 64, {}, [IN_TRITON], replace(effort, triton_polish=polish), seed=0)
        times: dict[Config, float] = {}
        for batch in search.batches():
            for config in batch:
                times[config] = 2.0 + config["NUM_WARPS"] + config["Q_ROWS"]
                search.tell(config, times[config])
        counts[polish] = len(times)
    assert 10 <= counts[0] < counts[6] <= counts[0] + 1 + 6


def test_what_was_measured_in_one_language_leaves_the_other_its_whole_effort() -> None:
    kernels = (NORMS.kernels["cuda"], NORMS.triton_kernels["cuda"])
    effort = Effort(exhaustive_up_to=0, trials=8, startup_trials=4, batch=4)
    known = dict.fromkeys(list(kernels[0].space.configs(PROBLEM, 64))[:8], 3.0)
    search = search_for(kernels, PROBLEM, 64, known, [PLAIN, IN_TRITON], effort, seed=0)
    assert search.total == 8
    assert {language_of(config) for batch in search.batches() for config in batch} == {TRITON}


# Source hashes


def test_the_cpp_kernels_hash_does_not_know_of_triton(edit_kernels: Callable[[str, str, str], None]) -> None:
    before = NORMS.source_hash("cuda"), NORMS.source_hash("cuda", IN_TRITON)
    edit_kernels("rms_norm.py", "1.0 / WIDTH", "1.00 / WIDTH")
    after = NORMS.source_hash("cuda"), NORMS.source_hash("cuda", IN_TRITON)
    assert before[0] == after[0]
    assert before[1] != after[1]


@pytest.mark.usefixtures("with_triton")
@pytest.mark.parametrize(("file", "stale"), [("rms_norm.py", IN_TRITON), ("rms_norm.cuh", PLAIN)])
def test_an_edited_kernel_makes_only_its_own_languages_winners_stale(
    file: str, stale: Config, edit_kernels: Callable[[str, str, str], None]
) -> None:
    winners = [winner(PLAIN, 1), winner(IN_TRITON, 64)]
    edit_kernels(file, "rsqrt", "rsqrt" + " ")
    assert [is_stale(each) for each in winners] == [each.config == stale for each in winners]
    fresh = Snapshot(Path("tuned.db"), True, H200, winners).buckets(PROBLEM, *NORMS.source_hashes("cuda"))
    assert [each.config for each in fresh] == [each.config for each in winners if each.config != stale]


@pytest.mark.usefixtures("without_triton")
def test_without_triton_only_the_cpp_winners_answer() -> None:
    snapshot = Snapshot(Path("tuned.db"), True, H200, [winner(PLAIN, 1), winner(IN_TRITON, 64)])
    hashes = NORMS.source_hashes("cuda")
    assert [each.tokens for each in snapshot.buckets(PROBLEM, *hashes)] == [1]
    assert snapshot.lookup(PROBLEM, 64, 64, *hashes).rule == "untuned"


@pytest.mark.usefixtures("without_triton")
def test_without_triton_its_winners_are_told_as_unused_and_not_as_stale() -> None:
    snapshot = Snapshot(Path("tuned.db"), True, H200, [winner(IN_TRITON, 64), winner(IN_TRITON, 256)])
    hashes = NORMS.source_hashes("cuda")
    answer = snapshot.lookup(PROBLEM, 64, 64, *hashes)
    assert (answer.rule, answer.winners) == ("untuned", ())
    assert (
        "was tuned at T=64, 256 on cuda:sm_90a:NVIDIA H200 with a kernel in Triton, which is not used" in answer.reason
    )
    steps = explain_lookup(snapshot, PROBLEM, 64, 64, *hashes)
    assert [step for step in steps if step.startswith(("stale", "unused"))] == [NO_TRITON]
    assert any(step.startswith(f"  T=64: {IN_TRITON}") for step in steps)


@pytest.mark.parametrize(
    ("triton", "states"),
    [
        ("with_triton", {1: "fresh", 64: "fresh", 256: STALE}),
        ("without_triton", {1: "fresh", 64: NO_TRITON, 256: STALE}),
    ],
)
def test_what_is_shown_of_winners_in_triton_is_what_a_lookup_makes_of_them(
    triton: str,
    states: dict[int, str],
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    request.getfixturevalue(triton)
    path = tmp_path / "tuned.db"
    with TunedDatabase(path) as database:
        for each in (winner(PLAIN, 1), winner(IN_TRITON, 64), winner(IN_TRITON, 256, source_hash="0ld")):
            database.record_winner(each)
    assert run(["show", "--database", str(path), "--json"]) == 0
    assert {shown["tokens"]: shown["state"] for shown in json.loads(capsys.readouterr().out)} == states
    buckets = Snapshot.load(path, H200).buckets(PROBLEM, *NORMS.source_hashes("cuda"))
    assert [each.tokens for each in buckets] == [tokens for tokens, state in states.items() if state == "fresh"]
    assert run(["report", str(tmp_path / "report.html"), "--database", str(path)]) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert [page.count(f"<td>{escape(state)}</td>") for state in ("fresh", NO_TRITON, STALE)] == [
        [*states.values()].count(state) for state in ("fresh", NO_TRITON, STALE)
    ]


@pytest.mark.usefixtures("with_triton")
def test_with_triton_the_winners_of_both_answer_for_a_range() -> None:
    snapshot = Snapshot(Path("tuned.db"), True, H200, [winner(PLAIN, 1), winner(IN_TRITON, 64)])
    answer = snapshot.lookup(PROBLEM, 1, 64, *NORMS.source_hashes("cuda"))
    assert [each.config for each in answer.winners] == [PLAIN, IN_TRITON]


# Plans


def test_a_plan_names_the_sources_of_the_kernels_it_runs() -> None:
    plain, other = NORMS.source_hash("cuda"), NORMS.source_hash("cuda", IN_TRITON)
    assert NORMS.plan_source("cuda", [PLAIN, None]) == plain
    assert NORMS.plan_source("cuda", [None]) == plain
    assert NORMS.plan_source("cuda", [IN_TRITON]) == other
    assert NORMS.plan_source("cuda", [IN_TRITON, PLAIN]) == "+".join(sorted([plain, other]))


def test_a_plan_of_two_languages_reads_back_and_knows_an_edited_kernel(
    edit_kernels: Callable[[str, str, str], None],
) -> None:
    source = NORMS.plan_source("cuda", [PLAIN, IN_TRITON])
    plan = Plan("sm_90a", PROBLEM, ((1, PLAIN), (64, IN_TRITON)), source)
    assert Plan.parse(str(plan)) == plan
    assert plan.made_for(NORMS.plan_source("cuda", plan.configs))
    edit_kernels("rms_norm.py", "1.0 / WIDTH", "1.00 / WIDTH")
    assert not plan.made_for(NORMS.plan_source("cuda", plan.configs))
    alone = Plan("sm_90a", PROBLEM, ((1, PLAIN),), NORMS.source_hash("cuda"))
    assert alone.made_for(NORMS.plan_source("cuda", alone.configs))


def test_a_config_of_no_space_makes_a_plan_unsuited() -> None:
    import torch

    from autofuse.runtime.dispatch import bind_plan
    from autofuse.targets import target_of

    cpu = torch.device("cpu")
    plan = Plan(target_of(cpu).arch, PROBLEM, ((1, IN_TRITON),), NORMS.source_hash("cpu"))
    with pytest.raises(UnsuitedPlan, match="not of the search space"):
        bind_plan(NORMS, plan, cpu)


# What is shown


def test_a_winner_is_compared_with_the_best_in_the_other_language(tmp_path: Path) -> None:
    slower = Config.of(IN_TRITON, NUM_WARPS=8)
    with TunedDatabase(tmp_path / "tuned.db") as database:
        for each in (trial(PLAIN, 1.0), trial(slower, 1.5), trial(IN_TRITON, 1.25)):
            database.record_trial(each)
        database.record_trial(replace(trial(Config.of(IN_TRITON, NUM_WARPS=2), 0.5), status="wrong"))
        best = database.record_winner(winner(PLAIN))
        rival = rival_of(database, best)
        assert rival is not None
        assert (rival.language, rival.config, rival.ratio) == (TRITON, IN_TRITON, 1.25)
        assert rival_of(database, winner(IN_TRITON)).ratio == 0.8  # type: ignore[union-attr]
        assert rival_of(database, winner(PLAIN, source_hash="0ld")) is None
        assert rival_of(database, winner(PLAIN, tokens=1)) is None


def test_show_says_which_language_won_and_by_how_much(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tuned.db"
    with TunedDatabase(path) as database:
        for each in (trial(PLAIN, 1.5), trial(IN_TRITON, 1.0)):
            database.record_trial(each)
        database.record_winner(winner(IN_TRITON))
        database.record_winner(winner(PLAIN, tokens=1))
    assert run(["show", "--database", str(path)]) == 0
    table = capsys.readouterr().out
    assert "triton, 1.50× the best in c++" in table
    assert run(["show", "--database", str(path), "--json"]) == 0
    assert '"language": "triton"' in capsys.readouterr().out
