"""Random layers, as source text: attention up to its caches, norms and quantisations in shuffled dialects.

A layer is what ``draw_layer`` makes of a seed. Its text is all there is to it, so that a wrong one can be read, cut
down and pasted into a test. Layers are hostile: others read what a fusion would take away, caches are read and written
between, tensors are views of one another, sizes coincide, statements change places. What a layer computes is what
eager PyTorch says, whatever it is.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from layer_dialects import (
    ABSORBED,
    LIBRARY,
    NO_ABSORBED,
    NO_NORMS,
    NO_PRODUCTS,
    NO_QUANTS,
    NO_ROPES,
    NORMS,
    PRODUCTS,
    QUANTS,
    ROPES,
    TABLE_ROWS,
)

__all__ = ["Input", "Layer", "Output", "draw_layer"]

HIDDEN, Q_RANK, LATENT, ROPE, NOPE, VALUE = 64, 128, 64, 16, 32, 64
BLOCKS, BLOCK = 4, 8  # of paged caches
DTYPES = ("float32", "float32", "bfloat16", "float16")
TOKENS = (0, 1, 1, 2, 2, 3, 4, 5, 7, 16)  # some are also numbers of heads, or a head's size


# ---- a layer --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Input:
    """An argument of a layer: ``make`` is an expression over ``T``, ``DTYPE``, the inputs before it, and ``LIBRARY``.

    Attributes:
        dynamic: whether its first dimension is T.
        passed: False for what other inputs are only views of, and for what vLLM's operators find by a layer's name.
    """

    name: str
    make: str
    dynamic: bool = False
    passed: bool = True


@dataclass(frozen=True)
class Output:
    """A result.

    Attributes:
        kind: "tensor"; "fp8" for values that were rounded to FP8; "quant" for two expressions, values and scales of
            ``group`` columns each.
    """

    text: str
    kind: str = "tensor"
    group: int = 0


@dataclass(frozen=True)
class Layer:
    """A function of tensors. Its text runs, once ``LIBRARY`` is imported.

    Attributes:
        dtype: of activations and weights, a name in ``torch``.
        tokens: T; a layer of dynamic T is called with ``more_tokens`` next.
    """

    seed: int
    dtype: str
    tokens: int
    more_tokens: int | None
    inputs: tuple[Input, ...]
    lines: tuple[str, ...]
    outputs: tuple[Output, ...]

    def __str__(self) -> str:
        made = [f"# seed {self.seed}", f"T, DTYPE = {self.tokens}, torch.{self.dtype}"]
        made += [f"{each.name} = {each.make}" for each in self.inputs]
        if self.more_tokens is not None:
            dynamic = ", ".join(each.name for each in self.inputs if each.dynamic)
            made.append(f"# the first dimension is dynamic of {dynamic}; then T = {self.more_tokens}")
        return "\n".join([*made, "", self.source])

    @property
    def source(self) -> str:
        """Of the function ``layer``."""
        names = ", ".join(each.name for each in self.inputs if each.passed)
        results = "".join(f"{output.text}, " for output in self.outputs)
        body = "".join(f"    {line}\n" for line in (*self.lines, f"return ({results})"))
        return f"def layer({names}):\n{body}"

    def function(self) -> Any:
        scope: dict[str, Any] = dict(LIBRARY)
        exec(compile(self.source, f"<layer {self.seed}>", "exec"), scope)
        return scope["layer"]

    def arguments(self, tokens: int) -> dict[str, torch.Tensor]:
        """Fresh ones, always the same for the same number of tokens."""
        torch.manual_seed(self.seed)
        scope: dict[str, Any] = {**LIBRARY, "T": tokens, "DTYPE": getattr(torch, self.dtype)}
        for each in self.inputs:
            scope[each.name] = eval(each.make, scope)
        return {each.name: scope[each.name] for each in self.inputs if each.passed}

    def without(self, what: Output | str) -> Layer:
        if isinstance(what, Output):
            return replace(self, outputs=tuple(each for each in self.outputs if each is not what))
        return replace(self, lines=tuple(line for line in self.lines if line is not what))


# ---- drawing --------------------------------------------------------------------------------------------------------


def draw_layer(seed: int) -> Layer:
    """The layer of that seed."""
    return _Drawing(seed).layer()


@dataclass
class _Drawing:
    """A layer on its way.

    Attributes:
        hostility: 0 for a layer as a model has it, up to 1.
        twins: whether the first and the last token are the same, and written to one slot: which comes last is not
            defined.
        kinds: (name, kind) of what others may read or change: "rows", "cache", "fp8", "indices", "weight", "table".
    """

    seed: int
    inputs: list[Input] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    kinds: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.hostility = self.pick(0.0, 0.4, 1.0, 1.0)
        self.dtype = self.pick(*DTYPES)
        self.tokens = self.pick(*TOKENS)
        self.twins = self.random.random() < 0.15
        self.more = self.pick(3, 6, 9) if self.tokens > 1 and self.random.random() < 0.25 else None
        self._count = 0

    def layer(self) -> Layer:
        x = self.given("x", f"rows(T, {HIDDEN}, dtype=DTYPE)", "rows", dynamic=True)
        for number in range(self.pick(1, 1, 2)):
            if number:
                x = self.let("x", f"{x} + 1")
            self.pick(self.mla, self.mla, self.gqa, self.gqa, self.batched, self.quantised, self.attention_output)(x)
        if self.odd(0.5):
            self.shuffle()
        for _ in range(self.pick(0, 1, 1, 2, 3)):
            if self.odd(1.0):
                self.twist()
        return Layer(
            self.seed,
            self.dtype,
            self.tokens,
            self.more,
            tuple(self.inputs),
            tuple(self.lines),
            tuple(dict.fromkeys(self.outputs)),
        )

    # ---- words ------------------------------------------------------------------------------------------------------

    def pick(self, *options: Any) -> Any:
        return self.random.choice(options)

    def odd(self, chance: float = 0.08) -> bool:
        return self.random.random() < chance * self.hostility

    def new(self, stem: str) -> str:
        self._count += 1
        return f"{stem}{self._count}"

    def given(self, stem: str, make: str, kind: str, dynamic: bool = False, passed: bool = True) -> str:
        """A new input; now and then one that is there already."""
        if dynamic and self.twins:
            make = f"twins({make})"
        known = [each.name for each in self.inputs if each.make == make and each.passed]
        if known and self.pick(True, False):
            return str(self.pick(*known))
        name = self.new(stem)
        self.inputs.append(Input(name, make, dynamic and self.more is not None, passed))
        if passed:
            self.kinds.append((name, kind))
        return name

    def let(self, stem: str, value: str, kind: str = "rows") -> str:
        name = self.new(stem)
        self.lines.append(f"{name} = {value}")
        self.kinds.append((name, kind))
        return name

    def weight(self, *sizes: Any) -> str:
        return self.given("w", f"rows({', '.join(map(str, sizes))}, dtype=DTYPE, scale={sizes[-2]}**-0.5)", "weight")

    def give(self, text: str) -> None:
        """Returns it, or something made of it."""
        if dict(self.kinds).get(text) == "fp8":
            self.outputs.append(Output(f"{text}.float()", "fp8"))
        else:
            self.outputs.append(Output(self.pick(text, f"{text} * 2", text)))

    def positions(self) -> str:
        return self.given("positions", f"torch.randint({TABLE_ROWS}, (T,))", "indices", dynamic=True)

    def table(self, size: int) -> str:
        dtype = self.pick("DTYPE", "DTYPE", "torch.float32")
        return self.given("table", f"table_of({size}, {dtype})", "table")

    def slots(self, negative: bool = False) -> str:
        make = f"torch.randperm({BLOCKS * BLOCK})[:T]"
        if negative and self.pick(True, False):
            make += ".where(torch.rand(T) < 0.6, -1)"
        elif self.odd(0.3):
            make += f" - {BLOCKS * BLOCK}"  # counted from the end
        return self.given("slots", make, "indices", dynamic=True)

    # ---- pieces -----------------------------------------------------------------------------------------------------

    def norm(self, x: str, width: int, dialect: Any = None, eps: float | None = None) -> str:
        weight = self.given("g", f"1 + rows({width}, dtype=DTYPE, scale=0.5)", "weight")
        dialect = self.pick(*NO_NORMS) if self.odd(0.1) else dialect or self.pick(*NORMS)
        eps = self.pick(1e-6, 0.5) if eps is None or self.odd() else eps
        if self.odd(0.1):
            x = self.let("r", f"{x} + {self.let('s', f'{x}.flip(0)')}")
        return self.let("n", f"{dialect.__name__}({x}, {weight}, {eps})")

    def quant(self, x: str, wide: bool = True) -> None:
        group = self.pick(64, 128) if wide else 64
        if self.pick(True, True, False):
            dialect = self.pick(*NO_QUANTS) if self.odd(0.15) else self.pick(*QUANTS)
            name = self.new("f")
            self.lines.append(f"{name}, {name}_scales = {dialect.__name__}({x}, {group})")
            self.outputs.append(Output(f"{name}, {name}_scales", "quant", group))
        else:
            scale = self.given("scale", "torch.full((1,), 0.01)", "table")
            self.outputs.append(
                Output(self.let("f", f"{self.pick('static_quant', 'static_quant_by_operator')}({x}, {scale})"))
            )
        if self.odd(0.2):
            self.outputs.append(Output(self.outputs[-1].text.split(",")[0] + ".float()", "fp8"))

    def split(self, x: str, *widths: int) -> list[str]:
        """Columns of one product, or of several."""
        names = [self.new("p") for _ in widths]
        form = self.pick("split", "split", "slices", "products")
        if form == "products":
            for name, width in zip(names, widths, strict=True):
                self.lines.append(f"{name} = {x} @ {self.weight(HIDDEN, width)}")
        else:
            whole = self.let("h", f"{x} @ {self.weight(HIDDEN, sum(widths))}")
            if self.odd(0.1):
                whole = self.let("h", f"{whole} * 2")
            if form == "split":
                self.lines.append(f"{', '.join(names)} = {whole}.split({list(widths)}, dim=-1)")
            else:
                ends = [sum(widths[: part + 1]) for part in range(len(widths))]
                for name, width, end in zip(names, widths, ends, strict=True):
                    self.lines.append(f"{name} = {whole}[..., {end - width}:{end}]")
        self.kinds += [(name, "rows") for name in names]
        return names

    def mla(self, x: str) -> None:
        """Multi-head latent attention up to its cache."""
        heads, dialect, eps = self.pick(1, 2, 4), self.pick(*NORMS), self.pick(1e-6, 0.5)
        q_c, kv_c, k_pe = self.split(x, Q_RANK, LATENT, ROPE)
        if self.pick(True, True, False):
            q_c = self.norm(q_c, Q_RANK, dialect, eps)
            kv_c = self.norm(kv_c, LATENT, dialect, eps)
            if self.pick(True, False, False):
                self.quant(q_c)
                q_c = self.let("h", f"{x} @ {self.weight(HIDDEN, Q_RANK)}") if self.pick(True, False) else q_c
        q = self.let("q", f"({q_c} @ {self.weight(Q_RANK, heads * (NOPE + ROPE))}).view(-1, {heads}, {NOPE + ROPE})")
        k_pe = self.let("k", f"{k_pe}.unsqueeze(1)")
        table, positions = self.table(ROPE), self.positions()
        others = self.positions() if self.odd() else positions
        rope = self.pick(*NO_ROPES) if self.odd() else self.pick(*ROPES)
        k_rope = self.pick(*ROPES) if self.odd() else rope
        form = self.pick("operator", "cat", "in place", "apart")
        if form == "operator":
            args = f"{positions}, {q}[..., {NOPE}:], {k_pe}, {ROPE}, {table}, {self.pick(True, False)}"
            self.lines.append(f"torch.ops._C.rotary_embedding({args})")
        elif form == "in place":
            self.lines.append(f"{q}[..., {NOPE}:] = {rope.__name__}({q}[..., {NOPE}:], {table}, {positions})")
        else:
            pe = self.let("q", f"{rope.__name__}({q}[..., {NOPE}:], {table}, {positions})")
            if form == "cat":
                q = self.let("q", f"torch.cat([{q}[..., :{NOPE}], {pe}], dim=-1)")
        if form != "operator":
            k_pe = self.let("k", f"{k_rope.__name__}({k_pe}, {table}, {others})")
        if form != "apart" and self.pick(True, False, False):
            self.latent_attention(q, kv_c, k_pe, heads)
            return
        write = [lambda: self.write_latent(kv_c, k_pe)] if self.pick(True, True, True, False) else []
        if not write:
            self.give(k_pe)
            self.give(kv_c)
        steps = [*write, lambda: self.query(q, pe if form == "apart" else "", heads)]
        for step in self.random.sample(steps, len(steps)):
            step()

    def latent_attention(self, q: str, kv_c: str, k_pe: str, heads: int) -> None:
        """vLLM's MLA attention, which finds its cache by the layer's name."""
        out = self.let("o", f"torch.empty({q}.shape[0], {heads * VALUE}, dtype={q}.dtype)", "own")
        name, done = self.latent_update(kv_c, k_pe, heads)
        call = f"unified_mla_attention_with_output({q}, {kv_c}, {k_pe}, {out}, {name!r}, kv_cache_dummy_dep={done})"
        self.lines.append(f"torch.ops.vllm.{call}")
        self.given_attention(out, heads * VALUE)

    def latent_update(self, kv_c: str, k_pe: str, heads: int) -> tuple[str, str]:
        """vLLM's write to the cache of a new layer: (its name, what attention waits for)"""
        name, cache = self.new("mla"), f"rows({BLOCKS}, {BLOCK}, {LATENT + ROPE}, dtype=DTYPE)"
        make = f"latent_layer({name!r}, {cache}, {self.layer_slots()}, {heads}, {NOPE}, {LATENT}, {VALUE})"
        self.inputs.append(Input(name, make, passed=False))
        scale, done = self.given("scale", "torch.ones(1)", "table"), self.new("done")
        update = f"unified_mla_kv_cache_update({kv_c}, {k_pe}, {name!r}, 'auto', {scale})"
        self.lines.append(f"{done} = torch.ops.vllm.{update}")
        return name, done

    def head_attention(self, q: str, k: str, v: str, heads: int, kv: int, size: int) -> None:
        """vLLM's attention over heads, which finds its caches by the layer's name."""
        name, pairs = self.new("gqa"), self.pick(None, None, 0, 1)
        sizes = {None: (BLOCKS, kv, BLOCK, 2 * size), 0: (2, BLOCKS, BLOCK, kv, size), 1: (BLOCKS, 2, BLOCK, kv, size)}
        dtype = self.pick("auto", "auto", "fp8")
        cache = f"rows({', '.join(map(str, sizes[pairs]))}, dtype={'DTYPE' if dtype == 'auto' else 'E4M3'})"
        scale = "torch.ones(())" if dtype == "auto" else self.pick("torch.full((), 0.05)", f"torch.full(({kv},), 0.05)")
        make = f"head_layer({name!r}, {cache}, {self.layer_slots()}, {pairs}, {dtype!r}, {scale})"
        self.inputs.append(Input(name, make, passed=False))
        done = self.new("done")
        self.lines.append(f"{done} = torch.ops.vllm.unified_kv_cache_update({k}, {v}, {name!r})")
        if dtype == "fp8" or self.pick(True, False):
            self.outputs.append(Output(done))
            self.give(q)
            return
        out = self.let("o", f"torch.empty({q}.shape[0], {heads}, {size}, dtype={q}.dtype)", "own")
        args = f"{q}, {k}, {v}, {out}, {name!r}, kv_cache_dummy_dep={done}"
        self.lines.append(f"torch.ops.vllm.unified_attention_with_output({args})")
        self.given_attention(f"{out}.view(-1, {heads * size})", heads * size)

    def layer_slots(self) -> str:
        """As a runner of vLLM gives them: none while it profiles, or as many as there are tokens that count."""
        slots = f"torch.randperm({BLOCKS * BLOCK})[:T]"
        slots = f"twins({slots})" if self.twins else slots
        return str(self.pick(slots, slots, f"{slots}.where(torch.rand(T) < 0.6, -1)", "None"))

    def given_attention(self, out: str, width: int) -> None:
        if width % 64 == 0 and self.pick(True, False):
            self.quant(out, wide=width % 128 == 0)
        else:
            self.outputs.append(Output(out))

    def query(self, q: str, pe: str, heads: int) -> None:
        nope = f"{q}[..., :{NOPE}]"
        if self.pick(True, True, False):
            product = self.pick(*NO_ABSORBED) if self.odd() else self.pick(*ABSORBED)
            nope = self.let("q", product.format(rows=nope, weight=self.w_uk(heads)))
        elif not pe:
            self.give(q)
            return
        parts = [nope, pe or f"{q}[..., {NOPE}:]"]
        parts = parts[::-1] if self.odd() else parts
        self.give(self.let("q", f"torch.cat([{', '.join(parts)}], dim=-1)"))

    def w_uk(self, heads: int) -> str:
        """As a parameter, a part of kv_b_proj, or computed."""
        own, kv_b = (heads, NOPE, LATENT), (heads * (NOPE + VALUE), LATENT)
        part = f"{{}}.T.view({LATENT}, {heads}, -1)[..., :{NOPE}].permute(1, 2, 0)"
        turned = (heads, LATENT, NOPE), "{}.transpose(1, 2)"
        sizes, text = turned if self.odd(0.1) else self.pick((own, "{}"), (own, "({} * 0.5)"), (kv_b, part))
        return text.format(self.weight(*sizes))

    def write_latent(self, kv_c: str, k_pe: str) -> None:
        width = LATENT + ROPE
        kind = self.pick("operator", "flat", "flat", "block", "block", "apart", "by name")
        if kind == "by name":
            self.outputs.append(Output(self.latent_update(kv_c, k_pe, heads=1)[1]))
            return
        dtype = self.pick("DTYPE", "DTYPE", "E4M3") if kind == "operator" else "DTYPE"
        if self.odd(0.04):
            dtype = "torch.float16"
        slots = self.slots(negative=kind == "operator")
        if kind == "apart":
            for part, size in self.random.sample([(kv_c, LATENT), (f"{k_pe}.squeeze(1)", ROPE)], 2):
                cache = self.cache(BLOCKS, BLOCK, size, dtype="DTYPE")
                self.lines.append(f"{cache}.view(-1, {size})[{slots}] = {part}")
            return
        cache = self.cache(BLOCKS, BLOCK, width, dtype=dtype)
        rows = f"torch.cat([{kv_c}, {k_pe}.squeeze(1)], dim=-1)"
        if self.odd():
            rows = f"torch.cat([{k_pe}.squeeze(1), {kv_c}], dim=-1)"
        if kind == "operator":
            name, scale = ("fp8", "torch.full((1,), 0.05)") if dtype == "E4M3" else ("auto", "torch.ones(1)")
            scale = self.given("scale", scale, "table")
            args = f"{kv_c}, {k_pe}.squeeze(1), {cache}, {slots}, {name!r}, {scale}"
            self.lines.append(f"torch.ops._C_cache_ops.concat_and_cache_mla({args})")
        else:
            self.lines.append(_assigned(cache, slots, rows, (width,), kind))
        if self.pick(True, False):
            self.give(cache)

    def cache(self, *sizes: int, dtype: str = "DTYPE") -> str:
        """A new cache: an input, a part of one, or one that others write to as well."""
        make, kind = f"rows({', '.join(map(str, sizes))}, dtype={dtype})", "fp8" if dtype == "E4M3" else "cache"
        if self.odd(0.1):
            pool = self.given("pool", make.replace("rows(", "rows(2, "), kind)
            return self.let("cache", f"{pool}[{self.pick(0, 1)}]", kind)
        if self.odd(0.05):
            pool = self.given("pool", make.replace("rows(", "rows(2, "), kind, passed=False)
            return self.given("cache", f"{pool}[{self.pick(0, 1)}]", kind)
        return self.given("cache", make, kind)

    def gqa(self, x: str) -> None:
        """Grouped-query attention up to its caches."""
        heads, kv, size = (*self.pick((4, 2), (4, 1), (2, 2), (2, 1)), self.pick(16, 16, 32))
        q, k, v = self.split(x, heads * size, kv * size, kv * size)
        table_size = size if self.pick(True, True, False) else size // 2
        table, positions = self.table(table_size), self.positions()
        others = self.positions() if self.odd() else positions
        form = self.pick("dialect", "dialect", "dialect", "operator")
        if form == "operator":
            args = f"{positions}, {q}, {k}, {size}, {table}, {self.pick(True, False)}"
            self.lines.append(f"torch.ops._C.rotary_embedding({args})")
        q, k, v = (self.let(n[0], f"{n}.reshape(-1, {h}, {size})") for n, h in ((q, heads), (k, kv), (v, kv)))
        if form == "dialect":
            if self.pick(True, False, False):
                dialect, eps = self.pick(*NORMS), self.pick(1e-6, 0.5)
                q, k = (self.norm(each, size, dialect, eps) for each in (q, k))
            rope = self.pick(*NO_ROPES) if self.odd() else self.pick(*ROPES)
            k_rope = self.pick(*ROPES) if self.odd() else rope
            if table_size == size:
                calls = rope.__name__, k_rope.__name__
            else:
                part = self.pick("first_columns", "first_columns", "last_columns_in_place")
                calls = f"{part}({rope.__name__})", f"{part}({k_rope.__name__})"
            q = self.let("q", f"{calls[0]}({q}, {table}, {positions})")
            k = self.let("k", f"{calls[1]}({k}, {table}, {others})")
        if self.pick(True, False, False):
            self.head_attention(q, k, v, heads, kv, size)
            return
        for step in self.random.sample([lambda: self.give(q), lambda: self.write_pair(k, v, kv, size)], 2):
            step()

    def write_pair(self, k: str, v: str, kv: int, size: int) -> None:
        kind = self.pick("operator", "flat", "flat", "block", "copy", "heads first", "none")
        if kind == "none":
            self.give(k)
            return
        if self.odd(0.05):
            k = self.let("k", self.pick(f"{k} * 2", f"{k}.flip(1)", f"{k}.clone()", f"{k}.flip(0)"))
        slots = self.slots(negative=kind == "operator")
        dtype = self.pick("DTYPE", "DTYPE", "E4M3") if kind == "operator" else "DTYPE"
        sizes = (BLOCKS, kv, BLOCK, size) if kind == "heads first" else (BLOCKS, BLOCK, kv, size)
        caches = [self.cache(*sizes, dtype=dtype) for _ in range(2)]
        if kind == "operator":
            name, scale = ("fp8", "torch.full((1,), 0.05)") if dtype == "E4M3" else ("auto", "torch.ones(1)")
            scale = self.given("scale", scale, "table")
            args = f"{k}, {v}, {caches[0]}, {caches[1]}, {slots}, {name!r}, {scale}, {scale}"
            self.lines.append(f"torch.ops._C_cache_ops.reshape_and_cache_flash({args})")
        else:
            for cache, part in self.random.sample([*zip(caches, (k, v), strict=True)], 2):
                where = self.slots() if self.odd() else slots
                self.lines.append(_assigned(cache, where, part, (kv, size), kind))
        for cache in caches:
            if self.pick(True, False):
                self.give(cache)

    def batched(self, x: str) -> None:
        """Hugging Face's attention: a batch, heads before tokens, a static cache or none."""
        heads, kv, size = (*self.pick((4, 2), (4, 1), (2, 2)), 16)
        batch = 1 if self.more is not None or self.tokens % 2 else self.pick(1, 2)
        cos, sin = (
            self.given(
                name, f"table_of({size}, DTYPE)[torch.randint({TABLE_ROWS}, (T,))].view({batch}, -1, {size})", "table"
            )
            for name in ("cos", "sin")
        )
        if self.more is not None:
            self.more = None
            self.inputs = [replace(each, dynamic=False) for each in self.inputs]
        halves = f"[..., :{size // 2}].repeat(1, 1, 2)"
        cos, sin = (self.let(each[:3], f"{each}{halves}", "table") for each in (cos, sin))
        q, k, v = self.split(x, heads * size, kv * size, kv * size)
        q, k, v = (
            self.let(n[0], f"{n}.reshape({batch}, -1, {h}, {size}).transpose(1, 2)")
            for n, h in ((q, heads), (k, kv), (v, kv))
        )
        q, k = (self.let(n[0], f"rope_heads_first({n}, {cos}, {sin})") for n in (q, k))
        length = self.tokens // batch + 3
        positions = self.given("at", f"torch.randperm({length})[: T // {batch}]", "indices")
        for cache, rows in zip([self.cache(batch, kv, length, size) for _ in range(2)], (k, v), strict=True):
            where = (
                f"[:, :, {positions}] = {rows}" if self.pick(True, False) else f".index_copy_(2, {positions}, {rows})"
            )
            self.lines.append(f"{cache}{where}")
            self.give(cache)
        self.give(q)

    def quantised(self, x: str) -> None:
        """Norms and quantisations alone."""
        kind = self.pick("input", "product", "norm", "norm", "two")
        if kind == "input":
            rows = self.given("y", f"rows(T, {Q_RANK}, dtype=DTYPE)", "rows", dynamic=True)
        else:
            rows = self.let("h", f"{x} @ {self.weight(HIDDEN, Q_RANK)}")
        if kind in ("norm", "two"):
            rows = self.norm(rows, Q_RANK)
        wide = True
        if self.odd(0.15):
            wide = self.pick(True, False)
            others = f"{rows}.flip(0)", f"{rows} * 2", f"{rows}.t().reshape(-1, {Q_RANK})"
            rows = self.let("h", self.pick(*others) if wide else f"{rows}[:, 64:]")
        for _ in range(2 if kind == "two" else 1):
            self.quant(rows, wide)

    def attention_output(self, x: str) -> None:
        """A product per head, quantised."""
        heads, value = self.pick(1, 2, 4), self.pick(64, 128)
        rows = self.let("o", f"({x} @ {self.weight(HIDDEN, heads * LATENT)}).view(-1, {heads}, {LATENT})")
        weight = self.weight(heads, LATENT, value)
        if self.odd(0.1):
            weight = f"{self.weight(heads, value, LATENT)}.transpose(1, 2)"
        product = self.pick(*NO_PRODUCTS) if self.odd() else self.pick(*PRODUCTS)
        values = self.let("o", product.format(rows=rows, weight=weight))
        if self.odd(0.1):
            values = self.let("o", f"{values}[:, {value}:]" if heads > 1 else f"{values} + 1")
        self.quant(values, wide=value == 128)

    # ---- twists -----------------------------------------------------------------------------------------------------

    def shuffle(self) -> None:
        """Lets lines change places with those that they take no name from."""
        for _ in range(2 * len(self.lines)):
            at = self.random.randrange(max(len(self.lines) - 1, 1))
            if at + 1 < len(self.lines) and not _names(self.lines[at].split(" = ")[0]) & _names(self.lines[at + 1]):
                self.lines[at : at + 2] = self.lines[at : at + 2][::-1]

    def twist(self) -> None:
        """Reads, changes or returns something, anywhere."""
        name, kind = self.pick(*(each for each in self.kinds if each[1] != "own"))
        made = [at for at, line in enumerate(self.lines) if name in _names(line.split(" = ")[0]) and " = " in line]
        at = self.random.randint(made[0] + 1 if made else 0, len(self.lines))
        if kind == "indices":
            change = f"{name}.copy_({name}.flip(0))"
        elif kind in ("weight", "table"):
            change = self.pick(f"{name}.mul_(0.5)", f"{name}[:1] = 0.25")
        else:
            change = self.pick(f"{name}.mul_(0.5)", f"{name}.zero_()", f"{name}[..., ::2] += 1")
            if not self.twins:
                change = self.pick(change, f"{name}[:1] = 0.25")
        if kind == "fp8":
            change = f"{name}.zero_()"
        match self.pick("read", "read", "return", "change", "change", "again"):
            case "read":
                reader = self.new("out")
                self.lines.insert(at, f"{reader} = {name}.float() * 2")
                self.outputs.append(Output(reader, kind if kind == "fp8" else "tensor"))
            case "return":
                self.outputs.append(Output(name))
            case "change":
                self.lines.insert(at, change)
            case "again":
                # What finds its cache by a name is ordered by what reads its result, and a second one is by nothing.
                written = re.compile(r"cache\d+\S*\] = |_cache\w*\(|index_copy_")
                writes = [line for line in self.lines if written.search(line) and "vllm.unified" not in line]
                if writes:
                    line = self.pick(*writes)
                    self.lines.insert(self.random.randint(self.lines.index(line) + 1, len(self.lines)), line)


def _assigned(cache: str, slots: str, rows: str, sizes: tuple[int, ...], kind: str) -> str:
    """Writes rows into a paged cache."""
    flat = f"{cache}.view(-1, {', '.join(map(str, sizes))})"
    return {
        "flat": f"{flat}[{slots}] = {rows}",
        "copy": f"{flat}.index_copy_(0, {slots} % {BLOCKS * BLOCK}, {rows})",
        "block": f"{cache}[{slots} // {BLOCK}, {slots} % {BLOCK}] = {rows}",
        "heads first": f"{cache}.transpose(1, 2)[{slots} // {BLOCK}, {slots} % {BLOCK}] = {rows}",
    }[kind]


def _names(text: str) -> set[str]:
    return set(re.findall(r"\b[a-z]+_*\d+(?:_scales)?\b", text))
