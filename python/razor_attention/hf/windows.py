# SPDX-License-Identifier: Apache-2.0
"""find_windows: how far back each head of an ALiBi model reads, from its weights or from a text.

Weights are read layer by layer, of a model in memory or of a checkpoint that never comes into it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CONFIG_MAPPING, AttentionInterface, AttentionMaskInterface, PreTrainedModel

from ..alibi import RULES, AlibiWeights, alibi_slopes, alibi_windows, attend_and_measure, smallest_windows
from .alibi import ALIBI_ARCHITECTURES, alibi_architecture, model_slopes
from .checkpoint import Reader, open_weights, read_config
from .models import AttentionSwitch, geometry, refuse_unsupported, text_config


def find_windows(
    model_or_path: nn.Module | str | os.PathLike[str],
    *,
    theta: float = 1e-5,
    alpha: float = 100,
    method: str = "msmodelslim",
    per_layer: bool = False,
    ids: Tensor | None = None,
    progress: bool = True,
) -> Tensor:
    """How many of its last tokens each head of an ALiBi model needs: what `Plan.from_windows` takes.

    The rules "msmodelslim", "per_head" and "theorem" look at the weights of the query and key projections, which they
    read layer by layer: given a path, nothing else of the checkpoint is read. "calibrated" runs the model over a text
    and takes the smallest window that drops at most theta of the attention of any query of that text.

    Args:
        model_or_path: BLOOM, MPT, Falcon with alibi, Baichuan-13B, or a module whose projections are called as theirs;
            or the folder of such a checkpoint, safetensors or .bin.
        theta: see `alibi_windows`; for "calibrated" the share of attention that may be dropped.
        alpha: margin on the logit spread; not part of "theorem" and "calibrated".
        method: "msmodelslim" (integer-equal to its binary), "per_head", "theorem" or "calibrated" (recommended).
        per_layer: windows of each layer instead of the widest of all; not in msmodelslim's rule.
        ids: (batch, tokens), int64; text for "calibrated", as long as the windows are to hold for.
        progress: show a progress bar.

    Returns:
        (num_heads,) or (num_layers, num_heads), int64, tokens.

    Raises:
        ValueError: model: expected one that uses ALiBi (...), got llama, which uses rotary positions; use find_heads
    """
    if method not in (*RULES, "calibrated"):
        wanted = ", ".join(map(repr, RULES))
        raise ValueError(f"method: expected {wanted} or 'calibrated', got {method!r}")
    if (method == "calibrated") != (ids is not None):
        wanted, got = ("token ids", "none") if ids is None else ("none", "token ids")
        raise ValueError(f"ids: expected {wanted} with method {method!r}, got {got}")
    if method == "calibrated":
        if not isinstance(model_or_path, PreTrainedModel):
            raise TypeError(f"model: expected a transformers model to run, got {type(model_or_path).__name__}")
        mass = dropped_mass(model_or_path, cast(Tensor, ids), progress=progress)
        windows = smallest_windows(mass, theta)
        return windows if per_layer else windows.amax(0)

    if isinstance(model_or_path, nn.Module):
        config: Any = getattr(model_or_path, "config", None)
        readers: Mapping[str, Reader] = {
            name: partial(_in_memory, name, tensor) for name, tensor in model_or_path.state_dict().items()
        }
        modules: Iterable[str] = dict(model_or_path.named_modules())
    elif isinstance(model_or_path, str | os.PathLike):
        config, readers = read_config(Path(model_or_path)), open_weights(Path(model_or_path))
        modules = readers
    else:
        raise TypeError(f"model: expected a module or a path, got {type(model_or_path).__name__}")
    slopes = _slopes(config, modules)
    layers = _Layers(config, len(slopes), readers, compatible=method == "msmodelslim")
    with tqdm(layers, total=len(layers), desc="find_windows", unit="layer", disable=not progress) as bar:
        return alibi_windows(bar, slopes, theta=theta, alpha=alpha, method=method, per_layer=per_layer)


def _slopes(config: Any, names: Iterable[str]) -> Tensor:
    """(num_heads,), float32: the model's own slopes, or the paper's for a module that is nobody's we know."""
    slopes = model_slopes(config)
    if slopes is not None:
        return slopes
    rotary = any("rotary" in name for name in names) or getattr(config, "rope_theta", None) is not None
    if rotary or getattr(config, "model_type", None) in CONFIG_MAPPING:
        raise not_alibi(config)
    num_heads = getattr(config, "num_attention_heads", None)
    if not num_heads:
        raise ValueError(f"model: expected a config with num_attention_heads, got {type(config).__name__} without it")
    return alibi_slopes(num_heads)


def not_alibi(config: Any) -> ValueError:
    """The error for a model without ALiBi."""
    known = ", ".join(ALIBI_ARCHITECTURES)
    got = getattr(config, "model_type", None) or type(config).__name__
    return ValueError(
        f"model: expected one that uses ALiBi ({known}), got {got}, which does not; its heads are found by find_heads"
    )


