# SPDX-License-Identifier: Apache-2.0
"""hf/gates.py and hf/passkeys.py: what is optimised, that nothing else changes, resuming, and the data."""

import itertools
import json
import random
import re

import pytest
import torch
from razor_attention.bench.gates import question_samples
from razor_attention.bench.questions import build_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedTokenizerFast

from razor_attention import Plan, cli, duo, find_heads
from razor_attention.duo import passkey_samples, read_samples, train_gates
from razor_attention.hf import gates as module
from razor_attention.hf.gates import windowed_attention
from razor_attention.hf.names import CACHE
from tiny_models import KV_HEADS, LAYERS, alibi_model, masked, prompts, shared_model, tiny_model

SINKS, WINDOW = 2, 8
OPTIONS = {"sink_size": SINKS, "window_size": WINDOW, "progress": False}


def exactly(message):
    return f"^{re.escape(message)}\\Z"


def samples(count=1000, length=60):
    """Random texts; the last ten tokens are asked."""
    for number in range(count):
        ids = prompts(length, seed=number)[0][0]
        yield ids, torch.arange(length) >= length - 10


def weights(model):
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def condition(model):
    """What training must leave as it was, beside the weights."""
    return (
        [weight.requires_grad for weight in model.parameters()],
        [part.training for part in model.modules()],
        [set(vars(part)) for part in model.modules()],
        model.config._attn_implementation,
    )


# --- attention


@pytest.mark.parametrize("tokens", [1, 7, 256, 257, 700])
@pytest.mark.parametrize(("sink_size", "window_size"), [(0, 1), (3, 5), (4, 300), (300, 20), (0, 1000), (600, 1)])
def test_windowed_attention_is_masked_attention(tokens, sink_size, window_size):
    query, key, value = (torch.randn(2, heads, tokens, 8, dtype=torch.float64) for heads in (4, 2, 2))
    at = torch.arange(tokens)
    here = at[:, None]
    seen = (at <= here) & ((at < sink_size) | (here - at < window_size))
    logits = (query.unflatten(1, (2, 2)) @ key[:, :, None].transpose(-1, -2)) * 0.7
    wanted = logits.masked_fill(~seen, -torch.inf).softmax(-1) @ value[:, :, None]
    got = windowed_attention(query, key, value, sink_size, window_size, 0.7)
    torch.testing.assert_close(got, wanted.flatten(1, 2), atol=1e-12, rtol=1e-12)


def hidden(model, ids):
    return model.model(ids[None], **{CACHE: DynamicCache()}).last_hidden_state[0]


@torch.no_grad()
@pytest.mark.parametrize("table", [[[0, 0, 0], [0, 0, 0]], [[1, 0, 1], [0, 1, 0]], [[1, 1, 1], [1, 1, 1]]])
def test_gates_of_zeros_and_ones_are_a_plan(table):
    """The distillation loss of such gates, from the masked model of the tests that shares nothing but the plan."""
    model, (ids, asked) = shared_model("llama"), next(samples())
    gates = torch.tensor(table).float()
    plan = Plan.from_gates(gates, threshold=0.5, sink_size=SINKS, window_size=WINDOW)
    with masked(model, plan, prefill="streaming"):
        mixed = hidden(model, ids)
    wanted = (mixed - hidden(model, ids))[asked].square().mean()
    run = module._Run(gates, SINKS, WINDOW)
    with module._frozen(model, run, recompute=False), module.AttentionSwitch(model, "razor_gates"):
        got = module._distillation(model, run, ids, asked)
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-3)
    assert (got > 1e-4) == (gates.min() == 0)


