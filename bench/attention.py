# SPDX-License-Identifier: Apache-2.0
"""How fast is attention over a compressed cache? Decode and prefill of one Llama-3-8B layer against torch's SDPA.

`--question chunk` asks for the next 512 tokens of a prompt, after `context` stored ones, `overhead` what a call costs
beside its work: one token over 64 rows, of 8 and of 2 kv heads. Plans named int8 and int4 store rows so.

`attend` is LayerCache.attend (attention, then append), `op` torch.ops.razor.attention alone, `sdpa` torch over the
full cache, which in decode lies ready in one piece: nothing is appended to it. `sdpa packed` is the same with the
query heads of a group as query tokens, transformers' way in decode. Each rival walks through copies of its cache of
WALK_BYTES together, because a model's other layers and weights would have pushed a layer's cache out of the caches
of the CPU since the last token. `flex` is FlexAttention with the same mask, where a plan has no compensation.

Example: python -m razor_attention.bench.attention --question decode --context 32k
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from razor_attention import LayerCache, Plan, ops

from .cases import CONTEXTS, LLAMA3_8B, QUANTISED, Layer, plans, rows_held, rows_read, rows_read_by_prompt, stored_plans
from .flex import flex_rival
from .harness import Row, Timing, assert_close, interleave, make_row, measured, parser, report
from .stored import as_stored

WALK_BYTES = 512 << 20
SHORT = 64  # tokens of the cache where the overhead is asked for
CHUNK = 512  # tokens of a prompt that come in one call
TOLERANCE = 0.02  # of outputs about 1, rounded to bfloat16; SDPA itself is off by half of it


def expected(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    positions: list[int],
    given: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The definition, in float32, one query at a time.

    Args:
        query: (1, num_heads, q_len, head_dim); its last token is the last one of key.
        key, value: (1, num_kv_heads, tokens, head_dim).
        plan: of which layer 0 counts.
        positions: tokens whose queries are wanted.
        given: key and value as they came, where the others are what is stored of them: tokens that the one call before
            these queries brought and dropped at once enter the mean so. None: the same.
    Returns:
        (1, num_heads, len(positions), head_dim), float32.
    """
    first = key.shape[2] - query.shape[2]
    group = query.shape[1] // key.shape[1]
    out = torch.empty(1, query.shape[1], len(positions), query.shape[3])
    policies = list(zip(*(table.tolist() for table in plan.layer(0)), strict=True))
    for i, p in enumerate(positions):
        at = torch.arange(p + 1)
        for h, (sinks, window, compensate) in enumerate(policies):
            kept = (at < sinks) | (p - at < window)
            k, v = key[0, h, : p + 1].float(), value[0, h, : p + 1].float()
            if given is not None:
                skipped = max(sinks, first - window)
                k, v = (
                    torch.cat([rows[:sinks], as_given[0, h, sinks:skipped].float(), rows[skipped:]])
                    for rows, as_given in zip((k, v), given, strict=True)
                )
            dropped = int((~kept).sum())
            rows, values, bias = k[kept], v[kept], torch.zeros(int(kept.sum()) + 1)
            if compensate and dropped:
                rows, values = torch.cat([rows, k[~kept].mean(0)[None]]), torch.cat([values, v[~kept].mean(0)[None]])
                bias[-1] = torch.tensor(float(dropped)).log()
            heads = slice(h * group, (h + 1) * group)
            logits = query[0, heads, p - first].float() @ rows.T * query.shape[3] ** -0.5 + bias[: len(rows)]
            out[0, heads, i] = logits.softmax(-1) @ values
    return out


