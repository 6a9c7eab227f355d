"""RoPE is found in every dialect, and only there."""

from __future__ import annotations

import pytest
import torch
import vllm_standins  # noqa: F401  (registers vLLM's operators)
from models import post_grad_graph
from rope_dialects import (
    GPTJ,
    NEOX,
    complex_numbers,
    first_columns,
    hugging_face,
    last_columns_in_place,
    vllm_gptj,
    vllm_neox,
)
from torch._inductor import config as inductor_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph
from torch.fx.node import map_arg

from autofuse.graph.blocks import RopeBlock
from autofuse.graph.recognise import recognise

T, H, D, P = 5, 4, 16, 32
OP = torch.ops._C.rotary_embedding
ADD, MM = torch.ops.aten.add.Tensor, torch.ops.aten.mm.default


def tensors(dtype=torch.bfloat16, table_dtype=None, size=D):
    torch.manual_seed(0)
    return torch.randn(T, H, D, dtype=dtype), torch.randn(P, size).to(table_dtype or dtype), torch.arange(T)


def found(function, *args, dynamic=False):
    """(blocks, reasons of near misses)"""
    result = recognise(post_grad_graph(function, *args, dynamic=dynamic))
    return result.ropes(), [miss.reason for miss in result.near_misses if miss.block == "RoPE"]


def style(block):
    return block.is_neox, block.reordered, block.rotary_first, block.rotary_dim, block.width


def name(value):
    return getattr(value, "__name__", "")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dialect", [*NEOX, *GPTJ], ids=name)
def test_every_dialect_gives_the_same_block(dialect, dtype):
    (block,), reasons = found(dialect, *tensors(dtype))
    assert not reasons
    assert style(block) == (dialect in NEOX, False, 0, D, D)
    assert block.dtype == dtype
    assert (block.input.node.op, block.input.first, block.input.heads) == ("placeholder", 0, 0)
    assert block.frame == (T, H)
    assert block.angles.sizes == (T, 1)
    assert [user.op for user in block.output.users] == ["output"]


@pytest.mark.parametrize("table_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dialect", [d for d in (*NEOX, *GPTJ) if d is not complex_numbers], ids=name)
def test_the_table_and_the_positions_are_found_behind_lookups_and_casts(dialect, table_dtype):
    (block,), _ = found(dialect, *tensors(table_dtype=table_dtype))
    table, positions = block.angles.table, block.angles.positions
    assert (table.op, positions.op) == ("placeholder", "placeholder")
    assert tuple(table.meta["val"].shape) == (P, D)


def test_of_complex_numbers_the_angles_are_those_numbers():
    (block,), _ = found(complex_numbers, *tensors())
    assert block.angles.table is None
    assert block.angles.cos == block.angles.sin
    assert block.angles.cos[0].meta["val"].dtype == torch.complex64


