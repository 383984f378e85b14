# SPDX-License-Identifier: Apache-2.0
"""What we need to know of a transformers model before we touch it, and the models we refuse."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed import is_torchelastic_launched
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .alibi import alibi_architecture
from .checkpoint import from_folder
from .masks import refuse_other_mask
from .names import MODEL_MAPPING, DistributedConfig, layer_kinds

T = TypeVar("T")

# By model_type: what the layers of a family do that our attention function does not, or cannot see.
_REFUSED = {
    "bigbird_pegasus": "layers that do not say that they are causal",
    "diffllama": "differential attention, which attends twice to one call's keys",
    "doge": "attention with a mask of its own for each head",
    "git": "tokens of an image that see each other",
    "jetmoe": "keys repeated for each expert after they were cached",
    "mllama_text_model": "layers of cross attention to an image",
    "openai-gpt": "no cache",
}
_ONE_FOR_ALL = {
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_size",
    "kv_lora_rank",
    "sliding_window",
}
# Encoders by default, which read both ways; with is_decoder they are decoders like any other.
_ENCODERS = {
    *("bert", "bert-generation", "camembert", "data2vec-text", "electra", "ernie", "roberta", "roberta-prelayernorm"),
    *("roc_bert", "xlm-roberta", "xlm-roberta-xl", "xmod"),
}
Tokenizer = PreTrainedTokenizerBase  # for rooms that do not import transformers


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes of a decoder's attention."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The decoder's configuration: the config itself, or the text part of a multi-modal one."""
    return config.get_text_config(decoder=True)


def geometry(config: PreTrainedConfig) -> Geometry:
    """Attention sizes of a model; refuses models whose layers do not all keep every token of their own.

    Raises:
        NotImplementedError: config: expected only full_attention layers, got sliding_attention; ...
    """
    if getattr(config, "is_encoder_decoder", False):
        raise NotImplementedError("config: expected a decoder-only model, got an encoder-decoder one")
    text = text_config(config)
    if reason := _REFUSED.get(text.model_type) or _REFUSED.get(config.model_type):
        raise NotImplementedError(f"config: expected plain causal attention, got {text.model_type}: {reason}")
    if text.model_type in _ENCODERS and not getattr(text, "is_decoder", False):
        raise NotImplementedError(
            f"config: expected is_decoder True, got False; {text.model_type} then reads both ways"
        )
    if varied := sorted(_ONE_FOR_ALL & set(getattr(text, "per_layer_attributes", None) or ())):
        raise NotImplementedError(
            f"config: expected the same sizes in all layers, got {', '.join(varied)} layer by layer"
        )
    if getattr(text, "num_attention_heads", None) is None or getattr(text, "num_hidden_layers", None) is None:
        got = f"{text.model_type} without num_attention_heads or num_hidden_layers"
        raise NotImplementedError(f"config: expected a decoder with layers of attention heads, got {got}")
    if getattr(text, "kv_lora_rank", None):
        raise NotImplementedError(
            f"config: expected keys and values of each head, got latent attention ({text.model_type}, kv_lora_rank "
            f"{text.kv_lora_rank}), which caches one latent row for all heads"
        )
    if kinds := set(layer_kinds(text)) - {"full_attention"}:
        raise NotImplementedError(
            f"config: expected only full_attention layers, got {', '.join(sorted(kinds))}; "
            "such layers keep a window, a state or a shared cache of their own"
        )
    if shared := getattr(text, "num_kv_shared_layers", None):
        raise NotImplementedError(
            f"config: expected keys and values of each layer, got {shared} layers that share theirs"
        )
    if softcap := getattr(text, "attn_logit_softcapping", None):
        raise NotImplementedError(
            f"config: expected logits as they are, got attn_logit_softcapping {softcap}; razor attention caps none"
        )
    num_heads, alibi = int(text.num_attention_heads), alibi_architecture(text)
    num_kv_heads = int(getattr(text, "num_key_value_heads", None) or num_heads)
    if alibi is not None:
        num_kv_heads = alibi.num_kv_heads(text, num_heads)
    elif getattr(text, "multi_query", False):  # GPT-BigCode
        num_kv_heads = 1
    return Geometry(
        num_layers=int(text.num_hidden_layers),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=int(getattr(text, "head_dim", None) or text.hidden_size // num_heads),
    )


@cache
def check_interface(config_class: Any) -> None:
    """Refuse models that ignore their attention function but would still take our mask, such as BLOOM.

    Raises:
        NotImplementedError: model: expected one that uses AttentionInterface, got BloomModel
    """
    if config_class in MODEL_MAPPING:
        models: Any = MODEL_MAPPING[config_class]
        for model in models if isinstance(models, tuple) else (models,):
            if not model._can_set_attn_implementation():
                raise NotImplementedError(f"model: expected one that uses AttentionInterface, got {model.__name__}")


def load_geometry(folder: Path) -> tuple[Geometry, torch.dtype]:
    """Attention sizes and dtype of a local checkpoint, from its configuration alone."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    return geometry(config), getattr(text_config(config), "dtype", None) or torch.float32


def load_model(folder: Path, dtype: str, *, parallel: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a local checkpoint, ready to generate; nothing is fetched.

    Args:
        folder: of the checkpoint.
        dtype: of the weights, such as "bfloat16" or "auto".
        parallel: under torchrun each process gets its part of the model (tensor parallelism).

    Raises:
        ValueError: MODEL: expected a model and its tokenizer in my-model, got ...
    """
    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True}
    if parallel and is_torchelastic_launched():
        options["distributed_config"] = DistributedConfig(tp_plan="auto")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = from_folder(AutoModelForCausalLM, folder, **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"MODEL: expected a model and its tokenizer in {folder}, got {error}") from error
    model.eval()
    return model, tokenizer


