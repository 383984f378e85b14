# SPDX-License-Identifier: Apache-2.0
"""The README keeps its word: its example runs, the files it names exist, its commands are the Makefile's."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_example_runs_and_prints_text() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 1
    run = subprocess.run([sys.executable, "-c", blocks[0]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()


def test_one_request_goes_through_the_four_files() -> None:
    paragraph = re.search(r"\*\*Follow one request\*\*(.*?)\n\n", README, re.DOTALL)
    assert paragraph is not None
    files = re.findall(r"`([\w/.-]+\.(?:py|cpp|h))`", paragraph[1])
    assert len(files) == 4
    for file in files[:-1]:
        assert re.search(r"\battention\(", (ROOT / file).read_text()), file
    assert "attention_block(" in (ROOT / files[-1]).read_text()


@pytest.mark.parametrize("command", ["make demo", "make test"])
def test_commands_are_targets(command: str) -> None:
    assert command in README
    assert re.search(rf"^{command.split()[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_every_measured_number_has_a_result_file() -> None:
    measured = README.split("## Measured")[1].split("\n## ")[0]
    files = re.findall(r"`(bench/results/[\w/.-]+)`", measured)
    assert files
    assert not [file for file in files if not (ROOT / file).is_file()]
