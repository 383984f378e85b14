# SPDX-License-Identifier: Apache-2.0
"""duo.py and DuoAttention's pattern folders: read and written, thresholds, and the original's quick-start."""

import copy
import inspect
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from razor_attention import Plan, RazorCache, attach, duo, files
from razor_attention.hf.names import CACHE, output_cache
from tiny_models import (
    FULL_PLAN,
    KV_HEADS,
    LAYERS,
    answer,
    both_ways,
    bytes_of,
    logits_by_step,
    prompts,
    shared_model,
    tiny_model,
)

PATTERNS = os.environ.get("RAZOR_DUO_PATTERNS")  # a folder with the published patterns, one folder each
PUBLISHED = {  # model: layers, kv heads, share of gates > 0.5
    "Llama-2-7B-32K-Instruct": (32, 32, 0.43),
    "Llama-3-8B-Instruct-Gradient-1048k": (32, 8, 0.81),
    "Llama-3-8B-Instruct-Gradient-4194k": (32, 8, 0.81),
    "Meta-Llama-3.1-8B-Instruct": (32, 8, 0.91),
    "Mistral-7B-Instruct-v0.2": (32, 8, 0.95),
    "Mistral-7B-Instruct-v0.3": (32, 8, 0.94),
}
GATES = np.array([[0.9, 0.02, 0.3], [0.6, 1.0, -0.004]])  # of the tiny models
SINKS, WINDOW = 3, 10


def exactly(message):
    return f"^{re.escape(message)}\\Z"


def write_pattern(folder, gates=GATES, **config):
    """A folder as the original's training writes it."""
    folder.mkdir()
    np.savetxt(folder / "full_attention_heads.tsv", gates, delimiter="\t")
    record = {"model_name": "models/tiny", "lr": 0.02, "sink_size": 128, "recent_size": 256, "deploy_sink_size": None}
    (folder / "config.json").write_text(json.dumps(record | config))
    return folder


@pytest.fixture
def pattern(tmp_path):
    return write_pattern(tmp_path / "pattern")


# --- folders


@pytest.mark.skipif(PATTERNS is None, reason="RAZOR_DUO_PATTERNS names no folder")
@pytest.mark.parametrize("model", PUBLISHED)
def test_published_patterns(model, tmp_path):
    layers, kv_heads, share = PUBLISHED[model]
    gates, sink_size, recent_size = duo.load_attn_pattern(Path(PATTERNS) / model)
    assert gates.shape == (layers, kv_heads)
    assert (sink_size, recent_size) == (128, 256)
    assert gates.min() == 0
    assert gates.max() == 1
    assert (gates > 0.5).mean() == pytest.approx(share, abs=0.005)
    raw = np.loadtxt(Path(PATTERNS) / model / "full_attention_heads.tsv", delimiter="\t")
    assert np.array_equal(files.load_gates(Path(PATTERNS) / model).numpy(), raw)
    for sparsity in (0.25, 0.5, 0.75):
        heads, really = duo.sparsify_attention_heads(gates, sparsity=sparsity)
        bound = np.quantile(gates, sparsity)
        assert heads[gates > bound].all()  # gates at the bound are equal, and the original tells them apart by noise
        assert not heads[gates < bound].any()
        assert really == pytest.approx(sparsity, abs=1 / gates.size)
    made = tmp_path / "again"
    files.save_gates(torch.from_numpy(raw), made, sink_size=128, window_size=256)
    assert (made / "full_attention_heads.tsv").read_bytes() == (
        Path(PATTERNS) / model / "full_attention_heads.tsv"
    ).read_bytes()


@pytest.mark.parametrize(("layers", "kv_heads"), [(32, 32), (32, 8), (1, 1), (1, 5), (5, 1)])
def test_reader_takes_what_numpy_writes(tmp_path, layers, kv_heads):
    raw = np.random.default_rng(0).uniform(-0.001, 1.0, (layers, kv_heads))
    folder = write_pattern(tmp_path / "duo", raw, sink_size=64, recent_size=100)
    gates, sink_size, recent_size = duo.load_attn_pattern(str(folder))
    assert np.array_equal(gates, raw.clip(0, 1))
    assert gates.dtype == np.float64
    assert (sink_size, recent_size) == (64, 100)
    assert np.array_equal(files.load_gates(folder / "full_attention_heads.tsv").numpy(), raw)


