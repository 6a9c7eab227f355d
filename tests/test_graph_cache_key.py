"""Inductor's cache gives a graph again only where nothing that its fusions depend on has changed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from models import HIDDEN, MlaLatents, isolate
from test_graph_decide import CPU, winner

from autofuse.cache_db import TunedDatabase, default_path
from autofuse.graph.decide import Knowledge
from autofuse.graph.graph_pass import FusionPass
from autofuse.graph.origin import Origins
from autofuse.graph.report_store import last_reports
from autofuse.graph.settings import Settings
from autofuse.targets import target_of

TOKENS = 10  # of hidden()
FUSE = {"autofuse.untuned": "fuse"}


@pytest.fixture(autouse=True)
def _isolated(monkeypatch, tmp_path, tmp_path_factory):
    isolate(monkeypatch, tmp_path, tmp_path_factory.getbasetemp() / "cache")
    torch._dynamo.reset()


def record(one):
    with TunedDatabase(default_path()) as database:
        database.record_winner(one)


def hits(options):
    """Whether a compilation from the start finds the graph in one of Inductor's caches."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    with torch.no_grad():
        torch.compile(MlaLatents(), backend="autofuse", options=options)(torch.ones(2, 5, HIDDEN, dtype=torch.bfloat16))
    counters = torch._dynamo.utils.counters
    hit = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
    assert bool(hit) == last_reports()[-1].from_cache
    return bool(hit)


def test_inductors_cache_follows_settings_and_the_database():
    assert not hits(FUSE)
    assert hits(FUSE)
    assert not hits({**FUSE, "autofuse.level": "O1"})
    assert not hits({**FUSE, "autofuse.fuse_mla_dual_rms_norm": False})
    assert hits(FUSE)
    elsewhere = replace(target_of(CPU), arch="another")
    record(replace(winner(TOKENS, 1.5), target=elsewhere))
    assert hits(FUSE)
    record(winner(TOKENS, 1.5))
    assert not hits(FUSE)
    assert last_reports()[-1].sites[0].rule == "exact"
    record(winner(TOKENS, 0.5))
    assert not hits(FUSE)
    assert last_reports()[-1].fused == 0


def uuid(options=None, known=None, ranges=""):
    settings, _ = Settings.parse(options)
    knowledge = {CPU: Knowledge.of(CPU, settings)} if known is None else known
    return FusionPass(settings, knowledge, Origins({}), [], lambda identity: "", lambda report: None, ranges).uuid()


@pytest.mark.parametrize(
    "options",
    [{"autofuse.level": level} for level in ("O0", "O1", "O3")]
    + [{"autofuse.untuned": "fuse"}, {"autofuse.fuse_quant": False}, {"autofuse.fuse_quant": True}],
    ids=str,
)
def test_each_setting_is_part_of_the_key(options):
    assert uuid(options) == uuid(options) != uuid()


def test_the_default_written_out_is_the_same_key():
    assert uuid({"autofuse.level": "O2", "autofuse.untuned": "skip"}) == uuid()


@pytest.mark.parametrize("part", ["kind", "arch", "device_name"])
def test_the_device_is_part_of_the_key(part):
    here = Knowledge.of(CPU, Settings())
    assert here.target is not None
    assert part in here.target.__dataclass_fields__
    there = replace(here, target=replace(here.target, **{part: "another"}))
    assert uuid(known={CPU: there}) != uuid(known={CPU: here}) == uuid()
    assert uuid(known={CPU: here, torch.device("cuda", 0): there}) != uuid()


def test_ranges_of_symbols_are_part_of_the_key():
    assert uuid(ranges="s0:2…16") != uuid(ranges="s0:2…64")


def test_rows_of_the_database_are_part_of_the_key_if_they_are_of_the_device():
    before = uuid()
    record(replace(winner(16, 1.5), target=replace(target_of(CPU), arch="another")))
    assert uuid() == before
    record(winner(16, 1.5))
    once = uuid()
    record(winner(16, 1.2))
    assert len({str(before), str(once), str(uuid())}) == 3
