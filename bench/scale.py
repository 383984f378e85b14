# SPDX-License-Identifier: Apache-2.0
"""How far do 1 to 16 devices carry a plan? On paper: context, requests at once, bytes moved, imbalance.

Devices are ranks of tensor parallelism, which cut kv heads, times stages (a device map), which cut layers: as many
ranks as divide both the devices and the kv heads, for no kv head is cut. Weights are taken to split evenly, and a share
of each device stays free for activations. Bytes of caches are those of `Plan.kv_bytes`. Nothing is timed;
tests/test_parallel.py compares caches, weights and what ranks add up with a real model on two ranks.

Ranks wait for each other in every layer. So an imbalance of memory is one of all layers together, and one of time
(`in_step`) is that of each layer's slowest rank. `dealt` columns say what would be left of both if every layer dealt
its kv heads to the ranks so that they fill evenly, as a checkpoint with its heads permuted would.

Without --plan, SHARE of all kv heads, drawn by --seed, are full, the others 4 + max(4000, 0.2 n) + compensation.

Example: python -m razor_attention.bench.scale --length 131072 --device-gb 64
"""

from __future__ import annotations

import argparse
import csv
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from razor_attention import FULL, Plan

from .harness import RESULTS, table

SHARE = 0.15  # of all kv heads, full
DEVICES = (1, 2, 4, 8, 16)
_ITEM = 2  # bytes of a weight and of an activation, bf16


@dataclass(frozen=True, slots=True)
class Model:
    """Sizes of a Llama-shaped model."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int

    @property
    def parameters(self) -> int:
        """Elements of all weights; the head is not tied to the embedding."""
        heads = 2 * self.num_heads + 2 * self.num_kv_heads
        layer = self.hidden_size * (self.head_dim * heads + 3 * self.intermediate_size + 2)
        return 2 * self.vocab_size * self.hidden_size + self.num_layers * layer + self.hidden_size


MODELS = {
    "llama-3-8b": Model(32, 32, 8, 128, 4096, 14336, 128256),
    "llama-3-70b": Model(80, 64, 8, 128, 8192, 28672, 128256),
}


class Result(NamedTuple):
    """A row of the results file. Bytes are those of the fullest device, imbalances its share over the mean's."""

    model: str
    plan: str
    kv_dtype: str
    device_gb: float  # 10^9 bytes that weights and caches may take on each device
    length: int  # tokens of a request
    devices: int
    ranks: int
    stages: int
    weight_bytes: int
    kv_bytes: int  # of one request
    max_context: int  # tokens of a request alone; 0: the weights do not fit
    requests: int  # of `length` at once
    token_bytes: int  # read for one token of one of them: its cache, and its part of the weights
    reduced_bytes: int  # that the ranks of a stage add up for one token, two hidden states in each layer
    imbalance: float
    imbalance_in_step: float
    dealt: float
    dealt_in_step: float


def layout(model: Model, devices: int) -> tuple[int, int]:
    """Ranks and stages that so many devices make."""
    ranks = math.gcd(devices, model.num_kv_heads)
    if devices // ranks > model.num_layers:
        most = model.num_layers * ranks
        raise ValueError(f"--devices: expected at most {most}, {ranks} for each layer, got {devices}")
    return ranks, devices // ranks


def device_plans(plan: Plan, ranks: int, stages: int) -> list[Plan]:
    """What each device keeps, stage by stage; stages are runs of layers, the first ones a layer longer if need be."""
    runs = torch.arange(plan.num_layers).tensor_split(stages)
    names = "sink_size", "window_size", "compensate"
    shards = [plan.shard(rank, ranks) for rank in range(ranks)]
    return [replace(shard, **{name: getattr(shard, name)[run] for name in names}) for run in runs for shard in shards]


def head_bytes(plan: Plan, length: int, head_dim: int, dtype: torch.dtype | str) -> Tensor:
    """Bytes that each kv head keeps of a request: (num_layers, num_kv_heads), int64."""
    policies = (side.flatten().tolist() for side in (plan.sink_size, plan.window_size, plan.compensate))
    alone = [Plan([[s]], [[w]], [[c]], plan.window_fraction) for s, w, c in zip(*policies, strict=True)]
    held = [one.kv_bytes(length, head_dim=head_dim, dtype=dtype) for one in alone]
    return torch.tensor(held).view(plan.sink_size.shape)


