"""Published shapes by name: UNETS["sd15"]() is a UNetConfig, AUTOENCODERS["kl-f8"]() an AutoencoderConfig.

DITS["dit-xl-2"]() is a DiTConfig.
"""

from __future__ import annotations

from sfumato.nets.presets import imagen, latent, pixel
from sfumato.nets.presets.first_stages import AUTOENCODERS
from sfumato.nets.presets.registry import UNETS
from sfumato.nets.presets.transformers import DITS

__all__ = ["AUTOENCODERS", "DITS", "UNETS", "imagen", "latent", "pixel"]
