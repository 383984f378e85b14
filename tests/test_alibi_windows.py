# SPDX-License-Identifier: Apache-2.0
"""ALiBi windows: against msmodelslim's own results, a literal restatement, the reference, and by hand."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cases import DTYPES
from razor_attention import _core, alibi, ops, reference

FULL = 2**31 - 1
MEASURED = torch.load(Path(__file__).parent / "data/alibi_windows.pt", weights_only=True)
DEFAULT = {"theta": 1e-5, "alpha": 100}
Layers = Sequence[tuple[Tensor, Tensor]]


def windows_of(layers: Layers, slopes: Tensor, method: str = "msmodelslim", **numbers: float) -> list[int]:
    """One layer after another."""
    bound = None
    for query, key in layers:
        windows, bound = ops.alibi_windows(query, key, slopes, bound, method=method, **DEFAULT | numbers)
    return windows.tolist()


def literally(layers: Layers, slopes: Tensor, theta: float, alpha: float) -> list[int]:
    """msmodelslim's rule as its inputs and outputs show it: float32 tensors, Python numbers, NaN never larger."""
    found = []
    for h in range(len(slopes)):
        best: Any = 0
        for q, k in layers:
            f = torch.max(q[:, h, :] @ k[:, h, :].t()).sqrt()
            if f > best:
                best = f
        found.append(int((best + math.log(theta) + alpha) / slopes[h]))
    return found


def weight(out: int, heads: int, cols: int) -> Tensor:
    """Multiples of 1/8 whose products are exact in float32, whatever their order."""
    return torch.randint(-8, 9, (out, heads, cols)) / 8


# What msmodelslim returned.


@pytest.mark.parametrize("case", [c for c in MEASURED if c["kind"] == "get_wins"], ids=lambda c: c["name"])
def test_measured_windows(case: dict[str, Any]) -> None:
    slopes = torch.as_tensor(case["slopes"], dtype=torch.float32)
    numbers = {"theta": case["theta"], "alpha": case["alpha"]}
    assert windows_of(case["qk_list"], slopes, **numbers) == case["expected"]
    assert literally(case["qk_list"], slopes, **numbers) == case["expected"]


def projections(layer: dict[str, Tensor], layout: str, heads: int, view: str) -> tuple[Tensor, Tensor]:
    """Query and key as msmodelslim slices them, or by true heads; every one a view."""
    if view == "compat":  # rows in registration order, input columns cut into heads
        thirds = layer["qkv"].view(3, -1, layer["qkv"].shape[1]) if layout != "separate" else None
        q, k = (layer["q_proj"], layer["k_proj"]) if thirds is None else (thirds[0], thirds[1])
        return q.view(len(q), heads, -1), k.view(len(k), heads, -1)
    if layout == "separate":
        by_head = [layer[name].view(heads, -1, layer[name].shape[1]) for name in ("q_proj", "k_proj")]
    elif layout == "W_pack":
        by_head = list(layer["qkv"].view(3, heads, -1, layer["qkv"].shape[1])[:2])
    else:
        by_head = list(layer["qkv"].view(heads, 3, -1, layer["qkv"].shape[1]).unbind(1)[:2])
    return by_head[0].permute(2, 0, 1), by_head[1].permute(2, 0, 1)


@pytest.mark.parametrize("case", [c for c in MEASURED if c["kind"] == "weights"], ids=lambda c: c["name"])
@pytest.mark.parametrize("view", ["compat", "per_head"])
def test_measured_windows_of_whole_weights(case: dict[str, Any], view: str) -> None:
    layers = [projections(layer, case["layout"], case["num_heads"], view) for layer in case["weights"]]
    found = windows_of(layers, case["slopes"], theta=case["theta"], alpha=case["alpha"])
    assert found == case[f"expected_{view}"]


def test_a_literal_restatement() -> None:
    differs = 0
    for trial in range(300):
        torch.manual_seed(trial)
        draw = torch.randint(0, 4, (5,)).tolist()
        heads, cols, layers = (1, 4, 7, 12)[draw[0]], (1, 6, 16, 33)[draw[1]], 1 + draw[2]
        theta, alpha = (1e-5, 3.7e-5, 1e-3, 1.0)[draw[3]], (0, 100, 1000, 10000)[draw[4]]
        rows = torch.randint(1, 40, (layers, 2)).tolist()
        weights = [(weight(a, heads, cols), weight(b, heads, cols)) for a, b in rows]
        slopes = torch.rand(heads) / 50 + 1e-3
        expected = literally(weights, slopes, theta, alpha)
        assert windows_of(weights, slopes, theta=theta, alpha=alpha) == expected, trial
        best = [max(0.0, *(float((q[:, h] @ k[:, h].T).max()) for q, k in weights)) ** 0.5 for h in range(heads)]
        exact = [int((b + math.log(theta) + alpha) / float(s)) for b, s in zip(best, slopes, strict=True)]
        differs += exact != expected
    assert differs > 10, "the order of rounding shows"


