# SPDX-License-Identifier: Apache-2.0
"""How attached models live: names of the cache, use_cache, copies, blocks that do not nest, threads, long positions."""

import copy
import gc
import io
import pickle
import re
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    MptConfig,
    MptForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    TextIteratorStreamer,
)

from razor_attention import Plan, RazorCache, attach, duo, find_heads
from razor_attention.hf.models import geometry
from razor_attention.hf.names import CACHE, CACHE_NAMES, output_cache, rename_cache
from tiny_models import FULL_PLAN, KV_HEADS, LAYERS, MIXED, SIZES, alibi_model, answer, prompts, settle, tiny_model

IDS, MASK = prompts(40, 31)
NEEDS_CACHE = "use_cache: expected True with razor attention, got False"


class Tokens:
    """A tokenizer for a streamer."""

    def decode(self, ids, **_):
        return "".join(f"{int(token)} " for token in ids)


def refused(error, message):
    return pytest.raises(error, match=f"^{re.escape(message)}$")


@pytest.fixture
def llama():
    return tiny_model("llama")


# --- one cache, two names


@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("family", ["llama", "mpt", "baichuan"])
def test_either_name_goes_everywhere_without_a_warning(family, name):
    model = tiny_model("llama") if family == "llama" else alibi_model(family)
    sizes = (2, KV_HEADS if family == "llama" else 8)
    plan = Plan.full(*sizes)
    stock = answer(model, IDS, MASK, max_new_tokens=6)
    with warnings.catch_warnings(), attach(model, plan), torch.no_grad():
        warnings.simplefilter("error")
        assert torch.equal(answer(model, IDS, MASK, max_new_tokens=6), stock)
        cache = RazorCache(model.config, plan)
        assert torch.equal(answer(model, IDS, MASK, max_new_tokens=6, **{name: cache}), stock)
        assert cache.get_seq_length() == 45
        cache.reset()
        for call in (model, model.base_model):
            out = call(IDS, attention_mask=MASK, **{name: cache})
            assert output_cache(out) is cache
            assert cache.get_seq_length() == 40
            cache.reset()


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_either_name_with_duo_attention(llama, name):
    duo.enable_duo_attention_eval(llama, torch.ones(LAYERS, KV_HEADS), 4, 8)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        first = llama(IDS[:1, :30])
        second = llama(IDS[:1, 30:], **{name: output_cache(first)})
        once = llama(IDS[:1], **{name: None})
    torch.testing.assert_close(second.logits, once.logits[:, 30:], atol=2e-4, rtol=2e-4)
    duo.disable_duo_attention_eval(llama)


def test_two_caches_are_refused(llama):
    two = {name: RazorCache(llama.config, MIXED) for name in CACHE_NAMES}
    with attach(llama, MIXED):
        for call in (llama, llama.generate):
            with refused(ValueError, "cache, past_key_values: expected one of the two, got both"):
                call(IDS, **two)


def test_renaming_leaves_the_callers_arguments():
    given = {"past_key_values": None, "use_cache": True}
    assert rename_cache(given, "cache") == {"cache": None, "use_cache": True}
    assert rename_cache(given, "past_key_values") is given
    assert list(given) == ["past_key_values", "use_cache"]


# --- use_cache is decided in generate


@pytest.mark.parametrize("name", ["stablelm", "opt", "biogpt", "persimmon", "ctrl", "llama"])
def test_use_cache_false_in_the_generation_config_is_refused(name):
    """Layers of these models do not say what was decided, and would store the whole text again at each step."""
    sizes = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    own = {"opt": {"ffn_dim": 64, "word_embed_proj_dim": 48}, "ctrl": {"dff": 64}}.get(name, {})
    sizes |= {"num_attention_heads": 6, "num_key_value_heads": 6}  # StableLM's default is 32
    config = AutoConfig.for_model(name, **sizes, **own)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.use_cache = False
    sizes = geometry(config)
    plan = Plan.full(sizes.num_layers, sizes.num_kv_heads)
    cache, block = RazorCache(model.config, plan), attach(model, plan)
    try:
        block.__enter__()
    except NotImplementedError:  # CTRL with older transformers does not use AttentionInterface
        return
    with refused(ValueError, NEEDS_CACHE):
        answer(model, IDS, MASK, **{CACHE: cache})
    block.__exit__(None, None, None)
    model.generation_config.use_cache = True
    stock = answer(model, IDS, MASK, max_new_tokens=8)
    with attach(model, plan):
        assert torch.equal(answer(model, IDS, MASK, max_new_tokens=8, **{CACHE: cache}), stock)
    assert cache.get_seq_length() == 47


