# SPDX-License-Identifier: Apache-2.0
"""Every instruction set is right, is really used, and stays in its own object file; what the libraries link."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from functools import cache
from importlib.resources import files
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

import oracle
from cases import ARITHMETIC, CASES, Case, assert_close, case_id, to_numpy
from razor_attention import reference

ROOT = Path(__file__).parent.parent
NEEDS = {"scalar": set(), "neon": {"asimd"}, "avx2": {"avx2", "fma", "f16c"}}  # in /proc/cpuinfo
NEEDS["avx512"] = NEEDS["avx2"] | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
NEEDS["avx512_bf16"] = NEEDS["avx512"] | {"avx512_bf16"}
NEEDS["amx"] = NEEDS["avx512_bf16"] | {"amx_tile", "amx_bf16"}
ISAS = list(NEEDS)
SMALL_CASES = [case for case in CASES if sum(call.q_len for call in case.calls) < 1000]
WINDOWS = [(37, 50, 33, "float32"), (128, 31, 64, "bfloat16"), (5, 70, 7, "float16")]  # q_rows, k_rows, cols, dtype
# period, repeats, head_dim, dtype
SCORES = [(3, 4, 33, "float32"), (40, 2, 64, "bfloat16"), (5, 3, 7, "float16"), (1, 3, 64, "bfloat16"),
          (140, 2, 33, "float16"), (300, 2, 17, "float32")]  # fmt: skip

ROUNDED = [  # and a scale: beyond what tiles take, without it, subnormal; many columns
    *((300, 170, 96, "float32", scale) for scale in (1.0, 1e-3, 1e12, 1e-12, 1e-20)),
    *((90, 400, 40, dtype, 0.02) for dtype in ("float32", "bfloat16", "float16")),
    (33, 70, 5000, "float32", 0.02),
]
WINDOW_NUMBERS = {"theta": 1e-5, "alpha": 100, "method": "msmodelslim"}

CHILD = """
import sys
sys.path.insert(0, sys.argv[2])
import numpy, torch
import razor_attention, test_isa
torch.set_num_threads(1)
results = {f"{case.name}.{i}": out.double().numpy()
           for case in test_isa.SMALL_CASES for i, out in enumerate(case.run())}
for i, score in enumerate(test_isa.SCORES):
    results[f"scores.{i}"] = torch.stack(razor_attention.head_scores(*test_isa.score_inputs(*score), score[0])).numpy()
for i, shape in enumerate(test_isa.WINDOWS + test_isa.ROUNDED):
    windows, bound = torch.ops.razor.alibi_windows(*test_isa.window_inputs(*shape), **test_isa.WINDOW_NUMBERS)
    results |= {f"windows.{i}": windows.numpy(), f"bound.{i}": bound.numpy()}
numpy.savez(sys.argv[1], isa=razor_attention.isa(), **results)
"""


def score_inputs(period: int, repeats: int, head_dim: int, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    draw = np.random.default_rng(period)
    shapes = [(1, heads, 1 + period * repeats, head_dim) for heads in (4, 2)]
    q, k = (torch.from_numpy(draw.standard_normal(shape)).to(getattr(torch, dtype)) for shape in shapes)
    return q, k


def window_inputs(
    q_rows: int, k_rows: int, cols: int, dtype: str, scale: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three heads, query by rows, key by columns. Without a scale no product is rounded; otherwise all are random."""
    draw = np.random.default_rng(q_rows)
    shapes = (q_rows, 3, cols), (3, cols, k_rows)
    q, k = (torch.from_numpy(scale * draw.standard_normal(s) if scale else draw.integers(-8, 9, s) / 8) for s in shapes)
    return q.to(getattr(torch, dtype)), k.to(getattr(torch, dtype)).permute(2, 0, 1), torch.tensor([0.5, 0.25, 0.125])


def present() -> list[str]:
    if not Path("/proc/cpuinfo").exists():
        return ["scalar"]
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((x for x in lines if x.startswith(("flags", "Features"))), "").split()
    return [isa for isa, needs in NEEDS.items() if needs <= set(flags)]


