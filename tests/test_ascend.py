# SPDX-License-Identifier: Apache-2.0
"""The Ascend kernels, emulated on the host, against the reference; and the host's tiling. None ran on an NPU."""

from __future__ import annotations

import ctypes
import itertools
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import emulated
from cases import (
    CASES,
    FULL,
    Case,
    assert_close,
    before_last_call,
    build_cache,
    case_id,
    lay_out,
    same_bits,
    to_numpy,
    wide,
)
from emulated import REVERSED, EmulationError
from razor_attention import reference

if emulated.compiler() is None:
    pytest.skip("no C++ compiler", allow_module_level=True)

ARITHMETIC = 1e-5  # of the largest value: float32 sums in another order, before the one rounding

POLICIES = {
    "full": lambda s, w: ((0, FULL, False),) * 2,
    "sinks and window": lambda s, w: ((s, w, False), (0, w, False)),
    "compensated": lambda s, w: ((s, w, True), (0, w + 3, True)),
    "mixed": lambda s, w: ((0, FULL, False), (s, w, True), (s, w, False)),
    "edges": lambda s, w: ((s, 0, True), (0, 0, False), (0, 1, True)),
}
# Tokens stored before the call: of a page P, of sinks s, of a window w.
LENGTHS = {
    "none": lambda P, s, w: 0,
    "one": lambda P, s, w: 1,
    "page - 1": lambda P, s, w: P - 1,
    "page": lambda P, s, w: P,
    "page + 1": lambda P, s, w: P + 1,
    "sinks - 1": lambda P, s, w: max(s - 1, 0),
    "sinks": lambda P, s, w: s,
    "sinks + 1": lambda P, s, w: s + 1,
    "full ring": lambda P, s, w: s + w,
    "ring turns by one": lambda P, s, w: s + w + 1,
    "ring turns often": lambda P, s, w: s + 5 * w + 3,
    "many parts": lambda P, s, w: 700,
}


@dataclass(frozen=True)
class Numbers:
    """One call: the grid's axes."""

    head_dim: int = 64
    group: int = 4
    page_size: int = 16
    dtype: str = "bfloat16"
    policy: str = "mixed"
    length: str = "ring turns often"
    q_len: int = 1
    cores: int = 24
    alibi: bool = False
    padded: bool = False
    dense: bool = False
    values: str = "random"
    layout: str = "contiguous"
    order: int = emulated.FORWARD
    sink: int = 4
    window: int = 21

    def heads(self) -> tuple[tuple[int, int, bool], ...]:
        return tuple(POLICIES[self.policy](self.sink, self.window))


AXES: dict[str, Sequence[Any]] = {
    "head_dim": (64, 80, 96, 128, 192, 256),
    "group": (1, 4, 7, 8),
    "page_size": (16, 64, 128),
    "dtype": ("float16", "bfloat16"),
    "policy": tuple(POLICIES),
    "length": tuple(LENGTHS),
    "q_len": (1, 2, 16, 19),
    "cores": (1, 20, 24, 40, 48),
    "alibi": (False, True),
    "padded": (False, True),
    "dense": (False, True),
    "values": ("random", "dominant", "equal", "negative", "zeros"),
    "layout": ("contiguous", "transposed", "fused"),
    "order": (emulated.FORWARD, REVERSED, 5),
    "sink": (1, 4, 17),
    "window": (5, 21, 64),
}


def pairwise(seed: int, fixed: dict[str, Any] | None = None) -> list[Numbers]:
    """Cases that hold every pair of values of any two axes: each time the one of 30 with most new pairs."""
    draw = np.random.default_rng(seed)
    axes = AXES | {name: (value,) for name, value in (fixed or {}).items()}
    names = list(axes)
    missing = {
        (a, x, b, y) for a, b in itertools.combinations(names, 2) for x, y in itertools.product(axes[a], axes[b])
    }

    def new(row: dict[str, Any]) -> set[tuple[Any, ...]]:
        return {(a, row[a], b, row[b]) for a, b in itertools.combinations(names, 2)} & missing

    cases = []
    while missing:
        a, x, b, y = min(missing, key=repr)
        rows = [{n: v[draw.integers(len(v))] for n, v in axes.items()} | {a: x, b: y} for _ in range(30)]
        best = max(rows, key=lambda row: len(new(row)))
        missing -= new(best)
        cases.append(Numbers(**best))
    return cases


