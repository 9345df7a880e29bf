"""The task of a noisy classifier: what it sees, its loss, and that it learns."""

from __future__ import annotations

import math

import torch

from sfumato.core.random import Noise
from sfumato.diffusion.schedules import Discrete
from sfumato.nets.blocks import BlockConfig
from sfumato.nets.classifier import NoisyClassifierConfig
from sfumato.nets.embedding import EmbeddingConfig
from sfumato.nets.unet import UNetConfig, levels
from sfumato.training.batches import Batch
from sfumato.training.task import Moment
from sfumato.training.tasks.classifying import Classifying, ClassifyingConfig, noised

COSINE = Discrete(formula="cosine")
NET = UNetConfig(
    in_channels=3,
    out_channels=3,
    levels=levels(8, (1, 1), 1),
    embedding=EmbeddingConfig(time_dim=8, dim=16),
    block=BlockConfig(film=True, resample="residual", norm_groups=4),
)


def task(pool="attention") -> Classifying:
    torch.manual_seed(0)
    net = NoisyClassifierConfig(encoder=NET, num_classes=2, size=8, head_dim=8, pool=pool, hidden=16)
    return Classifying(ClassifyingConfig(net=net, schedule=COSINE), torch.zeros(3, 3, 8, 8))


def batch(n: int = 8) -> Batch:
    """Dark pictures of class 0, bright ones of class 1."""
    labels = torch.arange(n) % 2
    images = (labels * 2.0 - 1).view(n, 1, 1, 1).expand(n, 3, 8, 8)
    return Batch(text=("",) * n, index=torch.arange(n), images=images, labels=labels)


def test_a_picture_is_noised_as_the_schedule_says():
    x0, t = torch.ones(2, 3, 8, 8), torch.tensor([0.0, 999.0], dtype=torch.float64)
    x_t, told = noised(COSINE, x0, t, Noise([1, 2]))
    assert told.tolist() == [0.0, 999.0]
    noise = Noise([1, 2])(x0)
    alpha, sigma = COSINE.table.alpha[[0, -1]], COSINE.table.sigma[[0, -1]]
    expected = alpha.view(2, 1, 1, 1) * x0 + sigma.view(2, 1, 1, 1) * noise
    torch.testing.assert_close(x_t, expected.float())


def test_it_learns_what_can_be_seen_through_the_noise():
    """Every pool; the head of "adaptive" begins at zero, and so at ln 2."""
    for pool in ("attention", "adaptive", "spatial", "spatial_v2"):
        one = task(pool)
        net = one.modules["classifier"]
        optim = torch.optim.Adam(net.parameters(), 5e-3)
        for step in range(30):
            (loss,) = one.losses(batch(), Noise(range(8 * step, 8 * step + 8)), Moment(0, 1))
            assert step or pool != "adaptive" or math.isclose(loss.value.item(), math.log(2), rel_tol=1e-5)
            optim.zero_grad()
            loss.value.backward()
            assert all(p.grad is not None for p in net.parameters())
            optim.step()
        (loss,) = one.losses(batch(64), Noise(range(9000, 9064)), Moment(0, 1))
        assert loss.metrics["right_clean"] > 0.95, pool
        assert loss.metrics["right"] <= 1


def test_the_preview_shows_examples_at_four_levels_of_noise():
    one = task()
    assert one.preview(one.modules).shape == (12, 3, 8, 8)
