# SPDX-License-Identifier: Apache-2.0
"""Quantised rows: their bytes on every instruction set, and how far they are from what they stand for."""

import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import oracle
from cases import to_numpy
from razor_attention import LayerCache, ops, reference
from test_isa import ISAS, present, run_child

FULL = reference.FULL
KV = {"int8": torch.int8, "int4": torch.uint8}
both = pytest.mark.parametrize("kv", KV)


def stored_bytes(rows: Tensor, kv: str, page_size: int = 16) -> np.ndarray:
    """Rows [count, head_dim] as one page of a cache stores them: [bytes of the page], 0xAA where nothing is."""
    width = reference.row_width(rows.shape[1], KV[kv])
    pages = torch.full((2, 1, page_size, width), -0x56 if kv == "int8" else 0xAA, dtype=KV[kv])
    zeros = torch.zeros(2, 1, rows.shape[1])
    policy = torch.tensor([0], dtype=torch.int32), torch.tensor([FULL], dtype=torch.int32), torch.tensor([False])
    table = torch.zeros(1, 1, dtype=torch.int32)
    ops.append(rows[None, None], rows[None, None], *pages, table, torch.tensor([0]), *policy, *zeros)
    assert torch.equal(*pages)
    return pages[0].flatten().numpy().view(np.uint8)


# The bytes.

GOLDEN = [  # rows, codes of each, numbers of each
    (
        "int8",
        [[63.5, -0.25, 0.75, 1.25], [0.0, 0.0, -0.0, 0.0]],
        ["7f 00 02 02", "00 00 00 00"],
        ["00 00 00 3f", "00 00 00 00"],
    ),
    ("int8", [[-(2.0**-141), 2.0**-141]], ["81 7f"], ["02 00 00 00"]),  # 256 of the smallest float, of 2 a unit: 127
    ("int8", [[math.nan, 1.0], [1.0, -math.inf]], ["00 00", "00 00"], ["00 00 c0 7f", "00 00 c0 7f"]),
    ("int4", [[-1.0, 0.5, 14.0]], ["f0 01"], ["81 3f"]),  # a scale of 1; 15/16 would leave 14 out
    ("int4", [[-0.1, 0.2], [3.0, 3.0]], ["f0", "ff"], ["a5 3c", "50 3e"]),  # 5/256, 13/64
    ("int4", [[0.0, 15.0], [-15.0, 0.0], [-16.0, 0.0]], ["f0", "f0", "e0"], ["80 3f", "8f 3f", "9e 3f"]),
    ("int4", [[1.0, 2.0, 3.0, 4.0, 5.0]], ["c3 f6 09"], ["b0 3e"]),  # 11/32
    ("int4", [[-1e30, 1e30, 0.0]], ["70 0e"], ["e7 6f"]),
    ("int4", [[3.4e38, -1.0], [3e38, -3e38]], ["0e", "00"], ["90 7d", "c0 7f"]),  # 6e38 is no float32
    ("int4", [[2e-38, -1e-38, 0.0, 1e-45]], ["13 10"], ["81 00"]),  # the least scale, 2^-126
    ("int4", [[*[0.0] * 16, 1.0, math.inf]], ["00 " * 8 + "00"], ["80 00 c0 7f"]),  # one group only
    ("int4", [[-0.0, 0.0]], ["00"], ["80 00"]),
]


@pytest.mark.parametrize(("kv", "rows", "codes", "numbers"), GOLDEN)
def test_bytes(kv: str, rows: list[list[float]], codes: list[str], numbers: list[str]) -> None:
    """All rows' codes come first in a page of 16 rows, then their numbers."""
    page = stored_bytes(torch.tensor(rows), kv)
    code, number = (len(bytes.fromhex(part[0])) for part in (codes, numbers))
    expected = np.full(16 * (code + number), 0xAA, dtype=np.uint8)
    for i, (c, n) in enumerate(zip(codes, numbers, strict=True)):
        expected[i * code : (i + 1) * code] = list(bytes.fromhex(c))
        start = 16 * code + i * number
        expected[start : start + number] = list(bytes.fromhex(n))
    assert page.tobytes().hex(" ") == expected.tobytes().hex(" ")


SHAPES = [(count, dim, dtype) for count, dim in ((3, 1), (9, 5), (16, 33), (5, 64), (4, 77), (7, 128))
          for dtype in ("float32", "bfloat16", "float16")]  # fmt: skip


def odd_rows(count: int, head_dim: int, dtype: str) -> Tensor:
    """Random rows of all sizes, some with a heavy element, constant, subnormal, or not finite: [10 * count, dim]"""
    draw = np.random.default_rng(head_dim)
    rows = draw.standard_normal((10, count, head_dim))
    rows *= np.array([1.0, 1e-3, 1e4, 3e37, 1e-43, 1e-8, 1.0, 1.0, 1.0, 1.0])[:, None, None]
    rows[6, :, draw.integers(head_dim)] *= 100
    rows[7] = rows[7, :, :1]
    rows[8, :, draw.integers(head_dim)] = math.nan
    rows[9, ::2, draw.integers(head_dim)], rows[9, 1::2] = -math.inf, -np.abs(rows[9, 1::2])
    return torch.from_numpy(rows.reshape(-1, head_dim)).to(getattr(torch, dtype))


