"""A plan for a whole deployment: an exported file whose winners decide, whatever the database holds."""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path

from autofuse.cache_db import TunedDatabase, usable_export
from autofuse.cache_db.foreign import check_size
from autofuse.cache_db.sqlite_export import write_sqlite
from autofuse.errors import BadInput
from autofuse.graph.settings import PLAN_VARIABLE
from autofuse.graph.sources import sources_hash
from autofuse.ops import OPS
from autofuse.paths import cache_folder
from autofuse.targets import Target

__all__ = ["load_plan", "pinned_database"]


def load_plan(path: Path | str | None) -> list[Target]:
    """Pins what ``autofuse export`` wrote to ``path``: from now on its winners alone decide what this process, and
    those that it starts, compile with ``backend="autofuse"``. None goes back to the database.

    The same as ``options={"autofuse.plan": path}`` for each ``torch.compile`` that names no plan of its own.

    Returns: the targets that it has winners for.
    Raises: BadInput, DatabaseError for a file that is none, or holds what no search space allows.

    Example:
        >>> autofuse.load_plan("h200.jsonl")  # doctest: +SKIP
        [Target(kind='cuda', arch='sm_90a', device_name='NVIDIA H200')]
    """
    if path is None:
        os.environ.pop(PLAN_VARIABLE, None)
        return []
    with TunedDatabase(pinned_database(Path(path)), read_only=True) as database:
        targets = list(dict.fromkeys(winner.target for winner in database.winners()))
    os.environ[PLAN_VARIABLE] = str(Path(path).absolute())
    return targets


def pinned_database(plan: Path) -> Path:
    """A database in the cache folder that holds what ``plan`` holds, checked as an import is. Made once for each
    content and each autofuse, for what one leaves out may be of use to another. Raises BadInput, DatabaseError.
    """
    try:
        check_size(plan.stat().st_size, plan)
        name = hashlib.sha256(f"{_what_is_of_use()}|".encode() + plan.read_bytes()).hexdigest()[:32]
    except OSError as error:
        raise BadInput(f"the plan {plan} cannot be read: {error.strerror}; name another file") from None
    folder = cache_folder() / "plans"
    made = folder / f"{name}.db"
    if made.exists():
        return made
    content = usable_export(plan)
    temporary = folder / f".{name}.{secrets.token_hex(4)}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_sqlite(content, temporary)
        os.replace(temporary, made)
    except OSError as error:
        raise BadInput(f"cannot write {made}: {error.strerror}; set XDG_CACHE_HOME to a folder that can be") from None
    finally:
        temporary.unlink(missing_ok=True)
    return made


def _what_is_of_use() -> str:
    """Stands for what decides which rows of an export are left out here."""
    # The sources do not tell a machine's cores, which some spaces go by: a cache folder may be shared by machines.
    values = [
        (op.name, kind, [(tunable.name, tunable.values) for tunable in kernel.space.tunables])
        for op in OPS.values()
        for kind in op.kernels
        for kernel in op.kernel_sources(kind)
    ]
    return f"{sources_hash()}|{values}"
