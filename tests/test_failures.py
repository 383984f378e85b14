# SPDX-License-Identifier: Apache-2.0
"""When something breaks half-way nothing is lost, and numbers that are not numbers are not hidden."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import GenerationConfig

from razor_attention import FULL, LayerCache, Plan, RazorCache, _core, attach, ops, pages, reference
from razor_attention.hf.cache import Block
from razor_attention.hf.names import CACHE
from tiny_models import MIXED, answer, prompts, tiny_model

IDS, MASK = prompts(30, 30)


def layer_cache(batch_size: int = 1) -> LayerCache:
    return LayerCache([2, 0], [8, FULL], [True, False], batch_size=batch_size, head_dim=8, dtype=torch.float32)


def tokens(count: int, batch_size: int = 1) -> torch.Tensor:
    return torch.randn(batch_size, 2, count, 8)


def assert_sound(cache: LayerCache) -> None:
    """Every page belongs to a page-table row or is free."""
    used = [
        page for row, n in zip(cache.page_table, cache._pages(cache.seen), strict=True) for page in row[:n].tolist()
    ]
    assert sorted([*set(used), *cache._pool.free_pages]) == list(range(len(cache.key_pages)))
    assert cache.key_pages.shape == cache.value_pages.shape


# --- the cache


@pytest.mark.parametrize("stored", [True, False], ids=["after the tokens were stored", "before"])
def test_interrupted_append(monkeypatch: pytest.MonkeyPatch, stored: bool) -> None:
    cache, twin = layer_cache(), layer_cache()
    key = tokens(100)
    for one in (cache, twin):
        one.append(key, key)
    append = ops.append

    def interrupted(*args: object, **kwargs: object) -> None:
        if stored:
            append(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(ops, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.append(key, key)
    monkeypatch.undo()
    if stored:
        twin.append(key, key)
    assert_sound(cache)
    query = torch.randn(1, 4, 3, 8)
    new = tokens(3)
    assert torch.equal(cache.attend(query, new, new), twin.attend(query, new, new))


@pytest.mark.parametrize("failing", [1, 2], ids=["keys", "values"])
@pytest.mark.parametrize("shared", [False, True])
def test_no_memory_for_more_pages(monkeypatch: pytest.MonkeyPatch, failing: int, shared: bool) -> None:
    cache, twin = layer_cache(), layer_cache()
    key = tokens(60)
    for one in (cache, twin):
        one.append(key, key)
    forks = cache.fork() if shared else []  # then there is none for a copy of the page that is being filled
    calls, room = [], pages._room

    def out_of_memory(*args: torch.Tensor) -> object:
        calls.append(1)
        if len(calls) == failing:
            raise OSError("Cannot allocate memory")
        return room(*args)

    monkeypatch.setattr(pages, "_room", out_of_memory)
    before = [tensor.clone() for tensor in cache._tensors()]
    with pytest.raises(MemoryError) as error:
        cache.append(*[tokens(3 if shared else 500)] * 2)
    count = 2 if shared else 8
    wanted = f"{count * 2 * 2048} bytes for {count} more pages"
    message = f"LayerCache: expected {wanted}, got none (Cannot allocate memory); the cache is unchanged"
    assert str(error.value) == message
    monkeypatch.undo()
    assert all(torch.equal(old, new) for old, new in zip(before, cache._tensors(), strict=True))
    del forks
    assert_sound(cache)
    for one in (cache, twin):
        one.append(key, key)
    query, new = torch.randn(1, 4, 3, 8), tokens(3)
    assert torch.equal(cache.attend(query, new, new), twin.attend(query, new, new))


LIMITED = """
import resource, torch
from razor_attention import FULL, LayerCache
def size(): return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
cache = LayerCache([0] * 8, [FULL] * 8, [False] * 8, batch_size=1, head_dim=64, dtype=torch.float32)
new, many = (torch.randn(1, 8, n, 64) for n in (1000, 40000))
cache.append(new, new)
kept = cache.key_pages[cache.page_table[:, :15].long()].clone()
for room in (60 << 20, 120 << 20):  # for neither pool of 82 MB, and for the keys alone
    resource.setrlimit(resource.RLIMIT_AS, (size() + room, resource.RLIM_INFINITY))
    try:
        cache.append(many, many)
    except MemoryError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert cache.seen.tolist() == [1000] and len(cache.key_pages) == len(cache.value_pages) == 8 * 16
    assert torch.equal(kept, cache.key_pages[cache.page_table[:, :15].long()])
