"""The values that new nodes carry are those that PyTorch's own fake tensor mode computes, and those alone."""

from __future__ import annotations

import contextlib

import pytest
import sympy
import torch
import vllm_standins  # noqa: F401 (registers vLLM's operators)
from models import MlaLatents, decoder, isolate, static_cache, without_code_generation
from rope_dialects import vllm_neox
from rope_layers import LATENT, ROPE, Gqa, Mla, by_head, flat, mla_flat, paged, rotate_in_place
from test_graph_fuse_norm_quant import FORMAT_NAMES, FORMATS, NormedLinear, QuantisedLatents
from torch import nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import _disable_current_modes

from autofuse.graph.fakes import compute, layout_view, on_fakes
from autofuse.graph.recognise.nodes import expression
from autofuse.graph.report_store import last_reports
from autofuse.graph.rewrite import Replacement
from mla_layer import SMALL, mla_layer, random_inputs, random_weights

aten = torch.ops.aten
FUSE = {"autofuse.level": "O3", "autofuse.untuned": "fuse"}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _isolated(monkeypatch, tmp_path, tmp_path_factory):
    isolate(monkeypatch, tmp_path, tmp_path_factory.getbasetemp() / "cache")


def facts(value, inputs=()):
    """All of a fake value that Inductor may ask for, and which of ``inputs`` it shares memory with."""
    if isinstance(value, (list, tuple)):
        return [facts(each, inputs) for each in value]
    if not isinstance(value, torch.Tensor):
        return str(value)
    storage = value.untyped_storage()
    shared = [place for place, each in enumerate(inputs) if each.untyped_storage()._cdata == storage._cdata]
    return {
        "type": type(value),
        "dtype": value.dtype,
        "device": value.device,
        "sizes": str(list(value.shape)),
        "strides": str(value.stride()),
        "offset": str(value.storage_offset()),
        "bytes": sympy.expand(expression(storage.nbytes())),
        "keys": str(torch._C._dispatch_keys(value)),
        "view": value._is_view(),
        "requires_grad": value.requires_grad,
        "shared": shared,
    }


@pytest.fixture
def checked(monkeypatch):
    """The targets of all new nodes, each of which has the value that PyTorch's mode computes for it."""
    targets = []
    call = Replacement.call

    def call_and_check(this, target, *args, **kwargs):
        node = call(this, target, *args, **kwargs)
        inputs = [each for arg in node.all_input_nodes for each in tensors_of(arg.meta["val"])]
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda arg: arg.meta["val"])
        mode = detect_fake_mode()
        with _disable_current_modes(), mode, mode.shape_env.suppress_guards():
            expected = target(*args, **kwargs)
        targets.append(target)
        faults.extend([node.format_node()] if facts(node.meta["val"], inputs) != facts(expected, inputs) else [])
        return node

    faults = []
    monkeypatch.setattr(Replacement, "call", call_and_check)
    yield targets
    assert not faults


def tensors_of(value):
    values = value if isinstance(value, (list, tuple)) else [value]
    return [each for each in values if isinstance(each, torch.Tensor)]


def mla():
    generator = torch.Generator().manual_seed(0)
    weights = random_weights(SMALL, torch.bfloat16, CPU, generator)
    inputs = random_inputs(SMALL, 5, 50, torch.bfloat16, CPU, generator)

    def layer(hidden, positions, slots, cache):
        changed = inputs._replace(hidden=hidden, positions=positions, slot_mapping=slots, kv_cache=cache)
        return mla_layer(SMALL, weights, changed, core=False)

    return layer, (inputs.hidden, inputs.positions, inputs.slot_mapping), (inputs.kv_cache,)


def rows(model, *others):
    """A layer of ``rope_layers`` on six tokens."""
    *caches, slots = others
    arguments = (torch.randn(6, 64, dtype=torch.bfloat16), torch.arange(6))
    return (lambda x, positions, slots, *caches: model(x, positions, *caches, slots)), (*arguments, slots), caches


