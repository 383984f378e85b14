# SPDX-License-Identifier: Apache-2.0
"""The names of transformers that differ between its versions, or may; every other module asks this one.

Names of the package's top level (`PreTrainedModel`, `AutoConfig`, ...) are stable and imported where they are used.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

from transformers import CONFIG_MAPPING as CONFIG_MAPPING
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING as MODEL_FOR_CAUSAL_LM_MAPPING
from transformers import MODEL_MAPPING as MODEL_MAPPING
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache as Cache
from transformers.cache_utils import CacheLayerMixin as CacheLayerMixin
from transformers.distributed.configuration_utils import DistributedConfig as DistributedConfig
from transformers.masking_utils import causal_mask_function as causal_mask_function
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer as GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as ALL_ATTENTION_FUNCTIONS

CACHE_NAMES = ("cache", "past_key_values")  # of a cache argument: from 5.24 on, and before
CACHE = next(name for name in CACHE_NAMES if name in inspect.signature(create_causal_mask).parameters)


def rename_cache(options: dict[str, Any], name: str = CACHE) -> dict[str, Any]:
    """Keyword arguments with the cache among them called `name`, under whichever name it was given.

    Args:
        options: keyword arguments of a caller, left as they are.
        name: what the function that gets them calls its cache.
    Returns:
        The same dict where nothing changes, else a new one.
    Raises:
        ValueError: cache, past_key_values: expected one of the two, got both
    """
    given = [key for key in CACHE_NAMES if key in options]
    values = [options[key] for key in given if options[key] is not None]
    if len(values) > 1:
        raise ValueError(f"{', '.join(CACHE_NAMES)}: expected one of the two, got both")
    if given in ([], [name]):
        return options
    rest = {key: value for key, value in options.items() if key not in given}
    return rest | {name: values[0] if values else None}


def pop_cache(options: dict[str, Any]) -> Any:
    """Take the cache out of keyword arguments, whichever name it has; None: there is none."""
    given = [options.pop(key) for key in CACHE_NAMES if key in options]
    return next((value for value in given if value is not None), None)


def output_cache(output: Any) -> Any:
    """The cache in the output of a forward pass or of `generate`."""
    return getattr(output, CACHE)


@cache
def cache_parameter(forward: Callable[..., Any]) -> tuple[str, int] | None:
    """Name and place (the module itself not counted) of the cache among the parameters of a class's forward.

    A model with code of its own may use another name than its transformers. None: it takes no cache by name.
    """
    parameters = list(inspect.signature(forward).parameters)[1:]
    return next(((name, parameters.index(name)) for name in CACHE_NAMES if name in parameters), None)


def layer_kinds(text: PreTrainedConfig) -> list[str]:
    """What each layer of a decoder keeps: "full_attention" for every token, another word for anything else.

    A sliding window as wide as all positions of the model never acts: such a layer keeps every token.

    Args:
        text: configuration of the decoder.
    """
    longest, window = getattr(text, "max_position_embeddings", None), getattr(text, "sliding_window", None)
    acts = isinstance(window, int) and (longest is None or window < longest)
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        # Mistral has no layer_types: a window in the config is a window in every layer.
        everywhere = window is not None and getattr(text, "use_sliding_window", True)
        kinds = ["sliding_attention" if everywhere else "full_attention"] * int(text.num_hidden_layers)
    return ["full_attention" if kind == "sliding_attention" and not acts else kind for kind in kinds]
