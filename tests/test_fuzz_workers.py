"""A fuzzer's processes: all seeds are run, and where one dies or hangs, that is a failure of the seed it had begun."""

from __future__ import annotations

import sys

import pytest

import fuzz_workers
from fuzz_workers import run_seeds

PROGRAM = """
import json, os, sys, time
first, count = map(int, sys.argv[1:3])
for seed in range(first, first + count):
    print("begin", seed, flush=True)
    if seed == {odd}:
        {fault}
    print("noise of a library", flush=True)
    print(json.dumps({{"case": str(seed), "threads": os.environ["OMP_NUM_THREADS"]}}), flush=True)
"""


def run(odd, fault, silence_s=60.0):
    program = PROGRAM.format(odd=odd, fault=fault)
    received, died = [], []
    run_seeds(
        lambda first, count: [sys.executable, "-c", program, str(first), str(count)],
        range(5, 17),
        jobs=3,
        received=lambda case: received.append(int(case["case"])),
        died=lambda seed, why: died.append((seed, why)),
        silence_s=silence_s,
    )
    return sorted(received), died


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    monkeypatch.setattr(fuzz_workers, "SEEDS_PER_PROCESS", 5)


def test_all_seeds_are_run():
    assert run(-1, "pass") == ([*range(5, 17)], [])


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("os.abort()", "ended with status -6, after its start"),
        ("raise ValueError('of all things')", "ValueError: of all things"),
        ("os._exit(3)", "ended with status 3"),
    ],
    ids=["killed", "raised", "exited"],
)
def test_a_process_that_dies_is_a_failure_of_its_seed(fault, why):
    received, ((seed, said),) = run(11, fault)
    assert seed == 11
    assert why in said
    assert received == [each for each in range(5, 17) if each != 11]


def test_a_process_that_hangs_is_stopped():
    received, ((seed, said),) = run(11, "time.sleep(600)", silence_s=5.0)
    assert seed == 11
    assert "said nothing for 5 s" in said
    assert received == [each for each in range(5, 17) if each != 11]
