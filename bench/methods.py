# SPDX-License-Identifier: Apache-2.0
"""Which way to keep a cache finds most in the same bytes? All methods of `razor eval` on the shipped models.

Four more questions are answered on the way: what the compensation row buys, and with which weight; what sinks buy; how
much the chosen heads depend on the probe's seed and period; how long choosing takes. What is measured already is found
in the folder of --out and not measured again.

Example: python -m razor_attention.bench.methods --question accuracy weights sinks heads alibi
"""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, PreTrainedTokenizerBase

from razor_attention import HeadScores, Plan, dropped_mass, find_heads, smallest_windows
from razor_attention.files import load_gate_sizes, load_gates
from razor_attention.hf.eval import Method, Row, Settings, TaskFile, evaluate, make_methods, summary, wilson
from razor_attention.hf.eval.methods import Gates
from razor_attention.hf.eval.reader import PAGE_SIZE, Reader
from razor_attention.hf.models import geometry, load_model
from razor_attention.hf.switch import AttentionSwitch

from .alibi_demo import MODEL as ALIBI_MODEL
from .demo import MODEL
from .gates import trained_gates
from .harness import assert_close, machine, parser, use_threads
from .plot_eval import plot_eval
from .questions import make_text, text_words

TASK_FILE = Path(__file__).parent / "tasks.json"
BUDGETS = (0.1, 0.16, 0.22, 0.4)
PERIOD, REPEATS = 500, 4  # of the probe
TEXT_SEED, TEXT_WORDS = 7, 20_000
CALIBRATION_SEED = 0
THETAS = (1e-2, 1e-1)
SEEDS, PERIODS = range(5), (125, 250, 500, 1000)
TOP = (3, 4)  # heads whose choice is compared

Result = NamedTuple("Result", [("question", str), *get_type_hints(Row).items()])  # type: ignore[misc]


class Run(NamedTuple):
    """What all questions share."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    scores: HeadScores | None  # None: ALiBi
    settings: Settings
    out: Path

    def ask(self, methods: Sequence[Method], question: str, **changes: Any) -> list[Row]:
        """Rows of one question."""
        return evaluate(self.model, self.tokenizer, methods, self.out / question, replace(self.settings, **changes))

    def methods(self, names: Sequence[str], **policy: int) -> list[Method]:
        """Methods by name."""

        def scores() -> HeadScores:
            assert self.scores is not None
            return self.scores

        sizes = geometry(self.model.config)
        return make_methods(names, sizes, self.model.dtype, scores=scores, gates=_gates, **policy)


def _gates(folder: str) -> Gates:
    return load_gates(folder), *load_gate_sizes(folder)


# --- the weight of the compensation row


def weighted_attention(
    plan: Plan,
    weight: Callable[[float, int], float] | None,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Dense-prefill attention by a plan over a cache that holds everything, with any weight of the compensation row.

    Args:
        plan: policy of every (layer, kv head), resolved.
        weight: (dropped tokens, head_dim) -> what is added to the row's logit after scaling. None: no such row.
        query: (1, num_heads, q_len, head_dim). key, value: (1, num_kv_heads, kv_len, head_dim), new tokens last.
        scaling: factor on q.k.
    """
    num_heads, q_len, head_dim = query.shape[1:]
    group, past = num_heads // key.shape[1], key.shape[2] - q_len
    token, scale = torch.arange(key.shape[2]), head_dim**-0.5 if scaling is None else scaling
    if past == 0:
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=group > 1
        )
        return out.transpose(1, 2), None
    key, value = (one[0].repeat_interleave(group, 0).double() for one in (key, value))
    sinks, windows, _compensate = (part.repeat_interleave(group) for part in plan.layer(module.layer_idx))
    reach = windows.long() - int(q_len == 1)  # one query alone counts itself among its window, several are dense
    kept = (token < sinks[:, None]) | (token >= past - reach[:, None])  # [num_heads, kv_len]
    logit = scale * query[0].double() @ key.transpose(1, 2)
    causal = token <= past + torch.arange(q_len)[:, None]
    logit = logit.masked_fill(~(kept[:, None] & causal), -torch.inf)
    left = (~kept).double()
    count = left.sum(-1)  # [num_heads]
    share = left / count.clamp(min=1)[:, None]
    mean_key, mean_value = (torch.einsum("ht,htd->hd", share, one) for one in (key, value))
    bias = torch.tensor([-torch.inf if n == 0 or weight is None else weight(n, head_dim) for n in count.tolist()])
    row = scale * torch.einsum("hqd,hd->hq", query[0].double(), mean_key) + bias[:, None]
    share = torch.cat([logit, row[..., None]], -1).softmax(-1)
    out = share[..., :-1] @ value + share[..., -1:] * mean_value[:, None]
    return out.to(query.dtype).transpose(0, 1)[None], None


