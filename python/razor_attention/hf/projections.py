# SPDX-License-Identifier: Apache-2.0
"""Query and key projections of an ALiBi model, layer by layer, split into heads; found by their names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from ..alibi import AlibiWeights
from .alibi import AlibiArchitecture
from .checkpoint import Reader


class Projections:
    """The projections of all layers, each read when it is asked for.

    Args:
        config: configuration of the model; its number of layers is checked where it has one.
        row: where its projections are.
        num_heads: query heads.
        readers: of its weights, by name.
        compatible: split them as msmodelslim does.

    Raises:
        ValueError: model: expected 5 layers with W_pack like its config, got layers 0 to 1
    """

    def __init__(
        self, config: Any, row: AlibiArchitecture, num_heads: int, readers: Mapping[str, Reader], *, compatible: bool
    ) -> None:
        self.row, self.num_heads, self.readers, self.compatible = row, num_heads, readers, compatible
        self.num_kv_heads = row.num_kv_heads(config, num_heads)
        self.names = self._by_layer(row.projections[0])
        counts = (getattr(config, name, None) for name in ("num_hidden_layers", "n_layer", "n_layers"))
        wanted = next((count for count in counts if count is not None), len(self.names))
        if sorted(self.names) != list(range(wanted)):
            got = ", ".join(map(str, sorted(self.names))) or "none"
            called = row.projections[0]
            raise ValueError(f"model: expected {wanted} layers with {called} like its config, got layers {got}")

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[AlibiWeights]:
        for _, name in sorted(self.names.items()):
            weights = [self._read(name.replace(self.row.projections[0], one)) for one in self.row.projections]
            query, key = (self._as_msmodelslim if self.compatible else self._by_head)(weights)
            yield AlibiWeights(query, key, None if self.compatible else self._norm(name))

    def _by_layer(self, projection: str) -> dict[int, str]:
        pattern = re.compile(rf"(?:.*?\.)??(\d+)\.(?:\w+\.)*{projection}\.weight")
        found: dict[int, str] = {}
        for name in self.readers:
            if match := pattern.fullmatch(name):
                if other := found.get(int(match[1])):
                    raise ValueError(f"model: expected one {projection} in layer {match[1]}, got {other} and {name}")
                found[int(match[1])] = name
        return found

    def _read(self, name: str) -> Tensor:
        if name not in self.readers:
            raise ValueError(f"model: expected the weight {name}, got a model without it")
        return self.readers[name]()

    def _norm(self, name: str) -> tuple[Tensor, Tensor | None] | None:
        layer = re.match(r"(?:.*?\.)??\d+\.", name)
        assert layer is not None  # _by_layer has seen it
        for norm in self.row.norms:
            if weight := self.readers.get(f"{layer[0]}{norm}.weight"):
                bias = self.readers.get(f"{layer[0]}{norm}.bias")
                return weight(), bias() if bias else None
        return None

    def _by_head(self, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Query and key of each head, (in, num_heads, head_dim): views where every query head has its own key head."""
        heads, kv_heads = self.num_heads, self.num_kv_heads
        if len(weights) == 2:
            query = _cut(weights[0], 0, heads)
            key = _cut(weights[1], 0, weights[1].shape[0] // query.shape[1])
        elif self.row.by_head:  # the group's queries, its key, its value
            grouped = _cut(_cut(weights[0], 0, kv_heads), 1, heads // kv_heads + 2)
            query, key = grouped[:, :-2].flatten(0, 1), grouped[:, -2]
        else:
            query, key = _cut(_cut(weights[0], 0, 3), 1, heads)[:2]
        if len(key) != heads:
            key = key.repeat_interleave(heads // len(key), 0)
        return query.permute(2, 0, 1), key.permute(2, 0, 1)

    def _as_msmodelslim(self, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Its view, (rows, num_heads, cols): thirds of the rows whatever the model; a head is a slice of columns."""
        if self.num_kv_heads != self.num_heads:
            raise ValueError(
                f"model: expected as many kv heads as query heads for method 'msmodelslim', got {self.num_kv_heads} of "
                f"{self.num_heads}, whose rows it would mix up; use method='per_head'"
            )
        query, key = weights if len(weights) == 2 else _cut(weights[0], 0, 3)[:2]
        return _cut(query, 1, self.num_heads), _cut(key, 1, self.num_heads)


def _cut(weight: Tensor, dim: int, parts: int) -> Tensor:
    """A view with the axis `dim` cut into (parts, size / parts)."""
    size = weight.shape[dim]
    if size % max(parts, 1):
        raise ValueError(f"model: expected projections that split into {parts} parts, got {list(weight.shape)}")
    return weight.view(*weight.shape[:dim], parts, size // parts, *weight.shape[dim + 1 :])
