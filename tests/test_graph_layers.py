"""A site is decided by the databases below the user's own as by the user's own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from deciding import CPU, PROBLEM, compared, decide, tuned, winner

from autofuse.cache_db import Snapshot, Trial, TunedDatabase, default_path
from autofuse.graph import notice
from autofuse.graph.evidence import read_shared, read_tuned
from autofuse.graph.ranks import Shared
from autofuse.ops import get_op
from autofuse.targets import target_of


@pytest.fixture(autouse=True)
def _warn_anew() -> None:
    notice.warn_once.cache_clear()


@pytest.fixture
def below(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Fills the n-th database below the user's own, which is absent unless a test fills it, too."""
    paths = [tmp_path / "site.db", tmp_path / "lowest.db"]
    monkeypatch.setenv("AUTOFUSE_DB_PATH", os.pathsep.join(map(str, paths)))

    def filled(depth: int, fill: Callable[[], object]) -> Path:
        with monkeypatch.context() as patch:
            patch.setenv("AUTOFUSE_DB", str(paths[depth]))
            fill()
        return paths[depth]

    return filled


def trial(tokens: int, status: str) -> Trial:
    one = winner(tokens, 1.5)
    time_us = {"time_us": 10.0} if status == "ok" else {}
    return Trial(one.target, one.problem, tokens, one.config, one.source_hash, status, **time_us)


def tried(*trials: Trial) -> None:
    with TunedDatabase(default_path()) as database:
        for one in trials:
            database.record_trial(one)


@pytest.mark.parametrize("depth", [0, 1])
def test_a_winner_over_eager_code_is_fused_by_what_its_own_database_compared(
    depth: int, below: Callable[..., Path]
) -> None:
    below(depth, lambda: compared(winner(16, 1.5, baseline="eager")))
    decision = decide(16)
    assert (decision.fuses, decision.rule) == (True, "exact")


def test_what_another_database_compared_says_nothing_of_a_winner(below: Callable[..., Path]) -> None:
    tuned(winner(16, 1.5, baseline="eager"))
    below(0, lambda: compared(winner(16, 1.5, baseline="eager")))
    assert (decide(16).fuses, decide(16).rule) == (False, "baseline")


def test_the_nearest_row_may_be_in_any_database(below: Callable[..., Path]) -> None:
    site = below(0, lambda: tuned(winner(1, 1.5)))
    assert "it differs in T: 1, which does not serve 4096" in decide(4096).nearest
    site.unlink()
    below(1, lambda: tuned(winner(1, 1.5, source_hash="0123")))
    assert "it differs in kernel source: 0123" in decide(1).nearest
    below(0, lambda: tried(trial(1, "ok")))
    assert "kernel source: 0123" in decide(1).nearest


def test_without_any_row_each_database_is_named(below: Callable[..., Path]) -> None:
    site = below(0, tuned)
    assert decide(16).nearest == "; ".join(f"{path} has no row of mla_dual_rms_norm" for path in (default_path(), site))


def test_a_failure_is_one_wherever_it_was_measured(below: Callable[..., Path]) -> None:
    below(1, lambda: tried(trial(16, "wrong")))
    assert "no config works (1 wrong)" in decide(16).reason
    below(0, lambda: tried(trial(64, "ok")))
    assert "no config works" not in decide(16).reason


def received() -> Shared:
    """What another rank gets of the databases that are here."""
    return Shared.decode(read_shared(default_path(), target_of(CPU)).encode())


def rules(snapshot: Snapshot | None) -> list[str]:
    assert snapshot is not None
    source = get_op(PROBLEM.op).source_hash("cpu")
    return [snapshot.lookup(PROBLEM, tokens, tokens, source).rule for tokens in (16, 1024)]


@pytest.mark.parametrize("own", [True, False])
def test_another_rank_looks_up_as_the_one_that_read(own: bool, below: Callable[..., Path]) -> None:
    if own:
        tuned(winner(1024, 1.5), winner(2048, 1.5, standing="candidate"))
    below(1, lambda: compared(winner(16, 1.5, baseline="eager")))
    here = Snapshot.load(None, target_of(CPU))
    there = received().snapshot(default_path(), target_of(CPU))
    assert there is not None
    assert [(layer.path, layer.present, layer.digest) for layer in there.layers()] == [
        (layer.path, layer.present, layer.digest) for layer in here.layers()
    ]
    assert rules(there) == rules(here) == ["exact", "exact" if own else "untuned"]
    assert [len(layer.compared) for layer in received().layers] == [0, 1]


def test_another_rank_is_told_of_candidates() -> None:
    tuned(winner(16, 1.5, standing="candidate"))
    assert rules(received().snapshot(default_path(), target_of(CPU))) == ["candidate"] * 2


def test_another_rank_is_not_told_of_a_lower_database_that_is_broken(
    below: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    below(1, lambda: tuned(winner(16, 1.5)))
    (default_path().parent / "site.db").write_bytes(b"a note\n" * 999)
    assert rules(received().snapshot(default_path(), target_of(CPU))) == ["exact", "untuned"]
    assert "a database of AUTOFUSE_DB_PATH is passed over" in caplog.text
    default_path().write_bytes(b"a note\n" * 999)
    assert (received().layers, bool(received().fault)) == ((), True)


def test_what_was_tuned_for_other_ranks_is_known_in_the_uppermost_database(below: Callable[..., Path]) -> None:
    below(0, lambda: tuned(winner(16, 1.5)))
    before = received()
    tuned(winner(1024, 1.5))
    newer = read_tuned(default_path(), target_of(CPU), PROBLEM)
    assert [layer.path for layer in newer.layers] == [default_path()]
    assert before.with_newer(newer) == received()
    assert before.with_newer(Shared(fault="why")) == before
