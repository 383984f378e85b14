# SPDX-License-Identifier: Apache-2.0
"""Tiny random models whose answers depend on far tokens, and a second implementation of a plan: dense, masked, float64.

The masked model keeps every key and value in a stock DynamicCache and decides for each query what it reads, from the
plan's tables alone. It knows no pages, rings or running sums, and shares nothing with the package but the plan.
"""

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BloomForCausalLM,
    DynamicCache,
    FalconForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MptForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.cache_utils import Cache

from razor_attention import FULL, Plan, RazorCache, attach
from razor_attention.hf.baichuan import BaichuanForCausalLM
from razor_attention.hf.names import CACHE
from razor_attention.hf.switch import AttentionSwitch

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
}
VOCABULARY = 96
PAD, EOS = 0, 1  # prompts have neither; `settle` forbids them in answers
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": EOS,
}
OF_FAMILY: dict[str, dict[str, Any]] = {"mistral": {"sliding_window": None}}
LAYERS, KV_HEADS = SIZES["num_hidden_layers"], SIZES["num_key_value_heads"]

# Every kind of head: full, with and without compensation, without sinks, with the smallest window.
MIXED = Plan(
    sink_size=[[0, 4, 2], [3, 0, 5]],
    window_size=[[FULL, 8, 12], [17, FULL, 1]],
    compensate=[[False, True, False], [True, False, True]],
)


FULL_PLAN = Plan.full(LAYERS, KV_HEADS)

