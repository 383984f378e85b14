# SPDX-License-Identifier: Apache-2.0
"""ALiBi: slopes, and how far back each head has to read.

With logit(p, j) = scale q_p.k_j - slope (p - j), a bound on the spread of the content term over the slope is a distance
beyond which tokens do not matter. The rules differ in that bound:

    msmodelslim  trunc((f + ln theta + alpha) / slope) with f = sqrt(max(0, max_ij (Wq Wk^T)_ij)), the largest of all
                 layers: the integers of msmodelslim's binary, sign of ln theta and negative windows included
    per_head     ceil((f - ln theta + alpha) / slope), at least 1: what that formula is meant to be
    theorem      ceil((2 |Wq Wk^T|_2 (|gamma|^2 + |b|^2) - ln theta) / slope): RazorAttention, Theorem 1
    calibrated   the smallest window that drops at most theta of the attention of any query of a text
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from .checks import check_int
from .op_checks import check_alibi_windows, check_slopes_and_bound
from .reference import FULL

RULES = ("msmodelslim", "per_head", "theorem")  # these ask for weights alone


class AlibiWeights(NamedTuple):
    """One layer's projections, split into heads; contracted over the last axis. Any strides, no copy needed."""

    query: Tensor  # (rows, num_heads, cols), f32 | bf16 | f16
    key: Tensor  # (rows, num_heads, cols), dtype of query
    norm: tuple[Tensor, Tensor | None] | None = None  # weight and bias of the norm before them, each (hidden_size,)


def alibi_slopes(num_heads: int) -> Tensor:
    """Slopes of the original ALiBi paper, as BLOOM and Baichuan use them.

    A power of two: `2 ** (-8 (i + 1) / n)`. Otherwise the slopes of the power of two below, then every other slope of
    the one above. MPT in transformers comes to the same; Falcon scales them.

    Args:
        num_heads: query heads.

    Returns:
        (num_heads,), float32, logit per token of distance.

    Raises:
        ValueError: num_heads: expected an integer >= 1, got 0
    """
    check_int("num_heads", num_heads, 1)

    def of_power(n: int) -> list[float]:
        return [2 ** (-8 * (i + 1) / n) for i in range(n)]

    below = 2 ** math.floor(math.log2(num_heads))
    return torch.tensor([*of_power(below), *of_power(2 * below)[0::2][: num_heads - below]], dtype=torch.float32)


