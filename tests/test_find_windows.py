# SPDX-License-Identifier: Apache-2.0
"""hf/windows.py and hf/checkpoint.py: windows of real architectures, from memory and from files of every kind."""

import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    LlamaConfig,
    MptConfig,
    MptForCausalLM,
)

from razor_attention import FULL, Plan, alibi_slopes, dropped_mass, find_heads, find_windows
from razor_attention.hf import checkpoint
from razor_attention.hf.baichuan import BaichuanConfig, BaichuanForCausalLM
from test_find_heads import tokenizer
from test_ra_compression import PackedModel
from tiny_models import prompts, tiny_model


def exactly(message):
    return f"^{re.escape(message)}$"


HIDDEN, LAYERS = 48, 3
SMALL = {"vocab_size": 96, "hidden_size": HIDDEN}


def bloom(heads=6):
    return BloomForCausalLM(BloomConfig(**SMALL, n_layer=LAYERS, n_head=heads))


def mpt(heads=6):
    return MptForCausalLM(MptConfig(vocab_size=96, d_model=HIDDEN, n_layers=LAYERS, n_heads=heads))


def falcon(**changes):
    sizes = {"num_hidden_layers": LAYERS, "num_attention_heads": 6, "alibi": True, "new_decoder_architecture": False}
    return FalconForCausalLM(FalconConfig(**SMALL | sizes | {"multi_query": False} | changes))


