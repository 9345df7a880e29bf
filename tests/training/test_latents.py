from __future__ import annotations

import pytest
import torch

from sfumato.core.random import Noise
from sfumato.nets.autoencoder import Autoencoder, AutoencoderConfig, DiagonalGaussian
from sfumato.systems.codec import Latents
from sfumato.training.batches import DataConfig, PictureBatches, open_folder, order_of
from sfumato.training.latents import LatentBatches, encode_folder, statistics

NET = AutoencoderConfig(channels=8, mults=(1, 2), blocks=1, norm_groups=4, z_channels=2, embed_dim=2)


@pytest.fixture
def net() -> Autoencoder:
    return Autoencoder(NET).eval().requires_grad_(False)


def test_cached_latents_equal_those_of_the_codec(pictures, net):
    config = DataConfig(path=pictures, size=16)
    folder = open_folder(config)
    order = order_of(folder, config, 0)
    moments = encode_folder(net, folder)
    scale = statistics(moments, sampled=True)
    batch = LatentBatches(moments, scale, order, 4, torch.device("cpu"))(8)
    fresh = PictureBatches(folder, order, 4, torch.device("cpu"))(8)
    assert (batch.text, batch.index.tolist()) == (fresh.text, fresh.index.tolist())
    assert batch.images is None
    wanted = Latents(net, *scale).encode(fresh.images, Noise([1, 2, 3, 4]))
    posterior = DiagonalGaussian(*batch.moments.chunk(2, dim=1))
    # Convolutions over batches of different size round differently in the last bits.
    torch.testing.assert_close(
        posterior.sample(Noise([1, 2, 3, 4])(posterior.mean)), wanted, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("sampled", [True, False])
def test_statistics_make_latents_of_zero_mean_and_unit_variance(pictures, net, sampled):
    moments = encode_folder(net, open_folder(DataConfig(path=pictures, size=16)))
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in statistics(moments, sampled=sampled))
    copies = 200 if sampled else 1
    latent = moments.mean.repeat(copies, 1, 1, 1)
    if sampled:
        latent = latent + (0.5 * moments.logvar).exp().repeat(copies, 1, 1, 1) * torch.randn(latent.shape)
    z = (latent - mean) / std
    # 200 draws of 12 pictures of 64 cells: the error of a mean of 153,600 unit normals is about 0.0026.
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(2), atol=0.02, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3), correction=0), torch.ones(2), atol=0.02, rtol=0)


def test_the_cache_is_used_until_weights_or_pictures_change(pictures, net, tmp_path, monkeypatch):
    calls = []
    encode = Autoencoder.encode
    monkeypatch.setattr(Autoencoder, "encode", lambda self, x: calls.append(len(x)) or encode(self, x))
    cache, config = tmp_path / "latents.safetensors", DataConfig(path=pictures, size=16)
    first = encode_folder(net, open_folder(config), cache)
    again = encode_folder(net, open_folder(config), cache)
    assert calls == [12]
    assert torch.equal(first.mean, again.mean)
    assert torch.equal(first.logvar, again.logvar)
    with torch.no_grad():
        net.encoder.conv_in.weight[0, 0, 0, 0] += 1
    encode_folder(net, open_folder(config), cache)
    assert calls == [12, 12]
    (pictures / "0.png").write_bytes((pictures / "1.png").read_bytes())
    encode_folder(net, open_folder(config), cache)
    assert calls == [12, 12, 12]
    cache.write_bytes(cache.read_bytes()[:100])
    encode_folder(net, open_folder(config), cache)
    assert calls == [12, 12, 12, 12]
