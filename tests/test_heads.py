# SPDX-License-Identifier: Apache-2.0
"""heads.py: scores, their selection rule with its ties, DuoAttention gates, and the probe."""

import math
import re
from collections import Counter
from decimal import ROUND_CEILING, Decimal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from razor_attention.heads import HeadScores, full_gates, probe_ids


def exactly(message):
    return f"^{re.escape(message)}\\Z"


def scores(echo=((0.0, 0.0),), induction=None, num_kv_heads=1, provenance=None):
    return HeadScores(echo, echo if induction is None else induction, num_kv_heads, provenance or {})


@st.composite
def score_tables(draw, values):
    """(rows of num_kv_heads * group scores, num_kv_heads)."""
    layers, num_kv_heads, group = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    row = st.lists(values, min_size=num_kv_heads * group, max_size=num_kv_heads * group)
    return draw(st.lists(row, min_size=layers, max_size=layers)), num_kv_heads


MANY_TIES = st.sampled_from([0.0, 0.125, 0.25, 1.0])
ANY = st.floats(0, 1, width=32)
RATIOS = st.floats(0, 1) | st.sampled_from([0, 1, 0.01, 0.14, 0.25, 0.5])


def expected_selection(rows, num_kv_heads, ratio):
    """The rule, word for word, in plain Python."""
    group = len(rows[0]) // num_kv_heads
    pooled = []
    for layer, row in enumerate(rows):
        for head in range(num_kv_heads):
            pooled.append((max(row[head * group + i] for i in range(group)), layer, head))
    k = round(len(pooled) * ratio)
    largest = {score for score, _, _ in sorted(pooled, reverse=True)[:k]}
    chosen = {}
    for score, layer, head in pooled:
        if score in largest:
            chosen.setdefault(layer, []).append(head)
    return chosen


# --- selection


@settings(max_examples=150, deadline=None)
@given(score_tables(MANY_TIES | ANY), RATIOS, RATIOS, st.randoms(use_true_random=False))
def test_selection_is_the_rule(table, induction_ratio, echo_ratio, random):
    rows, num_kv_heads = table
    other = [random.sample(row, len(row)) for row in rows]
    chosen = scores(rows, other, num_kv_heads).select(induction_ratio, echo_ratio)
    assert chosen == {
        "induction": expected_selection(other, num_kv_heads, induction_ratio),
        "echo": expected_selection(rows, num_kv_heads, echo_ratio),
    }
    assert list(chosen["echo"]) == sorted(chosen["echo"])


@settings(max_examples=50, deadline=None)
@given(score_tables(ANY), RATIOS, RATIOS)
def test_a_larger_ratio_chooses_a_superset(table, one, two):
    few, many = (scores(*table[:1], num_kv_heads=table[1]).select(0, ratio)["echo"] for ratio in sorted([one, two]))
    assert all(set(row) <= set(many.get(layer, [])) for layer, row in few.items())


def test_ties_choose_more_than_k():
    table = [[1.0, 1.0, 1.0, 0.5], [1.0, 0.2, 0.2, 0.2]]
    assert scores(table, num_kv_heads=4).select(0.25, 0.0) == {"induction": {0: [0, 1, 2], 1: [0]}, "echo": {}}


def test_halves_are_rounded_to_even():
    table = [[0.1, 0.2, 0.3, 0.4, 0.5]]
    chosen = [scores(table, num_kv_heads=5).select(ratio)["induction"] for ratio in (0.1, 0.3, 0.5)]
    assert chosen == [{}, {0: [3, 4]}, {0: [3, 4]}]  # 0.5 -> 0, 1.5 -> 2, 2.5 -> 2


def test_a_group_is_as_good_as_its_best_head():
    table = [[0.1, 0.9, 0.8, 0.7], [0.0, 0.0, 0.0, 1.0]]
    grouped = scores(table, num_kv_heads=2)
    assert [best.tolist() for best in grouped.group_max()] == [torch.tensor([[0.9, 0.8], [0.0, 1.0]]).tolist()] * 2
    assert grouped.select(0.5, 0.25) == {"induction": {0: [0], 1: [1]}, "echo": {1: [1]}}


