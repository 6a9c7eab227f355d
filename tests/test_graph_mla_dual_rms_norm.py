"""The two norms of an MLA layer are paired, and no others."""

from __future__ import annotations

import pytest
import torch
from models import HIDDEN, KV_RANK, Q_RANK, ROPE, MlaLatents, RMSNorm, post_grad_graph, without_code_generation
from torch import nn

from autofuse.graph.fusions.mla_dual_rms_norm import MlaDualRMSNorm
from autofuse.graph.recognise import recognise
from autofuse.graph.report_store import last_reports

DTYPE = torch.bfloat16


def sites_of(function, *args, **options):
    return MlaDualRMSNorm().match(recognise(post_grad_graph(function, *args, **options)))


def hidden(*shape):
    return torch.randn(*(shape or (2, 5)), HIDDEN, dtype=DTYPE)


@pytest.mark.parametrize("bias", [False, True], ids=["mm", "addmm"])
@pytest.mark.parametrize("joint", [True, False], ids=["one projection", "two projections"])
def test_both_latents_of_a_layer_are_paired(joint, bias):
    (site,) = sites_of(MlaLatents(DTYPE, joint, bias), hidden())
    assert site.refusal is None
    assert (site.q.width, site.kv.width) == (Q_RANK, KV_RANK)
    assert site.tokens == 10
    assert (site.q_rows.offset, site.kv_rows.offset) == (0, Q_RANK if joint else 0)


@pytest.mark.parametrize("joint", [True, False], ids=["one projection", "two projections"])
def test_dynamic_tokens(joint):
    x = hidden()
    torch._dynamo.mark_dynamic(x, 1)
    (site,) = sites_of(MlaLatents(DTYPE, joint), x, dynamic=None)
    assert site.refusal is None
    assert isinstance(site.tokens, torch.SymInt)


def test_parts_taken_by_slicing():
    class Sliced(MlaLatents):
        def forward(self, x):
            latents = self.down[0](x)
            return self.q_norm(latents[..., :Q_RANK]), self.kv_norm(latents[..., Q_RANK:-ROPE])

    (site,) = sites_of(Sliced(DTYPE), hidden())
    assert (site.q_rows.offset, site.kv_rows.offset, site.kv_rows.width) == (0, Q_RANK, KV_RANK)


def test_the_kv_norm_may_come_first():
    class Reversed(MlaLatents):
        def forward(self, x):
            kv, _ = self.down[1](x).split([KV_RANK, ROPE], dim=-1)
            return self.kv_norm(kv) + 1, self.q_norm(self.down[0](x))

    (site,) = sites_of(Reversed(DTYPE, joint=False), hidden())
    assert (site.refusal, site.q.width, site.kv.width) == (None, Q_RANK, KV_RANK)


def test_without_a_rope_part_the_narrower_is_kv():
    class NoRope(MlaLatents):
        def __init__(self):
            super().__init__(DTYPE, joint=False)
            self.kv_only = nn.Linear(HIDDEN, KV_RANK, bias=False, dtype=DTYPE)

        def forward(self, x):
            return self.kv_norm(self.kv_only(x)), self.q_norm(self.down[0](x))

    (site,) = sites_of(NoRope(), hidden())
    assert (site.q.width, site.kv.width) == (Q_RANK, KV_RANK)


def test_what_must_move_up_is_hoisted():
    (site,) = sites_of(MlaLatents(DTYPE, joint=False), hidden(), reorder=False)
    assert torch.ops.aten.mm.default in {node.target for node in site.hoist()}
    (site,) = sites_of(MlaLatents(DTYPE, joint=True), hidden())
    assert site.hoist() == ()


class Dependent(MlaLatents):
    """The kv latent is computed from the normed q latent."""

    def forward(self, x):
        latents = self.down[0](x)
        q = self.q_norm(latents[..., :Q_RANK])
        with_q = torch.cat([latents, self.q_up(q)], dim=-1)
        return q, self.kv_norm(with_q[..., Q_RANK : Q_RANK + KV_RANK])


