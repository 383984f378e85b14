# SPDX-License-Identifier: Apache-2.0
"""Which heads read everything: the probe's token ids, the scores of all heads, and the choice by score or by gate.

The scores themselves are computed by `ops.head_scores`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .checks import ceil_share, check_dict, check_int, check_share, check_table
from .files import LayerHeads, PathLike, TwoLists, read_json, write_json


@dataclass(frozen=True, slots=True, eq=False)
class HeadScores:
    """Echo and induction scores of every query head of a model, each the mean attention of a probe.

    Args:
        echo: (num_layers, num_heads), float32 or nested lists. Attention to earlier occurrences of the same token.
        induction: (num_layers, num_heads), float32 or nested lists. Attention to the tokens that followed them.
        num_kv_heads: kv heads of each layer; query heads h * group ... h * group + group - 1 share kv head h.
        provenance: where the scores come from, as JSON values: model, period, repeats, seed, package version.
    Raises:
        ValueError: num_kv_heads: expected a divisor of 6 heads, got 4
    """

    echo: Tensor  # [num_layers, num_heads] float32
    induction: Tensor  # [num_layers, num_heads] float32
    num_kv_heads: int
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        echo, induction = (check_table(name, getattr(self, name), "floats") for name in ("echo", "induction"))
        if induction.shape != echo.shape:
            raise ValueError(f"induction: expected shape {list(echo.shape)} like echo, got {list(induction.shape)}")
        if echo.shape[1] % check_int("num_kv_heads", self.num_kv_heads, 1):
            raise ValueError(f"num_kv_heads: expected a divisor of {echo.shape[1]} heads, got {self.num_kv_heads}")
        object.__setattr__(self, "echo", echo.float())
        object.__setattr__(self, "induction", induction.float())
        object.__setattr__(self, "provenance", check_dict("provenance", self.provenance))

    def group_max(self) -> tuple[Tensor, Tensor]:
        """Scores of the kv heads: the largest of each group of query heads.

        Returns:
            echo and induction, each (num_layers, num_kv_heads), float32.
        """
        shape = len(self.echo), self.num_kv_heads, -1
        return self.echo.view(shape).amax(-1), self.induction.view(shape).amax(-1)

    def select(self, induction_ratio: float = 0.14, echo_ratio: float = 0.01) -> TwoLists:
        """Choose retrieval heads: of all kv heads of all layers, those with the highest scores, once for each score.

        k = round(total * ratio), halves to even, and every kv head whose score equals one of the k largest is chosen:
        ties choose more than k. Ratio 0 chooses none, 1 all.

        Args:
            induction_ratio, echo_ratio: in [0, 1], share of the kv heads.
        Returns:
            {"induction": {layer: [kv_head, ...]}, "echo": ...}, ascending, layers without any left out.
        Raises:
            ValueError: echo_ratio: expected a number in 0..1, got 1.5
        """
        ratios = check_share("induction_ratio", induction_ratio), check_share("echo_ratio", echo_ratio)
        echo, induction = self.group_max()
        return {"induction": _highest(induction, ratios[0]), "echo": _highest(echo, ratios[1])}

    def ranking(self, echo_share: float = 1 / 15) -> Tensor:
        """All kv heads in the order in which a growing budget makes them full; see `Plan.from_ranking`.

        Of the first n heads, floor(n * echo_share) are the highest by echo score and the others the highest by
        induction score that are still left. Equal scores go by layer, then by head.

        Args:
            echo_share: in [0, 1]; the published ratios, 1 % by echo and 14 % by induction, are 1/15.
        Returns:
            (num_layers, num_kv_heads), int64: 0 for the first head, 1 for the next, ...
        Raises:
            ValueError: echo_share: expected a number in 0..1, got 2
        """
        share = check_share("echo_share", echo_share)
        orders = [side.flatten().argsort(descending=True, stable=True).tolist() for side in self.group_max()]
        left = [iter(order) for order in orders]
        ranks: dict[int, int] = {}  # kv head, counted through all layers -> its place
        for place in range(len(orders[0])):
            by_echo = math.floor((place + 1) * share) > math.floor(place * share)
            ranks[next(head for head in left[0 if by_echo else 1] if head not in ranks)] = place
        return torch.tensor([ranks[head] for head in range(len(ranks))]).view(len(self.echo), self.num_kv_heads)

    def save(self, path: PathLike) -> None:
        """Write scores and provenance as JSON, atomically; `load` gives back the same bits.

        Args:
            path: file to write.
        Raises:
            TypeError: obj: expected JSON values, got Object of type set is not JSON serializable
        """
        scores = {"num_kv_heads": self.num_kv_heads, "echo": self.echo.tolist(), "induction": self.induction.tolist()}
        head = {"format": "razor-attention scores", "version": 1, "provenance": self.provenance}
        write_json(path, head | scores)

    @classmethod
    def load(cls, path: PathLike) -> "HeadScores":
        """Read what `save` wrote.

        Args:
            path: file to read.
        Returns:
            The scores.
        Raises:
            ValueError: scores.json: expected the key 'echo', got a file without it
        """
        keys = ("echo", "induction", "num_kv_heads", "provenance")
        record = read_json(path, "scores", keys)
        try:
            return cls(*(record[key] for key in keys))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error


def probe_ids(vocab_ids: Sequence[int], prefix: int, *, period: int, repeats: int, seed: int) -> Tensor:
    """Token ids of the calibration prompt: a prefix, then one random block again and again.

    The block is drawn uniformly with replacement from a generator of its own; torch's global one is not touched.

    Args:
        vocab_ids: ids to draw from.
        prefix: first id, such as the tokenizer's BOS.
        period: tokens of the block.
        repeats: how often the block occurs, at least twice.
        seed: of the generator.
    Returns:
        (1 + period * repeats), int64.
    Raises:
        ValueError: repeats: expected an integer >= 2, got 1
    """
    if not len(vocab_ids):
        raise ValueError("vocab_ids: expected at least one id, got none")
    check_int("prefix", prefix, 0), check_int("period", period, 1), check_int("repeats", repeats, 2)
    generator = torch.Generator().manual_seed(check_int("seed", seed, 0, 2**63 - 1))
    places = torch.randint(len(vocab_ids), (period,), generator=generator)
    block = [check_int("vocab_ids", vocab_ids[place], 0) for place in places.tolist()]
    return torch.tensor([prefix] + block * repeats, dtype=torch.int64)


def full_gates(gates: Tensor, *, sparsity: float | None = None, threshold: float | None = None) -> Tensor:
    """Choose full heads by DuoAttention's gates, clipped to [0, 1]; 1 is full, 0 compressed.

    With `threshold` a gate >= threshold is full. With `sparsity` the ceil(sparsity * (n - 1)) lowest of n gates are
    compressed, all for 1, equal ones in the order of layer and head: without equal gates the published quantile rule.

    Args:
        gates: (num_layers, num_kv_heads), float or nested lists.
        sparsity, threshold: exactly one of the two, in [0, 1].
    Returns:
        (num_layers, num_kv_heads), bool, True for full.
    Raises:
        ValueError: sparsity, threshold: expected exactly one of the two, got both
    """
    table = check_table("gates", gates, "floats").clamp(0, 1)
    if threshold is not None and sparsity is None:
        return table >= check_share("threshold", threshold)
    if sparsity is None or threshold is not None:
        got = "neither" if sparsity is None else "both"
        raise ValueError(f"sparsity, threshold: expected exactly one of the two, got {got}")
    share = check_share("sparsity", sparsity)
    count = table.numel() if share == 1 else ceil_share(share, table.numel() - 1)
    full = torch.ones(table.numel(), dtype=torch.bool)
    full[table.flatten().argsort(stable=True)[:count]] = False
    return full.view(table.shape)


def _highest(scores: Tensor, ratio: float) -> LayerHeads:
    """Entries of (num_layers, num_kv_heads) that equal one of the round(total * ratio) largest values."""
    count = round(scores.numel() * ratio)
    if count == 0:
        return {}
    chosen = scores >= scores.flatten().topk(count).values[-1]
    return {layer: row.nonzero().flatten().tolist() for layer, row in enumerate(chosen) if row.any()}
