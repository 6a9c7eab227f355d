"""``autofuse doctor``: what this machine has, and what to do about what is missing."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated

import torch
import typer

from autofuse.cache_db import AbsentDatabaseError, DamagedDatabaseError, TunedDatabase, default_path
from autofuse.cache_db import repair as repair_database
from autofuse.cli.options import DatabaseOption, JsonOption
from autofuse.cli.output import console, print_json
from autofuse.cores import usable_cores
from autofuse.errors import AutofuseError
from autofuse.paths import cache_folder
from autofuse.targets import KINDS, Check, toolchain
from autofuse.targets.triton import triton_check

__all__ = ["doctor"]


def doctor(
    repair: Annotated[
        bool, typer.Option("--repair", help="Save what a damaged database still holds into a new file beside it.")
    ] = False,
    database: DatabaseOption = None,
    json: JsonOption = False,
) -> None:
    """Check what this machine can tune on.

    Says what to do about what is missing. Exit code 0 if there is a device to tune on and the files can be used,
    else 1.

    With --repair it does one thing: where the database is damaged, whatever rows are still whole go into a new file
    beside it. The damaged file is never changed.

    Example: autofuse doctor
    """
    if repair:
        _repair(database or default_path(), json)
        return
    toolchains = {kind: toolchain(kind).checks() for kind in KINDS}
    files = [_cache_check(), _database_check(database)]
    optional = [_package("transformers", "for Hugging Face models"), triton_check()]
    ready = [kind for kind in KINDS if all(check.ok for check in toolchains[kind])]
    sound = bool(ready) and all(check.ok for check in files)
    groups = {"machine": _machine(), **toolchains, "files": files, "optional": optional}
    if json:
        print_json({"ok": sound, "ready": ready, "checks": groups})
    else:
        needed = {"files", *(() if ready else KINDS)}
        _print(groups, needed)
        print(f"Ready to tune on: {', '.join(ready)}." if sound else "Not ready to tune: see the lines marked 'no'.")
    if not sound:
        raise typer.Exit(1)


def _repair(path: Path, json: bool) -> None:
    try:
        with TunedDatabase(path, read_only=True) as opened:
            opened.check()
        done = None
    except DamagedDatabaseError:
        done = repair_database(path)
    if json:
        print_json({"database": path, "repaired": done and done.path, "rows": done.salvaged if done else {}})
    elif done is None:
        typer.echo(f"{path} is sound: there is nothing to repair.")
    else:
        rows = ", ".join(f"{count} {table}" for table, count in done.salvaged.items() if count)
        typer.echo(f"Saved {rows} from {path} into {done.path}. {path} is as it was; to go on with what was saved:")
        typer.echo(f"  mv {path} {path}.damaged && mv {done.path} {path}")


def _print(groups: dict[str, list[Check]], needed: set[str]) -> None:
    out = console()
    for group, checks in groups.items():
        out.print(group, style="bold")
        for check in checks:
            mark = "ok" if check.ok else "no" if group in needed else "–"
            out.print(f"  {mark:2}  {check.name}: {check.found}", markup=False, soft_wrap=True)
            if check.remedy and not check.ok:
                out.print(f"      {check.remedy}", markup=False, soft_wrap=True)


def _machine() -> list[Check]:
    import autofuse

    return [
        Check("Python", True, f"{platform.python_version()} ({sys.executable})"),
        Check("autofuse", True, f"{autofuse.__version__} ({Path(autofuse.__file__).parent})"),
        Check("PyTorch", True, f"{torch.__version__}, {torch.get_num_threads()} threads"),
        Check("cores", True, f"{usable_cores()}, {platform.machine()}"),
    ]


def _cache_check() -> Check:
    folder = cache_folder() / "kernels"
    place = next(path for path in (folder, *folder.parents) if path.exists())
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        return Check("kernel cache", False, f"{folder} cannot be written", "set XDG_CACHE_HOME to a folder that can")
    count = sum(path.suffix in (".so", ".cubin") for path in folder.iterdir()) if folder.exists() else 0
    return Check("kernel cache", True, f"{folder}, {count} kernels")


def _database_check(database: Path | None) -> Check:
    try:
        path = database or default_path()
    except AutofuseError as error:
        return Check("database", False, "cannot be found", str(error))
    try:
        with TunedDatabase(path, read_only=True) as opened:
            opened.check(rows=False)
            winners, captured = opened.winners(), opened.captured()
    except AbsentDatabaseError:
        return Check("database", True, f"{path}: none yet, `autofuse tune` makes it")
    except AutofuseError as error:
        return Check("database", False, f"{path} cannot be used", str(error))
    targets = {winner.target for winner in winners}
    found = f"{path}: {len(winners)} winners on {len(targets)} targets, {len(captured)} captured sites to tune"
    return Check("database", True, found)


def _package(name: str, purpose: str) -> Check:
    try:
        return Check(name, True, f"{metadata.version(name)}, {purpose}")
    except metadata.PackageNotFoundError:
        return Check(name, False, f"none, {purpose}")
