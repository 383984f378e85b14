# SPDX-License-Identifier: Apache-2.0
"""The rival of torch's own: FlexAttention, compiled, with the mask of a plan. It has no compensation row.

The blocks that it visits are made here from the policy. torch's create_block_mask asks its rule for every pair of
tokens, which at 32K tokens would take 34 GB of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from razor_attention import FULL, Plan

BLOCK = 128  # tokens, torch's own choice


def block_mask(plan: Plan, group: int, tokens: int) -> BlockMask:
    """Sinks and windows of layer 0, for a causal prompt.

    Args:
        plan: without compensation.
        group: query heads of each kv head.
        tokens: of the prompt, queries and keys.
    Raises:
        ValueError: plan: expected one without compensation, got 7 kv heads with it
    """
    sinks, windows, compensate = plan.layer(0)
    if bool((compensate & (windows != FULL)).any()):
        raise ValueError(f"plan: expected one without compensation, got {int(compensate.sum())} kv heads with it")
    sink, window = (table.repeat_interleave(group) for table in (sinks, windows))  # [num_heads], tokens

    def keeps(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & ((key < sink[head]) | (query - key < window[head]))

    first = torch.arange(0, tokens, BLOCK)
    query, key = first[:, None], first[None, :]  # first tokens of blocks
    sink_of, window_of = sink[:, None, None], window[:, None, None]
    nearest = (query - key - BLOCK + 1).clamp(min=0)  # least distance of a pair of tokens in two blocks, [q, k]
    some = (key < query + BLOCK) & ((key < sink_of) | (nearest < window_of))  # [num_heads, q, k]
    whole = (key + BLOCK <= query) & ((key + BLOCK <= sink_of) | (query + BLOCK - 1 - key < window_of))
    return BlockMask.from_kv_blocks(
        *_listed(some & ~whole), *_listed(whole), BLOCK_SIZE=BLOCK, mask_mod=keeps, seq_lengths=(tokens, tokens)
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Number of True blocks of each row, and their places first: (1, heads, q), (1, heads, q, k), int32, of bool."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None], order.int()[None]


def flex_rival(query: Tensor, key: Tensor, value: Tensor, plan: Plan) -> Callable[[], Tensor] | None:
    """A call of compiled FlexAttention with the plan's mask; None, and a line that says why, where it does not compile.

    Args:
        query: (1, num_heads, tokens, head_dim).
        key, value: (1, num_kv_heads, tokens, head_dim).
        plan: of which layer 0 counts, without compensation.
    """
    mask = block_mask(plan, query.shape[1] // key.shape[1], query.shape[2])
    compiled = torch.compile(flex_attention, dynamic=False)

    def call() -> Tensor:
        with torch.no_grad():
            out: Tensor = compiled(query, key, value, block_mask=mask, enable_gqa=True)
        return out

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's own
            call()
    except Exception as error:  # no C++ compiler, a CPU without AVX2, ...
        print(f"FlexAttention is left out: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
        return None
    return call
