"""A compiler that hangs or dies costs one config, and its worker is replaced."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from autofuse.errors import CompileError
from autofuse.ops import get_op
from autofuse.tuner import compile_ahead
from autofuse.tuner.compile_ahead import compile_pool

NORMS = get_op("mla_dual_rms_norm")
PROBLEM = NORMS.make_problem(dtype="bf16", q_lora_rank=96, kv_lora_rank=40, cast_before_weight=True)
CONFIG = NORMS.default_config("cuda", PROBLEM, 4)
SPEC = NORMS.spec("cuda", PROBLEM, CONFIG)
HANGS = "import time; time.sleep(600)"
DIES = "import sys; sys.stdin.readline(); sys.exit(7)"
REFUSES = """
import json, sys
for line in sys.stdin:
    print(json.dumps({"error": "CompileError", "message": "no such instruction"}), flush=True)
"""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Programs that take the place of the next workers, in order; the last one of all others as well."""
    programs: list[str] = []

    def start(module: str, arguments: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        program = programs.pop(0) if len(programs) > 1 else programs[0]
        return subprocess.Popen([sys.executable, "-c", program], start_new_session=True, **options)

    monkeypatch.setattr(compile_ahead, "start_module", start)
    return programs


def test_a_compiler_that_hangs_is_ended(started: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_ahead, "COMPILE_LIMIT_S", 4.0)
    started += [HANGS, REFUSES]
    with compile_pool("cuda", "sm_90a", workers=1) as pool:
        hung, *others = pool.submit([SPEC] * 3)
        with pytest.raises(CompileError, match=r"mla_dual_rms_norm\.cu does not compile within 4 s"):
            hung.result()
        for other in others:  # by another worker
            with pytest.raises(CompileError, match="no such instruction"):
                other.result()


def test_a_compiler_that_dies_is_said_to_have_died(started: list[str]) -> None:
    started += [DIES, REFUSES]
    with compile_pool("cuda", "sm_90a", workers=1) as pool:
        dead, *others = pool.submit([SPEC] * 3)
        with pytest.raises(CompileError, match=r"the compiler of mla_dual_rms_norm\.cu died \(exit code 7\)"):
            dead.result()
        for other in others:
            with pytest.raises(CompileError, match="no such instruction"):
                other.result()


def test_a_pool_ends_its_workers_whatever_they_are_at(started: list[str]) -> None:
    started += [HANGS]
    with compile_pool("cuda", "sm_90a", workers=1) as pool:
        pool.submit([SPEC] * 3)
        while not pool._workers:
            pass
    (worker,) = pool._workers
    assert worker.poll() is not None
