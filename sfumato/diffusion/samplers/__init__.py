"""The samplers; importing this package fills SAMPLERS."""

from sfumato.diffusion.samplers.ancestral import ddim, ddpm, euler_ancestral

__all__ = ["ddim", "ddpm", "euler_ancestral"]
