"""A site is fused where the database says that it is faster, and the reason is told in either case."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import islice

import pytest
import torch
from deciding import CPU, PROBLEM, buckets, compared, decide, tuned, winner
from models import HIDDEN, KV_RANK, Q_RANK, MlaLatents, RMSNorm, isolate, without_code_generation
from torch._subclasses.fake_tensor import FakeTensorMode

from autofuse.cache_db import Trial, TunedDatabase, default_path
from autofuse.graph import decide as decide_module
from autofuse.graph import notice
from autofuse.graph.alignment import loads_of, misalignment
from autofuse.graph.decide import ANY_TOKENS, token_range
from autofuse.graph.evidence import read_shared, read_tuned
from autofuse.graph.fusions import FUSIONS
from autofuse.graph.ranks import Shared
from autofuse.graph.report import GraphReport, Measured, NearMissReport, SiteReport
from autofuse.graph.report_store import last_reports
from autofuse.graph.settings import LEVELS, Settings
from autofuse.ops import Config, LaunchShape, get_op
from autofuse.runtime.plan import Plan
from autofuse.targets import Target, target_of


@pytest.fixture(autouse=True)
def _isolated(monkeypatch, tmp_path, tmp_path_factory):
    isolate(monkeypatch, tmp_path, tmp_path_factory.getbasetemp() / "cache")
    notice.warn_once.cache_clear()


def symbolic(low=None, high=None):
    """T of a graph whose first dimension was marked dynamic."""
    seen = []

    def backend(gm, inputs):
        seen.append(next(size for size in inputs if isinstance(size, torch.SymInt)))
        return gm.forward

    torch._dynamo.reset()
    x = torch.zeros(max(low or 0, 8), 3)
    torch._dynamo.mark_dynamic(x, 0, min=low, max=high)
    torch.compile(lambda x: x + 1, backend=backend)(x)
    return seen[0]


def test_static_tokens_run_the_winner_of_their_bucket():
    tuned(winner(16, 1.5), winner(64, 1.2))
    decision = decide(16)
    assert (decision.rule, buckets(decision), decision.worst.gain) == ("exact", [16], 1.5)


def test_between_two_buckets_both_must_be_faster():
    tuned(winner(16, 1.5), winner(64, 1.2), winner(256, 0.9))
    assert buckets(decide(32)) == [64]
    slower = decide(128)
    assert (slower.plan, slower.rule) == (None, "between")
    assert "not faster beyond the noise" in slower.reason


def test_a_gain_within_the_noise_is_none():
    tuned(winner(16, 1.04))
    assert decide(16).plan is None


def test_a_range_of_tokens_takes_all_buckets_that_serve_it():
    tuned(winner(1, 1.5), winner(16, 1.4), winner(64, 1.2))
    assert buckets(decide(symbolic(low=2, high=20))) == [16, 64]
    assert (decide(symbolic()).plan, decide(symbolic()).rule) == (None, "untuned")
    tuned(winner(8192, 1.2))
    assert buckets(decide(symbolic())) == [16, 64, 8192]
    tuned(winner(64, 0.9))
    assert (decide(symbolic()).plan, decide(symbolic()).rule) == (None, "range")
    assert buckets(decide(symbolic(low=2, high=16))) == [16]


def test_only_the_buckets_inside_the_range_have_a_say():
    tuned(winner(1, 0.5), winner(16, 1.5), winner(64, 1.2), winner(8192, 0.5))
    assert buckets(decide(symbolic(low=2, high=20))) == [16, 64]
    assert (decide(symbolic(low=2, high=65)).plan, decide(1).plan) == (None, None)


def test_a_bucket_that_is_not_faster_runs_unfused_where_eager_is_the_fastest():
    compared(winner(16, 1.5), winner(64, 0.9, baseline="eager"), winner(1024, 1.2))
    decision = decide(symbolic(low=2, high=1000))
    assert [config is None for _, config in decision.plan.buckets] == [False, True, False]
    assert "unfused where it is not faster: T=64" in decision.reason
    assert str(decision.plan).count(":unfused") == 1
    assert (decide(64).plan, decide(64).rule) == (None, "exact")
    assert decide(symbolic(low=17, high=64)).plan is None  # nothing would run the kernel
    tuned(winner(64, 0.9))  # where Inductor's code is the fastest, the reference is not what the site would have run
    assert (decide(symbolic(low=2, high=1000)).plan, decide(symbolic(low=2, high=1000)).rule) == (None, "range")


def test_what_was_never_compared_with_inductors_code_is_left_alone():
    alone = winner(16, 3.0, baseline="eager")
    tuned(alone)
    decision = decide(16)
    assert (decision.plan, decision.rule) == (None, "baseline")
    assert "at T=16 it was compared with eager PyTorch alone" in decision.reason
    compared(alone)
    assert decide(16).plan is not None


def test_a_plan_names_the_source_it_was_tuned_with():
    tuned(winner(16, 1.5))
    assert decide(16).plan.source == get_op("mla_dual_rms_norm").source_hash("cpu")


def captured_buckets_of(decision):
    """What ``autofuse tune --captured`` would tune."""
    from autofuse.tuner.api import captured_buckets

    assert (decision.plan, decision.rule) == (None, "untuned")
    with TunedDatabase(default_path(), read_only=True) as database:
        return sorted({bucket.tokens for site in database.captured() for bucket in captured_buckets(site)})


@pytest.mark.parametrize("known", [(), (1,), (1, 64, 1024)], ids=str)
@pytest.mark.parametrize(
    "tokens",
    [3000, 1 << 21, (None, None), (2, 5000), (10000, 1 << 20)],
    ids=["static", "more than can be tuned", "unbounded", "bounded", "large"],
)
def test_what_was_captured_is_fused_once_it_is_tuned(tokens, known):
    tuned(*(winner(each, 1.5) for each in known))
    tokens = tokens if isinstance(tokens, int) else symbolic(*tokens)
    tuned(*(winner(each, 1.5) for each in captured_buckets_of(decide(tokens))))
    assert decide(tokens).plan is not None


def test_a_config_tuned_for_one_token_does_not_run_thousands():
    tuned(winner(1, 1.5))
    for tokens in (2048, symbolic()):
        decision = decide(tokens)
        assert (decision.plan, decision.rule) == (None, "untuned")
        assert "`autofuse tune --problem" in decision.reason
    assert decide(2).plan is not None


def test_the_range_comes_from_the_bounds_of_the_symbol():
    assert token_range(7) == (7, 7)
    assert token_range(symbolic(low=4, high=100)) == (4, 100)
    low, high = token_range(symbolic())
    assert low in (0, 2)
    assert high == ANY_TOKENS
    assert token_range(symbolic(low=4, high=100) * 3) == (12, 300)


def test_untuned_sites_are_left_and_remembered():
    decision = decide(16)
    assert (decision.plan, decision.rule) == (None, "untuned")
    with TunedDatabase(default_path(), read_only=True) as database:
        (captured,) = database.captured()
    assert (captured.problem, captured.tokens_low, captured.tokens_high) == (PROBLEM, 16, 16)


def test_stale_winners_do_not_count():
    tuned(winner(16, 1.5, source_hash="0123"))
    assert (decide(16).plan, decide(16).rule) == (None, "stale")
    assert decide(16, {"autofuse.untuned": "fuse"}).plan is not None


def test_untuned_fuse_takes_default_configs():
    decision = decide(16, {"autofuse.untuned": "fuse"})
    assert decision.rule == "default"
    assert str(decision.plan) == str(
        Plan(
            target_of(CPU).arch,
            PROBLEM,
            ((16, get_op("mla_dual_rms_norm").default_config("cpu", PROBLEM, 16)),),
            get_op("mla_dual_rms_norm").source_hash("cpu"),
        )
    )
    assert buckets(decide(symbolic(low=2, high=100), {"autofuse.untuned": "fuse"})) == [64, 1024]


def test_untuned_fuse_does_not_fuse_what_was_measured_to_be_slower():
    tuned(winner(16, 0.8))
    assert decide(16, {"autofuse.untuned": "fuse"}).plan is None


H200, H100 = (Target("cuda", "sm_90a", name) for name in ("NVIDIA H200", "NVIDIA H100 80GB HBM3"))


def on_h200(monkeypatch, options, *winners, trials=()):
    """The decision on a site of 64 tokens on an H200, whose kernels are not compiled."""
    op = get_op("mla_dual_rms_norm")
    with TunedDatabase(default_path()) as database:
        for made, config in winners:
            database.record_winner(replace(made, config=config, source_hash=op.source_hash("cuda")))
        for trial in trials:
            database.record_trial(trial)
    monkeypatch.setattr(decide_module, "target_of", lambda device: H200)
    monkeypatch.setattr(decide_module.Decider, "_with_kernels", lambda self, op, decision, target: decision)
    return decide(64, options)


CONFIG, OTHER = islice(get_op("mla_dual_rms_norm").kernel_source("cuda").space.configs(PROBLEM, 64), 7, 9)
FUSED = {"autofuse.untuned": "fuse"}


def test_another_gpus_winner_is_no_measurement_and_its_site_is_left_and_remembered(monkeypatch):
    lent = (winner(64, 3.0, target=H100), CONFIG)
    decision = on_h200(monkeypatch, None, lent)
    assert (decision.plan, decision.rule, decision.saved_us) == (None, "same_arch", None)
    with TunedDatabase(default_path(), read_only=True) as database:
        assert [site.target for site in database.captured()] == [H200]


def test_where_the_user_allows_it_the_config_of_another_gpu_runs(monkeypatch):
    decision = on_h200(monkeypatch, FUSED, (winner(64, 0.5, target=H100), CONFIG))
    assert (decision.rule, decision.plan.buckets, decision.saved_us) == ("same_arch", ((64, CONFIG),), None)
    assert "autofuse.untuned is 'fuse': its config" in decision.reason


def test_ranks_share_what_another_gpu_lends():
    lent, own = winner(64, 3.0, target=H100), winner(64, 2.0, target=H200)
    tuned(lent)
    shared = Shared.decode(read_shared(default_path(), H200).encode())
    assert shared.snapshot(default_path(), H200).lookup(PROBLEM, 64, 64, lent.source_hash).elsewhere == (
        *TunedDatabase(default_path(), read_only=True).winners(),
    )
    tuned(own)
    newer = shared.with_newer(read_tuned(default_path(), H200, PROBLEM))
    assert [known.target for known in newer.layers[0].winners] == [H100, H200]
    assert newer.snapshot(default_path(), H200).lookup(PROBLEM, 64, 64, own.source_hash).rule == "exact"


def test_a_config_of_another_gpu_that_is_none_here_or_failed_here_does_not_run(monkeypatch):
    op = get_op("mla_dual_rms_norm")
    default = op.default_config("cuda", PROBLEM, 64)
    decision = on_h200(monkeypatch, FUSED, (winner(64, 3.0, target=H100), Config.of(CONFIG, Q_WARPS=3)))
    assert (decision.rule, decision.plan.buckets) == ("default", ((64, default),))
    assert "is no config of mla_dual_rms_norm for cuda here: each warp needs" in decision.reason
    wrong = Trial(H200, PROBLEM, 1, OTHER, op.source_hash("cuda"), "wrong", "off by 2")
    decision = on_h200(monkeypatch, FUSED, (winner(64, 3.0, target=H100), OTHER), trials=[wrong])
    assert (decision.rule, decision.plan.buckets) == ("default", ((64, default),))
    assert f"{OTHER} fails here (wrong at T=1)" in decision.reason
    decision = on_h200(monkeypatch, FUSED, trials=[replace(wrong, config=default)])
    assert (decision.rule, decision.plan) == ("refused", None)


@pytest.mark.parametrize("config", [Config.of(THREADS=1), {"TASK_ROWS": 5}, {"THREADS": 1, "TASK_ROWS": 8}], ids=str)
def test_a_winner_whose_config_is_none_of_the_ops_is_left_alone(config):
    good = winner(16, 1.5)
    config = config if isinstance(config, Config) else Config.of(good.config, **config)
    tuned(replace(good, config=config))
    decision = decide(16)
    assert (decision.plan, decision.rule) == (None, "refused")
    assert f"{config}, is no config of mla_dual_rms_norm for cpu" in decision.reason
    assert "--retune" in decision.reason


def test_a_config_for_many_tokens_is_in_the_space_whatever_t_it_was_tuned_at():
    best = winner(1, 1.5)
    tuned(replace(best, config=Config.of(best.config, TASK_ROWS=1, UNROLL=4)))
    assert decide(1).plan is not None


@contextmanager
def locked(path) -> Iterator[None]:
    """Another process is writing, and does not end."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield


