# SPDX-License-Identifier: Apache-2.0
"""ra_compression.py: msmodelslim's documented scripts with the import line changed, and what its files hold."""

import math
import random
import re
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, MptConfig, MptForCausalLM

from razor_attention import HeadScores, find_heads, find_windows
from razor_attention.files import load_heads, load_windows
from razor_attention.ra_compression import RACompressConfig, RACompressor, RARopeCompressConfig, RARopeCompressor
from test_find_heads import tokenizer
from tiny_models import tiny_model


def exactly(message):
    return f"^{re.escape(message)}$"


BIG = 13000  # a vocabulary that has msmodelslim's ids


def rope_model(family, **changes):
    return tiny_model(family, max_position_embeddings=16384, **changes)


class PackedBlock(nn.Module):
    """An attention layer with Baichuan's names: rows of W_pack are q, k and v, one after the other."""

    def __init__(self, hidden_size, draw):
        super().__init__()
        self.W_pack = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        nn.init.normal_(self.W_pack.weight, generator=draw)


class PackedModel(nn.Module):
    def __init__(self, hidden_size=32, num_heads=4, num_layers=3, seed=0):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.config = SimpleNamespace(hidden_size=hidden_size, num_attention_heads=num_heads)
        self.layers = nn.ModuleList(PackedBlock(hidden_size, draw) for _ in range(num_layers))


def windows_by_the_binary(layers, theta, alpha):
    """Its formula, literally: layers of (query, key), each [rows, heads, cols], float32."""
    heads = layers[0][0].shape[1]
    slopes = torch.tensor([2 ** (-8 * (i + 1) / heads) for i in range(heads)])  # for a power of two
    out = []
    for h in range(heads):
        best = 0
        for q, k in layers:
            f = torch.max(q[:, h, :] @ k[:, h, :].t()).sqrt()
            if f > best:
                best = f
        out.append(int((best + math.log(theta) + alpha) / slopes[h]))
    return out


# --- ALiBi


def bloom(num_heads=8):
    return BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=64, n_layer=2, n_head=num_heads)).eval()


