# SPDX-License-Identifier: Apache-2.0
"""The transformers room: a Cache, an attention function, and the search for heads and windows."""

from __future__ import annotations

from . import baichuan as _baichuan  # noqa: F401  # registers itself with transformers
from .attachment import attach
from .cache import RazorCache
from .calibrate import find_heads
from .mass import dropped_mass
from .windows import find_windows

__all__ = ["RazorCache", "attach", "dropped_mass", "find_heads", "find_windows"]
