# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's configuration, and its weights one at a time: files are mapped, what is not read takes no memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..files import read_json
from .names import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

Reader = Callable[[], Tensor]
_NAMES = ("model.safetensors", "pytorch_model.bin")


def read_config(folder: Path) -> Any:
    """The configuration of a checkpoint; of one that transformers does not know, its config.json as attributes.

    Raises:
        ValueError: model: expected a folder with config.json, got my-model
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"model: expected a folder with config.json, got {folder}")
    record = read_json(folder / "config.json")
    known = record.get("model_type") in CONFIG_MAPPING
    return CONFIG_MAPPING[record["model_type"]].from_dict(record) if known else SimpleNamespace(**record)


def open_weights(folder: Path) -> dict[str, Reader]:
    """Readers of all tensors of a checkpoint by name: safetensors or .bin, one file or shards with an index.

    A tensor is a view of its mapped file; its pages leave memory with it.

    Raises:
        ValueError: model: expected model.safetensors or pytorch_model.bin, or their shards and index, in my-model, ...
    """
    for name in _NAMES:
        if (index := folder / f"{name}.index.json").is_file():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
                raise ValueError(f"{index}: expected 'weight_map', a dict of file names, got another one")
            if lacking := {shard for shard in shards.values() if not (folder / Path(shard).name).is_file()}:
                raise ValueError(f"model: expected the shard {min(lacking)} in {folder}, got an index without its file")
            return {key: partial(_read, folder / Path(shard).name, key) for key, shard in shards.items()}
        if (file := folder / name).is_file():
            return {key: partial(_read, file, key) for key in _keys(file)}
    raise ValueError(f"model: expected {' or '.join(_NAMES)}, or their shards and index, in {folder}, got none of them")


@contextmanager
def mapped_model(folder: Path) -> Iterator[PreTrainedModel]:
    """A model whose weights stay in files, each mapped for its own forward pass: those of its folder, if safetensors.

    Weights in .bin files are written anew to a temporary folder first, which takes as much room again.

    Raises:
        ValueError: model: expected a folder with config.json, got my-model
        ImportError: model: expected accelerate to be installed to run a model from its files, got none; ...
    """
    config = read_config(folder)
    if find_spec("accelerate") is None:
        raise ImportError(
            "model: expected accelerate to be installed to run a model from its files, got none; "
            "pip install 'razor-attention[hf]'"
        )
    if isinstance(config, SimpleNamespace):
        got = getattr(config, "model_type", "none")
        raise ValueError(f"model: expected a model_type that transformers knows, got {got} in {folder}")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"model: expected a causal language model in {folder}, got {config.model_type}; "
            "load it with its own class and give the model"
        )
    auto: Any = AutoModelForCausalLM  # untyped
    with torch.device("meta"):
        empty = auto.from_config(config)
    decoder = empty.base_model_prefix
    # The decoder's norm and the like in memory, all else on disk: with everything there, transformers before 5.23 would
    # never load a part to run it.
    places = {name: "disk" for name, _ in empty.named_children() if name != decoder}
    for name, part in getattr(empty, decoder).named_children():
        places[f"{decoder}.{name}"] = "disk" if isinstance(part, nn.ModuleList | nn.Embedding) else "cpu"
    with TemporaryDirectory() as scratch:
        options = {"dtype": "auto", "device_map": places, "offload_folder": scratch, "local_files_only": True}
        try:
            model = from_folder(auto, folder, **options)
        except OSError as error:
            raise ValueError(f"model: expected a checkpoint in {folder}, got {error}") from error
        yield model.eval()


def from_folder(auto: Any, folder: Path, **options: Any) -> Any:
    """`auto.from_pretrained`, but a weight that the checkpoint lacks is an error and not a random one.

    Raises:
        ValueError: model: expected the weight model.layers.0.self_attn.k_proj.weight in my-model, got none
    """
    model, info = auto.from_pretrained(folder, output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"model: expected the weight {missing[0]} in {folder}, got none")
    return model


def _keys(file: Path) -> list[str]:
    if file.suffix == ".bin":
        return list(_load_bin(file))
    try:
        with safe_open(file, framework="pt") as shard:
            return list(shard.keys())
    except SafetensorError as error:
        raise ValueError(f"{file}: expected a safetensors file, got {error}") from error


def _read(file: Path, key: str) -> Tensor:
    try:
        if file.suffix == ".bin":
            return _load_bin(file)[key]
        with safe_open(file, framework="pt") as shard:
            return shard.get_tensor(key)  # type: ignore[no-any-return]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{file}: expected the tensor {key}, got {error}") from error


def _load_bin(file: Path) -> dict[str, Tensor]:
    if file.stat().st_size > 4 and not is_zipfile(file):
        raise ValueError(f"{file}: expected torch's zip format, which can be mapped, got another; save it anew")
    try:
        return torch.load(file, map_location="cpu", mmap=True, weights_only=True)  # type: ignore[no-any-return]
    except OSError:
        raise
    except Exception as error:  # corrupt bytes raise anything; a forbidden object raises UnpicklingError
        raise ValueError(f"{file}: expected a torch file of plain tensors, got {type(error).__name__}") from error
