"""Pictures that the toys of the reports are trained on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sfumato.core.png import save_png
from sfumato.families import RECIPES
from sfumato.systems.system import load_system, save_system
from sfumato.training.run import train

COLORS = {"red": (255, 0, 0), "green": (0, 160, 0), "blue": (0, 0, 255)}


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """18 captioned pictures of 16x16 in three groups: a coloured bar, on white; every other one held out."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = []
    for i in range(18):
        name, color = list(COLORS.items())[i % 3]
        image = torch.full((3, 16, 16), 255, dtype=torch.uint8)
        image[:, 2 : 4 + i // 2, i // 2 : i // 2 + 5] = torch.tensor(color, dtype=torch.uint8).view(3, 1, 1)
        save_png(folder / f"{i}.png", image)
        split = "held_out" if i % 2 else "train"
        row = {"file_name": f"{i}.png", "text": f"{name} bar {i}", "concept": name, "split": split}
        rows.append(row | {"label": name, "group": name})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def trained(name: str, pictures: Path, runs: Path, **data: int) -> Path:
    """The run folder of a toy that saw 8 pictures; a CLIP that it needs is beside it."""
    recipe = RECIPES[name]()
    if getattr(recipe.task, "clip", None) is not None:
        recipe = replace(recipe, task=replace(recipe.task, clip=runs / "toy-clip"))
    settings = replace(recipe.trainer, images=8, preview_every=0, save_every=8, device="cpu", quiet=True)
    source = replace(recipe.data, path=pictures, **data)
    return train(replace(recipe, data=source, trainer=settings, out=runs / name)).parent


def shaken(run: Path) -> Path:
    """The run with random weights in the places where training begins with zeros, so that all matters."""
    system = load_system(run / "system")
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in system.parts.nets["denoiser"].parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    save_system(system, run / "system")
    return run


@pytest.fixture(scope="session")
def runs(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Flags for runs of toys by name, each trained when it is first asked for."""
    folder, made = tmp_path_factory.mktemp("runs"), dict[str, Path]()

    def flags(**toys: str) -> list[str]:
        for name in toys.values():
            if name not in made:
                made[name] = trained(name, pictures, folder, **({"size": 32} if "unclip-up" in name else {}))
                made[name] = shaken(made[name]) if "denoiser" in _nets(made[name]) else made[name]
        return [part for flag, name in toys.items() for part in (f"--{flag}", str(made[name]))]

    return flags


def _nets(run: Path) -> list[str]:
    return list(json.loads((run / "system/system.json").read_text())["nets"])


@pytest.fixture(scope="session")
def figures() -> Callable[[Path, str], dict[tuple[str, float | None], dict[str, float]]]:
    """Of (NAME.json, part): the figures by name and x; of shares, the hits."""

    def read(file: Path, part: str) -> dict[tuple[str, float | None], dict[str, float]]:
        rows = [row for row in json.loads(file.read_text())["cells"] if row["part"] == part]
        return {
            (row["name"], row["x"]): {
                k: v["hits"] if isinstance(v, dict) else v for k, v in row["figures"].items()
            }
            for row in rows
        }

    return read
