# SPDX-License-Identifier: Apache-2.0
"""Plan: which tokens each kv head keeps, and whether it keeps the mean of the others.

Tables are [num_layers, num_kv_heads], sizes in tokens. A plan knows nothing about models, devices or caches.
"""

import math
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from .checks import ceil_share, check_dict, check_int, check_kv_dtype, check_share, check_table
from .files import LayerHeads, PathLike, TwoLists, merge_heads, read_json, write_json
from .heads import full_gates
from .reference import FULL as FULL
from .reference import row_width

_KEYS = ("num_layers", "num_kv_heads", "sink_size", "window_size", "compensate", "window_fraction", "provenance")


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Cache policy of every kv head of a model; a group of query heads shares one. Equal plans have equal policies.

    Until `resolve`, the window of a head that is not full is max(window_size, ceil(window_fraction * prompt length)).

    Args:
        sink_size: (num_layers, num_kv_heads), int32 or nested lists, tokens. First tokens kept.
        window_size: (num_layers, num_kv_heads), int32 or nested lists, tokens. Last tokens kept, the query's own
            included, so at least 1 unless window_fraction will widen it; FULL keeps all.
        compensate: (num_layers, num_kv_heads), bool or nested lists. Becomes False for full heads, which drop nothing.
        window_fraction: in [0, 1]; 0 when the windows are final.
        provenance: where the plan comes from, as JSON values: model, method, parameters, seed, package version.
    Raises:
        ValueError: window_size: expected layers x kv heads 2 x 4 like sink_size, got 2 x 3
    """

    sink_size: Tensor  # [num_layers, num_kv_heads] int32, tokens
    window_size: Tensor  # [num_layers, num_kv_heads] int32, tokens
    compensate: Tensor  # [num_layers, num_kv_heads] bool
    window_fraction: float = 0.0
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sinks, windows = (check_table(name, getattr(self, name), "integers") for name in ("sink_size", "window_size"))
        compensate = check_table("compensate", self.compensate, "bools")
        for name, table in (("window_size", windows), ("compensate", compensate)):
            if table.shape != sinks.shape:
                wanted, got = ("{} x {}".format(*size) for size in (sinks.shape, table.shape))
                raise ValueError(f"{name}: expected layers x kv heads {wanted} like sink_size, got {got}")
        for name, table in (("sink_size", sinks), ("window_size", windows)):
            if (bad := (table < 0) | (table > FULL)).any():
                raise ValueError(f"{name}: expected 0..{FULL} tokens, got {table[bad][0]}")
        fraction = check_share("window_fraction", self.window_fraction)
        if fraction == 0 and (windows == 0).any():
            raise ValueError("window_size: expected at least 1 token, the query's own, got 0")
        if (over := (windows != FULL) & (sinks + windows > FULL)).any():
            got = f"{sinks[over][0]} + {windows[over][0]}"
            raise ValueError(f"window_size: expected sink_size + window_size <= {FULL}, got {got}")
        object.__setattr__(self, "sink_size", sinks.int())
        object.__setattr__(self, "window_size", windows.int())
        object.__setattr__(self, "compensate", compensate & (windows != FULL))
        object.__setattr__(self, "window_fraction", fraction)
        object.__setattr__(self, "provenance", check_dict("provenance", self.provenance))

    @classmethod
    def full(cls, num_layers: int, num_kv_heads: int) -> "Plan":
        """Every head keeps every token.

        Args:
            num_layers, num_kv_heads: shape of the model.
        Returns:
            The plan.
        Raises:
            ValueError: num_layers: expected an integer >= 1, got 0
        """
        return cls.streaming(num_layers, num_kv_heads, 0, FULL)

    @classmethod
    def streaming(cls, num_layers: int, num_kv_heads: int, sink_size: int, window_size: int) -> "Plan":
        """Every head keeps its first and last tokens and forgets the others (StreamingLLM).

        Args:
            num_layers, num_kv_heads: shape of the model.
            sink_size, window_size: first and last tokens kept; the window includes the query's own.
        Returns:
            The plan.
        Raises:
            ValueError: window_size: expected at least 1 token, the query's own, got 0
        """
        shape = check_int("num_layers", num_layers, 1), check_int("num_kv_heads", num_kv_heads, 1)
        sinks, windows = check_int("sink_size", sink_size, 0), check_int("window_size", window_size, 0)
        return cls(torch.full(shape, sinks), torch.full(shape, windows), torch.full(shape, False))

    @classmethod
    def from_heads(
        cls,
        heads: LayerHeads | TwoLists,
        *,
        num_layers: int,
        num_kv_heads: int,
        sink_size: int = 4,
        min_window: int = 4000,
        window_fraction: float = 0.2,
        compensate: bool = True,
        provenance: dict[str, Any] | None = None,
    ) -> "Plan":
        """RazorAttention's plan: the given heads are full, the others keep sinks, a window and the mean of the rest.

        Args:
            heads: {layer: [kv_head, ...]}, or two such lists, of which the union counts.
            num_layers, num_kv_heads: shape of the model.
            sink_size, min_window, compensate: policy of the other heads, tokens.
            window_fraction: share of the prompt that their window covers where that is more; see `resolve`.
            provenance: where the heads come from.
        Returns:
            The plan, not resolved unless window_fraction is 0.
        Raises:
            ValueError: heads: expected kv heads of 4 layers x 4 kv heads, got some that need 32 x 8
        """
        shape = check_int("num_layers", num_layers, 1), check_int("num_kv_heads", num_kv_heads, 1)
        sinks = torch.full(shape, check_int("sink_size", sink_size, 0))
        windows = torch.full(shape, check_int("min_window", min_window, 0))
        if not isinstance(compensate, bool):
            raise TypeError(f"compensate: expected a bool, got {compensate!r}")
        union = merge_heads(heads)
        need = max(union, default=-1) + 1, max((row[-1] for row in union.values()), default=-1) + 1
        if need[0] > num_layers or need[1] > num_kv_heads:
            wanted = f"kv heads of {num_layers} layers x {num_kv_heads} kv heads"
            raise ValueError(f"heads: expected {wanted}, got some that need {need[0]} x {need[1]}")
        for layer, row in union.items():
            windows[layer, row] = FULL
        return cls(sinks, windows, torch.full(shape, compensate), window_fraction, provenance or {})

    @classmethod
    def from_windows(
        cls, windows: Tensor, *, num_layers: int, num_kv_heads: int, provenance: dict[str, Any] | None = None
    ) -> "Plan":
        """Windows of an ALiBi model, without sinks or compensation; a group keeps the widest of its query heads.

        Args:
            windows: (heads) or (num_layers, heads), integers >= 1 or lists, tokens; heads is num_kv_heads or a
                multiple of it. FULL and more is full.
            num_layers, num_kv_heads: shape of the model.
            provenance: where the windows come from.
        Returns:
            The plan.
        Raises:
            ValueError: windows: expected at least 1 token, got -3
        """
        shape = check_int("num_layers", num_layers, 1), check_int("num_kv_heads", num_kv_heads, 1)
        table = check_table("windows", windows, "integers", dims=(1, 2))
        if table.shape[-1] % num_kv_heads or (table.dim() == 2 and len(table) != num_layers):
            wanted = f"[heads] or [{num_layers}, heads], heads a multiple of {num_kv_heads}"
            raise ValueError(f"windows: expected {wanted}, got {list(table.shape)}")
        if (least := table.min()) < 1:
            raise ValueError(f"windows: expected at least 1 token, got {least}")
        widest = table.expand(num_layers, -1).reshape(*shape, -1).amax(-1).clamp(max=FULL)
        return cls(torch.zeros_like(widest), widest, torch.full(shape, False), provenance=provenance or {})

    @classmethod
    def from_gates(
        cls,
        gates: Tensor,
        *,
        sparsity: float | None = None,
        threshold: float | None = None,
        sink_size: int = 64,
        window_size: int = 256,
        provenance: dict[str, Any] | None = None,
    ) -> "Plan":
        """DuoAttention's plan: heads with a high gate are full, the others keep sinks and a window.

        Args:
            gates: (num_layers, num_kv_heads), float or nested lists; 1 is full.
            sparsity, threshold: exactly one of the two, in [0, 1]; see `full_gates`.
            sink_size, window_size: policy of the compressed heads, tokens.
            provenance: where the gates come from.
        Returns:
            The plan.
        Raises:
            ValueError: sparsity, threshold: expected exactly one of the two, got both
        """
        full = full_gates(gates, sparsity=sparsity, threshold=threshold)
        sinks, window = check_int("sink_size", sink_size, 0), check_int("window_size", window_size, 0)
        windows = torch.full(full.shape, window).masked_fill(full, FULL)
        return cls(torch.full(full.shape, sinks), windows, torch.zeros_like(full), provenance=provenance or {})

    @classmethod
    def from_ranking(
        cls,
        ranking: Tensor,
        *,
        budget: float,
        seq_len: int,
        dtype: torch.dtype = torch.bfloat16,
        page_size: int = 64,
        sink_size: int = 4,
        min_window: int = 4000,
        window_fraction: float = 0.2,
        compensate: bool = True,
        provenance: dict[str, Any] | None = None,
    ) -> "Plan":
        """As many full heads as a share of the full cache's bytes pays for, at one length; the others as `from_heads`.

        Everything counts that the cache holds: sinks, windows, whole pages and the sums of compensating heads.

        Args:
            ranking: (num_layers, num_kv_heads), integers or nested lists, 0 ... n - 1 each once: 0 is the first head to
                be full; see `HeadScores.ranking`.
            budget: in [0, 1], largest kv_bytes(seq_len) over those of `Plan.full`.
            seq_len: tokens, at which the budget holds; elsewhere the share differs.
            dtype, page_size: of the cache; see `kv_bytes`.
            sink_size, min_window, window_fraction, compensate: policy of the other heads, tokens; see `from_heads`.
            provenance: where the ranking comes from.
        Returns:
            The plan, not resolved unless window_fraction is 0.
        Raises:
            ValueError: budget: expected at least 0.214, the smallest share at 32768 tokens, got 0.1; ...
        """
        order = check_table("ranking", ranking, "integers")
        if not torch.equal(order.flatten().sort().values, torch.arange(order.numel())):
            raise ValueError(f"ranking: expected 0..{order.numel() - 1}, each once, got {order.flatten().tolist()}")
        share, (layers, kv_heads) = check_share("budget", budget), order.shape
        check_int("seq_len", seq_len, 1)
        sizes: dict[str, Any] = {"head_dim": 1, "dtype": dtype, "page_size": page_size}  # head_dim scales all alike
        rule: dict[str, Any] = {"min_window": min_window, "window_fraction": window_fraction}
        none = cls.from_heads(
            {}, num_layers=layers, num_kv_heads=kv_heads, sink_size=sink_size, compensate=compensate, **rule,
            provenance=provenance,
        )  # fmt: skip
        whole, shares = cls.full(layers, kv_heads).kv_bytes(seq_len, **sizes), list[Fraction]()
        for count in range(order.numel(), -1, -1):
            made = replace(none, window_size=none.window_size.masked_fill(order < count, FULL))
            shares.append(Fraction(made.kv_bytes(seq_len, **sizes), whole))
            if shares[-1] <= Fraction(str(share)):
                return made
        least = math.ceil(min(shares) * 1000) / 1000
        raise ValueError(
            f"budget: expected at least {least}, the smallest share at {seq_len} tokens, got {share}; "
            "smaller windows or sinks need less"
        )

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return self.sink_size.shape[0]

    @property
    def num_kv_heads(self) -> int:
        """kv heads of each layer."""
        return self.sink_size.shape[1]

    @property
    def is_full(self) -> Tensor:
        """(num_layers, num_kv_heads), bool: the heads that keep every token."""
        return self.window_size == FULL

    def resolve(self, prompt_len: int) -> "Plan":
        """Apply the length rule for a prompt: window = max(window_size, ceil(window_fraction * prompt_len)).

        The product is exact for the fraction as written: 0.2 of 20000 is 4000. A window beyond int32 becomes FULL.

        Args:
            prompt_len: tokens.
        Returns:
            A plan with window_fraction 0; this one if it is already.
        Raises:
            ValueError: prompt_len: expected an integer >= 0, got -1
        """
        least = max(1, ceil_share(self.window_fraction, check_int("prompt_len", prompt_len, 0)))
        if self.window_fraction == 0:
            return self
        windows = self.window_size.long().clamp(min=least)
        windows[self.sink_size + windows > FULL] = FULL
        return replace(self, window_size=windows, window_fraction=0.0)

    def kv_bytes(
        self,
        seq_len: int,
        *,
        head_dim: int,
        dtype: torch.dtype | str,
        batch_size: int = 1,
        page_size: int = 64,
        exact_rows: int = 0,
        exact_dtype: torch.dtype = torch.bfloat16,
    ) -> int:
        """Bytes of the cache after `seq_len` tokens: whole pages of K and V, and float32 sums of compensating heads.

        A plan that is not resolved is resolved for a prompt of `seq_len` tokens.

        Args:
            seq_len: tokens of each sequence. batch_size: sequences. head_dim: elements of a row.
            dtype: of K and V in the cache: float32, bfloat16, float16, int8 or "int4".
            page_size: rows of a page, a multiple of 16.
            exact_rows: exact_sink + exact_window of a quantised cache, there from the first token on.
            exact_dtype: of these rows, the model's.
        Returns:
            Bytes.
        Raises:
            ValueError: page_size: expected a multiple of 16, got 24
        """
        plan = self.resolve(check_int("seq_len", seq_len, 0))
        if check_int("page_size", page_size, 16) % 16:
            raise ValueError(f"page_size: expected a multiple of 16, got {page_size}")
        stored = check_kv_dtype("dtype", dtype)
        row_bytes = row_width(check_int("head_dim", head_dim, 1), stored) * stored.itemsize
        kept = torch.where(plan.is_full, seq_len, (plan.sink_size.long() + plan.window_size).clamp(max=seq_len))
        pages = int(((kept + page_size - 1) // page_size).sum())
        page_bytes, sum_bytes = 2 * page_size * row_bytes, 2 * head_dim * 4
        exact_bytes = 2 * check_int("exact_rows", exact_rows, 0) * head_dim * exact_dtype.itemsize if seq_len else 0
        by_head = plan.sink_size.numel() * exact_bytes + int(plan.compensate.sum()) * sum_bytes
        return check_int("batch_size", batch_size, 1) * (pages * page_bytes + by_head)

    def layer(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """The policy of one layer, copied.

        Args:
            index: of the layer, from 0.
        Returns:
            sink_size and window_size, (num_kv_heads), int32, tokens, and compensate, (num_kv_heads), bool.
        Raises:
            ValueError: index: expected an integer <= 3, got 4
        """
        check_int("index", index, 0, self.num_layers - 1)
        return self.sink_size[index].clone(), self.window_size[index].clone(), self.compensate[index].clone()

    def select_kv_heads(self, start: int, stop: int) -> "Plan":
        """Kv heads start ... stop - 1 of every layer.

        Args:
            start, stop: kv heads, 0 <= start < stop <= num_kv_heads.
        Returns:
            A plan of stop - start kv heads.
        Raises:
            ValueError: stop: expected an integer <= 8, got 9
        """
        check_int("stop", stop, check_int("start", start, 0, self.num_kv_heads - 1) + 1, self.num_kv_heads)
        part = (slice(None), slice(start, stop))
        tables = self.sink_size[part], self.window_size[part], self.compensate[part]
        return Plan(*tables, self.window_fraction, self.provenance)

    def shard(self, rank: int, world_size: int) -> "Plan":
        """The plan of one tensor-parallel rank: of every layer its run of kv heads, runs being equal and in order.

        Args:
            rank: from 0.
            world_size: ranks, a divisor of num_kv_heads: no head is cut or copied.
        Returns:
            A plan of num_kv_heads / world_size kv heads.
        Raises:
            ValueError: world_size: expected a divisor of 8 kv heads, got 3
        """
        if self.num_kv_heads % check_int("world_size", world_size, 1):
            raise ValueError(f"world_size: expected a divisor of {self.num_kv_heads} kv heads, got {world_size}")
        count = self.num_kv_heads // world_size
        start = check_int("rank", rank, 0, world_size - 1) * count
        return self.select_kv_heads(start, start + count)

    def imbalance(
        self, world_size: int, seq_len: int, *, head_dim: int, dtype: torch.dtype | str, page_size: int = 64
    ) -> float:
        """How full the fullest rank's cache is: its bytes over the mean of all ranks. 1 is even, world_size the worst.

        Args:
            world_size: ranks; see `shard`.
            seq_len, head_dim, dtype, page_size: see `kv_bytes`.
        Returns:
            The ratio; 1 where no rank keeps anything.
        Raises:
            ValueError: world_size: expected a divisor of 8 kv heads, got 3
        """
        sizes: dict[str, Any] = {"head_dim": head_dim, "dtype": dtype, "page_size": page_size}
        held = [self.shard(rank, world_size).kv_bytes(seq_len, **sizes) for rank in range(world_size)]
        return max(held) * world_size / sum(held) if any(held) else 1.0

    def check_model(self, num_layers: int, num_kv_heads: int) -> None:
        """Refuse a model of another shape.

        Args:
            num_layers, num_kv_heads: shape of the model.
        Raises:
            ValueError: plan: expected 4 layers x 4 kv heads like the model, got 32 x 8
        """
        if (num_layers, num_kv_heads) != (self.num_layers, self.num_kv_heads):
            wanted = f"{num_layers} layers x {num_kv_heads} kv heads like the model"
            raise ValueError(f"plan: expected {wanted}, got {self.num_layers} x {self.num_kv_heads}")

    def save(self, path: PathLike) -> None:
        """Write the plan as JSON, atomically.

        Args:
            path: file to write.
        Raises:
            TypeError: obj: expected JSON values, got Object of type set is not JSON serializable
        """
        values = {key: getattr(self, key) for key in _KEYS}
        plain = {key: value.tolist() if isinstance(value, Tensor) else value for key, value in values.items()}
        write_json(path, {"format": "razor-attention plan", "version": 1, **plain})

    @classmethod
    def load(cls, path: PathLike) -> "Plan":
        """Read what `save` wrote, every value checked.

        Args:
            path: file to read.
        Returns:
            The plan.
        Raises:
            ValueError: plan.json: expected the key 'sink_size', got a file without it
        """
        record = read_json(path, "plan", _KEYS)
        try:
            plan = cls(*(record[key] for key in _KEYS[2:]))
            if (said := [record["num_layers"], record["num_kv_heads"]]) != [plan.num_layers, plan.num_kv_heads]:
                got = f"{plan.num_layers} x {plan.num_kv_heads}"
                raise ValueError(f"sink_size: expected {said[0]} layers x {said[1]} kv heads, got {got}")
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
        return plan

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return NotImplemented
        same = all(torch.equal(getattr(self, name), getattr(other, name)) for name in _KEYS[2:5])
        return same and self.window_fraction == other.window_fraction

    def __repr__(self) -> str:
        others = ~self.is_full
        text = f"{self.num_layers} layers x {self.num_kv_heads} kv heads, {int(self.is_full.sum())} full"
        if others.any():
            sinks, windows = _span(self.sink_size[others]), _span(self.window_size[others])
            if self.window_fraction:
                windows = f"max({windows}, {self.window_fraction} * prompt)"
            means = int(self.compensate.sum())
            some = "" if means == others.sum() else f" in {means}"
            text += f", others {sinks} + {windows}" + (f" + compensation{some}" if means else "")
        return f"Plan({text})"


def _span(sizes: Tensor) -> str:
    least, most = int(sizes.min()), int(sizes.max())
    return str(least) if least == most else f"{least}..{most}"
