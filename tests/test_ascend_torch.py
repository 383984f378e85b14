# SPDX-License-Identifier: Apache-2.0
"""Around the Ascend kernels: the build without CANN, the loader, the bench, the framework's attention for prompts."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from razor_attention.bench import ascend

import emulated
from cases import assert_close, same_bits
from razor_attention import _native, head_scores, reference
from test_ascend import Numbers, expected_attention, inputs

ROOT = emulated.ROOT
NEEDS_CMAKE = pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")


def find_cann(*definitions: str) -> subprocess.CompletedProcess[str]:
    command = ["cmake", *(f"-D{d}" for d in definitions), "-P", str(ROOT / "third_party/FindCANN.cmake")]
    return subprocess.run(command, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"}, check=False)


@NEEDS_CMAKE
def test_no_toolkit_is_no_error(tmp_path: Path) -> None:
    for definitions, reason in (
        ([], "off (ASCEND_HOME_PATH is not set: no CANN toolkit)"),
        ([f"ASCEND_HOME_PATH={tmp_path}/none"], f"off (ASCEND_HOME_PATH: expected a folder, got {tmp_path}/none)"),
        ([f"ASCEND_HOME_PATH={tmp_path}"], f"off (no ascendc.cmake in {tmp_path})"),
        ([f"ASCEND_HOME_PATH={tmp_path}", "RAZOR_ASCEND=OFF"], "off (RAZOR_ASCEND=OFF)"),
    ):
        done = find_cann(*definitions)
        assert done.returncode == 0
        assert done.stdout == f"-- ascend: {reason}\n"
    done = find_cann("RAZOR_ASCEND=ON")  # asked for: a warning, and no error either
    assert done.returncode == 0
    assert "CMake Warning" in done.stderr
    assert "off (ASCEND_HOME_PATH is not set" in done.stderr


@NEEDS_CMAKE
@pytest.mark.parametrize("folder", ["tools/tikcpp/ascendc_kernel_cmake", "compiler/tikcpp/ascendc_kernel_cmake"])
def test_a_toolkit_is_found(tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "ascendc.cmake").touch()
    found = find_cann(f"ASCEND_HOME_PATH={tmp_path}").stdout
    assert found == f"-- ascend: CANN in {tmp_path}, ascend910b1 (a guess; set SOC_VERSION)\n"
    given = find_cann(f"ASCEND_HOME_PATH={tmp_path}", "SOC_VERSION=ascend910b3").stdout
    assert given.endswith("ascend910b3 (as given)\n")


@NEEDS_CMAKE
@pytest.mark.skipif(emulated.compiler() is None, reason="no C++ compiler")
def test_the_library_configures_with_a_toolkit_that_has_these_functions(tmp_path: Path) -> None:
    """A stand-in for ascendc.cmake: which kernels it is given, with which folders to include."""
    (tmp_path / "ascendc.cmake").write_text(
        "function(ascendc_library name kind)\n  add_library(${name} INTERFACE)\n"
        '  message(STATUS "${kind}: ${ARGN}")\nendfunction()\n'
        "function(ascendc_include_directories name scope)\n  target_include_directories(${name} INTERFACE ${ARGN})\n"
        "endfunction()\n"
    )
    given = {"CANN_ROOT": tmp_path, "CANN_MODULE": tmp_path, "SOC_VERSION": "ascend910b1", "RAZOR_CORE": tmp_path}
    given |= {"RAZOR_TORCH": tmp_path, "RAZOR_TORCH_NPU": tmp_path}
    command = ["cmake", "-S", str(ROOT / "cpp/ascend"), "-B", str(tmp_path / "build")]
    done = subprocess.run(
        [*command, *(f"-D{name}={value}" for name, value in given.items())], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (kernels,) = re.findall("-- STATIC: (.*)", done.stdout)
    assert sorted(kernels.split(";")) == [str(path) for path in sorted((ROOT / "cpp/ascend/op_kernel").glob("*.cpp"))]


def test_nothing_of_the_emulation_is_installed() -> None:
    build = (ROOT / "CMakeLists.txt").read_text() + (ROOT / "cpp/ascend/CMakeLists.txt").read_text()
    assert "emulation" not in build
    assert "declarations" not in build


def test_importing_the_package_leaves_torch_npu_alone() -> None:
    code = "import sys, razor_attention, razor_attention.bench.ascend; assert 'torch_npu' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_loading_without_torch_npu_says_what_is_expected() -> None:
    with pytest.raises(ImportError, match=r"torch_npu: expected the release for torch .*, got: No module named"):
        _native.load_npu_ops()


def test_kernels_that_cannot_be_loaded_are_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _native._load_npu_ops_if_there()  # no torch.npu, no library: nothing
    monkeypatch.setattr(_native, "npu_library", lambda: tmp_path)
    monkeypatch.setattr(torch, "npu", object(), raising=False)
    _native._load_npu_ops_if_there()  # no library
    (tmp_path / "library").touch()
    monkeypatch.setattr(_native, "npu_library", lambda: tmp_path / "library")
    with pytest.warns(UserWarning, match="torch_npu: expected the release for torch .* NPU tensors take the reference"):
        _native._load_npu_ops_if_there()
    monkeypatch.setattr(_native, "import_module", lambda name: None)
    with pytest.raises(ImportError, match=r"razor_attention: expected a loadable .*library, got: .*; reinstall where"):
        _native.load_npu_ops()


def test_bench_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags in ([], ["--run"]):
        with pytest.raises(SystemExit, match="ascend: torch_npu is not installed: it needs the release for torch"):
            ascend.main(flags)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    with pytest.raises(SystemExit, match="ascend: the package was built without NPU kernels"):
        ascend.main(["--run"])


def test_bench_verifies_and_measures_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same functions with the CPU as the device: its checks pass, and fail where results differ."""
    monkeypatch.setattr(ascend, "CHECKS", [check for check in ascend.CHECKS if check[4] < 1000])
    assert all(ok and difference == 0 for _, difference, ok in ascend.verify("cpu"))
    (case, plan, time, rate), *_ = ascend.measure("cpu", ["4k"], lambda: None, rounds=7)
    assert (case, plan) == ("decode 4k bfloat16", "full")
    assert time.median_us > 0
    assert rate > 0
    stock, calls = ascend.LayerCache.attend, iter(range(100))  # every call by another number
    monkeypatch.setattr(ascend.LayerCache, "attend", lambda self, *qkv: stock(self, *qkv) + 0.1 * next(calls))
    assert not ascend.check_attention("cpu", ascend.CHECKS[0])[2]


