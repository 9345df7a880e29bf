"""A fast start, checked as which modules get imported: a clock would measure the machine instead."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import sfumato

# Each costs a tenth of a second to several seconds, and `import sfumato` needs none of them.
HEAVY = {
    "PIL",
    "diffusers",
    "numpy",
    "pydantic",
    "rich",
    "safetensors",
    "scipy",
    "tokenizers",
    "torch",
    "torchvision",
    "transformers",
    "tyro",
}
# What the command line may not need before it knows its command; tyro and rich print the help itself.
SLOW_FOR_HELP = {"diffusers", "scipy", "torch", "torchvision", "transformers"}
IMPORTED = re.compile(r"^import time:\s+\d+ \|\s+\d+ \|\s+([\w.]+)$", re.MULTILINE)


def imported(*arguments: str, root: Path) -> tuple[set[str], str]:
    """Top-level modules that `python ARGUMENTS` imports, and its standard output; it must succeed."""
    command = [sys.executable, "-X", "importtime", *arguments]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, re.sub("(?m)^import time:.*\n", "", done.stderr)
    return {name.split(".")[0] for name in IMPORTED.findall(done.stderr)}, done.stdout


def test_the_probe_sees_imports(repository: Path) -> None:
    modules, _ = imported("-c", "import json, sfumato.core.types", root=repository)
    assert {"json", "sfumato", "torch"} <= modules


def test_import_is_light(repository: Path) -> None:
    modules, _ = imported("-c", "import sfumato; dir(sfumato); sfumato.__version__", root=repository)
    assert "sfumato" in modules
    assert sorted(modules & HEAVY) == []


def test_help_does_without_torch(repository: Path) -> None:
    modules, printed = imported("-m", "sfumato", "--help", root=repository)
    assert "generate" in printed
    assert sorted(modules & SLOW_FOR_HELP) == []


@pytest.mark.parametrize("name", sfumato.__all__)
def test_public_names_are_there(name: str) -> None:
    assert getattr(sfumato, name) is getattr(sfumato, name)
    assert name in dir(sfumato)


def test_an_unknown_name_is_told_the_known_ones() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'frobnicate'; it offers .*\bload\b"):
        _ = sfumato.frobnicate
