"""Sample grids of a run, written as PNG files beside its log."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from sfumato.core.image import grid, to_uint8
from sfumato.core.png import save_png
from sfumato.diffusion.sampling import NotFinite

__all__ = ["PreviewFiles"]


class PreviewFiles:
    """Writes `previews/<images seen>.png` and keeps the random state and the caller's modules untouched.

    Args:
        folder: of the run.
        draw: the pictures to show, (n, 3, H, W) in [-1, 1]; called without gradients.
        notice: license and attribution, as text that each file carries.
        columns: pictures per row.
    """

    def __init__(
        self,
        folder: Path,
        draw: Callable[[], Tensor],
        notice: Mapping[str, str] | None = None,
        columns: int = 8,
    ) -> None:
        self.folder = folder / "previews"
        self.draw = draw
        self.columns = columns
        self.notice = notice

    def __call__(self, images: int, *, write: bool = True) -> Path:
        """Write the grid for a run that has seen `images`, or only help to draw it.

        A net that has gone wrong shows black where its pictures are not finite; the run itself checks losses.
        """
        try:
            with torch.no_grad():
                pictures = torch.nan_to_num(self.draw().float().cpu(), nan=-1.0, posinf=-1.0, neginf=-1.0)
        except NotFinite:
            pictures = torch.full((1, 3, 16, 16), -1.0)
        path = self.folder / f"{images:012d}.png"
        sheet = grid(to_uint8(pictures), columns=self.columns)
        return save_png(path, sheet, text=self.notice) if write else path
