"""Kills a CPU tuning with SIGKILL at random moments, and checks that nothing committed is lost or made again.

Each run goes on where the one before was killed, until a problem is tuned; then comes the next problem. A trial counts
as committed as soon as the tuner tells of it. At the end all is run once more without a kill.

    python scripts/kill_tune.py --kills 200
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import signal
import sqlite3
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from autofuse.cache_db import Trial, TunedDatabase
from autofuse.ops import Problem, get_op
from autofuse.targets import target_of
from autofuse.tuner.budgets import Effort
from autofuse.tuner.job import Event, TrialDone, tune_buckets
from autofuse.tuner.queue import Bucket
from tiny_effort import TINY

CPU = torch.device("cpu")
TOKENS = (1, 16)
# Races decide here: a trial that is pruned must not be lost either.
EFFORT = replace(
    TINY,
    exhaustive_up_to=0,
    trials=8,
    startup_trials=4,
    batch=4,
    trial_rounds=3,
    race_margin=Effort.race_margin,
    cpu_round_us=200.0,
    attempts=1,
)
LONGEST_RUN_S = 600.0

DIED = "while this config ran"
"""In the message of a trial whose process did not live to record what came of it."""

Told = tuple[str, int, str, str, float | None, str]
"""Problem, tokens, config, status, time, and when it was measured: what a committed row must go on saying."""


@dataclass
class Tally:
    """What was seen so far."""

    committed: dict[tuple[str, int, str], Told] = field(default_factory=dict)
    lost: int = 0
    repeated: int = 0
    duplicates: int = 0

    def take(self, told: list[Told]) -> None:
        """What one run told of."""
        for each in told:
            key = each[:3]
            before = self.committed.get(key)
            if before is not None and before[3] in ("ok", "pruned"):
                self.repeated += 1
                print(f"measured again: {before} as {each}", file=sys.stderr)
            self.committed[key] = each

    def check(self, path: Path) -> None:
        """That the database holds all that was committed, as it was or as the choice of a winner left it, and once."""
        with TunedDatabase(path) as database:  # for writing: it is looked through for damage
            trials = {told_of(trial)[:3]: trial for trial in database.every(Trial)}
        before = dict(self.committed)
        pruned = {key for key, told in before.items() if told[3] == "pruned"}
        finalists = [key for key, trial in trials.items() if trial.status == "ok" and not trial.message]
        contested = {key[:2] for key in finalists if key not in pruned}
        for key, told in before.items():
            trial = trials.get(key)
            if trial is not None and told_of(trial) == told:
                continue
            if trial is None or not rewritten_in_the_end(told, trial, contested=key[:2] in contested):
                self.lost += 1
                print(f"lost: {told}, there is {trial}", file=sys.stderr)
            elif DIED in trial.message:
                del self.committed[key]  # it is to be measured once more
            else:
                self.committed[key] = told_of(trial)
        with closing(sqlite3.connect(path)) as connection:
            columns = "target, problem, tokens, config, source_hash"
            query = f"SELECT count(*) FROM (SELECT 1 FROM trials GROUP BY {columns} HAVING count(*) > 1)"
            self.duplicates += connection.execute(query).fetchone()[0]


def told_of(trial: Trial) -> Told:
    return (str(trial.problem), trial.tokens, str(trial.config), trial.status, trial.time_us, trial.measured_at)


def rewritten_in_the_end(told: Told, now: Trial, contested: bool) -> bool:
    """Whether the choice of the winner, which no event tells of, may have made ``now`` of a trial: a finalist failed;
    or no finalist was left, and what had been pruned was timed to the end.

    Args: contested: whether the bucket has a trial that is right, and was not pruned before.
    """
    *_, status, _, measured_at = told
    if now.measured_at < measured_at:
        return False
    if status == "ok":
        return now.failed and DIED not in now.message  # a finalist is not recorded before it fails
    return status == "pruned" and not contested


def problem(number: int) -> Problem:
    width = 96 + 16 * number
    return get_op("mla_dual_rms_norm").make_problem(
        dtype="bf16", q_lora_rank=width, kv_lora_rank=64, cast_before_weight=True
    )


def run(path: Path, which: list[Problem], kill_after_s: float | None) -> tuple[list[Told], bool]:
    """Tunes in a process of its own, killed after so many seconds. What it told of, and whether it came to its end."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        _tune(path, which, theirs)
    os.close(theirs)
    end = time.monotonic() + (LONGEST_RUN_S if kill_after_s is None else kill_after_s)
    text, ended = b"", False
    while not ended and (left := end - time.monotonic()) > 0:
        if select.select([ours], [], [], left)[0]:
            part = os.read(ours, 1 << 16)
            text, ended = text + part, not part
    if not ended:
        os.kill(child, signal.SIGKILL)
        while part := os.read(ours, 1 << 16):
            text += part
    os.close(ours)
    _, status = os.waitpid(child, 0)
    told = [tuple(json.loads(line)) for line in text.splitlines(keepends=True) if line.endswith(b"\n")]
    if ended and os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"a run ended with {os.waitstatus_to_exitcode(status)}; see its output above")
    return told, ended  # type: ignore[return-value]


def _tune(path: Path, which: list[Problem], pipe: int) -> None:
    """In the child."""

    def tell(event: Event) -> None:
        if isinstance(event, TrialDone):
            os.write(pipe, json.dumps(told_of(event.trial)).encode() + b"\n")

    code = 1
    try:
        buckets = [Bucket(each, tokens) for each in which for tokens in TOKENS]
        with TunedDatabase(path) as database:
            tune_buckets(buckets, CPU, database, EFFORT, on_event=tell)
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the outcome here")
    options = parser.parse_args()
    target_of(CPU)
    source, tally = random.Random(options.seed), Tally()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="autofuse-kill-") as folder:
        path = Path(folder) / "tuned.db"
        warm = time.monotonic()
        told, _ = run(path, [problem(0)], None)
        whole_s = time.monotonic() - warm
        tally.take(told)
        kills, number, runs = 0, 1, 1
        while kills < options.kills:
            told, ended = run(path, [problem(number)], source.uniform(0.0, whole_s))
            runs += 1
            tally.take(told)
            tally.check(path)
            kills += not ended
            number += ended
            print(f"{kills} kills, {len(tally.committed)} trials committed, {number} problems", flush=True)
        which = [problem(each) for each in range(number + 1)]
        told, _ = run(path, which, None)
        tally.take(told)
        tally.check(path)
        with TunedDatabase(path, read_only=True) as database:
            winners = len(database.winners())
            died = sum("died" in trial.message for trial in database.failures())
    wanted = len(which) * len(TOKENS)
    outcome = {
        "kills": kills,
        "runs": runs + 1,
        "problems": len(which),
        "committed": len(tally.committed),
        "lost": tally.lost,
        "repeated": tally.repeated,
        "duplicates": tally.duplicates,
        "killed_twice": died,
        "winners": winners,
        "of": wanted,
        "seconds": round(time.monotonic() - begin),
    }
    print(json.dumps(outcome))
    if options.json:
        options.json.write_text(json.dumps(outcome, indent=2) + "\n", encoding="utf-8")
    right = tally.lost == tally.repeated == tally.duplicates == 0 and winners == wanted
    print("nothing is lost, nothing made twice, and all is tuned" if right else "FAILED")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