@pytest.mark.parametrize("alpha", [0, 100, 10000])
def test_every_rounding(alpha: int) -> None:
    """One product for each of many heads: torch itself rounds the same steps."""
    heads = 50000
    q, k = torch.rand(1, heads, 1) * 4, torch.rand(1, heads, 1)
    slopes = torch.rand(heads) / 50 + 1e-3
    wanted = ((q * k).flatten().sqrt() + math.log(3.7e-5) + alpha) / slopes
    assert windows_of([(q, k)], slopes, theta=3.7e-5, alpha=alpha) == wanted.long().tolist()
    wanted = (math.log(3.7e-5) + alpha) / slopes
    assert windows_of([(q, -k)], slopes, theta=3.7e-5, alpha=alpha) == wanted.long().tolist()


# By hand.


def test_zero_weights() -> None:
    """While no layer is positive."""
    of_8 = [176, 353, 707, 1415, 2831, 5663, 11326, 22652]
    of_32 = [105, 125, 148, 176, 210, 250, 297, 353, 420, 500, 595, 707, 841, 1001, 1190, 1415, 1683, 2002, 2381, 2831,
             3367, 4004, 4762, 5663, 6734, 8008, 9524, 11326, 13469, 16017, 19048, 22652]  # fmt: skip
    for expected in (of_8, [*of_8, 125, 250, 500, 1001], of_32):
        heads = len(expected)
        assert windows_of([(torch.zeros(3, heads, 5),) * 2], alibi.alibi_slopes(heads)) == expected


def test_single_entries() -> None:
    q, k = torch.zeros(4, 2, 3), torch.zeros(5, 2, 3)
    q[0, :, 0], k[1, 0, 0], k[1, 1, 1] = 2, 3, 3
    slopes = torch.tensor([0.5, 0.5])
    windows, bound = ops.alibi_windows(q, k, slopes, method="msmodelslim", **DEFAULT)
    assert bound.tolist() == [torch.tensor(6.0).sqrt(), 0.0]
    assert windows.tolist() == [int((6**0.5 + math.log(1e-5) + 100) / 0.5), int((math.log(1e-5) + 100) / 0.5)]
    _, bound = ops.alibi_windows(
        2 * torch.ones(2, 3, 5), 3 * torch.ones(4, 3, 5), torch.ones(3), method="per_head", **DEFAULT
    )
    assert bound.tolist() == [torch.tensor(30.0).sqrt()] * 3


@pytest.mark.parametrize("row", [-2.5, -0.6, 0.9, 1.5, 2.5])
def test_truncation_is_toward_zero_and_per_head_rounds_up(row: float) -> None:
    slopes = torch.tensor([1 / 64])
    q = torch.full((1, 1, 1), max(row, 0.0) / 64)  # bound^2 = q * k, with ln theta = 0
    k = q.clone()
    below = {"theta": math.exp(min(row, 0.0) / 64), "alpha": 0}
    assert windows_of([(q, k)], slopes, **below) == [int(row)]
    assert windows_of([(q, k)], slopes, "per_head", **below) == [max(1, math.ceil(abs(row)))]


def test_per_head_stays_within_limits() -> None:
    one = torch.ones(1, 2, 1)
    slopes = torch.tensor([1e-30, 1e6])
    assert windows_of([(one, one)], slopes, "per_head", theta=1.0, alpha=0) == [FULL, 1]
    wide, narrow = (windows_of([(one, one)], torch.ones(2), "per_head", theta=t)[0] for t in (1e-5, 1e-3))
    assert wide > narrow, "a smaller theta loses less"


