"""Binding: how a call of a fused op becomes a launch, as data.

It says which arguments a kernel accepts, where each field of the kernel's parameter struct comes from, and which
results are allocated. Python and the native dispatcher carry out the same binding, so an op declares it once and no op
has a fast path of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch

__all__ = ["ANY", "ROWS", "Binding", "Field", "FieldKind", "IndexBound", "LaunchShape", "Result", "TensorArg"]


_MOST_TOKENS = 2**31 - 1  # kernels count tokens in 32 bits
ANY = -2
"""A size that a kernel reads at run time: any, but 0."""
ROWS = -3
"""A size of at least T: a buffer of which only the first T rows count."""


@dataclass(frozen=True)
class TensorArg:
    """A tensor that a kernel accepts: strided any way, but its last dimension is contiguous.

    Attributes:
        index: its place among the op's arguments.
        sizes: None stands for T, the number of tokens, ANY and ROWS for what they say; the whole of it None for a
            single value, of any shape.
        align: bytes that its address and outer strides must be multiples of; 0: what the config asks for.
        constant: no kernel that may still be running writes it: a kernel may read it before it waits for the one before
            it (programmatic dependent launch).
    """

    index: int
    dtype: torch.dtype
    sizes: tuple[int | None, ...] | None
    align: int = 0
    constant: bool = False


@dataclass(frozen=True)
class IndexBound:
    """What the values of an int64 argument, one for each token, may be: numbers of rows of another one.

    Attributes:
        index: the argument's place among the op's.
        of: the place of the one that has the rows.
        dims: how many leading dimensions of that one count rows: their product is how many there are.
        padded: whether a negative value says that the token has no row.
    """

    index: int
    of: int
    dims: int = 1
    padded: bool = False


@dataclass(frozen=True)
class Result:
    """A tensor to allocate, on the device of the first tensor argument.

    Attributes:
        sizes: None stands for T.
        round_tokens: T in ``sizes`` is rounded up to a multiple of this.
        column_major: 0: contiguous. Else, for two dimensions: the first has stride 1, and the second the first's size,
            rounded up to a multiple of this.
    """

    dtype: torch.dtype
    sizes: tuple[int | None, ...]
    round_tokens: int = 1
    column_major: int = 0

    def allocate(self, tokens: int, device: torch.device) -> torch.Tensor:
        """The tensor, uninitialised."""
        sizes = [_rounded_up(tokens, self.round_tokens) if size is None else size for size in self.sizes]
        if not self.column_major:
            return torch.empty(sizes, dtype=self.dtype, device=device)
        # A stride is never 0, as PyTorch keeps it for tensors without elements.
        stride = _rounded_up(max(sizes[0], 1), self.column_major)
        return torch.empty_strided(sizes, (1, stride), dtype=self.dtype, device=device)


class FieldKind(IntEnum):
    """Where a field of the kernel's parameter struct comes from. The native dispatcher knows them by number."""

    POINTER = 0
    """The data of argument ``index``."""
    RESULT = 1
    """The data of result ``index``."""
    STRIDE = 2
    """The stride of argument ``index`` in dimension ``dim``, in elements."""
    TOKENS = 3
    FLOAT = 4
    """Argument ``index``, a float."""
    SIZE = 5
    """The size of argument ``index`` in dimension ``dim``, as a 32-bit integer."""
    NOTHING = 6
    """A zero: a pointer that this problem has no tensor for."""
    FLAG = 7
    """Argument ``index``, a bool, as a 32-bit integer."""


@dataclass(frozen=True)
class Field:
    """One field of the kernel's parameter struct."""

    kind: FieldKind
    index: int = 0
    dim: int = 0