def test_gradient_is_that_of_differences():
    model, (ids, asked) = tiny_model("llama", dtype=torch.float64), next(samples())
    gates = torch.full((LAYERS, KV_HEADS), 0.6, requires_grad=True)
    run = module._Run(gates.double(), SINKS, WINDOW)
    with module._frozen(model, run, recompute=False), module.AttentionSwitch(model, "razor_gates"):

        def loss(values):
            run.gates = values
            return module._distillation(model, run, ids, asked)

        values = torch.rand(LAYERS, KV_HEADS, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(loss(values), values)
        for place in itertools.product(range(LAYERS), range(KV_HEADS)):
            step = torch.zeros_like(values)
            step[place] = 1e-3
            difference = (loss(values + step) - loss(values - step)).item() / 2e-3
            assert gradient[place].item() == pytest.approx(difference, rel=0.02, abs=1e-6)


# --- training


def test_training_lowers_the_loss_and_changes_gates_alone():
    model = tiny_model("llama").train()
    model.lm_head.requires_grad_(False)
    before, stood = weights(model), condition(model)
    trained = train_gates(model, samples=itertools.repeat(next(samples())), steps=40, l1=2.0, **OPTIONS)
    assert trained.gates.shape == (LAYERS, KV_HEADS)
    assert 0 <= trained.gates.min() < 0.9
    assert trained.gates.max() <= 1
    loss = trained.losses @ torch.tensor([1.0, 2.0])
    assert trained.losses[0].tolist() == [0, 1]  # all full: nothing to distil
    assert loss[-1] < 0.97 * loss[0]
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert condition(model) == stood
    assert all(weight.grad is None for weight in model.parameters())
    assert trained.provenance["steps"] == 40
    again = train_gates(model, samples=itertools.repeat(next(samples())), steps=40, l1=2.0, **OPTIONS)
    assert torch.equal(again.gates, trained.gates)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_families_and_dtypes(family, dtype):
    model = tiny_model(family, dtype=dtype)
    trained = train_gates(model, samples=samples(), steps=3, **OPTIONS)
    assert trained.losses.isfinite().all()
    assert (trained.gates < 1).any()
    assert trained.gates.dtype == torch.float32


def test_the_rate_rises_and_falls():
    rates = []
    state = module._State.begin(torch.ones(1, 2), {"steps": 20, "learning_rate": 0.5, "l1": 1.0})
    for _ in range(20):
        state.descend(torch.tensor(0.0))
        rates.append(state.optimizer.param_groups[0]["lr"] / 0.5)
    assert rates == pytest.approx([0.25, 0.5, 0.75, *[1.0] * 14, 0.75, 0.5, 0.25])
    assert torch.equal(state.gates, torch.zeros(1, 2))  # and not below
    state = module._State.begin(torch.full((1, 2), 0.9), {"steps": 2, "learning_rate": 0.5, "l1": 0.0})
    state.descend(-state.gates.sum())
    assert torch.equal(state.gates, torch.ones(1, 2))  # nor above


def test_recompute_gives_the_same():
    model = tiny_model("llama").train()
    stood, before = condition(model), weights(model)
    calls = []
    hook = model.model.layers[1].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    kept = train_gates(model, samples=samples(), steps=5, **OPTIONS)
    assert len(calls) == 2 * 5  # full and mixed
    again = train_gates(model, samples=samples(), steps=5, recompute=True, **OPTIONS)
    assert len(calls) == 5 * 5  # and mixed once more on the way back
    hook.remove()
    torch.testing.assert_close(again.gates, kept.gates)
    torch.testing.assert_close(again.losses, kept.losses)
    assert condition(model) == stood
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def stopping(count, error):
    yield from samples(count)
    raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_resuming_equals_an_uninterrupted_run(tmp_path, monkeypatch, error):
    model, file = tiny_model("llama"), tmp_path / "training.pt"
    whole = train_gates(model, samples=samples(), steps=9, **OPTIONS)
    monkeypatch.setattr(module, "_SAVE_EVERY", 2)
    stood, before = condition(model), weights(model)
    for stop in (3, 8):  # twice: after 3 steps, of which 2 are kept, and after 8 of them
        with pytest.raises(error):
            train_gates(model, samples=stopping(stop, error), steps=9, checkpoint=file, **OPTIONS)
        assert condition(model) == stood
        assert torch.load(file, weights_only=True)["step"] == stop - stop % 2
    resumed = train_gates(model, samples=samples(), steps=9, checkpoint=file, **OPTIONS)
    assert torch.equal(resumed.gates, whole.gates)
    assert torch.equal(resumed.losses, whole.losses)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    done = train_gates(model, samples=[], steps=9, checkpoint=file, **OPTIONS)  # nothing left to do
    assert torch.equal(done.gates, whole.gates)
    assert [path.name for path in tmp_path.iterdir()] == ["training.pt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_in_a_layer_leaves_the_model_as_it_was(error):
    model = tiny_model("llama")
    stood, (ids, _) = condition(model), next(samples())
    stock = model(ids[None]).logits

    def fail(*_):
        raise error("halfway")

    for recompute in (False, True):
        hook = model.model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(error, match="halfway"):
            train_gates(model, samples=samples(), recompute=recompute, **OPTIONS)
        hook.remove()
        assert condition(model) == stood
        assert torch.equal(model(ids[None]).logits, stock)


def test_shipped_model_needs_its_retrieval_heads():
    """A few steps are enough for gates to tell layer 1, where all of its retrieval heads are, from the others."""
    folder = module.Path(__file__).parents[1] / "bench/model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    source = question_samples(tokenizer, 200, 300, seed=0)
    trained = train_gates(model, samples=source, sink_size=4, window_size=32, steps=30, progress=False)
    assert trained.gates[1].min() > 0.85
    assert trained.gates[[0, 2, 3]].max() < trained.gates[1].min() - 0.1


def test_training_an_enabled_model(tmp_path):
    """The gates are those of the model itself, and it stays enabled."""
    model = tiny_model("llama")
    wanted = train_gates(model, samples=samples(), steps=2, **OPTIONS)
    duo.enable_duo_attention_eval(model, torch.zeros(LAYERS, KV_HEADS), 1, 2)
    assert torch.equal(train_gates(model, samples=samples(), steps=2, **OPTIONS).gates, wanted.gates)
    assert model.config._attn_implementation == "razor"
    wanted.save(tmp_path / "duo")
    gates, *sizes = duo.load_attn_pattern(tmp_path / "duo")
    assert torch.equal(torch.from_numpy(gates).float(), wanted.gates)
    assert sizes == [SINKS, WINDOW]
    assert json.loads((tmp_path / "duo/config.json").read_text())["method"] == "trained gates"


SAMPLE = next(samples())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "text, samples: expected exactly one of the two, got neither"),
        ({"samples": [], "text": "a"}, ValueError, "text, samples: expected exactly one of the two, got both"),
        ({"text": "a"}, TypeError, "tokenizer: expected one with a text, got None"),
        ({"samples": [SAMPLE], "steps": 0}, ValueError, "steps: expected an integer >= 1, got 0"),
        ({"samples": [SAMPLE], "window_size": 0}, ValueError, "window_size: expected an integer >= 1, got 0"),
        ({"samples": [SAMPLE], "learning_rate": 0}, ValueError, "learning_rate: expected a number > 0, got 0"),
        ({"samples": [SAMPLE], "l1": -1.0}, ValueError, "l1: expected a number >= 0, got -1.0"),
        ({"samples": [SAMPLE], "l1": "x"}, TypeError, "l1: expected a number, got 'x'"),
        ({"samples": [SAMPLE], "steps": 2}, ValueError, "samples: expected one for each step, got 1"),
        ({"samples": [7]}, TypeError, "samples[0]: expected token ids and bools, got int"),
        ({"samples": [([1, 2], [True])]}, ValueError,
         "samples[0]: expected (tokens) int64 and (tokens) bool, got [2] torch.int64 and [1] torch.bool"),
        ({"samples": [([1, 2], [False] * 2)]}, ValueError,
         "samples[0]: expected at least one asked token, got none"),
        ({"samples": [([1, 96], [True] * 2)]}, ValueError, "samples[0]: expected ids from 0 to 95, got 1 to 96"),
    ],
)  # fmt: skip
def test_training_refuses(options, error, message):
    model = shared_model("llama")
    stood = condition(model)
    with pytest.raises(error, match=exactly(message)):
        train_gates(model, **OPTIONS | options)
    assert condition(model) == stood


