# SPDX-License-Identifier: Apache-2.0
"""A RazorCache on disk: one safetensors file of the pages in use, read back only into the model and plan it came from.

Metadata: format and version, the plan as given and as resolved, the model, and how the cache works. Tensors, of each
layer: pages in use, page table, seen, sums. The last tensor is a CRC-32 of the file up to itself: it tells a file that
was damaged or cut, not one that somebody forged. What is read is checked all the same, so that no file whatever makes
the cache read beyond its pages.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..cache import LayerCache
from ..checks import check_int, check_kv_dtype
from ..files import PathLike, write_atomic
from ..plan import Plan
from ..reference import row_width
from .alibi import model_slopes
from .models import geometry, text_config
from .parallel import kv_shard

_FORMAT, _VERSION = "razor-attention cache", "1"  # another version wherever the bytes of a page mean something else
_KEYS = ("plan", "given", "model", "weights", "prefill", "page_size", "kv_dtype",
         "exact_sink", "exact_window", "rotate_keys", "columns")  # fmt: skip
_NAMES = {torch.int64: "I64", torch.int32: "I32", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
          torch.int8: "I8", torch.uint8: "U8"}  # fmt: skip
_CHUNK = 16 << 20  # bytes
_SAMPLES = 64  # elements of each weight


@dataclass(frozen=True, slots=True)
class SavedCache:
    """What a file holds beside the model: all that a RazorCache is."""

    plan: Plan  # resolved
    given: Plan  # as it was given, perhaps with a length rule
    prefill: str
    page_size: int
    kv_dtype: str | None  # int8, int4 or None
    exact_sink: int  # tokens
    exact_window: int
    rotate_keys: bool
    columns: int  # tokens of the longest sequence, padding counted
    layers: list[LayerCache]


def write_cache(path: PathLike, saved: SavedCache, model: PreTrainedModel | PreTrainedConfig) -> None:
    """Write a cache, atomically; pages are copied some at a time."""
    config, weights = _describe(model)
    values = [_plan_values(saved.plan), _plan_values(saved.given), config, weights,
              saved.prefill, saved.page_size, saved.kv_dtype,
              saved.exact_sink, saved.exact_window, saved.rotate_keys, saved.columns]  # fmt: skip
    metadata = {"format": _FORMAT, "version": _VERSION}
    metadata |= {key: json.dumps(value) for key, value in zip(_KEYS, values, strict=True)}
    parts = [part for i, layer in enumerate(saved.layers) for part in _parts(f"layers.{i}.", layer)]
    parts.sort(key=lambda part: -part.dtype.itemsize)  # each then begins at a multiple of its element
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for part in parts:
        start, end = end, end + part.nbytes
        header[part.name] = {"dtype": _NAMES[part.dtype], "shape": part.shape, "data_offsets": [start, end]}
    header["checksum"] = {"dtype": "U8", "shape": [4], "data_offsets": [end, end + 4]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def write(file: BinaryIO) -> None:
        checksum = 0
        for data in _bytes(len(text).to_bytes(8, "little") + text, parts):
            checksum = zlib.crc32(data, checksum)
            file.write(data)
        file.write(checksum.to_bytes(4, "little"))

    write_atomic(path, write)


def read_cache(
    path: PathLike, model: PreTrainedModel | PreTrainedConfig, plan: Plan | None, device: torch.device | str
) -> SavedCache:
    """Read what `write_cache` wrote, everything checked before any of it is used.

    Raises:
        ValueError: book.safetensors: expected a file as it was written, got another checksum
    """
    try:
        with safe_open(Path(path), framework="pt") as file:
            metadata, names = file.metadata() or {}, set(file.keys())
            for key, wanted in (("format", _FORMAT), ("version", _VERSION)):
                if metadata.get(key) != wanted:
                    raise ValueError(f"{path}: expected {key} {wanted!r}, got {short(metadata.get(key))}")
            _check_sum(Path(path))
            values = _values(path, metadata)
            own, given = _check_plan(path, values, plan)
            _check_model(path, values, model)
            exact = {name: values[name] for name in ("exact_sink", "exact_window")}
            held = (*_TENSORS, "exact") if sum(exact.values()) else _TENSORS
            wanted_names = {f"layers.{i}.{name}" for i in range(own.num_layers) for name in held} | {"checksum"}
            if odd := sorted(names ^ wanted_names):
                has = "without it" if odd[0] in wanted_names else "with it"
                wanted = "the tensor" if odd[0] in wanted_names else "no tensor"
                raise ValueError(f"{path}: expected {wanted} {short(odd[0])}, got a file {has}")
            slopes, head_dim = model_slopes(text_config(config_of(model))), geometry(config_of(model)).head_dim
            layers: list[LayerCache] = []
            for i in range(own.num_layers):
                tensors = {name: file.get_tensor(f"layers.{i}.{name}") for name in held}
                seen = layers[0].seen.tolist() if layers else None
                stored = _check_layer(f"{path}: layers.{i}", tensors, own.layer(i), values, head_dim, seen)
                sizes = {"batch_size": len(tensors["seen"]), "head_dim": head_dim, "page_size": values["page_size"]}
                sizes |= exact | {"rotate_keys": values["rotate_keys"]}
                kv_dtype = "int4" if stored == torch.uint8 else stored
                layers.append(LayerCache(*own.layer(i), dtype=kv_dtype, device=device, alibi_slopes=slopes, **sizes))
                layers[-1]._fill(tensors)
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file, got {error}") from error
    settings = {key: values[key] for key in ("prefill", "page_size", "kv_dtype", "rotate_keys", "columns")} | exact
    return SavedCache(plan=own, given=given, layers=layers, **settings)


_TENSORS = ("seen", "page_table", "key_sum", "value_sum", "key_pages", "value_pages")


@dataclass(frozen=True, slots=True)
class _Part:
    """A tensor of the file: of `source` these pages, or all of it."""

    name: str
    source: Tensor
    pages: Tensor | None  # [num_pages] int64

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    @property
    def shape(self) -> list[int]:
        shape = list(self.source.shape)
        return shape if self.pages is None else [len(self.pages), *shape[1:]]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def _parts(prefix: str, layer: LayerCache) -> Iterator[_Part]:
    ids, page_table = layer._compact()
    pages = torch.from_numpy(ids).to(layer.seen.device)
    for name in (*_TENSORS, *(() if layer.exact is None else ("exact",))):
        source = page_table if name == "page_table" else getattr(layer, name)
        yield _Part(prefix + name, source, pages if name.endswith("_pages") else None)


def _bytes(header: bytes, parts: list[_Part]) -> Iterator[bytes | memoryview]:
    """The file, some pages at a time."""
    yield header
    for part in parts:
        if part.pages is None:
            pieces = iter([part.source])
        else:
            page_bytes = max(part.source[:1].nbytes, 1)
            pieces = (part.source[index] for index in torch.split(part.pages, max(_CHUNK // page_bytes, 1)))
        for piece in pieces:
            if piece.numel():
                yield piece.flatten().view(torch.uint8).cpu().numpy().data


def _check_sum(path: Path) -> None:
    checksum, left = 0, path.stat().st_size - 4
    with path.open("rb") as file:
        while left > 0:
            data = file.read(min(_CHUNK, left))
            if not data:
                break
            checksum, left = zlib.crc32(data, checksum), left - len(data)
        if file.read(4) != checksum.to_bytes(4, "little"):
            raise ValueError(f"{path}: expected a file as it was written, got another checksum")


def _values(path: PathLike, metadata: dict[str, str]) -> dict[str, Any]:
    if odd := sorted(set(metadata) ^ {"format", "version", *_KEYS}):
        raise ValueError(f"{path}: expected the metadata {', '.join(_KEYS)}, got other ones: {short(odd[0])}")
    try:
        values = {key: json.loads(metadata[key]) for key in _KEYS}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected metadata in JSON, got {error}") from error
    try:
        if check_int("page_size", values["page_size"], 16) % 16:
            raise ValueError(f"page_size: expected a multiple of 16, got {values['page_size']}")
        check_int("columns", values["columns"], 0)
        most = 0 if values["kv_dtype"] is None else 2**31 - 1
        (
            check_int("exact_sink", values["exact_sink"], 0, most),
            check_int("exact_window", values["exact_window"], 0, most),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    for key, known in (("prefill", ("dense", "streaming")), ("kv_dtype", (None, "int8", "int4")),
                       ("rotate_keys", (False, True))):  # fmt: skip
        if values[key] not in known:
            raise ValueError(f"{path}: expected {key} {' or '.join(map(repr, known))}, got {short(values[key])}")
    return values


def _plan_values(plan: Plan) -> list[Any]:
    tables = (plan.sink_size, plan.window_size, plan.compensate)
    return [*(table.tolist() for table in tables), plan.window_fraction, plan.provenance]


def _named(plan: Plan) -> str:
    """A plan and its policy's digest, since plans that differ may look alike."""
    digest = hashlib.blake2b(json.dumps(_plan_values(plan)[:4]).encode(), digest_size=4).hexdigest()
    return f"{plan!r} {digest}"


