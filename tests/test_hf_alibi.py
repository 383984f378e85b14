# SPDX-License-Identifier: Apache-2.0
"""hf/ with ALiBi models: windows of their own for every head, against the stock models with their masks narrowed."""

import copy
import re
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    BloomConfig,
    DynamicCache,
    FalconConfig,
    MptConfig,
)
from transformers.models.bloom.modeling_bloom import build_alibi_tensor as bloom_alibi
from transformers.models.falcon.modeling_falcon import build_alibi_tensor as falcon_alibi
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor as mpt_alibi

from razor_attention import FULL, Plan, RazorCache, attach
from razor_attention.hf.alibi import model_slopes
from razor_attention.hf.baichuan import BaichuanConfig
from razor_attention.hf.models import geometry
from razor_attention.hf.names import CACHE
from tiny_models import ALIBI, alibi_model, answer, logits_by_step, masked, prompts

PREFILLS = ("dense", "streaming")
CLOSE, FAR = 2e-4, 0.5  # of logits with a deviation of 3
WAYS = (
    {"max_new_tokens": 40},
    {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 12},
    {"do_sample": True, "temperature": 3.0, "seed": 3, "max_new_tokens": 30},
)
_models = {}


SLOW = ("bloom", "mpt, 12 heads", "falcon, 8 kv heads", "baichuan 2, 12 heads")  # as quick ones, of another layout


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in ALIBI])
def model(request):
    """Every model, checked to be left as it was."""
    if request.param not in _models:
        _models[request.param] = alibi_model(request.param)
    model = _models[request.param]
    before, attributes = model.config._attn_implementation, [set(vars(m)) for m in model.modules()]
    yield model
    assert type(model.config._attn_implementation) is str
    assert model.config._attn_implementation == before
    assert [set(vars(m)) for m in model.modules()] == attributes


@pytest.fixture
def bloom():
    return _models.setdefault("bloom", alibi_model("bloom"))


def windows(model, seed=0):
    """A plan of `Plan.from_windows`; where there are heads enough, one is full and one reads its own token alone."""
    sizes = geometry(model.config)
    drawn = torch.randint(3, 40, (sizes.num_layers, sizes.num_kv_heads), generator=torch.Generator().manual_seed(seed))
    if sizes.num_kv_heads > 1:
        drawn[0, 0] = FULL
    if sizes.num_kv_heads > 2:
        drawn[1, 1] = 1
    return Plan.from_windows(drawn, num_layers=sizes.num_layers, num_kv_heads=sizes.num_kv_heads)


def full(model):
    sizes = geometry(model.config)
    return Plan.full(sizes.num_layers, sizes.num_kv_heads)


def attention_layers(model):
    return [m for m in model.modules() if hasattr(m, "query_key_value") or hasattr(m, "Wqkv") or hasattr(m, "W_pack")]


