"""Puts the tuned-config database under stress: many writers, damaged files, processes that are killed.

Counts what must not happen: rows that were committed and are gone, exceptions inside what ``torch.compile`` asks of the
database, files that were overwritten. Exit code 1 if there is one.

    python scripts/stress_db.py                 # all of it: a few minutes
    python scripts/stress_db.py --copies 100 --kills 20 --compiles 3

Copies are damaged, and processes killed, in several processes side by side (--jobs), each with a file of its own.
benchmarks/cpu/database_stress.json is what docs/database.md shows; scripts/database_tables.py --markdown puts it there.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import random
import select
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from autofuse.cache_db import Baseline, Trial, TunedDatabase, Winner, export_database, import_into
from autofuse.cache_db.pages import leaf_rows, read_pages
from autofuse.cores import usable_cores
from autofuse.graph.decide import Decider, Knowledge
from autofuse.graph.fusions import Site
from autofuse.graph.fusions.mla_dual_rms_norm import MlaDualRMSNorm
from autofuse.graph.report_store import last_reports
from autofuse.graph.settings import Settings
from autofuse.ops import Config, get_op
from autofuse.targets import target_of
from bench.machine import machine_facts
from bench.progress import Progress

__all__ = ["Outcome", "compiled_copies", "corrupted_copies", "kills", "unprivileged", "writers"]

CPU = torch.device("cpu")
OP = get_op("mla_dual_rms_norm")
Q_RANK, KV_RANK = 96, 40
PROBLEM = OP.make_problem(dtype="bf16", q_lora_rank=Q_RANK, kv_lora_rank=KV_RANK, cast_before_weight=True)
OLDEST = Path(__file__).resolve().parents[1] / "tests" / "schemas" / "m003_views.db"
LONGEST_LIFE_S = {"write": 0.2, "import": 1.0, "migration": 0.08}  # of a process that is to be killed


@dataclass
class Outcome:
    """What one kind of stress showed.

    Attributes:
        faults: what must not have happened, each with what it happened to.
        counts: what did happen.
    """

    name: str
    faults: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0


def trial(number: int, writer: int) -> Trial:
    config = Config.of(NUMBER=number, WRITER=writer)
    return Trial(target_of(CPU), PROBLEM, 1, config, "stress", "ok", time_us=1.0 + number)


def winner(tokens: int) -> Winner:
    config, source = OP.default_config("cpu", PROBLEM, tokens), OP.source_hash("cpu")
    return Winner(target_of(CPU), PROBLEM, tokens, config, source, 1.0, 0.1, "compile", 2.0, 2.0, 1.9, 2.1)


def writers(folder: Path, processes: int, rows: int) -> Outcome:
    """Processes that make one database and write into it at once: every row must be there."""
    outcome, path = Outcome(f"{processes} processes write {rows:,} rows each into one new file"), folder / "written.db"

    def write(number: int, committed: int) -> None:
        with TunedDatabase(path, busy_timeout_s=600.0) as database:
            for row in range(rows):
                database.record_trial(trial(row, number))
                os.write(committed, b".")

    children = [_forked(lambda committed, number=number: write(number, committed)) for number in range(processes)]
    _end(children, Progress("rows", processes * rows))
    for child in children:
        if child.code:
            outcome.faults.append(f"a writer ended with exit code {child.code}")
        if child.committed != rows:
            outcome.faults.append(f"a writer committed {child.committed} of {rows} rows")
    with TunedDatabase(path, read_only=True) as database:
        database.check()
        outcome.counts["rows that are there"] = len(database.every(Trial))
    if outcome.counts["rows that are there"] != processes * rows:
        outcome.faults.append(f"{processes * rows - outcome.counts['rows that are there']} rows are gone")
    return outcome


# Damaged files


def sound(folder: Path) -> Path:
    """A database with what a decision asks for."""
    path = folder / "sound.db"
    with TunedDatabase(path) as database, database.transaction():
        for tokens in (1, 64, 1024):
            database.record_winner(winner(tokens))
            database.record_baseline(Baseline(target_of(CPU), PROBLEM, tokens, "compile", 2.0, 0.1))
        for row in range(200):
            database.record_trial(trial(row, 0))
    return path


@contextmanager
def _as_it_is(path: Path) -> Iterator[None]:
    yield


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        yield


@contextmanager
def unprivileged() -> Iterator[None]:
    """As a user whom permissions bind, even where this runs as root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@contextmanager
