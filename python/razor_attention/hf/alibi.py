# SPDX-License-Identifier: Apache-2.0
"""The table of ALiBi architectures: what their code really does with positions, and where their projections are.

A configuration is a transformers one, or any object with the attributes of a checkpoint's config.json.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..alibi import alibi_slopes
from .names import CONFIG_MAPPING


@dataclass(frozen=True, slots=True)
class AlibiArchitecture:
    """One architecture, as transformers or, for Baichuan, its checkpoints' authors implement it."""

    num_heads: tuple[str, ...]  # names of the number of query heads in a configuration, its own first
    projections: tuple[str, ...]  # an attention layer's Linears: one of q, k and v together, or those of q and k
    norms: tuple[str, ...]  # of their input; the first one that a layer has
    by_head: bool = False  # q, k, v are [num_kv_heads, group + 2, head_dim, in], not [3, num_heads, head_dim, in]
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
    "bloom": AlibiArchitecture(
        ("n_head", "num_attention_heads"), ("query_key_value",), ("input_layernorm",), by_head=True
    ),
    # transformers reads neither attn_config.alibi nor alibi_bias_max: it always adds ALiBi, with the paper's slopes.
    "mpt": AlibiArchitecture(("n_heads", "num_attention_heads"), ("Wqkv",), ("norm_1",)),
    "falcon": AlibiArchitecture(
        ("num_attention_heads", "n_head"),
        ("query_key_value",),
        ("ln_attn", "input_layernorm"),
        by_head=True,
        uses_alibi=lambda config: bool(getattr(config, "alibi", False)),
        num_kv_heads=_falcon_kv_heads,
        scale_slopes=_falcon_slopes,
    ),
    # 7B and 13B share a model_type; 7B is rotary and has max_position_embeddings, 13B has model_max_length alone.
    "baichuan": AlibiArchitecture(
        ("num_attention_heads",),
        ("W_pack",),
        ("input_layernorm",),
        uses_alibi=lambda config: getattr(config, "max_position_embeddings", None) is None,
    ),
}
_SEPARATE = AlibiArchitecture(("num_attention_heads",), ("q_proj", "k_proj"), ("input_layernorm",))


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
    return None if row is None else slopes_of(config, row)


def slopes_of(config: Any, row: AlibiArchitecture) -> Tensor:
    """Slopes of a model of this architecture, as `model_slopes` gives them."""
    found = [getattr(config, name) for name in row.num_heads if getattr(config, name, None) is not None]
    if not found or not isinstance(found[0], int):
        raise ValueError(f"config: expected {' or '.join(row.num_heads)}, got {found[0] if found else 'none'}")
    return row.scale_slopes(config, alibi_slopes(found[0]))


def guess_architecture(config: Any, names: Iterable[str], *, alibi: bool) -> AlibiArchitecture:
    """The row for a model that transformers does not know, by the names of its projections.

    It is taken for one with ALiBi if its configuration says `alibi`, or if nothing in it hints at other positions: no
    `max_position_embeddings`, nothing called rotary.

    Args:
        config: its configuration.
        names: of its weights, and of its modules where it has any.
        alibi: the caller says that it uses ALiBi, whatever the configuration says.

    Raises:
        ValueError: model: expected one that uses ALiBi (...), got llama; ...
    """
    names = list(names)
    values = {key.lower(): value for key, value in getattr(config, "__dict__", {}).items() if value}
    hints = "max_position_embeddings", "rotary", "rope", "inv_freq"
    other = any(hint in word for word in (*values, *(name.lower() for name in names)) for hint in hints)
    position = [values.get(key) for key in ("alibi", "position_embedding", "position_embedding_type")]
    says_so = position[0] is True or "alibi" in map(str.lower, map(str, position))
    if not alibi and (values.get("model_type") in CONFIG_MAPPING or (other and not says_so)):
        raise not_alibi(config)
    parts = {part for name in names for part in name.split(".")}
    rows = *ALIBI_ARCHITECTURES.values(), _SEPARATE
    for row in rows:
        if set(row.projections) <= parts:
            return row
    wanted = ", ".join(sorted({name for row in rows for name in row.projections}))
    raise ValueError(f"model: expected projections called one of {wanted}, got none")


def not_alibi(config: Any) -> ValueError:
    """The error for a model without ALiBi, or of which nobody knows."""
    got = getattr(config, "model_type", None) or type(config).__name__
    return ValueError(
        f"model: expected one that uses ALiBi (bloom, mpt, falcon with alibi, baichuan 13B), got {got}; rotary models "
        "have retrieval heads instead: find_heads; one that does use ALiBi needs its slopes named"
    )
