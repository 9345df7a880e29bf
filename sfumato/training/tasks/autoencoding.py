"""Training of a first stage: reconstruction, perceptual, bottleneck and patch-GAN losses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.core.random import Noise
from sfumato.nets.autoencoder import Autoencoder, AutoencoderConfig
from sfumato.nets.discriminator import Discriminator, DiscriminatorConfig
from sfumato.nets.perceptual import FeatureDistance
from sfumato.training.batches import Batch
from sfumato.training.optim import OptimConfig
from sfumato.training.task import Loss, Memory, Moment, Phase

__all__ = ["Autoencoding", "AutoencodingConfig", "adaptive_weight", "hinge"]


def _critic_optim() -> OptimConfig:
    return OptimConfig(lr=4e-4, betas=(0.5, 0.9), lr_schedule="constant", clip=0.0)


@dataclass(frozen=True, kw_only=True)
class AutoencodingConfig:
    """Loss of a first stage: nll + bottleneck + adversarial * adaptive weight * GAN.

    The nll is rec / exp(logvar) + logvar, with rec = l1 * L1 + l2 * L2 + perceptual * LPIPS. Latent diffusion
    trains KL autoencoders with `reduction` "sum", 1e-6 for `kl` and its disc_start for both starts, VQ ones
    with "mean". The two differ in the unit of the loss alone: "mean" with `kl` times (latent elements / image
    elements) is "sum" divided by the elements of an image. A start up to 1 is a fraction of the run, above
    1 a number of images.

    Attributes:
        net: the autoencoder.
        discriminator: its critic.
        lpips_trunk, lpips_heads: files of the published LPIPS, see `checkpoints.layouts.lpips`.
        perceptual_net: folder of a trained perceptual net, or of a run that trained one, that stands in for
            LPIPS; without that and without the files there is no perceptual loss.
        l1: weight of the mean absolute error.
        l2: weight of the mean squared error.
        perceptual: weight of the perceptual distance.
        reduction: of nll and KL over the elements of an image; over the batch it is always the mean.
        logvar: logarithm of the scale of rec, the same for all pictures.
        learn_logvar: whether that is learned, with the autoencoder.
        kl: weight of the KL divergence; for a KL autoencoder.
        codebook: weight of the quantiser's loss; for a VQ autoencoder.
        adversarial: weight of the GAN loss after the adaptive weight; 0 = no discriminator.
        perceptual_start: when the perceptual loss begins.
        adversarial_start: when the GAN loss reaches the autoencoder.
        discriminator_start: when the discriminator begins to learn, at or before that.
        discriminator_optim: its own optimizer.
    """

    kind: Literal["autoencoding"] = "autoencoding"
    net: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    lpips_trunk: Path | None = None
    lpips_heads: Path | None = None
    perceptual_net: Path | None = None
    l1: float = 1.0
    l2: float = 0.0
    perceptual: float = 1.0
    reduction: Literal["mean", "sum"] = "mean"
    logvar: float = 0.0
    learn_logvar: bool = False
    kl: float = 1e-6
    codebook: float = 1.0
    adversarial: float = 0.5
    perceptual_start: float = 0.0
    adversarial_start: float = 0.5
    discriminator_start: float = 0.5
    discriminator_optim: OptimConfig = field(default_factory=_critic_optim)

    def __post_init__(self) -> None:
        if self.l1 <= 0 and self.l2 <= 0:
            raise ValueError(f"l1 {self.l1} and l2 {self.l2}: one of them must be positive")
        if (self.lpips_trunk is None) != (self.lpips_heads is None):
            raise ValueError(
                f"lpips_trunk is {self.lpips_trunk} and lpips_heads {self.lpips_heads}; give both or neither"
            )
        if self.lpips_trunk is not None and self.perceptual_net is not None:
            raise ValueError(
                f"lpips_trunk {self.lpips_trunk} and perceptual_net {self.perceptual_net} are both given; "
                "leave one out: the net only stands in for LPIPS"
            )


class Decoded(NamedTuple):
    """A reconstruction (B, 3, H, W), the weighted bottleneck loss () and what to log of the bottleneck."""

    image: Tensor
    bottleneck: Tensor
    metrics: dict[str, Tensor]


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """Loss of the discriminator: half of mean max(0, 1 - real) + mean max(0, 1 + fake), ().

    Lim & Ye 2017 (arXiv:1705.02894), with the half of latent diffusion.
    """
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last: Tensor) -> Tensor:
    """How much larger the reconstruction's gradient is at the decoder's last layer, (), detached.

    |d reconstruction / d last| / (|d adversarial / d last| + 1e-4), clamped to [0, 1e4].

    Esser et al. 2021, eq. 7 (arXiv:2012.09841), with the constants of latent diffusion.
    """
    (theirs,) = torch.autograd.grad(reconstruction, last, retain_graph=True)
    (ours,) = torch.autograd.grad(adversarial, last, retain_graph=True)
    return (theirs.norm() / (ours.norm() + 1e-4)).clamp(0.0, 1e4).detach()


class LogVariance(nn.Module):
    """One number: the logarithm of the variance that all pixels of all pictures share."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))


