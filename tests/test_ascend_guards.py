# SPDX-License-Identifier: Apache-2.0
"""The Ascend sources under compilers that know more than the host's: clang with an address space for global memory and
marked device code, C++17, torch_npu's own headers. Each guard is seen to catch what it is for. None is CANN."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import emulated
from emulated import CPP, ROOT
from test_ascend_torch import STAND_INS

Edits = Mapping[str, tuple[str, str]]  # file under cpp/ascend -> (text that occurs once, its replacement)
KERNELS = sorted(path.name for path in (CPP / "ascend/op_kernel").glob("*.cpp"))


def run(command: list[str]) -> str:
    """What the compiler has to say; empty: nothing."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stderr if done.returncode or done.stderr else ""


def write_sources(folder: Path, edits: Edits) -> None:
    for name, text in emulated.read_sources(edits).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


# --- address spaces and marks


def clang() -> list[str] | None:
    """clang of the system, or of the package ziglang."""
    for name in (os.environ.get("CLANG"), "clang++", "clang"):
        if name and (found := shutil.which(name)):
            return [found]
    return [sys.executable, "-m", "ziglang", "clang"] if find_spec("ziglang") else None


NEEDS_CLANG = pytest.mark.skipif(clang() is None, reason="neither clang nor the package ziglang is installed")


def check_device_code(folder: Path, kernel: str, edits: Edits) -> str:
    """One pass of clang's CUDA mode, which tells device functions from others; nothing of CUDA's is included."""
    write_sources(folder, edits)
    mode = ["-x", "cuda", "-fcuda-is-device", "-triple", "nvptx64-nvidia-cuda", "-aux-triple", "x86_64-linux-gnu"]
    strict = ["-std=c++17", "-Wall", "-Wextra", "-pedantic", "-Werror"]
    includes = ["-ffreestanding", "-nostdsysteminc", "-nobuiltininc", f"-I{folder}", f"-I{folder}/ascend/declarations"]
    source = f"{folder}/ascend/op_kernel/{kernel}"
    return run([*(clang() or []), "-cc1", "-fsyntax-only", *mode, *strict, *includes, source])


@NEEDS_CLANG
@pytest.mark.parametrize("kernel", KERNELS)
def test_device_code_is_marked_and_knows_global_memory(tmp_path: Path, kernel: str) -> None:
    assert check_device_code(tmp_path, kernel, {}) == ""


# What was done -> (kernel that is compiled, file, text, replacement, what clang says).
DEVICE_FAULTS = {
    "two names in one declaration of addresses": (
        *("append.cpp", "op_kernel/cache_rows.h"),
        *("GM_ADDR key;\n  GM_ADDR value;", "GM_ADDR key, value;"),
        "field may not be qualified with an address space",  # of the second name, which is no pointer
    ),
    "two names in one declaration of sums": (
        *("attention.cpp", "op_kernel/attention.cpp"),
        *("  GM_ADDR key_sum;       // [batch * num_kv_heads, head_dim] float32\n  GM_ADDR value_sum; ",
          "  GM_ADDR key_sum, value_sum; "),
        "field may not be qualified with an address space",  # of the second name, which is no pointer
    ),
    "no __gm__ in a cast": (
        *("combine.cpp", "op_kernel/device.h"),
        *("reinterpret_cast<__gm__ int64_t*>", "reinterpret_cast<int64_t*>"),
        "is not allowed|cannot initialize a parameter of type",
    ),
    "no __gm__ in a template's cast": (
        *("append.cpp", "op_kernel/cache_rows.h"),
        *("reinterpret_cast<__gm__ U*>", "reinterpret_cast<U*>"),
        "is not allowed|cannot initialize a parameter of type",
    ),
    "an address as a plain pointer": (
        *("head_scores.cpp", "op_kernel/head_scores.cpp"),
        *("GM_ADDR scores, GM_ADDR tiling) {\n    read", "uint8_t* scores, GM_ADDR tiling) {\n    read"),
        "no matching member function for call to 'init'|reinterpret_cast from",
    ),
    "no mark on a shared function": (
        *("combine.cpp", "op_host/work_list.h"),
        *("RAZOR_FN int64_t smaller", "inline int64_t smaller"),
        "__host__ function",
    ),
    "no mark on a member": (
        *("attention.cpp", "op_kernel/attention.cpp"),
        *("__aicore__ inline void attend(const", "inline void attend(const"),
        "__host__ function 'attend'",
    ),
    "no mark on a function of rows": (
        *("head_scores.cpp", "op_kernel/query_rows.h"),
        *("__aicore__ inline int64_t rows_of_token(", "inline int64_t rows_of_token("),
        "__host__ function",
    ),
    "no mark on a constructor": (
        *("combine.cpp", "op_host/work_list.h"),
        *("RAZOR_FN WorkList(", "WorkList("),
        "__host__ function",
    ),
    "the mark defined behind the include that needs it": (
        *("combine.cpp", "op_kernel/device.h"),
        *('#define RAZOR_FN __aicore__ inline\n#include "ascend/op_host/work_list.h"\n',
          '#include "ascend/op_host/work_list.h"\n'),
        "__host__ function",
    ),
    "a header of the host": (
        *("append.cpp", "op_kernel/device.h"),
        *("#pragma once\n", "#pragma once\n#include <algorithm>\n"),
        "'algorithm' file not found",
    ),
    "C++20 in a kernel": (
        *("attention.cpp", "op_kernel/query_rows.h"),
        *("  int64_t head_dim;\n", "  int64_t head_dim;\n  bool operator==(const QueryRows&) const = default;\n"),
        "defaulted comparison operators are a C\\+\\+20 extension",
    ),
}  # fmt: skip


