"""System: a fold over stages, and the way from prompts to pictures."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Unpack

import torch
from PIL import Image

from sfumato.checkpoints.native import MANIFEST, Folder, Parts, read_folder, strict_json, write_folder
from sfumato.core.config import to_json
from sfumato.core.image import center_crop, from_pil, to_float, to_pil, to_uint8
from sfumato.core.random import Noise
from sfumato.core.registry import unknown
from sfumato.core.types import Inputs
from sfumato.core.world import ALONE, World
from sfumato.systems.conditioning import (
    READS_IMAGE,
    TEXTS,
    ClipTextConfig,
    LabelConfig,
    TokenTextConfig,
)
from sfumato.systems.config import About, SystemConfig
from sfumato.systems.options import SampleOptions
from sfumato.systems.request import Request, entered, inputs_for, options_for, seeds_for
from sfumato.systems.stage import Observer, Stage

__all__ = ["System", "assemble", "load_system", "save_system"]


@dataclass(frozen=True)
class System:
    """Stages in order; each takes the Inputs that the one before it returns.

    Attributes:
        config, parts: what the stages were assembled from, and what a checkpoint keeps.
        about: name, licence, data.
        card: text of the model card.
        fingerprint: of the checkpoint that it was loaded from, "" if it never was in one.
    """

    stages: tuple[Stage, ...]
    config: SystemConfig
    parts: Parts
    about: About = field(default_factory=About)
    card: str = ""
    fingerprint: str = ""

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) of its pictures unless the caller says otherwise; None if it makes none."""
        return next((s.pixels for s in reversed(self.stages) if s.pixels is not None), None)

    @property
    def factor(self) -> int:
        """Sides of its pictures are multiples of this."""
        return self.stages[-1].factor

    def run(
        self,
        inputs: Inputs,
        options: Mapping[str, SampleOptions] | None = None,
        *,
        only: Collection[str] | None = None,
        seed: int | Sequence[int] = 0,
        observe: Observer | None = None,
    ) -> Inputs:
        """Fold the inputs through the stages; the last picture is `low_res` of the result.

        Args:
            options: by stage name; a stage without an entry uses its defaults.
            only: names of the stages to run; None = all. A stage draws the same noise whatever else runs.
            seed: picture i uses seed + i; or one seed for each picture.
            observe: called after every step; raises Cancelled to stop.

        Raises: ValueError in one line for inputs or options that do not fit the system.
        """
        self._check_names(*(options or {}), *(only or ()))
        seeds = seeds_for(seed, inputs.n) if isinstance(seed, int) else list(seed)
        if len(seeds) != inputs.n or inputs.n < 1:
            raise ValueError(
                f"{len(seeds)} seeds for {inputs.n} pictures; allowed: one each, and at least one picture"
            )
        size = inputs.size
        for i, stage in enumerate(self.stages):
            if only is not None and stage.name not in only:
                continue
            # The first stage draws from the seeds themselves, as other programs do; later ones from streams
            # of their own.
            noise = Noise(seeds) if i == 0 else Noise(seeds).fork(stage.name)
            inputs = replace(inputs, size=self._stage_size(stage, size))
            inputs = stage.run(inputs, (options or {}).get(stage.name, stage.defaults), noise, observe)
        return replace(inputs, size=size)

    def generate(
        self,
        text: str | Sequence[str] | None = None,
        *,
        seed: int = 0,
        batch: int = 8,
        observe: Observer | None = None,
        world: World = ALONE,
        **request: Unpack[Request],
    ) -> list[Image.Image]:
        """Pictures for prompts.

        Args:
            text: one prompt or several; an empty one, or none, draws unconditionally. For a system of classes
                that reads no text: their names or numbers.
            seed: picture i of the result depends on seed + i alone, in whatever company it is made.
            batch: pictures computed together; limits the memory.
            observe: called after every step of every batch; raises Cancelled to stop.
            world: processes that share the pictures; each of them gets all.
            request: see Request.

        Returns: one Pillow image per prompt and `n`, prompt by prompt.
        Raises: ValueError in one line naming the value, what is allowed and the fix.
        """
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise ValueError(f"batch is {batch!r}; allowed: a whole number of at least 1")
        options = self.resolve(**request)
        request = entered(request, self.stages)
        inputs = self._inputs(text, request)
        seeds = seeds_for(seed, inputs.n)
        images: list[Image.Image] = []
        mine = world.share(inputs.n)

        def draw() -> None:
            for start in range(0, len(mine), batch):
                rows = mine[start : start + batch]
                own = [seeds[i] for i in rows]
                only = request.get("only")
                done = self.run(inputs.rows(rows), options, only=only, seed=own, observe=observe)
                if done.low_res is None:
                    raise ValueError(
                        "the stages that ran make no picture; run one that does, or use System.run"
                    )
                images.extend(to_pil(image) for image in to_uint8(done.low_res.cpu()))

        world.agree(draw)
        return world.together(images, inputs.n)

    def resolve(self, **request: Unpack[Request]) -> dict[str, SampleOptions]:
        """The options of every stage that a request would run, with nothing left to defaults."""
        self._check_names(*request.get("options", {}), *(request.get("only") or ()))
        request = entered(request, self.stages)
        given, only = request.get("options", {}), request.get("only")
        stages = [s for s in self.stages if only is None or s.name in only]
        told = {c.name for c in self.config.stages if any(isinstance(k, READS_IMAGE) for k in c.conditioners)}
        return {
            s.name: options_for(given.get(s.name, s.defaults), request, told=s.name in told) for s in stages
        }

    def unknown_words(self, text: str) -> list[str]:
        """The words of a prompt that the system was not trained on, where it can tell."""
        kinds = [c for stage in self.config.stages for c in stage.conditioners]
        names = {c.tokenizer for c in kinds if isinstance(c, TokenTextConfig)}
        return sorted({word for name in names for word in self.parts.tokenizers[name].unknown(text)})

    def reconstruct(self, image: Image.Image, *, size: int | tuple[int, int] | None = None) -> Image.Image:
        """What the codec makes of a picture: encoded to the mean latent and decoded.

        Args:
            size: side of a square or (height, width), to which the picture is scaled and cropped first;
                None = its own size, cropped to multiples of the codec's factor.

        Raises: ValueError if the size is not a multiple of the factor.
        """
        stage = next((s for s in reversed(self.stages) if s.pixels is not None), None)
        if stage is None:
            raise ValueError("this system makes no pictures, so it cannot reconstruct one")
        f = stage.codec.factor
        if size is None:
            size = max(image.height // f, 1) * f, max(image.width // f, 1) * f
        height, width = (size, size) if isinstance(size, int) else size
        if height % f or width % f or height < f or width < f:
            raise ValueError(f"size {width}x{height}: both sides must be positive multiples of {f} pixels")
        x = to_float(from_pil(center_crop(image.convert("RGB"), (height, width))))[None]
        with torch.no_grad():
            decoded = stage.codec.decode(stage.codec.encode(x.to(stage.device)))
        return to_pil(to_uint8(decoded[0].float().cpu()))

    @property
    def reads_text(self) -> bool:
        """Whether a stage is told a text."""
        return any(isinstance(c, TEXTS) for stage in self.config.stages for c in stage.conditioners)

    def _inputs(self, text: str | Sequence[str] | None, request: Request) -> Inputs:
        kinds = [c for stage in self.config.stages for c in stage.conditioners]
        classes = next((c for c in kinds if isinstance(c, LabelConfig)), None)
        texts = [text] if isinstance(text, str) else text or ()
        if classes and not self.reads_text and "label" not in request and any(texts):
            request, text = {**request, "label": texts}, None
        if "reading" in request and not any(isinstance(c, ClipTextConfig) for c in kinds):
            raise ValueError("CLIP does not read the prompts of this system; leave out how it is to read")
        return inputs_for(text, request, self.size, classes.names if classes else ())

    def _check_names(self, *names: str) -> None:
        known = [stage.name for stage in self.stages]
        for name in names:
            if name not in known:
                raise ValueError(unknown("stage", name, known))

    def _stage_size(self, stage: Stage, size: tuple[int, int] | None) -> tuple[int, int] | None:
        """The size of this stage's picture when the system's is `size`, scaled as the defaults are."""
        if size is None or stage.pixels is None or self.size is None:
            return None
        height, width = (s * own // full for s, own, full in zip(size, stage.pixels, self.size, strict=True))
        return height, width


def assemble(
    config: SystemConfig, parts: Parts, *, about: About | None = None, card: str = "", fingerprint: str = ""
) -> System:
    """A system from settings and parts. Raises: ValueError if a part is missing or does not fit."""
    stages = tuple(stage.build(parts) for stage in config.stages)
    return System(stages, config, parts, about or About(), card, fingerprint)


def load_system(
    path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> System:
    """A system from a native checkpoint folder. Raises: ValueError in one line for any fault in it."""
    folder = read_folder(path, device=device, dtype=dtype)
    if not folder.system:
        raise ValueError(
            f"{path} holds {', '.join(folder.parts.nets)} but no stages, so it cannot draw; choose another"
        )
    config = strict_json(SystemConfig, dict(folder.system), where=f"{Path(path) / MANIFEST}: system")
    about = strict_json(About, dict(folder.about), where=f"{Path(path) / MANIFEST}: about")
    return assemble(config, folder.parts, about=about, card=folder.card, fingerprint=folder.fingerprint)


def save_system(system: System, path: str | Path, *, dtype: torch.dtype | None = None) -> str:
    """Write a system as a native checkpoint folder, whole or not at all.

    Args:
        dtype: of the stored weights; None = as they are.

    Returns: the fingerprint of the checkpoint.
    Raises: ValueError in one line if the folder cannot be written, or the weights are not in memory.
    """
    if any(v.is_meta for net in system.parts.nets.values() for v in net.parameters()):
        raise ValueError("this cascade reads its weights from other folders by turns; load them to save it")
    card = system.card or f"# {system.about.name}\n\n{system.about.summary}\n"
    folder = Folder(system.parts, to_json(system.config), to_json(system.about), card)
    return write_folder(path, folder, dtype=dtype)
