# SPDX-License-Identifier: Apache-2.0
"""The demo's second half: perplexity of an ALiBi model when each head keeps a window, by every rule that finds one.

Windows come from the weights or from a calibration text, and are tried on other texts of the same kind. A text states
facts and asks for them again at distances from 64 tokens to its whole length, so that a window which is too small
costs answers. Prefill is streaming: every prediction is made with what the windows leave.

Example: razor demo      (runs this after the questions)
"""

from __future__ import annotations

import contextlib
import csv
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from razor_attention import Plan, RazorCache, attach, dropped_mass, find_windows
from razor_attention.alibi import smallest_windows
from razor_attention.files import save_windows
from razor_attention.hf.cache import cache_bytes
from razor_attention.hf.names import CACHE

from .harness import table
from .plot import plot_windows
from .questions import asked_tokens, make_text

MODEL = Path(__file__).parent / "alibi_model"
THETAS = (1e-5, 1e-3, 1e-2, 1e-1)  # for calibrated windows
TEXTS = 2
CALIBRATION_SEED = 0  # the texts that are measured have other ones


class Result(NamedTuple):
    """One row of alibi_demo.csv."""

    length: int  # tokens of a text
    method: str
    smallest: int  # window of all layers and heads, tokens
    largest: int
    dropped: float  # most attention that a head's windows take from a query of the calibration text
    perplexity: float  # of all tokens of all texts
    answered: float  # share of the asked tokens that the model ranks first
    kv_bytes: int  # of one text, at the end
    kv_ratio: float  # to the first method's


def make_methods(model: PreTrainedModel, mass: Tensor) -> dict[str, Tensor | None]:
    """Name -> windows [layers, heads]; None keeps the model's own cache and attention."""
    layers, heads, tokens = mass.shape
    methods: dict[str, Tensor | None] = {"full cache (transformers)": None}
    for rule in ("msmodelslim", "per_head", "theorem"):
        methods[rule] = find_windows(model, method=rule, progress=False).expand(layers, heads)
    for theta in THETAS:
        methods[f"calibrated, {theta:g}"] = smallest_windows(mass, theta)
    for theta in THETAS[1:]:  # as many rows in all as the calibrated windows have, the same for every head
        each = methods[f"calibrated, {theta:g}"]
        assert each is not None
        same = int(each.clamp(max=tokens - 1).float().mean())
        methods[f"uniform {same}"] = torch.full((layers, heads), same)
    return methods


@torch.no_grad()
def measure(model: PreTrainedModel, ids: Tensor, plan: Plan | None) -> tuple[Tensor, int]:
    """Log-probabilities (tokens - 1, vocabulary) of one text (1, tokens), and the bytes of its cache."""
    with contextlib.ExitStack() as stack:
        cache: Any = DynamicCache(config=model.config)
        if plan is not None:
            stack.enter_context(attach(model, plan, prefill="streaming"))
            cache = RazorCache(model.config, plan, prefill="streaming")
        logits = model(ids, **{CACHE: cache}, use_cache=True).logits[0, :-1]
    return logits.float().log_softmax(-1), cache_bytes(cache)


def results(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, length: int, texts: int
) -> tuple[list[Result], dict[str, Tensor | None]]:
    """A row for each method, and the windows behind it."""
    mass = dropped_mass(model, torch.tensor([make_text(tokenizer, length, CALIBRATION_SEED)]))
    methods, rows = make_methods(model, mass), list[Result]()
    read = [make_text(tokenizer, length, CALIBRATION_SEED + 1 + number) for number in range(texts)]
    for name, windows in tqdm(methods.items(), desc=f"{length} tokens", unit="method"):
        plan, dropped = None, 0.0
        if windows is not None:
            plan = Plan.from_windows(windows, num_layers=len(mass), num_kv_heads=mass.shape[1])
            dropped = float(f"{mass.gather(-1, windows.clamp(max=length)[..., None]).max():.3g}")
        loss, right, asked, kv_bytes = 0.0, 0, 0, 0
        for ids in read:
            wanted = torch.tensor(ids[1:])
            scores, kv_bytes = measure(model, torch.tensor([ids]), plan)
            loss -= float(scores.gather(1, wanted[:, None]).double().sum())
            places = torch.tensor([one.position - 1 for one in asked_tokens(tokenizer, ids)])
            right += int((scores[places].argmax(1) == wanted[places]).sum())
            asked += len(places)
        sizes = [length] if windows is None else windows.flatten().tolist()
        perplexity = round(math.exp(loss / (texts * (length - 1))), 4)
        ratio = kv_bytes / rows[0].kv_bytes if rows else 1.0
        rows.append(
            Result(
                length,
                name,
                min(sizes),
                max(sizes),
                dropped,
                perplexity,
                round(right / asked, 4),
                kv_bytes,
                round(ratio, 4),
            )
        )
    return rows, methods


def run(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path, *, length: int, texts: int = TEXTS
) -> None:
    """Measure, print, and leave alibi_demo.csv, alibi_windows.pt and alibi_windows.png in `out`.

    Args:
        model, tokenizer: trained by train_alibi_model.py.
        out: folder, created if needed.
        length: tokens of a text.
        texts: that are measured.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows, methods = results(model, tokenizer, length=length, texts=texts)
    chosen = methods[f"calibrated, {THETAS[2]:g}"]
    assert chosen is not None
    save_windows(chosen, out / "alibi_windows.pt")
    plot_windows(chosen, f"calibrated, {THETAS[2]:g}", out / "alibi_windows.png")
    print(f"ALiBi ({model.config.model_type}), {texts} texts of {length} tokens, streaming prefill; KV of one text")
    header = ("method", "windows", "drops at most", "perplexity", "answered", "KV MB", "KV ratio")
    cells = [
        (
            row.method,
            f"{row.smallest}..{row.largest}",
            f"{row.dropped:.1g}",
            f"{row.perplexity:.3f}",
            f"{row.answered:.1%}",
            row.kv_bytes / 1e6,
            row.kv_ratio,
        )
        for row in rows
    ]
    print(table(header, cells, left=1))
    with (out / "alibi_demo.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([Result._fields, *rows])