@NEEDS_CLANG
@pytest.mark.parametrize("fault", DEVICE_FAULTS)
def test_clang_catches(tmp_path: Path, fault: str) -> None:
    kernel, file, old, new, message = DEVICE_FAULTS[fault]
    assert re.search(message, check_device_code(tmp_path, kernel, {file: (old, new)}))


# --- the language level: the emulation's build of the kernels is C++17 too

STANDARD_FAULTS = {
    "a concept": (
        *("op_kernel/query_rows.h", "template <class T>\n__aicore__ inline void load_rows"),
        "template <class T> requires (sizeof(T) == 2)\n__aicore__ inline void load_rows",
    ),
    "designated initialisers": (
        *("op_host/work_list.h", "const int64_t start = range.begin + first_tile"),
        "const TokenRange unused = {.begin = 0, .end = 0};\n  (void)unused;\n"
        "  const int64_t start = range.begin + first_tile",
    ),
    "a defaulted comparison": (
        *("op_host/work_list.h", "  int64_t begin, end;\n};"),
        "  int64_t begin, end;\n  bool operator==(const TokenRange&) const = default;\n};",
    ),
    "two names in one declaration of addresses": (
        *("op_kernel/cache_rows.h", "GM_ADDR key;\n  GM_ADDR value;"),
        "GM_ADDR key, value;",
    ),
}


def compile_for_emulation(folder: Path, edits: Edits) -> str:
    write_sources(folder, edits)
    includes = [f"-I{folder}", f"-isystem{folder}/ascend/emulation"]
    source = f"{folder}/ascend/op_kernel/combine.cpp"
    return run([str(emulated.compiler()), "-fsyntax-only", *emulated.DEVICE, *emulated.FLAGS, *includes, source])


