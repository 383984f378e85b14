# SPDX-License-Identifier: Apache-2.0
"""Which blocks of a request hold what. Knows no vLLM.

A block holds keys and values of `block_size` tokens of one kv head: the key page, then the value page. A request gets
its blocks in one list that only grows, in this order: the sums of the heads that compensate, then for page 0, 1, ...
one block for each head that has such a page, heads that keep most first. A head keeps min(tokens, sink + window) rows
in the order of cpp/razor/kv_cache.h, so one that is not full stops taking blocks and goes round in those it has.
"""

from __future__ import annotations

from bisect import bisect_left

import torch
from torch import Tensor

from ..checks import check_int
from ..plan import Plan
from ..reference import FULL


def page_limits(plan: Plan, block_size: int) -> Tensor:
    """Pages that each kv head ever has: (num_layers, num_kv_heads), int64; FULL where it keeps every token."""
    rows = plan.sink_size.long() + plan.window_size
    return torch.where(plan.is_full, FULL, (rows + block_size - 1) // block_size)


class Growth:
    """How many blocks a request has after some tokens; the same in every tensor-parallel rank.

    Args:
        limits: pages that each kv head ever has, descending.
        sum_blocks: blocks of the compensation sums.
        block_size: tokens.
    """

    def __init__(self, limits: tuple[int, ...], sum_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self._ascending = limits[::-1]
        self._ends = [sum_blocks]  # blocks of a request with 0, 1, ... pages in its longest head
        longest = max((limit for limit in limits if limit < FULL), default=0)
        for page in range(longest):
            self._ends.append(self._ends[-1] + self._heads(page))
        self._full_heads = self._heads(longest)

    def _heads(self, page: int) -> int:
        """Heads that have this page."""
        return len(self._ascending) - bisect_left(self._ascending, page + 1)

    def first_block(self, page: int) -> int:
        """Place of a page's first block in the request's list; those of page 0 follow the sums."""
        known = min(page, len(self._ends) - 1)
        return self._ends[known] + (page - known) * self._full_heads

    def blocks(self, tokens: int) -> int:
        """Blocks of a request with so many tokens."""
        return self.first_block(-(-tokens // self.block_size))


class Layout:
    """Places of a model's pages and sums in a request's list of blocks, as one tensor-parallel rank sees them.

    Args:
        plan: of the whole model, windows final.
        block_size: tokens, a multiple of 16.
        head_dim: elements of a row.
        dtype: of keys and values.
        tp_size, tp_rank: kv heads are cut into tp_size equal parts; a request takes what the greediest rank needs.
    Raises:
        ValueError: plan: expected final windows, got window_fraction 0.2; use plan.resolve(prompt_len)
    """

    def __init__(
        self, plan: Plan, *, block_size: int, head_dim: int, dtype: torch.dtype, tp_size: int = 1, tp_rank: int = 0
    ) -> None:
        if plan.window_fraction:
            got = f"window_fraction {plan.window_fraction}"
            raise ValueError(f"plan: expected final windows, got {got}; use plan.resolve(prompt_len)")
        if check_int("block_size", block_size, 16) % 16:
            raise ValueError(f"block_size: expected a multiple of 16, got {block_size}")
        heads, rest = divmod(plan.num_kv_heads, tp_size)
        if rest or not heads:
            raise ValueError(f"tp_size: expected a divisor of {plan.num_kv_heads} kv heads, got {tp_size}")
        parts = [plan.select_kv_heads(rank * heads, (rank + 1) * heads) for rank in range(tp_size)]
        limits = [page_limits(part, block_size) for part in parts]
        merged = torch.stack([limit.flatten().sort(descending=True).values for limit in limits]).amax(0)
        self.plan, self.block_size, self.head_dim = parts[tp_rank], block_size, head_dim
        self.sums_per_block = block_size * dtype.itemsize // 2  # float32 rows in a block
        sums = 2 * max(int(part.compensate.sum()) for part in parts)
        self.limits = tuple(merged.tolist())
        self.sum_blocks = -(-sums // self.sums_per_block)
        self._own = limits[tp_rank]

    def growth(self) -> Growth:
        """How the request's list grows."""
        return Growth(self.limits, self.sum_blocks, self.block_size)

    def page_places(self, pages: int) -> Tensor:
        """Where the first `pages` pages of every head are in the list: (num_layers, num_kv_heads, pages), int64.

        0 where a head has no such page: nobody reads that entry.
        """
        growth, flat = self.growth(), self._own.flatten()
        rank = torch.empty_like(flat)  # of a head among those that keep most
        rank[flat.argsort(descending=True, stable=True)] = torch.arange(len(flat))
        first = torch.tensor([growth.first_block(page) for page in range(pages)], dtype=torch.int64)
        places = (rank[:, None] + first).masked_fill(torch.arange(pages) >= flat[:, None], 0)
        return places.view(*self._own.shape, pages)

    def sum_places(self) -> tuple[Tensor, Tensor]:
        """Block in the list and float32 row in it of every head's key sum; its value sum is the next row.

        Returns:
            (num_layers, num_kv_heads) each, int64; both 0 for heads that do not compensate.
        """
        compensate = self.plan.compensate
        row = (2 * (compensate.flatten().cumsum(0) - 1)).view(compensate.shape).masked_fill(~compensate, 0)
        return row // self.sums_per_block, row % self.sums_per_block
