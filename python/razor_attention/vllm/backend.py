# SPDX-License-Identifier: Apache-2.0
"""vLLM's attention backend on a plan: reads vLLM's block tables as page tables of torch.ops.razor.*."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from itertools import groupby, pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from .. import ops
from ..plan import Plan
from . import PLAN_VARIABLE
from .layout import Layout
from .model import attention_layers, refuse_config
from .spec import RazorSpec

logger = init_logger(__name__)


def replace_attention() -> None:
    """Put our backend in the place of vLLM's for the CPU; the plan's file is read here and now.

    Raises:
        NotImplementedError: RAZOR_PLAN: expected vLLM on a CPU, got cuda
    """
    plan = Plan.load(os.environ[PLAN_VARIABLE])
    if not current_platform.is_cpu():
        raise NotImplementedError(f"{PLAN_VARIABLE}: expected vLLM on a CPU, got {current_platform.device_type}")
    here = RazorBackend.__module__
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{here}.RazorBackend")
    for latent in (AttentionBackendEnum.CPU_MLA, AttentionBackendEnum.AMX_MLA):
        register_backend(latent, f"{here}.LatentBackend")
    logger.info("%s: %s", PLAN_VARIABLE, plan)


class RazorBackend(AttentionBackend):
    """Decoder attention of a model whose heads follow a plan. One layer owns the cache of all."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float32", "bfloat16", "float16"]
    forward_includes_kv_cache_update = True
    layout: ClassVar[Layout | None] = None  # of this process's model, once it is loaded

    @staticmethod
    def get_name() -> str:
        return AttentionBackendEnum.CPU_ATTN.name

    @staticmethod
    def get_impl_cls() -> type[RazorImpl]:
        return RazorImpl

    @staticmethod
    def get_builder_cls() -> type[RazorBuilder]:
        return RazorBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """The spec of the layer that owns the cache: blocks of one kv head, and how many of them a request needs."""
        if cls.layout is None:
            raise RuntimeError("model: expected weights that have been loaded, got none")
        if spec.head_size_v != spec.head_size:
            got = f"{spec.head_size} and {spec.head_size_v}"
            raise NotImplementedError(f"model: expected keys and values of one size, got {got}")
        values = {field.name: getattr(spec, field.name) for field in fields(AttentionSpec)}
        values |= {"num_kv_heads": 1, "dcp_sharded": False, "max_tp_shards": None}
        return RazorSpec(**values, limits=cls.layout.limits, sum_blocks=cls.layout.sum_blocks)


class LatentBackend(RazorBackend):
    """Stands where vLLM's latent attention was, to refuse it."""

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError("model: expected one with a key and a value of each kv head, got latent attention")


@dataclass
class Run:
    """Requests next to each other that have as many new tokens."""

    first: int  # request
    count: int  # requests
    token: int  # first new token
    q_len: int  # new tokens of each


@dataclass
class RazorMetadata(AttentionMetadata):
    """One step of the engine, for all layers."""

    runs: list[Run]
    seen: Tensor  # (requests,), int64, tokens in the cache
    tables: Tensor  # (num_layers, requests, num_kv_heads, pages), int32, key pages
    sum_rows: Tensor  # (num_layers, requests, num_kv_heads), int64, float32 rows of the cache