def run_child(code: str, isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"RAZOR_ISA": isa}
    return subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, np.ndarray]]:
    """{isa: {result: array}}, each instruction set in a process of its own."""
    found = {}
    for isa in present():
        path = tmp_path_factory.mktemp("isa") / f"{isa}.npz"
        child = run_child(CHILD, isa, str(path), str(ROOT / "tests"))
        assert child.returncode == 0, child.stderr
        with np.load(path) as arrays:
            found[isa] = dict(arrays)
    return found


@cache
def expected(case: Case) -> list[np.ndarray]:
    return case.expected()


@pytest.mark.parametrize("isa", ISAS)
def test_the_one_asked_for_is_used(isa: str, results: dict[str, dict[str, np.ndarray]]) -> None:
    if isa not in results:
        pytest.skip(f"this CPU has no {isa}")
    assert str(results[isa]["isa"]) == isa


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", SMALL_CASES, ids=case_id)
def test_attention(isa: str, case: Case, results: dict[str, dict[str, np.ndarray]]) -> None:
    if isa not in results:
        pytest.skip(f"this CPU has no {isa}")
    dtype = getattr(torch, case.dtype)
    for i, by_oracle in enumerate(expected(case)):
        assert_close(torch.from_numpy(results[isa][f"{case.name}.{i}"]).to(dtype), by_oracle, case.magnitude())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("number", range(len(SCORES)))
