# SPDX-License-Identifier: Apache-2.0
"""Without one of its native libraries the package says which one, where it looked, and what to do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import torch

import razor_attention
from razor_attention import _core

CORE = "librazor_core.so"
LIBRARIES = {name: Path(str(files("razor_attention") / name)) for name in (CORE, "_torch_ops.so")}
LIBRARIES["_core"] = Path(_core.__file__)
IMPORT = """
try:
    import razor_attention
except ImportError as error:
    print(error, type(error.__cause__).__name__, sep="|")
"""


def message_of_import(folder: Path, missing: str) -> str:
    """What `import razor_attention` says where one library is not."""
    package = folder / "razor_attention"
    shutil.copytree(
        Path(razor_attention.__file__).parent, package, ignore=shutil.ignore_patterns("*.so", "__pycache__", "bench")
    )
    for name, path in LIBRARIES.items():
        if name != missing:
            shutil.copy(path, package)
    paths = (str(folder), str(Path(torch.__file__).parents[1]))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    # Without `site` no hook of an editable install finds the libraries where they are.
    command = [sys.executable, "-S", "-c", IMPORT]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("missing", "reason", "cause"),
    [
        ("_core", "No module named 'razor_attention._core'", "ModuleNotFoundError"),
        (
            "librazor_core.so",
            "librazor_core.so: cannot open shared object file: No such file or directory",
            "ImportError",
        ),
    ],
)
def test_no_core(tmp_path: Path, missing: str, reason: str, cause: str) -> None:
    assert message_of_import(tmp_path, missing) == (
        f"razor_attention: expected its compiled part _core in {tmp_path / 'razor_attention'}, got: {reason}; "
        f"build it with `pip install .` in the source tree (torch first)|{cause}"
    )


def test_no_torch_ops(tmp_path: Path) -> None:
    start, _, end = message_of_import(tmp_path, "_torch_ops.so").partition(", got: ")
    assert start == f"razor_attention: expected a loadable {tmp_path / 'razor_attention' / '_torch_ops.so'}"
    assert end.endswith("; reinstall with `pip install .` after torch|OSError")
