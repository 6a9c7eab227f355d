"""The tuned-config database: one SQLite file that keeps everything that was measured."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import TracebackType

from autofuse.cache_db.faults import RESTORE, explain_sqlite_error, fault
from autofuse.cache_db.files import BUSY_TIMEOUT_S, default_path
from autofuse.cache_db.opening import open_copy, open_file
from autofuse.cache_db.records import Baseline, Captured, Trial, Winner, changed_digest, now, printable, winners_digest
from autofuse.cache_db.rows import (
    KEY_OF,
    KINDS,
    TABLE_OF,
    RecordT,
    Row,
    from_row,
    key_of,
    problem_row,
    stamped,
    target_row,
    to_row,
)
from autofuse.cache_db.schema import columns_of
from autofuse.errors import BadInput
from autofuse.ops.problem import Config, Problem
from autofuse.targets.base import Target

__all__ = ["FormerWinner", "Provenance", "TunedDatabase", "provenance_id"]

_logger = logging.getLogger("autofuse.cache_db")

Provenance = Mapping[str, str | int | float | None]

_DECIDES = "standing <> 'candidate'"


@dataclass(frozen=True)
class FormerWinner:
    """A winner that another took the place of, at ``replaced_at`` (UTC, in ``TIME_FORMAT``)."""

    replaced_at: str
    winner: Winner


class TunedDatabase:
    """Everything that was measured, in one SQLite file. A context manager.

    Open for writing, it makes the file and its folder where they are missing, and shares it with any number of other
    processes: readers never wait, writers wait for each other up to ``busy_timeout_s``. Every record commits at once.
    Open read-only, it is the content at the time of opening, and nothing in the file's folder is touched.

    Methods raise DatabaseError, whose one line names the file, what is wrong and what to do. A file that is not ours,
    or broken, is never written to. An object may be used from several threads, but not across a fork.

    Attributes:
        path: the file.
        read_only: whether ``record_*`` is refused.

    Example:
        >>> import tempfile
        >>> from autofuse.ops.problem import Config
        >>> target, problem = Target("cpu", "x86-64-v4", "EPYC"), Problem("op", (("width", 512),))
        >>> with tempfile.TemporaryDirectory() as folder, TunedDatabase(Path(folder) / "tuned.db") as database:
        ...     trial = Trial(target, problem, 64, Config.of(ROWS=1), "a1b2", "ok", time_us=6.0, error=0.2)
        ...     _ = database.record_trial(trial)
        ...     [str(known.config) for known in database.trials(target, problem, 64, "a1b2")]
        ['ROWS=1']
    """

    def __init__(
        self, path: Path | None = None, *, read_only: bool = False, busy_timeout_s: float = BUSY_TIMEOUT_S
    ) -> None:
        """Opens ``path``, else ``default_path()``. Raises AbsentDatabaseError (read-only), DatabaseError."""
        self.path = Path(path) if path is not None else default_path()
        self.read_only = read_only
        self._lock = threading.RLock()
        with self._explained():
            self._db = (open_copy if read_only else open_file)(self.path, busy_timeout_s)
            self._db.execute("PRAGMA foreign_keys = ON")
        self._identity = None if read_only else self._file_identity()
        _logger.debug("opened %s%s", self.path, " read-only" if read_only else "")

    def __enter__(self) -> TunedDatabase:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; closing twice is fine."""
        with self._explained():
            self._db.close()

    # Writing

    def record_provenance(self, fields: Provenance) -> str:
        """Remembers what else could have changed a timing (driver, toolkit, compiler…); returns its id.

        The same fields give the same id. Raises BadInput for values that are not text, finite numbers or None.
        """
        clean = _clean(fields)
        row: dict[str, object] = {"id": provenance_id(clean), "fields": json.dumps(clean, sort_keys=True)}
        for name in ("host", "autofuse", "torch", "driver", "toolkit", "compiler"):
            value = clean.get(name)
            row[name] = None if value is None else str(value)
        with self.transaction():
            self._insert("provenance", row, "IGNORE")
        return str(row["id"])

    def record_trial(self, trial: Trial) -> Trial:
        """Remembers a trial in place of one of the same key; returns it with its time filled in."""
        return self.record(trial)

    def record_baseline(self, baseline: Baseline) -> Baseline:
        """Remembers a baseline in place of an older one of its kind; returns it with its time filled in."""
        return self.record(baseline)

    def record_winner(self, winner: Winner) -> Winner:
        """Remembers a bucket's winner in place of the one before, which is kept in ``history``; returns it with its
        time filled in.
        """
        return self.record(winner)

    def record_captured(self, site: Captured) -> Captured:
        """Remembers a site that is to be measured; returns it with its time filled in."""
        return self.record(site)

    def record(self, record: RecordT) -> RecordT:
        """Remembers a record of any kind in place of one of the same key; returns it with its time filled in."""
        record = stamped(record)
        with self.transaction():
            self._insert("targets", target_row(record.target), "IGNORE")
            self._insert("problems", problem_row(record.problem), "IGNORE")
            if isinstance(record, Winner):
                self._replace_winner(record)
            else:
                self._insert(TABLE_OF[type(record)], to_row(record), "REPLACE")
        return record

    def record_former(self, former: FormerWinner) -> None:
        """Remembers what was a bucket's winner once."""
        with self.transaction():
            self._insert("targets", target_row(former.winner.target), "IGNORE")
            self._insert("problems", problem_row(former.winner.problem), "IGNORE")
            self._insert("history", {**to_row(former.winner), "replaced_at": former.replaced_at}, "ABORT")

    def roll_back(self, target: Target, problem: Problem, tokens: int) -> Winner | None:
        """Makes the winner before the present one the winner again, and forgets the present one; returns it.

        One whose config has failed since is passed over, and forgotten as well. None where there was none before:
        nothing changes.
        """
        key = {"target": str(target), "problem": str(problem), "tokens": tokens}
        with self.transaction():
            history = self.history(target, problem, tokens)
            for passed, former in enumerate(history):
                if self._fails(former.winner):
                    continue
                self._replace_winner(former.winner, keep=False)
                last = f"SELECT seq FROM history WHERE {_equal(key)} ORDER BY seq DESC LIMIT {passed + 1}"
                self._db.execute(f"DELETE FROM history WHERE seq IN ({last})", key)
                return former.winner
        return None

    def forget_winner(self, winner: Winner) -> None:
        """Removes the winner of the same key, whatever it is; nothing happens where there is none."""
        key = key_of(winner)
        with self.transaction():
            self._db.execute(f"DELETE FROM winners WHERE {_equal(key)}", key)
            self._write_digest(winner.target, None)

    def forget_trial(self, trial: Trial) -> None:
        """Removes the trial of the same key, whatever its outcome; nothing happens where there is none."""
        key = key_of(trial)
        with self.transaction():
            self._db.execute(f"DELETE FROM trials WHERE {_equal(key)}", key)

    def trim_history(self, keep: int) -> None:
        """Removes winners of before but the last ``keep`` of each bucket."""
        newer = "target = h.target AND problem = h.problem AND tokens = h.tokens AND seq > h.seq"
        with self.transaction():
            self._db.execute(
                "DELETE FROM history WHERE seq IN (SELECT seq FROM history AS h"
                f" WHERE (SELECT count(*) FROM history WHERE {newer}) >= ?)",
                [keep],
            )

    def drop_orphans(self) -> int:
        """Removes provenance, problems and targets that nothing names; returns how many of the first."""
        with self.transaction():
            gone = 0
            for parent, column in (("problems", "problem"), ("targets", "target"), ("provenance", "provenance")):
                named = " UNION ".join(
                    f"SELECT {column} FROM {table}"
                    for table in (*TABLE_OF.values(), "history")
                    if column in columns_of(table)
                )
                gone = self._db.execute(
                    f"DELETE FROM {parent} WHERE id NOT IN (SELECT {column} FROM ({named}) WHERE {column} NOT NULL)"
                ).rowcount
            return gone

    def compact(self) -> None:
        """Gives the space of what was removed back to the file system."""
        with self._lock, self._explained():
            self._db.execute("VACUUM")

    def forget_captured(self, site: Captured) -> None:
        """Removes a site, whenever it was seen; nothing happens where it is unknown."""
        key = key_of(site)
        with self.transaction():
            self._db.execute(f"DELETE FROM captured WHERE {_equal(key)}", key)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Everything recorded inside is committed together, or not at all if an exception leaves it. May be nested."""
        if self.read_only:
            raise fault(self.path, "is open for reading only", "open it with read_only=False")
        with self._lock, self._explained():
            connection = self._db.conn
            if connection.in_transaction:
                yield
                return
            self._check_identity()
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    # Reading

    def trials(self, target: Target, problem: Problem, tokens: int, *source_hashes: str) -> list[Trial]:
        """All trials of one bucket with these versions of its kernels, one for each language: the fastest first,
        failures last. No candidates.
        """
        key, where = _of_sources(target, problem, tokens, source_hashes)
        return self._select(Trial, f"{where} AND {_DECIDES} ORDER BY time_us IS NULL, time_us, config", key)

    def priors(self, target: Target, problem: Problem, tokens: int, *source_hashes: str) -> list[Config]:
        """The configs that another machine found good for this bucket and these kernels, the fastest first: worth
        measuring here before others.
        """
        key, where = _of_sources(target, problem, tokens, source_hashes)
        found: list[Trial | Winner] = []
        for kind, good in ((Winner, "1"), (Trial, "status = 'ok'")):
            found += self._select(kind, f"{where} AND standing IN ('trusted', 'candidate') AND {good}", key)
        found.sort(key=lambda record: (record.time_us, str(record.config)))
        return list(dict.fromkeys(record.config for record in found))

    def history(
        self, target: Target | None = None, problem: Problem | None = None, tokens: int | None = None, last: int = -1
    ) -> list[FormerWinner]:
        """What were winners once, the one that was replaced last first; at most ``last``. None means any."""
        names = ", ".join(field.name for field in fields(Winner))
        where = (
            "(:target IS NULL OR target = :target) AND (:problem IS NULL OR problem = :problem)"
            " AND (:tokens IS NULL OR tokens = :tokens)"
        )
        wanted = {"target": target and str(target), "problem": problem and str(problem), "tokens": tokens, "last": last}
        with self._reading():
            query = f"SELECT replaced_at, {names} FROM history WHERE {where} ORDER BY seq DESC LIMIT :last"
            rows = [dict(row) for row in self._db.query(query, wanted)]
            return [FormerWinner(str(row.pop("replaced_at")), from_row(Winner, row)) for row in rows]

    def failures(
        self, target: Target | None = None, op: str | None = None, problem: Problem | None = None
    ) -> list[Trial]:
        """Trials that failed, by status and message; None means any."""
        failed = (trial for trial in self.every(Trial, target, op, problem) if trial.failed)
        return sorted(failed, key=lambda trial: (trial.status, trial.message))

    def baselines(self, target: Target, problem: Problem, tokens: int) -> dict[str, Baseline]:
        """Kind → baseline of one bucket. No candidates."""
        key = {"target": str(target), "problem": str(problem), "tokens": tokens}
        found = self._select(Baseline, f"{_equal(key)} AND {_DECIDES} ORDER BY kind", key)
        return {baseline.kind: baseline for baseline in found}

    def winners(
        self, target: Target | None = None, op: str | None = None, problem: Problem | None = None
    ) -> list[Winner]:
        """Winners by target, problem and tokens, stale ones too, but no candidates; None means any."""
        return self.every(Winner, target, op, problem)

    def winner(self, target: Target, problem: Problem, tokens: int) -> Winner | None:
        """The winner of exactly this bucket, unless that is a candidate."""
        key = {"target": str(target), "problem": str(problem), "tokens": tokens}
        return next(iter(self._select(Winner, f"{_equal(key)} AND {_DECIDES}", key)), None)

    def captured(self, target: Target | None = None) -> list[Captured]:
        """Sites that are still to be measured, by target, problem and tokens."""
        return self.every(Captured, target)

    def every(
        self,
        kind: type[RecordT],
        target: Target | None = None,
        op: str | None = None,
        problem: Problem | None = None,
        *,
        candidates: bool = False,
    ) -> list[RecordT]:
        """All records of one kind, in the order of their keys; None means any. Candidates only if asked for."""
        where = (
            "(:target IS NULL OR target = :target) AND (:problem IS NULL OR problem = :problem)"
            " AND (:op IS NULL OR problem IN (SELECT id FROM problems WHERE op = :op))"
        )
        wanted = {"target": target and str(target), "problem": problem and str(problem), "op": op}
        if not candidates and kind is not Captured:
            where += f" AND {_DECIDES}"
        return self._select(kind, f"{where} ORDER BY {', '.join(KEY_OF[kind])}", wanted)

    def same_key(self, record: RecordT) -> RecordT | None:
        """The record that recording ``record`` would replace."""
        key = key_of(record)
        return next(iter(self._select(type(record), _equal(key), key)), None)

    def targets(self) -> list[Target]:
        """Every target that anything is recorded for, in the order of their canonical forms."""
        sources = " UNION ".join(f"SELECT target FROM {table}" for table in sorted(TABLE_OF.values()))
        with self._reading():
            return [Target.parse(row["target"]) for row in self._db.query(f"{sources} ORDER BY target")]

    def provenance(self, id: str) -> dict[str, str | int | float | None]:
        """The fields that were recorded under ``id``. Raises DatabaseError where there are none."""
        with self._reading():
            for row in self._db.query("SELECT fields FROM provenance WHERE id = ?", [id]):
                return _clean(dict(json.loads(row["fields"])))
        raise fault(self.path, f"holds no provenance {id!r}", "use an id that a record of this database names")

    def check(self, *, rows: bool = True) -> None:
        """Reads everything; without ``rows`` only looks whether the file's pages are whole, which takes a
        fiftieth of the time. Raises DatabaseError where some of it is damaged.
        """
        with self._reading():
            damage = self._db.execute("PRAGMA integrity_check(1)").fetchone()[0]
        if damage != "ok":
            raise fault(self.path, f"is damaged or cut short: {damage}", RESTORE)
        if not rows:
            return
        records = [record for kind in KINDS for record in self.every(kind, candidates=True)]
        for id in {record.provenance for record in records if not isinstance(record, Captured)} - {""}:
            self.provenance(id)
        self.history()

    def digest(self, target: Target) -> str:
        """64 hexadecimal digits that stand for all of this target's winners but candidates; see ``winners_digest``."""
        return self._stored_digest(target) or winners_digest(self.winners(target))

    # Helpers

    def _fails(self, winner: Winner) -> bool:
        trials = self.trials(winner.target, winner.problem, winner.tokens, winner.source_hash)
        return any(trial.failed and trial.config == winner.config for trial in trials)

    def _replace_winner(self, winner: Winner, *, keep: bool = True) -> None:
        before, digest = self.same_key(winner), self.digest(winner.target)
        self._insert("winners", to_row(winner), "REPLACE")
        decided = [known for known in (before,) if known is not None and known.standing != "candidate"]
        if keep and any(replace(known, provenance=winner.provenance) != winner for known in decided):
            self.record_former(FormerWinner(now(), decided[0]))
        decides = [winner] if winner.standing != "candidate" else []
        self._write_digest(winner.target, changed_digest(digest, added=decides, removed=decided))

    def _stored_digest(self, target: Target) -> str | None:
        with self._reading():
            row = self._db.execute("SELECT digest FROM digests WHERE target = ?", [str(target)]).fetchone()
        return None if row is None else str(row[0])

    def _write_digest(self, target: Target, digest: str | None) -> None:
        self._insert("digests", {"target": str(target), "digest": digest or self.digest(target)}, "REPLACE")

    def _insert(self, table: str, row: Row, on_conflict: str) -> None:
        names = ", ".join(row)
        values = ", ".join(f":{name}" for name in row)
        self._db.execute(f"INSERT OR {on_conflict} INTO {table} ({names}) VALUES ({values})", dict(row))

    def _select(self, kind: type[RecordT], where: str, values: Mapping[str, object]) -> list[RecordT]:
        names = ", ".join(field.name for field in fields(kind))
        with self._reading():
            rows = self._db.query(f"SELECT {names} FROM {TABLE_OF[kind]} WHERE {where}", dict(values))
            return [from_row(kind, row) for row in rows]

    @contextmanager
    def _reading(self) -> Iterator[None]:
        with self._lock, self._explained():
            try:
                yield
            except (BadInput, ValueError, TypeError, RecursionError) as error:
                raise fault(self.path, f"holds a row that autofuse did not write: {error}", RESTORE) from None

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, UnicodeDecodeError) as error:  # the latter where a message quotes what is damaged
            raise explain_sqlite_error(self.path, error) from error

    def _file_identity(self) -> tuple[int, int] | None:
        try:
            status = os.stat(self.path)
        except OSError:
            return None
        return (status.st_dev, status.st_ino)

    def _check_identity(self) -> None:
        if self._file_identity() != self._identity:
            raise fault(self.path, "was removed or replaced while it was in use", "run the command again")