def mla_rows():
    slots = torch.randperm(32)[:6]
    return rows(
        Mla(rotate_in_place(vllm_neox), mla_flat), torch.randn(4, 8, LATENT + ROPE, dtype=torch.bfloat16), slots
    )


def latents():
    return MlaLatents(joint=False), (torch.randn(6, 64, dtype=torch.bfloat16),), ()


def quantised(make, quantise):
    return make(quantise), (torch.randn(6, 64, dtype=torch.bfloat16),), ()


LAYERS = {
    "latents": latents,
    "MLA layer": mla,
    "MLA, in place": mla_rows,
    "GQA": lambda: rows(Gqa(write=flat), *paged(6)),
    "GQA, HND": lambda: rows(Gqa(write=by_head), *paged(6, order="HND")),
    "GQA, no cache": lambda: (Gqa(), (torch.randn(6, 64, dtype=torch.bfloat16), torch.arange(6)), ()),
    **{
        f"{make.__name__}, {name}": (lambda make=make, quantise=quantise: quantised(make, quantise))
        for make, formats in ((NormedLinear, FORMATS), (QuantisedLatents, FORMATS[:3]))
        for name, (quantise, _) in zip(FORMAT_NAMES, formats, strict=False)
    },
}


@pytest.mark.parametrize("dynamic", [False, None], ids=["static", "mark_dynamic"])
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_new_nodes_carry_what_pytorch_computes(make, dynamic, checked):
    function, per_token, others = make()
    if dynamic is None:
        for each in per_token:
            torch._dynamo.mark_dynamic(each, 0)
    with without_code_generation(), torch.no_grad():
        torch.compile(function, backend="autofuse", options=FUSE, dynamic=dynamic)(*per_token, *others)
    assert last_reports()[-1].fused > 0, last_reports()[-1]
    assert len(checked) > 1


@pytest.mark.parametrize("context", [torch.inference_mode, contextlib.nullcontext], ids=["inference_mode", "grad"])
def test_whatever_the_model_is_compiled_under(context, checked):
    function, per_token, others = mla()
    with without_code_generation(), context():
        torch.compile(function, backend="autofuse", options=FUSE)(*per_token, *others)
    assert last_reports()[-1].fused == 3
    assert aten.reshape.default in checked


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic=True"])
def test_a_model_with_a_static_cache(dynamic, checked):
    model = decoder("llama", layers=1)
    tokens = torch.randint(0, 64, (1, 4))
    with without_code_generation(), torch.no_grad():
        torch.compile(model, backend="autofuse", options=FUSE, dynamic=dynamic)(
            tokens, past_key_values=static_cache(model)
        )
    assert last_reports()[-1].fused > 0, last_reports()[-1]
    assert checked


