# SPDX-License-Identifier: Apache-2.0
"""A plan in other runtimes' forms, each read back the way its runtime reads it; what they lack; the CLI."""

import json
import re
import stat
from pathlib import Path

import pytest
import torch

import oracle
from razor_attention import FULL, Plan, cli, files
from razor_attention.atb import plan_tensors
from razor_attention.export import load_mindie, mindie_heads, save_duo, save_golden_stick, save_mindie

HEADS = {0: [1], 2: [0, 3]}
SIZE = {"num_layers": 3, "num_kv_heads": 4}
RAZOR = Plan.from_heads(HEADS, **SIZE)  # 4 + max(4000, 0.2 of the prompt) + compensation
FINAL = Plan.from_heads(HEADS, **SIZE, min_window=16, window_fraction=0)
DUO = Plan.from_heads(HEADS, **SIZE, sink_size=64, min_window=256, window_fraction=0, compensate=False)
MIXED = Plan([[4, 5]], [[9, 9]], [[True, True]])
WINDOWS = Plan([[4, 4]], [[10, 20]], [[True, True]])
HALF = Plan([[4, 4]], [[4000, 4000]], [[True, False]], 0.2)


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refused(message, function, *args, error=ValueError, **kwargs):
    before = sorted(Path().rglob("*"))
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        function(*args, **kwargs)
    assert sorted(Path().rglob("*")) == before


# --- MindIE

THEIRS = """
def get_global_wins(model_type, num_layers):
    prefix_matching = "prefix_matching"
    copying = "copying"
    first_sink = None
    head_dict = None
    if model_type == 'llama' and num_layers == 80:
        first_sink = 40
        head_dict = {prefix_matching: {18: [5, 0], 3: [2]}, copying: {18: [7], 4: []}}
    elif model_type == 'chatglm' and num_layers == 40:
        first_sink = 4
        head_dict = {prefix_matching: {}, copying: {5: [2]}}
    return head_dict, first_sink
"""


def test_mindie_imports_what_is_written():
    with pytest.warns(UserWarning, match=re.escape("expected its mean of N tokens to weigh N, got N ** (1 / sqrt(")):
        save_mindie(RAZOR, "wins.py", model_type="llama")
    module = {}
    exec(Path("wins.py").read_text(), module)
    assert module["get_global_wins"]("llama", 3) == ({"prefix_matching": HEADS, "copying": {}}, 4)
    assert module["get_global_wins"]("llama", 4) == module["get_global_wins"]("qwen2", 3) == (None, None)
    assert Plan.from_heads(mindie_heads("wins.py", 3, 4), **SIZE) == RAZOR
    save_mindie(Plan.full(2, 2), "full.py", model_type="llama")  # no warning
    assert load_mindie("full.py") == [("llama", 2, 0, {"induction": {0: [0, 1], 1: [0, 1]}, "echo": {}})]
    with pytest.warns(UserWarning, match="N tokens"):
        save_mindie(Plan.from_heads({}, **SIZE), "none.py", model_type="llama")
    assert load_mindie("none.py") == [("llama", 3, 4, {"induction": {}, "echo": {}})]


