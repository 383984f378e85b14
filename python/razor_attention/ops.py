# SPDX-License-Identifier: Apache-2.0
"""torch.ops.razor.*: documented wrappers, fake implementations, and the reference on devices without kernels.

Schemas and CPU implementations are registered by `cpp/bindings/torch_ops.cpp`. Any other device runs `reference.py`:
correct and slow. None of the ops has a backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from ._native import load_torch_ops

_ROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
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
    alibi_slopes: Tensor | None = None,
    pad: Tensor | None = None,
    scale: float | None = None,
    dense: bool = False,
) -> Tensor:
    """Attention of new tokens over a paged, per-head compressed cache and over themselves.

    A query at position p (padding not counted) on a kv head with policy (sink, window, compensate) reads exactly the
    tokens `kept = {j <= p : j < sink or p - j < window}` with `logit_j = scale * q.k_j - slope * (p - j)`. If the head
    compensates and tokens are left over, one more row stands for them: their mean key and value, with
    `logit = scale * q.mean_k + log(dropped)` (RazorAttention, compensation token; the weight is added after scaling).
    `dense`: every token of this call and every row that the cache still has are read exactly (the paper's prefill).
    A query that sees nothing yields zeros. The cache is only read: call `append` afterwards with the same tokens.

    Args:
        query: (batch, num_heads, q_len, head_dim), f32 | bf16 | f16. Rotated queries; strides free but the last.
        key: (batch, num_kv_heads, q_len, head_dim), dtype of query. Rotated keys of the new tokens.
        value: (batch, num_kv_heads, q_len, head_dim), dtype of query.
        key_pages: (num_pages, page_size, head_dim), dtype of query. Page pool; page_size a multiple of 16.
        value_pages: (num_pages, page_size, head_dim), dtype of query.
        page_table: (batch * num_kv_heads, max_pages), int32. Page ids of each (sequence, kv head), row
            `b * num_kv_heads + h`; entries past a row's length are not read.
        seen: (batch,), int64. Tokens stored so far, padding not counted.
        sink_size: (num_kv_heads,), int32, tokens.
        window_size: (num_kv_heads,), int32, tokens, the query's own included; 2**31 - 1 keeps everything.
        compensate: (num_kv_heads,), bool.
        key_sum: (batch * num_kv_heads, head_dim), float32. Sum of the dropped keys.
        value_sum: (batch * num_kv_heads, head_dim), float32. Sum of the dropped values.
        alibi_slopes: (num_heads,), float32, logit per token of distance. None: no ALiBi.
        pad: (batch,), int64. Leading new tokens of each sequence that are padding: not read, output zeros.
        scale: factor on q.k before any bias; None: head_dim ** -0.5.
        dense: see above.

    Returns:
        (batch, num_heads, q_len, head_dim), dtype of query, contiguous.

    Raises:
        ValueError: key: expected dtype float32 like query, got bfloat16
        NotImplementedError: razor::attention: expected inputs that need no gradient, got one that does
    """
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        raise NotImplementedError(
            "razor::attention: expected inputs that need no gradient, got one that does; call it under torch.no_grad()"
        )
    return torch.ops.razor.attention(  # type: ignore[no-any-return]
        query,
        key,
        value,
        key_pages,
        value_pages,
        page_table,
        seen,
        sink_size,
        window_size,
        compensate,
        key_sum,
        value_sum,
        alibi_slopes=alibi_slopes,
        pad=pad,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        dense=dense,
    )


def append(
    key: Tensor,
    value: Tensor,
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
    pad: Tensor | None = None,
) -> None:
    """Store new tokens in the cache by policy: what leaves a window is added to the sums, then `seen` grows.

    The page table must already hold pages for every row's new length, min(seen, sink + window) tokens. On an error
    nothing has changed.

    Args:
        key: (batch, num_kv_heads, q_len, head_dim), f32 | bf16 | f16. Rotated keys; strides free but the last.
        value: (batch, num_kv_heads, q_len, head_dim), dtype of key.
        key_pages: (num_pages, page_size, head_dim), dtype of key, changed in place.
        value_pages: (num_pages, page_size, head_dim), dtype of key, changed in place.
        page_table: (batch * num_kv_heads, max_pages), int32.
        seen: (batch,), int64, changed in place.
        sink_size: (num_kv_heads,), int32, tokens.
        window_size: (num_kv_heads,), int32, tokens.
        compensate: (num_kv_heads,), bool. Heads that do not compensate keep their sums as they are.
        key_sum: (batch * num_kv_heads, head_dim), float32, changed in place.
        value_sum: (batch * num_kv_heads, head_dim), float32, changed in place.
        pad: (batch,), int64. Leading new tokens of each sequence that are padding: not stored.

    Raises:
        ValueError: page_table: expected at least 3 pages for sequence 0, kv head 1, got 2
    """
    torch.ops.razor.append(
        key,
        value,
        key_pages,
        value_pages,
        page_table,
        seen,
        sink_size,
        window_size,
        compensate,
        key_sum,
        value_sum,
        pad=pad,
    )


def head_scores(query: Tensor, key: Tensor, period: int, *, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Echo and induction scores of attention heads on a prompt of one prefix token and `period` tokens repeated.

    With A the causal softmax map without the prefix's row and column, and J(i) the earlier copies of token i, for rows
    i >= period: `echo = mean_i sum_{j in J(i)} A[i, j]`, `induction = mean_i sum_{j in J(i)} A[i, j + 1]`
    (msmodelslim's definition). Keys are streamed: memory is O(tokens), the map is never built.

    Args:
        query: (batch, num_heads, 1 + period * repeats, head_dim), f32 | bf16 | f16. Rotated queries.
        key: (batch, num_kv_heads, 1 + period * repeats, head_dim), dtype of query. Rotated keys.
        period: tokens before the prompt repeats; at least two repeats.
        scale: factor on q.k; None: head_dim ** -0.5.

    Returns:
        (echo, induction), each (batch, num_heads), float32, between 0 and 1.

    Raises:
        ValueError: period: expected a value >= 1, got 0
    """
    return torch.ops.razor.head_scores(  # type: ignore[no-any-return]
        query, key, period, scale=query.shape[-1] ** -0.5 if scale is None else scale
    )


# Checks for devices without kernels, and for fakes; the words are those of cpp/bindings/array_args.h.


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
    known = (*_ROW_DTYPES, torch.int32, torch.int64, torch.bool)
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
) -> None:
    batch, num_kv_heads, _, head_dim = key.shape
    _expect_dims("key_pages", key_pages, "(num_pages, page_size, head_dim)")
    _expect_dtype("key_pages", key_pages, key.dtype, " like key")
    _expect_shape("key_pages", key_pages, [None, None, head_dim])
    if key_pages.shape[1] == 0 or key_pages.shape[1] % 16:
        raise ValueError(f"key_pages: expected a page_size that is a multiple of 16, got {key_pages.shape[1]}")
    _expect_dtype("value_pages", value_pages, key.dtype, " like key")
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


