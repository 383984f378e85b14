# SPDX-License-Identifier: Apache-2.0
"""What a cache holds, read back through its page table and decoded by `reference`; no kernel takes part.

Attention over it is written out here once more, in float64 and by blocks, for caches of millions of rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from razor_attention import LayerCache
from razor_attention.checks import check_kv_dtype
from razor_attention.reference import decode_rows, encode_rows, quantised_bytes

from .cases import Layer

_BLOCK = 32  # pages decoded at a time: what is made of them stays in the CPU's caches


def as_stored(rows: Tensor, layer: Layer) -> Tensor:
    """What a cache of this layer makes of rows, any shape (..., head_dim): the same shape, float32."""
    if layer.kv_dtype is None:
        return rows.float()
    dtype, flat = check_kv_dtype("kv_dtype", layer.kv_dtype), rows.reshape(-1, rows.shape[-1])
    blocks = (decode_rows(*encode_rows(part, dtype), rows.shape[-1], dtype).float() for part in flat.split(1 << 14))
    return torch.cat(list(blocks)).view(rows.shape)


def stored_rows(pages: Tensor, ids: Tensor, head_dim: int) -> Tensor:
    """All rows of some pages, one page after the other: (len(ids) * page_size, head_dim), float64.

    Args:
        pages: (num_pages, page_size, row width), a cache's keys or values.
        ids: (any,), integers, pages wanted.
    """
    some = pages[ids.long()]
    if pages.dtype not in (torch.int8, torch.uint8):
        return some.flatten(0, 1).double()
    code_bytes, number_bytes = quantised_bytes(head_dim, pages.dtype)
    flat = some.view(torch.uint8).flatten(1)  # of a page first the codes of all rows, then their numbers
    cut = pages.shape[1] * code_bytes
    codes, numbers = (part.reshape(-1, n) for part, n in ((flat[:, :cut], code_bytes), (flat[:, cut:], number_bytes)))
    return decode_rows(codes, numbers, head_dim, pages.dtype)


def tokens_held(cache: LayerCache, head: int) -> Tensor:
    """Tokens of the rows that a kv head of the only sequence has, by row: (rows,), int64."""
    seen, sinks, window = int(cache.seen[0]), int(cache.sink_size[head]), int(cache.window_size[head])
    row = torch.arange(_rows(cache, head))
    return torch.where(row < sinks, row, seen - 1 - (seen - 1 - row) % window) if window else row


def attended(cache: LayerCache, head: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The definition for one new token of the only sequence, by what the cache holds before it: float64.

    Args:
        cache: of one sequence, without ALiBi.
        head: kv head.
        query: (group, head_dim), of its query heads.
        key, value: (head_dim), of the new token.
    Returns:
        (group, head_dim), float64.
    """
    sinks, window, position = int(cache.sink_size[head]), int(cache.window_size[head]), int(cache.seen[0])
    token = torch.cat([tokens_held(cache, head), torch.tensor([position])])  # of every row, the new one included
    kept = (token < sinks) | (position - token < window)
    query = query.double() * cache.head_dim**-0.5
    logit = torch.cat([query @ rows.T for rows in _blocks(cache, cache.key_pages, head, key)], 1)
    logit.masked_fill_(~kept, -torch.inf)
    dropped = position + 1 - int(kept.sum())
    compensates = bool(cache.compensate[head]) and dropped > 0
    if compensates:
        left = (~kept).double()[None]  # a ring may still hold what its window has left
        means = [
            (_summed(cache, pages, head, new, left) + total[head].double()) / dropped
            for pages, new, total in (
                (cache.key_pages, key, cache.key_sum),
                (cache.value_pages, value, cache.value_sum),
            )
        ]
        logit = torch.cat([logit, query @ means[0].T + torch.tensor(dropped).double().log()], 1)
    weight = logit.softmax(1)
    if not compensates:
        return _summed(cache, cache.value_pages, head, value, weight)
    return _summed(cache, cache.value_pages, head, value, weight[:, :-1]) + weight[:, -1:] * means[1]


def _rows(cache: LayerCache, head: int) -> int:
    return min(int(cache.seen[0]), int(cache.sink_size[head]) + int(cache.window_size[head]))


def _blocks(cache: LayerCache, pages: Tensor, head: int, new: Tensor) -> Iterator[Tensor]:
    """The rows of a kv head, many at a time, and the new one: (rows, head_dim), float64."""
    rows = _rows(cache, head)
    for ids in cache.page_table[head, : -(-rows // cache.page_size)].split(_BLOCK):
        yield stored_rows(pages, ids, cache.head_dim)[:rows]
        rows -= len(ids) * cache.page_size
    yield new.double()[None]


def _summed(cache: LayerCache, pages: Tensor, head: int, new: Tensor, weight: Tensor) -> Tensor:
    """Rows weighted and added: weight (any, rows), float64; (any, head_dim)."""
    total, at = torch.zeros(len(weight), cache.head_dim, dtype=torch.float64), 0
    for rows in _blocks(cache, pages, head, new):
        total += weight[:, at : at + len(rows)] @ rows
        at += len(rows)
    return total
