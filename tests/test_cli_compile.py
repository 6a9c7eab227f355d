"""``autofuse compile``: every kernel for every GPU, on a machine that has none of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from autofuse.cli.app import run
from autofuse.errors import BadInput, TargetUnavailable
from autofuse.ops import OPS, FusedOp, get_op
from autofuse.ops.languages import CPP, language_of
from autofuse.targets import KernelSpec, nvrtc, target_of, toolchain
from autofuse.targets.hip import HipToolchain
from autofuse.tuner import compile_matrix
from autofuse.tuner.compile_ahead import CompilePool, compile_pool
from autofuse.tuner.compile_matrix import GPU_ARCHES, compile_jobs, jobs_for

NORMS = get_op("mla_dual_rms_norm")
HOST = target_of(torch.device("cpu")).arch

Compile = Callable[..., tuple[str, list[str]]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Compile:
    """Runs ``autofuse compile`` with one config of each problem of one op, which must end with ``code``; gives what it
    wrote to standard output, and the lines of standard error.
    """

    def call(*arguments: object, code: int = 0) -> tuple[str, list[str]]:
        few = ("--op", NORMS.name, "--configs", 1)
        result = run(["compile", *map(str, few), *map(str, arguments)])
        written = capsys.readouterr()
        assert result == code, written.err
        return written.out, written.err.splitlines()

    return call


def needs(arch: str) -> pytest.MarkDecorator:
    try:
        toolchain("hip" if arch.startswith("gfx") else "cuda").check_arch(arch)
    except (BadInput, TargetUnavailable) as reason:
        return pytest.mark.skip(str(reason))
    return pytest.mark.skipif(False, reason="")


@pytest.fixture
def no_gpu_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: object) -> None:
        raise TargetUnavailable("there is no compiler: install one")

    monkeypatch.setattr(nvrtc, "check_arch", missing)
    monkeypatch.setattr(HipToolchain, "check_arch", missing)


def of_arch(answer: str, arch: str) -> dict[str, Any]:
    (found,) = [each for each in json.loads(answer)["arches"] if each["arch"] == arch]
    return found


def test_each_kernel_is_reported_and_each_arch_summed_up(command: Compile) -> None:
    out, lines = command("--arch", HOST, "--json")
    kernels = json.loads(out)["kernels"]
    assert len({kernel["problem"] for kernel in kernels}) == len(kernels) > 1
    assert {(kernel["arch"], kernel["op"], Path(kernel["path"]).suffix) for kernel in kernels} == {
        (HOST, NORMS.name, ".so")
    }
    summed = of_arch(out, HOST)
    assert (summed["kernels"], summed["compiled"], summed["failed"]) == (len(kernels), len(kernels), 0)
    assert lines == [f"{HOST}: {len(kernels)} kernels"]


def test_a_person_gets_tables(command: Compile) -> None:
    out, _ = command("--arch", HOST)
    assert f"cast_before_weight=1) for {HOST}" in out
    assert out.splitlines()[-1].endswith("kernels compile")


@needs("sm_90a")
def test_nvidia_gpus_that_are_not_here_are_compiled_for(command: Compile) -> None:
    out, _ = command("--arch", "sm_80,sm_90a", "--json")
    kernels = json.loads(out)["kernels"]
    assert [kernel["arch"] for kernel in kernels] == sorted(kernel["arch"] for kernel in kernels)
    assert all(kernel["registers"] for kernel in kernels)
    assert of_arch(out, "sm_80")["kernels"] == of_arch(out, "sm_90a")["kernels"] > 1


@needs("gfx950")
def test_amd_gpus_that_are_not_here_are_compiled_for(command: Compile) -> None:
    out, _ = command("--arch", "gfx942,gfx950", "--json")
    assert [of_arch(out, arch)["failed"] for arch in ("gfx942", "gfx950")] == [0, 0]
    assert of_arch(out, "gfx950")["compiled"] > 1


def test_all_arches_are_asked_for_at_once(command: Compile, no_gpu_compilers: None) -> None:
    out, lines = command("--all", "--json", code=2)
    assert tuple(each["arch"] for each in json.loads(out)["arches"]) == GPU_ARCHES
    assert lines == [f"{', '.join(GPU_ARCHES)}: there is no compiler: install one"]


@needs("sm_90a")
def test_what_can_be_compiled_is_if_other_arches_cannot(command: Compile, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: object) -> None:
        raise TargetUnavailable("there is no clang: install one")

    monkeypatch.setattr(HipToolchain, "check_arch", missing)
    monkeypatch.setattr(compile_matrix, "GPU_ARCHES", ("sm_90a", "gfx942"))
    out, lines = command("--all", "--json", code=2)
    assert of_arch(out, "sm_90a")["compiled"] > 1
    assert of_arch(out, "sm_90a")["unavailable"] is None
    assert of_arch(out, "gfx942")["unavailable"] == "there is no clang: install one"
    assert lines[-1] == "gfx942: there is no clang: install one"


def test_an_arch_that_is_named_must_have_a_compiler(command: Compile, no_gpu_compilers: None) -> None:
    out, lines = command("--arch", f"{HOST},gfx942", code=2)
    assert (out, lines) == ("", ["autofuse: error: there is no compiler: install one"])


def test_a_kernel_that_does_not_compile_is_a_line_and_the_rest_goes_on(
    command: Compile, edit_kernels: Callable[[str, str, str], None]
) -> None:
    edit_kernels("mla_dual_rms_norm.cpp", "struct Params", "static_assert(Q_WIDTH != 24);\nstruct Params")
    out, lines = command("--arch", HOST, "--json", code=1)
    kernels = json.loads(out)["kernels"]
    (broken,) = [kernel for kernel in kernels if kernel["error"]]
    assert "q_lora_rank=24" in broken["problem"]
    assert "static assertion failed" in broken["error"]
    assert of_arch(out, HOST)["compiled"] == len(kernels) - 1 > 0
    assert lines[-1].startswith(f"{HOST} {broken['problem']} {broken['config']}: ")


@pytest.mark.skipif(HOST not in ("x86-64-v3", "x86-64-v4"), reason="needs an arch besides this machine's")
def test_ctrl_c_reports_what_was_compiled() -> None:
    arguments = ["--arch", f"{HOST},x86-64-v2", "--op", NORMS.name, "--configs", "3", "--json"]
    with subprocess.Popen(
        [sys.executable, "-m", "autofuse", "compile", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stderr.readline().startswith(f"{HOST}: ")
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the compilers at work get it too
        report, lines = process.stdout.read(), process.stderr.read().splitlines()
    assert process.returncode == 130
    assert of_arch(report, HOST)["compiled"] == of_arch(report, HOST)["kernels"] > 0
    assert lines[-1] == "autofuse: stopped; what was compiled is kept, the same command goes on from there"


@needs("sm_90a")
def test_a_compiler_that_dies_takes_one_kernel_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    in_worker = CompilePool._in_worker
    victims = []

    def with_an_accident(pool: CompilePool, kind: str, arch: str, spec: KernelSpec) -> Any:
        if not victims and pool._workers:
            victims.append(spec)
            pool._workers[0].kill()
            pool._workers[0].wait()
        return in_worker(pool, kind, arch, spec)

    monkeypatch.setattr(CompilePool, "_in_worker", with_an_accident)
    outcomes = list(compile_jobs(jobs_for(["sm_90a"], [NORMS], "fp16", 4)))
    assert victims
    failed = [outcome for outcome in outcomes if outcome.error]
    assert len(failed) <= 1  # the one that it was at; none if it was at none
    assert all("died" in outcome.error for outcome in failed)


@needs("sm_90a")
def test_leaving_a_pool_drops_what_waits() -> None:
    specs = [NORMS.spec("cuda", job.problem, job.config) for job in jobs_for(["sm_90a"], [NORMS], "fp32", 9)]
    with compile_pool("cuda", "sm_90a", workers=1) as pool:
        futures = pool.submit(specs)
        futures[0].result()
    assert futures[-1].cancelled()
    assert all(worker.poll() is not None for worker in pool._workers)


@needs("sm_90a")
def test_too_much_shared_memory_for_an_arch_is_skipped(command: Compile, monkeypatch: pytest.MonkeyPatch) -> None:
    spec_of = type(NORMS).spec

    def with_much_shared_memory(self: FusedOp, *arguments: Any) -> KernelSpec:
        return KernelSpec(**{**vars(spec_of(self, *arguments)), "shared_bytes": 150_000})

    monkeypatch.setattr(type(NORMS), "spec", with_much_shared_memory)
    out, _ = command("--arch", "sm_86,sm_90a", "--json")
    kernel = json.loads(out)["kernels"][0]
    assert kernel["shared_bytes"] >= 150_000
    assert kernel["skipped"] == f"a block has {kernel['shared_bytes']} bytes of shared memory, sm_86 at most 101376"
    assert (
        of_arch(out, "sm_86")["skipped"] == of_arch(out, "sm_90a")["compiled"] == of_arch(out, "sm_86")["kernels"] > 1
    )
    assert of_arch(out, "sm_90a")["skipped"] == of_arch(out, "sm_86")["compiled"] == 0


@pytest.mark.parametrize(
    ("arch", "kilobytes"),
    [("sm_80", 163), ("sm_89", 99), ("sm_90a", 227), ("sm_120a", 99), ("gfx942", 64), ("gfx950", 160), ("sm_75", None)],
)
def test_the_shared_memory_of_an_arch_is_known(arch: str, kilobytes: int | None) -> None:
    most = toolchain("hip" if arch.startswith("gfx") else "cuda").most_shared_bytes(arch)
    assert most == (kilobytes and kilobytes << 10)


@pytest.mark.parametrize("kind_arch", [("cuda", "sm_90a"), ("hip", "gfx942"), ("cpu", HOST)], ids=lambda pair: pair[0])
@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_the_kernels_of_an_op_are_a_sound_sample(op: FusedOp, kind_arch: tuple[str, str]) -> None:
    kind, arch = kind_arch
    if kind not in op.kernels:
        assert jobs_for([arch], [op], "bf16", 4) == []
        return
    jobs = jobs_for([arch], [op], "bf16", 4)
    assert jobs == jobs_for([arch], [op], "bf16", 4)
    assert len(set(jobs)) == len(jobs)
    problems = {job.problem for job in jobs}
    assert {op.default_config(kind, problem, 1024) for problem in problems} <= {job.config for job in jobs}
    wanted = {problem["dtype"] for problem in op.sweep_problems()}
    assert {problem["dtype"] for problem in problems} == wanted
    in_cpp = [job for job in jobs if language_of(job.config) == CPP]
    assert all(1 <= sum(job.problem == problem for job in in_cpp) <= 4 for problem in problems)
