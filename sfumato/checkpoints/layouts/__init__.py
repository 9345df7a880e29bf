"""Published file layouts, a table each: `LAYOUTS` has them by name once this package is imported."""

from __future__ import annotations

from sfumato.checkpoints.layouts import autoencoder, clip_text, dit, edm2, stable_file, unet_diffusers
from sfumato.checkpoints.layouts.layout import LAYOUTS

__all__ = ["LAYOUTS", "autoencoder", "clip_text", "dit", "edm2", "stable_file", "unet_diffusers"]