def test_defaults_and_ends():
    table = torch.rand(10, 10, generator=torch.Generator().manual_seed(0))
    heads = scores(table, table.flip(0), num_kv_heads=10)
    chosen = heads.select()
    assert [sum(map(len, chosen[word].values())) for word in ("induction", "echo")] == [14, 1]
    everything = {layer: list(range(10)) for layer in range(10)}
    assert heads.select(1, 0) == {"induction": everything, "echo": {}}
    assert heads.select(1.0, 1.0) == {"induction": everything, "echo": everything}
    assert scores([[0.0, 0.0]], num_kv_heads=2).select(0.5, 0)["induction"] == {0: [0, 1]}


@pytest.mark.parametrize("name", ["induction_ratio", "echo_ratio"])
@pytest.mark.parametrize(
    ("ratio", "error"),
    [
        (1.5, ValueError),
        (-0.1, ValueError),
        (2, ValueError),
        (math.nan, ValueError),
        (math.inf, ValueError),
        (True, TypeError),
        ("0.1", TypeError),
        (None, TypeError),
    ],
)
def test_ratios_that_are_refused(name, ratio, error):
    with pytest.raises(error, match=exactly(f"{name}: expected a number in 0..1, got {ratio!r}")):
        scores().select(**{name: ratio})


# --- the scores themselves


def test_scores_are_copied_to_float32():
    table = torch.rand(2, 4, dtype=torch.float64, requires_grad=True)
    heads = scores(table, table.detach().numpy(), num_kv_heads=2)
    for stored in (heads.echo, heads.induction):
        assert (stored.dtype, stored.requires_grad) == (torch.float32, False)
        assert torch.equal(stored, table.detach().float())
    single = table.detach().float()
    heads = scores(single, num_kv_heads=2)
    single.zero_()
    assert heads.echo.all()


