# SPDX-License-Identifier: Apache-2.0
"""Forks and reordered caches share pages and nothing else: programs over several, against caches of their own."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import threading
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cases import FULL, same_bits
from razor_attention import LayerCache, reference

FORMATS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": "int8",
    "int4": "int4",
}
HEAD_DIM, PAGE = 20, 16
POLICY = ((0, FULL, False), (4, 24, True))


def make(policy: tuple[tuple[int, int, bool], ...] = POLICY, kv: str = "float32", batch: int = 1) -> LayerCache:
    sizes = {"batch_size": batch, "head_dim": HEAD_DIM, "page_size": PAGE}
    if kv == "int8":  # with rows that no pool holds
        sizes |= {"exact_sink": 3, "exact_window": 7}
    return LayerCache(*zip(*policy, strict=True), dtype=FORMATS[kv], **sizes)


def tokens(count: int, batch: int = 1, heads: int = 2, kv: str = "float32") -> Tensor:
    return torch.randn(batch, heads, count, HEAD_DIM).to(FORMATS[kv] if isinstance(FORMATS[kv], torch.dtype) else None)


def rows(cache: LayerCache) -> list[Tensor]:
    """Bytes of all kept rows of every page-table row, keys then values: codes and numbers where they are quantised."""
    most, found = (cache.sink_size.long() + cache.window_size).tolist(), []
    for pages in (cache.key_pages, cache.value_pages):
        parts = (pages,) if pages.dtype.is_floating_point else reference._parts(pages, cache.head_dim)
        for r, table in enumerate(cache.page_table):
            count = min(int(cache.seen[r // len(most)]), most[r % len(most)])
            ids = table[: -(-count // cache.page_size)].long()
            found += [part[ids].flatten(0, 1)[:count].contiguous().view(torch.uint8) for part in parts]
    return found


def assert_alike(cache: LayerCache, other: LayerCache) -> None:
    assert torch.equal(cache.seen, other.seen)
    assert all(map(same_bits, (cache.key_sum, cache.value_sum), (other.key_sum, other.value_sum)))
    assert all(map(torch.equal, rows(cache), rows(other)))
    assert cache.nbytes == other.nbytes


def assert_sound(caches: list[LayerCache]) -> None:
    """The pool of these caches, and of no others, says of every page how often it is in use."""
    pool, used = caches[0]._pool, Counter[int]()
    for cache in caches:
        assert cache._pool is pool
        for table, count in zip(cache.page_table.tolist(), cache._pages(cache.seen).tolist(), strict=True):
            used.update(table[:count])
    assert pool._owners.tolist() == [used[page] for page in range(len(pool.key_pages))]
    assert sorted([*used, *pool.free_pages]) == list(range(len(pool.key_pages))) == list(range(len(pool.value_pages)))
    assert pool.shared == sum(count > 1 for count in used.values())
    assert (pool.used, pool.used == 0) == (len(used), len(pool.key_pages) == 0)


@dataclass(eq=False)
class Branch:
    """A cache under test and what its sequences were given, call by call: queries, keys and values, pad, dense."""

    cache: LayerCache
    calls: list[tuple[Tensor, Tensor, Tensor, Tensor, bool]]

    def alone(self, policy: tuple[tuple[int, int, bool], ...], kv: str) -> LayerCache:
        """A cache that nobody shares, filled by the same calls."""
        cache = make(policy, kv, self.cache.batch_size)
        for _, key, value, pad, _ in self.calls:
            cache.append(key, value, pad=pad)
        return cache


policies = st.tuples(st.integers(0, 20), st.sampled_from([0, 1, 7, 16, 33, FULL]), st.booleans())


@settings(max_examples=50)
@given(st.data(), st.lists(policies, min_size=1, max_size=3), st.sampled_from(sorted(FORMATS)), st.integers(1, 3))
def test_programs(data: st.DataObject, policy: list[tuple[int, int, bool]], kv: str, batch: int) -> None:
    """Whatever is done to one of several branches, each holds what a cache of its own holds, to the bit."""
    policy, heads = tuple(policy), len(policy)
    branches = [Branch(make(policy, kv, batch), [])]
    pool, dtype = branches[0].cache._pool, FORMATS[kv] if isinstance(FORMATS[kv], torch.dtype) else torch.bfloat16
    for _ in range(data.draw(st.integers(2, 12))):
        branch = branches[data.draw(st.integers(0, len(branches) - 1))]
        do = data.draw(st.sampled_from(["attend", "attend", "decode", "append", "fork", "reorder", "reset", "drop"]))
        size = branch.cache.batch_size
        if do in ("attend", "decode", "append"):
            q_len = 1 if do == "decode" else data.draw(st.integers(0, 40))
            q, k, v = (torch.randn(size, n, q_len, HEAD_DIM).to(dtype) for n in (2 * heads, heads, heads))
            pad = torch.tensor(data.draw(st.lists(st.integers(0, q_len), min_size=size, max_size=size)))
            dense = data.draw(st.booleans())
            alone = branch.alone(policy, kv)
            if do == "append":
                branch.cache.append(k, v, pad=pad)
                alone.append(k, v, pad=pad)
            else:
                out = branch.cache.attend(q, k, v, pad=pad, dense=dense)
                assert same_bits(out, alone.attend(q, k, v, pad=pad, dense=dense))
            branch.calls.append((q, k, v, pad, dense))
            assert_alike(branch.cache, alone)
        elif do == "fork":
            branches += [Branch(c, list(branch.calls)) for c in branch.cache.fork(data.draw(st.integers(1, 2)))]
        elif do == "reorder":
            index = torch.tensor(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=4)))
            branch.cache.reorder(index)
            branch.calls = [(*(x[index] for x in call[:4]), call[4]) for call in branch.calls]
        elif do == "reset":
            branch.cache.reset()
            branch.calls = []
        elif len(branches) > 1:
            branches.remove(branch)
            del branch
        assert_sound([b.cache for b in branches])
    for branch in branches:
        assert_alike(branch.cache, branch.alone(policy, kv))
    del branch
    branches.clear()
    assert (pool.used, pool.shared, len(pool.key_pages), pool._memory) == (0, 0, 0, [None, None])


def test_a_fork_copies_only_the_pages_that_it_writes() -> None:
    cache = make(batch=2)
    cache.append(tokens(100, 2), tokens(100, 2))  # 7 pages of the full head, 2 of the other
    page, sums = 2 * PAGE * HEAD_DIM * 4, 2 * 2 * HEAD_DIM * 4
    assert cache.pool_nbytes == cache.nbytes == 18 * page + sums
    forks = cache.fork(3)
    assert {c.pool_nbytes for c in (cache, *forks)} == {c.nbytes for c in (cache, *forks)} == {18 * page + sums}
    forks[0].append(tokens(1, 2), tokens(1, 2))  # each head of both sequences is in the middle of a page
    assert forks[0].pool_nbytes == 22 * page + sums
    forks[0].append(tokens(1, 2), tokens(1, 2))
    assert cache.pool_nbytes == 22 * page + sums
    assert cache.nbytes == forks[1].nbytes == 18 * page + sums
    cache.append(tokens(100, 2), tokens(100, 2))  # 6 pages more, and the ring all round: it has its own pages now
    assert cache.pool_nbytes == (22 + 2 * (1 + 6 + 2)) * page + sums
    del cache
    forks = forks[1:]
    assert forks[0].pool_nbytes == 18 * page + sums
    assert_sound(forks)


@pytest.mark.parametrize("kv", FORMATS)
def test_the_last_owner_writes_in_place(kv: str) -> None:
    """Without others a page is nobody else's: dropped forks cost nothing."""
    cache = make(kv=kv)
    cache.append(*[tokens(20, kv=kv)] * 2)
    table, forks = cache.page_table.clone(), cache.fork(2)
    del forks
    assert cache._pool.shared == 0
    cache.append(*[tokens(1, kv=kv)] * 2)
    assert torch.equal(cache.page_table, table)
    (fork,) = cache.fork()
    cache.append(*[tokens(1, kv=kv)] * 2)
    fork.append(*[tokens(1, kv=kv)] * 2)  # the other one has left for a copy
    assert torch.equal(fork.page_table, table)
    assert not torch.equal(cache.page_table, table)


