"""The table of named U-Nets; `pixel` and `latent` fill it, `sfumato.nets.presets` has it filled."""

from __future__ import annotations

from collections.abc import Callable

from sfumato.core.registry import Registry
from sfumato.nets.unet import UNetConfig

__all__ = ["UNETS"]

UNETS: Registry[Callable[[], UNetConfig]] = Registry("U-Net preset")