def _read_only(path: Path) -> Iterator[None]:
    path.chmod(0o444)
    path.parent.chmod(0o555)
    try:
        with unprivileged():
            yield
    finally:
        path.parent.chmod(0o755)


def _cut(path: Path, chance: random.Random) -> None:
    os.truncate(path, chance.randrange(1, path.stat().st_size))


def _flip(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(chance.choice((1, 10, 1000))):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def _blank_page(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    page = chance.randrange(len(content) // 4096)
    content[page * 4096 : (page + 1) * 4096] = chance.choice((bytes(4096), chance.randbytes(4096)))
    path.write_bytes(content)


def _empty(path: Path, chance: random.Random) -> None:
    path.write_bytes(b"")


def _noise(path: Path, chance: random.Random) -> None:
    path.write_bytes(chance.randbytes(chance.randrange(1, 100_000)))


def _wrong_schema(path: Path, chance: random.Random) -> None:
    table = chance.choice(("winners", "trials", "digests", "provenance"))
    edits = [
        f"DROP TABLE {table}",
        f"ALTER TABLE {table} RENAME TO mine",
        "DROP VIEW winners_view; DROP VIEW coverage_view; ALTER TABLE winners DROP COLUMN gain",
        "DELETE FROM _sqlite_migrations",
        "INSERT INTO _sqlite_migrations (migration_set, name, applied_at) VALUES ('autofuse', 'm999_later', '')",
        "UPDATE winners SET config = 'ROWS=__import__(1)'",
        "UPDATE winners SET gain = x'00ff'",
        "UPDATE winners SET problem = cast(x'ff28' AS text)",
    ]
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA foreign_keys = OFF")
        connection.executescript(chance.choice(edits))
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _folder(path: Path, chance: random.Random) -> None:
    path.unlink()
    path.mkdir()


def _unchanged(path: Path, chance: random.Random) -> None:
    pass


def _foreign_log(path: Path, chance: random.Random) -> None:
    Path(f"{path}-wal").write_bytes(chance.randbytes(chance.randrange(1, 50_000)))


DAMAGE: dict[str, tuple[Callable[[Path, random.Random], None], Callable[[Path], object]]] = {
    "cut short": (_cut, _as_it_is),
    "bits flipped": (_flip, _as_it_is),
    "a page overwritten": (_blank_page, _as_it_is),
    "empty": (_empty, _as_it_is),
    "noise": (_noise, _as_it_is),
    "wrong schema": (_wrong_schema, _as_it_is),
    "a folder": (_folder, _as_it_is),
    "a log of noise": (_foreign_log, _as_it_is),
    "locked": (_unchanged, _locked),
    "read-only": (_unchanged, _read_only),
}


def corrupted_copies(folder: Path, copies: int, seed: int = 0, jobs: int = 1) -> Outcome:
    """What ``torch.compile`` asks of the database, asked of damaged copies: no exception, and no byte of them lost."""
    outcome = Outcome(f"{copies:,} damaged copies asked")
    for count, fault in _side_by_side(partial(_corrupted_copy, folder, sound(folder), seed), copies, jobs, "copies"):
        outcome.counts += count
        outcome.faults += fault
    return outcome


def _corrupted_copy(folder: Path, original: Path, seed: int, number: int) -> tuple[Counter[str], list[str]]:
    kind = [*DAMAGE][number % len(DAMAGE)]
    with _damaged(folder, original, kind, random.Random(f"{seed}:{number}")) as path:
        before = _held(path)
        try:
            fused = _ask(path)
        except BaseException as error:
            return Counter(), [f"copy {number} ({kind}): {type(error).__name__}: {error}"]
        # Where the file can be written, a site was noted in it; nothing that was there before may be gone.
        lost = [] if before <= _held(path) else [f"copy {number} ({kind}): it was overwritten"]
    return Counter(["fused" if fused else "left unfused"]), lost


def compiled_copies(folder: Path, copies: int, seed: int = 0) -> Outcome:
    """A model compiled with damaged copies: it must give what it gives unfused, with a warning at most."""
    outcome, original = Outcome(f"{copies:,} models compiled with damaged copies"), sound(folder)
    progress = Progress("models", copies)
    warnings, logger = _Counting(), logging.getLogger("autofuse")
    level, propagate = logger.level, logger.propagate
    logger.addHandler(warnings)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    # As another user, whom permissions bind, Inductor could not write into this one's cache.
    kinds = [kind for kind in DAMAGE if kind != "read-only" or os.geteuid() != 0]
    for number in range(copies):
        kind = kinds[number % len(kinds)]
        with _damaged(folder, original, kind, random.Random(f"{seed}:{number}")) as path:
            torch._dynamo.reset()
            warnings.count = 0
            try:
                with torch.no_grad():
                    module = _Norms()
                    expected = module(*module.inputs)
                    compiled = torch.compile(module, backend="autofuse", options={"autofuse.database": str(path)})
                    for mine, theirs in zip(compiled(*module.inputs), expected, strict=True):
                        torch.testing.assert_close(mine, theirs, rtol=0.02, atol=0.02)
                    fused = sum(site.fused for site in last_reports()[-1].sites)
                outcome.counts["fused" if fused else "left unfused"] += 1
                if kind in _UNUSABLE and (fused or warnings.count != 1):
                    outcome.faults.append(f"{kind}: {fused} sites fused, {warnings.count} warnings")
            except BaseException as error:
                outcome.faults.append(f"{kind}: {type(error).__name__}: {error}")
            if warnings.count > 1:
                outcome.faults.append(f"{kind}: {warnings.count} warnings")
            outcome.counts["warnings"] += warnings.count
            progress.advance()
    logger.removeHandler(warnings)
    logger.setLevel(level)
    logger.propagate = propagate
    return outcome


_UNUSABLE = ("a folder", "noise")
"""Damage that leaves nothing to read: such a graph must be unfused, with exactly one warning."""


class _Norm(torch.nn.Module):
    """The norm as Hugging Face's models write it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(width, dtype=torch.bfloat16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class _Norms(torch.nn.Module):
    """One site of ``mla_dual_rms_norm``."""

    def __init__(self) -> None:
        super().__init__()
        self.down = torch.nn.Linear(64, Q_RANK + KV_RANK, bias=False, dtype=torch.bfloat16)
        self.q, self.kv = _Norm(Q_RANK), _Norm(KV_RANK)
        self.inputs = (torch.randn(4, 64, dtype=torch.bfloat16),)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, kv = self.down(x).split([Q_RANK, KV_RANK], dim=-1)
        return self.q(q), self.kv(kv)


class _Counting(logging.Handler):
    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += record.levelno >= logging.WARNING


@contextmanager
def _damaged(folder: Path, original: Path, kind: str, chance: random.Random) -> Iterator[Path]:
    damage, circumstances = DAMAGE[kind]
    with tempfile.TemporaryDirectory(dir=folder) as name:
        Path(name).chmod(0o755)
        path = Path(shutil.copyfile(original, Path(name) / "tuned.db"))
        damage(path, chance)
        with circumstances(path):
            yield path


def _held(path: Path) -> set[object]:
    """Every row that the file's pages hold, whether or not SQLite reads them; all its bytes, if it holds none."""
    if not path.is_file() or path.stat().st_size == 0:
        return set()
    return {*leaf_rows(read_pages(path, Path(f"{path}-wal")))} or {path.read_bytes()}


def _ask(path: Path) -> bool:
    """What a compilation does with the database: it looks a site up, says why, and notes what nobody measured."""
    settings, _ = Settings.parse({"autofuse.database": str(path)})
    known = Knowledge.of(CPU, settings)
    decider = Decider(settings, {CPU: known}, None)
    params = {"dtype": torch.bfloat16, "q_lora_rank": Q_RANK, "kv_lora_rank": KV_RANK, "cast_before_weight": True}
    site = Site(MlaDualRMSNorm.name, OP.name, tuple(params.items()), 16, CPU, (), None)
    decisions = [decider.decide(MlaDualRMSNorm(), one) for one in (site, replace(site, tokens=1 << 16))]
    decider.remember_untuned()
    return decisions[0].fuses


# Killed processes


def kills(folder: Path, count: int, seed: int = 0, jobs: int = 1) -> Outcome:
    """Processes killed while they write, import and upgrade: what was committed is there, and nothing by half."""
    outcome = Outcome(f"{count:,} × kill -9")
    source = folder / "source.db"
    with TunedDatabase(source) as database, database.transaction():
        for tokens in range(1, 400):
            database.record_winner(winner(tokens))
        export_database(database, folder / "source.jsonl")
    for counts, faults in _side_by_side(partial(_kill, folder, _old(folder), seed), count, jobs, "kills"):
        outcome.counts += counts
        outcome.faults += faults
    return outcome


def _kill(shared: Path, old: Path, seed: int, number: int) -> tuple[Counter[str], list[str]]:
    kind, check = (("write", _kill_write), ("import", _kill_import), ("migration", _kill_migration))[number % 3]
    with tempfile.TemporaryDirectory(dir=shared) as name:
        life_s = random.Random(f"{seed}:{number}").random() * LONGEST_LIFE_S[kind]
        try:
            return Counter([check(Path(name), shared, old, life_s)]), []
        except Exception as error:
            return Counter(), [f"kill {number} during {kind}: {type(error).__name__}: {error}"]


def _old(folder: Path) -> Path:
    """A database of the oldest schema, so large that its upgrade takes a while."""
    path = Path(shutil.copyfile(OLDEST, folder / "old.db"))
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(
            "WITH RECURSIVE n(i) AS (SELECT 1000 UNION ALL SELECT i + 1 FROM n WHERE i < 6000)"
            " INSERT INTO trials SELECT target, problem, i, config, source_hash, status, message, time_us, spread_us,"
            " error, compile_s, registers, spill_bytes, shared_bytes, provenance, measured_at"
            " FROM n JOIN (SELECT * FROM trials WHERE status = 'ok' LIMIT 1)"
        )
        connection.commit()
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return path


def _kill_write(folder: Path, shared: Path, old: Path, life_s: float) -> str:
    path = folder / "tuned.db"

    def write(committed: int) -> None:
        with TunedDatabase(path) as database:
            for row in range(1_000_000):
                database.record_trial(trial(row, 0))
                os.write(committed, b".")

    child = _killed(write, life_s)
    with TunedDatabase(path) as database:
        database.check()
        rows = len(database.every(Trial))
        if rows not in (child.committed, child.committed + 1):  # the last one before it could be told
            raise AssertionError(f"{child.committed} rows were committed, {rows} are there")
        database.record_trial(trial(0, 1))
    return f"write: killed {'after' if rows else 'before'} the first commit"


def _kill_import(folder: Path, shared: Path, old: Path, life_s: float) -> str:
    path = folder / "tuned.db"
    with TunedDatabase(path) as database:
        database.record_trial(trial(0, 0))
        database.record_winner(winner(1 << 16))

    def bring_in(committed: int) -> None:
        with TunedDatabase(path) as database:
            import_into(database, shared / "source.jsonl")
            os.write(committed, b".")

    child = _killed(bring_in, life_s)
    with TunedDatabase(path) as database:
        database.check()
        if len(database.every(Trial)) != 1:
            raise AssertionError("a row from before the import is gone")
        came = len(database.every(Winner, candidates=True)) - 1
    if came not in (0, 399) or (child.committed and came != 399):
        raise AssertionError(f"{came} of 399 winners came in")
    return f"import: {'whole' if came else 'nothing'} came in"


def _kill_migration(folder: Path, shared: Path, old: Path, life_s: float) -> str:
    path = Path(shutil.copyfile(old, folder / "tuned.db"))

    def upgrade(committed: int) -> None:
        with TunedDatabase(path):
            os.write(committed, b".")

    child = _killed(upgrade, life_s)
    with closing(sqlite3.connect(path)) as connection:
        upgraded = bool(connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'history'").fetchone())
    if child.committed and not upgraded:
        raise AssertionError("an upgrade is gone")
    with TunedDatabase(path) as database:
        database.check()
        if len(database.every(Trial)) != 5009:
            raise AssertionError(f"{len(database.every(Trial))} of 5009 rows are there")
    backups = [file for file in folder.iterdir() if ".before-" in file.name]
    if not backups:
        raise AssertionError("there is no backup")
    for backup in backups:
        with closing(sqlite3.connect(backup)) as connection:
            if connection.execute("SELECT count(*) FROM trials").fetchone()[0] != 5009:
                raise AssertionError(f"{backup.name} is not whole")
    return f"migration: killed {'after' if upgraded else 'before'} its commit"


@dataclass
class _Child:
    pid: int
    pipe: int
    committed: int = 0
    code: int = 0


def _forked(work: Callable[[int], None]) -> _Child:
    """Another process that does ``work`` and writes a byte into its argument for each commit that it was told of."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(reading)
            work(writing)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    return _Child(pid, reading)


def _end(children: Iterable[_Child], progress: Progress | None = None) -> None:
    """Waits for processes to end, and counts the commits that they were told of."""
    told_by = {child.pipe: child for child in children}
    while told_by:
        for pipe in select.select([*told_by], [], [], 5.0)[0]:
            told, child = len(os.read(pipe, 1 << 16)), told_by[pipe]
            child.committed += told
            if progress:
                progress.advance(told)
            if not told:
                os.close(pipe)
                child.code = os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])
                del told_by[pipe]
        if progress:
            progress.advance(0)


def _killed(work: Callable[[int], None], life_s: float) -> _Child:
    child = _forked(work)
    time.sleep(life_s)
    os.kill(child.pid, signal.SIGKILL)
    _end([child])
    if child.code not in (0, -signal.SIGKILL):
        raise AssertionError(f"it ended by itself, with exit code {child.code}")
    return child


Answer = TypeVar("Answer")


def _side_by_side(work: Callable[[int], Answer], count: int, jobs: int, what: str) -> Iterator[Answer]:
    """``work`` of 0 to ``count`` - 1, in that order; with several ``jobs``, in as many processes."""
    progress = Progress(what, count)
    if jobs == 1:
        for number in range(count):
            yield work(number)
            progress.advance()
        return
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        answers = pool.imap(work, range(count))
        while progress.done < count:
            try:
                yield answers.next(timeout=5.0)
                progress.advance()
            except multiprocessing.TimeoutError:
                progress.advance(0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--writers", type=int, default=16, help="processes that write at once")
    parser.add_argument("--rows", type=int, default=1000, help="rows of each")
    parser.add_argument("--copies", type=int, default=1000, help="corrupted copies to look something up in")
    parser.add_argument("--compiles", type=int, default=20, help="corrupted copies to compile a model with")
    parser.add_argument("--kills", type=int, default=200, help="processes to kill")
    parser.add_argument("--jobs", type=int, default=max(1, usable_cores() // 2), help="processes side by side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the outcomes here")
    args = parser.parse_args()
    logging.getLogger("autofuse").setLevel(logging.ERROR)
    facts, outcomes = machine_facts(), []
    with tempfile.TemporaryDirectory(prefix="autofuse-stress-") as name:
        os.chmod(name, 0o755)
        for stress in (
            lambda folder: writers(folder, args.writers, args.rows),
            lambda folder: kills(folder, args.kills, args.seed, args.jobs),
            lambda folder: corrupted_copies(folder, args.copies, args.seed, args.jobs),
            lambda folder: compiled_copies(folder, args.compiles, args.seed),
        ):
            with tempfile.TemporaryDirectory(dir=name) as folder:
                os.chmod(folder, 0o755)
                begin = time.perf_counter()
                outcome = stress(Path(folder))
                outcome.seconds = round(time.perf_counter() - begin, 1)
            outcomes.append(outcome)
            print(f"{outcome.name}: {len(outcome.faults)} faults, {outcome.seconds} s", flush=True)
            for line in (*(f"{what}: {count}" for what, count in sorted(outcome.counts.items())), *outcome.faults[:20]):
                print(f"  {line}")
    if args.json:
        content = {**facts, "outcomes": [vars(outcome) for outcome in outcomes]}
        args.json.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return 1 if any(outcome.faults for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