def test_mindies_own_tables_are_read():
    Path("wins.py").write_text(THEIRS)
    assert load_mindie("wins.py") == [
        ("llama", 80, 40, {"induction": {3: [2], 18: [0, 5]}, "echo": {18: [7]}}),
        ("chatglm", 40, 4, {"induction": {}, "echo": {5: [2]}}),
    ]
    assert mindie_heads("wins.py", 40, 4) == {"induction": {}, "echo": {5: [2]}}
    with pytest.warns(UserWarning, match="^sink_size: expected 40 like first_sink in wins.py, got 4$"):
        mindie_heads("wins.py", 80, 4)
    refused("wins.py: expected one table for 32 layers, got tables for 80, 40", mindie_heads, "wins.py", 32, 4)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("def get_global_wins", "def wins", "expected tables of heads in get_global_wins, got none"),
        ("def get", "def def get", "expected a Python module, got SyntaxError"),
        ("= 40\n", "= 40 + 0\n", "first_sink: expected a plain int, got None"),
        ("= 40\n", "= -40\n", "first_sink: expected a plain int, got None"),
        ("= 40\n", "= True\n", "first_sink: expected a plain int, got True"),
        ("num_layers == 80", "num_layers > 80", "num_layers: expected a plain int, got None"),
        ("and num_layers == 80", "or num_layers == 80", "model_type: expected a plain str, got None"),
        ("num_layers == 80", "num_layers == 18", "head_dict: expected layers below 18, got 18"),
        ("[5, 0]", "[5, 5]", "heads['prefix_matching'][18]: expected a list of different kv heads >= 0, got [5, 5]"),
        ("[5, 0]", "list(range(9))", "heads['prefix_matching'][18]: expected a list of different kv heads >= 0, got "),
        ("[5, 0]", "[5, -1]", "heads['prefix_matching'][18]: expected a list of different kv heads >= 0, got [5, "),
        ("3: [2]", "18: [2]", "heads['prefix_matching']: expected a dict of layers, got NoneType"),
        ("3: [2]", "**x", "heads['prefix_matching']: expected a dict of layers, got NoneType"),
        ("copying: {18", "'echo': {18", "head_dict: expected the keys 'prefix_matching' and 'copying', got ["),
    ],
)
def test_tables_that_are_refused(old, new, message):
    assert old in THEIRS
    Path("wins.py").write_text(THEIRS.replace(old, new))
    refused(f"wins.py: {message}", load_mindie, "wins.py", error=(TypeError, ValueError))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            RAZOR.resolve(9),
            "plan: expected windows of max(4000, 0.2 of the prompt), which MindIE has built in, got max(",
        ),
        (Plan.from_heads({}, **SIZE, window_fraction=0.5), "plan: expected windows of max(4000, 0.2 of the prompt), "),
        (
            Plan.from_heads({}, **SIZE, min_window=4001),
            "plan: expected windows of max(4000, 0.2 of the prompt), which ",
        ),
        (
            Plan.from_heads({}, **SIZE, compensate=False),
            "plan: expected compensation, which MindIE cannot do without, ",
        ),
        (MIXED, "plan: expected one sink_size for all compressed heads, all that MindIE has, got 4..5"),
        (WINDOWS, "plan: expected one window_size for all compressed heads, all that MindIE has, got 10..20"),
        (HALF, "plan: expected one compensate for all compressed heads, all that MindIE has, got both"),
    ],
)
def test_what_mindie_has_no_place_for(plan, message):
    refused(message, save_mindie, plan, "wins.py", model_type="llama")


# --- Golden Stick


def golden_stick_drops(length, sink_size, local_capacity, use_virtual_token):
    """Tokens that it leaves out or averages of a prompt: nothing up to local_capacity, then what lies behind the sinks
    and makes the rest, with the mean if there is one, local_capacity long."""
    if length <= local_capacity:
        return []
    return list(range(sink_size, sink_size + length - local_capacity + use_virtual_token))


@pytest.mark.filterwarnings("ignore:plan. expected its mean")
@pytest.mark.parametrize("plan", [FINAL, DUO])
def test_golden_stick_keeps_the_same_tokens(plan):
    settings = save_golden_stick(plan, "heads.json")
    sink, window, compensate = (int(x.amin()) for x in (plan.sink_size, plan.window_size, plan.compensate.int()))
    compensate = bool(plan.compensate.any())
    for length in (3, 20, 21, 22, 300, 319, 320, 321, 322, 1000):
        wanted = oracle.dropped_tokens(length, sink, window)
        if compensate and len(wanted) == 1:
            wanted = []  # it keeps a token that would be a mean of one
        assert golden_stick_drops(length, **settings) == wanted


def test_golden_stick_there_and_back():
    with pytest.warns(UserWarning, match="expected its mean of N tokens to weigh N, got 1 from Golden Stick"):
        settings = save_golden_stick(FINAL, "heads.json")
    assert settings == {"sink_size": 4, "local_capacity": 4 + 1 + 16, "use_virtual_token": True}
    record = json.loads(Path("heads.json").read_text())
    assert record == {"0": [1], "2": [0, 3]}
    assert [record.get(str(layer), []) for layer in range(3)] == [[1], [], [0, 3]]  # as its deploy step asks
    assert Path("heads.json").stat().st_mode & 0o777 == stat.S_IRUSR | stat.S_IWUSR | stat.S_IRGRP
    assert Plan.from_heads(files.load_heads("heads.json"), **SIZE, min_window=16, window_fraction=0) == FINAL
    assert save_golden_stick(Plan.full(2, 1), "full.json") == {}
    refused("path: expected a file name ending in .json, got heads.pt", save_golden_stick, FINAL, "heads.pt")
    message = (
        "plan: expected windows that are final, all that Golden Stick has, got at least 20 % of the prompt; resolve"
    )
    refused(message, save_golden_stick, RAZOR, "no.json")
    message = "plan: expected one window_size for all compressed heads, all that Golden Stick has, got 10..20"
    refused(message, save_golden_stick, WINDOWS, "no.json")


