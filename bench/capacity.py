# SPDX-License-Identifier: Apache-2.0
"""How long a context fits, and what does a token cost there? The KV cache of a whole Llama-3-8B, 32 layers, for real.

A plan with 15 % of the kv heads full, the others 4 + 4000 + compensation. Synthetic tokens are appended layer by layer,
every layer stays in memory, and a step is one token's attention in all of them, storing included: what a model's step
adds to its weights. Where memory is too small for all layers, as many as fit are measured at a time and their times
added. A context may also be `most`, what fits the memory that is available now.

Each query looks for the key of one token, far back or near the end, by far the likeliest one though not the only one.
Before anything is timed, outputs of a few heads are compared with a float64 reference over the rows that the cache
holds, read back without the kernels, and rows and sums with the tokens that were appended. The cache must hold the
bytes that Plan.kv_bytes promises. Beside it stand full caches and DuoAttention's (half of the heads full, 64 + 256 in
the others; 4-bit codes alone, without their scales), by arithmetic.

Example: python -m razor_attention.bench.capacity --context 1M 3.3M
"""

from __future__ import annotations

import random
import time
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from razor_attention import LayerCache, Plan

from .cases import LLAMA3_8B, LLAMA3_8B_LAYERS, QUANTISED, SHARE, Layer, random_plan, rows_read
from .harness import Row, Timing, append_rows, assert_close, make_row, measured, parser, report, table, timing
from .resident import Peak, available_bytes, status_bytes
from .stored import as_stored, attended, stored_rows, tokens_held

CHUNK = 1 << 18  # tokens of one append
SAMPLE = 2  # full heads and as many compressed ones whose outputs are checked
SPARE = 1 << 30  # bytes left to checks and to the rest of the process
BUDGETS = (8, 16, 24, 80)  # GB
TOLERANCE = 0.02  # of outputs about 1, rounded to bfloat16
NOT_TIMED = Timing(0.0, 0.0)
SHARPNESS = 1.5  # of a query: its token then weighs about as much as a million others


