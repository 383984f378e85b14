# SPDX-License-Identifier: Apache-2.0
"""Forks of a RazorCache, and RazorCaches on disk: going on is the same to the bit, and what does not fit is refused."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from razor_attention import FULL, Plan, RazorCache, attach
from razor_attention.hf.models import load_model
from razor_attention.hf.names import CACHE
from test_fork import assert_alike
from tiny_models import MIXED, alibi_model, answer, logits_by_step, prompts, shared_model, tiny_model

FORMATS = [(torch.float32, None), (torch.bfloat16, None), (torch.float16, None), (torch.float32, "int8"),
           (torch.bfloat16, "int4")]  # fmt: skip
formats = pytest.mark.parametrize(("dtype", "kv"), FORMATS, ids=[f"{d} {k}" for d, k in FORMATS])
prefills = pytest.mark.parametrize("prefill", ["dense", "streaming"])
IDS, MASK = prompts(70, 51)
LENGTHS = (30, *[1] * 8, 22, *[1] * 4, 6)  # every window slides, every ring comes round
SHIPPED = Path(__file__).resolve().parents[1] / "bench" / "model"


@pytest.fixture
def llama():
    return shared_model("llama")


def cache_of(model: Any, plan: Plan = MIXED, **options: Any) -> RazorCache:
    """Filled by IDS, in several calls."""
    if options.get("kv_dtype") == "int8":  # every way to store at once
        options |= {"exact_sink": 2, "exact_window": 9, "rotate_keys": True}
    cache = RazorCache(model.config, plan, **{"page_size": 16} | options)
    with attach(model, plan):
        logits_by_step(model, cache, IDS, LENGTHS, MASK)
    return cache


def go_on(model: Any, cache: RazorCache, seed: int = 5) -> Tensor:
    """Logits of 15 tokens more, one call of 5 among them."""
    new = torch.cat([IDS, prompts(15, 15, seed=seed)[0]], 1)
    mask, out, start = torch.cat([MASK, MASK.new_ones(2, 15)], 1), [], 70
    with attach(model, cache.plan), torch.no_grad():
        for length in (1, 1, 5, *[1] * 8):
            end = start + length
            position = (mask[:, :end].cumsum(1) - 1).clamp(min=0)[:, start:]
            options = {"attention_mask": mask[:, :end], "position_ids": position, CACHE: cache}
            out.append(model(new[:, start:end], **options).logits)
            start = end
    return torch.cat(out, 1)


def assert_same(cache: RazorCache, other: RazorCache) -> None:
    assert cache.plan == other.plan
    for ours, theirs in zip(cache.layers, other.layers, strict=True):
        assert_alike(ours.cache, theirs.cache)
        assert (ours.columns, ours.dense, ours.pending) == (theirs.columns, theirs.dense, theirs.pending)


# --- forks


@prefills
@formats
def test_forks_go_on_like_caches_of_their_own(dtype: torch.dtype, kv: str | None, prefill: str) -> None:
    model = shared_model("llama", dtype)
    prefix = cache_of(model, prefill=prefill, kv_dtype=kv)
    held = prefix.nbytes
    forks = prefix.fork(2)
    assert {c.nbytes for c in (prefix, *forks)} == {c.pool_nbytes for c in (prefix, *forks)} == {held}
    for seed, fork in enumerate((*forks, prefix)):
        alone = cache_of(model, prefill=prefill, kv_dtype=kv)
        assert torch.equal(go_on(model, fork, seed), go_on(model, alone, seed))
        assert_same(fork, alone)
        assert held < fork.pool_nbytes < (seed + 2) * fork.nbytes
    assert not torch.equal(forks[0].layers[0].cache.key_sum, forks[1].layers[0].cache.key_sum)
    del fork, forks
    assert prefix.pool_nbytes == prefix.nbytes


def test_generate_many_answers_over_one_prefix(llama) -> None:
    """Greedy, sampled and with beams, each as from a cache of its own."""
    text, questions = prompts(60)[0], [prompts(n, seed=n)[0] for n in (4, 9, 17)]

    def prefilled() -> RazorCache:
        cache = RazorCache(llama.config, MIXED, page_size=16)
        with torch.no_grad():
            llama(text, **{CACHE: cache})
        return cache

    with attach(llama, MIXED):
        prefix = prefilled()
        for options in ({}, {"do_sample": True, "seed": 3}, {"num_beams": 3, "max_new_tokens": 10}):
            for question, fork in zip(questions, prefix.fork(3), strict=True):
                whole, alone = torch.cat([text, question], 1), prefilled()
                if "num_beams" in options:
                    fork.batch_repeat_interleave(3)
                    alone.batch_repeat_interleave(3)
                expected = answer(llama, whole, **{CACHE: alone}, **options)
                assert torch.equal(answer(llama, whole, **{CACHE: fork}, **options), expected)
                assert_same(fork, alone)
        assert_same(prefix, prefilled())
        whole = torch.cat([text.expand(4, -1), prompts(9, 9, 9, 9, seed=2)[0]], 1)  # and a batch of questions
        (fork,) = prefix.fork()
        fork.batch_repeat_interleave(4)
        assert fork.pool_nbytes < fork.nbytes
        batch = answer(llama, whole, **{CACHE: fork})
        for row, fork in enumerate(prefix.fork(4)):
            assert torch.equal(batch[row : row + 1], answer(llama, whole[row : row + 1], **{CACHE: fork}))


def test_the_shipped_model_answers_from_forks_and_from_disk(tmp_path: Path) -> None:
    model, tokenizer = load_model(SHIPPED, "float32")
    plan = Plan.streaming(4, 4, 4, 64)
    plan = Plan(
        plan.sink_size, torch.where(torch.arange(4) < 2, FULL, plan.window_size), torch.tensor([[True] * 4] * 4)
    )
    facts = {"mia hid": "lamp rope coin bell", "tom hid": "salt moon ring cake"}
    text = (
        "".join(f"{key} {value} . " for key, value in facts.items()) + "the old wind moves over the quiet hill . " * 40
    )
    prefix = tokenizer(text, return_tensors="pt").input_ids
    cache = RazorCache(model.config, plan, prompt_len=prefix.shape[1])
    with attach(model, plan), torch.no_grad():
        model(prefix, **{CACHE: cache})
        cache.save(tmp_path / "book.safetensors", model)
        loaded = RazorCache.load(tmp_path / "book.safetensors", model, plan)
        for key, *forks in zip(facts, cache.fork(2), loaded.fork(2), strict=True):
            question = tokenizer(text + "? " + key, return_tensors="pt").input_ids
            assert torch.equal(question[:, : prefix.shape[1]], prefix)
            alone = RazorCache(model.config, plan)
            model(prefix, **{CACHE: alone})
            expected = model.generate(question, **{CACHE: alone}, max_new_tokens=4, do_sample=False)
            for fork in forks:
                assert torch.equal(
                    model.generate(question, **{CACHE: fork}, max_new_tokens=4, do_sample=False), expected
                )


def test_fork_refuses(llama) -> None:
    with pytest.raises(ValueError, match=r"^n: expected an integer >= 1, got 0$"):
        RazorCache(llama.config, MIXED).fork(0)
    cache = cache_of(llama)
    cache.layers[1].columns += 1
    with pytest.raises(RuntimeError, match=r"^RazorCache: expected all layers to have seen the same tokens"):
        cache.fork()


def test_a_fork_of_nothing_is_a_new_cache(llama) -> None:
    (fork,) = RazorCache(llama.config, MIXED, page_size=16).fork()
    with attach(llama, MIXED):
        logits_by_step(llama, fork, IDS, LENGTHS, MASK)
    assert_same(fork, cache_of(llama))
    (other,) = fork.fork()
    other.reset()
    assert other.get_seq_length() == other.nbytes == 0
    assert_same(fork, cache_of(llama))


# --- on disk


@prefills
@formats
def test_a_loaded_cache_goes_on_as_if_it_had_stayed(tmp_path, dtype: torch.dtype, kv: str | None, prefill: str) -> None:
    model, path = shared_model("llama", dtype), tmp_path / "cache.safetensors"
    cache = cache_of(model, prefill=prefill, kv_dtype=kv)
    cache.save(path, model)
    loaded = RazorCache.load(path, model, MIXED)
    assert_same(loaded, cache)
    assert (loaded.nbytes, loaded.kv_dtype, loaded.page_size) == (cache.nbytes, kv, 16)
    assert (loaded.exact_window, loaded.rotate_keys) == (cache.exact_window, cache.rotate_keys)
    assert loaded.pool_nbytes == loaded.nbytes
    assert all(len(layer.cache.key_pages) == layer.cache._pool.used for layer in loaded.layers)
    assert torch.equal(go_on(model, loaded), go_on(model, cache))
    assert_same(loaded, cache)


def test_generate_from_a_loaded_cache(llama, tmp_path) -> None:
    ids, mask = prompts(50, 64, 3)
    more = torch.cat([ids, prompts(7, 7, 7)[0]], 1), torch.cat([mask, mask.new_ones(3, 7)], 1)
    with attach(llama, MIXED), torch.no_grad():
        cache = RazorCache(llama.config, MIXED)
        llama(ids, attention_mask=mask, **{CACHE: cache})
        cache.save(tmp_path / "cache", llama.config)
        loaded = RazorCache.load(tmp_path / "cache", llama.config, MIXED)
        expected = answer(llama, *more, **{CACHE: cache})
        assert torch.equal(answer(llama, *more, **{CACHE: loaded}), expected)
    assert_same(loaded, cache)


def test_a_file_holds_the_pages_in_use(llama, tmp_path) -> None:
    """No more than nbytes and what says where they are, less where sequences share pages; any reader opens it."""
    cache, path = cache_of(llama), tmp_path / "cache.safetensors"
    cache.save(path, llama)
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["format"] == "razor-attention cache"
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for i, layer in enumerate(cache.layers):
        assert len(held[f"layers.{i}.key_pages"]) == layer.cache._pool.used
        assert torch.equal(held[f"layers.{i}.key_sum"], layer.cache.key_sum)
    size = path.stat().st_size
    assert size <= cache.nbytes + 2 * 2 * 2 * 3 * 16 * 4 + 4096  # all heads' sums
    cache.reorder_cache(torch.tensor([0]))
    cache.save(path, llama)
    assert path.stat().st_size < 0.7 * size
    cache.batch_repeat_interleave(4)
    cache.save(path, llama)
    assert path.stat().st_size < 0.9 * size
    loaded = RazorCache.load(path, llama)
    assert loaded.pool_nbytes == cache.pool_nbytes < cache.nbytes == loaded.nbytes
    for layer in loaded.layers:
        assert layer.cache._pool.shared == layer.cache._pool.used


def test_an_alibi_model_on_disk(tmp_path) -> None:
    model = alibi_model("bloom")
    plan, ids = Plan.streaming(2, 8, 0, 20), prompts(40, 40)[0]
    cache = RazorCache(model.config, plan)
    with attach(model, plan):
        logits_by_step(model, cache, ids, (40,))
        cache.save(tmp_path / "cache", model)
        loaded = RazorCache.load(tmp_path / "cache", model)
        for fork in cache.fork(2):
            a, b = (answer(model, torch.cat([ids, ids[:, :3]], 1), **{CACHE: c}) for c in (fork, loaded.fork()[0]))
            assert torch.equal(a, b)


def test_a_length_rule_on_disk(llama, tmp_path) -> None:
    """The plan as it was given and as it was resolved are both its plan; reset goes back to the one that was given."""
    given = Plan(MIXED.sink_size, MIXED.window_size, MIXED.compensate, window_fraction=0.5)
    cache, path = cache_of(llama, given), tmp_path / "cache"
    cache.save(path, llama)
    for plan in (None, given, given.resolve(30)):
        loaded = RazorCache.load(path, llama, plan)
        assert loaded.plan == given.resolve(30) != given
    loaded.reset()
    assert loaded.plan == given
    with pytest.raises(ValueError, match=r"^plan: expected Plan\("):
        RazorCache.load(path, llama, given.resolve(31 + 1))


def test_saving_refuses(llama, tmp_path) -> None:
    path = tmp_path / "cache"
    with pytest.raises(ValueError, match=r"^RazorCache: expected tokens to save, got none$"):
        RazorCache(llama.config, MIXED).save(path, llama)
    cache = cache_of(llama)
    with pytest.raises(TypeError, match=r"^model: expected a transformers model or its configuration, got str$"):
        cache.save(path, "llama")
    cache.layers[1].columns += 1
    with pytest.raises(RuntimeError, match=r"^RazorCache: expected all layers to have seen the same tokens"):
        cache.save(path, llama)
    assert not path.exists()


def test_an_interrupted_save_leaves_the_old_file(llama, tmp_path, monkeypatch) -> None:
    cache, path, calls = cache_of(llama), tmp_path / "cache", []
    cache.save(path, llama)
    before = path.read_bytes()

    def interrupted(*args: Any) -> int:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return zlib.crc32(*args)

    monkeypatch.setattr("razor_attention.hf.saved.zlib.crc32", interrupted, raising=True)
    with pytest.raises(KeyboardInterrupt):
        cache.save(path, llama)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# --- files that are refused


@pytest.fixture
def saved(llama, tmp_path) -> Path:
    cache_of(llama).save(tmp_path / "cache", llama)
    return tmp_path / "cache"


def test_another_model_or_plan_is_refused(llama, saved) -> None:
    other = tiny_model("llama")
    assert RazorCache.load(saved, other, MIXED).nbytes  # the same weights, made again
    with torch.no_grad():
        other.model.layers[1].self_attn.v_proj.weight *= 1.01
    with pytest.raises(
        ValueError, match=rf"^model: expected the weights '\w{{16}}' like {saved}, got \w{{16}}; a cache"
    ):
        RazorCache.load(saved, other)
    assert RazorCache.load(saved, other.config).nbytes  # a configuration knows no weights
    for name, value in {"num_hidden_layers": 3, "hidden_size": 96, "rope_parameters": {"rope_theta": 5e5}}.items():
        config = type(llama.config).from_dict(llama.config.to_dict() | {name: value})
        with pytest.raises(ValueError, match=rf"^model: expected .*model_type=llama.* like {saved}, got .*llama"):
            RazorCache.load(saved, config)
    with pytest.raises(ValueError, match=rf"^model: expected .*model_type=llama.* like {saved}, got .*qwen3"):
        RazorCache.load(saved, shared_model("qwen3"))
    for plan in (
        Plan.full(2, 3),
        Plan(MIXED.sink_size, MIXED.window_size + (MIXED.window_size == 8), MIXED.compensate),
    ):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            RazorCache.load(saved, llama, plan)
        wanted = (
            rf"plan: expected {re.escape(repr(MIXED))} (\w{{8}}) like {saved}, got {re.escape(repr(plan))} (\w{{8}})"
        )
        named = re.fullmatch(wanted, str(error.value))
        assert named, str(error.value)
        assert named[1] != named[2]
    with pytest.raises(TypeError, match=r"^plan: expected a Plan or None, got dict$"):
        RazorCache.load(saved, llama, {})


def test_every_truncation_is_refused(llama, saved) -> None:
    whole = saved.read_bytes()
    for length in (*range(0, len(whole), 997), len(whole) - 1, len(whole) - 4):
        saved.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"^{saved}: expected a safetensors file, got "):
            RazorCache.load(saved, llama)
    saved.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match=f"^{saved}: expected a safetensors file, got "):
        RazorCache.load(saved, llama)


def test_every_flipped_bit_is_refused(llama, saved) -> None:
    whole = bytearray(saved.read_bytes())
    for at in (*range(0, len(whole), 211), *range(len(whole) - 6, len(whole))):
        whole[at] ^= 1 << at % 8
        saved.write_bytes(whole)
        with pytest.raises(ValueError, match=f"^{saved}: expected "):
            RazorCache.load(saved, llama)
        whole[at] ^= 1 << at % 8
    saved.write_bytes(whole)
    RazorCache.load(saved, llama)


def forge(path: Path, change: Callable[[dict[str, str], dict[str, Tensor]], None]) -> None:
    """Change a file's metadata or tensors and make its checksum right again."""
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    tensors.pop("checksum")
    change(metadata, tensors)
    header: dict[str, Any] = {"__metadata__": metadata}
    names = {torch.int64: "I64", torch.int32: "I32", torch.float32: "F32", torch.float16: "F16", torch.int8: "I8"}
    data = b""
    for name, tensor in tensors.items():
        start, data = len(data), data + tensor.contiguous().numpy().tobytes()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, len(data)]}
    header["checksum"] = {"dtype": "U8", "shape": [4], "data_offsets": [len(data), len(data) + 4]}
    text = json.dumps(header).encode()
    whole = len(text).to_bytes(8, "little") + text + data
    path.write_bytes(whole + zlib.crc32(whole).to_bytes(4, "little"))


