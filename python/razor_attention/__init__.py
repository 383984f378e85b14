# SPDX-License-Identifier: Apache-2.0
"""Head-wise KV-cache compression for LLMs, without training: plan -> cache -> attention.

plan = Plan.from_heads(find_heads(model, tokenizer).select(), num_layers=32, num_kv_heads=8)
with attach(model, plan):
    model.generate(...)
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from . import ops  # registers torch.ops.razor.*
from ._native import isa
from .alibi import alibi_slopes, alibi_windows, smallest_windows
from .cache import LayerCache
from .heads import HeadScores
from .ops import head_scores
from .plan import Plan
from .reference import FULL

if TYPE_CHECKING:
    from .hf import RazorCache, attach, dropped_mass, find_heads, find_windows

__version__ = version("razor-attention")
__all__ = [
    "FULL",
    "HeadScores",
    "LayerCache",
    "Plan",
    "RazorCache",
    "alibi_slopes",
    "alibi_windows",
    "attach",
    "dropped_mass",
    "find_heads",
    "find_windows",
    "head_scores",
    "isa",
    "ops",
    "smallest_windows",
]
_NEEDS_TRANSFORMERS = ("RazorCache", "attach", "dropped_mass", "find_heads", "find_windows")


def __getattr__(name: str) -> Any:  # transformers is an extra, and slow to import
    if name in _NEEDS_TRANSFORMERS:
        try:
            from . import hf
        except ModuleNotFoundError as error:
            if error.name in ("transformers", "tqdm"):
                raise ImportError(
                    f"{name}: expected {error.name} to be installed, got none; pip install 'razor-attention[hf]'"
                ) from error
            raise
        return getattr(hf, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