@pytest.mark.parametrize("theta", [1e-5, 4.2e-4])
def test_script_on_bloom(tmp_path, theta):
    model = bloom()
    config = RACompressConfig(theta=theta, alpha=100)
    ra = RACompressor(model, config)
    assert ra.get_alibi_windows(str(tmp_path / "win.pt")) is None

    found = torch.load(tmp_path / "win.pt", weights_only=True)
    weights = [block.self_attention.query_key_value.weight.detach() for block in model.transformer.h]
    assert found.dtype == torch.int64
    assert found.tolist() == windows_by_the_binary([w.reshape(3, 64, 8, -1)[:2] for w in weights], theta, 100)
    assert load_windows(tmp_path / "win.pt").equal(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_script_on_packed_projections(tmp_path, dtype):
    model = PackedModel().to(dtype)
    RACompressor(model, RACompressConfig()).get_alibi_windows(str(tmp_path / "win.pt"))
    weights = [layer.W_pack.weight.detach().float() for layer in model.layers]
    wanted = windows_by_the_binary([w.reshape(3, 32, 4, -1)[:2] for w in weights], 1e-5, 100)
    assert torch.load(tmp_path / "win.pt", weights_only=True).tolist() == wanted


def test_script_on_mpt(tmp_path):
    model = MptForCausalLM(MptConfig(vocab_size=64, d_model=64, n_layers=2, n_heads=8)).eval()
    RACompressor(model, RACompressConfig()).get_alibi_windows(str(tmp_path / "win.pt"))
    assert load_windows(tmp_path / "win.pt").equal(find_windows(model, progress=False))


def test_negative_windows_stay_and_are_explained(tmp_path):
    with pytest.warns(UserWarning, match=r"^alpha: expected a margin above -ln\(theta\) = 11\.51, got 0; "):
        RACompressor(PackedModel(), RACompressConfig(alpha=0)).get_alibi_windows(str(tmp_path / "win.pt"))
    assert load_windows(tmp_path / "win.pt").min() < 0


def test_windows_file_belongs_to_its_owner_alone_and_can_be_written_again(tmp_path):
    path = tmp_path / "win.pt"
    for alpha in (100, 200):
        RACompressor(PackedModel(), RACompressConfig(alpha=alpha)).get_alibi_windows(str(path))
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert load_windows(path).equal(find_windows(PackedModel(), alpha=200, progress=False))
    assert [file.name for file in tmp_path.iterdir()] == ["win.pt"]


def test_a_rope_model_has_no_windows():
    message = (
        "model: expected one that uses ALiBi (bloom, mpt, falcon with alibi, baichuan 13B), got llama; rotary models "
        "have retrieval heads instead: find_heads; one that does use ALiBi needs its slopes named"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        RACompressor(rope_model("llama"), RACompressConfig()).get_alibi_windows("win.pt")


# --- RoPE


PROBED = [0, 3, 5]  # query heads, of different kv heads: a dense map of all would take half a minute


def dense_scores(query, key, scale, period=2500):
    """The rule by blocks of the dense map, float64. query [heads, 10001, dim], key [kv heads, 10001, dim]."""
    heads, tokens = query.shape[0], query.shape[1] - 1
    key = key.repeat_interleave(heads // key.shape[0], 0).double()
    scores = torch.zeros(2, heads, dtype=torch.float64)
    for head in PROBED:
        for first in range(period, tokens, period // 2):  # rows of the map without the prefix
            rows = torch.arange(first, first + period // 2)
            logits = scale * query[head, rows + 1].double() @ key[head].T
            logits.masked_fill_(torch.arange(tokens + 1) > rows[:, None] + 1, -torch.inf)
            attention = logits.softmax(-1)[:, 1:]
            for copy in range(3):
                column = rows % period + period * copy
                earlier = column < rows
                row, column = torch.arange(len(rows))[earlier], column[earlier]
                scores[0, head] += attention[row, column].sum()
                scores[1, head] += attention[row, column + 1].sum()
    return scores[:, PROBED] / (tokens - period)


def heads_by_the_rule(scores, num_kv_heads, ratio):
    """Its selection, literally: pooled values, membership by equality. scores [layers][heads]."""
    per_layer = []
    for row in scores:
        group = int(len(row) / num_kv_heads)
        per_layer.append([max(row[i * group : (i + 1) * group]) for i in range(num_kv_heads)])
    pooled = sorted((value for row in per_layer for value in row), reverse=True)
    top = pooled[: round(len(pooled) * ratio)]
    chosen = {i: [h for h, value in enumerate(row) if value in top] for i, row in enumerate(per_layer)}
    return {layer: heads for layer, heads in chosen.items() if heads}


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_script_on_rope_models(tmp_path, family, monkeypatch):
    model, words = rope_model(family, vocab_size=BIG), tokenizer(BIG)
    seen, real = [], torch.ops.razor.head_scores

    def look(query, key, period, *, scale):
        seen.append((query[0], key[0], scale))
        return real(query, key, period, scale=scale)

    given = []
    model.model.register_forward_pre_hook(lambda _, args, kwargs: given.append(kwargs["input_ids"]), with_kwargs=True)
    monkeypatch.setattr(torch.ops.razor, "head_scores", look)
    config = RARopeCompressConfig(induction_head_ratio=0.34, echo_head_ratio=0.17)
    ra = RARopeCompressor(model, words, config)
    assert ra.get_compress_heads(str(tmp_path / "heads.pt")) is None

    ids = given[0][0]
    assert ids.shape == (10001,)
    assert ids[1:].view(4, 2500).unique(dim=0).shape[0] == 1
    assert ids[1:].min() >= 10000
    assert ids[1:].max() <= 12500
    wanted = torch.stack([dense_scores(*layer) for layer in seen])  # [layers, 2, probed heads]
    assert (ra.scores.echo[:, PROBED] - wanted[:, 0]).abs().max() < 1e-5
    assert (ra.scores.induction[:, PROBED] - wanted[:, 1]).abs().max() < 1e-5

    file = torch.load(tmp_path / "heads.pt", weights_only=True)
    assert file == {
        "prefix_matching": heads_by_the_rule(ra.scores.induction.tolist(), 3, 0.34),
        "copying": heads_by_the_rule(ra.scores.echo.tolist(), 3, 0.17),
    }
    assert file["prefix_matching"]
    assert load_heads(tmp_path / "heads.pt") == {"induction": file["prefix_matching"], "echo": file["copying"]}
    assert stat.S_IMODE((tmp_path / "heads.pt").stat().st_mode) == 0o640


def test_selection_is_the_rule_ties_included():
    rng = random.Random(0)
    for _ in range(300):
        layers, kv_heads, group = rng.randint(1, 6), rng.randint(1, 6), rng.randint(1, 4)
        values = [0.0, 0.2, 0.5, 0.5, 1.0] if rng.random() < 0.5 else [rng.random() for _ in range(9)]
        echo, induction = (
            [[rng.choice(values) for _ in range(kv_heads * group)] for _ in range(layers)] for _ in range(2)
        )
        scores = HeadScores(torch.tensor(echo), torch.tensor(induction), num_kv_heads=kv_heads)
        ratios = rng.choice([0.0, 0.14, 0.25, 0.5, rng.random(), 1.0]), rng.choice([0.01, 0.5, rng.random()])
        assert scores.select(*ratios) == {
            "induction": heads_by_the_rule(scores.induction.tolist(), kv_heads, ratios[0]),
            "echo": heads_by_the_rule(scores.echo.tolist(), kv_heads, ratios[1]),
        }


def test_ids_of_a_small_vocabulary(tmp_path, monkeypatch):
    model, words = rope_model("llama"), tokenizer()
    monkeypatch.setattr(
        "razor_attention.ra_compression.find_heads",
        lambda *args, **options: find_heads(*args, period=30, repeats=3, progress=False, **options),
    )
    ra = RARopeCompressor(model, words, RARopeCompressConfig())
    ra.get_compress_heads(str(tmp_path / "heads.pt"))
    assert torch.equal(ra.scores.echo, find_heads(model, words, period=30, repeats=3, progress=False).echo)


def test_attributes():
    model, words, cfg = rope_model("llama"), tokenizer(), RARopeCompressConfig()
    ra = RARopeCompressor(model, words, cfg)
    assert (ra.model, ra.tokenizer, ra.cfg) == (model, words, cfg)
    assert (ra.hidden_size, ra.num_attention_heads, ra.num_key_value_heads) == (48, 6, 3)
    assert ra.num_kv_per_group == 2.0
    assert isinstance(ra.num_kv_per_group, float)
    assert RACompressConfig() == RACompressConfig(theta=0.00001, alpha=100)
    assert RARopeCompressConfig() == RARopeCompressConfig(induction_head_ratio=0.14, echo_head_ratio=0.01)


def test_an_alibi_model_has_no_retrieval_heads():
    model = bloom()
    message = (
        "model: expected one with rotary positions, got bloom, which uses ALiBi; its windows are found by find_windows"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        RARopeCompressor(model, tokenizer(), RARopeCompressConfig()).get_compress_heads("heads.pt")


# --- what is refused


@pytest.mark.parametrize(
    ("config", "values", "kind", "message"),
    [
        (RACompressConfig, {"alpha": 1.0}, TypeError, "alpha: expected an int, got float"),
        (RACompressConfig, {"alpha": True}, TypeError, "alpha: expected an int, got bool"),
        (RACompressConfig, {"alpha": 10001}, ValueError, "alpha: expected a number in [0, 10000], got 10001"),
        (RACompressConfig, {"alpha": -1}, ValueError, "alpha: expected a number in [0, 10000], got -1"),
        (RACompressConfig, {"alpha": -1, "theta": 1}, ValueError, "alpha: expected a number in [0, 10000], got -1"),
        (RACompressConfig, {"theta": 1}, TypeError, "theta: expected a float, got int"),
        (RACompressConfig, {"theta": 0.002}, ValueError, "theta: expected a number in [1e-05, 0.001], got 0.002"),
        (RACompressConfig, {"theta": 1e-6}, ValueError, "theta: expected a number in [1e-05, 0.001], got 1e-06"),
        (RACompressConfig, {"theta": math.nan}, ValueError, "theta: expected a number in [1e-05, 0.001], got nan"),
        (
            RARopeCompressConfig,
            {"induction_head_ratio": 1},
            TypeError,
            "induction_head_ratio: expected a float, got int",
        ),
        (RARopeCompressConfig, {"echo_head_ratio": False}, TypeError, "echo_head_ratio: expected a float, got bool"),
        (
            RARopeCompressConfig,
            {"echo_head_ratio": 1.1},
            ValueError,
            "echo_head_ratio: expected a number in [0, 1], got 1.1",
        ),
        (
            RARopeCompressConfig,
            {"induction_head_ratio": -0.1},
            ValueError,
            "induction_head_ratio: expected a number in [0, 1], got -0.1",
        ),
    ],
)
def test_config_ranges(config, values, kind, message):
    with pytest.raises(kind, match=exactly(message)):
        config(**values)


@pytest.mark.parametrize(
    "values", [{"theta": 1e-5}, {"theta": 1e-3}, {"alpha": 0}, {"alpha": 10000}], ids=lambda values: str(values)
)
def test_ends_of_the_ranges(values):
    RACompressConfig(**values)


def test_ends_of_the_ratios():
    RARopeCompressConfig(0.0, 1.0)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: RACompressor("model", RACompressConfig()), TypeError, "model: expected a Module, got str"),
        (lambda: RACompressor(PackedModel(), {}), TypeError, "cfg: expected a RACompressConfig, got dict"),
        (
            lambda: RACompressor(nn.Linear(2, 2), RACompressConfig()),
            ValueError,
            "model: expected a config with hidden_size, got none",
        ),
        (
            lambda: RACompressor(PackedModel(2002, 2, 0), RACompressConfig()),
            ValueError,
            "model: expected a head_dim in [1, 1000], got 1001",
        ),
        (
            lambda: RARopeCompressor("model", tokenizer(), RARopeCompressConfig()),
            TypeError,
            "model: expected a Module, got str",
        ),
        (
            lambda: RARopeCompressor(rope_model("llama"), tokenizer(), {}),
            TypeError,
            "cfg: expected a RARopeCompressConfig, got dict",
        ),
        (
            lambda: RARopeCompressor(rope_model("llama"), "words", RARopeCompressConfig()),
            TypeError,
            "tokenizer: expected a PreTrainedTokenizerBase, got str",
        ),
    ],
)
def test_arguments(make, kind, message):
    with pytest.raises(kind, match=exactly(message)):
        make()


@pytest.fixture
def places(tmp_path):
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "real.pt").write_text("")
    (tmp_path / "link.pt").symlink_to(tmp_path / "real.pt")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("win.txt", "save_path: expected a file name ending in .pt, got win.txt"),
        (".pt", "save_path: expected a file name ending in .pt, got .pt"),
        ("my win.pt", "save_path: expected letters, digits, '_', '-', '.' and '/' only, got '{}'"),
        ("win.pt/", "save_path: expected a file name ending in .pt, got win.pt"),
        ("folder.pt", "save_path: expected a file, got a folder"),
        ("link.pt", "save_path: expected a file, got a symbolic link"),
        ("nowhere/win.pt", "save_path: expected a file in a writable folder, got {}"),
        (f"{'x' * 253}.pt", "save_path: expected at most 255 characters in a name and 4096 in all, got {n}"),
    ],
)
def test_paths(places, name, message):
    path = f"{places}/{name}"
    for compressor in (
        RACompressor(PackedModel(), RACompressConfig()).get_alibi_windows,
        RARopeCompressor(rope_model("llama"), tokenizer(), RARopeCompressConfig()).get_compress_heads,
    ):
        with pytest.raises(ValueError, match=exactly(message.format(path, n=len(path)))):
            compressor(path)
    assert sorted(file.name for file in places.iterdir()) == ["folder.pt", "link.pt", "real.pt"]


@pytest.mark.parametrize("path", [b"win.pt", Path("win.pt"), None])
def test_path_types(path):
    with pytest.raises(TypeError, match=exactly(f"save_path: expected a str, got {type(path).__name__}")):
        RACompressor(PackedModel(), RACompressConfig()).get_alibi_windows(path)


def test_empty_path():
    with pytest.raises(ValueError, match=exactly("save_path: expected a path, got ''")):
        RACompressor(PackedModel(), RACompressConfig()).get_alibi_windows("")
