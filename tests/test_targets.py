"""Compilers, kernel cache and devices: a kernel is compiled once, and whatever is missing is one clear line."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from autofuse import kernels_src
from autofuse.errors import AutofuseError, BadInput, CompileError, LaunchError, TargetUnavailable
from autofuse.ops import get_op
from autofuse.targets import KernelSpec, kind_of_arch, nvrtc, parse_device, target_of, toolchain

CPU = torch.device("cpu")
NORMS = get_op("mla_dual_rms_norm")
PROBLEM = NORMS.make_problem(dtype="bf16", q_lora_rank=96, kv_lora_rank=40, cast_before_weight=True)


def spec(kind: str = "cpu", **defines: int | str) -> KernelSpec:
    made = NORMS.spec(kind, PROBLEM, NORMS.default_config(kind, PROBLEM, 1))
    return replace(made, defines={**made.defines, **defines})


def compile_here(wanted: KernelSpec) -> Path:
    return toolchain("cpu").compile(wanted, target_of(CPU).arch).path


def one_line(error: AutofuseError) -> str:
    text = str(error)
    assert "\n" not in text
    return text


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "autofuse" / "kernels"


# The kernel cache


def test_a_kernel_is_compiled_once(own_cache: Path) -> None:
    first = toolchain("cpu").compile(spec(), target_of(CPU).arch)
    second = toolchain("cpu").compile(spec(), target_of(CPU).arch)
    assert first.seconds > 0
    assert (second.path, second.seconds) == (first.path, 0.0)
    assert first.path.parent == own_cache


def test_every_define_makes_another_kernel(own_cache: Path) -> None:
    assert compile_here(spec()) != compile_here(spec(UNROLL=1))


def test_an_empty_file_in_the_cache_is_compiled_again(own_cache: Path) -> None:
    path = compile_here(spec())
    path.write_bytes(b"")
    assert compile_here(spec()) == path
    assert path.stat().st_size > 0


def test_a_broken_kernel_in_the_cache_is_named(own_cache: Path) -> None:
    artifact = toolchain("cpu").compile(spec(), target_of(CPU).arch)
    artifact.path.write_bytes(b"this is no shared library")
    with pytest.raises(LaunchError) as failure:
        toolchain("cpu").load(spec(), artifact, CPU)
    assert str(artifact.path) in one_line(failure.value)


def test_processes_may_compile_the_same_kernel_at_the_same_time(own_cache: Path) -> None:
    script = (
        "import sys, torch; from autofuse.ops import get_op; from autofuse.runtime.dispatch import load_kernel\n"
        "op = get_op('mla_dual_rms_norm')\n"
        "problem = op.make_problem(dtype='bf16', q_lora_rank=96, kv_lora_rank=40, cast_before_weight=True)\n"
        "sys.stdin.read()\n"
        "load_kernel(op, problem, op.default_config('cpu', problem, 1), torch.device('cpu'))\n"
    )
    start = [sys.executable, "-c", script]
    processes = [subprocess.Popen(start, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    outcomes = [(process.communicate("")[1], process.returncode) for process in processes]
    assert outcomes == [("", 0)] * 3
    assert sorted(path.suffix for path in own_cache.iterdir()) == [".json", ".so"]


def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(TargetUnavailable) as failure:
        compile_here(spec())
    assert "set XDG_CACHE_HOME" in one_line(failure.value)
    assert str(tmp_path / "file") in str(failure.value)


# The C++ compiler


def test_a_kernel_that_does_not_compile_is_one_line_and_a_log(own_cache: Path) -> None:
    with pytest.raises(CompileError) as failure:
        compile_here(spec(ELEMENT="no_such_type"))
    assert "mla_dual_rms_norm.cpp" in one_line(failure.value)
    assert "error" in str(failure.value)
    assert "no_such_type" in failure.value.log
    assert list(own_cache.iterdir()) == []


@pytest.mark.parametrize("command", ["no-such-compiler", "no-such-compiler -m64", " "])
def test_a_compiler_that_is_not_there_is_named(command: str, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", command)
    with pytest.raises(TargetUnavailable) as failure:
        compile_here(spec())
    assert f"CXX={command!r} is not a command that can be run" in one_line(failure.value)


def test_no_compiler_at_all_says_what_to_install(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(TargetUnavailable) as failure:
        compile_here(spec())
    assert one_line(failure.value) == "no C++ compiler found: install g++ or clang++, or set CXX to one"
    assert [check.ok for check in toolchain("cpu").checks()] == [False]


def test_a_compiler_that_only_fails_is_a_compile_error(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(CompileError) as failure:
        compile_here(spec())
    assert one_line(failure.value) == "false does not compile mla_dual_rms_norm.cpp: exit code 1"


def test_the_cpu_is_ready() -> None:
    assert [(check.name, check.ok) for check in toolchain("cpu").checks()] == [("C++ compiler", True), ("OpenMP", True)]


# Devices and arches


@pytest.mark.parametrize("text", ["gpu", "cuda:x", "cpu:cpu", "", "meta", "xpu"])
def test_unknown_devices_are_refused(text: str) -> None:
    with pytest.raises(BadInput, match=f"device '{text}' is none of auto, cpu, cuda, cuda:N"):
        parse_device(text)


def test_a_gpu_that_is_not_there_is_one_line() -> None:
    with pytest.raises(TargetUnavailable) as failure:
        parse_device("cuda:99")
    assert one_line(failure.value).startswith("device cuda:99:")


@pytest.mark.parametrize("arch", ["sm_1", "sm_", "sm_90x", ""])
def test_unknown_arches_are_refused_with_those_that_are_known(arch: str) -> None:
    kind = kind_of_arch(arch)
    if kind == "cuda":
        needs_nvrtc()
    with pytest.raises(BadInput) as failure:
        toolchain(kind).compile(spec(kind), arch)
    assert f"arch {arch!r}" in one_line(failure.value)


# NVIDIA, without a GPU


def needs_nvrtc() -> None:
    try:
        nvrtc.version()
    except TargetUnavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100a"])
def test_cuda_kernels_compile_without_a_gpu(arch: str) -> None:
    needs_nvrtc()
    artifact = toolchain("cuda").compile(spec("cuda"), arch)
    assert artifact.path.read_bytes().startswith(b"\x7fELF")
    assert artifact.resources.registers
    assert artifact.resources.spill_bytes == 0


def test_a_cuda_kernel_that_does_not_compile_is_one_line_and_a_log() -> None:
    needs_nvrtc()
    with pytest.raises(CompileError) as failure:
        toolchain("cuda").compile(spec("cuda", ELEMENT="no_such_type"), "sm_90a")
    assert "NVRTC does not compile mla_dual_rms_norm.cu for sm_90a: " in one_line(failure.value)
    assert "no_such_type" in failure.value.log


def test_without_cupy_the_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    with pytest.raises(TargetUnavailable) as failure:
        toolchain("cuda").compile(spec("cuda"), "sm_90a")
    assert "install the project with its 'cuda' extra" in one_line(failure.value)


def test_ptxas_report_is_read() -> None:
    log = (
        "ptxas info    : Function properties for norm\n"
        "    0 bytes stack frame, 24 bytes spill stores, 16 bytes spill loads\n"
        "ptxas info    : Used 40 registers, used 1 barriers, 1088 bytes smem, 400 bytes cmem[0]\n"
    )
    resources = nvrtc.ptxas_resources(log)
    assert (resources.registers, resources.spill_bytes, resources.shared_bytes) == (40, 40, 1088)


def test_what_is_compiled_is_what_the_caches_key_was_made_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "kernels_src"
    shutil.copytree(kernels_src.FOLDER, folder)
    monkeypatch.setattr(kernels_src, "FOLDER", folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernels_src.sources.cache_clear()
    try:
        kernels_src.sources("self_check.cpp")
        (folder / "self_check.cpp").write_text("#error edited since it was read")
        chain = toolchain("cpu")
        spec = KernelSpec("self_check.cpp", "self_check", {"UNUSED": 1}, "P")
        assert chain.compile(spec, target_of(torch.device("cpu")).arch).path.exists()
    finally:
        kernels_src.sources.cache_clear()