class WeightFromQ(MlaLatents):
    """The kv norm's weight depends on the normed q latent."""

    def forward(self, x):
        q, kv, _ = self.down[0](x).split([Q_RANK, KV_RANK, ROPE], dim=-1)
        q = self.q_norm(q)
        wide = kv.float()
        normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(kv.dtype)
        return q, normed * q.sum((0, 1))[:KV_RANK]


def test_a_half_that_depends_on_the_other_is_refused():
    assert sites_of(Dependent(DTYPE), hidden()) == []
    (site,) = sites_of(WeightFromQ(DTYPE), hidden())
    assert "depends on the result" in site.refusal


def test_halves_that_cast_differently_are_refused():
    class Mixed(MlaLatents):
        def __init__(self):
            super().__init__(DTYPE)
            self.kv_norm = nn.RMSNorm(KV_RANK, eps=1e-6, dtype=DTYPE)

    (site,) = sites_of(Mixed(), hidden())
    assert "one norm casts before its weight" in site.refusal


def test_random_numbers_are_not_moved():
    class Dropped(MlaLatents):
        def forward(self, x):
            q = self.q_norm(self.down[0](x))
            noise = self.kv_norm.weight * torch.rand(KV_RANK, dtype=DTYPE)
            kv = self.down[1](x)[..., :KV_RANK].float()
            normed = (kv * torch.rsqrt(kv.pow(2).mean(-1, keepdim=True) + 1e-6)).to(DTYPE)
            return q, normed * noise

    (site,) = sites_of(Dropped(DTYPE, joint=False), hidden(), reorder=False)
    assert "cannot be moved above" in site.refusal


def test_nothing_is_moved_over_a_mutation():
    graph = post_grad_graph(MlaLatents(DTYPE, joint=False), hidden())
    q, kv = sorted(recognise(graph).rms_norms(), key=lambda block: block.output)
    with graph.inserting_after(q.output):
        written = graph.call_function(torch.ops.aten.copy_.default, (q.input, q.output))
        written.meta["val"] = q.output.meta["val"]
    (site,) = MlaDualRMSNorm().match(recognise(graph))
    assert "may write to a tensor" in site.refusal
    assert kv.output > written


class Unpaired(nn.Module):
    """Norms of columns of projections of the same activations, which cannot be paired.

    Args:
        projections: for each, the columns that a norm reads.
    """

    def __init__(self, *projections: list[tuple[int, int]]) -> None:
        super().__init__()
        self.projections = projections
        self.down = nn.ModuleList(nn.Linear(HIDDEN, 96, bias=False, dtype=DTYPE) for _ in projections)
        self.norms = nn.ModuleList(RMSNorm(end - start, DTYPE) for parts in projections for start, end in parts)

    def forward(self, x):
        latents = zip([down(x) for down in self.down], self.projections, strict=True)
        parts = [latent[..., start:end] for latent, columns in latents for start, end in columns]
        return [norm(part) for norm, part in zip(self.norms, parts, strict=True)]


@pytest.mark.parametrize(
    ("projections", "reason"),
    [
        ([[(0, 48), (40, 72)]], "overlap"),
        ([[(0, 48), (0, 48)]], "overlap"),
        ([[(0, 48), (48, 80), (80, 96)]], "3 norms read parts of"),
        ([[(0, 48)], [(16, 48)]], "which of the norms over projections of"),
        ([[(0, 48)], [(0, 32)], [(0, 16)]], "which of the norms over projections of"),
    ],
    ids=["overlap", "same columns", "three of one", "no latent first", "three of three"],
)
def test_norms_of_a_projection_that_cannot_be_paired_are_near_misses(projections, reason):
    found = recognise(post_grad_graph(Unpaired(*projections), hidden()))
    assert len(found.rms_norms()) == sum(map(len, projections))
    assert MlaDualRMSNorm().match(found) == []
    (miss,) = MlaDualRMSNorm().near_misses(found)
    assert reason in miss.reason
    assert miss.block == "mla_dual_rms_norm"