def test_training_refuses_models_and_checkpoints(tmp_path):
    with pytest.raises(NotImplementedError, match="model: expected one with rotary positions, got bloom, which uses"):
        train_gates(alibi_model("bloom"), samples=samples(), **OPTIONS)
    model = tiny_model("llama")
    model.set_attn_implementation("razor_gates")
    with pytest.raises(ValueError, match="expected 'razor_gates' inside train_gates alone"):
        model(SAMPLE[0][None])
    model, file = shared_model("llama"), tmp_path / "training.pt"
    train_gates(model, samples=samples(), steps=1, checkpoint=file, **OPTIONS)
    wanted = "checkpoint: expected one of this run with steps 2, got 1"
    with pytest.raises(ValueError, match=exactly(wanted)):
        train_gates(model, samples=samples(), steps=2, checkpoint=file, **OPTIONS)
    nowhere = tmp_path / "no/training.pt"
    with pytest.raises(ValueError, match=exactly(f"checkpoint: expected a file in an existing folder, got {nowhere}")):
        train_gates(model, samples=samples(), steps=1, checkpoint=nowhere, **OPTIONS)
    more = tiny_model("llama", num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"checkpoint: expected gates of shape \[3, 3\], got \[2, 3\]"):
        train_gates(more, samples=samples(), steps=1, checkpoint=file, **OPTIONS)
    for content in (b"", b"nothing", None):
        file.write_bytes(content or b"")
        if content is None:
            torch.save([1], file)
        with pytest.raises(ValueError, match="checkpoint: expected a file that train_gates wrote, got "):
            train_gates(model, samples=samples(), steps=1, checkpoint=file, **OPTIONS)


