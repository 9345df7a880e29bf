from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sfumato.training.batches import DataConfig, open_folder
from sfumato.training.held_out import HeldOut, ValidationConfig, hold_out


def names(folder):
    return {entry.file.name for entry in folder.entries}


def test_a_split_is_kept_from_training_whatever_the_data_say(pictures):
    for split in (None, "train"):
        data = DataConfig(path=pictures, size=16, split=split, flip=True, shift=2)
        rest, held = hold_out(open_folder(data), ValidationConfig(split="held_out"), data)
        assert names(held) == {"2.png", "5.png", "8.png", "11.png"}
        assert not names(rest) & names(held)
        assert len(rest) == 8
        assert torch.equal(held.read(0, seed=1).image, held.read(0, seed=2).image)  # not augmented


def test_a_share_goes_by_file_names_and_stays_when_pictures_are_added(pictures):
    data, config = DataConfig(path=pictures, size=16), ValidationConfig(share=0.4)
    rest, held = hold_out(open_folder(data), config, data)
    assert names(rest) | names(held) == {f"{i}.png" for i in range(12)}
    assert not names(rest) & names(held)
    rows = (pictures / "metadata.jsonl").read_text()
    (pictures / "new.png").write_bytes((pictures / "0.png").read_bytes())
    (pictures / "metadata.jsonl").write_text('{"file_name": "new.png", "split": "train"}\n' + rows)
    _, again = hold_out(open_folder(data), config, data)
    assert names(again) - {"new.png"} == names(held)


def test_only_so_many_are_used_but_none_of_the_others_is_trained_on(pictures):
    data = DataConfig(path=pictures, size=16)
    rest, held = hold_out(open_folder(data), ValidationConfig(split="held_out", pictures=2), data)
    assert (len(rest), names(held)) == (8, {"2.png", "8.png"})


def test_nothing_is_held_out_unless_asked_for(pictures):
    data = DataConfig(path=pictures, size=16)
    folder = open_folder(data)
    assert hold_out(folder, ValidationConfig(), data) == (folder, None)


@pytest.mark.parametrize(
    ("data", "config", "said"),
    [
        ({"split": "train"}, {"split": "train"}, "split 'train' leaves 0 pictures to train on and 8 to"),
        ({}, {"share": 1e-9}, "share 1e-09 leaves 12 pictures to train on and 0 to validate on"),
        ({}, {"split": "test"}, "no picture has split = 'test'"),
    ],
)
def test_an_empty_side_is_refused(data, config, said, pictures):
    settings = replace(DataConfig(path=pictures, size=16), **data)
    with pytest.raises(ValueError, match=said) as error:
        hold_out(open_folder(settings), ValidationConfig(**config), settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"split": "a", "share": 0.1}, "choose one"),
        ({"share": 1.0}, "between 0 and 1"),
        ({"pictures": 0}, "at least 1"),
        ({"draws": 0}, "at least 1"),
    ],
)
def test_wrong_settings_are_told(config, said):
    with pytest.raises(ValueError, match=said):
        ValidationConfig(**config)


def test_noise_of_a_picture_does_not_depend_on_the_batch(pictures):
    data = DataConfig(path=pictures, size=16)
    _, folder = hold_out(open_folder(data), ValidationConfig(split="held_out"), data)
    drawn = []
    for batch in (1, 3):
        held = HeldOut(folder, batch, 1)
        assert sum(rows.stop - rows.start for rows in held.rows()) == 4
        drawn.append(torch.cat([held.noise(r, "a")(torch.empty(r.stop - r.start, 5)) for r in held.rows()]))
    assert torch.equal(*drawn)
    assert held.inputs(slice(1, 3)).text == ("blue bar 5", "blue bar 8")
