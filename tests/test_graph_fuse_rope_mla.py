"""MLA's rotations, the write of its latent and the query's cat become one op, or nothing changes."""

from __future__ import annotations

import re

import pytest
import torch
from like_eager import assert_like_eager
from models import isolate, post_grad_graph
from rope_dialects import vllm_gptj, vllm_neox
from rope_layers import (
    HIDDEN,
    LATENT,
    MLA_ROTATIONS,
    NOPE,
    ROPE,
    H,
    Mla,
    T,
    hidden,
    latents,
    mla_flat,
    mla_operator,
    rotate_by_cat,
    rotate_by_operator,
)
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code

from autofuse.graph.fusions.mla_rope_kv_cache_cat import MlaRopeKvCacheCat
from autofuse.graph.fusions.rope_kv_cache import RopeKvCache
from autofuse.graph.recognise import recognise
from autofuse.graph.report_store import last_reports

FUSE = {"autofuse.untuned": "fuse"}


@pytest.fixture(autouse=True)
def _isolated(monkeypatch, tmp_path, tmp_path_factory):
    isolate(monkeypatch, tmp_path, tmp_path_factory.getbasetemp() / "cache")


@pytest.fixture(params=[1, 2], ids=["v1", "v2"])
def _version(request):
    """Both ways in which PyTorch makes an operator that writes functional."""
    with inductor_config.patch(enable_auto_functionalized_v2=request.param == 2):
        yield


def assert_fused(model, args, cache, run=None, dynamic=None, tolerance=2e-2):
    """One site is fused, and results and cache are those of eager. Returns the site's report."""
    assert_like_eager(model, args, cache, options=FUSE, dynamic=dynamic, run=run, tolerance=tolerance)
    (site,) = [site for site in last_reports()[-1].sites if "rope" in site.op and site.rule != "level"]
    assert site.fused, site
    assert site.op == "mla_rope_kv_cache_cat"
    return site


@pytest.mark.usefixtures("_version")
@pytest.mark.parametrize("absorbed", [True, False], ids=["absorbed", "whole"])
@pytest.mark.parametrize("write", [mla_operator, mla_flat], ids=lambda f: f.__name__)
@pytest.mark.parametrize("rotate", MLA_ROTATIONS)
def test_a_layer_in_every_form(rotate, write, absorbed):
    site = assert_fused(Mla(MLA_ROTATIONS[rotate], write, absorbed), hidden(), latents(T))
    assert f"nope_dim={LATENT if absorbed else NOPE}," in site.problem
    assert f"rope_dim={ROPE},latent_dim={LATENT},neox={int(rotate == 'NeoX')}" in site.problem
    assert "cache=auto" in site.problem
    assert ("deinterleave=1" in site.problem) == ("halves out" in rotate)


@pytest.mark.usefixtures("_version")
def test_the_absorbed_query_is_put_together_by_the_op():
    site = assert_fused(Mla(rotate_by_operator, mla_operator), hidden(), latents(T))
    assert f"heads={H},nope_dim={LATENT}," in site.problem


@pytest.mark.usefixtures("_version")
def test_generated_code_writes_into_the_callers_cache_and_copies_nothing():
    codes = []

    def run(compiled, *args):
        results, code = run_and_get_code(compiled, *args)
        codes.extend(code)
        return results

    assert_fused(Mla(rotate_by_operator, mla_operator), hidden(), latents(T), run=run)
    text = "\n".join(codes)
    (call,) = re.findall(r"mla_rope_kv_cache_cat\.default\((.*)\)", text)
    assert re.search(r"arg\d+_1, None, None, None, False", call)  # the cache as it was given
    assert not re.findall(r"copy_\(|clone|slice_scatter|index_put|_cat_|rotary_embedding", text.replace(call, ""))


@pytest.mark.parametrize("rotate", ["cat", "in place"])
def test_dynamic_tokens(rotate):
    args, cache = hidden(), latents(T)
    for tensor in (*args, cache[1]):
        torch._dynamo.mark_dynamic(tensor, 0)
    site = assert_fused(Mla(MLA_ROTATIONS[rotate], mla_flat), args, cache)
    assert site.tokens == "2…∞"


