# SPDX-License-Identifier: Apache-2.0
"""The command `razor`: each sub-command from files to files, every message of ours, and the exit codes."""

import csv
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from razor_attention.bench.questions import build_tokenizer
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig

from razor_attention import FULL, HeadScores, Plan, cli, command, find_heads, find_windows
from razor_attention.files import load_heads, load_windows, save_heads, save_windows

ROPE = (
    "model: expected one that uses ALiBi (bloom, mpt, falcon with alibi, baichuan 13B), got llama; rotary models "
    "have retrieval heads instead: find_heads; one that does use ALiBi needs its slopes named"
)
TEXT = "mia hid lamp rope coin bell . the old wind moves over the quiet hill . ? mia hid"
PNG = b"\x89PNG\r\n"
COMMANDS = ["heads", "windows", "gates", "plan", "inspect", "export", "generate", "eval", "demo", "bench"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint with random weights: 3 layers x 4 heads, 2 kv heads, and the tokenizer of the demo."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=None,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bloom(tmp_path_factory):
    """A checkpoint of an ALiBi model: 2 layers x 4 heads."""
    folder = tmp_path_factory.mktemp("models") / "bloom"
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    BloomForCausalLM(BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=4)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def razor(*words):
    assert cli.main([str(word) for word in words]) == 0


def fails(capsys, *words):
    """Exit code and standard error."""
    try:
        code = cli.main([str(word) for word in words])
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr().err


# --- heads


def test_heads_writes_what_was_asked_for(model, capsys):
    ratios = "--induction-ratio", "0.5", "--echo-ratio", "0.2"
    razor("heads", model, "--out", "h.pt", "--scores", "s.json", "--plot", "h.png", "--period", 30, *ratios)
    scores = HeadScores.load("s.json")
    assert scores.echo.shape == (3, 4)
    assert scores.provenance["model"] == "tiny"
    assert scores.provenance["period"] == 30
    assert load_heads("h.pt") == scores.select(0.5, 0.2)
    assert Path("h.png").read_bytes().startswith(PNG)
    out = capsys.readouterr().out
    assert out.startswith("3 layers x 4 heads, 2 kv heads; ")
    assert len([line for line in out.splitlines() if line.lstrip()[:1].isdigit()]) == 1 + 3
    assert out.endswith("wrote h.pt, s.json, h.png\n")


@pytest.mark.filterwarnings("always")
def test_a_warning_is_one_line(model, capsys):
    razor("heads", model, "--period", 200)
    assert "razor: warning: period * repeats: expected at most 511 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_heads_from_files_and_from_memory(model, dtype):
    razor("heads", model, "--scores", "s.json", "--period", 30, "--dtype", dtype)
    loaded = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32 if dtype == "auto" else torch.bfloat16)
    assert HeadScores.load("s.json").echo.equal(find_heads(loaded, build_tokenizer(), period=30).echo)


# --- windows


def test_windows_writes_what_was_asked_for(bloom, capsys):
    razor("windows", bloom)
    assert load_windows("win.pt").equal(find_windows(bloom))
    out = capsys.readouterr().out
    assert out.startswith("win.pt: ALiBi windows of [4] heads, ")
    assert out.endswith("wrote win.pt\n")
    razor("windows", bloom, "--method", "per_head", "--per-layer", "--theta", 1e-3, "--alpha", 0, "--plot", "w.png")
    wanted = find_windows(bloom, theta=1e-3, alpha=0, method="per_head", per_layer=True)
    assert load_windows("win.pt").equal(wanted)
    assert Path("w.png").read_bytes().startswith(PNG)
    assert capsys.readouterr().out.endswith("wrote win.pt, w.png\n")


