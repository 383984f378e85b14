# SPDX-License-Identifier: Apache-2.0
"""Rotated keys: outputs stay what they are, and quantised keys with outlying channels lose less."""

import pytest
import torch
from torch import Tensor

from razor_attention import FULL, LayerCache, RazorCache, attach
from razor_attention.hf.names import CACHE, output_cache
from razor_attention.rotation import rotated_key, rotated_query
from tiny_models import FULL_PLAN, MIXED, answer, logits_by_step, prompts, shared_model

POLICY = [2, 2, 0], [FULL, 5, 7], [False, True, False]


def rows(tokens: int, head_dim: int = 64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of 6 heads, keys with four channels far from 0, values, of 3 kv heads: (2, heads, tokens, head_dim)."""
    draw = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, heads, tokens, head_dim, generator=draw) for heads in (6, 3, 3))
    k[..., [1, 9, 20, head_dim - 1]] += torch.tensor([15.0, -12.0, 10.0, -8.0])
    return q, k, v


def decoded(dtype: torch.dtype | str, head_dim: int = 64, **options: object) -> Tensor:
    """What 40 tokens after 200 read, a few at a time, in mixed policies."""
    cache = LayerCache(*POLICY, batch_size=2, head_dim=head_dim, dtype=dtype, page_size=16, **options)
    q, k, v = rows(240, head_dim)
    cache.append(k[:, :, :200], v[:, :, :200])
    parts = [[one[:, :, at : at + 10] for one in (q, k, v)] for at in range(200, 240, 10)]
    return torch.cat([cache.attend(*part) for part in parts], 2)


@pytest.mark.parametrize("head_dim", [1, 7, 16, 64, 80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_products_stay(head_dim, dtype):
    q, k = torch.randn(2, 6, 9, head_dim, generator=torch.Generator().manual_seed(head_dim)).to(dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-12
    assert torch.allclose(rotated_query(q) @ rotated_key(k).mT, q @ k.mT, rtol=0, atol=tolerance)
    if head_dim == 16:  # one channel goes to all
        assert torch.equal(rotated_key(torch.eye(16)[3]).abs(), torch.full((16,), 0.25))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_rotation_is_rounded_once(dtype):
    """Sums of float32 are exact enough to hit nearly always what the exact sum is rounded to."""
    for rotated, x in ((rotated_query, rows(50, 128)[0].to(dtype)), (rotated_key, rows(50, 128)[1].to(dtype))):
        assert (rotated(x) == rotated(x.double()).to(dtype)).float().mean() > 0.99


@pytest.mark.parametrize("slopes", [None, torch.tensor([0.5, 0.2, 0.1, 0.05, 0.02, 0.01])], ids=["", "alibi"])
def test_a_cache_gives_what_it_gives_without(slopes):
    """Compensation sums included: 200 tokens are far more than the windows hold."""
    exact, rotated = (decoded(torch.float32, alibi_slopes=slopes, rotate_keys=turn) for turn in (False, True))
    assert torch.allclose(exact, rotated, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("kv", "most"), [("int8", 0.6), ("int4", 0.85)])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_outlying_channels_cost_less(kv, most, head_dim):
    exact = decoded(torch.float32, head_dim)
    loss = [(decoded(kv, head_dim, rotate_keys=turn) - exact).norm() for turn in (False, True)]
    assert loss[1] < most * loss[0]


@pytest.mark.parametrize("plan", [FULL_PLAN, MIXED], ids=["full", "mixed"])
def test_models(plan):
    """By hand and through attach; what a quantised cache loses is another thing then."""
    model, (ids, mask) = shared_model("llama"), prompts(40, 31)
    found = {}
    for kv, turn in ((None, False), (None, True), ("int8", False), ("int8", True)):
        cache = RazorCache(model.config, plan, kv_dtype=kv, rotate_keys=turn)
        with attach(model, plan):
            found[kv, turn] = logits_by_step(model, cache, ids, (30, 1, 9), mask)[mask.bool()]
    assert torch.allclose(found[None, False], found[None, True], atol=1e-3)
    assert not torch.equal(found["int8", False], found["int8", True])
    assert (found["int8", True] - found[None, False]).pow(2).mean().sqrt() < 0.15
    with attach(model, plan, kv_dtype="int8", rotate_keys=True):
        said = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
        cache = RazorCache(model.config, plan, kv_dtype="int8", rotate_keys=True)
        assert torch.equal(said.sequences[:, 40:], answer(model, ids, mask, **{CACHE: cache}, max_new_tokens=8))
    assert all(layer.cache.rotate_keys for layer in output_cache(said).layers)