class RazorBuilder(AttentionMetadataBuilder[RazorMetadata]):
    """Turns vLLM's block tables into page tables, once a step for all layers."""

    def __init__(
        self, kv_cache_spec: RazorSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1)  # decoding requests first, so that they are one run
        layout = RazorBackend.layout
        assert layout is not None  # customize_spec has checked it
        if len(layer_names) != layout.plan.num_layers:
            raise RuntimeError(f"model: expected {layout.plan.num_layers} layers in one group, got {layer_names}")
        self._layout = layout
        pages = -(-vllm_config.model_config.max_model_len // layout.block_size)
        self._page_places = layout.page_places(pages)
        self._sum_blocks, self._sum_rows = layout.sum_places()

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> RazorMetadata:
        """See RazorMetadata."""
        common = common_attn_metadata
        starts = common.query_start_loc_cpu.tolist()
        lengths = [after - before for before, after in pairwise(starts)]
        runs = []
        for q_len, same in groupby(range(common.num_reqs), lengths.__getitem__):
            requests = list(same)
            if q_len:
                runs.append(Run(requests[0], len(requests), starts[requests[0]], q_len))
        seen = common.seq_lens.long() - torch.tensor(lengths)
        blocks = common.block_table_tensor
        places = self._page_places[..., : -(-int(common.seq_lens.max()) // self._layout.block_size)]
        tables = blocks[:, places.flatten()].mul_(2).view(len(blocks), *places.shape).transpose(0, 1).contiguous()
        rows = blocks[:, self._sum_blocks.flatten()].long().view(len(blocks), *self._sum_blocks.shape).transpose(0, 1)
        # A head without sums has row 0 of block 0, which vLLM gives to nobody.
        compensate = self._layout.plan.compensate[:, None]
        rows = rows.mul(self._layout.sums_per_block).add(self._sum_rows[:, None]).masked_fill(~compensate, 0)
        return RazorMetadata(runs, seen, tables, rows)


class RazorImpl(AttentionImpl[RazorMetadata]):
    """Attention of one layer: `ops.attention` over vLLM's blocks, then `ops.append`."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **others: Any,
    ) -> None:
        unsupported = {
            "sliding_window": sliding_window,
            "logits_soft_cap": logits_soft_cap,
            "attn_type": None if attn_type == AttentionType.DECODER else str(attn_type),
            "kv_sharing_target_layer_name": kv_sharing_target_layer_name,
            **others,
        }
        for key, value in unsupported.items():
            if value is not None:
                raise NotImplementedError(f"model: expected attention without {key}, got {value}")
        if kv_cache_dtype not in RazorBackend.supported_kv_cache_dtypes:
            raise NotImplementedError(f"kv_cache_dtype: expected the model's own, got {kv_cache_dtype}")
        self.config = get_current_vllm_config()
        refuse_config(self.config)
        self.num_heads, self.head_size, self.scale = num_heads, head_size, scale
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.alibi_slopes = None if alibi_slopes is None else torch.tensor(alibi_slopes, dtype=torch.float32)
        self.index = -1  # of this layer

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """The model is whole now: give each layer its part of the plan, and the cache of all to the first."""
        if self.index >= 0:
            return
        layers, layout = attention_layers(self.config, Plan.load(os.environ[PLAN_VARIABLE]), act_dtype)
        RazorBackend.layout = layout
        for index, layer in enumerate(layers):
            if index:  # what vLLM's own models with a shared cache set
                layer.kv_sharing_target_layer_name = layers[0].layer_name
            impl: RazorImpl = layer.impl
            impl.index = index
            impl.policy = layout.plan.layer(index)
            impl.compensates = bool(impl.policy[2].any())

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: RazorMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of the new tokens, which are then stored.

        Args:
            layer: vLLM's.
            query: (tokens, num_heads, head_dim), f32 | bf16 | f16. Rotated queries, one request after the other.
            key, value: (tokens, num_kv_heads, head_dim), dtype of query.
            kv_cache: (blocks, 1, block_size, 2 * head_dim), dtype of query; the layers share it.
            attn_metadata: of this step; None: a trial without a cache.
            output: (tokens, num_heads, head_dim), dtype of query; written.
            output_scale, output_block_scale: None.
        Returns:
            output.
        """
        if attn_metadata is None:
            return output.zero_()
        pages = kv_cache.view(2 * len(kv_cache), kv_cache.shape[2], self.head_size)  # key page, value page, ...
        sums = kv_cache.view(-1).view(torch.float32).view(-1, self.head_size)
        for run in attn_metadata.runs:
            tokens = slice(run.token, run.token + run.count * run.q_len)
            q, k, v = (
                x[tokens].view(run.count, run.q_len, -1, self.head_size).transpose(1, 2) for x in (query, key, value)
            )
            requests = slice(run.first, run.first + run.count)
            seen = attn_metadata.seen[requests].clone()
            rows = attn_metadata.sum_rows[self.index, requests].flatten()
            if self.compensates:
                begins = (seen == 0).repeat_interleave(self.num_kv_heads)[:, None]  # what is there is another's
                key_sum, value_sum = (sums[rows + i].masked_fill(begins, 0) for i in (0, 1))
            else:
                key_sum = value_sum = sums.new_empty(len(rows), self.head_size)
            table = attn_metadata.tables[self.index, requests].flatten(0, 1)
            cache = (pages[:-1], pages[1:], table, seen, *self.policy, key_sum, value_sum)
            out = ops.attention(q, k, v, *cache, alibi_slopes=self.alibi_slopes, scale=self.scale)
            output[tokens].view(run.count, run.q_len, self.num_heads, -1).copy_(out.transpose(1, 2))
            ops.append(k, v, *cache)
            if self.compensates:
                sums[rows], sums[rows + 1] = key_sum, value_sum
        return output
