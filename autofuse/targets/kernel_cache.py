"""The on-disk cache of compiled kernels.

A kernel's key covers everything that its binary depends on: the source text with its headers, the flags, the compiler's
version and the arch. Binaries are written to a temporary file and renamed, so processes that compile the same kernel at
the same time never see half a file; the last one wins, with the same content.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from autofuse.errors import CompileError, TargetUnavailable
from autofuse.paths import cache_folder
from autofuse.targets.base import Artifact, Resources

__all__ = ["KernelCache"]


class KernelCache:
    """Compiled kernels of one file type.

    Args:
        suffix: of the binaries: ``.cubin`` or ``.so``.
    """

    def __init__(self, suffix: str) -> None:
        self._suffix = suffix

    @property
    def folder(self) -> Path:
        return cache_folder() / "kernels"

    def get(self, entry: str, key_parts: Sequence[str], build: Callable[[Path], Resources]) -> Artifact:
        """The cached binary, or the one that ``build`` writes to the path it is given.

        Args:
            entry: the kernel's name, for a person who looks into the folder.
            key_parts: all that the binary depends on.

        Raises what ``build`` raises; TargetUnavailable if the folder cannot be written, or a disk is full: that is no
        fault of the kernel's.
        """
        key = hashlib.sha256("\0".join(key_parts).encode()).hexdigest()[:24]
        binary = self.folder / f"{entry}-{key}{self._suffix}"
        notes = binary.with_suffix(".json")
        if found := _read(binary, notes):
            return found
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.folder, prefix=".build-", ignore_cleanup_errors=True) as folder:
                draft = Path(folder) / f"kernel{self._suffix}"
                start = time.perf_counter()
                resources = build(draft)
                seconds = time.perf_counter() - start
                draft_notes = Path(folder) / "kernel.json"
                draft_notes.write_text(json.dumps(resources.as_dict()), encoding="utf-8")
                # The binary last: whoever finds it finds its notes as well.
                os.replace(draft_notes, notes)
                os.replace(draft, binary)
        except OSError as error:
            raise TargetUnavailable(
                f"kernel cache {self.folder} cannot be written ({error.strerror}): free some space there, or set "
                "XDG_CACHE_HOME elsewhere"
            ) from None
        except CompileError as error:
            if (full := os.strerror(errno.ENOSPC)) in f"{error} {error.log}":
                raise TargetUnavailable(
                    f"a compiler says: {full}: free some in {tempfile.gettempdir()} and {self.folder}; everything "
                    "measured before is kept"
                ) from None
            raise
        return Artifact(binary, resources, seconds)


def _read(binary: Path, notes: Path) -> Artifact | None:
    try:
        if binary.stat().st_size == 0:
            return None
        return Artifact(binary, Resources(**json.loads(notes.read_text(encoding="utf-8"))))
    except (OSError, ValueError, TypeError):
        return None
