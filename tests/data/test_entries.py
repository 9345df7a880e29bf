"""What an image folder says of its pictures: layouts and wrong metadata."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from sfumato.data.entries import pictures, read_entries


@pytest.fixture
def folder(tmp_path):
    for name in ("b.png", "a.JPG", "sub/c.webp", ".hidden.png", ".trash/d.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
    (tmp_path / "notes.md").write_text("not a picture")
    return tmp_path


def jsonl(folder, *rows):
    (folder / "metadata.jsonl").write_text(
        "\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows)
    )
    return folder


def told(entries):
    return [(e.file.name, e.text, e.label, dict(e.fields)) for e in entries]


def test_pictures_are_sorted_and_hidden_ones_ignored(folder):
    assert [p.relative_to(folder).as_posix() for p in pictures(folder)] == ["a.JPG", "b.png", "sub/c.webp"]


class TestTree:
    def test_sidecars(self, folder):
        (folder / "a.txt").write_text("a red\n  heart \n")
        (folder / "b.txt").write_text(" \n")
        entries, classes = read_entries(folder)
        assert told(entries) == [
            ("a.JPG", "a red heart", None, {}),
            ("b.png", None, None, {}),
            ("c.webp", None, None, {}),
        ]
        assert classes == ()

    def test_class_folders(self, tmp_path):
        for name in ("dog/1.png", "cat/x/2.png", "cat/1.png"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (2, 2)).save(tmp_path / name)
        (tmp_path / "dog" / "1.txt").write_text("a dog")
        entries, classes = read_entries(tmp_path)
        assert classes == ("cat", "dog")
        assert told(entries) == [("1.png", None, 0, {}), ("2.png", None, 0, {}), ("1.png", "a dog", 1, {})]


class TestJsonl:
    def test_order_text_and_fields(self, folder):
        rows = [
            {"file_name": "sub/c.webp", "text": "c", "split": "train", "n": 3},
            {"file_name": "b.png", "text": " "},
        ]
        entries, _ = read_entries(jsonl(folder, rows[0], "", rows[1], ""))
        assert told(entries) == [("c.webp", "c", None, {"split": "train", "n": 3}), ("b.png", None, None, {})]

    def test_labels(self, folder):
        numbers = jsonl(folder, {"file_name": "b.png", "label": 7}, {"file_name": "a.JPG"})
        entries, classes = read_entries(numbers)
        assert [e.label for e in entries] == [7, None]
        assert classes == ()
        names = jsonl(
            folder, {"file_name": "b.png", "label": "zebra"}, {"file_name": "a.JPG", "label": "ant"}
        )
        entries, classes = read_entries(names)
        assert [e.label for e in entries] == [1, 0]
        assert classes == ("ant", "zebra")

    def test_byte_order_mark(self, folder):
        (folder / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps({"file_name": "b.png"}).encode())
        assert len(read_entries(folder)[0]) == 1

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ('{"file_name": "a.JPG"', r"metadata\.jsonl:2: not JSON: .* at column"),
            (
                '["a.JPG"]',
                r"metadata\.jsonl:2: each line must be a JSON object with 'file_name', not '\[\"a\.JPG",
            ),
            ({"text": "x", "file": "a.JPG"}, r":2: needs 'file_name', .*; it has 'text', 'file'"),
            ({"file_name": 3}, ":2: needs 'file_name'"),
            ({"file_name": "/etc/a.png"}, ":2: file_name '/etc/a.png' must be relative"),
            ({"file_name": "../a.png"}, r":2: file_name '\.\./a.png' must be relative"),
            ({"file_name": "b.png"}, ":2: 'b.png' was already named in line 1"),
            ({"file_name": "a.JPG", "text": ["x"]}, r":2: text must be a string, not \['x'\]"),
            ({"file_name": "a.JPG", "label": -1}, ":2: label must be a number from 0 or a name, not -1"),
            ({"file_name": "a.JPG", "label": True}, ":2: label must be a number from 0 or a name, not True"),
            ({"file_name": "a.JPG", "label": "ant"}, ":2: label 'ant' must be a int like those before it"),
            ({"file_name": "gone.png"}, r"names 1 files that do not exist, the first is .*gone\.png"),
        ],
    )
    def test_wrong_line(self, folder, row, message):
        with pytest.raises(ValueError, match=message) as caught:
            read_entries(jsonl(folder, {"file_name": "b.png", "label": 0}, row))
        assert "\n" not in str(caught.value)
        assert str(folder) in str(caught.value)

    def test_not_utf_8(self, folder):
        (folder / "metadata.jsonl").write_bytes(b'{"file_name": "b.png"}\n{"file_name": "\xe9.png"}')
        with pytest.raises(ValueError, match=r"metadata\.jsonl:2: not UTF-8"):
            read_entries(folder)

    def test_empty(self, folder):
        with pytest.raises(ValueError, match=r"metadata\.jsonl is empty"):
            read_entries(jsonl(folder))

    def test_missing_files_are_kept_on_request(self, folder):
        entries, _ = read_entries(jsonl(folder, {"file_name": "gone.png"}), allow_missing=True)
        assert [e.file.name for e in entries] == ["gone.png"]


class TestCsv:
    def write(self, folder, text):
        (folder / "metadata.csv").write_text(text)
        return folder

    def test_quotes_numbers_and_fields(self, folder):
        text = 'file_name,text,label,source\nb.png,"one, ""two""\nthree",4,web\na.JPG,,,\n'
        entries, classes = read_entries(self.write(folder, text))
        assert told(entries) == [
            ("b.png", 'one, "two"\nthree', 4, {"source": "web"}),
            ("a.JPG", None, None, {"source": ""}),
        ]
        assert classes == ()

    def test_label_names(self, folder):
        entries, classes = read_entries(self.write(folder, "file_name,label\nb.png,x1\na.JPG,7\n"))
        assert classes == ("7", "x1")
        assert [e.label for e in entries] == [1, 0]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("name,text\nb.png,x\n", r"metadata\.csv:1: the first line must name the columns, 'file_name'"),
            ("", r"metadata\.csv:1: the first line"),
            ("file_name,text\nb.png,x\na.JPG,x,y\n", r"metadata\.csv:3: the line must have 2 columns"),
            ("file_name,text\nb.png\n", r"metadata\.csv:2: the line must have 2 columns"),
            ('file_name,text\nb.png,"x\n', r"metadata\.csv:\d: not CSV"),
            ("file_name,text\n", r"metadata\.csv is empty"),
        ],
    )
    def test_wrong(self, folder, text, message):
        with pytest.raises(ValueError, match=message):
            read_entries(self.write(folder, text))

    def test_both_kinds(self, folder):
        self.write(jsonl(folder, {"file_name": "b.png"}), "file_name\nb.png\n")
        with pytest.raises(ValueError, match=r"both metadata\.jsonl and metadata\.csv; remove one"):
            read_entries(folder)


class TestFolder:
    def test_absent(self, tmp_path):
        with pytest.raises(ValueError, match=r"the data folder .*nowhere does not exist"):
            read_entries(tmp_path / "nowhere")

    def test_a_file(self, folder):
        with pytest.raises(ValueError, match=r"the data folder .*b\.png is not a folder"):
            read_entries(folder / "b.png")

    def test_no_pictures(self, tmp_path):
        (tmp_path / "a.txt").write_text("x")
        with pytest.raises(ValueError, match=r"holds no pictures; allowed endings: \.avif, \.bmp"):
            read_entries(tmp_path)
