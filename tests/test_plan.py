# SPDX-License-Identifier: Apache-2.0
"""plan.py: policies from every source, the length rule, bytes, files, and what is refused."""

import copy
import json
import math
import os
import pickle
import re
from decimal import ROUND_CEILING, Decimal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from razor_attention.heads import HeadScores
from razor_attention.plan import FULL, Plan

SIZES = st.integers(0, 300)
WINDOWS = SIZES | st.just(FULL)
FRACTIONS = st.sampled_from([0, 0.14, 0.2, 1 / 3, 0.55, 1]) | st.floats(0, 1)


def exactly(message):
    return f"^{re.escape(message)}\\Z"


@st.composite
def plans(draw, fractions=FRACTIONS):
    layers, heads = draw(st.integers(1, 3)), draw(st.integers(1, 4))

    def table(values):
        row = st.lists(values, min_size=heads, max_size=heads)
        return draw(st.lists(row, min_size=layers, max_size=layers))

    fraction = draw(fractions)
    return Plan(
        table(SIZES), table(WINDOWS.filter(lambda w: w or fraction)), table(st.booleans()), fraction, {"seed": 1}
    )


def rows(plan):
    """Every head's (layer, head, sink_size, window_size, compensate) as Python values."""
    tables = (plan.sink_size.tolist(), plan.window_size.tolist(), plan.compensate.tolist())
    places = [(layer, head) for layer in range(plan.num_layers) for head in range(plan.num_kv_heads)]
    return [(layer, head, *(table[layer][head] for table in tables)) for layer, head in places]


# --- the class


def test_fields_are_canonical_whatever_they_are_made_of():
    sinks, windows, means = [[4, 0], [1, 2]], [[FULL, 7], [FULL, FULL]], [[True, True], [False, True]]
    made = [
        Plan(sinks, windows, means),
        Plan(np.array(sinks), np.array(windows, dtype=np.uint32), np.array(means)),
        Plan(torch.tensor(sinks, dtype=torch.int8), torch.tensor(windows), torch.tensor(means)),
    ]
    for plan in made:
        dtypes = [table.dtype for table in (plan.sink_size, plan.window_size, plan.compensate)]
        assert dtypes == [torch.int32, torch.int32, torch.bool]
        assert plan.sink_size.tolist() == sinks
        assert plan.window_size.tolist() == windows
        assert plan.compensate.tolist() == [[False, True], [False, False]]  # a full head drops nothing
        assert plan.is_full.tolist() == [[True, False], [True, True]]
        assert (plan.num_layers, plan.num_kv_heads) == (2, 2)
        assert plan == made[0]


def test_a_plan_shares_nothing_with_its_arguments():
    sinks, provenance = torch.zeros(1, 1, dtype=torch.int32), {"seed": 1}
    plan = Plan(sinks, [[5]], [[True]], 0, provenance)
    sinks.fill_(9)
    provenance["seed"] = 2
    assert (plan.sink_size.item(), plan.provenance) == (0, {"seed": 1})
    for table in plan.layer(0):
        table.zero_()
    assert rows(plan) == [(0, 0, 0, 5, True)]
    with pytest.raises(AttributeError):
        plan.window_fraction = 0.5


def test_equality_is_of_the_policy_alone():
    plan = Plan([[4]], [[8]], [[True]], 0.5, {"model": "a"})
    assert plan == Plan([[4]], [[8]], [[True]], 0.5, {"model": "b"})
    others = [
        Plan([[3]], [[8]], [[True]], 0.5),
        Plan([[4]], [[9]], [[True]], 0.5),
        Plan([[4]], [[8]], [[False]], 0.5),
        Plan([[4]], [[8]], [[True]], 0.25),
        Plan([[4, 4]], [[8, 8]], [[True, True]], 0.5),
        "plan",
    ]
    assert all(plan != other for other in others)
    with pytest.raises(TypeError, match="unhashable"):
        hash(plan)
    for clone in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert clone == plan
        assert clone.provenance == plan.provenance


