# SPDX-License-Identifier: Apache-2.0
"""Rows of results.csv: appended one by one as they are measured, and read again to go on after a stop."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, get_type_hints

_Z = 1.959963984540054  # 95 % of a normal distribution lie within so many deviations


class Row(NamedTuple):
    """One line of results.csv."""

    model: str
    task: str
    length: int  # tokens of a prompt
    depth: str  # where what is asked for stands, 0 ... 1; "any": a place drawn for each sample
    method: str
    budget: str  # share of the full cache's bytes; "" where the method takes none
    seed: int  # of the samples
    samples: int
    n: int  # answers; of perplexity: tokens
    correct: int  # answers that are right; of perplexity: tokens ranked first
    accuracy: float  # correct / n
    low: float  # 95 % confidence interval of the accuracy by Wilson, as if all n were independent
    high: float
    perplexity: str  # of that task alone
    kv_bytes: int  # that the cache of one sample held after `length` tokens, mean
    seconds: float  # of all samples


FIELDS = Row._fields
_KEY = ("model", "task", "length", "depth", "method", "budget", "seed", "samples")


def wilson(correct: int, n: int) -> tuple[float, float]:
    """Wilson's score interval of a share, 95 %.

    Args:
        correct, n: 0 <= correct <= n, n >= 1.
    Returns:
        Its ends, in [0, 1].
    """
    share, square = correct / n, _Z * _Z / n
    middle = (share + square / 2) / (1 + square)
    half = _Z / (1 + square) * math.sqrt(share * (1 - share) / n + square / (4 * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def key(row: Row) -> tuple[object, ...]:
    """What is measured once only."""
    return tuple(getattr(row, name) for name in _KEY)


def read_rows(path: Path) -> list[Row]:
    """Rows of a results file; a last line that was cut off while it was written is removed from the file.

    Args:
        path: file to read; none yet is no row.
    Returns:
        The rows.
    Raises:
        ValueError: results.csv: expected the columns model,task,..., got time,name
    """
    if not path.exists():
        return []
    whole = path.read_text()
    text = whole[: whole.rfind("\n") + 1]
    if len(text) < len(whole):
        os.truncate(path, len(text.encode()))
    if not text:
        return []
    header, *lines = csv.reader(io.StringIO(text))
    if tuple(header) != FIELDS:
        raise ValueError(f"{path.name}: expected the columns {','.join(FIELDS)}, got {','.join(header)}")
    kinds = get_type_hints(Row).values()
    try:
        return [Row(*(kind(cell) for kind, cell in zip(kinds, line, strict=True))) for line in lines]
    except ValueError as error:
        raise ValueError(f"{path.name}: expected rows like its columns, got {error}") from error


def append_row(path: Path, row: Row) -> None:
    """Append one row in one write, which no other process can come between, with a header if the file is empty.

    Args:
        path: file to append to.
        row: to write.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        writer.writerows(([FIELDS] if os.fstat(handle).st_size == 0 else []) + [row])
        os.write(handle, out.getvalue().encode())
    finally:
        os.close(handle)


def summary(rows: Sequence[Row]) -> str:
    """A text table: accuracy of every task over lengths and depths, and bytes, for each method and budget."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    lines = [["method", "budget", "KV MB", *tasks]]
    for method, budget in dict.fromkeys((row.method, row.budget) for row in rows):
        same = [row for row in rows if (row.method, row.budget) == (method, budget)]
        cells = [method, budget or "-", f"{sum(row.kv_bytes for row in same) / len(same) / 1e6:.3g}"]
        for task in tasks:
            of_task = [row for row in same if row.task == task]
            right, n = sum(row.correct for row in of_task), sum(row.n for row in of_task)
            mean = math.exp(sum(math.log(float(row.perplexity)) * row.n for row in of_task if row.perplexity) / n)
            cells.append(f"{mean:.3f}" if task == "perplexity" else f"{right / n:.0%}")
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
