# SPDX-License-Identifier: Apache-2.0
"""Attention cases: what is fed to a LayerCache call by call, what must come out, and how far off it may be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

import oracle
from oracle import FULL
from razor_attention import LayerCache, reference

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# The one table of tolerances. |out - exact| <= ROUNDING * |exact| + ARITHMETIC * max|v|.
#   ROUNDING    half an ulp of the result's dtype, 2^-p for p bits of precision: no result can be closer.
#   ARITHMETIC  inputs are exact and everything is computed in float32. A logit is off by about 2^-24 * |logit| * a few
#               (order of summation), a mean of n dropped tokens by 2^-24 * sqrt(n), an exp by 2 ulp; a weight is off by
#               twice what its logit is. The worst of 3000 random cases was 2^-24 * 14, with |logit| up to 50.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
ARITHMETIC = {torch.float32: 2.0**-24 * 64, torch.bfloat16: 2.0**-24 * 64, torch.float16: 2.0**-24 * 64}
SMALLEST = {torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 2.0**-25}  # half the spacing of subnormals


def assert_close(
    actual: Tensor, expected: np.ndarray, magnitude: float, arithmetic: float | None = None, roundings: int = 1
) -> None:
    """actual against expected (float64), both averages of values not larger than `magnitude`."""
    assert tuple(actual.shape) == expected.shape
    if actual.numel() == 0:
        return
    dtype, error = actual.dtype, np.abs(to_numpy(actual) - expected)
    arithmetic = ARITHMETIC[dtype] if arithmetic is None else arithmetic
    allowed = roundings * (ROUNDING[dtype] * np.abs(expected) + arithmetic * magnitude + SMALLEST[dtype])
    worst = np.unravel_index(np.argmax(np.where(np.isnan(error), np.inf, error - allowed)), error.shape)
    assert error[worst] <= allowed[worst], (
        f"{worst}: {expected[worst]}, got {float(actual[worst])}, allowed {allowed[worst]}"
    )


def assert_agree(a: Tensor, b: Tensor, magnitude: float) -> None:
    """Two results of the package with one meaning: each has its own rounding."""
    assert a.dtype == b.dtype
    assert_close(a, to_numpy(b), magnitude, roundings=2)


def to_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.double().numpy()


@dataclass(frozen=True)
class Call:
    q_len: int
    pad: tuple[int, ...] | None = None  # per sequence
    dense: bool = False


@dataclass(frozen=True)
class Tokens:
    """One call's tensors, [batch, heads, q_len, head_dim]; padding is NaN, because nobody may read it."""

    query: Tensor
    key: Tensor
    value: Tensor
    pad: Tensor | None
    dense: bool


