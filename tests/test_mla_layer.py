"""The MLA layer that is benchmarked: it computes attention, and all its fusions fire in one graph."""

from __future__ import annotations

import json
from argparse import Namespace

import pytest
import torch
import vllm_standins  # noqa: F401 (registers vLLM's operators)
from deciding import tuned, winner_of
from models import isolate, without_code_generation
from torch.nn import functional as F  # noqa: N812

import bench_layer
from autofuse.cache_db import TunedDatabase, Winner
from autofuse.graph.report_store import last_reports
from autofuse.ops import Config, Problem, get_op
from autofuse.targets import Target
from mla_layer import SMALL, Inputs, Weights, attend, mla_layer, quantised_and_back, random_inputs, random_weights

CPU = torch.device("cpu")
DTYPE = torch.bfloat16
FUSED = ["mla_dual_rms_norm", "mla_q_absorb_rope_kv_cache", "mla_v_up_quant"]
LESS_FUSED = ["mla_dual_rms_norm", "mla_rope_kv_cache_cat", "mla_v_up_quant"]  # without the product with W_UK
FUSE = {"autofuse.level": "O3", "autofuse.untuned": "fuse"}


@pytest.fixture(autouse=True)
def _isolated(monkeypatch, tmp_path, tmp_path_factory):
    isolate(monkeypatch, tmp_path, tmp_path_factory.getbasetemp() / "cache")


def arguments(tokens=5, context=50, dtype=DTYPE) -> tuple[Weights, Inputs]:
    generator = torch.Generator().manual_seed(0)
    weights = random_weights(SMALL, dtype, CPU, generator)
    return weights, random_inputs(SMALL, tokens, context, dtype, CPU, generator)


def copied(inputs: Inputs) -> Inputs:
    return inputs._replace(kv_cache=inputs.kv_cache.clone())


def not_absorbed(weights: Weights, inputs: Inputs) -> torch.Tensor:
    """The values of each head [T, heads · v_head_dim] by keys and values of its own, one sequence after the other.

    DeepSeek-V2 technical report, equations 9 to 16 and 37 to 47. RoPE as complex numbers.
    """
    widths, eps = SMALL, 1e-6
    rank, rope, nope = widths.kv_lora_rank, widths.qk_rope_head_dim, widths.qk_nope_head_dim
    angles = torch.complex(*inputs.cos_sin_cache.chunk(2, dim=-1))

    def rotated(x, position):
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * angles[position]).flatten(-2)

    q_c, kv_c, k_pe = (inputs.hidden @ weights.qkv_a.T).split([widths.q_lora_rank, rank, rope], dim=-1)
    q = (F.rms_norm(q_c, q_c.shape[-1:], weights.q_norm, eps) @ weights.q_b.T).unflatten(-1, (widths.heads, -1))
    values = []
    for sequence, blocks in enumerate(inputs.block_table):
        position = inputs.positions[sequence]
        rows = inputs.kv_cache[blocks].flatten(0, 1)[: position + 1].clone()
        newest = F.rms_norm(kv_c[sequence], (rank,), weights.kv_norm, eps)
        rows[position] = torch.cat([newest, rotated(k_pe[sequence], position)])
        query = torch.cat([q[sequence, :, :nope], rotated(q[sequence, :, nope:], position)], dim=-1)
        keys = torch.einsum("cl,npl->ncp", rows[:, :rank], weights.w_uk)
        keys = torch.cat([keys, rows[:, rank:].expand(widths.heads, -1, -1)], dim=-1)
        each = torch.einsum("cl,nlv->ncv", rows[:, :rank], weights.w_uv)
        values.append(F.scaled_dot_product_attention(query[:, None], keys, each).flatten())
    return torch.stack(values)


def test_the_layer_is_multi_head_latent_attention():
    weights, inputs = arguments(dtype=torch.float64)
    values = not_absorbed(weights, inputs)
    out, _ = mla_layer(SMALL, weights, copied(inputs), core=True)
    expected = quantised_and_back(values, SMALL.group) @ weights.o_proj.T
    # One FP8 value on the other side of a tie is all the difference there may be.
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-2)
    exact = values @ weights.o_proj.T
    assert 0 < (out - exact).abs().max() < 0.1 * exact.abs().max()  # the quantisation shows


def test_new_tokens_are_in_the_cache_and_nothing_else_is_written():
    weights, inputs = arguments()
    after = copied(inputs)
    mla_layer(SMALL, weights, after, core=False)
    changed = (after.kv_cache != inputs.kv_cache).any(-1).flatten().nonzero().flatten()
    assert sorted(inputs.slot_mapping.tolist()) == changed.tolist()