def baichuan():
    sizes = {"intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 6}
    return BaichuanForCausalLM(BaichuanConfig(**SMALL | sizes))


def rows_by_head(weight, heads):  # [heads, 3, head_dim, in]
    size = HIDDEN // heads
    return [(weight[3 * h * size :][:size], weight[(3 * h + 1) * size :][:size]) for h in range(heads)]


def rows_by_side(weight, heads):  # [3, heads, head_dim, in]
    size = HIDDEN // heads
    return [(weight[h * size :][:size], weight[HIDDEN + h * size :][:size]) for h in range(heads)]


def rows_of_one_key(weight, heads):  # [heads + 2, head_dim, in]
    size = HIDDEN // heads
    return [(weight[h * size :][:size], weight[heads * size :][:size]) for h in range(heads)]


def rows_of_groups(weight, heads, group=3):  # [kv heads, group + 2, head_dim, in]
    size = HIDDEN // heads
    starts = [(h // group) * (group + 2) * size for h in range(heads)]
    return [
        (weight[start + h % group * size :][:size], weight[start + group * size :][:size])
        for h, start in enumerate(starts)
    ]


# model, its projections by layer, how their rows are arranged, name of the norm before them, slopes
MODELS = {
    "bloom": (bloom, "transformer.h.{}.self_attention.query_key_value", rows_by_head, "input_layernorm", 1.0),
    "mpt": (mpt, "transformer.blocks.{}.attn.Wqkv", rows_by_side, "norm_1", 1.0),
    "falcon": (falcon, "transformer.h.{}.self_attention.query_key_value", rows_by_head, "input_layernorm", 8**-0.5),
    "falcon, one key": (
        lambda: falcon(multi_query=True),
        "transformer.h.{}.self_attention.query_key_value",
        rows_of_one_key,
        "input_layernorm",
        8**-0.5,
    ),
    "falcon, groups": (
        lambda: falcon(new_decoder_architecture=True, num_kv_heads=2),
        "transformer.h.{}.self_attention.query_key_value",
        rows_of_groups,
        "ln_attn",
        8**-0.5,
    ),
    "baichuan": (baichuan, "model.layers.{}.self_attn.W_pack", rows_by_side, "input_layernorm", 1.0),
    "packed": (lambda: PackedModel(HIDDEN, 6, LAYERS), "layers.{}.W_pack", rows_by_side, None, 1.0),
}


def made(name):
    """The model with large weights, and per layer its heads' (query, key) rows, [head_dim, in] each."""
    build, projection, split, norm, factor = MODELS[name]
    model = build()
    draw = torch.Generator().manual_seed(7)
    for key, weight in model.named_parameters():
        shift = 1.0 if "norm" in key and key.endswith("weight") else 0.0
        nn.init.normal_(weight, shift, 0.3, generator=draw)
    state = model.state_dict()
    heads = [split(state[projection.format(layer) + ".weight"], 6) for layer in range(LAYERS)]
    norms = []
    for layer in range(LAYERS if norm else 0):
        before = projection.format(layer).split(f".{layer}.")[0] + f".{layer}.{norm}."
        norms.append(sum(v.double().square().sum() for k, v in state.items() if k.startswith(before)))
    slopes = alibi_slopes(6)
    if name.startswith("falcon"):
        slopes = slopes.bfloat16().float()
    return model, heads, norms, (slopes * factor).double()


def per_head_windows(heads, slopes, theta=1e-5, alpha=100.0):
    """[layers, heads], float64 from the rows alone."""
    spread = [[max(0.0, float((q.double().T @ k.double()).max())) ** 0.5 for q, k in layer] for layer in heads]
    return ((torch.tensor(spread, dtype=torch.float64) - math.log(theta) + alpha) / slopes).ceil().long()


def theorem_windows(heads, norms, slopes, theta=1e-5):
    product = [[float(torch.linalg.matrix_norm(q.double().T @ k.double(), ord=2)) for q, k in layer] for layer in heads]
    bound = 2 * torch.tensor(product, dtype=torch.float64) * torch.tensor(norms, dtype=torch.float64)[:, None]
    return ((bound - math.log(theta)) / slopes).ceil().long()


# --- the rules


@pytest.mark.parametrize("name", MODELS)
def test_per_head(name):
    model, heads, _, slopes = made(name)
    wanted = per_head_windows(heads, slopes)
    options = {"method": "per_head", "progress": False}
    assert find_windows(model, per_layer=True, **options).equal(wanted)
    assert find_windows(model, **options).equal(wanted.amax(0))
    narrow = per_head_windows(heads, slopes, 1e-3, 0.0)
    assert find_windows(model, theta=1e-3, alpha=0, per_layer=True, **options).equal(narrow)
    assert (narrow < wanted).all()
    assert Plan.from_windows(narrow, num_layers=LAYERS, num_kv_heads=6).window_size.equal(narrow)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "packed"])
def test_theorem(name):
    model, heads, norms, slopes = made(name)
    wanted = theorem_windows(heads, norms, slopes)
    options = {"method": "theorem", "progress": False}
    assert find_windows(model, per_layer=True, **options).equal(wanted)
    assert find_windows(model, **options).equal(wanted.amax(0))


def test_one_head_moves_its_own_window_alone():
    model, *_ = made("bloom")
    before = find_windows(model, method="per_head", progress=False)
    with torch.no_grad():
        model.transformer.h[1].self_attention.query_key_value.weight.view(6, 3, 8, HIDDEN)[4, :2] *= 30
    after = find_windows(model, method="per_head", progress=False)
    assert (after != before).tolist() == [head == 4 for head in range(6)]


def test_msmodelslim_slices_columns_and_takes_any_layout():
    model, *_ = made("bloom")
    found = find_windows(model, progress=False)
    slopes = alibi_slopes(6)
    for h in range(6):
        best = 0
        for layer in range(LAYERS):
            fused = model.transformer.h[layer].self_attention.query_key_value.weight.detach().reshape(3, HIDDEN, 6, 8)
            best = max(best, float((fused[0, :, h] @ fused[1, :, h].T).max()) ** 0.5)
        assert abs(int(found[h]) - (best + math.log(1e-5) + 100) / float(slopes[h])) <= 1


def test_separate_projections():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.k_proj, self.v_proj, self.q_proj = (nn.Linear(HIDDEN, HIDDEN) for _ in range(3))  # in any order

    model = nn.Module()
    model.layers = nn.ModuleList(Block() for _ in range(LAYERS))
    model.config = SimpleNamespace(num_attention_heads=6)
    heads = [
        [(layer.q_proj.weight.data[8 * h :][:8], layer.k_proj.weight.data[8 * h :][:8]) for h in range(6)]
        for layer in model.layers
    ]
    wanted = per_head_windows(heads, alibi_slopes(6).double())
    assert find_windows(model, method="per_head", per_layer=True, progress=False).equal(wanted)


# --- from files


def save(model, folder, kind):
    """A checkpoint as `kind` says."""
    folder.mkdir()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict() if hasattr(model.config, "to_dict") else vars(model.config)
    (folder / "config.json").write_text(json.dumps(config, default=str))
    name, write = (
        ("model.safetensors", save_file) if "safetensors" in kind else ("pytorch_model.bin", torch.save)
    )  # both (tensors, path)
    if "shards" not in kind:
        write(state, folder / name)
        return
    index = {}
    for part in range(3):
        shard = name.replace(".", f"-{part + 1:05}-of-00003.", 1)
        keys = sorted(state)[part::3]
        write({key: state[key] for key in keys}, folder / shard)
        index |= dict.fromkeys(keys, shard)
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


@pytest.mark.parametrize("kind", ["safetensors", "safetensors shards", "bin", "bin shards"])
@pytest.mark.parametrize("name", MODELS)
def test_files_give_what_memory_gives(tmp_path, name, kind):
    model, *_ = made(name)
    save(model, tmp_path / "model", kind)
    for method in ("msmodelslim", "per_head"):
        try:
            wanted = find_windows(model, method=method, progress=False)
        except ValueError as error:  # rows that msmodelslim's view does not fit
            with pytest.raises(ValueError, match=exactly(str(error))):
                find_windows(tmp_path / "model", method=method, progress=False)
            continue
        assert find_windows(str(tmp_path / "model"), method=method, progress=False).equal(wanted)


def test_nothing_else_is_read(tmp_path, monkeypatch):
    model, *_ = made("bloom")
    save(model, tmp_path / "model", "safetensors shards")
    read, real = [], checkpoint._read
    monkeypatch.setattr(checkpoint, "_read", lambda file, key: read.append(key) or real(file, key))
    find_windows(tmp_path / "model", method="theorem", progress=False)
    layers = "self_attention.query_key_value.weight", "input_layernorm.weight", "input_layernorm.bias"
    assert read == [f"transformer.h.{layer}.{name}" for layer in range(LAYERS) for name in layers]


def test_bfloat16_weights_are_computed_in_float32():
    model, *_ = made("bloom")
    half = model.bfloat16()
    assert find_windows(half, progress=False).equal(find_windows(half.float(), progress=False))


# --- calibrated


def brute_force(model, ids):
    """[layers, heads, tokens + 1] from the model's own attention maps."""
    with torch.no_grad():
        maps = model(ids, output_attentions=True, use_cache=False).attentions
    maps, tokens = torch.stack(maps).double().amax(1), ids.shape[1]  # of one sequence
    mass = torch.zeros(*maps.shape[:2], tokens + 1, dtype=torch.float64)
    for w in range(tokens + 1):
        for p in range(tokens):
            mass[..., w] = torch.maximum(mass[..., w], maps[..., p, : max(0, p - w + 1)].sum(-1))
    return mass


@pytest.fixture(scope="module")
def read():
    model, *_ = made("bloom")
    model.eval()
    ids = prompts(70)[0]
    return model, ids, brute_force(model, ids)


def test_dropped_mass(read):
    model, ids, wanted = read
    mass = dropped_mass(model, ids, progress=False)
    torch.testing.assert_close(mass.double(), wanted, rtol=1e-4, atol=1e-7)
    assert (mass[..., 0] == 1).all()
    assert (mass[..., -1] == 0).all()
    assert (mass.diff() <= 0).all()
    assert 2 < (mass > 1e-2).sum(-1).min() < (mass > 1e-2).sum(-1).max() < 70


@pytest.mark.parametrize("name", ["mpt", "baichuan"])
def test_dropped_mass_of_other_models(name):
    model, *_ = made(name)
    model.eval()
    ids = prompts(40)[0]
    model.set_attn_implementation("eager")
    wanted = brute_force(model, ids)
    torch.testing.assert_close(dropped_mass(model, ids, progress=False).double(), wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "packed"])
