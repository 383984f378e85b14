# SPDX-License-Identifier: Apache-2.0
"""hf/: what is refused, in which words. Nothing may be ignored silently or run uncompressed."""

import copy
import re

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    LlamaConfig,
    MptConfig,
    MptForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.masking_utils import causal_mask_function

from razor_attention import Plan, RazorCache, attach
from razor_attention.hf.attention import razor_attention, razor_mask
from razor_attention.hf.names import CACHE
from tiny_models import FULL_PLAN, MIXED, SIZES, answer, logits_by_step, positions, prompts, shared_model, tiny_model

FALCON = {"vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "multi_query": False}
OUTSIDE = (
    f"{CACHE}: expected a RazorCache inside the block of `with attach(model, plan):`, got one in a model that runs "
    "another attention"
)
NO_RAZOR_CACHE = (
    f"{CACHE}: expected a RazorCache, got another cache or none; "
    "razor attention never runs uncompressed without saying so"
)
NO_ROLLBACK = (
    "RazorCache: expected no rollback, got crop(); dropped tokens cannot come back, "
    "generate without an assistant model or prompt lookup"
)
SLIDING_LAYERS = (
    "config: expected only full_attention layers, got sliding_attention; "
    "such layers keep a window, a state or a shared cache of their own"
)
NOT_CAUSAL = "attention_mask: expected a plain causal mask, got a sliding, chunked, packed, image or bidirectional one"
NOT_LEFT = "attention_mask: expected padding on the left only, got padding after a token"
UNMASKED = r"^attention_mask: expected \[30, 20\] earlier tokens like the cache, got \[30, {}\]"
NO_CACHE = "use_cache: expected True with razor attention, got False"


def refused(error, message):
    return pytest.raises(error, match=f"^{re.escape(message)}$")


@pytest.fixture
def llama():
    return shared_model("llama")


def forward(model, ids, **options):
    with torch.no_grad():
        return model(ids, **options).logits


IDS, MASK = prompts(30, 20)
RIGHT_PADDED, WITH_A_HOLE = MASK.clone(), MASK.clone()
RIGHT_PADDED[0, -3:], WITH_A_HOLE[1, 15:17] = 0, 0


# --- the wrong cache, or none


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_razor_cache_needs_razor_attention(implementation):
    model = tiny_model("llama")
    model.set_attn_implementation(implementation)
    with refused(ValueError, OUTSIDE):
        answer(model, IDS, MASK, **{CACHE: RazorCache(model.config, MIXED)})


def test_razor_attention_needs_a_razor_cache(llama):
    with attach(llama, MIXED):
        with refused(ValueError, NO_RAZOR_CACHE):
            answer(llama, IDS, MASK, **{CACHE: DynamicCache()})
        with refused(ValueError, NO_RAZOR_CACHE):
            forward(llama, IDS, use_cache=False)


def test_razor_attention_by_name_needs_attach():
    """A model built with it has no block that gives it caches and decides use_cache."""
    model = tiny_model("llama")
    model.set_attn_implementation("razor")
    with refused(ValueError, NO_RAZOR_CACHE):
        answer(model, IDS, MASK)
    with refused(ValueError, OUTSIDE):
        answer(model, IDS, MASK, **{CACHE: RazorCache(model.config, MIXED)})
    with attach(model, MIXED):
        assert answer(model, IDS, MASK).shape == (2, 24)


@pytest.mark.parametrize("options", [{"use_cache": False}, {"generation_config": GenerationConfig(use_cache=False)}])
def test_attach_needs_a_cache(llama, options):
    with refused(ValueError, NO_CACHE), attach(llama, MIXED):
        answer(llama, IDS, MASK, **options)


def test_attach_needs_a_cache_in_the_models_generation_config():
    model = tiny_model("llama")
    model.generation_config.use_cache = False
    with refused(ValueError, NO_CACHE), attach(model, MIXED):
        answer(model, IDS, MASK)


def test_attach_needs_a_cache_in_a_positional_generation_config(llama):
    with refused(ValueError, NO_CACHE), attach(llama, MIXED):
        llama.generate(prompts(30)[0], GenerationConfig(use_cache=False, max_new_tokens=4))


def test_another_cache_implementation(llama):
    """transformers' own words."""
    with pytest.raises(ValueError, match="Passing both `cache_implementation`"), attach(llama, MIXED):
        answer(llama, IDS, MASK, cache_implementation="static")


def test_a_cache_of_another_batch(llama):
    with attach(llama, MIXED):
        cache = RazorCache(llama.config, MIXED)
        before = forward(llama, IDS, **{CACHE: cache})
        message = f"{CACHE}: expected 2 sequences like the RazorCache holds, got 1; "
        with refused(ValueError, f"{message}cache.batch_repeat_interleave(n) repeats each n times"):
            forward(llama, IDS[:1, :1], **{CACHE: cache})
        assert cache.get_seq_length() == 30
        assert before.isfinite().all()


# --- rollback


def test_no_prompt_lookup(llama):
    with refused(NotImplementedError, NO_ROLLBACK), attach(llama, MIXED):
        answer(llama, *prompts(30), prompt_lookup_num_tokens=3)


def test_no_assistant_model(llama):
    with refused(NotImplementedError, NO_ROLLBACK), attach(llama, MIXED):
        answer(llama, *prompts(30), assistant_model=tiny_model("llama", num_hidden_layers=1))


def test_no_crop_and_no_offload(llama):
    cache = RazorCache(llama.config, MIXED)
    for refuse in (cache.crop, cache.layers[0].crop):
        with refused(NotImplementedError, NO_ROLLBACK):
            refuse(-1)
    with refused(NotImplementedError, NO_ROLLBACK):
        cache.layers[0].activate_past_recording()
    for move in (cache.layers[0].offload, cache.layers[0].prefetch):
        with refused(NotImplementedError, "RazorCache: expected no offloading, got offload()"):
            move()
    with refused(NotImplementedError, "RazorLayer: expected to be filled through RazorCache.update"):
        cache.layers[0].lazy_initialization(torch.zeros(1, 3, 1, 16), torch.zeros(1, 3, 1, 16))


# --- the wrong plan or model: refused before the model is touched


def both_doors(model, plan, **options):
    """RazorCache and attach, which must say the same."""
    return (lambda: RazorCache(model.config, plan, **options), lambda: attach(model, plan, **options).__enter__())


@pytest.mark.parametrize(
    ("plan", "options", "error", "message"),
    [
        (Plan.full(2, 4), {}, ValueError, "plan: expected 2 layers x 3 kv heads like the model, got 2 x 4"),
        (Plan.full(32, 8), {}, ValueError, "plan: expected 2 layers x 3 kv heads like the model, got 32 x 8"),
        ({0: [1]}, {}, TypeError, "plan: expected a Plan, got dict"),
        (None, {}, TypeError, "plan: expected a Plan, got NoneType"),
        (MIXED, {"prefill": "paged"}, ValueError, "prefill: expected 'dense' or 'streaming', got 'paged'"),
        (MIXED, {"prefill": None}, ValueError, "prefill: expected 'dense' or 'streaming', got None"),
    ],
)
def test_wrong_plan_or_prefill(llama, plan, options, error, message):
    for door in both_doors(llama, plan, **options):
        with refused(error, message):
            door()
    assert llama.config._attn_implementation == "sdpa"
    assert "generate" not in vars(llama)


def test_wrong_prompt_len(llama):
    with refused(ValueError, "prompt_len: expected an integer >= 0, got -1"):
        RazorCache(llama.config, MIXED, prompt_len=-1)


def test_layers_that_do_not_keep_everything():
    models = (
        tiny_model("mistral", sliding_window=16),
        tiny_model("qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=1),
    )
    assert models[1].config.layer_types == ["full_attention", "sliding_attention"]
    for model in models:
        for door in both_doors(model, MIXED):
            with refused(NotImplementedError, SLIDING_LAYERS):
                door()
        assert model.config._attn_implementation == "sdpa"
    with refused(NotImplementedError, SLIDING_LAYERS):
        RazorCache(Gemma2Config(**SIZES, sliding_window=16), MIXED)
    unused = LlamaConfig(**SIZES)
    unused.layer_types = ["full_attention", "linear_attention"]
    with refused(NotImplementedError, SLIDING_LAYERS.replace("sliding_attention", "linear_attention")):
        RazorCache(unused, MIXED)


def test_a_window_that_is_switched_off_is_none():
    """Qwen2 has a sliding_window in its config that it does not use."""
    model = tiny_model("qwen2", use_sliding_window=False, sliding_window=16)
    with attach(model, FULL_PLAN):
        ours = answer(model, IDS, MASK)
    assert torch.equal(ours, answer(model, IDS, MASK))


def test_softcapped_models():
    """Gemma 2 with full layers only."""
    model = Gemma2ForCausalLM._from_config(Gemma2Config(**SIZES | {"layer_types": ["full_attention"] * 2})).eval()
    for door in both_doors(model, MIXED):
        with refused(
            NotImplementedError,
            "config: expected logits as they are, got attn_logit_softcapping 50.0; razor attention caps none",
        ):
            door()
    config = Gemma2Config(**SIZES | {"layer_types": ["full_attention"] * 2, "attn_logit_softcapping": None})
    model = Gemma2ForCausalLM._from_config(config).eval()
    with attach(model, FULL_PLAN):
        ours = answer(model, IDS, MASK)
    assert torch.equal(ours, answer(model, IDS, MASK))


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (FalconForCausalLM, FalconConfig(**FALCON, alibi=False)),
    ],
)
def test_models_that_do_not_use_attention_interface(model_class, config):
    model = model_class._from_config(config)
    before = model.config._attn_implementation
    message = f"model: expected one that uses AttentionInterface, got {model_class.__name__}"
    with refused(NotImplementedError, message), attach(model, MIXED):
        pass
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(
    ("model_class", "config", "error"),
    [
        (BloomForCausalLM, BloomConfig(vocab_size=96, hidden_size=48, n_layer=2, n_head=3), NotImplementedError),
        (MptForCausalLM, MptConfig(vocab_size=96, d_model=48, n_layers=2, n_heads=3), NotImplementedError),
        (FalconForCausalLM, FalconConfig(**FALCON, alibi=True), KeyError),  # transformers' own
    ],
)
def test_alibi_models_do_not_take_razor_attention_by_name(model_class, config, error):
    """Nor by their config's: they would run their own attention with our mask, which is none."""
    with pytest.raises(error):
        forward(model_class._from_config(copy.deepcopy(config), attn_implementation="razor"), IDS)
    model = model_class._from_config(config).eval()
    with attach(model, Plan.full(2, 3)):
        pass
    model.config._attn_implementation_internal = "razor"
    with refused(
        NotImplementedError, f"model: expected one that uses AttentionInterface, got {model_class.__name__[:-11]}Model"
    ):
        forward(model, IDS)


