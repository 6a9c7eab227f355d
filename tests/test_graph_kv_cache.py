"""Writes to KV caches are found in every form, with where they go, and whether they may be made in place."""

from __future__ import annotations

import pytest
import torch
import vllm_standins
from models import post_grad_graph
from torch._inductor import config as inductor_config
from vllm_standins import layer_name

from autofuse.graph.recognise import recognise

B, H, P, D, T = 3, 2, 8, 16, 5
BLOCKS = 4
DTYPE = torch.bfloat16
CACHES = torch.ops._C_cache_ops


def found(function, *args, dynamic=False):
    """(blocks, reasons of near misses)"""
    result = recognise(post_grad_graph(function, *args, dynamic=dynamic))
    return result.cache_writes(), [miss.reason for miss in result.near_misses]


def static(*sizes, tokens=T):
    torch.manual_seed(0)
    rows = [tokens if size == P else size for size in sizes]
    return torch.randn(sizes, dtype=DTYPE), torch.arange(tokens), torch.randn(rows, dtype=DTYPE)


def paged(*sizes, dtype=DTYPE):
    torch.manual_seed(0)
    return torch.randn(sizes).to(dtype), torch.randperm(BLOCKS * P)[:T], torch.randn(T, *sizes[2:]).to(dtype)


def by_assignment(cache, positions, rows):
    cache[:, :, positions] = rows
    return cache.sum()


def by_index_copy(cache, positions, rows):
    cache.index_copy_(2, positions, rows)
    return cache.sum()


def functional(cache, positions, rows):
    new = cache.index_copy(2, positions, rows)
    cache.copy_(new)
    return new.sum()


@pytest.mark.parametrize("write", [by_assignment, by_index_copy, functional], ids=lambda f: f.__name__)
def test_a_static_cache(write):
    """[B, H, P, D], as transformers keeps it."""
    (block,), reasons = found(write, *static(B, H, P, D))
    assert not reasons
    assert block.not_in_place == ""
    assert block.root.op == "placeholder"
    # Seen as [blocks, rows, heads, columns].
    assert block.layout == ((B, P, H, D), (H * P * D, D, P * D, 1), 0)
    assert (block.tokens_at, block.heads_at, block.whole) == ((0, 2), 1, False)
    assert block.slots.per_block
    assert not block.slots.skips_negative
    assert [part.op for part in block.parts] == ["placeholder"]


def test_a_static_cache_with_its_heads_after_its_positions():
    def write(cache, positions, rows):
        cache[:, positions] = rows
        return cache.sum()

    (block,), _ = found(write, *static(B, P, H, D))
    assert block.layout[0] == (B, P, H, D)
    assert (block.tokens_at, block.heads_at, block.whole) == ((0, 1), 2, True)


def test_a_static_cache_of_latents():
    def write(cache, positions, rows):
        cache[:, positions] = rows
        return cache.sum()

    (block,), _ = found(write, *static(B, P, D))
    assert block.layout == ((B, P, 1, D), (P * D, D, 0, 1), 0)
    assert (block.tokens_at, block.heads_at) == ((0, 1), None)


def flat(cache, slots, rows):
    cache.view(-1, *rows.shape[1:])[slots] = rows
    return cache.sum()


def flat_index_put(cache, slots, rows):
    cache.view(-1, *rows.shape[1:]).index_put_((slots,), rows)
    return cache.sum()


def flat_index_copy(cache, slots, rows):
    cache.flatten(0, 1).index_copy_(0, slots, rows)
    return cache[0].sum()


@pytest.mark.parametrize("write", [flat, flat_index_put, flat_index_copy], ids=lambda f: f.__name__)
@pytest.mark.parametrize("sizes", [(BLOCKS, P, H, D), (BLOCKS, P, D)], ids=["heads", "latents"])
def test_a_paged_cache_written_through_a_view(write, sizes):
    (block,), reasons = found(write, *paged(*sizes))
    assert not reasons
    assert block.not_in_place == ""
    assert block.root.op == "placeholder"
    assert block.layout[0] == (BLOCKS, P, H if len(sizes) == 4 else 1, D)
    assert block.whole
    assert block.tokens_at == (0,)
    assert not block.slots.per_block
    assert block.slots.index.op == "placeholder"
    # What others read is the cache as a whole, not the view.
    assert tuple(block.output.meta["val"].shape) == sizes