@pytest.mark.slow
@pytest.mark.skipif(emulated.compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("fault", STANDARD_FAULTS)
def test_the_emulations_build_catches(tmp_path: Path, fault: str) -> None:
    file, old, new = STANDARD_FAULTS[fault]
    assert "error: " in compile_for_emulation(tmp_path, {file: (old, new)})


@pytest.mark.skipif(emulated.compiler() is None, reason="no C++ compiler")
def test_kernels_are_cpp17_under_emulation(tmp_path: Path) -> None:
    assert compile_for_emulation(tmp_path, {}) == ""


# --- torch_npu's headers


@cache
def unpack_torch_npu(version: str) -> Path | str:
    """Headers and library of the package, nothing of it installed or run; or why it cannot be had."""
    folder = ROOT / "build/torch_npu" / version
    if folder.exists():
        return folder / "torch_npu"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--retries", "1"]
        command = [*pip, "--no-deps", "--only-binary=:all:", "-d", partial, f"torch_npu=={version}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(partial).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            return (done.stderr.splitlines() or ["no wheel"])[-1]
        with zipfile.ZipFile(wheels[0]) as wheel:
            wanted = re.compile(r"torch_npu/(include/.*|lib/libtorch_npu\.so)")
            wheel.extractall(f"{partial}/unpacked", [name for name in wheel.namelist() if wanted.fullmatch(name)])
        with suppress(OSError):  # another process was faster
            Path(f"{partial}/unpacked").rename(folder)
    return folder / "torch_npu"


def torch_npu() -> Path:
    """That of this torch's version."""
    version = torch.__version__.split("+")[0]
    found = unpack_torch_npu(version)
    if isinstance(found, str):
        pytest.skip(f"torch_npu {version} cannot be had: {found}")
    return found


def compile_host_code(
    folder: Path, source: str, edits: Iterable[tuple[str, str]], *, standard: str, check_only: bool = True
) -> str:
    """torch_npu_ops.cpp or launch.cpp with torch's and torch_npu's headers; of CANN's two that are no part of them,
    the generated launch functions and the platform, we write our own."""
    shutil.copytree(CPP, folder, dirs_exist_ok=True)
    for name, header in STAND_INS.items():
        if name.startswith(("aclrtlaunch", "tiling/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(header)
    text = (folder / source).read_text()
    for old, new in edits:
        assert text.count(old) == 1, f"{source}: {old!r} occurs {text.count(old)} times"
        text = text.replace(old, new)
    (folder / source).write_text(text)
    torch_headers = Path(torch.__file__).parent / "include"
    system = [torch_headers, torch_headers / "torch/csrc/api/include", torch_npu() / "include"]
    flags = [f"-std={standard}", "-Wall", "-Wextra", "-Werror", "-Wno-missing-field-initializers"]
    flags += [f"-I{folder}", f"-I{folder}/bindings", *(f"-isystem{path}" for path in system)]
    output = ["-fsyntax-only"] if check_only else ["-O0", "-c", "-o", f"{folder}/object.o"]
    return run([str(emulated.compiler()), *flags, *output, f"{folder}/{source}"])


OPS, LAUNCH = "bindings/torch_npu_ops.cpp", "ascend/op_host/launch.cpp"


def symbols(file: Path, *flags: str) -> set[str]:
    done = subprocess.run(["nm", *flags, str(file)], capture_output=True, text=True, check=True)
    return {line.split()[-1] for line in done.stdout.splitlines()}


@pytest.mark.slow
@pytest.mark.skipif(emulated.compiler() is None or shutil.which("nm") is None, reason="no C++ compiler or no nm")
def test_the_binding_fits_torch_npu(tmp_path: Path) -> None:
    """Its headers take what we call, and its library has what we call."""
    assert compile_host_code(tmp_path, OPS, [], standard="c++20", check_only=False) == ""
    wanted = {name for name in symbols(tmp_path / "object.o", "-u") if re.search("c10_npu|at_npu", name)}
    assert len(wanted) >= 3
    assert wanted <= symbols(torch_npu() / "lib/libtorch_npu.so", "-D", "--defined-only")


@pytest.mark.slow
@pytest.mark.skipif(emulated.compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("standard", ["c++17", "c++20"])
def test_the_launches_fit_acl(tmp_path: Path, standard: str) -> None:
    assert compile_host_code(tmp_path, LAUNCH, [], standard=standard) == ""


# What was done -> (text, replacement, what the compiler says).
OPS_FAULTS = {
    "a stream's method that is not there": (
        *("getCurrentNPUStream().stream(/*need_empty=*/false)", "getCurrentNPUStream().handle(false)"),
        r"has no member named .handle",
    ),
    "no status for torch_npu": (
        *("{ return static_cast<int>(launch(stream)); }", "{ launch(stream); }"),
        r"no return statement in function returning non-void",
    ),
    "a status dropped": (
        *("return razor::ascend::launch_append(", "razor::ascend::launch_append("),
        r"ignoring return value of .*launch_append",
    ),
}
LAUNCH_FAULTS = {
    "a status dropped": (
        *("  return RAZOR_LAUNCH(params.format", "  RAZOR_LAUNCH(params.format"),
        r"no return statement in function returning non-void",
    ),
    "an argument missing": ("bytes(scores),", "", r"too few arguments to function"),
    "a number for an address": ("bytes(scores),", "workers,", r"invalid conversion"),
}


@pytest.mark.slow
@pytest.mark.skipif(emulated.compiler() is None, reason="no C++ compiler")
def test_torch_npus_headers_catch(tmp_path: Path) -> None:
    """All faults in one compilation: torch's headers take most of its time."""
    said = compile_host_code(tmp_path, OPS, [fault[:2] for fault in OPS_FAULTS.values()], standard="c++20")
    assert [fault for fault, (*_, message) in OPS_FAULTS.items() if not re.search(message, said)] == []


@pytest.mark.slow
@pytest.mark.skipif(emulated.compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("fault", LAUNCH_FAULTS)
def test_the_launch_functions_catch(tmp_path: Path, fault: str) -> None:
    old, new, message = LAUNCH_FAULTS[fault]
    assert re.search(message, compile_host_code(tmp_path, LAUNCH, [(old, new)], standard="c++20"))
