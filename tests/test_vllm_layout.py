# SPDX-License-Identifier: Apache-2.0
"""Where a request's pages and sums are in its list of blocks; needs no vLLM. The engine: tests/vllm_engine."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from razor_attention import FULL, Plan
from razor_attention.vllm.layout import Growth, Layout, page_limits
from tiny_models import MIXED

HEAD_DIM = 16


def make_layout(plan: Plan, block_size: int = 16, dtype: torch.dtype = torch.float32, **rank: int) -> Layout:
    return Layout(plan, block_size=block_size, head_dim=HEAD_DIM, dtype=dtype, **rank)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    layers, heads = draw(st.integers(1, 3)), draw(st.sampled_from([2, 4]))
    windows = st.one_of(st.just(FULL), st.integers(1, 90))

    def table(values: st.SearchStrategy[object]) -> list[list[object]]:
        return [[draw(values) for _ in range(heads)] for _ in range(layers)]

    return Plan(table(st.integers(0, 40)), table(windows), table(st.booleans()))


def pages_of(plan: Plan, tokens: int, block_size: int) -> torch.Tensor:
    """Pages of every head, from the plan's meaning alone: (num_layers, num_kv_heads)."""
    kept = torch.where(plan.is_full, tokens, (plan.sink_size.long() + plan.window_size).clamp(max=tokens))
    return -(-kept // block_size)


@given(plans(), st.sampled_from([16, 32]), st.lists(st.integers(0, 300), min_size=1), st.sampled_from([1, 2]))
def test_every_page_and_sum_has_a_place_of_its_own(
    plan: Plan, block_size: int, lengths: list[int], tp_size: int
) -> None:
    for rank in range(tp_size):
        layout = make_layout(plan, block_size, tp_size=tp_size, tp_rank=rank)
        part = layout.plan
        block, row = layout.sum_places()
        sums = [
            place
            for layer, head in part.compensate.nonzero().tolist()
            for place in ((int(block[layer, head]), int(row[layer, head]) + i) for i in (0, 1))
        ]
        assert len(set(sums)) == len(sums) == 2 * int(part.compensate.sum())
        assert all(b < layout.sum_blocks and r < layout.sums_per_block for b, r in sums)
        for tokens in lengths:
            pages, places = pages_of(part, tokens, block_size), layout.page_places(-(-tokens // block_size))
            used = [int(places[x, h, p]) for x, h in torch.ones_like(pages).nonzero() for p in range(pages[x, h])]
            assert len(set(used)) == len(used)
            blocks = layout.growth().blocks(tokens)
            assert all(layout.sum_blocks <= place < blocks for place in used)
            if tp_size == 1:  # not one block too many; a rank may need fewer than another
                assert blocks == layout.sum_blocks + len(used)


@given(plans(), st.integers(0, 400), st.integers(0, 400))
def test_places_do_not_move_as_a_request_grows(plan: Plan, before: int, after: int) -> None:
    layout = make_layout(plan)
    few, many = sorted((-(-before // 16), -(-after // 16)))
    assert torch.equal(layout.page_places(many)[..., :few], layout.page_places(few))


def test_ranks_agree_on_the_number_of_blocks() -> None:
    plan = Plan([[0, 4, 0, 4]], [[FULL, 60, 1, 20]], [[False, True, False, True]])
    ranks = [make_layout(plan, tp_size=2, tp_rank=rank) for rank in range(2)]
    assert ranks[0].limits == ranks[1].limits == (FULL, 4)  # 64 rows, 16 of a block
    assert ranks[0].sum_blocks == ranks[1].sum_blocks == 1
    assert ranks[1].plan.window_size.tolist() == [[1, 20]]


def test_bytes_are_the_plans_but_for_whole_blocks_of_sums() -> None:
    layout = make_layout(MIXED)
    sum_bytes = int(MIXED.compensate.sum()) * 2 * HEAD_DIM * 4
    block_bytes = 2 * 16 * HEAD_DIM * 4
    for tokens in (1, 16, 17, 200):
        pages = layout.growth().blocks(tokens) - layout.sum_blocks
        wanted = MIXED.kv_bytes(tokens, head_dim=HEAD_DIM, dtype=torch.float32, page_size=16)
        assert pages * block_bytes == wanted - sum_bytes
    assert 0 <= layout.sum_blocks * block_bytes - sum_bytes < block_bytes


def test_growth_by_hand() -> None:
    growth = Growth((FULL, FULL, 3, 1), sum_blocks=1, block_size=16)
    assert [growth.blocks(tokens) for tokens in (0, 1, 16, 17, 48, 49, 16 * 100)] == [1, 5, 5, 8, 11, 13, 1 + 4 + 200]


def test_page_limits() -> None:
    assert page_limits(Plan([[4, 0, 0]], [[FULL, 16, 17]], [[False] * 3]), 16).tolist() == [[FULL, 1, 2]]


def test_refusals() -> None:
    for change, error, message in (
        ({"plan": dataclasses.replace(MIXED, window_fraction=0.2)}, ValueError, "plan: expected final windows, got"),
        ({"block_size": 24}, ValueError, "block_size: expected a multiple of 16, got 24"),
        ({"tp_size": 2}, ValueError, "tp_size: expected a divisor of 3 kv heads, got 2"),
        ({"tp_size": 6}, ValueError, "tp_size: expected a divisor of 3 kv heads, got 6"),
    ):
        with pytest.raises(error, match=f"^{message}"):
            make_layout(**{"plan": MIXED} | change)