SMALL = Plan.from_heads({0: [0, 1, 2], 3: [1, 3]}, num_layers=4, num_kv_heads=4, min_window=128, window_fraction=0)
REPRS = [
    (Plan.full(4, 4), "4 layers x 4 kv heads, 16 full"),
    (Plan.streaming(2, 3, 4, 128), "2 layers x 3 kv heads, 0 full, others 4 + 128"),
    (SMALL, "4 layers x 4 kv heads, 5 full, others 4 + 128 + compensation"),
    (
        Plan([[4]], [[9]], [[True]], 0.2),
        "1 layers x 1 kv heads, 0 full, others 4 + max(9, 0.2 * prompt) + compensation",
    ),
    (
        Plan([[0, 2]], [[5, 7]], [[True, False]]),
        "1 layers x 2 kv heads, 0 full, others 0..2 + 5..7 + compensation in 1",
    ),
]


@pytest.mark.parametrize(("plan", "text"), REPRS)
def test_repr(plan, text):
    assert repr(plan) == f"Plan({text})"


TABLE = "expected a table [layers, heads] of"
BAD_PLANS = [
    ({"sink_size": [[1.0, 2.0]]}, TypeError, f"sink_size: {TABLE} integers, got torch.float64"),
    ({"sink_size": [[True, False]]}, TypeError, f"sink_size: {TABLE} integers, got torch.bool"),
    ({"sink_size": [[1], [2, 3]]}, TypeError, f"sink_size: {TABLE} integers, got [[1], [2, 3]]"),
    ({"sink_size": [["1", "2"]]}, TypeError, f"sink_size: {TABLE} integers, got [['1', '2']]"),
    ({"sink_size": None}, TypeError, f"sink_size: {TABLE} integers, got None"),
    ({"sink_size": [1, 2]}, ValueError, f"sink_size: {TABLE} integers, got shape [2]"),
    ({"sink_size": torch.zeros(0, 2).int()}, ValueError, f"sink_size: {TABLE} integers, got shape [0, 2]"),
    ({"sink_size": [[10**30, 1]]}, TypeError, f"sink_size: {TABLE} integers, got [[{10**30}, 1]]"),
    ({"sink_size": [[0, -1]]}, ValueError, "sink_size: expected 0..2147483647 tokens, got -1"),
    ({"sink_size": [[0, 2**31]]}, ValueError, "sink_size: expected 0..2147483647 tokens, got 2147483648"),
    ({"window_size": [[-5, 0]]}, ValueError, "window_size: expected 0..2147483647 tokens, got -5"),
    ({"window_size": [[0, 2**31]]}, ValueError, "window_size: expected 0..2147483647 tokens, got 2147483648"),
    (
        {"window_size": [[7, FULL - 1]], "sink_size": [[0, 2]]},
        ValueError,
        "window_size: expected sink_size + window_size <= 2147483647, got 2 + 2147483646",
    ),
    ({"compensate": [[0, 1]]}, TypeError, f"compensate: {TABLE} bools, got torch.int64"),
    ({"window_size": [[7]]}, ValueError, "window_size: expected layers x kv heads 1 x 2 like sink_size, got 1 x 1"),
    ({"compensate": [[True]]}, ValueError, "compensate: expected layers x kv heads 1 x 2 like sink_size, got 1 x 1"),
    ({"window_fraction": 1.5}, ValueError, "window_fraction: expected a number in 0..1, got 1.5"),
    ({"window_fraction": math.nan}, ValueError, "window_fraction: expected a number in 0..1, got nan"),
    ({"window_fraction": "0.2"}, TypeError, "window_fraction: expected a number in 0..1, got '0.2'"),
    ({"window_fraction": False}, TypeError, "window_fraction: expected a number in 0..1, got False"),
    ({"provenance": None}, TypeError, "provenance: expected a dict, got NoneType"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_PLANS)
def test_plans_that_are_refused(arguments, error, message):
    good = {"sink_size": [[4, 4]], "window_size": [[8, FULL]], "compensate": [[True, False]]}
    with pytest.raises(error, match=exactly(message)):
        Plan(**(good | arguments))


def test_the_largest_sizes_are_accepted():
    plan = Plan([[1, FULL, 0]], [[FULL - 1, FULL, FULL - 1]], [[True, False, True]])
    assert plan.is_full.tolist() == [[False, True, False]]


# --- sources


def test_full_and_streaming():
    assert rows(Plan.full(2, 1)) == [(0, 0, 0, FULL, False), (1, 0, 0, FULL, False)]
    assert rows(Plan.streaming(1, 2, 4, 9)) == [(0, 0, 4, 9, False), (0, 1, 4, 9, False)]


@settings(max_examples=50, deadline=None)
@given(st.sets(st.tuples(st.integers(0, 3), st.integers(0, 2))), st.booleans(), st.randoms(use_true_random=False))
def test_listed_heads_are_full_and_the_others_are_not(chosen, compensate, random):
    heads = {"induction": {}, "echo": {}}
    for layer, head in random.sample(sorted(chosen), len(chosen)):
        for word in random.sample(["induction", "echo"], random.randint(1, 2)):
            heads[word].setdefault(layer, []).append(head)
    shape = {"num_layers": 4, "num_kv_heads": 3}
    plan = Plan.from_heads(heads, **shape, min_window=50, compensate=compensate, provenance={"seed": 7})
    for layer, head, *policy in rows(plan):
        assert policy == ([4, FULL, False] if (layer, head) in chosen else [4, 50, compensate])
    assert (plan.window_fraction, plan.provenance) == (0.2, {"seed": 7})
    foreign = {"prefix_matching": heads["induction"], "copying": heads["echo"]}
    assert Plan.from_heads(foreign, **shape, min_window=50, compensate=compensate) == plan


def test_the_defaults_are_the_papers():
    plan = Plan.from_heads({0: [1]}, num_layers=1, num_kv_heads=2)
    assert rows(plan) == [(0, 0, 4, 4000, True), (0, 1, 4, FULL, False)]
    assert (plan.window_fraction, plan.provenance) == (0.2, {})


def test_scores_to_plan():
    scores = HeadScores([[0.1, 0.9], [0.2, 0.3]], [[0.5, 0.1], [0.2, 0.3]], 2)
    plan = Plan.from_heads(scores.select(0.25, 0.25), num_layers=2, num_kv_heads=2)
    assert plan.is_full.tolist() == [[True, True], [False, False]]


BAD_HEADS = [
    ({"heads": {31: [7]}}, ValueError, "heads: expected kv heads of 4 layers x 4 kv heads, got some that need 32 x 8"),
    ({"heads": {0: [4]}}, ValueError, "heads: expected kv heads of 4 layers x 4 kv heads, got some that need 1 x 5"),
    ({"heads": {4: [0]}}, ValueError, "heads: expected kv heads of 4 layers x 4 kv heads, got some that need 5 x 1"),
    ({"heads": {0: [1, 1]}}, ValueError, "heads[0]: expected a list of different kv heads >= 0, got [1, 1]"),
    ({"heads": [0]}, TypeError, "heads: expected a dict of layers, got list"),
    ({"num_layers": 0}, ValueError, "num_layers: expected an integer >= 1, got 0"),
    ({"num_kv_heads": 2.0}, TypeError, "num_kv_heads: expected an integer, got 2.0"),
    ({"sink_size": -1}, ValueError, "sink_size: expected an integer >= 0, got -1"),
    ({"min_window": -1}, ValueError, "min_window: expected an integer >= 0, got -1"),
    ({"min_window": 2**31}, ValueError, "min_window: expected an integer <= 2147483647, got 2147483648"),
    ({"window_fraction": -0.2}, ValueError, "window_fraction: expected a number in 0..1, got -0.2"),
    ({"compensate": 1}, TypeError, "compensate: expected a bool, got 1"),
    ({"provenance": "x"}, TypeError, "provenance: expected a dict, got str"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_HEADS)
def test_heads_that_are_refused(arguments, error, message):
    with pytest.raises(error, match=exactly(message)):
        Plan.from_heads(**({"heads": {}, "num_layers": 4, "num_kv_heads": 4} | arguments))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.booleans(), st.data())
def test_a_group_keeps_its_widest_window(layers, heads, group, per_layer, data):
    values = st.integers(1, 30) | st.sampled_from([FULL - 1, FULL, FULL + 1, 2**62])
    row = st.lists(values, min_size=heads * group, max_size=heads * group)
    table = data.draw(st.lists(row, min_size=layers, max_size=layers)) if per_layer else [data.draw(row)] * layers
    windows = torch.tensor(table if per_layer else table[0])
    plan = Plan.from_windows(windows, num_layers=layers, num_kv_heads=heads, provenance={"theta": 1e-5})
    for layer, head, *policy in rows(plan):
        assert policy == [0, min(max(table[layer][head * group : (head + 1) * group]), FULL), False]
    assert (plan.window_fraction, plan.provenance) == (0, {"theta": 1e-5})
    assert Plan.from_windows(windows.tolist(), num_layers=layers, num_kv_heads=heads) == plan


BAD_WINDOWS = [
    ([5, -3], ValueError, "windows: expected at least 1 token, got -3"),
    ([5, 0], ValueError, "windows: expected at least 1 token, got 0"),
    ([5, 6, 7], ValueError, "windows: expected [heads] or [3, heads], heads a multiple of 2, got [3]"),
    ([[5, 6]] * 2, ValueError, "windows: expected [heads] or [3, heads], heads a multiple of 2, got [2, 2]"),
    ([[5]] * 3, ValueError, "windows: expected [heads] or [3, heads], heads a multiple of 2, got [3, 1]"),
    ([5.0, 6.0], TypeError, f"windows: {TABLE} integers, got torch.float64"),
    (5, ValueError, f"windows: {TABLE} integers, got shape []"),
]


@pytest.mark.parametrize(("windows", "error", "message"), BAD_WINDOWS)
def test_windows_that_are_refused(windows, error, message):
    with pytest.raises(error, match=exactly(message)):
        Plan.from_windows(windows, num_layers=3, num_kv_heads=2)


def test_gates():
    gates = torch.tensor([[0.9, 0.1], [0.5, 0.5]])
    plan = Plan.from_gates(gates, sparsity=0.5, provenance={"seed": 42})  # ceil(0.5 * 3) = 2: 0.1 and the first 0.5
    assert rows(plan) == [
        (0, 0, 64, FULL, False),
        (0, 1, 64, 256, False),
        (1, 0, 64, 256, False),
        (1, 1, 64, FULL, False),
    ]
    assert (plan.window_fraction, plan.provenance) == (0, {"seed": 42})
    plan = Plan.from_gates(gates, threshold=0.5, sink_size=1, window_size=2)
    assert rows(plan) == [(0, 0, 1, FULL, False), (0, 1, 1, 2, False), (1, 0, 1, FULL, False), (1, 1, 1, FULL, False)]
    assert not Plan.from_gates(gates, sparsity=1).is_full.any()
    assert Plan.from_gates(gates, sparsity=0).is_full.all()


BAD_GATES = [
    ({}, ValueError, "sparsity, threshold: expected exactly one of the two, got neither"),
    ({"sparsity": 0.5, "window_size": -1}, ValueError, "window_size: expected an integer >= 0, got -1"),
    ({"sparsity": 0.5, "sink_size": 1.5}, TypeError, "sink_size: expected an integer, got 1.5"),
]


@pytest.mark.parametrize(("how", "error", "message"), BAD_GATES)
def test_gates_that_are_refused(how, error, message):
    with pytest.raises(error, match=exactly(message)):
        Plan.from_gates([[0.5]], **how)


# --- the length rule


@settings(max_examples=150, deadline=None)
@given(plans(), st.integers(0, 5000))
def test_resolve(plan, prompt_len):
    least = int((Decimal(repr(plan.window_fraction)) * prompt_len).to_integral_value(ROUND_CEILING))
    resolved = plan.resolve(prompt_len)
    for (*_, sink, window, mean), after in zip(rows(plan), rows(resolved), strict=True):
        assert after[2:] == (sink, max(window, least, 1), mean)
    assert (resolved.window_fraction, resolved.provenance) == (0, plan.provenance)
    assert resolved.resolve(10 * prompt_len) is resolved
    assert (resolved is plan) == (plan.window_fraction == 0)


EXACT = [(0.2, 20000, 4000), (0.2, 20001, 4001), (0.2, 19999, 4000), (1, 9, 9), (1e-7, 10**8, 10)]
EXACT += [(0.07, 100, 7), (0.14, 50, 7), (0.55, 100, 55)]  # a little more in float


@pytest.mark.parametrize(("fraction", "prompt_len", "window"), EXACT)
def test_the_product_is_exact(fraction, prompt_len, window):
    assert Plan([[0]], [[0]], [[True]], fraction).resolve(prompt_len).window_size.item() == window


def test_a_window_beyond_int32_is_full():
    plan = Plan([[4, 0]], [[0, 0]], [[True, True]], 1.0)
    assert rows(plan.resolve(FULL - 4)) == [(0, 0, 4, FULL - 4, True), (0, 1, 0, FULL - 4, True)]
    assert rows(plan.resolve(FULL - 3)) == [(0, 0, 4, FULL, False), (0, 1, 0, FULL - 3, True)]
    assert rows(plan.resolve(FULL)) == [(0, 0, 4, FULL, False), (0, 1, 0, FULL, False)]


BAD_PROMPTS = [
    (-1, ValueError, "prompt_len: expected an integer >= 0, got -1"),
    (2**31, ValueError, "prompt_len: expected an integer <= 2147483647, got 2147483648"),
    (1.0, TypeError, "prompt_len: expected an integer, got 1.0"),
]


@pytest.mark.parametrize("fraction", [0.0, 0.2])
@pytest.mark.parametrize(("prompt_len", "error", "message"), BAD_PROMPTS)
def test_prompts_that_are_refused(fraction, prompt_len, error, message):
    with pytest.raises(error, match=exactly(message)):
        Plan([[0]], [[5]], [[True]], fraction).resolve(prompt_len)


# --- bytes


def counted_bytes(plan, seq_len, head_dim, itemsize, batch_size, page_size):
    """Walk over tokens, pages and rows one by one."""
    total = 0
    for _, _, sink, window, mean in rows(plan):
        kept = [t for t in range(seq_len) if t < sink or seq_len - 1 - t < window]
        pages = {i // page_size for i in range(len(kept))}
        total += len(pages) * page_size * head_dim * itemsize * 2
        total += head_dim * 4 * 2 if mean else 0
    return total * batch_size


@settings(max_examples=100, deadline=None)
@given(
    plans(),
    st.integers(0, 700),
    st.sampled_from([1, 64, 80]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(1, 3),
    st.sampled_from([16, 48, 64, 128]),
)
def test_bytes_are_counted_page_by_page(plan, seq_len, head_dim, dtype, batch_size, page_size):
    itemsize = torch.tensor([], dtype=dtype).element_size()
    expected = counted_bytes(plan.resolve(seq_len), seq_len, head_dim, itemsize, batch_size, page_size)
    size = plan.kv_bytes(seq_len, head_dim=head_dim, dtype=dtype, batch_size=batch_size, page_size=page_size)
    assert type(size) is int
    assert size == expected


def test_bytes_of_a_known_model():
    shape = {"head_dim": 128, "dtype": torch.bfloat16}
    assert Plan.full(32, 8).kv_bytes(131072, **shape) == 16 * 2**30
    one = Plan.from_heads({layer: [0] for layer in range(32)}, num_layers=32, num_kv_heads=8, window_fraction=0)
    pages = 131072 // 64 + 7 * math.ceil(4004 / 64)
    assert one.kv_bytes(131072, **shape) == 32 * (pages * 64 * 128 * 2 * 2 + 7 * 2 * 128 * 4)
    big = Plan.full(128, 128).kv_bytes(FULL, head_dim=1024, dtype=torch.float32, batch_size=1024)
    assert big == 128 * 128 * 2**31 * 1024 * 4 * 2 * 1024  # beyond int64


BAD_BYTES = [
    ({"seq_len": -1}, ValueError, "seq_len: expected an integer >= 0, got -1"),
    ({"seq_len": 1.5}, TypeError, "seq_len: expected an integer, got 1.5"),
    ({"head_dim": 0}, ValueError, "head_dim: expected an integer >= 1, got 0"),
    ({"batch_size": 0}, ValueError, "batch_size: expected an integer >= 1, got 0"),
    ({"page_size": 24}, ValueError, "page_size: expected a multiple of 16, got 24"),
    ({"page_size": 0}, ValueError, "page_size: expected an integer >= 16, got 0"),
    ({"dtype": "float64"}, ValueError, "dtype: expected float32, bfloat16, float16, int8 or 'int4', got 'float64'"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_BYTES)
def test_byte_questions_that_are_refused(arguments, error, message):
    with pytest.raises(error, match=exactly(message)):
        Plan.full(1, 1).kv_bytes(**({"seq_len": 1, "head_dim": 8, "dtype": torch.float32} | arguments))


# --- parts


@settings(max_examples=50, deadline=None)
@given(plans(), st.data())
def test_ranks_and_layers_are_parts_of_the_plan(plan, data):
    start = data.draw(st.integers(0, plan.num_kv_heads - 1))
    stop = data.draw(st.integers(start + 1, plan.num_kv_heads))
    part = plan.select_kv_heads(start, stop)
    assert rows(part) == [(layer, head - start, *rest) for layer, head, *rest in rows(plan) if start <= head < stop]
    assert (part.window_fraction, part.provenance) == (plan.window_fraction, plan.provenance)
    for index in range(plan.num_layers):
        sinks, windows, means = plan.layer(index)
        assert (sinks.dtype, windows.dtype, means.dtype) == (torch.int32, torch.int32, torch.bool)
        of_layer = [tuple(policy) for layer, _, *policy in rows(plan) if layer == index]
        assert list(zip(sinks.tolist(), windows.tolist(), means.tolist(), strict=True)) == of_layer


BAD_PARTS = [
    ("layer", (2,), "index: expected an integer <= 1, got 2"),
    ("layer", (-1,), "index: expected an integer >= 0, got -1"),
    ("select_kv_heads", (0, 9), "stop: expected an integer <= 8, got 9"),
    ("select_kv_heads", (8, 9), "start: expected an integer <= 7, got 8"),
    ("select_kv_heads", (3, 3), "stop: expected an integer >= 4, got 3"),
    ("select_kv_heads", (-1, 3), "start: expected an integer >= 0, got -1"),
]


@pytest.mark.parametrize(("method", "arguments", "message"), BAD_PARTS)
def test_parts_that_are_refused(method, arguments, message):
    with pytest.raises(ValueError, match=exactly(message)):
        getattr(Plan.full(2, 8), method)(*arguments)


@pytest.mark.parametrize("shape", [(4, 8), (2, 4), (8, 2)])
def test_a_plan_for_another_model_is_refused(shape):
    Plan.full(2, 8).check_model(2, 8)
    message = f"plan: expected {shape[0]} layers x {shape[1]} kv heads like the model, got 2 x 8"
    with pytest.raises(ValueError, match=exactly(message)):
        Plan.full(2, 8).check_model(*shape)


# --- files


@settings(max_examples=40, deadline=None)
@given(plans())
def test_plans_come_back_from_files(tmp_path_factory, plan):
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    plan.save(path)
    again = Plan.load(path)
    assert again == plan
    assert again.provenance == plan.provenance
    again.save(path.with_name("again.json"))
    assert path.with_name("again.json").read_bytes() == path.read_bytes()


def test_the_file_can_be_read_without_us(tmp_path):
    Plan([[4, 4]], [[FULL, 128]], [[False, True]], 0.2, {"model": "tiny"}).save(tmp_path / "plan.json")
    record = json.loads((tmp_path / "plan.json").read_text())
    assert record.pop("provenance") == {"model": "tiny"}
    assert (record.pop("format"), record.pop("version")) == ("razor-attention plan", 1)
    assert (record.pop("num_layers"), record.pop("num_kv_heads"), record.pop("window_fraction")) == (1, 2, 0.2)
    assert record == {"sink_size": [[4, 4]], "window_size": [[2**31 - 1, 128]], "compensate": [[False, True]]}


KEYS = ["num_layers", "num_kv_heads", "sink_size", "window_size", "compensate", "window_fraction", "provenance"]
BAD_FILES = [(key, None, f"expected the key {key!r}, got a file without it") for key in KEYS] + [
    ("format", "razor-attention scores", "expected format 'razor-attention plan', got 'razor-attention scores'"),
    ("format", None, "expected format 'razor-attention plan', got None"),
    ("version", 2, "expected version 1, got 2"),
    ("version", None, "expected version 1, got None"),
    ("num_layers", 3, "sink_size: expected 3 layers x 2 kv heads, got 1 x 2"),
    ("num_kv_heads", "2", "sink_size: expected 1 layers x 2 kv heads, got 1 x 2"),
    ("sink_size", [[4, -4]], "sink_size: expected 0..2147483647 tokens, got -4"),
    ("window_size", [[1, 2], [3, 4]], "window_size: expected layers x kv heads 1 x 2 like sink_size, got 2 x 2"),
    ("window_size", [[1.5, 2]], f"window_size: {TABLE} integers, got torch.float64"),
    ("compensate", [[0, 1]], f"compensate: {TABLE} bools, got torch.int64"),
    ("window_fraction", math.nan, "window_fraction: expected a number in 0..1, got nan"),
    ("window_fraction", True, "window_fraction: expected a number in 0..1, got True"),
    ("provenance", [], "provenance: expected a dict, got list"),
]


@pytest.mark.parametrize(("key", "value", "message"), BAD_FILES)
def test_plan_files_that_are_refused(tmp_path, key, value, message):
    path = tmp_path / "plan.json"
    Plan([[4, 4]], [[FULL, 128]], [[False, True]], 0.2).save(path)
    record = json.loads(path.read_text())
    del record[key]
    if value is not None:
        record[key] = value
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=exactly(f"{path}: {message}")):
        Plan.load(path)


def test_a_failed_save_leaves_the_old_plan(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    Plan.full(1, 1).save(path)

    def crash(_):
        raise OSError("disk full")

    message = "obj: expected JSON values, got Object of type Tensor is not JSON serializable"
    with pytest.raises(TypeError, match=exactly(message)):
        Plan([[0]], [[1]], [[True]], 0, {"a": torch.tensor(1)}).save(path)
    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="disk full"):
        Plan.streaming(1, 1, 4, 8).save(path)
    assert list(tmp_path.iterdir()) == [path]
    assert Plan.load(path) == Plan.full(1, 1)
