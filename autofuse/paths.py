"""Where autofuse keeps its files."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/autofuse``, else ``~/.cache/autofuse``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "autofuse"