def test_the_callers_word_on_use_cache_counts_most(llama):
    stock = answer(llama, IDS, MASK)
    llama.generation_config.use_cache = False
    own = GenerationConfig(use_cache=True, max_new_tokens=24, do_sample=False, suppress_tokens=[0, 1])
    with attach(llama, FULL_PLAN):
        assert torch.equal(answer(llama, IDS, MASK, use_cache=True), stock)
        assert torch.equal(llama.generate(IDS, attention_mask=MASK, generation_config=own)[:, 40:], stock)
        with refused(ValueError, NEEDS_CACHE):
            answer(llama, IDS, MASK, use_cache=None)
        llama.generation_config.use_cache = True
        with refused(ValueError, NEEDS_CACHE):
            answer(llama, IDS, MASK, generation_config=GenerationConfig(use_cache=False))


def test_a_class_that_begins_without_a_cache_gets_one():
    model = settle(MptForCausalLM._from_config(MptConfig(vocab_size=96, d_model=64, n_layers=2, n_heads=4)))
    stock = answer(model, IDS[:1], use_cache=True)
    with attach(model, Plan.full(2, 4)):
        assert torch.equal(answer(model, IDS[:1]), stock)
        with refused(ValueError, NEEDS_CACHE):
            answer(model, IDS[:1], use_cache=False)


# --- copies and pickles


@pytest.mark.parametrize("how", ["attach", "duo"])
def test_an_attached_model_is_neither_copied_nor_pickled(llama, how):
    stock = answer(llama, IDS)
    if how == "duo":
        duo.enable_duo_attention_eval(llama, torch.zeros(LAYERS, KV_HEADS), 4, 8)
    else:
        block = attach(llama, MIXED)
        block.__enter__()
    for make in (copy.deepcopy, pickle.dumps, lambda model: torch.save(model, io.BytesIO())):
        with pytest.raises(NotImplementedError, match=r"^model: expected one that is not attached to copy or pickle"):
            make(llama)
    inside = answer(llama, IDS)
    duo.disable_duo_attention_eval(llama) if how == "duo" else block.__exit__(None, None, None)
    assert not torch.equal(inside, stock)
    for twin in (copy.deepcopy(llama), pickle.loads(pickle.dumps(llama))):
        with torch.no_grad():
            twin.lm_head.weight.copy_(-twin.lm_head.weight)
        assert not torch.equal(answer(twin, IDS), stock)
    assert torch.equal(answer(llama, IDS), stock)


@pytest.mark.parametrize("taken", ["shallow copy", "thread that starts late"])
def test_generate_taken_out_of_a_block_is_refused(llama, taken):
    streamer = TextIteratorStreamer(Tokens(), skip_prompt=True, timeout=60)
    with attach(llama, MIXED):
        generate = copy.copy(llama).generate if taken == "shallow copy" else llama.generate
    with refused(ValueError, "generate: expected a call inside the block of attach, got one after it was left"):
        generate(IDS, streamer=streamer)
    assert "".join(streamer) == ""  # nobody waits


def test_a_cache_copied_in_a_block_is_filled_in_blocks_alone(llama):
    with attach(llama, MIXED), torch.no_grad():
        cache = RazorCache(llama.config, MIXED)
        llama(IDS, attention_mask=MASK, **{CACHE: cache})
        twin, frozen = copy.deepcopy(cache), pickle.dumps(cache)
        next_ids = IDS[:, :1]
        mask = torch.cat([MASK, MASK[:, -1:]], 1)
        expected = llama(next_ids, attention_mask=mask, **{CACHE: cache}).logits
        for other in (twin, pickle.loads(frozen)):
            assert torch.equal(llama(next_ids, attention_mask=mask, **{CACHE: other}).logits, expected)
    with pytest.raises(ValueError, match="inside the block of"):
        llama(next_ids, **{CACHE: twin})


# --- blocks


def by_plan(model, plan):
    with attach(model, plan):
        return answer(model, IDS)


def test_blocks_may_be_left_in_any_order(llama):
    stock, plans = answer(llama, IDS), (MIXED, Plan.streaming(LAYERS, KV_HEADS, 0, 6))
    expected = [by_plan(llama, plan) for plan in plans]
    assert not torch.equal(*expected)
    first, second = (attach(llama, plan) for plan in plans)
    first.__enter__()
    second.__enter__()
    assert torch.equal(answer(llama, IDS), expected[1])
    first.__exit__(None, None, None)
    assert torch.equal(answer(llama, IDS), expected[1])
    second.__exit__(None, None, None)
    assert torch.equal(answer(llama, IDS), stock)
    assert "generate" not in vars(llama)
    assert not llama._forward_pre_hooks
    assert llama.config._attn_implementation == "sdpa"


