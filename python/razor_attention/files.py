# SPDX-License-Identifier: Apache-2.0
"""Formats on disk, and the only place that knows their foreign words: written atomically, read without executing."""

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from reprlib import repr as short
from typing import Any, BinaryIO, TypeAlias

import torch
from torch import Tensor

from .checks import check_int, check_table

PathLike: TypeAlias = str | os.PathLike[str]
LayerHeads: TypeAlias = dict[int, list[int]]  # layer -> kv heads
TwoLists: TypeAlias = dict[str, LayerHeads]  # "induction" and "echo"

_OURS = {"induction": "induction", "echo": "echo"}
_FOREIGN = {"induction": "prefix_matching", "echo": "copying"}  # our word -> msmodelslim's
_MODE = 0o640  # of heads and windows files, whatever the umask
_GATES, _GATES_CONFIG = "full_attention_heads.tsv", "config.json"  # DuoAttention's pattern folder
_NEAR = 0.5  # how far a trained gate may lie outside 0..1


def write_atomic(path: PathLike, write: Callable[[BinaryIO], object], *, mode: int | None = None) -> None:
    """Replace a file at once: whatever fails, there is the whole new file or the untouched old one, and nothing else.

    Args:
        path: file to write, in a folder that exists.
        write: called once with a binary file of a temporary name in that folder, which is then synced and renamed.
        mode: permission bits of the file; None follows the umask.
    Raises:
        ValueError: path: expected a file in an existing folder, got runs/plan.json
    """
    target = Path(path)
    if target.is_dir() or not target.parent.is_dir():
        raise ValueError(f"path: expected a file in an existing folder, got {target}")
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: PathLike, obj: dict[str, Any], *, mode: int | None = None) -> None:
    """Write a dict as JSON, atomically, one key a line.

    Args:
        path: file to write.
        obj: values that JSON can hold, no NaN or infinity.
        mode: permission bits of the file; None follows the umask.
    Raises:
        TypeError: obj: expected JSON values, got Object of type set is not JSON serializable
    """
    try:
        lines = [f"  {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in obj.items()]
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"obj: expected JSON values, got {error}") from error
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    write_atomic(path, lambda file: file.write(text.encode()), mode=mode)


