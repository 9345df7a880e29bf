from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sfumato.core.random import Noise
from sfumato.nets.perceptual import PerceptualConfig
from sfumato.training.batches import Batch
from sfumato.training.optim import OptimConfig, PhaseOptimizer
from sfumato.training.task import Moment
from sfumato.training.tasks.perceptual import CaptionWords, CaptionWordsConfig, vocabulary

CONFIG = CaptionWordsConfig(net=PerceptualConfig(widths=(4, 8), convs=(1, 1)))
TEXT = ("Red heart", "blue square", "red square", "blue heart")


def build() -> CaptionWords:
    torch.manual_seed(0)
    return CaptionWords(CONFIG, vocabulary(TEXT), torch.zeros(2, 3, 8, 8))


def pictures() -> Batch:
    """Red or blue; a square fills the frame, a heart is a dot: colour and shape decide the words."""
    images = torch.full((4, 3, 8, 8), -1.0)
    for i, (channel, large) in enumerate(((0, False), (2, True), (0, True), (2, False))):
        images[i, channel, slice(None) if large else slice(3, 5), slice(None) if large else slice(3, 5)] = 1.0
    return Batch(images=images, text=TEXT, index=torch.arange(4))


def test_targets_mark_the_words_of_each_caption():
    assert vocabulary(TEXT) == ("blue", "heart", "red", "square")
    wanted = build().targets(("RED heart", "green square"))
    assert wanted.tolist() == [[0, 1, 1, 0], [0, 0, 0, 1]]


def test_loss_is_the_sum_over_words_of_binary_cross_entropy():
    task = build()
    (loss,) = task.losses(pictures(), Noise(range(4)), Moment(0, 1))
    features = torch.cat([tap.mean((2, 3)) for tap in task.net.trunk(pictures().images)], 1)
    p = task.head(features).sigmoid()
    wanted = task.targets(TEXT)
    expected = -(wanted * p.log() + (1 - wanted) * (1 - p).log()).sum(1).mean()
    torch.testing.assert_close(loss.value, expected)


def test_it_learns_to_tell_words_from_pictures():
    task = build()
    optimizer = PhaseOptimizer(list(task.modules.values()), OptimConfig(lr=0.02, lr_schedule="constant"))
    for _ in range(150):
        (loss,) = task.losses(pictures(), Noise(range(4)), Moment(0, 1))
        optimizer.backward(loss.value)
        optimizer.step(0, 1, 1)
    assert all(p.grad is None for p in task.net.weights)  # the head's job is not theirs
    logits = task.head(
        torch.cat([F.adaptive_avg_pool2d(t, 1).flatten(1) for t in task.net.trunk(pictures().images)], 1)
    )
    assert torch.equal((logits > 0).float(), task.targets(TEXT))


def test_preview_repeats_the_examples_and_shows_each_tap():
    task = build()
    assert task.preview({"trunk": task.net.trunk}).shape == (2 * 3, 3, 8, 8)


def test_captions_without_words_are_refused():
    with pytest.raises(ValueError, match="no words"):
        CaptionWords(CONFIG, vocabulary(("", " ")), torch.zeros(1, 3, 8, 8))
