# SPDX-License-Identifier: Apache-2.0
"""Our own Baichuan: against float64 from its parameters alone, against Llama, and out of a checkpoint's files."""

import contextlib
import json

import pytest
import torch
from torch.nn.functional import rms_norm, silu
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from razor_attention import Plan, RazorCache, attach
from razor_attention.hf.alibi import model_slopes
from razor_attention.hf.baichuan import BaichuanConfig, BaichuanForCausalLM, NormHead
from tiny_models import BAICHUAN, TOKENS, alibi_model, answer, logits_by_step, prompts, settle

WINDOWS = Plan.streaming(2, 8, 0, 12)


def dense_baichuan(model, ids, slopes):
    """Logits of one sequence (tokens) in float64, from the parameters alone: (tokens, vocabulary)."""
    weights = {name: weight.detach().double() for name, weight in model.state_dict().items()}
    hidden = weights["model.embed_tokens.weight"][ids]
    token, heads = torch.arange(len(ids)), len(slopes)
    distance = token[:, None] - token
    bias = (-torch.tensor(slopes)[:, None, None] * distance).masked_fill(distance < 0, -torch.inf)

    def normed(x, name):
        return rms_norm(x, x.shape[-1:], weights[name], 1e-6)

    for index in range(2):
        layer = f"model.layers.{index}."
        packed = normed(hidden, layer + "input_layernorm.weight") @ weights[layer + "self_attn.W_pack.weight"].T
        query, key, value = packed.view(len(ids), 3, heads, 16).permute(1, 2, 0, 3)
        out = (query @ key.mT / 4 + bias).softmax(-1) @ value
        hidden = hidden + out.transpose(0, 1).flatten(1) @ weights[layer + "self_attn.o_proj.weight"].T
        x = normed(hidden, layer + "post_attention_layernorm.weight")
        gate, up, down = (weights[f"{layer}mlp.{name}_proj.weight"].T for name in ("gate", "up", "down"))
        hidden = hidden + (silu(x @ gate) * (x @ up)) @ down
    head = weights["lm_head.weight"]
    if model.config.normalize_head:
        head = head / head.norm(dim=1, keepdim=True)
    return normed(hidden, "model.norm.weight") @ head.T


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "razor"])
@pytest.mark.parametrize(
    ("name", "slopes"),
    [
        ("baichuan", [2.0**-i for i in range(1, 9)]),
        ("baichuan 2, 12 heads", [2.0**-i for i in range(1, 9)] + [2.0 ** -(i + 0.5) for i in range(4)]),
    ],
)
def test_baichuan_is_dense_baichuan(name, slopes, implementation):
    model = alibi_model(name)
    ids, mask = prompts(70, 52)
    with contextlib.ExitStack() as stack:
        cache = DynamicCache()
        if implementation == "razor":
            stack.enter_context(attach(model, plan := Plan.full(2, len(slopes))))
            cache = RazorCache(model.config, plan)
        else:
            model.set_attn_implementation(implementation)
        logits = logits_by_step(model, cache, ids, (40, 13, *[1] * 17), mask)
    for row, length in enumerate((70, 52)):
        assert (logits[row, -length:] - dense_baichuan(model, ids[row, -length:], slopes)).abs().max() < 2e-4


def test_baichuan_7b_is_llama():
    sizes = BAICHUAN | TOKENS | {"max_position_embeddings": 512}
    model = settle(BaichuanForCausalLM._from_config(BaichuanConfig(**sizes)))
    llama = LlamaForCausalLM._from_config(LlamaConfig(**sizes)).eval()
    state = model.state_dict()
    for index in range(2):
        layer = f"model.layers.{index}.self_attn."
        q, k, v = state.pop(layer + "W_pack.weight").chunk(3)
        state |= {layer + "q_proj.weight": q, layer + "k_proj.weight": k, layer + "v_proj.weight": v}
    llama.load_state_dict(state)
    ids, mask = prompts(50, 41)
    stock = answer(llama, ids, mask)
    assert torch.equal(stock, answer(model, ids, mask, suppress_tokens=None))
    assert model_slopes(model.config) is None
    with attach(model, WINDOWS):
        ours = answer(model, ids, mask, suppress_tokens=None)
    with attach(llama, WINDOWS):
        assert torch.equal(ours, answer(llama, ids, mask))
    assert not torch.equal(ours, stock)


@pytest.mark.parametrize("name", ["baichuan", "baichuan 2, 12 heads"])
def test_baichuan_from_a_checkpoint(tmp_path, name):
    """Whose configuration names code of its own, which is not run."""
    model = alibi_model(name)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("max_position_embeddings", "head_dim", "rope_parameters", "num_key_value_heads"):
        del config[key]
    config["auto_map"] = {
        "AutoConfig": "configuration_baichuan.BaichuanConfig",
        "AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert type(AutoConfig.from_pretrained(tmp_path)) is BaichuanConfig
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is BaichuanForCausalLM
    loaded.generation_config = model.generation_config
    ids, mask = prompts(40, 31)
    assert torch.equal(answer(model, ids, mask), answer(loaded, ids, mask))
    assert loaded(ids, output_attentions=True).attentions is not None


@pytest.mark.parametrize(
    ("vocabulary", "said", "normalized"),
    [(64000, None, False), (125696, None, True), (125700, True, True), (125696, False, False)],
)
def test_baichuan_2_is_known_by_its_vocabulary(vocabulary, said, normalized):
    with torch.device("meta"):
        config = BaichuanConfig(**BAICHUAN | {"vocab_size": vocabulary, "normalize_head": said})
        assert isinstance(BaichuanForCausalLM(config).lm_head, NormHead) is normalized
