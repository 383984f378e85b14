# SPDX-License-Identifier: Apache-2.0
"""hf/calibrate.py: the probe that find_heads runs, and scores that equal those of the model's own attention maps."""

import re
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast

from razor_attention import Plan, attach, find_heads
from tiny_models import (
    FAMILIES,
    FULL_PLAN,
    KV_HEADS,
    LAYERS,
    MIXED,
    SIZES,
    VOCABULARY,
    answer,
    prompts,
    save,
    shared_model,
    tiny_model,
)

SPECIAL = ("<pad>", "</s>", "<s>", "<unk>")
PERIOD, REPEATS = 17, 4


def exactly(message):
    return f"^{re.escape(message)}$"


def tokenizer(size=VOCABULARY, *, template=None):
    """Words "A", "w5", "w6", ... after the special tokens. template: what is put around a text."""
    words = {word: i for i, word in enumerate((*SPECIAL, "A", *(f"w{i}" for i in range(5, size))))}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if template:
        used = [(word, words[word]) for word in template.split() if word in words]
        made.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )


@pytest.fixture
def llama():
    return shared_model("llama")


def probe(model, words=None, *, period=PERIOD, repeats=REPEATS, **options):
    """The scores, and the ids that the model was given: [tokens]."""
    given = []

    def look(_, args, kwargs):
        given.append(kwargs["input_ids"] if "input_ids" in kwargs else args[0])

    hook = model.base_model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        scores = find_heads(model, words or tokenizer(), period=period, repeats=repeats, progress=False, **options)
    finally:
        hook.remove()
    assert [tuple(ids.shape) for ids in given] == [(1, 1 + period * repeats)]
    return scores, given[0][0]


