from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sfumato.core.png import save_png

COLORS = {"red": (255, 0, 0), "green": (0, 160, 0), "blue": (0, 0, 255)}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Twelve captioned pictures of 16x16: a coloured bar, which wanders, on white; blue ones are held out."""
    folder = tmp_path / "pictures"
    rows = []
    for i, (name, color) in enumerate(item for _ in range(4) for item in COLORS.items()):
        image = torch.full((3, 16, 16), 255, dtype=torch.uint8)
        image[:, 2 : 4 + i, i : i + 4] = torch.tensor(color, dtype=torch.uint8).view(3, 1, 1)
        save_png(folder / f"{i}.png", image)
        split = "held_out" if name == "blue" else "train"
        row = {"file_name": f"{i}.png", "text": f"{name} bar {i}", "concept": name, "split": split}
        rows.append(row | {"label": name})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
