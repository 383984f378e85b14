# SPDX-License-Identifier: Apache-2.0
"""dropped_mass: runs an ALiBi model over a text and measures what every window of every head would drop."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from ..alibi import attend_and_measure
from .alibi import not_alibi
from .models import geometry, inside, refuse_unsupported, text_config
from .parallel import gather_heads, local_slopes
from .switch import AttentionSwitch


@torch.no_grad()
def dropped_mass(model: PreTrainedModel, ids: Tensor, *, progress: bool = True) -> Tensor:
    """What every window of every head of an ALiBi model would drop on a text: one forward pass, no attention map kept.

    Args:
        model: one that `attach` takes, with ALiBi.
        ids: (batch, tokens), int64, no padding.
        progress: show a progress bar.

    Returns:
        (num_layers, num_heads, tokens + 1), float32. [l, h, w]: the largest over all queries of the attention weight of
        tokens at a distance >= w; falls along w.

    Raises:
        ValueError: ids: expected (batch, tokens), int64, at least 2 tokens, got [7] torch.float32
    """
    if (
        not isinstance(ids, Tensor)
        or ids.dim() != 2
        or ids.dtype != torch.int64
        or ids.shape[0] < 1
        or ids.shape[1] < 2
    ):
        got = f"{list(ids.shape)} {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"ids: expected (batch, tokens), int64, at least 2 tokens, got {got}")
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a transformers model to run, got {type(model).__name__}")
    config = text_config(model.config)
    if (slopes := local_slopes(model.config)) is None:
        raise not_alibi(config)
    if not 0 <= int(ids.min()) <= int(ids.max()) < config.vocab_size:
        raise ValueError(f"ids: expected values from 0 to {config.vocab_size - 1}, got {ids.min()} to {ids.max()}")
    sizes = geometry(model.config)
    with AttentionSwitch(model, "razor_mass"), tqdm(total=sizes.num_layers, unit="layer", disable=not progress) as bar:
        bar.set_description("dropped_mass")
        measured: dict[int, Tensor] = {}
        token = _running.set(_Measure(slopes, measured, bar))
        try:
            decoder: Any = model.base_model
            decoder(input_ids=ids.to(model.device), use_cache=False)
        finally:
            _running.reset(token)
    return gather_heads(model, torch.stack([measured[layer] for layer in range(sizes.num_layers)]))


@dataclass(frozen=True)
class _Measure:
    """What the attention function below needs and collects."""

    slopes: Tensor  # (heads of this process,), float32
    mass: dict[int, Tensor]  # layer -> (heads of this process, tokens + 1), float32
    progress: Any


_running: ContextVar[_Measure] = ContextVar("razor_mass")


def mass_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function registered as "razor_mass": plain causal ALiBi attention that measures its windows."""
    refuse_unsupported(module, dropout, kwargs, None, query.shape[2])
    measure = inside(_running, "razor_mass", "dropped_mass")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out, mass = attend_and_measure(query, key, value, measure.slopes.to(query.device), scale)
    measure.mass[cast(int, module.layer_idx)] = mass.cpu()
    measure.progress.update()
    return out.transpose(1, 2), None


def mass_mask(*, batch_size: int, kv_length: int, device: torch.device | None = None, **_: Any) -> Tensor:
    """The mask function registered as "razor_mass": there is no padding, but MPT asks for some mask."""
    inside(_running, "razor_mass", "dropped_mass")
    return torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)


AttentionInterface.register("razor_mass", mass_attention)
AttentionMaskInterface.register("razor_mass", mass_mask)