def scores_of_maps(model, ids, period):
    """echo and induction of every head from the maps of eager attention: two [layers, heads] float64."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(ids[None], output_attentions=True, use_cache=False).attentions
    model.set_attn_implementation(before)
    maps = torch.cat(maps).double()[:, :, 1:, 1:]  # [layers, heads, tokens, tokens], without the prefix
    tokens = maps.shape[-1]
    echo, induction = torch.zeros(2, *maps.shape[:2], dtype=torch.float64)
    for row in range(period, tokens):
        for copy in range(row % period, row, period):
            echo += maps[:, :, row, copy]
            induction += maps[:, :, row, copy + 1]
    return echo / (tokens - period), induction / (tokens - period)


# --- scores


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_the_attention_maps(family):
    model = shared_model(family)
    scores, ids = probe(model)
    echo, induction = scores_of_maps(model, ids, PERIOD)
    torch.testing.assert_close(scores.echo, echo.float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(scores.induction, induction.float(), rtol=1e-4, atol=1e-6)
    assert scores.echo.shape == (LAYERS, SIZES["num_attention_heads"])
    assert scores.num_kv_heads == KV_HEADS
    assert len({*scores.echo.flatten().tolist(), *scores.induction.flatten().tolist()}) == 2 * scores.echo.numel()
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("period", "repeats"), [(1, 2), (1, 9), (2, 2), (40, 2), (64, 3)])
def test_scores_of_other_periods(llama, period, repeats):
    scores, ids = probe(llama, period=period, repeats=repeats)
    echo, induction = scores_of_maps(llama, ids, period)
    torch.testing.assert_close(scores.echo, echo.float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(scores.induction, induction.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_groups(kv_heads):
    """A kv head counts as its best query head."""
    model = tiny_model("llama", num_key_value_heads=kv_heads)
    scores, ids = probe(model)
    for ours, maps in zip(scores.group_max(), scores_of_maps(model, ids, PERIOD), strict=True):
        group = 6 // kv_heads
        best = torch.stack([maps[:, h * group : (h + 1) * group].amax(1) for h in range(kv_heads)], 1)
        torch.testing.assert_close(ours, best.float(), rtol=1e-4, atol=1e-6)


def test_half_precision(llama):
    exact, _ = probe(llama)
    scores, _ = probe(shared_model("llama", torch.bfloat16))
    torch.testing.assert_close(scores.echo, exact.echo, rtol=0.1, atol=0.01)
    torch.testing.assert_close(scores.induction, exact.induction, rtol=0.1, atol=0.01)


def test_provenance_and_a_plan_from_the_scores(llama):
    scores, _ = probe(llama, seed=5)
    said = {"method": "echo and induction scores", "period": PERIOD, "repeats": REPEATS, "seed": 5}
    assert said.items() <= scores.provenance.items()
    assert scores.provenance["model"] == "LlamaForCausalLM"
    heads = scores.select(induction_ratio=0.2, echo_ratio=0.2)
    plan = Plan.from_heads(heads, num_layers=LAYERS, num_kv_heads=KV_HEADS, min_window=8, window_fraction=0)
    assert 1 <= plan.is_full.sum() <= 2
    with attach(llama, plan):
        assert not torch.equal(answer(llama, prompts(60)[0]), answer(llama, prompts(60, seed=1)[0]))


# --- the prompt


def test_prompt_is_a_prefix_and_one_block_repeated(llama):
    _, ids = probe(llama)
    block = ids[1 : 1 + PERIOD]
    assert torch.equal(ids[1:], block.repeat(REPEATS))
    assert len(block.unique()) > PERIOD // 2


def test_same_seed_same_scores(llama):
    state = torch.get_rng_state()
    (first, ids), (again, same), (other, different) = (probe(llama, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(ids, same)
    assert torch.equal(first.echo, again.echo)
    assert torch.equal(first.induction, again.induction)
    assert not torch.equal(ids, different)
    assert not torch.equal(first.echo, other.echo)
    assert torch.equal(state, torch.get_rng_state())  # torch's own generator is left alone


def test_special_tokens_are_never_drawn():
    """A vocabulary of 12 tokens: the other 8 all turn up."""
    model = tiny_model("qwen3", vocab_size=12)
    _, ids = probe(model, tokenizer(12), period=200, repeats=2)
    assert sorted(ids[1:].unique().tolist()) == list(range(len(SPECIAL), 12))


def test_ids_beyond_the_models_vocabulary_are_never_drawn():
    model = tiny_model("llama", vocab_size=12)
    _, ids = probe(model, tokenizer(40), period=200, repeats=2)
    assert sorted(ids[1:].unique().tolist()) == list(range(len(SPECIAL), 12))


@pytest.mark.parametrize(
    ("template", "prefix"),
    [("<s> $A", "<s>"), (None, "A"), ("<s> $A </s>", "</s>")],
    ids=["begin", "nothing", "begin and end"],
)
def test_prefix(llama, template, prefix):
    """The last token of an empty text, such as the begin token; where there is none, the last one of "A"."""
    words = tokenizer(template=template)
    _, ids = probe(llama, words)
    assert words.convert_ids_to_tokens(int(ids[0])) == prefix


# --- around it


def test_model_is_left_as_it_was(llama):
    before, stock = set(vars(llama)), answer(llama, prompts(30)[0])
    probe(llama)
    assert llama.config._attn_implementation == "sdpa"
    assert set(vars(llama)) == before
    assert torch.equal(stock, answer(llama, prompts(30)[0]))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_model_is_left_as_it_was_after_an_exception(llama, error):
    scores, _ = probe(llama)

    def fail(*_):
        assert llama.config._attn_implementation == "razor_probe"
        raise error("halfway")

    hook = llama.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(error, match="halfway"):
        probe(llama)
    hook.remove()
    assert llama.config._attn_implementation == "sdpa"
    assert torch.equal(scores.echo, probe(llama)[0].echo)


def test_find_heads_inside_attach(llama):
    scores, _ = probe(llama)
    with attach(llama, MIXED):
        expected = answer(llama, prompts(40)[0])
        assert torch.equal(scores.echo, probe(llama)[0].echo)
        assert llama.config._attn_implementation == "razor"
        assert torch.equal(expected, answer(llama, prompts(40)[0]))
    with attach(llama, FULL_PLAN):
        assert not torch.equal(expected, answer(llama, prompts(40)[0]))


def test_progress_bar(llama, capsys):
    find_heads(llama, tokenizer(), period=3, repeats=2)
    assert "find_heads, 3 tokens x 2: 100%" in capsys.readouterr().err
    find_heads(llama, tokenizer(), period=3, repeats=2, progress=False)
    assert capsys.readouterr().err == ""


def test_prompt_longer_than_the_model_was_made_for():
    model = tiny_model("llama", max_position_embeddings=40)
    message = "period * repeats: expected at most 39 tokens for this model, got 40"
    with pytest.warns(UserWarning, match=exactly(message)):
        probe(model, period=20, repeats=2)
    probe(model, period=13, repeats=3)  # 40 tokens fit; a warning would be an error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"period": 0}, "period: expected an integer >= 1, got 0"),
        ({"repeats": 1}, "repeats: expected an integer >= 2, got 1"),
        ({"seed": -1}, "seed: expected an integer >= 0, got -1"),
    ],
)
def test_bad_arguments(llama, options, message):
    with pytest.raises(ValueError, match=exactly(message)):
        find_heads(llama, tokenizer(), **{"period": 5, "repeats": 2} | options)
    assert llama.config._attn_implementation == "sdpa"


def test_vocabulary_of_special_tokens_only():
    model = tiny_model("llama", vocab_size=len(SPECIAL))
    with pytest.raises(ValueError, match="for 'A' below 4, got id 4"):
        find_heads(model, tokenizer(), period=5, repeats=2)


@pytest.mark.parametrize("words", [{"b": 0, "c": 1}, {"b": 0, "c": 1, "A": 200}], ids=["none", "beyond the model's"])
def test_tokenizer_without_a_prefix_for_this_model(llama, words):
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(words, [])))
    with pytest.raises(ValueError, match=r"expected .*, got "):
        find_heads(llama, made, period=5, repeats=2, progress=False)


@pytest.mark.parametrize("kind", ["safetensors", "safetensors shards", "bin", "bin shards"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_files_give_what_memory_gives(tmp_path, family, kind):
    model = shared_model(family)
    save(model, tmp_path / "model", kind)
    tokenizer().save_pretrained(tmp_path / "model")
    wanted = find_heads(model, tokenizer(), period=PERIOD, progress=False)
    for found in (
        find_heads(tmp_path / "model", period=PERIOD, progress=False),
        find_heads(str(tmp_path / "model"), tokenizer(), period=PERIOD, progress=False),
    ):
        assert found.echo.equal(wanted.echo)
        assert found.induction.equal(wanted.induction)


def test_folders_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match=exactly(f"model: expected a folder with config.json, got {tmp_path}")):
        find_heads(tmp_path, tokenizer())
    (tmp_path / "config.json").write_text('{"model_type": "bloom"}')
    with pytest.raises(ValueError, match=r"^model: expected one with rotary positions, got bloom, which uses ALiBi; "):
        find_heads(tmp_path, tokenizer())
    (tmp_path / "config.json").write_text('{"model_type": "own"}')
    message = f"model: expected a model_type that transformers knows, got own in {tmp_path}"
    with pytest.raises(ValueError, match=exactly(message)):
        find_heads(tmp_path, tokenizer())
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 32}')
    with pytest.raises(ValueError, match=r"^model: expected a checkpoint in "):
        find_heads(tmp_path, tokenizer())


def test_models_that_are_refused():
    bloom = BloomForCausalLM._from_config(BloomConfig(vocab_size=VOCABULARY, hidden_size=48, n_layer=2, n_head=3))
    message = (
        "model: expected one with rotary positions, got bloom, which uses ALiBi; its windows are found by find_windows"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        find_heads(bloom, tokenizer(), period=5, repeats=2, progress=False)
    sliding = tiny_model("mistral", sliding_window=16)
    with pytest.raises(NotImplementedError, match="expected only full_attention layers, got sliding_attention"):
        find_heads(sliding, tokenizer(), period=5, repeats=2, progress=False)
    noisy = tiny_model("llama", attention_dropout=0.5).train()
    with pytest.raises(NotImplementedError, match=exactly("dropout: expected 0, got 0.5; call model.eval() first")):
        find_heads(noisy, tokenizer(), period=5, repeats=2, progress=False)
    assert noisy.config._attn_implementation == "sdpa"


MEMORY = """
import resource
import torch
from razor_attention import find_heads
from test_find_heads import tokenizer
from tiny_models import tiny_model

torch.set_num_threads(1)
model, words = tiny_model("llama"), tokenizer()
find_heads(model, words, period=100, repeats=4, progress=False)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
find_heads(model, words, period=1000, repeats=4, progress=False)
print("kibibytes", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kibibytes on Linux alone")
def test_no_attention_map_is_built(request):
    command = [sys.executable, "-c", MEMORY]
    run = subprocess.run(command, cwd=request.path.parent, check=True, capture_output=True, text=True)
    grown = 1024 * int(re.search(r"kibibytes (\d+)", run.stdout)[1])
    one_map = 4001**2 * 4
    assert grown < one_map / 2 < one_map * SIZES["num_attention_heads"]
