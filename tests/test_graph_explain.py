"""What is said of each site: where it is, what was asked, what was measured, and why it is fused or not."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
import vllm_standins  # noqa: F401 (registers vLLM's operators)
from deciding import CPU, PROBLEM, decide, tuned, winner
from models import HIDDEN, KV_RANK, Q_RANK, MlaLatents, RMSNorm, isolate, without_code_generation
from torch import nn

from autofuse.cache_db import TunedDatabase, default_path
from autofuse.cli.app import run
from autofuse.graph import notice
from autofuse.graph.evidence import Key, differences, nearest_row
from autofuse.graph.explain import explain
from autofuse.graph.report import VERDICTS, GraphReport, Measured, NearMissReport, SiteReport
from autofuse.graph.report_html import html_page
from autofuse.graph.report_store import last_reports, store
from autofuse.ops import get_op
from autofuse.targets import Target, target_of

T = 4
SOURCE = get_op("mla_dual_rms_norm").source_hash("cpu")
KEY = Key(target_of(CPU), PROBLEM, T, T, (SOURCE,))


@pytest.fixture(autouse=True)
def _isolated(monkeypatch, tmp_path):
    isolate(monkeypatch, tmp_path)
    notice.warn_once.cache_clear()
    torch._dynamo.reset()
    torch.manual_seed(0)


class Model(nn.Module):
    """Two MLA layers; the second has another norm of the query, which no fusion can take with the other's."""

    def __init__(self, odd=False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(odd and index == 1) for index in range(2))

    def forward(self, x):
        return [layer(x) for layer in self.layers]


class Layer(nn.Module):
    def __init__(self, odd) -> None:
        super().__init__()
        self.self_attn = MlaLatents()
        if odd:
            self.self_attn.kv_norm = OddNorm(KV_RANK, torch.bfloat16)

    def forward(self, x):
        return self.self_attn(x)


