"""GPU kernels on the CPU: their unmodified sources, compiled as C++, one fibre per GPU thread."""

from __future__ import annotations

from emulation.ahead import run_ahead, wanted
from emulation.emulator import BLOCK_ORDERS, EmulationError, build, emulate, unavailable, verify

__all__ = [
    "BLOCK_ORDERS",
    "EmulationError",
    "build",
    "emulate",
    "run_ahead",
    "unavailable",
    "verify",
    "wanted",
]
