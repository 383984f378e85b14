# SPDX-License-Identifier: Apache-2.0
"""msmodelslim's `ra_compression` under its own names: change the import line of a script, keep the rest.

    from razor_attention.ra_compression import RACompressConfig, RACompressor
    RACompressor(model, RACompressConfig(theta=0.00001, alpha=100)).get_alibi_windows("win.pt")

    from razor_attention.ra_compression import RARopeCompressConfig, RARopeCompressor
    RARopeCompressor(model, tokenizer, RARopeCompressConfig()).get_compress_heads("heads.pt")

Needs transformers 5 (`pip install 'razor-attention[hf]'`); models in any floating dtype. Its defects, one by one:
kept or mended as the table in COMPATIBILITY.md says.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from . import files
from .heads import HeadScores
from .hf import find_heads, find_windows
from .hf.models import Tokenizer, geometry, text_config

__all__ = ["RACompressConfig", "RACompressor", "RARopeCompressConfig", "RARopeCompressor"]

_PROBE_IDS = range(10000, 12501)  # msmodelslim's vocabulary of the probe


@dataclass
class RACompressConfig:
    """Parameters of the window formula.

    Args:
        theta: float, [1e-5, 1e-3]; bound on an attention weight beyond the window.
        alpha: int, [0, 10000]; margin on the logit, divided by the slope.

    Raises:
        TypeError: alpha: expected an int, got float
        ValueError: theta: expected a number in [1e-05, 0.001], got 0.002
    """

    theta: float = 0.00001
    alpha: int = 100

    def __post_init__(self) -> None:
        _check_number("alpha", self.alpha, int, 0, 10000)
        _check_number("theta", self.theta, float, 0.00001, 0.001)


@dataclass
class RARopeCompressConfig:
    """Shares of the kv heads that stay full.

    Args:
        induction_head_ratio: float, [0, 1]; by induction score.
        echo_head_ratio: float, [0, 1]; by echo score.

    Raises:
        TypeError: induction_head_ratio: expected a float, got int
        ValueError: echo_head_ratio: expected a number in [0, 1], got 1.1
    """

    induction_head_ratio: float = 0.14
    echo_head_ratio: float = 0.01

    def __post_init__(self) -> None:
        _check_number("induction_head_ratio", self.induction_head_ratio, float, 0, 1)
        _check_number("echo_head_ratio", self.echo_head_ratio, float, 0, 1)


class RACompressor:
    """Windows of the heads of an ALiBi model, msmodelslim's integers; see `find_windows` for better ones.

    A Falcon whose kv heads are fewer than its query heads has no such integers, and is refused.

    Args:
        model: an ALiBi model in memory: BLOOM, MPT, Falcon with alibi, Baichuan-13B, or a module with such projections.
        cfg: theta and alpha.

    Raises:
        TypeError: model: expected a Module, got str
        ValueError: model: expected a config with hidden_size, got none
    """

    def __init__(self, model: nn.Module, cfg: RACompressConfig) -> None:
        _check_type("model", model, nn.Module)
        _check_type("cfg", cfg, RACompressConfig)
        self.model, self.cfg = model, cfg
        head_dim = _config_size(model, "hidden_size") // _config_size(model, "num_attention_heads")
        if not 1 <= head_dim <= 1000:
            raise ValueError(f"model: expected a head_dim in [1, 1000], got {head_dim}")

    def get_alibi_windows(self, save_path: str) -> None:
        """Write the window of every head, tokens, as one int64 tensor (num_attention_heads,).

        Args:
            save_path: a .pt file in an existing folder; replaced if it is there.

        Raises:
            ValueError: save_path: expected a file name ending in .pt, got win.txt
        """
        _check_path(save_path)
        files.save_windows(find_windows(self.model, theta=self.cfg.theta, alpha=self.cfg.alpha), save_path)


class RARopeCompressor:
    """Retrieval heads of a RoPE model, by msmodelslim's scores and selection.

    The probe's ids are msmodelslim's, 10000..12500, where the vocabulary has them, else all but the special tokens.
    After `get_compress_heads`, `scores` has the scores of all heads.

    Args:
        model: a transformers decoder that uses AttentionInterface.
        tokenizer: its tokenizer.
        cfg: shares.

    Raises:
        TypeError: tokenizer: expected a PreTrainedTokenizerBase, got str
    """

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, cfg: RARopeCompressConfig) -> None:
        _check_type("model", model, nn.Module)
        _check_type("cfg", cfg, RARopeCompressConfig)
        _check_type("tokenizer", tokenizer, Tokenizer)
        self.hidden_size = _config_size(model, "hidden_size")
        if not hasattr(model, "set_attn_implementation"):
            raise ValueError(f"model: expected a transformers PreTrainedModel, got {type(model).__name__}")
        sizes = geometry(model.config)  # type: ignore[arg-type]
        self.model, self.tokenizer, self.cfg = model, tokenizer, cfg
        self.num_attention_heads, self.num_key_value_heads = sizes.num_heads, sizes.num_kv_heads
        self.num_kv_per_group = sizes.num_heads / sizes.num_kv_heads
        self.scores: HeadScores | None = None

    def get_compress_heads(self, save_path: str) -> None:
        """Write {'prefix_matching': {layer: [kv_head, ...]}, 'copying': ...}, our induction and echo heads.

        Args:
            save_path: a .pt file in an existing folder; replaced if it is there.

        Raises:
            ValueError: save_path: expected a file name ending in .pt, got heads.txt
        """
        _check_path(save_path)
        vocabulary = _PROBE_IDS if text_config(self.model.config).vocab_size >= _PROBE_IDS.stop else None  # type: ignore[arg-type]
        self.scores = find_heads(self.model, self.tokenizer, vocabulary=vocabulary)  # type: ignore[arg-type]
        files.save_heads(self.scores.select(self.cfg.induction_head_ratio, self.cfg.echo_head_ratio), save_path)


def _check_type(name: str, value: object, wanted: type) -> None:
    if not isinstance(value, wanted):
        raise TypeError(f"{name}: expected a {wanted.__name__}, got {type(value).__name__}")


def _config_size(model: nn.Module, name: str) -> int:
    value = getattr(getattr(model, "config", None), name, None)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"model: expected a config with {name}, got {'none' if value is None else repr(value)}")
    return value


def _check_number(name: str, value: object, kind: type, least: float, most: float) -> None:
    if type(value) is not kind:  # a bool is no int here, and an int no float
        raise TypeError(f"{name}: expected {'an int' if kind is int else 'a float'}, got {type(value).__name__}")
    if not least <= value <= most:  # type: ignore[operator]  # refuses NaN as well
        raise ValueError(f"{name}: expected a number in [{least}, {most}], got {value}")


def _check_path(path: str) -> None:
    """msmodelslim's rules, without those that keep an owner from replacing a file of their own."""
    _check_type("save_path", path, str)
    file = Path(path)
    if not path:
        raise ValueError("save_path: expected a path, got ''")
    if not re.fullmatch(r"[\w/.-]+", path, re.ASCII):
        raise ValueError(f"save_path: expected letters, digits, '_', '-', '.' and '/' only, got {path!r}")
    if not path.endswith(".pt") or file.suffix != ".pt":
        raise ValueError(f"save_path: expected a file name ending in .pt, got {file.name}")
    if len(file.name) > 255 or len(path) > 4096:
        raise ValueError(f"save_path: expected at most 255 characters in a name and 4096 in all, got {len(path)}")
    if file.is_symlink() or file.is_dir():
        raise ValueError(f"save_path: expected a file, got a {'symbolic link' if file.is_symlink() else 'folder'}")
    if not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
        raise ValueError(f"save_path: expected a file in a writable folder, got {path}")
    if file.exists() and os.geteuid() not in (0, file.stat().st_uid):
        raise ValueError(f"save_path: expected a file of yours, got one of another user, {path}")