def _of_sources(
    target: Target, problem: Problem, tokens: int, source_hashes: Sequence[str]
) -> tuple[dict[str, object], str]:
    """Parameters and condition of a query for one bucket's rows of any of these sources."""
    bucket: dict[str, object] = {"target": str(target), "problem": str(problem), "tokens": tokens}
    sources = {f"source_{i}": source for i, source in enumerate(source_hashes)}
    listed = ", ".join(f":{name}" for name in sources)
    return {**bucket, **sources}, f"{_equal(bucket)} AND source_hash IN ({listed})"


def _equal(columns: Iterable[str]) -> str:
    return " AND ".join(f"{name} = :{name}" for name in columns)


def provenance_id(fields: Provenance) -> str:
    """16 hexadecimal digits of the fields' content, whatever their order. Raises BadInput."""
    return hashlib.sha256(json.dumps(_clean(fields), sort_keys=True).encode()).hexdigest()[:16]


def _clean(fields: Provenance) -> dict[str, str | int | float | None]:
    clean: dict[str, str | int | float | None] = {}
    for name, value in fields.items():
        if not isinstance(name, str) or not (value is None or isinstance(value, str | int | float)):
            raise BadInput(f"provenance: {name!r} must be text, a number or None, not {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise BadInput(f"provenance: {name} must be finite, not {value!r}")
        clean[printable(name)] = printable(value) if isinstance(value, str) else value
    return clean
