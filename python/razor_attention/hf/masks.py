# SPDX-License-Identifier: Apache-2.0
"""What our mask functions say of a mask: nothing for a plain causal one, padding apart, and else that it is not.

A model prepares the masks of all kinds of layers that its class knows, whether it has such layers or not, so a mask
that our attention cannot follow is refused by the layer that receives it, not where it is made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .names import causal_mask_function


def is_causal(
    mask_function: Callable[..., Any], kv_length: int, local_size: int | None, allow_is_causal_skip: bool
) -> bool:
    """Whether a mask, padding apart, shows each query every token up to itself.

    Args:
        mask_function: of transformers: what it says for (batch, head, query, key).
        kv_length: tokens so far, the new ones included.
        local_size: window or chunk of the mask; None: none.
        allow_is_causal_skip: False where the mask function is more than transformers' own for such a window.
    """
    if mask_function is causal_mask_function:
        return True
    return allow_is_causal_skip and local_size is not None and local_size >= kv_length  # it does not act yet


def other_mask(batch_size: int, device: torch.device | None) -> Tensor:
    """What stands for a mask that is not causal: (0, batch), int64."""
    return torch.empty(0, batch_size, dtype=torch.int64, device=device)


def refuse_other_mask(mask: Tensor | None) -> None:
    """Raise for a mask from `other_mask`.

    Raises:
        NotImplementedError: attention_mask: expected a plain causal mask, got a sliding, chunked, ... one
    """
    if mask is not None and mask.dim() == 2 and mask.shape[0] == 0:
        raise NotImplementedError(
            "attention_mask: expected a plain causal mask, got a sliding, chunked, packed, image or bidirectional one"
        )


def plain_mask(
    *,
    batch_size: int,
    kv_length: int,
    mask_function: Callable[..., Any] = causal_mask_function,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    device: torch.device | None = None,
    **_: Any,
) -> Tensor | None:
    """A mask function for attention functions that know no padding: None for a causal mask, else `other_mask`."""
    if is_causal(mask_function, kv_length, local_size, allow_is_causal_skip):
        return None
    return other_mask(batch_size, device)
