# SPDX-License-Identifier: Apache-2.0
"""Ways to keep a cache, each cut to the same share of the full cache's bytes.

A budget first buys full heads, in the order of the method's ranking; what is left over widens the other heads' windows,
so that all methods hold as many bytes to within one page (PAGE_SIZE rows) of every head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from ...heads import HeadScores
from ...plan import Plan
from ..cache import KvDtype
from ..models import Geometry
from .reader import PAGE_SIZE, Press, Way

RANDOM_SEEDS = (0, 1, 2)
KV: dict[str, KvDtype] = {"model": None, "int8": "int8", "int4": "int4"}
PRESSES = {"snapkv": "SnapKVPress", "expected-attention": "ExpectedAttentionPress"}
ECHO_SHARES = {"razor": 1 / 15, "razor-echo": 1.0, "razor-induction": 0.0}
NAMES = (
    "full",
    "streaming",
    "random",
    *(name + rest for name in ECHO_SHARES for rest in ("", "-uncompensated")),
    "duo=FOLDER",
    "plan=FILE",
    *(name + rest for name in PRESSES for rest in ("", "-asked")),
)

Gates = tuple[Tensor, int, int]  # (num_layers, num_kv_heads), sink_size, window_size


@dataclass(frozen=True, slots=True)
class Method:
    """A name in the results, and how it keeps the cache.

    Args:
        name: of the method.
        way: (tokens of the prompt, share of the full cache's bytes, those of its tokens that come after anything is
            dropped) -> how to keep the cache.
        budgeted: whether the share makes a difference.
        sees_question: whether the question is read together with the context, before anything is dropped.
        kv_dtype: of a RazorCache, which holds less than the budget where it is quantised.
    """

    name: str
    way: Callable[[int, float, int], Way]
    budgeted: bool = True
    sees_question: bool = False
    kv_dtype: KvDtype = None


def widen(plan: Plan, budget: float, length: int, dtype: torch.dtype) -> Plan:
    """The plan with the widest windows, the same in all heads that are not full, that fit the budget; no length rule.

    Args:
        plan: whose full heads and sinks stay as they are.
        budget: share of the full cache's bytes.
        length: tokens at which it holds.
        dtype: of the cache.
    Returns:
        The plan; windows never cover more than the whole length.
    Raises:
        ValueError: budget: expected at least 0.016, the smallest share at 4096 tokens, got 0.01
    """
    sizes: dict[str, Any] = {"head_dim": 1, "dtype": dtype, "page_size": PAGE_SIZE}
    whole = Plan.full(plan.num_layers, plan.num_kv_heads).kv_bytes(length, **sizes)

    def made(window: int) -> Plan:
        return replace(plan, window_size=plan.window_size.masked_fill(~plan.is_full, window), window_fraction=0.0)

    def share(window: int) -> Fraction:
        return Fraction(made(window).kv_bytes(length, **sizes), whole)

    least, most = 1, length  # least fits
    if share(least) > Fraction(str(budget)):
        wanted = math.ceil(share(least) * 1000) / 1000
        raise ValueError(f"budget: expected at least {wanted}, the smallest share at {length} tokens, got {budget}")
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if share(middle) <= Fraction(str(budget)) else (least, middle - 1)
    return made(least)


def ranked(gates: Tensor) -> Tensor:
    """(num_layers, num_kv_heads), int64: heads by gate, 0 for the highest; equal ones by layer and head."""
    order = gates.flatten().argsort(descending=True, stable=True)
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order))).view(gates.shape)


def make_methods(
    names: Sequence[str],
    sizes: Geometry,
    dtype: torch.dtype,
    *,
    scores: Callable[[], HeadScores],
    gates: Callable[[str], Gates],
    sink_size: int = 4,
    window_size: int = 60,
    kv: Sequence[str] = ("model",),
) -> list[Method]:
    """Methods by name.

    Args:
        names: of NAMES; FOLDER and FILE stand for paths. `random` is one method for each of RANDOM_SEEDS.
        sizes: of the model. dtype: of its cache.
        scores: called if a method needs them.
        gates: folder -> DuoAttention's gates, sinks and window.
        sink_size: first tokens kept by heads that are not full.
        window_size: last tokens that the budget leaves them before it makes heads full; `duo` has its own sizes.
        kv: of KV, formats to store each method's plan in, which is the same in all; none for kvpress' methods.
    Returns:
        The methods in the order of the names, each in the order of the formats.
    Raises:
        ValueError: methods: expected some of full, streaming, ..., got 'h2o'
    """
    shape, found = (sizes.num_layers, sizes.num_kv_heads), list[HeadScores]()

    def by_ranking(ranking: Tensor, compensate: bool, sinks: int = sink_size, window: int = window_size) -> Any:
        policy: dict[str, Any] = {"sink_size": sinks, "min_window": window, "window_fraction": 0.0}

        def way(length: int, budget: float, asked: int) -> Plan:
            plan = Plan.from_ranking(
                ranking,
                budget=budget,
                seq_len=length,
                dtype=dtype,
                page_size=PAGE_SIZE,
                compensate=compensate,
                **policy,
            )
            plan.check_model(*shape)
            return widen(plan, budget, length, dtype)

        return way

    def make(name: str) -> list[Method]:
        kind, _, path = name.partition("=")
        base, compensate = kind.removesuffix("-uncompensated"), not kind.endswith("-uncompensated")
        press = PRESSES.get(kind.removesuffix("-asked"))
        if name == "full":
            return [Method(name, lambda length, budget, asked: None, budgeted=False)]
        if name == "streaming":
            plan = Plan.streaming(*shape, sink_size, 1)
            return [Method(name, lambda length, budget, asked: widen(plan, budget, length, dtype))]
        if name == "random":
            many = [
                torch.randperm(shape[0] * shape[1], generator=torch.Generator().manual_seed(s)) for s in RANDOM_SEEDS
            ]
            return [
                Method(f"random-{seed}", by_ranking(order.view(shape), True))
                for seed, order in zip(RANDOM_SEEDS, many, strict=True)
            ]
        if base in ECHO_SHARES and not path:
            if not found:
                found.append(scores())
            return [Method(name, by_ranking(found[0].ranking(ECHO_SHARES[base]), compensate))]
        if kind == "duo" and path:
            table, sinks, window = gates(path)
            return [Method("duo", by_ranking(ranked(table), False, sinks, window))]
        if kind == "plan" and path:
            loaded = Plan.load(path)
            loaded.check_model(*shape)
            return [Method(name, lambda length, budget, asked: loaded.resolve(length), budgeted=False)]
        if press and not path:
            sees = kind.endswith("-asked")

            def way(length: int, budget: float, asked: int) -> Press:
                kept = int(Fraction(str(budget)) * length)
                return Press(press, max(kept - asked, 1))

            return [Method(name, way, sees_question=sees)]
        raise ValueError(f"methods: expected some of {', '.join(NAMES)}, got {name!r}")

    def stored(method: Method, name: str) -> Method:
        if name not in KV:
            raise ValueError(f"kv: expected some of {', '.join(KV)}, got {name!r}")
        if name == "model":
            return method
        if method.name.removesuffix("-asked") in PRESSES:
            raise ValueError(f"kv: expected model for {method.name}, which has no quantised cache, got {name}")
        way = (lambda *_: Plan.full(*shape)) if method.name == "full" else method.way
        return replace(method, name=f"{method.name}, {name}", way=way, kv_dtype=KV[name])

    return [stored(method, one) for name in names for method in make(name) for one in kv]
