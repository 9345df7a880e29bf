"""What a run needs and leaves behind, and the parts that all tasks build alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from sfumato.checkpoints.native import MANIFEST, Folder, read_folder
from sfumato.core.image import to_float
from sfumato.core.png import write_whole
from sfumato.core.world import ALONE, World
from sfumato.data.datasets import ImageFolder, stack
from sfumato.data.order import Draw
from sfumato.systems.config import About
from sfumato.text.tokenizers import Tokenizer
from sfumato.training.batches import Batch, PictureBatches, order_of
from sfumato.training.recipe import Recipe
from sfumato.training.task import Task

__all__ = [
    "Job",
    "Place",
    "examples",
    "part",
    "picture_batches",
    "settle",
    "spread",
    "trained",
    "vocabulary_of",
]

EXAMPLES = 8  # pictures that the preview of a first stage shows
N = TypeVar("N", bound=nn.Module)
T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Where a run happens: its folder, device, pictures and processes, and what to say of the result."""

    out: Path
    device: torch.device
    pictures: ImageFolder
    about: About
    card: str
    world: World = ALONE


@dataclass(frozen=True)
class Job:
    """What the trainer runs.

    Attributes:
        batches: see Trainer.
        result: the folder to publish, from the averaged modules.
        beside: writes what else is published with it into the run folder.
    """

    task: Task
    batches: Callable[[int], Batch]
    result: Callable[[Mapping[str, nn.Module]], Folder]
    beside: Callable[[Mapping[str, nn.Module]], None] = lambda averaged: None


def picture_batches(recipe: Recipe, place: Place) -> PictureBatches:
    """Batches of the run's pictures, as large as this process's part."""
    order = order_of(place.pictures, recipe.data, recipe.trainer.seed, recipe.trainer.batch)
    return PictureBatches(place.pictures, order, part(recipe, place), place.device)


def part(recipe: Recipe, place: Place) -> int:
    """Samples of a batch that each process computes.

    Raises: ValueError in one line if the processes cannot share a batch equally.
    """
    ways = place.world.size * recipe.trainer.accumulate
    if recipe.trainer.batch % ways:
        raise ValueError(
            f"trainer.batch {recipe.trainer.batch} cannot be shared equally by {place.world.size} processes "
            f"of {recipe.trainer.accumulate} micro-batches each; choose a multiple of {ways}"
        )
    return recipe.trainer.batch // place.world.size


def examples(place: Place) -> Tensor:
    """A few pictures (n, 3, H, W) spread over the data, in [-1, 1]."""
    chosen = spread(range(len(place.pictures)), EXAMPLES)
    return to_float(stack(place.pictures.draw([Draw(i, i, 0) for i in chosen])))


def spread(values: Sequence[T], count: int) -> tuple[T, ...]:
    """At most `count` of some values, at equal distances."""
    return tuple(values[:: max(1, len(values) // count)][:count])


def settle(modules: Mapping[str, nn.Module], device: torch.device) -> None:
    """Move modules to the device, with channels last, which convolutions like best, on CPUs above all."""
    for module in modules.values():
        module.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def trained(path: Path, kind: type[N], recipe: str, device: torch.device) -> N:
    """The one net of a kind in a native folder, or in the result of a run, frozen.

    Args:
        path: of the folder or of the run.
        recipe: that trains such a net, for the error.

    Raises: ValueError in one line that says how to train one.
    """
    folder = path if (path / MANIFEST).is_file() else path / "system"
    if not (folder / MANIFEST).is_file():
        raise ValueError(
            f"there is no trained {kind.__name__} at {path}; train one with `sfumato train {recipe}`, "
            "or give the folder of another"
        )
    nets = [net for net in read_folder(folder, device=device).parts.nets.values() if isinstance(net, kind)]
    if len(nets) != 1:
        raise ValueError(f"{folder} holds {len(nets)} networks of kind {kind.__name__}; expected one")
    settle({"net": nets[0]}, device)
    return nets[0].requires_grad_(False).eval()


def vocabulary_of(place: Place, vocab_size: int, context: int, *, end_highest: bool = False) -> Tokenizer:
    """A tokenizer learned from the captions once per run: again it need not give the same ids."""

    def learned() -> str:
        path = place.out / "tokenizer.json"
        if not path.is_file():
            texts = [text for text in place.pictures.texts if text]
            own = Tokenizer.train(texts, vocab_size=vocab_size, context=context, end_highest=end_highest)
            write_whole(path, own.to_json().encode())
        return path.read_text("utf-8")

    return Tokenizer.from_json(place.world.lead(learned))