def test_numpy_takes_what_the_writer_writes(tmp_path):
    raw = np.random.default_rng(0).uniform(0, 1, (4, 3))
    files.save_gates(torch.from_numpy(raw), tmp_path / "duo", sink_size=5, window_size=7, provenance={"model": "m"})
    assert np.array_equal(np.loadtxt(tmp_path / "duo/full_attention_heads.tsv", delimiter="\t"), raw)
    config = json.loads((tmp_path / "duo/config.json").read_text())
    assert config == {"model": "m", "sink_size": 5, "recent_size": 7}
    assert duo.load_attn_pattern(tmp_path / "duo")[1:] == (5, 7)


def test_writer_replaces_an_old_folder(pattern):
    (pattern / "notes.txt").write_text("mine")
    files.save_gates(torch.ones(1, 2), pattern, sink_size=1, window_size=2)
    assert np.array_equal(duo.load_attn_pattern(pattern)[0], np.ones((1, 2)))
    assert sorted(path.name for path in pattern.iterdir()) == ["config.json", "full_attention_heads.tsv", "notes.txt"]
    assert [path.name for path in pattern.parent.iterdir()] == ["pattern"]


@pytest.mark.parametrize("failing", ["fsync", "rename"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_crash_leaves_no_new_folder(tmp_path, monkeypatch, failing, error):
    def crash(*_):
        raise error

    monkeypatch.setattr(*((os, "fsync", crash) if failing == "fsync" else (Path, "rename", crash)))
    with pytest.raises(error):
        files.save_gates(torch.ones(1, 2), tmp_path / "duo", sink_size=1, window_size=2)
    assert list(tmp_path.iterdir()) == []


def test_a_crash_leaves_the_old_folder(pattern, monkeypatch):
    def crash(*_):
        raise OSError

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError):  # noqa: PT011  # no message: it is the system's
        files.save_gates(torch.ones(1, 2), pattern, sink_size=1, window_size=2)
    assert np.array_equal(files.load_gates(pattern).numpy(), GATES)
    assert [path.name for path in pattern.parent.iterdir()] == ["pattern"]


def test_writer_refuses(tmp_path):
    with pytest.raises(ValueError, match=exactly("gates: expected finite values, got nan")):
        files.save_gates(torch.tensor([[1.0, torch.nan]]), tmp_path / "duo", sink_size=1, window_size=2)
    folder = tmp_path / "no/duo"
    with pytest.raises(ValueError, match=exactly(f"folder: expected one in an existing folder, got {folder}")):
        files.save_gates(torch.ones(1, 2), folder, sink_size=1, window_size=2)
    with pytest.raises(ValueError, match=exactly("window_size: expected an integer >= 0, got -1")):
        files.save_gates(torch.ones(1, 2), tmp_path / "duo", sink_size=1, window_size=-1)
    assert list(tmp_path.iterdir()) == []


TSV, CONFIG = "{folder}/full_attention_heads.tsv", "{folder}/config.json"


@pytest.mark.parametrize(
    ("tsv", "config", "message"),
    [
        (None, "{}", "{folder}: expected a folder with full_attention_heads.tsv or such a file, got none"),
        ("1\t0\n1\n", "{}", f"{TSV}: expected 2 numbers in line 2 like in line 1, got 1"),
        ("", "{}", f"{TSV}: expected numbers in line 1, got 0"),
        ("1\t0\n\n1\t0\n", "{}", f"{TSV}: expected 2 numbers in line 2 like in line 1, got 0"),
        ("1\tx\n", "{}",
         f"{TSV}: expected a line of numbers for each layer, got could not convert string to float: 'x'"),
        ("1\tnan\n", "{}", f"{TSV}: expected gates near 0..1 in line 1, got nan"),
        ("1\t0\n1\t2.0\n", "{}", f"{TSV}: expected gates near 0..1 in line 2, got 2.0"),
        ("1\t0\n-1\t0\n", "{}", f"{TSV}: expected gates near 0..1 in line 2, got -1.0"),
        ("1\t0\n", None, "{folder}: expected a folder with config.json, got none"),
        ("1\t0\n", "[]", f"{CONFIG}: expected a dict, got list"),
        ("1\t0\n", '{"recent_size": 1}', f"{CONFIG}: expected the key 'sink_size', got a file without it"),
        ("1\t0\n", '{"sink_size": 1}', f"{CONFIG}: expected the key 'recent_size', got a file without it"),
        ("1\t0\n", '{"sink_size": 1.5, "recent_size": 1}', f"{CONFIG}: sink_size: expected an integer, got 1.5"),
        ("1\t0\n", '{"sink_size": 1, "recent_size": -4}',
         f"{CONFIG}: recent_size: expected an integer >= 0, got -4"),
    ],
)  # fmt: skip
def test_malformed_folders(tmp_path, tsv, config, message):
    for name, text in (("full_attention_heads.tsv", tsv), ("config.json", config)):
        if text is not None:
            (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=exactly(message.format(folder=tmp_path))):
        duo.load_attn_pattern(tmp_path)


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "full_attention_heads.tsv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"full_attention_heads\.tsv: expected a line of numbers for each layer, got"):
        duo.load_attn_pattern(tmp_path)


# --- sparsify


def test_sparsify_by_sparsity_and_by_threshold():
    given = GATES.copy()
    heads, sparsity = duo.sparsify_attention_heads(given, sparsity=0.5)
    assert np.array_equal(heads, [[1, 0, 0], [1, 1, 0]])
    assert heads.dtype == np.float64
    assert sparsity == 0.5
    assert np.array_equal(given, GATES)  # the original adds noise to it
    heads, sparsity = duo.sparsify_attention_heads(GATES, threshold=0.25)  # raises TypeError in the original
    assert np.array_equal(heads, [[1, 0, 1], [1, 1, 0]])
    assert sparsity == pytest.approx(1 / 3)
    assert np.array_equal(duo.sparsify_attention_heads(GATES, threshold=0.25, sparsity=0.5)[0], [[1, 0, 0], [1, 1, 0]])
    assert duo.sparsify_attention_heads(GATES, sparsity=1)[1] == 1
    assert duo.sparsify_attention_heads(GATES, sparsity=0)[1] == 0
    assert duo.sparsify_attention_heads(np.ones((4, 4)), sparsity=0.5)[1] == 0.5  # equal gates


@pytest.mark.parametrize(
    ("gates", "options", "message"),
    [
        (GATES, {}, "sparsity, threshold: expected exactly one of the two, got neither"),
        (GATES, {"sparsity": 50}, "sparsity: expected a number in 0..1, got 50"),
        (GATES, {"threshold": float("nan")}, "threshold: expected a number in 0..1, got nan"),
        (GATES * np.nan, {"sparsity": 0.5}, "full_attention_heads: expected finite values, got nan"),
        (
            GATES[0],
            {"sparsity": 0.5},
            "full_attention_heads: expected a table [layers, heads] of floats, got shape [3]",
        ),
    ],
)
def test_sparsify_refuses(gates, options, message):
    with pytest.raises(ValueError, match=exactly(message)):
        duo.sparsify_attention_heads(gates, **options)
    wanted = "full_attention_heads: expected a table [layers, heads] of numbers, got list: "
    for heads in ([[1.0], [1.0, 0.0]], ["a"], [None]):
        with pytest.raises(TypeError, match=re.escape(wanted)):
            duo.sparsify_attention_heads(heads, sparsity=0.5)


def test_every_kind_of_table():
    wanted = duo.sparsify_attention_heads(GATES, sparsity=0.5)[0]
    rows = [torch.from_numpy(row) for row in GATES]  # as the original's training has them
    kinds = GATES.tolist(), list(GATES), rows, torch.stack(rows).requires_grad_()
    for heads in kinds:
        assert np.array_equal(duo.sparsify_attention_heads(heads, sparsity=0.5)[0], wanted)
    assert np.array_equal(duo.sparsify_attention_heads([[1, 0, 0], [1, 1, 0]], sparsity=0.5)[0], wanted)


# --- the quick-start

# The calls of the original's README, with the import changed.
QUICK_START = """
from razor_attention.duo import load_attn_pattern, sparsify_attention_heads
from razor_attention.duo import enable_duo_attention_eval
import transformers
import torch

model = transformers.AutoModelForCausalLM.from_pretrained(
    MODEL,
    dtype=torch.bfloat16,
    low_cpu_mem_usage=True,
    attn_implementation="eager",
)
attn_heads, sink_size, recent_size = load_attn_pattern(PATTERN)
attn_heads, sparsity = sparsify_attention_heads(attn_heads, sparsity=0.5)
enable_duo_attention_eval(
    model,
    attn_heads,
    sink_size=64,
    recent_size=256,
)
"""


def test_quick_start_frees_memory(tmp_path, pattern):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    names = {"MODEL": tmp_path / "model", "PATTERN": pattern}
    exec(QUICK_START, names)
    model = names["model"]
    ids, _ = prompts(900)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, return_dict_in_generate=True
    )
    assert out.sequences.shape == (1, 908)
    plan = Plan.from_gates(GATES, sparsity=0.5)
    assert output_cache(out).plan == plan
    assert output_cache(out).nbytes == bytes_of(plan, [907], torch.bfloat16)
    assert output_cache(out).nbytes < 0.72 * bytes_of(FULL_PLAN, [907], torch.bfloat16)
    duo.disable_duo_attention_eval(model)
    assert model.config._attn_implementation == "eager"