class Autoencoding:
    """Phases "generator" and "discriminator", both stepping on every batch once the second has started.

    Rombach et al. 2022 (arXiv:2112.10752), app. G. The discriminator sees the reconstruction that the
    generator's phase produced, and not a second one of the weights just changed: that spares a pass.

    With trainer.accumulate the adaptive weight, and the statistics of the discriminator's batch norms, are
    those of each micro-batch, as under the accumulation of the loop that latent diffusion was trained with.

    Args:
        config: losses and nets.
        perceptual: frozen net; None = no perceptual loss.
        examples: pictures (n, 3, H, W) in [-1, 1] that previews reconstruct.
    """

    def __init__(
        self, config: AutoencodingConfig, perceptual: FeatureDistance | None, examples: Tensor
    ) -> None:
        self.config = config
        self.net = Autoencoder(config.net)
        self.perceptual = perceptual.requires_grad_(False).eval() if perceptual is not None else None
        self.examples = examples
        self.modules: dict[str, nn.Module] = {"autoencoder": self.net}
        self.logvar = LogVariance(config.logvar) if config.learn_logvar else None
        if self.logvar is not None:
            self.modules["logvar"] = self.logvar
        self.phases = {"generator": Phase(tuple(self.modules))}
        self.averaged = ("autoencoder",)
        self.memories: dict[str, Memory] = {}
        self.critic: Discriminator | None = None
        if config.adversarial > 0:
            self.critic = Discriminator(config.discriminator)
            self.modules["discriminator"] = self.critic
            start = config.discriminator_start
            self.phases["discriminator"] = Phase(("discriminator",), config.discriminator_optim, start)

    def losses(self, batch: Batch, noise: Noise, moment: Moment) -> Iterator[Loss]:
        """See Task; images (B, 3, H, W) in [-1, 1]."""
        image = batch.pictures
        decoded = self._decode(image, noise)
        yield self._generator(image, decoded, moment)
        if self.critic is not None and moment.reached(self.config.discriminator_start):
            real, fake = self.critic(image), self.critic(decoded.image.detach())
            yield Loss("discriminator", hinge(real, fake), {"real": real.mean(), "fake": fake.mean()})

    def preview(self, averaged: Mapping[str, nn.Module]) -> Tensor:
        """The examples and, after them, their reconstructions from the posterior mean."""
        net = averaged["autoencoder"]
        assert isinstance(net, Autoencoder)
        image = self.examples.to(next(net.parameters()).device)
        return torch.cat([image, net.decode(net.encode(image).mean)])

    def _decode(self, image: Tensor, noise: Noise) -> Decoded:
        posterior = self.net.encode(image)
        if self.config.net.kind == "vq":
            quantized = self.net.quantize(posterior.mean)
            codes = torch.bincount(quantized.codes.flatten(), minlength=self.config.net.codebook_size)
            metrics = {"codebook": quantized.loss, "codes": codes}
            decoded = self.net.decode(quantized.z, quantize=False)
            return Decoded(decoded, self.config.codebook * quantized.loss, metrics)
        kl = posterior.kl().mean()
        if self.config.reduction == "mean":
            kl = kl / posterior.mean[0].numel()
        decoded = self.net.decode(posterior.sample(noise(posterior.mean)))
        return Decoded(decoded, self.config.kl * kl, {"kl": kl})

    def _generator(self, image: Tensor, decoded: Decoded, moment: Moment) -> Loss:
        nll, metrics = self._nll(image, decoded.image, moment)
        total = nll + decoded.bottleneck
        metrics |= decoded.metrics
        if self.critic is not None and moment.reached(self.config.adversarial_start):
            adversarial = -self.critic(decoded.image).mean()
            weight = adaptive_weight(nll, adversarial, self.net.decoder.conv_out.weight)
            total = total + self.config.adversarial * weight * adversarial
            metrics |= {"adversarial": adversarial, "adaptive_weight": weight}
        return Loss("generator", total, metrics)

    def _nll(self, image: Tensor, decoded: Tensor, moment: Moment) -> tuple[Tensor, dict[str, Tensor]]:
        c = self.config
        l1, l2 = (image - decoded).abs().mean(), (image - decoded).square().mean()
        rec, metrics = c.l1 * l1 + c.l2 * l2, {"l1": l1, "l2": l2}
        if self.perceptual is not None and c.perceptual > 0 and moment.reached(c.perceptual_start):
            metrics["perceptual"] = self.perceptual(image, decoded).mean()
            rec = rec + c.perceptual * metrics["perceptual"]
        logvar = rec.new_tensor(c.logvar) if self.logvar is None else self.logvar.value
        nll = rec / logvar.exp() + logvar
        if self.logvar is not None:
            metrics |= {"nll": nll, "logvar": logvar}
        return nll * image[0].numel() if c.reduction == "sum" else nll, metrics