# --- the NPU library, with stand-ins for what torch_npu and CANN declare: same calls, CPU tensors, emulated launches

STAND_INS = {
    "torch_npu/csrc/core/npu/NPUGuard.h": """
        #include <c10/core/Device.h>
        namespace c10_npu { struct NPUGuard { explicit NPUGuard(c10::Device) {} }; }""",
    "torch_npu/csrc/core/npu/NPUStream.h": """
        namespace c10_npu { struct NPUStream { void* stream(bool) const { return nullptr; } };
                            inline NPUStream getCurrentNPUStream() { return {}; } }""",
    "torch_npu/csrc/framework/OpCommand.h": """
        #include <functional>
        #include <stdexcept>
        namespace at_npu::native { struct OpCommand {
          static void RunOpApi(const std::string& name, std::function<int()> f) {
            const int status = f();
            if (status != 0) throw std::runtime_error(name + ": status " + std::to_string(status)); } }; }""",
    "acl/acl.h": "#pragma once\n#include <stdint.h>\ntypedef void* aclrtStream;",
    "tiling/platform/platform_ascendc.h": """
        namespace platform_ascendc { enum class CoreMemType { UB };
          struct PlatformAscendCManager {
            static PlatformAscendCManager* GetInstance() { static PlatformAscendCManager one; return &one; }
            uint32_t GetCoreNumAiv() { return 24; }
            void GetCoreMemSize(CoreMemType, uint64_t& bytes) { bytes = 192 * 1024; } }; }""",
} | {f"aclrtlaunch_{kernel}.h": emulated.launch_header(kernel) for kernel in emulated.kernel_entries()}

