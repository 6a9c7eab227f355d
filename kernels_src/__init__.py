"""Kernel sources: plain C++ files with ``-D`` tunables and the headers they share, and Triton kernels in Python.

What an editor shows is what is compiled: nothing is generated or templated.
"""

from __future__ import annotations

import hashlib
import re
from functools import cache
from pathlib import Path

__all__ = ["FOLDER", "source_hash", "sources", "write_sources"]

FOLDER = Path(__file__).resolve().parent

_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)
_IMPORT = re.compile(r"^from \.(\w+) import", re.MULTILINE)


@cache
def sources(name: str) -> dict[str, str]:
    """The text of ``name`` and of every header or module of ours that it includes, by file name; ``name`` comes first.

    Raises FileNotFoundError.
    """
    texts: dict[str, str] = {}
    waiting = [name]
    while waiting:
        file = waiting.pop(0)
        if file not in texts:
            texts[file] = (FOLDER / file).read_text(encoding="utf-8")
            waiting += _included(file, texts[file])
    return texts


def _included(file: str, text: str) -> list[str]:
    return [f"{module}.py" for module in _IMPORT.findall(text)] if file.endswith(".py") else _INCLUDE.findall(text)


def write_sources(name: str, folder: Path) -> Path:
    """Writes those texts into ``folder`` and returns where ``name`` is.

    Compilers get what a cache's key was made of, not what the files have become since they were read.
    """
    for file, text in sources(name).items():
        (folder / file).write_text(text, encoding="utf-8")
    return folder / name


@cache
def source_hash(name: str) -> str:
    """Sixteen hexadecimal digits that change whenever ``name`` or something that it includes changes."""
    digest = hashlib.sha256()
    for file, text in sources(name).items():
        digest.update(f"{file}\0{text}\0".encode())
    return digest.hexdigest()[:16]
