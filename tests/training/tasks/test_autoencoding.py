from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from sfumato.core.random import Noise
from sfumato.nets.autoencoder import AutoencoderConfig
from sfumato.nets.discriminator import DiscriminatorConfig
from sfumato.nets.perceptual import PerceptualConfig, PerceptualNet
from sfumato.training.batches import Batch
from sfumato.training.history import read_log
from sfumato.training.log import RunLog
from sfumato.training.optim import OptimConfig, PhaseOptimizer
from sfumato.training.state import Checkpoints
from sfumato.training.task import Moment
from sfumato.training.tasks.autoencoding import Autoencoding, AutoencodingConfig, adaptive_weight, hinge
from sfumato.training.trainer import Trainer, TrainerConfig

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


def test_the_discriminators_weights_change_when_and_only_when_it_has_started(tmp_path):
    """In the trainer's own loop: the step that a published training script forgot."""
    for start, moves in ((0.0, True), (1.0, False)):
        task = build(dataclasses.replace(SMALL, discriminator_start=start, adversarial_start=1.0))
        before = {name: [p.detach().clone() for p in m.parameters()] for name, m in task.modules.items()}
        trainer = Trainer(
            task,
            lambda images: batch(),
            TrainerConfig(images=3, batch=3, device="cpu"),
            optim=OptimConfig(),
            log=RunLog(tmp_path / f"{start}" / "log.jsonl", 3, 0, quiet=True),
            checkpoints=Checkpoints(tmp_path / f"{start}" / "checkpoints"),
        )
        trainer.fit()
        moved = {
            name: any((p != q).any() for p, q in zip(m.parameters(), before[name], strict=True))
            for name, m in task.modules.items()
        }
        assert moved == {"autoencoder": True, "discriminator": moves}


def test_adaptive_weight_of_the_task_is_its_definition_over_the_whole_backward():
    task = build()
    metrics = by_phase(task, LATE)["generator"].metrics
    x, last = batch().images, task.net.decoder.conv_out.weight
    norms = []
    for part in ("reconstruction", "adversarial"):
        task.net.zero_grad()
        posterior = task.net.encode(x)
        y = task.net.decode(posterior.sample(Noise([5, 6, 7])(posterior.mean)))
        if part == "reconstruction":
            (
                (x - y).abs().mean() + 0.5 * ((x - y) ** 2).mean() + 0.3 * task.perceptual(x, y).mean()
            ).backward()
        else:
            (-task.critic(y).mean()).backward()
        norms.append(float(last.grad.double().pow(2).sum().sqrt()))
    assert float(metrics["adaptive_weight"]) == pytest.approx(norms[0] / (norms[1] + 1e-4), rel=1e-4)


def test_accumulated_micro_batches_have_adaptive_weights_of_their_own(tmp_path):
    config = dataclasses.replace(SMALL, net=VQ, perceptual=0.0, adversarial_start=0.0)  # VQ draws no noise
    task, whole = build(config), batch(4)
    parts = [
        Batch(images=whole.images[rows], text=("",) * 2, index=whole.index[rows])
        for rows in (slice(0, 2), slice(2, 4))
    ]
    weights = [
        float(next(build(config).losses(part, Noise([0, 0]), LATE)).metrics["adaptive_weight"])
        for part in parts
    ]
    assert abs(weights[0] - weights[1]) > 0.01 * weights[0]
    log = tmp_path / "log.jsonl"
    Trainer(
        task,
        lambda images: whole,
        TrainerConfig(images=4, batch=4, accumulate=2, device="cpu"),
        optim=OptimConfig(),
        log=RunLog(log, 4, 0, quiet=True),
        checkpoints=Checkpoints(tmp_path / "checkpoints"),
    ).fit()
    (row,) = read_log(log)
    assert row["generator/adaptive_weight"] == pytest.approx(sum(weights) / 2, rel=1e-4)


def published(task, config, x, weight):
    """KL loss of latent diffusion as its code has it: LPIPS added to each element, summed."""
    posterior = task.net.encode(x)
    y = task.net.decode(posterior.sample(Noise([5, 6, 7])(posterior.mean)))
    rec = (x - y).abs() + config.perceptual * task.perceptual(x, y)[:, None, None, None]
    nll = (rec / math.exp(config.logvar) + config.logvar).sum() / len(x)
    kl = 0.5 * (posterior.mean**2 + posterior.logvar.exp() - 1 - posterior.logvar).sum() / len(x)
    return nll + config.kl * kl + config.adversarial * weight * -task.critic(y).mean()