resource.setrlimit(resource.RLIMIT_AS, (size() + (200 << 20), resource.RLIM_INFINITY))
cache.append(many, many)  # without address space to spare
assert torch.equal(kept, cache.key_pages[cache.page_table[:, :15].long()])
assert len(cache._pool._rooms[0]) == len(cache.key_pages)
"""


def test_a_limit_on_the_address_space() -> None:
    """The real thing: mmap refuses, first for the keys, then for the values."""
    run = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    message = (
        "LayerCache: expected 163840000 bytes for 5000 more pages, got none ([Errno 12] Cannot allocate memory); "
        "the cache is unchanged\n"
    )
    assert run.stdout == 2 * message


def test_interrupted_reorder(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = layer_cache(3)
    key = tokens(100, 3)
    cache.append(key, key)
    before = [tensor.clone() for tensor in cache._tensors()]

    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cache._pool, "share", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.reorder(torch.tensor([1, 1, 1, 1]))
    monkeypatch.undo()
    assert_sound(cache)
    assert all(torch.equal(old, new) for old, new in zip(before[2:], cache._tensors()[2:], strict=True))
    cache.reorder(torch.tensor([1, 1, 1, 1]))
    assert_sound(cache)


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (torch.tensor([True, False]), TypeError, "index: expected a tensor of integers, got torch.bool"),
        ([0, 1], TypeError, "index: expected a tensor of integers, got list"),
        (torch.tensor([[0]]), ValueError, r"index: expected shape \[new_batch\], got \[1, 1\]"),
    ],
)
def test_reorder_refuses(index: object, error: type[Exception], message: str) -> None:
    cache = layer_cache(2)
    with pytest.raises(error, match=f"^{message}$"):
        cache.reorder(index)  # type: ignore[arg-type]


def test_policy_is_copied() -> None:
    window = torch.tensor([8, FULL], dtype=torch.int32)
    cache = LayerCache([2, 0], window, [True, False], batch_size=1, head_dim=8, dtype=torch.float32)
    window[0] = 1000
    assert cache.window_size.tolist() == [8, FULL]


def test_a_cache_from_inference_mode_goes_on_outside_it() -> None:
    cache = layer_cache()
    with torch.inference_mode():
        cache.append(tokens(70), tokens(70))
    cache.append(tokens(70), tokens(70))
    assert cache.seen.tolist() == [140]


# --- NaN


NAN = """
import torch
from razor_attention import FULL, LayerCache, isa
for where in ("query", "key", "overflow"):
    q, k, v = (torch.zeros(1, 1, 20, 8) + 0.5 for _ in range(3))
    if where == "query": q[:] = torch.nan
    if where == "key": k[0, 0, 3] = torch.nan
    if where == "overflow": q[:], k[:] = 3e38, 3e38
    cache = LayerCache([0], [FULL], [False], batch_size=1, head_dim=8, dtype=torch.float32)
    out = cache.attend(q, k, v)
    assert out[0, 0, -1].isnan().all(), (isa(), where, out[0, 0, -1])
"""


@pytest.mark.parametrize("isa", ["scalar", "neon", "avx2", "avx512", "avx512_bf16", "amx"])
def test_nan_stays_nan(isa: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", NAN], env=os.environ | {"RAZOR_ISA": isa}, capture_output=True, text=True, check=False
    )
    if "expected an instruction set of this CPU" in run.stderr:
        pytest.skip("this CPU lacks it")
    assert run.returncode == 0, run.stderr


def test_nan_stays_nan_in_the_reference() -> None:
    q, k, v = (torch.full((1, 1, 20, 8), 0.5) for _ in range(3))
    k[0, 0, 3] = torch.nan
    cache = LayerCache([0], [FULL], [False], batch_size=1, head_dim=8, dtype=torch.float32)
    out = reference.attention(q, k, v, *cache._tensors(), scale=1.0)
    assert out[0, 0, 3:].isnan().all()
    assert torch.allclose(out[0, 0, :3], scaled_dot_product_attention(q, k, v, is_causal=True)[0, 0, :3])


# --- a wrong RAZOR_ISA, through the ops


@pytest.mark.parametrize("call", ["cache.append(x, x)", "cache.attend(x, x, x)", "head_scores(x, x, 1)"])
def test_wrong_isa_is_refused_by_every_op(call: str) -> None:
    code = f"""
