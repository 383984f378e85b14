# SPDX-License-Identifier: Apache-2.0
"""hf/windows.py and hf/checkpoint.py: windows of real architectures, from memory and from files of every kind."""

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

from razor_attention import FULL, Plan, alibi_slopes, find_heads, find_windows
from razor_attention.hf import checkpoint
from razor_attention.hf.baichuan import BaichuanConfig, BaichuanForCausalLM
from test_find_heads import tokenizer
from test_ra_compression import PackedModel
from tiny_models import prompts, save, tiny_model


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


# --- what is refused

ROPE = (
    "model: expected one that uses ALiBi (bloom, mpt, falcon with alibi, baichuan 13B), got {}; rotary models "
    "have retrieval heads instead: find_heads; one that does use ALiBi needs its slopes named"
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


@pytest.mark.parametrize(
    "values",
    [
        {"max_position_embeddings": 2048},
        {"rope_theta": 1e4},
        {"rope_parameters": {"rope_theta": 1e4}},
        {"rotary": {"base": 1e4}},
        {"model_type": "baichuan", "max_position_embeddings": 2048},
    ],
    ids=str,
)
def test_configurations_that_hint_at_other_positions(tmp_path, values):
    model = PackedModel()
    model.config = SimpleNamespace(**vars(model.config) | values)
    got = values.get("model_type", "SimpleNamespace")
    with pytest.raises(ValueError, match=exactly(ROPE.format(got))):
        find_windows(model, progress=False)
    if "model_type" not in values:
        save(model, tmp_path / "model", "safetensors")
        with pytest.raises(ValueError, match=exactly(ROPE.format("SimpleNamespace"))):
            find_windows(tmp_path / "model", progress=False)
    assert find_windows(model, slopes=alibi_slopes(4), progress=False).equal(
        find_windows(PackedModel(), progress=False)
    )
    if "model_type" not in values:
        model.config.alibi = True
        assert find_windows(model, progress=False).equal(find_windows(PackedModel(), progress=False))


def test_slopes_of_the_callers():
    model, heads, *_ = made("packed")
    slopes = [0.5, 0.25, 0.1, 0.1, 0.01, 2.0]
    wanted = per_head_windows(heads, torch.tensor(slopes).double())
    assert find_windows(model, slopes=slopes, method="per_head", per_layer=True, progress=False).equal(wanted)
    with pytest.raises(
        ValueError, match=exactly("slopes: expected none with method 'calibrated', which runs the model, got some")
    ):
        find_windows(bloom(), slopes=slopes, method="calibrated", ids=prompts(8)[0], progress=False)


def test_models_with_other_layers_than_their_config_says():
    model = PackedModel(num_layers=2)
    model.config.num_hidden_layers = 5
    with pytest.raises(
        ValueError, match=exactly("model: expected 5 layers with W_pack like its config, got layers 0, 1")
    ):
        find_windows(model, progress=False)
    model = nn.Module()
    model.text, model.vision = PackedModel(), PackedModel()
    model.config = model.text.config
    message = "model: expected one W_pack in layer 0, got text.layers.0.W_pack.weight and vision.layers.0.W_pack.weight"
    with pytest.raises(ValueError, match=exactly(message)):
        find_windows(model, progress=False)


def test_a_key_projection_that_is_missing(tmp_path):
    (tmp_path / "config.json").write_text('{"num_attention_heads": 2}')
    tensors = {f"layers.{i}.{side}_proj.weight": torch.ones(4, 4) for i, side in ((0, "q"), (0, "k"), (1, "q"))}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=exactly("model: expected the weight layers.1.k_proj.weight, got a model without it")
    ):
        find_windows(tmp_path, progress=False)


@pytest.mark.parametrize("name", ["falcon, one key", "falcon, groups"])
def test_msmodelslim_has_no_view_of_grouped_heads(name):
    got = {"falcon, one key": 1, "falcon, groups": 2}[name]
    message = (
        f"model: expected as many kv heads as query heads for method 'msmodelslim', got {got} of 6, whose rows it "
        "would mix up; use method='per_head'"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        find_windows(made(name)[0], progress=False)


def test_double_precision(tmp_path):
    model, *_ = made("bloom")
    for method in ("msmodelslim", "per_head", "theorem"):
        wanted = find_windows(model.float(), method=method, progress=False)
        assert find_windows(model.double(), method=method, progress=False).equal(wanted)


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
            "weights[0] norm: expected that before the projections for method 'theorem', got none",
        ),
    ],
)
def test_options(options, kind, message):
    with pytest.raises(kind, match=exactly(message)):
        find_windows(PackedModel(), progress=False, **options)


def test_models_and_paths(tmp_path):
    PROJECTIONS = "model: expected projections called one of W_pack, Wqkv, k_proj, q_proj, query_key_value, got none"
    for model, kind, message in (
        (3, TypeError, "model: expected a module or a path, got int"),
        (nn.Linear(2, 2), ValueError, PROJECTIONS),
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
    (tmp_path / "pytorch_model.bin").write_bytes(b"not a zip file")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: expected torch's zip format, which can be mapped, got"):
        find_windows(tmp_path, progress=False)
    save_file({"other.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "bloom", "n_head": 2, "n_layer": 2}')
    with pytest.raises(
        ValueError, match=r"^model: expected 2 layers with query_key_value like its config, got layers none"
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
