"""Sites that nobody measured, written into the user's database on the way, for ``autofuse tune --captured``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from autofuse.cache_db.records import Captured
from autofuse.cache_db.store import TunedDatabase
from autofuse.errors import DatabaseError

__all__ = ["Notebook", "notebook"]

_TIMEOUT_S = 0.2  # for other writers: whoever notes something has other work to do


class Notebook:
    """Databases that would not take sites are left alone for the rest of the process: nothing waits for them again."""

    def __init__(self) -> None:
        self._given_up: set[Path] = set()

    def write(self, path: Path, sites: Iterable[Captured]) -> str:
        """Never raises. Returns why they could not be written, the first time; "" otherwise: the next process finds
        them again.
        """
        if path in self._given_up:
            return ""
        try:
            with TunedDatabase(path, busy_timeout_s=_TIMEOUT_S) as database, database.transaction():
                for site in sites:
                    database.record_captured(site)
        except DatabaseError as error:
            self._given_up.add(path)
            return f"autofuse cannot remember what is still to be tuned: {error}"
        return ""


notebook = Notebook()