def put(name: str, value: object) -> Callable[[dict[str, str], dict[str, Tensor]], None]:
    """A change of metadata, or of a tensor by a function."""

    def change(metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
        if callable(value):
            tensors[f"layers.{name}"] = value(tensors[f"layers.{name}"])
        elif value is None:
            (tensors if name in tensors else metadata).pop(name)
        else:
            metadata[name] = value

    return change


def with_element(index: tuple[int, ...], value: int) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor[index] = value
        return tensor

    return change


FORGERIES = [
    (put("format", "razor-attention plan"), "expected format 'razor-attention cache', got 'razor-attention plan'"),
    (put("version", "2"), "expected version '1', got '2'"),
    (put("prefill", '"sparse"'), "expected prefill 'dense' or 'streaming', got 'sparse'"),
    (put("kv_dtype", '"int2"'), "expected kv_dtype None or 'int8' or 'int4', got 'int2'"),
    (put("kv_dtype", '"int8"'), "layers.0.key_pages: expected dtype torch.int8, got torch.float32"),
    (put("page_size", "24"), "page_size: expected a multiple of 16, got 24"),
    (put("page_size", '"16"'), "page_size: expected an integer, got '16'"),
    (put("page_size", "32"), "layers.0.key_pages: expected torch.float32 [13, 32, 16], got "),
    (put("columns", "69"), "layers.0.seen: expected 0..69 tokens, got 51..70"),
    (put("columns", "-1"), "columns: expected an integer >= 0, got -1"),
    (put("plan", "[1]"), "Plan"),
    (put("plan", "[[[1]], [[1]], [[true]], 0.5, {}]"), "expected a plan that is resolved, got Plan("),
    (put("plan", "{"), "expected metadata in JSON, got "),
    (
        put("given", None),
        "expected the metadata plan, given, model, weights, prefill, page_size, kv_dtype, exact_sink, ",
    ),
    (put("layers.1.seen", None), "expected the tensor 'layers.1.seen', got a file without it"),
    (lambda _, tensors: tensors.update(extra=torch.zeros(1)), "expected no tensor 'extra', got a file with it"),
    (put("0.seen", lambda t: t.int()), "layers.0.seen: expected torch.int64 [2], got torch.int32 [2]"),
    (put("0.seen", lambda t: t[:0]), "layers.0.seen: expected at least one sequence, got 0"),
    (put("0.seen", with_element((1,), -1)), "layers.0.seen: expected 0..70 tokens, got -1..70"),
    (put("0.seen", with_element((0,), 71)), "layers.0.seen: expected 0..70 tokens, got 51..71"),
    (put("0.seen", with_element((0,), 60)), "layers.0.page_table: expected 4 pages in a row, got 5"),
    (put("1.seen", with_element((0,), 69)), "layers.1.seen: expected [70, 51] like the layer before, got [69, 51]"),
    (put("0.page_table", lambda t: t[:, :4]), "layers.0.page_table: expected 5 pages in a row, got 4"),
    (put("0.page_table", lambda t: t[:5]), "layers.0.page_table: expected torch.int32 [6, 5], got torch.int32 [5, 5]"),
    (
        put("0.page_table", lambda t: t.long()),
        "layers.0.page_table: expected torch.int32 [6, 5], got torch.int64 [6, 5]",
    ),
    (
        put("0.page_table", with_element((0, 0), -1)),
        "layers.0.page_table: expected the pages 0..12, each at least once",
    ),
    (
        put("0.page_table", with_element((0, 0), 13)),
        "layers.0.page_table: expected the pages 0..12, each at least once",
    ),
    (put("0.page_table", with_element((0, 0), 1)), "layers.0.page_table: expected the pages 0..12, each at least once"),
    (
        put("0.key_sum", lambda t: t[:, :8]),
        "layers.0.key_sum: expected torch.float32 [6, 16], got torch.float32 [6, 8]",
    ),
    (put("1.value_sum", lambda t: t.half()), "layers.1.value_sum: expected torch.float32 [6, 16], got torch.float16 "),
    (put("0.key_pages", lambda t: t[:-1]), "layers.0.value_pages: expected torch.float32 [12, 16, 16], got "),
    (put("0.value_pages", lambda t: t.half()), "layers.0.value_pages: expected torch.float32 [13, 16, 16], got "),
    (put("0.key_pages", lambda t: t.flatten()), "layers.0.key_pages: expected torch.float32 [3328, 16, 16], got "),
    (put("0.key_pages", lambda t: t.int()), "layers.0.key_pages: expected dtype torch.float32 or torch.bfloat16 or "),
]


@pytest.mark.parametrize(("change", "message"), FORGERIES, ids=[message[:60] for _, message in FORGERIES])
def test_a_forged_file_is_refused(llama, saved, change, message: str) -> None:
    forge(saved, lambda *_: None)
    RazorCache.load(saved, llama)  # as it is it would do
    forge(saved, change)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{saved}: ')}.*{re.escape(message)}"):
        RazorCache.load(saved, llama)


def test_foreign_files_are_refused(llama, tmp_path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=f"^{path}: expected format 'razor-attention cache', got None$"):
        RazorCache.load(path, llama)
    MIXED.save(path)
    with pytest.raises(ValueError, match=f"^{path}: expected a safetensors file, got "):
        RazorCache.load(path, llama)
    with pytest.raises(FileNotFoundError):
        RazorCache.load(tmp_path / "missing", llama)


def test_a_part_of_a_cache_is_not_written(llama, saved, monkeypatch) -> None:
    """Ranks hold heads of their own; a file of one of them would say nothing of the others."""
    cache, before = cache_of(llama), saved.read_bytes()
    monkeypatch.setattr("razor_attention.hf.saved.kv_shard", lambda _: (0, 2))
    message = "^model: expected one process, got 2 ranks, each with a part of every cache$"
    for call in (lambda: cache.save(saved, llama), lambda: RazorCache.load(saved, llama)):
        with pytest.raises(NotImplementedError, match=message):
            call()
    assert saved.read_bytes() == before
