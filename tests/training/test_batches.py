from __future__ import annotations

import json
import tarfile
from collections import Counter
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest
import torch

from sfumato.core.png import save_png
from sfumato.training.batches import (
    DataConfig,
    PictureBatches,
    check_captions,
    check_damage,
    check_labels,
    open_folder,
    order_of,
)

CPU = torch.device("cpu")


def batches(config: DataConfig, size: int = 4, seed: int = 0) -> PictureBatches:
    folder = open_folder(config)
    return PictureBatches(folder, order_of(folder, config, seed, size), size, CPU)


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
    assert [Path(name).name for name in made.skipped] == ["3.png"]
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
    assert replace(DataConfig(), crop=0.5).augments


def test_an_error_names_ten_damaged_files_and_counts_the_rest(pictures):
    for i in range(12):
        (pictures / f"{i}.png").write_bytes(b"no picture")
    folder = open_folder(DataConfig(path=pictures, size=16))
    folder.skipped |= {str(entry.file): "broken" for entry in folder.entries}
    with pytest.raises(ValueError, match="12 of 12 pictures are damaged") as error:
        check_damage(folder)
    said = str(error.value)
    assert said.count(".png") == 10
    assert "9.png and 2 more; the first: broken; see `sfumato data check " in said


def test_shards_give_what_their_folder_gives(pictures, tmp_path):
    """The same pictures, captions, splits and order, whatever they are stored in."""
    rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    for shard in range(3):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for row in rows[4 * shard : 4 * shard + 4]:
                name = row.pop("file_name")
                (tmp_path / "row.json").write_text(json.dumps(row))
                tar.add(pictures / name, name)
                tar.add(tmp_path / "row.json", name.replace(".png", ".json"))
    config = DataConfig(path=pictures, size=16, split="train", even="concept", flip=True)
    packed = replace(config, path=tmp_path / "{0..2}.tar", cache=tmp_path / "cache")
    one, other = batches(config)(8), batches(packed)(8)
    assert torch.equal(one.images, other.images)
    assert one.text == other.text
    assert one.index.tolist() == other.index.tolist()
    folder = open_folder(packed)
    few = order_of(folder, replace(packed, even=None, mix=1), 0)
    shards = [folder.entries[draw.index].block for draw in few.take(0, len(folder))]
    assert len([block for block, _ in groupby(shards)]) == 3  # one after the other


def test_buckets_keep_proportions_and_tell_size_and_crop(pictures):
    for i in range(0, 12, 2):
        save_png(pictures / f"{i}.png", torch.zeros(3, 20, 70, dtype=torch.uint8))
    made = batches(DataConfig(path=pictures, size=16, buckets=4, crop=1.0), 3)
    seen = Counter()
    for position in range(0, 12, 3):
        batch = made(position)
        seen[tuple(batch.images.shape[2:])] += 1
        for index, size, crop in zip(batch.index, batch.sizes.tolist(), batch.crops.tolist(), strict=True):
            assert size == ([20, 70] if index % 2 == 0 else [16, 16])
            # 20 x 70 becomes 9 x 32 or 10 x 35, and what is too much is cut off
            assert crop == [0, 0] if index % 2 else 0 <= crop[0] <= 2
    assert seen == {(16, 16): 2, (8, 32): 2}


def test_options_that_exclude_each_other():
    for option in ({"even": "concept"}, {"mix": 2}):
        with pytest.raises(
            ValueError, match=rf"data\.buckets and data\.{next(iter(option))} cannot be combined"
        ):
            DataConfig(buckets=8, **option)


def test_missing_captions_are_counted_or_an_error(pictures, caplog):
    rows = (pictures / "metadata.jsonl").read_text()
    (pictures / "metadata.jsonl").write_text(rows.replace('"text": "red bar 0"', '"text": ""'))
    check_captions(open_folder(DataConfig(path=pictures)))
    assert "1 of 12 pictures have no caption" in caplog.text
    (pictures / "metadata.jsonl").unlink()
    with pytest.raises(
        ValueError, match=r"no picture of .*pictures has a caption, and the task learns from text"
    ):
        check_captions(open_folder(DataConfig(path=pictures)))


def test_labels(pictures):
    rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    rows = [row | {"label": i} for i, row in enumerate(rows)]
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = DataConfig(path=pictures, size=16)
    batch = batches(config)(0)
    assert batch.labels.tolist() == batch.index.tolist()
    folder = open_folder(config)
    check_labels(folder, 12)
    with pytest.raises(
        ValueError, match=r"2 of 12 labels are out of range, the first is 10 of .*10\.png; .*0 to 9"
    ):
        check_labels(folder, 10)
    del rows[3]["label"]
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=r"3\.png has no label"):
        check_labels(open_folder(config), 12)
    assert batches(config, 12)(0).labels is None
