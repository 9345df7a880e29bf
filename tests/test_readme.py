"""The examples of README.md work: blocks marked for it are run as they stand.

A line `<!-- test -->` right before a ```bash or ```python block has it run here, in an empty folder, with
`sfumato` and `python` on the PATH; it must exit with 0. `<!-- test slow -->` leaves it to `make test-slow`.
Each block stands for itself, and everything it prints or writes is thrown away.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(
    r"^<!-- test(?P<slow> slow)? -->\n+```(?P<language>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
MARK = re.compile(r"^<!-- test\b.*-->$", re.MULTILINE)
RUNNERS = {"bash": ["bash", "-eu", "-o", "pipefail", "-c"], "python": [sys.executable, "-c"]}
TIMEOUT = 600  # seconds; an example that takes this long has hung


class Block(NamedTuple):
    """One marked example: the line of its mark, its language, its text and whether it is slow."""

    line: int
    language: str
    code: str
    slow: bool


def blocks(text: str) -> list[Block]:
    """The marked examples of a Markdown text.

    Raises: ValueError for a mark that no runnable block follows, which would otherwise pass for tested.
    """
    found = [
        Block(text.count("\n", 0, m.start()) + 1, m["language"], m["code"], bool(m["slow"]))
        for m in BLOCK.finditer(text)
    ]
    if len(found) != len(MARK.findall(text)) or any(b.language not in RUNNERS for b in found):
        raise ValueError(f"a test mark must stand right before a block of {' or '.join(RUNNERS)}")
    return found


README = (ROOT / "README.md").read_text("utf-8")
EXAMPLES = [
    pytest.param(b, id=f"line{b.line}-{b.language}", marks=[pytest.mark.slow] if b.slow else [])
    for b in blocks(README)
]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The tests' environment with this checkout's `sfumato` and `python` first, installed or not."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, arguments in {"sfumato": "-m sfumato", "python": ""}.items():
        command = folder / name
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        command.chmod(0o755)
    paths = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    return {**os.environ, **paths}


def run(block: Block, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run one example in an empty folder."""
    folder.mkdir()
    command = [*RUNNERS[block.language], block.code]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT
    )


@pytest.mark.parametrize("block", EXAMPLES)
def test_example(block: Block, tmp_path: Path, environment: dict[str, str]) -> None:
    done = run(block, tmp_path / "work", environment)
    assert done.returncode == 0, f"{block.code}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def test_both_languages_have_an_example() -> None:
    assert {b.language for b in blocks(README)} == set(RUNNERS)


def test_blocks_finds_the_marked_ones() -> None:
    bash, python = "<!-- test -->\n```bash\nls\n```\n", "<!-- test slow -->\n\n```python\nx = 1\n```\n"
    text = f"a\n{bash}```bash\nrm -r x\n```\n\n{python}"
    assert blocks(text) == [Block(2, "bash", "ls\n", False), Block(10, "python", "x = 1\n", True)]


@pytest.mark.parametrize(
    "text", ["<!-- test -->\ntext\n```bash\nls\n```\n", "<!-- test -->\n```json\n{}\n```\n"]
)
def test_a_mark_without_a_block_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="right before a block of bash or python"):
        blocks(text)


@pytest.mark.parametrize(("code", "passes"), [("true", True), ("false | cat", False), ("echo $UNSET", False)])
def test_a_failing_example_fails(
    code: str, passes: bool, tmp_path: Path, environment: dict[str, str]
) -> None:
    assert (run(Block(1, "bash", code, False), tmp_path / "work", environment).returncode == 0) == passes