def test_encoder_decoder():
    config = T5Config(vocab_size=96, d_model=16, num_layers=2, num_heads=3, d_ff=16, d_kv=8)
    for door in both_doors(T5ForConditionalGeneration._from_config(config), MIXED):
        with refused(NotImplementedError, "config: expected a decoder-only model, got an encoder-decoder one"):
            door()


def test_not_a_model():
    message = "model: expected a transformers PreTrainedModel, got Linear"
    with refused(TypeError, message), attach(torch.nn.Linear(2, 2), MIXED):
        pass


def test_float64():
    model = tiny_model("llama", dtype=torch.float64)
    message = "dtype: expected float32, bfloat16, float16, int8 or 'int4', got torch.float64"
    with refused(ValueError, message), attach(model, MIXED):
        answer(model, IDS, MASK)


# --- masks


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (RIGHT_PADDED, NotImplementedError, NOT_LEFT),
        (WITH_A_HOLE, NotImplementedError, NOT_LEFT),
        (MASK[:, :20], ValueError, "attention_mask: expected shape [2, 30], got [2, 20]"),
        (MASK[:, None].repeat(1, 30, 1), ValueError, "attention_mask: expected shape [2, 30], got [2, 30, 30]"),
        (
            torch.zeros(2, 1, 30, 30),
            NotImplementedError,
            "attention_mask: expected 2 dimensions (batch, tokens), got shape [2, 1, 30, 30]; "
            "masks prepared by the caller are not supported",
        ),
    ],
    ids=["right", "hole", "short", "3-D", "4-D"],
)
def test_masks(llama, mask, error, message):
    with attach(llama, MIXED):
        cache = RazorCache(llama.config, MIXED)
        with refused(error, message):
            forward(llama, IDS, attention_mask=mask, **{CACHE: cache})
        assert cache.get_seq_length() == 0


