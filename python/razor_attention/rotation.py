# SPDX-License-Identifier: Apache-2.0
"""A fixed rotation of queries and keys along head_dim: what a few channels of a key hold is spread over all of them.

Both are multiplied by the same Hadamard matrix, so that q.k stays what it was, and a scale of quantised rows no longer
follows one outlying channel. The matrix is divided by a power of two for keys and by another one for queries, which
together make its square: all its entries are exact in every dtype, and a product is rounded once.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def rotated_key(key: Tensor) -> Tensor:
    """(..., head_dim), f32 | bf16 | f16 -> the same. head_dim with an odd factor: in blocks of its power of two."""
    return key @ _matrix(key.shape[-1], 1, key.dtype, key.device)


def rotated_query(query: Tensor) -> Tensor:
    """As `rotated_key`: rotated_query(q) . rotated_key(k) = q . k, but for rounding."""
    return query @ _matrix(query.shape[-1], 0, query.dtype, query.device)


@cache
@torch.inference_mode(False)
def _matrix(head_dim: int, part: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(head_dim, head_dim): signs over 2 ** (log2(block) / 2), rounded down for part 0 and up for part 1."""
    signs = torch.ones(1, 1)
    while head_dim % (2 * len(signs)) == 0:
        signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
    power = (len(signs).bit_length() - 1 + part) // 2
    return torch.kron(torch.eye(head_dim // len(signs)), signs / 2**power).to(device, dtype)
