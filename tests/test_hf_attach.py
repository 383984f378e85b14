# SPDX-License-Identifier: Apache-2.0
"""attach: switches a model over and back again, whatever happens in between, and gives each prompt its cache."""

import copy
import inspect

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from razor_attention import Plan, RazorCache, attach
from razor_attention.hf.attention import razor_attention
from razor_attention.hf.calibrate import probe_attention
from razor_attention.hf.gates import gated_attention
from razor_attention.hf.mass import mass_attention
from razor_attention.hf.names import CACHE, output_cache
from tiny_models import (
    FULL_PLAN,
    KV_HEADS,
    LAYERS,
    MIXED,
    SIZES,
    answer,
    bytes_of,
    masked,
    prompts,
    settle,
    shared_model,
    tiny_model,
)


@pytest.fixture
def llama():
    return shared_model("llama")


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attach_leaves_the_model_as_it_was(implementation):
    model = tiny_model("qwen2")
    model.set_attn_implementation(implementation)
    ids, mask = prompts(40, 30)
    configs, before = [m.config for m in model.modules() if hasattr(m, "config")], copy.deepcopy(model.config)
    attributes, stock = set(vars(model)), answer(model, ids, mask)
    with attach(model, MIXED) as inside:
        assert inside is model
        assert model.config._attn_implementation == "razor"
        assert not torch.equal(stock, answer(model, ids, mask))
    assert model.config._attn_implementation == implementation
    after = [m.config for m in model.modules() if hasattr(m, "config")]
    assert all(a is b for a, b in zip(configs, after, strict=True))
    assert model.config.to_dict() == before.to_dict()
    assert set(vars(model)) == attributes
    assert torch.equal(stock, answer(model, ids, mask))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_attach_leaves_the_model_as_it_was_after_an_exception(error):
    llama, (ids, _) = tiny_model("llama"), prompts(40)
    stock = answer(llama, ids)

    def fail(*_):
        raise error("halfway")

    hook = llama.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(error, match="halfway"), attach(llama, MIXED):
        answer(llama, ids)
    hook.remove()
    assert llama.config._attn_implementation == "sdpa"
    assert "generate" not in vars(llama)
    assert torch.equal(stock, answer(llama, ids))


def test_attach_restores_the_models_own_generate():
    model = tiny_model("llama")
    calls, stock = [], model.generate

    def generate(*args, **kwargs):
        calls.append(1)
        return stock(*args, **kwargs)

    model.generate = generate
    with attach(model, MIXED):
        answer(model, prompts(20)[0], max_new_tokens=2)
    assert model.generate is generate
    assert calls == [1]


def test_attach_inside_attach(llama):
    ids, _ = prompts(60)
    stock = answer(llama, ids)
    with attach(llama, MIXED):
        outer = answer(llama, ids)
        with attach(llama, FULL_PLAN):
            assert torch.equal(stock, answer(llama, ids))
        assert torch.equal(outer, answer(llama, ids))
    assert not torch.equal(stock, outer)
    assert torch.equal(stock, answer(llama, ids))


def test_attach_uses_the_callers_cache(llama):
    ids, _ = prompts(60)
    with attach(llama, MIXED):
        cache = RazorCache(llama.config, FULL_PLAN)
        ours = answer(llama, ids, **{CACHE: cache})
    assert torch.equal(ours, answer(llama, ids))
    assert cache.get_seq_length() == 83


def test_attach_gives_each_call_a_fresh_cache(llama):
    ids, _ = prompts(60)
    with attach(llama, MIXED):
        caches = [answer_and_cache(llama, ids) for _ in range(2)]
        assert torch.equal(caches[0][0], caches[1][0])
        assert caches[0][1] is not caches[1][1]


def answer_and_cache(model, *args, **options):
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True} | options
    out = model.generate(*args, **options)
    return out.sequences, output_cache(out)


def test_length_rule_takes_the_prompts_length(llama):
    plan = Plan.from_heads({0: [0]}, num_layers=LAYERS, num_kv_heads=KV_HEADS, min_window=4, window_fraction=0.5)
    ids, mask = prompts(70, 31)
    embeddings = llama.get_input_embeddings()(ids).detach()
    with attach(llama, plan):
        for args, options in (
            ((ids,), {}),
            ((), {"inputs": ids}),
            ((), {"input_ids": ids}),
            ((), {"inputs_embeds": embeddings}),
            ((None,), {"inputs_embeds": embeddings}),
            ((ids,), {"prefill_chunk_size": 16}),
        ):
            _, cache = answer_and_cache(llama, *args, attention_mask=mask, **options)
            assert cache.plan == plan.resolve(70)
            assert cache.plan.window_size[1, 1] == 35
            assert cache.nbytes == bytes_of(plan.resolve(70), (73, 34), torch.float32, 64)
    assert plan.window_fraction == 0.5


def test_length_rule_of_a_cache_made_by_hand(llama):
    """The first call decides, unless the prompt's length is named."""
    plan = Plan.from_heads({0: [0]}, num_layers=LAYERS, num_kv_heads=KV_HEADS, min_window=4, window_fraction=0.5)
    ids, _ = prompts(70)
    with attach(llama, plan):
        for prompt_len, decided in ((None, 16), (70, 70)):
            cache = RazorCache(llama.config, plan, prompt_len=prompt_len)
            answer(llama, ids, **{CACHE: cache}, prefill_chunk_size=16, max_new_tokens=2)
            assert cache.plan == plan.resolve(decided)


def test_length_rule_of_a_cache_after_reset(llama):
    plan = Plan.from_heads({0: [0]}, num_layers=LAYERS, num_kv_heads=KV_HEADS, min_window=4, window_fraction=0.5)
    with attach(llama, plan):
        cache = RazorCache(llama.config, plan)
        answer(llama, prompts(20)[0], **{CACHE: cache})
        cache.reset()
        ours = answer(llama, prompts(70)[0], **{CACHE: cache})
        assert torch.equal(ours, answer(llama, prompts(70)[0]))


def test_the_text_part_of_a_multimodal_model(llama):
    """The vision tower keeps its attention."""
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**SIZES))
    model = settle(LlavaForConditionalGeneration._from_config(config))
    ids, mask = prompts(40, 27)
    stock = answer(model, ids, mask)
    with attach(model, FULL_PLAN):
        assert model.model.vision_tower.config._attn_implementation == "sdpa"
        assert model.model.language_model.config._attn_implementation == "razor"
        assert torch.equal(stock, answer(model, ids, mask))
    with attach(model, MIXED):
        ours = answer(model, ids, mask)
    with masked(model.model.language_model, MIXED):
        assert torch.equal(ours, answer(model, ids, mask))
    assert not torch.equal(ours, stock)
    assert model.model.language_model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("function", [razor_attention, probe_attention, mass_attention, gated_attention])
def test_attention_functions_take_what_sdpa_takes_by_place(function):
    """Wrappers around registered functions hand dropout on by place, as kvpress does."""
    theirs, ours = (list(inspect.signature(one).parameters)[:7] for one in (sdpa_attention_forward, function))
    assert ours[5:7] == theirs[5:7] == ["dropout", "scaling"]
