# SPDX-License-Identifier: Apache-2.0
"""Engines in this process, one at a time. Needs vLLM for the CPU: `make test-vllm`."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from razor_attention import Plan

found = importlib.util.find_spec("vllm")
if found is None or found.origin is None:  # any folder of that name looks like a package without files
    collect_ignore_glob = ["test_*.py"]

MakeEngine = Callable[..., Any]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:  # vLLM's own warnings are not ours to mend
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture
def make_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeEngine]:
    """make_engine(model or folder, plan, **options): a small `LLM` in this process that runs the plan."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    engines = []

    def make(model: PreTrainedModel | Path, plan: Plan, **options: Any) -> Any:
        plan.save(tmp_path / "plan.json")
        monkeypatch.setenv("RAZOR_PLAN", str(tmp_path / "plan.json"))
        from vllm import LLM

        if isinstance(model, PreTrainedModel):
            model.save_pretrained(tmp_path / "model")
            model = tmp_path / "model"
        sizes = {"max_model_len": 4096, "max_num_seqs": 8, "block_size": 16, "kv_cache_memory_bytes": 64 << 20}
        fixed = {"dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True}
        engines.append(LLM(str(model), **fixed | sizes | options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.llm_engine.engine_core.shutdown()
    engines.clear()
    gc.collect()
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()
