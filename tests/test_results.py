# SPDX-License-Identifier: Apache-2.0
"""Results files have the columns that their benches write."""

import csv
import importlib
import io
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CSV_HEADER = (
    "machine,isa,threads,question,case,format,plan,median_us,iqr_us,bytes,flops,gb_s,gflop_s,"
    "ceiling_gb_s,ceiling_gflop_s,roofline,commit"
)


def files(*patterns: str) -> list[Path]:
    return sorted({path for pattern in patterns for path in ROOT.glob(pattern)})


def wrong_rows(text: str) -> list[list[str]]:
    """Rows of a results file that do not fit the schema, the header first."""
    header, *rows = csv.reader(io.StringIO(text))
    numbers = [
        CSV_HEADER.split(",").index(c) for c in ("median_us", "iqr_us", "bytes", "flops", "gb_s", "gflop_s", "roofline")
    ]
    wrong = [] if header == CSV_HEADER.split(",") else [header]
    for row in rows:
        try:
            fits = len(row) == len(header) and all(float(row[i]) >= 0 for i in numbers) and all(row[:7])
        except ValueError:
            fits = False
        wrong += [] if fits else [row]
    return wrong


DEMO_RESULTS = files(
    *(f"bench/results/**/{name}.csv" for name in ("*demo", "methods", "gates", "quantised*", "scale", "vllm"))
)  # columns of their own
RESULTS = [path for path in files("bench/results/**/*.csv") if path not in DEMO_RESULTS]


@pytest.mark.skipif(not RESULTS, reason="no results yet")
def test_results_fit_the_schema() -> None:
    assert {path.name: wrong for path in RESULTS if (wrong := wrong_rows(path.read_text()))} == {}


def test_demo_results_fit_the_demo() -> None:
    for path in DEMO_RESULTS:
        demo = importlib.import_module(f"razor_attention.bench.{path.stem}")
        assert path.read_text().partition("\n")[0] == ",".join(demo.Result._fields)


def test_bench_writes_the_schema() -> None:
    harness = importlib.import_module("razor_attention.bench.harness")
    assert ",".join(harness.FIELDS) == CSV_HEADER


def test_row_check() -> None:
    assert wrong_rows("machine,isa\n")
    assert wrong_rows(f"{CSV_HEADER}\na,b,1,q,c,f,p,fast,1,1,1,1,1,1,1,0.5,d\n")
    assert not wrong_rows(f"{CSV_HEADER}\na,b,1,q,c,f,p,1.5,1,1,1,1,1,1,1,0.5,d\n")
