"""What every test may rely on: a cache folder and a database of its own, and small budgets."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import autofuse.kernels_src
from autofuse.ops import Config, FusedOp, Problem
from autofuse.runtime import dispatch
from autofuse.targets import Kernel
from autofuse.tuner.budgets import Effort
from tiny_effort import TINY

# As doctests would import them: a faulty op would be one of everybody's, and Triton need not be there.
collect_ignore = ["faulty", "fp8_kernel.py"]

# Compiled kernels are shared by all tests of a run, its workers, and the processes that tests start; nothing of a
# user's is read or written.
_OWNED = "AUTOFUSE_TESTS_CACHE" not in os.environ
_CACHE = Path(os.environ.get("AUTOFUSE_TESTS_CACHE") or tempfile.mkdtemp(prefix="autofuse-tests-"))
os.environ["AUTOFUSE_TESTS_CACHE"] = os.environ["XDG_CACHE_HOME"] = str(_CACHE)
os.environ["AUTOFUSE_DB"] = str(_CACHE / "tuned.db")


def pytest_unconfigure() -> None:
    if _OWNED:
        shutil.rmtree(_CACHE, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() and not torch.version.hip:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def database_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The default database of this test alone; not there yet."""
    path = tmp_path / "tuned.db"
    monkeypatch.setenv("AUTOFUSE_DB", str(path))
    return path


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each kind of device that there are kernels for; those that are not here are skipped."""
    return torch.device("cuda", 0) if request.param == "cuda" else torch.device("cpu")


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """The configs whose kernels are loaded from here on; those of calls that were bound before are not among them."""
    configs: list[Config] = []
    load = dispatch.load_kernel

    def recording(op: FusedOp, problem: Problem, config: Config, device: torch.device) -> Kernel:
        configs.append(config)
        return load(op, problem, config, device)

    monkeypatch.setattr(dispatch, "load_kernel", recording)
    return configs


@pytest.fixture
def tiny() -> Effort:
    """Budgets that end within seconds and measure nothing well."""
    return TINY


@pytest.fixture
def edit_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str, str], None]]:
    """A function (file, old, new) that edits a kernel source, for this test alone.

    The dispatcher keeps what it has loaded: use a problem that no other test uses.
    """
    folder = tmp_path / "kernels_src"
    shutil.copytree(autofuse.kernels_src.FOLDER, folder)
    cached = (autofuse.kernels_src.sources, autofuse.kernels_src.source_hash)

    def forget() -> None:
        for function in cached:
            function.cache_clear()

    def edit(file: str, old: str, new: str) -> None:
        text = (folder / file).read_text(encoding="utf-8")
        assert old in text, f"{file} has no {old!r}"
        (folder / file).write_text(text.replace(old, new), encoding="utf-8")
        forget()

    monkeypatch.setattr(autofuse.kernels_src, "FOLDER", folder)
    forget()
    yield edit
    monkeypatch.undo()
    forget()
