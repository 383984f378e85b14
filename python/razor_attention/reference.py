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
GROUP = 16  # elements of an int4 row that share one word; kInt4Group in cpp/razor/kv_format.h


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


def quantised_bytes(head_dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of one row's codes and numbers in pages of int8 or uint8 (two codes of 4 bits in a byte)."""
    return (head_dim, 4) if dtype == torch.int8 else ((head_dim + 1) // 2, 2 * -(-head_dim // GROUP))


def row_width(head_dim: int, dtype: torch.dtype) -> int:
    """Last dimension of pages: bytes of a row where they are int8 or uint8, its elements otherwise."""
    return sum(quantised_bytes(head_dim, dtype)) if dtype in (torch.int8, torch.uint8) else head_dim


def _int4_words(least: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """Bits of float32 scales, int32, and zero points, float32, of groups between least <= 0 and largest >= 0."""

    def zero_point(bits: Tensor) -> Tensor:
        return (-least / bits.view(torch.float32) - 0.5).ceil()

    bits = (((largest - least) / 16).view(torch.int32) + 0xFFFFF) & -0x100000  # rounded up to 4 significant bits
    bits = bits.clamp(min=0x800000)
    fits = zero_point(bits) <= 15.5 - largest / bits.view(torch.float32)
    bits = torch.where(fits, bits, bits + 0x100000)
    return bits, zero_point(bits)


def encode_rows(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Quantised rows, all of it in float32; what is not finite makes a scale NaN.

    int8: scale = max |x| / 127, code = round(x / scale); no element is off by more than half a scale.

    int4, by groups of 16: lo = min(min x, 0), hi = max(max x, 0); the scale is the smallest number of 4 significant
    bits >= (hi - lo) / 16 and 2^-126, zero = ceil(-lo / scale - 0.5), code = round(x / scale) + zero within 0 ... 15.
    Where zero > 15.5 - hi / scale, so that the codes do not reach hi, the scale is the next larger one. No element is
    off by more than half a scale, which is at most 9/8 (hi - lo) / 15 (or 2^-126), and what stands for an element,
    (code - zero) * scale, is a bfloat16 number, zero where the element is. A span beyond float32 counts as not finite.

    Args:
        rows: (count, head_dim), f32 | bf16 | f16.
        dtype: int8 or uint8 (int4).

    Returns:
        codes, (count, head_dim) or (count, ceil(head_dim / 2)), and numbers, (count, number bytes), both uint8. int8:
        the numbers are the float32 scale. int4: byte i holds element i in its low half, element i + ceil(head_dim / 2)
        in the high one; the numbers are 16 bits for each group, the upper 12 of the float32 scale and the zero point.
    """
    x = rows.float()
    if dtype == torch.int8:
        largest = x.abs().amax(-1, keepdim=True)
        scale = (largest / torch.full_like(largest, 127)).masked_fill(~x.isfinite().all(-1, keepdim=True), torch.nan)
        code = (x / scale).round().clamp(-127, 127).masked_fill(~(scale > 0), 0)
        return code.to(torch.int8).view(torch.uint8), scale.view(torch.uint8)
    count, head_dim = x.shape
    x = torch.nn.functional.pad(x, (0, -head_dim % GROUP))  # zeros change neither lo nor hi
    x = x.view(count, -(-head_dim // GROUP), GROUP)
    least, largest = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
    finite = (largest - least).isfinite()
    bits, zero = _int4_words(least, largest)
    code = ((x / bits.view(torch.float32)[..., None]).round() + zero[..., None]).clamp(0, 15)
    code = code.masked_fill(~finite[..., None], 0).to(torch.uint8).flatten(1)[:, :head_dim]
    low, high = code[:, : (head_dim + 1) // 2], code[:, (head_dim + 1) // 2 :]
    high = torch.nn.functional.pad(high, (0, head_dim % 2))
    word = (bits >> 16).masked_fill(~finite, 0x7FC0) | zero.masked_fill(~finite, 0).int()
    return low | high << 4, word.to(torch.int16).view(torch.uint8)


def decode_rows(codes: Tensor, numbers: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
    """What `encode_rows` made, exactly: (count, head_dim), code * scale or (code - zero) * scale."""
    if dtype == torch.int8:
        return _double(codes.view(torch.int8)) * _double(numbers.view(torch.float32))
    word = numbers.view(torch.int16).int()
    scale, zero = ((word & 0xFFF0) << 16).view(torch.float32), word & 15
    code = torch.cat([codes & 15, codes >> 4], 1)[:, :head_dim]
    group = torch.arange(head_dim, device=codes.device) // GROUP
    return _double(code - zero[:, group]) * _double(scale[:, group])


def _parts(pages: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Codes and numbers of quantised pages: (num_pages, page_size, bytes) each, uint8, the pages' own memory. In a page
    the codes of all its rows come first."""
    num_pages, page_size, width = pages.shape
    code, number = quantised_bytes(head_dim, pages.dtype)
    flat = pages.view(torch.uint8).view(num_pages, page_size * width)
    codes, numbers = flat[:, : page_size * code], flat[:, page_size * code :]
    return codes.view(num_pages, page_size, code), numbers.view(num_pages, page_size, number)


def _read(pages: Tensor, where: tuple[Tensor, Tensor], head_dim: int) -> Tensor:
    """Rows of pages: (count, head_dim)."""
    if pages.dtype not in (torch.int8, torch.uint8):
        return _double(pages[where])
    codes, numbers = _parts(pages, head_dim)
    return decode_rows(codes[where], numbers[where], head_dim, pages.dtype)


def _write(pages: Tensor, where: tuple[Tensor, Tensor], rows: Tensor) -> None:
    if pages.dtype not in (torch.int8, torch.uint8):
        pages[where] = rows
        return
    codes, numbers = _parts(pages, rows.shape[1])
    codes[where], numbers[where] = encode_rows(rows, pages.dtype)


def _exact(exact: Tensor, exact_sink: int, seen: int, tokens: list[int]) -> tuple[Tensor, Tensor]:
    """Which of the tokens have an exact row beside their codes after `seen` tokens: their indices, and these rows."""
    ring = exact.shape[2] - exact_sink
    there = set(kept_tokens(seen, exact_sink, ring))
    found = [(i, row_of_token(t, exact_sink, ring)) for i, t in enumerate(tokens) if t in there]
    index = torch.tensor(found, dtype=torch.int64, device=exact.device).view(-1, 2)
    return index[:, 0], index[:, 1]


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
    exact: Tensor | None = None,
    exact_sink: int = 0,
) -> Tensor:
    """Attention over kept tokens and one row for all dropped ones; see `ops.attention`."""
    num_kv_heads, page_size, head_dim = key.shape[1], key_pages.shape[1], key.shape[3]
    group = query.shape[1] // num_kv_heads
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    for b, past in enumerate(seen.tolist()):
        start = 0 if pad is None else int(pad[b])
        position = past + torch.arange(query.shape[2] - start, device=query.device)  # of the new tokens
        for h, (s, w, c) in enumerate(zip(sink_size.tolist(), window_size.tolist(), compensate.tolist(), strict=True)):
            table_row, heads = b * num_kv_heads + h, slice(h * group, (h + 1) * group)
            kept = kept_tokens(past, s, w)
            where = _locate(page_table[table_row], kept, s, w, page_size)
            stored_k, stored_v = _read(key_pages, where, head_dim), _read(value_pages, where, head_dim)
            if exact is not None:
                index, row = _exact(exact, exact_sink, past, kept)
                stored_k[index], stored_v[index] = _double(exact[0, table_row, row]), _double(exact[1, table_row, row])
            k = torch.cat([stored_k, _double(key[b, h, start:])])  # [kept + N, D]
            v = torch.cat([stored_v, _double(value[b, h, start:])])
            token = torch.cat([torch.tensor(kept, dtype=torch.int64, device=query.device), position])

            for first in range(0, len(position), 512):  # blocks of N queries: the whole map would not fit
                block = slice(start + first, start + first + 512)
                distance = position[first : first + 512, None] - token  # p - j, [N, kept + N]
                past_or_self = distance >= 0
                seen_rows = past_or_self & ((token < s) | (distance < w) | dense)
                q = _double(query[b, heads, block]) * scale  # [G, N, D]
                logit = q @ k.T
                if alibi_slopes is not None:
                    logit = logit - _double(alibi_slopes[heads])[:, None, None] * distance
                logit = logit.masked_fill(~seen_rows, -torch.inf)

                if c and w != FULL:
                    left = (past_or_self & ~seen_rows).to(k.dtype)  # dropped by this query, still at hand
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
    exact: Tensor | None = None,
    exact_sink: int = 0,
) -> None:
    """Store new tokens by policy, adding what leaves a window to the sums; see `ops.append`."""
    num_kv_heads, page_size, head_dim = key.shape[1], key_pages.shape[1], key.shape[3]
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
                for side, total, pages, new in ((0, key_sum, key_pages, key), (1, value_sum, value_pages, value)):
                    rows = _read(pages, where, head_dim)
                    if exact is not None:
                        index, row = _exact(exact, exact_sink, past, evicted)
                        rows[index] = _double(exact[side, table_row, row])
                    total[table_row] += (rows.sum(0) + _double(new[b, h, skipped]).sum(0)).float()
            stored = [t for t in after if t >= past]
            where = _locate(page_table[table_row], stored, s, w, page_size)
            source = torch.tensor(stored, dtype=torch.int64, device=key.device) - past + start
            _write(key_pages, where, key[b, h, source])
            _write(value_pages, where, value[b, h, source])
            if exact is not None:
                newest = [t for t in kept_tokens(end, exact_sink, exact.shape[2] - exact_sink) if t >= past]
                row = _exact(exact, exact_sink, end, newest)[1]
                source = torch.tensor(newest, dtype=torch.int64, device=key.device) - past + start
                exact[0, table_row, row], exact[1, table_row, row] = key[b, h, source], value[b, h, source]
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
        # Rounded once: a float32 root is not correctly rounded by every CPU's torch.
        after = torch.maximum(before, largest.double().sqrt().float()) if largest > 0 else before
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
