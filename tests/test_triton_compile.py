"""Kernels in Triton become binaries for GPUs that are not here, whose launch is what the launchers take for granted."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autofuse.errors import AutofuseError, CompileError, TargetUnavailable
from autofuse.ops import OPS, Config, FusedOp, get_op
from autofuse.targets import KernelSpec, kind_of_arch, toolchain
from autofuse.targets import triton as triton_target
from autofuse.targets.base import HIDDEN_ARGUMENTS, field_offsets
from autofuse.targets.triton import argument_pointers, launched, triton_unavailable
from autofuse.tuner.compile_ahead import compile_pool
from autofuse.tuner.compile_matrix import jobs_for

needs_triton = pytest.mark.skipif(triton_unavailable() is not None, reason=str(triton_unavailable()))

NORMS = get_op("mla_dual_rms_norm")
PROBLEM = NORMS.make_problem(dtype="bf16", q_lora_rank=1536, kv_lora_rank=512, cast_before_weight=True)
IN_TRITON = [pytest.param(op, id=op.name) for op in OPS.values() if "cuda" in op.triton_kernels]


def spec(kind: str = "cuda", **changes: int) -> KernelSpec:
    config = Config.of(NORMS.triton_kernels[kind].default(PROBLEM, 64), **changes)
    return NORMS.spec(kind, PROBLEM, config)


@pytest.fixture
def assemblies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[KernelSpec, str]]:
    """Of all that is compiled from now on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    check = triton_target._check_launchable
    seen: list[tuple[KernelSpec, str]] = []

    def look(spec: KernelSpec, answer: Any, what: str) -> None:
        seen.append((spec, answer["assembly"]))
        check(spec, answer, what)

    monkeypatch.setattr(triton_target, "_check_launchable", look)
    return seen


@pytest.fixture
def assembly(assemblies: list[tuple[KernelSpec, str]]) -> Callable[[KernelSpec, str], str]:
    """Compiles and gives the assembly."""

    def compiled(wanted: KernelSpec, arch: str) -> str:
        toolchain(kind_of_arch(arch)).compile(wanted, arch)
        return assemblies[-1][1]

    return compiled


# What is compiled


@pytest.mark.parametrize("op", IN_TRITON)
def test_an_argument_is_declared_for_each_field_and_each_constant_is_given(op: FusedOp) -> None:
    for problem in op.sweep_problems():
        config = op.triton_kernels["cuda"].default(problem, 64)
        made = op.spec("cuda", problem, config)
        assert made.triton is not None
        text = re.sub(r"#.*", "", (Path(triton_target.__file__).parents[2] / "kernels_src" / made.source).read_text())
        declared = re.search(rf"^def {made.entry}\((.*?)^\)", text, re.MULTILINE | re.DOTALL)
        assert declared is not None
        names = [name.strip() for name in declared[1].split(",") if name.strip()]
        constants = {name.removesuffix(": tl.constexpr") for name in names if name.endswith(": tl.constexpr")}
        assert len(names) - len(constants) == len(made.triton.signature) == len(op.binding(problem).fields)
        assert constants <= set(made.defines)


def test_addresses_and_strides_are_multiples_of_what_every_launched_call_has() -> None:
    made = spec()
    assert made.triton is not None
    assert made.triton.signature == (
        *[("*bf16", 16)] * 6,
        *[("i64", 8)] * 2,
        ("i32", 1),
        *[("fp32", 1)] * 2,
    )
    narrow = NORMS.make_problem(dtype="bf16", q_lora_rank=250, kv_lora_rank=514, cast_before_weight=True)
    config = NORMS.triton_kernels["cuda"].default(narrow, 64)
    signature = NORMS.spec("cuda", narrow, config).triton.signature  # type: ignore[union-attr]
    assert signature[0] == ("*bf16", 4)
    assert signature[6] == ("i64", 2)
    assert NORMS.launch_shape(narrow, config).align == 4


