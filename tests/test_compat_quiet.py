# SPDX-License-Identifier: Apache-2.0
"""Nothing of ours makes transformers warn, and its names that may change live in one module."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import quiet_worker

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "python/razor_attention"
# Baichuan is a model of transformers' kind, built from parts of its Llama.
OWN_IMPORTS = {"hf/names.py", "hf/baichuan.py"}


def test_no_door_prints_a_deprecation(tmp_path):
    command = [sys.executable, quiet_worker.__file__, str(tmp_path), str(ROOT / "bench/model")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    for output in (done.stdout, done.stderr):
        assert "deprecated" not in output
        assert "Warning" not in output


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_inner_names_of_transformers_live_in_one_module(path):
    """Names of its top level stay; names of its modules have moved before."""
    tree = ast.parse(path.read_text())
    modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level]
    modules += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    inner = [name for name in modules if name.startswith("transformers.")]
    assert not inner or str(path.relative_to(PACKAGE)) in OWN_IMPORTS
    if str(path.relative_to(PACKAGE)) != "hf/names.py":
        words = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        words |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword | ast.arg)}
        assert "past_key_values" not in words
