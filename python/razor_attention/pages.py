# SPDX-License-Identifier: Apache-2.0
"""PagePool: the pages of a LayerCache and of its forks, each page with a count of its owners.

A page with one owner may be written; one with several is copied first. On the CPU a pool is a mapping of its own: what
was never touched takes no memory, so that a large pool lies in more address space than it needs and grows where it is.
Pages that nobody owns are kept for reuse up to a quarter of those in use; beyond that they all go back to the system,
in whole pages of the system (4 KiB). Other devices copy a pool when it grows, and give it back when it is empty.

Threads: a cache and its forks are for one thread at a time. Dropping one is safe in any thread, at any moment.
"""

from __future__ import annotations

import math
import mmap
import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ids = NDArray[np.int64]

_HUGE_PAGE = 2 << 20  # bytes
_LARGE = 16 * _HUGE_PAGE  # bytes: so large that the huge page at the end of what is used does not matter
_ROOM = 16  # address space of a large pool, in pools: all pools together stay far below what a process has
_STEP = 256 << 20  # bytes: the most that a pool grows by beyond what is asked for
_KEPT_PAGES = 16  # for reuse, however few are in use


class PagePool:
    """Pages of keys and values, taken and released by their ids.

    Args:
        page_size: tokens in a page.
        width: last dimension of a page, see `reference.row_width`.
        dtype: of the pages.
        device: where they live.
    """

    def __init__(self, page_size: int, width: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.key_pages = torch.empty(0, page_size, width, dtype=dtype, device=device)  # [num_pages, page_size, width]
        self.value_pages = torch.empty_like(self.key_pages)
        self.page_bytes = page_size * width * dtype.itemsize  # of one side
        self._lock = Lock()
        self._dropped: deque[Ids] = deque()  # pages of caches that are gone, not yet released
        self._clear()

    @property
    def free_pages(self) -> list[int]:
        return [*self._warm, *self._cold]

    @property
    def used(self) -> int:
        return len(self._owners) - len(self._warm) - len(self._cold)

    def owners(self, pages: Ids) -> NDArray[np.int32]:
        """How many page-table entries of all caches say each of these pages: (len(pages),), int32."""
        return self._owners[pages]

    def take(self, count: int) -> list[int]:
        """Ids of `count` free pages, which then have one owner; neighbours in ascending order after a growth.

        Raises:
            MemoryError: LayerCache: expected 163840 bytes for 5 more pages, got none (...); the cache is unchanged
        """
        with self._alone():
            self._reserve(count)
            taken = [*_last(self._warm, count)]
            taken += _last(self._cold, count - len(taken))
            self._owners[taken] = 1
        return taken

    def share(self, pages: Ids, times: int = 1) -> None:
        """Give these pages `times` more owners for each time that they are named."""
        with self._alone():
            np.add.at(self._owners, pages, times)
            self.shared = int((self._owners > 1).sum())

    def release(self, pages: Ids) -> None:
        """Take one owner from these pages for each time that they are named."""
        with self._alone():
            self._release(pages)

    def drop(self, pages: Ids) -> None:
        """`release` for finalizers, which may run in the middle of anything here."""
        self._dropped.append(pages)
        self._settle()

    @torch.inference_mode(False)
    def copies(self, pages: Ids) -> list[int]:
        """Ids of new pages that hold what these hold."""
        new = self.take(len(pages))
        source, target = (torch.as_tensor(ids, device=self.key_pages.device) for ids in (pages, new))
        for side in (self.key_pages, self.value_pages):
            side[target] = side[source]
        return new

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with self._lock:
            yield
        self._settle()

    def _settle(self) -> None:
        """Release what was dropped, unless somebody is at work here, who then does it."""
        while self._dropped and self._lock.acquire(blocking=False):
            try:
                while self._dropped:
                    self._release(self._dropped.popleft())
            finally:
                self._lock.release()

    def _release(self, pages: Ids) -> None:
        np.subtract.at(self._owners, pages, 1)
        self._warm += np.unique(pages[self._owners[pages] == 0])[::-1].tolist()
        if self.shared:
            self.shared = int((self._owners > 1).sum())
        if self.used == 0:
            self._clear()
        elif len(self._warm) > max(self.used // 4, _KEPT_PAGES):
            self._give_back()

    @torch.inference_mode(False)
    def _clear(self) -> None:
        """No pages and no memory."""
        self.key_pages = self.key_pages.new_empty(0, *self.key_pages.shape[1:])
        self.value_pages = torch.empty_like(self.key_pages)
        # Whole rooms of which key_pages and value_pages are the beginning; their mappings, on the CPU.
        self._rooms, self._memory = [self.key_pages, self.value_pages], list[mmap.mmap | None]([None, None])
        self._owners: NDArray[np.int32] = np.zeros(0, np.int32)  # [num_pages]
        self.shared = 0  # pages with more than one owner
        # Free pages, to be taken from the end: those that hold memory first, then those that take none.
        self._warm: list[int] = []
        self._cold: list[int] = []

    def _give_back(self) -> None:
        """Memory of all free pages to the system; on devices other than the CPU it stays."""
        self._cold, self._warm = sorted(self._cold + self._warm, reverse=True), []
        free = np.array(self._cold[::-1])
        edge = np.flatnonzero(np.diff(free) != 1)
        for memory in self._memory:
            if memory is None:
                continue
            for first, last in zip(free[[0, *(edge + 1)]].tolist(), free[[*edge, -1]].tolist(), strict=True):
                start = -(-first * self.page_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
                end = (last + 1) * self.page_bytes // mmap.PAGESIZE * mmap.PAGESIZE
                if start < end:
                    memory.madvise(mmap.MADV_DONTNEED, start, end - start)

    @torch.inference_mode(False)
    def _reserve(self, count: int) -> None:
        """Grow until `count` pages are free."""
        capacity, missing = len(self._owners), count - len(self._warm) - len(self._cold)
        if missing <= 0:
            return
        size = capacity + max(missing, min(capacity // 4, _STEP // self.page_bytes))
        try:  # one side after the other, so that at most one of the two exists twice at a time
            for i, name in enumerate(("key_pages", "value_pages")):
                if len(self._rooms[i]) < size:
                    pages = getattr(self, name)
                    self._rooms[i], self._memory[i] = _room(pages, size, capacity + missing)
                    self._rooms[i][:capacity] = pages
                    setattr(self, name, self._rooms[i][:capacity])
        except (OSError, RuntimeError, MemoryError, OverflowError) as error:
            wanted = f"{2 * (size - capacity) * self.page_bytes} bytes for {size - capacity} more pages"
            raise MemoryError(f"LayerCache: expected {wanted}, got none ({error}); the cache is unchanged") from error
        self._owners = np.concatenate([self._owners, np.zeros(size - capacity, np.int32)])
        self.key_pages, self.value_pages = self._rooms[0][:size], self._rooms[1][:size]
        self._cold = [*range(size - 1, capacity - 1, -1), *self._cold]


def _last(pages: list[int], count: int) -> list[int]:
    """Takes up to `count` ids off the end of a list, the last one first."""
    taken = pages[: -count - 1 : -1] if count else []
    del pages[len(pages) - len(taken) :]
    return taken


def _room(pages: Tensor, size: int, needed: int) -> tuple[Tensor, mmap.mmap | None]:
    """Memory for at least `size` pages, the first `needed` of which will be filled now; on the CPU in a mapping of its
    own, since the heap would keep pools of other sizes around. What will be filled lies in huge pages where it fills
    them, a large pool in huge pages only: reading it is a sixth faster."""
    shape = pages.shape[1:]
    if pages.device.type != "cpu":
        return pages.new_empty(size, *shape), None
    page_bytes = math.prod(shape) * pages.element_size()
    room, huge = size, needed * page_bytes // _HUGE_PAGE * _HUGE_PAGE
    if size * page_bytes >= _LARGE:
        # More than the machine has is refused, and so is more than a limit on the address space leaves.
        with suppress(OSError):
            room = max(size, min(_ROOM * size, _memory_bytes() // page_bytes))
            return _mapped(room, shape, pages.dtype, room * page_bytes)
        huge = size * page_bytes
    return _mapped(size, shape, pages.dtype, huge)


def _mapped(size: int, shape: torch.Size, dtype: torch.dtype, huge: int) -> tuple[Tensor, mmap.mmap]:
    """[size, *shape] in a new mapping, its first `huge` bytes in huge pages."""
    length = size * math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE, 0, huge)
    return torch.frombuffer(memory, dtype=dtype).view(size, *shape), memory


def _memory_bytes() -> int:
    """Of the machine, less a little."""
    return os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE // 16 * 15