def test_windows_calibrated_on_a_text(bloom, capsys):
    Path("book.txt").write_text(f"{TEXT} " * 4)
    text = "--text", "book.txt", "--tokens", 50
    razor("windows", bloom, "--method", "calibrated", "--theta", "0.2", "--per-layer", *text)
    ids = torch.tensor([build_tokenizer()(f"{TEXT} " * 4).input_ids[:50]])
    loaded = BloomForCausalLM.from_pretrained(bloom)
    options = {"method": "calibrated", "theta": 0.2, "ids": ids}
    assert load_windows("win.pt").equal(find_windows(loaded, per_layer=True, **options))
    assert "of 50 tokens of book.txt, no query loses more than 0.19 of its attention" in capsys.readouterr().out
    razor("windows", bloom, "--method", "calibrated", "--theta", "0.2", *text)
    assert load_windows("win.pt").equal(find_windows(loaded, **options))
    capsys.readouterr()
    razor("windows", bloom, "--theta", "1e-4", *text)  # other rules are told what they drop
    assert "no query loses more than 0 of its attention" in capsys.readouterr().out


def test_windows_to_plan_to_text(bloom, capsys):
    razor("windows", bloom, "--out", "w.pt")
    razor("inspect", "w.pt")
    razor("plan", "--windows", "w.pt", "--model", bloom)
    capsys.readouterr()
    razor("generate", bloom, "--plan", "plan.json", "--prompt", TEXT, "--max-new-tokens", 5, "--compare")
    ours, theirs = (part.splitlines() for part in capsys.readouterr().out.split("\n\n"))
    assert ours[0] == theirs[0]  # windows as wide as the text


# --- plan


def test_plan_from_heads(model, capsys):
    save_heads({"induction": {0: [1]}, "echo": {2: [0]}}, "h.pt")
    razor("plan", "--heads", "h.pt", "--model", model, "--out", "p.json")
    plan = Plan.load("p.json")
    assert plan == Plan.from_heads({0: [1], 2: [0]}, num_layers=3, num_kv_heads=2)
    assert plan.provenance["file"] == "h.pt"
    assert plan.provenance["model"] == "tiny"
    out = capsys.readouterr().out
    assert out.startswith(f"{plan!r}\n")
    assert "131072" in out
    assert "head_dim 8, float32" in out
    size = "--layers", 3, "--kv-heads", 2
    flags = "--sink-size", 2, "--min-window", 16, "--window-fraction", 0.5, "--no-compensation"
    razor("plan", "--heads", "h.pt", *size, *flags)
    rule = {"sink_size": 2, "min_window": 16, "window_fraction": 0.5, "compensate": False}
    assert Plan.load("plan.json") == Plan.from_heads({0: [1], 2: [0]}, num_layers=3, num_kv_heads=2, **rule)


def test_plan_within_a_budget(model, capsys):  # a page and a sum for each head: 66 of 1024 rows of bf16
    echo, induction = torch.zeros(3, 4), torch.arange(12.0).view(3, 4) / 12
    scores = HeadScores(echo, induction, 2, {"model": "tiny", "seed": 7})
    scores.save("s.json")
    rule = {"sink_size": 2, "min_window": 62, "window_fraction": 0.0}
    flags = "--sink-size", 2, "--window-size", 62, "--window-fraction", 0
    razor("plan", "--scores", "s.json", "--budget", 0.5, "--length", 1000, "--model", model, *flags)
    plan = Plan.load("plan.json")
    assert plan == Plan.from_ranking(scores.ranking(), budget=0.5, seq_len=1000, dtype=torch.float32, **rule)
    assert (plan.provenance["budget"], plan.provenance["seed"]) == (0.5, 7)
    shares = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("    1000")]
    held, whole = (one.kv_bytes(1000, head_dim=8, dtype=torch.float32) for one in (plan, Plan.full(3, 2)))
    assert shares[0][-1] == f"{held / whole:.3f}"
    assert held <= whole / 2
    none = "budget: expected at least 0.065, the smallest share at 1000 tokens, got 0.01; smaller windows or sinks"
    code, error = fails(capsys, "plan", "--scores", "s.json", "--budget", 0.01, "--length", 1000, *flags)
    assert (code, error[: len(none) + 7]) == (2, f"razor: {none}")


