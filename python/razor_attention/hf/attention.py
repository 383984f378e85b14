# SPDX-License-Identifier: Apache-2.0
"""Razor attention for every model that uses transformers' AttentionInterface, and `attach`, which switches it on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import causal_mask_function

from ..plan import Plan
from .cache import KvDtype, Prefill, RazorCache
from .forwards import ReplacedForwards
from .models import AttentionSwitch, check_interface, refuse_unsupported

NEEDS_CACHE = "use_cache: expected True with razor attention, got False"


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
    refuse_unsupported(module, dropout, kwargs)
    if layer is None:
        raise ValueError(
            "past_key_values: expected a RazorCache, got another cache or none; "
            "razor attention never runs uncompressed without saying so"
        )
    if kwargs.get("use_cache") is False:  # generate would send the whole text again at every step
        raise ValueError(NEEDS_CACHE)
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
    **_: Any,
) -> Tensor | None:
    """The mask function registered as "razor": never builds a map of queries and keys.

    Args:
        attention_mask: (batch, kv_length), bool, False for padding; it must come before the tokens of a call.

    Returns:
        (2, batch), int64, see `padding_counts`. None: no mask, no padding. Models whose forwards were replaced
        (MPT makes booleans of whatever it gets) carry (batch, kv_length), bool, to `razor_attention` instead.
    """
    replaced = config is not None and isinstance(config._attn_implementation, ReplacedForwards)
    if config is not None and not replaced:
        check_interface(type(config))  # type: ignore[arg-type]  # typeshed: classes are hashable
    if mask_function is not causal_mask_function and not replaced:  # older Falcons intersect it with all True
        raise NotImplementedError(
            "attention_mask: expected a plain causal mask, got a sliding, chunked, packed, image or bidirectional one"
        )
    if attention_mask is None:
        return torch.ones(batch_size, kv_length, dtype=torch.bool, device=device) if replaced else None
    if attention_mask.shape != (batch_size, kv_length):
        raise ValueError(
            f"attention_mask: expected shape [{batch_size}, {kv_length}], got {list(attention_mask.shape)}"
        )
    attention_mask = attention_mask.bool()
    return attention_mask if replaced else padding_counts(attention_mask, q_length)


@contextmanager
def attach(
    model: PreTrainedModel,
    plan: Plan,
    *,
    prefill: Prefill = "dense",
    kv_dtype: KvDtype = None,
    exact_sink: int = 0,
    exact_window: int = 0,
    rotate_keys: bool = False,
) -> Iterator[PreTrainedModel]:
    """Inside this context `model.generate(...)` runs with a compressed cache; outside it the model is as before.

    Each `generate` call gets a fresh RazorCache for its prompt (the longest of a batch, where the plan has a length
    rule), unless it is given one as `past_key_values`.

    Args:
        model: a decoder model that uses AttentionInterface (Llama, Qwen2, Qwen3, Mistral, Baichuan as in baichuan.py,
            ...), or BLOOM, MPT or Falcon with ALiBi.
        plan: policy of every (layer, kv head).
        prefill: "dense" or "streaming", see RazorCache.
        kv_dtype: torch.int8 (or "int8"), "int4" or None, see RazorCache.
        exact_sink, exact_window: tokens that a quantised cache also keeps as they came, see RazorCache.
        rotate_keys: see RazorCache.

    Raises:
        ValueError: plan: expected 4 layers x 4 kv heads like the model, got 32 x 8
        NotImplementedError: model: expected one that uses AttentionInterface, got CodeGenForCausalLM
    """
    switch = AttentionSwitch(model, "razor")
    if not callable(getattr(model, "generate", None)):
        raise TypeError(f"model: expected one that can generate, got {type(model).__name__}")
    # Refuses what it cannot do before the model is touched.
    options: dict[str, Any] = {"prefill": prefill, "kv_dtype": kv_dtype}
    options |= {"exact_sink": exact_sink, "exact_window": exact_window, "rotate_keys": rotate_keys}
    RazorCache(model.config, plan, **options)
    had_own = vars(model).get("generate")
    generate: Any = model.generate

    def generate_compressed(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("use_cache", True) is None:  # would hide a False in the configuration from the model
            del kwargs["use_cache"]
        if kwargs.get("use_cache") is False:
            raise ValueError(NEEDS_CACHE)
        if getattr(type(switch.config), "use_cache", True) is False:  # MPT's way to begin with, nobody's choice
            kwargs["use_cache"] = True
        if kwargs.get("past_key_values") is None:
            prompt = next((x for x in (*args[:1], *map(kwargs.get, _PROMPTS)) if x is not None), None)
            mask = kwargs.get("attention_mask")
            prompt_len = prompt.shape[1] if isinstance(prompt, Tensor) else None
            if isinstance(mask, Tensor) and mask.dim() == 2:
                prompt_len = int(mask.sum(1).max())  # padding is no part of a prompt
            kwargs["past_key_values"] = RazorCache(model.config, plan, prompt_len=prompt_len, **options)
        return generate(*args, **kwargs)

    with switch:
        vars(model)["generate"] = generate_compressed  # on this object alone, over the class's method
        try:
            yield model
        finally:
            if had_own is None:
                del vars(model)["generate"]
            else:
                vars(model)["generate"] = had_own


_PROMPTS = ("inputs", "input_ids", "inputs_embeds")

AttentionInterface.register("razor", razor_attention)
AttentionMaskInterface.register("razor", razor_mask)  # without it transformers would pass no mask and ignore padding