@pytest.fixture
def llama():
    """Enabled or not, it goes back to what it was."""
    model = shared_model("llama")
    yield model
    if "_razor_duo" in vars(model):
        duo.disable_duo_attention_eval(model)


def test_full_gates_equal_the_stock_model(llama):
    ids, mask = prompts(60, 41)
    stock = answer(llama, ids, mask)
    duo.enable_duo_attention_eval(llama, np.ones((LAYERS, KV_HEADS)), SINKS, WINDOW)
    assert torch.equal(answer(llama, ids, mask), stock)
    assert torch.equal(answer(llama, ids, mask), stock)  # a cache for each call


@pytest.mark.parametrize("prefill", ["streaming", "dense"])
def test_enabled_is_attached(llama, prefill):
    ids, mask = prompts(60, 41)
    plan = Plan.from_gates(GATES.clip(0, 1), threshold=0.5, sink_size=SINKS, window_size=WINDOW)
    with attach(llama, plan, prefill=prefill):
        wanted = answer(llama, ids, mask)
    stock = answer(llama, ids, mask)
    duo.enable_duo_attention_eval(llama, GATES.clip(0, 1), SINKS, WINDOW, prefill=prefill)
    assert torch.equal(answer(llama, ids, mask), wanted)
    assert not torch.equal(wanted, stock)


