# SPDX-License-Identifier: Apache-2.0
"""attach: inside its block a model generates with a compressed cache, outside it the model is as before."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from contextlib import ContextDecorator, ExitStack
from typing import Any, NoReturn

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..plan import Plan
from . import attention as _attention  # noqa: F401  # registers "razor" with transformers
from .cache import Block, KvDtype, Prefill, RazorCache
from .names import CACHE, cache_parameter, rename_cache
from .switch import AttentionSwitch

_PROMPTS = ("inputs", "input_ids", "inputs_embeds")


class _NotCopied:
    """Part of an attached model: it is neither copied nor pickled, and neither is a model that holds it."""

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise NotImplementedError(
            "model: expected one that is not attached to copy or pickle, got one inside attach or with DuoAttention "
            "enabled; do it before or after"
        )


class attach(_NotCopied, ContextDecorator):
    """Inside this context a model runs with a compressed cache; outside it the model is as before.

    Each `generate` call, and each call of the model without a cache, gets a fresh RazorCache for its prompt (the
    longest of a batch, where the plan has a length rule). Give it one as `cache` or `past_key_values`, whatever the
    version of transformers, to go on from what that one holds.

    Blocks of one model may nest and be left in any order: the one entered last is in effect. All are entered in one
    thread; others may generate inside, and are waited for when the block is left. Entering returns the model.

    Args:
        model: a decoder model that uses AttentionInterface (Llama, Qwen2, Qwen3, Mistral, Baichuan as in baichuan.py,
            ...), or BLOOM, MPT or Falcon with ALiBi.
        plan: policy of every (layer, kv head).
        prefill: "dense" or "streaming", see RazorCache.
        kv_dtype: torch.int8 (or "int8"), "int4" or None, see RazorCache.
        exact_sink, exact_window: tokens that a quantised cache also keeps as they came, see RazorCache.
        rotate_keys: see RazorCache.

    Raises:
        ValueError: plan: expected 4 layers x 4 kv heads like the model, got 32 x 8
        ValueError: model: expected one that no other thread has switched to another attention, got one that uses razor
        NotImplementedError: model: expected one that uses AttentionInterface, got CodeGenForCausalLM
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plan: Plan,
        *,
        prefill: Prefill = "dense",
        kv_dtype: KvDtype = None,
        exact_sink: int = 0,
        exact_window: int = 0,
        rotate_keys: bool = False,
    ) -> None:
        self._entered = True  # until everything is checked: an error says enough
        self._switch = AttentionSwitch(model, "razor")
        if not callable(getattr(model, "generate", None)):
            raise TypeError(f"model: expected one that can generate, got {type(model).__name__}")
        # Refuses what it cannot do before the model is touched.
        if "PREFIX_TUNING" in str(getattr(getattr(model, "active_peft_config", None), "peft_type", "")):
            raise NotImplementedError(
                "model: expected one without keys and values of its own, got one with prefix tuning, which brings a "
                "cache of its prefix"
            )
        self._options: dict[str, Any] = {"prefill": prefill, "kv_dtype": kv_dtype, "rotate_keys": rotate_keys}
        self._options |= {"exact_sink": exact_sink, "exact_window": exact_window}
        RazorCache(model.config, plan, **self._options)
        self.model, self.plan = model, plan
        self._block = Block(is_open=False)
        self._running: list[int] = []  # threads in `generate`
        self._idle = threading.Condition()
        self._entered = False

    def __enter__(self) -> PreTrainedModel:
        self._entered = True
        if self._block.open:
            raise ValueError("attach: expected a block that is not open, got one inside itself; call attach again")
        with ExitStack() as undo:
            undo.enter_context(self._switch)
            self._block = Block()
            undo.callback(self._block.close)
            for module in self.model.modules():
                if isinstance(module, PreTrainedModel):
                    hook = module.register_forward_pre_hook(self._before_call, with_kwargs=True)
                    undo.callback(hook.remove)
            self._generate = _Generate.of(self.model)
            self._generate.blocks.append(self)
            undo.callback(self._generate.leave, self)
            self._undo = undo.pop_all()
        return self.model

    def __exit__(self, *error: object) -> None:
        try:
            self._wait()
        finally:
            self._undo.close()

    def __del__(self) -> None:
        if not getattr(self, "_entered", True):
            warnings.warn(
                "attach: expected `with attach(model, plan):`, got a call without `with`, which changes nothing",
                RuntimeWarning,
                stacklevel=2,
            )

    def _recreate_cm(self) -> attach:
        return self

    def _wait(self) -> None:
        """Until no other thread generates: with another attention it would go on wrongly, or never end its stream."""
        with self._idle:
            if any(thread != threading.get_ident() for thread in self._running):
                warnings.warn(
                    "attach: expected threads that generate to end inside the block, got one that is still running; "
                    "waiting for it (join it, or read its stream, inside the block)",
                    RuntimeWarning,
                    stacklevel=3,
                )
                self._idle.wait_for(lambda: all(thread == threading.get_ident() for thread in self._running))

    def _cache(self, prompt_len: int | None) -> RazorCache:
        return RazorCache(self.model.config, self.plan, prompt_len=prompt_len, **self._options)

    def _generate_compressed(self, generate: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's own `generate` with a RazorCache."""
        kwargs = dict(rename_cache(kwargs))
        config = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
        if not _wants_cache(self._switch.config, kwargs.get("use_cache"), config, self.model.generation_config):
            raise ValueError("use_cache: expected True with razor attention, got False")
        kwargs["use_cache"] = True
        if kwargs.get(CACHE) is None:
            kwargs[CACHE] = self._cache(_longest(args, kwargs))
        with self._idle:
            self._running.append(threading.get_ident())
        try:
            return generate(*args, **kwargs)
        finally:
            with self._idle:
                self._running.remove(threading.get_ident())
                self._idle.notify_all()

    def _before_call(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before each call of the model, or of a model in it: its cache by the right name, and a fresh one for none."""
        parameter = cache_parameter(type(module).forward)
        if parameter is None or self._generate.blocks[-1] is not self:
            return None
        name, place = parameter
        if len(args) > place:
            cache, changed = args[place], kwargs
        else:
            changed = rename_cache(kwargs, name)
            cache = changed.get(name)
        if cache is None and self._starts(module, changed):
            cache = self._cache(_longest(args, changed))
            if len(args) > place:
                args = (*args[:place], cache, *args[place + 1 :])
            else:
                changed = changed | {name: cache}
        if isinstance(cache, RazorCache):
            cache.block = self._block
        return args, changed

    def _starts(self, module: Any, kwargs: dict[str, Any]) -> bool:
        """Whether this call of the decoder, or of a model around it, wants a cache of its own."""
        config = module.config
        return config.get_text_config(decoder=True) is self._switch.config and _wants_cache(
            self._switch.config, kwargs.get("use_cache"), self._switch.config
        )


class _Generate(_NotCopied):
    """`generate` of an attached model: that of the block entered last, of those that are open."""

    def __init__(self, model: Any) -> None:
        self._attributes = vars(model)
        self._had_own, self._own = self._attributes.get("generate"), model.generate
        self.blocks: list[attach] = []

    @classmethod
    def of(cls, model: Any) -> _Generate:
        """The model's; put over its class's method, on this object alone, if it has none yet."""
        if not isinstance(vars(model).get("generate"), cls):
            vars(model)["generate"] = cls(model)
        return vars(model)["generate"]  # type: ignore[no-any-return]

    def leave(self, block: attach) -> None:
        self.blocks.remove(block)
        if not self.blocks:
            del self._attributes["generate"]
            if self._had_own is not None:
                self._attributes["generate"] = self._had_own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.blocks:  # a thread that starts late, or a shallow copy of the model, took this out of the block
            streamer: Any = kwargs.get("streamer")
            if hasattr(streamer, "end"):
                streamer.end()  # or its reader would wait for ever
            raise ValueError("generate: expected a call inside the block of attach, got one after it was left")
        return self.blocks[-1]._generate_compressed(self._own, args, kwargs)


def _wants_cache(text: Any, given: bool | None, *configs: Any) -> bool:
    """use_cache, decided as transformers does: the caller's word, then the first configuration that has one."""
    if given is None:
        if getattr(type(text), "use_cache", True) is False:  # MPT's way to begin with, nobody's choice
            return True
        given = next((use for use in (getattr(one, "use_cache", None) for one in configs) if use is not None), True)
    return bool(given)


def _longest(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Tokens of the longest prompt of a call's batch, padding not counted; None: nobody knows."""
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return int(mask.sum(1).max())
    prompt = next((x for x in (*args[:1], *map(kwargs.get, _PROMPTS)) if x is not None), None)
    return prompt.shape[1] if isinstance(prompt, Tensor) else None
