# SPDX-License-Identifier: Apache-2.0
"""`razor eval`: questions are right by construction, methods hold equal bytes, results are appended and found again."""

import contextlib
import json
import random
import re
import sys
import types
from dataclasses import replace

import pytest
import torch
from razor_attention.bench import methods as bench_methods
from razor_attention.bench import questions
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from razor_attention import FULL, HeadScores, Plan
from razor_attention.hf.eval import (
    FIELDS,
    TASKS,
    Row,
    Settings,
    TaskFile,
    evaluate,
    make_methods,
    read_rows,
    summary,
    wilson,
)
from razor_attention.hf.eval import evaluate as evaluate_function
from razor_attention.hf.eval.methods import ranked, widen
from razor_attention.hf.eval.reader import PAGE_SIZE, Press, Reader, answer, read_prefix
from razor_attention.hf.eval.results import append_row
from razor_attention.hf.eval.tasks import COPIED_WORDS, ENGLISH, HOPS, START_WORDS, TURNS, Writer, is_right
from razor_attention.hf.models import geometry, load_model
from razor_attention.hf.names import CACHE
from tiny_models import KV_HEADS, LAYERS, MIXED, SIZES, tiny_model

MODEL = bench_methods.MODEL
TINY = TaskFile.load(bench_methods.TASK_FILE)
HEADER = "model,task,length,depth,method,budget,seed,samples,n,correct,accuracy,low,high,perplexity,kv_bytes,seconds"
evaluating = sys.modules[evaluate_function.__module__]