@torch.no_grad()
def test_calls_without_a_cache_start_one(llama):
    """The loop of the original's evaluations: None first, then what the last call returned, in chunks."""
    ids, _ = prompts(70)
    heads = torch.tensor([[1, 0, 0], [0, 1, 0]])
    duo.enable_duo_attention_eval(llama, heads, SINKS, WINDOW)
    cache, logits = None, []
    for chunk in (*ids[:, :60].split(30, 1), *ids[:, 60:].split(1, 1)):
        out = llama(chunk, **{CACHE: cache}, use_cache=True)
        cache = output_cache(out)
        logits.append(out.logits)
    assert isinstance(cache, RazorCache)
    plan = Plan.from_gates(heads.double(), threshold=0.5, sink_size=SINKS, window_size=WINDOW)
    assert cache.nbytes == bytes_of(plan, [70], torch.float32)
    once = llama(ids)  # no chunks: the same result
    torch.testing.assert_close(torch.cat(logits, 1), once.logits, atol=2e-4, rtol=2e-4)
    assert isinstance(output_cache(llama.model(ids, None)), RazorCache)  # the decoder alone, arguments by place
    duo.disable_duo_attention_eval(llama)
    ours, theirs = both_ways(llama, plan, "streaming", ids, (60, *[1] * 10))  # theirs: dense, masked, float64
    torch.testing.assert_close(torch.cat(logits, 1), theirs, atol=2e-3, rtol=2e-3)
    assert not torch.allclose(logits_by_step(llama, None, ids, (70,)), ours, atol=1e-2)