def test_block_and_row_are_read_back_as_a_slot():
    def write(cache, slots, rows):
        cache[slots // P, slots % P] = rows
        return cache.sum()

    (block,), _ = found(write, *paged(BLOCKS, P, H, D))
    assert (block.slots.index.op, block.slots.blocks) == ("placeholder", None)
    assert (block.layout[0], block.whole) == ((BLOCKS, P, H, D), True)


def test_other_blocks_and_rows_stay_two():
    def write(cache, slots, rows):
        cache[slots // P, slots % (P - 1)] = rows
        return cache.sum()

    (block,), _ = found(write, *paged(BLOCKS, P, H, D))
    assert block.slots.blocks is not None


def test_two_caches_in_one_tensor():
    def write(caches, slots, rows):
        keys, values = caches.unbind(0)
        keys.view(-1, H, D)[slots] = rows
        values.view(-1, H, D)[slots] = rows + 1
        return keys.sum() + values.sum()

    caches = torch.randn(2, BLOCKS, P, H, D, dtype=DTYPE)
    (keys, values), reasons = found(write, caches, torch.arange(T), torch.randn(T, H, D, dtype=DTYPE))
    assert not reasons
    assert keys.root.op == "placeholder"
    assert values.root is keys.output
    assert (keys.not_in_place, values.not_in_place) == ("", "")
    assert (keys.layout[2], values.layout[2]) == (0, BLOCKS * P * H * D)


def test_what_is_put_together_for_the_write_is_known():
    def write(cache, slots, latent, key):
        cache.view(-1, D + 8)[slots] = torch.cat([latent, key], dim=-1)
        return cache.sum()

    cache, slots, _ = paged(BLOCKS, P, D + 8)
    (block,), _ = found(write, cache, slots, torch.randn(T, D, dtype=DTYPE), torch.randn(T, 8, dtype=DTYPE))
    assert [part.meta["val"].shape[-1] for part in block.joined] == [D, 8]


def test_dynamic_sizes():
    def write(cache, positions, rows):
        return by_assignment(cache, positions, rows[:, :, positions])

    cache, positions, _ = static(B, H, P, D)
    torch._dynamo.mark_dynamic(cache, 2)
    torch._dynamo.mark_dynamic(positions, 0)
    (block,), reasons = found(write, cache, positions, cache + 1, dynamic=None)
    assert not reasons
    assert isinstance(block.layout[0][1], torch.SymInt)


def test_a_cache_that_the_graph_makes_itself():
    """A StaticCache before its first use."""

    def write(positions, rows):
        cache = torch.zeros(B, H, P, D, dtype=DTYPE)
        cache[:, :, positions] = rows
        return cache

    _, positions, rows = static(B, H, P, D)
    (block,), _ = found(write, positions, rows)
    assert block.root.target is torch.ops.aten.full.default
    assert block.not_in_place == ""


# ---- vLLM's operators -----------------------------------------------------------------------------------------------


@pytest.fixture(params=[1, 2], ids=["v1", "v2"])
def _version(request):
    with inductor_config.patch(enable_auto_functionalized_v2=request.param == 2):
        yield


@pytest.mark.usefixtures("_version")
@pytest.mark.parametrize("order", ["NHD", "HND"])
def test_reshape_and_cache_flash(order):
    def write(key, value, keys, values, slots, scale):
        if order == "HND":
            keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        CACHES.reshape_and_cache_flash(key, value, keys, values, slots, "auto", scale, scale)
        return keys.sum() + values.sum()

    sizes = (BLOCKS, P, H, D) if order == "NHD" else (BLOCKS, H, P, D)
    caches = [torch.randn(sizes, dtype=DTYPE) for _ in range(2)]
    rows = [torch.randn(T, H, D, dtype=DTYPE) for _ in range(2)]
    blocks, reasons = found(write, *rows, *caches, torch.arange(T), torch.ones(1))
    if not blocks:  # version 1 has no word for a view
        assert order == "HND"
        return
    assert not reasons
    assert [block.layout[0] for block in blocks] == [(BLOCKS, P, H, D)] * 2
    assert blocks[0].call is blocks[1].call is not None
    assert all(block.slots.skips_negative and block.not_in_place == "" for block in blocks)
    assert [block.scale[0] for block in blocks] == ["auto"] * 2


@pytest.mark.usefixtures("_version")
def test_concat_and_cache_mla():
    def write(latent, key, cache, slots, scale):
        CACHES.concat_and_cache_mla(latent, key, cache, slots, "auto", scale)
        return cache.sum()

    cache = torch.randn(BLOCKS, P, D + 8, dtype=DTYPE)
    rows = torch.randn(T, D, dtype=DTYPE), torch.randn(T, 8, dtype=DTYPE)
    (block,), reasons = found(write, *rows, cache, torch.arange(T), torch.ones(1))
    assert not reasons
    assert block.layout[0] == (BLOCKS, P, 1, D + 8)
    assert (len(block.parts), block.heads_at, block.whole) == (2, None, True)


def test_a_latent_cache_that_is_no_tensor_of_the_graph_is_known_by_its_layer(monkeypatch):
    def write(latent, key, scale):
        return torch.ops.vllm.unified_mla_kv_cache_update(latent, key, layer_name("layers.0"), "auto", scale) + 1

    nothing = torch.empty(0)
    layer = vllm_standins.Layer(nothing, slot_mapping=None, w_uk=nothing, w_uv=nothing, scale=1.0)
    monkeypatch.setitem(vllm_standins.layers, "layers.0", layer)
    graph = post_grad_graph(write, torch.randn(T, D), torch.randn(T, 8), torch.ones(1))
    (update,) = recognise(graph).latent_updates()
    assert (update.layer_name, update.kv_cache_dtype) == ("layers.0", "auto")
    assert [node.op for node in (update.kv_c, update.k_pe, update.k_scale)] == ["placeholder"] * 3
    assert not recognise(graph).near_misses


def test_a_scale_that_is_left_out_is_a_near_miss():
    def write(latent, key, cache, slots, scale):
        CACHES.concat_and_cache_mla(latent, key, cache, slots, "fp8", scale, True)
        return cache.view(torch.uint8)

    cache = torch.zeros(BLOCKS, P, D + 8, dtype=torch.float8_e4m3fn)
    rows = torch.randn(T, D, dtype=DTYPE), torch.randn(T, 8, dtype=DTYPE)
    blocks, (reason,) = found(write, *rows, cache, torch.arange(T), torch.ones(1))
    assert not blocks
    assert "skip_scale" in reason


# ---- what is off ----------------------------------------------------------------------------------------------------


def test_an_input_that_keeps_its_contents_is_no_cache():
    assert found(lambda cache, p, rows: cache.index_copy(2, p, rows).sum(), *static(B, H, P, D)) == ([], [])


def test_sums_are_no_cache():
    def add(cache, positions, rows):
        cache.index_add_(2, positions, rows)
        return cache.sum()

    assert found(add, *static(B, H, P, D)) == ([], [])


def test_a_cache_that_ends_with_other_contents_is_not_written_in_place():
    def write(cache, positions, rows):
        new = cache.index_copy(2, positions, rows)
        cache.add_(1)
        return new.sum()

    (block,), _ = found(write, *static(B, H, P, D))
    assert "in the end" in block.not_in_place


def batch_and_position(cache, positions, rows):
    cache[torch.arange(B)[:, None], :, positions] = rows.transpose(1, 2)
    return cache.sum()


def int32_positions(cache, positions, rows):
    cache[:, :, positions.to(torch.int32)] = rows
    return cache.sum()


def one_row_for_all(cache, positions, rows):
    cache[:, :, positions] = rows[:1, :1]
    return cache.sum()


@pytest.mark.parametrize(
    ("write", "why"),
    [
        (batch_and_position, "writes at dimensions [0, 2]"),
        (int32_positions, "are no int64 tensors"),
        (one_row_for_all, "its rows"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_other_writes_to_an_input_are_near_misses(write, why):
    blocks, reasons = found(write, *static(B, H, P, D))
    assert not blocks
    assert any(why in reason for reason in reasons), reasons