def test_a_locked_database_is_waited_for_once_and_shortly(caplog, monkeypatch):
    tuned(winner(1, 1.5))
    with caplog.at_level(logging.WARNING, "autofuse"), locked(default_path()):
        begin = time.perf_counter()
        assert decide(16).rule == "untuned"
        assert time.perf_counter() - begin < 2
        with monkeypatch.context() as patch:
            patch.setattr("autofuse.cache_db.notebook.TunedDatabase", lambda *_, **__: pytest.fail("opened again"))
            assert decide(32).rule == "untuned"
    (warning,) = caplog.records
    assert "cannot remember" in warning.message
    decide(64)  # free again, but given up for this process
    with TunedDatabase(default_path(), read_only=True) as database:
        assert not database.captured()


def needs_alignment(monkeypatch, bytes_):
    """The CPU's kernels load from any address: as if they did not."""
    monkeypatch.setattr(type(get_op("mla_dual_rms_norm")), "launch_shape", lambda *_: LaunchShape(align=bytes_))


class Sliced(torch.nn.Module):
    """Both latents as columns of a wider tensor: [T, columns] → two norms."""

    def __init__(self, gap, rope=8):
        super().__init__()
        self.gap, self.columns = gap, Q_RANK + gap + KV_RANK + rope
        self.q_norm, self.kv_norm = RMSNorm(Q_RANK, torch.bfloat16), RMSNorm(KV_RANK, torch.bfloat16)

    def forward(self, x):
        start = Q_RANK + self.gap
        return self.q_norm(x[:, :Q_RANK]), self.kv_norm(x[:, start : start + KV_RANK])