def test_a_near_miss_is_reported():
    with without_code_generation(), torch.no_grad():
        torch.compile(Unpaired([(0, 48), (40, 72)]), backend="autofuse")(hidden())
    report = last_reports()[-1]
    (miss,) = report.near_misses
    assert report.sites == ()
    assert "overlap: columns 0 to 48 of mm, columns 40 to 72 of mm" in str(miss)


@pytest.mark.parametrize("module", [MlaLatents(DTYPE), MlaLatents(DTYPE, joint=False), Unpaired([(0, 48)])])
def test_pairs_and_lone_norms_are_no_near_misses(module):
    assert MlaDualRMSNorm().near_misses(recognise(post_grad_graph(module, hidden()))) == []


class Attention(nn.Module):
    """GQA with QK-norm, over each head (Qwen3) or over all of them (OLMo 2); one projection or three."""

    def __init__(self, per_head: bool, fused: bool, heads: int = 4, kv_heads: int = 2, size: int = 16) -> None:
        super().__init__()
        self.per_head, self.fused, self.size = per_head, fused, size
        self.widths = [heads * size, kv_heads * size, kv_heads * size]
        outs = [sum(self.widths)] if fused else self.widths
        self.projections = nn.ModuleList(nn.Linear(HIDDEN, out, bias=False, dtype=DTYPE) for out in outs)
        self.q_norm = RMSNorm(size if per_head else self.widths[0], DTYPE)
        self.k_norm = RMSNorm(size if per_head else self.widths[1], DTYPE)

    def forward(self, x):
        if self.fused:
            q, k, v = self.projections[0](x).split(self.widths, dim=-1)
        else:
            q, k, v = (projection(x) for projection in self.projections)
        heads = (*x.shape[:-1], -1, self.size)
        if self.per_head:
            q, k = self.q_norm(q.view(heads)), self.k_norm(k.view(heads))
        else:
            q, k = self.q_norm(q).view(heads), self.k_norm(k).view(heads)
        return q.transpose(1, 2), k.transpose(1, 2), v.view(heads).transpose(1, 2)


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("fused", [False, True], ids=["three projections", "one projection"])
@pytest.mark.parametrize("per_head", [False, True], ids=["over all heads", "per head"])
def test_qk_norm_is_not_mla(per_head, fused, kv_heads):
    module = Attention(per_head, fused, kv_heads=kv_heads)
    graph = post_grad_graph(module, hidden())
    assert len(recognise(graph).rms_norms()) == 2
    assert MlaDualRMSNorm().match(recognise(graph)) == []
    assert MlaDualRMSNorm().near_misses(recognise(graph)) == []


class Layers(nn.Module):
    """Two layers' input and post-attention norms around a linear, and a final norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(RMSNorm(HIDDEN, DTYPE) for _ in range(5))
        self.linears = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN, bias=False, dtype=DTYPE) for _ in range(4))

    def forward(self, x):
        for norm, linear in zip(self.norms, self.linears, strict=False):
            x = x + linear(norm(x))
        return self.norms[-1](x)


class Parallel(nn.Module):
    """Two norms of the same rows, as of a layer whose attention and MLP run side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = RMSNorm(HIDDEN, DTYPE), RMSNorm(HIDDEN, DTYPE)

    def forward(self, x):
        return self.one(x), self.other(x)


class Thirds(nn.Module):
    """Three norms of three parts: which two would belong together?"""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(RMSNorm(16, DTYPE) for _ in range(3))

    def forward(self, x):
        first, second, _ = x.split([16, 16, 32], dim=-1)
        return [norm(part) for norm, part in zip(self.norms, (first, second, x[..., :16]), strict=True)]


@pytest.mark.parametrize("module", [Layers, Parallel, Thirds])
def test_other_norms_are_not_paired(module):
    graph = post_grad_graph(module(), hidden())
    assert len(recognise(graph).rms_norms()) >= 2
    assert MlaDualRMSNorm().match(recognise(graph)) == []
    assert MlaDualRMSNorm().near_misses(recognise(graph)) == []
