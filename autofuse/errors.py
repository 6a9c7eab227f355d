"""The errors autofuse raises on purpose.

Each message is one line that says what was wrong, where, and what to do. The command line prints it and exits with
code 2; inside ``torch.compile`` it becomes one warning, and the unfused graph runs.
"""

from __future__ import annotations

__all__ = [
    "AutofuseError",
    "BadInput",
    "CompileError",
    "DatabaseError",
    "LaunchError",
    "TargetUnavailable",
    "UnsuitedPlan",
    "UnsupportedCall",
]


class AutofuseError(Exception):
    """Base of all errors below. ``str(error)`` is one line, fit for a person."""

    def __str__(self) -> str:
        return " ".join(super().__str__().split())


class BadInput(AutofuseError, ValueError):
    """A name, option or value that a person gave cannot be used."""


class TargetUnavailable(AutofuseError):
    """A device, driver, compiler or library that a target needs is missing."""


class CompileError(AutofuseError):
    """A kernel does not compile. ``log`` holds the compiler's whole output."""

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message)
        self.log = log


class LaunchError(AutofuseError):
    """A compiled kernel cannot be loaded or launched."""


class DatabaseError(AutofuseError):
    """The tuned-config database cannot be read or written."""


class UnsupportedCall(AutofuseError):
    """The arguments of a fused op are outside what its kernels compute; the reference handles them."""


class UnsuitedPlan(UnsupportedCall):
    """A plan is for other kernels, another device or another problem than those that are here; the reference runs."""