WEIGHTS: dict[str, Callable[[float, int], float] | None] = {
    "weight N": lambda n, d: float(torch.tensor(n).log()),
    "weight 1": lambda n, d: 0.0,
    "weight N^(1/sqrt d)": lambda n, d: float(torch.tensor(n).log()) / d**0.5,
    "no compensation row": None,
}


@contextlib.contextmanager
def weighted(plan: Plan, weight: Callable[[float, int], float] | None, model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model attends by `weighted_attention`."""
    AttentionInterface.register("bench_weighted", partial(weighted_attention, plan, weight))
    AttentionMaskInterface.register("bench_weighted", lambda **_: None)
    with AttentionSwitch(model, "bench_weighted"):
        yield


def weights(run: Run) -> list[Row]:
    """What the row buys: razor's heads and windows, and no full heads at all, with four weights."""
    methods = []
    for base in run.methods(["razor", "streaming"]):
        for name, weight in WEIGHTS.items():

            def way(length: int, budget: float, asked: int, base: Method = base, weight: Any = weight) -> Any:
                plan = base.way(length, budget, asked)
                assert isinstance(plan, Plan)
                return partial(weighted, plan, weight)

            methods.append(replace(base, name=f"{base.name}, {name}", way=way))
    check_weights(run)
    rows = run.ask(methods, "weights", tasks=["multikey", "perplexity"], budgets=BUDGETS[1:3])
    held = {(row.method, row.task, row.budget): row.kv_bytes for row in run.ask(
        [replace(m, name=f"{m.name} bytes") for m in run.methods(["razor", "streaming"])], "weights",
        tasks=["multikey", "perplexity"], budgets=BUDGETS[1:3], samples=1,
    )}  # fmt: skip  # these experiments hold everything; razor's cache of the same plan is what they would take
    return [row._replace(kv_bytes=held[f"{row.method.split(',')[0]} bytes", row.task, row.budget]) for row in rows]


def check_weights(run: Run) -> None:
    """With weight N the experiment computes what razor does."""
    plan = run.methods(["razor"])[0].way(512, 0.3, 3)
    assert isinstance(plan, Plan)
    ids, found = make_text(run.tokenizer, 520, 0), list[Tensor]()
    for way in (plan, partial(weighted, plan, WEIGHTS["weight N"])):
        with Reader(run.model, way) as reader:
            parts = [reader.read(ids[:500]), reader.read(ids[500:505], every=True)]
            found.append(torch.cat([*parts, *(reader.read([one]) for one in ids[505:])]))
    assert_close("weights", found[1], found[0], 1e-3)


# --- the other questions


def accuracy(run: Run) -> list[Row]:
    """All methods at equal bytes; those of kvpress, if it is installed, at the two largest budgets."""
    gates = trained_gates(run.model, run.tokenizer, run.out / "gates")
    names = ["full", "streaming", "random", "razor", "razor-uncompensated", "razor-induction", "razor-echo"]
    names.append(f"duo={gates}")
    rows = run.ask(run.methods(names), "accuracy")
    if importlib.util.find_spec("kvpress") is None:
        return rows
    return rows + run.ask(
        run.methods(["snapkv", "snapkv-asked", "expected-attention"]), "accuracy", budgets=BUDGETS[-2:]
    )


def sinks(run: Run) -> list[Row]:
    """The same budget with other sinks."""
    methods = [
        replace(method, name=f"{method.name}, {size} sinks")
        for size in (0, 1, 4, 16)
        for method in run.methods(["razor", "streaming"], sink_size=size, window_size=64 - size)
    ]
    return run.ask(methods, "sinks", tasks=["multikey", "perplexity"], budgets=BUDGETS[2:3])


def heads(run: Run) -> list[Row]:
    """Heads chosen with other seeds and periods: those in common, of all that either chose; and the probe's time."""
    rows, first = list[Row](), dict[int, set[int]]()
    for seed, period in [(0, PERIOD), *((s, PERIOD) for s in SEEDS if s), *((0, p) for p in PERIODS if p != PERIOD)]:
        begin = time.perf_counter()
        scores = find_heads(run.model, run.tokenizer, period=period, repeats=REPEATS, seed=seed, progress=False)
        seconds = time.perf_counter() - begin
        for kind, share in (("induction", 0.0), ("echo", 1.0)):
            for top in TOP:
                chosen = {head for head, place in enumerate(scores.ranking(share).flatten().tolist()) if place < top}
                base = first.setdefault(2 * top + int(share), chosen)
                both, either = len(chosen & base), len(chosen | base)
                low, high = wilson(both, either)
                numbers = (either, both, round(both / either, 4), round(low, 4), round(high, 4), "", 0)
                tokens, name = 1 + period * REPEATS, f"{kind}, top {top}, period {period}"
                rows.append(Row("model", "heads", tokens, "any", name, "", seed, 1, *numbers, round(seconds, 3)))
    return rows


def alibi(run: Run) -> list[Row]:
    """Windows calibrated by attention against the same window for every head, at the same bytes."""
    length, plans = run.settings.lengths[0], run.out / "alibi"
    plans.mkdir(parents=True, exist_ok=True)
    mass = dropped_mass(run.model, torch.tensor([make_text(run.tokenizer, length, CALIBRATION_SEED)]))
    sizes, methods, shares = geometry(run.model.config), run.methods(["full"]), list[float]()
    for theta in THETAS:
        plan = Plan.from_windows(
            smallest_windows(mass, theta), num_layers=sizes.num_layers, num_kv_heads=sizes.num_kv_heads
        )
        methods.append(Method(f"calibrated, {theta:g}", partial(_same_plan, plan), budgeted=False))
        whole, held = (
            one.kv_bytes(length, head_dim=sizes.head_dim, dtype=run.model.dtype, page_size=PAGE_SIZE)
            for one in (Plan.full(sizes.num_layers, sizes.num_kv_heads), plan)
        )
        shares.append(round(held / whole + 5e-4, 3))
    methods += [replace(m, name="the same window") for m in run.methods(["streaming"], sink_size=0)]
    methods += run.methods(["streaming"])
    return run.ask(methods, "alibi", tasks=["multikey", "perplexity"], budgets=shares)


def _same_plan(plan: Plan, length: int, budget: float, asked: int) -> Plan:
    return plan


QUESTIONS: dict[str, Callable[[Run], list[Row]]] = {
    "accuracy": accuracy,
    "weights": weights,
    "sinks": sinks,
    "heads": heads,
    "alibi": alibi,
}


def make_run(folder: Path, out: Path, *, length: int, samples: int) -> Run:
    """The shipped model of a folder, and what is asked of it."""
    model, tokenizer = load_model(folder, "auto")
    scores = None if folder == ALIBI_MODEL else find_heads(model, tokenizer, period=PERIOD, repeats=REPEATS)
    settings = Settings(
        tasks=["needle", "multikey", "copy", "multiturn", "perplexity"],
        lengths=[length],
        budgets=BUDGETS,
        samples=samples,
        text=" ".join(text_words(random.Random(TEXT_SEED), TEXT_WORDS)[1:]),
        task_file=TaskFile.load(TASK_FILE),
    )
    return Run(model, tokenizer, scores, settings, out)


def main(argv: list[str] | None = None) -> None:
    flags = parser(__doc__)
    flags.add_argument("--question", nargs="+", choices=QUESTIONS, default=list(QUESTIONS), help="default: all")
    flags.add_argument("--length", type=int, default=2048, help="tokens of the prompts (default: 2048)")
    flags.add_argument("--samples", type=int, default=8, help="of each task and depth (default: 8)")
    flags.add_argument("--out", type=Path, default=Path("razor-methods"), help="folder to go on in after a stop")
    arguments = flags.parse_args(argv)
    use_threads(flags, arguments.threads)
    results = list[Any]()
    for question in arguments.question:
        folder = ALIBI_MODEL if question == "alibi" else MODEL
        rows = QUESTIONS[question](make_run(folder, arguments.out, length=arguments.length, samples=arguments.samples))
        print(f"\n{question}\n{summary(rows)}")
        results += [Result(question, *row) for row in rows]
    name = arguments.machine or machine()
    target = arguments.results / name / "methods.csv"
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([Result._fields, *results])
    print(f"wrote {target}")
    if (measured := arguments.out / "accuracy" / "results.csv").exists():
        plots = arguments.results / "plots"
        plots.mkdir(exist_ok=True)
        print(*plot_eval(measured, plots, f"{name}-methods-"), sep="\n")


if __name__ == "__main__":
    main()
