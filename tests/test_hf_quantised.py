# SPDX-License-Identifier: Apache-2.0
"""Models with a quantised cache: the bytes that the plan says, answers that are nearly those of the exact cache."""

import re

import pytest
import torch

from razor_attention import RazorCache, attach
from razor_attention.hf.names import CACHE, output_cache
from tiny_models import (
    FULL_PLAN,
    MIXED,
    alibi_model,
    answer,
    bytes_of,
    conversation,
    logits_by_step,
    prompts,
    shared_model,
)

both = pytest.mark.parametrize("kv", ["int8", "int4"])


@pytest.fixture
def llama():
    return shared_model("llama")


def logits(model, plan, ids, lengths, mask=None, kv=None):
    with attach(model, plan):
        return logits_by_step(model, RazorCache(model.config, plan, kv_dtype=kv), ids, lengths, mask)


@pytest.mark.parametrize("plan", [FULL_PLAN, MIXED], ids=["full", "mixed"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_logits_are_nearly_those_of_the_exact_cache(family, plan):
    """They have a deviation of 3. The prompt reads itself as it is; later tokens read what was stored."""
    model, (ids, mask) = shared_model(family), prompts(40, 31)
    lengths = (30, 1, 1, 8)
    exact, int8, int4 = (logits(model, plan, ids, lengths, mask, kv)[mask.bool()] for kv in (None, "int8", "int4"))
    prompt = torch.zeros_like(mask, dtype=torch.bool)
    prompt[:, :30] = True
    prompt = prompt[mask.bool()]
    assert torch.allclose(exact[prompt], int8[prompt], atol=1e-4)
    assert torch.allclose(exact[prompt], int4[prompt], atol=1e-4)
    loss8, loss4 = ((exact - other)[~prompt].pow(2).mean().sqrt() for other in (int8, int4))
    assert 1e-3 < loss8 < 0.15
    assert 2 * loss8 < loss4 < 1.5


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_are_the_plans(kv, dtype):
    model = shared_model("llama", dtype)
    with attach(model, MIXED, kv_dtype=kv), torch.no_grad():
        cache = RazorCache(model.config, MIXED, kv_dtype=kv, page_size=16)
        model(prompts(60, 60)[0], **{CACHE: cache})
        for seen in range(60, 66):
            assert cache.nbytes == bytes_of(MIXED, (seen, seen), kv, 16)
            assert cache.nbytes < bytes_of(MIXED, (seen, seen), dtype, 16)
            model(torch.full((2, 1), 5), **{CACHE: cache})


@both
def test_generate(llama, kv):
    """Through attach, and by hand over several turns, greedy and with beams: the same tokens for the same cache."""
    ids, mask = prompts(50, 37)
    with attach(llama, MIXED, kv_dtype=kv):
        first = llama.generate(
            ids, attention_mask=mask, max_new_tokens=12, do_sample=False, return_dict_in_generate=True
        )
        cache = RazorCache(llama.config, MIXED, kv_dtype=torch.int8 if kv == "int8" else kv)
        assert torch.equal(first.sequences[:, 50:], answer(llama, ids, mask, **{CACHE: cache}, max_new_tokens=12))
        assert output_cache(first).nbytes == cache.nbytes
        assert {layer.cache.key_pages.element_size() for layer in cache.layers} == {1}
        a, b = (conversation(llama, RazorCache(llama.config, MIXED, kv_dtype=kv)) for _ in range(2))
        assert torch.equal(a, b)
        assert answer(llama, ids, mask, num_beams=3, max_new_tokens=6).shape == (2, 6)
        cache.reset()
        assert cache.nbytes == 0
    assert "generate" not in vars(llama)


def test_int8_gives_the_answers_of_the_exact_cache(llama):
    ids, mask = prompts(64, 50)
    with attach(llama, FULL_PLAN):
        exact = answer(llama, ids, mask, max_new_tokens=16)
    with attach(llama, FULL_PLAN, kv_dtype="int8"):
        assert (answer(llama, ids, mask, max_new_tokens=16) == exact).float().mean() > 0.9


@both
def test_alibi(kv):
    model = alibi_model("bloom")
    exact, close = (logits(model, FULL_PLAN_OF_8, prompts(40)[0], (30, 1, 9), kv=one) for one in (None, kv))
    assert torch.allclose(exact[:, :30], close[:, :30], atol=1e-3)
    assert (exact - close)[:, 30:].pow(2).mean().sqrt() < 0.6


FULL_PLAN_OF_8 = type(FULL_PLAN).full(2, 8)


@pytest.mark.parametrize(
    ("kv", "message"),
    [
        ("int2", "kv_dtype: expected int8, 'int4' or None for the model's own, got 'int2'"),
        ("bfloat16", "kv_dtype: expected int8, 'int4' or None for the model's own, got 'bfloat16'"),
        (torch.bfloat16, "kv_dtype: expected int8, 'int4' or None for the model's own, got torch.bfloat16"),
    ],
)
def test_formats_that_are_not(llama, kv, message):
    for make in (lambda: RazorCache(llama.config, MIXED, kv_dtype=kv), lambda: attach(llama, MIXED, kv_dtype=kv)):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            make()
    assert llama.config._attn_implementation == "sdpa"