def test_plan_from_the_other_sources():
    size = "--layers", 3, "--kv-heads", 2
    razor("plan", "--full", *size)
    assert Plan.load("plan.json") == Plan.full(3, 2)
    razor("plan", "--streaming", *size, "--window-size", 100)
    assert Plan.load("plan.json") == Plan.streaming(3, 2, 4, 100)
    save_windows(torch.tensor([5, 6, 7, FULL]), "win.pt")
    razor("plan", "--windows", "win.pt", *size)
    assert Plan.load("plan.json").window_size.tolist() == [[6, FULL]] * 3
    Path("gates.tsv").write_text("1.0e+00\t0.1\n0.2\t0.9\n")
    razor("plan", "--gates", "gates.tsv")
    gates = torch.tensor([[1.0, 0.1], [0.2, 0.9]])
    assert Plan.load("plan.json") == Plan.from_gates(gates, sparsity=0.5)
    razor("plan", "--gates", "gates.tsv", "--sparsity", 1, "--sink-size", 1, "--window-size", 2)
    assert Plan.load("plan.json") == Plan.streaming(2, 2, 1, 2)


# --- inspect


def test_inspect_plan(capsys):
    heads = {0: [1], 2: [0]}
    Plan.from_heads(heads, num_layers=3, num_kv_heads=2, min_window=96, window_fraction=0.0).save("p.json")
    razor("inspect", "p.json", "--length", 128, 12800)
    out = capsys.readouterr().out
    assert "\n    0  c#\n    1  cc\n    2  #c\n" in out
    whole, held = (
        p.kv_bytes(12800, head_dim=128, dtype=torch.bfloat16) for p in (Plan.full(3, 2), Plan.load("p.json"))
    )
    assert f"   12800   13.4 MB   39.3 MB  {held / whole:.3f}\n" in out
    assert out.endswith("provenance: not said\n")


def test_inspect_scores_heads_and_windows(capsys):
    echo = [[0.0, 0.9], [0.1, 0.0]]
    HeadScores(echo=echo, induction=[[0.8, 0.1], [0.2, 0.3]], num_kv_heads=2, provenance={"seed": 3}).save("s.json")
    razor("inspect", "s.json")
    out = capsys.readouterr().out
    assert "\n    0  I.           0.8000  0.9000\n" in out
    assert out.endswith("provenance: seed 3\n")
    save_heads({"induction": {0: [1, 2]}, "echo": {0: [2], 1: [0]}}, "h.pt")
    razor("inspect", "h.pt")
    assert "h.pt: 3 retrieval kv heads in 2 layers\n    0  .IB\n    1  E..\n" in capsys.readouterr().out
    save_heads({0: [1, 2]}, "h.json")
    razor("inspect", "h.json")
    assert "\n    0  .##\n" in capsys.readouterr().out
    save_windows(torch.tensor([5, 70]), "win.pt")
    razor("inspect", "win.pt")
    assert capsys.readouterr().out == "win.pt: ALiBi windows of [2] heads, 5..70 tokens\n5 70\n"


# --- generate


def test_generate_compares_with_the_full_cache(model, capsys):
    Plan.full(3, 2).save("full.json")
    razor("generate", model, "--plan", "full.json", "--prompt", TEXT, "--max-new-tokens", 9, "--compare")
    full, razor_text, *_ = capsys.readouterr().out.split("\n\n")
    assert full.splitlines()[0] == razor_text.splitlines()[0]
    assert 0 < len(full.splitlines()[0].split()) <= 9
    sizes = re.findall(r"full cache(?:: |'s )(\S+ KB)", full + razor_text)
    assert sizes == ["10.8 KB"] * 2  # one size, as transformers keeps 28 tokens
    assert "2.29 of the full cache's" in razor_text  # whole pages of 64 tokens
    assert " tokens/s" in razor_text


def test_generate_stores_in_fewer_bits(model, capsys):
    Plan.full(3, 2).save("full.json")
    shares = {}
    for kv in ("int8", "int4"):
        razor("generate", model, "--plan", "full.json", "--prompt", TEXT, "--max-new-tokens", 9, "--kv", kv)
        shares[kv] = float(re.search(r", ([\d.]+) of the full cache's", capsys.readouterr().out)[1])
    assert shares == {"int8": 0.86, "int4": 0.43}  # 64 rows of 12 and 6 bytes instead of 28 of 32
    code, error = fails(capsys, "generate", model, "--plan", "full.json", "--prompt", TEXT, "--kv", "int2")
    assert (code, error) == (2, "razor: --kv: expected one of int8, int4, got 'int2'\n")


