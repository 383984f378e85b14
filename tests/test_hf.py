# SPDX-License-Identifier: Apache-2.0
"""hf/: a full plan is stock generation token for token, a compressed plan is the masked model of tiny_models.py."""

import copy
import re

import pytest
import torch
import transformers
from transformers import DynamicCache

from razor_attention import FULL, Plan, RazorCache, attach
from razor_attention.hf.names import CACHE
from tiny_models import (
    FAMILIES,
    FULL_PLAN,
    KV_HEADS,
    LAYERS,
    MIXED,
    SIZES,
    answer,
    both_ways,
    bytes_of,
    conversation,
    logits_by_step,
    masked,
    policies,
    prompts,
    settle,
    shared_model,
)

PREFILLS = ("dense", "streaming")
# Logits have a deviation of 3; float32 arithmetic moves them by 2e-5 at most, the compressed plan by 10.
CLOSE, FAR = 2e-4, 1.0


@pytest.fixture(params=FAMILIES)
def model(request):
    """Every family, checked to be left as it was."""
    model = shared_model(request.param)
    yield model
    assert model.config._attn_implementation == "sdpa"
    assert "generate" not in vars(model)


@pytest.fixture
def llama():
    return shared_model("llama")


@pytest.fixture
def qwen3():
    return shared_model("qwen3")


def same_answer(model, plan, ids, mask=None, *, prefill="dense", **options):
    """The answer with a plan, checked to be the masked model's."""
    with attach(model, plan, prefill=prefill):
        ours = answer(model, ids, mask, **options)
    with masked(model, plan, prefill=prefill):
        assert torch.equal(ours, answer(model, ids, mask, **options))
    return ours


def assert_close(ours, theirs):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < CLOSE


# --- a full plan


def test_the_models_are_worth_testing(model):
    """Answers vary, depend on the first token of 70, and change under a compressed plan."""
    ids, _ = prompts(70)
    stock = answer(model, ids)
    other = ids.clone()
    other[0, 0] = (ids[0, 0] + 1) % 90 + 2
    assert len(stock.unique()) > 8
    assert not torch.equal(stock, answer(model, other))
    for prefill in PREFILLS:
        assert not torch.equal(stock, same_answer(model, MIXED, ids, prefill=prefill))


def test_full_plan_is_stock_greedy(model):
    ids, _ = prompts(70)
    with attach(model, FULL_PLAN):
        ours = answer(model, ids, max_new_tokens=60)
    assert torch.equal(ours, answer(model, ids, max_new_tokens=60))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "seed": 3},
        {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 12},
        {"num_beams": 2, "do_sample": True, "seed": 4, "max_new_tokens": 12},
        {"num_return_sequences": 2, "do_sample": True, "seed": 5},
    ],
    ids=["greedy", "sampled", "beams", "beams sampled", "samples"],
)
def test_full_plan_is_stock_on_a_padded_batch(model, options):
    ids, mask = prompts(50, 64, 3)
    with attach(model, FULL_PLAN):
        ours = answer(model, ids, mask, **options)
    assert torch.equal(ours, answer(model, ids, mask, **options))


@pytest.mark.parametrize("chunk", [1, 7, 16, 60])
def test_full_plan_is_stock_with_chunked_prefill(model, chunk):
    ids, mask = prompts(60, 41)
    stock = answer(model, ids, mask, max_new_tokens=8)
    for prefill in PREFILLS:
        with attach(model, FULL_PLAN, prefill=prefill):
            assert torch.equal(stock, answer(model, ids, mask, max_new_tokens=8, prefill_chunk_size=chunk))


def test_full_plan_is_stock_in_a_conversation(model):
    with attach(model, FULL_PLAN):
        ours = conversation(model, RazorCache(model.config, FULL_PLAN))
    assert torch.equal(ours, conversation(model, DynamicCache()))


