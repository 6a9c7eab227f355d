"""How this process compiles kernels for the CPU in tests that are not about how they are compiled."""

from __future__ import annotations

from typing import Any

from autofuse.targets import cpu

__all__ = ["compile_unoptimised"]


def compile_unoptimised(monkeypatch: Any) -> None:
    """Does without optimisation, which takes up to ten seconds for a kernel that runs for microseconds.

    What kernels compute as they are shipped, test_ops.py and test_tuner_verify.py test for every sweep problem.
    """
    assert "-O3" in cpu._FLAGS
    monkeypatch.setattr(cpu, "_FLAGS", tuple("-O0" if flag == "-O3" else flag for flag in cpu._FLAGS))