def english_tokenizer():
    """A byte-level BPE tokenizer with a BOS, trained on the sentences that it will see."""
    rng = random.Random(0)
    lines = [ENGLISH.write(rng.choice(ENGLISH.filler), rng) for _ in range(300)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


@pytest.fixture(scope="module")
def writers():
    return {"english": Writer(english_tokenizer(), ENGLISH), "tiny": Writer(questions.build_tokenizer(), TINY)}


@pytest.fixture(scope="module")
def shipped():
    return load_model(MODEL, "auto")


def text_of(writer, ids):
    return writer.tokenizer.decode(ids, skip_special_tokens=True)


# --- tasks

CASES = [(name, task) for name in ("english", "tiny") for task in TASKS if (name, task) != ("tiny", "tracking")]


@pytest.mark.parametrize(("name", "task"), CASES)
@pytest.mark.parametrize("depth", [0.0, 0.4, 1.0])
def test_a_sample_is_exact_in_length_and_depth(writers, name, task, depth):
    writer, length = writers[name], 1500
    sample = writer.sample(task, length, depth, "0")
    assert len(sample.context) + len(sample.turns[0].ids) == length
    assert sample.context[0] == writer.tokenizer.bos_token_id
    assert writer.tokenizer.bos_token_id not in sample.context[1:]
    start = round(sample.depth * (length - 1))
    longest = max(len(writer.ids(sentence)) for sentence in re.split(r"(?<=\.) ", text_of(writer, sample.context)))
    said = {"copy": "passage"}.get(task, "needle")
    pattern = re.sub(r"\\{(\w+)\\}", ".+?", re.escape(getattr(writer.language, said)))
    assert re.match(pattern, text_of(writer, sample.context[start:]).strip())
    room = length - len(sample.turns[0].ids) - longest  # as far as a sentence can start
    assert abs(start - depth * room) <= 2 * longest
    assert sample == writer.sample(task, length, depth, "0")
    assert sample != writer.sample(task, length, depth, "1")


def facts_of(writer, text):
    """(key, value) of all needles in a text, in the order of the text."""
    words = {name: f"(?:{'|'.join(some)})" for name, some in writer.language.words.items()}
    parts = {part: f"({getattr(writer.language, part).format(**words)})" for part in ("key", "value")}
    return re.findall(writer.language.needle.replace(".", r"\.").format(**parts), text)


@pytest.mark.parametrize("name", ["english", "tiny"])
@pytest.mark.parametrize("task", ["needle", "multikey", "multiturn"])
def test_answers_stand_in_the_context_once(writers, name, task):
    writer = writers[name]
    for number in range(3):
        sample = writer.sample(task, 2000, None, f"{number}")
        text = text_of(writer, sample.context)
        found = facts_of(writer, text)
        assert len(found) == len(dict(found)) == len({value for _, value in found})
        assert len(found) == 1 if task == "needle" else len(found) > 4
        asked = [next(key for key in dict(found) if key in text_of(writer, turn.ids)) for turn in sample.turns]
        assert len(set(asked)) == len(asked) == (TURNS if task == "multiturn" else 1)
        for key, turn in zip(asked, sample.turns, strict=True):
            assert dict(found)[key] == turn.answer
            assert text.count(turn.answer) == 1
            assert turn.answer not in text_of(writer, turn.ids)
            assert turn.limit >= len(writer.ids(f" {turn.answer}"))


def test_facts_share_no_two_neighbouring_words(writers):
    text = text_of(writers["tiny"], writers["tiny"].sample("multikey", 4096, None, "0").context)
    facts = [pair for fact in facts_of(writers["tiny"], text) for part in fact for pair in zip(
        part.split(), part.split()[1:], strict=False)]  # fmt: skip
    assert len(facts) == len(set(facts)) > 200


def test_a_tracked_value_is_found_over_links_alone(writers):
    for number in range(3):
        sample = writers["english"].sample("tracking", 2000, None, f"{number}")
        text = text_of(writers["english"], sample.context)
        links = dict(re.findall(r"of the (\w+ \w+) is the same as that of the (\w+ \w+)", text))
        values = dict(facts_of(writers["english"], re.sub(r"is the same[^.]*", "", text)))
        (key,) = {one for one in links if one in text_of(writers["english"], sample.turns[0].ids)}
        places = []
        for _ in range(HOPS):
            places.append(text.index(f"{key} is the same"))
            key = links[key]
        assert values[key] == sample.turns[0].answer
        assert sorted(places, reverse=True) == places  # said in order
        assert text.index(f"{key} is {values[key]}") < places[-1]
        assert len(set(values.values())) == len(values) == 4


@pytest.mark.parametrize("name", ["english", "tiny"])
def test_a_passage_goes_on_in_one_place_only(writers, name):
    sample = writers[name].sample("copy", 2000, None, "0")
    turn, text = sample.turns[0], text_of(writers[name], sample.context)
    start = " ".join(text_of(writers[name], turn.ids).split()[-START_WORDS:])
    assert text.count(start) == 1
    assert text.split(start)[1].strip().startswith(turn.answer)
    assert len(turn.answer.split()) == COPIED_WORDS


def test_right_answers():
    assert is_right(" 123456. And", "123456")
    assert is_right("lamp  rope\ncoin", "lamp rope coin")
    assert not is_right("1234567", "123456")
    assert not is_right("lamp coin rope", "lamp rope")


def test_the_task_file_of_the_shipped_models_speaks_their_language():
    assert {word for words in TINY.words.values() for word in words} < set(questions.WORDS)
    lists = (questions.NAMES, questions.VERBS, questions.THINGS, questions.ADJECTIVES, questions.NOUNS)
    names = ("name", "verb", "thing", "adjective", "noun")
    assert [tuple(TINY.words[name]) for name in names] == list(lists)


def test_task_file_errors(tmp_path, writers):
    path = tmp_path / "t.json"
    good = json.loads(bench_methods.TASK_FILE.read_text())
    for change, message in [
        ({"filler": "the wind ."}, "t.json: filler: expected a list of strings, got 'the wind .'"),
        ({"key": "{nome}"}, "t.json: key: expected names of word lists, got 'nome'"),
        ({"slack": -1}, "t.json: slack: expected an integer >= 0, got -1"),
        ({"words": {"name": []}}, "t.json: name: expected a list of strings, got []"),
    ]:
        path.write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            TaskFile.load(path)
    with pytest.raises(ValueError, match=r"^task file: expected words that the tokenizer knows, got '[A-Z]"):
        Writer(writers["tiny"].tokenizer, ENGLISH).sample("needle", 500, None, "0")
    with pytest.raises(ValueError, match=r"^length: expected at least \d+ tokens for this task, got 30$"):
        writers["tiny"].sample("copy", 30, None, "0")
    few = replace(TINY, words=TINY.words | {"name": ["ada"], "verb": ["hid"]})
    with pytest.raises(ValueError, match=r"^task file: expected more words to draw from, got two texts like 'ada hid'"):
        Writer(writers["tiny"].tokenizer, few).sample("multikey", 1000, None, "0")


# --- methods


def test_gates_become_a_ranking():
    assert ranked(torch.tensor([[0.1, 0.9], [0.5, 0.9]])).tolist() == [[3, 0], [2, 1]]


@pytest.mark.parametrize("budget", [0.2, 0.37, 0.8])
@pytest.mark.parametrize("length", [300, 513])
def test_all_methods_hold_the_budget_as_measured(monkeypatch, budget, length):
    """To within one page of every head; kvpress's stand-in to within one row."""
    monkeypatch.setitem(sys.modules, "kvpress", fake_kvpress())
    model = tiny_model("llama")
    scores = HeadScores(torch.rand(LAYERS, 6), torch.rand(LAYERS, 6), KV_HEADS)
    names = ["streaming", "random", "razor", "razor-uncompensated", "razor-echo", "duo=x", "snapkv", "snapkv-asked"]
    methods = make_methods(
        names, geometry(model.config), torch.float32, scores=lambda: scores,
        gates=lambda _: (torch.rand(LAYERS, KV_HEADS), 2, 20), window_size=20,
    )  # fmt: skip
    assert [method.name for method in methods] == [
        "streaming", "random-0", "random-1", "random-2", "razor", "razor-uncompensated", "razor-echo", "duo", "snapkv",
        "snapkv-asked",
    ]  # fmt: skip
    ids = torch.randint(2, SIZES["vocab_size"], (length,)).tolist()
    with Reader(model, None) as reader:
        reader.read(ids)
        whole = reader.nbytes
    heads, row = LAYERS * KV_HEADS, whole // length // (LAYERS * KV_HEADS)
    for method in methods:
        way = method.way(length, budget, 0 if method.sees_question else 7)
        with Reader(model, way) as reader:
            if method.sees_question:
                reader.read(ids)
            else:
                reader.read(ids[:-7])
                reader.read(ids[-7:])
            slack = row * heads * (1 if isinstance(way, Press) else PAGE_SIZE)
            most = Plan.full(LAYERS, KV_HEADS).kv_bytes(length, head_dim=16, dtype=torch.float32, page_size=PAGE_SIZE)
            assert budget * whole - slack < reader.nbytes <= budget * most
            if isinstance(way, Plan):
                assert reader.nbytes == way.kv_bytes(length, head_dim=16, dtype=torch.float32, page_size=PAGE_SIZE)


def test_widen_is_the_widest():
    plan = Plan([[0, 2]], [[FULL, 5]], [[False, True]])
    wide = widen(plan, 0.75, 1000, torch.float32)
    sizes = {"head_dim": 1, "dtype": torch.float32, "page_size": PAGE_SIZE}
    whole = Plan.full(1, 2).kv_bytes(1000, **sizes)
    wider = Plan([[0, 2]], wide.window_size + torch.tensor([[0, 1]]).masked_fill(wide.is_full, 0), [[False, True]])
    assert wide.kv_bytes(1000, **sizes) <= 0.75 * whole < wider.kv_bytes(1000, **sizes)
    assert wide.is_full.tolist() == [[True, False]]
    exact = widen(Plan.streaming(1, 1, 4, 1), 0.25, 1024, torch.float32)  # pages of 16 rows, used to the last one
    assert exact == Plan.streaming(1, 1, 4, 252)
    with pytest.raises(
        ValueError, match=r"^budget: expected at least 0.509, the smallest share at 1000 tokens, got 0.5$"
    ):
        widen(plan, 0.5, 1000, torch.float32)


def test_method_errors(tmp_path):
    model = tiny_model("llama")
    options = {"scores": lambda: None, "gates": lambda _: None}
    for name in ("h2o", "duo", "plan", "razor=x", "snapkv=x"):
        with pytest.raises(ValueError, match=f"^methods: expected some of full, streaming, .*, got {name!r}$"):
            make_methods([name], geometry(model.config), torch.float32, **options)
    Plan.full(9, 9).save(tmp_path / "p.json")
    with pytest.raises(ValueError, match=r"^plan: expected 2 layers x 3 kv heads like the model, got 9 x 9$"):
        make_methods([f"plan={tmp_path / 'p.json'}"], geometry(model.config), torch.float32, **options)


def test_a_missing_kvpress_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "kvpress", None)
    message = r"^kvpress: expected to be installed for SnapKVPress, got "
    with Reader(tiny_model("llama"), Press("SnapKVPress", 3)) as reader, pytest.raises(ImportError, match=message):
        reader.read([5] * 10)


