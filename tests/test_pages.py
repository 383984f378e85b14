# SPDX-License-Identifier: Apache-2.0
"""PagePool: what it holds of the machine's memory, before, while and after it grows and shrinks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cases import FULL, same_bits
from razor_attention import LayerCache, pages
from razor_attention.pages import PagePool
from test_fork import assert_alike, assert_sound

SYSTEM_PAGE = pages.mmap.PAGESIZE
linux = pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="needs Linux's account of memory")


def resident(tensor: Tensor) -> int:
    """Bytes of memory behind a tensor that begins with a page of the system."""
    first, count = tensor.data_ptr() // SYSTEM_PAGE, -(-tensor.nbytes // SYSTEM_PAGE)
    with Path("/proc/self/pagemap").open("rb", buffering=0) as file:
        file.seek(8 * first)
        entries = np.frombuffer(file.read(8 * count), np.uint64)
    assert len(entries) == count
    return int((entries >> np.uint64(63)).sum()) * SYSTEM_PAGE


def filled(kv: str, batch: int, count: int, page_size: int = 64) -> LayerCache:
    """Sequences of one full head of 128 and a short one."""
    dtype = kv if kv.startswith("int") else getattr(torch, kv)
    sizes = {"batch_size": batch, "head_dim": 128, "page_size": page_size}
    cache = LayerCache([0, 4], [FULL, 60], [False, True], dtype=dtype, **sizes)
    new = torch.randn(batch, 2, count, 128).to(dtype if isinstance(dtype, torch.dtype) else torch.float32)
    cache.append(new, new)
    return cache


@linux
@pytest.mark.parametrize("left", [[0], [5], [1, 4, 6]], ids=["first", "inner", "scattered"])
@pytest.mark.parametrize("kv", ["float32", "bfloat16", "int8", "int4"])
def test_fewer_sequences_take_less_memory(kv: str, left: list[int]) -> None:
    cache, twin = (torch.manual_seed(0), filled(kv, 8, 3900))[1], (torch.manual_seed(0), filled(kv, 8, 3900))[1]
    whole, table = [resident(side) for side in (cache.key_pages, cache.value_pages)], cache.page_table
    assert min(whole) >= cache._pool.used * cache._pool.page_bytes
    cache.reorder(torch.tensor(left))
    assert_sound([cache])
    for side in (cache.key_pages, cache.value_pages):
        used = len(left) * (61 + 1) * cache._pool.page_bytes
        assert used <= resident(side) <= used + 4 * len(left) * SYSTEM_PAGE  # the ends of what is in use
    twin._pool.page_bytes = 1  # gives nothing back: all of it is less than a page of the system
    twin.reorder(torch.tensor(left))
    assert resident(twin.key_pages) == whole[0]
    assert torch.equal(cache.page_table, table[[2 * b + h for b in left for h in (0, 1)]])
    assert_alike(cache, twin)  # nothing of a page in use went with its neighbours
    for one in (cache, twin):  # into pages that were given back
        torch.manual_seed(1)
        new = torch.randn(len(left), 2, 1000, 128).to(torch.float32 if kv.startswith("int") else one.key_pages.dtype)
        one.append(new, new)
    assert_alike(cache, twin)


@linux
@pytest.mark.parametrize("kv", ["float32", "int4"])
def test_forks_give_back_what_they_held_alone(kv: str) -> None:
    cache = filled(kv, 1, 4000)
    before = resident(cache.key_pages)
    forks = cache.fork(3)
    for fork in forks:
        new = torch.randn(1, 2, 4000, 128)
        fork.append(new, new)
    assert resident(cache.key_pages) > 3.5 * before
    del fork, forks
    slack = 16 * cache._pool.page_bytes + 8 * SYSTEM_PAGE
    assert resident(cache.key_pages) <= before + slack
    cache.reset()
    assert (len(cache.key_pages), cache._pool._memory, cache.pool_nbytes) == (0, [None, None], cache.nbytes)


@linux
def test_a_few_free_pages_are_kept_for_reuse() -> None:
    """A beam search frees and takes pages at every step: the system need not hear of it."""
    cache = filled("float32", 8, 4000)
    before = resident(cache.key_pages)
    cache.reorder(torch.tensor([0, 1, 2, 3, 4, 5, 6]))
    assert resident(cache.key_pages) == before
    assert len(cache._pool._warm) == 64
    free = cache._pool.free_pages
    assert cache._pool.take(64) == sorted(free)[:64]


def test_growth_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter, but never more than a step beyond what is asked for."""
    monkeypatch.setattr(pages, "_STEP", 10 * 16 * 8 * 4)
    pool, sizes = PagePool(16, 8, torch.float32, "cpu"), [0]
    for _ in range(400):
        pool.take(1)
        sizes.append(len(pool.key_pages))
    steps = set(np.diff(sizes).tolist())
    assert max(steps) == 10
    assert {1, 5} < steps
    pool.take(1000)
    assert len(pool.key_pages) == len(pool.value_pages) == 1400


