"""PNG files that carry how they were made."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sfumato.core.png import encode_png, parameters, read_record, read_text, save_png, write_whole

PICTURE = torch.arange(3 * 5 * 7, dtype=torch.uint8).reshape(3, 5, 7)


def test_round_trip(tmp_path):
    record = {
        "prompt": "a café, 夜",
        "seed": 2**62,
        "steps": 20,
        "guidance": 3.5,
        "size": [64, 64],
        "none": None,
    }
    path = save_png(
        tmp_path / "new" / "a.png", PICTURE, record=record, text={"parameters": "a café, 夜\nSteps: 20"}
    )
    assert read_record(path) == record
    assert read_text(path)["parameters"] == "a café, 夜\nSteps: 20"
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), PICTURE.permute(1, 2, 0).numpy())


def test_chunks_are_plain_text_where_latin_1_can_say_it():
    data = encode_png(PICTURE, record={"prompt": "夜"}, text={"parameters": "naïve"})
    assert b"tEXtparameters\0na\xefve" in data
    assert b'tEXtsfumato\0{"prompt": "\\u591c"}' in data
    assert b"iTXtparameters" in encode_png(PICTURE, text={"parameters": "夜"})


def test_same_arguments_same_bytes():
    first = encode_png(PICTURE, record={"a": 1, "b": 2}, text={"x": "y"})
    assert first == encode_png(PICTURE.clone(), record={"b": 2, "a": 1}, text={"x": "y"})
    assert first != encode_png(PICTURE, record={"a": 1, "b": 3}, text={"x": "y"})


@settings(max_examples=50)
@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=80))
def test_any_text_survives(tmp_path_factory, text):
    path = save_png(tmp_path_factory.mktemp("png") / "a.png", PICTURE, record={"t": text}, text={"t": text})
    assert read_record(path) == {"t": text}
    assert read_text(path)["t"] == text


def test_gray_and_pillow_images(tmp_path):
    save_png(tmp_path / "gray.png", PICTURE[:1])
    save_png(tmp_path / "pil.png", Image.new("RGB", (2, 3), "red"))
    with Image.open(tmp_path / "gray.png") as gray, Image.open(tmp_path / "pil.png") as red:
        assert gray.mode == "L"
        assert red.size == (2, 3)


@pytest.mark.parametrize(
    ("record", "text", "match"),
    [
        ({"x": float("nan")}, None, "record must be JSON"),
        ({"x": object()}, None, "record must be JSON"),
        (None, {"": "x"}, "ASCII key"),
        (None, {"k" * 80: "x"}, "ASCII key"),
        (None, {"clé": "x"}, "ASCII key"),
        (None, {"k": "a\0b"}, "without NUL"),
    ],
)
def test_what_cannot_be_written(record, text, match):
    with pytest.raises(ValueError, match=match):
        encode_png(PICTURE, record=record, text=text)


class TestReading:
    def test_absent_and_damaged(self, tmp_path):
        with pytest.raises(ValueError, match="there is no picture at"):
            read_text(tmp_path / "none.png")
        (tmp_path / "jpeg.png").write_bytes(b"not a png")
        with pytest.raises(ValueError, match="not a PNG file"):
            read_text(tmp_path / "jpeg.png")
        whole = encode_png(PICTURE, record={"a": 1})
        (tmp_path / "cut.png").write_bytes(whole[:-30])
        with pytest.raises(ValueError, match="cannot read the text of"):
            read_record(tmp_path / "cut.png")

    def test_no_record(self, tmp_path):
        with pytest.raises(ValueError, match="has no 'sfumato' text"):
            read_record(save_png(tmp_path / "a.png", PICTURE))
        with pytest.raises(ValueError, match="is not JSON"):
            read_record(save_png(tmp_path / "b.png", PICTURE, text={"sfumato": "{"}))
        with pytest.raises(ValueError, match="not an object"):
            read_record(save_png(tmp_path / "c.png", PICTURE, text={"sfumato": "[1]"}))


class TestWriting:
    def test_replaces_and_leaves_nothing_else(self, tmp_path):
        path = tmp_path / "a.png"
        write_whole(path, b"old")
        write_whole(path, b"new")
        assert path.read_bytes() == b"new"
        assert os.listdir(tmp_path) == ["a.png"]

    def test_a_folder_that_is_a_file(self, tmp_path):
        (tmp_path / "file").write_text("x")
        with pytest.raises(ValueError, match=r"cannot write .*a\.png: .*choose a folder"):
            save_png(tmp_path / "file" / "a.png", PICTURE)
        assert os.listdir(tmp_path) == ["file"]

    def test_a_target_that_is_a_folder(self, tmp_path):
        (tmp_path / "a.png").mkdir()
        with pytest.raises(ValueError, match=r"cannot write .*a.png"):
            save_png(tmp_path / "a.png", PICTURE)
        assert os.listdir(tmp_path) == ["a.png"]

    @pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
    def test_a_folder_without_permission(self, tmp_path):
        tmp_path.chmod(0o500)
        with pytest.raises(ValueError, match="Permission denied"):
            save_png(tmp_path / "a.png", PICTURE)

    @pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
    def test_an_interrupted_write_keeps_the_old_file(self, tmp_path, monkeypatch, failure):
        path = write_whole(tmp_path / "a.png", b"old")

        def half(self, data):
            with open(self, "wb") as file:
                file.write(data[:2])
            raise failure

        monkeypatch.setattr(type(path), "write_bytes", half)
        with pytest.raises((ValueError, KeyboardInterrupt)):
            write_whole(path, b"newer")
        assert path.read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["a.png"]


class TestParameters:
    def test_the_three_lines(self):
        text = parameters("a fox", "rain", {"Steps": 20, "Sampler": "Euler", "Size": "64x64"})
        assert text == "a fox\nNegative prompt: rain\nSteps: 20, Sampler: Euler, Size: 64x64"

    def test_without_negative_and_settings(self):
        assert parameters("a fox", settings={"Seed": 0}) == "a fox\nSeed: 0"
        assert parameters("a fox") == "a fox"

    def test_values_that_would_break_the_line_are_quoted(self):
        assert parameters("p", settings={"Note": 'a, "b": c'}) == 'p\nNote: "a, \\"b\\": c"'