def test_full_plan_is_stock_from_embeddings(llama):
    ids, mask = prompts(40, 28)
    embeddings = llama.get_input_embeddings()(ids).detach()
    options = {"inputs_embeds": embeddings, "attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    with attach(llama, FULL_PLAN):
        ours = llama.generate(**options)
    assert torch.equal(ours, llama.generate(**options))


def test_full_plan_is_stock_step_by_step(model):
    """Forward calls by hand, without generate: one token, several tokens, one token."""
    (ids, mask), lengths = prompts(80, 47), (30, 1, 1, 13, 1, *[1] * 34)
    stock = logits_by_step(model, DynamicCache(), ids, lengths, mask)
    for prefill in PREFILLS:
        with attach(model, FULL_PLAN):
            ours = logits_by_step(model, RazorCache(model.config, FULL_PLAN, prefill=prefill), ids, lengths, mask)
        real = mask.bool()
        assert_close(ours[real], stock[real])


@pytest.mark.parametrize("architecture", ["GPTNeoX", "OPT", "Gemma", "Phi3", "Olmo2", "Mixtral"])
def test_any_model_that_uses_attention_interface(architecture):
    """Partial rotary, learned and no positions of their own, without groups, fused projections, experts."""
    config_class = getattr(transformers, f"{architecture}Config")
    own = {
        "GPTNeoX": {"hidden_size": 96, "num_key_value_heads": 6},
        "OPT": {"hidden_size": 96, "num_key_value_heads": 6, "word_embed_proj_dim": 96, "ffn_dim": 64},
        "Mixtral": {"num_local_experts": 2, "sliding_window": None},
    }
    config = config_class(**SIZES | own.get(architecture, {}))
    model = settle(getattr(transformers, f"{architecture}ForCausalLM")._from_config(config))
    groups = config.num_key_value_heads // KV_HEADS
    mixed = Plan(*(table.repeat(1, groups) for table in (MIXED.sink_size, MIXED.window_size, MIXED.compensate)))
    ids, mask = prompts(40, 25)
    stock = answer(model, ids, mask, max_new_tokens=12)
    assert torch.equal(stock, same_answer(model, Plan.full(LAYERS, mixed.num_kv_heads), ids, mask, max_new_tokens=12))
    assert not torch.equal(stock, same_answer(model, mixed, ids, mask, max_new_tokens=12))


def test_a_window_longer_than_the_text_is_full(llama):
    ids, mask = prompts(40, 33)
    wide = Plan(torch.zeros(LAYERS, KV_HEADS).int(), torch.full((LAYERS, KV_HEADS), 64), MIXED.compensate)
    with attach(llama, wide, prefill="streaming"):
        ours = answer(llama, ids, mask)
    assert torch.equal(ours, answer(llama, ids, mask))


# --- a compressed plan


@pytest.mark.parametrize("prefill", PREFILLS)
def test_compressed_plan_is_the_masked_model(model, prefill):
    """Prefill and 60 decoded tokens, so that every window slides several times."""
    (ids, _), lengths = prompts(130), (70, *[1] * 60)
    ours, theirs = both_ways(model, MIXED, prefill, ids, lengths)
    assert_close(ours, theirs)
    stock = logits_by_step(model, DynamicCache(), ids, lengths)
    assert (theirs - stock)[:, 70:].abs().amax(-1).min() > FAR  # every decoded token feels the plan


@pytest.mark.parametrize("prefill", PREFILLS)
@pytest.mark.parametrize("compensate", [False, True])
def test_compensation_row_is_the_masked_models(llama, prefill, compensate):
    (ids, _), lengths = prompts(110), (50, *[1] * 60)
    ours, theirs = both_ways(llama, policies(MIXED, compensate=compensate), prefill, ids, lengths)
    assert_close(ours, theirs)
    _, other = both_ways(llama, policies(MIXED, compensate=not compensate), prefill, ids, lengths)
    assert (theirs - other)[:, 50:].abs().amax(-1).min() > FAR / 10


@pytest.mark.parametrize("prefill", PREFILLS)
def test_compressed_plan_is_the_masked_model_over_many_calls(model, prefill):
    """Padded rows, several calls of several tokens; a dense call reads what was kept and all of its own tokens."""
    ids, mask = prompts(100, 60, 98)
    lengths = (40, 1, 1, 20, 8, *[1] * 20, 2, *[1] * 8)
    ours, theirs = both_ways(model, MIXED, prefill, ids, lengths, mask)
    assert_close(ours, theirs)
    _, other = both_ways(model, MIXED, "streaming" if prefill == "dense" else "dense", ids, lengths, mask)
    assert (theirs - other).abs().max() > FAR


@pytest.mark.parametrize("prefill", PREFILLS)
def test_padding_may_come_with_every_call(qwen3, prefill):
    """Rows of a later turn may be shorter than others, empty even: their padding comes before their new tokens."""
    (ids, mask), lengths = prompts(80, 71, 80), (30, 1, 20, *[1] * 9, 20)
    mask[1, 31:40] = 0
    mask[2, 60:80] = 0
    ours, theirs = both_ways(qwen3, MIXED, prefill, ids, lengths, mask)
    assert_close(ours, theirs)
    full, _ = both_ways(qwen3, FULL_PLAN, prefill, ids, lengths, mask)
    assert_close(full, logits_by_step(qwen3, DynamicCache(), ids, lengths, mask)[mask.bool()])


@pytest.mark.parametrize("prefill", PREFILLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_compressed_plan_is_the_masked_model_in_half_precision(dtype, prefill):
    model = shared_model("qwen3", dtype)
    (ids, _), lengths = prompts(90), (50, *[1] * 40)
    ours, theirs = both_ways(model, MIXED, prefill, ids, lengths)
    stock = logits_by_step(model, DynamicCache(), ids, lengths)
    error, effect = (ours - theirs).abs(), (theirs - stock)[:, 50:].abs()
    assert error.mean() < effect.mean() / 100  # both round the same way nearly everywhere
    assert error.max() < effect.max() / 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_full_plan_is_as_exact_as_stock_in_half_precision(dtype):
    """Both round; ours may not be further from float32 than torch's."""
    (ids, _), lengths = prompts(90), (60, *[1] * 30)
    exact = logits_by_step(shared_model("llama"), DynamicCache(), ids, lengths)
    model = shared_model("llama", dtype)
    stock = logits_by_step(model, DynamicCache(), ids, lengths)
    with attach(model, FULL_PLAN):
        ours = logits_by_step(model, RazorCache(model.config, FULL_PLAN), ids, lengths)
    assert (ours - exact).abs().mean() < 1.2 * (stock - exact).abs().mean()


@pytest.mark.parametrize("prefill", PREFILLS)
@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 30},
        {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 16},
    ],
    ids=["greedy", "beams"],
)
def test_compressed_generation_is_the_masked_models(model, prefill, options):
    ids, mask = prompts(50, 64, 3)
    ours = same_answer(model, MIXED, ids, mask, prefill=prefill, **options)
    assert not torch.equal(ours, answer(model, ids, mask, **options))


