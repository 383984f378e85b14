# SPDX-License-Identifier: Apache-2.0
"""The capacity bench: what it appends, how it reads it back, what it refuses, and its arithmetic."""

import csv
import itertools
from dataclasses import replace

import pytest
import torch
from razor_attention.bench import capacity, cases, harness, plot, resident, stored

from razor_attention import FULL, LayerCache, Plan, reference

LAYER = cases.Layer(num_heads=8, num_kv_heads=2, head_dim=40, page_size=16)
KV = (None, "int8", "int4")
every_format = pytest.mark.parametrize("kv", KV)


@pytest.fixture(autouse=True)
def short_samples(monkeypatch):
    monkeypatch.setattr(harness, "_STREAM_BYTES", 1 << 16)
    monkeypatch.setattr(harness, "_MATMUL_SIZE", 32)


def small_plan(layers=3):
    heads = {1: [0], 2: [0, 1]}
    policy = {"sink_size": 4, "min_window": 100, "window_fraction": 0.0}
    return Plan.from_heads(heads, num_layers=layers, num_kv_heads=2, **policy)


# --- read back


POLICIES = ((0, FULL, False), (4, 40, True), (0, 40, False), (7, 1, True), (300, 9, True), (4, 150, True))


@every_format
def test_what_is_held_gives_the_definition(kv, monkeypatch):
    """In blocks, across page ends; before and after the rings are full."""
    monkeypatch.setattr(stored, "_BLOCK", 2)
    layer = replace(LAYER, num_heads=2 * len(POLICIES), num_kv_heads=len(POLICIES), kv_dtype=kv)
    query, key, value = layer.tokens(230, seed=0)
    cache = layer.cache(Plan(*(torch.tensor([column]) for column in zip(*POLICIES, strict=True))))
    for begin, end in ((0, 37), (37, 200), (200, 229)):
        cache.append(key[:, :, begin:end], value[:, :, begin:end])
        new = [x[:, :, end : end + 1].double() for x in (query, key, value)]
        wanted = reference.attention(*new, *cache._tensors(), scale=40**-0.5)
        for h, (sinks, window, _) in enumerate(POLICIES):
            tokens = stored.tokens_held(cache, h).tolist()
            assert sorted(tokens) == reference.kept_tokens(end, sinks, window)
            assert [reference.row_of_token(t, sinks, window) for t in tokens] == list(range(len(tokens)))
            out = stored.attended(cache, h, new[0][0, 2 * h : 2 * h + 2, 0], new[1][0, h, 0], new[2][0, h, 0])
            assert (out - wanted[0, 2 * h : 2 * h + 2, 0]).abs().max() < 1e-12


@every_format
def test_as_stored_is_what_a_cache_gives_back(kv):
    layer = replace(LAYER, kv_dtype=kv)
    _, key, value = layer.tokens(50, seed=0)
    cache = layer.cache(Plan.full(1, 2))
    cache.append(key, value)
    for pages, rows in ((cache.key_pages, key), (cache.value_pages, value)):
        wanted = stored.as_stored(rows, layer)
        assert wanted.shape == rows.shape
        assert 0 <= (wanted - rows).abs().max() < {None: 1e-9, "int8": 0.02, "int4": 0.3}[kv]
        assert torch.equal(stored.stored_rows(pages, cache.page_table[1], 40)[:50].float(), wanted[0, 1])


def test_bytes_of_a_row():
    sizes = [replace(cases.LLAMA3_8B, kv_dtype=kv).row_bytes for kv in KV]
    assert sizes == [2 * 256, 2 * 132, 2 * 80]
    assert [replace(cases.LLAMA3_8B, kv_dtype=kv).format for kv in KV] == ["bf16", "int8", "int4"]
    assert list(cases.stored_plans(cases.LLAMA3_8B)) == [
        "full", "1-full 4+4000+mean", "1-full 64+256",
        "full int8", "1-full 4+4000+mean int8", "full int4", "1-full 4+4000+mean int4",
    ]  # fmt: skip


# --- a whole model


