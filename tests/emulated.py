# SPDX-License-Identifier: Apache-2.0
"""The Ascend kernels under our host emulation: builds the library with the host compiler, calls it through ctypes.

Nothing here is CANN and nothing ran on an NPU: `cpp/ascend/emulation` stands in for it, stricter than the hardware.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
CPP = ROOT / "cpp"
SOURCES = [
    *sorted((CPP / "ascend/op_kernel").glob("*.cpp")),
    CPP / "ascend/op_host/tiling.cpp",
    *sorted((CPP / "ascend/emulation").glob("*.cpp")),
]
FLAGS = [
    *("-O1", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-missing-field-initializers", "-Wno-maybe-uninitialized"),
]
HOST = ["-std=c++20"]
DEVICE = ["-std=c++17", "-Wpedantic"]  # the toolkit's compiler takes no other standard for kernels
FOLDER = ROOT / "build" / "ascend_emulation"
UB_BUDGET = 188160  # bytes
FORWARD, REVERSED = 0, 1  # orders of the blocks; any other number is a seed
INT64 = ctypes.c_int64
CACHE = (
    "key_pages",
    "value_pages",
    "page_table",
    "seen",
    "sink_size",
    "window_size",
    "compensate",
    "key_sum",
    "value_sum",
)


class EmulationError(Exception):
    """A rule that a kernel broke, or arguments that the tiling does not take."""


def _fields(text: str) -> list[tuple[str, Any]]:
    """Every name an int64, `name*3` three of them."""
    return [(n, INT64 * int(c)) if c else (n, INT64) for n, _, c in (word.partition("*") for word in text.split())]


class CacheTiling(ctypes.Structure):
    _fields_ = _fields(
        "batch num_kv_heads head_dim num_pages page_size max_pages q_len key_stride*3 value_stride*3 key_elements "
        "value_elements tile_tokens has_pad workers"
    )


class AttentionTiling(ctypes.Structure):
    _fields_ = [
        ("cache", CacheTiling),
        *_fields("num_heads group query_stride*3 query_elements block_rows blocks_per_row has_slopes dense skip_full"),
        ("scale", ctypes.c_float),
        ("reserved", ctypes.c_float),
    ]


class HeadScoresTiling(ctypes.Structure):
    _fields_ = [
        *_fields("batch num_heads num_kv_heads group tokens head_dim period query_stride*3 key_stride*3"),
        *_fields("query_elements key_elements tile_tokens block_rows blocks_per_row workers"),
        ("scale", ctypes.c_float),
        ("reserved", ctypes.c_float),
    ]


class Buffer(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("bytes", INT64), ("writable", INT64)]


class Counters(ctypes.Structure):
    _fields_ = _fields("repeats instructions barriers copies bytes_in bytes_out ub_bytes")


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")


def build(edits: Mapping[str, tuple[str, str]] | None = None) -> ctypes.CDLL:
    """The library, built unless an earlier run has; objects are kept for the next one.

    Args:
        edits: file name under cpp/ascend -> (text that occurs once, its replacement), to seed a fault.
    """
    texts = read_sources(edits or {})

    def compile_one(source: Path) -> Path:
        used = _included(source.relative_to(CPP).as_posix(), texts)
        flags = [*(DEVICE if source.parent.name == "op_kernel" else HOST), *FLAGS]
        target = FOLDER / f"{_digest([compiler(), flags, [(name, texts[name]) for name in used]])}.o"
        if not target.exists():
            with tempfile.TemporaryDirectory() as folder:
                for name in used:
                    copy = Path(folder) / name
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    copy.write_text(texts[name])
                includes = [f"-I{folder}", f"-isystem{folder}/ascend/emulation"]  # pedantic about ours alone
                _write(target, [*flags, *includes, "-c", f"{folder}/{source.relative_to(CPP)}"])
        return target

    FOLDER.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    library = FOLDER / f"{_digest(objects)}.so"
    if not library.exists():
        _write(library, ["-shared", *map(str, objects)])
    return ctypes.CDLL(str(library))


def read_sources(edits: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    """All that the library is built from: path under cpp -> text, with the edits of `build`."""
    paths = [*CPP.glob("ascend/*/*.h"), *CPP.glob("razor/*.h"), *SOURCES]
    texts = {path.relative_to(CPP).as_posix(): path.read_text() for path in paths}
    for name, (old, new) in edits.items():
        name = f"ascend/{name}"
        assert texts[name].count(old) == 1, f"{name}: {old!r} occurs {texts[name].count(old)} times"
        texts[name] = texts[name].replace(old, new)
    return texts


def kernel_entries() -> dict[str, list[str]]:
    """The kernels' entries as their sources define them: name -> names of the arguments, all of them addresses."""
    found = {}
    for path in sorted((CPP / "ascend/op_kernel").glob("*.cpp")):
        text = re.sub(r"\\\n\s*", "", path.read_text())
        ((macro, arguments),) = re.findall(r"#define (RAZOR_\w+_KERNEL)\(name, T\).*?void name\(([^)]*)\)", text)
        names = [word.split()[-1] for word in arguments.split(",")]
        found |= {name: names for name in re.findall(rf"^{macro}\((\w+), \w+\)", text, re.MULTILINE)}
    return found


