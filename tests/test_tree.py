# SPDX-License-Identifier: Apache-2.0
"""The tree's own rules: sizes, who may include and import whom, words, docstrings, headers under test.

Every check is a function of a text; the tests at the end feed each one something it must refuse.
"""

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import razor_attention

ROOT = Path(__file__).resolve().parents[1]
MOST_LINES = 500


def files(*patterns: str) -> list[Path]:
    return sorted({path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()})


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


PYTHON = files("python/**/*.py")
BENCH = files("bench/*.py")
CPP = files("cpp/**/*.h", "cpp/**/*.cpp")
TESTS = files("tests/**/*.py", "tests/native/*.cpp")
BUILD = files("CMakeLists.txt", "third_party/*.cmake", "pyproject.toml", "Makefile", ".ci/*")


def per_file(paths: list[Path]) -> Callable[..., Any]:
    """One test for each file."""
    return pytest.mark.parametrize("path", paths, ids=name)


# --- size, licence, places


@per_file(CPP + PYTHON + TESTS + BENCH)
def test_no_file_is_long(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MOST_LINES


OTHER_SOURCES = files("python/**/*.pyi", "CMakeLists.txt", "cpp/**/CMakeLists.txt", "third_party/*.cmake", "Makefile")


@per_file(CPP + PYTHON + TESTS + BENCH + OTHER_SOURCES)
def test_first_line_is_the_licence(path: Path) -> None:
    assert path.read_text().partition("\n")[0] in (
        "# SPDX-License-Identifier: Apache-2.0",
        "// SPDX-License-Identifier: Apache-2.0",
    )


def test_third_party_holds_no_code() -> None:
    held = {path.name for path in (ROOT / "third_party").iterdir()}
    assert {n for n in held if not n.endswith(".cmake")} <= {"README.md"}


def machine_paths(text: str) -> list[str]:
    """Absolute paths into somebody's machine."""
    return re.findall(r"(?<![\w.~-])/(?:tmp|home|root|work|Users|mnt)/\S*", text)


def test_no_paths_of_a_machine() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    found = {}
    for path in (ROOT / entry for entry in listed.split("\0") if entry):
        raw = path.read_bytes() if path.is_file() else b""
        if b"\0" not in raw and (hits := machine_paths(raw.decode())):
            found[name(path)] = hits
    assert not found


# --- C++: who includes whom


def includes(text: str) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', text, re.MULTILINE)


FOREIGN_HEADERS = re.compile(r"(torch|ATen|c10|pybind11|numpy)/|(Python|omp|kernel_operator)\.h$|acl(/|\w*\.h)")


def forbidden_includes(path: str, text: str) -> list[str]:
    """Of a file under cpp/. Arrows point down: bindings -> razor -> razor/cpu -> formats."""
    found = includes(text)
    if path.startswith("cpp/bindings/"):  # each sees one host, and no kernels
        torch_side = path.endswith(("torch_ops.cpp", "torch_npu_ops.cpp", "full_heads.h", "torch_arrays.h"))
        other = r"(pybind11|numpy)/|Python\.h$" if torch_side else r"(torch\w*|ATen|c10)/"
        return [i for i in found if re.match(other, i) or (i.startswith("razor/cpu/") and i != "razor/cpu/isa.h")]
    if path.startswith("cpp/ascend/"):  # tests/test_ascend_emulation.py
        return []
    wrong = [
        i for i in found if FOREIGN_HEADERS.match(i) or i.startswith(("bindings/", "array_args", "ascend/", "../"))
    ]
    if not path.startswith("cpp/razor/cpu/"):
        return wrong
    file = path.removeprefix("cpp/razor/cpu/")
    allowed = {"razor/float16.h", "razor/kv_format.h", "razor/cpu/kernels.h"}
    if file.startswith("isa."):
        allowed = {"razor/cpu/isa.h", "razor/check.h"}
    elif file == "kernels.cpp":
        allowed |= {"razor/cpu/isa.h"}
    elif file.startswith("kernels_"):  # one per instruction set: the vectors, then the kernels
        return wrong + [i for i in found if not re.fullmatch(r"razor/cpu/(vec_\w+\.h|[\w-]+-inl\.h)", i)]
    ours = [i for i in found if i.startswith("razor/") and i not in allowed]
    standard = [i for i in found if "/" not in i and i not in ("stdint.h", "string.h", "immintrin.h", "arm_neon.h")]
    kernel = file.endswith("-inl.h") or file.startswith("vec_")  # no std templates compiled for one CPU only
    inner = r"razor/cpu/(vec_\w+\.h|[\w-]+-inl\.h)"
    return wrong + [i for i in ours if not (kernel and re.fullmatch(inner, i))] + (standard if kernel else [])


@per_file(CPP)
def test_include_direction(path: Path) -> None:
    assert forbidden_includes(name(path), path.read_text()) == []


OPEN_MP = re.compile(r"#\s*pragma\s+omp|omp\.h|-fopenmp|OpenMP::|find_package\(\s*OpenMP|\bomp_\w+\(|libgomp|libiomp")


@per_file(CPP + BUILD)
def test_no_openmp(path: Path) -> None:
    assert not OPEN_MP.search(path.read_text())


# --- Python: who imports whom

FRONT_DOORS = {"cli", "command", "duo", "export", "ra_compression", "bench"}
RANK = {
    "reference": 0,
    "checks": 0,
    "op_checks": 0,
    "rotation": 0,
    "_core": 0,
    "_native": 1,
    "ops": 2,
    "hf": 4,
    "vllm": 4,
    "__init__": 4,
    "cli": 6,
}
RANK |= (
    {"atb": 4}
    | dict.fromkeys(("files", "heads", "alibi", "plan", "pages", "cache"), 3)
    | dict.fromkeys(FRONT_DOORS - {"cli"}, 5)
)


def room(path: str) -> str:
    """Room of a file: its module, or the folder that it is in."""
    if path.startswith("bench/"):
        return "bench"
    return path.removeprefix("python/razor_attention/").partition("/")[0].removesuffix(".py")


def imports(path: str, text: str) -> Iterator[tuple[str, str]]:
    """(package, room) of each import; the room is "" outside our package."""
    package = ["razor_attention", *Path(path.removeprefix("python/razor_attention/")).parts[:-1]]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            wanted = [".".join([*base, alias.name]) for alias in node.names]
        else:
            continue
        for full in wanted:
            top, *rest = full.split(".")
            inner = rest[0] if rest and rest[0] in RANK else "__init__"
            yield top, inner if top == "razor_attention" else ""


def forbidden_imports(path: str, text: str) -> list[str]:
    here, wrong = room(path), []
    for package, there in imports(path, text):
        if package in ("transformers", "tqdm", "safetensors") and here != "hf" and here != "bench":
            wrong.append(f"{package}: hf/ alone may")
        if package == "vllm" and here not in ("vllm", "bench"):
            wrong.append(f"{package}: vllm/ alone may")
        if here == "reference" and package not in ("torch", "__future__"):
            wrong.append(f"{package}: reference.py imports torch alone")
        if package == "razor_attention" and there != here:
            if there in FRONT_DOORS and here not in ("cli", "command"):
                wrong.append(f"{there}: nobody imports a front door")
            elif RANK[there] > RANK[here] and (here, there) != ("command", "bench"):
                wrong.append(f"{there}: upwards")
    return wrong


@per_file(PYTHON)
def test_import_direction(path: Path) -> None:
    if room(name(path)) not in RANK:
        pytest.fail(f"{name(path)}: expected a room of RANK")
    assert forbidden_imports(name(path), path.read_text()) == []


@per_file([path for path in BENCH if path.name != "demo.py"])  # which, run as a program, is the command line's demo
def test_bench_imports_no_front_door(path: Path) -> None:
    assert [there for _, there in imports(name(path), path.read_text()) if there in FRONT_DOORS - {"bench"}] == []


def test_importing_the_package_imports_no_transformers() -> None:
    code = "import sys, razor_attention; print(*{module.partition('.')[0] for module in sys.modules})"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert {"torch", "razor_attention"} <= set(out.split())
    assert not {"transformers", "matplotlib", "safetensors"} & set(out.split())


# --- words

KNOW_FOREIGN_FORMATS = {"files.py", "ra_compression.py", "duo.py"}
IN_VLLM = files("python/razor_attention/vllm/*.py")  # vLLM's own words for its blocks
FOREIGN = re.compile(
    r"\b(wins?|slots?|streaming|razor offset|prefix matching|recent (size|window|tokens)|local capacity|"
    r"virtual token|block tables?)\b"
)


def words(identifier: str) -> str:
    """snake_case, CamelCase and kCamelCase as words with spaces between."""
    return " ".join(re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", identifier)).lower()


def cpp_identifiers(text: str) -> set[str]:
    code = re.sub(r'//[^\n]*|/\*.*?\*/|"(\\.|[^"\\])*"', " ", text, flags=re.DOTALL)
    return set(re.findall(r"[A-Za-z_]\w*", code))


def python_identifiers(text: str) -> set[str]:
    """Names that a file gives or uses, not its strings and comments. `Plan.streaming` and `slots=True` are known."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Name(id=n) | ast.arg(arg=n) | ast.ClassDef(name=n) | ast.alias(name=n):
                found.add(n)
            case ast.FunctionDef(name=n) | ast.Attribute(attr=n) if n != "streaming":
                found.add(n)
            case ast.keyword(arg=str(n)) if n != "slots":
                found.add(n)
    return found


def foreign_words(identifiers: set[str]) -> set[str]:
    return {i for i in identifiers if FOREIGN.search(words(i))}


@per_file([path for path in CPP + PYTHON + BENCH if path.name not in KNOW_FOREIGN_FORMATS and path not in IN_VLLM])
def test_no_foreign_words(path: Path) -> None:
    find = python_identifiers if path.suffix == ".py" else cpp_identifiers
    assert foreign_words(find(path.read_text())) == set()


# --- docstrings


def undocumented(text: str, told_by_host: Callable[[str], bool] = lambda _: False) -> list[str]:
    """Public modules, classes, functions and methods without a docstring. One-line properties speak for themselves."""

    def look(node: Any, where: str) -> Iterator[str]:
        for child in node.body:
            if not isinstance(child, ast.FunctionDef | ast.ClassDef) or child.name.startswith("_"):
                continue
            decorated = {ast.unparse(decorator) for decorator in child.decorator_list}
            plain = "property" in decorated and len(child.body) == 1
            told = isinstance(node, ast.ClassDef) and (plain or told_by_host(child.name))
            if not told and not ast.get_docstring(child):
                yield where + child.name
            if isinstance(child, ast.ClassDef):
                yield from look(child, f"{where}{child.name}.")

    tree = ast.parse(text)
    return ([] if ast.get_docstring(tree) else ["module"]) + list(look(tree, ""))


# Methods and properties of its classes that ours fill in; it is not installed here.
TOLD_BY_VLLM = {
    "add_local_computed_blocks",
    "allocate_external_computed_blocks",
    "allocate_new_blocks",
    "find_longest_cache_hit",
    "get_builder_cls",
    "get_impl_cls",
    "get_name",
    "get_num_blocks_to_allocate",
    "get_supported_kernel_block_sizes",
    "max_memory_usage_bytes",
    "max_num_blocks_per_req",
    "supported_kv_cache_layouts",
}


@per_file(PYTHON)
def test_public_definitions_have_docstrings(path: Path) -> None:
    def told_by_host(method: str) -> bool:
        from transformers.cache_utils import Cache, DynamicLayer

        if path.parent.name == "vllm":
            return method in TOLD_BY_VLLM
        return path.parent.name == "hf" and (hasattr(Cache, method) or hasattr(DynamicLayer, method))

    assert undocumented(path.read_text(), told_by_host) == []


def missing_parts(function: Callable[..., Any], doc: str) -> list[str]:
    """Arguments that a docstring does not explain, tensors without their shape, results without a description."""
    signature, missing = inspect.signature(function), []
    for argument in signature.parameters.values():
        if argument.name in ("self", "cls"):
            continue
        if not re.search(rf"\b{argument.name}\b[\w, ]*:", doc):
            missing.append(argument.name)
        elif re.search(r"\bTensor\b", str(argument.annotation)) and not re.search(
            rf"\b{argument.name}\b[\w, ]*: \(", doc
        ):
            missing.append(f"{argument.name}: shape")
    result = str(signature.return_annotation)
    if not re.search(r"None|NoReturn|Iterator|_empty", result) and signature.parameters and "Returns:" not in doc:
        missing.append("Returns")
    return missing


def public() -> Iterator[tuple[str, Callable[..., Any], str]]:
    """(name, function, docstring) of everything that a user calls; a class is documented as its constructor."""
    for key in razor_attention.__all__:
        thing = getattr(razor_attention, key)
        if isinstance(thing, ModuleType):
            yield from ((f"{key}.{op}", getattr(thing, op), getattr(thing, op).__doc__) for op in OPS)
        elif inspect.isclass(thing):
            yield key, thing.__init__, thing.__doc__ or ""
            for method, value in vars(thing).items():
                function = getattr(value, "__func__", value)
                if inspect.isfunction(function) and not method.startswith("_") and function.__doc__:
                    yield f"{key}.{method}", function, function.__doc__
        elif inspect.isfunction(thing):
            yield key, thing, thing.__doc__ or ""


OPS = ("attention", "append", "head_scores", "alibi_windows")


@pytest.mark.parametrize(("function", "doc"), [pytest.param(f, d, id=key) for key, f, d in public()])
def test_public_docstrings_have_all_parts(function: Callable[..., Any], doc: str) -> None:
    assert missing_parts(function, doc) == []


# --- what is under test

# Header or kernel file -> the test file that runs it, and a word there that says so.
UNDER_TEST = {
    "alibi_windows.h": ("test_alibi_windows.py", "alibi_windows"),
    "attention.h": ("test_attention.py", "LayerCache"),
    "check.h": ("test_ops.py", "ValueError"),
    "cpu/attention-inl.h": ("test_attention.py", "LayerCache"),
    "cpu/attention_amx-inl.h": ("test_isa.py", "amx"),
    "cpu/attention_tile-inl.h": ("test_attention.py", "few_queries"),
    "cpu/decode-inl.h": ("test_attention.py", "few_queries"),
    "cpu/decode_amx-inl.h": ("test_isa.py", "few queries"),
    "cpu/decode_bf16-inl.h": ("test_isa.py", "avx512_bf16"),
    "cpu/decode_softmax-inl.h": ("test_isa.py", "avx512_bf16"),
    "cpu/isa.h": ("test_isa.py", "RAZOR_ISA"),
    "cpu/kernels.h": ("test_isa.py", "RAZOR_ISA"),
    "cpu/kv_codes-inl.h": ("test_kv_format.py", "int8"),
    "cpu/kv_codes_bf16-inl.h": ("test_quantised.py", "few_queries"),
    "cpu/kv_rows-inl.h": ("test_kv_cache.py", "append"),
    "cpu/products-inl.h": ("test_alibi_windows.py", "alibi_windows"),
    "cpu/products_amx-inl.h": ("test_isa.py", "amx"),
    "cpu/vec_avx2.h": ("test_isa.py", "avx2"),
    "cpu/vec_avx512.h": ("test_isa.py", "avx512"),
    "cpu/vec_neon.h": ("test_isa.py", "test_neon_under_emulation"),
    "cpu/vec_scalar.h": ("test_isa.py", "scalar"),
    "decode.h": ("test_attention.py", "few_queries"),
    "floats.h": ("test_alibi_windows.py", "alibi_windows"),
    "float16.h": ("test_attention.py", "float16"),
    "head_scores.h": ("test_head_scores.py", "head_scores"),
    "kv_cache.h": ("test_kv_cache.py", "append"),
    "kv_format.h": ("test_kv_format.py", "int4"),
    "parallel.h": ("test_attention.py", "set_num_threads"),
    "softmax_state.h": ("test_attention.py", "few_queries"),
    "tiled_scratch.h": ("test_attention.py", "bfloat16"),
}


def test_every_core_header_is_under_test() -> None:
    headers = {path.relative_to(ROOT / "cpp/razor").as_posix() for path in files("cpp/razor/**/*.h")}
    assert headers == set(UNDER_TEST)


@pytest.mark.parametrize("header", UNDER_TEST)
def test_core_header_is_run_by(header: str) -> None:
    test, word = UNDER_TEST[header]
    assert word in (ROOT / "tests" / test).read_text()


# --- the checks themselves: each refuses what it is there for


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("cpp/razor/attention.cpp", "#include <torch/extension.h>"),
        ("cpp/razor/kv_cache.h", "#include <ATen/Parallel.h>"),
        ("cpp/razor/kv_cache.h", "#  include <omp.h>"),
        ("cpp/razor/check.h", '#include "Python.h"'),
        ("cpp/razor/check.h", "#include <acl/acl.h>"),
        ("cpp/razor/check.h", '#include "kernel_operator.h"'),
        ("cpp/razor/cpu/isa.cpp", "#include <pybind11/pybind11.h>"),
        ("cpp/razor/cpu/isa.h", '#include "razor/cpu/kernels.h"'),
        ("cpp/razor/cpu/kernels.h", '#include "razor/attention.h"'),
        ("cpp/razor/cpu/attention-inl.h", '#include "razor/kv_cache.h"'),
        ("cpp/razor/cpu/attention-inl.h", "#include <vector>"),
        ("cpp/razor/cpu/vec_avx2.h", '#include "razor/check.h"'),
        ("cpp/razor/cpu/kernels_avx2.cpp", "#include <algorithm>"),
        ("cpp/bindings/torch_ops.cpp", '#include "razor/cpu/kernels.h"'),
        ("cpp/bindings/torch_ops.cpp", "#include <Python.h>"),
        ("cpp/bindings/core_module.cpp", "#include <torch/torch.h>"),
        ("cpp/bindings/core_module.cpp", '#include "torch_npu/csrc/core/npu/NPUStream.h"'),
        ("cpp/bindings/torch_npu_ops.cpp", "#include <pybind11/pybind11.h>"),
        ("cpp/razor/attention.cpp", '#include "ascend/op_host/tiling.h"'),
    ],
)
def test_include_check(path: str, line: str) -> None:
    assert forbidden_includes(path, f"// text\n{line}\n")


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("plan.py", "from .hf import attach"),
        ("files.py", "def f():\n    import transformers.utils"),
        ("heads.py", "from tqdm import tqdm"),
        ("cache.py", "from vllm import LLM"),
        ("hf/cache.py", "import vllm.config"),
        ("cache.py", "from razor_attention import attach"),
        ("alibi.py", "from . import hf"),
        ("reference.py", "import numpy"),
        ("reference.py", "from . import ops"),
        ("ops.py", "from .plan import Plan"),
        ("hf/cache.py", "from ..cli import main"),
        ("hf/models.py", "from ..bench import harness"),
        ("hf/models.py", "import razor_attention.command"),
        ("__init__.py", "from . import cli"),
        ("plan.py", "from . import export"),
        ("cache.py", "from .atb import cache_tensors"),
        ("duo.py", "from . import ra_compression"),
    ],
)
def test_import_check(path: str, line: str) -> None:
    assert forbidden_imports(f"python/razor_attention/{path}", line)


@pytest.mark.parametrize(
    "line",
    ["wins = 1", "def f(slot): ...", "x.block_tables", "class VirtualToken: ...", "f(recent_size=1)", "streaming = 2"],
)
def test_word_check_for_python(line: str) -> None:
    assert foreign_words(python_identifiers(line))
    assert not foreign_words(python_identifiers("@dataclass(slots=True)\nclass A: ...\nPlan.streaming(1, 'streaming')"))


@pytest.mark.parametrize("line", ["int win_size;", "float razorOffset;", "kPrefixMatching", "int64_t slot = 0;"])
def test_word_check_for_cpp(line: str) -> None:
    assert foreign_words(cpp_identifiers(f"{line}  // text"))
    assert not foreign_words(cpp_identifiers('// wins\n/* slot */ f("block_table"); window_size; twin;'))


def test_other_checks() -> None:
    assert undocumented("def f(): ...") == ["module", "f"]
    assert undocumented('"""M."""\nclass A:\n    """A."""\n    def f(self): ...\n    def _g(self): ...') == ["A.f"]
    assert missing_parts(razor_attention.head_scores, "query: (batch)\nkey: tensor\nperiod: 3") == [
        "key: shape",
        "scale",
        "Returns",
    ]
    assert machine_paths("see " + "/" + "home/me/x.py") != []
    assert machine_paths("https://a.org/home/x, python/tmp/x") == []
    assert OPEN_MP.search("#pragma omp parallel for")
