"""Finds quantisations by vLLM's operators."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from autofuse.errors import BadInput
from autofuse.graph.blocks import QuantBlock
from autofuse.graph.recognise.custom_ops import CustomCall
from autofuse.graph.recognise.nodes import concrete, dtype_of, is_call, shape, tensor
from autofuse.graph.recognise.quant_blocks import E4M3, SMALLEST_AMAX, OffError, elements, quant_block, scale_layout
from autofuse.ops.quant import E4M3_MAX, NVFP4, STATIC, QuantFormat

__all__ = ["match_operator"]

aten = torch.ops.aten
_BY_OP = "as its operator rounds"

_NO_SUCH_FORMAT: Mapping[str, str] = {
    "_C::dynamic_scaled_fp8_quant": "one scale for all rows, found from them",
    "_C::dynamic_per_token_scaled_fp8_quant": "a scale for each row",
    "_C::per_token_group_fp8_quant_packed": "scales of one byte, packed",
    "_C::per_token_group_quant_int8": "int8 values",
}


def match_operator(call: CustomCall) -> QuantBlock | None:
    """The quantisation that an operator is; None if it is another operator. Raises OffError."""
    if call.name in _NO_SUCH_FORMAT:
        raise OffError(f"{call.name} has {_NO_SUCH_FORMAT[call.name]}")
    match = _OPS.get(call.name)
    return None if match is None else match(call)


def _group_op(call: CustomCall) -> QuantBlock:
    args = call.args
    for name, wanted in (("eps", SMALLEST_AMAX), ("fp8_min", -E4M3_MAX), ("fp8_max", E4M3_MAX)):
        if not math.isclose(args[name], wanted, rel_tol=1e-6):
            raise OffError(f"its {name} is {args[name]:g}, not {wanted:g}")
    values, scales = _result(call, "output_q"), call.written["output_s"]
    assert scales is not None
    node = scales.value()
    if node is None and scales.item is not None:
        raise OffError(f"its scales are not read as the operator wrote them, from {scales.item}")
    scheme = QuantFormat(args["group_size"], args["scale_ue8m0"])
    return _op_block(call, args["input"], values, scheme, scales=node)


def _ir_group_op(call: CustomCall) -> QuantBlock:
    args, results = call.args, call.results()
    group = args["group_shape"]
    if len(group) != 2 or group[0] != 1:
        raise OffError(f"its groups are {group}, not of one row")
    if 0 not in results:
        raise OffError("nobody reads its values")
    scheme = QuantFormat(group[1], args["use_ue8m0"])
    return _op_block(call, args["x"], results[0], scheme, scales=results.get(1))


def _static_op(call: CustomCall) -> QuantBlock:
    if call.args["group_shape"] not in (None, [-1, -1]):
        raise OffError(f"its groups are {call.args['group_shape']}, not the whole tensor")
    values, scale = _result(call, "result"), call.args["scale"]
    return _op_block(call, call.args["input"], values, QuantFormat(STATIC), scale=scale)


def _ir_static_op(call: CustomCall) -> QuantBlock:
    if call.args["num_token_padding"] is not None:
        raise OffError("it pads its rows")
    return _op_block(call, call.args["x"], call.node, QuantFormat(STATIC), scale=call.args["scale"])


def _nvfp4_op(call: CustomCall) -> QuantBlock:
    if not call.args["is_sf_swizzled_layout"]:
        raise OffError("its scales are not swizzled")
    if call.written:
        values: Node | None = _result(call, "output")
        raw: Node | None = _result(call, "output_scale", optional=True)
    else:
        values, raw = (call.results().get(index) for index in range(2))
    if values is None:
        raise OffError("nobody reads its values")
    users = [] if raw is None else list(raw.users)
    bytes_read = [user for user in users if is_call(user, aten.view.dtype) and user.args[1] == E4M3]
    if len(users) > 1 or len(bytes_read) != len(users):
        raise OffError(f"its scales {raw} are not read as {E4M3}")
    scales = bytes_read[0] if bytes_read else None
    return _op_block(
        call, call.args["input"], values, QuantFormat(NVFP4), scales=scales, scale=call.args["input_scale"]
    )


_OPS: Mapping[str, Callable[[CustomCall], QuantBlock]] = {
    "_C::per_token_group_fp8_quant": _group_op,
    "_C::scaled_fp4_quant": _nvfp4_op,
    "_C::scaled_fp4_quant.out": _nvfp4_op,
    "_C::static_scaled_fp8_quant": _static_op,
    "vllm_ir::dynamic_group_quant_fp8": _ir_group_op,
    "vllm_ir::static_quant_fp8": _ir_static_op,
}


def _result(call: CustomCall, name: str, optional: bool = False) -> Node | None:
    """The whole buffer that was written as argument ``name``."""
    written = call.written[name]
    node = None if written is None else written.item
    if node is None and not optional:
        raise OffError(f"nobody reads its {name}")
    if written is not None and written.layout is not None:
        raise OffError(f"its {name} is a part of the buffer {written.before}")
    return node


def _op_block(
    call: CustomCall,
    rows: Any,
    values: Node | None,
    scheme: QuantFormat,
    *,
    scales: Node | None = None,
    scale: Node | None = None,
) -> QuantBlock:
    """Checks what all operators have in common."""
    assert values is not None
    width = concrete(shape(rows)[-1]) if shape(rows) else None
    if width is None:
        raise OffError(f"the width of its rows {rows} is not known while compiling")
    wanted = torch.uint8 if scheme.group == NVFP4 else E4M3
    if dtype_of(values) != wanted:
        raise OffError(f"its values are {dtype_of(values)}, not {wanted}")
    if scales is not None and scheme.group not in (NVFP4, STATIC):
        layout = scale_layout(scales)
        if layout is None or dtype_of(scales) != torch.float32:
            value = tensor(scales)
            strides = None if value is None else list(value.stride())
            raise OffError(
                f"its scales, {dtype_of(scales)} {list(shape(scales))} with strides {strides}, are in no layout known"
            )
        scheme = replace(scheme, layout=layout)
    try:
        QuantFormat.checked("quantisation", width, scheme.group, scheme.ue8m0, scheme.layout)
    except BadInput as error:
        raise OffError(str(error).removeprefix("quantisation: ")) from None
    if scale is not None and (concrete(elements(scale)) != 1 or dtype_of(scale) != torch.float32):
        raise OffError(f"its scale {scale} is {dtype_of(scale)} {list(shape(scale))}, not one float32 value")
    own = {*call.own_nodes(), values, *([] if scales is None else [scales])}
    return quant_block(values, own, (), rows, width, scheme, scales=scales, scale=scale, rounding=(_BY_OP,))
