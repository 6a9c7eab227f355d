"""The bench in a process of its own, as the job sees it: whatever a candidate does, the job goes on.

A worker that dies, loses its device or does not answer in time is ended, and the next request starts another one. What
candidates did before in the same process may have spoilt it: a candidate is only blamed for a death in a worker that
ran no other one. Otherwise it gets a second try in a fresh worker.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch

from autofuse import errors, kernels_src
from autofuse.errors import AutofuseError, BadInput, TargetUnavailable
from autofuse.ops import Config, Problem, get_op
from autofuse.tuner.bench import COMPILED, EAGER
from autofuse.tuner.budgets import KILL_GRACE_S, Effort
from autofuse.tuner.disturbance import Comparison
from autofuse.tuner.failures import CandidateFailed, Subject
from autofuse.tuner.measure import Timing
from autofuse.tuner.processes import kill_group, start_module
from autofuse.tuner.racing import Race
from autofuse.tuner.worker import NOTE_BYTES, decode_subject, encode_effort, encode_subject

__all__ = ["IsolatedBench", "WorkerError"]

logger = logging.getLogger("autofuse.tuner")

_PREPARING_ROUNDS = 10  # what warming up and finding the length of a round may cost, in rounds
_SAID_LINES = 20  # of what a worker printed are kept
_SHOWN = 200  # characters of it in a message
_CLOSE_S = 2.0  # an idle worker ends at once
_ANOTHER_BUCKET = "another bucket"  # in the place of its configs


class WorkerError(AutofuseError):
    """The worker could not do what no candidate has a part in."""


class _InWorker(Exception):
    """The traceback of an error there."""


class _WorkerDied(Exception):
    """Its message says how."""


class _TimedOut(Exception):
    """The worker did not answer in time."""


class _NoTurn(Exception):
    """Others had the device all the time."""


class IsolatedBench:
    """A bench in a worker process. A context manager, which ends it. Methods are those of ``Bench``; they raise
    CandidateFailed for what a candidate did, and what a bench raises besides.

    The worker has the parent's environment, import path, kernel sources and thread count, and none of its other state.
    An op of one's own must be known to it after it imported the module that the op's class is in.

    Args: turns: the file of the ``Turns`` of those who tune on the device; None where nobody else does.
    """

    def __init__(self, device: torch.device, effort: Effort, turns: Path | None = None) -> None:
        self._device = device
        self._effort = effort
        self._limits = effort.limits
        self._turns = turns
        self._worker: _Worker | None = None
        self._bucket: dict[str, Any] = {}
        self._pending: list[str] = []  # what the worker was asked for and has not answered: "start", "open"
        self._opened_s = 0.0  # how long it took to open the bucket
        self._ran: set[Subject] = set()  # configs in the present worker
        self._has_baselines = False  # of this bucket, the present worker
        self._unfit: Config | None = None  # there are no races against it

    def __enter__(self) -> IsolatedBench:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(at_once=kind is not None or bool(self._pending))

    def open(self, problem: Problem, tokens: int, source_hash: str) -> None:
        """What the next requests are about. Does not wait: a worker starts and prepares while candidates compile.

        Raises BadInput for an op that a worker cannot import.
        """
        module = type(get_op(problem.op)).__module__
        if module == "__main__":
            raise BadInput(
                f"op {problem.op} is defined in the main program, which the tuner's worker cannot import: "
                "move its class, and what adds it, to a module of their own"
            )
        self._bucket = {"problem": str(problem), "tokens": tokens, "source_hash": source_hash, "module": module}
        self._unfit = None
        if self._worker is None:
            self._start()
            return
        self._ran = self._ran and {_ANOTHER_BUCKET}
        self._has_baselines = False
        self._worker.request("open", self._bucket)
        self._pending.append("open")

    @contextmanager
    def turn(self) -> Iterator[None]:
        """The device is this bench's in a ``with`` block; nothing to do where nobody else uses it. What is asked for
        outside of one takes a turn of its own.
        """
        if self._turns is None:
            yield
            return
        self._ask("take_turn", {}, [EAGER], self._limits.time_s)
        yield  # an exception ends the job, and the worker with it
        if self._worker is not None:  # else the turn ended with it
            self._ask("end_turn", {}, [EAGER], self._limits.time_s)

    def verify(self, config: Config) -> float:
        return float(self._ask("verify", {"config": str(config)}, [config], self._limits.verify_s))

    def time(self, config: Config, best: Config | None) -> Race:
        """A race in which a process dies, or the best config fails, says nothing of ``config``: it is timed once more
        without one, and the bucket has no more races against that best.
        """
        if best is None or best == self._unfit:
            return self._time(config, None)
        try:
            return self._time(config, best)
        except CandidateFailed as failed:
            if failed.subject == config and failed.status != "crashed":
                raise
            logger.info("%s: %s: %s is timed once more, alone", failed.subject, failed, config)
            self._unfit = best
        return self._time(config, None)

    def _time(self, config: Config, best: Config | None) -> Race:
        arguments = {"config": str(config), "best": None if best is None else str(best)}
        subjects = [config] if best is None else [config, best]
        answer = self._ask("time", arguments, subjects, self._limits.time_s)
        return Race(Timing(tuple(answer["rounds_us"])), answer["pruned"])

    def baselines(self, compiled: bool) -> list[str]:
        kinds = list(self._ask("baselines", {"compiled": compiled}, [COMPILED], self._limits.baselines_s))
        self._has_baselines = True
        return kinds

    def bandwidth(self) -> float:
        return float(self._ask("bandwidth", {}, [EAGER], self._limits.time_s))

    def interleave(self, subjects: Sequence[Subject], rounds: int, seed: int, places: int = 1) -> Comparison:
        arguments: dict[str, Any] = {"subjects": [encode_subject(subject) for subject in subjects]}
        arguments |= {"rounds": rounds, "seed": seed, "places": places}
        limit_s = self._limits.final_s
        if not self._has_baselines and any(isinstance(subject, str) for subject in subjects):
            limit_s += self._limits.baselines_s
        rounds = len(subjects) * (rounds + places * _PREPARING_ROUNDS)
        answer = self._ask("interleave", arguments, subjects, limit_s, rounds)
        return Comparison(tuple(Timing(tuple(each)) for each in answer["rounds_us"]), tuple(answer["disturbances"]))

    def _ask(
        self, method: str, arguments: dict[str, Any], subjects: Sequence[Subject], limit_s: float, rounds: int = 0
    ) -> Any:
        """The worker's answer. Raises CandidateFailed for one of ``subjects``, and what else the worker says."""
        while True:
            worker = self._ready()
            alone = self._ran <= set(subjects)
            self._ran |= {subject for subject in subjects if isinstance(subject, Config)}
            allowed_s = limit_s + (self._limits.slowdown + rounds) * self._opened_s
            try:
                answer = worker.ask(method, arguments, allowed_s)
            except _NoTurn:
                raise self._without_turn() from None
            except _TimedOut:
                message = f"it did not end within {allowed_s:.0f} s"
                failure = CandidateFailed(worker.running(subjects[0]), "timed_out", message)
                self._end(at_once=True)
                raise failure from None
            except _WorkerDied as died:
                failure = CandidateFailed(worker.running(subjects[0]), "crashed", str(died))
            else:
                if "failed" not in answer:
                    return _value(answer)
                said = answer["failed"]
                failure = CandidateFailed(decode_subject(said["subject"]), said["status"], said["message"])
                if not answer["lost"]:
                    raise failure
                failure.status = "crashed"
            self._end(at_once=True)
            if alone:
                raise failure
            logger.info("%s: %s: once more in a process that ran nothing else", failure.subject, failure)

    def _ready(self) -> _Worker:
        """A worker that has opened the bucket. Raises TargetUnavailable, and what went wrong in it."""
        while True:
            worker = self._worker or self._start()
            try:
                while self._pending:
                    step = self._pending[0]
                    limit_s = self._limits.start_s if step == "start" else self._limits.open_s
                    answer = worker.answer(limit_s)
                    del self._pending[0]
                    if step == "open":
                        self._opened_s = float(_value(answer))
                    elif "error" in answer:
                        raise TargetUnavailable(f"device {self._device}: {answer['error']['message']}")
                return worker
            except _NoTurn:
                raise self._without_turn() from None
            except (_WorkerDied, _TimedOut) as died:
                spoilt = bool(self._ran)
                self._end(at_once=True)
                if spoilt:
                    continue
                if step == "start":
                    raise TargetUnavailable(f"the tuner's worker does not start: {died}") from None
                place = f"{self._bucket['problem']} at T={self._bucket['tokens']}"
                raise WorkerError(f"the reference of {place} cannot be computed: {died}") from None

    def _start(self) -> _Worker:
        self._worker = worker = _Worker(self._limits.turn_s)
        worker.request(
            "start",
            {
                "package": str(Path(errors.__file__).parent),
                "kernels": str(kernels_src.FOLDER),
                "device": str(self._device),
                "effort": encode_effort(self._effort),
                "threads": torch.get_num_threads(),
                "log_level": logging.getLogger("autofuse").getEffectiveLevel(),
                "turns": None if self._turns is None else str(self._turns),
            },
        )
        worker.request("open", self._bucket)
        self._pending = ["start", "open"]
        return worker

    def _without_turn(self) -> TargetUnavailable:
        self._end(at_once=True)
        return TargetUnavailable(
            f"device {self._device}: another process of this job had it for {self._limits.turn_s:.0f} s, and may hang: "
            "end what is left of it; the same command goes on from here"
        )

    def _end(self, at_once: bool) -> None:
        worker, self._worker = self._worker, None
        self._pending = []
        self._ran = set()
        self._has_baselines = False
        if worker is not None:
            worker.end(at_once)


