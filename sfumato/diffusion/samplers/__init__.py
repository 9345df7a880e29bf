"""The samplers; importing this package fills SAMPLERS."""

from sfumato.diffusion.samplers.ancestral import ddim, ddpm, euler_ancestral, lcm
from sfumato.diffusion.samplers.flow_sde import flow_sde
from sfumato.diffusion.samplers.multistep import deis, dpmpp_2m, lms, plms, unipc
from sfumato.diffusion.samplers.ode import dpm2, edm, euler, heun
from sfumato.diffusion.samplers.sde import dpmpp_2m_sde, dpmpp_3m_sde, dpmpp_sde

__all__ = [
    "ddim",
    "ddpm",
    "deis",
    "dpm2",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_3m_sde",
    "dpmpp_sde",
    "edm",
    "euler",
    "euler_ancestral",
    "flow_sde",
    "heun",
    "lcm",
    "lms",
    "plms",
    "unipc",
]