@pytest.mark.parametrize("prefill", PREFILLS)
def test_compressed_conversation_is_the_masked_models(qwen3, prefill):
    with attach(qwen3, MIXED):
        ours = conversation(qwen3, RazorCache(qwen3.config, MIXED, prefill=prefill))
    with masked(qwen3, MIXED, prefill=prefill):
        theirs = conversation(qwen3, DynamicCache())
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, conversation(qwen3, DynamicCache()))


# --- what the result must not depend on


@pytest.mark.parametrize("prefill", PREFILLS)
def test_a_row_does_not_depend_on_its_batch(qwen3, prefill):
    lengths = (50, 64, 3)
    ids, mask = prompts(*lengths)
    with attach(qwen3, MIXED, prefill=prefill):
        together = answer(qwen3, ids, mask)
        for row, length in enumerate(lengths):
            assert torch.equal(together[row : row + 1], answer(qwen3, ids[row : row + 1, -length:]))
        order = torch.tensor([2, 0, 1])
        assert torch.equal(together[order], answer(qwen3, ids[order], mask[order]))


@pytest.mark.parametrize("prefill", PREFILLS)
def test_padding_of_all_rows_changes_nothing(qwen3, prefill):
    ids, mask = prompts(50, 33)
    wider, widened = (torch.nn.functional.pad(t, (19, 0)) for t in (ids, mask))
    with attach(qwen3, MIXED):
        cache = RazorCache(qwen3.config, MIXED, prefill=prefill)
        ours = answer(qwen3, wider, widened, **{CACHE: cache})
        assert cache.get_seq_length() == 19 + 50 + 23  # padding counted, as transformers does
        assert cache.nbytes == bytes_of(MIXED, (73, 56), torch.float32)
    with attach(qwen3, MIXED, prefill=prefill):
        assert torch.equal(ours, answer(qwen3, ids, mask))


