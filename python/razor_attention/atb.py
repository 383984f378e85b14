# SPDX-License-Identifier: Apache-2.0
"""Tensors for PagedAttention and ReshapeAndCache with head compression, of Huawei's ATB (Atlas A2), made on the CPU.

A row of theirs is one of ours, (sequence b, kv head h) = b * num_kv_heads + h, and has blocks of its own:

    a row that dropped tokens   [ sinks | mean of the dropped | window, oldest first | room for new tokens ]
    any other row               [ all tokens, oldest first                           | room for new tokens ]

    logit there = (q.k + razor_offset) * qkScale + mask      the offset comes before the scale
    ours        = scale * q.k + log(dropped)                 so log(dropped) / scale has to be passed: offset "atb"

"mindie" is what MindIE-LLM passes, log(dropped): the mean then weighs dropped ** scale instead of dropped. "none" is
Golden Stick's, weight 1. compressType 2 (COMPRESS_TYPE_KVHEAD_ROPE) has a mean and no mask; 1 (COMPRESS_TYPE_KVHEAD)
keeps last tokens only, and carries ALiBi as a mask. The room is filled without dropping: their window does not slide.
Nothing here has met an NPU; the names in the dicts are ATB's, and `context_lens` alone is read on the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .cache import LayerCache
from .checks import check_int
from .plan import Plan
from .reference import FULL

OFFSETS = ("atb", "mindie", "none")
_MOST_INDEX = 2**31 - 1
_SILENT = -1e4  # logit of a mean that must not count: its weight is 0 in float32


def plan_tensors(
    plan: Plan,
    lengths: Sequence[int],
    *,
    head_dim: int,
    scale: float | None = None,
    block_size: int = 128,
    max_new_tokens: int = 256,
    offset: str = "atb",
    alibi: bool = False,
) -> list[dict[str, Tensor]]:
    """What both operators need of a plan to write prompts and to attend to them, everything but keys and values.

    The plan's length rule is applied to each sequence by itself, as their rows allow. A row with one token to drop
    keeps it, which is the same as a mean of one. R = len(lengths) * num_kv_heads.

    Args:
        plan: policy. ALiBi: windows alone, no sinks, no compensation.
        lengths: tokens of each prompt.
        head_dim: elements of a key, a multiple of 32, at most 256.
        scale: factor on q.k, PagedAttention's qkScale; None: head_dim ** -0.5.
        block_size: tokens in a block, a multiple of 16, with head_dim at most 16384 elements.
        max_new_tokens: tokens that each row has room for behind the prompt.
        offset: "atb", "mindie" or "none", see the head of this module; without compensation only "atb".
        alibi: compressType 1 instead of 2; masks come from `alibi_mask`.
    Returns:
        For each layer
            block_tables: (R, most blocks of a row), int32, 0 where a row has fewer.
            context_lens: (R,), int32, rows in use behind the prompt, the mean included.
            slot_mapping: (R,), int32, first place of each row, for writing the prompt.
            seq_lens: (len(lengths),), int32, the lengths.
            wins: (R,), int32, tokens dropped; alibi: last tokens kept.
            offset_index: (R,), int32, first token dropped, -1: none. Not with alibi.
            razor_offset: (blocks, block_size), float32, 0 but at means. Not with alibi.
    Raises:
        ValueError: offset: expected 'atb' for heads that drop tokens without compensation, got 'mindie'
    """
    scale = _check_sizes(head_dim, scale, block_size, max_new_tokens, offset)
    if alibi and offset != "atb":
        raise ValueError(f"offset: expected 'atb' with alibi, which has no means to weigh, got {offset!r}")
    tokens = [check_int("lengths", length, 1) for length in lengths]
    if not tokens:
        raise ValueError("lengths: expected at least one prompt, got none")
    each = [plan.resolve(length) for length in tokens]
    seen = torch.tensor(tokens).repeat_interleave(plan.num_kv_heads)  # [R], like everything below
    layers = []
    for layer in range(plan.num_layers):
        sink, window, compensate = (torch.cat(part) for part in zip(*(p.layer(layer) for p in each), strict=True))
        dropped = (seen - sink - window).clamp(min=0)
        _check_kept(seen - dropped, compensate)
        if alibi:
            _check_alibi(sink, window, compensate)
            made, _ = _place(seen - dropped, block_size, max_new_tokens)
            made["wins"] = made["context_lens"].clone()
        else:
            mean = dropped >= torch.where(compensate, 2, 1)
            made, blocks = _place(torch.where(mean, seen - dropped + 1, seen), block_size, max_new_tokens)
            made["wins"] = torch.where(mean, dropped, 0).int()
            made["offset_index"] = torch.where(mean, sink, -1).int()
            bias = _bias(dropped[mean], compensate[mean], scale, offset)
            made["razor_offset"] = _scatter((made["slot_mapping"] + sink)[mean], bias, blocks, block_size)
        made["seq_lens"] = torch.tensor(tokens, dtype=torch.int32)
        layers.append(made)
    return layers


def cache_tensors(
    cache: LayerCache,
    *,
    scale: float | None = None,
    block_size: int = 128,
    max_new_tokens: int = 256,
    offset: str = "atb",
) -> dict[str, Tensor]:
    """One layer's cache as both operators want it: attend as the last stored token does, or write the next ones.

    Of a RazorCache: `[cache_tensors(layer.cache) for layer in razor_cache.layers]`. R = batch * num_kv_heads.

    Args:
        cache: bfloat16 or float16, with at least one token of every sequence. With ALiBi: no sinks, no compensation.
        scale, block_size, max_new_tokens, offset: as in `plan_tensors`; heads without compensation get no mean here,
            so that any offset will do for them.
    Returns:
        key_cache, value_cache: (blocks, block_size, 1, head_dim), dtype of the cache; means are rounded to it.
        block_tables, context_lens: as in `plan_tensors`; a token that is written first adds 1 to context_lens.
        slot_mapping: (R,), int32, place of the next token, further ones behind it.
        seq_lens: (batch,), int32, ones.
        wins: (R,), int32, tokens dropped so far, overruled by offset_index; ALiBi: ones.
        offset_index: (R,), int32, -1: the next token goes where it is told. Not with ALiBi.
        razor_offset: (blocks, block_size), float32, 0 but at means. Not with ALiBi.
        mask: (batch, num_heads, 1, most rows in use), dtype of the cache, see `alibi_mask`. With ALiBi only.
    Raises:
        ValueError: cache: expected bfloat16 or float16, got torch.float32
    """
    dtype, head_dim = cache.key_pages.dtype, cache.key_pages.shape[2]
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"cache: expected bfloat16 or float16, got {dtype}")
    scale = _check_sizes(head_dim, scale, block_size, max_new_tokens, offset)
    batch, heads = cache.batch_size, len(cache.sink_size)
    if (least := int(cache.seen.min())) < 1:
        raise ValueError(f"cache: expected at least one token of each sequence, got {least}")
    seen = cache.seen.cpu().repeat_interleave(heads)  # [R], like everything below
    sink, window, compensate = (x.cpu().repeat(batch) for x in (cache.sink_size, cache.window_size, cache.compensate))
    dropped = (seen - sink - window).clamp(min=0)
    _check_kept(seen - dropped, compensate)
    mean = compensate & (dropped > 0)
    if cache.alibi_slopes is not None:
        _check_alibi(sink, window, compensate)
    made, blocks = _place(seen - dropped + mean.long(), block_size, max_new_tokens)
    first = made["slot_mapping"]
    mean_place = (first + sink)[mean]
    sides = (cache.key_pages, cache.key_sum), (cache.value_pages, cache.value_sum)
    for name, (pages, sums) in zip(("key_cache", "value_cache"), sides, strict=True):
        flat = torch.zeros(blocks * block_size, head_dim, dtype=dtype)
        for r, table in enumerate(cache.page_table.cpu()):
            row = _by_age(int(seen[r]), int(sink[r]), int(window[r]))
            place = first[r] + torch.arange(len(row))
            place[int(sink[r]) :] += mean[r].long()
            page = table[row // cache.page_size].to(pages.device)
            flat[place] = pages[page, (row % cache.page_size).to(pages.device)].cpu()
        flat[mean_place] = (sums.cpu()[mean] / dropped[mean, None]).to(dtype)
        made[name] = flat.view(blocks, block_size, 1, head_dim)
    made["slot_mapping"] = first + made["context_lens"]
    made["seq_lens"] = torch.ones(batch, dtype=torch.int32)
    if cache.alibi_slopes is not None:
        made["wins"] = torch.ones_like(first)
        made["mask"] = alibi_mask(cache.alibi_slopes, made["context_lens"], num_kv_heads=heads, dtype=dtype)
    else:
        made["wins"] = dropped.int()
        made["offset_index"] = torch.full_like(first, -1)
        bias = _bias(dropped[mean], compensate[mean], scale, offset)
        made["razor_offset"] = _scatter(mean_place, bias, blocks, block_size)
    return made


def alibi_mask(slopes: Tensor, context_lens: Tensor, *, num_kv_heads: int, dtype: torch.dtype) -> Tensor:
    """ALiBi's bias of the last token as PagedAttention's mask: slope * (place - last place), places from the oldest on.

    To be made anew for every token, with context_lens that count it.

    Args:
        slopes: (num_heads,), float, logit per token.
        context_lens: (batch * num_kv_heads,), int32, rows in use, the token's own included.
        num_kv_heads: kv heads of each sequence.
        dtype: bfloat16 or float16, that of query and cache.
    Returns:
        (batch, num_heads, 1, most rows in use), 0 behind the rows in use of a head.
    Raises:
        ValueError: slopes: expected a multiple of num_kv_heads 8, got 12
    """
    if slopes.dim() != 1 or len(slopes) % check_int("num_kv_heads", num_kv_heads, 1):
        raise ValueError(f"slopes: expected a multiple of num_kv_heads {num_kv_heads}, got {list(slopes.shape)}")
    if context_lens.dim() != 1 or not len(context_lens) or len(context_lens) % num_kv_heads:
        got = list(context_lens.shape)
        raise ValueError(f"context_lens: expected [batch * num_kv_heads] with num_kv_heads {num_kv_heads}, got {got}")
    rows = context_lens.long().view(-1, num_kv_heads).repeat_interleave(len(slopes) // num_kv_heads, dim=1)
    behind = torch.arange(int(rows.max())) - rows[:, :, None] + 1  # [batch, num_heads, place], 0 at the last
    return (slopes.cpu().double()[:, None] * behind.clamp(max=0)).to(dtype)[:, :, None]


def mean_weight(dropped: int, scale: float, offset: str) -> float:
    """How many tokens the mean of `dropped` ones counts for in PagedAttention: exp(razor_offset * scale).

    Args:
        dropped: tokens that the mean stands for, at least 1.
        scale: PagedAttention's qkScale.
        offset: "atb", "mindie" or "none".
    Returns:
        `dropped`, as the paper has it, only with "atb".
    Raises:
        ValueError: offset: expected 'atb', 'mindie' or 'none', got 'log'
    """
    _check_offset(offset)
    return {"atb": float(dropped), "mindie": float(dropped**scale), "none": 1.0}[offset]


def _place(length: Tensor, block_size: int, room: int) -> tuple[dict[str, Tensor], int]:
    """Consecutive blocks for rows of `length` [R] places and room behind; the tensors that say so, and all blocks."""
    blocks = (length + room + block_size - 1) // block_size
    first, total = blocks.cumsum(0) - blocks, int(blocks.sum())
    if total * block_size > _MOST_INDEX:
        raise ValueError(f"lengths: expected at most {_MOST_INDEX} places in a layer, got {total * block_size}")
    column = torch.arange(int(blocks.max()))
    made = {
        "block_tables": torch.where(column < blocks[:, None], first[:, None] + column, 0).int(),
        "context_lens": length.int(),
        "slot_mapping": (first * block_size).int(),
    }
    return made, total


def _check_kept(kept: Tensor, compensate: Tensor) -> None:
    """PagedAttention skips an empty row, leaving what was there, and would read a silenced mean that stands alone."""
    if bool(((kept == 0) & ~compensate).any()):
        raise ValueError("window_size: expected at least one token to attend to in every head, got none")


def _bias(dropped: Tensor, compensate: Tensor, scale: float, offset: str) -> Tensor:
    """razor_offset of means of `dropped` tokens, each [means]; one that nobody asked for must not count."""
    if offset != "atb" and not bool(compensate.all()):
        raise ValueError(
            f"offset: expected 'atb' for heads that drop tokens without compensation, got {offset!r}; "
            "ReshapeAndCache writes their mean all the same, and only 'atb' can silence it"
        )
    logit = dropped.double().log()
    if offset == "atb":
        return torch.where(compensate, logit, _SILENT) / scale
    return logit if offset == "mindie" else torch.zeros_like(logit)


def _scatter(place: Tensor, bias: Tensor, blocks: int, block_size: int) -> Tensor:
    """razor_offset of a whole layer; whole, since an old value on a block used again would weigh a real token."""
    made = torch.zeros(blocks * block_size, dtype=torch.float32)
    made[place] = bias.float()
    return made.view(blocks, block_size)


def _by_age(seen: int, sink: int, window: int) -> Tensor:
    """Cache rows of the kept tokens, oldest first."""
    if seen <= sink + window:
        return torch.arange(seen)
    ring = (torch.arange(window) + seen - sink) % max(window, 1)
    return torch.cat([torch.arange(sink), sink + ring])


def _check_offset(offset: str) -> None:
    if offset not in OFFSETS:
        raise ValueError(f"offset: expected 'atb', 'mindie' or 'none', got {offset!r}")


def _check_sizes(head_dim: int, scale: float | None, block_size: int, room: int, offset: str) -> float:
    """The operators' limits; returns the scale."""
    _check_offset(offset)
    check_int("max_new_tokens", room, 0)
    if check_int("head_dim", head_dim, 32, 256) % 32:
        raise ValueError(f"head_dim: expected a multiple of 32, got {head_dim}")
    if check_int("block_size", block_size, 16) % 16 or block_size * head_dim > 16384:
        most = 16384 // head_dim
        raise ValueError(
            f"block_size: expected a multiple of 16 and at most {most} for this head_dim, got {block_size}"
        )
    if scale is None:
        return float(head_dim**-0.5)
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"scale: expected a number, got {scale!r}")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale: expected a number > 0, got {scale}")
    return float(scale)


def _check_alibi(sink: Tensor, window: Tensor, compensate: Tensor) -> None:
    """compressType 1 keeps last tokens and nothing else; its mask rules out the offset that a mean needs."""
    cut = window != FULL
    if bool((compensate & cut).any()):
        raise ValueError("compensate: expected False in every head of an ALiBi model, got True; ATB has no such form")
    if bool((sink[cut] > 0).any()):
        most = int(sink[cut].max())
        raise ValueError(f"sink_size: expected 0 in every head of an ALiBi model, got {most}; ATB has no such form")
