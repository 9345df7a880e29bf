from __future__ import annotations

import math

import pytest
import torch

from sfumato.evaluation.measures import Proportion, psnr, ranks


def _interval(hits, total):
    made = Proportion.of(hits, total)
    return made.low, made.high


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [
        # Closed form worked out by hand for the ends: z^2 / (n + z^2) = 3.8415 / 13.8415.
        (0, 10, 0.0, 0.27753),
        (10, 10, 0.72247, 1.0),
        (5, 10, 0.23659, 0.76341),
        # Newcombe 1998, table I, method 3 (Wilson): 81 of 263 and 15 of 148.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
    ],
)
def test_wilson_interval(hits, total, low, high):
    assert _interval(hits, total) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_covers_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    hits = torch.binomial(torch.full((2000,), 40.0), torch.full((2000,), 0.3), generator=generator)
    covered = sum(low <= 0.3 <= high for low, high in (_interval(int(h), 40) for h in hits))
    assert 0.93 < covered / 2000 < 0.975


def test_proportion_reads_as_a_sentence_and_refuses_nonsense():
    assert str(Proportion.of(81, 263)) == "30.8 % (81 of 263, 95 % interval 25.5 to 36.6)"
    for hits, total in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="no proportion"):
            Proportion.of(hits, total)


def test_psnr_of_a_constant_error_in_closed_form():
    reference = torch.zeros(2, 3, 4, 4)
    image = reference + torch.tensor([0.2, 0.02]).view(2, 1, 1, 1)  # 0.1 and 0.01 on the [0, 1] scale
    torch.testing.assert_close(psnr(image, reference), torch.tensor([20.0, 40.0]).double(), atol=1e-4, rtol=0)


def test_psnr_clamps_the_picture_but_forgives_nothing_else():
    white = torch.ones(1, 3, 2, 2)
    assert math.isinf(float(psnr(white + 5, white)))
    assert float(psnr(-white, white)) == pytest.approx(0.0)


def test_ranks_where_the_answer_is_known():
    references = torch.tensor([[0.0, 0.0], [1.0, 0.0], [3.0, 0.0], [10.0, 0.0]])
    features = torch.tensor([[0.1, 0.0], [2.1, 0.0], [2.9, 0.0], [0.0, 0.0]])
    truth = torch.tensor([0, 1, 0, 3])
    assert ranks(features, references, truth).tolist() == [0, 1, 2, 3]


def test_ranks_do_not_punish_twins_but_do_punish_ties():
    references, alike = torch.tensor([[1.0], [1.0], [-1.0]]), torch.tensor([7, 7, 8])
    assert ranks(torch.tensor([[0.9]]), references, torch.tensor([1]), alike).tolist() == [0]
    assert ranks(torch.tensor([[0.9]]), references, torch.tensor([1])).tolist() == [1]
    assert ranks(torch.tensor([[0.0]]), references, torch.tensor([1]), alike).tolist() == [1]