def test_a_tape_gives_every_token_a_row_of_its_own():
    tape = capacity.Tape(LAYER, 3, 400)
    key, value = (torch.cat([tape.rows(i, 0, 400)[side] for i in range(3)], 1) for side in (0, 1))
    assert key.shape == (1, 6, 400, 40)
    assert len(key.reshape(-1, 40).unique(dim=0)) == 6 * 400
    assert not torch.equal(key, value)
    assert torch.equal(tape.rows(2, 100, 250)[1], value[:, 4:, 100:250])
    query = tape.query(1, 400)
    weight = (query.view(2, 4, 40).float() @ key[0, 2:4].float().mT * 40**-0.5).softmax(-1)
    assert weight.argmax(-1).tolist() == [[40, 200, 240, 399]] * 2


@every_format
@pytest.mark.parametrize("room", [10**9, None])
def test_measure(kv, room):
    """All layers at a time, and one after the other in as many bytes as the largest takes."""
    plan, layer = small_plan(), replace(LAYER, kv_dtype=kv)
    tape = capacity.Tape(layer, 3, 350)
    room = room or capacity.needed_bytes(plan, layer, 300, [2])
    usage = capacity.measure(plan, layer, tape, 300, rounds=7, chunk=128, room=room)
    assert usage.parts == (1 if room == 10**9 else 2)
    assert usage.used_bytes == plan.kv_bytes(300, head_dim=40, dtype=kv or torch.bfloat16, page_size=16)
    assert len(usage.step_us) == 7
    assert all(us > 0 for us in usage.step_us)
    assert usage.largest > 0.3
    assert usage.error < 0.02
    rows = capacity.rows_of(usage, plan, layer, "some", "box")
    assert [(row.case, row.plan) for row in rows] == [
        ("fill 300", "some"), ("decode 300", "some"), ("held 300", "some, resident"),
    ]  # fmt: skip
    read = 3 * 301 + 3 * (104 + 1)  # three full heads; three with a row for what they dropped
    assert (rows[1].bytes, rows[1].flops) == (read * layer.row_bytes, read * 4 * 40 * 4)
    assert {row.format for row in rows} == {layer.format}


def doubled(cache, key, value):
    cache._store(key * 2, value, None)


def forgetful(cache, key, value):
    cache._store(key, value, None)
    cache.value_sum *= 1.1


def shifted(cache, query, key, value):
    return LayerCache.attend(cache, query.roll(1, 1), key, value)


@pytest.mark.parametrize(
    ("name", "wrong", "error"),
    [
        ("append", doubled, r"layer ., kv head ., token 0: expected a difference <= 0.0, got "),
        ("append", forgetful, r"layer ., kv head ., sums: expected a difference <= 0.001, got "),
        ("attend", shifted, r"300 tokens, layer ., kv head .: expected a difference <= 0.02, got "),
        ("nbytes", property(lambda cache: 1), r"caches: expected the \d+ bytes that the plan promises, got 3"),
    ],
)  # fmt: skip
def test_a_wrong_cache_is_not_timed(monkeypatch, name, wrong, error):
    class Broken(LayerCache):
        pass

    setattr(Broken, name, wrong)
    monkeypatch.setattr(cases, "LayerCache", Broken)
    plan, tape = small_plan(), capacity.Tape(LAYER, 3, 350)
    with pytest.raises(RuntimeError, match=f"^{error}"):
        capacity.measure(plan, LAYER, tape, 300, rounds=7, chunk=300, room=10**9)


def test_layers_that_do_not_fit_wait():
    plan = small_plan(5)
    one = [capacity.needed_bytes(plan, LAYER, 1000, [index]) for index in range(5)]
    assert capacity.parts_of(plan, LAYER, 1000, 10**9) == [[0, 1, 2, 3, 4]]
    parts = capacity.parts_of(plan, LAYER, 1000, one[2])
    assert list(itertools.chain(*parts)) == list(range(5))
    assert [2] in parts
    assert all(capacity.needed_bytes(plan, LAYER, 1000, part) <= one[2] for part in parts)
    with pytest.raises(
        ValueError, match=r"^context: expected a layer of 1000 tokens to need at most .* GB, got 0.000484"
    ):
        capacity.parts_of(plan, LAYER, 1000, one[2] - 1)


