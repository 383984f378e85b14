# SPDX-License-Identifier: Apache-2.0
"""RazorCache: a transformers Cache made of one LayerCache per layer.

transformers splits the work in a way that does not suit us: `Cache.update` sees no query and no mask, the attention
function sees no cache. So `update` only tags the new keys with their layer; the attention function (`attention.py`)
finds the layer there, and attends and stores in one go. `update` returns the new tokens alone.
"""

from __future__ import annotations

import copy
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..cache import LayerCache
from ..checks import check_int
from ..files import PathLike
from ..plan import Plan
from .models import geometry
from .names import CACHE, Cache, CacheLayerMixin
from .parallel import kv_shard, local_slopes
from .saved import SavedCache, config_of, read_cache, write_cache

Prefill = Literal["dense", "streaming"]
KvDtype = torch.dtype | Literal["int8", "int4"] | None


class Block:
    """The block of an `attach`: open until it is left. A RazorCache is filled inside one alone."""

    def __init__(self, *, is_open: bool = True) -> None:
        self.open = is_open

    def close(self) -> None:
        """No cache is filled in this block any more."""
        self.open = False

    def __deepcopy__(self, _: object) -> Block:
        return self

    def __reduce__(self) -> tuple[Any, ...]:  # in another process it is over
        return _closed_block, ()


def _closed_block() -> Block:
    return Block(is_open=False)


class RazorLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer of a RazorCache: its LayerCache, and the columns of the attention mask that it has seen."""

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, dense: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dense = dense
        self.cache: LayerCache | None = None
        self.columns = 0  # tokens seen, padding counted: what transformers counts
        self.pending = False  # keys were handed out and not attended yet

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> NoReturn:
        raise NotImplementedError("RazorLayer: expected to be filled through RazorCache.update")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.pending = True
        key_states = key_states[:]  # a fresh object to tag, so that nothing else refers to us
        key_states._razor_layer = self  # type: ignore[attr-defined]
        return key_states, value_states

    def attend(self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, scale: float | None) -> Tensor:
        """Attention of the new tokens, which are then stored.

        Args:
            query: (batch, num_heads, q_len, head_dim), f32 | bf16 | f16.
            key: (batch, num_kv_heads, q_len, head_dim), dtype of query.
            value: (batch, num_kv_heads, q_len, head_dim), dtype of query.
            padding: (2, batch), int64: leading padding among the new tokens; tokens before them. None: no padding.
            scale: factor on q.k.
        """
        assert self.cache is not None  # RazorCache.update has created it
        seen = self.cache.seen.tolist()
        pad, past = (
            (None, [self.columns] * len(seen))
            if padding is None
            else (padding[0].to(query.device), padding[1].tolist())
        )
        if past != seen:
            raise ValueError(
                f"attention_mask: expected {seen} earlier tokens like the cache, got {past}; "
                "what was padding or a token when it came stays so"
            )
        dense = self.dense and query.shape[2] > 1
        out = self.cache.attend(query, key, value, scale=scale, pad=pad, dense=dense)
        self.columns += query.shape[2]
        return out

    @property
    def batch_size(self) -> int:
        if self.cache is None:
            raise AttributeError("batch_size")
        return self.cache.batch_size

    def get_seq_length(self) -> int:
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def get_max_length(self) -> int:  # the name in transformers >= 5.18
        return -1

    get_max_cache_shape = get_max_length  # and before

    def reset(self) -> None:
        self.cache, self.is_initialized = None, False
        self.columns, self.pending = 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.cache is not None:
            self.cache.reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.cache is not None:
            self.cache.reorder(torch.arange(self.batch_size)[indices.cpu()])  # a mask or indices

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.cache is not None:
            self.cache.reorder(torch.arange(self.batch_size).repeat_interleave(repeats))

    def crop(self, *_: Any) -> NoReturn:
        raise NotImplementedError(
            "RazorCache: expected no rollback, got crop(); dropped tokens cannot come back, "
            "generate without an assistant model or prompt lookup"
        )

    def activate_past_recording(self) -> NoReturn:
        self.crop()

    def offload(self) -> NoReturn:
        raise NotImplementedError("RazorCache: expected no offloading, got offload()")

    prefetch = offload


class RazorCache(Cache):
    """A transformers Cache that stores each kv head by its policy in `plan`. Needs razor attention in the model.

    Use it through `attach`, or by hand, inside such a block, to keep a conversation: pass the same RazorCache to every
    `generate` call. To ask many questions about one text, prefill it once and ask each of a fork (transformers before
    5.24 calls the argument `past_key_values`; either name goes here):

        with attach(model, plan), torch.no_grad():
            prefix = RazorCache(model.config, plan, prompt_len=text.shape[1])
            model(text, cache=prefix)
            prefix.save("book.safetensors", model)  # for another day: RazorCache.load("book.safetensors", model)
            for question, cache in zip(questions, prefix.fork(len(questions))):
                model.generate(torch.cat([text, question], 1), cache=cache)

    Args:
        config: the model's configuration.
        plan: policy of every (layer, kv head) of the whole model; under tensor parallelism the cache's own `plan` is
            what this rank keeps of it. A length rule that is still open is resolved once, at the first call.
        prefill: "dense" (RazorAttention): the tokens of a call of more than one token read all tokens of that call,
            compression begins with what is stored. "streaming" (DuoAttention): every query keeps to its own window,
            so the result does not depend on how the prompt is cut, and prefill time is linear for compressed heads.
        prompt_len: tokens for the plan's length rule; None: those of the first call, so name it for chunked prefill.
        page_size: tokens in a cache page, a multiple of 16.
        kv_dtype: torch.int8 (or "int8") or "int4": K and V are stored so, in about half or a quarter of 16-bit
            floats' bytes; None: in the model's dtype.
        exact_sink: first tokens that a quantised cache also keeps and reads as they came.
        exact_window: newest tokens, likewise.
        rotate_keys: see LayerCache; worth its products for quantised keys with outlying channels.

    Raises:
        ValueError: plan: expected 4 layers x 4 kv heads like the model, got 32 x 8
        NotImplementedError: config: expected only full_attention layers, got sliding_attention
    """

    layers: list[RazorLayer]  # type: ignore[assignment]

    def __init__(
        self,
        config: PreTrainedConfig,
        plan: Plan,
        *,
        prefill: Prefill = "dense",
        prompt_len: int | None = None,
        page_size: int = 64,
        kv_dtype: KvDtype = None,
        exact_sink: int = 0,
        exact_window: int = 0,
        rotate_keys: bool = False,
    ) -> None:
        if prefill not in ("dense", "streaming"):
            raise ValueError(f"prefill: expected 'dense' or 'streaming', got {prefill!r}")
        if not isinstance(plan, Plan):
            raise TypeError(f"plan: expected a Plan, got {type(plan).__name__}")
        if kv_dtype not in (None, torch.int8, "int8", "int4"):
            raise ValueError(f"kv_dtype: expected int8, 'int4' or None for the model's own, got {kv_dtype!r}")
        sizes = geometry(config)
        plan.check_model(sizes.num_layers, sizes.num_kv_heads)
        plan = plan.shard(*kv_shard(config))
        self._slopes = local_slopes(config)  # (heads of this process,), float32; None: no ALiBi
        self._given = plan if prompt_len is None else plan.resolve(prompt_len)
        self.plan = self._given
        self.page_size = page_size
        self.kv_dtype = kv_dtype
        most = 0 if kv_dtype is None else 2**31 - 1
        self.exact_sink = check_int("exact_sink", exact_sink, 0, most)
        self.exact_window = check_int("exact_window", exact_window, 0, most)
        self.rotate_keys = rotate_keys
        self.block = _closed_block()  # of the attached model that was called with this cache last
        super().__init__(layers=[RazorLayer(prefill == "dense") for _ in range(sizes.num_layers)])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        layer, first = self.layers[layer_idx], self.layers[0]
        if not self.block.open:
            raise ValueError(
                f"{CACHE}: expected a RazorCache inside the block of `with attach(model, plan):`, got one in a model "
                "that runs another attention"
            )
        if first.pending or layer.pending:
            raise RuntimeError(
                f"{CACHE}: expected a model that attends to every layer of its RazorCache, got one that did not or was "
                "interrupted; reset() the cache"
            )
        new = key_states.shape[2]
        in_step = layer.columns + new == first.columns if layer_idx else self._in_step
        if not in_step:
            raise RuntimeError(_OUT_OF_STEP)
        if key_states.shape[1] != self.plan.num_kv_heads:
            raise ValueError(
                f"plan: expected {key_states.shape[1]} kv heads like the model's keys, got {self.plan.num_kv_heads}"
            )
        if (held := self._layer_cache(layer_idx, key_states, value_states)).batch_size != key_states.shape[0]:
            raise ValueError(
                f"{CACHE}: expected {held.batch_size} sequences like the RazorCache holds, got {key_states.shape[0]}; "
                "cache.batch_repeat_interleave(n) repeats each n times"
            )
        return layer.update(key_states, value_states)

    def _layer_cache(self, layer_idx: int, key: Tensor, value: Tensor) -> LayerCache:
        """The cache of one layer; made for the first tokens, of which `key` and `value` are some."""
        layer = self.layers[layer_idx]
        if layer.cache is None:
            self.plan = self.plan.resolve(key.shape[2])
            layer.cache = LayerCache(
                *self.plan.layer(layer_idx),
                batch_size=key.shape[0],
                head_dim=key.shape[3],
                dtype=value.dtype if self.kv_dtype is None else self.kv_dtype,
                device=key.device,
                page_size=self.page_size,
                alibi_slopes=self._slopes,
                exact_sink=self.exact_sink,
                exact_window=self.exact_window,
                rotate_keys=self.rotate_keys,
            )
            layer.is_initialized = True
        return layer.cache

    def fill(self, layer_idx: int, key: Tensor, value: Tensor) -> None:
        """Store what a dense prefill of another cache computed, as the first tokens of a layer, without padding.

        Args:
            layer_idx: layer.
            key: (batch, num_kv_heads, tokens, head_dim), f32 | bf16 | f16. Rotated keys.
            value: (batch, num_kv_heads, tokens, head_dim).
        """
        self._layer_cache(layer_idx, key, value).append(key.to(value.dtype), value)
        self.layers[layer_idx].columns = key.shape[2]

    def reset(self) -> None:
        """Forget everything, the length rule's windows too, and give the memory back."""
        self.plan = self._given
        super().reset()  # type: ignore[no-untyped-call]

    def fork(self, n: int = 1) -> list[RazorCache]:
        """Caches that go on from here, each its own way, as after this cache's calls; see `LayerCache.fork`.

        They share pages until one of them writes there. For batched questions repeat the sequences instead,
        `cache.fork()[0]` and then `batch_repeat_interleave(n)`, which shares them as well.

        Args:
            n: forks.

        Returns:
            n caches.

        Raises:
            ValueError: n: expected an integer >= 1, got 0
            RuntimeError: RazorCache: expected all layers to have seen the same tokens, got layers out of step ...
        """
        forks = [copy.copy(self) for _ in range(check_int("n", n, 1))]
        self._check_in_step()
        for fork in forks:
            fork.layers = [copy.copy(layer) for layer in self.layers]
        for i, layer in enumerate(self.layers):
            if layer.cache is not None:
                for fork, cache in zip(forks, layer.cache.fork(n), strict=True):
                    fork.layers[i].cache = cache
        return forks

    def save(self, path: PathLike, model: PreTrainedModel | PreTrainedConfig) -> None:
        """Write the cache to a safetensors file, atomically: pages in use, nothing else of the pools.

        Args:
            path: file to write.
            model: the model that filled the cache, whose weights the file then asks for; or its configuration, if
                sizes, vocabulary and positions shall do.

        Raises:
            ValueError: RazorCache: expected tokens to save, got none
        """
        self._check_in_step()
        layers = [layer.cache for layer in self.layers if layer.cache is not None]
        if len(layers) < len(self.layers):
            raise ValueError("RazorCache: expected tokens to save, got none")
        prefill = "dense" if self.layers[0].dense else "streaming"
        kv_dtype = None if self.kv_dtype is None else "int4" if self.kv_dtype == "int4" else "int8"
        columns = self.layers[0].columns
        settings = prefill, self.page_size, kv_dtype, self.exact_sink, self.exact_window, self.rotate_keys, columns
        write_cache(path, SavedCache(self.plan, self._given, *settings, layers), model)

    @classmethod
    def load(
        cls,
        path: PathLike,
        model: PreTrainedModel | PreTrainedConfig,
        plan: Plan | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> RazorCache:
        """Read what `save` wrote; going on is then, to the bit, as if the cache had never left memory.

        Refused is a file that was changed or cut, or that holds anything that does not fit; one of another plan; and
        one of another model: sizes, vocabulary and positions always count, and where both the file and `model` know
        weights, a sample of each of these.

        Args:
            path: file to read.
            model: the model that will go on, or its configuration.
            plan: that the cache must follow, as it was given or resolved; None takes the file's.
            device: where the cache lives; None: the model's device, or "cpu".

        Returns:
            The cache.

        Raises:
            ValueError: plan: expected Plan(...) 1c0e8a52 like book.safetensors, got Plan(...) 92ab3f10
        """
        place = getattr(model, "device", "cpu") if device is None else device
        saved = read_cache(path, model, plan, place)
        named = ("prefill", "page_size", "kv_dtype", "exact_sink", "exact_window", "rotate_keys")
        options: dict[str, Any] = {name: getattr(saved, name) for name in named}
        cache = cls(config_of(model), saved.given, **options)
        cache.plan = saved.plan
        for layer, held in zip(cache.layers, saved.layers, strict=True):
            layer.cache, layer.columns, layer.is_initialized = held, saved.columns, True
        return cache

    @property
    def nbytes(self) -> int:
        """Bytes of all layers by themselves, what `Plan.kv_bytes` promises; see `LayerCache.nbytes`."""
        return sum(layer.cache.nbytes for layer in self.layers if layer.cache is not None)

    @property
    def pool_nbytes(self) -> int:
        """Bytes that this cache and its forks hold together, each page once; see `LayerCache.pool_nbytes`."""
        return sum(layer.cache.pool_nbytes for layer in self.layers if layer.cache is not None)

    @property
    def _in_step(self) -> bool:
        return all(layer.columns == self.layers[0].columns for layer in self.layers)

    def _check_in_step(self) -> None:
        if not self._in_step:
            raise RuntimeError(_OUT_OF_STEP)


_OUT_OF_STEP = (
    "RazorCache: expected all layers to have seen the same tokens, got layers out of step after a forward pass that "
    "was interrupted; reset() the cache"
)


def cache_bytes(cache: Cache) -> int:
    """Bytes that a transformers cache holds: ours says so itself, of another one the keys and values are added up."""
    if isinstance(cache, RazorCache):
        return cache.nbytes
    kept: list[Any] = list(cache.layers)  # with keys and values once they hold any
    return sum(tensor.nbytes for layer in kept for tensor in (layer.keys, layer.values))
