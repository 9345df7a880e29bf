from __future__ import annotations

import pytest
import torch

from sfumato.core.random import Noise
from sfumato.nets.autoencoder import Autoencoder, AutoencoderConfig
from sfumato.systems.codec import Embeddings, Latents, Pixels


@pytest.fixture(scope="module")
def autoencoder():
    torch.manual_seed(0)
    return Autoencoder(
        AutoencoderConfig(channels=8, mults=(1, 2), blocks=1, mid_attention=False, norm_groups=4)
    ).requires_grad_(False)


def test_pixels_are_themselves():
    x = torch.randn(2, 3, 4, 4)
    assert Pixels().encode(x) is x
    assert Pixels().decode(x) is x
    assert Pixels().factor == 1


@pytest.mark.parametrize(
    ("mean", "std"),
    [((0.0,), (5.5,)), ((0.1, 0.2, 0.3, 0.4), (1.0, 2.0, 3.0, 4.0)), ((0.5,), (1.0, 2.0, 3.0, 4.0))],
)
def test_latents_are_normalised_by_channel(autoencoder, mean, std):
    codec = Latents(autoencoder, mean, std)
    x = torch.randn(2, 3, 8, 8)
    posterior = autoencoder.encode(x)
    z = codec.encode(x)
    assert z.shape == (2, 4, 4, 4)
    for c in range(4):
        m, s = mean[c % len(mean)], std[c % len(std)]
        torch.testing.assert_close(z[:, c], (posterior.mean[:, c] - m) / s)
    torch.testing.assert_close(codec.decode(z), autoencoder.decode(posterior.mean))


def test_noise_samples_the_posterior(autoencoder):
    codec = Latents(autoencoder, std=(2.0,))
    x = torch.randn(2, 3, 8, 8)
    posterior = autoencoder.encode(x)
    sampled = codec.encode(x, Noise([1, 2]))
    expected = posterior.sample(Noise([1, 2])(posterior.mean)) / 2
    torch.testing.assert_close(sampled, expected)
    assert not torch.allclose(sampled, codec.encode(x))


@pytest.mark.parametrize(
    ("mean", "std", "said"),
    [
        ((0.0, 0.0), (1.0,), "mean has 2 values; expected 1, or one for each of 4 latent channels"),
        ((0.0,), (1.0, 1.0, 1.0), "std has 3 values"),
        ((0.0,), (0.0,), "must be positive"),
    ],
)
def test_moments_must_fit(autoencoder, mean, std, said):
    with pytest.raises(ValueError, match=said):
        Latents(autoencoder, mean, std)


def test_embeddings_have_moments_per_dimension():
    codec = Embeddings(mean=(1.0, 2.0), std=(2.0, 4.0))
    assert codec.encode(torch.tensor([[3.0, 10.0]])).tolist() == [[1.0, 2.0]]
    assert codec.decode(torch.tensor([[1.0, 2.0]])).tolist() == [[3.0, 10.0]]
    with pytest.raises(ValueError, match="mean has 2 values"):
        Embeddings(mean=(1.0, 2.0), std=(1.0, 1.0, 1.0))
