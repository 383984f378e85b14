# SPDX-License-Identifier: Apache-2.0
"""Trained gates (DuoAttention) against heads found without training (RazorAttention), on the shipped model.

Gates are trained on haystacks with questions of other seeds and lengths than those asked afterwards. Both methods keep
the same number of full heads, and the others the same sinks and window without compensation row: the same bytes.

Example: python -m razor_attention.bench.gates --out gates --steps 200
"""

from __future__ import annotations

import csv
import itertools
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from razor_attention import Plan, find_heads
from razor_attention.files import load_gates
from razor_attention.hf.gates import train_gates
from razor_attention.hf.models import load_model
from razor_attention.hf.passkeys import Sample

from .demo import MODEL, PERIOD, QUESTION_SEED, REPEATS, SINKS, WINDOW, Method, Result, measure, summary
from .harness import machine, parser, table, use_threads
from .questions import make_questions


def question_samples(tokenizer: Any, shortest: int, longest: int, seed: int) -> Iterator[Sample]:
    """Haystacks with a question and its answer, for `train_gates`; the tokens that predict the answer are asked."""
    for number in itertools.count():
        rng = random.Random(f"{seed} {number}")
        length = rng.randrange(shortest, longest + 1)
        question = make_questions(tokenizer, length=length, count=1, seed=rng.randrange(2**31))[0]
        ids = question.ids + question.answer[:-1]
        yield Sample(ids, [at >= length - 1 for at in range(len(ids))])


def trained_gates(
    model: Any, tokenizer: Any, folder: Path, *, steps: int = 200, lengths: Sequence[int] = (512, 2048), seed: int = 0
) -> Path:
    """The folder, with gates trained on samples of `lengths` (shortest and longest) unless it has some already."""
    if not folder.exists():
        begin = time.perf_counter()
        folder.parent.mkdir(parents=True, exist_ok=True)
        samples = question_samples(tokenizer, *lengths, seed)
        train_gates(model, samples=samples, steps=steps, sink_size=SINKS, window_size=WINDOW).save(folder)
        print(f"gates: {steps} steps, {time.perf_counter() - begin:.0f} s")
    return folder


def main(argv: list[str] | None = None) -> None:
    """Train, compare, print, write gates.csv."""
    flags = parser(__doc__)
    flags.add_argument("--out", type=Path, default=Path("gates"), help="folder of the gates; one that exists is read")
    flags.add_argument("--steps", type=int, default=200)
    flags.add_argument("--train-length", type=int, nargs=2, default=[512, 2048], help="shortest and longest sample")
    flags.add_argument("--length", type=int, nargs="+", default=[4096, 8192], help="tokens of the prompts")
    text = "shares of compressed kv heads"
    flags.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.75, 0.875], help=text)
    flags.add_argument("--questions", type=int, default=40)
    flags.add_argument("--seed", type=int, default=0)
    arguments = flags.parse_args(argv)
    use_threads(flags, arguments.threads)
    model, tokenizer = load_model(MODEL, "auto")
    sizes: dict[str, Any] = {"steps": arguments.steps, "lengths": arguments.train_length, "seed": arguments.seed}
    gates = load_gates(trained_gates(model, tokenizer, arguments.out, **sizes))
    begin = time.perf_counter()
    scores = find_heads(model, tokenizer, period=PERIOD, repeats=REPEATS)
    found = scores.induction.unflatten(1, (scores.num_kv_heads, -1)).amax(2)  # in [0, 1], like gates
    print(f"scores: {time.perf_counter() - begin:.1f} s\ngates, then induction scores:")
    for layer in zip(gates.tolist(), found.tolist(), strict=True):
        print("   ".join(" ".join(f"{value:.2f}" for value in row) for row in layer))
    rows = []
    for length in arguments.length:
        asked = make_questions(tokenizer, length=length, count=arguments.questions, seed=QUESTION_SEED)
        methods = [Method("full cache (transformers)", None)]
        for sparsity in arguments.sparsity:
            for name, values in (("gates", gates), ("razor", found)):
                plan = Plan.from_gates(values, sparsity=sparsity, sink_size=SINKS, window_size=WINDOW)
                methods.append(Method(f"{name}, {int(plan.is_full.sum())} full", plan))
        measure(model, asked, methods)
        rows += summary(length, asked, methods)
    header = ("length", "method", "exact match", "KV MB", "KV ratio", "prefill s", "decode tokens/s")
    cells = [(*row[:2], f"{row.exact_match:.1%}", row.kv_bytes / 1e6, *row[4:7]) for row in rows]
    print(table(header, cells))
    target = arguments.results / (arguments.machine or machine()) / "gates.csv"
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([Result._fields, *rows])
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
