# SPDX-License-Identifier: Apache-2.0
"""One sequence read through one cache: transformers' own, a RazorCache, or one that kvpress has pruned.

kvpress is a rival and no dependency: it is imported where one of its methods is asked for.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ...plan import Plan
from ..attachment import attach
from ..cache import KvDtype, Prefill, RazorCache, cache_bytes
from ..names import CACHE

PAGE_SIZE = 16  # the smallest, so that budgets are met closely
Way: TypeAlias = "Plan | Press | Callable[[PreTrainedModel], AbstractContextManager[object]] | None"


class Prefix(NamedTuple):
    """A context read once in full, for all methods that begin like this."""

    tokens: int
    logits: Tensor  # (1, vocabulary), float32: after its last token
    layers: list[tuple[Tensor, Tensor]]  # keys and values, each (1, num_kv_heads, tokens, head_dim)
    seconds: float


@dataclass(frozen=True, slots=True)
class Press:
    """A method of kvpress, which drops tokens of every head after the prompt has been read in full."""

    name: str  # class in kvpress
    kept: int  # tokens that it leaves of those it sees


class Reader:
    """Reads tokens through a cache, which is filled on the way and gone afterwards.

    Args:
        model: a causal language model.
        way: how the cache is kept. None: transformers' DynamicCache; a function: the same, read inside the context that
            it returns. A Press sees the tokens of the first `read`.
        prefill, kv_dtype: of a RazorCache.
    """

    def __init__(self, model: PreTrainedModel, way: Way, prefill: Prefill = "dense", kv_dtype: KvDtype = None) -> None:
        self.model, self.way = model, way
        self._options: dict[str, Any] = {"prefill": prefill, "kv_dtype": kv_dtype}
        self.seen = 0
        parameters = inspect.signature(model.forward).parameters
        self._keeps = "logits_to_keep" in parameters

    def __enter__(self) -> Reader:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            self.cache: Any = DynamicCache(config=self.model.config)
            if isinstance(self.way, Plan):
                stack.enter_context(attach(self.model, self.way, **self._options))
                self.cache = RazorCache(self.model.config, self.way, page_size=PAGE_SIZE, **self._options)
            elif callable(self.way):
                stack.enter_context(self.way(self.model))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def read(self, ids: list[int], *, every: bool = False) -> Tensor:
        """Logits after the last of some tokens, or after every one.

        Args:
            ids: the next tokens of the sequence.
            every: whether to return the logits of all of them.
        Returns:
            (1 or tokens, vocabulary), float32.
        """
        options: dict[str, Any] = {"logits_to_keep": 0 if every else 1} if self._keeps else {}
        batch = torch.tensor([ids], device=self.model.device)
        with contextlib.ExitStack() as stack:
            if isinstance(self.way, Press):  # the pruned cache no longer knows how many tokens it has seen
                position = torch.arange(self.seen, self.seen + len(ids), device=batch.device)
                options |= {"position_ids": position[None], "cache_position": position}
                if self.seen == 0 and self.way.kept < len(ids):
                    stack.enter_context(self._press(self.way, len(ids)))
            logits: Tensor = self.model(batch, use_cache=True, **{CACHE: self.cache}, **options).logits
        self.seen += len(ids)
        return (logits[0] if every else logits[0, -1:]).float()

    def start(self, prefix: Prefix) -> Tensor:
        """Store what a dense prefill would have stored, as the first thing that is read.

        Args:
            prefix: from `read_prefix` with the same model.
        Returns:
            (1, vocabulary), float32: its logits.
        """
        for index, (key, value) in enumerate(prefix.layers):
            if isinstance(self.cache, RazorCache):
                self.cache.fill(index, key, value)
            else:
                self.cache.update(key, value, index)
        self.seen = prefix.tokens
        return prefix.logits

    def _press(self, way: Press, tokens: int) -> Any:
        try:
            kvpress = importlib.import_module("kvpress")
        except ImportError as error:
            raise ImportError(f"kvpress: expected to be installed for {way.name}, got {error}") from error
        ratio = 1 - (way.kept + 0.5) / tokens  # half a token more: kvpress rounds down
        return getattr(kvpress, way.name)(compression_ratio=ratio)(self.model)

    @property
    def nbytes(self) -> int:
        """Bytes that the cache holds now."""
        return cache_bytes(self.cache)


def read_prefix(model: PreTrainedModel, ids: list[int]) -> Prefix:
    """Read a context in full."""
    begin = time.perf_counter()
    with Reader(model, None) as reader:
        logits = reader.read(ids)
    layers = [(layer.keys, layer.values) for layer in reader.cache.layers]
    return Prefix(len(ids), logits, layers, time.perf_counter() - begin)


def answer(reader: Reader, logits: Tensor, limit: int, stop: int | None) -> list[int]:
    """Greedy tokens after what was read last; the last one of them is not read.

    Args:
        reader: that has read the prompt.
        logits: (1, vocabulary), float32: what it returned.
        limit: tokens.
        stop: id that ends the answer.
    Returns:
        At least one token, `stop` included.
    """
    tokens = [int(logits[-1].argmax())]
    while len(tokens) < limit and tokens[-1] != stop:
        tokens.append(int(reader.read(tokens[-1:])[-1].argmax()))
    return tokens
