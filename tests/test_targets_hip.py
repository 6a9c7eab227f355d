"""AMD GPUs, without one: kernels compile for them, and whatever is missing is one clear line."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from autofuse.errors import AutofuseError, BadInput, CompileError, TargetUnavailable
from autofuse.ops import OPS, Config, FusedOp, get_op
from autofuse.targets import KernelSpec, hip, kind_of_arch, target_of, toolchain
from autofuse.tuner.compile_matrix import compile_jobs, jobs_for

ARCHES = ("gfx90a", "gfx942", "gfx1100", "gfx1201")
TOKENS = 1024
NORMS = get_op("mla_dual_rms_norm")
PROBLEM = NORMS.make_problem(dtype="bf16", q_lora_rank=1536, kv_lora_rank=512, cast_before_weight=True)
WITH_KERNELS = [op for op in OPS.values() if "hip" in op.kernels]


def missing_compiler(arch: str) -> str:
    try:
        toolchain("hip").check_arch(arch)
    except (BadInput, TargetUnavailable) as error:
        return str(error)
    return ""


def needs_compiler(arch: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(bool(missing_compiler(arch)), reason=missing_compiler(arch) or "there is one")


needs_clang = needs_compiler("gfx942")
EACH_ARCH = pytest.mark.parametrize(
    "arch", [pytest.param(arch, marks=needs_compiler(arch)) for arch in (*ARCHES, "gfx950")]
)
needs_no_amd = pytest.mark.skipif(bool(torch.version.hip), reason="PyTorch is a ROCm build")


@pytest.fixture
def fresh_search(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The compiler is looked for again, in this test and after it."""

    def forget() -> None:
        for function in (hip._clang, hip._clangs, hip._known_arches, hip._version):
            function.cache_clear()

    forget()
    yield monkeypatch
    monkeypatch.undo()
    forget()


