# SPDX-License-Identifier: Apache-2.0
"""find_windows: how far back each head of an ALiBi model reads, from its weights or from a text.

Weights are read layer by layer, of a model in memory or of a checkpoint that never comes into it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from tqdm import tqdm

from ..alibi import RULES, alibi_windows, smallest_windows
from .alibi import alibi_architecture, guess_architecture, slopes_of
from .checkpoint import Reader, open_weights, read_config
from .mass import dropped_mass
from .projections import Projections


def find_windows(
    model_or_path: nn.Module | str | os.PathLike[str],
    *,
    theta: float = 1e-5,
    alpha: float = 100,
    method: str = "msmodelslim",
    per_layer: bool = False,
    slopes: Tensor | Sequence[float] | None = None,
    ids: Tensor | None = None,
    progress: bool = True,
) -> Tensor:
    """How many of its last tokens each head of an ALiBi model needs: what `Plan.from_windows` takes.

    The rules "msmodelslim", "per_head" and "theorem" look at the weights of the query and key projections, which they
    read layer by layer: given a path, nothing else of the checkpoint is read. "calibrated" runs the model over a text
    and takes the smallest window that drops at most theta of the attention of any query of that text: it says nothing
    of distances that the text does not have. It is `smallest_windows(dropped_mass(model, ids), theta)`; call those two
    to see the mass that every window drops, per layer and head.

    Args:
        model_or_path: BLOOM, MPT, Falcon with alibi, Baichuan-13B, or the folder of such a checkpoint, safetensors or
            .bin. Also a model that transformers does not know, if its projections are called as one of theirs or q_proj
            and k_proj and nothing in it hints at other positions: it is taken to have the paper's slopes.
        theta: see `alibi_windows`; for "calibrated" the share of attention that may be dropped.
        alpha: margin on the logit spread; not part of "theorem" and "calibrated".
        method: "msmodelslim" (integer-equal to its binary), "per_head", "theorem" or "calibrated" (recommended).
        per_layer: windows of each layer instead of the widest of all; not in msmodelslim's rule.
        slopes: (num_heads,), logit per token; None: the model's own. Not with "calibrated".
        ids: (batch, tokens), int64; text for "calibrated", as long as the windows are to hold for.
        progress: show a progress bar.

    Returns:
        (num_heads,) or (num_layers, num_heads), int64, tokens.

    Raises:
        TypeError: model: expected a module or a path, got int
        ValueError: model: expected one that uses ALiBi (...), got llama; rotary models have retrieval heads ...
    """
    if method not in (*RULES, "calibrated"):
        wanted = ", ".join(map(repr, RULES))
        raise ValueError(f"method: expected {wanted} or 'calibrated', got {method!r}")
    if (method == "calibrated") != (ids is not None):
        wanted, got = ("token ids", "none") if ids is None else ("none", "token ids")
        raise ValueError(f"ids: expected {wanted} with method {method!r}, got {got}")
    if ids is not None:
        if slopes is not None:
            raise ValueError("slopes: expected none with method 'calibrated', which runs the model, got some")
        windows = smallest_windows(dropped_mass(cast(Any, model_or_path), ids, progress=progress), theta)
        return windows if per_layer else windows.amax(0)

    if isinstance(model_or_path, nn.Module):
        config: Any = getattr(model_or_path, "config", None)
        readers: Mapping[str, Reader] = {
            name: partial(_in_memory, name, tensor) for name, tensor in model_or_path.state_dict().items()
        }
        names = [*readers, *(name for name, _ in model_or_path.named_modules())]
        names += [name for name, _ in model_or_path.named_buffers()]
    elif isinstance(model_or_path, str | os.PathLike):
        config, readers = read_config(Path(model_or_path)), open_weights(Path(model_or_path))
        names = [*readers]
    else:
        raise TypeError(f"model: expected a module or a path, got {type(model_or_path).__name__}")
    row = alibi_architecture(config) or guess_architecture(config, names, alibi=slopes is not None)
    if slopes is None:
        slopes = slopes_of(config, row)
    layers = Projections(config, row, len(slopes), readers, compatible=method == "msmodelslim")
    with tqdm(layers, total=len(layers), desc="find_windows", unit="layer", disable=not progress) as bar:
        return alibi_windows(bar, slopes, theta=theta, alpha=alpha, method=method, per_layer=per_layer)


def _in_memory(name: str, tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        raise ValueError(f"model: expected weights in memory, got {name} on the meta device; give the path instead")
    return tensor
