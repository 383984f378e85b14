# SPDX-License-Identifier: Apache-2.0
"""Echo and induction scores: against the oracle and the reference, by hand, and in O(tokens) memory."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import oracle
from cases import ARITHMETIC, DTYPES, head_dims, lay_out, to_numpy
from razor_attention import _core, head_scores, reference


def tokens(period: int, repeats: int, heads: int, head_dim: int = 16, batch: int = 1, dtype: str = "float32") -> Tensor:
    return torch.randn(batch, heads, 1 + period * repeats, head_dim).to(DTYPES[dtype])


def by_oracle(query: Tensor, key: Tensor, period: int, scale: float) -> np.ndarray:
    """[2, batch, num_heads]: echo, induction."""
    q, k, group = to_numpy(query), to_numpy(key), query.shape[1] // key.shape[1]
    scores = [[oracle.head_scores(q[b, h], k[b, h // group], period, scale=scale) for h in range(q.shape[1])]
              for b in range(len(q))]  # fmt: skip
    return np.moveaxis(np.array(scores), -1, 0)


def assert_scores(actual: tuple[Tensor, Tensor], expected: np.ndarray) -> None:
    """Sums of positive weights, each off by as much as its logit; then rounded to float32."""
    for got, want in zip(actual, expected, strict=True):
        assert got.dtype == torch.float32
        assert got.shape == want.shape
        assert (np.abs(to_numpy(got) - want) <= ARITHMETIC[torch.float32] * want + 1e-12).all()


@pytest.mark.parametrize("period", [1, 2, 7, 50])
@pytest.mark.parametrize("repeats", [2, 3, 4])
def test_definition(period: int, repeats: int) -> None:
    q, k = tokens(period, repeats, 4, batch=2), tokens(period, repeats, 2, batch=2)
    expected = by_oracle(q, k, period, 0.25)
    assert_scores(head_scores(q, k, period), expected)
    assert_scores(reference.head_scores(q, k, period, scale=0.25), expected)


@given(
    shape=st.sampled_from([(1, 5), (3, 2), (5, 6), (20, 3), (70, 2)]),
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 7]),
    head_dim=head_dims,
    dtype=st.sampled_from(sorted(DTYPES)),
    layout=st.sampled_from(["contiguous", "transposed", "fused"]),
    scale=st.none() | st.sampled_from([0.01, 0.2]),  # logits stay below 30
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape(
    shape: tuple[int, int],
    batch: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    dtype: str,
    layout: str,
    scale: float | None,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    q = tokens(*shape, kv_heads * group, head_dim, batch, dtype)
    k = tokens(*shape, kv_heads, head_dim, batch, dtype)
    q, k = lay_out([q, k], layout)
    scaled_by = head_dim**-0.5 if scale is None else scale
    scores = head_scores(q, k, shape[0], scale=scale)
    assert_scores(scores, by_oracle(q, k, shape[0], scaled_by))
    by_reference = reference.head_scores(q, k, shape[0], scale=scaled_by)
    assert_scores(scores, np.stack([to_numpy(s) for s in by_reference]))


@pytest.mark.parametrize("repeats", [2, 3, 4])
def test_perfect_heads(repeats: int) -> None:
    """Token t of the block is the unit vector t; one more element counts copies, so that one copy is preferred."""
    period, sharp = 12, 40.0
    position = torch.arange(period * repeats)
    block, copy = position % period, (position // period).float()
    key = torch.zeros(1, 1, 1 + period * repeats, period + 1)  # the prefix attracts nobody
    key[0, 0, 1 + position, block] = 2.0
    key[0, 0, 1:, period] = copy
    query = torch.zeros(1, 4, *key.shape[2:])
    query[0, 0, 1 + position, block] = sharp  # echo: the same token, in the oldest copy
    query[0, 0, 1:, period] = -20.0
    query[0, 1, 1 + position, (block + 1) % period] = sharp  # induction: the token after it, in the newest copy
    query[0, 1, 1:, period] = 20.0
    query[0, 2, 1 + position, (block + 2) % period] = sharp  # neither
    query[0, 3, 1 + position, block] = sharp  # itself and all copies alike
    echo, induction = head_scores(query, key, period, scale=1.0)
    assert echo[0, :3].tolist() == pytest.approx([1.0, 0.0, 0.0], abs=1e-6)
    assert induction[0, :3].tolist() == pytest.approx([0.0, 1.0, 0.0], abs=1e-6)
    copies = np.arange(1, repeats)  # of the token, before a row of the second, third ... copy
    assert float(echo[0, 3]) == pytest.approx(np.mean(copies / (copies + 1)), abs=1e-6)


def test_a_head_that_looks_everywhere() -> None:
    period, repeats = 9, 4
    q, k = torch.zeros(1, 1, 37, 8), tokens(period, repeats, 1, 8)
    rows = np.arange(period, period * repeats)
    expected = np.mean((rows // period) / (rows + 2))  # row i sees i + 2 tokens, the prefix too
    echo, induction = head_scores(q, k, period)
    assert float(echo) == pytest.approx(expected, rel=1e-6)
    assert float(induction) == pytest.approx(expected, rel=1e-6)


def test_a_head_that_looks_at_the_prefix_only() -> None:
    q, k = torch.ones(1, 1, 21, 8), torch.zeros(1, 1, 21, 8)
    k[:, :, 0] = 100.0
    for score in head_scores(q, k, 5):
        assert float(score) == pytest.approx(0.0, abs=1e-12)


def test_logits_too_large_for_exp() -> None:
    q, k = tokens(6, 3, 2), tokens(6, 3, 2)
    for score in head_scores(q, k, 6, scale=1e6):
        assert torch.isfinite(score).all()
        assert ((score >= 0) & (score <= 1)).all()


@pytest.mark.parametrize("group", [1, 3])
def test_threads_and_batch_do_not_matter(group: int) -> None:
    q, k = tokens(60, 3, 2 * group, batch=2), tokens(60, 3, 2, batch=2)
    alone = head_scores(q, k, 60)
    torch.set_num_threads(2)
    for i, (a, b) in enumerate(zip(alone, head_scores(q, k, 60), strict=True)):
        assert torch.equal(a, b)
        assert torch.equal(a[1:], head_scores(q[1:], k[1:], 60)[i])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_numpy_module_is_the_same(dtype: str) -> None:
    q, k = tokens(7, 3, 4, 20, 2, dtype), tokens(7, 3, 2, 20, 2, dtype)
    for a, b in zip(
        head_scores(q, k, 7, scale=0.3), _core.head_scores(q.numpy(), k.numpy(), 7, scale=0.3), strict=True
    ):
        assert a.numpy().tobytes() == b.tobytes()


PEAK = """
import sys
import torch
from razor_attention import head_scores, reference

def peak():  # kilobytes, since the last reset
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

torch.set_num_threads(1)
q, k = torch.randn(1, 4, 4001, 16), torch.randn(1, 2, 4001, 16)
head_scores(q[:, :, :401], k[:, :, :401], 100)
for scores in (head_scores, lambda *a: reference.head_scores(*a, scale=0.25)):
    open("/proc/self/clear_refs", "w").write("5")
    before = peak()
    scores(q, k, 1000)
    print("peak", (peak() - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_memory_grows_with_tokens_not_with_their_square() -> None:
    ran = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    ours, of_the_map = (int(line.split()[1]) for line in ran.stdout.splitlines() if line.startswith("peak"))
    one_map = 4001 * 4001 * 4
    assert of_the_map > one_map, "the reference builds the map: this test can see it"
    assert ours < one_map / 16