# --- readers


def fake_kvpress():
    """A module with a press of kvpress's kind: after the prompt it keeps the last tokens of every layer."""

    class SnapKVPress:
        def __init__(self, compression_ratio):
            self.ratio = compression_ratio

        @contextlib.contextmanager
        def __call__(self, model):
            def prune(module, _, given, output):
                layer, n = given[CACHE].layers[module.layer_idx], len(given["cache_position"])
                kept = max(1, int(n * (1 - self.ratio)))
                layer.keys, layer.values = layer.keys[:, :, -kept:], layer.values[:, :, -kept:]
                return output

            hooks = [one.self_attn.register_forward_hook(prune, with_kwargs=True) for one in model.model.layers]
            yield
            for hook in hooks:
                hook.remove()

    return types.SimpleNamespace(SnapKVPress=SnapKVPress)


def test_readers_agree_where_nothing_is_dropped(monkeypatch):
    monkeypatch.setitem(sys.modules, "kvpress", fake_kvpress())
    model = tiny_model("llama")
    ids = torch.randint(2, SIZES["vocab_size"], (60,)).tolist()
    found = []
    for way in (None, Plan.full(LAYERS, KV_HEADS), Press("SnapKVPress", 100), lambda _: contextlib.nullcontext()):
        with Reader(model, way) as reader:
            parts = [reader.read(ids[:50]), reader.read(ids[50:], every=True)]
            found.append((torch.cat(parts), answer(reader, parts[-1], 5, None)))
    for logits, said in found[1:]:
        torch.testing.assert_close(logits, found[0][0], rtol=1e-4, atol=1e-4)
        assert said == found[0][1]
    assert found[0][0].shape == (11, SIZES["vocab_size"])
    stop = found[0][1][1]
    with Reader(model, None) as reader:
        assert answer(reader, reader.read(ids), 5, stop)[-1] == stop or stop not in found[0][1]