def _in_memory(name: str, tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        raise ValueError(f"model: expected weights in memory, got {name} on the meta device; give the path instead")
    return tensor


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
    slopes = model_slopes(text_config(model.config))
    if slopes is None:
        raise not_alibi(model.config)
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
    return torch.stack([measured[layer] for layer in range(sizes.num_layers)])


@dataclass(frozen=True)
class _Measure:
    """What the attention function below needs and collects."""

    slopes: Tensor  # (num_heads,), float32
    mass: dict[int, Tensor]  # layer -> (num_heads, tokens + 1), float32
    progress: Any


_running: ContextVar[_Measure] = ContextVar("razor_mass")


def mass_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function registered as "razor_mass": plain causal ALiBi attention that measures its windows."""
    refuse_unsupported(module, dropout, kwargs)
    measure = _running.get()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out, mass = attend_and_measure(query, key, value, measure.slopes.to(query.device), scale)
    measure.mass[cast(int, module.layer_idx)] = mass.cpu()
    measure.progress.update()
    return out.transpose(1, 2), None


def mass_mask(*, batch_size: int, kv_length: int, device: torch.device | None = None, **_: Any) -> Tensor:
    """The mask function registered as "razor_mass": there is no padding, but MPT asks for some mask."""
    return torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)


# --- weights: found by the name of the projection, the only thing that tells models apart here

_FUSED = {"query_key_value": "by head", "Wqkv": "by side", "W_pack": "by side"}  # how the rows of q, k, v are arranged
_NORMS = ("input_layernorm", "ln_attn", "norm_1")  # of the input of these projections


class _Layers:
    """The projections of all layers, read when they are asked for."""

    def __init__(self, config: Any, num_heads: int, readers: Mapping[str, Reader], *, compatible: bool) -> None:
        self.config, self.num_heads, self.readers, self.compatible = config, num_heads, readers, compatible
        for sides in (*((name,) for name in _FUSED), ("q_proj", "k_proj")):
            found = [_by_layer(readers, side) for side in sides]
            if found[0]:
                break
        else:
            wanted = ", ".join((*_FUSED, "q_proj"))
            raise ValueError(f"model: expected projections called one of {wanted}, got none in numbered layers")
        self.sides, self.layers = sides, found[0]  # layer -> name of the (first) weight

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[AlibiWeights]:
        for _, name in sorted(self.layers.items()):
            yield self._split(name)

    def _split(self, name: str) -> AlibiWeights:
        weights = [self.readers[name.replace(self.sides[0], side)]() for side in self.sides]
        split = _split_as_msmodelslim if self.compatible else _split_heads
        query, key = split(weights, _FUSED.get(self.sides[0], ""), self.num_heads, self.config)
        return AlibiWeights(query, key, None if self.compatible else self._norm(name))

    def _norm(self, name: str) -> tuple[Tensor, Tensor | None] | None:
        layer = re.match(r"(?:.*?\.)??\d+\.", name)
        assert layer is not None  # _by_layer has seen it
        for norm in _NORMS:
            if weight := self.readers.get(f"{layer[0]}{norm}.weight"):
                bias = self.readers.get(f"{layer[0]}{norm}.bias")
                return weight(), bias() if bias else None
        return None


def _by_layer(names: Iterable[str], projection: str) -> dict[int, str]:
    pattern = re.compile(rf"(?:.*?\.)??(\d+)\.(?:\w+\.)*{projection}\.weight")
    return {int(match[1]): name for name in names if (match := pattern.fullmatch(name))}


def _split_heads(weights: list[Tensor], rows: str, num_heads: int, config: Any) -> tuple[Tensor, Tensor]:
    """Query and key of each head, (in, num_heads, head_dim): views where every query head has its own key head."""
    if len(weights) == 2:
        query = _cut(weights[0], 0, num_heads)
        key = _cut(weights[1], 0, weights[1].shape[0] // query.shape[1])
    elif rows == "by side":  # [3, num_heads, head_dim, in]
        query, key = _cut(_cut(weights[0], 0, 3), 1, num_heads)[:2]
    else:  # [num_kv_heads, group + 2, head_dim, in]: BLOOM and Falcon; the group's queries, its key, its value
        known = alibi_architecture(config)
        kv_heads = known.num_kv_heads(config, num_heads) if known else num_heads
        grouped = _cut(_cut(weights[0], 0, kv_heads), 1, num_heads // kv_heads + 2)
        query, key = grouped[:, :-2].flatten(0, 1), grouped[:, -2]
    if len(key) != num_heads:
        key = key.repeat_interleave(num_heads // len(key), 0)
    return query.permute(2, 0, 1), key.permute(2, 0, 1)


def _split_as_msmodelslim(weights: list[Tensor], rows: str, num_heads: int, config: Any) -> tuple[Tensor, Tensor]:
    """Its view, (rows, num_heads, cols): three blocks of rows whatever the model, a head is a slice of the columns."""
    query, key = weights if len(weights) == 2 else _cut(weights[0], 0, 3)[:2]
    return _cut(query, 1, num_heads), _cut(key, 1, num_heads)


def _cut(weight: Tensor, dim: int, parts: int) -> Tensor:
    """A view with the axis `dim` cut into (parts, size / parts)."""
    size = weight.shape[dim]
    if size % max(parts, 1):
        raise ValueError(f"model: expected projections that split into {parts} parts, got {list(weight.shape)}")
    return weight.view(*weight.shape[:dim], parts, size // parts, *weight.shape[dim + 1 :])


AttentionInterface.register("razor_mass", mass_attention)
AttentionMaskInterface.register("razor_mass", mass_mask)
