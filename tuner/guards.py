"""Guard zones: memory around tensors in which a write that missed shows.

Zones, and results before they are written, hold a byte that is NaN in every floating-point format here, and -1 or the
largest value as an integer: what a kernel reads beside an input spoils its results.

A look at memory on a GPU is a ``Claim``: many are made before the first is waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch

from autofuse.errors import UnsupportedCall
from autofuse.runtime.dispatch import BoundPlan
from autofuse.tuner.budgets import GUARD_BYTES, GUARD_ROWS, MOST_GUARD_BYTES
from autofuse.tuner.failures import WrongResult

__all__ = ["Answer", "Claim", "GuardedArgs", "GuardedCall", "insist", "same_bits", "told"]

Answer = torch.Tensor | bool
"""Yes or no; on a GPU one that nobody has waited for yet, without dimensions."""

_NAN_BYTE = 0xFF
_OTHER_BYTE = 0x5A  # in a second run: whatever neither run wrote differs between them
_ALIGNMENT = 512  # of CUDA's allocations; a CPU's have less
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Claim:
    """What must hold, and what to say where it does not."""

    holds: Answer
    otherwise: Callable[[], str]


def told(*groups: Sequence[Answer]) -> list[list[bool]]:
    """The answers, waited for once for all of them."""
    waiting = [answer for group in groups for answer in group if isinstance(answer, torch.Tensor)]
    values = iter(torch.stack(waiting).tolist() if waiting else ())
    return [[next(values) if isinstance(answer, torch.Tensor) else answer for answer in group] for group in groups]


def insist(claims: Iterable[Claim], answers: Iterable[bool]) -> None:
    """Raises WrongResult for the first that does not hold."""
    for claim, holds in zip(claims, answers, strict=True):
        if not holds:
            raise WrongResult(claim.otherwise())


def same_bits(a: torch.Tensor, b: torch.Tensor) -> Answer:
    """Whether two tensors of one dtype are the same bit by bit, NaN included; if not of one shape, they are not."""
    if a.shape != b.shape:
        return False
    if a.is_contiguous() and b.is_contiguous() and _is_words(a) and _is_words(b):
        a, b = a.view(-1).view(torch.int64), b.view(-1).view(torch.int64)  # a CPU goes through them one by one
    else:
        bits = _BITS[a.element_size()]
        a, b = a.view(bits), b.view(bits)
    return torch.equal(a, b) if a.device.type == "cpu" else (a == b).all()


def _is_words(tensor: torch.Tensor) -> bool:
    size = tensor.element_size()
    return tensor.numel() * size % 8 == 0 and tensor.storage_offset() * size % 8 == 0


class GuardedCall:
    """A loaded kernel as a function of the op's arguments, which allocates its results inside guard zones.

    Raises UnsupportedCall where the arguments do not suit the kernel: nothing but the kernel ever runs.
    """

    def __init__(self, bound: BoundPlan) -> None:
        self._bound = bound
        self._fills = cycle((_NAN_BYTE, _OTHER_BYTE))
        self._arenas: list[_Arena] = []

    def __call__(self, *args: Any) -> tuple[torch.Tensor, ...]:
        binding = self._bound.binding
        if not binding.accepts(args):
            raise UnsupportedCall(f"{self._bound.op.name}: the arguments are not of the kernel's problem")
        tokens, device = binding.tokens(args), args[binding.tensors[0].index].device
        likes = [result.allocate(tokens, torch.device("meta")) for result in binding.results]
        spans = [_span_bytes(like) for like in likes]
        arena = _Arena([_zone_bytes(like) for like in likes], spans, next(self._fills), device)
        results = tuple(
            arena.inside(index).view(like.dtype).as_strided(like.shape, like.stride())
            for index, like in enumerate(likes)
        )
        self._bound.launch(args, results)
        self._arenas.append(arena)
        return results

    def take_claims(self) -> list[Claim]:
        """Of all calls since: no zone was written to."""
        arenas, self._arenas = self._arenas, []
        return [Claim(arena.is_whole(), arena.damage) for arena in arenas]


class GuardedArgs:
    """An op's arguments, moved into memory with guard zones around it; strides, and what lies between the rows of a
    view, stay as they were, and so does what arguments share.

    Args: args: their tensors are on one device.

    Attributes:
        args: the arguments there.
    """

    def __init__(self, args: Sequence[Any], mutates: Sequence[int]) -> None:
        self._mutates = [index for index in mutates if isinstance(args[index], torch.Tensor)]
        tensors = {arg.untyped_storage().data_ptr(): arg for arg in args if isinstance(arg, torch.Tensor)}
        sizes = [tensor.untyped_storage().nbytes() for tensor in tensors.values()]
        device = next(iter(tensors.values())).device
        self._arena = _Arena([_zone_bytes(tensor) for tensor in tensors.values()], sizes, _NAN_BYTE, device)
        places = {key: index for index, key in enumerate(tensors)}
        for key, tensor in tensors.items():
            storage = torch.empty(0, dtype=torch.uint8, device=device).set_(tensor.untyped_storage())
            self._arena.inside(places[key]).copy_(storage)
        self._copy = self._arena.clone()
        self.args = tuple(_moved(arg, self._arena, places) for arg in args)
        self._before = tuple(_moved(arg, self._copy, places) for arg in args)

    @property
    def kept_bytes(self) -> int:
        return 2 * self._arena.buffer.numel()

    def take_mutated(self) -> list[torch.Tensor]:
        """What a call wrote into the arguments that its op writes into; they are put back to what they were."""
        taken = [self.args[index].clone() for index in self._mutates]
        for index in self._mutates:
            self.args[index].copy_(self._before[index])
        return taken

    def claim(self) -> Claim:
        """Everything is as it was."""
        return Claim(same_bits(self._arena.buffer, self._copy.buffer), self._damage)

    def _damage(self) -> str:
        if all(told([self.claim().holds])[0]):
            return "an input, or bytes beside one, were changed, and changed back by the next call"
        for index, (arg, before) in enumerate(zip(self.args, self._before, strict=True)):
            if isinstance(arg, torch.Tensor) and not same_bits(arg, before):
                return f"input {index} was changed"
        return "bytes beside an input were written"

    def restore(self) -> None:
        """Puts everything back to what it was."""
        self._arena.buffer.copy_(self._copy.buffer)


class _Arena:
    """Memory for several tensors with a guard zone before and after each; all of it in one block, which is filled and
    looked at as a whole: a candidate is verified within milliseconds.

    Args:
        zones: bytes of the zones of each, at least.
        spans: bytes of each.
    """

    def __init__(self, zones: Sequence[int], spans: Sequence[int], fill: int, device: torch.device) -> None:
        self._fill = fill
        self._places: list[slice] = []  # of the tensors
        self._zones: list[tuple[slice, slice]] = []  # before and after each
        end = 0
        for zone, span in zip(zones, spans, strict=True):
            begin, stop = end + zone, end + zone + span
            end = -(-(stop + zone) // _ALIGNMENT) * _ALIGNMENT
            self._places.append(slice(begin, stop))
            self._zones.append((slice(begin - zone, begin), slice(stop, end)))
        self.buffer = torch.full((end,), fill, dtype=torch.uint8, device=device)

    def inside(self, index: int) -> torch.Tensor:
        """The bytes of a tensor."""
        return self.buffer[self._places[index]]

    def clone(self) -> _Arena:
        other = copy(self)
        other.buffer = self.buffer.clone()
        return other

    def is_whole(self) -> Answer:
        """Whether no zone was written to."""
        zones = [self.buffer[zone] for pair in self._zones for zone in pair]
        return not zones or (torch.cat(zones) == self._fill).all()

    def damage(self) -> str:
        """Which zone was written to, and where, nearest to its tensor."""
        for index, (before, after) in enumerate(self._zones):
            beside = f"bytes beside result {index} were written"
            wrong = (self.buffer[after] != self._fill).nonzero()
            if len(wrong):
                return f"{beside}: {int(wrong[0])} bytes after its end"
            wrong = (self.buffer[before] != self._fill).nonzero()
            if len(wrong):
                return f"{beside}: {before.stop - before.start - int(wrong[-1])} bytes before its begin"
        raise AssertionError("a zone is damaged and whole")


def _span_bytes(tensor: torch.Tensor) -> int:
    """From its first element to its last."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _zone_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a zone: some rows, within bounds."""
    row = max((stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1), default=1)
    wanted = min(max(GUARD_ROWS * row * tensor.element_size(), GUARD_BYTES), MOST_GUARD_BYTES)
    return -(-wanted // _ALIGNMENT) * _ALIGNMENT


def _moved(arg: Any, arena: _Arena, places: Mapping[int, int]) -> Any:
    """``arg`` where its storage was copied to."""
    if not isinstance(arg, torch.Tensor):
        return arg
    storage = arg.untyped_storage()
    whole_bytes = storage.nbytes() // arg.element_size() * arg.element_size()
    whole = arena.inside(places[storage.data_ptr()])[:whole_bytes].view(arg.dtype)
    return whole.as_strided(arg.shape, arg.stride(), whole.storage_offset() + arg.storage_offset())
