from __future__ import annotations

import dataclasses

import pytest
import torch

from sfumato.core.random import Noise
from sfumato.nets.autoencoder import AutoencoderConfig
from sfumato.nets.discriminator import DiscriminatorConfig
from sfumato.nets.perceptual import PerceptualConfig, PerceptualNet
from sfumato.training.batches import Batch
from sfumato.training.optim import PhaseOptimizer
from sfumato.training.task import Moment
from sfumato.training.tasks.autoencoding import Autoencoding, AutoencodingConfig, adaptive_weight, hinge

KL = AutoencoderConfig(channels=8, mults=(1, 2), blocks=1, norm_groups=4, z_channels=2, embed_dim=2)
VQ = dataclasses.replace(KL, kind="vq", codebook_size=16)
SMALL = AutoencodingConfig(
    net=KL,
    discriminator=DiscriminatorConfig(channels=8, layers=2),
    l2=0.5,
    perceptual=0.3,
    kl=0.01,
    adversarial=0.7,
    perceptual_start=0.2,
    adversarial_start=0.5,
    discriminator_start=40,
)
EARLY, LATE = Moment(0, 100), Moment(90, 100)


def build(config: AutoencodingConfig = SMALL) -> Autoencoding:
    torch.manual_seed(0)
    perceptual = PerceptualNet(PerceptualConfig(widths=(4, 8), convs=(1, 1)))
    return Autoencoding(config, perceptual, torch.zeros(2, 3, 16, 16))


def batch(n: int = 3) -> Batch:
    images = torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return Batch(images=images, text=("",) * n, index=torch.arange(n))


def by_phase(task: Autoencoding, moment: Moment) -> dict:
    return {loss.phase: loss for loss in task.losses(batch(), Noise([5, 6, 7]), moment)}


def test_adaptive_weight_is_the_ratio_of_gradient_norms_at_the_last_layer():
    torch.manual_seed(0)
    last = torch.nn.Parameter(torch.randn(3, 4))
    x = torch.randn(4)
    reconstruction, adversarial = 3 * (last @ x).sum(), (last @ x).square().sum()
    a = 3 * x.expand(3, 4)  # d reconstruction / d last
    b = 2 * torch.outer(last.detach() @ x, x)  # d adversarial / d last
    weight = adaptive_weight(reconstruction, adversarial, last)
    torch.testing.assert_close(weight, a.norm() / (b.norm() + 1e-4))
    assert not weight.requires_grad


def test_adaptive_weight_is_clamped():
    last = torch.nn.Parameter(torch.ones(2))
    assert float(adaptive_weight(1e6 * last.sum(), 0 * last.sum(), last)) == 1e4


def test_hinge_is_zero_beyond_the_margin_and_linear_inside():
    assert float(hinge(torch.tensor([2.0]), torch.tensor([-3.0]))) == 0
    assert float(hinge(torch.tensor([0.0, 0.5]), torch.tensor([0.0]))) == pytest.approx(0.5 * (0.75 + 1.0))


def test_losses_are_the_stated_sums():
    task = build()
    losses = by_phase(task, LATE)
    g = losses["generator"]
    x = batch().images
    posterior = task.net.encode(x)
    y = task.net.decode(posterior.sample(Noise([5, 6, 7])(posterior.mean)))
    reconstruction = (x - y).abs().mean() + 0.5 * (x - y).square().mean() + 0.3 * task.perceptual(x, y).mean()
    adversarial = -task.critic(y).mean()
    weight = adaptive_weight(reconstruction, adversarial, task.net.decoder.conv_out.weight)
    kl = posterior.kl().mean() / (2 * 8 * 8)
    torch.testing.assert_close(g.value, reconstruction + 0.01 * kl + 0.7 * weight * adversarial)
    torch.testing.assert_close(g.metrics["adaptive_weight"], weight)
    d = losses["discriminator"]
    torch.testing.assert_close(d.value, hinge(task.critic(x), task.critic(y)))


def test_phases_and_terms_start_when_they_are_told_to():
    task = build()
    assert set(by_phase(task, EARLY)) == {"generator"}
    assert "perceptual" not in by_phase(task, EARLY)["generator"].metrics
    assert "perceptual" in by_phase(task, Moment(20, 100))["generator"].metrics
    assert set(by_phase(task, Moment(39, 100))) == {"generator"}
    warming = by_phase(task, Moment(40, 100))  # the discriminator learns before it is listened to
    assert set(warming) == {"generator", "discriminator"}
    assert "adversarial" not in warming["generator"].metrics
    assert "adversarial" in by_phase(task, Moment(50, 100))["generator"].metrics


def test_both_phases_step_and_each_moves_its_own_weights_only():
    task = build()
    optimizers = {
        name: PhaseOptimizer(
            [task.modules[m] for m in phase.modules], phase.optim or SMALL.discriminator_optim
        )
        for name, phase in task.phases.items()
    }
    parameters = {name: list(module.parameters()) for name, module in task.modules.items()}
    for loss, own in zip(
        task.losses(batch(), Noise([1, 2, 3]), LATE), ("autoencoder", "discriminator"), strict=True
    ):
        before = {name: [p.detach().clone() for p in ps] for name, ps in parameters.items()}
        optimizers[loss.phase].backward(loss.value)
        assert all(p.grad is not None for p in parameters[own])
        optimizers[loss.phase].step(0, 1, 100)
        moved = {
            name
            for name, ps in parameters.items()
            for p, q in zip(ps, before[name], strict=True)
            if (p != q).any()
        }
        assert moved == {own}


def test_every_parameter_belongs_to_one_phase_and_there_is_no_untrained_logvar():
    task = build()
    held = [
        id(p) for phase in task.phases.values() for m in phase.modules for p in task.modules[m].parameters()
    ]
    assert sorted(held) == sorted(id(p) for module in task.modules.values() for p in module.parameters())
    assert not any(
        "logvar" in name for module in task.modules.values() for name, _ in module.named_parameters()
    )
    assert all(not p.requires_grad for p in task.perceptual.parameters())


def test_without_a_discriminator_there_is_one_phase():
    task = build(dataclasses.replace(SMALL, adversarial=0.0))
    assert set(task.modules) == {"autoencoder"}
    assert set(by_phase(task, LATE)) == {"generator"}


def test_vq_weighs_its_codebook_loss_and_reports_code_use():
    task = build(dataclasses.replace(SMALL, net=VQ, codebook=2.0, adversarial=0.0, l2=0.0, perceptual=0.0))
    (g,) = by_phase(task, LATE).values()
    quantized = task.net.quantize(task.net.encode(batch().images).mean)
    torch.testing.assert_close(g.value, g.metrics["l1"] + 2.0 * quantized.loss)
    assert float(g.metrics["code_use"]) == quantized.codes.unique().numel() / 16


def test_preview_shows_pictures_over_their_reconstructions():
    task = build()
    shown = task.preview({"autoencoder": task.net})
    assert shown.shape == (4, 3, 16, 16)
    assert torch.equal(shown[:2], task.examples)


def test_a_loss_without_pixel_term_is_refused():
    with pytest.raises(ValueError, match=r"l1 0\.0 and l2 0\.0"):
        AutoencodingConfig(l1=0.0)