class Tape:
    """Keys and values of every token of every layer, from few numbers.

    A row is a window of one tape of random numbers, which moves on by STEP from token to token and by a longer way
    from kv head to kv head: all rows differ, and none of them is stored.

    Args:
        layer: of the model.
        num_layers: of the model.
        tokens: of its longest context.
    """

    STEP, HEAD = 16, 16 * 4099  # elements

    def __init__(self, layer: Layer, num_layers: int, tokens: int) -> None:
        self.layer = layer
        generator = torch.Generator().manual_seed(0)
        count = tokens * self.STEP + num_layers * layer.num_kv_heads * self.HEAD + layer.head_dim
        self.key, self.value = (torch.randn(count, generator=generator).to(layer.dtype) for _ in range(2))

    def rows(self, index: int, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values of tokens begin ... end - 1 of layer `index`: (1, num_kv_heads, end - begin, head_dim)."""
        heads, head_dim = self.layer.num_kv_heads, self.layer.head_dim
        shape, strides = (1, heads, end - begin, head_dim), (0, self.HEAD, self.STEP, 1)
        at = index * heads * self.HEAD + begin * self.STEP
        return self.key.as_strided(shape, strides, at), self.value.as_strided(shape, strides, at)

    def query(self, index: int, context: int) -> Tensor:
        """Queries of the token `context`, each looking for one token: (1, num_heads, 1, head_dim)."""
        group = self.layer.num_heads // self.layer.num_kv_heads
        near = min(3000, context // 2)
        wanted = [[context // 10, context - near, context * 6 // 10, context - 1][g % 4] for g in range(group)]
        keys = torch.cat([self.rows(index, t, t + 1)[0] for t in wanted], 2)
        return (SHARPNESS * keys.float()).to(self.layer.dtype).view(1, self.layer.num_heads, 1, -1)


@dataclass(frozen=True, slots=True)
class Usage:
    """What one context took."""

    context: int  # tokens
    parts: int  # groups of layers that were in memory at a time
    promised_bytes: int  # by Plan.kv_bytes
    used_bytes: int  # of all caches
    growth_bytes: int  # of the resident memory, at most, of the largest part
    fill_us: float
    step_us: list[float]  # of each step over all layers
    error: float  # the largest of the outputs that were checked
    largest: float  # of these outputs


def kv_bytes(plan: Plan, layer: Layer, context: int, index: int | None = None) -> int:
    """What a plan promises after `context` tokens, in all layers or in one."""
    if index is not None:
        plan = Plan(*(part[None] for part in plan.layer(index)))
    stored = layer.kv_dtype or layer.dtype
    return plan.kv_bytes(context, head_dim=layer.head_dim, dtype=stored, page_size=layer.page_size)


def needed_bytes(plan: Plan, layer: Layer, context: int, layers: Sequence[int]) -> int:
    """Memory that some layers take while they are filled: a pool is copied when it grows."""
    sizes = [kv_bytes(plan, layer, context, index) for index in layers]
    return sum(sizes) + max(sizes) // 2


def parts_of(plan: Plan, layer: Layer, context: int, room: int) -> list[list[int]]:
    """Layers, as many at a time as fit into `room` bytes.

    Raises:
        ValueError: context: expected a layer of 3300000 tokens to need at most 8 GB, got 9.1
    """
    parts: list[list[int]] = [[]]
    for index in range(plan.num_layers):
        if needed_bytes(plan, layer, context, [*parts[-1], index]) > room:
            parts.append([])
        parts[-1].append(index)
        if (need := needed_bytes(plan, layer, context, parts[-1])) > room:
            wanted = f"a layer of {context} tokens to need at most {room / 1e9:.3g} GB"
            raise ValueError(f"context: expected {wanted}, got {need / 1e9:.3g}")
    return [part for part in parts if part]


def most_tokens(size: Callable[[int], int], budget: int) -> int:
    """The longest context of which `size`, in bytes, is at most `budget`; in thousands of tokens."""
    low, high = 0, 1 << 20  # thousands
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size(middle * 1000) <= budget else (low, middle - 1)
    return low * 1000


def check_stored(cache: LayerCache, tape: Tape, index: int, head: int, name: str) -> None:
    """Stop unless some rows of a head are the tokens that they should be, and its sums those of all it dropped."""
    token, layer = tokens_held(cache, head), tape.layer
    for row in sorted({0, len(token) // 3, len(token) // 2, len(token) - 1}):
        given = tape.rows(index, int(token[row]), int(token[row]) + 1)
        page = cache.page_table[head, row // cache.page_size, None]
        for pages, rows in zip((cache.key_pages, cache.value_pages), given, strict=True):
            held = stored_rows(pages, page, layer.head_dim)[row % cache.page_size]
            assert_close(f"{name}, token {token[row]}", held, as_stored(rows[0, head, 0], layer), 0.0)
    if not bool(cache.compensate[head]) or (dropped := int(cache.seen[0]) - len(token)) <= 0:
        return
    first = int(cache.sink_size[head])
    off_by = 1e-3 + (0.3 / dropped**0.5 if layer.kv_dtype else 0.0)  # tokens that were stored are added as they were
    totals = torch.zeros(2, layer.head_dim, dtype=torch.float64)
    for begin in range(first, first + dropped, 1 << 14):
        given = tape.rows(index, begin, min(begin + (1 << 14), first + dropped))
        totals += torch.stack([rows[0, head].double().sum(0) for rows in given])
    for held, total in zip((cache.key_sum, cache.value_sum), totals, strict=True):
        assert_close(f"{name}, sums", held[head].double() / dropped, total / dropped, off_by)


def sample(plan: Plan, part: Sequence[int], count: int) -> list[tuple[int, int]]:
    """(layer, kv head) of `count` full heads of some layers and as many compressed ones."""
    drawn = random.Random(len(part))
    kinds = [[(index, h) for index in part for h in range(plan.num_kv_heads) if plan.is_full[index, h] == full]
             for full in (True, False)]  # fmt: skip
    return [place for places in kinds for place in drawn.sample(places, min(count, len(places)))]


def measure(plan: Plan, layer: Layer, tape: Tape, context: int, *, rounds: int, chunk: int, room: int) -> Usage:
    """Fill the caches of a model, check them, and time steps over all its layers.

    Args:
        plan: of the model, resolved.
        layer: each of its layers.
        tape: at least rounds + 1 tokens longer than the context.
        context: tokens appended before the steps.
        rounds: steps timed.
        chunk: tokens of one append.
        room: bytes that the caches may take.
    Raises:
        RuntimeError: caches: expected the 938424320 bytes that the plan promises, got 938424321
    """
    parts = parts_of(plan, layer, context, room)
    used, growth, fill_us, error, largest = 0, 0, 0.0, 0.0, 0.0
    step_us = [0.0] * rounds
    for part in parts:
        before = status_bytes("VmRSS")
        with Peak().start() as peak:
            begin = time.perf_counter()
            caches = {index: layer.cache(plan, index) for index in part}
            for index, cache in tqdm(caches.items(), desc=f"{context} tokens", unit="layer", disable=None, leave=False):
                for start in range(0, context, chunk):
                    cache.append(*tape.rows(index, start, min(start + chunk, context)))
            fill_us += (time.perf_counter() - begin) * 1e6
            growth = max(growth, peak.bytes() - before)
        used += sum(cache.nbytes for cache in caches.values())
        queries = {index: tape.query(index, context) for index in part}
        wanted = check_heads(caches, tape, sample(plan, part, -(-SAMPLE // len(parts))), queries)
        with Peak().start() as peak:  # a first step may take pages
            outputs = step(caches, tape, queries, context)[1]
            growth = max(growth, peak.bytes() - before)
        for (index, h), want in wanted.items():
            out = outputs[index].view(layer.num_kv_heads, -1, layer.head_dim)[h]
            assert_close(f"{context} tokens, layer {index}, kv head {h}", out, want, TOLERANCE)
            error = max(error, float((out.double() - want).abs().max()))
            largest = max(largest, float(want.abs().max()))
        for turn in range(rounds):
            step_us[turn] += step(caches, tape, queries, context + 1 + turn)[0]
        del cache, caches  # before the next part
    promised = kv_bytes(plan, layer, context)
    if used != promised:
        raise RuntimeError(f"caches: expected the {promised} bytes that the plan promises, got {used}")
    return Usage(context, len(parts), promised, used, growth, fill_us, step_us, error, largest)


def check_heads(
    caches: dict[int, LayerCache], tape: Tape, places: Sequence[tuple[int, int]], queries: dict[int, Tensor]
) -> dict[tuple[int, int], Tensor]:
    """Stop unless some (layer, kv head) hold what they should; what their query heads must give for the next token."""
    wanted, layer, threads = {}, tape.layer, torch.get_num_threads()
    torch.set_num_threads(1)  # thousands of short calls, which on a busy machine would wait for another thread
    try:
        for index, h in places:
            cache = caches[index]
            check_stored(cache, tape, index, h, f"layer {index}, kv head {h}")
            at = int(cache.seen[0])
            new = (rows[0, h, 0] for rows in tape.rows(index, at, at + 1))
            query = queries[index].view(layer.num_kv_heads, -1, layer.head_dim)[h]
            wanted[index, h] = attended(cache, h, query, *new)
    finally:
        torch.set_num_threads(threads)
    return wanted


def step(
    caches: dict[int, LayerCache], tape: Tape, queries: dict[int, Tensor], at: int
) -> tuple[float, dict[int, Tensor]]:
    """One token, `at`, through the attention of some layers: microseconds, and their outputs."""
    new = {index: tape.rows(index, at, at + 1) for index in caches}
    begin = time.perf_counter()
    outputs = {index: cache.attend(queries[index], *new[index]) for index, cache in caches.items()}
    return (time.perf_counter() - begin) * 1e6, outputs


def sizes(plan: Plan, layer: Layer) -> dict[str, tuple[str, Callable[[int], int]]]:
    """By plan: format, and bytes of the whole cache after some tokens, by arithmetic.

    DuoAttention: 2 * (head_dim / 2) bytes for each token of half of the heads, and for 64 + 256 of the others.
    """
    full, share = Plan.full(plan.num_layers, plan.num_kv_heads), name_of(plan)
    made: dict[str, tuple[str, Callable[[int], int]]] = {}
    for kv_dtype in (None, *QUANTISED):
        stored = replace(layer, kv_dtype=kv_dtype)
        for label, one in (("full", full), (share, plan)):
            made[f"{label} {stored.format}"] = stored.format, partial(kv_bytes, one, stored)
    heads = plan.num_layers * plan.num_kv_heads
    kept = (heads // 2, heads - heads // 2)
    made["DuoAttention 50% full int4"] = (
        "int4",
        lambda tokens: layer.head_dim * (kept[0] * tokens + kept[1] * min(tokens, 64 + 256)),
    )
    return made


def name_of(plan: Plan) -> str:
    """By its share of full heads."""
    return f"{float(plan.is_full.double().mean()):.0%} full"


def rows_of(usage: Usage, plan: Plan, layer: Layer, label: str, on: str | None) -> list[Row]:
    """Bytes: of all caches for `fill`, of the rows that a step reads for `decode`; "resident": what memory grew by."""
    rows = sum(rows_read(plan, usage.context + 1, index) for index in range(plan.num_layers))
    flops = rows * 4 * layer.head_dim * (layer.num_heads // layer.num_kv_heads)
    fill, step = Timing(usage.fill_us, 0.0), timing(usage.step_us)
    cells = [
        ("fill", label, fill, usage.used_bytes, 0),
        ("decode", label, step, rows * layer.row_bytes, flops),
        ("held", f"{label}, resident", NOT_TIMED, usage.growth_bytes, 0),
    ]
    return [
        make_row(
            "capacity",
            f"{case} {usage.context}",
            name,
            time_us,
            nbytes=nbytes,
            flops=flops,
            row_format=layer.format,
            on=on,
        )
        for case, name, time_us, nbytes, flops in cells
    ]


def held_rows(plan: Plan, layer: Layer, contexts: Sequence[int], on: str | None) -> list[Row]:
    """What plans hold, by arithmetic: for each context, and the longest one in thousands that each budget pays for."""
    rows = []
    for label, (row_format, size) in sizes(plan, layer).items():
        lengths = [(tokens, label) for tokens in contexts]
        lengths += [(most_tokens(size, gb * 10**9), f"{label}, most in {gb} GB") for gb in BUDGETS]
        for tokens, name in lengths:
            sizes_of = {"nbytes": size(tokens), "row_format": row_format}
            rows.append(make_row("capacity", f"held {tokens}", name, NOT_TIMED, **sizes_of, on=on))
    return rows


def summary(usages: Sequence[Usage], plan: Plan, layer: Layer, available: int) -> str:
    """What was measured, what each plan holds, and how many tokens it holds in how much memory."""
    header = ("tokens", "parts", "promised GB", "used GB", "growth GB", "fill s", "step s", "tokens/s", "worst error")
    cells = [
        (
            u.context,
            u.parts,
            f"{u.promised_bytes / 1e9:.3f}",
            f"{u.used_bytes / 1e9:.3f}",
            f"{u.growth_bytes / 1e9:.3f}",
            u.fill_us / 1e6,
            timing(u.step_us).median_us / 1e6,
            1e6 / timing(u.step_us).median_us,
            f"{u.error:.2g} of {u.largest:.2g}",
        )
        for u in usages
    ]
    text = f"{plan}, {layer.format}\n{table(header, cells, left=0)}\n\n"
    contexts = [u.context for u in usages]
    header = ("plan", *(f"{tokens} tokens, GB" for tokens in contexts), *(f"tokens in {gb} GB" for gb in BUDGETS))
    header += (f"in {available / 1e9:.1f} GB, available here",)
    cells = [
        (label, *(size(tokens) / 1e9 for tokens in contexts), *(most_tokens(size, gb * 10**9) for gb in BUDGETS),
         most_tokens(size, available))
        for label, (_, size) in sizes(plan, layer).items()
    ]  # fmt: skip
    return text + table(header, cells, left=1)


def tokens_of(text: str) -> int:
    """A context as it is written: 128k (of 1024), 3.3M (of 10^6), 100000; `most` is 0."""
    factor = {"k": 1024, "M": 10**6}.get(text[-1:], 1)
    try:
        tokens = 0 if text == "most" else round(float(text.rstrip("kM")) * factor)
        if text == "most" or tokens > 0:
            return tokens
    except (ValueError, OverflowError):
        pass
    raise ArgumentTypeError(f"--context: expected tokens such as 128k, 3.3M or most, got {text}")


def main(argv: list[str] | None = None) -> None:
    flags = parser(__doc__)
    text = "tokens, such as 128k, 3.3M, or `most`: all that fits (default: 1M 3.3M)"
    flags.add_argument("--context", type=tokens_of, nargs="+", default=[10**6, 3_300_000], help=text)
    flags.add_argument("--kv", choices=("bf16", *QUANTISED), default="int4", help="format of the rows (default: int4)")
    flags.add_argument("--share", type=float, default=SHARE, help=f"of the kv heads, full (default: {SHARE})")
    flags.add_argument("--chunk", type=int, default=CHUNK, help=f"tokens of one append (default: {CHUNK})")
    flags.add_argument("--gb", type=float, default=0.0, help="memory to use (default: what is available)")
    arguments = flags.parse_args(argv)
    layer = replace(LLAMA3_8B, kv_dtype=None if arguments.kv == "bf16" else arguments.kv)
    plan = random_plan(LLAMA3_8B_LAYERS, layer.num_kv_heads, arguments.share)
    label = f"{name_of(plan)} {layer.format}"

    def bench() -> list[Row]:
        available = round(arguments.gb * 1e9) or available_bytes()
        layers, spare = range(plan.num_layers), SPARE
        most = most_tokens(lambda tokens: needed_bytes(plan, layer, max(tokens, 1), layers) + spare, available)
        usages = []
        for context in sorted({tokens or most for tokens in arguments.context}):
            tape = Tape(layer, plan.num_layers, context + arguments.rounds + 1)
            options = {"rounds": arguments.rounds, "chunk": arguments.chunk, "room": available - SPARE}
            usages.append(measure(plan, layer, tape, context, **options))
        print(summary(usages, plan, layer, available))
        rows = [row for usage in usages for row in rows_of(usage, plan, layer, label, arguments.machine)]
        return rows + held_rows(plan, layer, [u.context for u in usages], arguments.machine)

    rows = measured(bench, arguments.threads)
    append_rows([row for row in rows if not row.median_us], arguments.results)
    report([row for row in rows if row.median_us], arguments.results)


if __name__ == "__main__":
    main()
