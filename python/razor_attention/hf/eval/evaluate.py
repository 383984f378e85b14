# SPDX-License-Identifier: Apache-2.0
"""evaluate: every task, length and depth with every method and budget; what is in the results already is left out."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...files import read_json, write_json
from ..cache import Prefill
from ..forwards import find_forward
from ..models import text_config
from .methods import Method
from .reader import Prefix, Press, Reader, answer, read_prefix
from .results import Row, append_row, key, read_rows, wilson
from .tasks import ENGLISH, TASKS, Sample, TaskFile, Writer, is_right

SCORED_SHARE = 1 / 16  # of a text's tokens: those at its end, whose perplexity is measured


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured, beside the methods.

    Args:
        tasks: of TASKS, and "perplexity".
        lengths: tokens of the prompts.
        budgets: shares of the full cache's bytes.
        samples: of each task, length and depth.
        seed: of the samples.
        depths: places of the needle, from the start to right before the question.
        prefill: of a RazorCache; "dense" or "streaming".
        text: that `perplexity` reads.
        task_file: sentences of the other tasks.
    """

    tasks: Sequence[str]
    lengths: Sequence[int]
    budgets: Sequence[float]
    samples: int = 20
    seed: int = 0
    depths: int = 5
    prefill: Prefill = "dense"
    text: str | None = None
    task_file: TaskFile = ENGLISH


class _Measured(NamedTuple):
    """What one sample adds to its row."""

    n: int
    correct: int
    loss: float  # summed over n tokens
    kv_bytes: int
    seconds: float


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    methods: Sequence[Method],
    out: Path,
    settings: Settings,
    *,
    fixed: dict[str, Any] | None = None,
    progress: bool = True,
) -> list[Row]:
    """Measure and append to `out`/results.csv what it does not hold yet.

    The context is read first, then the question; the bytes are those of the cache after both. All methods get the same
    samples, and where they begin with the same dense prefill it is run once and counted for each. An answer is right if
    it is in the generated text. Perplexity is that of the last sixteenth of a piece of the text, read in one call after
    the rest of it.

    Args:
        model, tokenizer: ready to generate.
        methods: from make_methods.
        out: folder, created if needed; settings.json says what its results were made with.
        settings: what is measured.
        fixed: what else must be the same to add to results, as JSON values.
        progress: show a progress bar.
    Returns:
        The rows of this call, those found in the file included.
    Raises:
        ValueError: out: expected results with window_size 60, got some with 252; ...
    """
    _check(model, settings)
    out.mkdir(parents=True, exist_ok=True)
    name = Path(model.config.name_or_path or "").name or type(model).__name__
    language = asdict(settings.task_file)
    _same(out / "settings.json", {"prefill": settings.prefill, "depths": settings.depths, **(fixed or {})}, language)
    path = out / "results.csv"
    known = {key(row): row for row in read_rows(path)}
    writer = Writer(tokenizer, settings.task_file)
    cases = list(_cases(methods, settings))
    rows = dict.fromkeys(_blank(name, settings, *case) for case in cases)
    with tqdm(total=len(cases) * settings.samples, desc=name, unit="sample", disable=not progress) as bar:
        for group in dict.fromkeys(case[:3] for case in cases):
            mine = {_blank(name, settings, *case): case[3:] for case in cases if case[:3] == group}
            todo = {blank: case for blank, case in mine.items() if key(blank) not in known}
            bar.update((len(mine) - len(todo)) * settings.samples)
            parts = _Parts(model, tokenizer, settings, group, bar).measure(writer, todo) if todo else {}
            for blank, measured in parts.items():
                known[key(blank)] = _row(blank, measured)
                append_row(path, known[key(blank)])
    return [known[key(blank)] for blank in rows]


def _check(model: PreTrainedModel, settings: Settings) -> None:
    """Refuse what would fail after minutes."""
    for task in settings.tasks:
        if task not in (*TASKS, "perplexity"):
            raise ValueError(f"tasks: expected some of {', '.join((*TASKS, 'perplexity'))}, got {task!r}")
    if "perplexity" in settings.tasks and not settings.text:
        raise ValueError("text: expected one for perplexity, got none")
    if "tracking" in settings.tasks and not settings.task_file.link:
        raise ValueError("tracking: expected a task file with a link, got one without")
    longest = getattr(text_config(model.config), "max_position_embeddings", None)
    if longest is not None and max(settings.lengths) >= longest:
        raise ValueError(f"lengths: expected less than {longest} tokens for this model, got {max(settings.lengths)}")


def _same(path: Path, fixed: dict[str, Any], language: dict[str, Any]) -> None:
    """Write what all results of a folder have in common, or refuse to add others to them."""
    wanted = json.loads(json.dumps({**fixed, "task_file": language}))
    if not path.exists():
        write_json(path, {"format": "razor-attention eval", "version": 1, "settings": wanted})
        return
    found = read_json(path, "eval", ("settings",))["settings"]
    for name in wanted:
        if found.get(name) != wanted[name]:
            was, now = ("another" if name == "task_file" else repr(one.get(name)) for one in (found, wanted))
            raise ValueError(f"out: expected a folder for {name} {now}, got one with results for {was}")