def inside(running: ContextVar[T], name: str, function: str) -> T:
    """What an attention function of ours shares with the function that it serves; refuses models built with its name.

    Raises:
        ValueError: attn_implementation: expected 'razor_probe' inside find_heads alone, got a forward pass of its own
    """
    shared = running.get(None)
    if shared is None:
        raise ValueError(
            f"attn_implementation: expected {name!r} inside {function} alone, got a forward pass of its own"
        )
    return shared


def refuse_unsupported(
    module: nn.Module, dropout: float, options: dict[str, Any], mask: Tensor | None, tokens: int = 0
) -> None:
    """Raise for what an attention layer asks for that our attention does not do, so that nothing is ignored silently.

    Args:
        module: the layer.
        dropout: it asks for.
        options: other keyword arguments of its call.
        mask: it received.
        tokens: of the sequence so far, padding and new ones included; a sliding window at least as wide is none.
    Raises:
        NotImplementedError: softcap: expected None, got 50.0; razor attention does not support it
    """
    refuse_other_mask(mask)
    window = options.get("sliding_window")
    if window is not None and (not isinstance(window, int) or window < tokens or not tokens):
        raise NotImplementedError(
            f"sliding_window: expected None or one wider than the text, got {window}; "
            "razor attention does not support it"
        )
    for name in ("softcap", "s_aux", "position_bias", "head_mask"):
        if options.get(name) is not None:
            value = options[name] if isinstance(options[name], int | float) else "a tensor"
            raise NotImplementedError(f"{name}: expected None, got {value}; razor attention does not support it")
    if options.get("output_attentions"):
        raise NotImplementedError(
            "output_attentions: expected False, got True; razor attention builds no attention map"
        )
    if dropout:
        raise NotImplementedError(f"dropout: expected 0, got {dropout}; call model.eval() first")
    if not getattr(module, "is_causal", True):
        raise NotImplementedError(f"model: expected causal attention, got {type(module).__name__} which is not")