def site_of(model, x, dynamic=False):
    with without_code_generation(), torch.no_grad():
        torch.compile(model, backend="autofuse", dynamic=dynamic, options={"autofuse.untuned": "fuse"})(x)
    (site,) = last_reports()[-1].sites
    return site


@pytest.mark.parametrize("dynamic", [False, None], ids=["static", "mark_dynamic"])
@pytest.mark.parametrize(
    ("gap", "rope", "what"),
    [
        (0, 8, None),
        (4, 4, "storage offset of kv_c, 52 elements of 2 bytes"),
        (0, 12, "stride in dimension 0 of q_c, 92 elements of 2 bytes"),
    ],
)
def test_what_a_kernel_cannot_load_is_refused(monkeypatch, gap, rope, what, dynamic):
    needs_alignment(monkeypatch, 16)
    model = Sliced(gap, rope)
    x = torch.randn(16, model.columns, dtype=torch.bfloat16)
    if dynamic is None:
        torch._dynamo.mark_dynamic(x, 0)
    site = site_of(model, x, dynamic)
    assert (site.fused, site.rule == "refused") == (what is None, what is not None), site
    if what is not None:
        assert what in site.reason
        assert "multiple of the 16 bytes" in site.reason
        needs_alignment(monkeypatch, 8)
        assert site_of(model, x, dynamic).fused


