# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism as transformers does it: which kv heads a process computes, and tables of all heads from parts.

transformers cuts the rows of k_proj into equal runs, in order, so rank r of n has kv heads r * num_kv_heads / n and on,
and the query heads that read them. Nothing here opens a connection: the model's own process group is used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from transformers import PreTrainedConfig, PreTrainedModel

from .alibi import model_slopes
from .models import geometry, text_config

_KEY_PROJECTIONS = ("k_proj", "query_key_value")  # of BLOOM and Falcon, fused head by head


def kv_shard(config: PreTrainedConfig) -> tuple[int, int]:
    """The part of every layer's kv heads that this process computes, as `Plan.shard` wants it.

    Args:
        config: of a model, which `from_pretrained` tells how it was cut.

    Returns:
        rank and world_size; (0, 1) for all heads: one process, or a model that gathers its keys again (OLMo 2, Phi-3).

    Raises:
        ValueError: tp_size: expected a divisor of 3 kv heads, got 2; ...
        NotImplementedError: pp_size: expected 1, got 2; ...
    """
    settings: Any = getattr(config, "distributed_config", None)
    if (stages := getattr(settings, "pp_size", None) or 1) > 1:
        raise NotImplementedError(f"pp_size: expected 1, got {stages}; spread layers over devices with device_map")
    world_size = getattr(settings, "tp_size", None) or 1
    given = getattr(settings, "tp_plan", None)
    rules: dict[str, str] = {}
    if given != {}:  # which means no rule at all
        rules = (text_config(config).base_model_tp_plan or {}) | (given if isinstance(given, dict) else {})
    styles = {name.rpartition(".")[2]: style for name, style in rules.items()}
    if world_size == 1 or "colwise" not in map(styles.get, _KEY_PROJECTIONS):
        return 0, 1
    if (kv_heads := geometry(config).num_kv_heads) % world_size:
        raise ValueError(
            f"tp_size: expected a divisor of {kv_heads} kv heads, got {world_size}; transformers would cut a head"
        )
    return distributed.get_rank() % world_size, world_size  # tensor parallelism is the mesh's innermost dimension


def local_slopes(config: PreTrainedConfig) -> Tensor | None:
    """ALiBi slopes of the query heads that this process computes: (heads,), float32; see `model_slopes`."""
    slopes, (rank, world_size) = model_slopes(text_config(config)), kv_shard(config)
    return None if slopes is None else slopes.chunk(world_size)[rank]


def gather_heads(model: PreTrainedModel, table: Tensor) -> Tensor:
    """A table of all query heads, on every rank, from those of each; all ranks must call it.

    Args:
        model: whose process group is used.
        table: (num_layers, heads of this rank, ...), float32.

    Returns:
        (num_layers, num_heads, ...), float32, on the CPU.

    Raises:
        NotImplementedError: model: expected 8 query heads in a layer, got 4; ...
    """
    if (world_size := kv_shard(model.config)[1]) > 1:
        mine = table.contiguous().to(model.device)
        parts = [torch.empty_like(mine) for _ in range(world_size)]
        mesh: Any = model._device_mesh
        distributed.all_gather(parts, mine, group=mesh["tp"].get_group())
        table = torch.cat(parts, 1).cpu()
    if (heads := geometry(model.config).num_heads) != table.shape[1]:
        raise NotImplementedError(
            f"model: expected {heads} query heads in a layer, got {table.shape[1]}; "
            "of a model cut by something else than transformers >= 5.19 nobody here knows the other ones"
        )
    return table
