# SPDX-License-Identifier: Apache-2.0
"""What every bench needs: interleaved timing, the machine's fingerprint and bandwidth, and CSV rows.

Times are microseconds of one call. Rivals take turns, so that a slow minute of the machine hits all of them; the
median and the interquartile range are over rounds. Correctness is the caller's to check, before it times anything.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from razor_attention import isa

RESULTS = Path("bench/results")  # of the checkout in which a bench runs
LEAST_ROUNDS = 7
_SAMPLE_SECONDS = 0.005  # a sample lasts at least so long, in several calls where one is shorter
_STREAM_BYTES = 512 << 20
_MATMUL_SIZE = 4096
FORMATS = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
_PRODUCTS = {"int8": "bf16", "int4": "bf16"}  # format whose products stand for those of quantised rows: the queries'


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds of one call."""

    median_us: float
    iqr_us: float


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a results file; the field names are its header."""

    machine: str
    isa: str
    threads: int
    question: str
    case: str
    format: str  # of the cached rows, such as bf16
    plan: str  # name of the plan, or of the rival
    median_us: float
    iqr_us: float
    bytes: int  # read and written by one call, or held: see the question
    flops: int
    gb_s: float
    gflop_s: float
    ceiling_gb_s: float  # of this process in the same minutes, see `measured`; 0: not taken
    ceiling_gflop_s: float
    roofline: float  # least time that bytes and flops need under the ceilings, over the median
    commit: str


FIELDS = tuple(field.name for field in fields(Row))


def interleave(rivals: dict[str, Callable[[], object]], *, rounds: int = 9, warmup: int = 1) -> dict[str, Timing]:
    """Time rivals in turns, another one first in each round.

    Args:
        rivals: name -> call to time.
        rounds: samples of each rival, at least 7.
        warmup: untimed calls of each rival.
    Returns:
        name -> median and interquartile range of one call.
    Raises:
        ValueError: rounds: expected an integer >= 7, got 3
    """
    if rounds < LEAST_ROUNDS:
        raise ValueError(f"rounds: expected an integer >= {LEAST_ROUNDS}, got {rounds}")
    calls = {}
    for name, call in rivals.items():
        seconds = min((_seconds(call, 1) for _ in range(warmup)), default=0.0)
        if seconds < 20 * _SAMPLE_SECONDS:  # a long call says how long it is while it warms up
            seconds = _seconds(call, 1)
        calls[name] = max(1, math.ceil(_SAMPLE_SECONDS / max(seconds, 1e-9)))
    samples: dict[str, list[float]] = {name: [] for name in rivals}
    names = list(rivals)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(_seconds(rivals[name], calls[name]) * 1e6)
    return {name: timing(values) for name, values in samples.items()}


def timing(samples_us: Sequence[float]) -> Timing:
    """Median and interquartile range of samples in microseconds."""
    if len(samples_us) == 1:
        return Timing(samples_us[0], 0.0)
    low, middle, high = statistics.quantiles(samples_us, n=4, method="inclusive")
    return Timing(middle, high - low)


def _seconds(call: Callable[[], object], count: int) -> float:
    begin = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - begin) / count


def read_bandwidth(nbytes: int = _STREAM_BYTES) -> float:
    """Bytes per nanosecond (GB/s) that this process reads from memory: the best of several passes over a large array.

    The best and not the median: it serves as the ceiling that other figures are compared with.
    """
    half = nbytes // 8
    left, right = torch.ones(half), torch.ones(half)
    passes = [lambda: torch.dot(left, right), lambda: (left.sum(), right.sum())]
    return max(8 * half / _seconds(call, 1) / 1e9 for _ in range(LEAST_ROUNDS) for call in passes)


def matmul_peak(row_format: str, size: int = _MATMUL_SIZE) -> float:
    """Floating-point operations per nanosecond (GFLOP/s) of torch's product of two square matrices: the best of 7."""
    left, right = (torch.randn(size, size).to(FORMATS[row_format]) for _ in range(2))
    return max(2 * size**3 / _seconds(lambda: left @ right, 1) / 1e9 for _ in range(LEAST_ROUNDS))


def measured(bench: Callable[[], list[Row]], threads: Sequence[int] = (0,)) -> list[Row]:
    """Rows of a bench, with the ceilings of the same minutes filled in; memory is measured before and after it.

    Args:
        bench: makes the rows.
        threads: numbers of torch's threads to run it with, one after the other; 0 leaves them as they are.
    """
    rows: list[Row] = []
    before = torch.get_num_threads()
    try:
        for count in threads:
            torch.set_num_threads(count or before)
            stream, made = read_bandwidth(_STREAM_BYTES), bench()
            stream = max(stream, read_bandwidth(_STREAM_BYTES))
            formats = {_PRODUCTS.get(row.format, row.format) for row in made if row.flops}
            peaks = {name: matmul_peak(name, _MATMUL_SIZE) for name in formats}
            rows += [under_ceilings(row, stream, peaks.get(_PRODUCTS.get(row.format, row.format), 0.0)) for row in made]
    finally:
        torch.set_num_threads(before)
    return rows


def under_ceilings(row: Row, gb_s: float, gflop_s: float) -> Row:
    """The row with two ceilings, in 10^9 per second, and its share of the one that binds it; 0: not known."""
    least = max(row.bytes / gb_s if gb_s else 0.0, row.flops / gflop_s if gflop_s else 0.0)  # nanoseconds
    share = least / (row.median_us * 1e3) if row.median_us else 0.0
    return replace(row, ceiling_gb_s=round(gb_s, 3), ceiling_gflop_s=round(gflop_s, 3), roofline=round(share, 4))