@dataclass(frozen=True)
class LaunchShape:
    """What of a launch depends on the config.

    Attributes:
        units_per_token, units_per_block, repeat, more_per_token, more_per_block: the grid has ceil(T × units_per_token
            ÷ units_per_block) × repeat blocks, and ceil(T × more_per_token ÷ more_per_block) more, which do something
            else.
        align: bytes; every address, and every stride that is stepped over, must be a multiple.
    """

    units_per_token: int = 1
    units_per_block: int = 1
    align: int = 1
    repeat: int = 1
    more_per_token: int = 0
    more_per_block: int = 1

    def blocks(self, tokens: int) -> int:
        repeated = -(-tokens * self.units_per_token // self.units_per_block) * self.repeat
        return repeated - (-tokens * self.more_per_token // self.more_per_block)


@dataclass(frozen=True)
class Binding:
    """How calls of one problem are launched.

    Attributes:
        tensors: the tensor arguments, the first of which has T in its sizes.
        absent: indices of optional tensors that must be None.
        constants: (index, value) of arguments that are compiled into the kernel.
        fields: the kernel's parameter struct, in order.
        params_format: that struct in the ``struct`` module's notation, one code per field.
        results: in the op's order.
    """

    tensors: tuple[TensorArg, ...]
    constants: tuple[tuple[int, bool | int], ...]
    fields: tuple[Field, ...]
    params_format: str
    results: tuple[Result, ...]
    absent: tuple[int, ...] = ()

    def tokens(self, args: Sequence[Any]) -> int:
        """T of a call that is accepted."""
        first = self.tensors[0]
        assert first.sizes is not None
        return args[first.index].shape[first.sizes.index(None)]

    def accepts(self, args: Sequence[Any]) -> bool:
        """Whether the call is of this binding's problem, all its tensors on one device."""
        if any(args[index] != value for index, value in self.constants):
            return False
        if any(args[index] is not None for index in self.absent) or any(
            args[arg.index] is None for arg in self.tensors
        ):
            return False
        first, sizes = args[self.tensors[0].index], self.tensors[0].sizes
        if sizes is None or first.dim() != len(sizes):
            return False
        tokens, device = self.tokens(args), first.device
        for tensor in self.tensors:
            arg = args[tensor.index]
            if arg.dtype != tensor.dtype or arg.device != device:
                return False
            if tensor.sizes is None:
                if arg.numel() != 1:
                    return False
                continue
            if arg.dim() != len(tensor.sizes):
                return False
            for size, wanted in zip(arg.shape, tensor.sizes, strict=True):
                if not _suits(size, wanted, tokens):
                    return False
        return True

    def launchable(self, args: Sequence[Any], align: int) -> bool:
        """Whether the strides, addresses and sizes of an accepted call suit a kernel that needs ``align``."""
        if self.tokens(args) > _MOST_TOKENS:
            return False
        for tensor in self.tensors:
            arg = args[tensor.index]
            needed = tensor.align or align
            if arg.data_ptr() % needed:
                return False
            dims = list(zip(arg.shape, arg.stride(), strict=True))
            if dims and dims[-1][0] > 1 and dims[-1][1] != 1:
                return False
            if any(size > 1 and stride * arg.element_size() % needed for size, stride in dims[:-1]):
                return False
        return True

    def allocate(self, args: Sequence[Any]) -> tuple[torch.Tensor, ...]:
        """The results, uninitialised."""
        tokens, device = self.tokens(args), args[self.tensors[0].index].device
        return tuple(result.allocate(tokens, device) for result in self.results)

    def params(self, args: Sequence[Any], results: Sequence[torch.Tensor]) -> list[int | float]:
        """The kernel's parameters, in order."""
        values: list[int | float] = []
        for field in self.fields:
            if field.kind is FieldKind.POINTER:
                values.append(args[field.index].data_ptr())
            elif field.kind is FieldKind.RESULT:
                values.append(results[field.index].data_ptr())
            elif field.kind is FieldKind.STRIDE:
                values.append(args[field.index].stride(field.dim))
            elif field.kind is FieldKind.TOKENS:
                values.append(self.tokens(args))
            elif field.kind is FieldKind.SIZE:
                values.append(args[field.index].shape[field.dim])
            elif field.kind is FieldKind.NOTHING:
                values.append(0)
            else:
                values.append(args[field.index])
        return values


def _suits(size: int, wanted: int | None, tokens: int) -> bool:
    if wanted == ANY:
        return size > 0
    if wanted == ROWS:
        return size >= tokens
    return size == (tokens if wanted is None else wanted)


def _rounded_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
