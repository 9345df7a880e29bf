"""What an autoregressive prior learns of a conditional distribution, and settings that do not fit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from sfumato.core.random import Noise
from sfumato.core.types import Conditioning
from sfumato.diffusion.guidance import CFG
from sfumato.nets.token_prior import TokenPrior, TokenPriorConfig
from sfumato.systems.options import SampleOptions
from sfumato.training.batches import Batch
from sfumato.training.task import Moment
from sfumato.training.tasks.predicting import Predicting, PredictingConfig, token_losses

DIM, WORDS = 4, {"": 0, "red": 1, "blue": 2}
CENTRES = torch.tensor([[0.0, 0, 0, 0], [2.0, 1, 0, 1], [-1.0, 2, 1, -1]])
SPREAD = 0.4


@dataclass(frozen=True)
class Words:
    """A text is one of three vectors."""

    def encode(self, texts):
        rows = torch.tensor([WORDS[text] for text in texts])
        return Conditioning(tokens=F.one_hot(rows, 3).float()[:, None], pooled=CENTRES[rows] + 0.1)

    def __call__(self, inputs, noise=None):
        return self.encode(inputs.text)

    def null(self, inputs, cond):
        return self.encode([""] * inputs.n)


def batch(n: int, seed: int) -> Batch:
    """Embeddings around the centre of their word."""
    generator = torch.Generator().manual_seed(seed)
    text = tuple("red" if i % 2 else "blue" for i in range(n))
    centres = CENTRES[torch.tensor([WORDS[word] for word in text])]
    vectors = centres + SPREAD * torch.randn(n, DIM, generator=generator)
    return Batch(text=text, index=torch.arange(n), vectors=vectors)


def fresh(dropout: float = 0.0) -> Predicting:
    torch.manual_seed(0)
    shape = {"width": 32, "depth": 1, "heads": 2, "kept": 3, "buckets": 16}
    net = TokenPrior(TokenPriorConfig(dim=DIM, text_dim=3, context=1, **shape))
    data = batch(512, 0)
    net.quantizer.fit(data.vectors, Words().encode(data.text).pooled)
    return Predicting(
        net, Words(), dropout=dropout, embed=lambda images: images, draw=lambda averaged: torch.zeros(1)
    )


@cache
def trained() -> TokenPrior:
    """After 150 steps with a third of the captions dropped."""
    task = fresh(1 / 3)
    optimizer = torch.optim.Adam(task.net.parameters(), lr=5e-3)
    for step in range(150):
        (loss,) = task.losses(batch(64, step), Noise(range(64 * step, 64 * step + 64)), Moment(0, 1))
        optimizer.zero_grad()
        loss.value.backward()
        optimizer.step()
    return task.net.requires_grad_(False)


def drawn(word: str, n: int = 200, **options: float) -> torch.Tensor:
    noise = torch.randn(n, DIM)
    cond, null = (Words().encode([text] * n) for text in (word, ""))
    return trained().draw(noise, cond, null if options else None, **options)


def test_it_draws_around_the_mean_of_the_caption_with_its_spread():
    for word in ("red", "blue"):
        centre, found = CENTRES[WORDS[word]], drawn(word)
        axes = trained().quantizer.axes
        off, unconditional = found.mean(0) - centre, CENTRES[1:].mean(0)
        assert float(off.norm()) < 0.2 * float((unconditional - centre).norm())
        # Cosines of the upper half are narrower; a few are of the other caption, and draw around its centre.
        low, high = torch.quantile(found @ axes.mT, torch.tensor([0.16, 0.84]), dim=0)
        spread = (high - low) / 2
        assert bool(((spread > 0.5 * SPREAD) & (spread < 1.5 * SPREAD)).all())


def test_without_its_caption_it_draws_all_of_the_data():
    both = drawn("red", scale=0.0)  # null + 0 (cond - null)
    near = (both - CENTRES[1]).norm(dim=1) < (both - CENTRES[2]).norm(dim=1)
    assert 0.25 < float(near.float().mean()) < 0.75
    guided = drawn("red", scale=3.0)
    assert float((guided - guided.mean(0)).norm(dim=1).mean()) < 3 * SPREAD


def test_the_loss_is_the_cross_entropy_of_the_coordinates():
    task, data = fresh(), batch(4, 9)
    (loss,) = task.losses(data, Noise(range(4)), Moment(0, 1))
    cond = Words().encode(data.text)
    tokens = task.net.quantizer.encode(data.vectors, cond.pooled)
    shares = task.net.logits(tokens, cond).softmax(2).detach()
    total = -sum(float(shares[i, k, tokens[i, k + 1]].log()) for i in range(4) for k in range(3))
    assert loss.value.item() == pytest.approx(total / 12)
    assert float(loss.metrics["bits"]) == pytest.approx(total / 12 / 0.6931472)
    # The cosine is that to the true text, also where the caption is dropped.
    null = Words().encode([""] * 4)
    dropped = token_losses(task.net, data.vectors, null, cond.pooled)
    assert not torch.allclose(dropped, token_losses(task.net, data.vectors, null, null.pooled))
    (all_dropped,) = fresh(0.999).losses(data, Noise(range(4)), Moment(0, 1))
    torch.testing.assert_close(all_dropped.value, dropped.mean())


def test_settings_that_do_not_fit_are_one_line():
    good = PredictingConfig(clip=Path("clip"))
    with pytest.raises(ValueError, match=r"dropout is 1\.0; allowed: a share in \[0, 1\)"):
        replace(good, dropout=1.0)
    with pytest.raises(ValueError, match="guidance is of kind cfg; this prior draws tokens: choose logits"):
        replace(good, sampling=SampleOptions(guidance=CFG()))