def _check_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *cache: Tensor,
    alibi_slopes: Tensor | None = None,
    pad: Tensor | None = None,
    scale: float,
    dense: bool = False,
) -> None:
    _expect_dims("query", query, "(batch, num_heads, q_len, head_dim)")
    _check_tokens(key, value, pad)
    _expect_dtype("query", query, key.dtype, " like key")
    _expect_shape("query", query, [key.shape[0], None, key.shape[2], key.shape[3]])
    _check_heads(query, key)
    if alibi_slopes is not None:
        _expect_dtype("alibi_slopes", alibi_slopes, torch.float32)
        _expect_shape("alibi_slopes", alibi_slopes, [query.shape[1]])
    _check_cache(key, *cache)


def _check_head_scores(query: Tensor, key: Tensor, period: int) -> None:
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


def _attention_fake(query: Tensor, key: Tensor, value: Tensor, *cache: Tensor, **options: object) -> Tensor:
    _check_attention(query, key, value, *cache, **options)  # type: ignore[arg-type]
    return query.new_empty(query.shape)


def check_append(key: Tensor, value: Tensor, *cache: Tensor, pad: Tensor | None = None) -> None:
    """Raise what `append` would raise for these shapes and dtypes."""
    _check_tokens(key, value, pad)
    _check_cache(key, *cache)


def _head_scores_fake(query: Tensor, key: Tensor, period: int, *, scale: float) -> tuple[Tensor, Tensor]:
    _check_head_scores(query, key, period)
    shape = (query.shape[0], query.shape[1])
    return query.new_empty(shape, dtype=torch.float32), query.new_empty(shape, dtype=torch.float32)


def _attention_reference(query: Tensor, key: Tensor, value: Tensor, *cache: Tensor, **options: object) -> Tensor:
    _check_attention(query, key, value, *cache, **options)  # type: ignore[arg-type]
    return reference.attention(query, key, value, *cache, **options)  # type: ignore[arg-type]


def _append_reference(key: Tensor, value: Tensor, *cache: Tensor, pad: Tensor | None = None) -> None:
    check_append(key, value, *cache, pad=pad)
    reference.append(key, value, *cache, pad=pad)


def _head_scores_reference(query: Tensor, key: Tensor, period: int, *, scale: float) -> tuple[Tensor, Tensor]:
    _check_head_scores(query, key, period)
    return reference.head_scores(query, key, period, scale=scale)


load_torch_ops()
_library = torch.library.Library("razor", "IMPL")  # type: ignore[no-untyped-call]
for _name, _reference, _fake in (
    ("attention", _attention_reference, _attention_fake),
    ("append", _append_reference, check_append),
    ("head_scores", _head_scores_reference, _head_scores_fake),
):
    _library.impl(_name, _reference, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"razor::{_name}", _fake, lib=_library)
