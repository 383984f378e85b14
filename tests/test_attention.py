# SPDX-License-Identifier: Apache-2.0
"""The attention op: against the oracle and the reference, and everything that must not change its result."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import oracle
from cases import (
    CASES,
    FULL,
    Call,
    Case,
    assert_agree,
    assert_close,
    before_last_call,
    build_cache,
    case_id,
    random_cases,
    reference_attend,
    same_bits,
    steps,
    to_numpy,
)
from razor_attention import LayerCache, ops

MIXED = ((0, FULL, False), (4, 24, True), (0, 9, False), (5, 0, True))


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def recut(case: Case, lengths: list[int], **changes: object) -> Case:
    """The same tokens in other chunks; for cases without padding."""
    other = dataclasses.replace(case, calls=steps(*lengths), **changes)
    whole = [torch.cat([getattr(t, name) for t in case.tokens], dim=2) for name in ("query", "key", "value")]
    for tokens, *parts in zip(other.tokens, *(t.split(lengths, dim=2) for t in whole), strict=True):
        for old, new in zip((tokens.query, tokens.key, tokens.value), parts, strict=True):
            old.copy_(new)
    return other


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_case(case: Case) -> None:
    cache = case.cache()
    for tokens, by_oracle in zip(case.tokens, case.expected(), strict=True):
        by_reference = reference_attend(case, cache, tokens)
        out = cache.attend(tokens.query, tokens.key, tokens.value, scale=case.scale, pad=tokens.pad, dense=tokens.dense)
        assert out.is_contiguous()
        assert out.dtype == tokens.query.dtype
        assert_close(out, by_oracle, case.magnitude())
        assert_close(out, to_numpy(by_reference), case.magnitude())


@given(random_cases())
def test_any_plan_in_any_chunks(case: Case) -> None:
    test_case(case)


@given(random_cases())
def test_unused_rows_and_pages_are_not_read(case: Case) -> None:
    """The last call, on a cache made by hand: NaN in every free row, INT32_MAX in every free page id."""
    cache, case = before_last_call(case)
    last = case.tokens[-1]
    before = [t.clone() for t in cache]
    options = {"alibi_slopes": case.slopes, "pad": last.pad, "scale": case.scaled_by, "dense": last.dense}
    out = ops.attention(last.query, last.key, last.value, *cache, **options)
    assert_close(out, case.expected()[-1], case.magnitude())
    assert all(same_bits(a, b) for a, b in zip(cache, before, strict=True)), "attention wrote to the cache"


@given(case=random_cases(), data=st.data())
def test_chunks_do_not_matter(case: Case, data: st.DataObject) -> None:
    case = dataclasses.replace(case, calls=tuple(Call(c.q_len) for c in case.calls))
    left, lengths = sum(c.q_len for c in case.calls), []
    while left:
        lengths.append(data.draw(st.integers(1, left)))
        left -= lengths[-1]
    a, b = (torch.cat(c.run(), dim=2) for c in (case, recut(case, lengths)))
    assert_agree(a, b, case.magnitude())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_page_size_does_not_matter(dtype: str) -> None:
    case = Case("", MIXED, steps(70, 1, 20, 1), dtype=dtype, group=2, head_dim=24)
    small, *others = (torch.cat(case.run(case.cache(page_size=size)), dim=2) for size in (16, 48, 64, 256))
    for other in others:
        assert_agree(other, small, case.magnitude())


def test_other_sequences_do_not_matter() -> None:
    case = Case("", MIXED, (Call(40, (0, 7, 40)), Call(1), Call(33, (2, 0, 0)), Call(1)), batch=3, group=3, head_dim=20)
    together = case.run()
    for b in range(case.batch):
        alone = dataclasses.replace(case, batch=1).cache()
        for tokens, out in zip(case.tokens, together, strict=True):
            one = [t[b : b + 1] for t in (tokens.query, tokens.key, tokens.value)]
            pad = None if tokens.pad is None else tokens.pad[b : b + 1]
            assert torch.equal(alone.attend(*one, pad=pad)[0], out[b])


@pytest.mark.parametrize("dense", [False, True])
def test_padding_does_not_matter(dense: bool) -> None:
    bare = Case("", MIXED, (Call(30, dense=dense), Call(1), Call(20, dense=dense)), group=2)
    padded, cache = bare.cache(), bare.cache()
    for pad, t in zip((5, 3, 0), bare.tokens, strict=True):
        q, k, v = (torch.nn.functional.pad(x, (0, 0, pad, 0), value=math.nan) for x in (t.query, t.key, t.value))
        out = padded.attend(q, k, v, pad=torch.tensor([pad]), dense=dense)
        assert not out[:, :, :pad].any()
        assert_agree(out[:, :, pad:], cache.attend(t.query, t.key, t.value, dense=dense), bare.magnitude())
    assert torch.equal(padded.seen, cache.seen)


@pytest.mark.parametrize("case", [c for c in CASES if sum(k.q_len for k in c.calls) > 60], ids=case_id)
def test_threads_do_not_matter(case: Case) -> None:
    alone = case.run()
    torch.set_num_threads(2)
    assert all(torch.equal(a, b) for a, b in zip(alone, case.run(), strict=True))


@pytest.mark.parametrize("layout", ["transposed", "fused"])
def test_strides_do_not_matter(layout: str) -> None:
    case = Case("", MIXED, steps(40, 1), group=2, batch=2, head_dim=20)
    other = dataclasses.replace(case, layout=layout)
    assert not other.tokens[0].key.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(case.run(), other.run(), strict=True))


def test_a_sequence_given_twice_by_a_stride_of_zero() -> None:
    one, two = Case("", MIXED, steps(20)), Case("", MIXED, steps(20), batch=2)
    qkv = [t.expand(2, -1, -1, -1) for t in (one.tokens[0].query, one.tokens[0].key, one.tokens[0].value)]
    out = two.cache().attend(*qkv)
    assert torch.equal(out[0], one.run()[0][0])
    assert torch.equal(out[1], out[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("lengths", [(1,), (16,), (17,), (130,), (64, 66), (100, *[1] * 5)])
def test_full_plan_is_plain_attention(dtype: str, lengths: tuple[int, ...]) -> None:
    case = Case("", ((0, FULL, False),) * 2, steps(*lengths), batch=2, group=3, head_dim=40, dtype=dtype)
    q, k, v = (torch.cat([getattr(t, n) for t in case.tokens], dim=2).double() for n in ("query", "key", "value"))
    expected = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert_close(torch.cat(case.run(), dim=2), to_numpy(expected), case.magnitude())


@pytest.mark.parametrize("policy", [(0, 90, True), (7, 83, True), (40, 90, False), (90, 0, True), (0, 2**31 - 2, True),
                                    (2**31 - 1, 2**31 - 1, True), (3, FULL, True)])  # fmt: skip
def test_window_as_long_as_the_text_is_full(policy: tuple[int, int, bool]) -> None:
    full = Case("", ((0, FULL, False),), steps(60, 29, 1), group=2)
    out, expected = (torch.cat(c.run(), dim=2) for c in (dataclasses.replace(full, policy=(policy,)), full))
    assert_agree(out, expected, full.magnitude())


@pytest.mark.parametrize("q_len", [1, 5, 40])
def test_a_query_that_sees_nothing_gives_zeros(q_len: int) -> None:
    case = Case("", ((0, 0, False), (2, 0, False)), steps(q_len, 1), dtype="float16", group=2)
    for out in case.run():
        assert not out[:, :2].any()
        assert out[:, 2:].any(-1).all()


def test_window_slides_in_decode() -> None:
    """Hundreds of single tokens through a small ring: the last outputs by hand, the compensation row included."""
    sink, window, tokens = 3, 11, 300
    cache = LayerCache([sink], [window], [True], batch_size=1, head_dim=16, dtype=torch.float32, page_size=16)
    q, k, v = random(1, 2, tokens, 16), random(1, 1, tokens, 16), random(1, 1, tokens, 16)
    for p in range(tokens):
        out = cache.attend(q[:, :, p : p + 1], k[:, :, p : p + 1], v[:, :, p : p + 1])
        if p < sink + window:
            continue
        rows = [
            torch.cat([x[0, 0, :sink], x[0, 0, p + 1 - window : p + 1], x[0, 0, sink : p + 1 - window].mean(0)[None]])
            for x in (k.double(), v.double())
        ]
        logits = q[0, :, p].double() @ rows[0].T / 4
        logits[:, -1] += math.log(p + 1 - window - sink)
        assert_close(out[0, :, 0], to_numpy(logits.softmax(-1) @ rows[1]), 5.0)
    assert cache.nbytes == 2 * (16 * 16 * 4 + 16 * 4)  # one page and the sums, whatever has been seen


def test_compensation_row_weighs_as_much_as_the_tokens_it_stands_for() -> None:
    """Equal keys: with compensation a compressed head is exact."""
    case = Case("", ((2, 5, True), (0, FULL, False)), steps(50, 1, 1))
    for tokens in case.tokens:
        tokens.key.copy_(tokens.key[:, :1, :1].clone() if tokens is case.tokens[0] else case.tokens[0].key[:, :1, :1])
        tokens.value[:, 0] = tokens.value[:, 1]
        tokens.query[:, 0] = tokens.query[:, 1]
    for out in case.run():
        assert_agree(out[:, 0], out[:, 1], case.magnitude())


def test_dense_then_compressed() -> None:
    """A dense prompt attends as a full head does; afterwards the cache holds what the policy says."""
    case = Case("", ((4, 8, True),), (Call(100, dense=True), Call(1)), group=2)
    full = dataclasses.replace(case, policy=((0, FULL, False),))
    sparse = dataclasses.replace(case, calls=steps(100, 1))
    assert_agree(case.run()[0], full.run()[0], case.magnitude())
    assert torch.equal(case.run()[1], sparse.run()[1])


@pytest.mark.parametrize(("past", "q_len"), [*((2600, n) for n in (1, 4, 16, 17, 64)), (4200, 20)])
@pytest.mark.parametrize("dense", [False, True])
def test_long_histories(past: int, q_len: int, dense: bool) -> None:
    """Up to 16 queries share long rows by splitting their tokens; more of them split the queries."""
    policy = ((0, FULL, False), (8, 1100, True), (1024, 1024, True), (1030, 3, False))
    keys, values = [random(4, past, 16)], [random(4, past, 16)]
    cache = build_cache(keys, values, policy, 64)
    q, k, v = random(1, 8, q_len, 16), random(1, 4, q_len, 16), random(1, 4, q_len, 16)
    out = ops.attention(q, k, v, *cache, dense=dense)
    for p in {0, q_len // 2, q_len - 1}:
        for head in range(8):
            sink, window, compensate = policy[head // 2]
            expected = oracle.attend(
                to_numpy(q[0, head, p]),
                to_numpy(torch.cat([keys[0], k[0, :, : p + 1]], 1)[head // 2]),
                to_numpy(torch.cat([values[0], v[0, :, : p + 1]], 1)[head // 2]),
                oracle.read_exactly(past + p, sink, window, past if dense else None),
                compensate=compensate,
                slope=0.0,
                scale=0.25,
            )
            assert_close(out[0, head, p], expected, 5.0)


@pytest.mark.parametrize("heavy_at", [0, 1500, 2999])
@pytest.mark.parametrize("q_len", [1, 40])
def test_one_heavy_row_does_not_swallow_the_others(heavy_at: int, q_len: int) -> None:
    """Weight 1e8 on one row and 1 on 3000 others: added one by one to a float32 sum they would all be lost."""
    tokens = 3000 + q_len
    k, v = torch.zeros(1, 1, tokens, 8), torch.zeros(1, 1, tokens, 8)
    k[:, :, heavy_at], v[:, :, heavy_at], v[..., 4:] = math.log(1e8), 1.0, 1.0
    q = torch.zeros(1, 1, tokens, 8)
    q[..., 0] = 1.0
    cache = LayerCache([0], [FULL], [False], batch_size=1, head_dim=8, dtype=torch.float32)
    cache.append(k[:, :, :3000], v[:, :, :3000])
    out = cache.attend(*(x[:, :, 3000:] for x in (q, k, v)), scale=1.0)
    heavy, others = math.exp(float(k[0, 0, heavy_at, 0])), np.arange(3000, tokens)[:, None]
    expected = np.ones((q_len, 8))
    expected[:, :4] = heavy / (heavy + others)
    assert_close(out[0, 0], expected, 1.0)


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_logits_too_large_for_exp(scale: float) -> None:
    case = Case("", ((0, FULL, False), (3, 20, False)), steps(60, 1), scale=scale)
    for out, expected in zip(case.run(), case.expected(), strict=True):
        assert_close(out, expected, case.magnitude(), arithmetic=1e-2)  # logits of 1e5 +- 1e-2


@pytest.mark.parametrize("group", [1, 3, 4, 5, 16, 19])
@pytest.mark.parametrize("past", [0, 5, 8, 31, 64, pytest.param(1100, marks=pytest.mark.slow)])
def test_a_few_queries_of_any_group(group: int, past: int) -> None:
    """Tiles of 4 and of 16 query rows, runs of any length; a heavy value must not cost the others their digits."""
    few_queries = Case(
        "", ((0, FULL, False), (3, 40, True)), steps(past, 1, 3), group=group, dtype="bfloat16", head_dim=96
    )
    for tokens in few_queries.tokens:
        tokens.value[..., ::7] *= 0.01
    for out, expected in zip(few_queries.run(), few_queries.expected(), strict=True):
        assert_close(out, expected, few_queries.magnitude())


@pytest.mark.parametrize("where", ["query", "key", "value", "overflow"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nan_is_not_hidden_from_a_few_queries(where: str, dtype: str) -> None:
    case = Case("", ((0, FULL, False),), steps(50, 1), group=4, dtype=dtype)
    past, last = case.tokens
    if where == "query":
        last.query[0, 1] = math.nan
    elif where == "overflow":
        last.query[0, 1], past.key[..., :] = 3e38, 3e38
    else:
        (past.key if where == "key" else past.value)[0, 0, 20, 3] = math.nan
    out = case.run()[1][0, :, 0]
    if where == "value":
        assert out[:, 3].isnan().all()
        assert not out[:, :3].isnan().any()
    else:
        assert out[1].isnan().all()
        assert where == "overflow" or bool(out[0].isnan().any()) == (where == "key")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("q_len", [5, 40, 600])
def test_what_is_not_finite_stays_so(q_len: int, dtype: str, bad: float) -> None:
    """A bad key is seen by the queries after it, by no others."""
    case = Case("", ((0, FULL, False), (2, 30, True)), steps(q_len), group=2, head_dim=32, dtype=dtype)
    clean = case.run()[0]
    case.tokens[0].key[:, 0, 3] = bad
    out = case.run()[0]
    assert (
        out[:, :2, 3:].isnan().any(-1).all() if math.isnan(bad) else not torch.equal(out[:, :2, 3:], clean[:, :2, 3:])
    )
    assert torch.equal(out[:, :2, :3], clean[:, :2, :3])
    assert torch.equal(out[:, 2:], clean[:, 2:])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_bad_query_spoils_no_other(dtype: str) -> None:
    case = Case("", ((0, FULL, False), (2, 30, True)), steps(300), group=2, head_dim=20, dtype=dtype)
    clean = case.run()[0]
    bad = [(0, 7), (1, 299), (2, 0), (3, 150)]
    for head, token in bad:
        case.tokens[0].query[0, head, token, 3] = math.nan
    out = case.run()[0]
    for head, token in bad:
        assert out[0, head, token].isnan().all()
        out[0, head, token] = clean[0, head, token]
    assert torch.equal(out, clean)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("repelling", [20, 290])
def test_keys_that_repel_without_bound_have_no_weight(repelling: int, dtype: str) -> None:
    """Logits of -inf: a query that sees no others gives zeros."""
    case = Case("", ((0, FULL, False),), steps(300), group=2, head_dim=24, dtype=dtype)
    t, few = case.tokens[0], dataclasses.replace(case, calls=steps(300 - repelling))
    for a in (t, few.tokens[0]):
        a.query[..., 0] = 1.0
    t.key[:, :, :repelling, 0] = -math.inf
    for name in ("query", "key", "value"):
        getattr(few.tokens[0], name).copy_(getattr(t, name)[:, :, repelling:])
    out = case.run()[0]
    assert not out[:, :, :repelling].any()
    assert_agree(out[:, :, repelling:], few.run()[0], case.magnitude())


def test_queries_alone_change_nothing_that_is_stored() -> None:
    case = Case("", MIXED, steps(30))
    cache = case.cache()
    case.run(cache)
    t = Case("", MIXED, steps(4), seed=1).tokens[0]
    first = ops.attention(t.query, t.key, t.value, *cache._tensors())
    assert torch.equal(first, ops.attention(t.query, t.key, t.value, *cache._tensors()))
    assert cache.seen.tolist() == [30]