def launch_header(kernel: str) -> str:
    """What the toolkit generates for a kernel of its name, as its documentation tells: aclrtlaunch_<kernel>.h."""
    arguments = "".join(f", void* {name}" for name in kernel_entries()[kernel])
    return (
        '#pragma once\n#include "acl/acl.h"\n'
        "#ifndef ACLRT_LAUNCH_KERNEL\n#define ACLRT_LAUNCH_KERNEL(kernel) aclrtlaunch_##kernel\n#endif\n"
        f'extern "C" uint32_t aclrtlaunch_{kernel}(uint32_t blocks, aclrtStream stream{arguments});\n'
    )


def _included(name: str, texts: Mapping[str, str]) -> list[str]:
    """The file and all that it includes of ours."""
    found, left = [], [name]
    while left:
        name = left.pop()
        found.append(name)
        for include in re.findall(r'#include "([^"]+)"', texts[name]):
            (known,) = {include, f"ascend/emulation/{include}"} & texts.keys()
            left += [known] if known not in found + left else []
    return sorted(found)


def _digest(thing: object) -> str:
    return hashlib.sha256(repr(thing).encode()).hexdigest()[:20]


def _write(target: Path, arguments: Sequence[str]) -> None:
    """Runs the compiler; a broken off run leaves no target."""
    partial = target.with_suffix(f".{os.getpid()}{target.suffix}")
    _run([str(compiler()), *arguments, "-o", str(partial)])
    partial.rename(target)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EmulationError(f"{' '.join(command)}\n{done.stderr}")


@cache
def stock() -> ctypes.CDLL:
    """The library of the sources as they are."""
    return build()


def checked(library: ctypes.CDLL, function: str, *arguments: Any) -> None:
    error = ctypes.create_string_buffer(512)
    if getattr(library, function)(*arguments, error):
        raise EmulationError(error.value.decode())


def launch(
    library: ctypes.CDLL,
    kernel: str,
    buffers: Sequence[tuple[str, Any, bool]],
    *,
    blocks: int,
    order: int = FORWARD,
    ub_budget: int = UB_BUDGET,
) -> Counters:
    """One launch. buffers: name, tensor | ctypes structure | None, may be written; in the kernel's order."""
    held, described = [], (Buffer * len(buffers))()
    for i, (name, thing, writable) in enumerate(buffers):
        if thing is None:
            address, size = None, 0
        elif isinstance(thing, ctypes.Structure):
            address, size = ctypes.addressof(thing), ctypes.sizeof(thing)
        else:
            span = 1 + sum((n - 1) * s for n, s in zip(thing.shape, thing.stride(), strict=True))
            address, size = thing.data_ptr(), span * thing.element_size() if thing.numel() else 0
        held.append(name.encode())
        described[i] = Buffer(held[-1], address, size, writable)
    counters = Counters()
    library.razor_emulate.argtypes = [
        *(ctypes.c_char_p, ctypes.c_void_p, INT64, INT64, ctypes.c_uint64, INT64, ctypes.c_void_p, ctypes.c_char_p)
    ]
    checked(
        library,
        "razor_emulate",
        kernel.encode(),
        ctypes.addressof(described),
        len(buffers),
        blocks,
        order,
        ub_budget,
        ctypes.addressof(counters),
    )
    return counters