def _value(answer: dict[str, Any]) -> Any:
    """What a worker answered. Raises the error that it met: one of ours, or MemoryError, or RuntimeError for others."""
    if "error" not in answer:
        return answer["value"]
    name, message = answer["error"]["type"], answer["error"]["message"]
    there = _InWorker(answer["error"]["traceback"])
    if name in errors.__all__:
        raise getattr(errors, name)(message) from there
    if name == "MemoryError":
        raise MemoryError(message) from there
    if name == "OSError":  # such as a full disk
        raise OSError(message) from there
    raise RuntimeError(f"{name}: {message}") from there


class _Worker:
    """The process, and the two pipes and the file that connect it.

    Args: turn_s: how long it may wait for its turn on the device.
    """

    def __init__(self, turn_s: float) -> None:
        self._turn_s = turn_s
        self._note = tempfile.TemporaryFile()  # noqa: SIM115 (closed in end)
        for_worker, requests = os.pipe()
        answers, from_worker = os.pipe()
        self._requests: IO[str] = open(requests, "w", encoding="utf-8")  # noqa: SIM115
        theirs = (for_worker, from_worker, self._note.fileno())
        try:
            self._process = start_module(
                "autofuse.tuner.worker",
                [str(descriptor) for descriptor in theirs],
                pass_fds=theirs,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                # A few small graphs need no pool of processes, which would have to be ended as well.
                env={**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"},
            )
        except BaseException:
            for descriptor in (answers, requests):
                os.close(descriptor)
            raise
        finally:
            os.close(for_worker)
            os.close(from_worker)
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._said: deque[str] = deque(maxlen=_SAID_LINES)
        assert self._process.stdout is not None
        lines: IO[str] = open(answers, encoding="utf-8")  # noqa: SIM115 (its reader closes it)
        self._readers = [
            threading.Thread(target=_read, args=(lines, self._answers.put), daemon=True),
            threading.Thread(target=_read, args=(self._process.stdout, self._said.append), daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def request(self, method: str, arguments: dict[str, Any]) -> None:
        with suppress(OSError):  # it is dead, as whoever waits for its answer will find
            self._requests.write(json.dumps([method, arguments]) + "\n")
            self._requests.flush()

    def ask(self, method: str, arguments: dict[str, Any], limit_s: float) -> dict[str, Any]:
        os.pwrite(self._note.fileno(), bytes(NOTE_BYTES), 0)
        self._said.clear()
        self.request(method, arguments)
        return self.answer(limit_s)

    def answer(self, limit_s: float) -> dict[str, Any]:
        """The next answer; for as long as the worker waits for its turn on the device, no time counts.

        Raises _TimedOut, _NoTurn, _WorkerDied.
        """
        end, waits = time.monotonic() + limit_s, False
        while True:
            try:
                line = self._answers.get(timeout=max(end - time.monotonic(), 0.0))
            except queue.Empty:
                if waits:
                    raise _NoTurn from None
                raise _TimedOut(f"it did not answer within {limit_s:.0f} s") from None
            try:
                answer: dict[str, Any] = json.loads(line)
            except ValueError:  # the pipe's end, or what a kernel wrote into it
                raise _WorkerDied(self._how_it_died()) from None
            if "waits" in answer:
                waits = answer["waits"]
                end = time.monotonic() + (self._turn_s if waits else limit_s)
            elif "log" in answer:
                name, level, message = answer["log"]
                logging.getLogger(name).log(level, "%s", message)
            else:
                return answer

    def running(self, default: Subject) -> Subject:
        """What ran last; ``default`` if nothing did since the last request."""
        text = os.pread(self._note.fileno(), NOTE_BYTES, 0).rstrip(b"\0")
        try:
            return decode_subject(json.loads(text)) if text else default
        except (ValueError, TypeError):  # a process that was killed while it wrote
            return default

    def end(self, at_once: bool) -> None:
        """Ends the process, and those that it started."""
        with suppress(OSError):
            self._requests.close()
        if not at_once:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_CLOSE_S)
        if not kill_group(self._process, KILL_GRACE_S):
            logger.warning("process %d does not end, although it was killed: its device may be busy", self._process.pid)
        for reader in self._readers:
            reader.join(_CLOSE_S)
        self._note.close()

    def _how_it_died(self) -> str:
        """One line: signal or exit code, and the last that it said."""
        try:
            code = self._process.wait(_CLOSE_S)
        except subprocess.TimeoutExpired:  # it closed its pipe, or wrote into it, and goes on
            return "it cut itself off"
        self._readers[-1].join(_CLOSE_S)
        if code == -signal.SIGKILL:
            how = "the process was killed (SIGKILL), as the system does when memory runs out"
        elif code < 0:
            how = f"the process died of {_signal_name(-code)}"
        else:
            how = f"it ended the process (exit code {code})"
        said = [line for line in self._said if line.strip()]
        return f"{how}: {' '.join(said[-1].split())[:_SHOWN]}" if said else how


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def _read(stream: IO[str], put: Callable[[str], None]) -> None:
    """Hands on the lines of a stream, and "" at its end."""
    with stream:
        for line in stream:
            put(line)
    put("")
