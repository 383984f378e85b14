# SPDX-License-Identifier: Apache-2.0
"""bench/scale.py: what it computes on paper against a model, a cache, and its own definitions."""

import csv
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from razor_attention.bench import scale
from transformers import LlamaConfig, LlamaForCausalLM

from razor_attention import Plan, attach
from razor_attention.hf.names import output_cache
from tiny_models import LAYERS, MIXED, prompts, shared_model

MODEL = scale.MODELS["llama-3-8b"]
FULL = Plan.full(MODEL.num_layers, MODEL.num_kv_heads)


@pytest.mark.parametrize("name", scale.MODELS)
def test_parameters_are_the_models(name):
    sizes = scale.MODELS[name]
    config = LlamaConfig(
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_kv_heads,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        vocab_size=sizes.vocab_size,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert sizes.head_dim == model.model.layers[0].self_attn.head_dim
    assert sizes.parameters == sum(weight.numel() for weight in model.parameters())


def test_stages_hold_what_their_layers_caches_hold():
    ids, mask = prompts(150)
    with attach(shared_model("llama"), MIXED) as model:
        out = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    layers = [layer.cache.nbytes for layer in output_cache(out).layers]
    stages = scale.device_plans(MIXED, 1, LAYERS)
    assert [part.kv_bytes(153, head_dim=16, dtype=torch.float32) for part in stages] == layers
    assert scale.head_bytes(MIXED, 153, 16, torch.float32).sum(1).tolist() == layers


@pytest.mark.parametrize(
    ("devices", "expected"), [(1, (1, 1)), (2, (2, 1)), (6, (2, 3)), (8, (8, 1)), (12, (4, 3)), (16, (8, 2))]
)
def test_ranks_divide_the_kv_heads_and_stages_do_the_rest(devices, expected):
    assert scale.layout(MODEL, devices) == expected
    parts = scale.device_plans(scale.drawn_plan(MODEL, 0), *expected)
    assert len(parts) == devices
    assert sum(part.num_layers * part.num_kv_heads for part in parts) == MODEL.num_layers * MODEL.num_kv_heads
    assert sum(int(part.is_full.sum()) for part in parts) == round(scale.SHARE * 256)


def test_more_stages_than_layers_are_refused():
    with pytest.raises(ValueError, match=r"^--devices: expected at most 256, 8 for each layer, got 264$"):
        scale.layout(MODEL, 264)


@pytest.mark.parametrize("devices", [1, 4, 16])
def test_context_and_requests_are_the_most_that_fit(devices):
    plan = scale.drawn_plan(MODEL, 1)
    row = scale.scale("llama-3-8b", "razor", plan, 50_000, devices, capacity=20e9)
    parts = scale.device_plans(plan, row.ranks, row.stages)

    def fits(tokens, requests=1):
        held = max(part.kv_bytes(tokens, head_dim=128, dtype=torch.bfloat16, batch_size=requests) for part in parts)
        return row.weight_bytes + held <= 20e9

    assert fits(row.max_context)
    assert not fits(row.max_context + 64)
    assert fits(50_000, row.requests)
    assert not fits(50_000, row.requests + 1)
    assert row.weight_bytes == -(-2 * MODEL.parameters // devices)
    assert row.token_bytes == row.kv_bytes + row.weight_bytes // row.requests


def test_devices_too_small_for_the_weights_hold_nothing():
    row = scale.scale("llama-3-8b", "full", FULL, 4096, 1, capacity=16e9)
    assert (row.max_context, row.requests) == (0, 0)
    assert row.token_bytes == row.kv_bytes + row.weight_bytes


def test_imbalance_of_a_full_plan_and_of_one_full_head():
    row = scale.scale("llama-3-8b", "full", FULL, 4096, 16, capacity=64e9)
    assert row[-4:] == (1, 1, 1, 1)
    nothing = Plan.streaming(32, 8, 0, 1)
    windows = nothing.window_size.clone()
    windows[:, 0] = 640  # rank 0 holds most: dealing evens out memory, but a layer still waits for one rank
    one = Plan(nothing.sink_size, windows, nothing.compensate)
    row = scale.scale("llama-3-8b", "one", one, 4096, 4, capacity=64e9)
    most = round(11 * 4 / 17, 4)  # pages: 10 + 1 of 17, on one rank of four
    assert row[-4:] == (most, most, 1, most)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.data())
def test_dealing_keeps_every_layer_and_never_adds_to_its_slowest_rank(ranks, places, layers, data):
    sizes = st.lists(st.integers(0, 50), min_size=ranks * places, max_size=ranks * places)
    held = torch.tensor(data.draw(st.lists(sizes, min_size=layers, max_size=layers)))
    dealt = scale.deal(held, ranks)
    assert torch.equal(dealt.sum(1), held.sum(1))
    most, least = held.sort(descending=True).values, held.sum(1) / ranks
    assert (dealt.amax(1) >= least.ceil()).all()
    assert (dealt.amax(1) <= most[:, :places].sum(1)).all()


def test_a_command_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    flags = ["--results", str(tmp_path), "--devices", "1", "8", "--model", "llama-3-8b", "--kv", "int8"]
    monkeypatch.setattr(sys, "argv", ["scale", *flags])
    scale.main()
    with (tmp_path / "paper" / "scale.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["plan"], row["devices"], row["kv_dtype"]) for row in rows] == [
        (plan, devices, "int8") for plan in ("full", "razor") for devices in "18"
    ]
    printed = capsys.readouterr().out
    assert all(f"{int(row['max_context']) // 1000}k" in printed for row in rows)