def test_head_scores(isa: str, number: int, results: dict[str, dict[str, np.ndarray]]) -> None:
    if isa not in results:
        pytest.skip(f"this CPU has no {isa}")
    q, k = score_inputs(*SCORES[number])
    for head in range(4):
        by_oracle = oracle.head_scores(
            to_numpy(q[0, head]), to_numpy(k[0, head // 2]), SCORES[number][0], scale=q.shape[-1] ** -0.5
        )
        error = np.abs(results[isa][f"scores.{number}"][:, 0, head] - by_oracle)
        assert (error <= ARITHMETIC[torch.float32] * np.array(by_oracle)).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("number", range(len(WINDOWS)))
def test_alibi_windows(isa: str, number: int, results: dict[str, dict[str, np.ndarray]]) -> None:
    if isa not in results:
        pytest.skip(f"this CPU has no {isa}")
    q, k, slopes = window_inputs(*WINDOWS[number])
    windows, bound = reference.alibi_windows(q, k, slopes, None, **WINDOW_NUMBERS)
    assert results[isa][f"windows.{number}"].tolist() == windows.tolist()
    assert results[isa][f"bound.{number}"].tolist() == bound.tolist()


@pytest.mark.parametrize("number", range(len(WINDOWS), len(WINDOWS) + len(ROUNDED)))
def test_the_same_bound_with_every_fma(number: int, results: dict[str, dict[str, np.ndarray]]) -> None:
    """A product is one chain of fma; AMX only says where the largest cannot be."""
    q, k, slopes = window_inputs(*ROUNDED[number - len(WINDOWS)])
    bound = reference.alibi_windows(q, k, slopes, None, **WINDOW_NUMBERS)[1].numpy()
    for found in results.values():
        assert found[f"bound.{number}"] == pytest.approx(bound, rel=1e-5)
    assert len({found[f"bound.{number}"].tobytes() for isa, found in results.items() if isa != "scalar"}) <= 1


@pytest.mark.skipif(len(present()) < 2, reason="this CPU has one instruction set only")
def test_they_are_different_code(results: dict[str, dict[str, np.ndarray]]) -> None:
    """Rounding differs somewhere between any two, in attention and in scores."""
    for a, b in combinations(results, 2):
        parts = ["prefill", "scores"]
        if a.startswith("avx512"):  # kernels of another kind only where bf16 queries meet keys
            parts = ["few queries"] if b == "avx512_bf16" else ["bfloat16", "few queries", "scores"]
        for part in parts:
            names = [name for name in results[a] if name.startswith(part)]
            assert any(not np.array_equal(results[a][name], results[b][name]) for name in names), (a, b, part)


@pytest.mark.parametrize("wrong", ["sse9", "AVX2"])
def test_a_wrong_name_is_refused(wrong: str) -> None:
    child = run_child("import razor_attention; print(razor_attention.isa())", wrong)
    assert child.returncode != 0
    message = f"RAZOR_ISA: expected one of scalar, neon, avx2, avx512, avx512_bf16, amx, got {wrong}"
    assert child.stderr.strip().splitlines()[-1] == f"ValueError: {message}"


def test_one_that_the_cpu_lacks_is_refused() -> None:
    lacking = next(isa for isa in ISAS if isa not in present())
    child = run_child("import razor_attention; print(razor_attention.isa())", lacking)
    known = ", ".join(present())
    message = f"RAZOR_ISA: expected an instruction set of this CPU ({known}), got {lacking}"
    assert child.stderr.strip().splitlines()[-1] == f"ValueError: {message}"


def test_an_empty_name_means_the_best() -> None:
    child = run_child("import razor_attention; print('isa', razor_attention.isa())", "")
    assert child.stdout.splitlines()[-1] == f"isa {present()[-1]}"


# What the linker sees.


def symbols(library: Path, *options: str, nm: str = "nm") -> list[tuple[str, str]]:
    """(type, demangled name) of every symbol."""
    if shutil.which(nm) is None:
        pytest.skip(f"{nm} is not installed")
    listing = subprocess.run([nm, "-C", *options, str(library)], capture_output=True, text=True, check=True).stdout
    return [(m[1], m[2]) for m in re.finditer(r"^[0-9a-f ]{16} ([A-Za-z]) (.*)$", listing, re.MULTILINE)]


def dynamic_section(library: Path) -> list[tuple[str, str]]:
    """(NEEDED | RUNPATH | ..., value)"""
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    listing = subprocess.run(["readelf", "-dW", str(library)], capture_output=True, text=True, check=True).stdout
    return re.findall(r"\((\w+)\).*\[(.*)\]", listing)


OBJECTS = sorted(ROOT.glob("build/*/CMakeFiles/razor_core.dir/cpp/razor/cpu/kernels_*.cpp.o"))


@pytest.mark.skipif(not OBJECTS, reason="no build tree")
@pytest.mark.parametrize("path", OBJECTS, ids=lambda p: f"{p.relative_to(ROOT).parts[1]}-{p.stem}")
def test_kernels_share_no_code_across_instruction_sets(path: Path) -> None:
    """A weak symbol compiled for one instruction set may be the copy that the linker keeps for every CPU."""
    found = symbols(path)
    isa = path.name.removeprefix("kernels_").removesuffix(".cpp.o")
    assert [name for kind, name in found if kind in "WwVvu"] == []
    assert [name for kind, name in found if kind in "TDBRGSC"] == [f"razor::cpu::kernels_{isa}"]
    assert len([name for kind, name in found if kind == "t"]) > 5


@pytest.mark.skipif(not OBJECTS, reason="no build tree")
@pytest.mark.parametrize("path", OBJECTS, ids=lambda p: f"{p.relative_to(ROOT).parts[1]}-{p.stem}")
def test_products_of_bf16_are_used_where_they_exist(path: Path) -> None:
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed")
    code = subprocess.run(["objdump", "-d", str(path)], capture_output=True, text=True, check=True).stdout
    assert ("tdpbf16ps" in code) == (path.name == "kernels_amx.cpp.o")
    assert ("vdpbf16ps" in code) == (path.name == "kernels_avx512_bf16.cpp.o")


# Another processor.

KERNELS = {"attention_block", "score_block", "decode_runs", "largest_product"}
KERNELS |= {"add_rows", "load_row", "store_row", "dot", "encode_rows", "decode_rows"}
CROSS, EMULATOR = "aarch64-linux-gnu-", "qemu-aarch64-static"


def build_core(folder: Path, options: dict[str, str], *targets: str) -> None:
    """The core without bindings, warnings taken for errors."""
    options = {
        **{"CMAKE_BUILD_TYPE": "Release", "RAZOR_BINDINGS": "OFF", "RAZOR_WERROR": "ON", "RAZOR_COMPARE_KERNELS": "ON"},
        **options,
    }
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), *(f"-D{key}={x}" for key, x in options.items())]
    for command in (configure, ["cmake", "--build", str(folder), "--target", *targets]):
        built = subprocess.run(command, capture_output=True, text=True)
        assert built.returncode == 0, built.stdout + built.stderr


