# SPDX-License-Identifier: Apache-2.0
"""The cache: ring arithmetic, the append op, and LayerCache with its pages."""

import dataclasses
import re
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import oracle
from cases import (
    DTYPES,
    FULL,
    Call,
    Case,
    before_last_call,
    head_policies,
    random_cases,
    raw,
    same_bits,
    steps,
    to_numpy,
)
from razor_attention import LayerCache, Plan, _core, ops, reference

POLICY = ((0, FULL, False), (4, 24, True), (0, 9, False), (5, 0, True))


def unchanged(cache: tuple[Tensor, ...], before: tuple[Tensor, ...]) -> bool:
    return all(same_bits(a, b) for a, b in zip(cache, before, strict=True))


def clone(cache: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.clone() for t in cache)


def rows_in_use(cache: tuple[Tensor, ...], b: int, h: int) -> dict[int, tuple[Tensor, Tensor]]:
    """{token: (key, value)} of one (sequence, kv head)."""
    key_pages, value_pages, page_table, seen, sink, window = cache[:6]
    found = {}
    for row, token in oracle.cache_rows(int(seen[b]), int(sink[h]), int(window[h])).items():
        page, offset = int(page_table[b * len(sink) + h, row // key_pages.shape[1]]), row % key_pages.shape[1]
        found[token] = (key_pages[page, offset], value_pages[page, offset])
    return found


def assert_holds(cache: tuple[Tensor, ...], case: Case) -> None:
    """The cache holds, bit for bit, the tokens that the oracle says are kept, and the sums of the others."""
    for b in range(case.batch):
        keys, values = case.history("key", b), case.history("value", b)
        assert int(cache[3][b]) == keys.shape[1]
        for h, (sink, window, compensate) in enumerate(case.policy):
            for token, (key, value) in rows_in_use(cache, b, h).items():
                assert np.array_equal(to_numpy(key), keys[h, token])
                assert np.array_equal(to_numpy(value), values[h, token])
            for total, history in zip(cache[7:], (keys, values), strict=True):
                row = to_numpy(total[b * len(case.policy) + h])
                if compensate:
                    assert_sums(row, oracle.dropped_sum(history[h], sink, window), np.abs(history[h]).sum(axis=0))
                else:
                    assert not row.any()


def assert_sums(actual: np.ndarray, expected: np.ndarray, of_magnitudes: np.ndarray) -> None:
    """float32 sums: every addition may be off by 2^-24 of the running sum, which is at most the sum of magnitudes; in
    random order the errors cancel to about the square root of that."""
    assert (np.abs(actual - expected) <= 2.0**-24 * 8 * of_magnitudes + 1e-30).all()


# Ring arithmetic.


@given(seen=st.integers(0, 300), sink=st.integers(0, 60), window=st.integers(0, 90) | st.just(FULL))
def test_kept_and_dropped_are_all(seen: int, sink: int, window: int) -> None:
    kept, dropped = reference.kept_tokens(seen, sink, window), oracle.dropped_tokens(seen, sink, window)
    assert sorted(kept + dropped) == list(range(seen))
    assert len(dropped) == max(0, seen - sink - window)
    rows = {reference.row_of_token(t, sink, window): t for t in kept}
    assert sorted(rows) == list(range(min(seen, sink + window)))  # no gap, no row twice
    assert rows == oracle.cache_rows(seen, sink, window)
    assert all(t == r if r < sink else t == seen - 1 - (seen - 1 - r) % window for r, t in rows.items() if sink == 0)
    assert all(row == token for row, token in rows.items() if row < sink)


# The append op.


@given(random_cases())
def test_append_stores_what_the_reference_stores(case: Case) -> None:
    cache, case = before_last_call(case)
    other, last = clone(cache), case.tokens[-1]
    ops.append(last.key, last.value, *cache, pad=last.pad)
    reference.append(last.key, last.value, *other, pad=last.pad)
    assert unchanged(cache[:7], other[:7]), "pages, page table, seen or policy differ"
    assert_holds(cache, case)
    assert_holds(other, case)


@given(random_cases())
def test_append_in_any_chunks(case: Case) -> None:
    cache = case.cache()
    for tokens in case.tokens:
        cache.append(tokens.key, tokens.value, pad=tokens.pad)
    assert_holds(cache._tensors(), case)


@given(random_cases())
def test_mean_of_the_dropped_tokens(case: Case) -> None:
    cache = case.cache()
    case.run(cache)
    for b in range(case.batch):
        history, seen = case.history("value", b), int(cache.seen[b])
        for h, (sink, window, compensate) in enumerate(case.policy):
            gone = oracle.dropped_tokens(seen, sink, window)
            if compensate and gone:
                mean = to_numpy(cache.value_sum[b * len(case.policy) + h]) / len(gone)
                assert np.allclose(mean, history[h, gone].mean(axis=0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", ["transposed", "fused"])
def test_append_takes_strides(layout: str) -> None:
    case = Case("", POLICY, (Call(30), Call(20, (3, 0))), batch=2, head_dim=20, layout=layout, dtype="bfloat16")
    cache, case = before_last_call(case)
    assert not case.tokens[-1].key.is_contiguous()
    ops.append(case.tokens[-1].key, case.tokens[-1].value, *cache, pad=case.tokens[-1].pad)
    assert_holds(cache, case)


def test_append_of_nothing_changes_nothing() -> None:
    cache, case = before_last_call(Case("", POLICY, (Call(30), Call(7, (7, 7))), batch=2))
    before, last = clone(cache), case.tokens[-1]
    ops.append(last.key, last.value, *cache, pad=last.pad)
    ops.append(last.key[:, :, :0], last.value[:, :, :0], *cache)
    assert unchanged(cache, before)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_matter(threads: int) -> None:
    cache, case = before_last_call(Case("", POLICY * 3, steps(100, 90), batch=2))
    alone, last = clone(cache), case.tokens[-1]
    ops.append(last.key, last.value, *alone)
    torch.set_num_threads(threads)
    ops.append(last.key, last.value, *cache)
    assert unchanged(cache, alone)


def spoil(cache: tuple[Tensor, ...], last: dict[str, Tensor], how: str) -> tuple[Tensor, ...]:
    """One mistake in the last (sequence, kv head), so that everything before it looks right."""
    key_pages, value_pages, page_table, seen, sink, window, compensate, key_sum, value_sum = cache
    if how == "page_table too narrow":
        page_table = page_table[:, :3].contiguous()  # enough for what is stored
    elif how == "page id too large":
        page_table[-4, 1] = len(key_pages)
    elif how == "page id negative":
        page_table[-4, 3] = -1  # of a page for new tokens
    elif how == "pad too large":
        last["pad"] = torch.tensor([0, 57])
    elif how == "pad negative":
        last["pad"] = torch.tensor([0, -1])
    elif how == "seen negative":
        seen[-1] = -1
    elif how == "window negative":
        window[-1] = -1
    elif how == "sink negative":
        sink[-1] = -1
    elif how == "dtype":
        last["value"] = last["value"].half()
    elif how == "shape":
        last["value"] = last["value"][:, :, 1:]
    elif how == "sums":
        value_sum = value_sum.double()
    return key_pages, value_pages, page_table, seen, sink, window, compensate, key_sum, value_sum


MISTAKES = ("page_table too narrow", "page id too large", "page id negative", "pad too large", "pad negative",
            "seen negative", "window negative", "sink negative", "dtype", "shape", "sums")  # fmt: skip


@pytest.mark.parametrize("how", MISTAKES)
def test_a_failed_append_changes_nothing(how: str) -> None:
    cache, case = before_last_call(Case("", POLICY, steps(40, 20), batch=2, page_size=16))
    last = {"key": case.tokens[-1].key, "value": case.tokens[-1].value, "pad": None}
    cache = spoil(cache, last, how)
    before = clone(cache)
    with pytest.raises(ValueError, match="expected"):
        ops.append(last["key"], last["value"], *cache, pad=last["pad"])
    assert unchanged(cache, before)


# The numpy module.


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_numpy_module_is_the_same(dtype: str) -> None:
    case = Case("", POLICY, (Call(40), Call(21, (0, 5))), batch=2, dtype=dtype, group=2, head_dim=20, alibi=True)
    cache, case = before_last_call(case)
    last = case.tokens[-1]
    arguments = clone((last.query, last.key, last.value, *cache, case.slopes, last.pad))
    arrays = [raw(t) for t in arguments]
    if dtype == "bfloat16":
        bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
        arrays = [a.view(bfloat16) if t.dtype == torch.bfloat16 else a for a, t in zip(arrays, arguments, strict=True)]
    q, k, v, *pages, slopes, pad = arrays
    options = {"scale": case.scaled_by, "dense": True}
    out = ops.attention(last.query, last.key, last.value, *cache, alibi_slopes=case.slopes, pad=last.pad, **options)
    by_numpy = _core.attention(q, k, v, *pages, alibi_slopes=slopes, pad=pad, **options)
    assert by_numpy.tobytes() == raw(out).tobytes()
    assert (by_numpy.shape, by_numpy.dtype) == (out.shape, q.dtype)
    ops.append(last.key, last.value, *cache, pad=last.pad)
    _core.append(k, v, *pages, pad=pad)
    for tensor, array in zip(cache, pages, strict=True):
        assert raw(tensor).tobytes() == array.tobytes()


# LayerCache.


@given(
    policy=st.lists(head_policies, min_size=1, max_size=4),
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=6),
    batch=st.integers(1, 3),
    dtype=st.sampled_from(sorted(DTYPES)),
    page_size=st.sampled_from([16, 64]),
)
def test_nbytes_is_what_the_plan_says(
    policy: list[tuple[int, int, bool]], lengths: list[int], batch: int, dtype: str, page_size: int
) -> None:
    policy = [(sinks, max(window, 1), mean) for sinks, window, mean in policy]  # a plan has no window of nothing
    case = Case("", tuple(policy), steps(*lengths), batch=batch, head_dim=8, dtype=dtype, page_size=page_size)
    cache, seen = case.cache(), 0
    plan = Plan(*([list(column)] for column in zip(*policy, strict=True)))
    shape = {"head_dim": 8, "dtype": DTYPES[dtype], "batch_size": batch, "page_size": page_size}
    for tokens in case.tokens:
        cache.append(tokens.key, tokens.value)
        seen += tokens.key.shape[2]
        assert cache.nbytes == plan.kv_bytes(seen, **shape)
        assert cache.nbytes == by_hand(policy, seen, batch, page_size, cache)
        assert pages_in_use(cache) + len(cache._pool.free_pages) == len(cache.key_pages) == len(cache.value_pages)


GOOD = {"sink_size": [4, 4], "window_size": [8, 8], "compensate": [True, False], "batch_size": 1, "head_dim": 8,
        "dtype": torch.float32}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"page_size": 20}, "page_size: expected a multiple of 16, got 20"),
        ({"page_size": 0}, "page_size: expected an integer >= 16, got 0"),
        ({"batch_size": 0}, "batch_size: expected an integer >= 1, got 0"),
        ({"head_dim": -1}, "head_dim: expected an integer >= 1, got -1"),
        ({"dtype": torch.int16}, "dtype: expected float32, bfloat16, float16, int8 or 'int4', got torch.int16"),
        ({"window_size": [8]}, "window_size: expected 2 kv heads like sink_size, got 1"),
        ({"compensate": [[True, True]]}, "compensate: expected a list [heads] of bools, got shape [1, 2]"),
        ({"sink_size": [4, -2]}, "sink_size: expected 0..2147483647 tokens, got [4, -2]"),
    ],
)
def test_constructor_refuses(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        LayerCache(**GOOD | change)


def by_hand(policy: list[tuple[int, int, bool]], seen: int, batch: int, page_size: int, cache: LayerCache) -> int:
    pages = sum(-(-len(oracle.cache_rows(seen, s, w)) // page_size) for s, w, _ in policy)
    sums = sum(c and w != FULL for _, w, c in policy)
    return 2 * batch * 8 * (pages * page_size * cache.key_pages.element_size() + sums * 4)


def pages_in_use(cache: LayerCache) -> int:
    """Counted in the page table; the pool says of every page how often it is there, and it is free if nowhere."""
    used: Counter[int] = Counter()
    for b in range(cache.batch_size):
        for h in range(len(cache.sink_size)):
            rows = len(oracle.cache_rows(int(cache.seen[b]), int(cache.sink_size[h]), int(cache.window_size[h])))
            used.update(cache.page_table[b * len(cache.sink_size) + h, : -(-rows // cache.page_size)].tolist())
    assert sorted([*used, *cache._pool.free_pages]) == list(range(len(cache.key_pages)))
    assert cache._pool.owners(np.arange(len(cache.key_pages))).tolist() == [
        used[p] for p in range(len(cache.key_pages))
    ]
    assert cache._pool.shared == sum(count > 1 for count in used.values())
    assert cache._pool.used == len(used)
    return len(used)


@given(case=random_cases(), data=st.data())
def test_reorder_then_go_on(case: Case, data: st.DataObject) -> None:
    """Like a cache that always held those sequences: same bits stored, same outputs, no page lost."""
    index = data.draw(st.lists(st.integers(0, case.batch - 1), min_size=1, max_size=4))
    cut = data.draw(st.integers(0, len(case.calls)))
    cache, other = case.cache(), dataclasses.replace(case, batch=len(index)).cache()
    for i, tokens in enumerate(case.tokens):
        if i == cut:
            cache.reorder(torch.tensor(index))
            assert cache.batch_size == len(index)
            pages_in_use(cache)
        chosen = [t[index] for t in (tokens.query, tokens.key, tokens.value)]
        mine = chosen if i >= cut else (tokens.query, tokens.key, tokens.value)
        pad = None if tokens.pad is None else tokens.pad[index]
        out = cache.attend(*mine, pad=pad if i >= cut else tokens.pad, dense=tokens.dense)
        expected = other.attend(*chosen, pad=pad, dense=tokens.dense)
        assert torch.equal(out if i >= cut else out[index], expected)
    if cut < len(case.calls):
        assert torch.equal(cache.seen, other.seen)
        assert torch.equal(cache.key_sum, other.key_sum)
        assert cache.nbytes == other.nbytes
        pages_in_use(cache)


def test_reorder_gives_pages_back() -> None:
    case = Case("", POLICY, steps(100), batch=4, page_size=16)
    cache = case.cache()
    case.run(cache)
    pool, whole = len(cache.key_pages), cache.nbytes
    cache.reorder(torch.tensor([2]))
    assert cache.nbytes * 4 == whole
    assert pages_in_use(cache) + len(cache._pool.free_pages) == pool
    cache.reorder(torch.tensor([0, 0, 0, 0]))  # back to four, all on the same pages
    assert len(cache.key_pages) == pool
    assert cache.nbytes == whole == 4 * cache.pool_nbytes - 3 * 4 * 2 * 2 * 64 * 4  # each has its sums
    cache.reorder(torch.tensor([3, 1, 0, 2]))
    assert len(cache.key_pages) == pool
    assert pages_in_use(cache) == pool // 4
    for tokens in case.tokens:  # all are sequence 2 now
        for part in (tokens.key, tokens.value):
            part.copy_(part[2].expand_as(part))
    assert_holds(cache._tensors(), case)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([0, 3], "index: expected values from 0 to 2, got 3"),
        ([-1], "index: expected values from 0 to 2, got -1"),
        ([], r"index: expected shape \[new_batch\], got \[0\]"),
        ([[0, 1]], r"index: expected shape \[new_batch\], got \[1, 2\]"),
    ],
)
def test_reorder_refuses(index: list[int], message: str) -> None:
    case = Case("", POLICY, steps(30), batch=3)
    cache = case.cache()
    case.run(cache)
    with pytest.raises(ValueError, match=f"^{message}$"):
        cache.reorder(torch.tensor(index, dtype=torch.int64))
    assert_holds(cache._tensors(), case)


def test_reset_gives_everything_back() -> None:
    case = Case("", POLICY, steps(70, 1, 1), batch=2, group=2)
    cache = case.cache()
    first = case.run(cache)
    cache.reset()
    assert cache.seen.tolist() == [0, 0]
    assert len(cache.key_pages) == 0
    assert cache.nbytes == 2 * 2 * 2 * 64 * 4  # the sums of two heads that compensate
    assert all(torch.equal(a, b) for a, b in zip(first, case.run(cache), strict=True))


def test_the_pool_grows_and_keeps_what_it_holds() -> None:
    case = Case("", POLICY, steps(*[9] * 60), page_size=16, head_dim=8)
    cache, sizes = case.cache(), []
    for tokens in case.tokens:
        cache.append(tokens.key, tokens.value)
        sizes.append(len(cache.key_pages))
    assert_holds(cache._tensors(), case)
    assert len(set(sizes)) > 5
    assert sizes == sorted(sizes)
    assert sizes[-1] <= 1.25 * pages_in_use(cache) + 1


@pytest.mark.parametrize("how", ["shape", "dtype", "pad too large", "pad negative", "pad of the wrong length"])
def test_a_failed_append_or_attend_leaves_the_layer_as_it_was(how: str) -> None:
    case = Case("", POLICY, steps(40, 40), batch=2, page_size=16)
    cache, (first, last) = case.cache(), case.tokens
    cache.append(first.key, first.value)
    bad = {"value": last.value, "pad": None}
    spoil(cache._tensors(), bad, how)
    if how == "pad of the wrong length":
        bad["pad"] = torch.tensor([1])
    for _ in range(3):
        with pytest.raises(ValueError, match="expected"):
            cache.attend(last.query, last.key, bad["value"], pad=bad["pad"])
        with pytest.raises(ValueError, match="expected"):
            cache.append(last.key, bad["value"], pad=bad["pad"])
    assert pages_in_use(cache) + len(cache._pool.free_pages) == len(cache.key_pages)
    cache.append(last.key, last.value)
    assert_holds(cache._tensors(), case)


def test_the_pages_of_a_prompt_are_neighbours() -> None:
    """Reading goes on from page to page in memory; while nobody enters a page, the table is left alone."""
    case = Case("", ((0, FULL, False), (4, 24, True)), steps(100, 1, 1), batch=2, page_size=16)
    cache = case.cache()
    cache.append(case.tokens[0].key, case.tokens[0].value)
    for row, pages in zip(cache.page_table.tolist(), cache._pages(cache.seen).tolist(), strict=True):
        assert row[:pages] == list(range(row[0], row[0] + pages))
    table, free = cache.page_table, cache._pool.free_pages
    for tokens in case.tokens[1:]:
        cache.append(tokens.key, tokens.value)
    assert cache.page_table is table
    assert cache._pool.free_pages == free


def test_a_pad_beyond_what_is_stored_takes_no_pages() -> None:
    case = Case("", ((0, FULL, False),), steps(40, 60), batch=2, page_size=16)
    cache, (first, last) = case.cache(), case.tokens
    cache.append(first.key, first.value)
    with pytest.raises(ValueError, match=r"^pad: expected values from 0 to 60, got 77 for sequence 1$"):
        cache.append(last.key, last.value, pad=torch.tensor([0, 77]))
    assert pages_in_use(cache) + len(cache._pool.free_pages) == len(cache.key_pages)