def read_json(path: PathLike, kind: str | None = None, keys: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read a JSON file that holds one dict without repeated keys; its values are not judged.

    Args:
        path: file to read.
        kind: when given, the file is one of ours: "format" must be "razor-attention <kind>" and "version" 1.
        keys: keys that such a file must have.
    Returns:
        The dict.
    Raises:
        ValueError: plan.json: expected the key 'sink_size', got a file without it
    """
    try:
        record = json.loads(Path(path).read_bytes(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path}: expected a dict, got {type(record).__name__}")
    wanted = {} if kind is None else {"format": f"razor-attention {kind}", "version": 1}
    for key, value in wanted.items():
        if record.get(key) != value:
            raise ValueError(f"{path}: expected {key} {value!r}, got {short(record.get(key))}")
    if missing := [key for key in keys if key not in record]:
        raise ValueError(f"{path}: expected the key {missing[0]!r}, got a file without it")
    return record


def save_heads(heads: LayerHeads | TwoLists, path: PathLike) -> None:
    """Write retrieval heads, mode 0640: msmodelslim's .pt, or the union as Golden Stick's file if `path` is a .json.

    Args:
        heads: {"induction": {layer: [kv_head, ...]}, "echo": ...}; for .json also {layer: [kv_head, ...]}.
        path: file to write.
    Raises:
        ValueError: heads: expected the keys 'induction' and 'echo', got {0: [1]}
    """
    lists = _lists(heads, "heads")
    if Path(path).suffix == ".json":
        write_json(path, {str(layer): row for layer, row in merge_heads(heads).items()}, mode=_MODE)
    elif set(lists) != set(_OURS):
        raise ValueError(f"heads: expected the keys 'induction' and 'echo', got {short(heads)}")
    else:
        foreign = {_FOREIGN[word]: layers for word, layers in lists.items()}
        write_atomic(path, lambda file: torch.save(foreign, file), mode=_MODE)


def load_heads(path: PathLike) -> LayerHeads | TwoLists:
    """Read retrieval heads: msmodelslim's .pt, or Golden Stick's union if `path` is a .json.

    Args:
        path: file to read.
    Returns:
        {"induction": {layer: [kv_head, ...]}, "echo": ...}, for .json {layer: [kv_head, ...]}; ascending, none empty.
    Raises:
        ValueError: win.pt: expected retrieval heads, got a tensor; read windows with load_windows
    """
    if Path(path).suffix == ".json":
        record = read_json(path)
        if bad := [key for key in record if not re.fullmatch("0|[1-9][0-9]{0,8}", key)]:
            raise ValueError(f"{path}: expected layer numbers as keys, got {short(bad[0])}")
        return _layers({int(key): row for key, row in record.items()}, str(path))
    content = _torch_load(path)
    if isinstance(content, Tensor):
        raise ValueError(f"{path}: expected retrieval heads, got a tensor; read windows with load_windows")
    if not isinstance(content, dict) or set(content) != set(_FOREIGN.values()):
        raise ValueError(f"{path}: expected the keys 'prefix_matching' and 'copying', got {short(content)}")
    return _lists(content, str(path))


def save_windows(windows: Tensor, path: PathLike) -> None:
    """Write ALiBi windows as msmodelslim's win.pt, mode 0640.

    Args:
        windows: (num_heads) or (num_layers, num_heads), int64, tokens.
        path: file to write.
    Raises:
        ValueError: windows: expected an int64 tensor [heads] or [layers, heads], got torch.float32 [8]
    """
    tensor = _check_windows(windows, "windows").detach().cpu().clone(memory_format=torch.contiguous_format)
    write_atomic(path, lambda file: torch.save(tensor, file), mode=_MODE)


def load_windows(path: PathLike) -> Tensor:
    """Read ALiBi windows; their values are not judged.

    Args:
        path: file to read.
    Returns:
        (num_heads) or (num_layers, num_heads), int64, tokens.
    Raises:
        ValueError: heads.pt: expected windows, got a dict; read retrieval heads with load_heads
    """
    content = _torch_load(path)
    if isinstance(content, dict):
        raise ValueError(f"{path}: expected windows, got a dict; read retrieval heads with load_heads")
    return _check_windows(content, str(path))


def save_gates(
    gates: Tensor, folder: PathLike, *, sink_size: int, window_size: int, provenance: dict[str, Any] | None = None
) -> None:
    """Write DuoAttention's pattern folder; a new folder appears at once, in an old one both files are replaced.

    Args:
        gates: (num_layers, num_kv_heads), float; 1 is full.
        folder: to write, in a folder that exists.
        sink_size, window_size: first and last tokens that the compressed half of the heads was trained with.
        provenance: JSON values that config.json also gets.
    Raises:
        ValueError: folder: expected one in an existing folder, got runs/gates
    """
    target, table = Path(folder), check_table("gates", gates, "floats").double()
    if not target.parent.is_dir() or (target.exists() and not target.is_dir()):
        raise ValueError(f"folder: expected one in an existing folder, got {target}")
    sizes = {"sink_size": check_int("sink_size", sink_size, 0), "recent_size": check_int("window_size", window_size, 0)}
    text = "".join("\t".join(f"{gate:.18e}" for gate in row) + "\n" for row in table.tolist())
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    temporary.mkdir()
    try:
        write_json(temporary / _GATES_CONFIG, {**(provenance or {}), **sizes})
        write_atomic(temporary / _GATES, lambda file: file.write(text.encode()))
        if target.exists():
            for name in (_GATES_CONFIG, _GATES):
                (temporary / name).replace(target / name)
            temporary.rmdir()
        else:
            temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def load_gates(path: PathLike) -> Tensor:
    """Read gates as they are in DuoAttention's pattern folder, or in its full_attention_heads.tsv alone.

    Args:
        path: folder or file.
    Returns:
        (num_layers, num_kv_heads), float64, not clipped; 1 is full.
    Raises:
        ValueError: gates.tsv: expected 8 numbers in line 2 like in line 1, got 7
    """
    file = Path(path) / _GATES if Path(path).is_dir() else Path(path)
    rows: list[list[float]] = []
    try:
        lines = file.read_text().rstrip("\n").split("\n")
        rows = [[float(cell) for cell in line.split()] for line in lines]
    except FileNotFoundError as error:
        raise ValueError(f"{path}: expected a folder with {_GATES} or such a file, got none") from error
    except ValueError as error:
        raise ValueError(f"{file}: expected a line of numbers for each layer, got {error}") from error
    for number, row in enumerate(rows, 1):
        if len(row) != len(rows[0]) or not row:
            wanted = f"{len(rows[0])} numbers in line {number} like in line 1" if rows[0] else "numbers in line 1"
            raise ValueError(f"{file}: expected {wanted}, got {len(row)}")
        if bad := [gate for gate in row if not -_NEAR <= gate <= 1 + _NEAR]:  # NaN too
            raise ValueError(f"{file}: expected gates near 0..1 in line {number}, got {bad[0]}")
    return torch.tensor(rows, dtype=torch.float64)


def has_gate_sizes(folder: PathLike) -> bool:
    """Whether a folder has the config.json that `load_gate_sizes` reads."""
    return (Path(folder) / _GATES_CONFIG).is_file()


def load_gate_sizes(folder: PathLike) -> tuple[int, int]:
    """Read what the compressed half of the heads was trained with from DuoAttention's pattern folder.

    Args:
        folder: with a config.json.
    Returns:
        sink_size and window_size, tokens.
    Raises:
        ValueError: duo/config.json: expected the key 'sink_size', got a file without it
    """
    file = Path(folder) / _GATES_CONFIG
    if not has_gate_sizes(folder):
        raise ValueError(f"{folder}: expected a folder with {_GATES_CONFIG}, got none")
    record, sizes = read_json(file), []
    for key in ("sink_size", "recent_size"):
        if key not in record:
            raise ValueError(f"{file}: expected the key {key!r}, got a file without it")
        try:
            sizes.append(check_int(key, record[key], 0))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}: {error}") from error
    return sizes[0], sizes[1]


def merge_heads(heads: LayerHeads | TwoLists) -> LayerHeads:
    """One list of retrieval heads: the union of both lists where there are two; layers without any are left out.

    Args:
        heads: {layer: [kv_head, ...]}, or two of them under "induction" and "echo" or under msmodelslim's words.
    Returns:
        {layer: [kv_head, ...]}, layers and heads ascending.
    Raises:
        ValueError: heads[3]: expected a list of different kv heads >= 0, got [5, 1, 5]
    """
    parts = _lists(heads, "heads").values()
    layers = sorted({layer for part in parts for layer in part})
    return {layer: sorted({head for part in parts for head in part.get(layer, [])}) for layer in layers}


def _lists(heads: Any, name: str) -> TwoLists:
    """Check one list or two: {"all": layers}, or one entry for each of our two words."""
    for words in (_OURS, _FOREIGN):
        if isinstance(heads, dict) and set(heads) == set(words.values()):
            return {ours: _layers(heads[word], f"{name}[{word!r}]") for ours, word in words.items()}
    return {"all": _layers(heads, name)}


def _layers(layers: Any, name: str) -> LayerHeads:
    """Check {layer: [kv_head, ...]}; layers and heads ascending, empty layers left out."""
    if not isinstance(layers, dict):
        raise TypeError(f"{name}: expected a dict of layers, got {type(layers).__name__}")
    for layer, row in layers.items():
        if type(layer) is not int or layer < 0:
            raise ValueError(f"{name}: expected layers that are integers >= 0, got {short(layer)}")
        ids = isinstance(row, list) and all(type(head) is int and head >= 0 for head in row)
        if not ids or len(set(row)) != len(row):
            raise ValueError(f"{name}[{layer}]: expected a list of different kv heads >= 0, got {short(row)}")
    return {layer: sorted(layers[layer]) for layer in sorted(layers) if layers[layer]}


def _check_windows(windows: Any, name: str) -> Tensor:
    if not isinstance(windows, Tensor):
        raise TypeError(f"{name}: expected an int64 tensor, got {type(windows).__name__}")
    kind = (windows.dtype, windows.layout)
    if kind != (torch.int64, torch.strided) or windows.dim() not in (1, 2) or windows.numel() == 0:
        got = f"{windows.dtype} {list(windows.shape)}"
        raise ValueError(f"{name}: expected an int64 tensor [heads] or [layers, heads], got {got}")
    return windows


def _torch_load(path: PathLike) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # corrupt bytes raise anything; a forbidden object raises UnpicklingError
        raise ValueError(f"{path}: expected a torch file of plain values, got {type(error).__name__}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key given twice")
    return values