@contextmanager
def narrowed(model, plan, *, prefill="dense"):
    """The stock model: its own attention, cache and ALiBi; the mask that each layer gets is narrowed head by head."""
    num_heads = geometry(model.config).num_heads

    def narrow(module, args, kwargs):
        mask, cache = kwargs["attention_mask"], kwargs.get("layer_past", kwargs.get(CACHE))
        q_len = args[0].shape[1] if args else kwargs["hidden_states"].shape[1]
        past = 0 if cache is None else cache.get_seq_length(module.layer_idx)
        if mask is None:
            mask = torch.ones(past + q_len, past + q_len, dtype=torch.bool).tril()[None, None, past:]
        if mask.dtype != torch.bool:
            visible = mask > torch.finfo(mask.dtype).min / 2
        else:
            visible = ~mask if hasattr(module, "Wqkv") else mask
        visible = visible[:, :1]
        real = visible[:, 0, -1]  # the last query sees every token
        token = (real.cumsum(1) - 1)[:, None, None]
        here = token[..., -q_len:].transpose(2, 3)
        sink, window, _ = (
            table.repeat_interleave(num_heads // len(table))[:, None, None] for table in plan.layer(module.layer_idx)
        )
        read = (token < sink) | (here - token < window)
        if prefill == "dense" and q_len > 1:
            stored = real[:, :past].sum(1)[:, None, None, None]
            read = read | (token >= stored) | (stored - 1 - token < window)
        hidden = ~(visible & read)
        if mask.dtype == torch.bool:
            kwargs["attention_mask"] = hidden if hasattr(module, "Wqkv") else ~hidden
        else:
            kwargs["attention_mask"] = mask.expand_as(hidden).masked_fill(hidden, torch.finfo(mask.dtype).min)
        return args, kwargs

    hooks = [layer.register_forward_pre_hook(narrow, with_kwargs=True) for layer in attention_layers(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def stock_answer(model, *args, **options):
    return answer(model, *args, use_cache=True, **options)  # MPT has none unless told


def assert_close(ours, theirs):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < CLOSE


# --- slopes


def per_token(alibi):
    """Logit per token of distance of a stock ALiBi tensor (num_heads, 1, tokens): (num_heads,)."""
    return alibi[:, 0, 1] - alibi[:, 0, 0]


@pytest.mark.parametrize("heads", [1, 2, 3, 8, 12, 40, 64, 71, 112])
def test_slopes_are_those_of_the_stock_models(heads):
    """MPT builds them in another way and order, and gets the same."""
    hidden, mask = 64 * heads, torch.ones(1, 4)
    for config, alibi, scale in (
        (BloomConfig(n_head=heads, hidden_size=hidden), bloom_alibi(mask, heads, torch.float32), 1.0),
        (MptConfig(n_heads=heads, d_model=hidden, attn_config={"alibi_bias_max": 4}), mpt_alibi(heads, 4), 1.0),
        (
            FalconConfig(alibi=True, num_attention_heads=heads, hidden_size=hidden),
            falcon_alibi(mask, heads, torch.float32),
            1 / 8,
        ),
    ):
        torch.testing.assert_close(model_slopes(config), per_token(alibi) * scale, rtol=1e-6, atol=0)
    baichuan = BaichuanConfig(num_attention_heads=heads, hidden_size=hidden)
    assert torch.equal(model_slopes(baichuan), model_slopes(BloomConfig(n_head=heads, hidden_size=hidden)))


def test_slopes_from_any_object():
    """As from a checkpoint's config.json."""
    assert torch.equal(model_slopes(SimpleNamespace(model_type="bloom", n_head=2)), torch.tensor([2**-4, 2**-8]))
    assert model_slopes(SimpleNamespace(model_type="mpt", n_heads=12, attn_config={"alibi": False})).shape == (12,)
    falcon = {"model_type": "falcon", "num_attention_heads": 2, "hidden_size": 128}
    assert model_slopes(SimpleNamespace(**falcon)) is None
    assert torch.equal(model_slopes(SimpleNamespace(**falcon, alibi=True)), torch.tensor([2**-7, 2**-11]))
    baichuan = {"model_type": "baichuan", "num_attention_heads": 40, "model_max_length": 4096}
    assert model_slopes(SimpleNamespace(**baichuan)).shape == (40,)
    assert model_slopes(SimpleNamespace(**baichuan, max_position_embeddings=4096)) is None
    assert model_slopes(SimpleNamespace(model_type="llama", num_attention_heads=32)) is None
    assert model_slopes(SimpleNamespace()) is None
    with pytest.raises(ValueError, match=r"^config: expected n_head or num_attention_heads, got none$"):
        model_slopes(SimpleNamespace(model_type="bloom"))


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("falcon, 1 kv head", 1),
        ("falcon, 8 kv heads", 8),
        ("falcon, groups", 2),
        ("bloom, 12 heads", 12),
        ("baichuan", 8),
    ],
)
def test_geometry(name, heads):
    assert geometry(alibi_model(name).config).num_kv_heads == heads


# --- a full plan


def test_full_plan_is_stock(model):
    ids, mask = prompts(50, 64, 3)
    with attach(model, full(model)):
        ours = [answer(model, ids, mask, **options) for options in WAYS]
        chunks = [answer(model, ids, mask, max_new_tokens=8, prefill_chunk_size=chunk) for chunk in (1, 7, 16)]
    assert all(map(torch.equal, ours, [stock_answer(model, ids, mask, **options) for options in WAYS]))
    assert len(ours[2].unique()) > 20
    assert all(torch.equal(chunk, ours[0][:, :8]) for chunk in chunks)


@pytest.mark.parametrize("prefill", PREFILLS)
def test_full_plan_is_stock_step_by_step(model, prefill):
    (ids, mask), lengths = prompts(80, 47), (30, 1, 1, 13, 1, *[1] * 34)
    stock = logits_by_step(model, DynamicCache(), ids, lengths, mask)
    with attach(model, full(model)):
        ours = logits_by_step(model, RazorCache(model.config, full(model), prefill=prefill), ids, lengths, mask)
        unmasked = logits_by_step(model, RazorCache(model.config, full(model)), ids[:1], lengths)
    assert_close(ours[mask.bool()], stock[mask.bool()])
    assert_close(unmasked, logits_by_step(model, DynamicCache(), ids[:1], lengths))


def test_alibi_matters(model):
    """Without it the full plan would not be stock: the tests see slopes."""
    (ids, _), lengths = prompts(60), (40, *[1] * 20)
    with attach(model, full(model)):
        cache = RazorCache(model.config, full(model))
        cache._slopes = None
        without = logits_by_step(model, cache, ids, lengths)
    assert (without - logits_by_step(model, DynamicCache(), ids, lengths)).abs().max() > FAR


# --- windows


@pytest.mark.parametrize("prefill", PREFILLS)
def test_windows_are_the_narrowed_models(model, prefill):
    """Padded rows; prefill, 40 decoded tokens so that windows slide, and calls of several tokens."""
    plan = windows(model)
    (ids, mask), lengths = prompts(110, 71, 98), (60, *[1] * 40, 8, 1, 1)
    with narrowed(model, plan, prefill=prefill):
        theirs = logits_by_step(model, DynamicCache(), ids, lengths, mask)
    with attach(model, plan):
        ours = logits_by_step(model, RazorCache(model.config, plan, prefill=prefill), ids, lengths, mask)
    assert_close(ours[mask.bool()], theirs[mask.bool()])
    stock = logits_by_step(model, DynamicCache(), ids, lengths, mask)
    assert (ours - stock)[:, 60:].abs().amax(-1).median() > FAR


@pytest.mark.parametrize("prefill", PREFILLS)
def test_sinks_are_the_narrowed_models(model, prefill):
    """Any plan works; a compensation row has no ALiBi and is below."""
    sizes = geometry(model.config)
    plan = Plan.streaming(sizes.num_layers, sizes.num_kv_heads, 4, 12)
    (ids, mask), lengths = prompts(90, 71), (60, *[1] * 30)
    with narrowed(model, plan, prefill=prefill):
        theirs = logits_by_step(model, DynamicCache(), ids, lengths, mask)
    with attach(model, plan):
        ours = logits_by_step(model, RazorCache(model.config, plan, prefill=prefill), ids, lengths, mask)
    assert_close(ours[mask.bool()], theirs[mask.bool()])


@pytest.mark.parametrize("prefill", PREFILLS)
def test_generation_with_windows_is_the_narrowed_models(model, prefill):
    (ids, mask), plan = prompts(50, 64, 3), windows(model)
    with attach(model, plan, prefill=prefill):
        ours = [answer(model, ids, mask, **options) for options in WAYS]
    with narrowed(model, plan, prefill=prefill):
        theirs = [stock_answer(model, ids, mask, **options) for options in WAYS]
    assert all(map(torch.equal, ours, theirs))
    assert not torch.equal(ours[0], stock_answer(model, ids, mask, **WAYS[0]))


def test_a_row_does_not_depend_on_its_batch(model):
    lengths, plan = (50, 64, 3), windows(model)
    ids, mask = prompts(*lengths)
    with attach(model, plan):
        together = answer(model, ids, mask)
        for row, length in enumerate(lengths):
            assert torch.equal(together[row : row + 1], answer(model, ids[row : row + 1, -length:]))


def test_streaming_prefill_does_not_depend_on_chunks(model):
    (ids, mask), plan = prompts(60, 41), windows(model)
    with attach(model, plan, prefill="streaming"):
        whole = answer(model, ids, mask)
        assert all(torch.equal(whole, answer(model, ids, mask, prefill_chunk_size=chunk)) for chunk in (1, 7, 16))


def test_cache_bytes_are_the_plans(model):
    sizes, (ids, mask) = geometry(model.config), prompts(600, 412)
    plan = Plan.from_windows([16] * sizes.num_kv_heads, num_layers=2, num_kv_heads=sizes.num_kv_heads)
    with attach(model, plan):
        cache = RazorCache(model.config, plan, page_size=16)
        logits_by_step(model, cache, ids, (598, 1, 1), mask)
    lengths = (600, 412)
    options = {"head_dim": 16, "dtype": torch.float32, "page_size": 16}
    assert cache.nbytes == sum(plan.kv_bytes(n, **options) for n in lengths)
    assert cache.nbytes * 20 < sum(full(model).kv_bytes(n, **options) for n in lengths)
    held = sum(t.numel() * 4 for layer in cache.layers for t in (layer.cache.key_pages, layer.cache.value_pages))
    assert cache.nbytes <= held < 2 * cache.nbytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(model, dtype):
    """Stock models round whole ALiBi maps; ours may not be further from float32 than they are."""
    (ids, mask), lengths, plan = prompts(90, 60), (60, *[1] * 30), full(model)
    half = copy.deepcopy(model).to(dtype)
    exact = logits_by_step(model, DynamicCache(), ids, lengths, mask)
    stock = logits_by_step(half, DynamicCache(), ids, lengths, mask)
    with attach(half, plan):
        cache = RazorCache(half.config, plan)
        ours = logits_by_step(half, cache, ids, lengths, mask)
    real = mask.bool()
    assert cache.layers[0].cache.key_pages.dtype == dtype
    assert (ours - exact)[real].abs().mean() < 1.2 * (stock - exact)[real].abs().mean()
    with attach(half, windows(model)):
        assert answer(half, ids, mask).shape == (2, 24)


# --- the switch


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_attach_leaves_the_model_as_it_was_after_an_exception(model, error):
    ids, _ = prompts(40)
    stock = stock_answer(model, ids)

    def fail(*_):
        raise error("halfway")

    hook = attention_layers(model)[1].register_forward_pre_hook(fail)
    with pytest.raises(error, match="halfway"), attach(model, windows(model)):
        answer(model, ids)
    hook.remove()
    assert torch.equal(stock, stock_answer(model, ids))


def test_attach_inside_attach(model):
    ids, _ = prompts(60)
    with attach(model, windows(model)):
        outer = answer(model, ids)
        with attach(model, full(model)):
            assert torch.equal(stock_answer(model, ids), answer(model, ids))
            inner = answer(model, ids)
        assert torch.equal(outer, answer(model, ids))
    assert torch.equal(inner, stock_answer(model, ids))
    assert not torch.equal(inner, outer)


def test_attach_under_hooks_that_wrap_forward(bloom):
    """accelerate's, which move tensors between devices and hold on to the layer's own forward."""
    hooks, seen = pytest.importorskip("accelerate.hooks"), []

    class Hook(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(module)
            return args, kwargs

    model, (ids, mask), plan = copy.deepcopy(bloom), prompts(50, 30), windows(bloom)
    for layer in attention_layers(model):
        hooks.add_hook_to_module(layer, Hook())
    before = [dict(vars(layer)) for layer in attention_layers(model)]
    with attach(model, plan):
        ours = answer(model, ids, mask)
    assert len(seen) == 2 * ours.shape[1]
    with attach(bloom, plan):
        assert torch.equal(ours, answer(bloom, ids, mask))
    assert [dict(vars(layer)) for layer in attention_layers(model)] == before


def test_no_copy_is_made_inside_attach(bloom):
    """Its layers would run with this model's weights."""
    with attach(bloom, windows(bloom)), pytest.raises(NotImplementedError, match="expected one that is not attached"):
        copy.deepcopy(bloom)
    twin = copy.deepcopy(bloom)
    assert torch.equal(answer(twin, prompts(30)[0]), answer(bloom, prompts(30)[0]))


@pytest.mark.parametrize("name", ["bloom", "mpt", "falcon, groups"])
@pytest.mark.parametrize("prefill", PREFILLS)
def test_compensation_row_is_the_masked_models(name, prefill):
    """And any other attention function runs in these models."""
    model = alibi_model(name)
    sizes = geometry(model.config)
    plan = Plan.streaming(sizes.num_layers, sizes.num_kv_heads, 2, 12)
    plan = Plan(plan.sink_size, plan.window_size, torch.full_like(plan.compensate, True))
    (ids, mask), lengths = prompts(90, 60), (50, *[1] * 40)
    with masked(model, plan, prefill=prefill, slopes=model_slopes(model.config)):
        theirs = logits_by_step(model, DynamicCache(), ids, lengths, mask)
    with attach(model, plan):
        ours = logits_by_step(model, RazorCache(model.config, plan, prefill=prefill), ids, lengths, mask)
    assert_close(ours[mask.bool()], theirs[mask.bool()])


# --- refusals


def refused(error, message):
    return pytest.raises(error, match=f"^{re.escape(message)}$")


def test_a_plan_for_another_model(bloom):
    for door in (RazorCache, lambda _, plan: attach(bloom, plan).__enter__()):
        with refused(ValueError, "plan: expected 2 layers x 8 kv heads like the model, got 2 x 3"):
            door(bloom.config, Plan.full(2, 3))


def test_a_model_without_the_layers_we_know(bloom):
    model = copy.deepcopy(bloom)
    del model.transformer.h[1]
    message = "model: expected 2 attention layers with query_key_value, got 1"
    with refused(NotImplementedError, message), attach(model, full(bloom)):
        pass
    assert type(model.config._attn_implementation) is str


def test_what_is_refused_inside_attach(model):
    ids, mask = prompts(30, 20)
    with attach(model, windows(model)):
        with refused(ValueError, "use_cache: expected True with razor attention, got False"):
            answer(model, ids, mask, use_cache=False)
        with pytest.raises(ValueError, match=rf"^{CACHE}: expected a RazorCache, got another cache or none"):
            answer(model, ids, mask, **{CACHE: DynamicCache()})
        with pytest.raises(NotImplementedError, match=r"^attention_mask: expected padding on the left only"):
            answer(model, ids, mask.flip(1))
        cache = RazorCache(model.config, windows(model))
        answer(model, ids, mask, **{CACHE: cache}, max_new_tokens=2)
    with pytest.raises((RuntimeError, ValueError), match=r"inside the block of|like the model's keys"):
        stock_answer(model, ids, mask, **{CACHE: RazorCache(model.config, windows(model))})


def test_attention_maps_and_dropout(bloom):
    ids, _ = prompts(30)
    message = "output_attentions: expected False, got True; razor attention builds no attention map"
    with attach(bloom, windows(bloom)):
        with refused(NotImplementedError, message):
            bloom(ids, **{CACHE: RazorCache(bloom.config, windows(bloom))}, output_attentions=True)
        model = alibi_model("bloom", attention_dropout=0.25).train()
    with (
        refused(NotImplementedError, "dropout: expected 0, got 0.25; call model.eval() first"),
        attach(model, windows(model)),
    ):
        answer(model, ids)