def alibi_windows(
    weights: Iterable[AlibiWeights | tuple[Tensor, Tensor]],
    slopes: Tensor | Sequence[float],
    *,
    theta: float = 1e-5,
    alpha: float = 100,
    method: str = "msmodelslim",
    per_layer: bool = False,
) -> Tensor:
    """How many of its last tokens each head of an ALiBi model needs, from the weights of its projections alone.

    Layers are read one at a time: an iterator over a checkpoint never has more than one of them in memory.

    Args:
        weights: (rows, num_heads, cols) each, floats of any dtype, contracted over the last axis: (query, key) of every
            layer, or AlibiWeights with the norm that `theorem` asks for. The heads of a Linear weight
            (out, in) are `weight.view(num_heads, head_dim, in).permute(2, 0, 1)`; msmodelslim's view of it, which
            slices the input columns instead, is `weight.view(out, num_heads, -1)`.
        slopes: (num_heads,), logit per token of distance, > 0.
        theta: bound on an attention weight beyond the window, in (0, 1]. In `msmodelslim` a smaller theta gives a
            narrower window, in the others a wider one.
        alpha: margin added to the logit spread; not part of `theorem`.
        method: "msmodelslim", "per_head" or "theorem", see the head of this module. "calibrated": `find_windows`.
        per_layer: windows of each layer; not in msmodelslim's rule, which takes the widest.

    Returns:
        (num_heads,) or (num_layers, num_heads), int64, tokens. `msmodelslim` may give windows below 1, with a warning;
        the others are at least 1, and FULL where no int32 would hold them.

    Raises:
        ValueError: method: expected 'msmodelslim', 'per_head' or 'theorem', got 'guess'
    """
    if method not in RULES:
        raise ValueError(f"method: expected 'msmodelslim', 'per_head' or 'theorem', got {method!r}")
    if per_layer and method == "msmodelslim":
        raise ValueError("per_layer: expected False with method 'msmodelslim', which has one window a head, got True")
    for name, value in (("theta", theta), ("alpha", alpha)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    slope = torch.as_tensor(slopes, dtype=torch.float32).detach().cpu().contiguous()
    found: list[Tensor] = []  # (num_heads,), of each layer, or the last one of all layers so far
    bound: Tensor | None = None
    for number, parts in enumerate(weights):
        layer, before = _detached(*parts), None if per_layer else bound
        try:
            if method == "theorem":
                check_alibi_windows(*layer[:2], slope, None, theta=theta, alpha=0, method="per_head")
                check_slopes_and_bound(slope, None)
                now = _theorem_bound(layer)
                bound = now if before is None else torch.maximum(before, now)
                windows = ((bound - math.log(theta)) / slope.double()).ceil().clamp(1, FULL).long()
            else:
                windows, bound = ops.alibi_windows(*layer[:2], slope, before, theta=theta, alpha=alpha, method=method)
        except ValueError as error:
            if str(error).startswith(("query", "key", "norm")):
                raise ValueError(f"weights[{number}] {error}") from error
            raise
        found = [*found, windows] if per_layer else [windows]
    if not found:
        raise ValueError("weights: expected at least one layer, got none")
    if per_layer:
        return torch.stack(found)
    if method == "msmodelslim":
        assert bound is not None
        if not isinstance(slopes, Tensor):  # Python divides by floats in float64 where the binary has no bound at all
            for head in (bound == 0).nonzero().flatten().tolist():
                found[0][head] = int((math.log(theta) + alpha) / float(slopes[head]))
        if (least := int(found[0].min())) < 1:
            warnings.warn(
                f"alpha: expected a margin above -ln(theta) = {-math.log(theta):.2f}, got {alpha}; msmodelslim's rule "
                f"adds ln(theta) where it should subtract it, so that windows go down to {least}. They are kept as its "
                "binary gives them and no plan takes them: use method='per_head'",
                stacklevel=2,
            )
    return found[0]


def attend_and_measure(
    query: Tensor, key: Tensor, value: Tensor, slopes: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Causal ALiBi attention, and for every window the most that a query would lose with it.

    Args:
        query: (batch, num_heads, tokens, head_dim), f32 | bf16 | f16.
        key: (batch, num_kv_heads, tokens, head_dim), dtype of query.
        value: (batch, num_kv_heads, tokens, head_dim), dtype of query.
        slopes: (num_heads,), float32, logit per token.
        scale: factor on q.k.

    Returns:
        out: (batch, num_heads, tokens, head_dim), dtype of query.
        mass: (num_heads, tokens + 1), float32; mass[h, w] is the largest over all queries p of the attention weight
            of the tokens at distances p - j >= w. Falls with w, 1 at w = 0, 0 at w = tokens.
    """
    batch, num_heads, tokens, _ = query.shape
    group = num_heads // key.shape[1]
    position = torch.arange(tokens, device=query.device)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    mass = torch.zeros(num_heads, tokens + 1, dtype=torch.float32, device=query.device)
    mass[:, 0] = 1.0
    for b in range(batch):
        for h in range(num_heads):  # one head at a time: a block of the map is all that exists of it
            k, v = key[b, h // group].float(), value[b, h // group].float()
            for first in range(0, tokens, 256):
                end = min(first + 256, tokens)
                distance = position[first:end, None] - position[:end]
                logit = (query[b, h, first:end].float() * scale) @ k[:end].T - slopes[h] * distance
                weight = logit.masked_fill(distance < 0, -torch.inf).softmax(-1)
                out[b, h, first:end] = (weight @ v[:end]).to(out.dtype)
                # lost[r, j]: what row r loses with the window that begins behind token j. Adding from the oldest token
                # on keeps the small weights exact.
                lost = weight.double().cumsum(-1).clamp(max=1).float()
                worst = _by_distance(lost.flip(1)).amax(0)  # [w]
                torch.maximum(mass[h, 1:end], worst[1:], out=mass[h, 1:end])
    return out, mass


def _by_distance(newest_first: Tensor) -> Tensor:
    """Row r shifted left so that its first column is its own token, zeros after its last.

    Args:
        newest_first: (rows, tokens); the last row's own token stands first, that of the row before second, and so on.

    Returns:
        (rows, tokens), a view.
    """
    rows, tokens = newest_first.shape
    padded = newest_first.new_zeros(rows, tokens + rows)
    padded[:, :tokens] = newest_first
    return padded.as_strided((rows, tokens), (tokens + rows - 1, 1), rows - 1)


def smallest_windows(mass: Tensor, theta: float) -> Tensor:
    """The smallest windows that drop at most `theta` of the attention of any query.

    Args:
        mass: (..., tokens + 1), from `attend_and_measure`, falling along the last axis.
        theta: share of the attention, in (0, 1].

    Returns:
        (...), int64, tokens, at least 1. One near the text's length says nothing about longer texts.

    Raises:
        ValueError: theta: expected a value > 0 and <= 1, got 0
    """
    if not 0 < theta <= 1:
        raise ValueError(f"theta: expected a value > 0 and <= 1, got {theta:g}")
    return (mass > theta).sum(-1).clamp(min=1)


def _detached(query: Tensor, key: Tensor, norm: tuple[Tensor, Tensor | None] | None = None) -> AlibiWeights:
    """On the CPU; float64 as float32, which is what the op computes in."""
    query, key = (x.float() if x.dtype == torch.float64 else x for x in (query.detach().cpu(), key.detach().cpu()))
    return AlibiWeights(query, key, norm)


def _theorem_bound(layer: AlibiWeights) -> Tensor:
    """2 |Wq Wk^T|_2 (|gamma|^2 + |b|^2) of each head, float64: the paper's bound, which leaves the scale of q.k out."""
    if layer.norm is None:
        raise ValueError("norm: expected that before the projections for method 'theorem', got none")
    square = sum(float(part.double().square().sum()) for part in layer.norm if part is not None)
    bound = torch.stack([2 * square * _spectral_norm(q, k) for q, k in _heads(layer)])
    for head in (~bound.isfinite()).nonzero().flatten().tolist():
        raise ValueError(f"query: expected finite products with key, got {bound[head].item()} in head {head}")
    return bound


def _heads(layer: AlibiWeights) -> Iterator[tuple[Tensor, Tensor]]:
    for head in range(layer.query.shape[1]):
        yield layer.query[:, head].double(), layer.key[:, head].double()


def _spectral_norm(query: Tensor, key: Tensor) -> Tensor:
    """|Q K^T|_2 of tall factors (rows, cols): that of the small product of their triangular parts."""
    triangles = [torch.linalg.qr(side, mode="r").R for side in (query, key)]
    small: Tensor = triangles[0] @ triangles[1].mT
    largest: Tensor = torch.linalg.svdvals(small)[0] if small.isfinite().all() else small.sum()  # inf or nan
    return largest
