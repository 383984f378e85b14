# SPDX-License-Identifier: Apache-2.0
"""The benches beside rivals: FlexAttention, copies, whole maps, DynamicCache, kvpress. Nothing depends on a time."""

import contextlib
import subprocess
import sys

import pytest
import torch
from razor_attention.bench import append, attention, cases, flex, generate, harness, head_scores, memory, quick

from razor_attention import Plan, reference
from razor_attention.reference import kept_tokens

LAYER = cases.Layer(num_heads=4, num_kv_heads=2, head_dim=16)
SHAPE = memory.Shape(hidden_size=64, intermediate_size=64, num_layers=4, num_heads=8, num_kv_heads=4)


@pytest.fixture(autouse=True)
def short_samples(monkeypatch):
    monkeypatch.setattr(harness, "_SAMPLE_SECONDS", 0.0)  # one call each
    monkeypatch.setattr(harness, "_STREAM_BYTES", 1 << 16)
    monkeypatch.setattr(harness, "_MATMUL_SIZE", 32)


def small_plans(layer):
    heads = Plan.from_heads({0: [0]}, num_layers=1, num_kv_heads=2, sink_size=2, min_window=16, window_fraction=0.0)
    return {"full": Plan.full(1, 2), "mean": heads, "streaming": Plan.streaming(1, 2, 3, 8)}


# --- attention


