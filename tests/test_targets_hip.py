"""AMD GPUs, without one: kernels compile for them, and whatever is missing is one clear line."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from typer.testing import CliRunner

from autofuse.cli.app import app
from autofuse.errors import AutofuseError, BadInput, CompileError, TargetUnavailable
from autofuse.ops import OPS, Problem, get_op
from autofuse.targets import KernelSpec, hip, kind_of_arch, target_of, toolchain

ARCHES = ("gfx90a", "gfx942", "gfx1100", "gfx1201")
TOKENS = 1024
NORMS = get_op("mla_dual_rms_norm")
PROBLEM = NORMS.make_problem(dtype="bf16", q_lora_rank=1536, kv_lora_rank=512, cast_before_weight=True)
PROBLEMS = [
    pytest.param(problem, id=str(problem))
    for op in OPS.values()
    if "hip" in op.kernels
    for problem in op.sweep_problems()
]


def missing_compiler() -> str:
    try:
        hip._clang()
    except TargetUnavailable as error:
        return str(error)
    return ""


needs_clang = pytest.mark.skipif(bool(missing_compiler()), reason=missing_compiler() or "there is one")
needs_no_amd = pytest.mark.skipif(bool(torch.version.hip), reason="PyTorch is a ROCm build")


@pytest.fixture
def fresh_search(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The compiler is looked for again, in this test and after it."""
    hip._clang.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    hip._clang.cache_clear()


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
@pytest.mark.parametrize("problem", PROBLEMS)
def test_kernels_compile_for_amd_gpus(problem: Problem) -> None:
    op = get_op(problem.op)
    space = op.kernel_source("hip").space
    others = random.Random(0).sample(list(space.configs(problem, TOKENS)), 2)
    for number, config in enumerate([op.default_config("hip", problem, TOKENS), *others]):
        assert number or space.refusal(config, problem, TOKENS) is None
        artifact = toolchain("hip").compile(op.spec("hip", problem, config), ARCHES[number])
        assert artifact.path.read_bytes()[:4] == b"\x7fELF"


@needs_clang
@pytest.mark.parametrize("arch", ARCHES)
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
def test_the_command_compiles_for_several_arches() -> None:
    run = CliRunner().invoke(app, ["compile", "--arch", "gfx942,gfx90a", "--configs", "1", "--json"])
    assert run.exit_code == 0, run.output
    assert '"arch": "gfx90a"' in run.output


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
    refusal(error.value)
    assert "\n" in error.value.log


@needs_clang
def test_a_warp_width_that_the_gpu_has_not_is_refused() -> None:
    spec = default_spec()
    narrow = KernelSpec(**{**vars(spec), "defines": {**spec.defines, "WARP_SIZE": 32}})
    with pytest.raises(CompileError, match="WARP_SIZE is not the width"):
        toolchain("hip").compile(narrow, "gfx942")


@needs_no_amd
@pytest.mark.parametrize("command", ["true", "no-such-clang"])
def test_a_chosen_compiler_must_know_amd_gpus(command: str, fresh_search: pytest.MonkeyPatch) -> None:
    fresh_search.setenv("AUTOFUSE_HIP_CLANG", command)
    with pytest.raises(TargetUnavailable, match=f"AUTOFUSE_HIP_CLANG='{command}' is not a clang") as error:
        toolchain("hip").compile(default_spec(), "gfx942")
    refusal(error.value)


@needs_no_amd
def test_without_a_compiler_the_error_says_what_to_install(fresh_search: pytest.MonkeyPatch) -> None:
    fresh_search.setenv("PATH", "")
    with pytest.raises(TargetUnavailable, match="install clang 17 or later with lld") as error:
        toolchain("hip").compile(default_spec(), "gfx942")
    refusal(error.value)
    assert [check.ok for check in toolchain("hip").checks()] == [False]


@needs_no_amd
def test_without_an_amd_gpu_there_is_no_target() -> None:
    with pytest.raises(TargetUnavailable, match="finds no AMD GPU with ROCm") as error:
        toolchain("hip").target(torch.device("cuda"))
    refusal(error.value)
    assert target_of(torch.device("cpu")).kind == "cpu"