@dataclass(frozen=True)
class Case:
    name: str
    policy: tuple[tuple[int, int, bool], ...]  # (sink, window, compensate) of each kv head
    calls: tuple[Call, ...]
    batch: int = 1
    group: int = 1
    head_dim: int = 64
    dtype: str = "float32"
    page_size: int = 64
    alibi: bool = False
    scale: float | None = None
    layout: str = "contiguous"  # | transposed: [batch, q_len, heads, head_dim] in memory | fused: slices of one qkv
    seed: int = 0
    outlier: float = 1.0  # factor on every 17th key: one heavy logit

    @property
    def num_heads(self) -> int:
        return self.group * len(self.policy)

    @property
    def slopes(self) -> Tensor | None:
        return 0.5 ** torch.linspace(1, 8, self.num_heads) if self.alibi else None

    @property
    def scaled_by(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @cached_property
    def tokens(self) -> list[Tokens]:
        draw, calls, stored = np.random.default_rng(self.seed), [], np.zeros(self.batch, int)
        for call in self.calls:
            pad = np.array(call.pad if call.pad else [0] * self.batch)
            heads = (self.num_heads, len(self.policy), len(self.policy))
            shapes = [(self.batch, n, call.q_len, self.head_dim) for n in heads]
            q, k, v = (torch.from_numpy(draw.standard_normal(shape)) for shape in shapes)
            if self.outlier != 1.0:
                position = torch.from_numpy(stored - pad)[:, None] + torch.arange(call.q_len)
                k = torch.where((position % 17 == 3)[:, None, :, None], k * self.outlier, k)
            padding = torch.arange(call.q_len) < torch.from_numpy(pad)[:, None]
            qkv = [t.to(getattr(torch, self.dtype)).masked_fill(padding[:, None, :, None], math.nan) for t in (q, k, v)]
            stored += call.q_len - pad
            calls.append(Tokens(*lay_out(qkv, self.layout), torch.from_numpy(pad) if call.pad else None, call.dense))
        return calls

    def cache(self, page_size: int | None = None, device: str = "cpu") -> LayerCache:
        sink, window, compensate = zip(*self.policy, strict=True)
        return LayerCache(
            sink,
            window,
            compensate,
            batch_size=self.batch,
            head_dim=self.head_dim,
            dtype=DTYPES[self.dtype],
            device=device,
            page_size=self.page_size if page_size is None else page_size,
            alibi_slopes=self.slopes,
        )

    def run(self, cache: LayerCache | None = None) -> list[Tensor]:
        cache = self.cache() if cache is None else cache
        return [cache.attend(t.query, t.key, t.value, scale=self.scale, pad=t.pad, dense=t.dense) for t in self.tokens]

    def history(self, name: str, b: int) -> np.ndarray:
        """query, key or value of one sequence over all calls, padding left out: [heads, tokens, head_dim] float64."""
        parts = [getattr(t, name)[b, :, 0 if t.pad is None else int(t.pad[b]) :] for t in self.tokens]
        return to_numpy(torch.cat(parts, dim=1))

    def expected(self) -> list[np.ndarray]:
        """What the oracle says, per call: [batch, num_heads, q_len, head_dim], zeros for padding."""
        out = [np.zeros(t.query.shape) for t in self.tokens]
        for b in range(self.batch):
            counts = [t.query.shape[2] - (0 if t.pad is None else int(t.pad[b])) for t in self.tokens]
            starts = np.cumsum([0, *counts[:-1]])
            whole = oracle.attention(
                *(self.history(name, b) for name in ("query", "key", "value")),
                self.policy,
                scale=self.scaled_by,
                slopes=None if self.slopes is None else to_numpy(self.slopes),
                dense_start=np.repeat([s if t.dense else -1 for s, t in zip(starts, self.tokens, strict=True)], counts),
            )
            for result, start, count in zip(out, starts, counts, strict=True):
                result[b, :, result.shape[2] - count :] = whole[:, start : start + count]
        return out

    def magnitude(self) -> float:
        """Largest |v|."""
        values = [t.value.double().nan_to_num().abs() for t in self.tokens if t.value.numel()]
        return max((float(v.max()) for v in values), default=0.0)


def lay_out(tensors: Sequence[Tensor], layout: str) -> list[Tensor]:
    """The same [batch, heads, q_len, head_dim] numbers with other strides."""
    if layout == "transposed":
        return [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    if layout == "fused":  # [batch, q_len, all heads, head_dim + 3]
        heads = [t.shape[1] for t in tensors]
        padded = torch.nn.functional.pad(torch.cat(list(tensors), dim=1), (1, 2), value=math.nan)
        return list(padded.transpose(1, 2).contiguous().transpose(1, 2)[..., 1:-2].split(heads, dim=1))
    return [t.contiguous() for t in tensors]


def wide(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The same cache or tokens with every floating-point tensor in float64."""
    return tuple(t.double() if t.is_floating_point() else t for t in tensors)


def reference_attend(case: Case, cache: LayerCache, t: Tokens) -> Tensor:
    """reference.attention on the cache's own tensors, in float64."""
    return reference.attention(
        *wide((t.query, t.key, t.value, *cache._tensors())),
        alibi_slopes=cache.alibi_slopes,
        pad=t.pad,
        scale=case.scaled_by,
        dense=t.dense,
        **{name: wide([x])[0] if isinstance(x, Tensor) else x for name, x in cache._exact_rows(t.key).items()},
    )


def build_cache(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    policy: Sequence[tuple[int, int, bool]],
    page_size: int,
    *,
    room: int = 0,
    spare_pages: int = 3,
    seed: int = 0,
) -> tuple[Tensor, ...]:
    """The nine cache tensors, made by hand from whole histories: per sequence [num_kv_heads, tokens, head_dim].

    Page ids are shuffled; every row that holds no token is NaN, every page id that is not needed INT32_MAX. `room`:
    tokens for which pages are there beyond the stored ones.
    """
    heads, dtype, head_dim = len(policy), keys[0].dtype, keys[0].shape[2]
    held = [oracle.cache_rows(k.shape[1], s, w) for k in keys for s, w, _ in policy]
    ample = [len(oracle.cache_rows(k.shape[1] + room, s, w)) for k in keys for s, w, _ in policy]
    counts = [-(-rows // page_size) for rows in ample]
    ids = iter(np.random.default_rng(seed).permutation(sum(counts) + spare_pages).tolist())
    pages = torch.full((2, sum(counts) + spare_pages, page_size, head_dim), math.nan, dtype=dtype)
    page_table = torch.full((len(held), max(counts, default=0) + 1), 2**31 - 1, dtype=torch.int32)
    sums = torch.zeros(2, len(held), head_dim, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for row, (rows, count) in enumerate(zip(held, counts, strict=True)):
        b, h = divmod(row, heads)
        page_table[row, :count] = torch.tensor([next(ids) for _ in range(count)], dtype=torch.int32)
        for side, history in enumerate((keys, values)):
            for cache_row, token in rows.items():
                page = int(page_table[row, cache_row // page_size])
                pages[side, page, cache_row % page_size] = history[b][h, token]
            if policy[h][2]:
                sums[side, row] = torch.from_numpy(oracle.dropped_sum(to_numpy(history[b][h]), *policy[h][:2]))
    sink, window, compensate = zip(*policy, strict=True)
    return (
        *pages.unbind(),
        page_table,
        torch.tensor([k.shape[1] for k in keys]),
        torch.tensor(sink, dtype=torch.int32),
        torch.tensor(window, dtype=torch.int32),
        torch.tensor(compensate),
        *sums.unbind(),
    )


def before_last_call(case: Case) -> tuple[tuple[Tensor, ...], Case]:
    """A cache made by hand of all calls but the last, with room for it; and the case, its earlier calls unpadded."""
    case = replace(case, calls=(*(Call(c.q_len) for c in case.calls[:-1]), case.calls[-1]))
    *past, last = case.tokens
    nothing = last.key.new_empty(len(case.policy), 0, case.head_dim)
    keys, values = (
        [torch.cat([nothing, *(getattr(t, name)[b] for t in past)], dim=1) for b in range(case.batch)]
        for name in ("key", "value")
    )
    return build_cache(keys, values, case.policy, case.page_size, room=last.key.shape[2], seed=case.seed), case


def same_bits(a: Tensor, b: Tensor) -> bool:
    """NaN included."""
    return a.shape == b.shape and a.dtype == b.dtype and raw(a).tobytes() == raw(b).tobytes()


def raw(tensor: Tensor) -> np.ndarray:
    """As numpy sees it; bfloat16, which it does not know, as int16."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def steps(*lengths: int) -> tuple[Call, ...]:
    return tuple(Call(n) for n in lengths)


RAZOR = ((0, FULL, False), (4, 24, True))
# The shared list: every backend and every instruction set must pass it.
CASES = (
    Case("one token", ((0, FULL, False),), steps(1)),
    Case("prefill and decode", RAZOR, steps(70, 1, 1, 1), group=4, head_dim=128),
    Case("no query token", RAZOR, steps(0, 5, 0, 1)),
    Case("no visible key", ((0, 0, False), (0, 0, True)), steps(5, 1), head_dim=20),
    Case("sinks only", ((3, 0, False), (3, 0, True)), steps(40, 1, 1)),
    Case("window of one", ((0, 1, False), (0, 1, True)), steps(20, 1, 3)),
    Case("ring wraps often", ((2, 5, True), (0, 7, False)), steps(*[3] * 12, *[1] * 12), page_size=16, head_dim=16),
    Case("ring of several pages", ((17, 37, True), (0, 80, True)), steps(150, 40, 1, 1), page_size=16, group=3),
    Case("tail of one", RAZOR, steps(33, 1), head_dim=33, group=2),
    Case("tail below a vector", RAZOR, steps(33, 1), head_dim=5, group=7),
    Case("tails everywhere", RAZOR, steps(65, 1, 1), head_dim=77, group=3, dtype="bfloat16"),
    Case("float16", RAZOR, steps(65, 1, 1), head_dim=80, group=8, dtype="float16"),
    Case("bfloat16", RAZOR, steps(65, 16, 17, 1), head_dim=64, group=2, dtype="bfloat16"),
    Case("ALiBi", ((0, 30, False), (0, FULL, False), (2, 9, True)), steps(60, 1, 20), alibi=True, group=2),
    Case("padding", RAZOR, (Call(30, (0, 12, 30)), Call(5, (5, 0, 2)), Call(1)), batch=3, group=2, head_dim=24),
    Case("dense", RAZOR, (Call(50, dense=True), Call(40, dense=True), Call(1), Call(30)), group=2, head_dim=32),
    Case("dense, padded", RAZOR, (Call(40, (0, 9), True), Call(35, (3, 0), True), Call(1)), batch=2, dtype="float16"),
    Case("transposed", RAZOR, steps(40, 1, 6), layout="transposed", batch=2, group=2),
    Case("fused", RAZOR, steps(40, 1, 6), layout="fused", batch=2, dtype="bfloat16", head_dim=40),
    Case("scale", RAZOR, steps(50, 1), scale=0.3, group=2),
    Case("heavy logits", RAZOR, steps(60, 1, 1), outlier=8.0),
    Case(
        "few queries",
        ((0, FULL, False), (8, 300, True)),
        steps(600, 1, 2, 16, 1),
        head_dim=128,
        group=4,
        dtype="bfloat16",
    ),
    Case(
        "few queries of many heads",
        ((0, FULL, False), (5, 40, True)),
        steps(130, 1, 9),
        head_dim=32,
        group=17,
        dtype="bfloat16",
    ),
    Case(
        "few queries, ALiBi",
        ((0, 80, False), (0, FULL, False)),
        steps(170, 1, 5, 1),
        alibi=True,
        head_dim=64,
        group=3,
        dtype="bfloat16",
        page_size=16,
    ),
    Case(
        "several steps of keys",
        ((0, FULL, False), (4, 100, True), (0, 270, False)),
        (Call(310), Call(290, (7,)), Call(40, dense=True)),
        head_dim=72,
        group=3,
        dtype="float16",
    ),
    Case(
        "several steps, ALiBi", ((0, FULL, False), (300, 20, True)), steps(280, 250), alibi=True, head_dim=33, group=5
    ),
    Case("one row a panel", ((0, FULL, False), (3, 50, False)), steps(20, 270, 17), head_dim=1),
    Case("many tokens, few queries", ((0, FULL, False), (8, 1500, True)), steps(2300, 1, 16), head_dim=16, group=2),
)


def case_id(case: Case) -> str:
    return case.name


# Random policies, chunkings and shapes for hypothesis.
head_policies = st.tuples(st.integers(0, 40), st.integers(0, 80) | st.just(FULL), st.booleans())
head_dims = st.sampled_from([8, 20, 33, 64, 80, 128])


@st.composite
def random_calls(draw: st.DrawFn, batch: int, most_tokens: int = 160) -> tuple[Call, ...]:
    calls: list[Call] = []
    for kind in draw(st.lists(st.sampled_from(["chunk", "padded", "dense", "decode"]), min_size=1, max_size=6)):
        left = most_tokens - sum(c.q_len for c in calls)
        if left <= 0:
            break
        if kind == "decode":
            calls += steps(*[1] * draw(st.integers(1, min(40, left))))
            continue
        q_len = draw(st.integers(1, min(70, left)))
        some = st.integers(0, q_len) | st.just(q_len)
        pad = draw(st.tuples(*[some] * batch)) if kind == "padded" or draw(st.booleans()) else None
        calls.append(Call(q_len, pad, dense=kind == "dense"))
    return tuple(calls)


@st.composite
def random_cases(draw: st.DrawFn, dtypes: Sequence[str] = tuple(DTYPES)) -> Case:
    batch = draw(st.integers(1, 3))
    return Case(
        "random",
        policy=tuple(draw(st.lists(head_policies, min_size=1, max_size=3))),
        calls=draw(random_calls(batch)),
        batch=batch,
        group=draw(st.sampled_from([1, 2, 3, 4, 7, 8])),
        head_dim=draw(head_dims),
        dtype=draw(st.sampled_from(dtypes)),
        page_size=draw(st.sampled_from([16, 32, 64])),
        alibi=draw(st.booleans()),
        scale=draw(st.none() | st.sampled_from([0.05, 0.4])),
        layout=draw(st.sampled_from(["contiguous", "transposed", "fused"])),
        seed=draw(st.integers(0, 2**32 - 1)),
    )
