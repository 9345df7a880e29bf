"""Where data lie: folders, wildcards, brace patterns and addresses, resolved to the names of tar shards."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from sfumato.core.image import EXTENSIONS

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

__all__ = ["address", "is_remote", "remote", "shard_names"]

ENDINGS = (".tar", ".tar.gz", ".tgz")
BACKENDS = {"s3": "s3fs", "http": "aiohttp", "https": "aiohttp", "gs": "gcsfs", "gcs": "gcsfs"}
WILD = re.compile(r"[*?\[]")
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")
SCHEME = re.compile(r"(\w[\w+.-]+):/+")  # two letters or more: "C:/" is a drive


def address(path: str | Path) -> str:
    """A path as text; the "//" after a scheme, which a `Path` makes "/", is put back."""
    text = path.as_posix() if isinstance(path, Path) else path
    return SCHEME.sub(r"\1://", text, count=1) if SCHEME.match(text) else text


def is_remote(name: str) -> bool:
    """Whether a name is an address such as s3://bucket/name and not a path."""
    return "://" in name


def remote(name: str) -> tuple[AbstractFileSystem, str]:
    """The file system of an address, and the name in it.

    Raises: ValueError in one line with what to install, if a package is missing.
    """
    scheme = name.partition("://")[0]
    backend = BACKENDS.get(scheme)
    try:
        from fsspec.core import url_to_fs

        system, path = url_to_fs(name)
    except ImportError:
        wanted = " ".join(["fsspec", *([backend] if backend else [])])
        raise ValueError(f"reading {name} needs packages that are missing; pip install {wanted}") from None
    except ValueError as error:
        raise ValueError(f"cannot read {name}: {error}; allowed: s3://, http(s):// and paths") from None
    return system, str(path)


def shard_names(path: str | Path) -> list[str]:
    """The tar files that a location stands for; none if it is a folder of pictures or nothing at all.

    A location is a tar file (.tar, .tar.gz, .tgz), a folder with tar files at its top and no pictures
    anywhere, wildcards (`shards/*.tar`), braces with a range or a list (`{000..009}`, `{train,extra}`), or
    an address that fsspec reads (`s3://bucket/{000..009}.tar`, `https://...`). Names are in the order of the
    braces, sorted where the file system listed them.

    Raises: ValueError in one line if braces are malformed, nothing fits, or a file is no tar file.
    """
    text = address(path)
    local = not is_remote(text)
    if local and Path(text).is_dir():
        found = [name for name in _listed(f"{glob.escape(text)}/*") if name.endswith(ENDINGS)]
        return [] if found and _has_pictures(Path(text)) else found
    if local and not WILD.search(text) and "{" not in text and not text.endswith(ENDINGS):
        return []
    names = [name for pattern in _braces(text) for name in _matching(pattern)]
    if len(set(names)) < len(names):
        raise ValueError(f"{text} names a shard twice; each may be there once")
    gone = [name for name in names if not is_remote(name) and not Path(name).is_file()]
    if gone:
        raise ValueError(
            f"{len(gone)} of the {len(names)} shards of {text} do not exist, the first is {gone[0]}"
        )
    return names


def _braces(text: str) -> Iterator[str]:
    """Every name that a brace pattern stands for, later braces running faster."""
    found = BRACES.search(text)
    if found is None:
        if "{" in text or "}" in text:
            raise ValueError(f"the braces in {text} do not match; write {{000..009}} or {{a,b}}")
        yield text
        return
    inside = found.group(1)
    if bounds := RANGE.fullmatch(inside):
        first, last = bounds.groups()
        width = max(len(first), len(last)) if "0" in (first[0], last[0]) else 0
        choices = [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    else:
        choices = inside.split(",")
    if not choices or (len(choices) == 1 and not bounds):
        raise ValueError(
            f"{{{inside}}} in {text} is no range from low to high and no list; write {{000..009}}"
        )
    for choice in choices:
        yield from _braces(text[: found.start()] + choice + text[found.end() :])


def _matching(pattern: str) -> list[str]:
    """The tar files of one pattern without braces."""
    if is_remote(pattern) and not pattern.endswith(ENDINGS) and not WILD.search(pattern):
        pattern = pattern.rstrip("/") + "/*"  # a folder
    if not WILD.search(pattern):
        names = [pattern]
    else:
        names = [name for name in _listed(pattern) if name.endswith(ENDINGS)]
    if not names:
        raise ValueError(f"no tar file fits {pattern}; shards end in {', '.join(ENDINGS)}")
    if strange := next((name for name in names if not name.endswith(ENDINGS)), None):
        raise ValueError(f"{strange} is no tar file; shards end in {', '.join(ENDINGS)}")
    return names


def _listed(pattern: str) -> list[str]:
    """What a file system has for a pattern with wildcards, sorted."""
    if not is_remote(pattern):
        return sorted(name for name in glob.glob(pattern) if not PurePosixPath(name).name.startswith("."))
    system, path = remote(pattern)
    try:
        return sorted(str(system.unstrip_protocol(name)) for name in system.glob(path))
    except OSError as error:
        raise ValueError(f"cannot list {pattern}: {error}") from None


def _has_pictures(folder: Path) -> bool:
    return any(path.suffix.lower() in EXTENSIONS for path in folder.rglob("*"))