def test_interleaved_generators(llama):
    stock = answer(llama, IDS)

    def answers(plan):
        with attach(llama, plan):
            yield answer(llama, IDS)
            yield answer(llama, IDS)

    first, second = answers(MIXED), answers(MIXED)
    inside = [next(first), next(second), next(first), next(second)]
    assert all(torch.equal(one, inside[0]) for one in inside)
    first.close()
    assert torch.equal(answer(llama, IDS), inside[0])
    second.close()
    assert torch.equal(answer(llama, IDS), stock)


def test_duo_enabled_inside_a_block_outlives_it(llama):
    stock = answer(llama, IDS)
    heads = torch.zeros(LAYERS, KV_HEADS)
    expected = by_plan(llama, plan := Plan.streaming(LAYERS, KV_HEADS, 2, 9))
    with attach(llama, MIXED):
        duo.enable_duo_attention_eval(llama, heads, 2, 9, prefill="dense")
    assert torch.equal(answer(llama, IDS), expected)
    duo.disable_duo_attention_eval(llama)
    assert torch.equal(answer(llama, IDS), stock)
    assert torch.equal(by_plan(llama, plan), expected)


def test_another_thread_does_not_attach_an_attached_model(llama):
    stock, errors = answer(llama, IDS), []

    def attach_too():
        try:
            by_plan(llama, FULL_PLAN)
        except ValueError as error:
            errors.append(str(error))

    with attach(llama, MIXED):
        thread = threading.Thread(target=attach_too)
        thread.start()
        thread.join()
        inside = answer(llama, IDS)
    message = "model: expected one that no other thread has switched to another attention, got one that uses razor"
    assert errors == [message]
    assert torch.equal(by_plan(llama, MIXED), inside)
    assert torch.equal(answer(llama, IDS), stock)


def test_a_block_is_entered_again(llama):
    block = attach(llama, MIXED)
    with block:
        first = answer(llama, IDS)
    with block:
        assert torch.equal(answer(llama, IDS), first)
    with attach(llama, MIXED) as model:
        assert model is llama


def test_a_block_inside_itself_is_refused(llama):
    stock, block = answer(llama, IDS), attach(llama, MIXED)
    with block:
        with refused(ValueError, "attach: expected a block that is not open, got one inside itself; call attach again"):
            block.__enter__()
        inside = answer(llama, IDS)
    assert torch.equal(by_plan(llama, MIXED), inside)
    assert torch.equal(answer(llama, IDS), stock)


def test_a_forgotten_with_is_told(llama):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with pytest.raises(ValueError, match="plan: expected"):
            attach(llama, Plan.full(1, 1))
        gc.collect()
        assert told == []  # the error said enough
        attach(llama, MIXED)
        gc.collect()
    (warning,) = told
    assert str(warning.message) == (
        "attach: expected `with attach(model, plan):`, got a call without `with`, which changes nothing"
    )


def test_a_cache_outside_its_block_is_refused():
    """Also where one call of a model of one layer would have run uncompressed."""
    for layers in (1, 2):
        model, plan = tiny_model("llama", num_hidden_layers=layers), Plan.streaming(layers, KV_HEADS, 1, 4)
        with attach(model, plan), torch.no_grad():
            used = RazorCache(model.config, plan)
            model(IDS, **{CACHE: used})
        for cache in (RazorCache(model.config, plan), used):
            with pytest.raises(ValueError, match=rf"^{CACHE}: expected a RazorCache inside the block of `with attach"):
                model(IDS[:, :5], **{CACHE: cache})
        with attach(model, plan), torch.no_grad():
            model(IDS[:, :5], **{CACHE: used})
        assert used.get_seq_length() == 45


# --- streaming threads


def test_a_stream_read_after_the_block_ends(llama):
    expected = by_plan(llama, MIXED)
    streamer = TextIteratorStreamer(Tokens(), skip_prompt=True, timeout=60)
    options = {"attention_mask": MASK[:1], "max_new_tokens": 24, "do_sample": False, "streamer": streamer}
    started = threading.Event()
    hook = llama.register_forward_pre_hook(lambda *_: started.set())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with attach(llama, MIXED):
            thread = threading.Thread(target=llama.generate, args=(IDS[:1],), kwargs=options)
            thread.start()
            started.wait(60)
    assert "expected threads that generate to end inside the block" in str(told[-1].message)
    text = "".join(streamer)
    thread.join()
    hook.remove()
    assert text.split() == [str(int(token)) for token in expected[0]]


