# SPDX-License-Identifier: Apache-2.0
"""The transformers room: a Cache, an attention function, and head search for any AttentionInterface model."""

from __future__ import annotations

from .attention import attach
from .cache import RazorCache
from .calibrate import find_heads

__all__ = ["RazorCache", "attach", "find_heads"]
