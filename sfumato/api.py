"""What the commands, a studio and users import: load, save, generate, train."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import torch
from PIL import Image

from sfumato.core.device import device_of
from sfumato.systems.adapting import adapted
from sfumato.systems.request import Request
from sfumato.systems.system import System, load_system, save_system

if TYPE_CHECKING:
    from sfumato.training.recipe import Recipe

__all__ = ["BUNDLED", "generate", "load", "save", "train"]

BUNDLED = Path(__file__).resolve().parent / "assets" / "default"
"""The system that comes with the package."""


def load(
    path: str | Path | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    adapter: str | Path | None = None,
    adapter_scale: float = 1.0,
) -> System:
    """A system from its folder; without a path the bundled one.

    Args:
        device: where the networks go; "auto" takes an accelerator if there is one.
        dtype: float32 (default), or float16 or bfloat16 to compute in half precision.
        adapter: adapter.safetensors of a run on this system, merged into its weights.
        adapter_scale: factor on what it changes; 1 = as trained, 0 = nothing.

    Raises: ValueError in one line naming the file, what was expected and what was found.
    """
    if path is None and not BUNDLED.is_dir():
        raise ValueError(f"the bundled system is missing at {BUNDLED}; install sfumato again, or give a path")
    system = load_system(path or BUNDLED, device=device_of(device), dtype=dtype or torch.float32)
    return system if adapter is None else adapted(system, adapter, scale=adapter_scale)


def save(system: System, path: str | Path, *, dtype: torch.dtype | None = None) -> str:
    """Write a system as a folder that `load` reads, whole or not at all.

    Args:
        dtype: of the stored weights; None = as they are in memory.

    Returns: the fingerprint of what was written.
    Raises: ValueError in one line if it cannot be written.
    """
    return save_system(system, path, dtype=dtype)


def generate(
    text: str | Sequence[str] | None = None,
    *,
    system: System | str | Path | None = None,
    seed: int = 0,
    **request: Unpack[Request],
) -> list[Image.Image]:
    """Pictures for prompts in one call; load a system once and use its `generate` to make several requests.

    Args:
        system: a system, its folder, or None for the bundled one.

    See System.generate for the rest.
    """
    loaded = system if isinstance(system, System) else load(system)
    return loaded.generate(text, seed=seed, **request)


def train(recipe: Recipe | str) -> object:
    """Run a training recipe, or the one of that name with its defaults; returns what the run produced."""
    from sfumato.families import RECIPES
    from sfumato.training.run import train as run

    return run(RECIPES[recipe]() if isinstance(recipe, str) else recipe)