# --- what a model does with its cache by itself


def longrope(original):
    """Phi-3 whose factors change beyond `original` positions; then it drops its cache and reads all again."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.5] * 8, "rope_theta": 10000.0}
    rope |= {"original_max_position_embeddings": original}
    sizes = {name: value for name, value in SIZES.items() if name != "head_dim"} | {"hidden_size": 96}
    config = Phi3Config(**sizes, rope_parameters=rope, original_max_position_embeddings=original)
    return settle(Phi3ForCausalLM._from_config(config))


def test_longrope_reads_again_with_a_fresh_cache_of_the_plan():
    model = longrope(50)
    ids = prompts(45)[0]
    stock, plan = answer(model, ids), Plan.streaming(LAYERS, KV_HEADS, 2, 10)
    if not torch.equal(stock, answer(model, ids, use_cache=False)):  # older transformers lost the text itself
        with pytest.raises(ValueError, match="attention_mask: expected shape"), attach(model, plan):
            answer(model, ids)
        return
    with attach(model, Plan.full(LAYERS, KV_HEADS)):
        assert torch.equal(answer(model, ids), stock)
    with attach(model, plan):
        out = model.generate(ids, max_new_tokens=24, do_sample=False, return_dict_in_generate=True)
    assert output_cache(out).plan == plan
    assert output_cache(out).get_seq_length() == 68
    assert output_cache(out).nbytes == plan.kv_bytes(68, head_dim=16, dtype=torch.float32)


def test_guidance_with_a_negative_prompt(llama):
    negative = prompts(20, seed=3)[0]
    options = {"guidance_scale": 1.7, "negative_prompt_ids": negative, "max_new_tokens": 8}
    stock = answer(llama, IDS[:1], **options)
    with attach(llama, FULL_PLAN):
        assert torch.equal(answer(llama, IDS[:1], **options), stock)
    assert not torch.equal(answer(llama, IDS[:1], max_new_tokens=8), stock)


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "PeftType.PREFIX_TUNING", "LORA"])
def test_prefix_tuning_is_refused(llama, kind):
    """It hands the model a cache of its own, already filled."""
    object.__setattr__(llama, "active_peft_config", SimpleNamespace(peft_type=kind))
    if kind == "LORA":
        with attach(llama, MIXED):
            return
    with pytest.raises(NotImplementedError, match=r"^model: expected one without keys and values of its own, got one"):
        attach(llama, MIXED)


def test_many_answers_over_one_prefilled_prompt(llama):
    with attach(llama, MIXED), torch.no_grad():
        cache = RazorCache(llama.config, MIXED)
        llama(IDS[:1, :30], **{CACHE: cache})
        message = (
            f"{CACHE}: expected 1 sequences like the RazorCache holds, got 3; "
            "cache.batch_repeat_interleave(n) repeats each n times"
        )
        options = {"num_return_sequences": 3, "do_sample": True, "max_new_tokens": 4}
        with refused(ValueError, message):
            answer(llama, IDS[:1], **options, **{CACHE: cache})
        cache.batch_repeat_interleave(3)
        assert answer(llama, IDS[:1].repeat(3, 1), max_new_tokens=4, **{CACHE: cache}).shape == (3, 4)


def test_windows_of_nothing_are_refused():
    message = "window_size: expected at least 1 token, the query's own, got 0"
    with refused(ValueError, message):
        Plan.streaming(2, 3, 0, 0)
    with refused(ValueError, message):
        Plan([[0, 4]], [[5, 0]], [[True, True]])
    with refused(ValueError, "recent_size: expected an integer >= 1, got 0"):
        duo.enable_duo_attention_eval(tiny_model("llama"), torch.zeros(LAYERS, KV_HEADS), 0, 0)


def test_find_heads_inside_a_block_leaves_it_as_it_was(llama):
    from test_find_heads import tokenizer

    with attach(llama, MIXED):
        before = answer(llama, IDS)
        find_heads(llama, tokenizer(), period=8, progress=False)
        assert torch.equal(answer(llama, IDS), before)


def test_a_switch_that_fails_leaves_nothing(llama, monkeypatch):
    def fail(*_):
        raise RuntimeError("no")

    with monkeypatch.context() as broken:
        broken.setattr(type(llama), "set_attn_implementation", fail)
        with pytest.raises(RuntimeError, match="no"):
            attach(llama, MIXED).__enter__()
    stock = answer(llama, IDS)
    assert not torch.equal(by_plan(llama, MIXED), stock)
    assert torch.equal(answer(llama, IDS), stock)
