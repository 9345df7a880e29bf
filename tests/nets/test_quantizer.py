"""Principal axes against an SVD, what quantizing loses, and cosines from the upper half."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sfumato.nets.quantizer import Quantizer

DIM = 6


def pairs(n: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of pictures with a spread of their own in each of turned axes, and of their texts."""
    turn = torch.linalg.qr(torch.randn(DIM, DIM))[0]
    images = torch.randn(n, DIM) * torch.arange(DIM, 0, -1) @ turn + 2
    return images, images + 2 * torch.randn(n, DIM)


def fitted(kept: int, buckets: int) -> tuple[Quantizer, torch.Tensor, torch.Tensor]:
    images, texts = pairs()
    quantizer = Quantizer(DIM, kept, buckets)
    quantizer.fit(images, texts)
    return quantizer, images, texts


def test_the_axes_are_those_of_an_svd():
    quantizer, images, _ = fitted(4, 8)
    rows = images.double().numpy()
    expected = np.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][:4]
    found = quantizer.axes.double().numpy()
    np.testing.assert_allclose(found @ found.T, np.eye(4), atol=1e-6)
    np.testing.assert_allclose(np.abs((found * expected).sum(1)), 1, atol=1e-6)  # up to their signs


def test_a_round_trip_is_off_by_half_a_bucket_at_most():
    quantizer, images, texts = fitted(DIM, 32)
    tokens = quantizer.encode(images, texts)
    assert tokens.dtype == torch.int64
    assert tokens.amin(0).tolist() == [0] * (1 + DIM)
    assert tokens.amax(0).tolist() == [31] * (1 + DIM)
    again = quantizer.decode(tokens)
    off = ((again - images) @ quantizer.axes.mT).abs()
    assert bool((off <= 0.5001 * quantizer.width[1:]).all())
    assert torch.equal(quantizer.encode(again, texts)[:, 1:], tokens[:, 1:])


def test_axes_that_are_left_out_are_at_their_mean():
    quantizer, images, texts = fitted(2, 1024)
    again = quantizer.decode(quantizer.encode(images, texts))
    rest = (again - images.mean(0)) - (again - images.mean(0)) @ quantizer.axes.mT @ quantizer.axes
    assert float(rest.abs().max()) < 1e-4
    variances = torch.linalg.eigvalsh(torch.cov(images.mT.double(), correction=0)).flip(0)
    assert float((again - images).square().sum(1).mean()) == pytest.approx(
        float(variances[2:].sum()), rel=0.01
    )


def test_token_zero_is_the_cosine_and_is_drawn_from_its_upper_half():
    quantizer, images, texts = fitted(2, 16)
    cosine = F.cosine_similarity(images, texts)
    token = quantizer.encode(images, texts)[:, 0]
    middles = quantizer.low[0] + (token + 0.5) * quantizer.width[0]
    assert bool(((middles - cosine).abs() <= 0.5001 * quantizer.width[0]).all())
    drawn = quantizer.matching(torch.linspace(0, 1, 20_001))
    counts = torch.bincount(token.sort().values[200:], minlength=16)  # of 400 pictures, the better half
    torch.testing.assert_close(torch.bincount(drawn, minlength=16) / 20_001, counts / 200, rtol=0, atol=1e-3)


def test_half_precision_around_it_changes_no_token():
    quantizer, images, texts = fitted(4, 1024)
    tokens = quantizer.encode(images, texts)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer.encode(images, texts), tokens)
        again = quantizer.decode(tokens)
    assert torch.equal(again, quantizer.decode(tokens))


def test_what_is_beyond_the_data_goes_to_the_last_bucket():
    quantizer, _, texts = fitted(3, 8)
    for sign, last in ((-1, 0), (1, 7)):
        far = quantizer.mean + sign * 1000 * quantizer.axes.sum(0)
        assert quantizer.encode(far[None], texts[:1])[0, 1:].tolist() == [last] * 3


@pytest.mark.parametrize(
    ("images", "texts", "message"),
    [
        ((9, 7), (9, 7), r"embeddings of images have shape \(9, 7\) and this prior is for \(9, 6\)"),
        ((9, 6), (9, 5), r"embeddings of texts have shape \(9, 5\) .*: set dim to the width of its CLIP"),
        ((4, 6), (4, 6), "4 pictures have no 4 principal axes; lower kept, or add some"),
    ],
)
def test_pairs_that_do_not_fit_are_one_line(images, texts, message):
    with pytest.raises(ValueError, match=message) as error:
        Quantizer(DIM, 4, 8).fit(torch.randn(images), torch.randn(texts))
    assert "\n" not in str(error.value)
