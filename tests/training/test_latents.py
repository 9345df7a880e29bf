from __future__ import annotations

import pytest
import torch

from sfumato.core.png import save_png
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
    assert torch.equal(batch.sizes, fresh.sizes)
    assert torch.equal(batch.crops, fresh.crops)
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
    table = torch.stack([moments[row] for row in range(len(moments))])
    latent = table[:, :2].repeat(copies, 1, 1, 1)
    if sampled:
        latent = latent + (0.5 * table[:, 2:]).exp().repeat(copies, 1, 1, 1) * torch.randn(latent.shape)
    z = (latent - mean) / std
    # 200 draws of 12 pictures of 64 cells: the error of a mean of 153,600 unit normals is about 0.0026.
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(2), atol=0.02, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3), correction=0), torch.ones(2), atol=0.02, rtol=0)


@pytest.fixture
def encoded(monkeypatch):
    """The number of pictures of each call of an encoder."""
    calls = []
    encode = Autoencoder.encode
    monkeypatch.setattr(Autoencoder, "encode", lambda self, x: calls.append(len(x)) or encode(self, x))
    return calls


def equal(one, other):
    return [torch.equal(one[row], other[row]) for row in range(len(one))]


def test_only_what_changed_is_encoded_again(pictures, net, tmp_path, encoded, caplog):
    cache, config = tmp_path / "latents", DataConfig(path=pictures, size=16)
    first = encode_folder(net, open_folder(config), cache)
    again = encode_folder(net, open_folder(config), cache)
    assert encoded == [12]
    assert all(equal(first, again))
    (pictures / "7.png").write_bytes((pictures / "1.png").read_bytes())
    save_png(pictures / "8.png", torch.zeros(3, 16, 16, dtype=torch.uint8))
    edited = encode_folder(net, open_folder(config), cache)
    assert encoded == [12, 1]  # one of the two equals another picture, which is known
    assert equal(edited, first) == [row not in (7, 8) for row in range(12)]
    assert torch.equal(edited[7], first[1])
    small = encode_folder(net, open_folder(DataConfig(path=pictures, size=8)), cache)
    assert small[0].shape == (4, 4, 4)
    assert encoded == [12, 1, 11]
    assert "damaged" not in caplog.text


def test_other_weights_encode_everything_and_leave_no_old_files(pictures, net, tmp_path, encoded):
    cache, config = tmp_path / "latents", DataConfig(path=pictures, size=16)
    encode_folder(net, open_folder(config), cache)
    old = set(cache.iterdir())
    with torch.no_grad():
        net.encoder.conv_in.weight[0, 0, 0, 0] += 1
    encode_folder(net, open_folder(config), cache)
    assert encoded == [12, 12]
    assert not old & set(cache.iterdir())


def test_a_damaged_file_of_the_cache_is_made_again(pictures, net, tmp_path, encoded, caplog):
    cache, config = tmp_path / "latents", DataConfig(path=pictures, size=16)
    first = encode_folder(net, open_folder(config), cache)
    (path,) = cache.iterdir()
    part = path.read_bytes()[:100]
    path.unlink()  # not cut in place: `first` has it mapped into memory
    path.write_bytes(part)
    assert all(equal(encode_folder(net, open_folder(config), cache), first))
    assert encoded == [12, 12]
    assert f"{path} is damaged" in caplog.text


def test_a_damaged_picture_has_the_stand_in_of_its_pictures_batch(pictures, net, tmp_path, monkeypatch):
    monkeypatch.setattr("sfumato.training.batches.MOST_DAMAGED", 0.5)
    for name in ("3.png", "4.png"):
        (pictures / name).write_bytes(b"no picture")
    folder = open_folder(DataConfig(path=pictures, size=16))
    moments = encode_folder(net, folder, tmp_path / "latents")
    assert moments.index.tolist() == [0, 1, 2, 5, 5, 5, 6, 7, 8, 9, 10, 11]
    assert moments.text[3] == moments.text[4] == folder.texts[5]
    assert torch.equal(moments[4], moments[5])
    assert len(folder.skipped) == 2


def test_too_many_damaged_pictures(pictures, net):
    (pictures / "3.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"1 of 12 pictures are damaged, more than 1 %: .*3\.png"):
        encode_folder(net, open_folder(DataConfig(path=pictures, size=16)))


def test_latents_in_buckets(pictures, net, tmp_path, encoded):
    for i in range(0, 12, 2):
        save_png(pictures / f"{i}.png", torch.full((3, 10, 40), 20 * i, dtype=torch.uint8))
    config = DataConfig(path=pictures, size=16, buckets=4)
    folder = open_folder(config)
    order = order_of(folder, config, 0, 3)
    moments = encode_folder(net, folder, tmp_path / "latents", sizes=order.sizes)
    assert encoded == [6, 6]
    latents = LatentBatches(moments, statistics(moments, sampled=False), order, 3, torch.device("cpu"))
    fresh = PictureBatches(folder, order, 3, torch.device("cpu"))
    shapes = set()
    for position in range(0, 12, 3):
        batch, wanted = latents(position), fresh(position)
        assert batch.index.tolist() == wanted.index.tolist()
        assert torch.equal(batch.crops, wanted.crops)
        assert batch.moments.shape[2:] == (wanted.images.shape[2] // 2, wanted.images.shape[3] // 2)
        shapes.add(tuple(wanted.images.shape[2:]))
    assert shapes == {(16, 16), (8, 32)}