@pytest.mark.parametrize("new", [1, 16])
def test_a_ring_comes_round_into_its_own_pages(new: int) -> None:
    """From the middle of its second page, past its end, into its first; also where the cache owned that for a while."""
    cache = make(((0, 33, True),))
    cache.append(tokens(53, heads=1), tokens(53, heads=1))
    (first,) = cache.fork()
    held = rows(first)
    cache.append(tokens(new, heads=1), tokens(new, heads=1))
    (second,) = cache.fork()
    held += rows(second)
    cache.append(tokens(new, heads=1), tokens(new, heads=1))
    assert all(map(torch.equal, held, [*rows(first), *rows(second)]))
    assert not torch.equal(rows(cache)[0], rows(second)[0])


def test_decode_looks_at_shared_pages_once_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is shared, never."""
    cache, looks = make(), []
    own = LayerCache._own_written_pages
    monkeypatch.setattr(LayerCache, "_own_written_pages", lambda *args: (looks.append(1), own(*args))[1])
    cache.append(tokens(100), tokens(100))
    for _ in range(64):
        cache.append(tokens(1), tokens(1))
    assert not looks
    (fork,) = cache.fork()
    for _ in range(64):
        fork.append(tokens(1), tokens(1))
    assert 64 / PAGE <= len(looks) <= 3 * 64 / PAGE  # ends of pages of the full head and of the ring, and of the ring
    del cache
    assert fork._pool.shared == 0


def test_reorder_shares_and_then_parts() -> None:
    """Beam search: what beams have in common is there once."""
    cache = make(batch=2)
    cache.append(tokens(100, 2), tokens(100, 2))
    cache.reorder(torch.tensor([1, 1, 1, 1]))
    assert cache._pool.used == 9
    for _ in range(5):
        cache.append(tokens(1, 4), tokens(1, 4))
        cache.reorder(torch.tensor([2, 0, 0, 3]))
    assert cache._pool.used == 9 + 2 * 2  # two of the four are one now; each of the others has a page for each head
    assert_sound([cache])


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda c: pickle.loads(pickle.dumps(c))])
@pytest.mark.parametrize("kv", FORMATS)
def test_copies_and_pickles_share_nothing(copied, kv: str) -> None:
    cache = make(kv=kv, batch=2)
    cache.append(*[tokens(50, 2, kv=kv)] * 2, pad=torch.tensor([0, 13]))
    cache.reorder(torch.tensor([1, 0, 1]))
    (fork,) = cache.fork()
    fork.append(*[tokens(3, 3, kv=kv)] * 2)
    other = copied(cache)
    assert_alike(cache, other)
    assert other._pool is not cache._pool
    assert_sound([other])
    assert len(other.key_pages) == other._pool.used == 4 + 3 + 2 * 2  # sequences of one source still share
    q, k, v = (tokens(4, 3, heads, kv) for heads in (4, 2, 2))
    assert same_bits(cache.attend(q, k, v), other.attend(q, k, v))
    assert_alike(cache, other)
    assert pickle.loads(pickle.dumps(make())).seen.tolist() == [0]


@pytest.mark.parametrize(
    ("n", "error", "message"),
    [
        (0, ValueError, "n: expected an integer >= 1, got 0"),
        (True, TypeError, "n: expected an integer, got True"),
        (1.0, TypeError, "n: expected an integer, got 1.0"),
    ],
)
def test_fork_refuses(n: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        make().fork(n)  # type: ignore[arg-type]


def test_a_fork_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make()
    cache.append(tokens(50), tokens(50))

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cache._pool, "share", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.fork(3)
    monkeypatch.undo()
    gc.collect()
    assert_sound([cache])


def test_a_failed_append_of_a_fork_changes_nothing() -> None:
    cache = make()
    cache.append(tokens(50), tokens(50))
    (fork,) = cache.fork()
    before = rows(cache)
    with pytest.raises(ValueError, match=r"^pad: expected values from 0 to 40, got 41 for sequence 0$"):
        fork.append(tokens(40), tokens(40), pad=torch.tensor([41]))
    assert_sound([cache, fork])
    assert_alike(cache, fork)
    assert all(map(torch.equal, before, rows(cache)))


# --- dropping


def test_a_fork_may_be_dropped_in_the_middle_of_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """The garbage collector may come while the pool is at work: what it drops is released right after that."""
    cache = make()
    cache.append(tokens(50), tokens(50))
    (fork,) = cache.fork()
    fork.append(tokens(100), tokens(100))
    fork.itself = fork  # type: ignore[attr-defined]  # a cycle
    del fork
    pool, reserve = cache._pool, type(cache._pool)._reserve
    before = pool.used

    def collected(self: object, count: int) -> None:
        gc.collect()
        assert pool.used == before
        reserve(self, count)

    monkeypatch.setattr(type(pool), "_reserve", collected)
    cache.append(tokens(30), tokens(30))
    monkeypatch.undo()
    assert_sound([cache])
    assert pool.used < before


def test_a_fork_may_be_dropped_in_another_thread() -> None:
    cache, stop = make(), threading.Event()
    cache.append(tokens(50), tokens(50))
    forks: list[LayerCache] = []

    def drop() -> None:
        while not stop.is_set() or forks:
            if forks:
                forks.pop()

    thread = threading.Thread(target=drop)
    thread.start()
    for _ in range(200):
        (fork,) = cache.fork()
        fork.append(tokens(20), tokens(20))
        forks.append(fork)
        del fork
    stop.set()
    thread.join()
    assert_sound([cache])
    assert cache._pool.shared == 0
    assert np.all(cache._pool._owners <= 1)
