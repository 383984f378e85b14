# SPDX-License-Identifier: Apache-2.0
"""What does scoring heads cost? Echo and induction scores of 32 heads against one causal SDPA call of that shape.

Example: python -m razor_attention.bench.head_scores --long
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from razor_attention import head_scores, reference

from .cases import LLAMA3_8B, Layer
from .harness import Row, assert_close, interleave, make_row, parser, read_bandwidth, report

REPEATS = 4
TOLERANCE = 1e-4  # of shares of attention, in float32


def scores(layer: Layer, period: int, *, rounds: int, on: str | None = None) -> list[Row]:
    """Time the scores of one prefix token and `period` random tokens, REPEATS times."""
    tokens = 1 + period * REPEATS
    query, key, value = layer.tokens(tokens, seed=0)
    # The reference builds the whole map: the first kv head's group stands for all.
    group = layer.num_heads // layer.num_kv_heads
    few = min(period, 100)
    part = query[:, :group, : 1 + few * REPEATS], key[:, :1, : 1 + few * REPEATS]
    wanted = reference.head_scores(*part, few, scale=layer.head_dim**-0.5)
    found = head_scores(*part, few)
    for name, have, want in zip(("echo", "induction"), found, wanted, strict=True):
        assert_close(f"head scores, {name}", have, want, TOLERANCE)
    times = interleave(
        {
            "scores": lambda: head_scores(query, key, period),
            "sdpa": lambda: scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True),
        },
        rounds=rounds,
    )
    pairs = tokens * (tokens + 1) // 2 * layer.num_heads * layer.head_dim  # products of the causal half of q.k
    work = {"scores": (2 * pairs, query.nbytes + key.nbytes), "sdpa": (4 * pairs, 2 * query.nbytes + 2 * key.nbytes)}
    return [
        make_row("head_scores", f"{tokens} tokens", label, time, nbytes=work[label][1], flops=work[label][0], on=on)
        for label, time in times.items()
    ]


def main(argv: list[str] | None = None) -> None:
    flags = parser(__doc__)
    flags.add_argument("--long", action="store_true", help="10001 tokens, as find_heads; otherwise 2001")
    arguments = flags.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    bandwidth = read_bandwidth()
    period = 2500 if arguments.long else 500
    rows = scores(LLAMA3_8B, period, rounds=arguments.rounds, on=arguments.machine)
    print(f"scores take {rows[0].median_us / rows[1].median_us:.2f}x of one causal SDPA call")
    report(rows, bandwidth, arguments.results, arguments.machine)


if __name__ == "__main__":
    main()
