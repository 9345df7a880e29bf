"""Post-hoc averaging: snapshots of two averages during a run, an average of any width after it.

Karras et al. 2024 (arXiv:2312.02696), section 3 and appendix C.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from sfumato.checkpoints.files import COPY_AGAIN
from sfumato.checkpoints.native import Parts, read_folder, write_folder
from sfumato.checkpoints.weights import assign
from sfumato.core.config import from_json, to_json
from sfumato.core.png import write_whole
from sfumato.core.world import ALONE, World
from sfumato.training.ema import PowerAverage, gamma_of

__all__ = ["PostHoc", "PostHocConfig", "Profile", "Reconstruction", "export", "fit", "reconstruct"]

LOGGER = logging.getLogger(__name__)
FOLDER, ABOUT = "averages", "sfumato-average"
POOR = 0.1  # relative error of a profile from which on a reconstruction is said to be a poor one


@dataclass(frozen=True, kw_only=True)
class PostHocConfig:
    """Which averages a run tracks so that others can be made of them.

    Attributes:
        sigma_rel: widths of the tracked averages, as shares of the run so far; () = none. The paper tracks
            0.05 and 0.10, from which widths of about 0.02 to 0.25 can be made.
        every: images between snapshots, with one at the end; some 30 or more of a run are enough.
        dtype: of the stored weights; "fp16" keeps in float32 what half precision cannot hold.
    """

    sigma_rel: tuple[float, ...] = ()
    every: int = 10_000
    dtype: Literal["fp16", "fp32"] = "fp16"

    def __post_init__(self) -> None:
        for width in self.sigma_rel:
            gamma_of(width)
        if len(set(self.sigma_rel)) < len(self.sigma_rel):
            raise ValueError(f"sigma_rel {self.sigma_rel} names a width twice; every one must be another")
        if self.every < 1:
            raise ValueError(f"every is {self.every}; there must be at least 1 image between snapshots")


class Profile(NamedTuple):
    """What weights at time t count up to `images`: (gamma + 1) t^gamma / images^(gamma + 1) (eq. 121)."""

    images: int
    gamma: float


class Reconstruction(NamedTuple):
    """An average that was not tracked.

    Attributes:
        modules: state of each module by its name, parameters in float32.
        error: root-mean-square difference of its profile from the wanted one, relative to that one.
    """

    modules: dict[str, dict[str, Tensor]]
    error: float


@dataclass(frozen=True, kw_only=True)
class About:
    """What a snapshot says of itself.

    Attributes:
        images, sigma_rel: its profile.
        buffers: names of the tensors that are copies, not averages.
    """

    images: int
    sigma_rel: float
    buffers: tuple[str, ...]


class PostHoc:
    """The tracked averages of a run and their snapshots: averages/IMAGES-SIGMA_REL.safetensors in its folder.

    Args:
        modules: what to average, by name.
        config: see PostHocConfig.
        run: folder of the run.
        world: the processes of the run; the first writes.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], config: PostHocConfig, run: Path, world: World = ALONE
    ) -> None:
        self.config = config
        self.world = world
        self.folder = run / FOLDER
        self.averages = {width: PowerAverage(modules, width) for width in config.sigma_rel}

    def update(self, before: int, after: int, total: int) -> None:
        """Follow the step from `before` to `after` images of a run of `total`; write snapshots when due.

        Raises: ValueError in one line if a snapshot cannot be written.
        """
        if before == 0:
            self._discard(0)  # of an earlier beginning
        for average in self.averages.values():
            average.update(before, after)
        if after >= total or after // self.config.every > before // self.config.every:
            for width, average in self.averages.items():
                self._write(average.whole(), after, width)

    def state_dict(self) -> dict[str, Any]:
        """The averages in full precision."""
        return {str(width): average.state_dict() for width, average in self.averages.items()}

    def load_state_dict(self, state: Mapping[str, Any], images: int) -> None:
        """Inverse of `state_dict`, saved at `images`; snapshots of a later time are removed."""
        for width, average in self.averages.items():
            average.load_state_dict(state[str(width)])
        self._discard(images)

    def _write(self, modules: Mapping[str, nn.Module], images: int, width: float) -> None:
        path = self.folder / f"{images:012d}-{width:.6f}.safetensors"
        self.world.lead(lambda: write_whole(path, _packed(modules, images, width, self.config.dtype)))

    def _discard(self, images: int) -> None:
        if not self.averages:
            return
        for path in self.folder.glob("*-*.safetensors") if self.world.leads else ():
            time = path.name.split("-")[0]
            if time.isdigit() and int(time) > images:
                path.unlink()


def fit(tracked: Sequence[Profile], wanted: Profile) -> tuple[np.ndarray[Any, np.dtype[np.float64]], float]:
    """Coefficients whose sum of tracked profiles is nearest to a wanted one, in the mean square over time.

    The averages of piecewise constant weights are integrals against these profiles, so the same coefficients
    make the wanted average of the tracked ones (eq. 151 and algorithm 3). All in float64.

    Returns: the coefficients, and the root-mean-square error that remains relative to the wanted profile.
    """
    gram = np.array([[_inner(a, b) for b in tracked] for a in tracked])
    target = np.array([_inner(a, wanted) for a in tracked])
    coefficients = np.linalg.lstsq(gram, target, rcond=None)[0]
    left = _inner(wanted, wanted) - 2 * coefficients @ target + coefficients @ gram @ coefficients
    return coefficients, float(np.sqrt(max(0.0, left) / _inner(wanted, wanted)))


