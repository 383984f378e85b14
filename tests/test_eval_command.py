# SPDX-License-Identifier: Apache-2.0
"""razor eval on the command line, its pictures, and the bench of methods."""

import csv
from pathlib import Path

import pytest
import torch
from razor_attention.bench import methods as bench_methods
from razor_attention.bench import plot_eval

from razor_attention import HeadScores, Plan, cli
from razor_attention.files import save_gates
from razor_attention.hf.eval import FIELDS, Row, Settings, TaskFile, read_rows
from razor_attention.hf.models import load_model

MODEL = bench_methods.MODEL
TINY = TaskFile.load(bench_methods.TASK_FILE)
ROW = Row("m", "needle", 64, "0.5", "full", "", 0, 2, 2, 1, 0.5, 0.1, 0.9, "", 100, 1.5)


def test_the_command(tmp_path, capsys):
    save_gates(torch.rand(4, 4), tmp_path / "duo", sink_size=4, window_size=12)
    scores = HeadScores(torch.zeros(4, 8), torch.eye(4, 8), 4)
    scores.save(tmp_path / "s.json")
    Plan.full(4, 4).save(tmp_path / "p.json")
    flags = (
        f"--tasks needle multikey --lengths 256 300 --budget 0.5 0.7 --samples 1 --depths 2 --scores {tmp_path}/s.json"
    )
    words = ["eval", str(MODEL), *flags.split(), "--task-file", str(bench_methods.TASK_FILE), "--window-size", "12"]
    out, methods = tmp_path / "e", f"full duo={tmp_path}/duo razor plan={tmp_path}/p.json"
    words += ["--out", str(out), "--methods", *methods.split()]
    assert cli.main(words) == 0
    rows = read_rows(out / "results.csv")
    assert len(rows) == 2 * (2 + 1) * (1 + 2 + 2 + 1)
    assert {row.accuracy for row in rows if row.method.startswith(("full", "plan"))} == {1.0}
    for name in ("needle.png", "curves.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
        assert name in capsys.readouterr().out or name == "curves.png"
    assert cli.main([*words, "--kv", "int8"]) == 0
    more = read_rows(out / "results.csv")[len(rows) :]
    assert {row.method for row in more} == {f"{row.method}, int8" for row in rows}
    assert cli.main([*words[:-1], "h2o"]) == 2
    assert "razor: methods: expected some of full" in capsys.readouterr().err


def test_pictures_name_files_without_their_folders():
    names = ["razor", "plan=/a/b/p.json", "plan=p.json, int8", "duo=x/y, int4"]
    assert [plot_eval.label(name) for name in names] == ["razor", "plan=p.json", "plan=p.json, int8", "duo=y, int4"]


def test_pictures_count_random_heads_as_one():
    assert [plot_eval.family(name) for name in ("random-0", "random-12", "razor")] == ["random", "random", "razor"]
    assert plot_eval.together([ROW, ROW._replace(correct=2)]) == (3, 4)


# --- the bench


def test_the_weights_bench_computes_what_razor_does(monkeypatch):
    scores = HeadScores(torch.zeros(4, 8), torch.eye(4, 8), 4)
    run = bench_methods.Run(
        *load_model(MODEL, "float32"), scores, Settings(["needle"], [512], [0.3], task_file=TINY), Path()
    )
    bench_methods.check_weights(run)
    monkeypatch.setitem(bench_methods.WEIGHTS, "weight N", bench_methods.WEIGHTS["weight 1"])
    with pytest.raises(RuntimeError, match=r"^weights: expected a difference <= 0.001, got "):
        bench_methods.check_weights(run)


def test_the_bench_writes_its_columns(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_methods, "PERIOD", 40)
    monkeypatch.setattr(bench_methods, "PERIODS", (40, 60))
    monkeypatch.setattr(bench_methods, "SEEDS", range(2))
    monkeypatch.setattr(bench_methods, "TEXT_WORDS", 100)
    bench_methods.main(
        ["--question", "heads", "--out", str(tmp_path / "o"), "--results", str(tmp_path), "--machine", "m"]
    )
    with (tmp_path / "m" / "methods.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == bench_methods.Result._fields == ("question", *FIELDS)
    assert len(rows) == 3 * 2 * len(bench_methods.TOP)
    assert {float(row["accuracy"]) for row in rows if (row["seed"], row["length"]) == ("0", "161")} == {1.0}
