"""The tuning job as it is asked for: a model, a problem, or what ``torch.compile`` found untuned."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from autofuse.cache_db import Captured, TunedDatabase, Winner
from autofuse.errors import AutofuseError, BadInput
from autofuse.models import PRESETS, checked_config, model_config, per_rank
from autofuse.ops import OPS, Problem, get_op
from autofuse.ops.base import DTYPES
from autofuse.ops.buckets import RANGE_BUCKETS, buckets_serving
from autofuse.tuner.budgets import STOP_GRACE_S, Effort
from autofuse.tuner.budgets import effort as effort_named
from autofuse.tuner.device_lock import device_lock
from autofuse.tuner.devices import parse_devices, tune_on_devices
from autofuse.tuner.job import Bucket, BucketDone, Event

__all__ = [
    "DEFAULT_TOKENS",
    "MOST_TOKENS",
    "captured_buckets",
    "checked_problem",
    "forget_when_tuned",
    "model_buckets",
    "parse_tokens",
    "problem_buckets",
    "tune",
    "tune_site",
]

logger = logging.getLogger("autofuse.tuner")

DEFAULT_TOKENS = RANGE_BUCKETS
"""What is tuned where nobody names token counts: enough for a graph that is compiled for any T."""

MOST_TOKENS = 1 << 20
"""The largest T that can be tuned; more is a typing error rather than a batch."""


def tune(
    model: Any = None,
    tokens: Iterable[int] = DEFAULT_TOKENS,
    *,
    dtype: str = "bf16",
    device: str | torch.device = "auto",
    effort: str | Effort = "default",
    ops: Sequence[str] | None = None,
    database: Path | str | None = None,
    retune: bool = False,
    seed: int = 0,
    budget_s: float | None = None,
    tp: int = 1,
    on_event: Callable[[Event], None] = lambda event: None,
) -> list[Winner]:
    """Tunes the fused ops of a model: the same job as ``autofuse tune``.

    What was measured before is not measured again, and every measurement is kept as soon as it is made.

    Args:
        model: a preset's name (``deepseek-v3``), a path to a ``config.json``, a Hugging Face model or config; None for
            every preset.
        tokens: the T to tune for; calls in between run the next larger one.
        dtype: ``bf16``, ``fp16`` or ``fp32``.
        device: ``auto`` (the GPU if there is one), ``cpu``, ``cuda``, ``cuda:N``, several of these with commas between,
            or ``all`` GPUs. Another tuner on one of them is waited for.
        effort: ``quick``, ``default``, ``exhaustive``, or budgets of your own.
        ops: names of ops; None for all.
        database: the file; None for the default one.
        retune: measure again what is known.
        seed: of the search.
        budget_s: how long it may take, in seconds; None for as long as it takes. The same call goes on from there.
        tp: ranks of tensor parallelism, which share the model's heads: what one of them runs is tuned.
        on_event: called with what happens, as it happens.

    Returns: the winner of each problem and T, those found earlier included.
    Raises: BadInput, TargetUnavailable, DatabaseError.

    Example:
        >>> autofuse.tune("deepseek-v3", tokens=[1, 64], device="cpu", effort="quick")  # doctest: +SKIP
        [Winner(...), Winner(...)]
    """
    buckets = model_buckets(model, parse_tokens(tokens), dtype, ops, tp)
    budgets = effort if isinstance(effort, Effort) else effort_named(effort)
    where = parse_devices(str(device))
    path = None if database is None else Path(database)
    with TunedDatabase(path) as opened, device_lock(where, on_wait=logger.warning):
        return tune_on_devices(
            buckets, where, opened, budgets, retune=retune, seed=seed, budget_s=budget_s, on_event=on_event
        )


def parse_tokens(tokens: str | Iterable[int]) -> tuple[int, ...]:
    """Token counts, ascending, each once, from a list or from text. Raises BadInput.

    Example:
        >>> parse_tokens("64,1, 2048,64")
        (1, 64, 2048)
    """
    items = tokens.split(",") if isinstance(tokens, str) else [str(count) for count in tokens]
    shown = tokens if isinstance(tokens, str) else ",".join(items)
    counts = set()
    for item in items:
        word = item.strip()
        if not (word.isascii() and word.isdecimal()) or int(word[:20]) < 1:
            raise BadInput(f"tokens {shown!r}: {word!r} is not a whole number from 1; give a list such as 1,64,2048")
        if len(word) > 20 or int(word) > MOST_TOKENS:
            raise BadInput(f"tokens {shown!r}: {word} is more than {MOST_TOKENS}, the most that is tuned")
        counts.add(int(word))
    if not counts:
        raise BadInput("tokens: there are none; give a list such as 1,64,2048")
    return tuple(sorted(counts))


def model_buckets(
    model: Any, tokens: Sequence[int], dtype: str = "bf16", ops: Sequence[str] | None = None, tp: int = 1
) -> list[Bucket]:
    """What a model (None: every preset) gives to tune on one of ``tp`` ranks, which share its heads.

    Raises BadInput, also where that is nothing.
    """
    if dtype not in DTYPES:
        raise BadInput(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    wanted = [get_op(name) for name in ops] if ops else list(OPS.values())
    problems: dict[Problem, None] = {}
    for each in PRESETS if model is None else [model]:
        name = _name_of(each)
        config = per_rank(checked_config(model_config(each), name), tp, name)
        for op in wanted:
            try:
                problems.update(dict.fromkeys(op.model_problems(config, dtype)))
            except (TypeError, ValueError) as error:
                raise BadInput(f"{name}: its config does not suit {op.name}: {error}") from None
    if not problems:
        names = ", ".join(op.name for op in wanted)
        raise BadInput(f"{_name_of(model)} has no use for {names}: there is nothing to tune")
    return _buckets(problems, tokens)


def problem_buckets(texts: Iterable[str], tokens: Sequence[int]) -> list[Bucket]:
    """Exactly these problems, as ``autofuse show`` prints them. Raises BadInput, UnsupportedCall."""
    return _buckets([checked_problem(Problem.parse(text)) for text in texts], tokens)


def checked_problem(problem: Problem) -> Problem:
    """``problem``, if its op knows it as such. Raises BadInput, UnsupportedCall."""
    op = get_op(problem.op)
    try:
        made = op.make_problem(**dict(problem.params))
    except KeyError as missing:
        raise BadInput(f"problem {problem} lacks {missing.args[0]}") from None
    except (TypeError, ValueError) as error:
        raise BadInput(f"problem {problem}: {error}") from None
    if made != problem:
        raise BadInput(f"problem {problem} is none of {op.name}; the nearest is {made}")
    return made


def captured_buckets(site: Captured) -> list[Bucket]:
    """What a site that ``torch.compile`` left unfused needs to have measured. Raises BadInput, UnsupportedCall.

    One static T is tuned as it is, a range at the buckets that serve it.
    """
    low = min(max(site.tokens_low, 1), MOST_TOKENS)
    return _buckets([checked_problem(site.problem)], buckets_serving(low, max(low, site.tokens_high)))


def forget_when_tuned(
    database: TunedDatabase, sites: dict[Captured, list[Bucket]], on_event: Callable[[Event], None]
) -> Callable[[Event], None]:
    """``on_event``, and besides: a site whose last bucket is done is no longer to be measured."""
    waiting = {site: set(buckets) for site, buckets in sites.items()}

    def handle(event: Event) -> None:
        if isinstance(event, BucketDone) and event.winner is not None:
            for site, left in list(waiting.items()):
                left.discard(event.bucket)
                if not left:
                    database.forget_captured(site)
                    del waiting[site]
        on_event(event)

    return handle


def tune_site(
    problem: Problem,
    tokens: Sequence[int],
    device: torch.device,
    database: Path | None = None,
    budget_s: float | None = None,
    on_line: Callable[[str], None] = lambda line: None,
) -> None:
    """Tunes one problem by ``autofuse tune`` in a process of its own.

    For use while ``torch.compile`` is at work: the tuner compiles the unfused code for comparison, and compilations do
    not nest. If this process is interrupted while it waits, the other one is told to stop, and is waited for: what it
    has measured is kept, and the interrupt goes on to whoever called.

    Args:
        budget_s: how long it may take; STOP_GRACE_S more, and it is stopped.
        on_line: called with each line of its progress, in another thread.

    Raises AutofuseError with the last line that the command said.
    """
    command = [sys.executable, "-m", "autofuse", "tune", "--problem", str(problem), "--device", str(device)]
    command += ["--tokens", ",".join(map(str, tokens)), "--effort", "quick"]
    command += [] if database is None else ["--database", str(database)]
    command += [] if budget_s is None else ["--budget", f"{budget_s:.1f}"]
    # In a session of its own: Ctrl-C at a terminal reaches it once, from here.
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    said: deque[str] = deque(maxlen=1)
    reader = threading.Thread(target=_read_lines, args=(process, said, on_line), daemon=True)
    reader.start()
    try:
        process.wait(None if budget_s is None else budget_s + STOP_GRACE_S)
    except subprocess.TimeoutExpired:
        raise AutofuseError(f"tuning {problem} did not end within its {budget_s:.0f} s: run autofuse tune") from None
    finally:
        _stop(process)
        reader.join(STOP_GRACE_S)
    if process.returncode:
        last = said[0] if said else f"exit code {process.returncode}"
        raise AutofuseError(f"tuning {problem} failed: {last.removeprefix('autofuse: error: ')}")


def _read_lines(process: subprocess.Popen[str], said: deque[str], on_line: Callable[[str], None]) -> None:
    assert process.stderr is not None
    with process.stderr:
        for line in process.stderr:
            if text := line.strip():
                said.append(text)
                on_line(text)


def _stop(process: subprocess.Popen[str]) -> None:
    """Ends a process that runs, and those it started: first as Ctrl-C does, so that it puts things in order."""
    if process.poll() is not None:
        return
    try:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(STOP_GRACE_S)
    except (subprocess.TimeoutExpired, ProcessLookupError):
        pass
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _buckets(problems: Iterable[Problem], tokens: Sequence[int]) -> list[Bucket]:
    """Each once: two devices must not tune the same one."""
    return list(dict.fromkeys(Bucket(problem, count) for problem in problems for count in tokens))


def _name_of(model: Any) -> str:
    if model is None:
        return "none of the presets"
    return f"model {model!r}" if isinstance(model, str) else f"model {type(model).__name__}"
