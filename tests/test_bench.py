# SPDX-License-Identifier: Apache-2.0
"""The benches measure what they say, in turns, and write rows of one schema. Nothing here depends on a time."""

import csv
import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from razor_attention.bench import (
    alibi_demo,
    attention,
    cases,
    demo,
    harness,
    head_scores,
    memory,
    plot,
    resident,
    windows,
)
from razor_attention.bench.questions import Asked, Question, asked_tokens, build_tokenizer, make_text
from transformers import AutoModelForCausalLM, AutoTokenizer

from razor_attention import HeadScores, Plan, reference
from razor_attention.reference import kept_tokens

LAYER = cases.Layer(num_heads=4, num_kv_heads=2, head_dim=16)
SHAPE = memory.Shape(hidden_size=64, intermediate_size=64, num_layers=4, num_heads=8, num_kv_heads=4)
SCHEMA = ",".join(harness.FIELDS)


@pytest.fixture(autouse=True)
def short_samples(monkeypatch):
    monkeypatch.setattr(harness, "_SAMPLE_SECONDS", 0.0)  # one call each
    monkeypatch.setattr(harness, "_STREAM_BYTES", 1 << 16)
    monkeypatch.setattr(harness, "_MATMUL_SIZE", 32)


# --- harness


def test_rivals_take_turns():
    log = []
    rivals = {name: lambda name=name: log.append(name) for name in "abc"}
    times = harness.interleave(rivals, rounds=7, warmup=2)
    assert list(times) == ["a", "b", "c"]
    warm, turns = log[: 3 * 2], "".join(log[3 * 2 :])
    assert warm == ["a"] * 2 + ["b"] * 2 + ["c"] * 2
    assert turns == "abc" + "bca" + "cab" + "abc" + "bca" + "cab" + "abc"
    with pytest.raises(ValueError, match=r"^rounds: expected an integer >= 7, got 6$"):
        harness.interleave(rivals, rounds=6)


def test_a_short_call_is_repeated_within_a_sample(monkeypatch):
    monkeypatch.setattr(harness, "_SAMPLE_SECONDS", 1e-4)
    log = []
    harness.interleave({"a": lambda: log.append(1)}, rounds=7)
    assert len(log) > 2 + 7


def test_timing():
    assert harness.timing([3.0]) == harness.Timing(3.0, 0.0)
    assert harness.timing([9.0, 1.0, 2.0, 3.0, 4.0]) == harness.Timing(3.0, 2.0)


def test_rows(tmp_path):
    time_us = harness.Timing(2000.0, 10.0)
    row = harness.make_row("attention", "decode 8k", "full", time_us, nbytes=4_000_000, flops=6_000_000, on="box-2c")
    assert (row.gb_s, row.gflop_s, row.threads) == (2.0, 3.0, 1)
    assert re.fullmatch(r"[0-9a-f]{7,}\+?|unknown", row.commit)
    for _ in range(2):
        path = harness.append_rows([row, row], tmp_path)
    assert path == tmp_path / "box-2c" / "attention.csv"
    lines = path.read_text().splitlines()
    assert lines[0] == SCHEMA
    assert len(lines) == 1 + 4
    assert lines[1].startswith(f"box-2c,{row.isa},1,attention,decode 8k,bf16,full,2000.0,10.0,4000000,6000000,2.0,3.0,")
    path.write_text("time,name\n")
    with pytest.raises(ValueError, match=f"^attention.csv: expected the columns {SCHEMA}, got time,name$"):
        harness.append_rows([row], tmp_path)


@pytest.mark.parametrize(
    ("model", "slug"),
    [
        ("Intel(R) Xeon(R) Processor", "xeon"),
        ("Intel(R) Core(TM) i7-8650U CPU @ 1.90GHz", "core-i7-8650u"),
        ("AMD EPYC 7763 64-Core Processor", "epyc-7763"),
        ("aarch64", "aarch64"),
        ("(R)", "cpu"),
    ],
)
def test_machine_names_hold_no_host(model, slug):
    assert harness._slug(model) == slug
    assert re.fullmatch(r"[a-z0-9-]+-\d+c", harness.machine())


def test_ceilings_and_their_share():
    row = harness.make_row("q", "a", "x", harness.Timing(2000.0, 0.0), nbytes=4_000_000, flops=6_000_000, on="box")
    bound = harness.under_ceilings(row, 4.0, 4.0)  # 1000 us of memory, 1500 us of products
    assert (bound.ceiling_gb_s, bound.ceiling_gflop_s, bound.roofline) == (4.0, 4.0, 0.75)
    assert harness.under_ceilings(row, 4.0, 0.0).roofline == 0.5
    assert harness.under_ceilings(row, 1.0, 4.0).roofline == 2.0
    assert harness.matmul_peak("bf16", 32) > 0


