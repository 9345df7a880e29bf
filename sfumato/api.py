"""What the commands, a studio and users import: load, save, generate, train; nets of other programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import torch
from PIL import Image
from torch import nn

from sfumato.checkpoints.foreign import CONFIG, INDEX, Foreign, read_foreign, read_json, read_text, write_nets
from sfumato.checkpoints.hub import resolved
from sfumato.checkpoints.native import MANIFEST, read_folder
from sfumato.core.device import device_of
from sfumato.systems.adapting import adapted
from sfumato.systems.cascade import deferred, joined
from sfumato.systems.guiding import guided_by
from sfumato.systems.request import Request
from sfumato.systems.system import System, load_system, save_system

if TYPE_CHECKING:
    from sfumato.training.recipe import Recipe

__all__ = ["BUNDLED", "cascade", "generate", "guided", "load", "load_nets", "save", "save_nets", "train"]

Config = Mapping[str, object] | str | Path
BUNDLED = Path(__file__).resolve().parent / "assets" / "default"
"""The system that comes with the package."""


def load(  # noqa: PLR0913 (the parts that may come from elsewhere)
    path: str | Path | None = None,
    *,
    layout: str | None = None,
    config: Config | None = None,
    vae: str | Path | None = None,
    text: str | Path | System | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    adapter: str | Path | Sequence[str | Path] | None = None,
    adapter_scale: float | Sequence[float] = 1.0,
) -> System:
    """A system from its folder, or from a file or folder of another program; without a path the bundled one.

    Args:
        path: also ORG/NAME[@REVISION] in the cache of the model hub, see `sfumato pull`; nothing is fetched.
        layout, config: of a file of another program, see `load_nets`.
        vae: its first stage, if that is a file or folder of its own; without one it draws latents.
        text: folder with the text encoder that it reads with (IF: T5) and its tokenizer, if it has none; or a
            system, with which it then shares them.
        device: where the networks go; "auto" takes an accelerator if there is one.
        dtype: float32 (default), or float16 or bfloat16 to compute in half precision.
        adapter: adapter.safetensors of a run on this system or LoRA files of other programs, merged into its
            weights.
        adapter_scale: factor on what it changes, for all or for each; 1 = as trained, 0 = nothing.

    Raises: ValueError in one line naming the file, what was expected and what was found.
    """
    if path is None and not BUNDLED.is_dir():
        raise ValueError(f"the bundled system is missing at {BUNDLED}; install sfumato again, or give a path")
    path, where, held = resolved(Path(path or BUNDLED)), device_of(device), dtype or torch.float32
    if _foreign(path):
        system = _load_foreign(path, layout, _settings(config), vae, text, where, held)
    elif layout is not None or config is not None or vae is not None or text is not None:
        raise ValueError(f"{path} is no file of another program: leave out layout, config, vae and text")
    else:
        system = load_system(path, device=where, dtype=held)
    return system if adapter is None else adapted(system, adapter, scale=adapter_scale)


def guided(
    system: System | str | Path,
    *guides: str | Path | Mapping[str, nn.Module],
    scale: float | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> System:
    """A system of one stage that is guided by a noisy classifier, or by GLIDE's noised CLIP.

    Args:
        system: a loaded one, or its path.
        guides: the file or run of the classifier; the run or the files of both towers of CLIP; or nets of
            `load_nets`.
        scale: how strongly unless a request gives `guidance`; None = 1 for a classifier, 3 for CLIP.
        device, dtype: of what is read, as of `load`.

    Raises: ValueError in one line if the guide is of other classes or pictures than the system.
    """
    where, held = device_of(device), dtype or torch.float32
    nets: dict[str, nn.Module] = {}
    words = None
    for guide in guides:
        if isinstance(guide, Mapping):
            nets |= guide
            continue
        path = Path(guide)
        folder = path if (path / MANIFEST).is_file() else path / "system"
        if (folder / MANIFEST).is_file():
            parts = read_folder(folder, device=where, dtype=held).parts
            nets, words = nets | dict(parts.nets), parts.tokenizers.get("clip", words)
        else:
            found = read_foreign(path, device=where, dtype=held)
            nets, words = nets | dict(found.nets), found.tokenizers.get("tokenizer", words)
    system = system if isinstance(system, System) else load(system, device=where, dtype=held)
    return guided_by(system, nets, words, scale=scale)


def cascade(
    *systems: System | str | Path,
    text: str | Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> System:
    """One system of the stages of several, in order: what draws, then what enlarges.

    Args:
        systems: loaded ones, or paths. Of a path the weights are read for each run of a stage and dropped
            after it, so that the memory is that of the largest; draw all pictures in one batch.
        text, device, dtype: of the paths, as of `load`.

    Raises: ValueError in one line if a stage cannot take what the one before it makes.
    """
    reads = [
        s if isinstance(s, System) else partial(load, s, text=text, device=device, dtype=dtype)
        for s in systems
    ]
    return joined([s if isinstance(s, System) else deferred(s) for s in reads])


def load_nets(
    path: str | Path,
    *,
    layout: str | None = None,
    config: Config | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> dict[str, nn.Module]:
    """The networks of a file or folder by part: "net" (the denoiser, `net(x, t, cond)`), "vae", ...

    Args:
        path: a .pt, .ckpt or .safetensors file, a diffusers model or pipeline folder, or a system's folder.
        layout: a name in sfumato.checkpoints.layouts.LAYOUTS; None = found by the names of the tensors. DiT
            and SiT have the same names: "sit" must be said. "adm" is a denoiser or a noisy classifier.
        config: settings of the net by the names of the reference's constructor, or a JSON file of them; what
            is left out is inferred from names and shapes.
        device, dtype: as of `load`.

    Raises: ValueError in one line naming the file, what was expected and what was found.
    """
    path, where, held = resolved(Path(path)), device_of(device), dtype or torch.float32
    if (path / MANIFEST).is_file() and layout is None and config is None:
        return dict(read_folder(path, device=where, dtype=held).parts.nets)
    return dict(read_foreign(path, layout=layout, config=_settings(config), device=where, dtype=held).nets)


def save(
    system: System, path: str | Path, *, layout: str | None = None, dtype: torch.dtype | None = None
) -> str:
    """Write a system as a folder that `load` reads, whole or not at all; or for another program.

    Args:
        layout: None = sfumato's own; "dit" or "sit" = the denoiser as a .pt or .safetensors file;
            "dit-diffusers", "unet-diffusers" = a folder for diffusers' pipelines; "sd1-compvis",
            "sd2-compvis", "sdxl-compvis", "sdxl-refiner-compvis" = a single file with everything in it.
        dtype: of the stored weights; None = as they are in memory.

    Returns: the fingerprint of what was written, "" in another layout.
    Raises: ValueError in one line if it cannot be written, or another program would draw other pictures.
    """
    if layout is None:
        return save_system(system, path, dtype=dtype)
    from sfumato.families.assembly import write_system

    write_system(system, path, layout, dtype=dtype)
    return ""


def save_nets(
    nets: Mapping[str, nn.Module],
    path: str | Path,
    *,
    layout: str,
    config: Config | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write networks for another program: the inverse of `load_nets` for one file or folder of a model.

    Args:
        nets: those that the layout holds together: one, for "glide" the denoiser and its text tower.
        path: a .pt or .safetensors file; a folder for layouts of diffusers' classes.
        config: settings that the network does not know, such as input_size.

    Raises: ValueError in one line if the layout cannot hold it, or would compute something else.
    """
    write_nets(nets, path, layout, extra=_settings(config), dtype=dtype)


def _foreign(path: Path) -> bool:
    """Whether the path is a weights file, or a folder of diffusers."""
    return path.is_file() or ((path / INDEX).is_file() or (path / CONFIG).is_file())


def _load_foreign(
    path: Path,
    layout: str | None,
    config: Mapping[str, object],
    vae: str | Path | None,
    text: str | Path | System | None,
    device: torch.device,
    dtype: torch.dtype,
) -> System:
    from sfumato.families.assembly import system_of

    found = read_foreign(path, layout=layout, config=config, device=device, dtype=dtype)
    if vae is not None:
        found += read_foreign(vae, device=device, dtype=dtype)
    if isinstance(text, System):
        nets = {name: net for name, net in text.parts.nets.items() if name == "text_encoder"}
        found += Foreign(nets, {}, {}, {}, text.parts.tokenizers)
    elif text is not None:
        found += read_text(text, device=device, dtype=dtype)
    return system_of(found)


def _settings(config: Config | None) -> Mapping[str, object]:
    return read_json(Path(config)) if isinstance(config, str | Path) else dict(config or {})


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
