# SPDX-License-Identifier: Apache-2.0
"""What does a quantised cache change in what the shipped models say? The same prompts with each plan in each format.

Every format is compared with the model's own dtype under the same plan: answers that were right and no longer are,
and those that became right. Two tasks: "questions" about facts of one haystack, several asked side by side once it has
been read (greedy answers, all four words right), and "text": its perplexity, and the words that only looking back
predicts. Both are read in pieces, so that nearly every token reads what was stored.

Example: python -m razor_attention.bench.quantised_answers --threads 1
"""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from razor_attention import Plan, RazorCache, attach, dropped_mass, find_heads
from razor_attention.alibi import smallest_windows
from razor_attention.files import merge_heads
from razor_attention.hf.models import geometry, load_model
from razor_attention.hf.names import CACHE

from .alibi_demo import CALIBRATION_SEED
from .alibi_demo import MODEL as ALIBI_MODEL
from .demo import ECHO_RATIO, INDUCTION_RATIO, MODEL, PERIOD, PREFILL, REPEATS, make_plan
from .harness import machine, parser, table, use_threads
from .questions import ANSWER_TOKENS, FACT_SHARE, FACT_TOKENS, Fact, asked_tokens, haystack, make_facts, make_text

SEED = 11
ASKED = 16  # questions about one haystack
THETA = 1e-2  # of calibrated windows
FORMATS: dict[str, dict[str, Any]] = {
    "model": {},
    "int8": {"kv_dtype": "int8"},
    "int4": {"kv_dtype": "int4"},
    "int4, rotated keys": {"kv_dtype": "int4", "rotate_keys": True},
}


class Result(NamedTuple):
    """One row of quantised_answers.csv."""

    model: str
    dtype: str
    task: str
    length: int  # tokens of a haystack, with a question, or of a text
    piece: int  # tokens that are read in one call
    plan: str
    kv: str  # format of the cache
    n: int  # answers; of a text: words to look back for
    correct: int
    accuracy: float
    lost: int  # of those right in the model's dtype under the same plan
    gained: int  # of those wrong there
    perplexity: str  # of a text
    kv_bytes: int  # of one prompt or text, at the end


class Outcome(NamedTuple):
    """What one haystack or text gave."""

    right: Tensor  # (answers,), bool
    loss: float  # summed over `tokens`
    tokens: int
    kv_bytes: int


class Haystack(NamedTuple):
    ids: list[int]
    questions: Tensor  # (ASKED, 3), int64
    answers: Tensor  # (ASKED, 4), int64


def make_haystack(tokenizer: PreTrainedTokenizerBase, length: int, seed: int) -> Haystack:
    """Facts and filler; with a question behind it, exactly `length` tokens; its last ones are not asked for."""
    rng, ids_of = random.Random(seed), tokenizer.get_vocab()
    body, latest = length - 4, length - (512 if length >= 2048 else length // 4)  # as questions.py
    facts = make_facts(rng, max(3 * ASKED, round(body * FACT_SHARE / FACT_TOKENS)))
    sentences, said = haystack(rng, facts, body), list[Fact]()
    words = ["<bos>"]
    by_key = {fact.key: fact for fact in facts}
    for sentence in sentences:
        if len(words) < latest and (fact := by_key.get(tuple(sentence[:2]))):  # type: ignore[call-overload]
            said.append(fact)
        words += sentence
    asked = rng.sample(said, ASKED)
    questions, answers = ([[ids_of[word] for word in part] for part in parts] for parts in (
        [fact.question() for fact in asked], [fact.things for fact in asked]
    ))  # fmt: skip
    return Haystack([ids_of[word] for word in words], torch.tensor(questions), torch.tensor(answers))


def read(model: PreTrainedModel, cache: RazorCache, ids: Sequence[int], piece: int) -> Iterator[Tensor]:
    """Logits (tokens, vocabulary) of every piece; `cache` holds it all afterwards."""
    for start in range(0, len(ids), piece):
        yield model(torch.tensor([ids[start : start + piece]]), **{CACHE: cache}).logits[0]


def ask(model: PreTrainedModel, cache: RazorCache, given: Haystack, piece: int) -> Outcome:
    """All questions at once, each with a copy of the cache that has read the haystack."""
    for _ in read(model, cache, given.ids, piece):
        pass
    held = cache.nbytes
    cache.batch_repeat_interleave(len(given.questions))
    said = [model(given.questions, **{CACHE: cache}, logits_to_keep=1).logits[:, -1:].argmax(-1)]
    while len(said) < ANSWER_TOKENS:
        said.append(model(said[-1], **{CACHE: cache}).logits[:, -1:].argmax(-1))
    return Outcome((torch.cat(said, 1) == given.answers).all(1), 0.0, 0, held)


def recite(model: PreTrainedModel, cache: RazorCache, ids: list[int], places: list[int], piece: int) -> Outcome:
    """The log-loss of a text's tokens after its first piece, and the words at `places` that are ranked first."""
    wanted, loss, first = torch.tensor(ids[1:]), torch.zeros(len(ids) - 1), torch.zeros(len(ids) - 1, dtype=torch.long)
    for number, logits in enumerate(read(model, cache, ids[:-1], piece)):
        part = slice(number * piece, number * piece + len(logits))
        loss[part] = -logits.float().log_softmax(-1).gather(1, wanted[part, None])[:, 0]
        first[part] = logits.argmax(-1)
    at = torch.tensor(places) - 1
    scored = loss[piece:].double()
    return Outcome(first[at] == wanted[at], float(scored.sum()), len(scored), cache.nbytes)


def plans(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int) -> dict[str, Plan]:
    """The full cache; the demo's plan; DuoAttention's kind of plan with the same heads, or an ALiBi model's windows."""
    sizes = geometry(model.config)
    shape: dict[str, Any] = {"num_layers": sizes.num_layers, "num_kv_heads": sizes.num_kv_heads}
    full = {"full": Plan.full(**shape)}
    if model.config.model_type == "bloom":
        mass = dropped_mass(model, torch.tensor([make_text(tokenizer, length, CALIBRATION_SEED)]))
        return full | {f"calibrated, {THETA:g}": Plan.from_windows(smallest_windows(mass, THETA), **shape)}
    scores = find_heads(model, tokenizer, period=PERIOD, repeats=REPEATS, progress=False)
    heads = scores.select(INDUCTION_RATIO, ECHO_RATIO)
    duo = Plan.from_heads(
        heads["induction"], sink_size=64, min_window=256, window_fraction=0.0, compensate=False, **shape
    )
    return full | {"razor": make_plan(merge_heads(heads), scores), "induction, 64 + 256": duo}


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    length: int,
    count: int,
    formats: Sequence[str],
    piece: int,
) -> list[Result]:
    """A row for each plan and format, which take turns over `count` haystacks or texts."""
    chosen = plans(model, tokenizer, length)
    found: dict[tuple[str, str], list[Outcome]] = {(plan, kv): [] for plan in chosen for kv in formats}
    name = Path(model.config.name_or_path).name
    for number in tqdm(range(count), desc=f"{name}, {task}, {length} in pieces of {piece}"):
        seed = SEED + number
        given = make_haystack(tokenizer, length, seed) if task == "questions" else None
        ids = make_text(tokenizer, length, seed)
        places = [one.position for one in asked_tokens(tokenizer, ids) if one.position > piece]
        for (plan, kv), outcomes in found.items():
            with torch.no_grad(), attach(model, chosen[plan], prefill=PREFILL):
                cache = RazorCache(model.config, chosen[plan], prefill=PREFILL, **FORMATS[kv])
                some = ask(model, cache, given, piece) if given else recite(model, cache, ids, places, piece)
                outcomes.append(some)
    rows = []
    for (plan, kv), outcomes in found.items():
        right, base = (torch.cat([o.right for o in some]) for some in (outcomes, found[plan, formats[0]]))
        n, correct, tokens = len(right), int(right.sum()), sum(o.tokens for o in outcomes)
        loss = f"{math.exp(sum(o.loss for o in outcomes) / tokens):.5g}" if tokens else ""
        changed = int((base & ~right).sum()), int((right & ~base).sum())
        share, dtype = round(correct / n, 5), str(model.dtype).removeprefix("torch.")
        rows.append(
            Result(name, dtype, task, length, piece, plan, kv, n, correct, share, *changed, loss, outcomes[-1].kv_bytes)
        )
    return rows


