"""One warning per cause and process, however many graphs are compiled."""

from __future__ import annotations

import logging
from functools import cache

__all__ = ["logger", "warn_once"]

logger = logging.getLogger("autofuse.graph")


@cache
def warn_once(message: str) -> None:
    """Logs ``message`` as a warning, the first time it is given."""
    logger.warning(message)