def all_bytes() -> dict[str, np.ndarray]:
    """What this process's kernels store of them."""
    return {f"{kv} {shape}": stored_bytes(odd_rows(*shape), kv, page_size=160) for kv, shape in product(KV, SHAPES)}


def by_reference(rows: Tensor, kv: str, page_size: int) -> np.ndarray:
    code, number = reference.quantised_bytes(rows.shape[1], KV[kv])
    page = np.full(page_size * (code + number), 0xAA, dtype=np.uint8)
    codes, numbers = (part.numpy().ravel() for part in reference.encode_rows(rows, KV[kv]))
    page[: codes.size], page[page_size * code :][: numbers.size] = codes, numbers
    return page


CHILD = """
import sys
sys.path.insert(0, sys.argv[2])
import numpy, test_kv_format
numpy.savez(sys.argv[1], **test_kv_format.all_bytes())
"""


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_stores_the_bytes_of_the_reference(isa: str, tmp_path: Path) -> None:
    if isa not in present():
        pytest.skip(f"this CPU has no {isa}")
    child = run_child(CHILD, isa, str(tmp_path / "bytes.npz"), str(Path(__file__).parent))
    assert child.returncode == 0, child.stderr
    with np.load(tmp_path / "bytes.npz") as found:
        for kv, shape in product(KV, SHAPES):
            expected = by_reference(odd_rows(*shape), kv, 160)
            assert found[f"{kv} {shape}"].tobytes() == expected.tobytes(), (kv, shape)


# What is lost.


@both
@given(
    seed=st.integers(0, 2**32 - 1),
    head_dim=st.sampled_from([1, 2, 15, 16, 17, 33, 80, 128]),
    size=st.sampled_from([1e-6, 1e-3, 1.0, 300.0]),
    shift=st.sampled_from([0.0, 1.0, -30.0]),
)
def test_no_element_is_off_by_more_than_half_a_step(
    kv: str, seed: int, head_dim: int, size: float, shift: float
) -> None:
    """A step is max |x| / 127 of a row; at most 9/8 of a 15th of the span of 16 elements and 0."""
    x = np.random.default_rng(seed).standard_normal((4, head_dim)) * size + shift
    x = x.astype(np.float32)
    back = to_numpy(reference.decode_rows(*reference.encode_rows(torch.from_numpy(x), KV[kv]), head_dim, KV[kv]))
    again, step = oracle.quantised(x, kv)
    assert np.array_equal(back, again)
    assert (np.abs(back - x) <= step * (0.5 + 2.0**-19)).all()  # a code is a rounded quotient
    if kv == "int8":
        assert (step <= np.abs(x).max(1, keepdims=True) / 127 * (1 + 2.0**-23)).all()
        return
    for start in range(0, head_dim, 16):
        part = np.pad(x[:, start : start + 16].astype(float), ((0, 0), (0, 1)))
        assert (step[:, start] <= np.ptp(part, 1) / 15 * 9 / 8 * (1 + 2.0**-20)).all()
        assert (back[:, start : start + 16][part[:, :-1] == 0] == 0).all()


@given(st.integers(0, 2**32 - 1), st.floats(-130, 123))
def test_int4_rows_are_bfloat16_rows(seed: int, exponent: float) -> None:
    x = torch.from_numpy(np.random.default_rng(seed).standard_normal((4, 40)) * 2.0**exponent).float()
    x[:, 5::16] = 0.0
    back = reference.decode_rows(*reference.encode_rows(x, torch.uint8), 40, torch.uint8)
    assert torch.equal(back.bfloat16().double(), back)
    assert (back[:, 5::16] == 0).all()


@pytest.mark.parametrize("value", [3.4e38, -3.4e38, float(np.finfo(np.float32).max)])
def test_int8_holds_the_largest_floats(value: float) -> None:
    cache = LayerCache([0], [FULL], [False], batch_size=1, head_dim=4, dtype="int8")
    cache.append(*[torch.tensor([value, 1.0, 0.0, 0.0]).expand(1, 1, 1, 4)] * 2)
    back = reference._read(cache.value_pages, (torch.tensor([0]), torch.tensor([0])), 4)
    assert back[0, 0] == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("rows", [[3.4e38, 0.0, 1e30], [-3.4e38, 1.0, 0.0], [1.6e38, -1.6e38, 1e38]])
def test_int4_holds_spans_of_float32(rows: list[float]) -> None:
    back = reference.decode_rows(*reference.encode_rows(torch.tensor([rows]), torch.uint8), 3, torch.uint8)[0]
    assert np.allclose(back, rows, rtol=0, atol=3.4e38 / 25)
