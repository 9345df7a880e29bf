"""Other programs that draw a run's curves: TensorBoard, Weights & Biases, trackio. No run needs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from sfumato.core.png import write_whole
from sfumato.core.registry import Registry

__all__ = ["TRACKERS", "Tracked", "Tracker", "open_trackers"]


class Tracker(Protocol):
    """What a run tells another program; counts are images seen."""

    def begin(self, images: int) -> None:
        """The run starts, or goes on, at `images`; what was told of later ones no longer holds."""
        ...

    def numbers(self, images: int, values: Mapping[str, float]) -> None:
        """Metrics by name, such as "denoiser/loss"."""
        ...

    def picture(self, images: int, path: Path) -> None:
        """A sheet of samples, a PNG file."""
        ...

    def end(self) -> None:
        """The run stops, for good or for now."""
        ...


@dataclass(frozen=True, kw_only=True)
class Tracked:
    """The run that is told of.

    Attributes:
        name: shown for it.
        folder: of the run.
        settings: its recipe as JSON data.
    """

    name: str
    folder: Path
    settings: Mapping[str, object] = field(default_factory=dict)


TRACKERS: Registry[Callable[[Tracked], Tracker]] = Registry("tracker")


def open_trackers(names: Sequence[str], run: Tracked) -> list[Tracker]:
    """The trackers of these names in TRACKERS.

    Raises: ValueError in one line for an unknown name, or if the program is not installed.
    """
    return [TRACKERS[name](run) for name in names]


@TRACKERS("tensorboard")
class TensorBoard:
    """Event files in `tensorboard/` of the run folder; see them with `tensorboard --logdir runs`."""

    def __init__(self, run: Tracked) -> None:
        self._module = _module("torch.utils.tensorboard", "tensorboard", "sfumato[train]")
        self._folder = run.folder / "tensorboard"
        self._writer: Any = None

    def begin(self, images: int) -> None:
        """See Tracker."""
        # Steps from here on are hidden, so that a resumed run does not run backwards in the curves.
        self._writer = self._module.SummaryWriter(str(self._folder), purge_step=images or None)

    def numbers(self, images: int, values: Mapping[str, float]) -> None:
        """See Tracker."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, images)

    def picture(self, images: int, path: Path) -> None:
        """See Tracker."""
        from sfumato.core.image import from_pil, load

        self._writer.add_image("samples", from_pil(load(path)).numpy(), images)

    def end(self) -> None:
        """See Tracker."""
        self._writer.close()


class Runs:
    """The interface of Weights & Biases, which trackio shares: init, log, Image, finish.

    Args:
        module: its name, and that of the package.
        run: becomes a run of the project "sfumato".
        keeps_ids: whether a run is taken up again by its id instead of its name.
    """

    def __init__(self, module: str, run: Tracked, *, keeps_ids: bool) -> None:
        self._module = _module(module, module, f"sfumato[{module}]")
        self._run = run
        self._id = run.folder / f"{module}.id" if keeps_ids else None
        self._open: Any = None

    def begin(self, images: int) -> None:
        """See Tracker."""
        run = self._run
        known: dict[str, object] = {"project": "sfumato", "name": run.name, "config": dict(run.settings)}
        if self._id is not None and self._id.is_file():
            known["id"] = self._id.read_text("utf-8").strip()
        self._open = self._module.init(**known, resume="allow")
        if self._id is not None:
            write_whole(self._id, f"{self._open.id}\n".encode())
            # Its own step may only rise, but a resumed run begins where the last checkpoint was written.
            self._open.define_metric("*", step_metric="images")

    def numbers(self, images: int, values: Mapping[str, float]) -> None:
        """See Tracker."""
        self._log(images, dict(values))

    def picture(self, images: int, path: Path) -> None:
        """See Tracker."""
        self._log(images, {"samples": self._module.Image(str(path))})

    def end(self) -> None:
        """See Tracker."""
        self._open.finish()

    def _log(self, images: int, values: dict[str, object]) -> None:
        if self._id is None:
            self._open.log(values, step=images)
        else:
            self._open.log({"images": images, **values})


@TRACKERS("wandb")
def wandb(run: Tracked) -> Tracker:
    """Weights & Biases; the id of its run is kept in `wandb.id`, by which a resumed run is taken up again."""
    return Runs("wandb", run, keeps_ids=True)


@TRACKERS("trackio")
def trackio(run: Tracked) -> Tracker:
    """Trackio, on this machine; `trackio show` draws the curves."""
    return Runs("trackio", run, keeps_ids=False)


def _module(module: str, package: str, extra: str) -> ModuleType:
    """An optional module, from the names in this file only."""
    try:
        return import_module(module)
    except ImportError:
        raise ValueError(
            f"trainer.trackers asks for {package}, which is not installed; pip install '{extra}', "
            "or leave it out: log.jsonl has every number"
        ) from None
