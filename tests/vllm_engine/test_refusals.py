# SPDX-License-Identifier: Apache-2.0
"""What a plan cannot serve in vLLM is refused before the first token."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from razor_attention import Plan
from razor_attention.vllm import register
from tiny_models import MIXED, shared_model, tiny_model


@pytest.fixture(autouse=True)
def _no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM looks through all modules of the process for Triton kernels, which fails after an engine that failed."""
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "register_triton_kernel_overrides", lambda *_: None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
            "speculative_config: expected none with a plan, got ngram",
        ),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype: expected the model's own, got fp8"),
        ({"kv_cache_dtype": "bfloat16"}, "kv_cache_dtype: expected the model's own, got torch.bfloat16"),
        ({"block_size": 24}, "block_size: expected a multiple of 16, got 24"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options(make_engine: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((NotImplementedError, ValueError), match=message):
        make_engine(shared_model("llama"), MIXED, **options)


@pytest.mark.parametrize(
    ("part", "key", "value", "got"),
    [
        ("parallel_config", "pipeline_parallel_size", 2, "2"),
        ("parallel_config", "decode_context_parallel_size", 2, "2"),
        ("parallel_config", "prefill_context_parallel_size", 4, "4"),
        ("cache_config", "kv_sharing_fast_prefill", True, "True"),
        ("", "kv_transfer_config", SimpleNamespace(kv_connector="NixlConnector"), "NixlConnector"),
    ],
)
def test_configurations(part: str, key: str, value: Any, got: str) -> None:
    """Those that would need more machines, on vLLM's defaults."""
    from vllm.config import CacheConfig, ParallelConfig

    from razor_attention.vllm.model import refuse_config

    parts = {"parallel_config": ParallelConfig(), "cache_config": CacheConfig()}
    config = SimpleNamespace(**parts, speculative_config=None, kv_transfer_config=None)
    refuse_config(config)
    setattr(getattr(config, part) if part else config, key, value)
    with pytest.raises(NotImplementedError, match=f"^{key}: expected none with a plan, got {got}$"):
        refuse_config(config)


def test_a_plan_for_another_model(make_engine: Any) -> None:
    with pytest.raises(ValueError, match="plan: expected 2 layers x 3 kv heads like the model, got 4 x 4"):
        make_engine(shared_model("llama"), Plan.full(4, 4))


def test_a_length_rule(make_engine: Any) -> None:
    with pytest.raises(ValueError, match=r"plan: expected final windows, got window_fraction 0\.2"):
        make_engine(shared_model("llama"), dataclasses.replace(MIXED, window_fraction=0.2))


def test_a_model_with_a_window_of_its_own(make_engine: Any) -> None:
    with pytest.raises(NotImplementedError, match="model: expected attention without sliding_window, got 16"):
        make_engine(tiny_model("mistral", sliding_window=16), MIXED)


def test_no_plan_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    AttentionBackendEnum.CPU_ATTN.clear_override()
    monkeypatch.delenv("RAZOR_PLAN", raising=False)
    register()
    assert not AttentionBackendEnum.CPU_ATTN.is_overridden()


def test_another_platform(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    from vllm.platforms import current_platform

    MIXED.save(tmp_path / "plan.json")
    monkeypatch.setenv("RAZOR_PLAN", str(tmp_path / "plan.json"))
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    with pytest.raises(NotImplementedError, match="RAZOR_PLAN: expected vLLM on a CPU, got "):
        register()


def test_latent_attention() -> None:
    from razor_attention.vllm.backend import LatentBackend

    with pytest.raises(NotImplementedError, match="got latent attention"):
        LatentBackend.get_impl_cls()
