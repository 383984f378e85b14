# SPDX-License-Identifier: Apache-2.0
"""The demo: find retrieval heads, make a plan, and ask the same questions with a full and with compressed caches.

The questions can only be answered by looking thousands of tokens back. Rivals of the plan: transformers' own cache,
as many heads chosen at random, and no full heads at all. Everything is run here and printed as measured.

Example: python -m razor_attention.bench.demo --length 4096 8192      (the same as `razor demo`)
"""

from __future__ import annotations

import contextlib
import csv
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from razor_attention import HeadScores, Plan, RazorCache, attach, find_heads
from razor_attention.files import LayerHeads, merge_heads, save_heads
from razor_attention.hf.cache import Prefill, cache_bytes
from razor_attention.hf.names import CACHE

from .harness import table
from .plot import plot_scores
from .questions import ANSWER_TOKENS, QUESTION_TOKENS, WORDS, Question, as_batch, make_questions

MODEL = Path(__file__).parent / "model"

PERIOD = 500  # tokens of the probe's block; less where the model is shorter
REPEATS = 4
INDUCTION_RATIO, ECHO_RATIO = 0.19, 0.01
SINKS, WINDOW = 4, 64  # tokens that the other heads keep
COMPENSATE = True
PREFILL: Prefill = "streaming"

RANDOM_SEEDS = (0, 1, 2)
QUESTION_SEED = 1
BATCH = 5  # questions at a time
NEW_TOKENS = 16  # generated for each; the answer comes first, the others make the speed worth measuring


class Result(NamedTuple):
    """One row of demo.csv."""

    length: int  # tokens of the prompt
    method: str
    exact_match: float  # share of the questions
    kv_bytes: int  # of one question, at the end
    kv_ratio: float  # to the first method's
    prefill_s: float  # of one question
    decode_tokens_per_s: float  # of a whole batch
    questions: int


@dataclass
class Method:
    """One way to keep the cache, and what was measured with it."""

    name: str
    plan: Plan | None  # None: transformers' DynamicCache and its own attention
    answers: list[list[int]] = field(default_factory=list)  # ANSWER_TOKENS token ids for each question
    kv_bytes: int = 0  # of one question, at the end
    prefill_s: float = 0.0  # of all questions
    decode_s: float = 0.0


