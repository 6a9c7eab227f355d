"""Throwing away what no decision and no tuning can use any more."""

from __future__ import annotations

from collections import Counter

from autofuse.cache_db.kernels import is_stale
from autofuse.cache_db.records import Trial, Winner
from autofuse.cache_db.rows import TABLE_OF
from autofuse.cache_db.store import TunedDatabase
from autofuse.ops import OPS

__all__ = ["KEPT_WINNERS", "collect_garbage"]

KEPT_WINNERS = 5
"""How many winners of before are kept of each bucket."""


def collect_garbage(database: TunedDatabase, *, keep: int = KEPT_WINNERS, dry_run: bool = False) -> dict[str, int]:
    """Removes trials and winners of versions of kernels that are not here, winners of before but the last ``keep`` of
    each bucket, and provenance that nothing names any more; returns table → rows removed, or to be removed.

    The winners of this version, the baselines, and rows of ops that are not autofuse's own all stay. Raises
    DatabaseError.
    """
    removed = Counter[str]()
    rows: list[Trial | Winner] = [*database.every(Trial, candidates=True), *database.every(Winner, candidates=True)]
    stale = [row for row in rows if row.problem.op in OPS and is_stale(row)]
    for record in stale:
        removed[TABLE_OF[type(record)]] += 1
    buckets = Counter[tuple[object, ...]]()
    for former in database.history():
        winner = former.winner
        buckets[winner.target, winner.problem, winner.tokens] += 1
    removed["history"] = sum(max(0, count - keep) for count in buckets.values())
    if not dry_run:
        with database.transaction():
            for record in stale:
                if isinstance(record, Trial):
                    database.forget_trial(record)
                else:
                    database.forget_winner(record)
            database.trim_history(keep)
            removed["provenance"] = database.drop_orphans()
        database.compact()
    return dict(removed)