# --- DuoAttention


def test_duo_there_and_back():
    save_duo(DUO, "duo")
    sizes = files.load_gate_sizes("duo")
    assert sizes == (64, 256)
    gates = files.load_gates("duo")
    assert gates.tolist() == DUO.is_full.double().tolist()
    assert Plan.from_gates(gates, threshold=0.5, sink_size=sizes[0], window_size=sizes[1]) == DUO
    save_duo(Plan.full(2, 2), "full")
    assert files.load_gates("full").tolist() == [[1.0, 1.0]] * 2
    refused("plan: expected no compensation, which DuoAttention does not know, got some", save_duo, FINAL, "no")
    refused("plan: expected windows that are final, all that DuoAttention has, got at least", save_duo, RAZOR, "no")
    message = "plan: expected one sink_size for all compressed heads, all that DuoAttention has, got 4..5"
    refused(message, save_duo, MIXED, "no")


# --- the command


def razor(*words):
    return cli.main(["export", *(str(word) for word in words)])


@pytest.fixture
def plans():
    for name, plan in (("razor", RAZOR), ("final", FINAL), ("duo", DUO), ("mixed", MIXED)):
        plan.save(f"{name}.json")


def test_export_to_atb(plans, capsys):
    assert razor("razor.json", "--to", "atb", "--length", 9000, 100, "--head-dim", 64, "--out", "atb.pt") == 0
    out = capsys.readouterr().out
    rows = 2 * (4 + 1 + 4000) * 2 + (4 + 1 + 4000) + 3 * 9000 + 12 * 100 + 2 * (4 + 1 + 4000) + 2 * (4 + 1 + 4000)
    assert out == f"3 layers, {rows} cache rows behind prompts of 9000, 100 tokens\nwrote atb.pt\n"
    content = torch.load("atb.pt", weights_only=True)
    for made, wanted in zip(content["layers"], plan_tensors(RAZOR, [9000, 100], head_dim=64), strict=True):
        assert made.keys() == wanted.keys()
        assert all(made[name].equal(wanted[name]) for name in made)
    manifest = content["manifest"]
    wanted = {"compressType": 2, "qkScale": 0.125, "kvHeadNum": 4, "offset": "atb", "lengths": [9000, 100]}
    assert {name: manifest[name] for name in wanted} == wanted
    flags = "--block-size", 32, "--max-new-tokens", 7, "--offset", "mindie", "--scale", 0.5
    assert razor("razor.json", "--to", "atb", "--length", 9000, "--head-dim", 64, "--out", "atb.pt", *flags) == 0
    options = {"block_size": 32, "max_new_tokens": 7, "offset": "mindie", "scale": 0.5}
    content = torch.load("atb.pt", weights_only=True)
    wanted = plan_tensors(RAZOR, [9000], head_dim=64, **options)[0]
    assert all(content["layers"][0][name].equal(wanted[name]) for name in wanted)
    assert {name: content["manifest"][name] for name in ("offset", "qkScale")} == {"offset": "mindie", "qkScale": 0.5}
    Plan.from_windows([5, FULL], num_layers=1, num_kv_heads=2).save("windows.json")
    assert razor("windows.json", "--to", "atb", "--length", 9, "--head-dim", 64, "--out", "atb.pt", "--alibi") == 0
    content = torch.load("atb.pt", weights_only=True)
    assert content["manifest"]["compressType"] == 1
    assert content["layers"][0]["wins"].tolist() == [5, 9]