@pytest.mark.parametrize("method", ["msmodelslim", "per_head"])
def test_negative_products_leave_the_bound(method: str) -> None:
    q, k, slopes = torch.ones(3, 2, 4), -torch.ones(3, 2, 4), torch.ones(2)
    for before, after in ((None, [0.0, 0.0]), (torch.tensor([0.5, 2.0]), [0.5, 2.0])):
        _, bound = ops.alibi_windows(q, k, slopes, before, method=method, **DEFAULT)
        assert bound.tolist() == after
        assert before is None or bound.data_ptr() != before.data_ptr()
    assert ops.alibi_windows(q, -k, slopes, before, method=method, **DEFAULT)[1].tolist() == [2.0, 2.0]


def test_infinite_weights() -> None:
    """A head with NaN among its products is ignored in that layer, +inf beside it too; -inf never is the largest."""
    slopes, two = torch.ones(3), torch.full((3,), 2.0)
    q, k = torch.ones(3, 3, 2), torch.ones(5, 3, 2)
    q[1, 0, 1], q[1, 1, 0], k[4, 1, 0] = math.nan, math.inf, 0  # NaN; +inf and, of inf * 0, NaN
    k[2, 2] = -math.inf
    for before, after in ((None, [0, 0, 2**0.5]), (two, [2, 2, 2])):
        _, bound = ops.alibi_windows(q, k, slopes, before, method="msmodelslim", **DEFAULT)
        assert bound.tolist() == pytest.approx(after)
        by_reference = reference.alibi_windows(q, k, slopes, before, method="msmodelslim", **DEFAULT)[1]
        assert torch.equal(bound, by_reference)


# Every row, every place, every layout.

PLACES = [(1, 1, 1), (2, 3, 1), (5, 33, 7), (29, 35, 16), (37, 41, 33), (15, 65, 40)]


@pytest.mark.parametrize("shape", PLACES)
def test_the_largest_product_is_found_wherever_it_is(shape: tuple[int, int, int]) -> None:
    q_rows, k_rows, cols = shape
    slopes = torch.ones(1)
    for i in range(q_rows):
        for j in range(k_rows):
            q, k = torch.full((q_rows, 1, cols), -1.0), torch.full((k_rows, 1, cols), 1.0)
            q[i, 0, -1], k[j, 0, -1] = 4.0 * cols, 2.0
            _, bound = ops.alibi_windows(q, k, slopes, method="per_head", **DEFAULT)
            assert float(bound) ** 2 == pytest.approx(8 * cols - (cols - 1), rel=1e-6), (i, j)
    for side, rows in (("query", q_rows), ("key", k_rows)):
        for i in range(rows):
            weights = {"query": torch.ones(q_rows, 1, cols), "key": torch.ones(k_rows, 1, cols)}
            weights[side][i, 0, i % cols] = math.nan
            bound = ops.alibi_windows(**weights, slopes=slopes, method="msmodelslim", **DEFAULT)[1]
            assert float(bound) == 0.0, (side, i)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("step", [2.0**-12, 2.0**-14])
def test_the_largest_of_many_that_round_alike(dtype: str, step: float) -> None:
    """Rows of one direction, each a little longer than the last: bf16 does not tell them apart."""
    line = torch.rand(64) + 0.5
    for shuffle in range(20):
        torch.manual_seed(shuffle)
        q, k = ((line * (1 + step * torch.randperm(n)[:, None])).to(DTYPES[dtype])[:, None] for n in (200, 130))
        bound = ops.alibi_windows(q, k, torch.ones(1), method="per_head", **DEFAULT)[1]
        torch.testing.assert_close(bound, by_hand(q, k).float(), rtol=1e-6, atol=0)


def by_hand(query: Tensor, key: Tensor) -> Tensor:
    return torch.einsum("ihc,jhc->hij", query.double(), key.double()).flatten(1).amax(1).clamp(min=0).sqrt()