def test_a_sum_over_elements_is_the_published_loss_and_the_mean_is_that_per_element():
    config = dataclasses.replace(SMALL, l2=0.0, reduction="sum", kl=1e-2, logvar=0.4)
    task = build(config)
    summed = by_phase(task, LATE)["generator"]
    weight = summed.metrics["adaptive_weight"]
    torch.testing.assert_close(summed.value, published(task, config, batch().images, weight))
    # 2 * 8 * 8 latent elements and 3 * 16 * 16 of the image; the adaptive weight has a constant of its own
    config = dataclasses.replace(config, reduction="mean", kl=1e-2 * 128 / 768, adversarial=0.0)
    task = build(dataclasses.replace(config, reduction="sum", kl=1e-2))
    mean = build(config)
    mean.net.load_state_dict(task.net.state_dict())
    mean.perceptual.load_state_dict(task.perceptual.state_dict())
    losses = [by_phase(each, LATE)["generator"].value for each in (task, mean)]
    torch.testing.assert_close(losses[0], 768 * losses[1])


def test_a_learned_logvar_is_in_the_optimizer_and_moves_toward_the_logarithm_of_the_error():
    task = build(dataclasses.replace(SMALL, learn_logvar=True, logvar=1.0, adversarial=0.0, l2=0.0, kl=0.0))
    assert task.phases["generator"].modules == ("autoencoder", "logvar")
    optimizer = PhaseOptimizer(
        [task.modules[m] for m in task.phases["generator"].modules],
        OptimConfig(lr=0.01, lr_schedule="constant", clip=0.0),
    )
    assert any(p is task.logvar.value for p in optimizer.parameters)
    loss = by_phase(task, LATE)["generator"]
    rec = loss.metrics["l1"] + 0.3 * loss.metrics["perceptual"]
    torch.testing.assert_close(loss.value, rec / math.e + 1)
    torch.testing.assert_close(loss.metrics["logvar"], torch.tensor(1.0))
    optimizer.backward(loss.value)
    torch.testing.assert_close(task.logvar.value.grad, (1 - rec / math.e).detach())
    optimizer.step(0, 1, 100)
    # The first step of Adam is the learning rate.
    assert float(task.logvar.value.detach()) == pytest.approx(1.0 - 0.01)


@pytest.mark.parametrize(("legacy", "encoder", "codebook"), [(False, 0.25, 1.0), (True, 1.0, 0.25)])
def test_beta_reaches_the_encoder_or_the_codebook_as_defined(legacy, encoder, codebook):
    """Against the gradients of the two terms, written out with the codes that were chosen."""
    net = dataclasses.replace(VQ, legacy_commitment=legacy)
    task = build(dataclasses.replace(SMALL, net=net, adversarial=0.0, l2=0.0, perceptual=0.0, l1=1e-12))
    loss = by_phase(task, LATE)["generator"]
    weights = [task.net.quant_conv.weight, task.net.quantizer.embedding.weight]
    found = torch.autograd.grad(loss.value, weights)
    z = task.net.encode(batch().images).mean
    table = task.net.quantizer.embedding.weight
    chosen = torch.cdist(z.permute(0, 2, 3, 1).reshape(-1, 2), table).argmin(1)
    codes = table[chosen].reshape(3, 8, 8, 2).permute(0, 3, 1, 2)
    commit = torch.autograd.grad(((z - codes.detach()) ** 2).mean(), weights[0])[0]
    moved = torch.autograd.grad(((z.detach() - codes) ** 2).mean(), weights[1])[0]
    torch.testing.assert_close(found[0], encoder * commit, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(found[1], codebook * moved, rtol=1e-4, atol=1e-8)


def test_every_parameter_belongs_to_one_phase_and_logvar_only_exists_where_it_is_learned():
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


def test_vq_weighs_its_codebook_loss_and_counts_its_codes():
    task = build(dataclasses.replace(SMALL, net=VQ, codebook=2.0, adversarial=0.0, l2=0.0, perceptual=0.0))
    (g,) = by_phase(task, LATE).values()
    quantized = task.net.quantize(task.net.encode(batch().images).mean)
    torch.testing.assert_close(g.value, g.metrics["l1"] + 2.0 * quantized.loss)
    drawn = quantized.codes.flatten().tolist()
    assert g.metrics["codes"].tolist() == [drawn.count(code) for code in range(16)]


def test_preview_shows_pictures_over_their_reconstructions():
    task = build()
    shown = task.preview({"autoencoder": task.net})
    assert shown.shape == (4, 3, 16, 16)
    assert torch.equal(shown[:2], task.examples)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"lpips_trunk": Path("vgg16.pth")}, "lpips_heads None; give both or neither"),
        (
            {"lpips_trunk": Path("a"), "lpips_heads": Path("b"), "perceptual_net": Path("c")},
            "the net only stands in for LPIPS",
        ),
    ],
)
def test_files_of_lpips_come_in_pairs_and_without_a_stand_in(bad, said):
    with pytest.raises(ValueError, match=said):
        AutoencodingConfig(**bad)


def test_a_loss_without_pixel_term_is_refused():
    with pytest.raises(ValueError, match=r"l1 0\.0 and l2 0\.0"):
        AutoencodingConfig(l1=0.0)