def test_cosines_without_a_table_are_found_by_their_columns():
    def rope(x, frequencies):
        angles = torch.outer(torch.arange(T).float(), frequencies)
        cos, sin = (f(torch.cat((angles, angles), dim=-1)).to(x.dtype).unsqueeze(1) for f in (torch.cos, torch.sin))
        return x * cos + torch.cat((-x[..., D // 2 :], x[..., : D // 2]), dim=-1) * sin

    (block,), _ = found(rope, tensors()[0], torch.randn(D // 2))
    assert block.angles.table is None
    for node, first, step in (block.angles.cos, block.angles.sin):
        assert (first, step) == (0, 1)
        assert node.meta["val"].dtype == torch.bfloat16


@pytest.mark.parametrize("dialect", [vllm_neox, hugging_face, vllm_gptj, complex_numbers], ids=name)
def test_partial_rotary_is_one_block_with_what_it_passes_on(dialect):
    (block,), reasons = found(first_columns(dialect), *tensors(size=8))
    assert not reasons
    assert style(block) == (dialect in NEOX, False, 0, 8, D)
    assert block.input.node.op == "placeholder"


@pytest.mark.parametrize("dialect", [vllm_neox, hugging_face, vllm_gptj, complex_numbers], ids=name)
def test_a_slice_that_is_written_back_is_one_block_with_its_rows(dialect):
    (block,), reasons = found(last_columns_in_place(dialect), *tensors(size=8))
    assert not reasons
    assert style(block) == (dialect in NEOX, False, 8, 8, D)
    assert block.input.node.target is torch.ops.aten.mul.Tensor


def test_neighbours_that_become_halves_are_told_apart():
    """Hugging Face's DeepSeek-V3."""

    def rope(x, table, positions):
        cos, sin = (part.unsqueeze(1) for part in table[positions].chunk(2, dim=-1))
        a, b = x[..., ::2], x[..., 1::2]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    (block,), _ = found(rope, *tensors())
    assert style(block) == (False, True, 0, D, D)


@pytest.mark.parametrize("dialect", [vllm_neox, hugging_face, vllm_gptj], ids=name)
def test_dynamic_tokens(dialect):
    x, table, positions = tensors()
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.mark_dynamic(positions, 0)
    (block,), reasons = found(dialect, x, table, positions, dynamic=None)
    assert not reasons
    assert isinstance(block.frame[0], torch.SymInt)
    assert block.angles.table is not None


def test_query_and_key_have_the_same_angles_and_other_positions_others():
    def rope(q, k, table, positions, others):
        return vllm_neox(q, table, positions), hugging_face(k, table, positions), vllm_neox(q, table, others)

    x, table, positions = tensors()
    blocks, _ = found(rope, x, x + 1, table, positions, positions + 1)
    a, b, c = (block.angles.identity for block in blocks)
    assert a == b != c


# ---- vLLM's operator ------------------------------------------------------------------------------------------------


@pytest.fixture(params=[1, 2], ids=["v1", "v2"])
def version(request):
    """Both ways in which PyTorch makes an operator that writes functional."""
    with inductor_config.patch(enable_auto_functionalized_v2=request.param == 2):
        yield request.param


def gqa(heads=4, kv_heads=2, size=16, is_neox=True):
    """Query and key as slices of one projection, rotated in place, as vLLM's models have it."""

    def layer(x, weight, table, positions):
        q, k, v = (x @ weight).split([heads * size, kv_heads * size, kv_heads * size], dim=-1)
        OP(positions, q, k, size, table, is_neox)
        return q.view(-1, heads, size) + 1, k.view(-1, kv_heads, size) + 1, v + 1

    x, weight = torch.randn(T, 64), torch.randn(64, (heads + 2 * kv_heads) * size)
    return layer, (x.bfloat16(), weight.bfloat16(), torch.randn(P, size).bfloat16(), torch.arange(T))


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("is_neox", [True, False], ids=["NeoX", "GPT-J"])
def test_rows_rotated_in_place_are_followed_to_their_readers(version, is_neox, kv_heads):
    layer, args = gqa(is_neox=is_neox, kv_heads=kv_heads)
    blocks, reasons = found(layer, *args)
    assert not reasons
    by_name = {block.call[1]: block for block in blocks}
    for which, heads in (("query", 4), ("key", kv_heads)):
        block = by_name[which]
        assert style(block) == (is_neox, False, 0, D, D)
        assert block.frame == (T, heads)
        assert block.heads_at == 1
        assert block.input.heads == heads
        (read,) = block.reads
        assert [user.target for user in read.node.users] in ([ADD], [torch.ops.aten.reshape.default])
    # The value is read from the same buffer after it was rotated; it is to be had from before.
    ((node, where),) = [each for block in blocks for each in block.spared]
    assert where.node.target is MM
    assert where.first == (4 + kv_heads) * 16
    assert [user.target for user in node.users] == [ADD]


def test_heads_of_their_own_dimension(version):
    def layer(q, k, table, positions):
        q, k = q * 1, k * 1
        OP(positions, q, k, D, table, True)
        return q * 1, k * 1

    x, table, positions = tensors()
    blocks, reasons = found(layer, x, x[:, :1], table, positions)
    assert not reasons
    assert [(block.frame, block.heads_at, block.input.heads) for block in blocks] == [((T, H), 1, 0), ((T, 1), 1, 0)]


def test_a_partial_rotation_by_the_operator(version):
    layer, args = gqa()
    blocks, _ = found(layer, args[0], args[1], args[2][:, :8].contiguous(), args[3])
    assert [style(block) for block in blocks] == [(True, False, 0, 8, D)] * 2


@pytest.mark.parametrize("whole", [True, False], ids=["query read whole", "query read in parts"])
def test_mla_rotates_a_slice_of_the_query_in_place(version, whole):
    def layer(x, w_q, w_kv, table, positions):
        q = (x @ w_q).view(-1, H, 40)
        kv_c, k_pe = (x @ w_kv).split([32, 16], dim=-1)
        k_pe = k_pe.unsqueeze(1)
        OP(positions, q[..., 24:], k_pe, 16, table, False)
        return kv_c + 1, k_pe + 1, *([q + 1] if whole else [q[..., :24] + 1, q[..., 24:] + 1])

    x, weights = torch.randn(T, 64), [torch.randn(64, H * 40), torch.randn(64, 48)]
    args = [tensor.bfloat16() for tensor in (x, *weights, torch.randn(P, 16))]
    blocks, reasons = found(layer, *args, torch.arange(T))
    assert not reasons
    by_name = {block.call[1]: block for block in blocks}
    assert style(by_name["query"]) == (False, False, *((24, 16, 40) if whole else (0, 16, 16)))
    assert style(by_name["key"]) == (False, False, 0, 16, 16)
    spared = [node.meta["val"].shape[-1] for block in blocks for node, _ in block.spared]
    assert sorted(spared) == ([32] if whole else [24, 32])


def test_the_operator_rotating_backwards_is_a_near_miss(version):
    def layer(q, table, positions):
        q = q * 1
        OP(positions, q, None, D, table, True, inverse=True)
        return q * 1

    blocks, (reason,) = found(layer, *tensors())
    assert not blocks
    assert "rotates backwards" in reason


def test_the_operator_may_rotate_the_last_columns(version):
    def layer(q, table, positions):
        q = q * 1
        OP(positions, q, None, D, table, True, rope_dim_offset=8)
        return q * 1

    (block,), _ = found(layer, *tensors(size=8))
    assert style(block) == (True, False, 8, 8, D)


def test_a_buffer_that_is_read_with_rotated_and_other_rows_is_a_near_miss(version):
    def layer(x, weight, table, positions):
        qkv = x @ weight
        q, k, _ = qkv.split([64, 32, 32], dim=-1)
        OP(positions, q, k, D, table, True)
        return qkv + 1

    _, args = gqa()
    blocks, (reason,) = found(layer, *args)
    assert not blocks
    assert "a buffer with rotated rows and others, is read by add" in reason


# ---- what is no RoPE ------------------------------------------------------------------------------------------------


def _angles(table, positions):
    return (part.unsqueeze(1) for part in table[positions].chunk(2, dim=-1))


def backwards(x, table, positions):
    cos, sin = _angles(table, positions)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


def both_minus(x, table, positions):
    cos, sin = _angles(table, positions)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos - a * sin), dim=-1)


def unlike_halves(x, table, positions):
    """A cosine for each element, of which nobody knows that they are alike in pairs."""
    cos, sin = table[positions].unsqueeze(1), table[positions + 1].unsqueeze(1)
    return x * cos + torch.cat((-x[..., D // 2 :], x[..., : D // 2]), dim=-1) * sin


def wider(x, table, positions):
    cos, sin = (part.float() for part in _angles(table, positions))
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def product_leaves(x, table, positions):
    cos, sin = _angles(table, positions)
    a, b = x.chunk(2, dim=-1)
    product = a * cos
    return torch.cat((product - b * sin, b * cos + a * sin), dim=-1), product


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (backwards, "it rotates backwards"),
        (both_minus, "signs of its products make no rotation"),
        (unlike_halves, "have the same cosine is not known"),
        (wider, "is torch.float32, its input"),
        (product_leaves, "is also an output of the graph"),
    ],
    ids=name,
)
def test_what_differs_is_a_near_miss_with_its_reason(function, why):
    blocks, reasons = found(function, *tensors())
    assert not blocks
    assert any(why in reason for reason in reasons), reasons


def test_a_negated_sine_is_not_taken_for_the_tables():
    def rope(x, table, positions):
        cos, sin = table[positions].chunk(2, dim=-1)
        cos, sin = cos.unsqueeze(1), (-sin).unsqueeze(1)
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    (block,), _ = found(rope, *tensors())
    assert block.angles.table is None


def test_a_scaled_cosine_is_not_taken_for_the_tables():
    def rope(x, table, positions):
        cos, sin = (part * 0.5 for part in _angles(table, positions))
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    (block,), _ = found(rope, *tensors())
    assert block.angles.table is None


def test_sines_before_cosines_are_no_table():
    def rope(x, table, positions):
        sin, cos = _angles(table, positions)
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    (block,), _ = found(rope, *tensors())
    assert block.angles.table is None


@pytest.mark.parametrize(
    "function",
    [
        lambda x, table, positions: torch.cat((x, x * 2), dim=-1),
        lambda x, table, positions: torch.cat((-x[..., 8:], x[..., :8]), dim=-1),
        lambda x, table, positions: torch.nn.functional.silu(x[..., :8]) * x[..., 8:],
        lambda x, table, positions: torch.cat((x[..., :8] * x[..., 8:], x[..., 8:] + x[..., :8]), dim=-1),
        lambda x, table, positions: torch.stack((x, x + 1), dim=-1).flatten(-2),
    ],
    ids=["cat", "rotate_half alone", "SwiGLU", "products", "stack"],
)
def test_what_does_not_look_like_it_is_passed_over_in_silence(function):
    assert found(function, *tensors()) == ([], [])


def test_a_long_chain_of_views_is_no_hindrance():
    graph, mode = Graph(), FakeTensorMode()

    def call(target, *args):
        node = graph.call_function(target, args)
        with mode:
            node.meta["val"] = target(*map_arg(args, lambda arg: arg.meta["val"]))
        return node

    node = graph.placeholder("rows")
    with mode:
        node.meta["val"] = torch.empty(5, 64)
    for _ in range(1000):
        node = call(torch.ops.aten.neg.default, node)
    graph.output((call(torch.ops.aten.cat.default, [node, node], -1),))
    assert recognise(graph).of_kind(RopeBlock) == []
