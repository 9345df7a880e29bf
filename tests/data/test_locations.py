"""Folders, wildcards, braces and addresses."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfumato.data import locations
from sfumato.data.locations import address, shard_names


@pytest.fixture
def shards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (
        "s/a-08.tar",
        "s/a-09.tar",
        "s/a-10.tar",
        "s/b.tgz",
        "s/c.tar.gz",
        "s/notes.txt",
        "s/.x.tar",
    ):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("s/b.tgz", ["s/b.tgz"]),
        ("s/a-*.tar", ["s/a-08.tar", "s/a-09.tar", "s/a-10.tar"]),
        ("s/a-{08..10}.tar", ["s/a-08.tar", "s/a-09.tar", "s/a-10.tar"]),
        ("s/{c.tar.gz,b.tgz}", ["s/c.tar.gz", "s/b.tgz"]),
        ("s/{a,b}*", ["s/a-08.tar", "s/a-09.tar", "s/a-10.tar", "s/b.tgz"]),
        ("s", ["s/a-08.tar", "s/a-09.tar", "s/a-10.tar", "s/b.tgz", "s/c.tar.gz"]),
        ("nowhere", []),
    ],
)
def test_what_a_location_stands_for(shards, path, names):
    assert shard_names(Path(path)) == names


@given(st.integers(0, 1200), st.integers(0, 30), st.integers(1, 6))
def test_ranges_count_like_a_shell(first, more, width):
    low, high = f"{first:0{width}d}", f"{first + more:0{width}d}"
    names = list(locations._braces(f"x{{{low}..{high}}}y"))
    assert len(names) == more + 1
    assert (names[0], names[-1]) == (f"x{low}y", f"x{high}y")
    assert [int(name[1:-1]) for name in names] == list(range(first, first + more + 1))


def test_a_folder_with_pictures_is_no_folder_of_shards(shards):
    Path("s/deep").mkdir()
    Path("s/deep/a.png").touch()
    assert shard_names("s") == []


@pytest.mark.parametrize(
    ("path", "said"),
    [
        (
            "s/a-{08..12}.tar",
            r"2 of the 5 shards of s/a-\{08\.\.12\}\.tar do not exist, the first is s/a-11\.tar",
        ),
        ("s/x*.tar", r"no tar file fits s/x\*\.tar; shards end in \.tar, \.tar\.gz, \.tgz"),
        ("s/{notes.txt,b.tgz}", r"s/notes\.txt is no tar file"),
        ("s/a-{09..08}.tar", r"no range from low to high"),
        ("s/a-{09}.tar", r"no range from low to high"),
        ("s/a-{09..08.tar", r"braces in .* do not match"),
        ("s/a-{09,09}.tar", r"names a shard twice"),
    ],
)
def test_wrong_patterns(shards, path, said):
    with pytest.raises(ValueError, match=said) as error:
        shard_names(path)
    assert "\n" not in str(error.value)


def test_addresses_survive_being_a_path():
    for text in ("s3://bucket/a-{000..009}.tar", "https://host/x.tar", "memory://a/b.tar"):
        assert address(Path(text)) == address(text) == text
    assert address(Path("/data/x.tar")) == "/data/x.tar"


def test_addresses_are_listed_through_fsspec():
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    for name in ("/set/1.tar", "/set/0.tar.gz", "/set/note.txt"):
        system.pipe_file(name, b"x")
    wanted = ["memory:///set/0.tar.gz", "memory:///set/1.tar"]
    assert [
        name.replace(":///", "://").replace("://", ":///") for name in shard_names("memory://set/*")
    ] == wanted
    assert [
        name.replace(":///", "://").replace("://", ":///") for name in shard_names("memory://set")
    ] == wanted
    assert shard_names("memory://set/{0.tar.gz,1.tar}") == ["memory://set/0.tar.gz", "memory://set/1.tar"]
    with pytest.raises(ValueError, match=r"no tar file fits memory://set/\*\.tgz"):
        shard_names("memory://set/*.tgz")
    system.rm("/set", recursive=True)


@pytest.mark.parametrize(
    ("name", "module", "packages"),
    [("s3://b/*.tar", "fsspec.core", "fsspec s3fs"), ("https://h/*.tar", "fsspec.core", "fsspec aiohttp")],
)
def test_missing_packages_are_named(monkeypatch, name, module, packages):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"needs packages that are missing; pip install {packages}$"):
        shard_names(name)


def test_unknown_schemes():
    pytest.importorskip("fsspec")
    with pytest.raises(
        ValueError, match=r"cannot read abc://x/\*\.tar: .*allowed: s3://, http\(s\):// and paths"
    ):
        shard_names("abc://x/*.tar")