@cache
def machine() -> str:
    """Short name of this machine, from CPU model and cores alone, such as xeon-2c."""
    return f"{_slug(_cpu_model())}-{len(os.sched_getaffinity(0))}c"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    found = re.search(r"^(?:model name|Model|CPU part)\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.machine()


def _slug(model: str) -> str:
    noise = r"\((?:R|TM|r|tm)\)|\b(?:Intel|AMD|CPU|Processor|\d+-Core)\b|@.*"
    return "-".join(re.findall(r"[a-z0-9]+", re.sub(noise, " ", model).lower())) or "cpu"


@cache
def commit() -> str:
    """Short hash of the checkout in which this runs, with a + if tracked files differ from it; else "unknown"."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "diff", "--quiet", "HEAD"], capture_output=True, check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if dirty else "")


def make_row(
    question: str,
    case: str,
    plan: str,
    time_us: Timing,
    *,
    nbytes: int,
    flops: int = 0,
    row_format: str = "bf16",
    on: str | None = None,
) -> Row:
    """A row with this machine's columns filled in and the two rates derived, without ceilings (see `measured`); `on`
    overrides the machine's name."""
    nanoseconds = time_us.median_us * 1e3 or math.inf
    return Row(
        machine=on or machine(),
        isa=isa(),
        threads=torch.get_num_threads(),
        question=question,
        case=case,
        format=row_format,
        plan=plan,
        median_us=round(time_us.median_us, 2),
        iqr_us=round(time_us.iqr_us, 2),
        bytes=nbytes,
        flops=flops,
        gb_s=round(nbytes / nanoseconds, 3),
        gflop_s=round(flops / nanoseconds, 3),
        ceiling_gb_s=0.0,
        ceiling_gflop_s=0.0,
        roofline=0.0,
        commit=commit(),
    )


def append_rows(rows: Sequence[Row], results: Path = RESULTS) -> Path:
    """Append rows of one machine and question to `results`/<machine>/<question>.csv, with a header if it is new.

    Raises:
        ValueError: attention.csv: expected the columns machine,isa,..., got time,name
    """
    path = results / rows[0].machine / f"{rows[0].question}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    if not new:
        with path.open() as file:
            header = file.readline().strip()
        if header != ",".join(FIELDS):
            raise ValueError(f"{path.name}: expected the columns {','.join(FIELDS)}, got {header}")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    return path


def table(header: Sequence[str], rows: Iterable[Sequence[object]], *, left: int = 2) -> str:
    """Text table; the first `left` columns stand left, the others right; floats get three digits."""
    lines = [list(header), *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    sides = [str.ljust] * left + [str.rjust] * (len(header) - left)
    return "\n".join(
        "  ".join(side(cell, width) for side, cell, width in zip(sides, line, widths, strict=True)).rstrip()
        for line in lines
    )


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The flags that all benches share."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--results", type=Path, default=RESULTS, help=f"folder of the CSV files (default: {RESULTS})")
    made.add_argument("--machine", default=None, help=f"name of this machine in them (default: {machine()})")
    made.add_argument("--rounds", type=int, default=9, help="samples of each rival, at least 7 (default: 9)")
    text = "threads of torch; several: one run for each (default: torch's own choice)"
    made.add_argument("--threads", type=int, nargs="+", default=[0], help=text)
    return made


def use_threads(flags: argparse.ArgumentParser, threads: Sequence[int]) -> None:
    """For a bench of one run: as many of torch's threads as --threads says, which must be one number."""
    if len(threads) > 1:
        flags.error(f"--threads: expected one number, got {list(threads)}")
    if threads[0]:
        torch.set_num_threads(threads[0])


def report(rows: Sequence[Row], results: Path) -> None:
    """Print rows with their ceilings, and append them."""
    header = ("case", "plan", "median ms", "iqr ms", "MB", "GB/s", "GFLOP/s", "roofline")
    for threads in dict.fromkeys(row.threads for row in rows):
        some = [row for row in rows if row.threads == threads]
        peaks = {_PRODUCTS.get(row.format, row.format): row.ceiling_gflop_s for row in some if row.ceiling_gflop_s}
        products = "".join(f", {name} matmul {peak:.0f} GFLOP/s" for name, peak in peaks.items())
        print(f"{some[0].machine}, {some[0].isa}, {threads} threads, stream {some[0].ceiling_gb_s:.1f} GB/s{products}")
        cells = [
            (r.case, r.plan, r.median_us / 1e3, r.iqr_us / 1e3, r.bytes / 1e6, r.gb_s, r.gflop_s, r.roofline)
            for r in some
        ]
        print(table(header, cells))
    print(f"appended to {append_rows(rows, results)}")


def assert_close(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Stop a bench whose rivals do not compute the same.

    Args:
        name: of what is compared.
        actual, expected: tensors of one shape.
        tolerance: largest absolute difference allowed.
    Raises:
        RuntimeError: decode 32k: expected a difference <= 0.02, got 0.5
    """
    difference = (actual.float() - expected.float()).abs().max().item()
    if not difference <= tolerance:
        raise RuntimeError(f"{name}: expected a difference <= {tolerance}, got {difference:.3g}")
