# SPDX-License-Identifier: Apache-2.0
"""AttentionSwitch: a model's decoder uses another attention function for a while, and its own again afterwards."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .forwards import ReplacedForwards, find_forward, forward_places
from .models import text_config

_lock = threading.RLock()


@dataclass
class _Base:
    """What a switched model had before, and who has switched it since."""

    attention: str
    places: list[tuple[nn.Module, str]]  # where forwards are replaced: layers, and the name among their attributes
    forwards: list[Any]  # what stood in these places; None: nothing, so that the class's was used
    switches: list[AttentionSwitch]  # open ones, the last one is in effect
    thread: int


_switched: dict[int, _Base] = {}  # id of the decoder's configuration, which a switch keeps alive


class AttentionSwitch:
    """Context manager: a model's decoder uses the attention function `name` inside it, and its own again afterwards.

    Several may be open for one model, in one thread: the one that was entered last is in effect, and they may be left
    in any order.

    Raises:
        NotImplementedError: model: expected one that uses AttentionInterface, got CodeGenForCausalLM
        ValueError: model: expected one that no other thread has switched to another attention, got one that uses razor
    """

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        if not isinstance(model, nn.Module) or not hasattr(model, "set_attn_implementation"):
            raise TypeError(f"model: expected a transformers PreTrainedModel, got {type(model).__name__}")
        self.model, self.name = model, name
        self.config: PreTrainedConfig = text_config(model.config)

    def __enter__(self) -> PreTrainedModel:
        with _lock:
            base = _switched.get(id(self.config))
            if base is not None and base.thread != threading.get_ident():
                raise ValueError(
                    "model: expected one that no other thread has switched to another attention, got one that uses "
                    f"{base.switches[-1].name}"
                )
            if base is None:
                base = self._base()
                _switched[id(self.config)] = base
            base.switches.append(self)
            try:
                self._apply(base)
            except BaseException:
                self._leave(base)
                raise
        return self.model

    def __exit__(self, *error: object) -> None:
        with _lock:
            self._leave(_switched[id(self.config)])

    def _base(self) -> _Base:
        places: list[tuple[nn.Module, str]] = []
        if find_forward(self.config) is not None:
            places = forward_places(self.model, self.config)
        elif not self.model._can_set_attn_implementation():
            raise NotImplementedError(
                f"model: expected one that uses AttentionInterface, got {type(self.model).__name__}"
            )
        own = [vars(layer).get(key) for layer, key in places]
        return _Base(self.config._attn_implementation, places, own, [], threading.get_ident())

    def _leave(self, base: _Base) -> None:
        base.switches.remove(self)
        if not base.switches:
            del _switched[id(self.config)]
        self._apply(base)

    def _apply(self, base: _Base) -> None:
        """Make the model use what the last open switch wants, or what it had before."""
        name = base.switches[-1].name if base.switches else base.attention
        if not base.places:
            self._set(name)
            return
        forward = find_forward(self.config)
        assert forward is not None  # there are places only then
        for (layer, key), own in zip(base.places, base.forwards, strict=True):
            if base.switches:
                vars(layer)[key] = partial(forward, layer, name)
            elif own is None:
                vars(layer).pop(key, None)
            else:
                vars(layer)[key] = own
        self.config._attn_implementation_internal = ReplacedForwards(name) if base.switches else name

    def _set(self, name: str) -> None:
        wanted: Any = name
        if self.config is not self.model.config:  # leave a vision tower alone
            wanted = {
                key: name for key in self.model.config.sub_configs if getattr(self.model.config, key) is self.config
            }
        self.model.set_attn_implementation(wanted)