def test_the_pointers_of_a_launch_are_the_fields_and_then_nothing() -> None:
    made = spec()
    params = ctypes.create_string_buffer(88)
    pointers = list(argument_pointers(made, params))
    base = ctypes.addressof(params)
    offsets = field_offsets(made.params_format)
    assert pointers[: len(offsets)] == [base + offset for offset in offsets]
    hidden = pointers[len(offsets) :]
    assert len(hidden) == HIDDEN_ARGUMENTS
    assert all(ctypes.c_void_p.from_address(int(address or 0)).value is None for address in hidden)
    assert list(argument_pointers(replace(made, triton=None), params)) == [base]


def test_jobs_of_a_language_are_few_and_only_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from autofuse.ops import base

    def in_triton(**options: int) -> int:
        jobs = jobs_for(["sm_90a", "gfx942"], [NORMS], "bf16", 1, **options)
        return sum("TRITON" in job.config for job in jobs)

    monkeypatch.setattr(base, "triton_unavailable", lambda: None)
    assert (in_triton(), in_triton(triton_configs=3), in_triton(triton_configs=0)) == (2, 6, 0)
    monkeypatch.setattr(base, "triton_unavailable", lambda: "there is no triton")
    assert in_triton() == 0


def test_without_triton_compiling_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_target, "triton_unavailable", lambda: "there is no triton: install it")
    with pytest.raises(TargetUnavailable, match="there is no triton"):
        toolchain("cuda").compile(spec(), "sm_90a")


# Binaries


@needs_triton
def test_a_cubin_takes_the_fields_as_arguments_and_at_most_the_hidden_ones_more(
    assembly: Callable[[KernelSpec, str], str],
) -> None:
    made = spec()
    text = assembly(made, "sm_90a")
    entry = re.search(rf"\.entry {made.entry}\((.*?)\)", text, re.DOTALL)
    assert entry is not None
    kinds = re.findall(r"\.param \.(\w+)", entry[1])
    assert kinds[:11] == [*["u64"] * 8, "u32", *["f32"] * 2]
    assert 0 <= len(kinds) - 11 <= HIDDEN_ARGUMENTS
    assert set(kinds[11:]) <= {"u64"}
    assert "ld.global.v4.b32" in text


@needs_triton
@pytest.mark.parametrize("arch", ["sm_90a", "sm_80", "gfx942"])
@pytest.mark.parametrize("op", IN_TRITON)
def test_every_kind_of_problem_compiles(op: FusedOp, arch: str, assemblies: list[tuple[KernelSpec, str]]) -> None:
    """And what waits for the kernel before touches nothing of it before that. For other arches some must do: a kernel
    takes the compiler a second or two.
    """
    kind = kind_of_arch(arch)
    kernel, problems = op.triton_kernels[kind], op.sweep_problems()[:: 1 if arch == "sm_90a" else 4]
    configs = [Config.of(kernel.default(problem, 64), PDL=int(kind == "cuda")) for problem in problems]
    specs = [op.spec(kind, problem, config) for problem, config in zip(problems, configs, strict=True)]
    with compile_pool(kind, arch) as pool:
        artifacts = [future.result() for future in pool.submit(specs)]
    assert all(not artifact.resources.spill_bytes for artifact in artifacts)
    for made, text in assemblies:
        if arch == "sm_90a":
            assert text.count("griddepcontrol.wait") == 1, made
            # Loads that are staged through shared memory are asynchronous copies.
            touched = [text.index(access) for access in ("ld.global", "cp.async", "st.global") if access in text]
            assert len(touched) > 1, made
            assert text.index("griddepcontrol.wait") < min(touched), made
        else:
            assert "griddepcontrol" not in text


@needs_triton
@pytest.mark.parametrize("pdl", [1, 2])
def test_nothing_of_other_kernels_is_touched_before_the_wait(
    pdl: int, assembly: Callable[[KernelSpec, str], str]
) -> None:
    text = assembly(spec(PDL=pdl), "sm_90a")
    wait, start = text.index("griddepcontrol.wait"), text.index("griddepcontrol.launch_dependents")
    assert wait < min(text.index("ld.global"), text.index("st.global"))
    assert (start < wait) == (pdl == 1)