def test_the_offset_of_a_graph_input_counts(monkeypatch):
    needs_alignment(monkeypatch, 16)
    model = Sliced(0)
    wide = torch.randn(16, model.columns + 8, dtype=torch.bfloat16)
    assert site_of(model, wide[:, 8:]).fused
    refused = site_of(model, wide[:, 4:-4])
    assert "storage offset of q_c, 4 elements" in refused.reason
    model.kv_norm.weight = torch.nn.Parameter(torch.ones(KV_RANK + 1, dtype=torch.bfloat16)[1:], requires_grad=False)
    assert "storage offset of kv_weight, 1 elements" in site_of(model, wide[:, 8:]).reason


def test_one_row_is_stepped_over_by_nobody(monkeypatch):
    needs_alignment(monkeypatch, 16)
    model = Sliced(0, rope=12)
    assert site_of(model, torch.randn(1, model.columns, dtype=torch.bfloat16)).fused


def test_a_symbolic_stride_is_refused_only_if_it_never_fits():
    op = get_op("mla_dual_rms_norm")
    plan = Plan("x86-64", PROBLEM, ((16, op.default_config("cpu", PROBLEM, 16)),))
    columns = symbolic()
    with columns.node.shape_env.suppress_guards(), FakeTensorMode(shape_env=columns.node.shape_env):
        fits, never = (
            torch.empty_strided((4, Q_RANK), (stride, 1), dtype=torch.bfloat16) for stride in (columns, 8 * columns + 3)
        )
    with pytest.MonkeyPatch.context() as patch:
        needs_alignment(patch, 16)
        loads = loads_of(op, plan)
        assert misalignment(op, loads, {0: fits}) is None
        assert "stride in dimension 0 of q_c" in (misalignment(op, loads, {0: never}) or "")


