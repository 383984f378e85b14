# SPDX-License-Identifier: Apache-2.0
"""LayerCache: one layer's compressed KV cache. Owns the tensors; what they mean is said in cpp/razor/kv_cache.h."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import ops
from .checks import check_int, check_kv_dtype, check_table
from .op_checks import check_append
from .pages import Ids, PagePool
from .reference import FULL, row_width
from .rotation import rotated_key, rotated_query

_GROWTH = 1.25  # of the page table
_NEVER = 2**62  # a token that does not come


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
        exact_sink: first tokens that a quantised cache also keeps as they came, and reads so.
        exact_window: newest tokens, likewise.
        rotate_keys: queries and keys pass through `rotation.py` as they come. Outputs stay what they are but for
            rounding; of a quantised cache they come closer where some channels of the keys are far larger than others.

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
        exact_sink: int = 0,
        exact_window: int = 0,
        rotate_keys: bool = False,
    ) -> None:
        if check_int("page_size", page_size, 16) % 16:
            raise ValueError(f"page_size: expected a multiple of 16, got {page_size}")
        check_int("batch_size", batch_size, 1), check_int("head_dim", head_dim, 1)
        stored = check_kv_dtype("dtype", dtype)
        most = 2**31 - 1 if not stored.is_floating_point else 0  # rows that are not quantised are exact anyway
        self._exact_sink = check_int("exact_sink", exact_sink, 0, most)
        self._exact_window = check_int("exact_window", exact_window, 0, most)
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
        self.rotate_keys = rotate_keys
        self.seen = torch.zeros(batch_size, dtype=torch.int64, device=device)
        rows = batch_size * num_kv_heads
        self.page_table = torch.empty(rows, 0, dtype=torch.int32, device=device)
        self.key_sum = torch.zeros(rows, head_dim, dtype=torch.float32, device=device)
        self.value_sum = torch.zeros_like(self.key_sum)
        self.exact: Tensor | None = None  # made with the first tokens, whose dtype it has; see `ops.attention`
        # Most rows of one (sequence, kv head), [num_kv_heads] int64.
        self._most_rows = self.sink_size.long() + self.window_size.long()
        self._own_until = [0] * batch_size  # of each sequence, a token before which no shared page will be written
        self._pool = PagePool(page_size, row_width(head_dim, stored), stored, device)  # last, see __del__

    @property
    def key_pages(self) -> Tensor:
        return self._pool.key_pages

    @property
    def value_pages(self) -> Tensor:
        return self._pool.value_pages

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
        """Bytes of this cache by itself, what `Plan.kv_bytes` promises: the pages that each sequence reads, whether
        they are shared or not, plus exact rows and the sums of the heads that compensate."""
        pages = int(self._pages(self.seen).sum()) * self.page_size * self.key_pages.shape[2]
        return 2 * pages * self.key_pages.element_size() + self._own_bytes

    @property
    def pool_nbytes(self) -> int:
        """Bytes of the pages that this cache and its forks hold together, each counted once, plus this cache's sums and
        exact rows. As `nbytes` where nothing is shared."""
        return 2 * self._pool.used * self._pool.page_bytes + self._own_bytes

    @property
    def _own_bytes(self) -> int:
        sums = int((self.compensate & (self.window_size != FULL)).sum())
        exact = 0 if self.exact is None else self.exact.nbytes
        return 2 * sums * self.batch_size * self.head_dim * self.key_sum.element_size() + exact

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
        if self.rotate_keys:
            query, key = rotated_query(query), rotated_key(key)
        out = ops.attention(
            query,
            key,
            value,
            *self._tensors(),
            alibi_slopes=self.alibi_slopes,
            pad=pad,
            scale=scale,
            dense=dense,
            **self._exact_rows(key),
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
        check_append(key, value, *self._tensors(), pad=pad, **self._exact_rows(key))
        self._store(rotated_key(key) if self.rotate_keys else key, value, pad)

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
        taken: list[int] = []
        try:
            if not full:
                taken = self._take_pages(torch.tensor(after, device=self.seen.device))
            if self._pool.shared and any(a > own for a, own in zip(after, self._own_until, strict=True)):
                self._own_written_pages(before, after)
            ops.append(key, value, *self._tensors(), pad=pad, **self._exact_rows(key))
        except BaseException:  # also an interrupt that arrives once the tokens are stored
            if taken and self.seen.tolist() == before:
                self._pool.release(np.array(taken))
            raise

    @torch.inference_mode(False)
    def reorder(self, index: Tensor) -> None:
        """Make sequence i what sequence index[i] was (beam search); the batch size becomes len(index).

        Nothing is copied: sequences that come from one share its pages, as forks do.

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
        if sources == list(range(self.batch_size)):
            return
        index = index.to(self.seen.device, torch.int64)
        exact = None if self.exact is None else torch.stack([self._of_sequences(x, index) for x in self.exact])
        page_table, key_sum, value_sum = (
            self._of_sequences(x, index) for x in (self.page_table, self.key_sum, self.value_sum)
        )
        own_until = [self._own_until[s] if sources.count(s) == 1 else 0 for s in sources]
        gone = self._page_ids(sorted(set(range(self.batch_size)) - set(sources)))
        self._pool.share(self._page_ids([s for i, s in enumerate(sources) if s in sources[:i]]))
        self.page_table, self.seen, self.key_sum, self.value_sum = page_table, self.seen[index], key_sum, value_sum
        self.exact = exact
        self._own_until = own_until
        self._pool.release(gone)

    @torch.inference_mode(False)
    def fork(self, n: int = 1) -> list[LayerCache]:
        """Caches that go on from here, each its own way: nobody sees what another one stores.

        They share pages, and a page is copied when one of them first writes into it: the last page of a head, or the
        next of a ring. A cache and its forks are for one thread at a time. Dropping one, in any thread, gives back the
        pages that it alone held.

        Args:
            n: forks.

        Returns:
            n caches.

        Raises:
            ValueError: n: expected an integer >= 1, got 0
        """
        forks = [object.__new__(LayerCache) for _ in range(check_int("n", n, 1))]
        self._own_until = [0] * self.batch_size
        for fork in forks:
            vars(fork).update({name: value for name, value in vars(self).items() if name != "_pool"})
            fork._own_until = list(self._own_until)
            fork.seen, fork.page_table = self.seen.clone(), self.page_table.clone()
            fork.key_sum, fork.value_sum = self.key_sum.clone(), self.value_sum.clone()
            fork.exact = None if self.exact is None else self.exact.clone()
        self._pool.share(self._page_ids(), n)
        for fork in forks:
            fork._pool = self._pool
        return forks

    @torch.inference_mode(False)
    def reset(self) -> None:
        """Forget every token and give the memory back, all but the pages that forks hold."""
        gone = self._page_ids()
        self.seen.zero_()
        self.key_sum.zero_()
        self.value_sum.zero_()
        self.page_table = self.page_table.new_empty(self.page_table.shape[0], 0)
        self._own_until = [0] * self.batch_size
        self.exact = None
        self._pool.release(gone)

    def __del__(self, process_ends: Callable[[], bool] = sys.is_finalizing) -> None:
        if not process_ends() and "_pool" in vars(self):  # without a pool it owns nothing
            self._pool.drop(self._page_ids())

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles hold the pages in use, and share none."""
        policy = self.sink_size, self.window_size, self.compensate
        form = {"page_size": self.page_size, "alibi_slopes": self.alibi_slopes, "dtype": self._kv_dtype}
        form |= {"exact_sink": self._exact_sink, "exact_window": self._exact_window, "rotate_keys": self.rotate_keys}
        return _restored, (policy, form, self._contents())

    def _exact_rows(self, key: Tensor) -> dict[str, Any]:
        """The ops' arguments of that name, for tokens like `key`."""
        rows = self._exact_sink + self._exact_window
        if rows == 0:
            return {}
        if self.exact is None:
            with torch.inference_mode(False):
                shape = (2, len(self.key_sum), rows, self.head_dim)
                self.exact = torch.zeros(shape, dtype=key.dtype, device=self.key_sum.device)
        return {"exact": self.exact, "exact_sink": self._exact_sink}

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

    @property
    def _kv_dtype(self) -> torch.dtype | str:
        """What the constructor calls the dtype of the pages."""
        return "int4" if self.key_pages.dtype == torch.uint8 else self.key_pages.dtype

    def _of_sequences(self, tensor: Tensor, index: Tensor) -> Tensor:
        """Page-table rows of some sequences: of (batch * num_kv_heads, ...), (len(index) * num_kv_heads, ...)."""
        return tensor.view(self.batch_size, self.sink_size.numel(), *tensor.shape[1:])[index].flatten(0, 1)

    def _in_use(self) -> Tensor:
        """Entries of the page table that are read: (batch * num_kv_heads, max_pages), bool."""
        column = torch.arange(self.page_table.shape[1], device=self.seen.device)
        return column < self._pages(self.seen)[:, None]

    def _page_ids(self, sequences: Sequence[int] | None = None) -> Ids:
        """Ids of the pages of these sequences, or of all."""
        table, used = self.page_table, self._in_use()
        if sequences is not None:
            index = torch.tensor(sequences, dtype=torch.int64, device=table.device)
            table, used = self._of_sequences(table, index), self._of_sequences(used, index)
        return table[used].long().cpu().numpy()

    def _contents(self) -> dict[str, Tensor]:
        """Everything that the cache holds, in as many pages as are in use; see `_fill`. Pages are copied."""
        pages, page_table = self._compact()
        index = torch.from_numpy(pages).to(self.seen.device)
        return {
            "seen": self.seen.clone(),
            "page_table": page_table,
            "key_sum": self.key_sum.clone(),
            "value_sum": self.value_sum.clone(),
            "key_pages": self.key_pages[index],
            "value_pages": self.value_pages[index],
        } | ({} if self.exact is None else {"exact": self.exact.clone()})

    def _compact(self) -> tuple[Ids, Tensor]:
        """Pages in use, each once, (num_pages,), and the page table with their places there, -1 past a row's length."""
        used = self._in_use()
        columns = int(used.sum(1).max())
        pages, place = np.unique(self._page_ids(), return_inverse=True)
        table = torch.full(used.shape, -1, dtype=torch.int32, device=used.device)
        table[used] = torch.from_numpy(place).to(used.device, torch.int32)
        return pages, table[:, :columns].contiguous()

    @torch.inference_mode(False)
    def _fill(self, contents: dict[str, Tensor]) -> None:
        """Make this empty cache one that holds what `_contents` said of another; every value has been checked.

        Args:
            contents: seen, page_table, key_sum and value_sum as `ops.attention` has them, and key_pages and
                value_pages, (num_pages, page_size, row width); exact where there are such rows.
        """
        count, device = len(contents["key_pages"]), self.seen.device
        self._pool.take(count)  # 0, 1, ... of an empty pool
        self._pool.key_pages[:count] = contents["key_pages"].to(device)
        self._pool.value_pages[:count] = contents["value_pages"].to(device)
        self.seen, self.page_table, self.key_sum, self.value_sum = (
            contents[name].to(device, copy=True) for name in ("seen", "page_table", "key_sum", "value_sum")
        )
        if "exact" in contents:
            self.exact = contents["exact"].to(device, copy=True)
        self._pool.share(self._page_ids())
        self._pool.release(np.arange(count))

    @torch.inference_mode(False)
    def _take_pages(self, after: Tensor) -> list[int]:
        """Give each page-table row the pages it needs to grow from `seen` to `after` tokens; returns these pages."""
        have, need = self._pages(self.seen), self._pages(after)
        total = int((need - have).clamp(min=0).sum())
        if total == 0:
            return []
        columns, table = int(need.max()), self.page_table
        if columns > table.shape[1]:
            width = table.shape[1]
            table = table.new_full((table.shape[0], max(columns, int(width * _GROWTH))), -1)
            table[:, :width] = self.page_table
        count = (need - have).clamp(min=0)
        row = torch.repeat_interleave(count)
        column = torch.arange(total, device=row.device) - (count.cumsum(0) - count - have)[row]
        taken = self._pool.take(total)
        table[row, column] = torch.tensor(taken, dtype=torch.int32, device=row.device)
        self.page_table = table
        return taken

    @torch.inference_mode(False)
    def _own_written_pages(self, before: list[int], after: list[int]) -> None:
        """Copy what is shared of the stored pages into which tokens before ... after - 1 will be written."""
        begin, end = (torch.tensor(tokens, device=self.seen.device)[:, None] for tokens in (before, after))
        sink, window, size = self.sink_size.long(), self.window_size.long(), self.page_size
        # Rows that are written, [batch, heads]: sinks, and from the first of these tokens that stays in the ring on,
        # up to its end and from its beginning.
        first = end.sub(window).maximum(sink).maximum(begin)
        start = sink + (first - sink) % window.clamp(min=1)
        stop = start + (end - first).clamp(min=0)
        row = size * torch.arange(self.page_table.shape[1], device=sink.device)  # first of each page
        written = torch.zeros(*start.shape, len(row), dtype=torch.bool, device=sink.device)
        for low, high in (begin, end.minimum(sink)), (start, stop.minimum(self._most_rows)), (sink, stop - window):
            written |= ((low < high)[..., None]) & (row < high[..., None]) & (row + size > low[..., None])
        entries = (written.flatten(0, 1) & self._in_use()).nonzero()  # [pages, 2]; pages not in use yet are new
        pages = self.page_table[entries[:, 0], entries[:, 1]].long().cpu().numpy()
        # Where all owners of a page are among these, the first to ask keeps it.
        _, ask, asks = np.unique(pages, return_index=True, return_counts=True)
        owners = self._pool.owners(pages)
        copied = owners > 1
        copied[ask[owners[ask] == asks]] = False
        if copied.any():
            copies = self._pool.copies(pages[copied])
            row, column = entries[torch.from_numpy(copied).to(sink.device)].unbind(1)
            self.page_table[row, column] = torch.tensor(copies, dtype=torch.int32, device=sink.device)
            self._pool.release(pages[copied])
        # No other page comes before the end of the page, or of the ring, of the last token.
        last = torch.where(end > sink, sink + (end - 1 - sink) % window.clamp(min=1), end - 1)
        left = (size - 1 - last % size).minimum(self._most_rows - 1 - last)
        until = (end + left.masked_fill((window == 0) & (end > sink), _NEVER)).amin(1).tolist()
        self._own_until = [u if a > b else a for u, a, b in zip(until, after, before, strict=True)]


def _restored(policy: tuple[Tensor, ...], form: dict[str, Any], contents: dict[str, Tensor]) -> LayerCache:
    seen, head_dim = contents["seen"], contents["key_sum"].shape[1]
    cache = LayerCache(*policy, batch_size=len(seen), head_dim=head_dim, device=seen.device, **form)
    cache._fill(contents)
    return cache
