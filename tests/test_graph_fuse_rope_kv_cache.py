"""RoPE of q and k and the writes of k and v become one op that writes into the caller's caches, or nothing changes."""

from __future__ import annotations

import re

import pytest
import torch
from models import isolate, post_grad_graph, without_code_generation
from rope_dialects import (
    DEINTERLEAVED,
    GPTJ,
    NEOX,
    first_columns,
    hugging_face_interleaved,
    vllm_gptj,
    vllm_neox,
)
from rope_layers import (
    BLOCK,
    KV,
    D,
    Gqa,
    GqaOperators,
    H,
    P,
    T,
    by_block,
    by_head,
    flat,
    hidden,
    operator,
    paged,
)
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code

from autofuse.graph.fusions.rope_kv_cache import RopeKvCache
from autofuse.graph.recognise import recognise
from autofuse.graph.report_store import last_reports

FUSE = {"autofuse.untuned": "fuse"}
OP = torch.ops.autofuse.rope_kv_cache.default
WRITES = torch.ops.higher_order.auto_functionalized_v2


@pytest.fixture(autouse=True)
def _isolated(monkeypatch, tmp_path, tmp_path_factory):
    isolate(monkeypatch, tmp_path, tmp_path_factory.getbasetemp() / "cache")


def sites_of(function, *args, **options):
    return RopeKvCache().match(recognise(post_grad_graph(function, *args, **options)))


def near_misses_of(function, *args):
    return [miss.reason for miss in RopeKvCache().near_misses(recognise(post_grad_graph(function, *args)))]


def copies(values):
    return [value.clone() for value in values]


def assert_fused(model, args, cache, dynamic=False, tolerance=2e-2, fused=1):
    """One site is fused, and results and caches are those of eager. Returns the site's report."""
    expected_cache, fused_cache = copies(cache), copies(cache)
    with torch.no_grad():
        expected = model(*args, *expected_cache)
        with without_code_generation():
            results = torch.compile(model, backend="autofuse", dynamic=dynamic, options=FUSE)(*args, *fused_cache)
    report = last_reports()[-1]
    sites = [site for site in report.sites if site.op == "rope_kv_cache"]
    assert (len(sites), sum(site.fused for site in sites)) == (1, fused), report
    for result, right in zip([*results, *fused_cache], [*expected, *expected_cache], strict=True):
        torch.testing.assert_close(result, right, atol=tolerance, rtol=tolerance)
    return sites[0]


# ---- every dialect --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", [*NEOX, *GPTJ, *DEINTERLEAVED], ids=lambda f: f.__name__)
def test_rotations_in_every_dialect_with_a_cache(dialect):
    site = assert_fused(Gqa(dialect, flat), hidden(), paged(T))
    assert f"neox={int(dialect in NEOX)}" in site.problem
    assert site.problem.endswith(",deinterleave=1)") == (dialect in DEINTERLEAVED)
    assert "cache=auto" in site.problem
    assert "return_k=0" in site.problem


@pytest.mark.parametrize("dialect", [*NEOX, *GPTJ, *DEINTERLEAVED], ids=lambda f: f.__name__)
def test_rotations_alone(dialect):
    site = assert_fused(Gqa(dialect), hidden(), [])
    assert "cache=none" in site.problem
    assert "return_k=1" in site.problem


@pytest.mark.parametrize(("write", "order"), [(flat, "NHD"), (by_block, "NHD"), (by_head, "HND"), (operator, "NHD")])
@pytest.mark.parametrize("kv", [1, 2])
def test_writes_in_every_form(write, order, kv):
    assert_fused(Gqa(vllm_neox, write, kv=kv), hidden(), paged(T, heads=kv, order=order))


@pytest.mark.parametrize("version", [1, 2], ids=["v1", "v2"])
@pytest.mark.parametrize("kv", [1, 2])
def test_vllms_operators(version, kv):
    with inductor_config.patch(enable_auto_functionalized_v2=version == 2):
        assert_fused(GqaOperators(kv=kv), hidden(), paged(T, heads=kv))


