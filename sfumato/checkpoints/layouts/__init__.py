"""Published file layouts, a table each: `LAYOUTS` has them by name once this package is imported."""

from __future__ import annotations

from sfumato.checkpoints.layouts import adm, autoencoder, deepfloyd, dit, edm2, glide
from sfumato.checkpoints.layouts.layout import LAYOUTS

__all__ = ["LAYOUTS", "adm", "autoencoder", "deepfloyd", "dit", "edm2", "glide"]
