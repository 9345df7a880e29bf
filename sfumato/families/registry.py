"""The table of training recipes."""

from __future__ import annotations

from collections.abc import Callable

from sfumato.core.registry import Registry
from sfumato.training.recipe import Recipe

__all__ = ["RECIPES"]

RECIPES: Registry[Callable[[], Recipe]] = Registry("recipe")
