"""What a mutation of a kernel is, and what the emulator may say of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from autofuse.ops import Problem

__all__ = [
    "MASK",
    "NOT_ITS_OWN",
    "OFF",
    "OUTSIDE",
    "OVERLAP",
    "RACE",
    "STANDSTILL",
    "UNWRITTEN",
    "WRONG",
    "Mutation",
    "Subject",
]

WRONG = "times the tolerance"
STANDSTILL = "no thread can go on"
OUTSIDE = "buffer-overflow"
NOT_ITS_OWN = f"{OUTSIDE}|use-after-poison"  # outside a tensor, or between its rows
RACE = f"depends on the order|{WRONG}"
UNWRITTEN = "were not written"
OVERLAP = "was written by block"
MASK = "lacks the calling lane"
OFF = f"{NOT_ITS_OWN}|SEGV|misaligned|{OVERLAP}|{UNWRITTEN}|{RACE}"  # a wrong address: it depends on where that leads


@dataclass(frozen=True)
class Subject:
    """A launch of a kernel, with an op's ``check_args``, in which mutations of the kernel show."""

    problem: Problem
    config: Mapping[str, int]
    tokens: int


@dataclass(frozen=True, eq=False)
class Mutation:
    """An edit of a source, what the emulator says of it, and where it shows: in the subject's config but for what
    ``config`` changes of it.
    """

    name: str
    old: str
    new: str
    caught: str
    file: str
    config: Mapping[str, int] = field(default_factory=dict)
    warp_size: int = 32
    subject: Subject = field(kw_only=True)
