# SPDX-License-Identifier: Apache-2.0
"""The ALiBi architectures: what their code really does with positions, from a configuration alone.

A configuration is a transformers one, or any object with the attributes of a checkpoint's config.json.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..alibi import alibi_slopes


@dataclass(frozen=True, slots=True)
class AlibiArchitecture:
    """One architecture, as transformers or, for Baichuan, its checkpoints' authors implement it."""

    num_heads: tuple[str, ...]  # names of the number of query heads in a configuration, its own first
    uses_alibi: Callable[[Any], bool] = lambda config: True
    num_kv_heads: Callable[[Any, int], int] = lambda config, num_heads: num_heads
    scale_slopes: Callable[[Any, Tensor], Tensor] = lambda config, slopes: slopes  # from the paper's, (num_heads,)


def _falcon_slopes(config: Any, slopes: Tensor) -> Tensor:
    """Falcon rounds them to bfloat16 and scales the bias like q.k.

    It rounds positions and products too, so beyond 256 tokens, or with slopes that are no powers of two, stock Falcon
    is off by up to 0.4 % of the bias; ours is exact.
    """
    return slopes.bfloat16().float() / math.sqrt(config.hidden_size // len(slopes))


def _falcon_kv_heads(config: Any, num_heads: int) -> int:
    if getattr(config, "new_decoder_architecture", False):
        return int(getattr(config, "num_kv_heads", None) or num_heads)
    return 1 if getattr(config, "multi_query", True) else num_heads


# By config.model_type.
ALIBI_ARCHITECTURES = {
    "bloom": AlibiArchitecture(("n_head", "num_attention_heads")),
    # transformers reads neither attn_config.alibi nor alibi_bias_max: it always adds ALiBi, with the paper's slopes.
    "mpt": AlibiArchitecture(("n_heads", "num_attention_heads")),
    "falcon": AlibiArchitecture(
        ("num_attention_heads", "n_head"),
        lambda config: bool(getattr(config, "alibi", False)),
        _falcon_kv_heads,
        _falcon_slopes,
    ),
    # 7B and 13B share a model_type; 7B is rotary and has max_position_embeddings, 13B has model_max_length alone.
    "baichuan": AlibiArchitecture(
        ("num_attention_heads",), lambda config: getattr(config, "max_position_embeddings", None) is None
    ),
}


def alibi_architecture(config: Any) -> AlibiArchitecture | None:
    """The row of a model that uses ALiBi, None for any other."""
    row = ALIBI_ARCHITECTURES.get(getattr(config, "model_type", ""))
    return row if row is not None and row.uses_alibi(config) else None


def model_slopes(config: Any) -> Tensor | None:
    """Slopes that a model uses.

    Args:
        config: its configuration, or any object with the same attributes.

    Returns:
        (num_heads,), float32, logit per token of distance, added after scaling. None for a model without ALiBi.

    Raises:
        ValueError: config: expected n_head or num_attention_heads, got none
    """
    row = alibi_architecture(config)
    if row is None:
        return None
    found = [getattr(config, name) for name in row.num_heads if getattr(config, name, None) is not None]
    if not found:
        raise ValueError(f"config: expected {' or '.join(row.num_heads)}, got none")
    return row.scale_slopes(config, alibi_slopes(int(found[0])))
