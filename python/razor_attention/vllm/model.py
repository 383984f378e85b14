# SPDX-License-Identifier: Apache-2.0
"""What a plan asks of vLLM's configuration and model, and what is refused."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import extract_layer_index

from ..plan import Plan
from .layout import Layout


def refuse_config(config: VllmConfig) -> None:
    """Refuse what a plan cannot serve, before weights are loaded.

    Raises:
        NotImplementedError: speculative_config: expected none with a plan, got ngram; ...
    """
    parallel = config.parallel_config
    speculative = config.speculative_config
    cannot = {
        "speculative_config": speculative and speculative.method,  # dropped tokens cannot come back
        "kv_transfer_config": config.kv_transfer_config and config.kv_transfer_config.kv_connector,
        "kv_sharing_fast_prefill": config.cache_config.kv_sharing_fast_prefill,
        "pipeline_parallel_size": parallel.pipeline_parallel_size > 1 and parallel.pipeline_parallel_size,
        "decode_context_parallel_size": (
            parallel.decode_context_parallel_size > 1 and parallel.decode_context_parallel_size
        ),
        "prefill_context_parallel_size": (
            parallel.prefill_context_parallel_size > 1 and parallel.prefill_context_parallel_size
        ),
    }
    for key, got in cannot.items():
        if got:
            raise NotImplementedError(f"{key}: expected none with a plan, got {got}")


def attention_layers(config: VllmConfig, plan: Plan, dtype: torch.dtype) -> tuple[list[Any], Layout]:
    """The model's attention layers in order, and the layout of their cache.

    Args:
        config: vLLM's.
        plan: of the whole model.
        dtype: of keys and values.
    Returns:
        `Attention` modules with our implementation, and the layout of this rank.
    Raises:
        ValueError: plan: expected 4 layers x 4 kv heads like the model, got 32 x 8
        NotImplementedError: model: expected plain attention in all layers, got MambaMixer2 in model.layers.0.mixer
    """
    found: dict[str, Any] = get_layers_from_vllm_config(config, AttentionLayerBase)
    for name, layer in found.items():
        if type(layer) is not Attention or layer.use_mm_prefix:
            raise NotImplementedError(
                f"model: expected plain attention in all layers, got {type(layer).__name__} in {name}"
            )
        if layer.kv_cache_torch_dtype != dtype:
            got = f"{layer.kv_cache_torch_dtype} beside {dtype}"
            raise NotImplementedError(f"kv_cache_dtype: expected the model's own, got {got}")
    layers = sorted(found.values(), key=lambda layer: extract_layer_index(layer.layer_name))
    if len({(layer.num_kv_heads, layer.head_size) for layer in layers}) != 1:
        raise NotImplementedError("model: expected layers with as many and as large kv heads, got different ones")
    size = config.parallel_config.tensor_parallel_size
    plan.check_model(len(layers), config.model_config.get_total_num_kv_heads())
    layout = Layout(
        plan,
        block_size=config.cache_config.block_size,
        head_dim=layers[0].head_size,
        dtype=dtype,
        tp_size=size,
        tp_rank=get_tensor_model_parallel_rank(),
    )
    return layers, layout