def test_attention_sees_no_further_than_its_position():
    _, inputs = arguments(tokens=2, context=50)
    query = torch.randn(2, SMALL.heads, SMALL.latent, dtype=DTYPE)
    short = inputs._replace(positions=torch.tensor([20, 49]))
    beyond = copied(short)
    beyond.kv_cache.view(-1, SMALL.latent)[short.block_table[0, 21 // 16] * 16 + 21 % 16] = 1e4
    assert torch.equal(*(attend(query, each, 0.1, SMALL.kv_lora_rank)[0] for each in (short, beyond)))


def run(function, weights, inputs):
    """(results, the cache afterwards)"""
    inputs = copied(inputs)
    with torch.no_grad():
        return *function(weights, inputs), inputs.kv_cache


@pytest.mark.parametrize("core", [False, True], ids=["without core", "with core"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_all_fusions_fire_in_one_graph(tokens, core):
    weights, inputs = arguments(tokens)
    expected = run(bench_layer.layer_call(SMALL, core), weights, inputs)
    with without_code_generation():
        results = run(bench_layer.compiled(SMALL, core, FUSE), weights, inputs)
    report = last_reports()[-1]
    assert sorted(site.op for site in report.sites if site.fused) == FUSED, report
    assert not report.near_misses
    for result, right in zip(results, expected, strict=True):
        torch.testing.assert_close(result, right, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("op", sorted({*FUSED, *LESS_FUSED}))
def test_each_fusion_alone(op):
    from autofuse.graph.fusions import FUSIONS

    (name,) = {fusion.name for fusion in FUSIONS if fusion.op == op}
    weights, inputs = arguments()
    options = {"autofuse.level": "O0", f"autofuse.{name}": True, "autofuse.untuned": "fuse"}
    expected = run(bench_layer.layer_call(SMALL, True), weights, inputs)
    with without_code_generation():
        results = run(bench_layer.compiled(SMALL, True, options), weights, inputs)
    assert [site.op for site in last_reports()[-1].sites if site.fused] == [op]
    for result, right in zip(results, expected, strict=True):
        torch.testing.assert_close(result, right, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(("saved", "fused"), [({}, FUSED), ({FUSED[1]: 1.0}, LESS_FUSED)], ids=["more", "less"])
def test_the_product_is_taken_in_where_that_was_measured_to_save_more(saved, fused):
    weights, inputs = arguments()
    options = {"autofuse.level": "O3"}
    with without_code_generation():
        run(bench_layer.compiled(SMALL, True, options), weights, inputs)
    problems = {site.op: Problem.parse(site.problem) for site in last_reports()[-1].sites if site.problem}
    saves = {**dict.fromkeys(LESS_FUSED, 2.0), FUSED[1]: 3.0, **saved}
    tuned(*(winner_of(problem, 5, saves[op]) for op, problem in problems.items()))
    expected = run(bench_layer.layer_call(SMALL, True), weights, inputs)
    with without_code_generation():
        results = run(bench_layer.compiled(SMALL, True, options), weights, inputs)
    assert sorted(site.op for site in last_reports()[-1].sites if site.fused) == fused
    for result, right in zip(results, expected, strict=True):
        torch.testing.assert_close(result, right, rtol=0.05, atol=0.05)


def test_generated_code_runs_the_fused_layer():
    torch._dynamo.reset()
    weights, inputs = arguments()
    expected = run(bench_layer.layer_call(SMALL, True), weights, inputs)
    results = run(bench_layer.compiled(SMALL, True, FUSE), weights, inputs)
    assert sorted(site.op for site in last_reports()[-1].sites if site.fused) == FUSED
    for result, right in zip(results, expected, strict=True):
        torch.testing.assert_close(result, right, rtol=0.05, atol=0.05)


def by_operators(weights: Weights, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer by vLLM's operators, which write where they are told to."""
    ops, widths, tokens = torch.ops._C, SMALL, inputs.hidden.shape[0]
    rank, rope, nope = widths.kv_lora_rank, widths.qk_rope_head_dim, widths.qk_nope_head_dim

    def normed(x, weight):
        out = torch.empty(x.shape, dtype=x.dtype)
        ops.rms_norm(out, x, weight, 1e-6)
        return out

    q_c, kv_c, k_pe = F.linear(inputs.hidden, weights.qkv_a).split([widths.q_lora_rank, rank, rope], dim=-1)
    q = F.linear(normed(q_c, weights.q_norm), weights.q_b).view(tokens, widths.heads, nope + rope)
    kv_c = normed(kv_c, weights.kv_norm)
    q_nope, q_pe = q.split([nope, rope], dim=-1)
    ql_nope = torch.bmm(q_nope.transpose(0, 1), weights.w_uk).transpose(0, 1)
    q_pe, k_pe = q_pe.contiguous(), k_pe.contiguous()
    ops.rotary_embedding(inputs.positions, q_pe, k_pe, rope, inputs.cos_sin_cache, False)
    torch.ops._C_cache_ops.concat_and_cache_mla(kv_c, k_pe, inputs.kv_cache, inputs.slot_mapping, "auto", torch.ones(1))
    query = torch.cat([ql_nope, q_pe], dim=-1)
    latent = attend(query, inputs, (nope + rope) ** -0.5, rank)
    x = torch.bmm(latent.transpose(0, 1), weights.w_uv).transpose(0, 1).reshape(tokens, -1)
    values = torch.empty(x.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(tokens, x.shape[1] // widths.group)
    ops.per_token_group_fp8_quant(x, values, scales, widths.group, 1e-10, -448.0, 448.0, False, False, False)
    wide = (values.view(tokens, -1, widths.group).float() * scales[..., None]).to(x.dtype).view(x.shape)
    return F.linear(wide, weights.o_proj), query


def test_the_layer_by_vllms_operators():
    weights, inputs = arguments()
    expected = run(by_operators, weights, inputs)
    for result, right in zip(run(bench_layer.layer_call(SMALL, True), weights, inputs), expected, strict=True):
        torch.testing.assert_close(result, right, rtol=0.05, atol=0.05)
    with without_code_generation():
        compiled = torch.compile(by_operators, backend="autofuse", dynamic=False, fullgraph=True, options=FUSE)
        results = run(compiled, weights, inputs)
    report = last_reports()[-1]
    assert sorted(site.op for site in report.sites if site.fused) == FUSED, report
    for result, right in zip(results, expected, strict=True):
        torch.testing.assert_close(result, right, rtol=0.05, atol=0.05)


def test_a_row_of_the_benchmark(monkeypatch, tmp_path, tiny):
    """Tuning is left out: it is tested elsewhere."""
    monkeypatch.setattr(bench_layer, "EFFORTS", {"tiny": tiny})
    monkeypatch.setattr(bench_layer, "tune_on_devices", lambda *_: [])
    monkeypatch.setattr(bench_layer, "UNTUNED", {"autofuse.untuned": "fuse"})
    options = Namespace(effort="tiny", database=tmp_path / "tuned.db", no_single=False)
    with without_code_generation(), torch.no_grad():
        row = bench_layer.measured_row(SMALL, 2, 20, options, CPU)
    singles = {f"+{site['fusion']}" for site in row["sites"]}
    assert set(row["us"]) == {"eager", "compile", "autofuse", "GEMMs alone", *singles}
    assert [site["op"] for site in row["sites"] if site["fused"]] == FUSED
    assert max(row["error"].values()) < 0.05
    path = tmp_path / "h200" / "mla_layer.json"
    for tokens in (2, 4):
        bench_layer.record(path, bench_layer.facts(SMALL, CPU), "with core", tokens, row)
    content = json.loads(path.read_text())
    assert list(content["rows"]["with core"]) == ["2", "4"]
    assert {"host", "torch", "source_hashes"} <= set(row["provenance"])
    assert bench_layer.shown("layer", {2: row}).row_count == 1


def test_plainly_launched_configs_are_those_of_the_winners_but_for_programmatic_launch(tmp_path):
    target = Target.parse("cuda:sm_90a:NVIDIA H200")
    op = get_op("mla_dual_rms_norm")
    problem = op.make_problem(dtype="bf16", q_lora_rank=1536, kv_lora_rank=512, cast_before_weight=True)
    plain = op.default_config("cuda", problem, 64)
    early = Config.of(plain, PDL=1, PREFETCH=1)
    with TunedDatabase(tmp_path / "tuned.db") as database:
        provenance = database.record_provenance({"host": "somewhere"})
        database.record_winner(
            Winner(target, problem, 64, early, "hash", 1.0, 0.1, "compile", 2.0, 2.0, 1.9, 2.1, provenance)
        )
    bench_layer.plainly_launched(tmp_path / "tuned.db", tmp_path / "plain.db", target)
    with TunedDatabase(tmp_path / "plain.db") as database:
        (winner,) = database.winners(target=target)
    assert (winner.config, winner.tokens, winner.problem) == (Config.of(early, PDL=0, PREFETCH=0), 64, problem)