def test_measuring_computes_what_the_model_does(name):
    model, *_ = made(name)
    model.eval()
    ids, out = prompts(40)[0], []
    hook = model.base_model.register_forward_hook(lambda *parts: out.append(parts[-1].last_hidden_state))
    with torch.no_grad():
        model(ids, use_cache=False)
    dropped_mass(model, ids, progress=False)
    hook.remove()
    torch.testing.assert_close(out[1], out[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("theta", [1e-1, 3e-2, 1e-2])
def test_calibrated(read, theta):
    model, ids, mass = read
    wanted = (mass > theta).int().argmin(-1)  # the first window that drops no more
    options = {"method": "calibrated", "theta": theta, "ids": ids, "progress": False}
    found = find_windows(model, per_layer=True, **options)
    assert found.equal(wanted.clamp(min=1))
    assert find_windows(model, **options).equal(found.amax(0))
    assert (mass.gather(-1, found[..., None]) <= theta).all()
    assert (mass.gather(-1, found[..., None] - 1) > theta).all()


def test_calibrated_takes_the_worst_sequence(read):
    model, ids, _ = read
    other = prompts(70, seed=1)[0]
    both = dropped_mass(model, torch.cat([ids, other]), progress=False)
    each = [dropped_mass(model, one, progress=False) for one in (ids, other)]
    torch.testing.assert_close(both, torch.maximum(*each), rtol=1e-5, atol=1e-8)


def test_text_that_is_too_short_for_a_head(read):
    model, ids, _ = read
    with pytest.warns(UserWarning, match="^ids: expected a text longer than every head reads, got 70 tokens, "):
        find_windows(model, method="calibrated", theta=1e-12, ids=ids, progress=False)


def test_measuring_leaves_the_model_as_it_was(read):
    model, ids, _ = read
    kinds = [type(module) for module in model.modules()], model.config._attn_implementation
    dropped_mass(model, ids, progress=False)
    with pytest.raises(IndexError):
        dropped_mass(model, ids + 1000, progress=False)
    assert ([type(module) for module in model.modules()], model.config._attn_implementation) == kinds


# --- what is refused

ROPE = (
    "model: expected one that uses ALiBi (bloom, mpt, falcon, baichuan), got {}, which does not; "
    "its heads are found by find_heads"
)


@pytest.mark.parametrize("method", ["msmodelslim", "per_head", "theorem", "calibrated"])
def test_models_without_alibi(method):
    ids = {"ids": prompts(8)[0]} if method == "calibrated" else {}
    for model, kind in ((tiny_model("llama"), "llama"), (falcon(alibi=False), "falcon")):
        with pytest.raises(ValueError, match=exactly(ROPE.format(kind))):
            find_windows(model, method=method, progress=False, **ids)


def test_other_modules_with_rotary_positions():
    model = PackedModel()
    model.layers[0].rotary_emb = nn.Identity()
    with pytest.raises(ValueError, match=exactly(ROPE.format("SimpleNamespace"))):
        find_windows(model, progress=False)


def test_checkpoint_without_alibi(tmp_path):
    LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path)
    save_file({"model.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=exactly(ROPE.format("llama"))):
        find_windows(tmp_path, progress=False)


def test_alibi_models_have_no_retrieval_heads(tmp_path):
    message = (
        "model: expected one with rotary positions, got {}, which uses ALiBi; its windows are found by find_windows"
    )
    for model, kind in ((bloom(), "bloom"), (mpt(), "mpt"), (falcon(), "falcon")):
        with pytest.raises(ValueError, match=exactly(message.format(kind))):
            find_heads(model, tokenizer(), progress=False)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (
            {"method": "guess"},
            ValueError,
            "method: expected 'msmodelslim', 'per_head', 'theorem' or 'calibrated', got 'guess'",
        ),
        ({"method": "calibrated"}, ValueError, "ids: expected token ids with method 'calibrated', got none"),
        (
            {"ids": torch.zeros(1, 5, dtype=torch.int64)},
            ValueError,
            "ids: expected none with method 'msmodelslim', got token ids",
        ),
        (
            {"per_layer": True},
            ValueError,
            "per_layer: expected False with method 'msmodelslim', which has one window a head, got True",
        ),
        (
            {"method": "theorem"},
            ValueError,
            "weights: expected the norm of every layer for method 'theorem', got none for layer 0",
        ),
    ],
)
def test_options(options, kind, message):
    with pytest.raises(kind, match=exactly(message)):
        find_windows(PackedModel(), progress=False, **options)


@pytest.mark.parametrize(
    ("ids", "got"),
    [
        (torch.zeros(5, dtype=torch.int64), "[5] torch.int64"),
        (torch.zeros(1, 5), "[1, 5] torch.float32"),
        (torch.zeros(1, 1, dtype=torch.int64), "[1, 1] torch.int64"),
        ([[1, 2, 3]], "list"),
    ],
)
def test_ids(ids, got):
    message = f"ids: expected (batch, tokens), int64, at least 2 tokens, got {got}"
    with pytest.raises(ValueError, match=exactly(message)):
        find_windows(bloom(), method="calibrated", ids=ids, progress=False)


def test_models_and_paths(tmp_path):
    for model, kind, message in (
        (3, TypeError, "model: expected a module or a path, got int"),
        (nn.Linear(2, 2), ValueError, "model: expected a config with num_attention_heads, got NoneType without it"),
        (tmp_path, ValueError, f"model: expected a folder with config.json, got {tmp_path}"),
    ):
        with pytest.raises(kind, match=exactly(message)):
            find_windows(model, progress=False)
    (tmp_path / "config.json").write_text('{"model_type": "bloom", "n_head": 2}')
    with pytest.raises(ValueError, match=r"^model: expected model\.safetensors or pytorch_model\.bin, or their shards"):
        find_windows(tmp_path, progress=False)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')
    with pytest.raises(ValueError, match=r"^model: expected the shard b\.safetensors in .*, got an index without its"):
        find_windows(tmp_path, progress=False)
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model.safetensors").write_bytes(b"12")
    with pytest.raises(ValueError, match=r"model\.safetensors: expected a safetensors file, got"):
        find_windows(tmp_path, progress=False)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"12")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: expected a torch file of plain tensors, got"):
        find_windows(tmp_path, progress=False)
    save_file({"other.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"^model: expected projections called one of query_key_value, Wqkv, W_pack, q_proj"
    ):
        find_windows(tmp_path, progress=False)


def test_weights_that_are_not_in_memory():
    with torch.device("meta"):
        model = bloom()
    with pytest.raises(ValueError, match=r"^model: expected weights in memory, got transformer\.h\.0\.self_attention"):
        find_windows(model, progress=False)


def test_wide_windows_are_full():
    found = find_windows(made("bloom")[0], method="per_head", alpha=1e12, progress=False)
    assert found.tolist() == [FULL] * 6
