"""The backend around the pass: Inductor's modes, options, caches and a user's own passes work as without it."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import HIDDEN, MlaLatents, isolate, without_code_generation
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import run_and_get_code

from autofuse.graph import notice, sources
from autofuse.graph.explain import explain
from autofuse.graph.report_store import last_reports

FUSE = {"autofuse.untuned": "fuse"}


@pytest.fixture(autouse=True)
def _isolated(monkeypatch, tmp_path, tmp_path_factory):
    isolate(monkeypatch, tmp_path, tmp_path_factory.getbasetemp() / "cache")
    notice.warn_once.cache_clear()
    torch._dynamo.reset()


def hidden():
    torch.manual_seed(0)
    return torch.randn(2, 5, HIDDEN, dtype=torch.bfloat16)


def compiled_code(model, **options):
    torch._dynamo.reset()
    with torch.no_grad():
        result, code = run_and_get_code(torch.compile(model, **options), hidden())
    # All but the number of the compilation.
    return result, re.sub(r"# AOT ID: .*", "", "\n".join(code))


def warnings_in(caplog):
    return [record.message for record in caplog.records if record.name.startswith("autofuse")]


def test_what_is_not_fused_is_exactly_inductors_code():
    model = MlaLatents()
    _, plain = compiled_code(model, backend="inductor")
    _, skipped = compiled_code(model, backend="autofuse")
    assert skipped == plain
    (site,) = last_reports()[-1].sites
    assert (site.fused, site.rule) == (False, "untuned")


def test_mode_and_other_options_reach_inductor(monkeypatch):
    model = MlaLatents()
    seen = {}

    class Spy(CustomGraphPass):
        def __call__(self, graph):
            seen.update(cudagraphs=torch._inductor.config.triton.cudagraphs, dce=torch._inductor.config.dce)

        def uuid(self):
            return "spy"

    options = {**FUSE, "dce": True, "post_grad_custom_pre_pass": Spy()}
    from torch._inductor import config

    with without_code_generation(), config.patch(post_grad_custom_pre_pass=Spy()), torch.no_grad():
        torch.compile(model, backend="autofuse", options=options)(hidden())
        assert seen == {"cudagraphs": config.triton.cudagraphs, "dce": True}
        torch.compile(model, backend="autofuse", mode="reduce-overhead")(hidden())
        assert seen["cudagraphs"] is True


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_modes_compute_the_same(mode):
    model = MlaLatents()
    with without_code_generation(), torch.no_grad():
        result = torch.compile(model, backend="autofuse", mode=mode, fullgraph=True)(hidden())
    torch.testing.assert_close(result, model(hidden()), atol=2e-2, rtol=2e-2)


class CountingPass(CustomGraphPass):
    """A user's own pass: counts the nodes it is shown."""

    def __init__(self, name):
        self.name, self.nodes = name, []

    def __call__(self, graph):
        self.nodes.append([str(node.target) for node in graph.nodes])

    def uuid(self):
        return self.name


@pytest.mark.parametrize("place", ["options", "config"])
def test_a_users_own_pass_runs_first(place):
    theirs = CountingPass("theirs")
    options = {**FUSE, **({"post_grad_custom_post_pass": theirs} if place == "options" else {})}
    from torch._inductor import config

    patched = config.patch(post_grad_custom_post_pass=theirs if place == "config" else None)
    with patched, without_code_generation(), torch.no_grad():
        torch.compile(MlaLatents(), backend="autofuse", options=options)(hidden())
    (shown,) = theirs.nodes
    assert "aten.rsqrt.default" in shown
    assert last_reports()[-1].fused == 1


def test_a_users_plain_function_switches_the_caches_off_as_it_would_without_us():
    counters = torch._dynamo.utils.counters["inductor"]
    options = {**FUSE, "post_grad_custom_post_pass": lambda graph: None}
    for _ in range(2):
        torch._dynamo.reset()
        counters.clear()
        with torch.no_grad():
            torch.compile(MlaLatents(), backend="autofuse", options=options)(hidden())
        assert not counters["fxgraph_cache_hit"]
        assert not last_reports()[-1].from_cache


SECOND_PROCESS = """
import json, sys, torch
sys.path[:0] = {path!r}
from models import HIDDEN, MlaLatents
from autofuse.graph.report_store import last_reports
torch.manual_seed(0)
model, x = MlaLatents(), torch.ones(2, 5, HIDDEN, dtype=torch.bfloat16)
with torch.no_grad():
    torch.compile(model, backend="autofuse", options={options!r})(x)
counters = torch._dynamo.utils.counters
hit = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
(report,) = last_reports()
print(json.dumps([bool(hit), report.from_cache, report.fused, [site.plan for site in report.sites]]))
"""


def in_new_process(options):
    script = SECOND_PROCESS.format(path=sys.path, options=options)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_second_process_hits_inductors_cache_and_still_has_the_report():
    hit, cached, fused, plans = in_new_process(FUSE)
    assert (hit, cached, fused) == (False, False, 1)
    assert in_new_process(FUSE) == [True, True, 1, plans]
    # Other settings are another graph.
    assert in_new_process({**FUSE, "autofuse.level": "O0"}) == [False, False, 0, [""]]


