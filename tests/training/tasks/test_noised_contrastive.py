"""The task of a noised CLIP: it learns to tell captions through the noise, and its run guides a system."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import sfumato
from sfumato.core.random import Noise
from sfumato.diffusion.schedules import Discrete
from sfumato.diffusion.times import LogitNormal
from sfumato.families import RECIPES
from sfumato.nets.noised_clip import NoisedTextConfig, NoisedVisionConfig
from sfumato.text.tokenizers import Tokenizer
from sfumato.training.batches import Batch
from sfumato.training.run import train
from sfumato.training.task import Moment
from sfumato.training.tasks.noised_contrastive import NoisedContrastive, NoisedContrastiveConfig

COSINE = Discrete(formula="cosine")
WORDS = ("dark", "bright", "left", "right")
TEXT = NoisedTextConfig(width=16, depth=1, heads=2, vocab=300, context=8, embed=8)
VISION = NoisedVisionConfig(width=16, depth=1, heads=2, size=8, patch=4, embed=8)


def batch() -> Batch:
    """A picture for each of the words."""
    images = torch.stack([torch.full((3, 8, 8), -1.0), torch.ones(3, 8, 8), *torch.zeros(2, 3, 8, 8)])
    images[2, :, :, :4], images[3, :, :, 4:] = 1.0, 1.0
    return Batch(text=WORDS, index=torch.arange(4), images=images)


def test_it_learns_which_caption_is_whose_through_the_noise():
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(list(WORDS), vocab_size=300, context=8)
    config = NoisedContrastiveConfig(vision=VISION, text=TEXT, schedule=COSINE, times=LogitNormal(-1.0))
    one = NoisedContrastive(config, tokenizer, batch().images)
    optim = torch.optim.Adam([p for m in one.modules.values() for p in m.parameters()], 5e-3)
    losses = []
    for step in range(240):
        (loss,) = one.losses(batch(), Noise(range(4 * step, 4 * step + 4)), Moment(0, 1))
        optim.zero_grad()
        loss.value.backward()
        assert all(p.grad is not None for m in one.modules.values() for p in m.parameters())
        optim.step()
        losses.append(float(loss.value.detach()))
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])
    ids, mask = tokenizer(list(WORDS))
    texts = torch.nn.functional.normalize(one.text(ids, mask.sum(1)), dim=1)
    pictures = torch.nn.functional.normalize(one.vision(batch().images, torch.zeros(4)), dim=1)
    assert (pictures @ texts.mT).argmax(1).tolist() == [0, 1, 2, 3]


def test_its_run_guides_a_system(pictures, tmp_path):
    def run(name):
        full = RECIPES[name]()
        trainer = replace(full.trainer, images=8, device="cpu", quiet=True)
        data = replace(full.data, path=pictures)
        return train(replace(full, trainer=trainer, data=data, out=tmp_path / name))

    system, guide = run("toy-glide"), run("toy-noised-clip").parent
    plain = sfumato.load(system)
    guided = sfumato.guided(plain, guide, scale=50.0)
    drawn = [s.generate("red bar", seed=1, guidance=g) for s, g in ((guided, 50.0), (guided, 0.0))]
    assert drawn[0][0].tobytes() != drawn[1][0].tobytes()
    sfumato.save(guided, tmp_path / "whole")
    again = sfumato.load(tmp_path / "whole").generate("red bar", seed=1)
    assert again[0].tobytes() == drawn[0][0].tobytes()


def test_settings_that_do_not_fit():
    with pytest.raises(ValueError, match="embed in 8 and 4 dimensions"):
        NoisedContrastiveConfig(vision=VISION, text=replace(TEXT, embed=4))
    with pytest.raises(ValueError, match=r"vision.times is 1000 and schedule.steps 500"):
        NoisedContrastiveConfig(vision=VISION, text=TEXT, schedule=Discrete(steps=500))
