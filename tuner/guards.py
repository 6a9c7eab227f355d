"""Guard zones: memory around tensors in which a write that missed shows.

Zones, and results before they are written, hold a byte that is NaN in every floating-point format here, and -1 or the
largest value as an integer: what a kernel reads beside an input spoils its results.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Any

import torch

from autofuse.errors import UnsupportedCall
from autofuse.runtime.dispatch import BoundPlan
from autofuse.tuner.budgets import GUARD_BYTES, GUARD_ROWS, MOST_GUARD_BYTES
from autofuse.tuner.failures import WrongResult

__all__ = ["GuardedArgs", "GuardedCall", "same_bits"]

_NAN_BYTE = 0xFF
_OTHER_BYTE = 0x5A  # in a second run: whatever neither run wrote differs between them
_ALIGNMENT = 512  # of CUDA's allocations; a CPU's have less
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one dtype and shape are the same bit by bit, NaN included."""
    if a.is_contiguous() and b.is_contiguous() and _is_words(a) and _is_words(b):
        return torch.equal(a.view(-1).view(torch.int64), b.view(-1).view(torch.int64))  # it goes one by one on a CPU
    bits = _BITS[a.element_size()]
    return torch.equal(a.view(bits), b.view(bits))


def _is_words(tensor: torch.Tensor) -> bool:
    size = tensor.element_size()
    return tensor.numel() * size % 8 == 0 and tensor.storage_offset() * size % 8 == 0


class GuardedCall:
    """A loaded kernel as a function of the op's arguments, which allocates its results inside guard zones.

    Raises WrongResult where a zone was written to, UnsupportedCall where the arguments do not suit the kernel: nothing
    but the kernel ever runs.
    """

    def __init__(self, bound: BoundPlan) -> None:
        self._bound = bound
        self._fills = cycle((_NAN_BYTE, _OTHER_BYTE))

    def __call__(self, *args: Any) -> tuple[torch.Tensor, ...]:
        binding = self._bound.binding
        if not binding.accepts(args):
            raise UnsupportedCall(f"{self._bound.op.name}: the arguments are not of the kernel's problem")
        tokens, device = binding.tokens(args), args[binding.tensors[0].index].device
        fill = next(self._fills)
        guarded = [
            _GuardedResult(result.allocate(tokens, torch.device("meta")), device, fill) for result in binding.results
        ]
        results = tuple(each.tensor for each in guarded)
        self._bound.launch(args, results)
        for index, each in enumerate(guarded):
            if where := each.damage():
                raise WrongResult(f"bytes beside result {index} were written: {where}")
        return results


class _GuardedResult:
    def __init__(self, like: torch.Tensor, device: torch.device, fill: int) -> None:
        last = sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True))
        span = (last + 1) * like.element_size() if like.numel() else 0
        self._guard, self._fill = _zone_bytes(like), fill
        self._buffer = torch.full((2 * self._guard + span,), fill, dtype=torch.uint8, device=device)
        inside = self._buffer[self._guard : self._guard + span].view(like.dtype)
        self.tensor = inside.as_strided(like.shape, like.stride())

    def damage(self) -> str:
        """Where the zones were written to, nearest to the result; "" if nowhere."""
        after = (self._buffer[-self._guard :] != self._fill).nonzero()
        if len(after):
            return f"{int(after[0])} bytes after its end"
        before = (self._buffer[: self._guard] != self._fill).nonzero()
        if len(before):
            return f"{self._guard - int(before[-1])} bytes before its begin"
        return ""


class GuardedArgs:
    """An op's arguments, moved into memory with guard zones around it; strides, and what lies between the rows of a
    view, stay as they were, and so does what arguments share.

    Attributes:
        args: the arguments there.
    """

    def __init__(self, args: Sequence[Any], mutates: Sequence[int]) -> None:
        self._mutates = [index for index in mutates if isinstance(args[index], torch.Tensor)]
        self._buffers: dict[int, torch.Tensor] = {}
        for arg in args:
            if isinstance(arg, torch.Tensor):
                key = arg.untyped_storage().data_ptr()
                if key not in self._buffers:
                    self._buffers[key] = _with_zones(arg)
        self._copies = {key: buffer.clone() for key, buffer in self._buffers.items()}
        self.args = tuple(_moved(arg, self._buffers) for arg in args)
        self._before = tuple(_moved(arg, self._copies) for arg in args)

    @property
    def kept_bytes(self) -> int:
        return 2 * sum(buffer.numel() for buffer in self._buffers.values())

    def take_mutated(self) -> list[torch.Tensor]:
        """What a call wrote into the arguments that its op writes into; they are put back to what they were."""
        taken = [self.args[index].clone() for index in self._mutates]
        for index in self._mutates:
            self.args[index].copy_(self._before[index])
        return taken

    def check(self) -> None:
        """Raises WrongResult where anything is not as it was; then it is so again."""
        changed = [key for key, buffer in self._buffers.items() if not same_bits(buffer, self._copies[key])]
        if not changed:
            return
        said = "bytes beside an input were written"
        for index, (arg, before) in enumerate(zip(self.args, self._before, strict=True)):
            if isinstance(arg, torch.Tensor) and not same_bits(arg, before):
                said = f"input {index} was changed"
                break
        self.restore()
        raise WrongResult(said)

    def restore(self) -> None:
        """Puts everything back to what it was."""
        for key, buffer in self._buffers.items():
            buffer.copy_(self._copies[key])


def _zone_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a zone: some rows, within bounds."""
    row = max((stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1), default=1)
    wanted = min(max(GUARD_ROWS * row * tensor.element_size(), GUARD_BYTES), MOST_GUARD_BYTES)
    return -(-wanted // _ALIGNMENT) * _ALIGNMENT


def _with_zones(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor's whole storage as bytes, a zone before and after it."""
    storage = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
    zone = _zone_bytes(tensor)
    size = -(-(2 * zone + storage.numel()) // 8) * 8  # in whole words: they compare faster
    buffer = torch.full((size,), _NAN_BYTE, dtype=torch.uint8, device=tensor.device)
    buffer[zone : zone + storage.numel()] = storage
    return buffer


def _moved(arg: Any, buffers: dict[int, torch.Tensor]) -> Any:
    """``arg`` in the buffer that its storage was copied to."""
    if not isinstance(arg, torch.Tensor):
        return arg
    storage = arg.untyped_storage()
    buffer = buffers[storage.data_ptr()]
    zone = (buffer.numel() - storage.nbytes()) // 2 // _ALIGNMENT * _ALIGNMENT
    whole_bytes = storage.nbytes() // arg.element_size() * arg.element_size()
    whole = buffer[zone : zone + whole_bytes].view(arg.dtype)
    return whole.as_strided(arg.shape, arg.stride(), whole.storage_offset() + arg.storage_offset())
