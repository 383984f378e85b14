# SPDX-License-Identifier: Apache-2.0
"""Plans with a window of its own in every head: tiling, emulated kernels and the forms of Ascend's runtimes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import emulated
from cases import assert_close, same_bits
from razor_attention import FULL, LayerCache, Plan, cli, reference
from razor_attention.atb import cache_tensors, plan_tensors
from razor_attention.export import load_mindie, save_mindie
from test_ascend import (
    ARITHMETIC,
    AXES,
    Numbers,
    check_shares,
    expected_attention,
    inputs,
    run_append,
    run_attention,
    tiling_for,
)
from test_interop import Tokens, as_numpy, write

NEEDS_COMPILER = pytest.mark.skipif(emulated.compiler() is None, reason="no C++ compiler")
Head = tuple[int, int, bool]  # sinks, window, compensation


def draw_plan(seed: int, num_layers: int, num_kv_heads: int, most: int, *, full: int = 0) -> Plan:
    """Windows of 1..most tokens, no two alike in a layer; sinks and compensation drawn too; `full` heads of each layer
    keep everything."""
    draw = np.random.default_rng(seed)
    windows = np.stack([1 + draw.permutation(most)[:num_kv_heads] for _ in range(num_layers)])
    for row in windows:
        row[draw.permutation(num_kv_heads)[:full]] = FULL
    shape = num_layers, num_kv_heads
    return Plan(
        torch.tensor(draw.integers(0, 18, shape)), torch.tensor(windows), torch.tensor(draw.random(shape) < 0.6)
    )


def heads_of(plan: Plan, layer: int = 0) -> tuple[Head, ...]:
    return tuple(zip(*(table.tolist() for table in plan.layer(layer)), strict=True))


@dataclass(frozen=True)
class PlanNumbers(Numbers):
    """One call with the heads of a plan's layer."""

    layer: tuple[Head, ...] = ()

    def heads(self) -> tuple[Head, ...]:
        return self.layer


def draw_case(seed: int) -> PlanNumbers:
    draw = np.random.default_rng(1000 + seed)
    axes: dict[str, Any] = {name: values[draw.integers(len(values))] for name, values in AXES.items()}
    heads = int(draw.integers(2, 7))
    plan = draw_plan(seed, 1, heads, most=(8, 40, 150)[seed % 3], full=int(draw.integers(0, 2)))
    return PlanNumbers(**axes, layer=heads_of(plan))


def run_case(seed: int) -> None:
    c = draw_case(seed)
    windows = [window for _, window, _ in c.layer]
    assert len(set(windows)) == len(windows)
    try:
        run_attention(c)
        run_append(c)
    except Exception as error:
        raise AssertionError(repr(c)) from error


@NEEDS_COMPILER
@pytest.mark.parametrize("seed", range(12))
def test_kernels(seed: int) -> None:
    run_case(seed)


@NEEDS_COMPILER
@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 500, 25))
def test_kernels_on_500_plans(first: int) -> None:
    for seed in range(first, first + 25):
        run_case(seed)


@NEEDS_COMPILER
def test_decoding_turns_every_ring_at_its_own_time() -> None:
    """attention and append in turns, past the wrap of every head."""
    layer = heads_of(draw_plan(3, 1, 4, 12, full=1))
    c = PlanNumbers(length="none", q_len=40, group=2, dtype="float16", layer=layer)
    (query, key, value, *cache), options, magnitude = inputs(c)
    theirs = [t.clone() for t in cache]
    for i in range(40):
        now = tuple(t[:, :, i : i + 1] for t in (query, key, value))
        out = emulated.attention(*now, *cache, **options)
        assert_close(out, expected_attention((*now, *theirs), options), magnitude, ARITHMETIC)
        emulated.append(*now[1:], *cache)
        reference.append(*now[1:], *theirs)
        assert all(same_bits(a, b) for a, b in zip(cache[:7], theirs[:7], strict=True))


@NEEDS_COMPILER
@pytest.mark.parametrize("cores", [1, 24, 48])
def test_shares_are_even_whatever_the_windows(cores: int) -> None:
    """8 heads that keep from a few tokens to all 40,000: every core has its share of the tiles."""
    plan = draw_plan(5, 1, 8, 8000, full=1)
    sink, window, compensate = plan.layer(0)
    seen = torch.tensor([40_000, 900, 33])
    tiling = tiling_for(3, 8, 4, 1, 128, cores)
    units = check_shares(tiling, (None, None, None, seen, sink, window, compensate))  # type: ignore[arg-type]
    for row, (length, head) in enumerate(itertools.product(seen.tolist(), range(8))):
        kept = min(length + 1, int(sink[head]) + int(window[head]))  # with the new token
        # Tiles begin anew at the end of the sinks, and where the ring, at any place, meets a multiple of a tile.
        assert kept // tiling.cache.tile_tokens <= units[row] <= kept // tiling.cache.tile_tokens + 5


# --- ATB


def atb_rows(heads: tuple[Head, ...], length: int) -> dict[str, list[int]]:
    """What a row of each head says of a prompt, head by head."""
    made: dict[str, list[int]] = {"wins": [], "context_lens": [], "offset_index": []}
    for sink, window, compensate in heads:
        dropped = max(0, length - sink - window)
        mean = dropped >= (2 if compensate else 1)  # the mean of one token is that token
        row = (dropped, sink + 1 + window, sink) if mean else (0, length, -1)
        for name, number in zip(made, row, strict=True):
            made[name].append(number)
    return made


