# SPDX-License-Identifier: Apache-2.0
"""The reference against the oracle, both in float64: two independent readings of one definition."""

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

import oracle
from cases import CASES, Case, before_last_call, build_cache, case_id, random_cases, to_numpy
from razor_attention import FULL, ops, reference

EXACT = 1e-12  # float64: 2^-53 times what cases.ARITHMETIC allows float32, and room


def assert_equal(actual: Tensor, expected: np.ndarray, tolerance: float = EXACT) -> None:
    assert actual.dtype == torch.float64
    assert np.abs(to_numpy(actual) - expected).max(initial=0.0) <= tolerance


@given(random_cases(dtypes=("float64",)))
def test_attention(case: Case) -> None:
    cache, case = before_last_call(case)
    last = case.tokens[-1]
    options = {"alibi_slopes": case.slopes, "pad": last.pad, "scale": case.scaled_by, "dense": last.dense}
    out = reference.attention(last.query, last.key, last.value, *cache, **options)
    assert_equal(out, case.expected()[-1])


@given(random_cases(dtypes=("float64",)))
def test_append_then_attend(case: Case) -> None:
    """All calls, from an empty cache; the sums are rounded to float32 on their way."""
    nothing = [torch.empty(len(case.policy), 0, case.head_dim, dtype=torch.float64)] * case.batch
    room = sum(call.q_len for call in case.calls)
    cache = build_cache(nothing, nothing, case.policy, case.page_size, room=room)
    for t, expected in zip(case.tokens, case.expected(), strict=True):
        options = {"alibi_slopes": case.slopes, "pad": t.pad, "scale": case.scaled_by, "dense": t.dense}
        assert_equal(reference.attention(t.query, t.key, t.value, *cache, **options), expected, 1e-5)
        reference.append(t.key, t.value, *cache, pad=t.pad)
    for b in range(case.batch):
        for name, total in (("key", cache[7]), ("value", cache[8])):
            for h, (sink, window, compensate) in enumerate(case.policy):
                by_oracle = oracle.dropped_sum(case.history(name, b)[h], sink, window) if compensate else 0.0
                assert np.allclose(to_numpy(total[b * len(case.policy) + h]), by_oracle, rtol=0, atol=1e-5)


@pytest.mark.parametrize("period", [1, 2, 7, 30])
@pytest.mark.parametrize("repeats", [2, 3])
def test_head_scores(period: int, repeats: int) -> None:
    shape = (1 + period * repeats, 12)
    q, k = torch.randn(2, 6, *shape, dtype=torch.float64), torch.randn(2, 2, *shape, dtype=torch.float64)
    for b in range(2):
        for h in range(6):
            by_oracle = oracle.head_scores(to_numpy(q[b, h]), to_numpy(k[b, h // 3]), period, scale=0.7)
            by_reference = [float(s[b, h]) for s in reference.head_scores(q, k, period, scale=0.7)]
            assert np.allclose(by_reference, by_oracle, rtol=2**-23, atol=0)  # returned as float32


@pytest.mark.parametrize("policy", [(3, 10, True), (0, FULL, True), (5, 0, True)])
def test_equal_tokens_need_no_window(policy: tuple[int, int, bool]) -> None:
    """With one key and value for all tokens, any policy that compensates returns that value."""
    one, query = torch.randn(1, 1, 1, 8, dtype=torch.float64), torch.randn(1, 1, 4, 8, dtype=torch.float64)
    past, new = one[0].expand(1, 30, 8), one.expand(1, 1, 4, 8)
    out = reference.attention(query, new, new, *build_cache([past], [past], [policy], 16), scale=1.0)
    assert_equal(out, to_numpy(new))


@pytest.mark.parametrize("case", [c for c in CASES if "many" not in c.name], ids=case_id)
def test_ops_of_devices_without_kernels(case: Case) -> None:
    """What torch calls there is the reference behind the checks: the kernels' results, on the kernels' dtypes."""
    cache, case = before_last_call(case)
    last = case.tokens[-1]
    options = {"alibi_slopes": case.slopes, "pad": last.pad, "scale": case.scaled_by, "dense": last.dense}
    out = ops._attention_reference(last.query, last.key, last.value, *cache, **options)
    assert out.dtype == last.query.dtype
    assert out.is_contiguous()
    assert torch.equal(out, reference.attention(last.query, last.key, last.value, *cache, **options))


@pytest.mark.cuda
@pytest.mark.parametrize("case", [c for c in CASES if "many" not in c.name], ids=case_id)
def test_cuda(case: Case) -> None:
    cache = case.cache(device="cuda")
    for t, expected in zip(case.tokens, case.run(), strict=True):
        qkv = [x.cuda() for x in (t.query, t.key, t.value)]
        pad = None if t.pad is None else t.pad.cuda()
        out = cache.attend(*qkv, scale=case.scale, pad=pad, dense=t.dense)
        assert torch.allclose(out.cpu(), expected, rtol=2.0**-7, atol=1e-4)