def summary(rows: Sequence[Result]) -> str:
    header = ("model", "task", "plan", "kv", "length", "piece", "n", "right", "points", "lost", "gained", "perplexity",
              "KV MB")  # fmt: skip
    base = {row[:6]: row.accuracy for row in rows if row.kv == "model"}
    cells = [
        (f"{r.model}, {r.dtype}", r.task, r.plan, r.kv, r.length, r.piece, r.n, f"{r.accuracy:.2%}",
         f"{100 * (r.accuracy - base[r[:6]]):+.2f}", r.lost, r.gained, r.perplexity, r.kv_bytes / 1e6)
        for r in rows
    ]  # fmt: skip
    return table(header, cells, left=4)


def main(argv: list[str] | None = None) -> None:
    flags = parser(__doc__)
    flags.add_argument("--length", type=int, nargs="+", default=[4096, 8192], help="tokens (default: 4096 8192)")
    flags.add_argument(
        "--haystacks",
        type=int,
        default=20,
        help=f"of {ASKED} questions each, at 4096 tokens; fewer of longer ones (default: 20)",
    )
    flags.add_argument("--texts", type=int, default=6, help="at 4096 tokens, fewer of longer ones (default: 6)")
    text = "tokens read in one call, which see each other unquantised (default: 256)"
    flags.add_argument("--piece", type=int, default=256, help=text)
    flags.add_argument(
        "--kv", nargs="+", choices=FORMATS, default=list(FORMATS), help="the first is what others are compared with"
    )
    flags.add_argument("--model", nargs="+", type=Path, default=[MODEL, ALIBI_MODEL])
    flags.add_argument("--dtype", default="bfloat16", help="of the models (default: bfloat16)")
    arguments = flags.parse_args(argv)
    use_threads(flags, arguments.threads)
    target = arguments.results / (arguments.machine or machine()) / "quantised_answers.csv"
    target.parent.mkdir(parents=True, exist_ok=True)
    rows = list[Result]()
    for folder in arguments.model:
        model, tokenizer = load_model(folder, arguments.dtype)
        for length in arguments.length:
            for task, count in (("questions", arguments.haystacks), ("text", arguments.texts)):
                same = max(1, min(count, count * 4096 // length))  # about as many tokens at all lengths
                rows += measure(model, tokenizer, task, length, same, arguments.kv, arguments.piece)
                with target.open("w", newline="") as file:  # after each, since all of them take an hour
                    csv.writer(file, lineterminator="\n").writerows([Result._fields, *rows])
    print(f"{summary(rows)}\nwrote {target}")


if __name__ == "__main__":
    main()
