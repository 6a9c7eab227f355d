"""Carrying measurements from one machine to another.

An export is JSON lines (``lines.py``) or a SQLite file with the database's own schema (``sqlite_export.py``). What
comes from elsewhere is a candidate until it is measured here, or trusted by whoever imports it.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from autofuse.cache_db.faults import AbsentDatabaseError
from autofuse.cache_db.files import permits
from autofuse.cache_db.foreign import Measured, check_size, left_out
from autofuse.cache_db.kernels import is_stale
from autofuse.cache_db.lines import KIND_OF, Content, malformed, read_lines, write_lines
from autofuse.cache_db.merge import Settled, merge_contents
from autofuse.cache_db.records import Trial, Winner
from autofuse.cache_db.rows import TABLE_OF, key_of
from autofuse.cache_db.sqlite_export import read_sqlite, write_sqlite
from autofuse.cache_db.store import TunedDatabase
from autofuse.errors import BadInput
from autofuse.ops.problem import Problem
from autofuse.targets.base import Target

__all__ = [
    "Conflict",
    "ExportSummary",
    "ImportSummary",
    "export_database",
    "import_into",
    "merge_exports",
    "preview_import",
    "read_export",
    "usable_export",
]


@dataclass(frozen=True)
class ExportSummary:
    """What an export holds: table → rows, and where it is."""

    path: Path
    counts: Mapping[str, int]


@dataclass(frozen=True)
class Conflict:
    """A bucket for which both have a winner, with different configs or times, and which of them stays: ``here`` or
    ``there``.
    """

    here: Winner
    there: Winner
    stays: str


@dataclass(frozen=True)
class ImportSummary:
    """What an import did, or would do.

    Attributes:
        new, kept, replaced: table → rows that came in, that stayed as they were here, that took the place of ours.
        wins: buckets whose winner is now the imported one.
        conflicts: buckets for which both have a winner.
        left_out: why rows are of no use here → how many.
    """

    new: Mapping[str, int]
    kept: Mapping[str, int]
    replaced: Mapping[str, int]
    wins: tuple[Winner, ...] = ()
    conflicts: tuple[Conflict, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)


def export_database(
    source: TunedDatabase,
    destination: Path,
    *,
    op: str | None = None,
    targets: Collection[Target] | None = None,
    problems: Collection[Problem] | None = None,
    winners_only: bool = False,
    overwrite: bool = False,
) -> ExportSummary:
    """Writes what was measured to ``destination``: whole or not at all. Equal content gives equal bytes.

    The suffix ``.jsonl`` gives JSON lines, any other a SQLite file. Candidates stay here: nobody measured them here.

    Args:
        op, targets, problems: only what is of these; None for all.
        winners_only: winners, and the baselines of their buckets, without which a winner over eager PyTorch alone
            decides nothing.

    Raises BadInput where ``destination`` exists (unless ``overwrite``) or cannot be written; DatabaseError.
    """
    _check_destination([source.path], destination, overwrite)
    return _write(_gather(source, op, targets, problems, winners_only), destination)


def merge_exports(
    sources: Sequence[Path], destination: Path, *, overwrite: bool = False
) -> tuple[ExportSummary, list[Settled]]:
    """Writes what several exports or databases hold to one, as ``export_database`` does; see ``merge_contents``.

    Every row is checked as an import is. Rows of ops and problems that this autofuse does not have go along.

    Returns: what was written, and the winners that are not in it.
    Raises BadInput, naming file and line, also for a config outside its kernel's search space; DatabaseError.
    """
    _check_destination(sources, destination, overwrite)
    contents = [read_export(path) for path in sources]
    for path, content in zip(sources, contents, strict=True):
        _of_use(content, str(path), some=False)
    merged, settled = merge_contents(contents)
    return _write(merged, destination), settled


def _write(content: Content, destination: Path) -> ExportSummary:
    temporary = destination.with_name(f".{destination.name}.{secrets.token_hex(4)}.tmp")
    try:
        if destination.suffix == ".jsonl":
            write_lines(content, temporary)
        else:
            write_sqlite(content, temporary)
        os.replace(temporary, destination)
    except OSError as error:
        raise BadInput(f"cannot write {destination}: {error.strerror}; name a file that can be written") from None
    finally:
        for suffix in ("", "-wal", "-shm", "-journal"):
            Path(f"{temporary}{suffix}").unlink(missing_ok=True)
    return ExportSummary(destination, content.counts())


def read_export(path: Path) -> Content:
    """What a file holds that ``export_database`` wrote, or a database itself, every row checked; all are candidates.

    Raises BadInput, naming file and line, and DatabaseError.
    """
    try:
        if not path.is_file():
            raise BadInput(f"cannot import {path}: there is no such file; name one that `autofuse export` wrote")
        check_size(path.stat().st_size, path)
    except OSError as error:
        raise BadInput(f"cannot import {path}: {error.strerror}; name a file that can be read") from None
    return read_lines(path) if path.suffix == ".jsonl" else read_sqlite(path)


def usable_export(path: Path) -> Content:
    """What of a file is of use here; see ``import_into``. Raises BadInput, DatabaseError."""
    return _of_use(read_export(path), str(path))[0]


def import_into(database: TunedDatabase | Path, source: Path | str, *, trust: bool = False) -> ImportSummary:
    """Takes over what ``source``, an export or a database itself, holds: all of it that is of use here, or nothing.

    Every row is checked before the first is written. A row from elsewhere is a candidate: its config is worth trying
    (``TunedDatabase.priors``), but it decides nothing and never takes the place of what was measured here. With
    ``trust`` it decides as if it had been measured here, until it is. Which of two rows of one key stays is never a
    matter of the lower time: one of the kernel as it is here stays over one of another version; then what was measured
    here stays over what is trusted, and that over a candidate; then the one that was measured later.

    Rows of ops, problems and configs that this autofuse does not have are left out, and so are winners of configs that
    failed here; a file in which nothing is of use, or one with a config outside the search space of the kernel as it is
    here, is refused.

    Args:
        database: open for writing, or where it is; it is made only once ``source`` was found to be in order.
        source: a path, or the URL of one (``https://…``, ``s3://…``) where fsspec is installed.

    Raises BadInput, naming file and line, and DatabaseError.
    """
    with _fetched(source) as path:
        where = database if isinstance(database, Path) else database.path
        if where.exists() and path.exists() and os.path.samefile(path, where):
            raise BadInput(f"cannot import {source} into itself; name another file")
        content, useless = _of_use(read_export(path), str(source))
        opening = TunedDatabase(database) if isinstance(database, Path) else nullcontext(database)
        with opening as opened, opened.transaction():
            plan = _planned(opened, content, trust, useless)
            for id in sorted({record.provenance for record in plan.records} - {""}):
                opened.record_provenance(content.provenance[id])
            for record in plan.records:
                opened.record(record)
        return plan.summary


def preview_import(database: Path, source: Path | str, *, trust: bool = False) -> ImportSummary:
    """What ``import_into`` would do; changes nothing. An absent database is an empty one. Raises as that does."""
    with _fetched(source) as path:
        content, useless = _of_use(read_export(path), str(source))
        try:
            with TunedDatabase(database, read_only=True) as opened:
                return _planned(opened, content, trust, useless).summary
        except AbsentDatabaseError:
            return _planned(None, content, trust, useless).summary


@dataclass(frozen=True)
class _Plan:
    records: list[Measured]
    summary: ImportSummary


def _planned(database: TunedDatabase | None, content: Content, trust: bool, useless: Mapping[str, int]) -> _Plan:
    standing = "trusted" if trust else "candidate"
    tallies = {word: Counter[str]() for word in ("new", "kept", "replaced")}
    useless = Counter(useless)
    records: dict[tuple[object, ...], Measured] = {}
    priors: list[Winner] = []
    conflicts: list[Conflict] = []
    for foreign in content.records:
        record = replace(foreign, standing=standing)
        known = None if database is None else database.same_key(record)
        if isinstance(record, Winner) and database is not None and _failed_here(record, database):
            useless["winners of configs that failed here"] += 1
            continue
        outcome = "new" if known is None else "replaced" if _takes_place(record, known) else "kept"
        tallies[outcome][TABLE_OF[type(record)]] += 1
        if outcome != "kept":
            records[_key(record)] = record
        if not isinstance(record, Winner) or not isinstance(known, Winner) or known.standing == "candidate":
            continue
        if (known.config, known.time_us, known.source_hash) != (record.config, record.time_us, record.source_hash):
            conflicts.append(Conflict(known, record, "here" if outcome == "kept" else "there"))
        if outcome == "kept" and known.config != record.config:
            priors.append(record)
    for winner in priors:  # as a trial it is still worth a measurement
        trial = _as_trial(winner)
        if _key(trial) not in records and (database is None or database.same_key(trial) is None):
            records[_key(trial)] = trial
    wins = tuple(record for record in records.values() if isinstance(record, Winner) and trust)
    new, kept, replaced = ({table: tally[table] for table in KIND_OF} for tally in tallies.values())
    summary = ImportSummary(new, kept, replaced, wins, tuple(conflicts), useless)
    return _Plan([*records.values()], summary)


def _failed_here(winner: Winner, database: TunedDatabase) -> bool:
    trial = database.same_key(_as_trial(winner))
    return trial is not None and trial.failed and trial.standing == "own"


_RANK = {"candidate": 0, "trusted": 1, "disputed": 2, "own": 3}


def _takes_place(record: Measured, known: Measured) -> bool:
    if record.standing == "candidate" and known.standing != "candidate":
        return False
    return _worth(record) > _worth(known)


def _worth(record: Measured) -> tuple[bool, int, str]:
    return not is_stale(record), _RANK[record.standing], record.measured_at


def _key(record: Measured) -> tuple[object, ...]:
    return (type(record), *key_of(record).values())


def _as_trial(winner: Winner) -> Trial:
    return Trial(
        winner.target,
        winner.problem,
        winner.tokens,
        winner.config,
        winner.source_hash,
        "ok",
        time_us=winner.time_us,
        spread_us=winner.spread_us,
        provenance=winner.provenance,
        measured_at=winner.measured_at,
        standing="candidate",
    )


def _of_use(content: Content, place: str, *, some: bool = True) -> tuple[Content, Counter[str]]:
    """What of it is of use here, and why how much is not. Args: some: whether it is refused where nothing is."""
    kept, useless = Content(content.provenance), Counter[str]()
    for record in content.records:
        try:
            why = left_out(record)
        except BadInput as error:
            raise malformed(place, error) from None
        if why is None:
            kept.records.append(record)
        else:
            useless[why] += 1
    if some and useless and not kept.records:
        raise malformed(place, BadInput(f"nothing in it is of use here: {next(iter(useless))}"))
    return kept, useless


@contextmanager
def _fetched(source: Path | str) -> Iterator[Path]:
    """The file itself, or a copy of what a URL names. Raises BadInput."""
    if isinstance(source, Path) or "://" not in source:
        yield Path(source)
        return
    try:
        import fsspec
    except ImportError:
        needed = "`pip install 'fsspec[http]'`"
        raise BadInput(f"cannot import {source}: URLs need fsspec; {needed}, or fetch the file") from None
    with tempfile.TemporaryDirectory(prefix="autofuse-import-") as folder:
        copy = Path(folder) / (Path(source.partition("?")[0]).name or "export")
        try:
            with fsspec.open(source, "rb") as remote, copy.open("wb") as local:
                while piece := remote.read(1 << 20):
                    local.write(piece)
                    check_size(local.tell(), source)
        except BadInput:
            raise
        except Exception as error:  # whatever a file system behind fsspec raises
            remedy = "install that" if isinstance(error, ImportError) else "check the URL"
            raise BadInput(f"cannot import {source}: {_reason(error, source)}; {remedy}, or fetch the file") from None
        yield copy


def _reason(error: BaseException, source: str) -> str:
    """What went wrong, in one line; of an error that only repeats the URL, by what caused it."""
    text = " ".join(str(error).split())
    if text not in ("", source):
        return text
    return _reason(error.__cause__, source) if error.__cause__ else type(error).__name__


def _gather(
    source: TunedDatabase,
    op: str | None,
    targets: Collection[Target] | None,
    problems: Collection[Problem] | None,
    winners_only: bool,
) -> Content:
    content = Content()
    buckets = {(winner.target, winner.problem, winner.tokens) for winner in source.winners(op=op)}
    for kind in KIND_OF.values():
        content.records += [
            record
            for record in source.every(kind, op=op)
            if (targets is None or record.target in targets)
            and (problems is None or record.problem in problems)
            and (not winners_only or (kind is not Trial and (record.target, record.problem, record.tokens) in buckets))
        ]
    for id in sorted({record.provenance for record in content.records} - {""}):
        content.provenance[id] = source.provenance(id)
    return content


def _check_destination(sources: Iterable[Path], destination: Path, overwrite: bool) -> None:
    if not destination.parent.is_dir():
        raise BadInput(f"cannot write {destination}: its folder does not exist; make it first")
    if destination.is_dir():
        raise BadInput(f"cannot write {destination}: it is a folder; name a file in it")
    if not permits(destination.parent, os.W_OK):
        raise BadInput(f"cannot write {destination}: its folder is read-only; name a file in another")
    if not destination.exists():
        return
    if any(source.exists() and os.path.samefile(destination, source) for source in sources):
        raise BadInput(f"cannot export {destination} onto itself; name another file")
    if not overwrite:
        raise BadInput(f"cannot write {destination}: it exists; name another file or ask to overwrite it")
    if Path(f"{destination}-wal").exists():
        raise BadInput(f"cannot write {destination}: a database of that name is in use; name another file")