def _cases(methods: Sequence[Method], settings: Settings) -> Iterator[tuple[str, int, float | None, Method, float]]:
    """Task, length, depth, method, budget: each a row."""
    steps = max(settings.depths - 1, 1)
    for task in settings.tasks:
        depths: list[float | None] = [place / steps for place in range(settings.depths)] if task == "needle" else [None]
        for length in settings.lengths:
            for depth in depths:
                for method in methods:
                    for budget in settings.budgets if method.budgeted else settings.budgets[:1]:
                        yield task, length, depth, method, budget


def _samples(writer: Writer, settings: Settings, task: str, length: int, depth: float | None) -> list[Sample]:
    if task != "perplexity":
        return [writer.sample(task, length, depth, f"{settings.seed} {number}") for number in range(settings.samples)]
    ids = writer.ids(settings.text or "")
    body = length - len(writer.prefix)
    if len(ids) < body:
        raise ValueError(f"text: expected at least {body} tokens, got {len(ids)}")
    free = len(ids) - body
    starts = [free * number // max(settings.samples - 1, 1) for number in range(settings.samples)]
    return [Sample([*writer.prefix, *ids[start : start + body]], [], 0.0) for start in starts]


def _blank(
    name: str, settings: Settings, task: str, length: int, depth: float | None, method: Method, budget: float
) -> Row:
    """A row before it is measured."""
    share = f"{budget:g}" if method.budgeted else ""
    place = "any" if depth is None else f"{depth:g}"
    return Row(name, task, length, place, method.name, share, settings.seed, settings.samples, 0, 0, 0, 0, 0, "", 0, 0)


def _row(blank: Row, parts: Sequence[_Measured]) -> Row:
    n, correct = sum(part.n for part in parts), sum(part.correct for part in parts)
    low, high = wilson(correct, n)
    loss = math.exp(sum(part.loss for part in parts) / n)
    return blank._replace(
        n=n,
        correct=correct,
        accuracy=round(correct / n, 4),
        low=round(low, 4),
        high=round(high, 4),
        perplexity=f"{loss:.5g}" if blank.task == "perplexity" else "",
        kv_bytes=round(sum(part.kv_bytes for part in parts) / len(parts)),
        seconds=round(sum(part.seconds for part in parts), 3),
    )


class _Parts(NamedTuple):
    """One task, length and depth: every sample is put to all methods, which share the reading of its context."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    settings: Settings
    group: tuple[str, int, float | None]
    bar: Any

    def measure(self, writer: Writer, todo: Mapping[Row, tuple[Method, float]]) -> dict[Row, list[_Measured]]:
        """What each sample adds to each row."""
        task, length, depth = self.group
        found: dict[Row, list[_Measured]] = {blank: [] for blank in todo}
        shares = self.settings.prefill == "dense" and find_forward(text_config(self.model.config)) is None
        for sample in _samples(writer, self.settings, task, length, depth):
            prefix: Prefix | None = None
            for blank, (method, budget) in todo.items():
                self.bar.set_postfix_str(f"{task} {length} {method.name}", refresh=False)
                context, asked = _halves(sample, length)
                joined = method.sees_question and bool(sample.turns)
                way = method.way(length, budget, 0 if joined else len(asked))
                begin = time.perf_counter()
                shared = shares and not isinstance(way, Press)
                if shared and prefix is None:
                    prefix = read_prefix(self.model, context)
                    begin += prefix.seconds
                with Reader(self.model, way, self.settings.prefill, method.kv_dtype) as reader:
                    if joined:
                        logits = reader.read([*context, *asked])
                    else:
                        before = reader.start(prefix) if shared and prefix else reader.read(context)
                        logits = torch.cat([before, reader.read(asked, every=not sample.turns)])
                    kv_bytes = reader.nbytes
                    part = self._answers(reader, logits, sample) if sample.turns else _loss(logits, asked)
                spent = time.perf_counter() - begin + (prefix.seconds if shared and prefix else 0.0)
                found[blank].append(part._replace(kv_bytes=kv_bytes, seconds=spent))
                self.bar.update()
        return found

    def _answers(self, reader: Reader, logits: Tensor, sample: Sample) -> _Measured:
        """Questions one after the other; the model's own answers stay in the cache between them."""
        correct, said = 0, list[int]()
        for number, turn in enumerate(sample.turns):
            if number:
                logits = reader.read([said[-1], *turn.ids])
            said = answer(reader, logits, turn.limit, self.tokenizer.eos_token_id)
            correct += is_right(str(self.tokenizer.decode(said, skip_special_tokens=True)), turn.answer)
        return _Measured(len(sample.turns), correct, 0.0, 0, 0.0)


def _halves(sample: Sample, length: int) -> tuple[list[int], list[int]]:
    """What is read first, and the question, or the end of a text whose perplexity is measured."""
    if sample.turns:
        return sample.context, sample.turns[0].ids
    scored = max(1, round(length * SCORED_SHARE))
    return sample.context[:-scored], sample.context[-scored:]


def _loss(logits: Tensor, wanted: list[int]) -> _Measured:
    """Of tokens, given the logits (tokens + 1, vocabulary) that begin before the first of them."""
    target = torch.tensor(wanted, device=logits.device)
    chosen = logits[:-1].log_softmax(-1).gather(1, target[:, None]).double()
    correct = int((logits[:-1].argmax(1) == target).sum())
    return _Measured(len(wanted), correct, -float(chosen.sum()), 0, 0.0)