def run(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path, *, lengths: Sequence[int], questions: int
) -> None:
    """Run the demo, print it, and leave win.pt, scores.json, plan.json, scores.png and demo.csv in `out`.

    Args:
        model, tokenizer: trained by train_model.py.
        out: folder, created if needed.
        lengths: tokens of the prompts.
        questions: of each length.
    Raises:
        ValueError: length: expected at most 16368 tokens for this model, got 20000
    """
    longest = int(model.config.max_position_embeddings)
    check(tokenizer, longest, lengths, questions)
    out.mkdir(parents=True, exist_ok=True)
    period = min(PERIOD, (longest - 1) // REPEATS)
    scores = find_heads(model, tokenizer, period=period, repeats=REPEATS)
    heads = scores.select(INDUCTION_RATIO, ECHO_RATIO)
    plan = make_plan(merge_heads(heads), scores)
    scores.save(out / "scores.json")
    save_heads(heads, out / "win.pt")
    plan.save(out / "plan.json")
    plot_scores(scores, heads, out / "scores.png")
    found = ", ".join(f"layer {layer}: {row}" for layer, row in merge_heads(heads).items())
    print(f"retrieval kv heads, by a probe of {period} random tokens x {REPEATS}: {found}")
    print(f"{plan}, {PREFILL} prefill\n")

    rows: list[Result] = []
    for length in lengths:
        asked = make_questions(tokenizer, length=length, count=questions, seed=QUESTION_SEED)
        methods = make_methods(plan, scores)
        measure(model, asked, methods)
        rows += summary(length, asked, methods)
        if length == lengths[0]:
            print(side_by_side(tokenizer, asked, methods), end="\n\n")
    header = ("length", "method", "exact match", "KV MB", "KV ratio", "prefill s", "decode tokens/s")
    cells = [(*row[:2], f"{row.exact_match:.0%}", row.kv_bytes / 1e6, *row[4:7]) for row in rows]
    print(f"{questions} questions of each length, batches of {min(BATCH, questions)}; KV and prefill of one question")
    print(table(header, cells))
    with (out / "demo.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([Result._fields, *rows])


def check(tokenizer: PreTrainedTokenizerBase, longest: int, lengths: Sequence[int], questions: int) -> None:
    """Refuse what would fail after minutes."""
    if missing := set(WORDS) - set(tokenizer.get_vocab()):
        raise ValueError(f"model: expected one trained by train_model.py, got a tokenizer without {min(missing)!r}")
    for length in lengths:
        if length + NEW_TOKENS > longest:
            raise ValueError(f"length: expected at most {longest - NEW_TOKENS} tokens for this model, got {length}")
        make_questions(tokenizer, length=length, count=1)
    if questions < 1:
        raise ValueError(f"questions: expected an integer >= 1, got {questions}")


def make_plan(heads: LayerHeads, scores: HeadScores, *, compensate: bool = COMPENSATE) -> Plan:
    """The plan with these full heads."""
    return Plan.from_heads(
        heads,
        num_layers=len(scores.echo),
        num_kv_heads=scores.num_kv_heads,
        sink_size=SINKS,
        min_window=WINDOW,
        window_fraction=0.0,
        compensate=compensate,
        provenance=scores.provenance,
    )


def make_methods(plan: Plan, scores: HeadScores) -> list[Method]:
    """The plan and its rivals; those with random heads share a name."""
    layers, kv_heads = plan.num_layers, plan.num_kv_heads
    methods = [Method("full cache (transformers)", None), Method("razor", plan)]
    for seed in RANDOM_SEEDS:
        heads: LayerHeads = {}
        for place in random.Random(seed).sample(range(layers * kv_heads), int(plan.is_full.sum())):
            heads.setdefault(place // kv_heads, []).append(place % kv_heads)
        methods.append(Method(f"random heads (mean of {len(RANDOM_SEEDS)})", make_plan(heads, scores)))
    return [*methods, Method("sinks + window only", Plan.streaming(layers, kv_heads, SINKS, WINDOW))]


def measure(model: PreTrainedModel, questions: list[Question], methods: list[Method]) -> None:
    """Ask all questions with all methods, which take turns batch by batch."""
    answer(model, as_batch(questions[:1]), methods[0])  # warm-up; forgotten below
    methods[0].answers, methods[0].prefill_s, methods[0].decode_s = [], 0.0, 0.0
    batches = [as_batch(questions[start : start + BATCH]) for start in range(0, len(questions), BATCH)]
    with tqdm(total=len(batches) * len(methods), desc=f"{len(questions[0].ids)} tokens", unit="batch") as bar:
        for ids in batches:
            for method in methods:
                answer(model, ids, method)
                bar.update()


@torch.no_grad()
def answer(model: PreTrainedModel, ids: Tensor, method: Method) -> None:
    """Prefill and greedy decoding of NEW_TOKENS tokens with the clock on; adds to `method`. ids (batch, tokens)."""
    with contextlib.ExitStack() as stack:
        cache: Any = DynamicCache(config=model.config)
        if method.plan is not None:
            stack.enter_context(attach(model, method.plan, prefill=PREFILL))
            cache = RazorCache(model.config, method.plan, prefill=PREFILL)
        begin = time.perf_counter()
        tokens = [model(ids, **{CACHE: cache}, logits_to_keep=1).logits[:, -1:].argmax(-1)]
        middle = time.perf_counter()
        while len(tokens) < NEW_TOKENS:
            tokens.append(model(tokens[-1], **{CACHE: cache}).logits[:, -1:].argmax(-1))
        end = time.perf_counter()
    method.answers += torch.cat(tokens[:ANSWER_TOKENS], 1).tolist()
    method.prefill_s += middle - begin
    method.decode_s += end - middle
    method.kv_bytes = cache_bytes(cache) // len(ids)


def summary(length: int, questions: list[Question], methods: list[Method]) -> list[Result]:
    """One row for each name of a method; methods of the same name are averaged."""
    rows: list[Result] = []
    for name in dict.fromkeys(method.name for method in methods):
        same = [method for method in methods if method.name == name]
        count = len(same) * len(questions)
        right = sum(
            got == question.answer for method in same for got, question in zip(method.answers, questions, strict=True)
        )
        kv_bytes = sum(method.kv_bytes for method in same) // len(same)
        decode_s = sum(method.decode_s for method in same)
        match, ratio = round(right / count, 4), round(kv_bytes / methods[0].kv_bytes, 4)
        prefill_s = round(sum(method.prefill_s for method in same) / count, 4)
        speed = round(count * (NEW_TOKENS - 1) / decode_s, 1)
        rows.append(Result(length, name, match, kv_bytes, ratio, prefill_s, speed, len(questions)))
    return rows


def side_by_side(tokenizer: PreTrainedTokenizerBase, questions: list[Question], methods: list[Method]) -> str:
    """The first question that the full cache answers, with everybody's answer."""
    number = next((i for i, one in enumerate(questions) if methods[0].answers[i] == one.answer), 0)
    question = questions[number]

    def text(ids: list[int]) -> str:
        return str(tokenizer.decode(ids))

    back = round((1 - question.depth) * (len(question.ids) - 1))
    lines = [(f"wanted, said {back} tokens before", text(question.answer), "")]
    for method in methods:
        right = "right" if method.answers[number] == question.answer else "wrong"
        lines.append((method.name.split(" (mean")[0], text(method.answers[number]), right))
    widths = [max(len(line[i]) for line in lines) for i in range(2)]
    body = "\n".join(f"  {a.ljust(widths[0])}  {b.ljust(widths[1])}  {c}".rstrip() for a, b, c in lines)
    return f"Sample: {text(question.ids[-QUESTION_TOKENS:])}\n{body}"


if __name__ == "__main__":
    from razor_attention.cli import main

    sys.exit(main(["demo", *sys.argv[1:]]))
