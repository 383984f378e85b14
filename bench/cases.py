# SPDX-License-Identifier: Apache-2.0
"""Named shapes: one layer of a model, context lengths, and plans for it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from razor_attention import FULL, LayerCache, Plan
from razor_attention.checks import check_kv_dtype
from razor_attention.reference import row_width

from .harness import FORMATS


@dataclass(frozen=True, slots=True)
class Layer:
    """Attention of one layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16
    page_size: int = 64  # tokens
    kv_dtype: str | None = None  # "int8" or "int4", in which the cache stores rows; None: dtype

    @property
    def format(self) -> str:
        """Of the cached rows, as results files name it."""
        return self.kv_dtype or next(name for name, dtype in FORMATS.items() if dtype == self.dtype)

    @property
    def row_bytes(self) -> int:
        """Bytes of one cached key and one cached value of one kv head."""
        stored = check_kv_dtype("kv_dtype", self.kv_dtype or self.dtype)
        return 2 * row_width(self.head_dim, stored) * stored.itemsize

    def tokens(self, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Random query (1, num_heads, count, head_dim), key and value (1, num_kv_heads, count, head_dim), in dtype."""
        generator = torch.Generator().manual_seed(seed)
        query, key, value = (
            torch.randn(1, heads, count, self.head_dim, generator=generator).to(self.dtype)
            for heads in (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        )
        return query, key, value

    def cache(self, plan: Plan, layer: int = 0) -> LayerCache:
        """An empty cache for a layer of a plan."""
        stored = self.kv_dtype or self.dtype
        sizes: dict[str, Any] = {"batch_size": 1, "head_dim": self.head_dim, "page_size": self.page_size}
        return LayerCache(*plan.layer(layer), dtype=stored, **sizes)


LLAMA3_8B = Layer(num_heads=32, num_kv_heads=8, head_dim=128)
LLAMA3_8B_LAYERS = 32
QUANTISED = ("int8", "int4")
SHARE = 0.15  # of a model's kv heads, full
CONTEXTS = {f"{k}k": k * 1024 for k in (2, 4, 8, 16, 32, 64, 128, 256)}  # tokens


def plans(layer: Layer = LLAMA3_8B) -> dict[str, Plan]:
    """The plans of one layer that benches compare; in the compressed ones a single kv head is full."""
    shape: dict[str, Any] = {"num_layers": 1, "num_kv_heads": layer.num_kv_heads, "window_fraction": 0.0}
    return {
        "full": Plan.full(1, layer.num_kv_heads),
        "1-full 4+4000+mean": Plan.from_heads({0: [0]}, sink_size=4, min_window=4000, **shape),
        "1-full 64+256": Plan.from_heads({0: [0]}, sink_size=64, min_window=256, compensate=False, **shape),
    }


def stored_plans(layer: Layer, kv_dtypes: Sequence[str] = QUANTISED) -> dict[str, tuple[Layer, Plan]]:
    """The plans in the layer's own dtype, then, named after it, each that forgets nothing in each quantised one."""
    made = {label: (layer, plan) for label, plan in plans(layer).items()}
    for kv_dtype in kv_dtypes:
        for label, plan in plans(layer).items():
            if bool((plan.is_full | plan.compensate).all()):
                made[f"{label} {kv_dtype}"] = replace(layer, kv_dtype=kv_dtype), plan
    return made


def random_plan(num_layers: int, num_kv_heads: int, share: float = SHARE) -> Plan:
    """A share of the kv heads is full, drawn with one seed, so unevenly over layers; the others keep 4 + 4000 +
    compensation."""
    places = num_layers * num_kv_heads
    heads: dict[int, list[int]] = {}
    for place in random.Random(0).sample(range(places), round(share * places)):
        heads.setdefault(place // num_kv_heads, []).append(place % num_kv_heads)
    shape: dict[str, Any] = {"num_layers": num_layers, "num_kv_heads": num_kv_heads}
    return Plan.from_heads(heads, min_window=4000, window_fraction=0.0, **shape)


def rows_held(plan: Plan, context: int, layer: int = 0) -> int:
    """Rows of a layer that a cache holds after `context` tokens, compensation rows not counted."""
    return int(_kept(plan, context, layer).sum())


def rows_read(plan: Plan, context: int, layer: int = 0) -> int:
    """Rows of a layer that a query reads after `context` tokens, its own included, compensation rows too."""
    kept = _kept(plan, context, layer)
    return int(kept.sum() + (plan.layer(layer)[2] & (kept < context)).sum())


def _kept(plan: Plan, context: int, layer: int) -> Tensor:
    """(num_kv_heads,), int64."""
    sinks, windows, _ = plan.layer(layer)
    return torch.where(windows == FULL, context, (sinks.long() + windows).clamp(max=context))


def rows_read_by_prompt(plan: Plan, context: int, layer: int = 0) -> int:
    """Sum of `rows_read` over all positions of a prompt."""
    sinks, windows, compensate = plan.layer(layer)
    at = torch.arange(1, context + 1)[:, None]
    kept = torch.minimum(at, torch.where(windows == FULL, context, sinks.long() + windows))
    return int(kept.sum() + (compensate & (kept < at)).sum())