@pytest.mark.filterwarnings("always")
def test_export_to_the_others(plans, capsys):
    assert razor("razor.json", "--to", "mindie", "--model-type", "llama", "--out", "wins.py") == 0
    said = capsys.readouterr()
    assert "razor: warning: plan: expected its mean of N tokens to weigh N, got N ** " in said.err
    assert said.out == "put it in the place of get_razor_attention_wins.py\nwrote wins.py\n"
    assert mindie_heads("wins.py", 3, 4)["induction"] == HEADS
    assert razor("razor.json", "--to", "golden-stick", "--length", 40000, "--out", "heads.json") == 0
    settings = "sink_size=4, local_capacity=8005, use_virtual_token=True"
    assert capsys.readouterr().out == f"with it goes RAConfig({settings})\nwrote heads.json\n"
    assert razor("duo.json", "--to", "duo", "--out", "gates") == 0
    assert files.load_gates("gates").equal(DUO.is_full.double())


def test_a_plan_from_mindies_tables(capsys):
    Path("wins.py").write_text(THEIRS)
    words = ["plan", "--heads", "wins.py", "--layers", "80", "--kv-heads", "8", "--sink-size", "40", "--out", "p.json"]
    assert cli.main(words) == 0
    wanted = Plan.from_heads({3: [2], 18: [0, 5, 7]}, num_layers=80, num_kv_heads=8, sink_size=40)
    assert Plan.load("p.json") == wanted
    assert capsys.readouterr().err == ""
    words[words.index("80")] = "32"
    assert cli.main(words) == 2
    assert capsys.readouterr().err == "razor: wins.py: expected one table for 32 layers, got tables for 80, 40\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("final.json --to atb --length 9 --out a.pt", "--head-dim: expected a value with --to atb, got none"),
        ("final.json --to atb --head-dim 64 --out a.pt", "--length: expected a value with --to atb, got none"),
        ("final.json --to mindie --out a.py", "--model-type: expected a value with --to mindie, got none"),
        ("duo.json --to duo --scale 1 --out a", "--scale: expected --to atb with it, got --to duo"),
        ("final.json --to mindie --model-type llama --length 9 --out a.py",
         "--length: expected --to atb or golden-stick or duo with it, got --to mindie"),
        ("razor.json --to golden-stick --length 9 10 --out a.json",
         "--length: expected one value with --to golden-stick, got 2"),
        ("final.json --to atb --length 9 --head-dim 80 --out a.pt", "head_dim: expected a multiple of 32, got 80"),
        ("duo.json --to atb --length 900 --head-dim 64 --offset mindie --out a.pt",
         "offset: expected 'atb' for heads that drop tokens without compensation, got 'mindie'; ReshapeAndCache writes "
         "their mean all the same, and only 'atb' can silence it"),
        ("final.json --to mindie --model-type l-1 --out a.py", "model_type: expected a word like 'llama', got 'l-1'"),
        ("final.json --to mindie --model-type llama --out a.pt", "path: expected a file name ending in .py, got a.pt"),
        ("final.json --to mindie --model-type llama --out a.py",
         "plan: expected windows of max(4000, 0.2 of the prompt), which MindIE has built in, got max(16, 0)"),
        ("mixed.json --to golden-stick --out a.json",
         "plan: expected one sink_size for all compressed heads, all that Golden Stick has, got 4..5"),
        ("final.json --to duo --out a", "plan: expected no compensation, which DuoAttention does not know, got some"),
        ("final.json --to vllm --out a", "--to: expected one of atb, mindie, golden-stick, duo, got 'vllm'"),
        ("final.json --to duo --out no/a", "--out: expected a file or folder in an existing folder, got 'no/a'"),
        ("duo.json --to duo --out final.json", "folder: expected one in an existing folder, got final.json"),
        ("final.json --to duo", "--out: expected a value, got none"),
        ("heads.json --to duo --out a", "heads.json: expected format 'razor-attention plan', got None"),
    ],
)  # fmt: skip
def test_what_the_command_refuses(plans, capsys, line, message):
    Path("heads.json").write_text('{"0": [1]}')
    before = sorted(Path().rglob("*"))
    try:
        code = razor(*line.split())
    except SystemExit as stop:
        code = stop.code
    assert (code, capsys.readouterr().err.splitlines()[-1]) == (2, f"razor: {message}")
    assert sorted(Path().rglob("*")) == before