def attend_op(cache: LayerCache, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention alone; nothing is stored. Shapes as LayerCache.attend."""
    return ops.attention(
        query,
        key,
        value,
        cache.key_pages,
        cache.value_pages,
        cache.page_table,
        cache.seen,
        cache.sink_size,
        cache.window_size,
        cache.compensate,
        cache.key_sum,
        cache.value_sum,
    )


def gqa_sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As packed_sdpa, with the groups left to torch."""
    return scaled_dot_product_attention(query, key, value, enable_gqa=True)


def packed_sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One query token over everything: (1, num_heads, 1, head_dim); key, value (1, num_kv_heads, tokens, head_dim)."""
    batch, heads, _, head_dim = query.shape
    tokens = query.view(batch, key.shape[1], heads // key.shape[1], head_dim)
    return scaled_dot_product_attention(tokens, key, value).view(query.shape)


def _walk(call: Callable[[Any], Tensor], states: list[Any]) -> Callable[[], object]:
    """A call that takes the next state each time."""
    turn = cycle(states)
    return lambda: call(next(turn))


def after(layer: Layer, key: Tensor, value: Tensor, new: int) -> tuple[Tensor, Tensor]:
    """Keys and values as queries of the last `new` tokens read them, earlier ones as the cache stores them: float32."""
    past_key, past_value = (as_stored(x[:, :, :-new], layer) for x in (key, value))
    return torch.cat([past_key, key[:, :, -new:]], 2), torch.cat([past_value, value[:, :, -new:]], 2)


def decode(
    layer: Layer,
    context: int,
    *,
    rounds: int,
    walk_bytes: int,
    name: str,
    kv_dtypes: Sequence[str] = QUANTISED,
    on: str | None = None,
) -> list[Row]:
    """Time one new token after `context` others."""
    query, key, value = layer.tokens(context + 1, seed=0)
    query, new = query[:, :, -1:], (key[:, :, -1:], value[:, :, -1:])
    rivals: dict[str, Callable[[], object]] = {}
    nbytes, flops, formats = {}, {}, {}
    for label, (stored, plan) in stored_plans(layer, kv_dtypes).items():
        rows = rows_read(plan, context + 1)
        caches = []
        for _ in range(-(-walk_bytes // (rows * stored.row_bytes))):
            caches.append(stored.cache(plan))
            caches[-1].append(key[:, :, :-1], value[:, :, :-1])
        wanted = expected(query, *after(stored, key, value, 1), plan, [context], (key, value))
        assert_close(f"decode {name} {label}", attend_op(caches[0], query, *new), wanted, TOLERANCE)
        for cache in caches:  # a pool grows by a quarter at once; a prompt's last page is full here, so it would now
            cache.attend(query, *new)
        rivals[f"{label} attend"] = _walk(lambda cache: cache.attend(query, *new), caches)
        rivals[f"{label} op"] = _walk(lambda cache: attend_op(cache, query, *new), caches)
        for how in ("attend", "op"):
            formats[f"{label} {how}"] = stored.format
            nbytes[f"{label} {how}"] = rows * stored.row_bytes
            flops[f"{label} {how}"] = rows * 4 * layer.head_dim * (layer.num_heads // layer.num_kv_heads)
    pairs = [(key.clone(), value.clone()) for _ in range(-(-walk_bytes // nbytes["full op"]))]
    wanted = expected(query, key, value, plans(layer)["full"], [context])
    for label, sdpa in (("sdpa", gqa_sdpa), ("sdpa packed", packed_sdpa)):
        assert_close(f"decode {name} {label}", sdpa(query, key, value), wanted, TOLERANCE)
        formats[label], nbytes[label], flops[label] = layer.format, nbytes["full op"], flops["full op"]
    rivals["sdpa"] = _walk(lambda pair: gqa_sdpa(query, *pair), pairs)
    rivals["sdpa packed"] = _walk(lambda pair: packed_sdpa(query, *pair), pairs)
    return _rows(f"decode {name}", interleave(rivals, rounds=rounds), nbytes, flops, formats, on)


def chunk(
    layer: Layer, context: int, *, rounds: int, name: str, tokens: int = CHUNK, on: str | None = None
) -> list[Row]:
    """Time a prompt's next `tokens` tokens after `context` others, every query by its own window; nothing is stored."""
    query, key, value = layer.tokens(context + tokens, seed=0)
    query, new = query[:, :, -tokens:], (key[:, :, -tokens:], value[:, :, -tokens:])
    rivals: dict[str, Callable[[], object]] = {}
    nbytes, flops, formats, case = {}, {}, {}, f"{tokens} tokens after {name}"
    sample, io = [0, tokens // 3, tokens - 1], 2 * query.nbytes + sum(x.nbytes for x in new)
    for label, (stored, plan) in stored_plans(layer).items():
        cache = stored.cache(plan)
        cache.append(key[:, :, :-tokens], value[:, :, :-tokens])
        wanted = expected(query, *after(stored, key, value, tokens), plan, [context + i for i in sample], (key, value))
        assert_close(f"{case}, {label}", attend_op(cache, query, *new)[:, :, sample], wanted, TOLERANCE)
        rivals[f"{label} op"] = lambda cache=cache: attend_op(cache, query, *new)
        rows = rows_read_by_prompt(plan, context + tokens) - rows_read_by_prompt(plan, context)
        formats[f"{label} op"], nbytes[f"{label} op"] = stored.format, rows_held(plan, context) * stored.row_bytes + io
        flops[f"{label} op"] = rows * 4 * layer.head_dim * (layer.num_heads // layer.num_kv_heads)
    mask = torch.ones(tokens, context + tokens, dtype=torch.bool).tril(context)

    def sdpa() -> Tensor:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)

    wanted = expected(query, key, value, plans(layer)["full"], [context + i for i in sample])
    assert_close(f"{case}, sdpa", sdpa()[:, :, sample], wanted, TOLERANCE)
    rivals["sdpa"] = sdpa
    formats["sdpa"], nbytes["sdpa"], flops["sdpa"] = layer.format, nbytes["full op"], flops["full op"]
    return _rows(case, interleave(rivals, rounds=rounds), nbytes, flops, formats, on)


def _rows(
    case: str,
    times: dict[str, Timing],
    nbytes: dict[str, int],
    flops: dict[str, int],
    formats: dict[str, str],
    on: str | None,
) -> list[Row]:
    """A row for each rival."""
    return [
        make_row(
            "attention", case, label, time, nbytes=nbytes[label], flops=flops[label], row_format=formats[label], on=on
        )
        for label, time in times.items()
    ]


def prefill(
    layer: Layer, context: int, *, rounds: int, name: str, flex: bool = True, on: str | None = None
) -> list[Row]:
    """Time a prompt of `context` tokens into an empty cache, every query by its own window."""
    query, key, value = layer.tokens(context, seed=0)
    rivals: dict[str, Callable[[], object]] = {}
    flops = {}
    sample = [0, context // 3, context - 1]
    group = layer.num_heads // layer.num_kv_heads
    for label, plan in plans(layer).items():
        cache = layer.cache(plan)

        def attend(cache: LayerCache = cache) -> Tensor:
            cache.reset()
            return cache.attend(query, key, value)

        wanted = expected(query, key, value, plan, sample)
        assert_close(f"prefill {name} {label}", attend()[:, :, sample], wanted, TOLERANCE)
        rivals[f"{label} attend"] = attend
        flops[f"{label} attend"] = rows_read_by_prompt(plan, context) * 4 * layer.head_dim * group
        alike = label != "full" and not bool(plan.compensate.any())
        if flex and alike and (call := flex_rival(query, key, value, plan)):
            assert_close(f"prefill {name} {label} flex", call()[:, :, sample], wanted, TOLERANCE)
            rivals[f"{label} flex"], flops[f"{label} flex"] = call, flops[f"{label} attend"]
    rivals["sdpa"] = lambda: scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    flops["sdpa"] = flops["full attend"]
    nbytes = 2 * query.nbytes + key.nbytes + value.nbytes
    times = interleave(rivals, rounds=rounds)
    return [
        make_row("attention", f"prefill {name}", label, time, nbytes=nbytes, flops=flops[label], on=on)
        for label, time in times.items()
    ]


def overhead(layer: Layer, *, rounds: int, on: str | None = None) -> list[Row]:
    """Time one new token over SHORT others: nearly all of it is what a call costs by itself."""
    query, key, value = layer.tokens(SHORT + 1, seed=0)
    query, new = query[:, :, -1:], (key[:, :, -1:], value[:, :, -1:])
    plan = Plan.streaming(1, layer.num_kv_heads, sink_size=4, window_size=SHORT - 4)  # stays short, however often
    cache, growing = layer.cache(plan), layer.cache(plan)
    for each in (cache, growing):
        each.append(key[:, :, :-1], value[:, :, :-1])
    name = f"overhead, {layer.num_kv_heads} kv heads"
    assert_close(name, attend_op(cache, query, *new), expected(query, key, value, plan, [SHORT]), TOLERANCE)
    rivals: dict[str, Callable[[], object]] = {
        "op": lambda: attend_op(cache, query, *new),
        "append": lambda: growing.append(*new),
        "attend": lambda: growing.attend(query, *new),
        "sdpa": lambda: gqa_sdpa(query, key, value),
    }
    rows = rows_read(plan, SHORT + 1)
    nbytes = dict.fromkeys(rivals, rows * layer.row_bytes) | {"append": 2 * layer.num_kv_heads * layer.row_bytes}
    flops = rows * 4 * layer.head_dim * (layer.num_heads // layer.num_kv_heads)
    return [
        make_row("attention", name, label, time, nbytes=nbytes[label], flops=0 if label == "append" else flops, on=on)
        for label, time in interleave(rivals, rounds=rounds).items()
    ]


def main(argv: list[str] | None = None) -> None:
    flags = parser(__doc__)
    questions = ("decode", "prefill", "chunk", "overhead")
    flags.add_argument("--question", choices=questions, nargs="+", default=["decode", "prefill"])
    flags.add_argument("--context", choices=CONTEXTS, nargs="+", default=["8k"], help="default: 8k")
    arguments = flags.parse_args(argv)
    options = {"rounds": arguments.rounds, "on": arguments.machine}

    def bench() -> list[Row]:
        rows: list[Row] = []
        for name in arguments.context:
            if "decode" in arguments.question:
                rows += decode(LLAMA3_8B, CONTEXTS[name], walk_bytes=WALK_BYTES, name=name, **options)
            if "prefill" in arguments.question:
                rows += prefill(LLAMA3_8B, CONTEXTS[name], name=name, **options)
            if "chunk" in arguments.question:
                rows += chunk(LLAMA3_8B, CONTEXTS[name], name=name, **options)
        if "overhead" in arguments.question:
            for kv_heads in (8, 2):
                rows += overhead(replace(LLAMA3_8B, num_heads=4 * kv_heads, num_kv_heads=kv_heads), **options)
        return rows

    report(measured(bench, arguments.threads), arguments.results)


if __name__ == "__main__":
    main()
