from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from sfumato.conditioners.base import Merged
from sfumato.conditioners.label import LabelCond
from sfumato.core.random import Noise
from sfumato.core.types import Conditioning
from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.objective import Objective
from sfumato.diffusion.parameterization import PARAMETERIZATIONS
from sfumato.diffusion.schedules import Discrete, Flow
from sfumato.diffusion.times import LossSecondMoment
from sfumato.nets.autoencoder import Autoencoder, AutoencoderConfig
from sfumato.systems.codec import Latents, Pixels
from sfumato.systems.stage import Stage
from sfumato.training.batches import Batch
from sfumato.training.task import Moment
from sfumato.training.tasks.denoising import Denoising, DenoisingConfig


class Net(nn.Module):
    """Predicts a plane from the pooled text, whatever the picture."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.out = nn.Linear(2, channels)
        self.seen: list[torch.Tensor] = []

    def forward(self, x, t, cond):
        self.seen.append(cond.pooled.detach())
        return self.out(cond.pooled)[:, :, None, None].expand_as(x)


@dataclass(frozen=True)
class Words:
    """Pooled text: the number of words, and a trained bias; the empty text is zero words."""

    bias: nn.Parameter

    def encode(self, texts):
        counts = torch.tensor([[float(len(text.split())), 1.0] for text in texts])
        return Conditioning(pooled=counts * self.bias)

    def __call__(self, inputs, noise=None):
        return self.encode(inputs.text)

    def null(self, inputs, cond):
        return replace(cond, pooled=self.encode([""] * inputs.n).pooled)


def build(*, codec=None, dropout=0.0, posterior="sample", objective=None, schedule=None, channels=3):
    bias = nn.Parameter(torch.ones(2))
    tower = nn.Module()
    tower.bias = bias
    net = Net(channels)
    stage = Stage(
        name="base",
        denoiser=Denoiser(net, schedule or Flow(), PARAMETERIZATIONS["flow" if schedule is None else "eps"]),
        shape=(channels, 8, 8),
        conditioner=Words(bias),
        codec=codec or Pixels(),
    )
    return Denoising(
        stage,
        objective or Objective(),
        dropout=dropout,
        posterior=posterior,
        modules={"denoiser": net, "text": tower},
        draw=lambda averaged: torch.zeros(1, 3, 8, 8),
    )


def batch(n: int = 4, **more) -> Batch:
    images = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(3)) * 2 - 1
    text = tuple("word " * (i + 1) for i in range(n))
    return Batch(text=text, index=torch.arange(n), **({"images": images} | more))


def only(task, data, seeds=None):
    (loss,) = task.losses(data, Noise(range(len(data)) if seeds is None else seeds), Moment(0, 1))
    return loss


def test_the_loss_is_the_mean_of_the_objective():
    task, data, noise = build(), batch(), Noise(range(4))
    noise.uniform(torch.empty(4))  # spent on caption dropout
    wanted = task.objective(task.denoiser, data.images, task.conditioner.encode(data.text), noise)
    loss = only(task, data)
    torch.testing.assert_close(loss.value, wanted.loss.mean())
    torch.testing.assert_close(loss.metrics["mse"], wanted.metrics["mse"].mean())
    assert loss.phase == "denoiser"


def test_net_and_tower_are_trained_together():
    task = build()
    only(task, batch()).value.backward()
    trained = [p for module in task.modules.values() for p in module.parameters()]
    assert len(trained) == 3
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    assert task.phases["denoiser"].modules == task.averaged == ("denoiser", "text")


def test_captions_are_dropped_as_often_as_asked_and_whole():
    task = build(dropout=0.3)
    for k in range(100):
        only(task, batch(20), range(1000 * k, 1000 * k + 20))
    seen = torch.cat(task.denoiser.net.seen)[:, 0]
    share = float((seen == 0).float().mean())
    assert abs(share - 0.3) < 0.03  # 2000 draws: one standard deviation is 0.01
    kept = seen.view(100, 20)
    assert ((kept == 0) | (kept == torch.arange(1.0, 21.0))).all()


def test_labels_are_dropped_together_with_captions():
    task, labels = build(dropout=0.3), torch.arange(20) % 3
    task.conditioner = Merged((task.conditioner, LabelCond(3)))
    told = []
    task.denoiser.net.register_forward_pre_hook(lambda net, args: told.append(args[2].label))
    for k in range(50):
        only(task, batch(20, labels=labels), range(1000 * k, 1000 * k + 20))
    kept = torch.stack(task.denoiser.net.seen)[..., 0] != 0
    assert torch.equal(torch.stack(told), torch.where(kept, labels, 3))
    assert 0.6 < float(kept.float().mean()) < 0.8


def test_dropout_of_a_sample_depends_on_its_seed_alone():
    task = build(dropout=0.5)
    only(task, batch(8), range(8))
    whole = task.denoiser.net.seen.pop()
    for i in range(0, 8, 2):
        data = batch(8)
        part = Batch(text=data.text[i : i + 2], index=data.index[i : i + 2], images=data.images[i : i + 2])
        only(task, part, range(i, i + 2))
    assert torch.equal(torch.cat(task.denoiser.net.seen), whole)


@pytest.mark.parametrize("posterior", ["sample", "mean"])
def test_latents_come_from_moments_or_from_the_codec(posterior):
    config = AutoencoderConfig(channels=8, mults=(1,), blocks=1, norm_groups=4, z_channels=2, embed_dim=2)
    codec = Latents(Autoencoder(config).eval(), (0.1, 0.2), (0.5, 2.0))
    task = build(codec=codec, posterior=posterior, channels=2)
    data = batch()
    fresh = task.clean(data, Noise(range(4)))
    assert fresh.shape == (4, 2, 8, 8)
    assert not fresh.requires_grad  # the autoencoder is frozen
    assert torch.equal(fresh, codec.encode(data.images, Noise(range(4)) if posterior == "sample" else None))
    posterior_ = codec.autoencoder.encode(data.images)
    mean, std = (torch.tensor(v).view(1, 2, 1, 1) for v in (codec.mean, codec.std))
    moments = torch.cat([(posterior_.mean - mean) / std, posterior_.logvar - 2 * std.log()], 1).detach()
    cached = task.clean(batch(images=None, moments=moments), Noise(range(4)))
    torch.testing.assert_close(cached, fresh, atol=1e-6, rtol=1e-5)  # the same sum in another order


def test_a_time_sampler_that_learns_is_kept_in_the_checkpoint():
    times = LossSecondMoment(steps=100, history=1)
    task = build(objective=Objective(times=times), schedule=Discrete(steps=100))
    assert task.memories == {"times": times}
    only(task, batch())
    assert int(times.state_dict()["counts"].sum()) > 0
    assert build().memories == {}


def test_a_dropout_that_leaves_nothing_is_refused():
    with pytest.raises(ValueError, match=r"dropout is 1\.0"):
        DenoisingConfig(dropout=1.0)
