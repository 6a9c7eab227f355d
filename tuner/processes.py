"""Starting Python processes of our own: the same interpreter, environment and import path.

They are commands rather than ``multiprocessing``'s, which would run the user's main module again: a script needs no
``if __name__ == "__main__"``, and a notebook or an interactive session will do.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from autofuse.errors import TargetUnavailable

__all__ = ["end_with_parent", "kill_group", "start_module"]

_START = "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); from {module} import main; main()"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def start_module(module: str, arguments: Sequence[str] = (), **options: Any) -> subprocess.Popen[Any]:
    """Starts a process that runs ``main()`` of a module, with the present ``sys.path``.

    It is in a session of its own: Ctrl-C at a terminal is for the command, which ends its processes.

    Args:
        arguments: what ``sys.argv[1:]`` will be there.
        options: for ``subprocess.Popen``.

    Raises TargetUnavailable where no process can be started.
    """
    path = [entry for entry in sys.path if isinstance(entry, str)]
    command = [sys.executable, "-c", _START.format(module=module), json.dumps(path), *arguments]
    try:
        return subprocess.Popen(command, start_new_session=True, **options)
    except OSError as error:
        raise TargetUnavailable(
            f"Python {sys.executable!r} cannot be started again: {error.strerror or error}"
        ) from None


def end_with_parent() -> None:
    """Makes the kernel kill this process when the thread that started it ends, however it ends. Linux only; elsewhere
    a process ends when it finds its pipe closed.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def kill_group(process: subprocess.Popen[Any], grace_s: float) -> bool:
    """Kills a process of ``start_module`` and those that it started. False if it is still there ``grace_s`` later."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    try:
        process.wait(grace_s)
    except subprocess.TimeoutExpired:
        return False
    return True