def test_measured_takes_each_number_of_threads(monkeypatch):
    before, speeds = torch.get_num_threads(), iter([3.0, 5.0, 9.0, 8.0])
    monkeypatch.setattr(harness, "read_bandwidth", lambda _: next(speeds))
    monkeypatch.setattr(harness, "matmul_peak", lambda name, _: {"bf16": 50.0, "f32": 10.0}[name])

    def bench():
        time_us = harness.Timing(1.0, 0.0)
        return [harness.make_row("q", "a", n, time_us, nbytes=1, flops=1, row_format=n) for n in ("bf16", "f32")]

    rows = harness.measured(bench, [1, 2])
    assert [(row.threads, row.ceiling_gb_s, row.ceiling_gflop_s) for row in rows] == [
        (1, 5.0, 50.0), (1, 5.0, 10.0), (2, 9.0, 50.0), (2, 9.0, 10.0),
    ]  # fmt: skip
    assert torch.get_num_threads() == before


def test_table_and_bandwidth():
    text = harness.table(("a", "plan", "ms"), [("x", "full", 0.123456), ("yy", "f", 1234.5)])
    assert text == "a   plan     ms\n--  ----  -----\nx   full  0.123\nyy  f      1234"
    assert harness.read_bandwidth(1 << 16) > 0


def test_rivals_that_differ_stop_a_bench():
    harness.assert_close("x", torch.ones(2), torch.ones(2), 0.0)
    for wrong in (1.5, torch.nan):
        with pytest.raises(RuntimeError, match=r"^x: expected a difference <= 0.1, got (0.5|nan)$"):
            harness.assert_close("x", torch.tensor([1.0, wrong]), torch.ones(2), 0.1)


# --- cases and attention


def small_plans(layer):
    heads = Plan.from_heads({0: [0]}, num_layers=1, num_kv_heads=2, sink_size=2, min_window=16, window_fraction=0.0)
    return {"full": Plan.full(1, 2), "mean": heads, "streaming": Plan.streaming(1, 2, 3, 8)}


def test_named_cases():
    assert list(cases.plans()) == ["full", "1-full 4+4000+mean", "1-full 64+256"]
    for plan in cases.plans().values():
        assert (plan.num_layers, plan.num_kv_heads) == (1, cases.LLAMA3_8B.num_kv_heads)
    assert cases.LLAMA3_8B.row_bytes == 2 * 128 * 2


@pytest.mark.parametrize("context", [1, 10, 19, 40])
def test_rows_read(context):
    for plan in small_plans(LAYER).values():
        wanted = []
        for seen in range(1, context + 1):
            rows = 0
            for sinks, window, compensate in zip(*(table.tolist() for table in plan.layer(0)), strict=True):
                kept = len(kept_tokens(seen, sinks, window))
                rows += kept + (compensate and kept < seen)
            wanted.append(rows)
        assert cases.rows_read(plan, context) == wanted[-1]
        assert cases.rows_read_by_prompt(plan, context) == sum(wanted)


@pytest.fixture
def of_small_plans(monkeypatch):
    monkeypatch.setattr(attention, "plans", small_plans)
    monkeypatch.setattr(cases, "plans", small_plans)


QUANTISED = [f"{plan} {kv_dtype}" for kv_dtype in ("int8", "int4") for plan in ("full", "mean")]
FORMATS = [*["bf16"] * 3, *["int8"] * 2, *["int4"] * 2]