LAUNCHES = """
    #include <malloc.h>
    #include <initializer_list>
    #include <stdexcept>
    #include <string>
    #include <vector>
    struct RazorBuffer { const char* name; uint8_t* data; int64_t bytes, writable; };
    struct RazorCounters { int64_t counters[7]; };
    extern "C" int razor_emulate(const char*, const RazorBuffer*, int64_t, int64_t, uint64_t, int64_t, RazorCounters*,
                                 char*);
    static std::string failing;  // the kernel whose launches fail
    static uint32_t failure;     // with this status
    extern "C" void fail_launches(const char* kernel, uint32_t status) { failing = kernel; failure = status; }
    static uint32_t launch(const char* kernel, uint32_t blocks, std::initializer_list<void*> arguments) {
      if (failing == kernel) return failure;
      std::vector<RazorBuffer> buffers;
      for (void* a : arguments) {
        buffers.push_back({"argument", static_cast<uint8_t*>(a), a ? int64_t(malloc_usable_size(a)) : 0, 1});
      }
      RazorCounters counters;
      char error[512];
      if (razor_emulate(kernel, buffers.data(), buffers.size(), blocks, 3, 188160, &counters, error)) {
        throw std::runtime_error(error);
      }
      return 0;
    }
"""


def emulated_launches() -> str:
    """The launch functions of the toolkit, by the emulation: a C++ source."""
    text = "".join(f'#include "aclrtlaunch_{kernel}.h"\n' for kernel in emulated.kernel_entries()) + LAUNCHES
    for kernel, names in emulated.kernel_entries().items():
        parameters = "".join(f", void* {name}" for name in names)
        text += f'extern "C" uint32_t aclrtlaunch_{kernel}(uint32_t blocks, aclrtStream{parameters}) {{\n'
        text += f'  return launch("{kernel}", blocks, {{{", ".join(names)}}});\n}}\n'
    return text


