"""Diffusion mathematics: schedules, grids, parameterizations, samplers, guidance, objectives. No networks.

Importing this package registers every schedule, spacing and sampler.
"""

from sfumato.diffusion import samplers, spacings
from sfumato.diffusion.denoiser import DenoiseFn, Denoiser, Net
from sfumato.diffusion.grid import SPACINGS, Grid, repaint
from sfumato.diffusion.parameterization import PARAMETERIZATIONS, Parameterization
from sfumato.diffusion.sampling import SAMPLERS, Cancelled, Run, integrate
from sfumato.diffusion.schedules import SCHEDULES, VE, Cosine, Discrete, Flow, NoiseSchedule, ScheduleConfig

__all__ = [
    "PARAMETERIZATIONS",
    "SAMPLERS",
    "SCHEDULES",
    "SPACINGS",
    "VE",
    "Cancelled",
    "Cosine",
    "DenoiseFn",
    "Denoiser",
    "Discrete",
    "Flow",
    "Grid",
    "Net",
    "NoiseSchedule",
    "Parameterization",
    "Run",
    "ScheduleConfig",
    "integrate",
    "repaint",
    "samplers",
    "spacings",
]
