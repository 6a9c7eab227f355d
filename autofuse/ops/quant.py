"""What ops that quantise their result share: formats, layouts of scales, the reference and how far kernels may be off.

Three formats, told apart by the size of a group of consecutive elements that share a scale, ``group``:

- 64 or 128, **group FP8** (DeepSeek-V3 technical report, section 3.3.2; layouts as vLLM and DeepGEMM have them): e4m3
  values, x ÷ scale, and fp32 scales, max(amax, 1e-10) ÷ 448. UE8M0 rounds a scale up to a power of two and keeps it as
  fp32. Both divisions are IEEE divisions in fp32, so the result is defined bit for bit. A NaN makes its whole group and
  the scale NaN; of a group with an infinity the scale is infinite, infinities become NaN and all else zero.
- 0, **static FP8**, one scale for the whole tensor, given beforehand: e4m3 values, x · (1 ÷ scale), saturated, as vLLM
  computes them. NaN stays NaN.
- 16, **NVFP4** (two e2m1 values in a byte, the first in the low half; NVIDIA cuBLAS, "1D block scaling"): a group's
  scale is e4m3 of global_scale · (amax · (1 ÷ 6)), saturated, its values are x · (1 ÷ (scale · (1 ÷ global_scale))),
  rounded to nearest even and saturated; where the scale is 0 they are zeros. NaN, which e2m1 does not have, becomes 6.
  This is vLLM's arithmetic, but with IEEE divisions where vLLM takes approximate reciprocals.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch

from autofuse.errors import BadInput
from autofuse.ops.base import DTYPES, Tolerance
from autofuse.ops.binding import Field, FieldKind, Result, TensorArg
from autofuse.ops.problem import Problem

__all__ = ["E4M3_MAX", "NVFP4", "STATIC", "QuantFormat", "ScaleLayout", "e2m1_codes", "swizzled"]

E4M3_MAX = 448.0
_E4M3_EPSILON = 2.0**-3
_E2M1_MAX = 6.0
_SMALLEST_AMAX = 1e-10
STATIC, NVFP4 = 0, 16
"""``group`` of the formats that are not group FP8."""
_GROUPS = (STATIC, NVFP4, 64, 128)
_SWIZZLE_ROWS, _SWIZZLE_COLUMNS = 128, 4  # of a tile of NVFP4's scales
_BIT_EQUAL = Tolerance(relative=0.0, absolute=2.0**-100)  # less than any two fp8 values or scales differ by


class ScaleLayout(IntEnum):
    """How the scales [T, width / group] of group FP8 lie in memory."""

    ROW_MAJOR = 0
    """Contiguous."""
    COLUMN_MAJOR = 1
    """Strides (1, T)."""
    TMA_ALIGNED = 2
    """Strides (1, T rounded up to a multiple of 4): each column begins at a multiple of 16 bytes, as TMA wants it. What
    lies between the columns belongs to no one and is not written."""


_COLUMN_MAJOR = {ScaleLayout.ROW_MAJOR: 0, ScaleLayout.COLUMN_MAJOR: 1, ScaleLayout.TMA_ALIGNED: 4}


@dataclass(frozen=True)
class QuantFormat:
    """The format of a quantised [T, width] tensor and of its scales: an op's arguments of these names.

    Attributes:
        group: 64, 128 (group FP8), 16 (NVFP4) or 0 (static FP8).
        ue8m0: group FP8's scales are powers of two.
        layout: of group FP8's scales. Static FP8 has no scales (the result is an empty tensor). NVFP4's are always
            [T rounded up to 128, width / 16 rounded up to 4], swizzled in tiles of 128 × 4 (see ``swizzled``), zero
            where padded.

    Example:
        >>> QuantFormat(128).params
        (('group', 128), ('ue8m0', 0), ('layout', 0))
    """

    group: int
    ue8m0: bool = False
    layout: ScaleLayout = ScaleLayout.ROW_MAJOR

    @classmethod
    def checked(cls, op: str, width: int, group: int, ue8m0: bool, layout: int) -> QuantFormat:
        """The format of a call's arguments. Raises BadInput, which begins with ``op``, where they make no sense."""
        if group not in _GROUPS:
            raise BadInput(f"{op}: group is {group}, none of {', '.join(map(str, _GROUPS))}")
        if layout not in tuple(ScaleLayout):
            raise BadInput(
                f"{op}: layout is {layout}, none of {', '.join(f'{x.value} ({x.name})' for x in ScaleLayout)}"
            )
        if group in (STATIC, NVFP4) and (ue8m0 or layout):
            raise BadInput(f"{op}: ue8m0 and layout are for groups of 64 and 128, not {group}")
        if group and width % group:
            raise BadInput(f"{op}: rows of {width} elements are no whole number of groups of {group}")
        return cls(group, bool(ue8m0), ScaleLayout(layout))

    @classmethod
    def of(cls, problem: Problem) -> QuantFormat:
        """The format of a problem that has ``params`` among its own."""
        return cls(problem.int("group"), bool(problem["ue8m0"]), ScaleLayout(problem.int("layout")))

    @property
    def params(self) -> tuple[tuple[str, int], ...]:
        """The part of a Problem's parameters that says which format it is."""
        return ("group", self.group), ("ue8m0", int(self.ue8m0)), ("layout", int(self.layout))

    @property
    def defines(self) -> dict[str, int]:
        """The constants that quant.cuh and quant.h are compiled with."""
        return {"GROUP": self.group, "UE8M0": int(self.ue8m0), "SCALE_LAYOUT": int(self.layout)}

    @property
    def needs_scale(self) -> bool:
        """Whether a call brings a scale (static FP8) or a global scale (NVFP4)."""
        return self.group in (STATIC, NVFP4)

    def check_scale(self, op: str, scale: torch.Tensor | None, device: torch.device) -> None:
        """Raises BadInput unless ``scale`` is one fp32 value on ``device``, or None where none is needed."""
        if not self.needs_scale:
            if scale is not None:
                raise BadInput(f"{op}: groups of {self.group} find their own scales; scale must be None")
        elif scale is None or scale.numel() != 1 or scale.dtype != torch.float32:
            given = "None" if scale is None else f"{list(scale.shape)} of {scale.dtype}"
            raise BadInput(f"{op}: with group {self.group}, scale must be one fp32 value, not {given}")
        elif scale.device != device:
            raise BadInput(f"{op}: scale is on {scale.device}, the other tensors are on {device}")

    # ---- results ----------------------------------------------------------------------------------------------------

    def results(self, width: int) -> tuple[Result, Result]:
        """What an op allocates: values, and scales."""
        if self.group == NVFP4:
            columns = _rounded_up(width // NVFP4, _SWIZZLE_COLUMNS)
            return (
                Result(torch.uint8, (None, width // 2)),
                Result(torch.float8_e4m3fn, (None, columns), round_tokens=_SWIZZLE_ROWS),
            )
        values = Result(torch.float8_e4m3fn, (None, width))
        if self.group == STATIC:
            return values, Result(torch.float32, (0,))
        scales = Result(torch.float32, (None, width // self.group), column_major=_COLUMN_MAJOR[self.layout])
        return values, scales

    def empty(self, tokens: int, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Uninitialised values and scales."""
        values, scales = self.results(width)
        return values.allocate(tokens, device), scales.allocate(tokens, device)

    def scale_args(self, index: int) -> tuple[TensorArg, ...]:
        """The binding of argument ``index``, the optional scale, where the format needs it."""
        return (TensorArg(index, torch.float32, None, align=4),) if self.needs_scale else ()

    def scale_field(self, index: int) -> Field:
        """The kernel parameter ``const float* scale``, from argument ``index``."""
        return Field(FieldKind.POINTER, index) if self.needs_scale else Field(FieldKind.NOTHING)

    def bytes_written(self, tokens: int, width: int) -> int:
        """Values and scales, and NVFP4's padding, which is written too."""
        if self.group == NVFP4:
            padded = _rounded_up(tokens, _SWIZZLE_ROWS) * _rounded_up(width // NVFP4, _SWIZZLE_COLUMNS)
            return tokens * width // 2 + padded
        return tokens * (width + (4 * width // self.group if self.group else 0))

    # ---- meaning ----------------------------------------------------------------------------------------------------

    def quantise(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The reference: x [T, width] of any floating dtype to values and scales, in fp32 arithmetic."""
        wide = x.float()
        if self.group == STATIC:
            assert scale is not None
            values = (wide * (1 / scale.reshape(()))).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
            return values.contiguous(), wide.new_empty(0)
        groups = wide.unflatten(-1, (x.shape[-1] // self.group, self.group))
        amax = groups.abs().amax(-1)
        if self.group == NVFP4:
            assert scale is not None
            return _nvfp4(groups, amax, scale.reshape(()))
        scales = self._scales(amax)
        values = (groups / scales[..., None]).flatten(-2).to(torch.float8_e4m3fn)
        if self.layout == ScaleLayout.ROW_MAJOR:
            return values, scales
        return values, self.results(x.shape[-1])[1].allocate(x.shape[0], x.device).copy_(scales)

    def exact(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """What kernels that compute x themselves are checked against: x in fp64, already rounded as their semantics
        say. FP8 values are not rounded, so that a kernel's x on the other side of a tie costs what it is worth;
        ``tolerance`` knows. (Kernels that are given x are checked against ``quantise``, bit for bit.)
        """
        if self.group == NVFP4:
            return self.quantise(x, scale)
        if self.group == STATIC:
            assert scale is not None
            return (x / scale.double().reshape(())).clamp(-E4M3_MAX, E4M3_MAX), x.new_empty(0)
        groups = x.unflatten(-1, (x.shape[-1] // self.group, self.group))
        scales = self._scales(groups.abs().amax(-1).float()).double()
        return (groups / scales[..., None]).flatten(-2), scales

    def tolerance(self, result: int, dtype: str | None) -> Tolerance:
        """For ``result`` 0 (values) or 1 (scales).

        Args:
            dtype: of x where the kernel computes it (``bf16``, …); None where x is an input: then both results are
                defined bit for bit.
        """
        if dtype is None:
            return _BIT_EQUAL
        # x may be off by one unit in its last place where fp32 arithmetic lands on the other side of a tie, which is
        # rare. A scale moves with the largest x of its group, and the group's values with the scale. Usually a value
        # is off by its own rounding only: half a unit in the last place, and 1 % of that for fp32 arithmetic.
        epsilon = torch.finfo(DTYPES[dtype]).eps
        if self.group == NVFP4:
            if result == 0:
                return _E2m1Tolerance(relative=1.0, absolute=0.0, usual=0.0)
            return Tolerance(relative=_E4M3_EPSILON, absolute=2.0**-9, usual=2.0**-20)
        if result == 1:
            close = 16 * epsilon if dtype == "fp32" else 2.0**-20
            # A power of two is twice as large, or half, where amax ÷ 448 was next to it.
            return Tolerance(relative=1.0 if self.ue8m0 else 16 * epsilon, absolute=0.0, usual=close)
        largest = 1 + _E4M3_EPSILON if self.ue8m0 else _E4M3_EPSILON
        smallest = 2.0**-9
        return Tolerance(
            relative=largest, absolute=smallest, usual=0.505 * _E4M3_EPSILON, usual_absolute=0.505 * smallest
        )

    def _scales(self, amax: torch.Tensor) -> torch.Tensor:
        # By a tensor: on a GPU PyTorch divides by a number by multiplying with its rounded reciprocal.
        scales = amax.clamp(min=_SMALLEST_AMAX) / torch.full_like(amax, E4M3_MAX)
        if not self.ue8m0:
            return scales
        # scale = mantissa · 2^exponent, mantissa in [0.5, 1): a power of two where the mantissa is 0.5. No logarithm:
        # next to a power of two a rounded one lands on either side.
        mantissa, exponent = torch.frexp(scales)
        up = torch.ldexp(torch.ones_like(scales), exponent - (mantissa == 0.5).int())
        return torch.where(scales.isfinite(), up, scales)


def _rounded_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _nvfp4(groups: torch.Tensor, amax: torch.Tensor, global_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales = (global_scale * (amax * (1 / _E2M1_MAX))).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    wide = scales.float()
    factors = torch.where(wide == 0, 0.0, 1 / (wide * (1 / global_scale)))
    codes = e2m1_codes((groups * factors[..., None]).flatten(-2))
    return codes[..., ::2] | codes[..., 1::2] << 4, swizzled(scales)


def e2m1_codes(values: torch.Tensor) -> torch.Tensor:
    """The e2m1 code, 0 to 15, of each value: nearest, ties to an even code, saturated at 6; NaN is 6.

    Codes 0 to 7 are 0, 0.5, 1, 1.5, 2, 3, 4, 6; 8 more is negative (OCP Microscaling Formats, section 5.3.3).
    """
    size = values.abs().nan_to_num(nan=_E2M1_MAX, posinf=_E2M1_MAX)
    up = (size > 0.25, size >= 0.75, size > 1.25, size >= 1.75, size > 2.5, size >= 3.5, size > 5)
    code = sum(step.to(torch.uint8) for step in up)
    assert isinstance(code, torch.Tensor)
    return code | (values.signbit() & ~values.isnan()).to(torch.uint8) << 3


def swizzled(scales: torch.Tensor) -> torch.Tensor:
    """NVFP4's scales [T, columns] as tensor cores want them: padded with zeros to multiples of 128 rows and 4 columns,
    in tiles of 128 × 4, whose rows i, i + 32, i + 64 and i + 96 lie side by side (cuBLAS, "1D block scaling factors
    layout").
    """
    rows, columns = scales.shape
    rows_up, columns_up = _rounded_up(rows, _SWIZZLE_ROWS), _rounded_up(columns, _SWIZZLE_COLUMNS)
    padded = torch.zeros(rows_up, columns_up, dtype=torch.uint8, device=scales.device)
    padded[:rows, :columns] = scales.view(torch.uint8)
    tiles = padded.view(rows_up // _SWIZZLE_ROWS, 4, 32, columns_up // _SWIZZLE_COLUMNS, _SWIZZLE_COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(rows_up, columns_up).view(scales.dtype)


@dataclass(frozen=True)
class _E2m1Tolerance(Tolerance):
    """Two e2m1 values in a byte: each may be one code off, and 1 % of them may be off at all."""

    def error(self, out: torch.Tensor, reference: torch.Tensor) -> float:
        nearby = Tolerance(relative=0.0, absolute=1.0, usual=0.0, usual_absolute=0.5)
        return nearby.error(_ordered(out), _ordered(reference))


def _ordered(packed: torch.Tensor) -> torch.Tensor:
    """Codes as numbers whose neighbours are neighbouring e2m1 values."""
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).to(torch.int32)
    return torch.where(codes >= 8, 8 - codes, codes)
