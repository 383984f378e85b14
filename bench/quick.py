# SPDX-License-Identifier: Apache-2.0
"""What `razor bench` runs: the main figures of this machine in less than a minute, each against torch's SDPA.

A look, not a record: nothing is written. The records are made by the other files of this room.
"""

from __future__ import annotations

from .attention import WALK_BYTES, decode, prefill
from .cases import CONTEXTS, LLAMA3_8B, QUANTISED, Layer
from .harness import LEAST_ROUNDS, Row, measured, table
from .head_scores import scores

DECODE, PREFILL = ("8k", "32k"), ("2k", "4k")
PERIOD = 500


def run(
    layer: Layer = LLAMA3_8B, *, contexts: dict[str, int] = CONTEXTS, period: int = PERIOD, threads: int = 0
) -> list[Row]:
    """Measure, and print a table.

    Args:
        layer: one layer of a model.
        contexts: tokens of the names in DECODE and PREFILL.
        period: random tokens that the scored prompt repeats.
        threads: of torch; 0 leaves them as they are.
    """

    def bench() -> list[Row]:
        rows: list[Row] = []
        for name in DECODE:
            kv_dtypes = QUANTISED if name == DECODE[-1] else ()  # in one of them: the table is long enough
            rows += decode(
                layer, contexts[name], walk_bytes=WALK_BYTES, name=name, kv_dtypes=kv_dtypes, rounds=LEAST_ROUNDS
            )
        for name in PREFILL:
            rows += prefill(layer, contexts[name], name=name, flex=False, rounds=LEAST_ROUNDS)
        return rows + scores(layer, period, maps=False, rounds=LEAST_ROUNDS)

    rows = measured(bench, [threads])
    print(summary(rows))
    return rows


def summary(rows: list[Row]) -> str:
    """A line for each of our rows and the plain SDPA of its case: times, how often faster, share of the roofline."""
    sdpa = {row.case: row.median_us for row in rows if row.plan == "sdpa"}
    cells = [
        (r.case, r.plan, r.median_us / 1e3, r.iqr_us / 1e3, f"{sdpa[r.case] / r.median_us:.2f}x", r.roofline)
        for r in rows
    ]
    first = rows[0]
    products = max(row.ceiling_gflop_s for row in rows)
    return (
        f"{first.machine}, {first.isa}, {first.threads} threads; reads {first.ceiling_gb_s:.1f} GB/s, "
        f"multiplies {products:.0f} GFLOP/s in {first.format}\n"
        f"{table(('case', 'plan', 'median ms', 'iqr ms', 'SDPA / it', 'roofline'), cells)}\n"
        "one layer, 32 query and 8 kv heads of 128; roofline: least time that its bytes and operations need here, "
        "over its time"
    )