def test_padded_tokens_write_nothing():
    cache, slots = latents(T)
    slots[::2] = -1
    assert_fused(Mla(rotate_by_operator, mla_operator), hidden(), (cache, slots))


def test_without_a_cache():
    class NoCache(Mla):
        def forward(self, x, positions):
            q = (x @ self.w_q).view(-1, H, NOPE + ROPE)
            _, k_pe = (x @ self.w_kv).split([LATENT, ROPE], dim=-1)
            return [each * 2 for each in self.rotate(q, k_pe.unsqueeze(1), self.table, positions)]

    for rotate in MLA_ROTATIONS.values():
        site = assert_fused(NoCache(rotate, None), hidden(), [])
        assert "cache=none" in site.problem


def test_two_caches_of_latent_and_key():
    """As Hugging Face keeps them: [B, 1, P, width] each."""

    class Apart(Mla):
        def forward(self, x, positions, latent_cache, key_cache, places):
            q = (x @ self.w_q).view(*x.shape[:-1], H, NOPE + ROPE)
            kv_c, k_pe = (x @ self.w_kv).unsqueeze(2).split([LATENT, ROPE], dim=-1)
            q, k_pe = self.rotate(q, k_pe, self.table, positions)
            for cache, rows in ((latent_cache, kv_c), (key_cache, k_pe)):
                cache.index_copy_(2, places, rows.transpose(1, 2))
            return q.transpose(1, 2) * 2, latent_cache * 2, key_cache * 2

    torch.manual_seed(1)
    caches = [torch.randn(2, 1, 16, width, dtype=torch.bfloat16) for width in (LATENT, ROPE)]
    x, positions = hidden()
    args = x.view(2, 3, HIDDEN), positions.view(2, 3)
    site = assert_fused(Apart(rotate_by_cat(vllm_gptj), None), args, (*caches, torch.tensor([3, 4, 5])))
    assert "cache=auto_apart" in site.problem
    assert site.tokens == "6"


# ---- what must not be fused -----------------------------------------------------------------------------------------


def refusals(model, *args):
    found = recognise(post_grad_graph(model, *args))
    return [site.refusal for fusion in (MlaRopeKvCacheCat(), RopeKvCache()) for site in fusion.match(found)]


def test_the_key_before_the_latent_is_refused():
    def write(cache, slots, kv_c, k_pe):
        cache.view(-1, LATENT + ROPE)[slots] = torch.cat([k_pe.squeeze(1), kv_c], dim=-1)

    (why,) = refusals(Mla(rotate_by_cat(vllm_neox), write, absorbed=False), *hidden(), *latents(T))
    assert "not the latent, then the rotated key" in why


def test_a_cache_of_other_rows_is_refused():
    def write(cache, slots, kv_c, k_pe):
        rows = torch.cat([kv_c, k_pe.squeeze(1), kv_c[:, :8]], dim=-1)
        cache.view(-1, LATENT + ROPE + 8)[slots] = rows

    cache = torch.randn(4, 8, LATENT + ROPE + 8, dtype=torch.bfloat16)
    (why,) = refusals(Mla(rotate_by_cat(vllm_neox), write, absorbed=False), *hidden(), cache, latents(T)[1])
    assert "not the latent, then the rotated key" in why


def test_columns_rotated_in_the_middle_are_refused():
    class Middle(Mla):
        def forward(self, x, positions):
            q = (x @ self.w_q).view(-1, H, NOPE + ROPE)
            k = (x @ self.w_kv)[:, None, -ROPE:]
            rotated = [vllm_neox(rows, self.table, positions) for rows in (q[..., 8 : 8 + ROPE], k)]
            return torch.cat([q[..., :8], rotated[0], q[..., 8 + ROPE :]], dim=-1) * 2, rotated[1] * 2

    (why,) = refusals(Middle(None, None), *hidden())
    assert "are rotated, and not the last" in why
