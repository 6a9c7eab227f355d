"""On a GPU: a kernel that loses the worker its device's context costs a trial and a worker, and the caller nothing."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from planting import FOLDER, PROBLEM, Planted, impatient, plant

from autofuse import kernels_src
from autofuse.cache_db import TunedDatabase
from autofuse.ops import get_op
from autofuse.tuner.bench import Bench
from autofuse.tuner.budgets import Effort
from autofuse.tuner.job import Bucket, tune_buckets
from autofuse.tuner.measure import Ring, runner

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
ROOT = Path(__file__).resolve().parents[1]
TOKENS = 12
EditKernels = Callable[[str, str, str], None]

OUTCOMES = {
    "illegal address": ("crashed", "illegal memory access"),
    "misaligned access": ("crashed", "misaligned address"),
    "trap": ("crashed", "."),  # drivers name it differently
    "endless loop": ("timed_out", r"it did not end within \d+ s"),
    "write after a result": ("wrong", "bytes beside result 1 were written: 0 bytes after its end"),
    "write before a result": ("wrong", "bytes beside result 0 were written: 1 bytes before its begin"),
    "write after what it writes into": ("wrong", "bytes beside an input were written"),
    "last row unwritten": ("wrong", "result 0 is inf times the tolerance"),
    "NaN": ("wrong", "result 0 is inf times the tolerance"),
    "changed input": ("wrong", "input 0 was changed"),
    "does not compile": ("compile_error", "."),
    "too much shared memory": ("launch_error", "1048576 bytes of shared memory"),
}


@pytest.fixture
def planted(edit_kernels: EditKernels, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Planted:
    return plant(edit_kernels, monkeypatch, tmp_path)


def test_each_fault_is_a_failed_trial_and_nothing_of_it_reaches_this_process(planted: Planted, tiny: Effort) -> None:
    mine = torch.arange(8, device=DEVICE)  # this process has a context, and uses it before and after
    planted.choose(DEVICE, *OUTCOMES, "none")
    with TunedDatabase() as database:
        winners = tune_buckets([Bucket(PROBLEM, TOKENS)], DEVICE, database, impatient(tiny, 8.0))
        trials = planted.trials(database, DEVICE, TOKENS)
    assert {fault: trial.status for fault, trial in trials.items()} == {
        **{fault: status for fault, (status, _) in OUTCOMES.items()},
        "none": "ok",
    }
    for fault, (_, message) in OUTCOMES.items():
        assert re.search(message, trials[fault].message), (fault, trials[fault].message)
    assert [winner.config for winner in winners] == [trials["none"].config]
    torch.cuda.synchronize()
    assert mine.sum().item() == 28


def test_a_worker_that_was_killed_in_a_kernel_frees_its_device(planted: Planted, tiny: Effort) -> None:
    planted.choose(DEVICE, "endless loop")
    free = torch.cuda.mem_get_info(DEVICE)[0]  # with this process's context
    with TunedDatabase() as database:
        assert tune_buckets([Bucket(PROBLEM, TOKENS)], DEVICE, database, impatient(tiny, 5.0)) == []
        assert planted.trials(database, DEVICE, TOKENS)["endless loop"].status == "timed_out"
    assert torch.cuda.mem_get_info(DEVICE)[0] > free - (64 << 20)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    torch.zeros(1 << 20, device=DEVICE).add_(1)
    end.record()
    end.synchronize()  # nothing of the killed process runs before it
    assert begin.elapsed_time(end) < 1000.0


def test_finalists_are_timed_with_inputs_at_several_addresses(tiny: Effort, monkeypatch: pytest.MonkeyPatch) -> None:
    norms = get_op("mla_dual_rms_norm")
    problem = norms.make_problem(dtype="bf16", q_lora_rank=256, kv_lora_rank=128, cast_before_weight=True)
    good = norms.default_config("cuda", problem, TOKENS)
    bench = Bench(DEVICE, tiny)
    bench.open(problem, TOKENS, norms.source_hash("cuda"))
    timed: list[set[int]] = []

    def noted(call: Any, ring: Ring, *args: Any, **kwargs: Any) -> Any:
        timed.append({arg.data_ptr() for args in ring.sets for arg in args if isinstance(arg, torch.Tensor)})
        return runner(call, ring, *args, **kwargs)

    monkeypatch.setattr("autofuse.tuner.bench.runner", noted)
    done = bench.interleave([good], 7, seed=0, places=3)
    assert [len(timing.rounds_us) for timing in done.timings] == [7]
    assert len(timed) == 3
    assert all(not one & other for one, other in itertools.combinations(timed, 2))
    bench.interleave([good], 7, seed=0, places=3)
    assert len(timed) == 5  # those of the first place are kept


TUNE = """
import ctypes, sys
from pathlib import Path
import torch
import autofuse.kernels_src
autofuse.kernels_src.FOLDER = Path(sys.argv[1])
sys.path.insert(0, sys.argv[2])
import faulty_op
from autofuse.cache_db import TunedDatabase
from autofuse.ops import Problem
from autofuse.targets import parse_device
from autofuse.tuner.budgets import Effort
from autofuse.tuner.job import Bucket, tune_buckets

effort = Effort(exhaustive_up_to=1000, trial_rounds=2, final_rounds=4, round_us=50.0, ring_bytes=1, verify_seeds=1,
                attempts=1)
with TunedDatabase() as database:
    winners = tune_buckets([Bucket(Problem.parse(sys.argv[3]), 12)], parse_device("cuda"), database, effort)
flags, active = ctypes.c_uint(), ctypes.c_int(-1)
driver = ctypes.CDLL("libcuda.so.1")
assert driver.cuInit(0) == 0
assert driver.cuDevicePrimaryCtxGetState(0, ctypes.byref(flags), ctypes.byref(active)) == 0
print(len(winners), active.value)
"""


def test_tuning_creates_no_context_in_the_process_that_asks_for_it(planted: Planted) -> None:
    planted.choose(DEVICE, "illegal address", "none")
    command = [sys.executable, "-c", TUNE, str(kernels_src.FOLDER), str(FOLDER), str(PROBLEM)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert run.stdout.split() == ["1", "0"], run.stderr
