# SPDX-License-Identifier: Apache-2.0
"""Argument checks that plans and head scores share: `<argument>: expected <what>, got <actual>`."""

import math
from fractions import Fraction
from reprlib import repr as short
from typing import Any

import numpy as np
import torch
from torch import Tensor


def check_int(name: str, value: Any, least: int, most: int = 2**31 - 1) -> int:
    """`value` if it is an int (no bool) of least..most, else TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if not least <= value <= most:
        bound = f">= {least}" if value < least else f"<= {most}"
        raise ValueError(f"{name}: expected an integer {bound}, got {value}")
    return int(value)


def check_kv_dtype(name: str, value: Any) -> torch.dtype:
    """The dtype of a cache's pages: `value` or what its name stands for, and uint8 for "int4"."""
    if isinstance(value, str) and value == "int4":
        return torch.uint8
    kinds = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "int8")}
    value = kinds.get(value, value) if isinstance(value, str) else value
    if isinstance(value, torch.dtype) and value in kinds.values():
        return value
    raise ValueError(f"{name}: expected float32, bfloat16, float16, int8 or 'int4', got {value!r}")


def check_share(name: str, value: Any) -> float:
    """`value` as float if it is a number (no bool) in 0..1, else TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number in 0..1, got {value!r}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number in 0..1, got {value}")
    return float(value)


def check_dict(name: str, value: Any) -> dict[str, Any]:
    """A copy of `value` if it is a dict, else TypeError."""
    if not isinstance(value, dict):
        raise TypeError(f"{name}: expected a dict, got {type(value).__name__}")
    return dict(value)


def check_table(name: str, value: Any, kind: str, dims: tuple[int, ...] = (2,)) -> Tensor:
    """A CPU copy of `value`, tensor, array or nested lists, if it is a non-empty table of integers, floats or bools."""
    wanted = f"{name}: expected {'a list [heads]' if dims == (1,) else 'a table [layers, heads]'} of {kind}"
    try:
        table = value.detach().cpu().clone() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{wanted}, got {short(value)}") from error
    found = "floats" if table.is_floating_point() else "bools" if table.dtype == torch.bool else "integers"
    if found != kind or table.is_complex():
        raise TypeError(f"{wanted}, got {table.dtype}")
    if table.dim() not in dims or table.numel() == 0:
        raise ValueError(f"{wanted}, got shape {list(table.shape)}")
    if kind == "floats" and not table.float().isfinite().all():
        raise ValueError(f"{name}: expected finite values, got {table[~table.float().isfinite()][0].item()}")
    return table.long() if kind == "integers" else table


def ceil_share(share: float, total: int) -> int:
    """ceil(share * total), exact for the decimal that `share` is written as: 0.2 of 20000 is 4000."""
    return math.ceil(Fraction(str(share)) * total)
