"""Problem and Config: the two keys under which everything is measured and remembered."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from autofuse.errors import BadInput

__all__ = ["Config", "Problem", "shortened", "whole_number"]

_CALL = re.compile(r"(?P<op>[a-z_][a-z0-9_]*)\((?P<params>[^()]*)\)")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SHOWN = 200  # characters of what a person gave in a message
_MOST_DIGITS = 18  # of a whole number: it fits 64 bits, SQLite's as well as a kernel's


def _split_pairs(text: str, what: str) -> Iterator[tuple[str, str]]:
    for pair in filter(None, text.split(",")):
        name, equals, value = pair.partition("=")
        if not equals or not _NAME.fullmatch(name) or not value:
            raise BadInput(f"{what} {shortened(text)}: {shortened(pair)} is not of the form name=value")
        yield name, value


def shortened(text: str) -> str:
    """``text`` in quotation marks, its middle left out where it is longer than a line: for messages."""
    return repr(text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]}…{text[-_SHOWN // 2 :]}")


def whole_number(text: str) -> int | None:
    """The whole number that ``text`` is in ASCII digits, None where it is none or has more than 18 of them."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= _MOST_DIGITS else None


@dataclass(frozen=True)
class Problem:
    """The static part of a fused op's call: everything that shapes its kernel but the number of tokens.

    Attributes:
        op: the fused op's name.
        params: (name, value) pairs in the op's own order; values are integers (widths, heads, 0/1 flags) or short
            words (dtypes: ``bf16``, ``fp16``, ``fp32``).

    Example:
        >>> problem = Problem("mla_dual_rms_norm", (("dtype", "bf16"), ("q_lora_rank", 1536)))
        >>> str(problem)
        'mla_dual_rms_norm(dtype=bf16,q_lora_rank=1536)'
        >>> Problem.parse(str(problem)) == problem
        True
    """

    op: str
    params: tuple[tuple[str, int | str], ...]

    def __str__(self) -> str:
        return f"{self.op}({','.join(f'{name}={value}' for name, value in self.params)})"

    def __getitem__(self, name: str) -> int | str:
        return dict(self.params)[name]

    def int(self, name: str) -> int:
        """The integer parameter ``name``; raises KeyError or TypeError if there is none."""
        value = self[name]
        if not isinstance(value, int):
            raise TypeError(f"{name} of {self} is not an integer")
        return value

    @classmethod
    def parse(cls, text: str) -> Problem:
        """Reads the canonical form back. Raises BadInput."""
        match = _CALL.fullmatch(text)
        if match is None:
            raise BadInput(f"problem {shortened(text)} is not of the form op(name=value,...)")
        params: list[tuple[str, int | str]] = []
        for name, value in _split_pairs(match["params"], "problem"):
            number = whole_number(value)
            if number is None and value.isdecimal():
                raise BadInput(
                    f"problem {shortened(text)}: {name} is no whole number of at most {_MOST_DIGITS} ASCII digits"
                )
            params.append((name, value if number is None else number))
        return cls(match["op"], tuple(params))


@dataclass(frozen=True)
class Config(Mapping[str, int]):
    """One point of a search space: tunable → value. Immutable, ordered by name, hashable.

    Example:
        >>> str(Config.of(ROWS=2, PDL=1))
        'PDL=1,ROWS=2'
        >>> Config.parse("ROWS=2,PDL=1") == Config.of(PDL=1, ROWS=2)
        True
    """

    pairs: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, values: Mapping[str, int] | None = None, /, **more: int) -> Config:
        return cls(tuple(sorted({**(values or {}), **more}.items())))

    @classmethod
    def parse(cls, text: str) -> Config:
        """Reads the canonical form back. Raises BadInput."""
        values = {}
        for name, value in _split_pairs(text, "config"):
            number = whole_number(value)
            if number is None or name in values:
                raise BadInput(
                    f"config {shortened(text)}: {name} must be given once, as a whole number, not {shortened(value)}"
                )
            values[name] = number
        return cls.of(values)

    def __str__(self) -> str:
        return ",".join(f"{name}={value}" for name, value in self.pairs)

    def __getitem__(self, name: str) -> int:
        for key, value in self.pairs:
            if key == name:
                return value
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)
