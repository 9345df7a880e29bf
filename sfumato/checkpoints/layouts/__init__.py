"""Published file layouts, a table each: `LAYOUTS` has them by name once this package is imported."""

from __future__ import annotations

from sfumato.checkpoints.layouts import (
    adm,
    autoencoder,
    clip_text,
    clip_vision,
    deepfloyd,
    dit,
    edm2,
    glide,
    stable_file,
    unet_diffusers,
)
from sfumato.checkpoints.layouts.layout import LAYOUTS

__all__ = [
    "LAYOUTS",
    "adm",
    "autoencoder",
    "clip_text",
    "clip_vision",
    "deepfloyd",
    "dit",
    "edm2",
    "glide",
    "stable_file",
    "unet_diffusers",
]