def build_npu_library(folder: Path) -> Path:
    """torch_npu_ops.cpp and launch.cpp as they are, but for the device: torch.ops.razor_stand_in on CPU tensors."""
    text = (ROOT / "cpp/bindings/torch_npu_ops.cpp").read_text()
    for npu, cpu in (
        ("TORCH_LIBRARY_IMPL(razor, PrivateUse1, m)", "TORCH_LIBRARY_IMPL(razor_stand_in, CPU, m)"),
        ("is_privateuseone()", "is_cpu()"),
        (".pinned_memory(true)", ""),
    ):
        assert text.count(npu) == 1, npu
        text = text.replace(npu, cpu)
    for name, header in (STAND_INS | {"ops.cpp": text, "launches.cpp": emulated_launches()}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(header)
    torch_folder = Path(torch.__file__).parent
    includes = [folder, ROOT / "cpp", ROOT / "cpp/bindings"]
    system = [torch_folder / "include", torch_folder / "include/torch/csrc/api/include"]
    host = ROOT / "cpp/ascend/op_host"
    sources = [folder / "ops.cpp", folder / "launches.cpp", host / "launch.cpp", host / "tiling.cpp"]
    command = [str(emulated.compiler()), *("-std=c++20", "-O0", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror")]
    command += ["-Wno-missing-field-initializers", *(f"-I{f}" for f in includes), *(f"-isystem{f}" for f in system)]
    links = [f"-L{torch_folder}/lib", "-ltorch_cpu", "-ltorch", "-lc10", str(emulated.stock()._name)]
    done = subprocess.run(
        [*command, *map(str, sources), *links, "-o", str(folder / "npu.so")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder / "npu.so"


@pytest.fixture(scope="module")
def npu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, ctypes.CDLL]]:
    """The NPU library's ops, on CPU tensors; and the library, to make launches fail."""
    definitions = torch.library.Library("razor_stand_in", "DEF")
    for op in ("attention", "append", "head_scores"):
        definitions.define(str(getattr(torch.ops.razor, op).default._schema).removeprefix("razor::"))
    library = build_npu_library(tmp_path_factory.mktemp("npu"))
    torch.ops.load_library(str(library))
    yield torch.ops.razor_stand_in, ctypes.CDLL(str(library))
    del definitions


@pytest.mark.slow
def test_npu_library_with_stand_ins(npu: tuple[Any, ctypes.CDLL]) -> None:
    """Checks, tilings, the order of the kernels' arguments, full heads of prompts; not torch_npu, not CANN."""
    ops, _ = npu
    base = Numbers(policy="mixed", dtype="float16", group=3)
    cases = [
        replace(base, length=length, q_len=q_len, alibi=alibi, padded=padded, dense=padded, dtype=dtype)
        for length in ("none", "page + 1", "ring turns often")
        for q_len, alibi, padded, dtype in ((1, False, False, "float16"), (3, True, True, "bfloat16"))
    ]
    cases += [replace(c, q_len=40) for c in cases]
    for c in cases:
        arguments, options, magnitude = inputs(c)
        query, key, value, *cache = (t.clone() for t in arguments)  # each with memory of its own
        cache[2].clamp_(max=1 << 20)
        out = ops.attention(query, key, value, *cache, **options)
        # the framework's attention of full heads rounds on its own
        precision = 1e-5 if c.q_len <= 16 else 2.0**-9
        assert_close(out, expected_attention(arguments, options), magnitude, precision)
        theirs = [t.clone() for t in cache]
        ops.append(key, value, *cache, pad=options["pad"])
        reference.append(key, value, *theirs, pad=options["pad"])
        assert all(same_bits(a, b) for a, b in zip(cache[:7], theirs[:7], strict=True))
    query, key = torch.randn(2, 6, 28, 32).half(), torch.randn(2, 2, 28, 32).half()
    for mine, theirs_ in zip(
        ops.head_scores(query, key, 9, scale=0.2), head_scores(query, key, 9, scale=0.2), strict=True
    ):
        torch.testing.assert_close(mine, theirs_, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="query: expected head_dim a multiple of 16 up to 256 on an NPU, got 8"):
        ops.head_scores(query[..., :8].clone(), key[..., :8].clone(), 9, scale=0.2)
    with pytest.raises(ValueError, match=r"key: expected shape \[2, any, 28, 32\]"):
        ops.head_scores(query, key[:1].clone(), 9, scale=0.2)
    with pytest.raises(NotImplementedError, match="head_scores: expected float16 or bfloat16 on an NPU, got float32"):
        ops.head_scores(query.float(), key.float(), 9, scale=0.2)
    quantised = [torch.zeros(8, 16, 36, dtype=torch.int8)] * 2 + cache[2:]
    with pytest.raises(NotImplementedError, match="append: expected pages of float16 or bfloat16 on an NPU, got quant"):
        ops.append(key, key, *quantised)


@pytest.mark.slow
@pytest.mark.parametrize("op", ["attention", "combine", "append", "head_scores"])
def test_the_status_of_a_launch_reaches_the_caller(npu: tuple[Any, ctypes.CDLL], op: str) -> None:
    ops, library = npu
    (query, key, value, *cache), options, _ = inputs(Numbers(policy="mixed", dtype="float16", q_len=2))
    cache = [t.clone() for t in cache]
    cache[2].clamp_(max=1 << 20)
    before = [t.clone() for t in cache]
    square = torch.randn(1, 4, 28, 64).half()

    def call() -> None:
        if op == "append":
            ops.append(key.clone(), value.clone(), *cache)
        elif op == "head_scores":
            ops.head_scores(square, square.clone(), 9, scale=0.2)
        else:
            ops.attention(query.clone(), key.clone(), value.clone(), *cache, **options)

    library.fail_launches(f"razor_{op}_f16".encode(), 507035)
    named = "attention" if op == "combine" else op  # both launches of one call
    with pytest.raises(RuntimeError, match=f"razor_{named}: status 507035"):
        call()
    assert all(same_bits(a, b) for a, b in zip(cache, before, strict=True))  # `seen` has not grown
    library.fail_launches(b"", 0)
    call()
