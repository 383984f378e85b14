# SPDX-License-Identifier: Apache-2.0
"""What does scoring heads cost? Echo and induction scores of 32 heads against one causal SDPA call of that shape.

`row by row` scores as msmodelslim does: the map of tokens x tokens of a head at a time, from which every row picks what
it attends to its earlier copies. `--question model` asks what `find_heads` takes of a whole model, against the model's
own forward pass over the same tokens (Llama-shaped as in memory.py, random weights; needs transformers).

Example: python -m razor_attention.bench.head_scores --long
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from razor_attention import head_scores, reference
from razor_attention.heads import probe_ids

from .cases import LLAMA3_8B, Layer
from .harness import Row, assert_close, interleave, make_row, measured, parser, report

REPEATS = 4
TOLERANCE = 1e-4  # of shares of attention, in float32
MAP_TOLERANCE = 5e-4  # the same, of a map in bfloat16: 1 % of them


def row_by_row(query: Tensor, key: Tensor, period: int) -> tuple[Tensor, Tensor]:
    """Scores from whole maps.

    Args:
        query: (1, num_heads, 1 + n * period, head_dim).
        key: (1, num_kv_heads, 1 + n * period, head_dim), dtype of query.
        period: tokens before the prompt repeats.
    Returns:
        echo, induction: (1, num_heads) each, float32.
    """
    _, num_heads, tokens, head_dim = query.shape
    group = num_heads // key.shape[1]
    later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    picked: list[Tensor] = []
    for head in range(num_heads):
        logits = query[0, head] @ key[0, head // group].T * head_dim**-0.5
        attention = logits.masked_fill_(later, -torch.inf).softmax(-1, dtype=torch.float32)[1:, 1:]
        for row in range(period, tokens - 1):
            picked.append(attention[row, row % period : row : period].sum())
            picked.append(attention[row, row % period + 1 : row + 1 : period].sum())
    echo, induction = torch.stack(picked).view(1, num_heads, -1, 2).mean(2).unbind(-1)
    return echo, induction


def scores(layer: Layer, period: int, *, rounds: int, maps: bool = True, on: str | None = None) -> list[Row]:
    """Time the scores of one prefix token and `period` random tokens, REPEATS times; with or without `row by row`."""
    tokens = 1 + period * REPEATS
    query, key, value = layer.tokens(tokens, seed=0)
    # The reference builds the whole map: the first kv head's group stands for all.
    group = layer.num_heads // layer.num_kv_heads
    few = min(period, 100)
    part = query[:, :group, : 1 + few * REPEATS], key[:, :1, : 1 + few * REPEATS]
    wanted = reference.head_scores(*part, few, scale=layer.head_dim**-0.5)
    found = {"scores": (head_scores(*part, few), TOLERANCE)}
    rivals = {
        "scores": lambda: head_scores(query, key, period),
        "sdpa": lambda: scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True),
    }
    if maps:
        found["row by row"] = row_by_row(*part, few), MAP_TOLERANCE
        rivals["row by row"] = lambda: row_by_row(query, key, period)
    for label, (pair, tolerance) in found.items():
        for name, have, want in zip(("echo", "induction"), pair, wanted, strict=True):
            assert_close(f"head scores, {label}, {name}", have, want, tolerance)
    pairs = tokens * (tokens + 1) // 2 * layer.num_heads * layer.head_dim  # products of the causal half of q.k
    work = {label: (2 * pairs, query.nbytes + key.nbytes) for label in rivals}
    work["sdpa"] = 4 * pairs, 2 * query.nbytes + 2 * key.nbytes
    return [
        make_row("head_scores", f"{tokens} tokens", label, time, nbytes=work[label][1], flops=work[label][0], on=on)
        for label, time in interleave(rivals, rounds=rounds).items()
    ]


def whole_model(period: int, *, rounds: int, shape: Any = None, on: str | None = None) -> list[Row]:
    """Time find_heads, and the decoder over its prompt without a cache; `shape`: a memory.Shape, None: its default."""
    from transformers.utils import logging

    from razor_attention import find_heads

    from . import memory
    from .questions import build_tokenizer

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    shape = shape or memory.Shape()
    model, tokenizer = memory.new_model(shape), build_tokenizer()
    ids = probe_ids(range(len(tokenizer)), 0, period=period, repeats=REPEATS, seed=0)[None]

    def forward() -> Tensor:
        with torch.no_grad():
            out: Tensor = model.model(ids, use_cache=False).last_hidden_state
        return out

    options: Any = {"period": period, "repeats": REPEATS, "seed": 0, "progress": False}
    times = interleave(
        {"find_heads": lambda: find_heads(model, tokenizer, **options), "forward": forward}, rounds=rounds
    )
    tokens, weights = ids.numel(), list(model.model.layers.parameters())
    pairs = tokens * (tokens + 1) // 2 * shape.num_layers * shape.hidden_size  # products of the causal half of q.k
    forward_flops = 2 * tokens * sum(weight.numel() for weight in weights) + 4 * pairs
    flops = {"forward": forward_flops, "find_heads": forward_flops + 2 * pairs}
    nbytes = sum(weight.nbytes for weight in weights)
    return [
        make_row("head_scores", f"model, {tokens} tokens", label, time, nbytes=nbytes, flops=flops[label], on=on)
        for label, time in times.items()
    ]


def main(argv: list[str] | None = None) -> None:
    flags = parser(__doc__)
    flags.add_argument("--question", choices=("layer", "model"), nargs="+", default=["layer"], help="default: layer")
    flags.add_argument("--long", action="store_true", help="10001 tokens, as find_heads; otherwise 2001")
    arguments = flags.parse_args(argv)
    period = 2500 if arguments.long else 500
    options = {"rounds": arguments.rounds, "on": arguments.machine}

    def bench() -> list[Row]:
        rows: list[Row] = []
        if "layer" in arguments.question:
            rows += scores(LLAMA3_8B, period, **options)
            ours, sdpa, maps = (row.median_us for row in rows)
            print(f"scores take {ours / sdpa:.2f}x of one causal SDPA call, {maps / ours:.1f}x less than row by row")
        if "model" in arguments.question:
            rows += (pair := whole_model(period, **options))
            print(f"find_heads takes {pair[0].median_us / pair[1].median_us:.2f}x of the model's forward pass")
        return rows

    report(measured(bench, arguments.threads), arguments.results)


if __name__ == "__main__":
    main()