BAD_SCORES = [
    ({"echo": [[1, 2]]}, TypeError, "echo: expected a table [layers, heads] of floats, got torch.int64"),
    (
        {"echo": [[1.0, 2.0], [3.0]]},
        TypeError,
        "echo: expected a table [layers, heads] of floats, got [[1.0, 2.0], [3.0]]",
    ),
    ({"echo": None}, TypeError, "echo: expected a table [layers, heads] of floats, got None"),
    ({"echo": [[1j]]}, TypeError, "echo: expected a table [layers, heads] of floats, got torch.complex128"),
    ({"echo": [0.5]}, ValueError, "echo: expected a table [layers, heads] of floats, got shape [1]"),
    ({"echo": torch.ones(0, 4)}, ValueError, "echo: expected a table [layers, heads] of floats, got shape [0, 4]"),
    ({"echo": [[0.5, math.nan]]}, ValueError, "echo: expected finite values, got nan"),
    ({"echo": [[1e39]]}, ValueError, "echo: expected finite values, got 1e+39"),
    ({"induction": [[math.inf, 1.0]]}, ValueError, "induction: expected finite values, got inf"),
    ({"induction": [[0.5]]}, ValueError, "induction: expected shape [1, 2] like echo, got [1, 1]"),
    ({"echo": [[0.1] * 6], "num_kv_heads": 4}, ValueError, "num_kv_heads: expected a divisor of 6 heads, got 4"),
    ({"num_kv_heads": 0}, ValueError, "num_kv_heads: expected an integer >= 1, got 0"),
    ({"num_kv_heads": 1.0}, TypeError, "num_kv_heads: expected an integer, got 1.0"),
    ({"num_kv_heads": True}, TypeError, "num_kv_heads: expected an integer, got True"),
    ({"provenance": [1]}, TypeError, "provenance: expected a dict, got list"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_SCORES)
def test_scores_that_are_refused(arguments, error, message):
    with pytest.raises(error, match=exactly(message)):
        scores(**arguments)


# --- files


@settings(max_examples=25, deadline=None)
@given(score_tables(st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_scores_come_back_bit_for_bit(tmp_path_factory, table):
    path = tmp_path_factory.mktemp("scores") / "scores.json"
    rows, num_kv_heads = table
    heads = scores(rows, [row[::-1] for row in rows], num_kv_heads, {"model": "tiny", "seed": 3})
    heads.save(path)
    again = HeadScores.load(path)
    assert torch.equal(again.echo, heads.echo)
    assert torch.equal(again.induction, heads.induction)
    assert torch.equal(again.echo.signbit(), heads.echo.signbit())
    assert (again.num_kv_heads, again.provenance) == (num_kv_heads, {"model": "tiny", "seed": 3})


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"echo"', '"copying"', "expected the key 'echo', got a file without it"),
        (
            "razor-attention scores",
            "razor-attention plan",
            "expected format 'razor-attention scores', got 'razor-attention plan'",
        ),
        ('"version": 1', '"version": 2', "expected version 1, got 2"),
        ("0.5", "NaN", "echo: expected finite values, got nan"),
        ("0.5", '"x"', "echo: expected a table [layers, heads] of floats, got [['x', 0.25]]"),
        ('"num_kv_heads": 2', '"num_kv_heads": 3', "num_kv_heads: expected a divisor of 2 heads, got 3"),
        ('"provenance": {}', '"provenance": null', "provenance: expected a dict, got NoneType"),
    ],
)
def test_score_files_that_are_refused(tmp_path, old, new, message):
    path = tmp_path / "scores.json"
    scores([[0.5, 0.25]], num_kv_heads=2).save(path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=exactly(f"{path}: {message}")):
        HeadScores.load(path)


def test_provenance_that_json_cannot_hold_leaves_no_file(tmp_path):
    message = "obj: expected JSON values, got Object of type set is not JSON serializable"
    with pytest.raises(TypeError, match=exactly(message)):
        scores(provenance={"a": {1}}).save(tmp_path / "scores.json")
    assert list(tmp_path.iterdir()) == []


# --- gates


def quantile_rule(gates, sparsity):
    """The published rule: full where the clipped gate reaches the quantile."""
    gates = np.clip(gates, 0, 1)
    tau = 2 if sparsity >= 1 else -1 if sparsity <= 0 else np.quantile(gates, sparsity)
    return gates >= tau


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 16), st.randoms(use_true_random=False))
def test_sparsity_is_the_quantile_rule_where_no_gates_are_equal(layers, heads, sixteenths, random):
    distinct = random.sample(range(1024), layers * heads)  # multiples of 2^-10: the quantile's arithmetic is exact
    gates = np.array(distinct).reshape(layers, heads) / 1024
    full = full_gates(torch.from_numpy(gates), sparsity=sixteenths / 16)
    assert full.dtype == torch.bool
    assert full.tolist() == quantile_rule(gates, sixteenths / 16).tolist()


@settings(max_examples=100, deadline=None)
@given(score_tables(MANY_TIES | st.floats(-1, 2, width=32)), RATIOS)
def test_sparsity_compresses_the_lowest_gates_in_order(table, sparsity):
    rows = table[0]
    flat = sorted((min(max(gate, 0), 1), i) for i, gate in enumerate(gate for row in rows for gate in row))
    count = (Decimal(repr(sparsity)) * (len(flat) - 1)).to_integral_value(ROUND_CEILING)
    count = len(flat) if sparsity == 1 else int(count)
    expected = [True] * len(flat)
    for _, i in flat[:count]:
        expected[i] = False
    for gates in (rows, np.array(rows), torch.tensor(rows), torch.tensor(rows, dtype=torch.float64)):
        assert full_gates(gates, sparsity=sparsity).flatten().tolist() == expected


def test_the_number_of_compressed_heads_is_exact():
    gates = torch.linspace(0, 1, 51)[None]
    assert full_gates(gates, sparsity=0.14).tolist() == [[False] * 7 + [True] * 44]  # 0.14 * 50 exceeds 7 in float


def test_a_gate_at_the_threshold_is_full_in_its_own_precision():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        gates = torch.tensor([[0.7, 0.6999, -3.0], [0.5, 9.0, 1.0]], dtype=dtype)
        assert full_gates(gates, threshold=0.7).tolist() == (gates >= gates[0, 0]).tolist()
    assert full_gates([[-0.5, 0.0]], threshold=0).all()
    assert full_gates([[1.5, 0.99]], threshold=1).tolist() == [[True, False]]


