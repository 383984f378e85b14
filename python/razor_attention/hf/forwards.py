# SPDX-License-Identifier: Apache-2.0
"""AttentionInterface for the ALiBi models that do not use it: BLOOM, MPT and Falcon.

Their attention layers get another forward for a while: the layer's own projections, then `Cache.update`, then an
attention function that looks after ALiBi itself. Weights and classes stay as they are, and no ALiBi map is built.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

from .alibi import alibi_architecture
from .names import ALL_ATTENTION_FUNCTIONS, pop_cache

# query (batch, num_heads, q_len, head_dim), key and value (batch, num_kv_heads, q_len, head_dim)
_QKV = tuple[Tensor, Tensor, Tensor]


class ReplacedForwards(str):
    """Name of an attention function in a config whose model runs it although its class cannot."""


def _attend(
    module: Any, name: str, qkv: _QKV, cache: Any, mask: Tensor | None, scaling: float, dropout: float, **options: Any
) -> tuple[Tensor, Any]:
    """Attention of new tokens by the function `name`: ((batch, q_len, num_heads * head_dim), weights or None)."""
    query, key, value = qkv
    if cache is not None:
        key, value = cache.update(key, value, module.layer_idx)
    dropout = dropout if module.training else 0.0
    attention = ALL_ATTENTION_FUNCTIONS[name]
    out, weights = attention(module, query, key, value, mask, scaling=scaling, dropout=dropout, **options)
    return out.flatten(2), weights


def _bloom(
    module: Any,
    name: str,
    hidden_states: Tensor,
    residual: Tensor,
    alibi: Tensor,
    attention_mask: Tensor | None,
    layer_past: Any = None,
    **options: Any,
) -> tuple[Tensor, Any]:
    fused = module.query_key_value(hidden_states).unflatten(-1, (-1, 3, module.head_dim))
    query, key, value = fused.transpose(1, 2).unbind(-2)
    scaling, dropout = module.inv_norm_factor, module.attention_dropout.p
    out, weights = _attend(module, name, (query, key, value), layer_past, attention_mask, scaling, dropout, **options)
    return residual + nn.functional.dropout(module.dense(out), module.hidden_dropout, module.training), weights


def _mpt(
    module: Any,
    name: str,
    hidden_states: Tensor,
    position_bias: Tensor,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Any]:
    cache = pop_cache(options)
    fused = module.Wqkv(hidden_states)
    if module.clip_qkv:
        fused = fused.clamp(-module.clip_qkv, module.clip_qkv)
    query, key, value = fused.unflatten(-1, (3, -1, module.head_dim)).transpose(1, 3).unbind(2)
    scaling, dropout = module.softmax_scale, module.attn_dropout_p
    out, weights = _attend(module, name, (query, key, value), cache, attention_mask, scaling, dropout, **options)
    return module.out_proj(out), weights


def _falcon(
    module: Any,
    name: str,
    hidden_states: Tensor,
    alibi: Tensor,
    attention_mask: Tensor | None,
    layer_past: Any = None,
    **options: Any,
) -> tuple[Tensor, Any]:
    fused = module.query_key_value(hidden_states).unflatten(-1, (-1, module.head_dim))
    row = alibi_architecture(module.config)
    assert row is not None  # has_forward has looked
    group = module.num_heads // row.num_kv_heads(module.config, module.num_heads)
    # Each kv head's group of queries, its key and its value, in all three of Falcon's layouts.
    query, key, value = fused.unflatten(2, (-1, group + 2)).transpose(1, 2).split([group, 1, 1], 3)
    query = query.transpose(2, 3).flatten(1, 2)
    scaling, dropout = module.inv_norm_factor, module.attention_dropout.p
    for option in ("position_ids", "position_embeddings"):  # for rotary models
        options.pop(option, None)
    out, weights = _attend(
        module, name, (query, key.squeeze(3), value.squeeze(3)), layer_past, attention_mask, scaling, dropout, **options
    )
    return module.dense(out), weights


# By config.model_type.
_FORWARDS: dict[str, Callable[..., tuple[Tensor, Any]]] = {"bloom": _bloom, "mpt": _mpt, "falcon": _falcon}


def find_forward(config: PreTrainedConfig) -> Callable[..., tuple[Tensor, Any]] | None:
    """The forward that attention layers of this configuration need, called with the layer and a name before its own
    arguments; None: the layers use AttentionInterface, or nobody here knows them."""
    return None if alibi_architecture(config) is None else _FORWARDS.get(config.model_type)


def forward_places(model: nn.Module, config: PreTrainedConfig) -> list[tuple[nn.Module, str]]:
    """The model's attention layers, and the attribute of each that stands for its class's forward.

    Raises:
        NotImplementedError: model: expected 24 attention layers with query_key_value, got 0
    """
    row = alibi_architecture(config)
    assert row is not None  # find_forward has looked
    projection = row.projections[0]
    layers = [module for module in model.modules() if hasattr(module, projection)]
    if len(layers) != config.num_hidden_layers:
        raise NotImplementedError(
            f"model: expected {config.num_hidden_layers} attention layers with {projection}, got {len(layers)}"
        )
    # accelerate's hooks sit in `forward` and call `_old_forward`.
    return [(layer, "_old_forward" if "_old_forward" in vars(layer) else "forward") for layer in layers]