def test_a_large_pool_grows_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_LARGE", 40 * 16 * 8 * 4)
    pool, places, early = PagePool(16, 8, torch.float32, "cpu"), [], torch.empty(0)
    for i in range(500):
        (page,) = pool.take(1)
        pool.key_pages[page], pool.value_pages[page] = i, -i
        if len(pool.key_pages) > 40:
            places.append((pool.key_pages.data_ptr(), pool.value_pages.data_ptr()))
            early = early if len(early) else pool.key_pages
    assert len(set(places)) == 1
    expected = torch.arange(500.0)
    assert torch.equal(pool.key_pages[:500, 0, 0], expected)
    assert torch.equal(pool.value_pages[:500, 15, 7], -expected)
    assert torch.equal(early, pool.key_pages[: len(early)])  # what was at hand before stays good
    room = len(pool._rooms[0])
    assert room >= 16 * 40
    pool.take(room)
    assert pool.key_pages.data_ptr() != places[0][0]  # beyond its room it moves once more
    assert torch.equal(pool.key_pages[:500, 0, 0], expected)
    assert torch.equal(pool.value_pages[:500, 15, 7], -expected)


GROWING = """
import re, resource, torch
from pathlib import Path
from razor_attention import FULL, LayerCache
def status(key): return int(re.search(key + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10
cache = LayerCache([0], [FULL], [False], batch_size=1, head_dim=128, dtype=torch.float32)
new, one = torch.randn(1, 1, 64 * 1200, 128), torch.randn(1, 1, 64, 128)
cache.append(new, new)  # 39 MB of keys, and of values
Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
before, sizes = status("VmHWM"), set()
for _ in range(400):  # 13 MB each
    cache.append(one, one)
    sizes.add(len(cache.key_pages))
assert len(sizes) > 1
print(status("VmHWM") - before, 2 * 400 * 64 * 128 * 4)
"""


@linux
def test_growing_takes_no_more_memory_than_what_is_stored() -> None:
    run = subprocess.run([sys.executable, "-c", GROWING], capture_output=True, text=True, check=False)
    if "clear_refs" in run.stderr:
        pytest.skip("the peak of resident memory cannot be reset")
    assert run.returncode == 0, run.stderr
    peak, stored = map(int, run.stdout.split())
    assert abs(peak - stored) < 12 << 20  # huge pages begun, and what torch needs


def test_other_devices_copy() -> None:
    """As far as a device without memory can tell: no mapping, no room to spare."""
    pool = PagePool(16, 8, torch.bfloat16, "meta")
    for count in (5, 1, 1, 100):
        pool.copies(np.array(pool.take(count)))
    assert (pool.used, pool._memory) == (214, [None, None])
    assert [len(room) for room in pool._rooms] == [len(pool.key_pages), len(pool.value_pages)]
    pool.release(np.arange(100))
    assert len(pool.key_pages) >= 214
    pool.release(np.arange(100, 214))
    assert len(pool.key_pages) == 0


def test_pages_come_as_neighbours() -> None:
    pool = PagePool(16, 8, torch.float32, "cpu")
    assert pool.take(6) == [0, 1, 2, 3, 4, 5]
    pool.release(np.array([4, 1, 2]))
    assert pool.take(2) == [1, 2]
    assert pool.take(3) == [4, 6, 7]
    assert pool.take(0) == []
    pool.share(np.array([0, 0, 3]))
    assert pool.owners(np.array([0, 3, 5])).tolist() == [3, 2, 1]
    assert pool.shared == 2
    pool.release(np.array([0, 3]))
    assert pool.shared == 1
    (copy,) = pool.copies(np.array([0]))
    assert same_bits(pool.key_pages[copy], pool.key_pages[0])