class OddNorm(RMSNorm):
    """Centred first, so that it is no RMSNorm."""

    def forward(self, x):
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(0, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def hidden():
    return torch.randn(T, HIDDEN, dtype=torch.bfloat16)


def report_of(model, options=None, x=None) -> GraphReport:
    with without_code_generation(), torch.no_grad():
        torch.compile(model, backend="autofuse", options=options)(hidden() if x is None else x)
    return last_reports()[-1]


def test_a_site_says_where_it_is_what_was_asked_and_what_was_measured():
    tuned(winner(T, 1.5))
    site = report_of(Model()).sites[1]
    assert (site.where, site.dialect) == ("layers.1.self_attn", "plain PyTorch (models)")
    assert re.fullmatch(r"models\.py:\d+ in forward", site.source)
    assert site.looked_up == str(KEY)
    assert (site.verdict, site.tokens, site.plan_text.split("|")[0]) == ("fused", "4", f"{KEY.target.arch}@{SOURCE}")
    assert (site.gain, site.gain_low, site.gain_high) == (1.5, 1.45, 1.55)
    assert site.measured == (Measured.of(winner(T, 1.5)),)
    text = str(site)
    for said in (site.where, site.source, f"node {site.node}", site.plan, "1.50×, 95 % in [1.45, 1.55]", str(KEY)):
        assert said in text


def test_the_dialect_of_operators_is_their_names():
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            widths = (Q_RANK, KV_RANK)
            self.down = nn.ModuleList(nn.Linear(HIDDEN, width, bias=False, dtype=torch.bfloat16) for width in widths)
            self.norm = nn.ModuleList(RMSNorm(width, torch.bfloat16) for width in widths)

        def forward(self, x):
            normed = []
            for down, norm in zip(self.down, self.norm, strict=True):
                rows = down(x)
                out = torch.empty_like(rows)
                torch.ops._C.rms_norm(out, rows, norm.weight, norm.eps)
                normed.append(out)
            return normed

    (site,) = report_of(Normed()).sites
    assert site.dialect == "_C::rms_norm"


def test_what_is_left_is_told_apart():
    """Not tuned, tuned but slower, of another kernel, switched off, near miss, and nothing at all."""
    untuned = report_of(Model(odd=True))
    assert [site.verdict for site in untuned.sites] == ["untuned"]
    (miss,) = untuned.near_misses
    assert (miss.block, miss.where) == ("RMSNorm", "layers.1.self_attn.kv_norm")
    assert miss.source
    assert "no RMSNorm" in str(miss)
    assert untuned.summary == "0 of 1 sites fused, 1 not tuned; 1 near miss"

    tuned(winner(T, 0.8))
    slower = report_of(Model())
    assert [site.verdict for site in slower.sites] == ["slower"] * 2
    assert "left alone, tuned, but not faster" in str(slower)
    assert "0.80×, not faster beyond the noise" in slower.sites[0].reason

    tuned(winner(T, 1.5, source_hash="0123"))
    assert [site.verdict for site in report_of(Model()).sites] == ["stale"] * 2
    assert [site.verdict for site in report_of(Model(), {"autofuse.level": "O0"}).sites] == ["off"] * 2

    nothing = report_of(nn.Linear(HIDDEN, HIDDEN, dtype=torch.bfloat16))
    assert (nothing.sites, nothing.near_misses, nothing.blocks) == ((), (), ())
    assert "fuse_mla_dual_rms_norm (mla_dual_rms_norm)" in nothing.unmatched
    assert "recognised: no building block; matched nothing: fuse_mla_dual_rms_norm" in str(nothing)
    assert "fuse_mla_dual_rms_norm (mla_dual_rms_norm)" not in slower.unmatched
    assert not [name for name in nothing.unmatched if name.startswith("fuse_attn_quant")]  # it is off at O2
    assert slower.blocks == (("RMSNorm", 4),)


def test_a_refusal_names_its_condition_and_its_node():
    model = MlaLatents()
    model.q_norm.weight = nn.Parameter(torch.ones(2 * Q_RANK, dtype=torch.bfloat16)[::2], requires_grad=False)
    (site,) = report_of(model).sites
    assert (site.verdict, site.rule) == ("refused", "refused")
    assert re.search(r"the weight \w+ is not contiguous", site.reason)
    assert not site.looked_up


# The nearest row


H200 = Target("cuda", "sm_90a", "NVIDIA H200")


def other(**params):
    problem = get_op("mla_dual_rms_norm").make_problem(**{**dict(PROBLEM.params), **params})
    return winner(T, 1.5, problem=problem)


@pytest.mark.parametrize(
    ("row", "differs"),
    [
        (
            winner(T, 1.5, target=H200),
            ["vendor: NVIDIA, not CPU", "arch: sm_90a, not", "device_name: NVIDIA H200"],
        ),
        (other(q_lora_rank=1536), ["q_lora_rank: 1536, not 48"]),
        (other(dtype="fp16"), ["dtype: fp16, not bf16"]),
        (winner(T, 1.5, source_hash="0123"), [f"kernel source: 0123, not {SOURCE}"]),
        (winner(64, 1.5), ["T: 64, which does not serve 4"]),
    ],
    ids=["device", "width", "dtype", "source", "tokens"],
)
def test_a_row_says_what_it_differs_in(row, differs):
    found = differences(row, KEY)
    assert len(found) == len(differs)
    assert all(text.startswith(start) for text, start in zip(found, differs, strict=True))
    assert nearest_row([row], KEY) == (row, found)


def test_the_nearest_row_is_the_one_that_could_most_nearly_answer():
    device, dtype = winner(T, 1.5, target=H200), other(dtype="fp16")
    near, far = other(q_lora_rank=56), other(q_lora_rank=1536)
    rows = [device, far, near, dtype]
    for expected in (near, dtype, far, device):
        found = nearest_row(rows, KEY)
        assert found is not None
        assert found[0] == expected
        rows.remove(expected)
    assert nearest_row([], KEY) is None


def test_a_site_that_nobody_measured_names_the_nearest_row():
    assert decide(T).nearest == f"{default_path()} has no row of mla_dual_rms_norm"
    tuned(winner(T, 1.5, target=H200), other(q_lora_rank=56))
    decision = decide(T)
    assert decision.nearest.startswith("the nearest row is mla_dual_rms_norm(dtype=bf16,q_lora_rank=56")
    assert decision.nearest.endswith("it differs in q_lora_rank: 56, not 48")
    assert str(decision.key) == str(KEY)


# As HTML


class _Page(HTMLParser):
    """Checks that elements are nested, and collects what a reader and a browser would see."""

    VOID = ("meta", "line", "circle", "br")

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href") or name.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read(page):
    parser = _Page()
    parser.feed(page)
    parser.close()
    assert not parser.open
    return parser


def test_the_page_needs_nothing_else_and_says_everything():
    tuned(winner(T, 1.5))
    with torch.no_grad():
        explanation = explain(Model(odd=True), hidden())
    page = read(explanation.html("A model"))
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not page.links
    (graph,) = explanation.graphs
    for site in graph.sites:
        for said in (site.where, site.source, site.node, site.dialect, site.reason, site.looked_up, site.plan_text):
            assert said in page.text
    for miss in graph.near_misses:
        assert miss.reason in page.text
        assert miss.where in page.text
    assert "1.50× [1.45, 1.55]" in page.text
    assert graph.recognised in page.text


def test_the_page_escapes_what_it_is_given():
    evil = "<script>alert('x')</script>&"
    site = SiteReport(*[evil] * 6, "16", False, "", "", "untuned", evil, evil, evil, evil, evil)
    graph = GraphReport(evil, evil, (site,), (NearMissReport(evil, evil, evil, evil, evil),), note=evil)
    page = read(html_page([replace(graph, unmatched=(evil,), blocks=((evil, 2),))], evil))
    assert "script" not in page.tags
    assert page.text.count(evil) > 10


def test_every_verdict_has_words_and_every_rule_a_verdict():
    rules = ("exact", "between", "nearest", "range", "stale", "untuned")
    rules += ("level", "refused", "split", "unsupported", "target", "baseline", "overlap", "cycle")
    site = SiteReport("f", "op", "", "", "", "cpu", "1", False, "", "", "", "")
    assert {replace(site, rule=rule).verdict for rule in rules} | {"fused"} == set(VERDICTS)


# In another process


SECOND_PROCESS = """
import json, sys, torch
sys.path[:0] = {path!r}
from test_graph_explain import Model, hidden
from autofuse.graph.explain import explain
from autofuse.graph.report_store import last_reports
torch.manual_seed(0)
model, x = Model(odd=True), hidden()
compiled = torch.compile(model, backend="autofuse")
with torch.no_grad():
    compiled(x)
    (report,) = last_reports()
    (again,) = explain(compiled, x).graphs
counters = torch._dynamo.utils.counters
hit = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
print(json.dumps([bool(hit), report.from_cache, report.to_json(), again.from_cache, again.as_dict()["sites"]]))
"""


def in_new_process():
    script = SECOND_PROCESS.format(path=sys.path)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_everything_is_known_where_inductor_had_the_graph_in_its_cache(capsys, tmp_path):
    tuned(winner(T, 1.5))
    hit, cached, first, _, sites = in_new_process()
    assert (hit, cached) == (False, False)
    hit, cached, second, again_cached, again = in_new_process()
    assert (hit, cached, again_cached) == (True, True, False)
    report, before = (
        replace(GraphReport.from_json(each), pass_seconds=0.0, kernel_seconds=0.0) for each in (second, first)
    )
    assert report == before
    assert again == sites == json.loads(first)["sites"]
    assert [site.where for site in report.sites] == ["layers.0.self_attn"]
    assert [miss.where for miss in report.near_misses] == ["layers.1.self_attn.kv_norm"]
    assert report.sites[0].measured[0].gain == 1.5

    # And from the command line, in a third one.
    assert run(["why", "--json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)["graphs"]
    assert (listed["key"], listed["sites"]) == (report.key, sites)
    assert run(["why"]) == 0
    assert "layers.0.self_attn: mla_dual_rms_norm fused, plan" in capsys.readouterr().out
    assert run(["why", "--html", str(tmp_path / "page.html")]) == 0
    assert "layers.1.self_attn.kv_norm" in read((tmp_path / "page.html").read_text(encoding="utf-8")).text


def test_a_report_that_was_lost_is_said_to_be_and_explain_makes_it_anew():
    compiled = torch.compile(Model(), backend="autofuse")
    with torch.no_grad():
        compiled(hidden())
        for path in store.folder.glob("*.json"):
            path.unlink()
        torch._dynamo.reset()
        compiled(hidden())
        lost = last_reports()[-1]
        (found,) = explain(compiled, hidden()).graphs
    assert (lost.from_cache, lost.sites) == (True, ())
    assert "autofuse.explain(model, *inputs) makes one" in lost.note
    assert (found.key, len(found.sites)) == (lost.key, 2)


def test_the_graphs_used_last_are_listed_last(capsys):
    keys = [f"{number:032d}" for number in range(3)]
    for age, key in enumerate(keys):
        store.save(GraphReport(key, "s"))
        os.utime(store.folder / f"{key}.json", (1000 + age, 1000 + age))
    (store.folder / "broken.json").write_text("{}")
    assert [graph.key for graph in store.recent(2)] == keys[1:]
    assert store.load(keys[0]) is not None
    assert [graph.key for graph in store.recent(10)] == [keys[1], keys[2], keys[0]]
    assert run(["why", "--last", "1", "--json"]) == 0
    assert [graph["key"] for graph in json.loads(capsys.readouterr().out)["graphs"]] == [keys[0]]


def test_without_a_graph_it_says_so(capsys):
    assert run(["why"]) == 0
    assert "No graph was compiled yet" in capsys.readouterr().out
    assert run(["why", "mla_dual_rms_norm", "--html", "x.html"]) == 2
    assert "--html shows graphs: leave the op out" in capsys.readouterr().err


def test_sites_are_remembered_by_looking_too():
    with torch.no_grad():
        explain(Model(), hidden())
    with TunedDatabase(default_path(), read_only=True) as database:
        assert [(site.problem, site.tokens_low) for site in database.captured()] == [(PROBLEM, T)]
