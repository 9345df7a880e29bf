"""How well a system draws the OpenMoji captions: reconstruction, and retrieval of the picture meant."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sfumato.core.image import from_pil, grid, to_float
from sfumato.core.png import save_png
from sfumato.core.world import ALONE, World
from sfumato.data.compositions import without_skin_tone
from sfumato.data.datasets import ImageFolder
from sfumato.data.openmoji import render
from sfumato.data.transforms import CenterCrop
from sfumato.evaluation.measures import Proportion, psnr, ranks
from sfumato.systems.stage import Stage
from sfumato.systems.system import System

__all__ = [
    "PROMPTS",
    "OpenMojiResult",
    "Protocol",
    "References",
    "Retrieval",
    "captioned",
    "evaluate",
    "retrieval",
]

PROMPTS = (
    *("red heart", "woman astronaut dark skin tone", "pizza", "cat face", "rocket", "red apple", "house"),
    *(
        "man firefighter light skin tone",
        "rainbow",
        "octopus",
        "birthday cake",
        "grinning face",
        "blue heart",
    ),
    *(
        "thumbs up medium skin tone",
        "bicycle",
        "sunflower",
        "fire",
        "hot dog",
        "snowman",
        "green apple",
        "sun",
    ),
    *("full moon", "star", "umbrella", "dog face", "unicorn", "butterfly", "cactus", "castle", "airplane"),
    *("sailboat", "guitar", "soccer ball", "trophy", "crown", "key", "light bulb", "alarm clock", "camera"),
    *("laptop", "books", "pencil", "hot beverage", "watermelon", "ghost", "robot", "green circle"),
    "woman health worker medium-dark skin tone",
)
"""48 captions to look at; picture i has seed i."""

CHUNK = 64  # pictures encoded at a time
Progress = Callable[[str, int, int], None]
"""Told (what, done, in all)."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What is measured, and how pictures are made.

    Attributes:
        training: training captions, at most.
        toneless: training captions without a skin tone, at most.
        held_out: held-out captions, at most.
        steps: of the sampler; what is not named here is the system's own.
        guidance: scale.
        sampler: by name.
        batch: pictures made at a time; it does not change them.
    """

    training: int = 500
    toneless: int = 200
    held_out: int = 200
    steps: int = 20
    guidance: float = 3.0
    sampler: str = "euler"
    batch: int = 50

    def __post_init__(self) -> None:
        for name in ("training", "toneless", "held_out", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: a whole number of at least 1")


@dataclass(frozen=True)
class Retrieval:
    """How often the picture made for a caption is nearest to its own, or has it among the nearest five."""

    top1: Proportion
    top5: Proportion


@dataclass(frozen=True)
class References:
    """The whole set as the system sees it.

    Attributes:
        features: (N, D).
        alike: (N,) equal numbers for pictures that are pixel by pixel the same.
        psnr: (held-out pictures,) dB of each one's reconstruction.
    """

    features: Tensor
    alike: Tensor
    psnr: Tensor


@dataclass(frozen=True, kw_only=True)
class OpenMojiResult:
    """All figures of one evaluation, with the protocol that gave them.

    Attributes:
        system: fingerprint of the checkpoint, "" if it was never saved.
        references: pictures among which the right one had to be found.
        psnr: mean over the held-out pictures of each one's PSNR in dB.
        psnr_pictures: how many those are.
    """

    protocol: Protocol
    system: str
    references: int
    size: int
    psnr: float
    psnr_pictures: int
    training: Retrieval
    toneless: Retrieval
    held_out: Retrieval

    def lines(self) -> list[str]:
        """The figures and the protocol, to print."""
        p = self.protocol
        rows = [
            f"OpenMoji at {self.size}x{self.size}, system {self.system or '(not saved)'}",
            f"  {p.sampler}, {p.steps} steps, guidance {p.guidance:g}, picture i of each kind has seed i",
            "  feature: the autoencoder's latent of the picture; nearest by L2 among all "
            f"{self.references} pictures",
            f"reconstruction PSNR   {self.psnr:.2f} dB, mean over {self.psnr_pictures} held-out pictures",
        ]
        kinds = (
            ("training captions", self.training),
            ("  without skin tone", self.toneless),
            ("held-out captions", self.held_out),
        )
        for name, found in kinds:
            rows += [f"{name:<20}  top-1 {found.top1}", f"{'':<20}  top-5 {found.top5}"]
        return rows


def evaluate(
    system: System,
    data: str | Path | None = None,
    *,
    protocol: Protocol | None = None,
    sheet: str | Path | None = None,
    progress: Progress | None = None,
    world: World = ALONE,
) -> OpenMojiResult:
    """Measure a text-to-image system on OpenMoji.

    A caption's picture is made, taken as the 8-bit picture that a user sees, and encoded; its feature is the
    normalised posterior mean (for a system on pixels, the pixels). Of equal pictures in the set any counts as
    the right one. Captions are taken in the order of the SHA-256 of their text.

    Args:
        data: folder that `sfumato data openmoji` wrote; None = rendered once into the user's cache.
        sheet: PNG file for a grid of PROMPTS.
        progress: told after every batch.
        world: processes that share the pictures; all get the result, and the first writes the sheet.

    Raises: ValueError in one line if the folder is no OpenMoji rendering or the system makes no pictures.
    """
    protocol = protocol or Protocol()
    tell = progress or (lambda what, done, total: None)
    stage = next((s for s in reversed(system.stages) if s.pixels is not None), None)
    if stage is None or stage.pixels is None:
        raise ValueError("this system makes no pictures, so it cannot be evaluated on OpenMoji")
    size = stage.pixels[0]
    folder = ImageFolder(world.lead(lambda: _rendered(data, size, tell)), transform=CenterCrop(size))
    maker = _Maker(system, stage, protocol, tell, world)
    training, held = captioned(folder, "train"), captioned(folder, "held_out")
    references = _survey(stage, folder, tell)
    bare = set(without_skin_tone([folder.texts[i] for i in training]))
    kinds = {
        "training": training[: protocol.training],
        "toneless": [i for i in training if folder.texts[i] in bare][: protocol.toneless],
        "held_out": held[: protocol.held_out],
    }
    found = {
        kind: retrieval(maker.features([folder.texts[i] for i in rows], kind), references, rows)
        for kind, rows in kinds.items()
    }
    if sheet is not None:
        shown = grid(maker.pictures(PROMPTS, "prompts"), columns=8)
        world.lead(lambda: save_png(sheet, shown, text=system.about.notice))
    return OpenMojiResult(
        protocol=protocol,
        system=system.fingerprint,
        references=len(folder),
        size=size,
        psnr=float(references.psnr.mean()),
        psnr_pictures=len(references.psnr),
        **found,
    )


def retrieval(features: Tensor, references: References, truth: Sequence[int]) -> Retrieval:
    """Accuracy of features (B, D) whose own pictures are the rows `truth` of the references."""
    place = ranks(features, references.features, torch.tensor(truth), references.alike)
    return Retrieval(*(Proportion.of(int((place < k).sum()), len(place)) for k in (1, 5)))


@dataclass(frozen=True)
class _Maker:
    """Pictures for captions, and their features."""

    system: System
    stage: Stage
    protocol: Protocol
    tell: Progress
    world: World

    def pictures(self, text: Sequence[str], what: str) -> Tensor:
        """(n, 3, H, W) uint8; picture i has seed i."""
        p, made = self.protocol, []
        for start in range(0, len(text), p.batch):
            images = self.system.generate(
                text[start : start + p.batch],
                seed=start,
                batch=p.batch,
                steps=p.steps,
                guidance=p.guidance,
                sampler=p.sampler,
                world=self.world,
            )
            made += [from_pil(image) for image in images]
            self.tell(what, len(made), len(text))
        return torch.stack(made)

    def features(self, text: Sequence[str], what: str) -> Tensor:
        """(n, D) float32 on the CPU."""
        return _features(self.stage, self.pictures(text, what))


def _features(stage: Stage, pictures: Tensor) -> Tensor:
    with torch.no_grad():
        parts = [stage.codec.encode(to_float(chunk).to(stage.device)) for chunk in pictures.split(CHUNK)]
    return torch.cat([part.float().cpu().flatten(1) for part in parts])


def _survey(stage: Stage, folder: ImageFolder, tell: Progress) -> References:
    held = torch.tensor([split == "held_out" for split in folder.column("split")])
    parts, quality, number = [], [], dict[bytes, int]()
    alike = []
    for chunk in torch.arange(len(folder)).split(CHUNK):
        pictures = folder.images(chunk.tolist())
        alike += [number.setdefault(picture.numpy().tobytes(), len(number)) for picture in pictures]
        image = to_float(pictures).to(stage.device)
        with torch.no_grad():
            z = stage.codec.encode(image)
            mine = held[chunk].to(stage.device)
            if mine.any():
                quality.append(psnr(stage.codec.decode(z[mine]), image[mine]))
        parts.append(z.float().cpu().flatten(1))
        tell("references", int(chunk[-1]) + 1, len(folder))
    return References(torch.cat(parts), torch.tensor(alike), torch.cat(quality))


def captioned(folder: ImageFolder, split: str) -> list[int]:
    """Rows of a split that have a caption, in the order of a hash of it.

    Raises: ValueError in one line if there are none.
    """
    rows = [i for i, value in enumerate(folder.column("split")) if value == split and folder.texts[i]]
    if not rows:
        raise ValueError(
            f"no captioned picture of {folder.path} has split {split!r}: it is no OpenMoji folder"
        )
    return sorted(rows, key=lambda i: hashlib.sha256(folder.texts[i].encode()).digest())


def _rendered(data: str | Path | None, size: int, tell: Progress) -> Path:
    """The folder given, or one in the user's cache with all pictures rendered."""
    if data is not None:
        return Path(data)
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "sfumato" / f"openmoji-{size}"
    return render(folder, size=size, progress=lambda done, total: tell("rendering", done, total))
