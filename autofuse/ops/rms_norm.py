"""RMSNorm of rows, as ops that norm are checked against and compared with."""

from __future__ import annotations

import torch

__all__ = ["rms_norm", "rms_norm_exact"]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, cast_before_weight: bool) -> torch.Tensor:
    """x · rsqrt(mean(x², -1) + eps) · weight in fp32, in x's dtype (Zhang & Sennrich 2019, "Root Mean Square Layer
    Normalization"). ``cast_before_weight``: the normalised x is rounded to its dtype before it meets the weight.
    """
    normed = x.float()
    normed = normed * torch.rsqrt(normed.square().mean(-1, keepdim=True) + eps)
    if cast_before_weight:
        return (normed.to(x.dtype) * weight).to(x.dtype).contiguous()
    return (normed * weight.float()).to(x.dtype).contiguous()


def rms_norm_exact(x: torch.Tensor, weight: torch.Tensor, eps: float, cast_before_weight: bool) -> torch.Tensor:
    """The same in fp64, with the rounding before the weight, if there is one, and none after it."""
    wide = x.double()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if cast_before_weight:
        normed = normed.to(x.dtype).double()
    return normed * weight.double()