CALLS = [
    lambda x: aten.slice.Tensor(x, 1, 4, 20),
    lambda x: aten.slice.Tensor(x, 1, -20, -4, 2),
    lambda x: aten.select.int(x, 0, 1),
    lambda x: aten.reshape.default(x, [-1, 8, 4]),
    lambda x: aten.reshape.default(aten.slice.Tensor(x, 1, 0, 20), [-1]),
    lambda x: aten.permute.default(x, [1, 0]),
    lambda x: aten.reshape.default(aten.permute.default(x, [1, 0]), [-1]),
    lambda x: aten.expand.default(aten.unsqueeze.default(x, 1), [6, 3, 32]),
    lambda x: aten.as_strided.default(x, [2, 3], [1, 7], 5),
    lambda x: aten.clone.default(aten.permute.default(x, [1, 0])),
    lambda x: aten.clone.default(aten.permute.default(x, [1, 0]), memory_format=torch.contiguous_format),
    lambda x: x[:, 0].transpose(0, 0),
    lambda x: x.view(torch.int16),
    lambda x: torch.cat([x, x]),
    lambda x: aten.split.Tensor(x, 8, 1),
    lambda x: nn.functional.pad(x, (1, 1)),
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("symbolic", [False, True], ids=["static", "symbolic"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_any_operator_may_be_asked(call, symbolic, context):
    mode = FakeTensorMode(shape_env=ShapeEnv())
    real = torch.empty(6, 32, dtype=torch.bfloat16)
    if symbolic:
        torch._dynamo.mark_dynamic(real, 0)
    with context():
        x = mode.from_tensor(real, static_shapes=None if symbolic else True)
        with mode, mode.shape_env.suppress_guards():
            expected = call(x)
        with on_fakes(mode):
            found = call(x)
    assert facts(found, [x]) == facts(expected, [x])


def test_what_cannot_be_computed_raises_as_ever():
    mode = FakeTensorMode(shape_env=ShapeEnv())
    x = mode.from_tensor(torch.empty(6, 32)[:, :20])
    with on_fakes(mode), pytest.raises((RuntimeError, ValueError)):
        x.view(-1)
    with on_fakes(mode), pytest.raises(RuntimeError):
        torch.ops.autofuse.mla_dual_rms_norm.default(x, x, x)


def test_symbols_get_no_guards():
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    real = torch.empty(6, 32)
    torch._dynamo.mark_dynamic(real, 0)
    x = mode.from_tensor(real)
    before = len(env.guards)
    with on_fakes(mode):
        assert x.view(-1, 8).shape[1] == 8
        assert bool(x.shape[0] == 6)
    assert len(env.guards) == before


def test_outside_nothing_is_fake():
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with on_fakes(mode), on_fakes(mode):
        pass
    assert type(torch.ones(2) + 1) is torch.Tensor
    with on_fakes(None):
        assert type(torch.ones(2) + 1) is torch.Tensor


VIEWS = [
    lambda x: x.view(-1, 8, 4),
    lambda x: x.view(-1, 32).narrow(1, 8, 16),
    lambda x: x.select(0, 1),
    lambda x: x.transpose(0, 1),
    lambda x: x.as_strided([2, 3], [1, 7], 5),
    lambda x: x.unbind(0)[2],
]


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("symbolic", [False, True], ids=["static", "symbolic"])
def test_layouts_are_those_of_fake_tensors(view, symbolic):
    mode = FakeTensorMode(shape_env=ShapeEnv())
    real = torch.empty(6, 32, dtype=torch.bfloat16)
    if symbolic:
        torch._dynamo.mark_dynamic(real, 0)
    x = mode.from_tensor(real, static_shapes=None if symbolic else True)
    with mode, mode.shape_env.suppress_guards():
        expected = facts(view(x))
    guards = len(mode.shape_env.guards)
    with on_fakes(mode):
        found = facts(layout_view(x, view))
        again = facts(layout_view(layout_view(x, view), lambda value: value.unsqueeze(0)))
    for what in ("dtype", "sizes", "strides", "offset"):
        assert found[what] == expected[what]
    assert again["offset"] == expected["offset"]
    assert len(mode.shape_env.guards) == guards


def test_layers_that_differ_get_results_of_their_own():
    """What a fused op makes is remembered by all that it depends on."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    norms = torch.ops.autofuse.mla_dual_rms_norm.default

    def made(tokens, width, dtype, cast):
        q, weight = (mode.from_tensor(torch.empty(size, dtype=dtype)) for size in ((tokens, width), (width,)))
        return compute(mode, norms, (q, weight, q, weight, 1e-6, 1e-6, cast, ""), {})

    cases = [
        (tokens, width, dtype, cast)
        for tokens in (4, 5)
        for width in (64, 128)
        for dtype in (torch.bfloat16, torch.float16)
        for cast in (True, False)
    ]
    with on_fakes(mode):
        for case in (*cases, *cases):
            results = made(*case)
            assert [(tuple(each.shape), each.dtype) for each in results] == [(case[:2], case[2])] * 2
            assert results[0].untyped_storage()._cdata != results[1].untyped_storage()._cdata