def reconstruct(run: str | Path, sigma_rel: float, *, images: int | None = None) -> Reconstruction:
    """The average of any width from the snapshots of a run.

    Args:
        run: its folder.
        sigma_rel: the wanted width, as a share of `images`.
        images: when the average ends; None = at the last snapshot.

    Raises: ValueError in one line if there are no snapshots, none at `images`, or one is damaged.
    """
    files = dict(_snapshots(Path(run)))
    times = sorted({profile.images for profile in files.values()})
    images = times[-1] if images is None else images
    if images not in times:
        near = min(times, key=lambda t: abs(t - images))
        raise ValueError(f"{run} has no snapshot at {images} images; the nearest of {len(times)} is {near}")
    used = {path: profile for path, profile in files.items() if profile.images <= images}
    coefficients, error = fit(list(used.values()), Profile(images, gamma_of(sigma_rel)))
    if error > POOR:
        LOGGER.warning(
            "sigma_rel %g at %d images: the snapshots of %s give its profile with an error of %.0f %%; "
            "track a nearer width, or save more often",
            *(sigma_rel, images, run, 100 * error),
        )
    total: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    for path, coefficient in zip(used, coefficients, strict=True):
        tensors, fixed = _unpacked(path)
        for name in tensors.keys() - fixed:
            part = tensors[name].double() * float(coefficient)
            total[name] = total[name] + part if name in total else part
        if used[path].images == images:
            buffers = {name: tensors[name] for name in fixed}
    state: dict[str, dict[str, Tensor]] = {}
    for name, tensor in {**{n: v.float() for n, v in total.items()}, **buffers}.items():
        module, _, leaf = name.partition(".")
        state.setdefault(module, {})[leaf] = tensor
    return Reconstruction(state, error)


def export(run: str | Path, sigma_rel: float, out: str | Path, *, images: int | None = None) -> Path:
    """The system that a run has made, with the average of another width in the nets that it trained.

    Args:
        run: its folder, with system/.
        sigma_rel, images: see `reconstruct`.
        out: folder of the new system.

    Raises: ValueError in one line as `reconstruct`, `read_folder` and `write_folder` do, or if what was
        averaged is no net of the system.
    """
    folder = read_folder(Path(run) / "system")
    modules = reconstruct(run, sigma_rel, images=images).modules
    if strange := sorted(modules.keys() - folder.parts.nets.keys()):
        raise ValueError(
            f"the snapshots of {run} are of {', '.join(strange)}, and its system has no such net, only "
            f"{', '.join(folder.parts.nets)}; use reconstruct and load the tensors yourself"
        )
    for name, state in modules.items():
        assign(folder.parts.nets[name], state, where=str(Path(run) / FOLDER))
    note = f"\n## Average\n\nWeights are the power-function average of sigma_rel {sigma_rel:g}"
    card = f"{folder.card.rstrip()}\n{note} (arXiv:2312.02696).\n"
    write_folder(out, replace(folder, parts=Parts(folder.parts.nets, folder.parts.tokenizers), card=card))
    return Path(out)


def _inner(a: Profile, b: Profile) -> float:
    """Integral of the product of two profiles over time (eq. 151); ratios, so that nothing overflows."""
    early, late = (a, b) if a.images <= b.images else (b, a)
    ratio = (early.images / late.images) ** late.gamma
    return (a.gamma + 1) * (b.gamma + 1) * ratio / ((a.gamma + b.gamma + 1) * late.images)


def _packed(modules: Mapping[str, nn.Module], images: int, width: float, dtype: str) -> bytes:
    """A snapshot as the bytes of a safetensors file; its metadata say which tensors are buffers."""
    tensors, fixed = {}, []
    for name, module in modules.items():
        parameters = dict(module.named_parameters(remove_duplicate=False))
        for leaf, tensor in module.state_dict().items():
            full = f"{name}.{leaf}"
            held = _halved(tensor) if dtype == "fp16" and leaf in parameters else tensor
            tensors[full] = held.detach().cpu().clone(memory_format=torch.contiguous_format)
            fixed += [full] if leaf not in parameters else []
    about = About(images=images, sigma_rel=width, buffers=tuple(fixed))
    # One entry, for the library writes several in an order of chance: equal snapshots shall be equal files.
    return save(tensors, {ABOUT: json.dumps(to_json(about))})


def _halved(tensor: Tensor) -> Tensor:
    half = tensor.half()
    return half if bool(torch.isfinite(half).all()) else tensor


def _snapshots(run: Path) -> Iterator[tuple[Path, Profile]]:
    """The snapshots of a run, in the order of their names."""
    paths = sorted((run / FOLDER).glob("*.safetensors"))
    if not paths:
        raise ValueError(
            f"there are no snapshots in {run / FOLDER}; train with --trainer.posthoc.sigma-rel 0.05 0.1"
        )
    for path in paths:
        about = _about(path)
        yield path, Profile(about.images, gamma_of(about.sigma_rel))


def _about(path: Path) -> About:
    try:
        with safe_open(path, "pt") as file:
            return from_json(About, (file.metadata() or {}).get(ABOUT, ""), where=str(path))
    except (OSError, SafetensorError, ValueError):
        raise ValueError(
            f"{path} is not a snapshot of an average, or damaged; {COPY_AGAIN}, or remove it"
        ) from None


def _unpacked(path: Path) -> tuple[dict[str, Tensor], set[str]]:
    """Tensors of a snapshot, and the names of those that are buffers."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, set(_about(path).buffers)  # noqa: SIM118
