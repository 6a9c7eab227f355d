"""The tuned-config database: what was measured, on which target, and what a compiler may conclude from it.

``TunedDatabase`` is the SQLite file: ``Trial``, ``Baseline``, ``Winner`` and ``Captured`` records go in and come out.
``Snapshot`` is one target's winners in memory; its ``lookup`` says which answer for a call, by which rule, and why.
``export_database`` and ``import_into`` carry measurements between machines. Anything wrong with a file is one
DatabaseError that names it and says what to do.
"""

from autofuse.cache_db.agreement import CLOSE, Agreement, Pair, agreement
from autofuse.cache_db.difference import Difference, compare
from autofuse.cache_db.exchange import (
    Conflict,
    ExportSummary,
    ImportSummary,
    export_database,
    import_into,
    merge_exports,
    preview_import,
    read_export,
    usable_export,
)
from autofuse.cache_db.faults import AbsentDatabaseError, DamagedDatabaseError
from autofuse.cache_db.files import default_path
from autofuse.cache_db.garbage import KEPT_WINNERS, collect_garbage
from autofuse.cache_db.kernels import is_stale, why_unused_here
from autofuse.cache_db.lookup import LOOKUP_RULES, Lookup, Snapshot, explain_lookup
from autofuse.cache_db.merge import Settled
from autofuse.cache_db.records import (
    BASELINE_KINDS,
    STANDINGS,
    TRIAL_STATUSES,
    Baseline,
    Captured,
    Trial,
    Winner,
    winners_digest,
)
from autofuse.cache_db.repair import RepairSummary, repair
from autofuse.cache_db.rivals import Rival, rival_of
from autofuse.cache_db.software import TIMED, software_changes, timed_alike
from autofuse.cache_db.store import FormerWinner, Provenance, TunedDatabase

__all__ = [
    "BASELINE_KINDS",
    "CLOSE",
    "KEPT_WINNERS",
    "LOOKUP_RULES",
    "STANDINGS",
    "TIMED",
    "TRIAL_STATUSES",
    "AbsentDatabaseError",
    "Agreement",
    "Baseline",
    "Captured",
    "Conflict",
    "DamagedDatabaseError",
    "Difference",
    "ExportSummary",
    "FormerWinner",
    "ImportSummary",
    "Lookup",
    "Pair",
    "Provenance",
    "RepairSummary",
    "Rival",
    "Settled",
    "Snapshot",
    "Trial",
    "TunedDatabase",
    "Winner",
    "agreement",
    "collect_garbage",
    "compare",
    "default_path",
    "explain_lookup",
    "export_database",
    "import_into",
    "is_stale",
    "merge_exports",
    "preview_import",
    "read_export",
    "repair",
    "rival_of",
    "software_changes",
    "timed_alike",
    "usable_export",
    "why_unused_here",
    "winners_digest",
]
