"""Feature nets as metrics use them: 8-bit pictures in, named features out, and what they were computed by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sfumato.checkpoints.files import sha256
from sfumato.checkpoints.hub import located
from sfumato.checkpoints.layouts.clip import read_clip
from sfumato.checkpoints.layouts.dinov2 import read_dinov2
from sfumato.checkpoints.layouts.inception import FILES, read_inception
from sfumato.evaluation.preparation import PREPARATIONS, for_clip, for_dinov2, for_inception
from sfumato.text.clip import END, clip_tokenizer
from sfumato.text.tokenizers import Tokenizer

__all__ = ["FEATURES", "CLIPFeatures", "FeatureNet", "open_net"]

FEATURES = {
    "pool": "inception",
    "spatial": "inception",
    "logits": "inception",
    "dinov2": "dinov2",
    "clip": "clip",
}
"""Feature -> the net that has it."""
DINOV2 = tuple(f"dinov2_vit{size}14_pretrain.pth" for size in "lbsg")  # L is the published choice
DINOV2_HUB = tuple(f"facebook/dinov2-{size}" for size in ("large", "base", "small", "giant"))
CLIP_HUB = ("openai/clip-vit-base-patch32", "openai/clip-vit-large-patch14")  # the first is CLIPScore's


@dataclass(frozen=True)
class FeatureNet:
    """A net with its preparation.

    Attributes:
        name: "inception", "dinov2" or "clip".
        file: of the weights, and its digest.
        net: frozen; in which precision is told by its weights.
        features: of pictures (B, 3, H, W) uint8, on the net's device; on the CPU, float32, one row each.
    """

    name: str
    file: Path
    sha256: str
    net: nn.Module
    features: Callable[[Tensor], Mapping[str, Tensor]]

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        """Features by name, (B, D) float32 on the CPU."""
        return {name: v.float().cpu() for name, v in self.features(pixels).items()}

    @property
    def protocol(self) -> dict[str, str]:
        """What a result says of it."""
        return {"file": self.file.name, "sha256": self.sha256, "preparation": PREPARATIONS[self.name]}


@dataclass(frozen=True)
class CLIPFeatures(FeatureNet):
    """CLIP, which has features of texts too."""

    tokenizer: Tokenizer

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings (B, D) float32 on the CPU."""
        ids = self.tokenizer(texts)[0].to(next(self.net.parameters()).device)
        embedding: Tensor = self.net.text(ids).embedding  # type: ignore[operator, union-attr]
        return embedding.float().cpu()


def open_net(name: str, given: Path | None = None, *, device: torch.device | str = "cpu") -> FeatureNet:
    """A feature net from `given`, or from the caches of other programs; see `located`.

    Raises: ValueError in one line if there are no such weights, or they are of another network.
    """
    if name == "inception":
        file = located(given, "FID's Inception", files=FILES)
        inception = read_inception(file).to(device)

        def seen(pixels: Tensor) -> dict[str, Tensor]:
            found = inception(for_inception(pixels.to(device)))
            return {"pool": found.pool, "spatial": found.spatial, "logits": found.logits}

        return FeatureNet(name, file, sha256(file), inception, seen)
    if name == "dinov2":
        file = located(given, "DINOv2", files=DINOV2, repositories=DINOV2_HUB)
        dinov2 = read_dinov2(file).to(device)
        return FeatureNet(
            name, file, sha256(file), dinov2, lambda pixels: {"dinov2": dinov2(for_dinov2(pixels).to(device))}
        )
    file = located(given, "CLIP", repositories=CLIP_HUB)
    clip = read_clip(file).to(device)
    side = clip.config.vision.side
    return CLIPFeatures(
        *(name, file, sha256(file), clip),
        lambda pixels: {"clip": clip.vision(for_clip(pixels, side).to(device))},
        clip_tokenizer(file.parent, END, clip.config.text.context),
    )