def test_disable_leaves_the_model_as_it_was(llama):
    ids, mask = prompts(60, 41)
    stock, attributes, before = answer(llama, ids, mask), set(vars(llama)), copy.deepcopy(llama.config)
    duo.enable_duo_attention_eval(llama, GATES.clip(0, 1), SINKS, WINDOW)
    duo.enable_duo_attention_eval(llama, np.zeros((LAYERS, KV_HEADS)), 0, WINDOW)  # replaces, nothing nests
    assert not torch.equal(answer(llama, ids, mask), stock)
    duo.disable_duo_attention_eval(llama)
    assert set(vars(llama)) == attributes
    assert llama.config.to_dict() == before.to_dict()
    assert llama.config._attn_implementation == "sdpa"
    assert not llama.model._forward_pre_hooks
    assert torch.equal(answer(llama, ids, mask), stock)
    with pytest.raises(ValueError, match=exactly("model: expected one with DuoAttention enabled, got one without")):
        duo.disable_duo_attention_eval(llama)


def test_other_paths_work_while_enabled(llama):
    ids, mask = prompts(60, 41)
    other, plan = tiny_model("llama"), Plan.streaming(LAYERS, KV_HEADS, 1, 5)
    with attach(llama, plan):
        wanted = answer(llama, ids, mask)
    stock = answer(other, ids, mask)
    duo.enable_duo_attention_eval(llama, GATES.clip(0, 1), SINKS, WINDOW)
    inside = answer(llama, ids, mask)
    with attach(llama, plan):
        assert torch.equal(answer(llama, ids, mask), wanted)
    assert torch.equal(answer(llama, ids, mask), inside)
    cache = RazorCache(llama.config, FULL_PLAN)
    assert torch.equal(answer(llama, ids, mask, **{CACHE: cache}), stock)  # one's own cache is used
    assert torch.equal(answer(other, ids, mask), stock)
    with pytest.raises(ValueError, match="use_cache: expected True with razor attention, got False"):
        answer(llama, ids, mask, use_cache=False)


@pytest.mark.parametrize(
    ("heads", "options", "message"),
    [
        (np.ones((32, 8)), {}, "full_attention_heads: expected 2 layers x 3 kv heads like the model, got 32 x 8"),
        (GATES * np.nan, {}, "full_attention_heads: expected finite values, got nan"),
        (GATES, {}, "full_attention_heads: expected values in 0..1, got -0.004 to 1.0"),
        (GATES.clip(0, 1), {"sink_size": -1}, "sink_size: expected an integer >= 0, got -1"),
        (GATES.clip(0, 1), {"recent_size": -1}, "recent_size: expected an integer >= 1, got -1"),
        (GATES.clip(0, 1), {"prefill": "sparse"}, "prefill: expected 'dense' or 'streaming', got 'sparse'"),
    ],
)
def test_enable_refuses_before_it_touches_the_model(llama, heads, options, message):
    attributes = set(vars(llama))
    with pytest.raises(ValueError, match=exactly(message)):
        duo.enable_duo_attention_eval(llama, heads, **{"sink_size": SINKS, "recent_size": WINDOW} | options)
    assert set(vars(llama)) == attributes
    with pytest.raises(TypeError, match=exactly("model: expected a transformers PreTrainedModel, got str")):
        duo.enable_duo_attention_eval("llama", GATES, SINKS, WINDOW)


def test_to_device():
    model = torch.nn.Linear(1, 1)
    assert duo.to_device(model, "cpu") is model
    with pytest.raises(NotImplementedError, match="enable_tp, enable_pp: expected False and one device, got several"):
        duo.to_device(model, [0, 1], enable_tp=True)


def test_names_are_the_originals():
    names = {name: list(inspect.signature(getattr(duo, name)).parameters) for name in duo.__all__}
    assert names["load_attn_pattern"] == ["attn_load_dir"]
    assert names["sparsify_attention_heads"] == ["full_attention_heads", "threshold", "sparsity"]
    assert names["enable_duo_attention_eval"][:4] == ["model", "full_attention_heads", "sink_size", "recent_size"]
