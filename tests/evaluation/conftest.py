"""Feature nets that are small, so that what is around them can be tested."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sfumato.core.png import save_png
from sfumato.evaluation.features import FeatureNet


@pytest.fixture
def inception() -> FeatureNet:
    """Stands for Inception: features of 5 and 3 dimensions and 4 logits, by a fixed map of pixel means."""
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(12, 12, generator=generator)

    def features(pixels: Tensor) -> dict[str, Tensor]:
        cells = nn.functional.adaptive_avg_pool2d(pixels.float() / 64 - 2, 2).flatten(1)
        found = (cells @ matrix).tanh()
        return {"pool": found[:, :5], "spatial": found[:, 5:8], "logits": 3 * found[:, 8:]}

    return FeatureNet("inception", Path("toy.pth"), "ab" * 32, nn.Identity(), features)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """30 pictures of 16x16 in a folder, half of them captioned."""
    folder = tmp_path / "pictures"
    for i in range(30):
        pixels = torch.randint(256, (3, 16, 16), dtype=torch.uint8)
        save_png(folder / f"{i:02}.png", pixels)
        (folder / f"{i:02}.txt").write_text("red heart" if i % 2 else "blue heart")
    return folder