@needs_triton
def test_earlier_gpus_get_no_instructions_of_programmatic_launch(assembly: Callable[[KernelSpec, str], str]) -> None:
    assert "griddepcontrol" not in assembly(spec(PDL=1), "sm_80")


@needs_triton
@pytest.mark.parametrize(("arch", "threads"), [("gfx942", 256), ("gfx1100", 128)])
def test_amds_warps_have_as_many_lanes_as_triton_gives_them(
    arch: str, threads: int, assembly: Callable[[KernelSpec, str], str]
) -> None:
    made = spec("hip")
    assert f".max_flat_workgroup_size: {threads}" in re.sub(" +", " ", assembly(made, arch))
    artifact = toolchain("hip").compile(made, arch)
    assert launched(made, artifact, arch).block == threads
    assert artifact.resources.registers


@needs_triton
def test_a_kernel_is_compiled_once_and_knows_its_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = toolchain("cuda").compile(spec(), "sm_90a")
    again = toolchain("cuda").compile(spec(), "sm_90a")
    assert first.seconds > 0
    assert (again.path, again.seconds, again.resources) == (first.path, 0.0, first.resources)
    assert launched(spec(), again, "sm_90a").shared_bytes == first.resources.shared_bytes
    assert first.resources.registers
    assert {path.name for path in first.path.parent.iterdir()} == {first.path.name, first.path.stem + ".json"}


@needs_triton
@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("rms_normed(x, weight", "tl.no_such_function(x, weight", "no_such_function"),
        ("block < q_blocks:", "block <", "SyntaxError"),
        ("import triton\n", "import os, triton\nos.abort()\n", "died"),
    ],
)
def test_a_kernel_that_triton_refuses_is_one_line(
    old: str, new: str, said: str, edit_kernels: Callable[[str, str, str], None]
) -> None:
    edit_kernels("mla_dual_rms_norm.py", old, new)
    with pytest.raises(CompileError) as failure:
        toolchain("cuda").compile(spec(), "sm_90a")
    error: AutofuseError = failure.value
    assert "\n" not in str(error)
    assert said in str(error)
    assert "mla_dual_rms_norm.py for sm_90a" in str(error)


@needs_triton
def test_settings_for_other_kernels_do_not_reach_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("TRITON_INTERPRET", "DISABLE_PTXAS_OPT", "TRITON_KERNEL_DUMP"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "not here"))
    assert toolchain("cuda").compile(spec(), "sm_90a").path.exists()
    assert not (tmp_path / "not here").exists()


# Tensor memory of Blackwell: what a kernel allocates itself


@needs_triton
def test_a_product_may_use_tensor_memory(assembly: Callable[[KernelSpec, str], str]) -> None:
    op = get_op("mla_v_up_quant")
    problem = op.make_problem(
        dtype="bf16", heads=16, kv_lora_rank=512, v_head_dim=128, group=128, ue8m0=0, layout=0, w_constant=1
    )
    tile = Config.of(COLUMNS=128, DEPTH=64, NUM_STAGES=2, NUM_WARPS=8, PDL=2, TOKENS=128, TRITON=1)
    assert "tcgen05.alloc" in assembly(op.spec("cuda", problem, tile), "sm_100a")


@pytest.mark.parametrize(("columns", "fits"), [(0, True), (512, True), (513, False)])
def test_no_kernel_has_more_tensor_memory_than_there_is(
    columns: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_target, "_version", lambda: "3.9.0")
    made = spec()
    assert made.triton is not None
    answer = {"name": made.entry, "num_warps": made.triton.num_warps, "scratch": {}, "tensor_memory": columns}
    if fits:
        triton_target._check_launchable(made, answer, "a kernel")
    else:
        with pytest.raises(CompileError, match="needs 513 columns of tensor memory, of which there are 512"):
            triton_target._check_launchable(made, answer, "a kernel")
