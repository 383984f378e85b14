# SPDX-License-Identifier: Apache-2.0
"""DuoAttention under its own names: change the import lines of a script, keep the rest.

    from razor_attention.duo import enable_duo_attention_eval, load_attn_pattern, sparsify_attention_heads
    attn_heads, sink_size, recent_size = load_attn_pattern("attn_patterns/my-model")
    attn_heads, sparsity = sparsify_attention_heads(attn_heads, sparsity=0.5)
    enable_duo_attention_eval(model, attn_heads, sink_size=64, recent_size=256)

Any model that `attach` takes, batches with left padding, and no weight is reordered. Beside it `train_gates`, which
makes such patterns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from . import files
from .checks import check_int, check_table
from .heads import full_gates
from .hf import attach
from .hf.gates import TrainedGates, train_gates
from .hf.models import geometry
from .hf.passkeys import passkey_samples, read_samples
from .plan import Plan

if TYPE_CHECKING:
    from .hf.cache import Prefill

__all__ = [
    "TrainedGates",
    "disable_duo_attention_eval",
    "enable_duo_attention_eval",
    "load_attn_pattern",
    "passkey_samples",
    "read_samples",
    "sparsify_attention_heads",
    "to_device",
    "train_gates",
]

_BLOCK = "_razor_duo"  # attribute of an enabled model: the open block of its attach


def load_attn_pattern(attn_load_dir: files.PathLike) -> tuple[NDArray[np.float64], int, int]:
    """Read a pattern folder: full_attention_heads.tsv and config.json.

    Args:
        attn_load_dir: the folder.
    Returns:
        Gates [layers, kv heads], clipped to [0, 1], 1 is full; sink_size and recent_size of their training, tokens.
    Raises:
        ValueError: duo/full_attention_heads.tsv: expected 8 numbers in line 2 like in line 1, got 7
    """
    gates = files.load_gates(attn_load_dir).clamp(0, 1)
    return gates.numpy(), *files.load_gate_sizes(attn_load_dir)


def sparsify_attention_heads(
    full_attention_heads: ArrayLike, threshold: float | None = None, sparsity: float | None = None
) -> tuple[NDArray[np.float64], float]:
    """Gates as zeros and ones. Unlike the original: equal gates are told apart by their place, without random noise,
    the argument stays as it was, and a threshold alone works.

    Args:
        full_attention_heads: [layers, kv heads], floats; array, tensor or nested lists.
        threshold: a gate of at least this is full; ignored where a sparsity is given.
        sparsity: share of the heads that becomes compressed, the lowest gates; all for 1.
    Returns:
        [layers, kv heads], 1.0 full, 0.0 compressed; and the share of zeros.
    Raises:
        ValueError: sparsity, threshold: expected exactly one of the two, got neither
    """
    full = full_gates(
        _table(full_attention_heads), sparsity=sparsity, threshold=threshold if sparsity is None else None
    )
    heads = full.double().numpy()
    return heads, float(1 - heads.mean())


def enable_duo_attention_eval(
    model: Any,
    full_attention_heads: ArrayLike,
    sink_size: int,
    recent_size: int,
    *,
    prefill: Prefill = "streaming",
) -> None:
    """From now on the model's `generate` and its own calls use compressed caches, until `disable_duo_attention_eval`.

    Calls without a cache start a RazorCache; hand the one in their output to the next call, as `past_key_values` or
    `cache`. The model may be moved to another device afterwards. Enabling again replaces the heads.

    Args:
        model: one that `attach` takes.
        full_attention_heads: [layers, kv heads]; array, tensor or nested lists, in [0, 1]; >= 0.5 is full.
        sink_size, recent_size: first and last tokens that the other heads keep.
        prefill: "streaming": every query keeps to its own window, so results do not depend on how a prompt is cut;
            "dense" as the original: tokens of one call all read each other.
    Raises:
        ValueError: full_attention_heads: expected 4 layers x 4 kv heads like the model, got 32 x 8
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise TypeError(f"model: expected a transformers PreTrainedModel, got {type(model).__name__}")
    heads = _table(full_attention_heads)
    if ((heads < 0) | (heads > 1)).any():
        raise ValueError(f"full_attention_heads: expected values in 0..1, got {heads.min()} to {heads.max()}")
    config: Any = model.config
    sizes = geometry(config)
    if list(heads.shape) != [sizes.num_layers, sizes.num_kv_heads]:
        wanted = f"{sizes.num_layers} layers x {sizes.num_kv_heads} kv heads like the model"
        raise ValueError(f"full_attention_heads: expected {wanted}, got {' x '.join(map(str, heads.shape))}")
    check_int("recent_size", recent_size, 1)
    plan = Plan.from_gates(heads, threshold=0.5, sink_size=sink_size, window_size=recent_size)
    if _BLOCK in vars(model):
        disable_duo_attention_eval(model)
    block = attach(model, plan, prefill=prefill)  # type: ignore[arg-type]
    block.__enter__()
    vars(model)[_BLOCK] = block


def disable_duo_attention_eval(model: Any) -> None:
    """The model is again as it was before `enable_duo_attention_eval`.

    Args:
        model: an enabled one.
    Raises:
        ValueError: model: expected one with DuoAttention enabled, got one without
    """
    block: attach | None = vars(model).pop(_BLOCK, None)
    if block is None:
        raise ValueError("model: expected one with DuoAttention enabled, got one without")
    block.__exit__(None, None, None)


def to_device(model: Any, device: Any, enable_tp: bool = False, enable_pp: bool = False) -> Any:
    """Move a model, as the original does for one device.

    Args:
        model: any module.
        device: one that `model.to` takes.
        enable_tp, enable_pp: must be False.
    Returns:
        The model.
    Raises:
        NotImplementedError: enable_tp, enable_pp: expected False, got True; use device_map of from_pretrained
    """
    if enable_tp or enable_pp or isinstance(device, list):
        raise NotImplementedError(
            "enable_tp, enable_pp: expected False and one device, got several; use device_map of from_pretrained"
        )
    return model.to(device)


def _table(heads: Any) -> torch.Tensor:
    """(layers, kv heads), float64, on the CPU, of a tensor, or of rows that are tensors, arrays or lists."""
    try:
        table = heads if isinstance(heads, torch.Tensor) else torch.stack([torch.as_tensor(row) for row in heads])
        return check_table("full_attention_heads", table.double(), "floats")
    except (TypeError, RuntimeError) as error:
        got = f"{type(heads).__name__}: {error}"
        raise TypeError(f"full_attention_heads: expected a table [layers, heads] of numbers, got {got}") from error