# --- data


@pytest.fixture(scope="module")
def bytewise():
    """A tokenizer that knows every byte, and no special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={sign: i for i, sign in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


STORY = "It was a dark and stormy night; the rain fell in torrents. " * 20


def test_passkeys_are_hidden_and_asked_for(bytewise):
    made = list(itertools.islice(passkey_samples(bytewise, STORY, shortest=2000, longest=9000, words=4), 6))
    assert len({len(ids) for ids, _ in made}) > 3
    depths = []
    for ids, asked in made:
        text = bytewise.decode(ids)
        hidden = re.findall(r"Passkey number (\d+) is: ([a-z ]+\.)\n", text)
        asks = re.findall(r"What is passkey number (\d+)\? It is:( [a-z ]+\.)", text)
        assert [number for number, _ in hidden] == [str(i + 1) for i in range(10)]
        assert [(number, key.strip()) for number, key in asks] == hidden
        assert all(len(key.split()) == 4 for _, key in hidden)
        assert bytewise.decode([i for i, a in zip(ids, asked, strict=True) if a]) == "".join(key for _, key in asks)
        depths += [found.start() / text.index("\nWhat is") for found in re.finditer("Passkey number", text)]
    assert min(depths) > 0.04
    assert max(depths) < 0.96
    assert max(depths) - min(depths) > 0.7
    later = passkey_samples(bytewise, STORY, shortest=2000, longest=9000, words=4, start=4)
    assert [next(later), next(later)] == made[4:]
    other = passkey_samples(bytewise, STORY, shortest=2000, longest=9000, words=4, seed=1)
    assert next(other) != made[0]


def test_passkeys_keep_to_the_limit(bytewise):
    few = {"passkeys": 2, "words": 3}
    for ids, asked in itertools.islice(passkey_samples(bytewise, STORY, limit=500, **few), 5):
        assert len(ids) == len(asked) == 500
    with pytest.raises(ValueError, match=r"limit: expected more than \d+ tokens for 2 passkeys, got 100\Z"):
        next(passkey_samples(bytewise, STORY, limit=100, **few))
    with pytest.raises(ValueError, match=exactly("shortest: expected 1..longest = 5 tokens, got 9")):
        passkey_samples(bytewise, STORY, shortest=9, longest=5)
    with pytest.raises(ValueError, match=exactly("text: expected at least one token, got none")):
        passkey_samples(bytewise, "")
    with pytest.raises(ValueError, match=exactly("passkeys, words: expected integers >= 1, got 0 and 32")):
        passkey_samples(bytewise, STORY, passkeys=0)
    with pytest.raises(ValueError, match="tokenizer: expected one that knows the words of passkeys, got unknown"):
        passkey_samples(build_tokenizer(), STORY)


def test_training_on_passkeys(bytewise, monkeypatch, tmp_path):
    """A text instead of samples: passkeys up to the model's length, and resuming draws the same ones."""
    model = tiny_model("llama", vocab_size=256, max_position_embeddings=1000)
    small = {"passkeys": 2, "words": 3, "longest": 1500}
    made = module.passkey_samples
    monkeypatch.setattr(module, "passkey_samples", lambda *given, **options: made(*given, **small | options))
    whole = train_gates(model, bytewise, text=STORY, steps=3, seed=5, **OPTIONS)
    again = made(bytewise, STORY, limit=1000, seed=5, **small)
    assert torch.equal(train_gates(model, samples=again, steps=3, **OPTIONS).gates, whole.gates)
    assert whole.provenance["samples"] == "passkeys"
    assert whole.provenance["seed"] == 5
    file = tmp_path / "training.pt"
    train_gates(model, bytewise, text=STORY, steps=3, seed=5, checkpoint=file, **OPTIONS)
    with pytest.raises(ValueError, match=exactly("checkpoint: expected one of this run with seed 6, got 5")):
        train_gates(model, bytewise, text=STORY, steps=3, seed=6, checkpoint=file, **OPTIONS)