import torch
from razor_attention import FULL, LayerCache, head_scores
x = torch.zeros(1, 1, 3, 8)
cache = LayerCache([0], [FULL], [False], batch_size=1, head_dim=8, dtype=torch.float32)
try:
    {call}
except ValueError as error:
    assert str(error) == "RAZOR_ISA: expected one of scalar, neon, avx2, avx512, avx512_bf16, amx, got sse9", error
    assert cache.seen.tolist() == [0]
else:
    raise SystemExit("not refused")
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"RAZOR_ISA": "sse9"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr


# --- numpy


def test_numpy_arrays_that_only_look_right() -> None:
    good = np.zeros((1, 1, 3, 8), np.float32)
    with pytest.raises(ValueError, match=r"^query: expected elements of at least one byte, got none$"):
        _core.head_scores(np.empty((1, 1, 3, 8), "V0"), good, 1, scale=1.0)
    with pytest.raises(ValueError, match=r"^key: expected dtype float32 like query, got another dtype$"):
        _core.head_scores(good, good.astype(">f4"), 1, scale=1.0)


# --- transformers


def test_layers_out_of_step_are_refused() -> None:
    model = tiny_model("llama")
    with torch.no_grad(), attach(model, MIXED):
        cache = RazorCache(model.config, MIXED)
        model(IDS, **{CACHE: cache})
        hook = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(IDS[:, :5], **{CACHE: cache})
        hook.remove()
        with pytest.raises(RuntimeError, match=r"^RazorCache: expected all layers to have seen the same tokens"):
            model(IDS[:, :5], **{CACHE: cache})
        cache.reset()
        model(IDS, **{CACHE: cache})


@pytest.mark.parametrize("way", ["merged", "of the model", "by hand"])
def test_no_way_around_use_cache(way: str) -> None:
    model = tiny_model("llama")
    options = {"use_cache": None, "generation_config": GenerationConfig(use_cache=False, max_new_tokens=4)}
    if way == "of the model":
        model.generation_config.use_cache = False
        options = {"generation_config": GenerationConfig(max_new_tokens=4)}
    if way == "by hand":
        options = {"use_cache": False, CACHE: RazorCache(model.config, MIXED), "max_new_tokens": 4}
    with (
        attach(model, MIXED),
        pytest.raises(ValueError, match=r"^use_cache: expected True with razor attention, got False$"),
    ):
        model.generate(IDS, attention_mask=MASK, **options)


def test_autocast_runs_like_stock() -> None:
    model = tiny_model("llama")
    with torch.autocast("cpu", torch.bfloat16):
        expected = answer(model, IDS, MASK)
        with attach(model, Plan.full(MIXED.num_layers, MIXED.num_kv_heads)):
            assert answer(model, IDS, MASK).shape == expected.shape


def test_kv_heads_of_one_rank_are_refused() -> None:
    model = tiny_model("llama")
    cache = RazorCache(model.config, MIXED)
    cache.block = Block()
    key = torch.zeros(1, MIXED.num_kv_heads - 1, 4, 16)
    wanted = f"plan: expected {MIXED.num_kv_heads - 1} kv heads like the model's keys, got {MIXED.num_kv_heads}"
    with pytest.raises(ValueError, match=f"^{wanted}$"):
        cache.update(key, key, 0)


def test_length_rule_does_not_count_padding() -> None:
    model = tiny_model("llama")
    plan = Plan.from_heads(
        {0: [0]}, num_layers=MIXED.num_layers, num_kv_heads=MIXED.num_kv_heads, min_window=1, window_fraction=0.5
    )
    ids, mask = prompts(20, 12)
    ids, mask = (torch.nn.functional.pad(x, (40, 0)) for x in (ids, mask))
    with attach(model, plan):
        out = answer(model, ids, mask)
        alone = answer(model, ids[:, 40:], mask[:, 40:])
    assert torch.equal(out[:, -5:], alone[:, -5:])


def test_a_base_model_cannot_be_attached() -> None:
    model = tiny_model("llama").model
    with (
        pytest.raises(TypeError, match=r"^model: expected one that can generate, got LlamaModel$"),
        attach(model, MIXED),
    ):
        pass
