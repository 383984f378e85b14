# SPDX-License-Identifier: Apache-2.0
"""What every op means, in plain PyTorch, in float64 where the device has it. Slow; every fast path is compared with it.

Letters: G = num_heads / num_kv_heads query heads of one kv head, N = queries of a block, D = head_dim.
Shapes and dtypes of the arguments: `ops.py`. Nothing is checked here but what only the result shows, and float64
queries get float64 results of `attention`.
"""

from __future__ import annotations

import torch
from torch import Tensor

FULL = 2**31 - 1  # window_size of a head that keeps every token


def kept_tokens(seen: int, sink: int, window: int) -> list[int]:
    """Tokens that a head still has after `seen` tokens, oldest first."""
    return [*range(min(seen, sink)), *range(max(sink, seen - window, 0), seen)]


def row_of_token(token: int, sink: int, window: int) -> int:
    """Cache row of a kept token: sinks first, then a ring of `window` rows."""
    return token if token < sink else sink + (token - sink) % window


def _double(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.device.type in ("mps", "npu") else tensor.double()


def _locate(page_table_row: Tensor, tokens: list[int], sink: int, window: int, page_size: int) -> tuple[Tensor, Tensor]:
    rows = torch.tensor(
        [row_of_token(t, sink, window) for t in tokens], dtype=torch.int64, device=page_table_row.device
    )
    return page_table_row[rows // page_size].long(), rows % page_size


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
    scale: float,
    dense: bool = False,
) -> Tensor:
    """Attention over kept tokens and one row for all dropped ones; see `ops.attention`."""
    num_kv_heads, page_size = key.shape[1], key_pages.shape[1]
    group = query.shape[1] // num_kv_heads
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    for b, past in enumerate(seen.tolist()):
        start = 0 if pad is None else int(pad[b])
        position = past + torch.arange(query.shape[2] - start, device=query.device)  # of the new tokens
        for h, (s, w, c) in enumerate(zip(sink_size.tolist(), window_size.tolist(), compensate.tolist(), strict=True)):
            table_row, heads = b * num_kv_heads + h, slice(h * group, (h + 1) * group)
            kept = kept_tokens(past, s, w)
            where = _locate(page_table[table_row], kept, s, w, page_size)
            k = torch.cat([_double(key_pages[where]), _double(key[b, h, start:])])  # [kept + N, D]
            v = torch.cat([_double(value_pages[where]), _double(value[b, h, start:])])
            token = torch.cat([torch.tensor(kept, dtype=torch.int64, device=query.device), position])

            for first in range(0, len(position), 512):  # blocks of N queries: the whole map would not fit
                block = slice(start + first, start + first + 512)
                distance = position[first : first + 512, None] - token  # p - j, [N, kept + N]
                past_or_self = distance >= 0
                exact = past_or_self & ((token < s) | (distance < w) | dense)
                q = _double(query[b, heads, block]) * scale  # [G, N, D]
                logit = q @ k.T
                if alibi_slopes is not None:
                    logit = logit - _double(alibi_slopes[heads])[:, None, None] * distance
                logit = logit.masked_fill(~exact, -torch.inf)

                if c and w != FULL:
                    left = (past_or_self & ~exact).to(k.dtype)  # dropped by this query, still at hand
                    count = left.sum(-1) + max(0, past - s - w)  # [N]
                    mean_k = (left @ k + _double(key_sum[table_row])) / count.clamp(min=1)[:, None]  # [N, D]
                    mean_v = (left @ v + _double(value_sum[table_row])) / count.clamp(min=1)[:, None]
                    dropped_logit = (q * mean_k).sum(-1) + count.log()  # [G, N], -inf where nothing is dropped
                    logit = torch.cat([logit, dropped_logit[..., None]], -1)

                sees_nothing = logit.isneginf().all(-1, keepdim=True)
                weight = logit.softmax(-1).masked_fill(sees_nothing, 0.0)
                result = weight[..., : len(token)] @ v
                if c and w != FULL:
                    result = result + weight[..., -1:] * mean_v
                out[b, heads, block] = result.to(out.dtype)
    return out


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
    """Store new tokens by policy, adding what leaves a window to the sums; see `ops.append`."""
    num_kv_heads, page_size = key.shape[1], key_pages.shape[1]
    for b, past in enumerate(seen.tolist()):
        start = 0 if pad is None else int(pad[b])
        end = past + key.shape[2] - start
        for h, (s, w, c) in enumerate(zip(sink_size.tolist(), window_size.tolist(), compensate.tolist(), strict=True)):
            table_row = b * num_kv_heads + h
            before, after = kept_tokens(past, s, w), kept_tokens(end, s, w)
            if c and w != FULL:
                evicted = [t for t in before if t >= s and t < end - w]
                skipped = torch.arange(max(past, s), max(past, s, end - w), device=key.device) - past + start
                where = _locate(page_table[table_row], evicted, s, w, page_size)
                key_sum[table_row] += (_double(key_pages[where]).sum(0) + _double(key[b, h, skipped]).sum(0)).float()
                value_sum[table_row] += (
                    _double(value_pages[where]).sum(0) + _double(value[b, h, skipped]).sum(0)
                ).float()
            stored = [t for t in after if t >= past]
            where = _locate(page_table[table_row], stored, s, w, page_size)
            source = torch.tensor(stored, dtype=torch.int64, device=key.device) - past + start
            key_pages[where] = key[b, h, source]
            value_pages[where] = value[b, h, source]
    seen += key.shape[2] if pad is None else key.shape[2] - pad


def head_scores(query: Tensor, key: Tensor, period: int, *, scale: float) -> tuple[Tensor, Tensor]:
    """Echo and induction scores of every query head; see `ops.head_scores`."""
    batch, num_heads, tokens = query.shape[:3]
    group, n = num_heads // key.shape[1], tokens - 1
    echo = torch.zeros(batch, num_heads, dtype=torch.float32, device=query.device)
    induction = torch.zeros_like(echo)
    token = torch.arange(tokens, device=query.device)
    for first in range(1 + period, tokens, 512):  # blocks of rows: never the whole map
        row = token[first : first + 512, None]
        copies = (token >= 1) & (token < row) & ((row - token) % period == 0)  # earlier copies, prefix left out
        for b in range(batch):
            for h in range(num_heads):
                logit = scale * (_double(query[b, h, first : first + 512]) @ _double(key[b, h // group]).T)
                attn = logit.masked_fill(token > row, -torch.inf).softmax(-1)
                echo[b, h] += (attn * copies).sum() / (n - period)
                induction[b, h] += (attn[:, 1:] * copies[:, :-1]).sum() / (n - period)  # on the token after the copy
    return echo, induction


def alibi_windows(
    query: Tensor, key: Tensor, slopes: Tensor, bound: Tensor | None, *, theta: float, alpha: float, method: str
) -> tuple[Tensor, Tensor]:
    """Window of every head with this layer, and the bound behind it; see `ops.alibi_windows`."""
    log_theta = torch.tensor(theta, dtype=torch.float64).log().item()
    windows, bounds = [], []
    for h, slope in enumerate(slopes):
        k = _double(key[:, h])
        blocks = [(_double(query[i : i + 512, h]) @ k.T).max() for i in range(0, len(query), 512)]
        largest = torch.stack(blocks).max().float()  # NaN if one product is
        if largest == torch.inf or (method == "per_head" and not largest.isfinite()):
            raise ValueError(f"query: expected finite products with key, got {largest.item():g} in head {h}")
        before = torch.zeros_like(slope) if bound is None else bound[h]
        after = torch.maximum(before, largest.sqrt()) if largest > 0 else before
        if method == "per_head":
            exact = (after.item() - log_theta + alpha) / slope.item()
            window = min(max(int(-(-exact // 1)), 1), FULL)
        else:  # float32 step by step; torch takes the reciprocal of the slope where the sum is a number
            numerator = after + log_theta + alpha if after > 0 else log_theta + alpha
            exact = (numerator / slope).item()
            if not abs(exact) < 2**63:
                raise ValueError(f"slopes: expected windows within int64, got {exact:g} for head {h}")
            window = int(exact)
        windows.append(window)
        bounds.append(after)
    return torch.tensor(windows, device=query.device), torch.stack(bounds)