@pytest.mark.slow
def test_clang_builds_the_core(tmp_path: Path) -> None:
    """And its kernels agree with the scalar ones, on the best instruction set of this CPU."""
    for tool in ("cmake", "clang", "clang++"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    options = {"CMAKE_C_COMPILER": "clang", "CMAKE_CXX_COMPILER": "clang++"}
    build_core(tmp_path, options, "razor_core", "compare_kernels")
    compared = subprocess.run([str(tmp_path / "compare_kernels")], capture_output=True, text=True)
    assert compared.returncode == 0, compared.stdout + compared.stderr


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() == "aarch64", reason="neon is tested as it is")
def test_neon_under_emulation(tmp_path: Path) -> None:
    """Every kernel of neon against the scalar one, by a program built for aarch64."""
    for tool in ("cmake", f"{CROSS}gcc", f"{CROSS}g++", f"{CROSS}nm", EMULATOR):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    options = {
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_C_COMPILER": f"{CROSS}gcc",
        "CMAKE_CXX_COMPILER": f"{CROSS}g++",
        "CMAKE_EXE_LINKER_FLAGS": "-static",
    }
    build_core(tmp_path, options, "compare_kernels")
    compared = subprocess.run([EMULATOR, str(tmp_path / "compare_kernels")], capture_output=True, text=True)
    assert compared.returncode == 0, compared.stdout + compared.stderr
    lines = [line.split() for line in compared.stdout.splitlines()]
    assert [kernel for _, kernel, _ in lines] == sorted(KERNELS)
    assert all(isa == "neon" and int(count) > 100 for isa, _, count in lines)
    (kernels,) = tmp_path.rglob("kernels_neon.cpp.o")
    assert [name for kind, name in symbols(kernels, nm=f"{CROSS}nm") if kind in "WwVvuTDBRGSC"] == [
        "razor::cpu::kernels_neon"
    ]


def library(name: str) -> Path:
    return Path(str(files("razor_attention") / name))


def test_torch_library_needs_nothing_of_torch_but_its_c_interface() -> None:
    path = library("_torch_ops.so")
    needed = [value for tag, value in dynamic_section(path) if tag == "NEEDED"]
    assert "libtorch_cpu.so" in needed
    assert [n for n in needed if re.search("torch|c10|gomp|iomp|omp|python|mkl", n)] == ["libtorch_cpu.so"]
    wanted = [name for kind, name in symbols(path, "-D", "--undefined-only") if kind == "U"]
    assert [name for name in wanted if re.match(r"(\w+ )*(torch|at|c10|caffe2)::", name)] == []
    assert any(name.startswith("aoti_torch_") for name in wanted)


@pytest.mark.parametrize("release", ["2_10", "2_15"])
def test_one_build_serves_every_torch(release: str) -> None:
    wanted = {name for _, name in symbols(library("_torch_ops.so"), "-D", "--undefined-only")}
    wanted = {name for name in wanted if re.match(r"(aoti_)?torch_", name)}
    exported = set((ROOT / f"tests/data/torch_symbols_{release}.txt").read_text().split())
    assert wanted
    assert wanted <= exported


@pytest.mark.parametrize("name", ["_torch_ops.so", "_core"])
def test_libraries_find_the_core_next_to_themselves(name: str) -> None:
    path = library(name) if name.endswith(".so") else Path(sys.modules["razor_attention._core"].__file__ or "")
    section = dynamic_section(path)
    assert ("NEEDED", "librazor_core.so") in section
    assert [value for tag, value in section if tag in ("RPATH", "RUNPATH")] == ["$ORIGIN"]


def test_core_needs_neither_torch_nor_python_nor_openmp() -> None:
    needed = [value for tag, value in dynamic_section(library("librazor_core.so")) if tag == "NEEDED"]
    assert [n for n in needed if re.search("torch|c10|omp|python", n)] == []
    exported = {name.split("(")[0] for kind, name in symbols(library("librazor_core.so"), "-D", "--defined-only")
                if kind == "T"}  # fmt: skip
    assert {"razor::attention", "razor::append", "razor::head_scores", "razor::alibi_windows", "razor::isa"} <= exported
    assert not any("kernels" in name for name in exported)
