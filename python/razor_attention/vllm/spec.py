# SPDX-License-Identifier: Apache-2.0
"""What vLLM's scheduler knows of a plan: the bytes of a block and how many blocks a request needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.block_pool import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.kv_cache_spec_registry import register_kv_cache_spec

from .layout import Growth


class RazorManager(SingleTypeKVCacheManager):
    """Gives a request the blocks that its plan needs for its tokens, and takes them back at its end or preemption.

    A head that is not full reuses its own blocks, so nothing is freed in between. What a block holds depends on all
    tokens before and is overwritten: it is no prefix that another request could share, and prefix lookups find nothing.
    """

    kv_cache_spec: RazorSpec

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> int:
        held = len(self.req_to_blocks.get(request_id, ()))
        return max(self.kv_cache_spec.growth.blocks(num_tokens) - held, 0)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        taken = self.block_pool.get_new_blocks(self.get_num_blocks_to_allocate(request_id, num_tokens))
        self.req_to_blocks[request_id].extend(taken)
        return taken

    def add_local_computed_blocks(self, request_id: str, new_computed_blocks: Sequence[KVCacheBlock], *_: int) -> None:
        assert not new_computed_blocks  # find_longest_cache_hit finds none

    def allocate_external_computed_blocks(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("kv_transfer_config: expected none with a plan, got tokens from a connector")

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes: Any, max_length: int, kv_cache_group_ids: list[int], *_: Any, **__: Any
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        return tuple([] for _ in kv_cache_group_ids), 0


@register_kv_cache_spec(manager_class=RazorManager)
@dataclass(frozen=True, kw_only=True)
class RazorSpec(AttentionSpec):
    """Cache of the whole model; `num_kv_heads` is 1 because a block holds one kv head.

    Args:
        limits, sum_blocks: see `Growth`.
    """

    limits: tuple[int, ...]
    sum_blocks: int
    dcp_sharded: bool = False

    @cached_property
    def growth(self) -> Growth:
        """How many blocks a request needs."""
        return Growth(self.limits, self.sum_blocks, self.block_size)

    @property
    def prefix_cacheable(self) -> bool:
        return False

    @property
    def uses_slot_mapping(self) -> bool:
        return False

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        # vLLM's own slot mapping, which we do not use, looks up to max_len / block_size in the list.
        return max(self.growth.blocks(max_len), -(-max_len // self.block_size))

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        return self.growth.blocks(vllm_config.model_config.max_model_len) * self.page_size_bytes
