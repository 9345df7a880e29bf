"""Scenes as training data: drawn as they are read, without files, or written as tar shards."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from sfumato.core.png import encode_png, write_whole
from sfumato.data.entries import Entry
from sfumato.data.scenes.captions import Caption, describe
from sfumato.data.scenes.draw import PIXELS, render
from sfumato.data.scenes.graph import Scenes
from sfumato.data.scenes.sampling import draw_scenes
from sfumato.data.scenes.splits import SPLITS, Split

__all__ = ["PREFIX", "ScenePicture", "SceneSet", "scene_entries", "write_scenes"]

PREFIX = "scenes:"
SHARD = 5000  # pictures of a tar file
PART = 1000  # pictures drawn at a time
FORM = f"{PREFIX}COUNT[,size={'|'.join(map(str, PIXELS))}][,seed=0][,split=train]"
Progress = Callable[[int, int], None]
"""Told (pictures done, pictures in all)."""


@dataclass(frozen=True, kw_only=True)
class SceneSet:
    """The first `count` scenes of a split. Raises: ValueError in one line for what there is not."""

    count: int
    size: int = 64
    seed: int = 0
    split: Split = "train"

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"{self.count} scenes; allowed: at least 1")
        if self.size not in PIXELS:
            raise ValueError(f"scenes of {self.size} pixels; allowed: {', '.join(map(str, PIXELS))}")
        if self.split not in SPLITS:
            raise ValueError(f"unknown split {self.split!r} of scenes; allowed: {', '.join(SPLITS)}")

    @staticmethod
    def parse(text: str) -> SceneSet:
        """The set of a data path such as "scenes:100000,size=32". Raises: ValueError in one line."""
        count, *settings = text.removeprefix(PREFIX).split(",")
        pairs = dict(part.partition("=")[::2] for part in settings)
        try:
            numbers = {name: int(pairs.pop(name)) for name in ("size", "seed") if name in pairs}
            return SceneSet(count=int(count), **numbers, **pairs)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            told = f": {error}" if "allowed" in str(error) else ""
            raise ValueError(f"cannot read the data path {text!r}{told}; write {FORM}") from None

    def scenes(self, first: int, count: int) -> tuple[Scenes, list[Caption]]:
        """Scenes and their captions from number `first` on."""
        scenes = draw_scenes(self.split, count, seed=self.seed, first=first)
        return scenes, describe(scenes, self.split, seed=self.seed, first=first)


@dataclass(frozen=True, slots=True)
class ScenePicture:
    """A picture that is drawn when it is read; see `core.image.PictureFile`."""

    scenes: Scenes
    row: int
    size: int
    name: str

    def read_bytes(self) -> bytes:
        """The picture as a PPM file, which costs little to write and to read."""
        pixels = render(self.scenes[self.row : self.row + 1], self.size)[0]
        return b"P6 %d %d 255\n" % (self.size, self.size) + pixels.tobytes()

    def __str__(self) -> str:
        return self.name


def scene_entries(path: str) -> list[Entry]:
    """The pictures of a data path of the form FORM, with captions and the fields split and difficulty.

    Raises: ValueError in one line if the path has another form.
    """
    wanted = SceneSet.parse(path)
    scenes, captions = wanted.scenes(0, wanted.count)
    name = f"{PREFIX}{wanted.split},size={wanted.size},seed={wanted.seed}"
    return [
        Entry(
            file=ScenePicture(scenes, row, wanted.size, f"{name}/{row}"),
            text=caption.text,
            size=(wanted.size, wanted.size),
            fields={"split": wanted.split, "difficulty": caption.difficulty},
        )
        for row, caption in enumerate(captions)
    ]


def write_scenes(directory: str | Path, wanted: SceneSet, *, progress: Progress | None = None) -> Path:
    """Write scenes as tar shards: NUMBER.png, and NUMBER.json with text, split, difficulty, facts and scene.

    Raises: ValueError in one line if the folder is not empty or cannot be written.
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} is not an empty folder; choose a new one for the scenes")
    for start in range(0, wanted.count, SHARD):
        out = io.BytesIO()
        stop = min(start + SHARD, wanted.count)
        with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for first in range(start, stop, PART):
                _append(tar, wanted, first, min(PART, stop - first))
                if progress:
                    progress(min(first + PART, stop), wanted.count)
        write_whole(directory / f"scenes-{start // SHARD:05d}.tar", out.getvalue())
    return directory


def _append(tar: tarfile.TarFile, wanted: SceneSet, first: int, count: int) -> None:
    scenes, captions = wanted.scenes(first, count)
    rows = zip(render(scenes, wanted.size), scenes.unpack(), captions, strict=True)
    for number, (pixels, scene, caption) in enumerate(rows, first):
        facts = {name: value for name, value in asdict(caption).items() if name != "text"}
        told: Mapping[str, object] = {
            "text": caption.text,
            "split": wanted.split,
            "difficulty": caption.difficulty,
            "facts": facts,
            "scene": asdict(scene),
        }
        png = encode_png(Image.fromarray(pixels))
        for ending, data in (("png", png), ("json", json.dumps(told).encode())):
            member = tarfile.TarInfo(f"{number:08d}.{ending}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