@pytest.mark.usefixtures("of_small_plans")
def test_attention_bench():
    rows = attention.decode(LAYER, 100, rounds=7, walk_bytes=30_000, name="100")
    ours = [f"{plan} {how}" for plan in ("full", "mean", "streaming", *QUANTISED) for how in ("attend", "op")]
    assert [row.plan for row in rows] == [*ours, "sdpa", "sdpa packed"]
    assert [row.format for row in rows[::2]] == [*FORMATS, "bf16"]
    by_plan = {row.plan: row for row in rows}
    assert by_plan["full op"].bytes == by_plan["sdpa"].bytes == 2 * 101 * LAYER.row_bytes
    assert by_plan["streaming op"].bytes == 2 * 11 * LAYER.row_bytes
    assert by_plan["sdpa"].flops == by_plan["full int4 op"].flops == 4 * 4 * 101 * 16
    assert by_plan["full int8 op"].bytes == 2 * 101 * 2 * 20
    less = attention.decode(LAYER, 100, rounds=7, walk_bytes=1, name="100", kv_dtypes=())
    assert [row.plan for row in less] == [*ours[:6], "sdpa", "sdpa packed"]
    rows = attention.prefill(LAYER, 70, rounds=7, name="70", flex=False)
    assert [row.plan for row in rows] == ["full attend", "mean attend", "streaming attend", "sdpa"]
    assert {row.case for row in rows} == {"prefill 70"}
    assert rows[0].flops == rows[-1].flops == 4 * 4 * 16 * (70 * 71 // 2)


@pytest.mark.usefixtures("of_small_plans")
def test_chunk_bench():
    rows = attention.chunk(LAYER, 100, rounds=7, name="100", tokens=30)
    assert [row.plan for row in rows] == [*(f"{x} op" for x in ("full", "mean", "streaming", *QUANTISED)), "sdpa"]
    assert [row.format for row in rows] == [*FORMATS, "bf16"]
    assert {row.case for row in rows} == {"30 tokens after 100"}
    products, given = 4 * 4 * 16, 30 * (2 * 4 + 2 * 2) * 16 * 2
    assert rows[0].flops == rows[3].flops == rows[-1].flops == products * sum(range(101, 131))
    assert rows[1].flops == 2 * 4 * 16 * (sum(range(101, 131)) + 30 * (18 + 1))
    assert (rows[0].bytes, rows[1].bytes) == (given + 200 * 64, given + 118 * 64)
    assert rows[3].bytes == given + 200 * 2 * 20


@pytest.mark.usefixtures("of_small_plans")
def test_what_attention_must_give_is_of_stored_rows(monkeypatch):
    """An int4 cache is held to what int4 keeps of past tokens, and the new ones come as they are."""
    _, key, value = LAYER.tokens(90, seed=0)
    layer = dataclasses.replace(LAYER, kv_dtype="int4")
    for given, read in zip((key, value), attention.after(layer, key, value, 7), strict=True):
        assert torch.equal(read[:, :, -7:], given[:, :, -7:].float())
        off = (read - given)[:, :, :-7].abs()
        assert 0.05 < off.max() < 0.5
    monkeypatch.setattr(attention, "as_stored", lambda rows, layer: rows.float())
    with pytest.raises(RuntimeError, match=r"^decode 50 full int4: expected a difference <= 0.02, got "):
        attention.decode(LAYER, 50, rounds=7, walk_bytes=1, name="50")


@pytest.mark.parametrize("bench", [attention.decode, attention.chunk])
def test_a_wrong_kernel_is_not_timed(monkeypatch, bench):
    monkeypatch.setattr(attention, "attend_op", lambda cache, query, *_: torch.zeros_like(query))
    flags, case = (
        ({"walk_bytes": 1}, "decode 50") if bench is attention.decode else ({"tokens": 9}, "9 tokens after 50,")
    )
    with pytest.raises(RuntimeError, match=f"^{case} full: expected a difference <= 0.02, got "):
        bench(LAYER, 50, rounds=7, name="50", **flags)


def test_quantised_rows_are_under_the_ceiling_of_bf16(monkeypatch):
    monkeypatch.setattr(harness, "read_bandwidth", lambda _: 5.0)
    asked = []
    monkeypatch.setattr(harness, "matmul_peak", lambda name, _: asked.append(name) or 50.0)
    time_us = harness.Timing(1.0, 0.0)
    names = ("int8", "int4", "bf16")
    rows = [harness.make_row("q", "a", n, time_us, nbytes=1, flops=1, row_format=n) for n in names]
    assert [row.ceiling_gflop_s for row in harness.measured(lambda: rows)] == [50.0] * 3
    assert asked == ["bf16"]


def test_windows_bench(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(windows, "BAICHUAN_13B", windows.Shape(num_heads=3, hidden=48))
    monkeypatch.setattr(harness, "read_bandwidth", lambda _: 10.0)
    wanted = ["--results", str(tmp_path), "--machine", "box", "--rounds", "7", "--layers", "2"]
    windows.main([*wanted, "--dtype", "float32", "bfloat16"])
    with (tmp_path / "box" / "windows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["plan"] for row in rows] == ["windows", "torch"] * 4
    assert [row["format"] for row in rows] == ["f32"] * 4 + ["bf16"] * 4
    assert int(rows[0]["flops"]) == 2 * 2 * 48**3
    assert int(rows[0]["bytes"]) == 2 * 2 * 48 * 48 * 4
    assert "bfloat16, input-columns heads: torch takes " in capsys.readouterr().out
    monkeypatch.setattr(windows, "by_torch", lambda query, key: torch.zeros(3))
    with pytest.raises(RuntimeError, match=r"^windows, true heads: expected a difference <= 1e-05, got "):
        windows.windows(windows.BAICHUAN_13B, "true", torch.float32, rounds=7)


def test_main_prints_and_appends(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(head_scores, "LLAMA3_8B", LAYER)
    monkeypatch.setattr(head_scores, "row_by_row", lambda *part: reference.head_scores(*part, scale=0.25))
    monkeypatch.setattr(harness, "read_bandwidth", lambda _: 10.0)
    head_scores.main(["--results", str(tmp_path), "--machine", "box", "--rounds", "7"])
    with (tmp_path / "box" / "head_scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["plan"] for row in rows] == ["scores", "sdpa", "row by row"]
    assert {float(row["ceiling_gb_s"]) for row in rows} == {10.0}
    assert {row["machine"] for row in rows} == {"box"}
    assert "stream 10.0 GB/s" in capsys.readouterr().out


# --- memory


@pytest.mark.parametrize("variant", memory.VARIANTS)
def test_memory(variant):
    usage = memory.measure(variant, 256, chunk=100, steps=3, shape=SHAPE)
    assert len(usage.step_us) == 3
    assert usage.growth_bytes >= usage.prefill_growth_bytes >= 0
    head_dim, tokens = 8, 256 + 3
    wanted = {
        "dynamic": 2 * 4 * 4 * head_dim * 2 * tokens,
        "razor": memory.razor_plan(SHAPE).kv_bytes(tokens, head_dim=head_dim, dtype=torch.bfloat16),
        "control": 0,
    }
    assert usage.cache_bytes == wanted[variant]
    assert [row.case for row in memory.rows_of(usage, "box")] == ["prefill 256", "decode 256"]


def test_memory_plan_and_verdict():
    assert int(memory.razor_plan(memory.Shape()).is_full.sum()) == 5  # 15 % of 8 x 4
    usages = [memory.Usage(name, 9, size, size, 100, 1e6, [1e3]) for name, size in (("dynamic", 200), ("razor", 60))]
    assert "peak growth of razor: 0.30 of dynamic's, 0.60 of dynamic's cache alone" in memory.summary(usages)
    assert memory.Usage(**json.loads(json.dumps({f: getattr(usages[0], f) for f in usages[0].__slots__}))) == usages[0]


@pytest.mark.parametrize("refused", [False, True])
def test_peak_sees_memory_that_is_gone_again(monkeypatch, refused):
    def refuse(*_):
        raise PermissionError

    if refused:  # no access to the kernel's mark: a thread samples
        monkeypatch.setattr(Path, "write_text", refuse)
    before = resident.status_bytes("VmRSS")
    with resident.Peak().start() as peak:
        block = torch.ones(16 << 20)
        while peak.bytes() - before < 60 << 20:
            block += 1
        del block
        assert peak.bytes() - before > 60 << 20


# --- texts and the model which reads them


def test_texts_ask_for_what_they_said():
    tokenizer = build_tokenizer()
    for length in (1, 2, 40, 2048):
        assert len(make_text(tokenizer, length, 3)) == length
    ids = make_text(tokenizer, 2048, 3)
    assert ids == make_text(tokenizer, 2048, 3) != make_text(tokenizer, 2048, 4)
    asked = asked_tokens(tokenizer, ids)
    assert all(ids[position] == ids[position - distance] for position, distance in asked)
    assert len(asked) > 2048 // 8
    octaves = {distance.bit_length() for _, distance in asked}
    assert octaves >= {7, 8, 9, 10}
    words = ["mia", "hid", "lamp", "rope", "coin", "bell", ".", "?", "zoe", "made", "?", "mia", "hid", "lamp", "rope"]
    short = [tokenizer.get_vocab()[word] for word in words]
    assert asked_tokens(tokenizer, short) == [Asked(13, 11), Asked(14, 11)]


@torch.no_grad()
def test_alibi_model_reads_far_back():
    folder = Path(demo.__file__).parent / "alibi_model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert (model.config.model_type, model.dtype) == ("bloom", torch.float32)
    ids = make_text(tokenizer, 768, 1)
    logits = model(torch.tensor([ids])).logits[0, :-1]
    assert torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:])).exp() < 6.0
    far = [position for position, distance in asked_tokens(tokenizer, ids) if distance > 128]
    right = logits[torch.tensor(far) - 1].argmax(-1) == torch.tensor(ids)[far]
    assert right.float().mean() > 0.9


def test_windows_of_the_alibi_model(tmp_path, capsys):
    """All rules keep what it says; equal bytes spread evenly do not."""
    folder = Path(demo.__file__).parent / "alibi_model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    alibi_demo.run(model, tokenizer, tmp_path / "out", length=768, texts=1)
    with (tmp_path / "out/alibi_demo.csv").open(newline="") as file:
        rows = {row["method"]: {k: float(v) for k, v in row.items() if k != "method"} for row in csv.DictReader(file)}
    full = rows["full cache (transformers)"]
    for method in ("msmodelslim", "per_head", "theorem", "calibrated, 1e-05", "calibrated, 0.001", "calibrated, 0.01"):
        assert abs(rows[method]["perplexity"] / full["perplexity"] - 1) < 0.01
        assert rows[method]["answered"] >= full["answered"] - 0.01
    held = [rows[method]["kv_ratio"] for method in ("theorem", "per_head", "msmodelslim", "calibrated, 0.01")]
    assert held == sorted(held, reverse=True)
    assert held[-1] < 0.5
    least, even = rows["calibrated, 0.1"], [row for method, row in rows.items() if method.startswith("uniform")][-1]
    assert even["kv_ratio"] >= least["kv_ratio"]
    assert even["perplexity"] > 1.2 * least["perplexity"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "alibi_demo.csv", "alibi_windows.pt", "alibi_windows.png",
    }  # fmt: skip
    assert "768 tokens" in capsys.readouterr().out


# --- demo and plot


def test_demo_averages_methods_of_one_name():
    asked = [Question([1, 2, 3, 4], [5, 6, 7, 8], 0.5)] * 2
    methods = [
        demo.Method("full", None, [[5, 6, 7, 8]] * 2, 1000, 1.0, 2.0),
        demo.Method("random", None, [[5, 6, 7, 8], [0] * 4], 200, 1.0, 1.0),
        demo.Method("random", None, [[0] * 4] * 2, 400, 3.0, 2.0),
    ]
    full, others = demo.summary(99, asked, methods)
    assert full == (99, "full", 1.0, 1000, 1.0, 0.5, 15.0, 2)
    assert others == (99, "random", 0.25, 300, 0.3, 1.0, 20.0, 2)


def test_demo_rivals_have_as_many_full_heads():
    table = torch.zeros(4, 8)
    methods = demo.make_methods(
        demo.make_plan({1: [0, 2], 3: [1]}, HeadScores(table, table, 4)), HeadScores(table, table, 4)
    )
    full = [0 if method.plan is None else int(method.plan.is_full.sum()) for method in methods]
    assert full == [0, 3, 3, 3, 3, 0]
    assert methods[2].plan != methods[3].plan


def test_plots(tmp_path, capsys):
    scores = HeadScores(torch.rand(3, 4), torch.rand(3, 4), 2)
    plot.plot_scores(scores, scores.select(0.5, 0.2), tmp_path / "scores.png")
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")
    time_us = harness.Timing(5.0, 1.0)
    names = [f"{phase} {k}k" for phase in ("decode", "prefill") for k in (8, 32, 16)]
    rows = [
        harness.make_row("q", case, plan, time_us, nbytes=9, on="box")
        for case in ("a", "b", *names)
        for plan in ("full attend", "full op", "sdpa")
    ]
    harness.append_rows(rows, tmp_path)
    newer = harness.make_row("q", "a", "sdpa", harness.Timing(7.0, 1.0), nbytes=9, on="box")
    few = dataclasses.replace(newer, median_us=14.0, threads=0)
    path = harness.append_rows([newer, few], tmp_path)
    cases_of = plot.latest(path)
    assert cases_of["a"]["sdpa"]["median_us"] == "7.0"
    assert cases_of["a, 0 threads"]["sdpa"]["median_us"] == "14.0"
    assert [at for at, _ in plot.contexts(cases_of, "decode")["full attend"]] == [8192, 16384, 32768]
    (path.parent / "demo.csv").write_text("length,method\n")  # not one of these
    plot.main(["--results", str(tmp_path)])
    pictures = [f"{tmp_path}/plots/box-q.png", f"{tmp_path}/plots/box-q-contexts.png"]
    assert capsys.readouterr().out.splitlines() == pictures
    for picture in pictures:
        assert Path(picture).read_bytes().startswith(b"\x89PNG")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit):
        plot.main(["--results", str(tmp_path / "empty")])


@pytest.mark.parametrize("bench", [attention, head_scores, memory, plot, windows])
def test_help_names_the_module(bench, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(["--help"])
    assert stop.value.code == 0
    assert f"python -m {bench.__name__} " in capsys.readouterr().out + " "
