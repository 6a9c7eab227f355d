"""GPU kernels on the CPU: their unmodified sources, compiled as C++, one fibre per GPU thread."""

from __future__ import annotations

from emulation.emulator import BLOCK_ORDERS, EmulationError, build, emulate, unavailable

__all__ = ["BLOCK_ORDERS", "EmulationError", "build", "emulate", "unavailable"]
