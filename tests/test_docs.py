"""The pages under docs/ say what the code does: tables agree with it, and the worked example runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

import bench_search
import bench_timing
import database_tables
import language_table
from autofuse.cli.app import app
from autofuse.graph.fusions import FUSIONS
from autofuse.graph.settings import LEVELS, UNTUNED
from autofuse.models import PRESETS
from autofuse.ops import OPS, Problem
from bench.showing import replace_generated
from fusion_gains import BEGIN, DOCUMENT, Measured, flags_of, layers_in, markdown, recorded

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def table(text: str, first_column: str) -> list[list[str]]:
    """The rows of the table whose first column has that name, without backquotes."""
    after = f"\n{text}".partition(f"\n| {first_column} |")[2].splitlines()[2:]
    lines = []
    for line in after:
        if not line.startswith("|"):
            break
        lines.append([cell.strip().replace("`", "") for cell in line.strip("|").split("|")])
    return lines


def test_every_fusion_has_its_row_and_nothing_else_has() -> None:
    rows = [row[:3] for row in table(page("fusions.md"), "flag")]
    assert sorted(rows) == sorted([fusion.name, f"O{fusion.level}", fusion.op] for fusion in FUSIONS)


def test_every_fusion_has_its_conditions() -> None:
    conditions = page("fusions.md").partition("## Conditions")[2].partition("## ")[0]
    assert set(re.findall(r"^\*\*`(\w+)`\*\*", conditions, re.MULTILINE)) == {fusion.name for fusion in FUSIONS}


def test_every_kernel_in_triton_has_its_row() -> None:
    rows = [tuple(row) for row in table(page("triton.md"), "op")]
    kernels = {(op.name, f"kernels_src/{kernel.file}") for op in OPS.values() for kernel in op.triton_kernels.values()}
    assert sorted(rows) == sorted(kernels)


def test_levels_name_what_they_switch_on() -> None:
    rows = table(page("levels.md"), "level")
    assert [row[0].split()[0] for row in rows] == [*LEVELS]
    for number, row in enumerate(rows):
        named = set(re.findall(r"fuse_\w+", row[1]))
        assert named == {fusion.name for fusion in FUSIONS if fusion.level == number}


def test_levels_name_what_may_become_of_unmeasured_sites() -> None:
    assert [row[0].split()[0] for row in table(page("levels.md"), "value")] == [*UNTUNED]


def test_the_gains_are_those_of_the_committed_benchmarks() -> None:
    document = DOCUMENT.read_text(encoding="utf-8")
    generated = markdown(recorded(), layers_in())
    assert replace_generated(document, generated, BEGIN) == document, "run scripts/fusion_gains.py --markdown"


def test_gains_are_the_least_and_the_most_of_each_range() -> None:
    problem = Problem.parse("mla_dual_rms_norm(dtype=bf16)")
    rows = table(markdown([Measured("H", problem, {1: 3.0, 16: 2.5, 64: 1.204, 8192: 0.9})], []), "fusion")
    by_flag = {row[0]: row[1:] for row in rows}
    assert by_flag["fuse_mla_dual_rms_norm"] == ["H", str(problem), "2.50–3.00×", "1.20×", "–", "0.90×"]
    assert by_flag["fuse_attn_quant"][0] == "not measured"


def test_fusions_that_share_an_op_are_told_apart_by_their_problems() -> None:
    alone, normed = (Problem.parse(f"fp8_group_quant(dtype=bf16,width=64,norm={norm})") for norm in (0, 1))
    assert (flags_of(alone), flags_of(normed)) == (["fuse_quant"], ["fuse_norm_quant"])


def test_the_databases_figures_are_those_of_the_committed_benchmarks() -> None:
    document = page("database.md")
    tables = database_tables.recorded("database_lookup"), database_tables.recorded("database_stress")
    assert database_tables.with_tables(document, *tables) == document, "run scripts/database_tables.py --markdown"


def test_the_databases_tables_have_a_row_for_each_size_and_each_stress() -> None:
    facts = {
        "cpu": "A (2 threads)",
        "load": 0.1,
        "python": "3.12",
        "sqlite": "3.40",
        "measured_at": "2026-01-02T03:04:05Z",
    }
    times = {"first_us": 4200.0, "first_best_us": 4100.0, "other_us": 2000.0, "other_best_us": 1900.0}
    lookup = {
        **facts,
        "rows": [{"winners": 100_000, "bytes": 3 << 20, **times, "again_us": 0.5, "again_best_us": 0.44}],
    }
    text = database_tables.lookup_table(lookup)
    assert text.startswith("A (2 threads), load 0.1 at the start, Python 3.12, SQLite 3.40, measured 2026-01-02:\n")
    assert table(text, "winners") == [["100,000", "3.0", "4.20 (4.10)", "2.00 (1.90)", "0.50 (0.44)"]]
    outcomes = [{"name": "kills", "faults": ["a row is gone"], "counts": {"write": 1200, "import": 3}, "seconds": 61.4}]
    rows = table(database_tables.stress_table({**facts, "outcomes": outcomes}), "stress")
    assert rows == [["kills", "1", "import: 3; write: 1,200", "61"]]


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert not missing


def test_the_worked_example_runs(tmp_path: Path) -> None:
    """A copy of the package with the page's fusion, registered as the page says, passes the page's test."""
    fusion, registration, test = re.findall(r"```python\n(.*?)```", page("adding-a-fusion.md"), re.DOTALL)
    package = tmp_path / "autofuse"
    shutil.copytree(ROOT / "autofuse", package, ignore=shutil.ignore_patterns("__pycache__"))
    fusions = package / "graph" / "fusions"
    (fusions / "qk_norm.py").write_text(fusion, encoding="utf-8")
    line, entry = (part.strip() for part in registration.strip().split("\n\n"))
    text = (fusions / "__init__.py").read_text(encoding="utf-8")
    imports, opening = "from autofuse.graph.fusions.quant", "FUSIONS: tuple[Fusion, ...] = (\n"
    assert imports in text
    assert opening in text
    text = text.replace(imports, f"{line}\n{imports}").replace(opening, f"{opening}    {entry}\n")
    (fusions / "__init__.py").write_text(text, encoding="utf-8")
    (tmp_path / "test_qk_norm.py").write_text(test, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
        str(tmp_path),
    ]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "2 passed" in run.stdout


def test_the_page_on_tuning_names_every_preset_and_only_options_that_there_are() -> None:
    text = page("tuning.md")
    presets = text.partition("Presets: ")[2].partition(". ")[0]
    assert re.findall(r"`([^`]+)`", presets) == list(PRESETS)
    command = get_command(app).commands["tune"]  # type: ignore[attr-defined]
    known = {option for parameter in command.params for option in parameter.opts}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)) - {"--kills", "--record", "--most", "--markdown"} <= known


def test_the_table_of_languages_is_the_recorded_one() -> None:
    text = language_table.DOCUMENT.read_text(encoding="utf-8")
    assert replace_generated(text, language_table.table(language_table.recorded()), language_table.BEGIN) == text


def test_the_table_of_ways_of_timing_is_the_recorded_one() -> None:
    text = bench_timing.DOCUMENT.read_text(encoding="utf-8")
    rows = json.loads(bench_timing.RECORDED.read_text(encoding="utf-8"))
    assert replace_generated(text, bench_timing.table(rows), bench_timing.BEGIN) == text


def test_the_table_of_searches_is_the_recorded_one() -> None:
    text = bench_search.DOCUMENT.read_text(encoding="utf-8")
    table = bench_search.markdown(bench_search.recorded_rows(), bench_search.loaded([bench_search.FOLDER]))
    assert replace_generated(text, table, bench_search.BEGIN) == text, "run scripts/bench_search.py --markdown"