# --- arithmetic


def test_three_million_tokens():
    plan = cases.random_plan(cases.LLAMA3_8B_LAYERS, 8)
    assert int(plan.is_full.sum()) == 38
    assert len(plan.is_full.sum(1).unique()) > 2  # layers differ
    sizes = {label: size(3_300_000) for label, (_, size) in capacity.sizes(plan, cases.LLAMA3_8B).items()}
    assert list(sizes) == [
        "full bf16", "15% full bf16", "full int8", "15% full int8", "full int4", "15% full int4",
        "DuoAttention 50% full int4",
    ]  # fmt: skip
    assert sizes["full bf16"] == 2 * 256 * 128 * 2 * 3_300_032  # whole pages: 432.5 GB
    assert sizes["DuoAttention 50% full int4"] == 128 * (128 * 3_300_000 + 128 * 320)  # 54 GB
    means = 218 * 2 * 128 * 4
    assert sizes["15% full int4"] == (38 * 3_300_032 + 218 * 4032) * 2 * 80 + means  # 20.2 GB
    size = capacity.sizes(plan, cases.LLAMA3_8B)["15% full int4"][1]
    most = capacity.most_tokens(size, 24 * 10**9)
    assert size(most) <= 24 * 10**9 < size(most + 1000)
    assert capacity.most_tokens(size, 0) == 0


def test_contexts_as_written():
    assert [capacity.tokens_of(text) for text in ("128k", "3.3M", "1000", "most")] == [131072, 3_300_000, 1000, 0]
    for text in ("0", "-1", "M", "x", "infM"):
        with pytest.raises(capacity.ArgumentTypeError, match=f"^--context: expected tokens such as .*, got {text}$"):
            capacity.tokens_of(text)


def test_memory_that_is_available(monkeypatch, tmp_path):
    assert resident.available_bytes() > 1 << 20
    monkeypatch.setattr(resident, "_CGROUP", tmp_path)
    for name, text in (("max", "5000"), ("current", "2000")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert resident.available_bytes() == 3000
    (tmp_path / "memory.max").write_text("max\n")
    assert resident.available_bytes() > 1 << 20
    with pytest.raises(RuntimeError, match=r"^/proc/self/status: expected a line Vm, got none$"):
        resident.status_bytes("Vm")


def test_main_and_its_picture(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(capacity, "LLAMA3_8B", LAYER)
    monkeypatch.setattr(capacity, "LLAMA3_8B_LAYERS", 4)
    monkeypatch.setattr(capacity, "SPARE", 0)
    monkeypatch.setattr(capacity, "BUDGETS", (1,))
    flags = ["--results", str(tmp_path), "--machine", "box", "--rounds", "7", "--kv", "int8", "--share", "0.25"]
    capacity.main([*flags, "--context", "200", "most", "--gb", "0.004", "--chunk", "1000"])
    with (tmp_path / "box" / "capacity.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    timed = [row for row in rows if float(row["median_us"])]
    contexts = sorted({int(row["case"].split()[1]) for row in timed})
    assert contexts[0] == 200
    assert contexts[1] > 5000
    assert contexts[1] % 1000 == 0
    assert [row["plan"] for row in timed] == ["25% full int8"] * 4
    assert len(rows) == len(timed) + 2 + 7 * (2 + 1)
    assert all(float(row["roofline"]) > 0 for row in timed)
    out = capsys.readouterr().out
    assert "2 full, others 4 + 4000 + compensation), int8\n" in out
    assert "25% full int8, resident" not in out
    plot.main(["--results", str(tmp_path)])
    picture = tmp_path / "plots" / "box-capacity.png"
    assert capsys.readouterr().out == f"{picture}\n"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_help_names_the_module(capsys):
    with pytest.raises(SystemExit) as stop:
        capacity.main(["--help"])
    assert stop.value.code == 0
    assert f"python -m {capacity.__name__} " in capsys.readouterr().out
