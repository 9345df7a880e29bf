from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sfumato.conditioners.base import Merged, Unconditional, merged
from sfumato.conditioners.label import LabelCond
from sfumato.core.types import Conditioning, Inputs


class Pooled:
    """Fills `pooled` with ones, and with zeros when dropped."""

    def __call__(self, inputs, noise=None):
        return Conditioning(pooled=torch.ones(inputs.n, 2))

    def null(self, inputs, cond):
        return replace(cond, pooled=torch.zeros(inputs.n, 2))


def test_unconditional_says_nothing():
    cond = Unconditional()(Inputs(n=3))
    assert dict(cond.items()) == {}
    assert Unconditional().null(Inputs(n=3), cond) is cond


def test_merged_fills_and_drops_the_fields_of_every_part():
    both = merged([Pooled(), LabelCond(5)])
    inputs = Inputs(n=2, label=torch.tensor([1, 4]))
    cond = both(inputs)
    null = both.null(inputs, cond)
    assert cond.label.tolist() == [1, 4]
    assert cond.pooled.eq(1).all()
    assert null.label.tolist() == [5, 5]
    assert null.pooled.eq(0).all()


def test_merged_refuses_two_conditioners_of_one_field():
    with pytest.raises(ValueError, match="two conditioners of one stage fill label"):
        Merged((LabelCond(5), LabelCond(3)))(Inputs(n=1))


def test_merging_none_or_one_adds_nothing():
    one = LabelCond(5)
    assert merged([one]) is one
    assert merged([]) == Unconditional()
