from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from sfumato.training.batches import DataConfig, PictureBatches, open_folder, order_of

CPU = torch.device("cpu")


def batches(config: DataConfig, size: int = 4, seed: int = 0) -> PictureBatches:
    folder = open_folder(config)
    return PictureBatches(folder, order_of(folder, config, seed), size, CPU)


def test_a_batch_is_a_pure_function_of_seed_and_position(pictures):
    config = DataConfig(path=pictures, size=16, flip=True, shift=2)
    first, second = batches(config), batches(config)
    for position in (20, 0, 4):
        second(position)
    assert torch.equal(first(20).images, second(20).images)
    assert first(20).text == second(20).text
    assert not torch.equal(first(20).images, batches(config, seed=1)(20).images)


def test_the_same_samples_whatever_the_batch_size(pictures):
    config = DataConfig(path=pictures, size=16, shift=3)
    small, large = batches(config, 2), batches(config, 6)
    parts = [small(position) for position in (0, 2, 4)]
    assert torch.equal(torch.cat([part.images for part in parts]), large(0).images)
    assert torch.equal(torch.cat([part.index for part in parts]), large(0).index)


def test_pictures_are_floats_in_range_with_their_captions(pictures):
    batch = batches(DataConfig(path=pictures, size=16))(0)
    assert batch.images.shape == (4, 3, 16, 16)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert float(batch.images.min()) == -1.0
    assert float(batch.images.max()) == 1.0
    for text, index in zip(batch.text, batch.index.tolist(), strict=True):
        assert text.endswith(f"bar {index}")


def test_a_split_and_evenly_drawn_concepts(pictures):
    made = batches(DataConfig(path=pictures, size=16, split="train", even="concept"), size=8)
    words = Counter(text.split()[0] for position in range(0, 64, 8) for text in made(position).text)
    assert words == {"red": 32, "green": 32}


def test_one_damaged_file_in_many_is_passed_over_and_counted(pictures):
    (pictures / "3.png").write_bytes((pictures / "3.png").read_bytes()[:60])
    rows = (pictures / "metadata.jsonl").read_text()
    extra = "".join(rows.replace('"file_name": "', f'"file_name": "copy{k}/') for k in range(9))
    for k in range(9):
        (pictures / f"copy{k}").mkdir()
        for i in range(12):
            source = pictures / ("0.png" if i == 3 else f"{i}.png")
            (pictures / f"copy{k}" / f"{i}.png").write_bytes(source.read_bytes())
    (pictures / "metadata.jsonl").write_text(rows + extra)
    made = batches(DataConfig(path=pictures, size=16), size=120)
    batch = made(0)
    assert len(batch) == 120
    assert [path.name for path in made.skipped] == ["3.png"]
    assert sorted(batch.index.tolist()) == sorted([4, *(i for i in range(120) if i != 3)])


def test_many_damaged_files_stop_the_run_with_the_reason(pictures):
    (pictures / "3.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"1 of 12 pictures are damaged, more than 1 %.*3\.png") as error:
        batches(DataConfig(path=pictures, size=16), size=12)(0)
    assert "\n" not in str(error.value)


def test_only_random_preparations_count_as_augmentation():
    assert not DataConfig().augments
    assert replace(DataConfig(), flip=True).augments
    assert replace(DataConfig(), shift=1).augments
