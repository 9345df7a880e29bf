"""The wheel: what a user installs holds the bundled weights, the type marker and the command."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import sfumato

BUILD = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of this checkout, built without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-c", BUILD, str(folder)]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(folder / done.stdout.strip().splitlines()[-1])


def test_wheel_holds_every_file_of_the_package(wheel: zipfile.ZipFile, repository: Path) -> None:
    package = repository / "sfumato"
    files = [p for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    expected = {p.relative_to(repository).as_posix() for p in files}
    held = set(wheel.namelist())
    assert "sfumato/py.typed" in expected
    assert sorted(expected - held) == []
    assert (
        sorted(n for n in held if not n.startswith(("sfumato/", f"sfumato-{sfumato.__version__}.dist-info/")))
        == []
    )


def test_wheel_holds_weights_and_licenses(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert [n for n in names if re.match(r"sfumato/assets/.*\.safetensors$", n)]
    assert {n.rsplit("/", 1)[-1] for n in names if "/licenses/" in n} == {"LICENSE", "NOTICE"}
    # 25 MB of weights and the code: what `pip install` may cost beside torch.
    assert os.path.getsize(str(wheel.filename)) < 30e6


def test_wheel_has_the_command(wheel: zipfile.ZipFile) -> None:
    entry = next(n for n in wheel.namelist() if n.endswith("entry_points.txt"))
    assert "sfumato = sfumato.cli:main" in wheel.read(entry).decode()


def test_constraints_pin_what_is_required(repository: Path) -> None:
    """Each requirement has one exact tested version; torch has no build (+cpu), so that any build fits."""
    project = tomllib.loads((repository / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    text = (repository / "constraints.txt").read_text("utf-8")
    pins = [line for line in text.splitlines() if not line.startswith("#")]
    assert [p for p in pins if not re.fullmatch(r"[\w.-]+==[\w.]+", p)] == []
    assert sorted({_name(w) for w in wanted} - {_name(p) for p in pins} - {"sfumato"}) == []


def _name(requirement: str) -> str:
    """The distribution of a requirement, in the one spelling that all spellings of it share (PEP 503)."""
    return re.sub(r"[-_.]+", "-", re.split(r"[<>=!~\[; ]", requirement, maxsplit=1)[0]).lower()