BAD_GATES = [
    ([[0.5]], {}, ValueError, "sparsity, threshold: expected exactly one of the two, got neither"),
    (
        [[0.5]],
        {"sparsity": 0.5, "threshold": 0.5},
        ValueError,
        "sparsity, threshold: expected exactly one of the two, got both",
    ),
    ([[0.5]], {"sparsity": 1.5}, ValueError, "sparsity: expected a number in 0..1, got 1.5"),
    ([[0.5]], {"sparsity": math.nan}, ValueError, "sparsity: expected a number in 0..1, got nan"),
    ([[0.5]], {"threshold": -0.1}, ValueError, "threshold: expected a number in 0..1, got -0.1"),
    ([[0.5]], {"threshold": True}, TypeError, "threshold: expected a number in 0..1, got True"),
    ([[math.nan]], {"threshold": 0.5}, ValueError, "gates: expected finite values, got nan"),
    ([[1, 0]], {"threshold": 0.5}, TypeError, "gates: expected a table [layers, heads] of floats, got torch.int64"),
    ([0.5], {"threshold": 0.5}, ValueError, "gates: expected a table [layers, heads] of floats, got shape [1]"),
]


@pytest.mark.parametrize(("gates", "how", "error", "message"), BAD_GATES)
def test_gates_that_are_refused(gates, how, error, message):
    with pytest.raises(error, match=exactly(message)):
        full_gates(gates, **how)


# --- the probe


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 10**6), min_size=1, max_size=50),
    st.integers(0, 9),
    st.integers(1, 40),
    st.integers(2, 5),
    st.integers(0, 2**63 - 1),
)
def test_the_probe_repeats_one_block_of_the_vocabulary(vocab, prefix, period, repeats, seed):
    state = torch.get_rng_state()
    ids = probe_ids(vocab, prefix, period=period, repeats=repeats, seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    assert (ids.dtype, tuple(ids.shape)) == (torch.int64, (1 + period * repeats,))
    assert ids[0] == prefix
    assert (ids[1:].view(repeats, period) == ids[1 : 1 + period]).all()
    assert set(ids[1:].tolist()) <= set(vocab)
    assert torch.equal(ids, probe_ids(vocab, prefix, period=period, repeats=repeats, seed=seed))


def test_the_block_is_drawn_uniformly_and_with_replacement():
    block = probe_ids(range(10, 20), 0, period=20_000, repeats=2, seed=1)[1:20_001].tolist()
    counts = Counter(block)
    assert sorted(counts) == list(range(10, 20))
    assert sum((count - 2000) ** 2 / 2000 for count in counts.values()) < 27.9  # chi square, 9 degrees, 1 in 1000
    assert block != probe_ids(range(10, 20), 0, period=20_000, repeats=2, seed=2)[1:20_001].tolist()


BAD_PROBES = [
    ({"vocab_ids": []}, ValueError, "vocab_ids: expected at least one id, got none"),
    ({"vocab_ids": [-1]}, ValueError, "vocab_ids: expected an integer >= 0, got -1"),
    ({"vocab_ids": [1.5]}, TypeError, "vocab_ids: expected an integer, got 1.5"),
    ({"prefix": -1}, ValueError, "prefix: expected an integer >= 0, got -1"),
    ({"prefix": None}, TypeError, "prefix: expected an integer, got None"),
    ({"period": 0}, ValueError, "period: expected an integer >= 1, got 0"),
    ({"period": 2.0}, TypeError, "period: expected an integer, got 2.0"),
    ({"repeats": 1}, ValueError, "repeats: expected an integer >= 2, got 1"),
    ({"repeats": True}, TypeError, "repeats: expected an integer, got True"),
    ({"seed": -1}, ValueError, "seed: expected an integer >= 0, got -1"),
    ({"seed": 2**63}, ValueError, f"seed: expected an integer <= {2**63 - 1}, got {2**63}"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_PROBES)
def test_probes_that_are_refused(arguments, error, message):
    with pytest.raises(error, match=exactly(message)):
        probe_ids(**({"vocab_ids": [1], "prefix": 0, "period": 2, "repeats": 2, "seed": 0} | arguments))
