"""Published file layouts, a table each: `LAYOUTS` has them by name once this package is imported."""

from __future__ import annotations

from sfumato.checkpoints.layouts import (
    adm,
    autoencoder,
    clip_text,
    clip_vision,
    controlnet,
    deepfloyd,
    deepfloyd_diffusers,
    dit,
    edm2,
    glide,
    glide_clip,
    karlo,
    latent_file,
    stable_file,
    t2i_adapter,
    t5,
    unet2d,
    unet_diffusers,
)
from sfumato.checkpoints.layouts.layout import LAYOUTS

__all__ = [
    "LAYOUTS",
    "adm",
    "autoencoder",
    "clip_text",
    "clip_vision",
    "controlnet",
    "deepfloyd",
    "deepfloyd_diffusers",
    "dit",
    "edm2",
    "glide",
    "glide_clip",
    "karlo",
    "latent_file",
    "stable_file",
    "t2i_adapter",
    "t5",
    "unet2d",
    "unet_diffusers",
]