@pytest.fixture
def fake_clangs(fresh_search: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """A function (name → arches) that makes these the only clangs there are."""

    def make(**known: str) -> None:
        for name, arches in known.items():
            (tmp_path / name.replace("_", "-")).write_text(f"#!/bin/sh\nprintf '\\t%s\\n' {arches}\n")
            (tmp_path / name.replace("_", "-")).chmod(0o755)
        fresh_search.setenv("PATH", str(tmp_path))
        fresh_search.delenv("AUTOFUSE_HIP_CLANG", raising=False)
        fresh_search.setattr(hip, "find_spec", lambda name: None)

    return make


def default_spec() -> KernelSpec:
    return NORMS.spec("hip", PROBLEM, NORMS.default_config("hip", PROBLEM, TOKENS))


def refusal(error: AutofuseError) -> str:
    assert "\n" not in str(error)
    return str(error)


def test_arch_names_tell_the_vendor() -> None:
    assert [kind_of_arch(arch) for arch in ("gfx942", "gfx1100", "sm_90a", "x86-64-v3")] == [
        "hip",
        "hip",
        "cuda",
        "cpu",
    ]


@needs_clang
@pytest.mark.parametrize("op", WITH_KERNELS, ids=lambda op: op.name)
def test_kernels_compile_for_amd_gpus(op: FusedOp) -> None:
    # Each kernel for one of the arches.
    jobs = [job for n, arch in enumerate(ARCHES) for job in jobs_for([arch], [op], "bf16", 2)[n :: len(ARCHES)]]
    for outcome in compile_jobs(jobs):
        assert outcome.artifact is not None, outcome
        assert outcome.artifact.path.read_bytes()[:4] == b"\x7fELF"


@pytest.mark.parametrize("op", WITH_KERNELS, ids=lambda op: op.name)
def test_default_configs_are_of_the_search_space(op: FusedOp) -> None:
    for problem in op.sweep_problems():
        config = op.default_config("hip", problem, TOKENS)
        assert op.kernel_source("hip").space.refusal(config, problem, TOKENS) is None


@EACH_ARCH
def test_the_compiler_says_what_a_kernel_takes(arch: str) -> None:
    resources = toolchain("hip").compile(default_spec(), arch).resources
    assert 0 < (resources.registers or 0) <= 256
    assert (resources.spill_bytes, resources.shared_bytes) == (0, 4 * (3 + 1))  # a float for each warp


@needs_clang
def test_a_kernel_is_compiled_once() -> None:
    first = toolchain("hip").compile(default_spec(), "gfx942")
    again = toolchain("hip").compile(default_spec(), "gfx942")
    assert (again.path, again.seconds, again.resources) == (first.path, 0.0, first.resources)


@needs_clang
def test_arches_that_the_compiler_does_not_know_are_refused() -> None:
    with pytest.raises(BadInput, match=r"compiles for .*gfx942") as error:
        toolchain("hip").compile(default_spec(), "gfx999")
    refusal(error.value)


def test_names_that_are_no_arch_are_refused() -> None:
    with pytest.raises(BadInput, match="'gfx-942' is not an AMD GPU's"):
        toolchain("hip").compile(default_spec(), "gfx-942")


@needs_clang
def test_what_does_not_compile_is_one_line_with_the_log_beside_it() -> None:
    spec = default_spec()
    broken = KernelSpec(**{**vars(spec), "defines": {**spec.defines, "VEC_BYTES": 32}})
    with pytest.raises(CompileError, match=r"does not compile mla_dual_rms_norm.cu for gfx942: .*error") as error:
        toolchain("hip").compile(broken, "gfx942")
    assert re.match(r"clang\S* does not compile mla_dual_rms_norm.cu for gfx942: \w+.cuh?:\d+:", refusal(error.value))
    assert "\n" in error.value.log


@needs_clang
def test_a_small_block_may_have_all_registers() -> None:
    config = Config.parse("KV_WARPS=4,PDL=0,PREFETCH=0,Q_WARPS=1,READ_ONCE=1,ROWS=1,UNROLL=4,VEC_BYTES=4,WARP_SIZE=64")
    resources = toolchain("hip").compile(NORMS.spec("hip", PROBLEM, config), "gfx942").resources
    assert resources.registers is not None
    assert resources.registers > 128  # what there is for each of 1,024 threads
    assert resources.spill_bytes == 0


@needs_clang
def test_a_warp_width_that_the_gpu_has_not_is_refused() -> None:
    spec = default_spec()
    narrow = KernelSpec(**{**vars(spec), "defines": {**spec.defines, "WARP_SIZE": 32}})
    with pytest.raises(CompileError, match="WARP_SIZE is not the width"):
        toolchain("hip").compile(narrow, "gfx942")


@needs_no_amd
@pytest.mark.skipif(find_spec("ziglang") is None, reason="ziglang is not installed")
def test_the_package_ziglang_is_compiler_enough(fresh_search: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("sh", "ld"):  # no clang, and no lld
        (tmp_path / name).symlink_to(shutil.which(name) or name)
    fresh_search.setenv("PATH", str(tmp_path))
    fresh_search.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    artifact = toolchain("hip").compile(default_spec(), "gfx950")
    assert artifact.path.read_bytes()[:4] == b"\x7fELF"
    assert artifact.resources.registers
    (check, _) = toolchain("hip").checks()
    assert "ziglang" in check.found


@needs_no_amd
@pytest.mark.parametrize(
    "message", ['error: unable to execute command: Executable "lld" doesn\'t exist!', "error: posix_spawn failed"]
)
def test_a_clang_without_a_linker_says_so(
    message: str, fake_clangs: Callable[..., None], fresh_search: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_clangs(clang_19="gfx942")
    script = (tmp_path / "clang-19").read_text() + f"echo {shlex.quote(message)} >&2\nexit 1\n"
    (tmp_path / "clang-19").write_text(script)
    fresh_search.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(TargetUnavailable, match="clang-19 finds no lld to link with: install") as error:
        toolchain("hip").compile(default_spec(), "gfx942")
    refusal(error.value)


@needs_no_amd
def test_the_newest_clang_that_knows_an_arch_compiles_for_it(fake_clangs: Callable[..., None]) -> None:
    fake_clangs(clang_17="gfx90a", clang_18="gfx90a gfx942", clang_19="gfx90a gfx942", clang="gfx950")
    assert [hip._clang(arch).command for arch in ("gfx942", "gfx950")] == [("clang-19",), ("clang",)]
    with pytest.raises(
        BadInput, match=r"arch 'gfx999': clang-19, clang-18, clang-17, clang compiles for gfx90a"
    ) as error:
        toolchain("hip").check_arch("gfx999")
    assert "'amd' extra" in refusal(error.value)


@needs_no_amd
def test_a_chosen_compiler_comes_first(fake_clangs: Callable[..., None], fresh_search: pytest.MonkeyPatch) -> None:
    fake_clangs(mine="gfx90a gfx942", clang_19="gfx90a gfx942", clang_20="gfx950")
    fresh_search.setenv("AUTOFUSE_HIP_CLANG", "mine")
    assert [hip._clang(arch).command for arch in ("gfx942", "gfx950")] == [("mine",), ("clang-20",)]


@needs_no_amd
@pytest.mark.parametrize("command", ["true", "no-such-clang", "'"])
def test_a_chosen_compiler_must_know_amd_gpus(command: str, fresh_search: pytest.MonkeyPatch) -> None:
    fresh_search.setenv("AUTOFUSE_HIP_CLANG", command)
    with pytest.raises(TargetUnavailable, match=re.escape(f"AUTOFUSE_HIP_CLANG={command!r} is not a clang")) as error:
        toolchain("hip").compile(default_spec(), "gfx942")
    refusal(error.value)


@needs_no_amd
def test_without_a_compiler_the_error_says_what_to_install(fresh_search: pytest.MonkeyPatch) -> None:
    fresh_search.setenv("PATH", "")
    fresh_search.setattr(hip, "find_spec", lambda name: None)
    with pytest.raises(TargetUnavailable, match="'amd' extra, or clang 17 or later with lld") as error:
        toolchain("hip").compile(default_spec(), "gfx942")
    refusal(error.value)
    assert [check.ok for check in toolchain("hip").checks()] == [False]


@needs_no_amd
def test_without_an_amd_gpu_there_is_no_target() -> None:
    with pytest.raises(TargetUnavailable, match="finds no AMD GPU with ROCm") as error:
        toolchain("hip").target(torch.device("cuda"))
    refusal(error.value)
    assert target_of(torch.device("cpu")).kind == "cpu"