def test_a_shared_prefix_is_a_dense_prefill():
    model = tiny_model("llama")
    ids = torch.randint(2, SIZES["vocab_size"], (90,)).tolist()
    prefix = read_prefix(model, ids[:80])
    assert prefix.tokens == 80
    for way in (MIXED, None):
        found = []
        for share in (True, False):
            with Reader(model, way) as reader:
                first = reader.start(prefix) if share else reader.read(ids[:80])
                found.append(torch.cat([first, reader.read(ids[80:], every=True), reader.read([7])]))
                found.append(torch.tensor(float(reader.nbytes)))
        torch.testing.assert_close(found[0], found[2], rtol=1e-4, atol=1e-4)
        assert found[1] == found[3]
        assert prefix.layers[0][0].shape[2] == 80  # no reader has added to it


def test_a_pruned_cache_keeps_counting_positions(monkeypatch):
    """Forgetting the first tokens is a window: the same as StreamingLLM without sinks, positions included."""
    monkeypatch.setitem(sys.modules, "kvpress", fake_kvpress())
    model = tiny_model("llama")
    ids = torch.randint(2, SIZES["vocab_size"], (64,)).tolist()
    logits = []
    for way in (Press("SnapKVPress", 20), Plan.streaming(LAYERS, KV_HEADS, 0, 20)):
        with Reader(model, way) as reader:
            reader.read(ids[:60])
            logits.append(reader.read(ids[60:]))
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)


