# SPDX-License-Identifier: Apache-2.0
"""The attention and mask functions that transformers calls "razor"; `attach` (attachment.py) switches them on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig

from .forwards import ReplacedForwards
from .masks import is_causal, other_mask
from .models import check_interface, refuse_unsupported
from .names import CACHE, causal_mask_function


def razor_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function registered as "razor"; the layer's cache comes with `key` (see cache.py).

    Args:
        module: the attention layer.
        query: (batch, num_heads, q_len, head_dim), f32 | bf16 | f16.
        key: (batch, num_kv_heads, q_len, head_dim), dtype of query; tagged by RazorLayer.update.
        value: (batch, num_kv_heads, q_len, head_dim), dtype of query.
        attention_mask: (2, batch), int64, or (batch, kv_length), bool, from `razor_mask`; None without padding.
        dropout: must be 0. It stands sixth as in transformers' sdpa: wrappers around it (kvpress) pass it by place.
        scaling: factor on q.k; None: head_dim ** -0.5.

    Returns:
        ((batch, q_len, num_heads, head_dim), None).
    """
    layer = getattr(key, "_razor_layer", None)
    if layer is not None:
        layer.pending = False  # also if the call is refused below: nothing has been stored
    refuse_unsupported(
        module, dropout, kwargs, attention_mask, query.shape[2] + (0 if layer is None else layer.columns)
    )
    if layer is None:
        raise ValueError(
            f"{CACHE}: expected a RazorCache, got another cache or none; "
            "razor attention never runs uncompressed without saying so"
        )
    if attention_mask is not None and attention_mask.dim() != 2:
        raise NotImplementedError(
            f"attention_mask: expected 2 dimensions (batch, tokens), got shape {list(attention_mask.shape)}; "
            "masks prepared by the caller are not supported"
        )
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        attention_mask = padding_counts(attention_mask, query.shape[2])
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves rotated ones in float32
    return layer.attend(query, key, value, attention_mask, scaling).transpose(1, 2), None


def padding_counts(mask: Tensor, q_length: int) -> Tensor:
    """What a cache without padding needs to know of a padding mask.

    Args:
        mask: (batch, kv_length), bool, False for padding; it must come before the tokens of a call.
        q_length: new tokens, the last columns.

    Returns:
        (2, batch), int64: leading padding among the new tokens, and tokens before them.

    Raises:
        NotImplementedError: attention_mask: expected padding on the left only, got padding after a token
    """
    past, new = mask[:, : mask.shape[1] - q_length], mask[:, mask.shape[1] - q_length :]
    if bool((new[:, 1:] < new[:, :-1]).any()):
        raise NotImplementedError("attention_mask: expected padding on the left only, got padding after a token")
    return torch.stack([q_length - new.sum(1), past.sum(1)])


def razor_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    config: PreTrainedConfig | None = None,
    device: torch.device | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **_: Any,
) -> Tensor | None:
    """The mask function registered as "razor": never builds a map of queries and keys.

    Args:
        batch_size, q_length, kv_length, mask_function, config, device, local_size, allow_is_causal_skip: see
            transformers' mask functions and `masks.is_causal`.
        attention_mask: (batch, kv_length), bool, False for padding; it must come before the tokens of a call.

    Returns:
        (2, batch), int64, see `padding_counts`. None: no mask, no padding. (0, batch) for a mask that is not causal,
        which a layer of ours refuses. Models whose forwards were replaced
        (MPT makes booleans of whatever it gets) carry (batch, kv_length), bool, to `razor_attention` instead.
    """
    replaced = config is not None and isinstance(config._attn_implementation, ReplacedForwards)
    if config is not None and not replaced:
        check_interface(type(config))  # type: ignore[arg-type]  # typeshed: classes are hashable
    # Older Falcons intersect theirs with all True.
    if not replaced and not is_causal(mask_function, kv_length, local_size, allow_is_causal_skip):
        return other_mask(batch_size, device)
    if attention_mask is None:
        return torch.ones(batch_size, kv_length, dtype=torch.bool, device=device) if replaced else None
    if attention_mask.shape != (batch_size, kv_length):
        raise ValueError(
            f"attention_mask: expected shape [{batch_size}, {kv_length}], got {list(attention_mask.shape)}"
        )
    attention_mask = attention_mask.bool()
    return attention_mask if replaced else padding_counts(attention_mask, q_length)


AttentionInterface.register("razor", razor_attention)
AttentionMaskInterface.register("razor", razor_mask)  # without it transformers would pass no mask and ignore padding