@pytest.mark.parametrize("prefill", PREFILLS)
def test_logits_of_a_row_do_not_depend_on_its_batch(llama, prefill):
    (ids, mask), lengths = prompts(90, 61, 34), (60, *[1] * 30)
    with attach(llama, MIXED):
        together = logits_by_step(llama, RazorCache(llama.config, MIXED, prefill=prefill), ids, lengths, mask)
        for row, length in enumerate(mask.sum(1).tolist()):
            cache = RazorCache(llama.config, MIXED, prefill=prefill)
            alone = logits_by_step(llama, cache, ids[row : row + 1, -length:], (length - 30, *[1] * 30))
            assert_close(together[row, -length:], alone[0])


def test_streaming_prefill_does_not_depend_on_chunks(qwen3):
    ids, mask = prompts(60, 41)
    with attach(qwen3, MIXED, prefill="streaming"):
        whole = answer(qwen3, ids, mask)
        for chunk in (1, 7, 16, 60):
            assert torch.equal(whole, answer(qwen3, ids, mask, prefill_chunk_size=chunk))


def test_dense_prefill_compresses_between_chunks(llama):
    """The other way round: in dense mode a chunk reads all of its own tokens and only what was kept of the others."""
    (ids, mask), chunks = prompts(60, 41), (16, 16, 16, 12)
    ours, theirs = both_ways(llama, MIXED, "dense", ids, chunks, mask)
    assert_close(ours, theirs)
    whole, _ = both_ways(llama, MIXED, "dense", ids, (60,), mask)
    assert (ours - whole).abs().max() > FAR


@pytest.mark.parametrize("prefill", PREFILLS)
def test_page_size_does_not_matter(llama, prefill):
    (ids, mask), lengths = prompts(90, 60), (60, *[1] * 30)
    with attach(llama, MIXED):
        small, large = (
            logits_by_step(llama, RazorCache(llama.config, MIXED, prefill=prefill, page_size=p), ids, lengths, mask)
            for p in (16, 256)
        )
    assert_close(small, large)


# --- the cache


@pytest.mark.parametrize("prefill", PREFILLS)
@pytest.mark.parametrize(("dtype", "page_size"), [(torch.float32, 16), (torch.float32, 64), (torch.bfloat16, 16)])
def test_cache_bytes_are_the_plans(dtype, page_size, prefill):
    """Around the edges of pages and rings, prefilled or decoded up to there, to the byte."""
    model = shared_model("llama", dtype)
    plan = Plan([[0, 4, 16], [3, 0, 5]], [[FULL, 8, 48], [61, FULL, 1]], MIXED.compensate)
    with attach(model, plan), torch.no_grad():
        for start in (1, 11, 15, 16, 62, 63, 64, 126, 190):
            cache = RazorCache(model.config, plan, prefill=prefill, page_size=page_size)
            assert cache.nbytes == 0
            model(prompts(start, start)[0], **{CACHE: cache})
            for seen in range(start, start + 4):
                expected = plan.kv_bytes(seen, head_dim=16, dtype=dtype, batch_size=2, page_size=page_size)
                assert cache.nbytes == expected == bytes_of(plan, (seen, seen), dtype, page_size)
                model(torch.full((2, 1), 5), **{CACHE: cache})


