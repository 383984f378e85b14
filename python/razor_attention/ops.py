# SPDX-License-Identifier: Apache-2.0
"""torch.ops.razor.*: documented wrappers, fake implementations, and the reference on devices without kernels.

Schemas and CPU implementations are registered by `cpp/bindings/torch_ops.cpp`. Any other device runs `reference.py`:
correct and slow. None of the ops has a backward: inputs that need a gradient are refused by the dispatcher's Autograd
key. The wrappers here ask the same at less cost and go past that key, whose kernels are in Python.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._native import load_torch_ops
from .op_checks import (
    check_alibi_windows,
    check_append,
    check_attention,
    check_head_scores,
    check_slopes_and_bound,
    check_values,
)


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
    exact: Tensor | None = None,
    exact_sink: int = 0,
) -> Tensor:
    """Attention of new tokens over a paged, per-head compressed cache and over themselves.

    A query at position p (padding not counted) on a kv head with policy (sink, window, compensate) reads exactly the
    tokens `kept = {j <= p : j < sink or p - j < window}` with `logit_j = scale * q.k_j - slope * (p - j)`. If the head
    compensates and tokens are left over, one more row stands for them: their mean key and value, with
    `logit = scale * q.mean_k + log(dropped)` (RazorAttention, compensation token; the weight is added after scaling).
    `dense`: every token of this call and every row that the cache still has are read exactly (the paper's prefill).
    A query that sees nothing yields zeros. A value that is not finite may also reach the other queries of its kv head
    in the call, as 0 * NaN does in any product of matrices. The cache is only read: call `append` afterwards with the
    same tokens.

    Args:
        query: (batch, num_heads, q_len, head_dim), f32 | bf16 | f16. Rotated queries; strides free but the last.
        key: (batch, num_kv_heads, q_len, head_dim), dtype of query. Rotated keys of the new tokens.
        value: (batch, num_kv_heads, q_len, head_dim), dtype of query.
        key_pages: (num_pages, page_size, head_dim), dtype of query. Page pool; page_size a multiple of 16. Quantised:
            (num_pages, page_size, row bytes), int8 (head_dim + 4 bytes) or uint8 for int4 (ceil(head_dim / 2) + 2 *
            ceil(head_dim / 16)); a page holds the codes of its rows, then their numbers: see `reference.encode_rows`.
        value_pages: (num_pages, page_size, head_dim or row bytes), as key_pages. Tokens of this call are read as they
            are given, and quantised when they are stored.
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
        exact: (2, batch * num_kv_heads, exact_rows, head_dim), dtype of query. Beside a quantised cache: keys and
            values, as they came, of the first exact_sink tokens and of the newest exact_rows - exact_sink; they are
            read instead of their codes. Token t is in row t if t < exact_sink, else in row
            exact_sink + (t - exact_sink) mod (exact_rows - exact_sink). None: the codes of all.
        exact_sink: tokens.

    Returns:
        (batch, num_heads, q_len, head_dim), dtype of query, contiguous.

    Raises:
        ValueError: query: expected dtype float32 like key, got bfloat16
        NotImplementedError: razor::attention: expected inputs that need no gradient, got one that does
    """
    return _call(  # type: ignore[no-any-return]
        "attention",
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
        scale=_scale(query) if scale is None else scale,
        dense=dense,
        exact=exact,
        exact_sink=exact_sink,
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
    exact: Tensor | None = None,
    exact_sink: int = 0,
) -> None:
    """Store new tokens in the cache by policy: what leaves a window is added to the sums, then `seen` grows.

    The page table must already hold pages for every row's new length, min(seen, sink + window) tokens. On an error
    nothing has changed. Out of a quantised cache the sums get what it held; a token that is dropped within the call
    that brings it enters them as it came.

    Args:
        key: (batch, num_kv_heads, q_len, head_dim), f32 | bf16 | f16. Rotated keys; strides free but the last.
        value: (batch, num_kv_heads, q_len, head_dim), dtype of key.
        key_pages: (num_pages, page_size, head_dim), dtype of key, or (num_pages, page_size, row bytes), int8 or uint8:
            see `attention`. Changed in place.
        value_pages: (num_pages, page_size, head_dim or row bytes), as key_pages. Changed in place.
        page_table: (batch * num_kv_heads, max_pages), int32.
        seen: (batch,), int64, changed in place.
        sink_size: (num_kv_heads,), int32, tokens.
        window_size: (num_kv_heads,), int32, tokens.
        compensate: (num_kv_heads,), bool. Heads that do not compensate keep their sums as they are.
        key_sum: (batch * num_kv_heads, head_dim), float32, changed in place.
        value_sum: (batch * num_kv_heads, head_dim), float32, changed in place.
        pad: (batch,), int64. Leading new tokens of each sequence that are padding: not stored.
        exact: (2, batch * num_kv_heads, exact_rows, head_dim), dtype of key: see `attention`. Changed in place.
        exact_sink: tokens.

    Raises:
        ValueError: page_table: expected at least 3 pages for sequence 0, kv head 1, got 2
    """
    _call(
        "append",
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
        exact=exact,
        exact_sink=exact_sink,
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
    scale = _scale(query) if scale is None else scale
    return _call("head_scores", query, key, period, scale=scale)  # type: ignore[no-any-return]


def alibi_windows(
    query: Tensor,
    key: Tensor,
    slopes: Tensor,
    bound: Tensor | None = None,
    *,
    theta: float,
    alpha: float,
    method: str,
) -> tuple[Tensor, Tensor]:
    """Windows of ALiBi heads from one layer's query and key projections, or from all layers up to this one.

    With `S_h = Q_h K_h^T` over all rows, `bound_h = max(bound of the layers before, sqrt(max S_h), 0)`; S is not built.
    `msmodelslim`: `trunc(((bound_h + ln theta) + alpha) / slope_h)`, rounded to float32 at every step like that tool;
    while `bound_h` is 0, `float(ln theta + alpha) * float(1 / slope_h)`. A head of a layer with NaN among its products
    is ignored, windows may be negative. `per_head`: `ceil((bound_h - ln theta + alpha) / slope_h)`, kept within
    1..2**31 - 1. Neither is RazorAttention's Theorem 1, where `2 |W_Q W_K| (|gamma|^2 + |b|^2)` stands for the bound:
    the root of one product bounds no logit, and alpha is the margin for that.

    Args:
        query: (q_rows, num_heads, cols), f32 | bf16 | f16, all strides free. True heads of a weight [out, in] are
            `weight.view(num_heads, head_dim, in).permute(2, 0, 1)`.
        key: (k_rows, num_heads, cols), dtype of query.
        slopes: (num_heads,), float32, logit per token of distance, > 0.
        bound: (num_heads,), float32, what the call for the layer before returned; None: this layer is the first.
        theta: share of attention that may be lost, > 0 and <= 1.
        alpha: margin, a logit, >= 0.
        method: msmodelslim or per_head.

    Returns:
        (windows, bound): (num_heads,), int64, tokens; (num_heads,), float32.

    Raises:
        ValueError: query: expected finite products with key, got inf in head 3
        NotImplementedError: razor::alibi_windows: expected inputs that need no gradient, got one that does
    """
    return _call(  # type: ignore[no-any-return]
        "alibi_windows", query, key, slopes, bound, theta=theta, alpha=alpha, method=method
    )


def _scale(query: Tensor) -> float:
    """head_dim ** -0.5; of a query without head_dim anything, since the op refuses it."""
    return float(max(query.shape[-1] if query.dim() else 1, 1) ** -0.5)


def _call(name: str, *args: object, **options: object) -> Any:
    """An op without its Autograd kernel; refuses gradients itself."""
    _refuse_gradients(name, *args, *options.values())
    op = getattr(torch.ops.razor, name)
    if torch.compiler.is_compiling():
        return op(*args, **options)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args, **options)


def _refuse_gradients(name: str, *values: object) -> None:
    if not torch.is_grad_enabled():
        return
    if any(isinstance(value, Tensor) and value.requires_grad for value in values):
        raise NotImplementedError(
            f"razor::{name}: expected inputs that need no gradient, got one that does; call it under torch.no_grad()"
        )


def _autograd(name: str) -> Callable[..., Any]:
    """What the op does at the Autograd key, where direct calls of torch.ops.razor arrive."""
    redispatch, below = getattr(torch.ops.razor, name).default.redispatch, torch._C._after_autograd_keyset

    def refuse_and_go_on(keys: Any, *args: object, **options: object) -> Any:
        _refuse_gradients(name, *args, *options.values())
        return redispatch(keys & below, *args, **options)

    return refuse_and_go_on


def _attention_fake(query: Tensor, key: Tensor, value: Tensor, *cache: Tensor, **options: object) -> Tensor:
    check_attention(query, key, value, *cache, **options)  # type: ignore[arg-type]
    return query.new_empty(query.shape)


def _head_scores_fake(query: Tensor, key: Tensor, period: int, *, scale: float) -> tuple[Tensor, Tensor]:
    check_head_scores(query, key, period)
    shape = (query.shape[0], query.shape[1])
    return query.new_empty(shape, dtype=torch.float32), query.new_empty(shape, dtype=torch.float32)


def _alibi_windows_fake(
    query: Tensor, key: Tensor, slopes: Tensor, bound: Tensor | None = None, *, theta: float, alpha: float, method: str
) -> tuple[Tensor, Tensor]:
    check_alibi_windows(query, key, slopes, bound, theta=theta, alpha=alpha, method=method)
    return query.new_empty(query.shape[1], dtype=torch.int64), query.new_empty(query.shape[1], dtype=torch.float32)


def _attention_reference(query: Tensor, key: Tensor, value: Tensor, *cache: Tensor, **options: object) -> Tensor:
    check_attention(query, key, value, *cache, **options)  # type: ignore[arg-type]
    check_values(key, *cache, pad=options.get("pad"), new_tokens=False)  # type: ignore[arg-type]
    return reference.attention(query, key, value, *cache, **options)  # type: ignore[arg-type]


def _append_reference(key: Tensor, value: Tensor, *cache: Tensor, pad: Tensor | None = None, **options: object) -> None:
    check_append(key, value, *cache, pad=pad, **options)  # type: ignore[arg-type]
    check_values(key, *cache, pad=pad, new_tokens=True)
    reference.append(key, value, *cache, pad=pad, **options)  # type: ignore[arg-type]


def _head_scores_reference(query: Tensor, key: Tensor, period: int, *, scale: float) -> tuple[Tensor, Tensor]:
    check_head_scores(query, key, period)
    return reference.head_scores(query, key, period, scale=scale)


def _alibi_windows_reference(
    query: Tensor, key: Tensor, slopes: Tensor, bound: Tensor | None = None, *, theta: float, alpha: float, method: str
) -> tuple[Tensor, Tensor]:
    check_alibi_windows(query, key, slopes, bound, theta=theta, alpha=alpha, method=method)
    check_slopes_and_bound(slopes, bound)
    return reference.alibi_windows(query, key, slopes, bound, theta=theta, alpha=alpha, method=method)


load_torch_ops()
_library = torch.library.Library("razor", "IMPL")  # type: ignore[no-untyped-call]
for _name, _reference, _fake in (
    ("attention", _attention_reference, _attention_fake),
    ("append", _append_reference, check_append),
    ("head_scores", _head_scores_reference, _head_scores_fake),
    ("alibi_windows", _alibi_windows_reference, _alibi_windows_fake),
):
    _library.impl(_name, _reference, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    _library.impl(_name, _autograd(_name), "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"razor::{_name}", _fake, lib=_library)
