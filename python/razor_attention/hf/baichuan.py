# SPDX-License-Identifier: Apache-2.0
"""Baichuan and Baichuan 2 for transformers 5, where their checkpoints' own code no longer runs.

Llama with q, k and v in one projection, W_pack; 13B has ALiBi instead of rotary positions, Baichuan 2 a normalised
head. Parameters have the names of the published checkpoints, but none was at hand: this ran small random models alone.
Tokenizers of these checkpoints are code of their own too and not ours.

Under sdpa and eager each layer of a 13B model builds its causal ALiBi map, (batch, num_heads, q_len, kv_len): exact
and slow. Under razor attention, which looks after ALiBi itself, there is none.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, apply_rotary_pos_emb, eager_attention_forward

from .alibi import model_slopes
from .names import ALL_ATTENTION_FUNCTIONS, CONFIG_MAPPING, pop_cache

_ADD_ALIBI = ("razor", "razor_mass")  # names of attention functions that do, from their cache's slopes
_BAICHUAN_2_VOCABULARY = 125696


@strict
class BaichuanConfig(LlamaConfig):  # type: ignore[no-untyped-call]
    """Configuration of all sizes: `max_position_embeddings` makes a rotary model (7B), its absence ALiBi (13B).

    `normalize_head` None: Baichuan 2 is known by its vocabulary of 125,696 tokens (Baichuan has 64,000); a model with a
    vocabulary changed afterwards needs it said.
    """

    model_type = "baichuan"
    base_model_tp_plan = {}  # noqa: RUF012  # Llama's names three projections that are not here

    vocab_size: int = 64000
    hidden_size: int = 5120
    intermediate_size: int = 13696
    num_hidden_layers: int = 40
    num_attention_heads: int = 40
    max_position_embeddings: int | None = None  # type: ignore[assignment]
    model_max_length: int = 4096
    pad_token_id: int | None = 0
    normalize_head: bool | None = None


def alibi_map(slopes: Tensor, mask: Tensor | None, q_len: int, kv_len: int, dtype: torch.dtype) -> Tensor:
    """What attention functions without ALiBi add to their logits.

    Args:
        slopes: (num_heads,), float32.
        mask: (batch, 1, q_len, kv_len), bool or added to logits. None: causal.
        q_len: new tokens, the last of `kv_len`.
        kv_len: all tokens.
        dtype: of the result, where a masked token has the least value.

    Returns:
        (batch or 1, num_heads, q_len, kv_len), dtype.
    """
    token = torch.arange(kv_len, device=slopes.device)
    distance = token[kv_len - q_len :, None] - token
    least = torch.finfo(dtype).min
    if mask is None:
        mask = (distance >= 0)[None, None]
    if mask.dtype == torch.bool:
        mask = torch.zeros((), device=mask.device).where(mask, least)
    return (mask.float() - slopes[:, None, None] * distance).clamp(min=least).to(dtype)


class BaichuanAttention(nn.Module):
    """Attention with one projection: W_pack.weight (3 * num_heads * head_dim, hidden), query, key and value in turn."""

    def __init__(self, config: BaichuanConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_key_value_groups, self.is_causal = 1, True  # asked for by transformers' attention functions
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of the new tokens, as transformers' decoder layers call it.

        Args:
            hidden_states: (batch, q_len, hidden).
            position_embeddings: cosines and sines, each (batch, q_len, head_dim); for rotary models.
            attention_mask: what the mask function of the attention in use returned.
            kwargs: the cache, under the name that transformers gives it; the rest is for the attention function.

        Returns:
            (batch, q_len, hidden), and what the attention function returns as its map.
        """
        fused = self.W_pack(hidden_states).unflatten(-1, (3, -1, self.head_dim))
        query, key, value = fused.transpose(1, 3).unbind(2)  # each (batch, num_heads, q_len, head_dim)
        slopes = model_slopes(self.config)
        if slopes is None:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if (cache := pop_cache(kwargs)) is not None:
            key, value = cache.update(key, value, self.layer_idx)
        name = self.config._attn_implementation
        if slopes is not None and name not in _ADD_ALIBI:
            slopes = slopes.to(query.device)
            attention_mask = alibi_map(slopes, attention_mask, query.shape[2], key.shape[2], query.dtype)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        scaling = self.head_dim**-0.5
        out, weights = attention(self, query, key, value, attention_mask, scaling=scaling, dropout=0.0, **kwargs)
        return self.o_proj(out.flatten(2)), weights


class NormHead(nn.Linear):
    """A head without bias whose rows count with norm 1."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Cosines times the norm of the hidden state.

        Args:
            hidden_states: (batch, tokens, hidden).

        Returns:
            (batch, tokens, vocabulary).
        """
        # Dividing logits takes one more pass over the weight, but no normalised copy of it.
        norms = torch.linalg.vector_norm(self.weight, dim=1, dtype=torch.float32).clamp(min=1e-12)
        return cast(Tensor, super().forward(hidden_states) / norms).to(hidden_states.dtype)


class BaichuanModel(LlamaModel):  # type: ignore[no-untyped-call]
    """The decoder without a head."""

    config_class = BaichuanConfig
    # Attention functions that know neither our map nor our slopes.
    _supports_flash_attn = _supports_flex_attn = False
    _can_record_outputs = {"hidden_states": LlamaDecoderLayer, "attentions": BaichuanAttention}  # noqa: RUF012

    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            layer.self_attn = BaichuanAttention(config, index)
        self.post_init()  # type: ignore[no-untyped-call]


class BaichuanForCausalLM(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """Baichuan with its head; Baichuan 2 normalises the head's rows."""

    config_class = BaichuanConfig
    _supports_flash_attn = _supports_flex_attn = False
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]  # noqa: RUF012

    def __init__(self, config: BaichuanConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)  # its own would build every layer twice
        self.model = BaichuanModel(config)
        self.vocab_size = config.vocab_size
        normalize = config.normalize_head
        if normalize is None:
            normalize = config.vocab_size == _BAICHUAN_2_VOCABULARY
        self.lm_head = (NormHead if normalize else nn.Linear)(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]


if BaichuanConfig.model_type not in CONFIG_MAPPING:  # as long as transformers brings none
    AutoConfig.register(BaichuanConfig.model_type, BaichuanConfig)
    AutoModel.register(BaichuanConfig, BaichuanModel)
    AutoModelForCausalLM.register(BaichuanConfig, BaichuanForCausalLM)
