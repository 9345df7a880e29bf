"""Systems by family: presets and training recipes, as pure functions."""

from __future__ import annotations

from sfumato.families import latent  # noqa: F401 (fills RECIPES)
from sfumato.families.registry import RECIPES

__all__ = ["RECIPES"]