def test_right_padding_in_generate(llama):
    with refused(NotImplementedError, NOT_LEFT), attach(llama, MIXED):
        answer(llama, IDS, RIGHT_PADDED)


def test_masks_that_are_not_causal():
    mask = razor_mask(batch_size=1, q_length=2, kv_length=2, mask_function=lambda *_: True)
    q, kv = torch.zeros(1, 6, 2, 16), torch.zeros(1, 3, 2, 16)
    with refused(NotImplementedError, NOT_CAUSAL):
        razor_attention(torch.nn.Identity(), q, kv, kv, mask)
    assert razor_mask(batch_size=1, q_length=2, kv_length=2, mask_function=causal_mask_function) is None


def second_call(llama, mask):
    """Logits of one more token after a padded prompt, with this mask for the tokens before."""
    with attach(llama, FULL_PLAN):
        cache = RazorCache(llama.config, FULL_PLAN)
        logits_by_step(llama, cache, IDS, (30,), MASK)
        mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
        return forward(llama, IDS[:, :1], attention_mask=mask, position_ids=positions(mask)[:, -1:], **{CACHE: cache})


@pytest.mark.parametrize("hide", [(0, 5), (1, 12)])
def test_tokens_masked_after_they_were_stored(llama, hide):
    changed = MASK.clone()
    changed[hide] = 0
    counts = changed.sum(1).tolist()
    message = (
        f"attention_mask: expected [30, 20] earlier tokens like the cache, got {counts}; "
        "what was padding or a token when it came stays so"
    )
    with refused(ValueError, message):
        second_call(llama, changed)
    assert second_call(llama, MASK).isfinite().all()