# --- the ops


def dtype_name(tensor: Tensor) -> str:
    return {torch.float16: "f16", torch.bfloat16: "bf16"}[tensor.dtype]


def cache_tiling(key: Tensor, value: Tensor, cache: Sequence[Tensor], pad: Tensor | None) -> CacheTiling:
    pages, table = cache[0], cache[2]
    return CacheTiling(
        batch=key.shape[0],
        num_kv_heads=key.shape[1],
        head_dim=key.shape[3],
        num_pages=pages.shape[0],
        page_size=pages.shape[1],
        max_pages=table.shape[1],
        q_len=key.shape[2],
        key_stride=(INT64 * 3)(*key.stride()[:3]),
        value_stride=(INT64 * 3)(*value.stride()[:3]),
        has_pad=pad is not None,
    )


def attention_tiling(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: Sequence[Tensor],
    *,
    alibi_slopes: Tensor | None = None,
    pad: Tensor | None = None,
    scale: float,
    dense: bool = False,
    cores: int = 40,
    ub_bytes: int = UB_BUDGET,
    library: ctypes.CDLL | None = None,
) -> tuple[AttentionTiling, int]:
    """The tiling, and the float32 numbers of its states."""
    tiling = AttentionTiling(
        cache=cache_tiling(key, value, cache, pad),
        num_heads=query.shape[1],
        query_stride=(INT64 * 3)(*query.stride()[:3]),
        has_slopes=alibi_slopes is not None,
        dense=dense,
        scale=scale,
    )
    floats = INT64()
    arguments = INT64(cores), INT64(ub_bytes), ctypes.byref(tiling), ctypes.byref(floats)
    checked(library or stock(), "razor_complete_attention", *arguments)
    return tiling, floats.value


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *cache: Tensor,
    alibi_slopes: Tensor | None = None,
    pad: Tensor | None = None,
    scale: float,
    dense: bool = False,
    cores: int = 40,
    blocks: int | None = None,
    order: int = FORWARD,
    ub_bytes: int = UB_BUDGET,
    library: ctypes.CDLL | None = None,
    skip_full: bool = False,
    counted: list[Counters] | None = None,
) -> Tensor:
    """As `reference.attention`, by the emulated kernels."""
    library = library or stock()
    options: dict[str, Any] = {"alibi_slopes": alibi_slopes, "pad": pad, "scale": scale, "dense": dense}
    tiling, floats = attention_tiling(
        query, key, value, cache, **options, cores=cores, ub_bytes=ub_bytes, library=library
    )
    tiling.skip_full = skip_full
    out = torch.full(query.shape, 777.0, dtype=query.dtype)  # nobody may leave it
    states = torch.full((floats,), torch.nan)
    inputs = [("query", query), ("key", key), ("value", value), *zip(CACHE, cache, strict=True)]
    inputs += [("alibi_slopes", alibi_slopes), ("pad", pad)]
    by_name = dict(inputs)
    setting: dict[str, Any] = {"blocks": blocks or cores, "order": order, "ub_budget": ub_bytes}
    counters = launch(
        library,
        f"razor_attention_{dtype_name(query)}",
        [*((n, t, False) for n, t in inputs), ("out", out, True), ("states", states, True), ("tiling", tiling, False)],
        **setting,
    )
    policy = [(n, by_name[n], False) for n in ("seen", "sink_size", "window_size", "compensate", "pad")]
    combined = launch(
        library,
        f"razor_combine_{dtype_name(query)}",
        [*policy, ("states", states, False), ("out", out, True), ("tiling", tiling, False)],
        **setting,
    )
    if counted is not None:
        counted += [counters, combined]
    return out


