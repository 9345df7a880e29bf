from __future__ import annotations

import pytest
import torch

from sfumato.conditioners.label import LabelCond, LabelToken
from sfumato.core.types import Inputs
from sfumato.nets.told import ClassToken, ClassTokenConfig


def test_label_and_its_null_class():
    cond = LabelCond(10)(Inputs(n=2, label=torch.tensor([0, 9])))
    assert cond.label.dtype == torch.int64
    assert cond.label.tolist() == [0, 9]
    assert LabelCond(10).null(Inputs(n=2), cond).label.tolist() == [10, 10]


def test_without_labels_everything_is_the_null_class():
    assert LabelCond(10)(Inputs(n=3)).label.tolist() == [10, 10, 10]


@pytest.mark.parametrize("label", [[10], [-1]])
def test_classes_outside_the_range_are_refused(label):
    with pytest.raises(ValueError, match=r"outside 0\.\.9"):
        LabelCond(10)(Inputs(n=1, label=torch.tensor(label)))


def test_one_label_per_picture():
    with pytest.raises(ValueError, match=r"shape \(2,\); expected one integer per picture, \(3,\)"):
        LabelCond(10)(Inputs(n=3, label=torch.tensor([1, 2])))


def test_a_class_and_the_null_class_as_tokens():
    net = ClassToken(ClassTokenConfig(rows=11, width=6))
    rows, told = net.embedding.weight, Inputs(n=2, label=torch.tensor([0, 9]))
    cond = LabelToken(LabelCond(10), net)(told)
    assert cond.label is None
    assert torch.equal(cond.tokens, rows[[0, 9]][:, None])
    assert torch.equal(LabelToken(LabelCond(10), net).null(told, cond).tokens, rows[[10, 10]][:, None])
    assert LabelToken(LabelCond(11, has_null=False), net).null(told, cond) is cond