def exported_layers(folder: Path, *flags: str) -> list[dict[str, torch.Tensor]]:
    """What `razor export --to atb` makes of plan.json in a folder."""
    plan, out = folder / "plan.json", folder / "atb.pt"
    assert cli.main(["export", str(plan), "--to", "atb", "--head-dim", "64", "--out", str(out), *flags]) == 0
    return torch.load(out, weights_only=True)["layers"]  # type: ignore[no-any-return]


def test_the_command_gives_atb_each_heads_own_window(tmp_path: Path) -> None:
    plan = draw_plan(7, 3, 6, 300, full=1)
    plan.save(tmp_path / "plan.json")
    layers = exported_layers(tmp_path, "--length", "1000", "150", "5")
    assert len(layers) == 3
    for layer, made in enumerate(layers):
        for b, length in enumerate((1000, 150, 5)):
            for name, numbers in atb_rows(heads_of(plan, layer), length).items():
                assert made[name].view(3, 6)[b].tolist() == numbers, name
    compressed = layers[0]["wins"].view(3, 6)[0][~plan.is_full[0]]
    assert len(set(compressed.tolist())) == 5  # the windows' differences arrived


@pytest.mark.parametrize("seed", range(6))
def test_atb_attends_as_ours(seed: int) -> None:
    """The prompts as its first operator writes them, and a cache handed over, by the model of its second."""
    plan = draw_plan(seed, 1, 5, 60, full=1)
    tokens = Tokens(heads_of(plan), (150, 3, 37), torch.float16)
    (made,) = plan_tensors(plan, tokens.lengths, head_dim=64, block_size=16)
    keys, values = write(tokens, made)
    reached = tokens.attend({**made, "key_cache": torch.tensor(keys), "value_cache": torch.tensor(values)})
    np.testing.assert_allclose(reached, tokens.expected(), rtol=2e-6, atol=2e-6)  # the float32 of razor_offset
    snapshot = tokens.attend(cache_tensors(tokens.cache, block_size=16))
    assert np.abs(snapshot - tokens.expected()).max() < 2.0**-10  # means are rounded to float16


def test_alibi_windows_of_every_head(tmp_path: Path) -> None:
    Plan.from_windows([3, 40, 7, FULL], num_layers=2, num_kv_heads=4).save(tmp_path / "plan.json")
    for made in exported_layers(tmp_path, "--length", "100", "20", "--alibi"):
        assert made["wins"].tolist() == made["context_lens"].tolist() == [3, 40, 7, 100, 3, 20, 7, 20]


def test_a_cache_of_the_plan_has_the_same_rows() -> None:
    """context_lens of a cache that stored the prompt, and of the plan; heads without compensation have no mean here."""
    plan = draw_plan(11, 1, 6, 90, full=2)
    cache = LayerCache(*plan.layer(0), batch_size=2, head_dim=32, dtype=torch.bfloat16)
    new = torch.randn(2, 2, 6, 120, 32).bfloat16()
    cache.append(new[0], new[1])
    held = cache_tensors(cache)["context_lens"].view(2, 6)
    (made,) = plan_tensors(plan, [120, 120], head_dim=32)
    sink, window, compensate = plan.layer(0)
    silent = ~compensate & (sink.long() + window < 120)
    assert (made["context_lens"].view(2, 6) - held).tolist() == [silent.long().tolist()] * 2
    assert as_numpy(held).min() >= 1


# --- MindIE


@pytest.mark.filterwarnings("ignore:plan. expected its mean")
def test_mindie_has_full_heads_and_one_window(tmp_path: Path) -> None:
    """Any heads may be full; a window, sink or compensation of one head's own is refused by its name."""
    full = torch.tensor([[True, False, False], [False, False, True]])
    tables = {"sink_size": torch.full((2, 3), 4), "window_size": torch.full((2, 3), 4000).masked_fill(full, FULL)}
    plan = Plan(**tables, compensate=~full, window_fraction=0.2)
    save_mindie(plan, tmp_path / "wins.py", model_type="llama")
    (table,) = load_mindie(tmp_path / "wins.py")
    assert (table.heads["induction"], table.sink_size) == ({0: [0], 1: [2]}, 4)
    shared = "plan: expected one {} for all compressed heads, all that MindIE has, got {}$"
    for name, value, got in (("window_size", 6000, "4000..6000"), ("sink_size", 9, "4..9"), ("compensate", 0, "both")):
        changed = {field: getattr(plan, field).clone() for field in ("sink_size", "window_size", "compensate")}
        changed[name][1, 0] = value
        with pytest.raises(ValueError, match=shared.format(name, got)):
            save_mindie(Plan(**changed, window_fraction=0.2), tmp_path / "wins.py", model_type="llama")
    drawn = draw_plan(13, 2, 4, 9000)
    apart = Plan(torch.full_like(drawn.sink_size, 4), drawn.window_size, torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=shared.format("window_size", r"\d+\.\.\d+")):
        save_mindie(apart, tmp_path / "wins.py", model_type="llama")
