# SPDX-License-Identifier: Apache-2.0
"""LayerCache: one layer's compressed KV cache. Owns the tensors; what they mean is said in cpp/razor/kv_cache.h."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from . import ops
from .checks import check_int, check_kv_dtype, check_table
from .op_checks import check_append
from .reference import FULL, row_width

_HUGE_PAGE = 2 << 20  # bytes
_GROWTH = 1.25  # of the page pool; a pool is one layer's, so growing never copies the whole cache


class LayerCache:
    """Keys and values of one layer, each kv head by its own policy, in pages taken from one pool.

    A full head keeps every token. A compressed head keeps its first `sink_size` tokens and a ring of the last
    `window_size`, and, if it compensates, the running sums of everything dropped. The window slides in decode too.

    Args:
        sink_size: (num_kv_heads,), int32, or a sequence of ints. First tokens kept.
        window_size: (num_kv_heads,), int32, or a sequence of ints. Last tokens kept; FULL keeps everything.
        compensate: (num_kv_heads,), bool, or a sequence of bools.
        batch_size: sequences.
        head_dim: elements of one key or value.
        dtype: float32, bfloat16 or float16, which queries, keys and values then have too; or torch.int8 or "int4",
            in which any of the three is stored: one scale for each row, or a scale and a zero point for every 16
            elements (see `reference.encode_rows`).
        device: where the tensors live; devices without kernels run the reference.
        page_size: tokens in a page, a multiple of 16.
        alibi_slopes: (num_heads,), float32. None: no ALiBi.

    Raises:
        ValueError: page_size: expected a multiple of 16, got 20
    """

    @torch.inference_mode(False)  # tensors made here may be changed outside inference mode later
    def __init__(
        self,
        sink_size: Tensor | Sequence[int],
        window_size: Tensor | Sequence[int],
        compensate: Tensor | Sequence[bool],
        *,
        batch_size: int,
        head_dim: int,
        dtype: torch.dtype | str,
        device: torch.device | str = "cpu",
        page_size: int = 64,
        alibi_slopes: Tensor | None = None,
    ) -> None:
        if check_int("page_size", page_size, 16) % 16:
            raise ValueError(f"page_size: expected a multiple of 16, got {page_size}")
        check_int("batch_size", batch_size, 1), check_int("head_dim", head_dim, 1)
        stored = check_kv_dtype("dtype", dtype)
        sizes = {"sink_size": sink_size, "window_size": window_size}
        policy = {name: check_table(name, value, "integers", dims=(1,)) for name, value in sizes.items()}
        for name, table in policy.items():
            if bool(((table < 0) | (table > FULL)).any()):
                raise ValueError(f"{name}: expected 0..{FULL} tokens, got {table.tolist()}")
        policy["compensate"] = check_table("compensate", compensate, "bools", dims=(1,))
        num_kv_heads = len(policy["sink_size"])
        for name, table in policy.items():
            if len(table) != num_kv_heads:
                raise ValueError(f"{name}: expected {num_kv_heads} kv heads like sink_size, got {len(table)}")
        self.sink_size = policy["sink_size"].to(device, torch.int32)
        self.window_size = policy["window_size"].to(device, torch.int32)
        self.compensate = policy["compensate"].to(device)
        self.alibi_slopes = None if alibi_slopes is None else alibi_slopes.to(device, torch.float32)
        self.seen = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.key_pages = torch.empty(0, page_size, row_width(head_dim, stored), dtype=stored, device=device)
        self.value_pages = torch.empty_like(self.key_pages)
        rows = batch_size * num_kv_heads
        self.page_table = torch.empty(rows, 0, dtype=torch.int32, device=device)
        self.key_sum = torch.zeros(rows, head_dim, dtype=torch.float32, device=device)
        self.value_sum = torch.zeros_like(self.key_sum)
        # Most rows of one (sequence, kv head), [num_kv_heads] int64.
        self._most_rows = self.sink_size.long() + self.window_size.long()
        self._free_pages: list[int] = []

    @property
    def batch_size(self) -> int:
        return self.seen.shape[0]

    @property
    def page_size(self) -> int:
        return self.key_pages.shape[1]

    @property
    def head_dim(self) -> int:
        return self.key_sum.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the pages in use plus the sums of the heads that compensate: what `Plan.kv_bytes` promises."""
        pages = int(self._pages(self.seen).sum()) * self.page_size * self.key_pages.shape[2]
        sums = int((self.compensate & (self.window_size != FULL)).sum()) * self.batch_size * self.head_dim
        return 2 * (pages * self.key_pages.element_size() + sums * self.key_sum.element_size())

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None = None,
        pad: Tensor | None = None,
        dense: bool = False,
    ) -> Tensor:
        """Attention of new tokens over the cache and themselves, then the tokens are stored.

        They read each other as they come, also where the cache is quantised: what a quantised cache loses, it loses of
        earlier calls' tokens, so that results depend on how a text is cut, within that loss.

        Args:
            query: (batch, num_heads, q_len, head_dim), the cache's dtype, or f32 | bf16 | f16 if it is quantised.
                Rotated queries.
            key: (batch, num_kv_heads, q_len, head_dim), dtype of query. Rotated keys.
            value: (batch, num_kv_heads, q_len, head_dim), dtype of query.
            scale: factor on q.k; None: head_dim ** -0.5.
            pad: (batch,), int64. Leading new tokens of each sequence that are padding: not stored, output zeros.
            dense: queries read every token of this call and every kept row (the paper's prefill); what is stored
                afterwards follows the policy all the same.

        Returns:
            (batch, num_heads, q_len, head_dim), dtype of query.

        Raises:
            ValueError: as `ops.attention` and `ops.append`; the cache is then as it was.
        """
        out = ops.attention(
            query,
            key,
            value,
            *self._tensors(),
            alibi_slopes=self.alibi_slopes,
            pad=pad,
            scale=scale,
            dense=dense,
        )
        self._store(key, value, pad)  # attention has just checked them
        return out

    def append(self, key: Tensor, value: Tensor, *, pad: Tensor | None = None) -> None:
        """Store new tokens by policy.

        Args:
            key: (batch, num_kv_heads, q_len, head_dim), the cache's dtype, or f32 | bf16 | f16 if it is quantised.
                Rotated keys.
            value: (batch, num_kv_heads, q_len, head_dim), dtype of key.
            pad: (batch,), int64. Leading new tokens of each sequence that are padding: not stored.

        Raises:
            ValueError: as `ops.append`; the cache is then as it was.
        """
        check_append(key, value, *self._tensors(), pad=pad)
        self._store(key, value, pad)

    def _store(self, key: Tensor, value: Tensor, pad: Tensor | None) -> None:
        """`append` of tokens whose shapes and dtypes have been checked."""
        before, new, size = self.seen.tolist(), key.shape[2], self.page_size
        after = (
            [t + new for t in before]
            if pad is None
            else [t + new - p for t, p in zip(before, pad.tolist(), strict=True)]
        )
        # Where no sequence enters a page, no head does: this is what nearly every decoded token gets.
        full = all(-(-a // size) <= -(-b // size) for a, b in zip(after, before, strict=True))
        taken = [] if full else self._take_pages(torch.tensor(after, device=self.seen.device))
        try:
            ops.append(key, value, *self._tensors(), pad=pad)
        except BaseException:  # also an interrupt that arrives once the tokens are stored
            if self.seen.tolist() == before:
                self._free_pages += reversed(taken)
            raise

    @torch.inference_mode(False)
    def reorder(self, index: Tensor) -> None:
        """Make sequence i what sequence index[i] was (beam search); the batch size becomes len(index).

        Args:
            index: (new_batch,), int64. May repeat and leave out sequences.

        Raises:
            ValueError: index: expected values from 0 to 2, got 3
        """
        if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32):
            raise TypeError(
                f"index: expected a tensor of integers, got {getattr(index, 'dtype', type(index).__name__)}"
            )
        if index.dim() != 1 or not len(index):
            raise ValueError(f"index: expected shape [new_batch], got {list(index.shape)}")
        sources = index.tolist()
        for source in sources:
            if not 0 <= source < self.batch_size:
                raise ValueError(f"index: expected values from 0 to {self.batch_size - 1}, got {source}")
        heads = self.sink_size.numel()
        pages = self._pages(self.seen).view(-1, heads).tolist()
        old_table = self.page_table.view(self.batch_size, heads, -1)
        gone = [
            int(page)
            for b in set(range(self.batch_size)) - set(sources)
            for h in range(heads)
            for page in old_table[b, h, : pages[b][h]]
        ]
        needed = sum(sum(pages[s]) for s in sources) - sum(sum(pages[s]) for s in set(sources))
        self._reserve(needed - len(gone))
        free = self._free_pages + gone
        index = index.to(self.seen.device, torch.int64)
        table = old_table[index]
        copies: list[tuple[int, int]] = []  # (from page, to page)
        for i, source in enumerate(sources):
            if source not in sources[:i]:
                continue  # the first to ask keeps the pages, later ones get copies
            for h in range(heads):
                for p in range(pages[source][h]):
                    copies.append((int(table[i, h, p]), free.pop()))
                    table[i, h, p] = copies[-1][1]
        if copies:
            old, new = (torch.tensor(side, device=self.seen.device) for side in zip(*copies, strict=True))
            self.key_pages[new] = self.key_pages[old]
            self.value_pages[new] = self.value_pages[old]
        sums = (x.view(-1, heads, x.shape[1])[index].flatten(0, 1) for x in (self.key_sum, self.value_sum))
        key_sum, value_sum = sums
        page_table, seen = table.reshape(len(sources) * heads, -1), self.seen[index]
        self.page_table, self.seen, self.key_sum, self.value_sum = page_table, seen, key_sum, value_sum
        self._free_pages = free

    @torch.inference_mode(False)
    def reset(self) -> None:
        """Forget every token and give the memory back."""
        self.seen.zero_()
        self.key_sum.zero_()
        self.value_sum.zero_()
        self.key_pages = self.key_pages.new_empty(0, *self.key_pages.shape[1:])
        self.value_pages = torch.empty_like(self.key_pages)
        self.page_table = self.page_table.new_empty(self.page_table.shape[0], 0)
        self._free_pages = []

    def _tensors(self) -> tuple[Tensor, ...]:
        return (
            self.key_pages,
            self.value_pages,
            self.page_table,
            self.seen,
            self.sink_size,
            self.window_size,
            self.compensate,
            self.key_sum,
            self.value_sum,
        )

    def _pages(self, seen: Tensor) -> Tensor:
        """Pages of each page-table row after `seen` tokens: (batch * num_kv_heads,), int64."""
        rows = torch.minimum(seen[:, None], self._most_rows)
        return ((rows + self.page_size - 1) // self.page_size).flatten()

    @torch.inference_mode(False)
    def _take_pages(self, after: Tensor) -> list[int]:
        """Give each page-table row the pages it needs to grow from `seen` to `after` tokens; returns these pages."""
        have, need = self._pages(self.seen), self._pages(after)
        total = int((need - have).clamp(min=0).sum())
        if total == 0:
            return []
        self._reserve(total)
        columns = int(need.max())
        if columns > self.page_table.shape[1]:
            old, width = self.page_table, self.page_table.shape[1]
            self.page_table = old.new_full((old.shape[0], max(columns, int(width * _GROWTH))), -1)
            self.page_table[:, :width] = old
        column = torch.arange(self.page_table.shape[1], device=need.device)
        missing = (column >= have[:, None]) & (column < need[:, None])
        taken = self._free_pages[: -total - 1 : -1]  # neighbours, in ascending order after a growth
        del self._free_pages[-total:]
        self.page_table[missing] = torch.tensor(taken, dtype=torch.int32, device=need.device)
        return taken

    @torch.inference_mode(False)
    def _reserve(self, pages: int) -> None:
        """Grow the pool until `pages` of it are free; on the CPU untouched pages take no memory."""
        capacity, missing = self.key_pages.shape[0], pages - len(self._free_pages)
        if missing <= 0:
            return
        size = max(capacity + missing, int(capacity * _GROWTH))
        # One after the other, so that at most one of the two exists twice at a time.
        try:
            self.key_pages = _grown(self.key_pages, size, capacity + missing)
            self.value_pages = _grown(self.value_pages, size, capacity + missing)
        except BaseException:
            self.key_pages = self.key_pages[:capacity]
            raise
        self._free_pages = [*range(size - 1, capacity - 1, -1), *self._free_pages]


def _grown(pages: Tensor, size: int, needed: int) -> Tensor:
    """A copy of the pool with `size` pages, the first `needed` of which will be filled now. On the CPU in a mapping of
    its own: what is not used yet takes no memory, and what is let go returns to the system at once, where the heap
    would keep pools of other sizes around. What will be filled lies in huge pages where it fills them: reading it is
    a sixth faster."""
    shape = (size, *pages.shape[1:])
    if pages.device.type == "cpu":
        page_bytes = math.prod(pages.shape[1:]) * pages.element_size()
        memory = mmap.mmap(-1, size * page_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        filled = needed * page_bytes // _HUGE_PAGE * _HUGE_PAGE
        if filled and hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel without them
                memory.madvise(mmap.MADV_HUGEPAGE, 0, filled)
        grown = torch.frombuffer(memory, dtype=pages.dtype).view(shape)
    else:
        grown = pages.new_empty(shape)
    grown[: len(pages)] = pages
    return grown
