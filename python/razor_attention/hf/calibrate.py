# SPDX-License-Identifier: Apache-2.0
"""find_heads: runs the probe prompt through a model once and scores every head on the way, layer by layer."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .. import ops
from ..checks import check_int
from ..heads import HeadScores, probe_ids
from .alibi import alibi_architecture
from .checkpoint import mapped_model, read_config
from .masks import plain_mask
from .models import geometry, inside, refuse_unsupported, text_config
from .parallel import gather_heads, kv_shard
from .switch import AttentionSwitch


@dataclass
class Probe:
    """What the attention function collects while the probe runs."""

    period: int
    progress: Any  # a tqdm bar, one step per layer
    scores: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # layer -> echo, induction [heads here]


_running: ContextVar[Probe] = ContextVar("razor_probe")


def probe_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function registered as "razor_probe": plain causal attention that also scores its heads."""
    refuse_unsupported(module, dropout, kwargs, attention_mask, query.shape[2])
    probe = inside(_running, "razor_probe", "find_heads")
    echo, induction = ops.head_scores(query, key, probe.period, scale=scaling)
    probe.scores[cast(int, module.layer_idx)] = (echo[0].cpu(), induction[0].cpu())
    probe.progress.update()
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.transpose(1, 2), None


def probe_mask(**options: Any) -> Tensor | None:
    """The mask function registered as "razor_probe": the probe has no padding."""
    inside(_running, "razor_probe", "find_heads")
    return plain_mask(**options)


def _prefix(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> int:
    """The token before the probe: what the tokenizer puts before an empty text, else the last one of "A"."""
    ids = tokenizer("").input_ids or tokenizer("A").input_ids
    if not ids or not 0 <= ids[-1] < vocab_size:
        got = f"id {ids[-1]}" if ids else "none"
        raise ValueError(f"tokenizer: expected a token for an empty text or for 'A' below {vocab_size}, got {got}")
    return int(ids[-1])


def _period(longest: int | None, repeats: int) -> int:
    """2500, or what fits a model of `longest` positions."""
    period = 2500 if longest is None else min(2500, (longest - 1) // check_int("repeats", repeats, 2))
    if period < 1:
        raise ValueError(f"repeats: expected less than the model's {longest} positions, got {repeats}")
    return period


def find_heads(
    model: PreTrainedModel | str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    period: int | None = None,
    repeats: int = 4,
    seed: int = 0,
    vocabulary: Sequence[int] | None = None,
    progress: bool = True,
) -> HeadScores:
    """Echo and induction scores of every head, from one forward pass over a random block repeated (RazorAttention).

    The prompt is one prefix token and `period` random ids of the vocabulary, special tokens left out, `repeats` times.
    No attention map is built: memory beside the model's own activations is O(tokens). Given a path, the weights stay
    in files: each projection is mapped when the probe passes it and dropped again.

    Args:
        model: a decoder model that uses AttentionInterface, or the folder of its checkpoint; weights that are no
            safetensors are copied to a temporary folder first.
        tokenizer: the model's tokenizer: vocabulary, special tokens and prefix. None: the one in the folder.
        period: tokens before the prompt repeats. None: 2500, or what fits the model's positions; the progress bar and
            the provenance say which. A longer probe than the model has positions for is warned of.
        repeats: copies of the block, at least 2.
        seed: of the block.
        vocabulary: ids that the block is drawn from; None: all of the tokenizer's but the special ones.
        progress: show a progress bar.

    Returns:
        Scores of all layers, with the provenance that a plan made from them carries on. Under tensor parallelism every
        rank gets those of all heads.

    Raises:
        NotImplementedError: model: expected one that uses AttentionInterface, got CodeGenForCausalLM
        ValueError: model: expected one with rotary positions, got bloom, which uses ALiBi; ...
    """
    if isinstance(model, str | os.PathLike):
        folder = Path(model)
        _refuse_alibi(read_config(folder))
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(folder, local_files_only=True)
        options: Any = {"period": period, "repeats": repeats, "seed": seed, "vocabulary": vocabulary}
        with mapped_model(folder) as mapped:
            return find_heads(mapped, tokenizer, progress=progress, **options)
    if tokenizer is None:
        raise TypeError("tokenizer: expected one with a model in memory, got None")
    config = text_config(model.config)
    _refuse_alibi(config)
    switch = AttentionSwitch(model, "razor_probe")
    sizes, (rank, _) = geometry(model.config), kv_shard(model.config)
    if vocabulary is None:
        special = set(tokenizer.all_special_ids)
        vocabulary = [i for i in range(min(len(tokenizer), config.vocab_size)) if i not in special]
    elif len(vocabulary) and not 0 <= min(vocabulary) <= max(vocabulary) < config.vocab_size:
        raise ValueError(
            f"vocabulary: expected ids from 0 to {config.vocab_size - 1}, got {min(vocabulary)} to {max(vocabulary)}"
        )
    longest = getattr(config, "max_position_embeddings", None)
    period = _period(longest, repeats) if period is None else period
    ids = probe_ids(vocabulary, _prefix(tokenizer, config.vocab_size), period=period, repeats=repeats, seed=seed)
    if longest is not None and len(ids) > longest:
        warnings.warn(
            f"period * repeats: expected at most {longest - 1} tokens for this model, got {len(ids) - 1}", stacklevel=2
        )

    description = f"find_heads, {period} tokens x {repeats}"
    with switch, tqdm(total=sizes.num_layers, desc=description, unit="layer", disable=not progress or rank > 0) as bar:
        probe = Probe(period, bar)
        token = _running.set(probe)
        try:
            with torch.no_grad():
                # The decoder alone: nobody reads the probe's logits.
                decoder: Any = model.base_model
                device = "cpu" if model.device.type == "meta" else model.device  # weights that wait in files
                decoder(input_ids=ids[None].to(device), use_cache=False)
        finally:
            _running.reset(token)
    missing = [layer for layer in range(sizes.num_layers) if layer not in probe.scores]
    if missing:
        raise NotImplementedError(f"model: expected {sizes.num_layers} attention layers, got none for layers {missing}")
    echo, induction = (
        gather_heads(model, torch.stack(side))
        for side in zip(*(probe.scores[i] for i in range(sizes.num_layers)), strict=True)
    )
    return HeadScores(
        echo=echo,
        induction=induction,
        num_kv_heads=sizes.num_kv_heads,
        provenance={
            "model": Path(config.name_or_path or "").name or type(model).__name__,  # a path means nothing elsewhere
            "method": "echo and induction scores",
            "period": period,
            "repeats": repeats,
            "seed": seed,
            "version": version("razor-attention"),
        },
    )


def _refuse_alibi(config: Any) -> None:
    if alibi_architecture(config) is not None:
        raise ValueError(
            f"model: expected one with rotary positions, got {config.model_type}, which uses ALiBi; "
            "its windows are found by find_windows"
        )


AttentionInterface.register("razor_probe", probe_attention)
AttentionMaskInterface.register("razor_probe", probe_mask)