def test_prompts_and_answers_from_a_file(tmp_path):
    tokenizer, file = build_tokenizer(), tmp_path / "asked.jsonl"
    file.write_text('{"prompt": "mia hid lamp . ? mia hid", "answer": "lamp rope"}\n{"prompt": "zoe", "answer": "."}\n')
    source = read_samples(file, tokenizer)
    first, second, third = next(source), next(source), next(source)
    assert tokenizer.decode(first.ids) == "<bos> mia hid lamp . ? mia hid lamp"
    assert first.asked == [False] * 7 + [True, True]
    assert second.asked == [False, True]
    assert third == first
    for text, got in (
        ("", r"in each line, got an empty file"),
        ('{"prompt": "a"}\n', r"in line 1, got KeyError\('answer'\)"),
        ("[1]\n", r"in line 1, got TypeError\("),
        ("?\n", r"in line 1, got JSONDecodeError\("),
        ('{"prompt": "a", "answer": ""}\n', "in line 1, got an empty one"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=rf"asked.jsonl: expected a prompt and an answer {got}"):
            read_samples(file, tokenizer)


def test_command(tmp_path, capsys, monkeypatch):
    model, tokenizer = tiny_model("llama", vocab_size=len(build_tokenizer())), build_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    draw = random.Random(0)
    lines = [
        {"prompt": " ".join(draw.choices(["mia", "hid", "lamp", "rope"], k=40)), "answer": "lamp rope"}
        for _ in range(4)
    ]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, lines)))
    line = "gates model --samples asked.jsonl --out duo --steps 6 --sink-size 2 --window-size 8 --checkpoint run.pt"
    assert cli.main(line.split()) == 0
    out = capsys.readouterr().out
    assert "wrote duo; next: razor plan --gates duo" in out
    gates, *sizes = duo.load_attn_pattern("duo")
    assert gates.shape == (LAYERS, KV_HEADS)
    assert sizes == [2, 8]
    direct = train_gates(
        AutoModelForCausalLM.from_pretrained("model"),
        samples=read_samples(tmp_path / "asked.jsonl", tokenizer),
        steps=6,
        **OPTIONS,
    )
    assert torch.equal(torch.from_numpy(gates).float(), direct.gates)
    assert cli.main(["plan", "--gates", "duo/full_attention_heads.tsv", "--out", "plan.json"]) == 0
    sizes = {"sink_size": direct.sink_size, "window_size": direct.window_size}  # the folder has them
    assert Plan.load("plan.json") == Plan.from_gates(direct.gates, sparsity=0.5, **sizes)
    assert cli.main(line.replace("--out duo", "--out no/duo").split()) == 2
    assert "--out: expected a folder in an existing folder, got 'no/duo'" in capsys.readouterr().err
    assert cli.main(line.replace("--steps 6", "--steps 7").split()) == 2
    assert "checkpoint: expected one of this run with steps 7, got 6" in capsys.readouterr().err
    assert cli.main(["gates", "model", "--text", "asked.jsonl"]) == 2  # the demo's words have no passkeys
    assert "tokenizer: expected one that knows the words of passkeys" in capsys.readouterr().err


def test_scores_and_gates_agree_where_they_must():
    """find_heads still sees the model itself while DuoAttention is enabled."""
    model, tokenizer = tiny_model("llama", vocab_size=len(build_tokenizer())), build_tokenizer()
    wanted = find_heads(model, tokenizer, period=20, repeats=2, progress=False)
    duo.enable_duo_attention_eval(model, torch.zeros(LAYERS, KV_HEADS), 1, 2)
    got = find_heads(model, tokenizer, period=20, repeats=2, progress=False)
    assert torch.equal(got.induction, wanted.induction)
