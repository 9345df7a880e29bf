"""A training loop on diffusers, as its users write one."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from setting import LR, Pace, Samples, Size

__all__ = ["unet"]


def net(size: Size) -> UNet2DConditionModel:
    """The U-Net of `Size.unet` in their words."""
    down, levels = "CrossAttnDownBlock2D", len(size.widths)
    return UNet2DConditionModel(
        sample_size=size.side,
        in_channels=4,
        out_channels=4,
        block_out_channels=size.widths,
        layers_per_block=1,
        norm_num_groups=size.groups,
        down_block_types=(down,) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        cross_attention_dim=size.tokens,
        attention_head_dim=size.heads,  # the number of heads, in spite of its name
    )


def unet(size: Size, data: Path, pace: Pace) -> None:
    """Its net, scheduler, average, rate; AdamW and clipping."""
    trained = net(size)
    trained.train()
    noises = DDPMScheduler(num_train_timesteps=1000)
    average = EMAModel(
        trained.parameters(), decay=0.9999, model_cls=UNet2DConditionModel, model_config=trained.config
    )
    optimizer = torch.optim.AdamW(trained.parameters(), lr=LR, betas=(0.9, 0.999), weight_decay=0.0, eps=1e-8)
    rates = get_scheduler("constant", optimizer=optimizer)
    samples, total = Samples.of(size), 0.0
    for rows in samples.endless():
        pace()
        x, tokens = samples.latents[rows], samples.tokens[rows]
        noise = torch.randn_like(x)
        t = torch.randint(0, noises.config.num_train_timesteps, (len(x),)).long()
        out = trained(noises.add_noise(x, noise, t), t, tokens, return_dict=False)[0]
        loss = F.mse_loss(out.float(), noise.float(), reduction="mean")
        total += loss.item()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        average.step(trained.parameters())