def _check_plan(path: PathLike, values: dict[str, Any], plan: Plan | None) -> tuple[Plan, Plan]:
    """The plan that the cache follows, and the one that it was given."""
    try:
        own, given = (Plan(*values[key]) for key in ("plan", "given"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    if own.window_fraction:
        raise ValueError(f"{path}: expected a plan that is resolved, got {own!r}")
    if not isinstance(plan, Plan | None):
        raise TypeError(f"plan: expected a Plan or None, got {type(plan).__name__}")
    if plan is not None and plan not in (own, given):
        raise ValueError(f"plan: expected {_named(given)} like {path}, got {_named(plan)}")
    return own, given


def config_of(model: PreTrainedModel | PreTrainedConfig) -> PreTrainedConfig:
    """Of a model or of a configuration, the configuration."""
    config = model if isinstance(model, PreTrainedConfig) else getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        raise TypeError(f"model: expected a transformers model or its configuration, got {type(model).__name__}")
    return config


def _describe(model: PreTrainedModel | PreTrainedConfig) -> tuple[dict[str, Any], str | None]:
    """What tells a model from others: sizes, vocabulary and positions, and a digest of its weights if it has them."""
    if (ranks := kv_shard(config_of(model))[1]) > 1:
        raise NotImplementedError(f"model: expected one process, got {ranks} ranks, each with a part of every cache")
    text, sizes = text_config(config_of(model)), geometry(config_of(model))
    facts = {name: getattr(text, name, None) for name in ("model_type", "hidden_size", "vocab_size", "rope_parameters")}
    facts |= {name: getattr(sizes, name) for name in ("num_layers", "num_heads", "num_kv_heads", "head_dim")}
    weights = None if isinstance(model, PreTrainedConfig) else _weights_digest(model)
    return json.loads(json.dumps(facts, default=str)), weights


@torch.no_grad()
def _weights_digest(model: PreTrainedModel) -> str | None:
    """Of some elements of every weight, so that another checkpoint of the same sizes has another one; None where not
    all weights are in memory."""
    digest = hashlib.blake2b(digest_size=8)
    for name, weight in sorted(model.named_parameters()):
        local: Tensor = weight.to_local() if hasattr(weight, "to_local") else weight  # of a rank
        if local.is_meta:
            return None
        flat = local.detach().flatten()
        index = torch.arange(min(_SAMPLES, len(flat)), device=flat.device) * max(len(flat) // _SAMPLES, 1)
        digest.update(f"{name} {list(weight.shape)} {weight.dtype}".encode())
        digest.update(flat[index].cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check_model(path: PathLike, values: dict[str, Any], model: PreTrainedModel | PreTrainedConfig) -> None:
    facts, weights = _describe(model)
    if facts != values["model"]:
        named = [" ".join(f"{k}={v}" for k, v in sorted(x.items())) if isinstance(x, dict) else short(x)
                 for x in (values["model"], facts)]  # fmt: skip
        raise ValueError(f"model: expected {named[0]} like {path}, got {named[1]}")
    if None not in (weights, values["weights"]) and weights != values["weights"]:
        raise ValueError(
            f"model: expected the weights {short(values['weights'])} like {path}, got {weights}; "
            "a cache goes on only in the checkpoint that filled it"
        )


def _check_layer(
    where: str,
    tensors: dict[str, Tensor],
    policy: tuple[Tensor, Tensor, Tensor],
    values: dict[str, Any],
    head_dim: int,
    seen: list[int] | None,
) -> torch.dtype:
    """Sizes, dtypes and ranges of one layer's tensors; returns the dtype of the pages. seen: of the layer before."""

    def expect(name: str, good: bool, wanted: object, got: object) -> None:
        if not good:
            raise ValueError(f"{where}.{name}: expected {wanted}, got {got}")

    stored, batch = tensors["key_pages"].dtype, tensors["seen"].numel()
    kinds = kinds_of_rows = [torch.float32, torch.bfloat16, torch.float16]
    if values["kv_dtype"] is not None:
        kinds = [check_kv_dtype("kv_dtype", values["kv_dtype"])]
    expect("key_pages", stored in kinds, f"dtype {' or '.join(map(str, kinds))}", stored)
    expect("seen", batch > 0, "at least one sequence", batch)
    heads, page_size = len(policy[0]), values["page_size"]
    count = tensors["key_pages"].shape[0] if tensors["key_pages"].dim() else 0
    columns = tensors["page_table"].shape[1] if tensors["page_table"].dim() == 2 else 0
    page = (stored, [count, page_size, row_width(head_dim, stored)])
    sums = (torch.float32, [batch * heads, head_dim])
    table = (torch.int32, [batch * heads, columns])
    forms: dict[str, tuple[torch.dtype, list[int]]] = dict(
        zip(_TENSORS, [(torch.int64, [batch]), table, sums, sums, page, page], strict=True)
    )
    if "exact" in tensors:
        exact_dtype = tensors["exact"].dtype
        expect("exact", exact_dtype in kinds_of_rows, f"dtype {' or '.join(map(str, kinds_of_rows))}", exact_dtype)
        rows_beside = values["exact_sink"] + values["exact_window"]
        forms["exact"] = (exact_dtype, [2, batch * heads, rows_beside, head_dim])
    for name, form in forms.items():
        got = tensors[name].dtype, list(tensors[name].shape)
        expect(name, got == form, "{} {}".format(*form), "{} {}".format(*got))
    if seen is None:
        most = values["columns"]
        least, largest = int(tensors["seen"].min()), int(tensors["seen"].max())
        expect("seen", least >= 0 and largest <= most, f"0..{most} tokens", f"{least}..{largest}")
    else:
        got_seen = tensors["seen"].tolist()
        expect("seen", got_seen == seen, f"{short(seen)} like the layer before", short(got_seen))
    sink, window, _ = policy
    rows = tensors["seen"][:, None].minimum(sink.long() + window.long())
    needed = ((rows + page_size - 1) // page_size).flatten()
    expect("page_table", columns == int(needed.max()), f"{int(needed.max())} pages in a row", columns)
    used = torch.arange(columns) < needed[:, None]
    ids = np.unique(tensors["page_table"][used].numpy())
    wanted = f"the pages 0..{count - 1}, each at least once" if count else "no pages"
    expect("page_table", np.array_equal(ids, np.arange(count)), wanted, short(ids.tolist()))
    return stored