@pytest.mark.parametrize(
    "file", ["cache_db/lookup.py", "targets/base.py", "graph/decide.py", "ops/buckets.py", "runtime/plan.py"]
)
def test_an_edit_of_what_decides_is_another_graph_to_inductor(monkeypatch, tmp_path, file):
    package = tmp_path / "autofuse"
    for folder in ("cache_db", "graph", "ops", "runtime", "targets"):
        shutil.copytree(Path(sources.__file__).parents[1] / folder, package / folder)
    monkeypatch.setattr(sources, "__file__", str(package / "graph" / "sources.py"))
    before = sources.sources_hash.__wrapped__()
    assert sources.sources_hash.__wrapped__() == before
    with (package / file).open("a", encoding="utf-8") as written:
        written.write("# another rule\n")
    assert sources.sources_hash.__wrapped__() != before


def test_training_is_not_disturbed():
    model = MlaLatents(dtype=torch.float32)
    x = hidden().float().requires_grad_()
    expected = torch.autograd.grad(sum(part.sum() for part in model(x)), x)
    with without_code_generation():
        compiled = torch.compile(model, backend="autofuse", options=FUSE)
        result = torch.autograd.grad(sum(part.sum() for part in compiled(x)), x)
    torch.testing.assert_close(result, expected)
    report = last_reports()[-1]
    assert report.fused == 0
    assert any("saved for backward" in miss.reason for miss in report.near_misses)


@pytest.mark.parametrize("options", [{}, FUSE], ids=["skip", "fuse"])
def test_a_broken_database_is_one_warning(tmp_path, caplog, options):
    (tmp_path / "tuned.db").write_text("this is no database, but it is long enough to be taken for one" * 100)
    model = MlaLatents()
    with without_code_generation(), torch.no_grad(), caplog.at_level(logging.WARNING, "autofuse"):
        result = torch.compile(model, backend="autofuse", options=options)(hidden())
        torch.compile(model, backend="autofuse", options=options, dynamic=True)(hidden())
    (warning,) = warnings_in(caplog)
    assert "is not a SQLite database" in warning
    torch.testing.assert_close(result, model(hidden()), atol=2e-2, rtol=2e-2)
    assert last_reports()[-1].fused == len(options)


@pytest.mark.parametrize("broken", ["autofuse.graph.graph_pass.recognise", "autofuse.graph.rewrite.rows_as_matrix"])
def test_a_fault_of_ours_is_one_warning_and_the_unfused_graph(monkeypatch, caplog, broken):
    def fail(*_):
        raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr(broken.replace("rewrite.rows", "fusions.mla_dual_rms_norm.rows"), fail)
    model = MlaLatents()
    with without_code_generation(), torch.no_grad(), caplog.at_level(logging.WARNING, "autofuse"):
        result = torch.compile(model, backend="autofuse", options=FUSE)(hidden())
    (warning,) = warnings_in(caplog)
    assert "ZeroDivisionError: a fault of ours" in warning
    assert last_reports()[-1].fused == 0
    torch.testing.assert_close(result, model(hidden()), atol=2e-2, rtol=2e-2)


def test_a_missing_compiler_is_one_warning_and_the_unfused_graph(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    model = MlaLatents()
    with without_code_generation(), torch.no_grad(), caplog.at_level(logging.WARNING, "autofuse"):
        result = torch.compile(model, backend="autofuse", options=FUSE)(hidden())
    (warning,) = warnings_in(caplog)
    assert "leaves mla_dual_rms_norm unfused" in warning or "leaves the graphs on cpu" in warning
    (site,) = last_reports()[-1].sites
    assert (site.fused, site.rule) == (False, "target")
    torch.testing.assert_close(result, model(hidden()), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"autofuse.levle": "O1"}, "did you mean autofuse.level?"),
        ({"autofuse.level": "O4"}, "one of 'O0', 'O1', 'O2', 'O3'"),
        ({"no_such_option": 1}, "unknown option no_such_option"),
    ],
)
def test_unknown_options_are_refused(options, message):
    with pytest.raises(Exception, match="BadInput") as raised:
        torch.compile(MlaLatents(), backend="autofuse", options=options)(hidden())
    assert message in str(raised.value)


def test_explain_says_each_site_and_keeps_what_was_compiled():
    model = MlaLatents()
    compiled = torch.compile(model, backend="autofuse", options=FUSE)
    with without_code_generation(), torch.no_grad():
        compiled(hidden())
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        explanation = explain(compiled, hidden())
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs + 1
        compiled(hidden())
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs + 1
    assert (explanation.fused, explanation.sites) == (1, 1)
    assert "fused, plan" in str(explanation)
    assert json.loads(explanation.to_json())["graphs"][0]["sites"][0]["fused"] is True


def test_explain_of_a_plain_model_takes_default_settings():
    with torch.no_grad():
        explanation = explain(MlaLatents(), hidden())
    (graph,) = explanation.graphs
    assert graph.settings == "level=O2,untuned=skip"
    assert "was never tuned" in str(explanation)


def test_explain_takes_the_options_of_a_compiled_function():
    model = MlaLatents()
    compiled = torch.compile(lambda x: model(x), backend="autofuse", options={"autofuse.level": "O0"})
    with torch.no_grad():
        (graph,) = explain(compiled, hidden()).graphs
    assert graph.settings.startswith("level=O0")
    assert [site.rule for site in graph.sites] == ["level"]


def test_another_range_of_tokens_is_another_graph():
    reports = []
    for high in (16, 64):
        x = hidden()
        torch._dynamo.mark_dynamic(x, 1, min=2, max=high)
        with without_code_generation(), torch.no_grad():
            torch.compile(MlaLatents(), backend="autofuse", options=FUSE)(x)
        reports.append(last_reports()[-1])
    assert [report.sites[0].tokens for report in reports] == ["4…32", "4…128"]
    assert reports[0].key != reports[1].key