def append(
    key: Tensor,
    value: Tensor,
    *cache: Tensor,
    pad: Tensor | None = None,
    cores: int = 40,
    order: int = FORWARD,
    ub_bytes: int = UB_BUDGET,
    library: ctypes.CDLL | None = None,
) -> None:
    """As `reference.append`, by the emulated kernel; `seen` grows as the binding has it grow."""
    library = library or stock()
    tiling = cache_tiling(key, value, cache, pad)
    checked(library, "razor_complete_append", INT64(cores), INT64(ub_bytes), ctypes.byref(tiling))
    written = {"key_pages", "value_pages", "key_sum", "value_sum"}
    launch(
        library,
        f"razor_append_{dtype_name(key)}",
        [
            *(("key", key, False), ("value", value, False)),
            *((n, t, n in written) for n, t in zip(CACHE, cache, strict=True)),
            *(("pad", pad, False), ("tiling", tiling, False)),
        ],
        blocks=tiling.workers,
        order=order,
        ub_budget=ub_bytes,
    )
    cache[3].add_(key.shape[2] if pad is None else key.shape[2] - pad)


def head_scores(
    query: Tensor,
    key: Tensor,
    period: int,
    *,
    scale: float,
    cores: int = 40,
    order: int = FORWARD,
    ub_bytes: int = UB_BUDGET,
    library: ctypes.CDLL | None = None,
) -> tuple[Tensor, Tensor]:
    """As `reference.head_scores`, by the emulated kernel and the binding's sum."""
    library = library or stock()
    batch, num_heads, tokens, head_dim = query.shape
    tiling = HeadScoresTiling(
        batch=batch,
        num_heads=num_heads,
        num_kv_heads=key.shape[1],
        tokens=tokens,
        head_dim=head_dim,
        period=period,
        query_stride=(INT64 * 3)(*query.stride()[:3]),
        key_stride=(INT64 * 3)(*key.stride()[:3]),
        scale=scale,
    )
    floats = INT64()
    arguments = INT64(cores), INT64(ub_bytes), ctypes.byref(tiling), ctypes.byref(floats)
    checked(library, "razor_complete_head_scores", *arguments)
    scores = torch.full((floats.value,), torch.nan)
    launch(
        library,
        f"razor_head_scores_{dtype_name(query)}",
        [("query", query, False), ("key", key, False), ("scores", scores, True), ("tiling", tiling, False)],
        blocks=tiling.workers,
        order=order,
        ub_budget=ub_bytes,
    )
    rows = (tokens - 1 - period) * tiling.group
    by_row = scores.view(batch, key.shape[1], 2, tiling.blocks_per_row, -1)[..., : tiling.block_rows]
    by_token = by_row.reshape(batch, key.shape[1], 2, -1)[..., :rows].reshape(batch, key.shape[1], 2, -1, tiling.group)
    echo, induction = (by_token.double().sum(-2) / (tokens - 1 - period)).float().unbind(2)
    return echo.reshape(batch, num_heads), induction.reshape(batch, num_heads)


def shares(
    tiling: AttentionTiling, cache: Sequence[Tensor], pad: Tensor | None = None, most: int = 1 << 16
) -> list[list[int]]:
    """worker, table row, first and end query row, first and end unit, units, state; of all workers."""
    records = torch.zeros(most, 8, dtype=torch.int64)
    address = [None if t is None else ctypes.c_void_p(t.data_ptr()) for t in (cache[3], pad, *cache[4:7], records)]
    stock().razor_shares.restype = INT64
    count = stock().razor_shares(ctypes.byref(tiling), *address, INT64(most))
    assert count <= most
    return [list(map(int, record)) for record in records[:count].tolist()]
