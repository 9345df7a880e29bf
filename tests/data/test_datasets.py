"""Image folders as training data."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.data.datasets import ImageFolder, stack
from sfumato.data.order import Order
from sfumato.data.transforms import CenterCrop, Chain, Flip, Shift


def picture(seed, height=8, width=8):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    rows = []
    for i in range(6):
        Image.fromarray(picture(i)).save(tmp_path / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": f"thing {i}", "label": i % 2, "kind": "ab"[i // 4]})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_samples(folder):
    data = ImageFolder(folder)
    assert len(data) == 6
    sample = data[2]
    assert np.array_equal(sample.image.permute(1, 2, 0).numpy(), picture(2))
    assert (sample.text, sample.label, sample.index, sample.size) == ("thing 2", 0, 2, (8, 8))
    assert sample.name == str(folder / "2.png")
    assert sample.fields == {"kind": "a"}
    assert data[-1].index == 5
    with pytest.raises(IndexError):
        data[6]


def test_columns(folder):
    data = ImageFolder(str(folder))
    assert data.texts == [f"thing {i}" for i in range(6)]
    assert data.labels == [0, 1, 0, 1, 0, 1]
    assert data.column("kind") == list("aaaabb")
    with pytest.raises(ValueError, match="no field 'sort'; it has: kind"):
        data.column("sort")


def test_where(folder):
    data = ImageFolder(folder, where={"kind": "b"})
    assert data.texts == ["thing 4", "thing 5"]
    assert data[0].index == 0
    with pytest.raises(ValueError, match=r"no picture has kind = 'c'; it has: 'a', 'b'"):
        ImageFolder(folder, where={"kind": "c"})
    with pytest.raises(ValueError, match="no field 'sort'"):
        ImageFolder(folder, where={"sort": "c"})


def test_captions_and_labels_may_be_absent(tmp_path):
    Image.fromarray(picture(0)).save(tmp_path / "a.png")
    data = ImageFolder(tmp_path)
    assert data.texts == [""]
    assert data[0].text is None
    with pytest.raises(ValueError, match=r"a\.png has no label"):
        _ = data.labels


def test_size_is_that_of_the_file_and_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture(0, 10, 20)).save(tmp_path / "a.jpg", exif=exif)
    sample = ImageFolder(tmp_path, transform=CenterCrop(4))[0]
    assert sample.size == (20, 10)
    assert sample.image.shape == (3, 4, 4)


class TestDraws:
    def test_positions_decide(self, folder):
        data = ImageFolder(folder, transform=Chain((Flip(), Shift(2))))
        order = Order(len(data), seed=1, groups=data.column("kind"))
        run = data.draw(order.take(0, 40))
        resumed = ImageFolder(folder, transform=data.transform).draw(order.take(13, 4))
        assert [s.index for s in run[13:17]] == [s.index for s in resumed]
        assert all(torch.equal(a.image, b.image) for a, b in zip(run[13:17], resumed, strict=True))
        again = [s.image for s in run if s.index == run[0].index]
        assert len(again) > 3
        assert any(not torch.equal(again[0], other) for other in again)  # each draw has its own seed

    def test_damaged_files_are_skipped_and_counted(self, folder):
        whole = (folder / "3.png").read_bytes()
        (folder / "3.png").write_bytes(whole[: len(whole) // 2])
        data = ImageFolder(folder)
        samples = data.draw(Order(6).take(0, 12))
        assert len(samples) == 12
        assert sorted(s.index for s in samples) == sorted([0, 1, 2, 4, 4, 5] * 2)
        assert list(data.skipped) == [str(folder / "3.png")]
        assert "truncated" in data.skipped[str(folder / "3.png")]
        with pytest.raises(ValueError, match=r"cannot read the picture .*3\.png: .*truncated"):
            data[3]

    def test_the_stand_in_does_not_depend_on_what_was_read_before(self, folder):
        for name in ("0.png", "5.png"):
            (folder / name).write_bytes(b"")
        order = Order(6, seed=4)
        run = [s.index for s in ImageFolder(folder).draw(order.take(0, 12))]
        assert [ImageFolder(folder).draw([order[p]])[0].index for p in range(12)] == run

    def test_nothing_readable(self, folder):
        for i in range(6):
            (folder / f"{i}.png").write_bytes(b"junk")
        with pytest.raises(ValueError, match="none of the 6 pictures"):
            ImageFolder(folder).draw(Order(6).take(0, 1))

    def test_an_error_of_the_transform_is_not_taken_for_damage(self, folder):
        data = ImageFolder(folder, transform=CenterCrop(0))
        with pytest.raises(ValueError, match="at least 1 pixel"):
            data.draw(Order(6).take(0, 1))
        assert not data.skipped


class TestBatches:
    def test_images(self, folder):
        data = ImageFolder(folder)
        assert data.images().shape == (6, 3, 8, 8)
        assert data.images().dtype == torch.uint8
        assert torch.equal(data.images([4, 1]), stack([data[4], data[1]]))

    def test_no_pictures(self, folder):
        with pytest.raises(ValueError, match="at least one picture"):
            ImageFolder(folder).images([])

    def test_different_sizes(self, folder):
        Image.fromarray(picture(0, 8, 9)).save(folder / "1.png")
        with pytest.raises(
            ValueError, match=r"0\.png \(8x8\) and .*1\.png \(9x8\); crop or resize them first"
        ):
            ImageFolder(folder).images()
