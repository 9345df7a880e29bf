"""Diffusion mathematics: schedules, grids, parameterizations, samplers, guidance, objectives. No networks."""
