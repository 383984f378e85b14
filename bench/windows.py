# SPDX-License-Identifier: Apache-2.0
"""What do ALiBi windows cost? All heads of a layer against torch's product and maximum, head by head.

Example: python -m razor_attention.bench.windows --view true input-columns --dtype float32 bfloat16
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from razor_attention import alibi_slopes, ops

from .harness import FORMATS, Row, assert_close, interleave, make_row, measured, parser, report

TOLERANCE = 1e-5  # of a bound near 0.8: another order of float32 additions


@dataclass(frozen=True, slots=True)
class Shape:
    """Query and key weights of one layer, [hidden, hidden] each."""

    num_heads: int
    hidden: int

    def weight(self, view: str, dtype: torch.dtype, seed: int) -> Tensor:
        """Random weight (hidden, num_heads, head_dim): true heads, or input columns as msmodelslim takes them."""
        generator = torch.Generator().manual_seed(seed)
        weight = (torch.randn(self.hidden, self.hidden, generator=generator) * 0.02).to(dtype)
        if view == "true":
            return weight.view(self.num_heads, -1, self.hidden).permute(2, 0, 1)
        return weight.view(self.hidden, self.num_heads, -1)


BAICHUAN_13B = Shape(num_heads=40, hidden=5120)
VIEWS = ("true", "input-columns")


def by_torch(query: Tensor, key: Tensor) -> Tensor:
    """Bound (num_heads,) with one product (hidden, hidden) of float32 at a time."""
    largest = [(query[:, h].float() @ key[:, h].float().T).max() for h in range(query.shape[1])]
    return torch.stack(largest).clamp(min=0).sqrt()


def windows(
    shape: Shape, view: str, dtype: torch.dtype, *, rounds: int, layers: int = 1, on: str | None = None
) -> list[Row]:
    """Time the windows of `layers` layers, each of the same two weights."""
    query, key = (shape.weight(view, dtype, seed) for seed in (0, 1))
    slopes = alibi_slopes(shape.num_heads)

    def ours() -> Tensor:
        bound = None
        for _ in range(layers):
            _, bound = ops.alibi_windows(query, key, slopes, bound, theta=1e-5, alpha=100, method="per_head")
        assert bound is not None
        return bound

    assert_close(f"windows, {view} heads", ours(), by_torch(query, key), TOLERANCE)
    rivals: dict[str, Callable[[], object]] = {
        "windows": ours,
        "torch": lambda: [by_torch(query, key) for _ in range(layers)],
    }
    flops = 2 * layers * shape.hidden**3
    nbytes = layers * (query.nbytes + key.nbytes)
    row_format = next(name for name, of in FORMATS.items() if of == dtype)
    case = f"{layers} x {shape.num_heads} heads, hidden {shape.hidden}, {view}"
    return [
        make_row("windows", case, label, time, nbytes=nbytes, flops=flops, row_format=row_format, on=on)
        for label, time in interleave(rivals, rounds=rounds).items()
    ]


def main(argv: list[str] | None = None) -> None:
    flags = parser(__doc__)
    flags.add_argument("--layers", type=int, default=1, help="layers in one sample (default: 1)")
    flags.add_argument("--view", nargs="+", choices=VIEWS, default=list(VIEWS), help="how weights are cut into heads")
    flags.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16", "float16"), default=["float32"])
    arguments = flags.parse_args(argv)

    def bench() -> list[Row]:
        rows = []
        for dtype in arguments.dtype:
            for view in arguments.view:
                options = {"rounds": arguments.rounds, "layers": arguments.layers, "on": arguments.machine}
                pair = windows(BAICHUAN_13B, view, getattr(torch, dtype), **options)
                print(f"{dtype}, {view} heads: torch takes {pair[1].median_us / pair[0].median_us:.2f}x of ours")
                rows += pair
        return rows

    report(measured(bench, arguments.threads), arguments.results)


if __name__ == "__main__":
    main()