# --- results


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"), [(8, 10, 0.490162, 0.943318), (0, 10, 0.0, 0.277533), (10, 10, 0.722467, 1.0),
                                      (81, 263, 0.2553, 0.3662)]
)  # fmt: skip
def test_wilson(correct, n, low, high):
    assert wilson(correct, n) == pytest.approx((low, high), abs=5e-5)


ROW = Row("m", "needle", 64, "0.5", "full", "", 0, 2, 2, 1, 0.5, 0.1, 0.9, "", 100, 1.5)


def test_rows_are_appended_and_read(tmp_path):
    path = tmp_path / "results.csv"
    assert read_rows(path) == []
    for number in range(3):
        append_row(path, ROW._replace(seed=number))
    assert path.read_text().splitlines()[0] == HEADER == ",".join(FIELDS)
    assert read_rows(path) == [ROW._replace(seed=number) for number in range(3)]
    whole = path.read_text()
    path.write_text(whole + "m,needle,64,0.")  # stopped while writing
    assert len(read_rows(path)) == 3
    assert path.read_text() == whole
    path.write_text("time,name\n1,2\n")
    with pytest.raises(ValueError, match=f"^results.csv: expected the columns {HEADER}, got time,name$"):
        read_rows(path)
    path.write_text(whole.replace("64", "many"))
    with pytest.raises(ValueError, match=r"^results.csv: expected rows like its columns, got "):
        read_rows(path)


