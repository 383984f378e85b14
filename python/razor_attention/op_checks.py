# SPDX-License-Identifier: Apache-2.0
"""What the ops refuse, for fakes and for devices without kernels.

The CPU has its own checks in cpp/bindings/array_args.h (shapes, dtypes) and in `check_cache` of cpp/razor/kv_cache.cpp
(values), in the same words. Shapes and dtypes of the arguments: `ops.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .reference import row_width

_ROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_TOKENS = 2**48  # of one sequence; kMaxTokens in cpp/razor/kv_cache.h


def _expect_shape(name: str, tensor: Tensor, shape: Sequence[int | None]) -> None:
    same = tensor.dim() == len(shape) and all(
        want is None or have == want for have, want in zip(tensor.shape, shape, strict=True)
    )
    if not same:
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: expected shape [{expected}], got {list(tensor.shape)}")


def _expect_dims(name: str, tensor: Tensor, meaning: str) -> None:
    if tensor.dim() != meaning.count(",") + 1:
        raise ValueError(
            f"{name}: expected {meaning.count(',') + 1} dimensions {meaning}, got shape {list(tensor.shape)}"
        )


def _dtype_name(dtype: torch.dtype) -> str:
    known = (*_ROW_DTYPES, torch.int32, torch.int64, torch.bool, torch.int8, torch.uint8)
    return str(dtype).removeprefix("torch.") if dtype in known else "another dtype"


def _expect_dtype(name: str, tensor: Tensor, dtype: torch.dtype, like: str = "") -> None:
    if tensor.dtype != dtype:
        raise ValueError(f"{name}: expected dtype {_dtype_name(dtype)}{like}, got {_dtype_name(tensor.dtype)}")


def _expect_row_dtype(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _ROW_DTYPES:
        raise ValueError(f"{name}: expected dtype float32, bfloat16 or float16, got {_dtype_name(tensor.dtype)}")


def _check_heads(query: Tensor, key: Tensor) -> None:
    if key.shape[1] == 0 or query.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"query: expected a multiple of the {key.shape[1]} kv heads as num_heads, got {query.shape[1]}"
        )


def _check_tokens(key: Tensor, value: Tensor, pad: Tensor | None) -> None:
    _expect_dims("key", key, "(batch, num_kv_heads, q_len, head_dim)")
    _expect_row_dtype("key", key)
    if key.shape[1] == 0 or key.shape[3] == 0:
        raise ValueError(f"key: expected at least one kv head and one element, got shape {list(key.shape)}")
    _expect_dtype("value", value, key.dtype, " like key")
    _expect_shape("value", value, key.shape)
    if pad is not None:
        _expect_dtype("pad", pad, torch.int64)
        _expect_shape("pad", pad, [key.shape[0]])


def _check_cache(
    key: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    seen: Tensor,
    sink_size: Tensor,
    window_size: Tensor,
    compensate: Tensor,
    key_sum: Tensor,
    value_sum: Tensor,
    *,
    exact: Tensor | None,
    exact_sink: int,
) -> None:
    batch, num_kv_heads, _, head_dim = key.shape
    _expect_dims("key_pages", key_pages, "(num_pages, page_size, head_dim)")
    if key_pages.dtype not in (key.dtype, torch.int8, torch.uint8):
        wanted = f"dtype {_dtype_name(key.dtype)} like key, int8 or uint8"
        raise ValueError(f"key_pages: expected {wanted}, got {_dtype_name(key_pages.dtype)}")
    _expect_shape("key_pages", key_pages, [None, None, row_width(head_dim, key_pages.dtype)])
    if key_pages.shape[1] == 0 or key_pages.shape[1] % 16:
        raise ValueError(f"key_pages: expected a page_size that is a multiple of 16, got {key_pages.shape[1]}")
    _expect_dtype("value_pages", value_pages, key_pages.dtype, " like key_pages")
    _expect_shape("value_pages", value_pages, key_pages.shape)
    for name, tensor, dtype, shape in (
        ("page_table", page_table, torch.int32, (batch * num_kv_heads, None)),
        ("seen", seen, torch.int64, (batch,)),
        ("sink_size", sink_size, torch.int32, (num_kv_heads,)),
        ("window_size", window_size, torch.int32, (num_kv_heads,)),
        ("compensate", compensate, torch.bool, (num_kv_heads,)),
        ("key_sum", key_sum, torch.float32, (batch * num_kv_heads, head_dim)),
        ("value_sum", value_sum, torch.float32, (batch * num_kv_heads, head_dim)),
    ):
        _expect_dtype(name, tensor, dtype)
        _expect_shape(name, tensor, shape)
    if exact is not None:
        if key_pages.dtype.is_floating_point:
            got = _dtype_name(key_pages.dtype)
            raise ValueError(f"exact: expected quantised key_pages beside it, got {got}")
        _expect_dtype("exact", exact, key.dtype, " like key")
        _expect_shape("exact", exact, (2, batch * num_kv_heads, None, head_dim))
    most = 0 if exact is None else exact.shape[2]
    if not 0 <= exact_sink <= most:
        raise ValueError(f"exact_sink: expected a value from 0 to {most}, got {exact_sink}")


def check_values(
    key: Tensor,
    key_pages: Tensor,
    _: Tensor,
    page_table: Tensor,
    seen: Tensor,
    sink_size: Tensor,
    window_size: Tensor,
    *__: Tensor,
    pad: Tensor | None,
    new_tokens: bool,
) -> None:
    """Raise what the ops would raise for these values, as stored or once the new tokens are."""
    num_kv_heads, q_len, (num_pages, page_size) = key.shape[1], key.shape[2], key_pages.shape[:2]
    sizes = list(zip(sink_size.tolist(), window_size.tolist(), strict=True))
    for h, (sink, window) in enumerate(sizes):
        for name, size in (("sink_size", sink), ("window_size", window)):
            if size < 0:
                raise ValueError(f"{name}: expected values >= 0, got {size} for kv head {h}")
    for b, past in enumerate(seen.tolist()):
        if not 0 <= past <= _MAX_TOKENS:
            raise ValueError(f"seen: expected values from 0 to {_MAX_TOKENS}, got {past} for sequence {b}")
        skipped = 0 if pad is None else int(pad[b])
        if not 0 <= skipped <= q_len:
            raise ValueError(f"pad: expected values from 0 to {q_len}, got {skipped} for sequence {b}")
        stored = past + (q_len - skipped if new_tokens else 0)
        for h, (sink, window) in enumerate(sizes):
            pages = -(-min(stored, sink + window) // page_size)
            where = f"for sequence {b}, kv head {h}"
            if pages > page_table.shape[1]:
                raise ValueError(f"page_table: expected at least {pages} pages {where}, got {page_table.shape[1]}")
            for page in page_table[b * num_kv_heads + h, :pages].tolist():
                if not 0 <= page < num_pages:
                    raise ValueError(f"page_table: expected page ids from 0 to {num_pages - 1}, got {page} {where}")


def check_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *cache: Tensor,
    alibi_slopes: Tensor | None = None,
    pad: Tensor | None = None,
    scale: float,
    dense: bool = False,
    exact: Tensor | None = None,
    exact_sink: int = 0,
) -> None:
    """Raise what `attention` would raise for these shapes and dtypes."""
    _expect_dims("query", query, "(batch, num_heads, q_len, head_dim)")
    _check_tokens(key, value, pad)
    _expect_dtype("query", query, key.dtype, " like key")
    _expect_shape("query", query, [key.shape[0], None, key.shape[2], key.shape[3]])
    _check_heads(query, key)
    if alibi_slopes is not None:
        _expect_dtype("alibi_slopes", alibi_slopes, torch.float32)
        _expect_shape("alibi_slopes", alibi_slopes, [query.shape[1]])
    _check_cache(key, *cache, exact=exact, exact_sink=exact_sink)


def check_head_scores(query: Tensor, key: Tensor, period: int) -> None:
    """Raise what `head_scores` would raise for these shapes and dtypes."""
    _expect_dims("query", query, "(batch, num_heads, tokens, head_dim)")
    _expect_dims("key", key, "(batch, num_kv_heads, tokens, head_dim)")
    _expect_dtype("key", key, query.dtype, " like query")
    _expect_shape("key", key, [query.shape[0], None, query.shape[2], query.shape[3]])
    _check_heads(query, key)
    _expect_row_dtype("query", query)
    if period < 1:
        raise ValueError(f"period: expected a value >= 1, got {period}")
    if (query.shape[2] - 1) % period or (query.shape[2] - 1) // period < 2:
        raise ValueError(
            f"query: expected 1 + period * repeats tokens with period {period} and at least 2 repeats, "
            f"got {query.shape[2]}"
        )


def check_alibi_windows(
    query: Tensor, key: Tensor, slopes: Tensor, bound: Tensor | None, *, theta: float, alpha: float, method: str
) -> None:
    """Raise what `alibi_windows` would raise for these shapes, dtypes and numbers."""
    _expect_dims("query", query, "(q_rows, num_heads, cols)")
    _expect_dims("key", key, "(k_rows, num_heads, cols)")
    _expect_row_dtype("query", query)
    _expect_dtype("key", key, query.dtype, " like query")
    if 0 in query.shape:
        raise ValueError(f"query: expected at least one row, head and column, got shape {list(query.shape)}")
    _expect_shape("key", key, [None, query.shape[1], query.shape[2]])
    if 0 in key.shape:
        raise ValueError(f"key: expected at least one row, head and column, got shape {list(key.shape)}")
    _expect_dtype("slopes", slopes, torch.float32)
    _expect_shape("slopes", slopes, [query.shape[1]])
    if bound is not None:
        _expect_dtype("bound", bound, torch.float32)
        _expect_shape("bound", bound, [query.shape[1]])
    if method not in ("msmodelslim", "per_head"):
        raise ValueError(f"method: expected msmodelslim or per_head, got {method}")
    if not 0 < theta <= 1:
        raise ValueError(f"theta: expected a value > 0 and <= 1, got {theta:g}")
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha: expected a finite value >= 0, got {alpha:g}")


def check_slopes_and_bound(slopes: Tensor, bound: Tensor | None) -> None:
    """Raise what `alibi_windows` would raise for these values."""
    for h, slope in enumerate(slopes.tolist()):
        if not slope > 0:
            raise ValueError(f"slopes: expected values > 0, got {slope:g} for head {h}")
        if slope == math.inf:
            raise ValueError(f"slopes: expected finite values, got inf for head {h}")
    for h, value in enumerate([] if bound is None else bound.tolist()):
        if not 0 <= value < math.inf:
            raise ValueError(f"bound: expected finite values >= 0, got {value:g} for head {h}")


def check_append(
    key: Tensor,
    value: Tensor,
    *cache: Tensor,
    pad: Tensor | None = None,
    exact: Tensor | None = None,
    exact_sink: int = 0,
) -> None:
    """Raise what `append` would raise for these shapes and dtypes."""
    _check_tokens(key, value, pad)
    _check_cache(key, *cache, exact=exact, exact_sink=exact_sink)