@pytest.mark.parametrize("dialect", [vllm_neox, vllm_gptj, hugging_face_interleaved], ids=lambda f: f.__name__)
def test_partial_rotary(dialect):
    site = assert_fused(Gqa(first_columns(dialect), flat, rope=8), hidden(), paged(T))
    assert "rope_dim=8" in site.problem


def test_halves_that_come_out_as_neighbours_are_left_alone():
    def interleaved(x, table, positions):
        cos, sin = (part.unsqueeze(-2) for part in table.index_select(0, positions).chunk(2, dim=-1))
        a, b = x.chunk(2, dim=-1)
        return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)

    assert "pairs halves of its input but neighbours of its result" in refusal(
        Gqa(interleaved, flat), *hidden(), *paged(T)
    )


def test_a_query_and_a_key_in_different_orders_are_left_alone():
    class Mixed(Gqa):
        def forward(self, x, positions):
            q, k, _ = (x @ self.qkv).split([H * D, self.kv * D, self.kv * D], dim=-1)
            q = hugging_face_interleaved(q.view(-1, H, D), self.table, positions)
            return q * 2, vllm_gptj(k.view(-1, self.kv, D), self.table, positions) * 2

    assert "different styles: neighbours to halves and neighbours" in refusal(Mixed(), *hidden())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_other_dtypes(dtype):
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    assert_fused(Gqa(vllm_neox, flat, dtype=dtype), hidden(dtype=dtype), paged(T, dtype=dtype), tolerance=tolerance)


@pytest.mark.parametrize("write", [flat, by_block, None], ids=["flat", "by block", "no cache"])
def test_dynamic_tokens(write):
    x, positions = hidden()
    cache = [] if write is None else [*paged(T)]
    for tensor in (x, positions, *cache[2:]):
        torch._dynamo.mark_dynamic(tensor, 0)
    site = assert_marked(Gqa(vllm_neox, write), (x, positions), cache)
    assert site.tokens == "2…∞"
    assert ("cache=none" if write is None else "cache=auto") in site.problem


@pytest.mark.parametrize("write", [flat, by_block, None], ids=["flat", "by block", "no cache"])
def test_everything_dynamic(write):
    site = assert_fused(Gqa(vllm_neox, write), hidden(), [] if write is None else paged(T), dynamic=True)
    assert site.tokens == "2…∞"


def test_dynamic_tokens_of_operators():
    cache = paged(T)
    for tensor in cache[:2]:
        torch._dynamo.mark_static(tensor)
    site = assert_marked(GqaOperators(), hidden(), cache, dynamic=True)
    assert site.tokens == "2…∞"


def assert_marked(model, args, cache, dynamic=None):
    """``assert_fused`` on tensors that carry marks, which copies would lose."""
    expected_cache = copies(cache)
    with torch.no_grad():
        expected = model(*args, *expected_cache)
        with without_code_generation():
            results = torch.compile(model, backend="autofuse", dynamic=dynamic, options=FUSE)(*args, *cache)
    (site,) = [site for site in last_reports()[-1].sites if site.op == "rope_kv_cache"]
    assert site.fused, site
    for result, right in zip([*results, *cache], [*expected, *expected_cache], strict=True):
        torch.testing.assert_close(result, right, atol=2e-2, rtol=2e-2)
    return site


def test_padded_tokens_write_nothing():
    k_cache, v_cache, slots = paged(T)
    slots[1::2] = -1
    assert_fused(Gqa(vllm_neox, operator), hidden(), (k_cache, v_cache, slots))


def test_negative_indices_count_from_the_end_as_they_did():
    k_cache, v_cache, slots = paged(T)
    for write in (flat, by_block):
        assert_fused(Gqa(vllm_neox, write), hidden(), (k_cache, v_cache, slots - 4 * BLOCK))