def test_cache_bytes_of_padded_rows_are_the_plans(llama):
    ids, mask = prompts(90, 61, 34)
    with attach(llama, MIXED):
        cache = RazorCache(llama.config, MIXED, page_size=16)
        answer(llama, ids, mask, **{CACHE: cache}, max_new_tokens=11)
    assert cache.nbytes == bytes_of(MIXED, (100, 71, 44), torch.float32, 16)
    assert cache.get_seq_length() == 100
    assert cache.get_mask_sizes(7, 0) == (107, 0)
    assert cache.layers[0].batch_size == 3


def test_cache_after_reset_is_as_new(llama):
    ids, mask = prompts(50, 64, 3)
    other, _ = prompts(30, 30, 30, seed=9)
    with attach(llama, MIXED):
        cache = RazorCache(llama.config, MIXED)
        answer(llama, other, **{CACHE: cache})
        cache.reset()
        assert cache.get_seq_length() == 0
        assert cache.nbytes == 0
        assert torch.equal(answer(llama, ids, mask, **{CACHE: cache}), answer(llama, ids, mask))


OPERATIONS = {
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([2, 0])),
    "select by mask": lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])),
    "repeat, then reorder": lambda cache: (
        cache.batch_repeat_interleave(2),
        cache.reorder_cache(torch.tensor([5, 0, 0, 3, 1, 2])),
    ),
}


@pytest.mark.parametrize("plan", [FULL_PLAN, MIXED], ids=["full", "mixed"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_batch_operations_are_those_of_a_stock_cache(llama, plan, operation):
    ids, mask = prompts(50, 64, 33)

    def run(cache):
        out = logits_by_step(llama, cache, ids, (64,), mask)
        OPERATIONS[operation](cache)
        rows = {"repeat": [0, 0, 1, 1, 2, 2], "select": [2, 0], "select by mask": [0, 2], "reorder": [1, 1, 0]}
        rows = torch.tensor(rows.get(operation, [2, 0, 0, 1, 0, 1]))
        grown = torch.cat([mask[rows], mask.new_ones(len(rows), 20)], 1)
        with torch.no_grad():
            for step in range(64, 84):  # different tokens, so that rows with shared pages must part
                token = (torch.arange(len(rows)) * 7 + step)[:, None] % 90 + 2
                position = grown[:, : step + 1].sum(1, keepdim=True) - 1
                options = {"attention_mask": grown[:, : step + 1], "position_ids": position}
                out = llama(token, **{CACHE: cache}, **options).logits
        return out

    with attach(llama, plan):
        cache = RazorCache(llama.config, plan, page_size=16)
        ours = run(cache)
    with masked(llama, plan):
        theirs = run(DynamicCache())
    assert_close(ours, theirs)
    assert [layer.batch_size for layer in cache.layers] == [len(ours)] * LAYERS


def test_a_copied_cache_goes_its_own_way(llama):
    ids, _ = prompts(50)
    with attach(llama, MIXED):
        cache = RazorCache(llama.config, MIXED)
        logits_by_step(llama, cache, ids, (50,))
        twin = copy.deepcopy(cache)
        first = [answer(llama, torch.cat([ids, ids[:, :9]], 1), **{CACHE: c}) for c in (cache, twin)]
    assert torch.equal(*first)


def test_an_empty_cache_says_what_it_is(llama):
    cache = RazorCache(llama.config, MIXED)
    assert not cache.is_compileable
    assert cache.is_sliding == [False] * LAYERS
    assert (cache.get_seq_length(), len(cache)) == (0, LAYERS)
    layer = cache.layers[0]
    assert not layer.is_croppable
    assert not hasattr(layer, "batch_size")  # a stock cache counts such layers as -1
    assert layer.get_max_length() == layer.get_max_cache_shape() == -1  # two names of two versions
    assert re.fullmatch(r"RazorCache\(.*\)", repr(cache))
