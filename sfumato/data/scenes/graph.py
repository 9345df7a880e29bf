"""What a scene is: objects with shape, color, size, texture and place on a background, singly and in bulk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BACKGROUNDS",
    "COLORS",
    "INK",
    "INVERSE",
    "MOST",
    "RADII",
    "RELATIONS",
    "SHAPES",
    "SIZES",
    "TEXTURES",
    "Object",
    "Scene",
    "Scenes",
    "gather",
    "relation_of",
]

RGB = tuple[int, int, int]

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLORS: dict[str, RGB] = {
    "red": (215, 25, 30),
    "orange": (245, 125, 0),
    "yellow": (255, 225, 30),
    "green": (30, 150, 50),
    "cyan": (30, 190, 220),
    "blue": (30, 60, 215),
    "purple": (130, 30, 165),
    "pink": (250, 90, 175),
}
BACKGROUNDS: dict[str, RGB] = {
    "white": (255, 255, 255),
    "beige": (235, 215, 175),
    "gray": (150, 150, 155),
    "lavender": (205, 190, 235),
}
INK: RGB = (0, 0, 0)
"""Color of the stripes and dots of textured objects."""
SIZES = ("small", "large")
RADII = (6 / 64, 9.5 / 64)
"""By size, in units of the picture's side; what each shape makes of it is in `draw`."""
TEXTURES = ("solid", "striped", "dotted")
"""Small objects are always solid: at 32 pixels their textures could not be told apart."""
RELATIONS = ("left of", "right of", "above", "below")
INVERSE = (1, 0, 3, 2)
"""The relation of b to a, by that of a to b."""
MOST = 4
"""Objects of a scene, at most."""


@dataclass(frozen=True, slots=True)
class Object:
    """One shape; x and y of its center from the top left, in units of the picture's side."""

    shape: str
    color: str
    size: str
    texture: str
    x: float
    y: float

    @property
    def kind(self) -> tuple[str, str, str, str]:
        """Everything but the place."""
        return self.shape, self.color, self.size, self.texture


@dataclass(frozen=True, slots=True)
class Scene:
    """Objects on a background; objects of one kind that a caption names together stand side by side."""

    background: str
    objects: tuple[Object, ...]


@dataclass(frozen=True)
class Scenes:
    """Many scenes as arrays of numbers, which index the tuples above.

    Attributes:
        count: (N,) objects of each; places beyond it hold nothing that counts.
        background: (N,).
        shape, color, size, texture: (N, MOST).
        x, y: (N, MOST) float64.
    """

    count: NDArray[np.int8]
    background: NDArray[np.int8]
    shape: NDArray[np.int8]
    color: NDArray[np.int8]
    size: NDArray[np.int8]
    texture: NDArray[np.int8]
    x: NDArray[np.float64]
    y: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.count)

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> Scenes:
        """Some of the scenes."""
        return Scenes(*(value[rows] for value in vars(self).values()))

    @property
    def there(self) -> NDArray[np.bool_]:
        """(N, MOST) which places hold an object."""
        found: NDArray[np.bool_] = np.arange(MOST) < self.count[:, None]
        return found

    def unpack(self) -> list[Scene]:
        """The scenes one by one."""
        colors, backgrounds = tuple(COLORS), tuple(BACKGROUNDS)
        columns = [v.tolist() for v in (self.shape, self.color, self.size, self.texture, self.x, self.y)]
        scenes = []
        for count, ground, *rows in zip(self.count.tolist(), self.background.tolist(), *columns, strict=True):
            objects = tuple(
                Object(SHAPES[s], colors[c], SIZES[z], TEXTURES[t], x, y)
                for s, c, z, t, x, y in zip(*(row[:count] for row in rows), strict=True)
            )
            scenes.append(Scene(backgrounds[ground], objects))
        return scenes


def gather(scenes: Sequence[Scene]) -> Scenes:
    """Inverse of `Scenes.unpack`.

    Raises: ValueError if a scene has more than MOST objects or an unknown word.
    """
    colors, backgrounds = tuple(COLORS), tuple(BACKGROUNDS)
    many = next((len(s.objects) for s in scenes if len(s.objects) > MOST), None)
    if many is not None:
        raise ValueError(f"a scene has {many} objects; allowed: at most {MOST}")
    blank = Object(SHAPES[0], colors[0], SIZES[0], TEXTURES[0], 0.0, 0.0)
    rows = [[*scene.objects, *[blank] * (MOST - len(scene.objects))] for scene in scenes]

    def numbers(name: str, table: tuple[str, ...]) -> NDArray[np.int8]:
        found = [[table.index(getattr(item, name)) for item in row] for row in rows]
        return np.array(found, np.int8).reshape(-1, MOST)

    return Scenes(
        count=np.array([len(scene.objects) for scene in scenes], np.int8),
        background=np.array([backgrounds.index(scene.background) for scene in scenes], np.int8),
        shape=numbers("shape", SHAPES),
        color=numbers("color", colors),
        size=numbers("size", SIZES),
        texture=numbers("texture", TEXTURES),
        x=np.array([[item.x for item in row] for row in rows], np.float64).reshape(-1, MOST),
        y=np.array([[item.y for item in row] for row in rows], np.float64).reshape(-1, MOST),
    )


def relation_of(dx: NDArray[np.float64], dy: NDArray[np.float64]) -> NDArray[np.int8]:
    """Index in RELATIONS of a to b, by b - a: along the axis on which they are further apart."""
    level = np.abs(dx) >= np.abs(dy)
    return np.where(level, np.where(dx > 0, 0, 1), np.where(dy > 0, 2, 3)).astype(np.int8)