def test_flex_visits_what_a_plan_keeps():
    for tokens, sinks, window in ((700, 64, 200), (1000, 0, 300), (256, 300, 1), (130, 5, 129)):
        policy = {"sink_size": sinks, "min_window": window, "window_fraction": 0.0, "compensate": False}
        plan = Plan.from_heads({0: [0]}, num_layers=1, num_kv_heads=2, **policy)
        mask = flex.block_mask(plan, 2, tokens)
        at, rows = torch.arange(tokens), -(-tokens // flex.BLOCK)
        keeps = torch.stack([mask.mask_mod(at[0], torch.tensor(h), at[:, None], at) for h in range(4)])
        for head, seen in ((1, tokens), (2, None)):
            for p in (0, tokens // 2, tokens - 1):
                wanted = kept_tokens(p + 1, sinks if seen is None else 0, window if seen is None else tokens)
                assert keeps[head, p].nonzero().flatten().tolist() == sorted(wanted)
        pad, cut = rows * flex.BLOCK - tokens, (4, rows, flex.BLOCK, rows, flex.BLOCK)
        padded = [torch.nn.functional.pad(keeps, (0, pad, 0, pad), value=value).view(cut) for value in (False, True)]
        some, whole = torch.zeros(2, 4, rows, rows, dtype=torch.bool)
        for count, places, said in (
            (mask.kv_num_blocks, mask.kv_indices, some),
            (mask.full_kv_num_blocks, mask.full_kv_indices, whole),
        ):
            for h, q in torch.cartesian_prod(torch.arange(4), torch.arange(rows)).tolist():
                said[h, q, places[0, h, q, : count[0, h, q]].long()] = True
        assert torch.equal(some | whole, padded[0].any(4).any(2))
        assert not (whole & ~padded[1].all(4).all(2)).any()
        assert whole.any()
    with pytest.raises(ValueError, match=r"^plan: expected one without compensation, got 1 kv heads with it$"):
        flex.block_mask(small_plans(LAYER)["mean"], 2, 100)


def test_flex_that_does_not_compile_is_left_out(monkeypatch, capsys):
    def compiler(*_, **__):
        def call(*_, **__):
            raise RuntimeError("no compiler\nfound")

        return call

    monkeypatch.setattr(torch, "compile", compiler)
    assert flex.flex_rival(*LAYER.tokens(20, 0), Plan.streaming(1, 2, 3, 8)) is None
    assert capsys.readouterr().out == "FlexAttention is left out: RuntimeError: no compiler\n"


def test_overhead_bench():
    rows = attention.overhead(LAYER, rounds=7)
    assert [row.plan for row in rows] == ["op", "append", "attend", "sdpa"]
    assert {row.case for row in rows} == {"overhead, 2 kv heads"}
    assert rows[0].bytes == 2 * attention.SHORT * LAYER.row_bytes


# --- append and head scores


def test_append_bench(monkeypatch):
    monkeypatch.setattr(cases, "plans", small_plans)
    rows = append.append(LAYER, 100, rounds=7, name="100")
    given = 2 * 100 * LAYER.row_bytes
    sizes = {"full": 2 * given, "mean": given + 118 * 64, "streaming": given + 22 * 64, "clone": 2 * given}
    sizes |= {f"{plan} int8": given + held * 2 * 20 for plan, held in (("full", 200), ("mean", 118))}
    at = len(rows) // 2
    prompt, token = ({row.plan: row for row in some} for some in (rows[:at], rows[at:]))
    names = ["full", "mean", "streaming", "full int8", "mean int8", "full int4", "mean int4"]
    assert (list(prompt), list(token)) == ([*names, "clone"], [*names, "cat"])
    assert {name: prompt[name].bytes for name in sizes} == sizes
    assert {row.case for row in token.values()} == {"one token after 100"}
    assert (token["full"].bytes, token["full int8"].bytes) == (2 * 2 * 64, 2 * (64 + 40))
    assert [prompt[name].format for name in ("mean int8", "full int4", "clone")] == ["int8", "int4", "bf16"]
    monkeypatch.setattr(cases.LayerCache, "append", lambda cache, key, value: cache._store(key * 2, value, None))
    with pytest.raises(RuntimeError, match=r"^append 100 full, token 0: expected a difference <= 0.0, got "):
        append.append(LAYER, 100, rounds=7, name="100")


def reference_scores(query, key, period):
    return reference.head_scores(query, key, period, scale=query.shape[-1] ** -0.5)


def test_head_scores_bench(monkeypatch):
    scores, sdpa, maps = head_scores.scores(LAYER, 10, rounds=7)
    assert (scores.plan, sdpa.plan, maps.plan, scores.case) == ("scores", "sdpa", "row by row", "41 tokens")
    assert sdpa.flops == 2 * scores.flops
    assert [row.plan for row in head_scores.scores(LAYER, 10, rounds=7, maps=False)] == ["scores", "sdpa"]
    monkeypatch.setattr(
        head_scores, "row_by_row", lambda query, key, period: reference_scores(query, key, period)[::-1]
    )
    with pytest.raises(RuntimeError, match=r"^head scores, row by row, echo: expected a difference <= 0.0005, got "):
        head_scores.scores(LAYER, 10, rounds=7)


def test_row_by_row_scores_as_the_definition():
    query, key, _ = LAYER.tokens(1 + 4 * 12, seed=0)
    pairs = zip(head_scores.row_by_row(query, key, 12), reference_scores(query, key, 12), strict=True)
    for have, want in pairs:
        assert have.shape == want.shape
        assert (have - want).abs().max() < 0.01 * want.max()


def test_whole_model_bench():
    rows = head_scores.whole_model(10, rounds=7, shape=memory.Shape(64, 64, 2, 4, 2))
    assert [(row.plan, row.case) for row in rows] == [
        ("find_heads", "model, 41 tokens"),
        ("forward", "model, 41 tokens"),
    ]
    assert rows[0].flops - rows[1].flops == 2 * 2 * 64 * (41 * 42 // 2)


# --- razor bench and generate


def test_quick_bench(monkeypatch, capsys):
    monkeypatch.setattr(attention, "plans", small_plans)
    monkeypatch.setattr(quick, "WALK_BYTES", 1)
    sizes = dict(zip((*quick.DECODE, *quick.PREFILL), (50, 70, 20, 30), strict=True))
    rows = quick.run(LAYER, contexts=sizes, period=10, threads=1)
    assert list(dict.fromkeys(row.case for row in rows)) == [
        "decode 8k", "decode 32k", "prefill 2k", "prefill 4k", "41 tokens",
    ]  # fmt: skip
    assert {row.threads for row in rows} == {1}
    assert all(row.roofline > 0 for row in rows)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 2 + len(rows) + 1
    assert lines[2].count("-  -") >= 5
    assert all(" 1.00x " in line for line in lines if "  sdpa  " in line)


def test_quick_bench_needs_torch_alone():
    code = "import sys; sys.modules |= dict.fromkeys(('transformers', 'matplotlib', 'tqdm')); "
    done = subprocess.run([sys.executable, "-c", code + "import razor_attention.bench.quick"], check=False)
    assert done.returncode == 0


def rival_press(plan):
    """What kvpress would do to a cache: nothing, with the plan's model in hand."""
    return lambda model: contextlib.nullcontext(model)


@pytest.mark.slow
def test_generate_bench_with_quantised_caches(monkeypatch):
    monkeypatch.setattr(generate, "press_of", lambda plan: None)
    rows = generate.generate(300, rounds=7, chunk=128, shape=SHAPE, kv_dtypes=("int8", "int4"))
    held = {row.plan: row for row in rows if row.case == "prefill 300"}
    assert [(name, row.format) for name, row in held.items()] == [
        ("dynamic", "bf16"), ("razor", "bf16"), ("razor int8", "int8"), ("razor int4", "int4"),
    ]  # fmt: skip
    plan = memory.razor_plan(SHAPE)
    assert [held[f"razor {kv}"].bytes for kv in ("int8", "int4")] == [
        plan.kv_bytes(300, head_dim=8, dtype=kv) for kv in ("int8", "int4")
    ]


@pytest.mark.parametrize("pressed", [False, True])
def test_generate_bench(monkeypatch, pressed):
    monkeypatch.setattr(generate, "press_of", rival_press if pressed else lambda plan: None)
    rows = generate.generate(300, rounds=7, chunk=128, shape=SHAPE)
    names = ["dynamic", "razor", *["kvpress"] * pressed]
    cells = [(f"{phase} 300", name) for name in names for phase in ("prefill", "decode")]
    assert [(row.case, row.plan) for row in rows] == [*cells, ("decode 300", "model")]
    by_cell = {(row.case, row.plan): row for row in rows}
    full = 2 * 4 * 4 * 8 * 2 * 300
    weights = by_cell["decode 300", "model"].bytes
    assert by_cell["prefill 300", "dynamic"].bytes == full
    assert by_cell["decode 300", "dynamic"].bytes == weights + full
    assert by_cell["prefill 300", "razor"].bytes == memory.razor_plan(SHAPE).kv_bytes(
        300, head_dim=8, dtype=torch.bfloat16
    )
    products = by_cell["decode 300", "model"].flops
    assert by_cell["decode 300", "dynamic"].flops == products + 4 * 4 * 64 * 300
    assert by_cell["prefill 300", "dynamic"].flops == 300 * products + 4 * 4 * 64 * (300 * 301 // 2)
    assert "x as fast as DynamicCache (target 5.0)" in generate.summary(rows)


def test_generate_bench_checks_first(monkeypatch):
    monkeypatch.setattr(generate.Plan, "full", lambda layers, heads: Plan.streaming(layers, heads, 0, 1))
    with pytest.raises(
        RuntimeError, match=r"^generate: expected the tokens of DynamicCache with a full plan, got \d+ of"
    ):
        generate.generate(300, rounds=7, chunk=128, shape=SHAPE)


def test_steps_are_times_between_tokens(monkeypatch):
    clock = generate.Clock()
    clock.times = [1.0, 3.0, 3.5, 3.75]
    assert (clock.first_us(), clock.steps_us()) == (2e6, [0.5e6, 0.25e6])


@pytest.mark.parametrize("bench", [append, generate])
def test_help_names_the_module(bench, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(["--help"])
    assert stop.value.code == 0
    assert f"python -m {bench.__name__} " in capsys.readouterr().out