# ---- the graph, and the code ----------------------------------------------------------------------------------------


def rewritten(model, *args, **options):
    graph = post_grad_graph(model, *args, **options)
    fusion = RopeKvCache()
    (site,) = fusion.match(recognise(graph))
    assert site.refusal is None
    fusion.rewrite(graph, site, "")
    graph.lint()
    return graph


def test_the_call_is_functional_and_all_that_it_replaces_is_gone():
    graph = rewritten(Gqa(vllm_neox, flat), *hidden(), *paged(T))
    (call,) = graph.find_nodes(op="call_function", target=WRITES)
    assert call.args == (OP,)
    assert [base.op for base in call.kwargs["_all_bases"]] == ["placeholder"] * 2
    for target in (torch.ops.aten.index_put.default, torch.ops.aten.cat.default, torch.ops.aten.index.Tensor):
        assert not graph.find_nodes(op="call_function", target=target)
    assert all("val" in node.meta for node in graph.nodes if node.op != "output")


@pytest.mark.parametrize("model", [Gqa(vllm_neox, flat), Gqa(vllm_neox, by_head), GqaOperators()])
def test_a_site_knows_the_tensors_that_the_op_will_get(model):
    order = "HND" if getattr(model, "write", None) is by_head else "NHD"
    graph = post_grad_graph(model, *hidden(), *paged(T, order=order))
    fusion = RopeKvCache()
    (site,) = fusion.match(recognise(graph))
    before = {index: layout(value) for index, value in site.tensors().items() if index < 3}
    fusion.rewrite(graph, site, "")
    (call,) = graph.find_nodes(op="call_function", target=WRITES)
    assert before == {index: layout(call.kwargs[name].meta["val"]) for index, name in enumerate(("q", "k", "v"))}


def layout(value):
    return value.dtype, str(list(value.shape)), str(value.stride()), str(value.storage_offset())


