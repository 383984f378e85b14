# SPDX-License-Identifier: Apache-2.0
"""A cache that holds int8 or int4: its bytes, what it loses, and attention over it."""

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import oracle
from cases import (
    CASES,
    FULL,
    Call,
    Case,
    assert_agree,
    assert_close,
    case_id,
    raw,
    reference_attend,
    same_bits,
    steps,
    to_numpy,
    wide,
)
from cases import random_cases as any_cases
from razor_attention import LayerCache, Plan, _core, ops, reference
from test_isa import ISAS, present, run_child

KV = {"int8": torch.int8, "int4": torch.uint8}
MIXED = ((0, FULL, False), (4, 24, True), (0, 9, False), (5, 0, True))
both = pytest.mark.parametrize("kv", KV)
NO_EXACT = {"exact_sink": 0, "exact_window": 0}


def cache_of(case: Case, kv: str | torch.dtype, page_size: int | None = None, **exact: int) -> LayerCache:
    sizes = {"batch_size": case.batch, "head_dim": case.head_dim, "page_size": page_size or case.page_size} | exact
    return LayerCache(*zip(*case.policy, strict=True), dtype=kv, alibi_slopes=case.slopes, **sizes)


# Attention and append.


def expected(case: Case, kv: str, exact_sink: int, exact_window: int) -> list[np.ndarray]:
    """By the oracle: queries read the tokens of their own call and those with exact rows as they came, what else was
    stored as it was quantised. What is dropped stays as it was then."""
    out = [np.zeros(t.query.shape) for t in case.tokens]
    for b in range(case.batch):
        query, *given = (case.history(name, b) for name in ("query", "key", "value"))
        key, value = (rows.copy() for rows in given)
        position = 0
        for i, t in enumerate(case.tokens):
            pad = 0 if t.pad is None else int(t.pad[b])
            stored, end = position, position + t.query.shape[2] - pad
            for p in range(stored, end):
                for head in range(case.num_heads):
                    h = head // case.group
                    sink, window, compensate = case.policy[h]
                    out[i][b, head, pad + p - stored] = oracle.attend(
                        query[head, p],
                        key[h, : p + 1],
                        value[h, : p + 1],
                        oracle.read_exactly(p, sink, window, stored if t.dense else None),
                        compensate=compensate,
                        slope=0.0 if case.slopes is None else float(case.slopes[head]),
                        scale=case.scaled_by,
                    )
            for h, (sink, window, _) in enumerate(case.policy):
                kept = list(oracle.cache_rows(end, sink, window).values())
                for rows, as_given in zip((key, value), given, strict=True):
                    if coded := [x for x in kept if exact_sink <= x < end - exact_window]:
                        rows[h, coded] = oracle.quantised(as_given[h, coded], kv)[0]
            position = end
    return out


