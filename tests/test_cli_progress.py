"""Progress: one count for the whole job, on however many devices, and one line for each bucket that is done."""

from __future__ import annotations

import io
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from autofuse.cache_db import Trial, Winner
from autofuse.cli import progress as progress_module
from autofuse.cli.progress import _Count, outcome, progress
from autofuse.ops import Config, get_op
from autofuse.targets import target_of
from autofuse.tuner.budgets import Effort
from autofuse.tuner.job import BucketDone, BucketStarted, Event, TrialDone
from autofuse.tuner.queue import Bucket

TARGET = target_of(torch.device("cpu"))
PROBLEM = get_op("mla_dual_rms_norm").make_problem(
    dtype="bf16", q_lora_rank=96, kv_lora_rank=40, cast_before_weight=True
)
CONFIG = Config.of(ROWS=1)
WINNER = Winner(TARGET, PROBLEM, 1, CONFIG, "a1b2", 2.5, 0.1, "graph", 5.0, 2.0, 1.9, 2.1)
FIRST, SECOND, THIRD = (Bucket(PROBLEM, tokens) for tokens in (1, 64, 1024))


def trial(bucket: Bucket, time_us: float | None) -> TrialDone:
    status = "ok" if time_us is not None else "wrong"
    return TrialDone(bucket, Trial(TARGET, PROBLEM, bucket.tokens, CONFIG, "a1b2", status, time_us=time_us))


def job() -> Iterator[Event]:
    """Two devices at work: the buckets' events are mixed."""
    yield BucketStarted(FIRST, 2)
    yield BucketStarted(SECOND, 3)
    yield trial(FIRST, 3.0)
    yield trial(SECOND, None)
    yield trial(SECOND, 7.0)
    yield trial(FIRST, 2.5)
    yield BucketDone(FIRST, WINNER, measured=True, bandwidth_share=0.41)
    yield BucketStarted(THIRD, 0)
    yield BucketDone(THIRD, WINNER, measured=False)
    yield trial(SECOND, 8.0)
    yield BucketDone(SECOND, None, measured=True)


def test_steps_of_all_devices_are_counted_together_and_end_at_the_total() -> None:
    count = _Count(3, guess=10)
    seen = []
    for event in job():
        count.take(event)
        seen.append((count.done, count.total))
        if event == trial(SECOND, 7.0):
            assert count.describe(SECOND) == "2/3 configs, best 7.00 µs, 1 failed"
            assert count.describe(FIRST) == "1/2 configs, best 3.00 µs"
    done = [each for each, _ in seen]
    assert done == sorted(done)
    assert all(each <= total for each, total in seen)
    assert seen[-1][0] == seen[-1][1] == 5 + 2 * progress_module._FINAL_STEPS
    assert count.finished == 3


def test_a_line_says_the_winner_its_gain_and_its_share_of_the_bandwidth() -> None:
    name = f"{PROBLEM} T=1: "
    gain = "2.50 µs, 2.00× [1.90, 2.10] over graph"
    assert outcome(BucketDone(FIRST, WINNER, True, 0.41)) == f"{name}{gain}, 41 % of the bandwidth, ROWS=1"
    assert outcome(BucketDone(FIRST, WINNER, True, 0.0123)) == f"{name}{gain}, 1.2 % of the bandwidth, ROWS=1"
    assert outcome(BucketDone(FIRST, WINNER, False)) == f"{name}{gain}, ROWS=1 (tuned already)"
    assert outcome(BucketDone(FIRST, None, True)) == f"{name}no config works"


def test_a_terminal_gets_one_bar_and_the_lines_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    terminal = Console(file=written, force_terminal=True, width=300, highlight=False, color_system=None)
    monkeypatch.setattr(progress_module, "console", lambda stderr: terminal)
    with progress(3, Effort()) as show:
        for event in job():
            show(event)
    text = written.getvalue()
    assert text.count("41 % of the bandwidth") == 1
    assert "3/3 tuned" in text
    assert "left:" in text


def test_elsewhere_there_are_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(progress_module, "_LINE_EVERY_S", 0.0)
    monkeypatch.setattr(progress_module, "typer", SimpleNamespace(echo=lambda line, err: lines.append(line)))
    with progress(3, Effort()) as show:
        for event in job():
            show(event)
        show(None)
    assert sum(line.startswith(f"{PROBLEM} T=") and "up to" in line for line in lines) == 2
    assert sum("µs, 2.00×" in line for line in lines) == 2
    assert any(line.startswith("  2/3 configs") and "0/3 tuned" in line and " s left" in line for line in lines)
