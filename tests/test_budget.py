# SPDX-License-Identifier: Apache-2.0
"""Plans within a budget: the order in which heads become full, and how many of them a share of the bytes pays for."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from razor_attention import HeadScores, Plan


def test_ranking_takes_the_highest_scores_of_both_kinds():
    induction, echo = torch.arange(32.0).view(4, 8), torch.arange(32.0).flip(0).view(4, 8)
    scores = HeadScores(echo, induction, 4)
    for n in (1, 5, 16):
        for share, side in ((0.0, "induction"), (1.0, "echo")):
            ratios = {"induction_ratio": n / 16 * (1 - share), "echo_ratio": n / 16 * share}
            chosen = {(layer, head) for layer, row in scores.select(**ratios)[side].items() for head in row}
            first = scores.ranking(share) < n
            assert {tuple(place) for place in first.nonzero().tolist()} == chosen
    mixed = scores.ranking(0.25).flatten().tolist()
    assert [mixed.index(place) for place in range(5)] == [15, 14, 13, 0, 12]  # every fourth by echo
    assert HeadScores(torch.zeros(2, 2), torch.zeros(2, 2), 2).ranking().tolist() == [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match=r"^echo_share: expected a number in 0..1, got 2$"):
        scores.ranking(2)


@given(
    st.permutations(range(6)), st.integers(1, 3000), st.floats(0, 1), st.booleans(), st.integers(1, 300),
    st.sampled_from([0.0, 0.2]), st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([16, 64]),
)  # fmt: skip
def test_as_many_full_heads_as_a_budget_pays_for(order, length, budget, compensate, window, fraction, dtype, page_size):
    ranking = torch.tensor(order).view(2, 3)
    rule = {"sink_size": 4, "min_window": window, "window_fraction": fraction, "compensate": compensate}
    sizes = {"dtype": dtype, "page_size": page_size}

    def with_full(count):
        heads = {i: [h for h in range(3) if ranking[i, h] < count] for i in range(2)}
        return Plan.from_heads(heads, num_layers=2, num_kv_heads=3, **rule)

    whole = Plan.full(2, 3).kv_bytes(length, head_dim=32, **sizes)
    held = [with_full(count).kv_bytes(length, head_dim=32, **sizes) for count in range(7)]
    fitting = [count for count in range(7) if held[count] <= budget * whole]
    if fitting:
        plan = Plan.from_ranking(ranking, budget=budget, seq_len=length, **sizes, **rule)
        assert plan == with_full(max(fitting))
        return
    with pytest.raises(
        ValueError, match=rf"^budget: expected at least [\d.]+, the smallest share at {length} tokens"
    ) as got:
        Plan.from_ranking(ranking, budget=budget, seq_len=length, **sizes, **rule)
    least = float(re.search(r"least ([\d.]+),", str(got.value))[1])
    assert min(held) <= least * whole * (1 + 1e-9) < min(held) + 2e-3 * whole
    if least <= 1:  # the share that it names is enough
        Plan.from_ranking(ranking, budget=least, seq_len=length, **sizes, **rule)


def test_bad_rankings():
    for ranking, got in (([[0, 0]], r"\[0, 0\]"), ([[1, 2]], r"\[1, 2\]")):
        with pytest.raises(ValueError, match=rf"^ranking: expected 0\.\.1, each once, got {got}$"):
            Plan.from_ranking(torch.tensor(ranking), budget=1, seq_len=10)
