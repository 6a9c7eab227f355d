"""What can go wrong with one config, as the database remembers it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from autofuse.errors import AutofuseError, CompileError, LaunchError, UnsuitedPlan, UnsupportedCall
from autofuse.ops import Config

__all__ = ["CandidateFailed", "Subject", "WrongResult", "blaming", "is_out_of_memory"]

Subject = Config | str
"""What runs: a config, or a kind of baseline."""


class WrongResult(AutofuseError):
    """A kernel ran and did something else than its op's reference."""


class CandidateFailed(AutofuseError):
    """A config, or a baseline, failed by its own fault.

    Attributes:
        subject: which.
        status: one of ``TRIAL_STATUSES``.
    """

    def __init__(self, subject: Subject, status: str, message: str) -> None:
        super().__init__(message)
        self.subject = subject
        self.status = status


@contextmanager
def blaming(subject: Subject) -> Iterator[None]:
    """Whatever a kernel can cause in this block becomes the ``CandidateFailed`` of ``subject``. All else passes:
    a missing device, a bad input, a fault of ours.
    """
    try:
        yield
    except CandidateFailed:
        raise
    except Exception as error:
        status = _status_of(error)
        if status is None:
            raise
        raise CandidateFailed(subject, status, _first_line(error)) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was lacking, on a GPU or on the host. PyTorch's CPU allocator has no exception of its own."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _status_of(error: Exception) -> str | None:
    if isinstance(error, WrongResult):
        return "wrong"
    if isinstance(error, CompileError):
        return "compile_error"
    if is_out_of_memory(error):
        return "out_of_memory"
    if isinstance(error, UnsuitedPlan):
        return None  # the tuner's own fault
    if isinstance(error, LaunchError | UnsupportedCall | RuntimeError):
        return "launch_error"
    return None


def _first_line(error: Exception) -> str:
    """What an error says; of PyTorch's, without the general advice and the C++ stack that follow."""
    if isinstance(error, AutofuseError):
        return str(error)
    lines = [line for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[0].split()) if lines else type(error).__name__
