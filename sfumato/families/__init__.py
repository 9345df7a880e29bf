"""Systems by family: presets and training recipes, as pure functions."""

from __future__ import annotations

from sfumato.families import latent, scenes  # noqa: F401 (fill RECIPES)
from sfumato.families.registry import RECIPES

__all__ = ["RECIPES"]
