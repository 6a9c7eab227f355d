"""A process that tunes on a device beside others: it takes buckets from ``devices.py`` and tells what it does."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import sys
import threading
from contextlib import suppress
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from autofuse import kernels_src
from autofuse.cache_db import TunedDatabase
from autofuse.tuner.job import tune_shares
from autofuse.tuner.processes import end_with_parent
from autofuse.tuner.queue import Share

__all__ = ["main"]

_INTERRUPTED = 130


def main() -> None:
    """Serves until there is nothing left to take. ``sys.argv[1]``: the descriptor of the connection."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs in the background has it switched off
    try:
        code = _serve(_Talk(Connection(int(sys.argv[1]))))
    except KeyboardInterrupt:
        code = _INTERRUPTED
    logging.shutdown()
    os._exit(code)


def _serve(talk: _Talk) -> int:
    """The exit code."""
    try:
        _tune(talk, **talk.receive())
        talk.say("done")
    except (BrokenPipeError, EOFError):  # there is nobody left to tune for
        return _INTERRUPTED
    except Exception as error:
        with suppress(OSError):
            talk.say_error(error)
        return 1
    return 0


def _tune(
    talk: _Talk,
    *,
    path: Any,
    device: str,
    effort: Any,
    retune: bool,
    seed: int,
    kernels: Any,
    modules: list[str],
    threads: int,
    log_level: int,
    compilers: int,
    turns: Path,
) -> None:
    logger = logging.getLogger("autofuse")
    logger.setLevel(log_level)
    logger.addHandler(_Forward(talk))
    logger.propagate = False
    kernels_src.FOLDER = kernels
    torch.set_num_threads(threads)
    for module in modules:
        import_module(module)

    def take() -> Share | None:
        talk.say("take")
        share: Share | None = talk.receive()
        return share

    with TunedDatabase(path) as database:
        tune_shares(
            take,
            torch.device(device),
            database,
            effort,
            retune=retune,
            seed=seed,
            on_event=lambda event: talk.say("event", event),
            compilers=compilers,
            turns=turns,
        )


class _Talk:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()  # log records may come from any thread

    def say(self, kind: str, *what: Any) -> None:
        with self._lock:
            self._connection.send((kind, *what))

    def say_error(self, error: Exception) -> None:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # an exception may ask for more arguments than it keeps
            error = RuntimeError(f"{type(error).__name__}: {error}")
        self.say("error", error)

    def receive(self) -> Any:
        return self._connection.recv()


class _Forward(logging.Handler):
    """Hands log records to the other side."""

    def __init__(self, talk: _Talk) -> None:
        super().__init__()
        self._talk = talk

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            self._talk.say("log", record.name, record.levelno, record.getMessage())