def make(shipped, names, **policy):
    ranking = torch.arange(16).view(4, 4)
    induction = torch.where(ranking // 4 == 1, 1.0, 0.0).repeat_interleave(2, 1)  # the shipped model's retrieval layer
    scores = HeadScores(torch.zeros_like(induction), induction, 4)
    return make_methods(names, geometry(shipped[0].config), torch.float32, scores=lambda: scores,
                        gates=lambda _: None, window_size=12, **policy)  # fmt: skip


def test_evaluate_measures_and_goes_on(shipped, tmp_path, monkeypatch):
    text = " ".join(questions.text_words(random.Random(0), 700)[1:])
    settings = Settings(["needle", "multiturn", "perplexity"], [320], [0.4], 2, depths=2, text=text, task_file=TINY)
    methods = make(shipped, ["full", "streaming", "razor"])
    rows = evaluate(*shipped, methods, tmp_path, settings, progress=False)
    assert len(rows) == 3 * (2 + 1 + 1) == len(read_rows(tmp_path / "results.csv"))
    found = {(row.task, row.depth, row.method): row for row in rows}
    for method, early in (("full", 2), ("razor", 2), ("streaming", 0)):
        assert found["needle", "0", method].correct == early
        assert found["needle", "1", method].correct == 2  # right before the question
    assert found["multiturn", "any", "full"].n == 2 * TURNS
    assert found["multiturn", "any", "razor"].accuracy > found["multiturn", "any", "streaming"].accuracy
    whole = found["needle", "0", "full"].kv_bytes
    assert whole == 2 * 4 * 4 * 320 * 32 * 4
    for row in rows:
        assert (row.low, row.high) == tuple(round(end, 4) for end in wilson(row.correct, row.n))
        assert row.budget == ("" if row.method == "full" else "0.4")
        assert row.kv_bytes <= whole * (1 if row.method == "full" else 0.4)
        assert bool(row.perplexity) == (row.task == "perplexity")
        assert row.n == {"needle": 2, "multiturn": 8, "perplexity": 40}[row.task]
    table = summary(rows).splitlines()
    assert table[0].split() == ["method", "budget", "KV", "MB", "needle", "multiturn", "perplexity"]
    assert table[1].split()[:4] == ["full", "-", f"{whole / 1e6:.3g}", "100%"]

    before = (tmp_path / "results.csv").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(evaluating, "Reader", None)  # nothing is run again
        assert evaluate(*shipped, methods, tmp_path, settings, progress=False) == rows
    lines = before.splitlines(keepends=True)
    (tmp_path / "results.csv").write_text("".join(lines[:2] + lines[3:]))
    again = evaluate(*shipped, methods, tmp_path, settings, progress=False)
    assert [row._replace(seconds=0) for row in again] == [row._replace(seconds=0) for row in rows]
    assert len((tmp_path / "results.csv").read_text().splitlines()) == len(lines)
    for change, name in (({"prefill": "streaming"}, "prefill 'streaming', got one with results for 'dense'"),
                         ({"task_file": ENGLISH}, "task_file another, got one with results for another")):  # fmt: skip
        with pytest.raises(ValueError, match=f"^out: expected a folder for {name}$"):
            evaluate(*shipped, methods, tmp_path, replace(settings, **change), progress=False)


def test_formats_of_the_cache(shipped, tmp_path):
    """The same plan in every format, in the bytes that it says; what the prompt holds is read as it was stored."""
    settings = Settings(["needle", "multikey"], [320], [0.4], 2, depths=2, task_file=TINY)
    methods = make(shipped, ["full", "razor"], kv=["model", "int8", "int4"])
    assert [method.name for method in methods] == [f"{name}{kv}" for name in ("full", "razor")
                                                   for kv in ("", ", int8", ", int4")]  # fmt: skip
    rows = evaluate(*shipped, methods, tmp_path, settings, progress=False)
    held = {row.method: row.kv_bytes for row in rows if row.task == "needle"}
    sizes = {"head_dim": 32, "page_size": PAGE_SIZE}
    for base in ("full", "razor"):
        plan = methods[0 if base == "full" else 3].way(320, 0.4, 3) or Plan.full(4, 4)
        for kv in ("int8", "int4"):
            assert held[f"{base}, {kv}"] == plan.kv_bytes(320, dtype=kv, **sizes) < held[base] / 2
    assert {row.accuracy for row in rows if row.method in ("full", "full, int8")} == {1.0}
    assert sum(row.correct for row in rows if row.method == "razor, int8") >= 5
    with Reader(shipped[0], methods[4].way(320, 0.4, 3), "dense", methods[4].kv_dtype) as reader:
        reader.read(list(range(5, 40)))
        assert reader.cache.layers[0].cache.key_pages.dtype == torch.int8
    for names, kv, message in [
        (["razor"], ["int2"], "kv: expected some of model, int8, int4, got 'int2'"),
        (["snapkv-asked"], ["int4"], "kv: expected model for snapkv-asked, which has no quantised cache, got int4"),
    ]:
        with pytest.raises(ValueError, match=f"^{message}$"):
            make(shipped, names, kv=kv)


def test_evaluate_refuses_early(shipped, tmp_path):
    def run(**changes):
        good = {"tasks": ["needle"], "lengths": [100], "budgets": [0.5], "task_file": TINY}
        evaluate(*shipped, make(shipped, ["full"]), tmp_path / "new", Settings(**good | changes), progress=False)

    for changes, message in [
        (
            {"tasks": ["poem"]},
            "tasks: expected some of needle, multikey, tracking, copy, multiturn, perplexity, got 'poem'",
        ),
        ({"tasks": ["perplexity"]}, "text: expected one for perplexity, got none"),
        ({"tasks": ["tracking"]}, "tracking: expected a task file with a link, got one without"),
        ({"lengths": [100, 16384]}, "lengths: expected less than 16384 tokens for this model, got 16384"),
    ]:
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            run(**changes)
        assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match=r"^text: expected at least 99 tokens, got 2$"):
        run(tasks=["perplexity"], text="the old")
