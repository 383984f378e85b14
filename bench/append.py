# SPDX-License-Identifier: Apache-2.0
"""What does storing cost? Tokens of one Llama-3-8B layer into a full and into compressed caches.

A prompt goes into an empty cache, memory for its pages included, against torch's `clone` of its keys and values, which
is what any cache must at least do. One token goes into a cache that holds the prompt, against `cat`, as DynamicCache
stores it.

Example: python -m razor_attention.bench.append --context 32k
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from razor_attention import LayerCache, Plan

from .cases import CONTEXTS, LLAMA3_8B, Layer, rows_held, stored_plans
from .harness import Row, assert_close, interleave, make_row, measured, parser, report
from .stored import as_stored, stored_rows

TOLERANCE = 1e-3  # of means of float32 sums, another order of additions


def check(cache: LayerCache, key: Tensor, value: Tensor, plan: Plan, name: str, layer: Layer) -> None:
    """Stop unless the cache holds the first and the last token of every kv head, and the sums of what it dropped.

    Args:
        cache: of layer 0 of the plan.
        key, value: (1, num_kv_heads, tokens, head_dim), all that was stored.
        layer: that stores them.
    """
    tokens = key.shape[2]
    for h, (sinks, window, compensate) in enumerate(zip(*(x.tolist() for x in plan.layer(0)), strict=True)):
        rows = min(tokens, sinks + window)
        last = tokens - 1 if rows == tokens else sinks + (tokens - 1 - sinks) % window
        for at, row in ((0, 0), (tokens - 1, last)):
            page = cache.page_table[h, row // cache.page_size, None]
            for pages, given in ((cache.key_pages, key), (cache.value_pages, value)):
                held = stored_rows(pages, page, layer.head_dim)[row % cache.page_size]
                assert_close(f"{name}, token {at}", held, as_stored(given[0, h, at], layer), 0.0)
        if compensate and rows < tokens:
            for held, given in ((cache.key_sum, key), (cache.value_sum, value)):
                mean = given[0, h, sinks : tokens - window].double().mean(0)
                assert_close(f"{name}, sums", held[h].double() / (tokens - rows), mean, TOLERANCE)


def append(layer: Layer, context: int, *, rounds: int, name: str, on: str | None = None) -> list[Row]:
    """Time a prompt of `context` tokens, and one more; bytes are those read and those written."""
    _, key, value = layer.tokens(context, seed=0)
    new = key[:, :, -1:], value[:, :, -1:]
    prompts: dict[str, Callable[[], object]] = {}
    tokens: dict[str, Callable[[], object]] = {}
    written, formats, one = {}, {}, {}
    for label, (stored, plan) in stored_plans(layer).items():
        cache, longer = stored.cache(plan), stored.cache(plan)

        def store(cache: LayerCache = cache) -> None:
            cache.reset()
            cache.append(key, value)

        store()
        check(cache, key, value, plan, f"append {name} {label}", stored)
        longer.append(key, value)
        prompts[label] = store
        tokens[label] = lambda cache=longer: cache.append(*new)
        written[label], formats[label] = rows_held(plan, context) * stored.row_bytes, stored.format
        one[label] = layer.num_kv_heads * (layer.row_bytes + stored.row_bytes)
    prompts["clone"] = lambda: (key.clone(), value.clone())
    tokens["cat"] = lambda: (torch.cat([key, new[0]], 2), torch.cat([value, new[1]], 2))
    read = key.nbytes + value.nbytes
    written["clone"], one["cat"] = read, 2 * read + 2 * layer.num_kv_heads * layer.row_bytes
    formats |= dict.fromkeys(("clone", "cat"), layer.format)
    made = [
        (f"prompt {name}", interleave(prompts, rounds=rounds), {label: read + size for label, size in written.items()}),
        (f"one token after {name}", interleave(tokens, rounds=rounds), one),
    ]
    return [
        make_row("append", case, label, time, nbytes=sizes[label], row_format=formats[label], on=on)
        for case, times, sizes in made
        for label, time in times.items()
    ]


def main(argv: list[str] | None = None) -> None:
    flags = parser(__doc__)
    flags.add_argument("--context", choices=CONTEXTS, nargs="+", default=["32k"], help="default: 32k")
    arguments = flags.parse_args(argv)

    def bench() -> list[Row]:
        rows: list[Row] = []
        for name in arguments.context:
            rows += append(LLAMA3_8B, CONTEXTS[name], rounds=arguments.rounds, name=name, on=arguments.machine)
        return rows

    report(measured(bench, arguments.threads), arguments.results)


if __name__ == "__main__":
    main()
