"""Systems by family: presets and training recipes, as pure functions."""

from __future__ import annotations

from sfumato.families import (  # noqa: F401 (fill ASSEMBLIES, PUBLICATIONS, RECIPES)
    adm,
    ddpm,
    deepfloyd,
    dit,
    glide,
    imagen,
    latent,
    latent_2021,
    openmoji_unclip,
    pixel,
    scenes,
    sdxl,
    stable,
    stable_written,
    unclip,
)
from sfumato.families.assembly import ASSEMBLIES, PUBLICATIONS
from sfumato.families.registry import RECIPES

__all__ = ["ASSEMBLIES", "PUBLICATIONS", "RECIPES"]