def test_padding_unmasked_after_it_was_left_out(llama):
    changed = MASK.clone()
    changed[1, 4:] = 1
    with pytest.raises(ValueError, match=UNMASKED.format(26)):
        second_call(llama, changed)


def test_all_padding_unmasked_after_it_was_left_out(llama):
    with pytest.raises(ValueError, match=UNMASKED.format(30)):
        second_call(llama, torch.ones_like(MASK))


# --- what an attention layer may ask for


def test_attention_maps(llama):
    message = "output_attentions: expected False, got True; razor attention builds no attention map"
    with refused(NotImplementedError, message), attach(llama, MIXED):
        answer(llama, IDS, MASK, output_attentions=True, return_dict_in_generate=True)


def test_dropout():
    model = tiny_model("llama", attention_dropout=0.25).train()
    with refused(NotImplementedError, "dropout: expected 0, got 0.25; call model.eval() first"), attach(model, MIXED):
        answer(model, IDS, MASK)


def test_gradients(llama):
    message = "expected inputs that need no gradient, got one that does; call it under torch.no_grad()"
    with attach(llama, MIXED):
        cache = RazorCache(llama.config, MIXED)
        with refused(NotImplementedError, f"razor::attention: {message}"):
            llama(IDS, attention_mask=MASK, **{CACHE: cache})
        cache.reset()
        assert forward(llama, IDS, attention_mask=MASK, **{CACHE: cache}).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softcap": 50.0}, "softcap: expected None, got 50.0"),
        ({"sliding_window": 1}, "sliding_window: expected None or one wider than the text, got 1"),
        ({"s_aux": torch.ones(6)}, "s_aux: expected None, got a tensor"),
        ({"position_bias": torch.ones(1)}, "position_bias: expected None, got a tensor"),
        ({"head_mask": torch.ones(6)}, "head_mask: expected None, got a tensor"),
    ],
)
def test_options_of_attention_layers(llama, options, message):
    q, kv = torch.zeros(1, 6, 2, 16), torch.zeros(1, 3, 2, 16)
    with refused(NotImplementedError, f"{message}; razor attention does not support it"):
        razor_attention(llama.model.layers[0].self_attn, q, kv, kv, None, **options)


def test_layers_that_are_not_causal():
    layer, kv = torch.nn.Identity(), torch.zeros(1, 3, 2, 16)
    layer.is_causal = False
    with refused(NotImplementedError, "model: expected causal attention, got Identity which is not"):
        razor_attention(layer, kv, kv, kv, None)


# --- after a refusal


def test_a_refused_call_leaves_the_cache_as_it_was(llama):
    with attach(llama, MIXED):
        cache, twin = (RazorCache(llama.config, MIXED) for _ in range(2))
        for one in (cache, twin):
            forward(llama, IDS, **{CACHE: one})
        with pytest.raises(NotImplementedError):
            forward(llama, IDS[:, :1], **{CACHE: cache}, output_attentions=True)
        after, expected = (forward(llama, IDS[:, :1], **{CACHE: one}) for one in (cache, twin))
    assert torch.equal(after, expected)


def test_batch_operations_on_an_empty_cache(llama):
    cache = RazorCache(llama.config, MIXED)
    cache.reset()
    cache.reorder_cache(torch.tensor([0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0]))