def test_level_flag_and_refusal_come_first():
    tuned(winner(16, 1.5))
    assert decide(16, {"autofuse.level": "O0"}).rule == "level"
    assert decide(16, {"autofuse.level": "O0", "autofuse.fuse_mla_dual_rms_norm": True}).plan is not None
    assert decide(16, {"autofuse.fuse_mla_dual_rms_norm": False}).rule == "level"
    assert decide(16, refusal="because").reason == "because"


def test_what_no_kernel_computes_is_left():
    assert decide(16, dtype=torch.float64).rule == "unsupported"


def test_another_database_can_be_named(tmp_path):
    with TunedDatabase(tmp_path / "other.db") as database:
        database.record_winner(winner(16, 1.5))
    assert decide(16).plan is None
    assert decide(16, {"autofuse.database": str(tmp_path / "other.db")}).plan is not None


def test_a_compiled_graph_follows_the_database():
    model, x = MlaLatents(), torch.randn(16, HIDDEN, dtype=torch.bfloat16)
    fused = []
    for winners in ((), (winner(16, 1.5),), (winner(16, 0.9),)):
        tuned(*winners)
        with without_code_generation(), torch.no_grad():
            torch.compile(model, backend="autofuse")(x)
        fused.append(last_reports()[-1].fused)
    assert fused == [0, 1, 0]
    assert len({report.key for report in last_reports()[-3:]}) == 3


@pytest.mark.parametrize("level", LEVELS)
def test_levels_switch_on_what_they_should(level):
    settings, others = Settings.parse({"autofuse.level": level, "dce": True})
    assert others == {"dce": True}
    from_level = {
        "fuse_mla_dual_rms_norm": 1,
        "fuse_norm_quant": 1,
        "fuse_quant": 1,
        "fuse_rope_kvcache": 2,
        "fuse_rope_kvcache_cat_mla": 2,
        "fuse_attn_quant": 3,
        "fuse_mla_q_absorb": 3,
    }
    on = {fusion.name: settings.switched_on(fusion)[0] for fusion in FUSIONS}
    assert on == {name: int(level[1]) >= from_level[name] for name in on}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"autofuse.level": 2}, "must be one of 'O0'"),
        ({"autofuse.untuned": "skp"}, "did you mean 'skip'?"),
        ({"autofuse.fuse_mla_dual_rms_norm": "yes"}, "must be True or False"),
        ({"autofuse.fuse_mla_dual_rms": True}, "did you mean autofuse.fuse_mla_dual_rms_norm?"),
        ({"autofuse.database": 3}, "must be a path"),
        ({"autofuse.tune_budget": "1 h"}, "must be a number of seconds from 0"),
        ({"autofuse.tune_budget": float("inf")}, "must be a number of seconds from 0"),
        ({"autofuse.tune_budget": True}, "must be a number of seconds from 0"),
        ({"autofuse.splitting_op": []}, "did you mean autofuse.splitting_ops?"),
        ({"autofuse.splitting_ops": "vllm::unified_kv_cache_update"}, "must be a list of operators"),
        ({"autofuse.splitting_ops": ["unified_kv_cache_update"]}, "must be a list of operators"),
        ({"autofuse.use_inductor_graph_partition": 1}, "must be True or False"),
    ],
)
def test_options_that_make_no_sense_are_named(options, message):
    with pytest.raises(ValueError) as raised:  # noqa: PT011 (the message is checked)
        Settings.parse(options)
    assert message in str(raised.value)