def test_a_rewrite_that_fails_leaves_the_graph_as_it_was(monkeypatch):
    graph = post_grad_graph(Gqa(vllm_neox, flat), *hidden(), *paged(T))
    before = str(graph)
    fusion = RopeKvCache()
    (site,) = fusion.match(recognise(graph))
    monkeypatch.setattr("autofuse.graph.fusions.rope_kv_cache.replace_rope", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fusion.rewrite(graph, site, "")
    assert str(graph) == before
    graph.lint()


def code_of(model, args, cache):
    torch._dynamo.reset()
    expected_cache = copies(cache)
    with torch.no_grad():
        expected = model(*args, *expected_cache)
        compiled = torch.compile(model, backend="autofuse", options=FUSE)
        results, code = run_and_get_code(compiled, *args, *cache)
    for result, right in zip([*results, *cache], [*expected, *expected_cache], strict=True):
        torch.testing.assert_close(result, right, atol=2e-2, rtol=2e-2)
    return "\n".join(code)


@pytest.mark.parametrize("version", [1, 2], ids=["v1", "v2"])
@pytest.mark.parametrize("model", [Gqa(vllm_neox, flat), GqaOperators()], ids=["index_put", "operators"])
def test_generated_code_writes_into_the_callers_caches_and_copies_nothing(model, version):
    with inductor_config.patch(enable_auto_functionalized_v2=version == 2):
        code = code_of(model, hidden(), paged(T))
    (call,) = re.findall(r"rope_kv_cache\.default\((.*)\)", code)
    # q, k and v are views of the one matrix product, the caches are the graph's inputs.
    (product,) = set(re.findall(r"extern_kernels\.mm\(.*out=(\w+)\)", code))
    assert len(re.findall(rf"reinterpret_tensor\({product}, ", call)) == 3
    assert len(re.findall(r"arg\d+_1", call)) >= 2
    assert not re.findall(r"copy_\(|clone|slice_scatter|index_put", code.replace(call, ""))


# ---- what must not be fused -----------------------------------------------------------------------------------------


def refusal(model, *args):
    (site,) = sites_of(model, *args)
    assert site.refusal is not None
    return site.refusal


class OldCacheIsRead(Gqa):
    def forward(self, x, positions, k_cache, v_cache, slots):
        old = k_cache.clone()
        q, *_ = super().forward(x, positions, k_cache, v_cache, slots)
        return q, old * q.sum()


def test_a_cache_that_is_also_read_as_it_was_before():
    """Whether the reader comes first or last, nothing is written before it has read."""
    model, args, cache = OldCacheIsRead(vllm_neox, flat), hidden(), paged(T)
    expected_cache, fused_cache = copies(cache), copies(cache)
    with torch.no_grad():
        expected = model(*args, *expected_cache)
        torch._dynamo.reset()
        results = torch.compile(model, backend="autofuse", options=FUSE)(*args, *fused_cache)
    for result, right in zip([*results, *fused_cache], [*expected, *expected_cache], strict=True):
        torch.testing.assert_close(result, right, atol=2e-2, rtol=2e-2)


def test_a_cache_that_is_read_before_the_write_but_after_the_rotation_is_refused():
    def write(k_cache, v_cache, slots, k, v):
        v = v + k_cache.view(-1, KV, D)[slots] * k  # depends on the rotated key, and on the cache before
        flat(k_cache, v_cache, slots, k, v)

    assert "as it was before, is read by" in refusal(Gqa(vllm_neox, write), *hidden(), *paged(T))


def test_two_steps_into_one_cache_keep_their_order():
    class Twice(Gqa):
        def forward(self, x, positions, k_cache, v_cache, slots):
            first = super().forward(x, positions, k_cache, v_cache, slots)
            return *first, *super().forward(x + 1, positions + 1, k_cache, v_cache, slots)

    model, (x, positions), cache = Twice(vllm_neox, flat), hidden(), paged(T)
    positions %= P - 1
    expected_cache, fused_cache = copies(cache), copies(cache)
    with torch.no_grad():
        expected = model(x, positions, *expected_cache)
        torch._dynamo.reset()
        results, code = run_and_get_code(
            torch.compile(model, backend="autofuse", options=FUSE), x, positions, *fused_cache
        )
    assert last_reports()[-1].fused == 2, last_reports()[-1]
    assert not re.findall(r"copy_\(|clone", "\n".join(code))
    for result, right in zip([*results, *fused_cache], [*expected, *expected_cache], strict=True):
        torch.testing.assert_close(result, right, atol=2e-2, rtol=2e-2)


def test_key_and_value_in_one_cache_are_refused():
    def write(k_cache, v_cache, slots, k, v):
        for rows in (k, v):
            k_cache[slots // BLOCK, slots % BLOCK] = rows

    assert "is written to twice" in refusal(Gqa(vllm_neox, write), *hidden(), *paged(T))


@pytest.mark.parametrize("version", [1, 2], ids=["v1", "v2"])
@pytest.mark.parametrize("write", [flat, by_block, operator])
def test_caches_in_one_tensor_are_written_in_place(write, version):
    class Stacked(Gqa):
        def forward(self, x, positions, caches, slots):
            keys, values = caches.unbind(0)
            return super().forward(x, positions, keys, values, slots)

    k_cache, v_cache, slots = paged(T)
    with inductor_config.patch(enable_auto_functionalized_v2=version == 2):
        code = code_of(Stacked(vllm_neox, write), hidden(), (torch.stack([k_cache, v_cache]), slots))
    assert last_reports()[-1].fused == 1, last_reports()[-1]
    assert not re.findall(r"copy_\(|clone|select_scatter|index_put", code)


def another_key(k_cache, v_cache, slots, k, v):
    flat(k_cache, v_cache, slots, k * 2, v)


def heads_reversed(k_cache, v_cache, slots, k, v):
    flat(k_cache, v_cache, slots, k.flip(1), v)


def key_alone(k_cache, v_cache, slots, k, v):
    k_cache.view(-1, KV, D)[slots] = k


def other_slots(k_cache, v_cache, slots, k, v):
    k_cache.view(-1, KV, D)[slots] = k
    v_cache.view(-1, KV, D)[slots.flip(0)] = v


def columns_for_heads(k_cache, v_cache, slots, k, v):
    k_cache.view(-1, D, KV)[slots] = k.transpose(1, 2)
    v_cache.view(-1, KV, D)[slots] = v


@pytest.mark.parametrize(
    ("write", "why"),
    [
        (another_key, "cache=none"),
        (heads_reversed, "cache=none"),
        (key_alone, "no write beside that of the key"),
        (other_slots, "no write beside that of the key"),
        (columns_for_heads, "no write beside that of the key"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_other_writes_are_not_joined(write, why):
    """Either the write stays outside and the rotations are one op, or the site is refused; results stay right."""
    model, args, cache = Gqa(vllm_neox, write), hidden(), paged(T)
    expected_cache, fused_cache = copies(cache), copies(cache)
    with torch.no_grad():
        expected = model(*args, *expected_cache)
        with without_code_generation():
            results = torch.compile(model, backend="autofuse", options=FUSE)(*args, *fused_cache)
    for result, right in zip([*results, *fused_cache], [*expected, *expected_cache], strict=True):
        torch.testing.assert_close(result, right, atol=2e-2, rtol=2e-2)
    (site,) = [site for site in last_reports()[-1].sites if site.op == "rope_kv_cache"]
    assert why in site.problem + site.reason


def test_different_angles_are_no_pair():
    class Other(Gqa):
        def forward(self, x, positions):
            q, k, _ = (x @ self.qkv).split([H * D, KV * D, KV * D], dim=-1)
            q = self.dialect(q.view(-1, H, D), self.table, positions)
            return q * 2, self.dialect(k.view(-1, KV, D), self.table, positions + 1) * 2

    assert sites_of(Other(), *hidden()) == []
    reasons = near_misses_of(Other(), *hidden())
    assert len(reasons) == 2
    assert all("nothing else of the same activations" in reason for reason in reasons)


def test_three_rotations_of_one_projection_are_unclear():
    class Three(Gqa):
        def forward(self, x, positions):
            parts = (x @ self.qkv).view(-1, H + 2 * KV, D).split([H, KV, KV], dim=1)
            return [self.dialect(part, self.table, positions) * 2 for part in parts]

    assert sites_of(Three(), *hidden()) == []
    (reason,) = near_misses_of(Three(), *hidden())
    assert "which are query and key is unclear" in reason


def test_rows_that_inductor_computes_on_the_way_are_refused():
    class Scaled(Gqa):
        def forward(self, x, positions):
            q, k, _ = (torch.tanh(x @ self.qkv)).split([H * D, KV * D, KV * D], dim=-1)
            rows = q.view(-1, H, D), k.view(-1, KV, D)
            return [self.dialect(each, self.table, positions) * 2 for each in rows]

    assert "which Inductor joins with the rotation" in refusal(Scaled(), *hidden())


def test_a_cache_of_another_dtype_is_refused():
    k_cache, v_cache, slots = paged(T)
    why = refusal(Gqa(vllm_neox, operator), *hidden(), k_cache.to(torch.float16), v_cache.to(torch.float16), slots)
    assert "torch.float16" in why


def test_level_and_flag_switch_it_off():
    for options in ({"autofuse.level": "O1"}, {"autofuse.fuse_rope_kvcache": False}):
        with without_code_generation(), torch.no_grad():
            torch.compile(Gqa(), backend="autofuse", options={**FUSE, **options})(*hidden())
        assert [site.rule for site in last_reports()[-1].sites] == ["level"]