def shaped(kind: str, query: Tensor, keys: list[Tensor], scale: float) -> list[Tensor]:
    """Keys [num_kv_heads, tokens, head_dim] of every sequence that make logits of this kind."""
    towards = query[:, :, -1].double()  # [batch, num_heads, head_dim]
    changed = []
    for b, k in enumerate(keys):
        direction = towards[b].view(k.shape[0], -1, k.shape[2])[:, :1]  # of each kv head's first query head
        unit = direction / (direction.square().sum(-1, keepdim=True) * scale)  # logit 1
        if kind == "dominant" and k.shape[1]:
            k = k.clone()
            k[:, k.shape[1] // 2] = (80 * unit[:, 0]).to(k.dtype)
        elif kind in ("equal", "negative", "zeros"):
            factor = {"equal": 1.0, "negative": -500.0, "zeros": 0.0}[kind]
            k = (factor * unit).to(k.dtype).expand_as(k).contiguous()
        changed.append(k)
    return changed


def inputs(c: Numbers) -> tuple[tuple[Tensor, ...], dict[str, Any], float]:
    """Arguments of reference.attention, and the largest |value|."""
    draw = torch.Generator().manual_seed(zlib.crc32(repr(c).encode()))
    heads, dtype = c.heads(), getattr(torch, c.dtype)
    stored = LENGTHS[c.length](c.page_size, c.sink, c.window)
    lengths = [stored, stored // 2] if stored < 500 else [stored]
    pad = [i * c.q_len // 2 for i in range(len(lengths))] if c.padded else [0] * len(lengths)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(dtype)

    scale = c.head_dim**-0.5
    q = random(len(lengths), c.group * len(heads), c.q_len, c.head_dim)
    k, v = (random(len(lengths), len(heads), c.q_len, c.head_dim) for _ in range(2))
    keys, values = ([random(len(heads), n, c.head_dim) for n in lengths] for _ in range(2))
    keys = shaped(c.values, q, keys, scale)
    if c.values != "random":
        k = torch.stack(shaped(c.values, q, list(k), scale))
    cache = build_cache(keys, values, heads, c.page_size, room=c.q_len, seed=stored)
    magnitude = max(float(t.abs().max()) for t in [v, *values] if t.numel())
    padding = torch.arange(c.q_len) < torch.tensor(pad)[:, None]
    new = [t.masked_fill(padding[:, None, :, None], torch.nan) for t in (q, k, v)]
    slopes = 0.5 ** torch.linspace(1, 8, q.shape[1]) if c.alibi else None
    options = {"alibi_slopes": slopes, "pad": torch.tensor(pad) if c.padded else None, "scale": scale, "dense": c.dense}
    return (*lay_out(new, c.layout), *cache), options, magnitude


def expected_attention(arguments: tuple[Tensor, ...], options: dict[str, Any]) -> np.ndarray:
    return to_numpy(reference.attention(*wide(arguments), **options))


def run_attention(c: Numbers, library: ctypes.CDLL | None = None) -> None:
    arguments, options, magnitude = inputs(c)
    out = emulated.attention(*arguments, **options, cores=c.cores, order=c.order, library=library)
    assert_close(out, expected_attention(arguments, options), magnitude, ARITHMETIC)


def run_append(c: Numbers, library: ctypes.CDLL | None = None) -> None:
    arguments, options, _ = inputs(c)
    (_, key, value, *cache), pad = arguments, options["pad"]
    mine, theirs = [t.clone() for t in cache], [t.clone() for t in cache]
    emulated.append(key, value, *mine, pad=pad, cores=c.cores, order=c.order, library=library)
    reference.append(key, value, *theirs, pad=pad)
    for name, a, b in zip(emulated.CACHE[:7], mine, theirs, strict=False):
        assert same_bits(a, b), name
    for name, a, b in zip(emulated.CACHE[7:], mine[7:], theirs[7:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4, msg=name)


def run_head_scores(c: Numbers, library: ctypes.CDLL | None = None) -> None:
    draw = torch.Generator().manual_seed(c.head_dim)
    period, repeats = {16: (9, 3), 64: (70, 2), 128: (1, 40)}[c.page_size]
    tokens, dtype = 1 + period * repeats, getattr(torch, c.dtype)
    q = torch.randn(2, 2 * c.group, tokens, c.head_dim, generator=draw).to(dtype)
    k = torch.randn(2, 2, tokens, c.head_dim, generator=draw).to(dtype)
    k[:, 1] = k[:, 1, 1:2]  # a head that looks at all tokens alike
    q, k = lay_out([q, k], c.layout)
    mine = emulated.head_scores(q, k, period, scale=c.head_dim**-0.5, cores=c.cores, order=c.order, library=library)
    theirs = reference.head_scores(q, k, period, scale=c.head_dim**-0.5)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def number_id(c: Numbers) -> str:
    return "-".join(str(getattr(c, name)).replace(" ", "") for name in AXES)


# --- the grid: every pair of values here, all of head_dim x group x page_size x dtype x length in CI's long job

DECODE = pairwise(1)
SCORED = pairwise(2, {"policy": "full", "length": "none", "values": "random"})[::4]


@pytest.mark.parametrize("c", DECODE, ids=number_id)
def test_attention(c: Numbers) -> None:
    run_attention(c)


@pytest.mark.parametrize("c", DECODE[::2], ids=number_id)
def test_append(c: Numbers) -> None:
    run_append(c)


@pytest.mark.parametrize("c", SCORED, ids=number_id)
def test_head_scores(c: Numbers) -> None:
    run_head_scores(c)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", AXES["head_dim"])
@pytest.mark.parametrize("group", AXES["group"])
@pytest.mark.parametrize("page_size", AXES["page_size"])
def test_whole_grid(head_dim: int, group: int, page_size: int) -> None:
    draw = np.random.default_rng([head_dim, group, page_size])
    for dtype, length in itertools.product(AXES["dtype"], AXES["length"]):
        rest = {n: v[draw.integers(len(v))] for n, v in AXES.items()}
        c = Numbers(**(rest | dict(head_dim=head_dim, group=group, page_size=page_size, dtype=dtype, length=length)))
        try:
            run_attention(c)
            run_append(c)
        except Exception as error:
            raise AssertionError(repr(c)) from error
    run_head_scores(replace(c, page_size=page_size))


@pytest.mark.parametrize("case", [c for c in CASES if c.head_dim % 16 == 0], ids=case_id)
def test_shared_cases(case: Case) -> None:
    case = replace(case, dtype="float16" if case.dtype == "float32" else case.dtype)
    cache, case = before_last_call(case)
    last = case.tokens[-1]
    arguments = (last.query, last.key, last.value, *cache)
    options = {"alibi_slopes": case.slopes, "pad": last.pad, "scale": case.scaled_by, "dense": last.dense}
    out = emulated.attention(*arguments, **options, cores=7)
    assert_close(out, expected_attention(arguments, options), case.magnitude(), ARITHMETIC)


@pytest.mark.parametrize("seen", [30, 31, 10**6])
def test_one_dropped_token_and_a_million(seen: int) -> None:
    """The count comes from `seen`, however many tokens nobody stored."""
    c = Numbers(policy="compensated", length="ring turns often", window=25)
    arguments, options, magnitude = inputs(c)
    arguments = list(arguments)
    arguments[6] = torch.tensor([seen, seen])  # the cache rows are those of some other tokens: all are in use
    held = reference.kept_tokens(seen, 4, 25)
    assert len(held) == 29
    out = emulated.attention(*arguments, **options)
    largest = max(magnitude, float(arguments[11].abs().max()))
    assert_close(out, expected_attention(tuple(arguments), options), largest, ARITHMETIC)


def test_order_and_number_of_blocks_change_nothing() -> None:
    """Bit for bit: the shares depend on the number of workers, who does them does not matter."""
    c = Numbers(length="many parts", q_len=3, group=7, alibi=True)
    arguments, options, _ = inputs(c)
    first = emulated.attention(*arguments, **options, cores=20)
    for blocks, order in ((20, REVERSED), (20, 3), (7, 9), (1, 0), (33, REVERSED)):
        assert same_bits(emulated.attention(*arguments, **options, cores=20, blocks=blocks, order=order), first)


def test_prompt_without_its_full_heads() -> None:
    """Those are attended elsewhere: the kernel leaves their rows alone, and all others are as ever."""
    c = Numbers(q_len=40, policy="mixed", padded=True)
    arguments, options, magnitude = inputs(c)
    out, expected = emulated.attention(*arguments, **options, skip_full=True), expected_attention(arguments, options)
    assert_close(out[:, c.group :], expected[:, c.group :], magnitude, ARITHMETIC)
    assert (out[1, : c.group, 20:] == 777).all()
    assert not out[1, : c.group, :20].any()  # padding yields zeros everywhere


def test_first_call_of_an_empty_cache() -> None:
    """No page at all yet."""
    c = Numbers(q_len=20, length="none")
    arguments, options, magnitude = inputs(c)
    q, k, v, keys, values, table, *rest = arguments
    arguments = (q, k, v, keys[:0], values[:0], table[:, :0].contiguous(), *rest)
    out = emulated.attention(*arguments, **options)
    assert_close(out, expected_attention(arguments, options), magnitude, ARITHMETIC)


def test_decoding_token_after_token() -> None:
    """attention and append in turns, as a cache uses them."""
    c = Numbers(policy="mixed", length="sinks - 1", window=9, sink=3, head_dim=64, group=2)
    arguments, options, magnitude = inputs(replace(c, q_len=40))
    q, k, v, *cache = arguments
    theirs = [t.clone() for t in cache]
    for i in range(40):
        now = tuple(t[:, :, i : i + 1] for t in (q, k, v))
        out = emulated.attention(*now, *cache, **options)
        assert_close(out, expected_attention((*now, *theirs), options), magnitude, ARITHMETIC)
        emulated.append(*now[1:], *cache)
        reference.append(*now[1:], *theirs)
        assert all(same_bits(a, b) for a, b in zip(cache[:7], theirs[:7], strict=True))


# --- the host's tiling


def tiling_for(
    batch: int, num_kv_heads: int, group: int, q_len: int, head_dim: int, cores: int
) -> emulated.AttentionTiling:
    query = torch.empty(batch, num_kv_heads * group, q_len, head_dim, dtype=torch.float16, device="meta")
    key = query[:, :num_kv_heads]
    cache = (torch.empty(4, 64, head_dim, device="meta"), None, torch.empty(batch * num_kv_heads, 4, device="meta"))
    return emulated.attention_tiling(query, key, key, cache, scale=1.0, cores=cores)[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("cores", [1, 20, 24, 40, 48])
@pytest.mark.parametrize(("batch", "q_len"), [(1, 1), (3, 1), (16, 1), (5, 16), (2, 500)])
def test_shares_hold_everything_once_and_evenly(cores: int, batch: int, q_len: int) -> None:
    draw = torch.Generator().manual_seed(cores * batch + q_len)
    heads = 8
    seen = torch.randint(0, 40_000, (batch,), generator=draw)
    window = torch.full((heads,), 4000, dtype=torch.int32)
    window[:: heads // 2] = FULL
    sink = torch.full((heads,), 4, dtype=torch.int32)
    cache = (None, None, None, seen, sink, window, window != FULL)
    check_shares(tiling_for(batch, heads, 4, q_len, 128, cores), cache)  # type: ignore[arg-type]


def check_shares(tiling: emulated.AttentionTiling, cache: Sequence[Tensor]) -> dict[int, int]:
    """Every unit of every part is in one share, and shares are even. Returns the units of each page-table row."""
    cores, batch, heads, q_len = tiling.cache.workers, tiling.cache.batch, tiling.cache.num_kv_heads, tiling.cache.q_len
    group = tiling.group
    shares = emulated.shares(tiling, cache)
    held: dict[tuple[int, int], list[tuple[int, int]]] = {}
    load = [0] * cores
    for worker, row, first, end, begin, stop, units, state in shares:
        assert 0 <= first < end <= q_len * group
        assert 0 <= begin < stop <= units
        assert state == (-1 if (begin, stop) == (0, units) else 2 * worker + (begin == 0))
        held.setdefault((row, first), []).append((begin, stop))
        load[worker] += stop - begin
        if (begin, stop) != (0, units):
            assert q_len <= 16
    assert set(held) == {(r, f) for r in range(batch * heads) for f in range(0, q_len * group, tiling.block_rows)}
    units_of = {(row, first): units for _, row, first, _, _, _, units, _ in shares}
    for part, pieces in held.items():
        assert [0, *(stop for _, stop in pieces)] == [*(begin for begin, _ in pieces), units_of[part]]
    if q_len <= 16:
        assert max(load) <= max(-(-sum(load) // cores), 4)
    states = [state for *_, state in shares if state >= 0]
    assert len(states) == len(set(states))
    return {row: sum(units for (r, _), units in units_of.items() if r == row) for row in range(batch * heads)}


BUDGET = emulated.UB_BUDGET
HEAD_DIMS = (64, 80, 96, 128, 192, 256)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("group", [1, 4, 7, 8, 71])
def test_kernels_use_what_the_formula_says(head_dim: int, group: int) -> None:
    tiling = tiling_for(2, 2, group, 1, head_dim, 40)
    bytes_ = (ctypes.c_int64 * 4)()
    emulated.stock().razor_ub_bytes(
        *(ctypes.c_int64(x) for x in (tiling.cache.tile_tokens, tiling.block_rows, head_dim)), bytes_
    )
    assert max(bytes_) <= BUDGET
    c = Numbers(head_dim=head_dim, group=group, length="page", policy="mixed")
    arguments, options, _ = inputs(c)
    counted: list[emulated.Counters] = []
    emulated.attention(*arguments, **options, counted=counted)
    assert [x.ub_bytes for x in counted] == list(bytes_)[:2]


def documented(section: str) -> list[list[float]]:
    """The numbers of a section's table in cpp/ascend/README.md."""
    text = (emulated.CPP / "ascend/README.md").read_text().split(f"## {section}\n")[1].split("\n## ")[0]
    return [[float(x) for x in re.findall(r"[\d.]+", row)] for row in re.findall(r"^\| \d.*$", text, re.MULTILINE)]


def test_documented_use_of_memory() -> None:
    rows = []
    for head_dim, group in itertools.product(HEAD_DIMS, (4, 8)):
        tiling = tiling_for(1, 1, group, 1, head_dim, 40)
        n, bytes_ = tiling.cache.tile_tokens, (ctypes.c_int64 * 4)()
        emulated.stock().razor_ub_bytes(*(ctypes.c_int64(x) for x in (n, tiling.block_rows, head_dim)), bytes_)
        rows.append([head_dim, group, n, *bytes_, BUDGET - bytes_[0]])
    assert documented("On-chip memory") == rows


def test_documented_cost_of_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted by the emulation, as the difference of two lengths; cycles are arithmetic with nominal figures."""
    bytes_per_cycle, table = 1600 / 48 / 1.8, documented("Roofline, on paper")
    for head_dim, group, nbytes, cycles, repeats, share, instructions, barriers in table:
        counts = []
        for tokens in (128, 256):
            monkeypatch.setitem(LENGTHS, "page", lambda P, s, w, tokens=tokens: tokens)
            c = Numbers(head_dim=int(head_dim), group=int(group), page_size=64, policy="full", length="page")
            arguments, options, _ = inputs(c)
            emulated.attention(*arguments, **options, cores=1, counted=counts)
        short, _, long, _ = counts
        n = tiling_for(1, 1, int(group), 1, int(head_dim), 1).cache.tile_tokens
        tokens = 128 * 2 + 64 * 2  # two kv heads, two sequences of which one is half as long

        def per_token(field: str, long: Any = long, short: Any = short, tokens: int = tokens) -> float:
            return (getattr(long, field) - getattr(short, field)) / tokens

        assert per_token("bytes_in") == nbytes
        assert round(per_token("repeats"), 1) == repeats
        assert round(per_token("barriers") * n) == barriers
        assert round((per_token("instructions") - per_token("barriers")) * n) == instructions
        assert per_token("copies") * n == 2
        assert round(nbytes / bytes_per_cycle, 1) == pytest.approx(cycles, abs=0.11)
        assert min(1, round(cycles / repeats, 2)) == pytest.approx(share, abs=0.011)
    assert len(table) == 7


def test_small_memory_makes_small_tiles() -> None:
    c = Numbers(head_dim=128, group=8)
    arguments, options, magnitude = inputs(c)
    for ub_bytes in (60_000, 90_000, 120_000):
        out = emulated.attention(*arguments, **options, ub_bytes=ub_bytes)
        assert_close(out, expected_attention(arguments, options), magnitude, ARITHMETIC)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 72}, "query: expected head_dim a multiple of 16 up to 256 on an NPU, got 72"),
        ({"head_dim": 272}, "query: expected head_dim a multiple of 16 up to 256 on an NPU, got 272"),
    ],
)
def test_what_the_kernels_do_not_take(change: dict[str, Any], message: str) -> None:
    arguments, options, _ = inputs(Numbers(**change))
    with pytest.raises(EmulationError, match=re.escape(message)):
        emulated.attention(*arguments, **options)


def test_overlapping_rows_and_little_memory_are_refused() -> None:
    (q, k, v, *cache), options, _ = inputs(Numbers(q_len=3))
    with pytest.raises(EmulationError, match="key: expected rows that do not overlap on an NPU, got stride 0"):
        emulated.attention(q, k[:, :, :1].expand_as(k), v, *cache, **options)
    with pytest.raises(EmulationError, match=r"ub_bytes: expected at least \d+, got 1000"):
        emulated.attention(q, k, v, *cache, **options, ub_bytes=1000)