def deal(held: Tensor, ranks: int) -> Tensor:
    """Every layer's kv heads dealt to ranks, equally many to each: the fullest head left goes to the rank that is
    emptiest in the layer, then in all of them.

    Args:
        held: (num_layers, num_kv_heads), int64, bytes.
        ranks: a divisor of num_kv_heads.
    Returns:
        (num_layers, ranks), int64, bytes.
    """
    dealt, total = torch.zeros(len(held), ranks, dtype=torch.int64), [0] * ranks
    for layer, heads in enumerate(held):
        places = [held.shape[1] // ranks] * ranks
        for size in heads.sort(descending=True).values.tolist():
            rank = min((r for r in range(ranks) if places[r]), key=lambda r: (int(dealt[layer, r]), total[r]))
            dealt[layer, rank] += size
            total[rank] += size
            places[rank] -= 1
    return dealt


def imbalances(cut: Tensor, stages: int) -> tuple[float, float]:
    """The fullest device over the mean; and the sum over layers of their fullest rank, over that of their mean.

    Args:
        cut: (num_layers, ranks), int64, bytes.
        stages: runs of layers.
    """
    if not (mean := cut.sum().item() / cut.shape[1]):
        return 1.0, 1.0
    fullest = max(int(run.sum(0).max()) for run in cut.tensor_split(stages))
    return fullest * stages / mean, cut.amax(1).sum().item() / mean


def longest(fits: Callable[[int], bool]) -> int:
    """The largest number of tokens that fits, FULL - 1 at most; 0: not even one does."""
    low, high = 0, FULL
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def scale(
    name: str, plan_name: str, plan: Plan, length: int, devices: int, *, capacity: float, kv_dtype: str = "bfloat16"
) -> Result:
    """One row.

    Args:
        name: of MODELS.
        plan_name, plan: what it is called, and it.
        length: tokens of a request.
        devices: their number.
        capacity: bytes that weights and caches may take on each of them.
        kv_dtype: bfloat16, int8 or int4.
    Returns:
        The row.
    Raises:
        ValueError: plan: expected 32 layers x 8 kv heads like the model, got 80 x 8
    """
    model = MODELS[name]
    plan.check_model(model.num_layers, model.num_kv_heads)
    ranks, stages = layout(model, devices)
    dtype = torch.bfloat16 if kv_dtype == "bfloat16" else kv_dtype
    parts, weights = device_plans(plan, ranks, stages), -(-model.parameters * _ITEM // devices)

    def fullest(tokens: int) -> int:
        return max(part.kv_bytes(tokens, head_dim=model.head_dim, dtype=dtype) for part in parts)

    free, held = capacity - weights, fullest(length)
    requests = int(free // held) if free >= 0 else 0
    heads = head_bytes(plan, length, model.head_dim, dtype)
    even = imbalances(heads.view(model.num_layers, ranks, -1).sum(2), stages)
    dealt = imbalances(deal(heads, ranks), stages)
    reduced = 2 * -(-model.num_layers // stages) * model.hidden_size * _ITEM if ranks > 1 else 0
    return Result(
        name, plan_name, kv_dtype, round(capacity / 1e9, 3), length, devices, ranks, stages, weights, held,
        longest(lambda tokens: fullest(tokens) <= free), requests, held + weights // max(requests, 1), reduced,
        *(round(value, 4) for value in (*even, *dealt)),
    )  # fmt: skip


def drawn_plan(model: Model, seed: int) -> Plan:
    """The default plan: SHARE of the kv heads of all layers, drawn, are full."""
    cells = [(layer, head) for layer in range(model.num_layers) for head in range(model.num_kv_heads)]
    chosen: dict[int, list[int]] = {}
    for layer, head in random.Random(seed).sample(cells, round(SHARE * len(cells))):
        chosen.setdefault(layer, []).append(head)
    return Plan.from_heads(chosen, num_layers=model.num_layers, num_kv_heads=model.num_kv_heads)


def write(rows: Sequence[Result], path: Path) -> None:
    """Rows as CSV, over what was there: they follow from their arguments."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Result._fields)
        writer.writerows(rows)


def show(rows: Sequence[Result]) -> str:
    """The rows as text."""
    header = ("plan", "kv", "devices", "ranks x stages", "max context", "requests", "KV GB", "GB/token", "imbalance",
              "in step", "dealt", "in step")  # fmt: skip
    cells = [
        (r.plan, r.kv_dtype, r.devices, f"{r.ranks} x {r.stages}", f"{r.max_context // 1000}k", r.requests,
         r.kv_bytes / 1e9, r.token_bytes / 1e9, r.imbalance, r.imbalance_in_step, r.dealt, r.dealt_in_step)
        for r in rows
    ]  # fmt: skip
    return table(header, cells)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--model", choices=MODELS, nargs="+", default=[*MODELS], help="sizes (default: all)")
    flags.add_argument("--plan", type=Path, help="plan.json for the model (default: see above)")
    flags.add_argument("--seed", type=int, default=0, help="of the default plan (default: 0)")
    flags.add_argument("--length", type=int, default=131072, help="tokens of a request (default: 131072)")
    flags.add_argument("--devices", type=int, nargs="+", default=DEVICES, help="(default: 1 2 4 8 16)")
    flags.add_argument("--device-gb", type=float, default=64, help="10^9 bytes of a device (default: 64)")
    flags.add_argument("--reserve", type=float, default=0.1, help="share kept for activations (default: 0.1)")
    flags.add_argument("--kv", choices=("bfloat16", "int8", "int4"), nargs="+", default=["bfloat16", "int4"])
    flags.add_argument("--results", type=Path, default=RESULTS, help=f"folder of the CSV files (default: {RESULTS})")
    given = flags.parse_args()
    rows, capacity = list[Result](), given.device_gb * 1e9 * (1 - given.reserve)
    for name in given.model:
        model = MODELS[name]
        plans = {
            "full": Plan.full(model.num_layers, model.num_kv_heads),
            "razor": Plan.load(given.plan) if given.plan else drawn_plan(model, given.seed),
        }
        some = [
            scale(name, called, plan, given.length, devices, capacity=capacity, kv_dtype=kv)
            for called, plan in plans.items()
            for kv in (given.kv if called == "razor" else given.kv[:1])
            for devices in given.devices
        ]
        print(f"{name}, {given.length} tokens, devices of {given.device_gb:g} GB, {given.reserve:.0%} kept free")
        print(show(some))
        rows += some
    path = given.results / "paper" / "scale.csv"
    write(rows, path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