# name: model class, then what its config has beyond TOKENS. Head_dim 16, two layers, 8 heads and once 12.
TOKENS = {name: SIZES[name] for name in ("vocab_size", "pad_token_id", "eos_token_id", "tie_word_embeddings")}
FALCON = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8, "alibi": True, "bos_token_id": None}
BAICHUAN = FALCON | {"intermediate_size": 64, "bos_token_id": None}
del BAICHUAN["alibi"]
ALIBI: dict[str, tuple[Any, dict[str, Any]]] = {
    "bloom": (BloomForCausalLM, {"hidden_size": 128, "n_layer": 2, "n_head": 8, "bos_token_id": None}),
    "bloom, 12 heads": (BloomForCausalLM, {"hidden_size": 192, "n_layer": 2, "n_head": 12, "bos_token_id": None}),
    "mpt": (MptForCausalLM, {"d_model": 128, "n_layers": 2, "n_heads": 8}),
    "mpt, 12 heads": (MptForCausalLM, {"d_model": 192, "n_layers": 2, "n_heads": 12, "attn_config": {"clip_qkv": 1.5}}),
    "falcon, 1 kv head": (FalconForCausalLM, FALCON),
    "falcon, 8 kv heads": (FalconForCausalLM, FALCON | {"multi_query": False, "parallel_attn": False, "bias": True}),
    "falcon, groups": (FalconForCausalLM, FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "baichuan": (BaichuanForCausalLM, BAICHUAN),
    "baichuan 2, 12 heads": (
        BaichuanForCausalLM,
        BAICHUAN | {"hidden_size": 192, "num_attention_heads": 12, "normalize_head": True},
    ),
}


def bytes_of(plan: Plan, lengths: Sequence[int], dtype: torch.dtype, page_size: int = 64) -> int:
    """What the plan says that sequences of these lengths take."""
    return sum(plan.kv_bytes(n, head_dim=SIZES["head_dim"], dtype=dtype, page_size=page_size) for n in lengths)


def policies(plan: Plan, *, compensate: bool) -> Plan:
    """The same plan with the compensation row for all heads or for none."""
    return Plan(plan.sink_size, plan.window_size, torch.full_like(plan.compensate, compensate))


def tiny_model(family: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A new random model with a config of its own; a config object that two models share would tie them together."""
    config_class, model_class = FAMILIES[family]
    model = model_class._from_config(config_class(**SIZES | OF_FAMILY.get(family, {}) | changes))
    assert model.config._attn_implementation == "sdpa"
    return settle(model).to(dtype)


def alibi_model(name: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A new random model of ALIBI."""
    model_class, sizes = ALIBI[name]
    return settle(model_class._from_config(model_class.config_class(**TOKENS | sizes | changes))).to(dtype)


@functools.cache
def shared_model(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """One model for many tests: leave it as it was."""
    return tiny_model(family, dtype=dtype)


def settle(model: PreTrainedModel) -> PreTrainedModel:
    """Large random weights: attention logits vary so much that single far tokens win, and answers are clear."""
    draw = torch.Generator().manual_seed(zlib.crc32(type(model).__name__.encode()))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=draw)
            if "norm" in name and "bias" in name:
                weight.copy_(0.1 * noise)
            elif "norm" in name or "ln_" in name:  # q_norm and k_norm take the place of large projections
                weight.copy_((1.6 if name.split(".")[-2] in ("q_norm", "k_norm") else 1.0) + 0.1 * noise)
            elif weight.dim() == 1:
                weight.copy_(0.3 * noise)
            elif "embed" in name:
                weight.copy_(noise)
            else:
                last = name.split(".")[-2]
                gain = 3.0 if last == "lm_head" else 1.6
                if last == "dense_4h_to_h" or ".ffn.down_proj" in name:
                    gain = 0.4  # what GELU adds to every token alike would decide all answers
                weight.copy_(noise * gain * weight.shape[1] ** -0.5)
    model.generation_config.suppress_tokens = [PAD, EOS]
    return model.eval()


def save(model: Any, folder: Path, kind: str) -> None:
    """A checkpoint of any module: `kind` is safetensors or bin, and shards."""
    folder.mkdir()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict() if hasattr(model.config, "to_dict") else vars(model.config)
    (folder / "config.json").write_text(json.dumps(config, default=str))
    name, write = (
        ("model.safetensors", save_file) if "safetensors" in kind else ("pytorch_model.bin", torch.save)
    )  # both (tensors, path)
    if "shards" not in kind:
        write(state, folder / name)
        return
    index: dict[str, str] = {}
    for part in range(3):
        shard = name.replace(".", f"-{part + 1:05}-of-00003.", 1)
        keys = sorted(state)[part::3]
        write({key: state[key] for key in keys}, folder / shard)
        index |= dict.fromkeys(keys, shard)
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def prompts(*lengths: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random ids and their mask, each (len(lengths), longest), int64, padded on the left."""
    draw, longest = torch.Generator().manual_seed(seed), max(lengths)
    ids = torch.randint(EOS + 1, VOCABULARY, (len(lengths), longest), generator=draw)
    mask = (torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]).long()
    return ids.where(mask.bool(), PAD), mask


def positions(mask: Tensor) -> Tensor:
    """Positions that `generate` gives the tokens of a mask (batch, tokens)."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def answer(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    """The new tokens, greedy unless told otherwise. seed: of torch's generator."""
    if "seed" in options:
        torch.manual_seed(options.pop("seed"))
    mask = torch.ones_like(ids) if mask is None else mask
    out = model.generate(ids, attention_mask=mask, **{"max_new_tokens": 24, "do_sample": False} | options)
    return out[:, ids.shape[1] :]


def conversation(model: PreTrainedModel, cache: Cache) -> Tensor:
    """Answers to a padded prompt and three more turns on one cache: a longer one, a shorter one, one of one token."""
    ids, mask = prompts(30, 22)
    answers = []
    for new in (0, 40, 20, 1):
        ids = torch.cat([ids, prompts(new, new, seed=new)[0]], 1)
        mask = torch.cat([mask, mask.new_ones(2, ids.shape[1] - mask.shape[1])], 1)
        answers.append(answer(model, ids, mask, **{CACHE: cache}, max_new_tokens=10))
        ids = torch.cat([ids, answers[-1]], 1)
    return torch.cat(answers, 1)


@torch.no_grad()
def logits_by_step(
    model: PreTrainedModel, cache: Cache, ids: Tensor, lengths: Sequence[int], mask: Tensor | None = None
) -> Tensor:
    """Logits of fixed tokens (batch, tokens), fed in calls of these lengths: (batch, tokens, vocabulary) float32."""
    mask = torch.ones_like(ids) if mask is None else mask
    out, start = [], 0
    for length in lengths:
        end = start + length
        step = {"attention_mask": mask[:, :end], "position_ids": positions(mask[:, :end])[:, start:]}
        out.append(model(ids[:, start:end], **{CACHE: cache}, use_cache=True, **step).logits)
        start = end
    assert start == ids.shape[1]
    return torch.cat(out, 1).float()


# --- the masked model

_policy: ContextVar[tuple[Plan, bool, Tensor | None]] = ContextVar("policy")


def masked_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """query: (batch, num_heads, q_len, head_dim); key, value: (batch, num_kv_heads, kv_len, head_dim), all tokens."""
    plan, dense, slopes = _policy.get()
    sink, window, compensate = (table[:, None, None] for table in plan.layer(module.layer_idx))  # [kv heads, 1, 1]
    batch, q_len, kv_len = query.shape[0], query.shape[2], key.shape[2]
    real = torch.ones(batch, kv_len, dtype=torch.bool) if attention_mask is None else attention_mask
    token = (real.cumsum(1) - 1)[:, None, None]  # [batch, 1, 1, kv_len], positions; padding does not count
    here = token[..., -q_len:].transpose(2, 3)  # [batch, 1, q_len, 1]
    visible = (here >= token) & real[:, None, None] & real[:, None, -q_len:, None]
    exact = (token < sink) | (here - token < window)
    if dense and q_len > 1:
        stored = real[:, : kv_len - q_len].sum(1)[:, None, None, None]  # tokens in the cache when the call began
        exact = exact | (token >= stored) | (stored - 1 - token < window)
    exact, dropped = visible & exact, visible & ~exact & compensate  # [batch, kv heads, q_len, kv_len]

    q = query.double().unflatten(1, (key.shape[1], -1)) * scaling  # [batch, kv heads, group, q_len, dim]
    k, v = key.double()[:, :, None], value.double()[:, :, None]
    count = dropped.sum(-1)[:, :, None, :, None].double()  # [batch, kv heads, 1, q_len, 1]
    share = dropped[:, :, None] / count.clamp(min=1)
    mean_k, mean_v = share @ k, share @ v  # one row for each query
    logits = q @ k.transpose(-1, -2)
    if slopes is not None:
        logits = logits - slopes.view(key.shape[1], -1, 1, 1) * (here - token)[:, :, None]
    logits = logits.masked_fill(~exact[:, :, None], -torch.inf)
    logits = torch.cat([logits, (q * mean_k).sum(-1, keepdim=True) + count.log()], -1)
    weights = logits.softmax(-1).nan_to_num(0.0)
    out = weights[..., :-1] @ v + weights[..., -1:] * mean_v
    return out.flatten(1, 2).to(query.dtype).transpose(1, 2).contiguous(), None


def padding_mask(*, attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
    """Hands the padding mask (batch, kv_len) on as it is."""
    return attention_mask


@contextmanager
def masked(
    model: PreTrainedModel, plan: Plan, *, prefill: str = "dense", slopes: Tensor | None = None
) -> Iterator[None]:
    """Inside this context the model with a DynamicCache computes what the plan says. slopes: [num_heads], for ALiBi."""
    AttentionInterface.register("masked", masked_attention)
    AttentionMaskInterface.register("masked", padding_mask)
    token = _policy.set((plan, prefill == "dense", slopes))
    try:
        with AttentionSwitch(model, "masked"):
            yield
    finally:
        _policy.reset(token)


def both_ways(
    model: PreTrainedModel,
    plan: Plan,
    prefill: str,
    ids: Tensor,
    lengths: Sequence[int],
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Our logits and the masked model's for the same calls, without those of padding."""
    with masked(model, plan, prefill=prefill):
        theirs = logits_by_step(model, DynamicCache(), ids, lengths, mask)
    with attach(model, plan):
        ours = logits_by_step(model, RazorCache(model.config, plan, prefill=prefill), ids, lengths, mask)
    return (ours, theirs) if mask is None else (ours[mask.bool()], theirs[mask.bool()])
