"""Bindings as data: which calls they accept, what they allocate, how many blocks they launch."""

from __future__ import annotations

import pytest
import torch

from autofuse.ops import LaunchShape
from autofuse.ops.binding import ROWS, Binding, Result, TensorArg

CPU = torch.device("cpu")


def test_tokens_of_a_result_can_be_rounded_up() -> None:
    result = Result(torch.uint8, (None, 4), round_tokens=128)
    assert [list(result.allocate(tokens, CPU).shape) for tokens in (0, 1, 128, 129)] == [
        [0, 4],
        [128, 4],
        [128, 4],
        [256, 4],
    ]


@pytest.mark.parametrize(("tokens", "multiple", "stride"), [(5, 1, 5), (5, 4, 8), (8, 4, 8), (0, 4, 4), (0, 1, 1)])
def test_a_column_major_result_has_neighbouring_tokens_side_by_side(tokens: int, multiple: int, stride: int) -> None:
    scales = Result(torch.float32, (None, 3), column_major=multiple).allocate(tokens, CPU)
    assert scales.shape == (tokens, 3)
    assert scales.stride() == (1, stride)


def test_a_grid_can_be_repeated_for_each_head() -> None:
    shape = LaunchShape(units_per_block=16, repeat=8)
    assert [shape.blocks(tokens) for tokens in (0, 1, 16, 17)] == [0, 8, 8, 16]


def test_a_grid_can_have_blocks_of_two_kinds() -> None:
    shape = LaunchShape(units_per_block=16, repeat=8, more_per_token=3, more_per_block=32)
    assert [shape.blocks(tokens) for tokens in (0, 1, 16, 17)] == [0, 8 + 1, 8 + 2, 16 + 2]


def test_buffers_may_have_more_rows_than_there_are_tokens() -> None:
    binding = Binding(
        tensors=(TensorArg(0, torch.int64, (None,)), TensorArg(1, torch.float32, (ROWS, 2))),
        constants=(),
        fields=(),
        params_format="",
        results=(),
    )
    positions = torch.zeros(3, dtype=torch.int64)
    assert [binding.accepts((positions, torch.zeros(rows, 2))) for rows in (2, 3, 9)] == [False, True, True]
    assert binding.tokens((positions, torch.zeros(9, 2))) == 3
