# SPDX-License-Identifier: Apache-2.0
"""What newcomers met first: gates that come back, probes that fit, and errors that name the file or the way out."""

import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from razor_attention import LayerCache, Plan, cli, find_heads
from razor_attention.export import load_duo, save_duo
from razor_attention.files import save_gates
from razor_attention.hf.models import load_model
from razor_attention.ra_compression import RARopeCompressConfig, RARopeCompressor
from test_find_heads import tokenizer
from tiny_models import SIZES, tiny_model

MODEL = Path(__file__).parents[1] / "bench/model"


def refused(message):
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


def fails(capsys, *words):
    """Exit code and standard error."""
    code = cli.main([str(word) for word in words])
    return code, capsys.readouterr().err


# --- DuoAttention's folder


def duo_plan(full, sink_size=4, window_size=256):
    return Plan.from_gates(torch.tensor(full).double(), threshold=0.5, sink_size=sink_size, window_size=window_size)


@pytest.mark.parametrize("full", [[[1, 0, 0], [0, 1, 0]], [[1, 1, 1], [1, 1, 0]], [[1, 1, 1], [1, 1, 1]], [[0, 0, 0]]])
def test_an_exported_plan_comes_back(tmp_path, monkeypatch, full):
    monkeypatch.chdir(tmp_path)
    plan = duo_plan(full)
    save_duo(plan, "duo")
    assert load_duo("duo") == load_duo("duo/full_attention_heads.tsv") == plan
    for source in ("duo", "duo/full_attention_heads.tsv"):
        assert cli.main(["plan", "--gates", source]) == 0
        assert Plan.load("plan.json") == plan


def test_what_is_asked_for_goes_before_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gates = torch.tensor([[0.9, 0.2], [0.4, 0.6]], dtype=torch.float64)
    save_gates(gates, "duo", sink_size=128, window_size=200)
    assert load_duo("duo") == Plan.from_gates(gates, sparsity=0.5, sink_size=128, window_size=200)
    words = ["plan", "--gates", "duo", "--sparsity", "0.7", "--sink-size", "1", "--window-size", "2"]
    assert cli.main(words) == 0
    assert Plan.load("plan.json") == Plan.from_gates(gates, sparsity=0.7, sink_size=1, window_size=2)
    Path("alone").mkdir()
    shutil.copy("duo/full_attention_heads.tsv", "alone/gates.tsv")
    assert load_duo("alone/gates.tsv") == Plan.from_gates(gates, sparsity=0.5, sink_size=64, window_size=256)


def test_gates_that_are_not_there(capsys):
    with pytest.raises(SystemExit):
        cli.main(["plan", "--gates", "nowhere"])
    assert capsys.readouterr().err == (
        "razor: --gates: expected DuoAttention's folder or its full_attention_heads.tsv, got 'nowhere'\n"
    )


# --- the probe


def test_the_probe_fits_the_model():
    model = tiny_model("llama", max_position_embeddings=50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_heads(model, tokenizer(), progress=False).provenance["period"] == 12
        assert find_heads(model, tokenizer(), repeats=2, progress=False).provenance["period"] == 24
    with pytest.warns(UserWarning, match=r"expected at most 49 tokens for this model, got 52"):
        find_heads(model, tokenizer(), period=13, progress=False)
    short = tiny_model("llama", max_position_embeddings=4)
    with refused("repeats: expected less than the model's 4 positions, got 4"):
        find_heads(short, tokenizer(), progress=False)


def test_the_probe_is_the_papers_where_it_fits(capsys):
    model = tiny_model("llama", max_position_embeddings=10_001, num_hidden_layers=1)
    assert find_heads(model, tokenizer()).provenance["period"] == 2500
    assert "find_heads, 2500 tokens x 4" in capsys.readouterr().err


def test_vendor_compatible_heads_fit_the_model(tmp_path):
    model = tiny_model("llama", max_position_embeddings=50)
    compressor = RARopeCompressor(model, tokenizer(), RARopeCompressConfig())
    compressor.get_compress_heads(str(tmp_path / "heads.pt"))
    assert compressor.scores.provenance["period"] == 12


# --- files


def test_a_checkpoint_without_a_weight_is_named(tmp_path):
    """transformers would put random numbers there."""
    folder = tmp_path / "broken"
    shutil.copytree(MODEL, folder)
    weights = load_file(folder / "model.safetensors")
    gone = "model.layers.1.self_attn.k_proj.weight"
    del weights[gone]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with refused(f"model: expected the weight {gone} in {folder}, got none"):
        find_heads(folder, period=20, progress=False)
    message = f"model: expected the weight {gone} in {folder}, got none"
    with pytest.raises(ValueError, match=re.escape(message)):
        load_model(folder, "auto")


def test_a_folder_of_another_kind_of_model_is_named(tmp_path):
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlavaConfig(vision_config=CLIPVisionConfig(**vision), text_config=LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    message = f"model: expected a causal language model in {tmp_path}, got llava; "
    with refused(f"{message}load it with its own class and give the model"):
        find_heads(tmp_path, tokenizer(), period=20, progress=False)


@pytest.mark.parametrize("command", ["generate", "gates", "eval"])
def test_a_text_that_is_not_utf_8_is_named(tmp_path, capsys, command):
    text = tmp_path / "latin.txt"
    text.write_bytes("a caf\xe9".encode("latin-1"))
    Plan.full(4, 4).save(tmp_path / "p.json")
    words = {
        "generate": ("generate", MODEL, "--plan", tmp_path / "p.json", "--prompt-file", text),
        "gates": ("gates", MODEL, "--text", text, "--out", tmp_path / "gates"),
        "eval": ("eval", MODEL, "--tasks", "perplexity", "--text", text, "--out", tmp_path / "e", "--methods", "full"),
    }[command]
    message = f"razor: {text}: expected text in UTF-8, got byte 0xe9 at place 5\n"
    assert fails(capsys, *words) == (2, message)


@pytest.mark.filterwarnings("always")
def test_a_text_beyond_the_models_positions_is_warned_of(tmp_path, capsys):
    model, tok = load_model(MODEL, "auto")
    model.config.max_position_embeddings = 20
    model.save_pretrained(tmp_path / "short")
    tok.save_pretrained(tmp_path / "short")
    Plan.streaming(4, 4, 2, 8).save(tmp_path / "p.json")
    words = ["generate", tmp_path / "short", "--plan", tmp_path / "p.json", "--prompt", "bell " * 18]
    assert cli.main([str(word) for word in [*words, "--max-new-tokens", 4]]) == 0
    assert "prompt: expected at most 20 tokens with the answer, the positions that this model knows, got 19 + 4" in (
        capsys.readouterr().err
    )


# --- dtypes by name


def test_dtypes_by_name():
    for name in ("float32", "bfloat16", "float16", "int8"):
        cache = LayerCache([0], [8], [False], batch_size=1, head_dim=8, dtype=name)
        assert cache.key_pages.dtype == getattr(torch, name)
        sizes = {"head_dim": 8, "page_size": 16}
        plan = Plan.full(1, 1)
        assert plan.kv_bytes(9, dtype=name, **sizes) == plan.kv_bytes(9, dtype=getattr(torch, name), **sizes)
    with refused("dtype: expected float32, bfloat16, float16, int8 or 'int4', got 'float64'"):
        LayerCache([0], [8], [False], batch_size=1, head_dim=8, dtype="float64")