def test_generate_reads_the_prompt_from_everywhere(model, capsys, monkeypatch):
    Plan.streaming(3, 2, 2, 6).save("p.json")
    Path("prompt.txt").write_text(TEXT)
    monkeypatch.setattr(sys, "stdin", io.StringIO(TEXT))
    texts = []
    common = "--plan", "p.json", "--prefill", "streaming"
    for words in (["--prompt", TEXT], ["--prompt-file", "prompt.txt", "--chunk", 5], ["-"]):
        razor("generate", model, *words, *common, "--max-new-tokens", 6)
        texts.append(capsys.readouterr().out.splitlines()[0])
    assert len(set(texts)) == 1  # neither the source nor the chunks matter
    razor("generate", model, "--prompt", TEXT, *common, "--max-new-tokens", 1)  # too few to say how fast
    assert "tokens/s" not in capsys.readouterr().out


# --- demo


def test_demo(model, capsys):
    razor("demo", "--model", model, "--length", 256, 300, "--questions", 2, "--out", "d")
    assert {path.name for path in Path("d").iterdir()} == {
        "demo.csv", "plan.json", "scores.json", "scores.png", "win.pt",
    }  # fmt: skip
    plan = Plan.load("d/plan.json")
    with Path("d/demo.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["length"] for row in rows] == ["256"] * 4 + ["300"] * 4
    assert rows[0]["kv_ratio"] == "1.0"
    sizes = {"head_dim": 8, "dtype": torch.float32}
    tokens = 256 + 16 - 1
    assert int(rows[0]["kv_bytes"]) == 3 * 2 * 2 * 8 * 4 * tokens
    assert int(rows[1]["kv_bytes"]) == int(rows[2]["kv_bytes"]) == plan.kv_bytes(tokens, **sizes)
    assert all(0 <= float(row["exact_match"]) <= 1 and float(row["decode_tokens_per_s"]) > 0 for row in rows)
    assert load_heads("d/win.pt").keys() == {"induction", "echo"}
    out = capsys.readouterr().out
    assert "Sample: ? " in out
    assert "random heads (mean of 3)" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--length", "600"], "length: expected at most 496 tokens for this model, got 600"),
        (["--length", "9"], "length: expected at least 18 tokens, got 9"),
        (["--questions", "0"], "--questions: expected an integer >= 1, got '0'"),
        (["--out", "file"], "--out: expected a folder, got the file 'file'"),
    ],
)
def test_demo_refuses_early(model, capsys, words, message):
    Path("file").touch()
    code, error = fails(capsys, "demo", "--model", model, *words)
    assert (code, error.splitlines()[-1]) == (2, f"razor: {message}")
    assert not Path("razor-demo").exists()


