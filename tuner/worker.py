"""The worker process: it owns a device, and does there what ``isolation.py`` asks for.

Requests and answers are JSON, a line each, on two pipes. What runs is noted in a file that both have open, so that the
other side can read it when this process is gone; a pipe would wake it between two timed rounds. Answers are one of

- ``{"value": …}``;
- ``{"failed": {"subject", "status", "message"}, "lost": bool}``: a candidate failed, and whether the device is lost
  with it;
- ``{"error": {"type", "message", "traceback"}}``: something else did;
- ``{"log": [logger, level, message]}``, before any of these;
- ``{"waits": bool}``, before any of these as well: it waits for its turn on the device, or has it now.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import IO, Any

import torch

from autofuse import kernels_src
from autofuse.errors import AutofuseError
from autofuse.ops import OPS, Config, Problem
from autofuse.tuner.bench import Bench
from autofuse.tuner.budgets import Effort, Limits
from autofuse.tuner.failures import CandidateFailed, Subject, is_out_of_memory
from autofuse.tuner.processes import end_with_parent
from autofuse.tuner.turns import Turns

__all__ = ["NOTE_BYTES", "decode_effort", "decode_subject", "encode_effort", "encode_subject", "main"]

NOTE_BYTES = 4096
"""The size of the file that says what runs: JSON, then zeros."""

_FIRST_FOR_OUT_OF_MEMORY = "1000"  # what the kernel ends first when the host's memory is full


def encode_subject(subject: Subject) -> list[str]:
    return ["config" if isinstance(subject, Config) else "baseline", str(subject)]


def decode_subject(pair: list[str]) -> Subject:
    kind, text = pair
    return Config.parse(text) if kind == "config" else text


def encode_effort(effort: Effort) -> dict[str, Any]:
    return asdict(effort)


def decode_effort(fields: Mapping[str, Any]) -> Effort:
    plain: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    plain["limits"] = Limits(**plain["limits"])
    return Effort(**plain)


def main() -> None:
    """Serves until the requests end. ``sys.argv[1:]``: file descriptors of requests, answers and the note."""
    end_with_parent()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # candidates crash; nobody wants gigabytes of each
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_FIRST_FOR_OUT_OF_MEMORY)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests, answers, note = (int(argument) for argument in sys.argv[1:])
    for descriptor in (requests, answers, note):
        os.set_inheritable(descriptor, False)
    with open(requests, encoding="utf-8") as lines, open(answers, "w", encoding="utf-8") as out:
        server = _Server(out, note)
        for line in lines:
            server.answer(*json.loads(line))
    os._exit(0)  # quickly: there is nothing to put in order


class _Server:
    def __init__(self, out: IO[str], note: int) -> None:
        self._out = out
        self._note = note
        self._lock = threading.Lock()  # log records may come from any thread
        self._device = torch.device("cpu")
        self._bench: Bench | None = None
        self._turns = Turns(None)
        self._turn = ExitStack()
        self._notes: dict[Subject, bytes] = {}

    def answer(self, method: str, arguments: dict[str, Any]) -> None:
        try:
            self.send({"value": getattr(self, f"_do_{method}")(**arguments)})
        except CandidateFailed as failed:
            said = {
                "subject": encode_subject(failed.subject),
                "status": failed.status,
                "message": str(failed),
            }
            self.send({"failed": said, "lost": self._device_is_lost()})
        except Exception as error:
            kind = "MemoryError" if is_out_of_memory(error) else type(error).__name__
            self.send({"error": {"type": kind, "message": str(error), "traceback": traceback.format_exc()}})

    def send(self, message: dict[str, Any]) -> None:
        line = json.dumps(message)
        with self._lock:
            self._out.write(line + "\n")
            self._out.flush()

    def _do_start(
        self,
        package: str,
        kernels: str,
        device: str,
        effort: dict[str, Any],
        threads: int,
        log_level: int,
        turns: str | None,
    ) -> None:
        here = str(Path(sys.modules["autofuse"].__file__ or "").parent)
        if here != package:
            raise AutofuseError(f"the tuner's worker imports {here} in place of {package}: use absolute paths")
        logger = logging.getLogger("autofuse")
        logger.setLevel(log_level)
        logger.addHandler(_Forward(self))
        logger.propagate = False
        kernels_src.FOLDER = Path(kernels)
        torch.set_num_threads(threads)
        self._device = torch.device(device)
        self._turns = Turns(None if turns is None else Path(turns), lambda waits: self.send({"waits": waits}))
        with self._turns:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
                torch.zeros(1, device=self._device)
            self._bench = Bench(self._device, decode_effort(effort), self._take_note, self._turns)

    def _do_open(self, problem: str, tokens: int, source_hash: str, module: str) -> float:
        """Seconds that it took, without those that others had the device."""
        begin, waited_s = time.perf_counter(), self._turns.waited_s
        parsed = Problem.parse(problem)
        if parsed.op not in OPS:
            import_module(module)
        if parsed.op not in OPS:
            raise AutofuseError(f"importing {module} does not make the op {parsed.op} known; see OpRegistry.add")
        self._opened().open(parsed, tokens, source_hash)
        return time.perf_counter() - begin - (self._turns.waited_s - waited_s)

    def _do_take_turn(self) -> None:
        """The device is this process's until ``_do_end_turn``, whatever it is asked for meanwhile."""
        self._turn.enter_context(self._turns)

    def _do_end_turn(self) -> None:
        self._turn.close()

    def _do_verify(self, config: str) -> float:
        return self._opened().verify(Config.parse(config))

    def _do_time(self, config: str, best: str | None) -> dict[str, Any]:
        race = self._opened().time(Config.parse(config), None if best is None else Config.parse(best))
        return {"rounds_us": race.timing.rounds_us, "pruned": race.pruned}

    def _do_baselines(self, compiled: bool) -> list[str]:
        return self._opened().baselines(compiled)

    def _do_bandwidth(self) -> float:
        return self._opened().bandwidth()

    def _do_interleave(self, subjects: list[list[str]], rounds: int, seed: int, places: int) -> dict[str, Any]:
        done = self._opened().interleave([decode_subject(subject) for subject in subjects], rounds, seed, places)
        return {"rounds_us": [timing.rounds_us for timing in done.timings], "disturbances": done.disturbances}

    def _opened(self) -> Bench:
        assert self._bench is not None
        return self._bench

    def _take_note(self, subject: Subject) -> None:
        text = self._notes.get(subject)
        if text is None:  # the same few again and again, between timed rounds
            text = json.dumps(encode_subject(subject)).encode().ljust(NOTE_BYTES, b"\0")
            self._notes[subject] = text
        os.pwrite(self._note, text, 0)

    def _device_is_lost(self) -> bool:
        """Whether nothing runs on the device any more, as after a fault on an NVIDIA GPU: all later calls of the
        process fail.
        """
        if self._device.type != "cuda":
            return False
        try:
            with self._turns:
                torch.cuda.synchronize(self._device)
                return int((torch.ones(1, device=self._device) + 1).item()) != 2
        except Exception:
            return True


class _Forward(logging.Handler):
    """Hands log records to the other side."""

    def __init__(self, server: _Server) -> None:
        super().__init__()
        self._server = server

    def emit(self, record: logging.LogRecord) -> None:
        self._server.send({"log": [record.name, record.levelno, record.getMessage()]})