def used_rows(cache: LayerCache) -> list[tuple[int, int]]:
    """(page, row) of every kept token."""
    found = []
    for r, table in enumerate(cache.page_table.tolist()):
        b, h = divmod(r, len(cache.sink_size))
        for row in oracle.cache_rows(int(cache.seen[b]), int(cache.sink_size[h]), int(cache.window_size[h])):
            found.append((table[row // cache.page_size], row % cache.page_size))
    return found


def poison(cache: LayerCache) -> None:
    """NaN in every row that holds no token: all bits set."""
    used = torch.zeros(cache.key_pages.shape[:2], dtype=torch.bool)
    for page, row in used_rows(cache):
        used[page, row] = True
    for pages in (cache.key_pages, cache.value_pages):
        for part in reference._parts(pages, cache.head_dim):
            part[~used] = 0xFF


def assert_same_cache(cache: LayerCache, other: LayerCache) -> None:
    """Bytes of all kept tokens, and sums within their rounding."""
    assert torch.equal(cache.seen, other.seen)
    for name in ("key_pages", "value_pages"):
        for side in (0, 1):  # codes, numbers
            kept = []
            for one in (cache, other):
                part = reference._parts(getattr(one, name), one.head_dim)[side]
                kept.append([part[page, row] for page, row in used_rows(one)])
            assert all(map(torch.equal, *kept))
    for name in ("key_sum", "value_sum"):
        assert np.allclose(getattr(cache, name), getattr(other, name), rtol=1e-5, atol=1e-4)


def attend_everything(case: Case, kv: str, **exact: int) -> None:
    """Against the oracle and the reference, which also fills a cache of its own."""
    cache, filled_by_reference, slack = cache_of(case, kv, **exact), cache_of(case, kv, **exact), {}
    if case.scaled_by * case.outlier > 1:  # logits of some hundreds
        slack = {"arithmetic": 2.0**-24 * 1024}
    for tokens, by_oracle in zip(case.tokens, expected(case, kv, **NO_EXACT | exact), strict=True):
        poison(cache)
        by_reference = reference_attend(case, cache, tokens)
        out = cache.attend(tokens.query, tokens.key, tokens.value, scale=case.scale, pad=tokens.pad, dense=tokens.dense)
        assert out.dtype == tokens.query.dtype
        assert_close(out, by_oracle, case.magnitude(), **slack)
        assert_close(out, to_numpy(by_reference), case.magnitude(), **slack)
        filled_by_reference._take_pages(cache.seen)
        rows = filled_by_reference._exact_rows(tokens.key)
        reference.append(tokens.key, tokens.value, *filled_by_reference._tensors(), pad=tokens.pad, **rows)
        assert_same_cache(cache, filled_by_reference)
        assert not exact or torch.equal(cache.exact, filled_by_reference.exact)


LONG = ("few queries", "many tokens, few queries", "several steps of keys")
QUICK_CASES = [pytest.param(case, marks=pytest.mark.slow) if case.name in LONG else case for case in CASES]


@both
@pytest.mark.parametrize("case", QUICK_CASES, ids=case_id)
def test_case(case: Case, kv: str) -> None:
    if case.name == "many tokens, few queries":
        case = dataclasses.replace(case, calls=steps(1800, 1, 16))  # two items of a row
    attend_everything(case, kv)


@both
@pytest.mark.parametrize(
    "dtype", ["bfloat16", *(pytest.param(d, marks=pytest.mark.slow) for d in ("float32", "float16"))]
)
@pytest.mark.parametrize("alibi", [False, True])
def test_chunks_of_many_queries(kv: str, dtype: str, alibi: bool) -> None:
    """Beyond few queries: blocks of them over what is stored and over themselves, ring wrapped, padding, dense."""
    calls = (Call(90), Call(40, (7, 0)), Call(300, dense=True), Call(33), Call(1), Call(70, (0, 70)))
    attend_everything(Case("", MIXED, calls, batch=2, group=2, head_dim=72, dtype=dtype, alibi=alibi), kv)


@both
@given(any_cases())
def test_any_plan_in_any_chunks(kv: str, case: Case) -> None:
    attend_everything(case, kv)


def few_queries() -> None:
    """Whole and partial runs of codes, sinks, rings, masks, ALiBi, and tokens of the call as they come."""
    calls = (Call(70), Call(1), Call(3, (2, 0)), Call(2, dense=True))
    for kv in KV:
        for group, head_dim, dtype in (
            (4, 128, "bfloat16"),
            (1, 96, "bfloat16"),
            (5, 64, "bfloat16"),
            (2, 33, "float16"),
        ):
            shape = {"batch": 2, "group": group, "head_dim": head_dim, "dtype": dtype}
            attend_everything(Case("", MIXED, calls, alibi=group > 1, **shape), kv)


CHILD = "import sys; sys.path.insert(0, sys.argv[1]); import test_quantised; test_quantised.few_queries()"


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_few_queries_on_every_instruction_set(isa: str) -> None:
    if isa not in present():
        pytest.skip(f"this CPU has no {isa}")
    child = run_child(CHILD, isa, str(Path(__file__).parent))
    assert child.returncode == 0, child.stderr


@both
@pytest.mark.parametrize("sizes", [(4, 0), (0, 1), (0, 30), (6, 17)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_exact_rows(kv: str, dtype: str, sizes: tuple[int, int]) -> None:
    """Beside the codes, of windows that are longer and shorter than they; few queries and many, padding, dense."""
    exact = {"exact_sink": sizes[0], "exact_window": sizes[1]}
    calls = (Call(20), Call(1), Call(1), Call(40, (7, 0)), Call(3), Call(60, dense=True), Call(2), Call(50), Call(1))
    case = Case("", MIXED, calls, batch=2, group=2, head_dim=40, dtype=dtype, alibi=sizes == (0, 30), page_size=16)
    attend_everything(case, kv, **exact)


@both
@given(any_cases(), st.integers(0, 9), st.integers(1, 70))
def test_exact_rows_of_any_plan(kv: str, case: Case, exact_sink: int, exact_window: int) -> None:
    attend_everything(case, kv, exact_sink=exact_sink, exact_window=exact_window)


@both
def test_everything_exact_is_an_unquantised_cache(kv: str) -> None:
    case = Case("", MIXED, steps(30, 1, 20, 1), batch=2, group=2, head_dim=40, dtype="bfloat16")
    exact, coded = case.run(cache_of(case, kv, exact_window=100)), case.run(cache_of(case, kv))
    for a, b, c in zip(exact, case.run(cache_of(case, torch.bfloat16)), coded, strict=True):
        assert_agree(a, b, case.magnitude())
        assert c is coded[0] or (b - c).abs().max() > 2 * (b - a).abs().max()


@both
def test_results_do_not_depend_on_threads_pages_or_neighbours(kv: str) -> None:
    calls = (Call(150, (0, 20)), Call(1), Call(60), Call(3))
    case = Case("", MIXED, calls, batch=2, group=3, head_dim=40, dtype="bfloat16")
    alone = case.run(cache_of(case, kv))
    torch.set_num_threads(2)
    assert all(torch.equal(a, b) for a, b in zip(alone, case.run(cache_of(case, kv)), strict=True))
    for other in (16, 128):
        for a, b in zip(alone, case.run(cache_of(case, kv, page_size=other)), strict=True):
            assert_agree(a, b, case.magnitude())
    first = cache_of(dataclasses.replace(case, batch=1), kv)
    for t, out in zip(case.tokens, alone, strict=True):
        pad = None if t.pad is None else t.pad[:1]
        assert torch.equal(first.attend(t.query[:1], t.key[:1], t.value[:1], pad=pad), out[:1])


@both
def test_chunks_matter_within_the_loss_only(kv: str) -> None:
    """One call reads its tokens as they come; later calls what is stored. Without queries of one call: the same."""
    case = Case("", ((0, FULL, False),), steps(64), group=2, dtype="float32")
    whole = case.run(cache_of(case, kv))[0]
    cache, t = cache_of(case, kv), case.tokens[0]
    cut = torch.cat(
        [cache.attend(*(x[:, :, i : i + 8] for x in (t.query, t.key, t.value))) for i in range(0, 64, 8)], 2
    )
    assert torch.allclose(cut[:, :, :8], whole[:, :, :8], atol=1e-6)
    off = (cut - whole)[:, :, 8:].abs().max()
    assert 1e-4 < off < (0.05 if kv == "int8" else 0.6)
    assert off > 1e-2 or kv == "int8"


@both
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("q_len", [1, 40])
def test_what_is_not_finite_shows(kv: str, bad: float, q_len: int) -> None:
    case = Case("", ((0, FULL, False), (0, 5, False)), steps(50, q_len), head_dim=64, dtype="bfloat16")
    case.tokens[0].value[0, :, 20, 3] = bad
    out = case.run(cache_of(case, kv))[1]
    spoiled = out[0, 0].isnan()
    assert spoiled[:, : 64 if kv == "int8" else 16].all()
    assert not spoiled[:, 64 if kv == "int8" else 16 :].any()
    assert not out[0, 1].isnan().any()


@both
def test_sums_take_what_was_stored_and_what_never_was(kv: str) -> None:
    """Window 4 of calls of 3, 6 and 1: stored tokens leave as quantised, skipped ones as they came (3 and 4)."""
    case = Case("", ((1, 4, True),), steps(3, 6, 1), head_dim=40)
    cache = cache_of(case, kv)
    case.run(cache)
    for name, total in (("key", cache.key_sum), ("value", cache.value_sum)):
        history = case.history(name, 0)[0]
        before, after = (oracle.quantised(history[part], kv)[0] for part in (slice(1, 3), slice(5, 6)))
        gone = [before, history[3:5], after]  # kept: 0 and 6 ... 9
        assert np.allclose(total[0].numpy(), np.concatenate(gone).sum(0), atol=1e-5)
        assert not np.allclose(total[0].numpy(), history[1:6].sum(0), atol=1e-4)


# LayerCache, Plan.


@both
@pytest.mark.parametrize("head_dim", [1, 33, 64, 80, 128])
@pytest.mark.parametrize("page_size", [16, 64])
def test_nbytes_is_what_the_plan_says(kv: str, head_dim: int, page_size: int) -> None:
    policy = tuple((sinks, max(window, 1), mean) for sinks, window, mean in MIXED)  # a plan has no window of nothing
    case = Case("", policy, steps(3, 40, 1, 60), batch=2, head_dim=head_dim, page_size=page_size)
    cache, plan, seen = cache_of(case, kv), Plan(*([list(column)] for column in zip(*policy, strict=True))), 0
    beside = cache_of(case, kv, exact_sink=2, exact_window=7)
    row = head_dim + 4 if kv == "int8" else math.ceil(head_dim / 2) + 2 * math.ceil(head_dim / 16)
    shape = {"head_dim": head_dim, "batch_size": 2, "page_size": page_size}
    for tokens in case.tokens:
        cache.append(tokens.key, tokens.value)
        seen += tokens.key.shape[2]
        pages = sum(-(-len(oracle.cache_rows(seen, s, w)) // page_size) for s, w, _ in policy)
        by_hand = 2 * 2 * (pages * page_size * row + 2 * 4 * head_dim)  # K and V, 2 sequences; 2 heads compensate
        assert cache.nbytes == by_hand == plan.kv_bytes(seen, dtype=kv, **shape)
        beside.append(tokens.key, tokens.value)
        rows = {"exact_rows": 9, "exact_dtype": torch.float32}
        assert beside.nbytes == by_hand + 2 * 2 * 4 * 9 * head_dim * 4 == plan.kv_bytes(seen, dtype=kv, **shape, **rows)
        assert cache.key_pages[0].numel() * cache.key_pages.element_size() == page_size * row
    assert plan.kv_bytes(seen, dtype=torch.int8, **shape) == plan.kv_bytes(seen, dtype="int8", **shape)


def test_bytes_of_a_known_model() -> None:
    full = Plan.full(32, 8)
    exact = 131072 * 32 * 8 * 2
    assert full.kv_bytes(131072, head_dim=128, dtype=torch.int8) == exact * 132
    assert full.kv_bytes(131072, head_dim=128, dtype="int4") == exact * 80


@both
@pytest.mark.parametrize("exact", [{}, {"exact_sink": 2, "exact_window": 11}], ids=["codes", "exact rows"])
def test_reorder_and_reset(kv: str, exact: dict[str, int]) -> None:
    case = Case("", MIXED, (Call(50, (0, 9, 3)), Call(1), Call(20), Call(1)), batch=3, group=2, head_dim=24)
    index, cache = [2, 0, 2, 1], cache_of(case, kv, **exact)
    other = cache_of(dataclasses.replace(case, batch=4), kv, **exact)
    for i, t in enumerate(case.tokens):
        if i == 2:
            cache.reorder(torch.tensor(index))
        rows = slice(None) if i < 2 else index
        chosen = [x[index] for x in (t.query, t.key, t.value)]
        mine = cache.attend(*(x[rows] for x in (t.query, t.key, t.value)), pad=t.pad)
        theirs = other.attend(*chosen, pad=None if t.pad is None else t.pad[index])
        assert torch.equal(mine if i >= 2 else mine[index], theirs)
    cache.reset()
    assert (len(cache.key_pages), cache.key_pages.dtype, cache.head_dim) == (0, KV[kv], 24)
    assert cache.nbytes == 4 * 2 * 2 * 24 * 4  # sums of two heads that compensate
    case = dataclasses.replace(case, batch=4, calls=steps(30, 1))
    assert all(torch.equal(a, b) for a, b in zip(case.run(cache), case.run(cache_of(case, kv, **exact)), strict=True))


@both
def test_any_dtype_of_tokens_on_one_cache(kv: str) -> None:
    """Nothing ties a quantised cache to a dtype: a model may change it between calls."""
    case = Case("", ((0, FULL, False), (2, 8, True)), steps(20, 1, 20), head_dim=32)
    cache = cache_of(case, kv)
    for t, dtype in zip(case.tokens, (torch.float32, torch.bfloat16, torch.float16), strict=True):
        chosen = [x.to(dtype) for x in (t.query, t.key, t.value)]
        tokens = dataclasses.replace(t, query=chosen[0], key=chosen[1], value=chosen[2])
        by_reference = reference_attend(case, cache, tokens)
        assert_close(cache.attend(*chosen), to_numpy(by_reference), case.magnitude())


# Doors and mistakes.


def good(kv: str, dtype: str = "float32", dense: bool = False) -> tuple[list[Tensor], dict[str, object]]:
    """Arguments of attention by position and by name: batch 2, 2 kv heads, 4 heads, 3 new tokens after 20, and exact
    rows."""
    calls = (Call(20), Call(3, (0, 2), dense))
    case = Case("", ((0, FULL, False), (4, 6, True)), calls, batch=2, group=2, head_dim=8, dtype=dtype, page_size=16)
    cache, (first, last) = cache_of(case, kv, exact_sink=1, exact_window=5), case.tokens
    cache.append(first.key, first.value)
    cache._take_pages(cache.seen + 3)
    tensors = [t.nan_to_num().contiguous() for t in (last.query, last.key, last.value)]
    options = {"pad": last.pad, "scale": 0.3, "dense": dense}
    return [*tensors, *cache._tensors()], options | cache._exact_rows(last.key)


@both
@pytest.mark.parametrize("op", ["attention", "append"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_opcheck(kv: str, op: str, dtype: str) -> None:
    arguments, options = good(kv, dtype)
    if op == "append":
        arguments, options = arguments[1:], stored_with(options)
    torch.library.opcheck(getattr(torch.ops.razor, op).default, tuple(arguments), options)


@both
def test_compiled_is_eager(kv: str) -> None:
    def layer(query: Tensor, key: Tensor, value: Tensor, *cache: Tensor) -> Tensor:
        out = ops.attention(query * 2, key, value, *cache)
        ops.append(key, value, *cache)
        return out + 1

    torch._dynamo.reset()
    mine, theirs = (good(kv)[0] for _ in range(2))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*mine), layer(*theirs))
    assert all(same_bits(a, b) for a, b in zip(mine, theirs, strict=True))
    assert int(mine[6][0]) == 23


@both
def test_numpy_module_is_the_same(kv: str) -> None:
    arguments, options = good(kv, "float16")
    arrays = [raw(t.clone()) for t in arguments]
    in_numpy = options | {"pad": options["pad"].numpy(), "exact": raw(options["exact"].clone())}
    by_numpy = _core.attention(*arrays, **in_numpy)
    assert by_numpy.tobytes() == raw(ops.attention(*arguments, **options)).tobytes()
    ops.append(*arguments[1:], **stored_with(options))
    _core.append(*arrays[1:], **stored_with(in_numpy))
    arguments.append(options["exact"]), arrays.append(in_numpy["exact"])
    assert all(raw(t).tobytes() == a.tobytes() for t, a in zip(arguments, arrays, strict=True))


@both
def test_reference_door(kv: str) -> None:
    """What devices without kernels run."""
    arguments, options = good(kv)
    theirs, my_exact = [t.clone() for t in arguments], options["exact"].clone()
    assert_close(ops._attention_reference(*theirs, **options), to_numpy(ops.attention(*arguments, **options)), 5.0)
    ops._append_reference(*theirs[1:], **stored_with(options))
    ops.append(*arguments[1:], **stored_with(options | {"exact": my_exact}))
    assert torch.equal(my_exact, options["exact"])
    assert all(torch.equal(a, b) for a, b in zip(arguments[:10], theirs[:10], strict=True))


def stored_with(options: dict[str, object]) -> dict[str, object]:
    """Those of append."""
    return {name: options[name] for name in ("pad", "exact", "exact_sink")}


MISTAKES = [
    ("int8", 3, lambda t: t[..., :11], "key_pages: expected shape [any, any, 12], got [{n}, 16, 11]"),
    ("int4", 3, lambda t: t[..., :5], "key_pages: expected shape [any, any, 6], got [{n}, 16, 5]"),
    ("int8", 3, lambda t: t.short(), "key_pages: expected dtype float32 like key, int8 or uint8, got another dtype"),
    ("int8", 3, lambda t: t.half(), "key_pages: expected dtype float32 like key, int8 or uint8, got float16"),
    ("int8", 4, lambda t: t.view(torch.uint8), "value_pages: expected dtype int8 like key_pages, got uint8"),
    ("int4", 4, lambda t: t.float(), "value_pages: expected dtype uint8 like key_pages, got float32"),
    ("int4", 4, lambda t: t[1:], "value_pages: expected shape [{n}, 16, 6], got [{less}, 16, 6]"),
    ("int8", "exact", lambda t: t.half(), "exact: expected dtype float32 like key, got float16"),
    ("int4", "exact", lambda t: t[:1], "exact: expected shape [2, 4, any, 8], got [1, 4, 6, 8]"),
    ("int8", "exact", lambda t: t[:, 1:], "exact: expected shape [2, 4, any, 8], got [2, 3, 6, 8]"),
    ("int8", "exact_sink", lambda _: 7, "exact_sink: expected a value from 0 to 6, got 7"),
    ("int8", "exact_sink", lambda _: -1, "exact_sink: expected a value from 0 to 6, got -1"),
    ("int8", "exact", lambda _: None, "exact_sink: expected a value from 0 to 0, got 1"),
]


@pytest.mark.parametrize("door", ["torch", "numpy", "meta", "reference"])
@pytest.mark.parametrize(("kv", "index", "change", "message"), MISTAKES, ids=[m[3] for m in MISTAKES])
def test_mistake(door: str, kv: str, index: int | str, change, message: str) -> None:
    arguments, options = good(kv)
    message = message.format(n=len(arguments[3]), less=len(arguments[3]) - 1)
    held = options if isinstance(index, str) else arguments
    held[index] = change(held[index])
    call = {"torch": ops.attention, "numpy": _core.attention, "meta": ops.attention,
            "reference": ops._attention_reference}[door]  # fmt: skip
    if door in ("numpy", "meta"):
        convert = Tensor.numpy if door == "numpy" else lambda t: t.to("meta")
        arguments = [convert(t) for t in arguments]
        options = {name: convert(x) if isinstance(x, Tensor) else x for name, x in options.items()}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call(*arguments, **options)


@pytest.mark.parametrize("dtype", ["int2", torch.uint8, torch.int16, torch.float64, 8, None])
def test_formats_that_are_not(dtype: object) -> None:
    message = f"dtype: expected float32, bfloat16, float16, int8 or 'int4', got {dtype!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        LayerCache([4], [8], [True], batch_size=1, head_dim=8, dtype=dtype)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Plan.full(1, 1).kv_bytes(1, head_dim=8, dtype=dtype)


def test_float64_stays_with_the_reference() -> None:
    """Which decodes exactly: a cache of int8 read in float64."""
    arguments, options = good("int8")
    out = reference.attention(*wide(arguments[:3]), *arguments[3:], **options)
    assert out.dtype == torch.float64
    assert_close(ops.attention(*arguments, **options), to_numpy(out), 5.0)


def test_exact_rows_want_codes_beside_them() -> None:
    for name in ("exact_sink", "exact_window"):
        with pytest.raises(ValueError, match=f"^{name}: expected an integer <= 0, got 4$"):
            LayerCache([4], [8], [True], batch_size=1, head_dim=8, dtype=torch.float32, **{name: 4})
    cache = LayerCache([4], [8], [True], batch_size=1, head_dim=8, dtype=torch.float32)
    cache._take_pages(torch.tensor([5]))
    rows, message = torch.zeros(1, 1, 5, 8), "exact: expected quantised key_pages beside it, got float32"
    for call in (ops.append, ops._append_reference):
        with pytest.raises(ValueError, match=f"^{message}$"):
            call(rows, rows, *cache._tensors(), exact=torch.zeros(2, 1, 4, 8))
