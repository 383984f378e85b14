# SPDX-License-Identifier: Apache-2.0
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

def isa() -> str: ...
def attention(
    query: Array,
    key: Array,
    value: Array,
    key_pages: Array,
    value_pages: Array,
    page_table: NDArray[np.int32],
    seen: NDArray[np.int64],
    sink_size: NDArray[np.int32],
    window_size: NDArray[np.int32],
    compensate: NDArray[np.bool_],
    key_sum: NDArray[np.float32],
    value_sum: NDArray[np.float32],
    *,
    alibi_slopes: NDArray[np.float32] | None = None,
    pad: NDArray[np.int64] | None = None,
    scale: float,
    dense: bool = False,
) -> Array: ...
def append(
    key: Array,
    value: Array,
    key_pages: Array,
    value_pages: Array,
    page_table: NDArray[np.int32],
    seen: NDArray[np.int64],
    sink_size: NDArray[np.int32],
    window_size: NDArray[np.int32],
    compensate: NDArray[np.bool_],
    key_sum: NDArray[np.float32],
    value_sum: NDArray[np.float32],
    *,
    pad: NDArray[np.int64] | None = None,
) -> None: ...
def head_scores(
    query: Array, key: Array, period: int, *, scale: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]: ...
def alibi_windows(
    query: Array,
    key: Array,
    slopes: NDArray[np.float32],
    bound: NDArray[np.float32] | None = None,
    *,
    theta: float,
    alpha: float,
    method: str,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]: ...