@given(
    rows=st.tuples(st.integers(1, 150), st.integers(1, 150)),
    heads=st.integers(1, 5),
    cols=st.sampled_from([1, 2, 15, 16, 31, 32, 33, 64, 100, 128]),
    dtype=st.sampled_from(sorted(DTYPES)),
    layout=st.sampled_from(["rows", "columns", "strided", "reversed heads"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape(rows: tuple[int, int], heads: int, cols: int, dtype: str, layout: str, seed: int) -> None:
    torch.manual_seed(seed)
    made = []
    for count in rows:
        if layout == "columns":
            made.append(torch.randn(heads, cols, count).to(DTYPES[dtype]).permute(2, 0, 1))
        elif layout == "strided":
            made.append(torch.randn(count, heads, 3 * cols).to(DTYPES[dtype])[..., ::3])
        else:
            made.append(torch.randn(count, heads, cols).to(DTYPES[dtype]))
    if layout == "reversed heads":
        made = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in made]
    slopes = torch.rand(heads) + 0.1
    for method in ("msmodelslim", "per_head"):
        windows, bound = ops.alibi_windows(*made, slopes, method=method, **DEFAULT)
        expected = reference.alibi_windows(*made, slopes, None, method=method, **DEFAULT)
        assert (windows.dtype, bound.dtype) == (torch.int64, torch.float32)
        torch.testing.assert_close(bound, by_hand(*made).float(), rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(bound, expected[1], rtol=2e-6, atol=2e-6)
        assert (windows - expected[0]).abs().max() <= 1


def test_threads_and_blocks_do_not_matter() -> None:
    cols = 3000  # few rows to a block
    q, k = torch.randn(200, 3, cols), torch.randn(70, 3, cols)
    slopes = torch.ones(3)
    alone = ops.alibi_windows(q, k, slopes, method="per_head", **DEFAULT)
    torch.testing.assert_close(alone[1], by_hand(q, k).float(), rtol=1e-5, atol=0)
    for threads in (2, 5):
        torch.set_num_threads(threads)
        for a, b in zip(alone, ops.alibi_windows(q, k, slopes, method="per_head", **DEFAULT), strict=True):
            assert torch.equal(a, b)
    swapped = ops.alibi_windows(k, q, slopes, method="per_head", **DEFAULT)[1]
    assert torch.equal(alone[1], swapped), "a product is one chain of fma, on whichever side"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_numpy_module_is_the_same(dtype: str) -> None:
    q, k = torch.randn(40, 3, 20).to(DTYPES[dtype]), torch.randn(3, 20, 50).to(DTYPES[dtype]).permute(2, 0, 1)
    slopes, before = torch.ones(3), torch.tensor([0.0, 100.0, 0.0])
    for bound in (None, before):
        ours = ops.alibi_windows(q, k, slopes, bound, method="msmodelslim", **DEFAULT)
        arrays = (q.numpy(), k.numpy(), slopes.numpy(), None if bound is None else bound.numpy())
        for a, b in zip(ours, _core.alibi_windows(*arrays, method="msmodelslim", **DEFAULT), strict=True):
            assert a.numpy().tobytes() == b.tobytes()
            assert a.numpy().dtype == b.dtype


def test_compiled_is_eager() -> None:
    def layer(query: Tensor, key: Tensor, slopes: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
        windows, bound = ops.alibi_windows(query * 2, key, slopes, bound, method="per_head", **DEFAULT)
        return windows + 1, bound

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    q, k, slopes = torch.randn(30, 2, 8), torch.randn(2, 8, 20).permute(2, 0, 1), torch.ones(2)
    for bound in (torch.zeros(2), torch.tensor([9.0, 0.0])):
        for a, b in zip(compiled(q, k, slopes, bound), layer(q, k, slopes, bound), strict=True):
            assert torch.equal(a, b)


PEAK = """
import torch
from razor_attention import ops, reference

def peak():  # kilobytes, since the last reset
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

torch.set_num_threads(1)
q, k, slopes = torch.randn(3000, 1, 64), torch.randn(3000, 1, 64), torch.ones(1)
numbers = {"theta": 1e-5, "alpha": 100, "method": "per_head"}
ops.alibi_windows(q[:9], k[:9], slopes, **numbers)
for windows in (ops.alibi_windows, lambda q, k, *_, **__: (q[:, 0] @ k[:, 0].T).max()):
    open("/proc/self/clear_refs", "w").write("5")
    before = peak()
    windows(q, k, slopes, **numbers)
    print("peak", (peak() - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_products_are_not_stored() -> None:
    ran = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    ours, of_the_products = (int(line.split()[1]) for line in ran.stdout.splitlines() if line.startswith("peak"))
    assert of_the_products >= 3000 * 3000 * 4, "this test can see them"
    assert ours < of_the_products / 8


def test_the_error_that_it_documents() -> None:
    assert "query: expected finite products with key, got inf in head 3" in (ops.alibi_windows.__doc__ or "")
    q = torch.ones(1, 4, 1)
    q[0, 3] = math.inf
    with pytest.raises(ValueError, match=r"^query: expected finite products with key, got inf in head 3$"):
        ops.alibi_windows(q, q.clamp(max=2), torch.ones(4), method="msmodelslim", **DEFAULT)