def test_an_unknown_option_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown option") as raised:
        Settings.parse({"autofuse.nothing_like_it": True})
    names = ["level", "untuned", "database", "splitting_ops", "use_inductor_graph_partition"]
    assert all(f"autofuse.{name}" in str(raised.value) for name in [*names, *(fusion.name for fusion in FUSIONS)])


def test_operators_that_split_the_graph_are_part_of_what_decisions_depend_on():
    split = {"autofuse.splitting_ops": ["vllm::a", "vllm::b.default", "vllm::a"]}
    settings, _ = Settings.parse(split)
    assert str(settings) == "level=O2,untuned=skip,splitting_ops=vllm::a+vllm::b.default"
    assert settings.inductor_options == {}
    assert settings.split_at(["vllm::c"]) is None
    for name in ("vllm::a", "vllm::b"):
        assert f"{name} is in autofuse.splitting_ops".replace("::b is", "::b.default is") in settings.split_at([name])


def test_inductor_partitions_where_the_graph_would_be_split():
    split = {"autofuse.splitting_ops": ["vllm::a"], "autofuse.use_inductor_graph_partition": True}
    settings, _ = Settings.parse(split)
    assert str(settings).endswith("splitting_ops=vllm::a,use_inductor_graph_partition=on")
    assert settings.split_at(["vllm::a"]) is None
    assert settings.inductor_options == {"graph_partition": True, "custom_should_partition_ops": ["vllm::a"]}


def test_a_fusion_whose_operator_splits_the_graph_is_named_in_the_report():
    """Also where the graph was split already, and nothing is left to be found."""
    options = {"autofuse.splitting_ops": ["vllm::unified_mla_kv_cache_update"]}
    x = torch.randn(16, HIDDEN, dtype=torch.bfloat16)
    for level, noted in (("O1", False), ("O2", True)):
        with without_code_generation(), torch.no_grad():
            torch.compile(MlaLatents(), backend="autofuse", options={**options, "autofuse.level": level})(x)
        note = last_reports()[-1].note
        assert ("fuse_rope_kvcache_cat_mla: vllm::unified_mla_kv_cache_update is in" in note) == noted


@pytest.mark.parametrize(
    ("options", "warns"),
    [
        ({}, False),
        ({"autofuse.level": "O3"}, False),
        ({"autofuse.fuse_mla_dual_rms_norm": True}, False),  # untuned, but it could fire
        ({"autofuse.fuse_rope_kvcache": False}, False),
        ({"autofuse.fuse_rope_kvcache": True}, True),
    ],
    ids=str,
)
def test_asking_for_what_cannot_fire_warns_once(options, warns, caplog):
    x = torch.randn(16, HIDDEN, dtype=torch.bfloat16)
    with caplog.at_level(logging.WARNING, "autofuse"):
        for _ in range(2):
            with without_code_generation(), torch.no_grad():
                torch.compile(MlaLatents(), backend="autofuse", options=options)(x)
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("autofuse")]
    assert [("autofuse.fuse_rope_kvcache is set" in message) for message in messages] == [True] * warns


def test_reports_read_back_from_their_canonical_form():
    site = SiteReport("f", "op", "op(n=1)", "layers.0", "m.py:1 in forward", "cpu", "16", True, "ab", "x", "exact", "y")
    site = replace(site, measured=(Measured.of(winner(16, 1.5)),), gain=1.5, nearest="a row")
    misses = (NearMissReport("RMSNorm", "", "", "rsqrt", "why"),)
    report = GraphReport("k", "s", (site,), misses, 0.5, 0.25, blocks=(("Rope", 2),), unmatched=("fuse_x (y)",))
    again = GraphReport.from_json(report.to_json())
    assert replace(again, from_cache=False) == report
    assert again.to_json() == report.to_json()
    assert again.from_cache
    assert not report.from_cache
    with pytest.raises(ValueError, match="not a graph report"):
        GraphReport.from_json("{}")
