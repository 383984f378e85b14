# SPDX-License-Identifier: Apache-2.0
"""ALiBi slopes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .checks import check_int


def alibi_slopes(num_heads: int) -> Tensor:
    """Slopes of the original ALiBi paper, as BLOOM and Baichuan use them.

    A power of two: `2 ** (-8 (i + 1) / n)`. Otherwise the slopes of the power of two below, then every other slope of
    the one above. Models that scale their slopes (Falcon, MPT) need to scale these.

    Args:
        num_heads: query heads.

    Returns:
        (num_heads,), float32, logit per token of distance.

    Raises:
        ValueError: num_heads: expected an integer >= 1, got 0
    """
    check_int("num_heads", num_heads, 1)

    def of_power(n: int) -> list[float]:
        return [2 ** (-8 * (i + 1) / n) for i in range(n)]

    below = 2 ** math.floor(math.log2(num_heads))
    return torch.tensor([*of_power(below), *of_power(2 * below)[0::2][: num_heads - below]], dtype=torch.float32)
