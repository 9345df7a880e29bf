"""Published shapes by name: UNETS["sd15"]() is a UNetConfig, AUTOENCODERS["kl-f8"]() an AutoencoderConfig."""

from __future__ import annotations

from sfumato.nets.presets import latent, pixel
from sfumato.nets.presets.first_stages import AUTOENCODERS
from sfumato.nets.presets.registry import UNETS

__all__ = ["AUTOENCODERS", "UNETS", "latent", "pixel"]
