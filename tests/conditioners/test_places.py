from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sfumato.conditioners.places import Boxes, Semantic
from sfumato.core.types import Inputs
from sfumato.nets.text import TextTransformer, TextTransformerConfig
from sfumato.nets.told import ClassMap, ClassMapConfig


def test_a_map_of_classes_is_made_small_and_mixed():
    """The published rescaler: one-hot, half the size twice, a 1x1 convolution without bias."""
    net = ClassMap(ClassMapConfig(classes=182, channels=3))
    classes = torch.randint(182, (2, 8, 16))
    hint = classes[:, None].expand(2, 3, 8, 16) / 127.5 - 1
    cond = Semantic(net, factor=4)(Inputs(n=2, hint=hint))
    x = F.one_hot(classes, 182).permute(0, 3, 1, 2).float()
    for _ in range(2):
        x = F.interpolate(x, scale_factor=0.5, mode="bilinear")
    torch.testing.assert_close(cond.concat, F.conv2d(x, net.mix.weight[:, :, None, None]))
    assert Semantic(net, factor=4).null(Inputs(n=2), cond) is cond


def test_a_map_that_is_missing_or_of_other_classes():
    semantic = Semantic(ClassMap(ClassMapConfig(classes=4, channels=3)), factor=2)
    with pytest.raises(ValueError, match="give a gray picture of them as hint"):
        semantic(Inputs(n=1))
    with pytest.raises(ValueError, match="the hint has class 255; allowed: gray values 0 to 3"):
        semantic(Inputs(n=1, hint=torch.ones(1, 3, 4, 4)))


@pytest.fixture
def boxes() -> Boxes:
    """Two boxes on a grid of 4x4: 16 ids, of which the last is none."""
    shape = {"width": 16, "depth": 1, "heads": 2, "padding": "read"}
    return Boxes(TextTransformer(TextTransformerConfig(vocab_size=16, context=8, **shape)).eval())


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("", [15, 15, 15, 15, 15, 15, 0, 15]),
        ("7 0 0 1 1", [7, 0, 15, 15, 15, 15, 0, 15]),
        # The third column of the second row is 6: the example in the reference's own words.
        ("3 0.66 0.33 1 0.7; 0 0 0.1 0.5 0.49", [3, 6, 11, 0, 0, 6, 0, 15]),
    ],
)
def test_a_box_is_a_class_and_two_places_on_a_grid(boxes, text, ids):
    cond = boxes(Inputs(n=1, text=[text]))
    expected, _ = boxes.encoder(torch.tensor([ids]), torch.ones(1, 8, dtype=torch.bool))
    torch.testing.assert_close(cond.tokens, expected)
    assert boxes.null(Inputs(n=1), cond) is cond


@pytest.mark.parametrize(
    "text", ["a cat", "15 0 0 1 1", "3 0 0 1", "3 0.5 0 0.4 1", "3 0 0 1 1.5", "3.5 0 0 1 1"]
)
def test_what_is_no_box_is_refused(boxes, text):
    with pytest.raises(ValueError, match=r"box '.*' is not understood; give class \(0 to 14\), left, top"):
        boxes(Inputs(n=1, text=[text]))


def test_too_many_boxes(boxes):
    with pytest.raises(ValueError, match="3 boxes; allowed: at most 2"):
        boxes(Inputs(n=1, text=["1 0 0 1 1;" * 3]))