# --- help, errors, exit codes


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_that_parses(name, capsys, model, monkeypatch):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    example = capsys.readouterr().out.split("example:\n")[1].split()
    assert example[:2] == ["razor", name]
    for file in ("heads.pt", "plan.json", "book.txt"):
        Path(file).touch()
    Path("my-model").symlink_to(model)
    ran = []
    monkeypatch.setattr(command, {"eval": "evaluate"}.get(name, name), ran.append)  # eval is Python's
    razor(*example[1:])
    assert len(ran) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "COMMAND: expected a value, got none"),
        ("fly", f"COMMAND: expected one of {', '.join(COMMANDS)}, got 'fly'"),
        ("heads", "MODEL: expected a value, got none"),
        ("heads nowhere", "MODEL: expected a folder with a transformers checkpoint, got 'nowhere'"),
        ("heads MODEL --period 0", "--period: expected an integer >= 1, got '0'"),
        ("heads MODEL --repeats x", "--repeats: expected an integer >= 2, got 'x'"),
        ("heads MODEL --echo-ratio 1.5", "--echo-ratio: expected a number in 0..1, got '1.5'"),
        ("heads MODEL --out no/h.pt", "--out: expected a file in an existing folder, got 'no/h.pt'"),
        ("heads MODEL --fast", "arguments: expected those that --help shows, got --fast"),
        ("plan", "--heads --scores --windows --gates --streaming --full: expected one of them, got none"),
        ("plan --full --streaming", "--streaming: expected to stand without --full, got both"),
        ("plan --full", "--layers, --kv-heads: expected both, or --model, got fewer"),
        ("plan --scores s.json --budget 0.3", "--budget, --length: expected both with --scores, got fewer"),
        ("plan --full --layers", "--layers: expected one argument, got none"),
        ("plan --full --sink-size 4", "--sink-size: expected --heads or --scores or --gates or --streaming with it, "
         "got --full"),
        ("plan --gates bad.tsv", "bad.tsv: expected a line of numbers for each layer, got could not convert string to "
         "float: 'one'"),
        ("plan --full --model MODEL --layers 9", "plan: expected 3 layers x 2 kv heads like the model, got 9 x 2"),
        ("inspect bad.json", "bad.json: expected a plan, scores, heads or windows, got format 'other'"),
        ("windows MODEL", ROPE),
        ("windows MODEL --theta 0", "--theta: expected a number in (0, 1], got '0'"),
        ("windows MODEL --alpha -1", "--alpha: expected a number >= 0, got '-1'"),
        ("windows MODEL --method guess",
         "--method: expected one of msmodelslim, per_head, theorem, calibrated, got 'guess'"),
        ("windows MODEL --per-layer", "--per-layer: expected another --method than msmodelslim, got it"),
        ("windows MODEL --method calibrated", "--text: expected a file with --method calibrated, got none"),
        ("inspect gone.pt", "FILE: expected a file, got 'gone.pt'"),
        ("inspect bad.tsv", "bad.tsv: expected a torch file of plain values, got UnpicklingError"),
        ("generate MODEL --plan wide.json --prompt .",
         "plan: expected 3 layers x 2 kv heads like the model, got 9 x 9"),
        ("generate MODEL --plan wide.json", "--prompt --prompt-file -: expected one of them, got none"),
    ],
)  # fmt: skip
def test_bad_input(model, capsys, line, message):
    Path("bad.json").write_text('{"format": "other"}')
    Path("bad.tsv").write_text("one two")
    Plan.full(9, 9).save("wide.json")
    HeadScores(torch.zeros(3, 4), torch.zeros(3, 4), 2).save("s.json")
    code, error = fails(capsys, *(str(model) if word == "MODEL" else word for word in line.split()))
    assert (code, error.splitlines()[-1]) == (2, f"razor: {message}")
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "razor: interrupted\n"),
        (ValueError("size: expected 1, got 2"), 2, "razor: size: expected 1, got 2\n"),
        (NotImplementedError("model: expected Llama, got Bloom"), 2, "razor: model: expected Llama, got Bloom\n"),
        (ImportError("x: expected to be installed, got none"), 1, "razor: x: expected to be installed, got none\n"),
        (ValueError("odd"), 1, "razor: ValueError: odd\n"),
        (OSError(28, "No space left"), 1, "razor: OSError: [Errno 28] No space left\n"),
    ],
)
def test_exit_codes(monkeypatch, capsys, error, code, message):
    def fail(_):
        raise error

    monkeypatch.setattr(command, "demo", fail)
    assert fails(capsys, "demo") == (code, message)
    if code != 130:
        with pytest.raises(type(error)):
            cli.main(["demo", "--traceback"])


def test_a_model_that_cannot_be_compressed(capsys):
    MistralConfig(num_hidden_layers=2, sliding_window=8).save_pretrained("mistral")
    code, error = fails(capsys, "plan", "--full", "--model", "mistral")
    assert code == 2
    assert error.startswith("razor: config: expected only full_attention layers, got sliding_attention")


def test_a_missing_package_is_named(monkeypatch, capsys, model):
    monkeypatch.setitem(sys.modules, "razor_attention.bench.plot", None)
    code, error = fails(capsys, "heads", model, "--plot", "h.png")
    assert code == 1
    assert error.endswith("got no such module; pip install 'razor-attention[demo]'\n")


def test_the_process_says_so_too(tmp_path):
    start = "import sys; from razor_attention.cli import main; sys.exit(main(['inspect', 'gone']))"
    done = subprocess.run([sys.executable, "-c", start], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.endswith("razor: FILE: expected a file, got 'gone'\n")
