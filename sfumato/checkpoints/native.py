"""The native checkpoint: a folder of system.json, safetensors files, tokenizers and MODEL_CARD.md.

system.json holds typed settings with tags instead of import paths, the format and program version, and the
SHA-256 of every other file that shapes the pictures. What its "system" part means is the business of
`sfumato.systems`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from sfumato import __version__
from sfumato.checkpoints.files import COPY_AGAIN, read_safetensors, sha256, write_safetensors
from sfumato.checkpoints.weights import assign, floating, parameter_free
from sfumato.core.config import from_json, to_json
from sfumato.core.registry import unknown
from sfumato.nets import NETS
from sfumato.text.tokenizers import Tokenizer

__all__ = ["CARD", "MANIFEST", "Folder", "Parts", "read_folder", "staging", "strict_json", "write_folder"]

MANIFEST, CARD = "system.json", "MODEL_CARD.md"
VERSION = 1
T = TypeVar("T")


@dataclass(frozen=True)
class Parts:
    """What a system is assembled from, by the names that its settings use."""

    nets: Mapping[str, nn.Module] = field(default_factory=dict)
    tokenizers: Mapping[str, Tokenizer] = field(default_factory=dict)


@dataclass(frozen=True)
class Folder:
    """A native checkpoint in memory.

    Attributes:
        system: JSON settings of the stages.
        about: JSON description: name, licence, data.
        card: text of MODEL_CARD.md.
        fingerprint: 16 hex digits over settings, weights and tokenizers; "" before it was written.
    """

    parts: Parts
    system: Mapping[str, Any]
    about: Mapping[str, Any] = field(default_factory=dict)
    card: str = ""
    fingerprint: str = ""


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """A file of the folder and the digest of its bytes."""

    file: str
    sha256: str

    def __post_init__(self) -> None:
        if Path(self.file).name != self.file:
            raise ValueError(f"file {self.file!r} must be a plain name inside the folder")


@dataclass(frozen=True, kw_only=True)
class NetEntry(FileEntry):
    """A network: its tag in NETS, its config, its weights."""

    kind: str
    config: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of system.json."""

    format: Literal["sfumato-system"]
    version: int
    sfumato: str
    about: dict[str, Any]
    system: dict[str, Any]
    nets: dict[str, NetEntry]
    tokenizers: dict[str, FileEntry]

    @property
    def fingerprint(self) -> str:
        """Digest of all that decides what a picture looks like; the description is not part of it."""
        shaping = {k: v for k, v in to_json(self).items() if k in ("system", "nets", "tokenizers")}
        return hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()[:16]


def write_folder(path: str | Path, folder: Folder, *, dtype: torch.dtype | None = None) -> str:
    """Write a checkpoint whole or not at all; one that is already there is replaced.

    Args:
        dtype: of the stored floating tensors, e.g. torch.float16; None keeps each tensor's own.

    Returns: the fingerprint of what was written.
    Raises: ValueError in one line if `path` holds something else, or cannot be written.
    """
    path = Path(path)
    if path.exists() and not (path / MANIFEST).is_file() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path} exists and is no sfumato system; choose a new folder, or remove it first")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with staging(path) as new:
            manifest = _fill(new, folder, dtype)
            _replace(new, path)
    except OSError as error:
        raise ValueError(
            f"cannot write {path}: {error.strerror or error}; choose a folder you may write to"
        ) from None
    return manifest.fingerprint


def read_folder(
    path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Folder:
    """Read a checkpoint; networks are built without memory and take their weights from the files.

    Args:
        dtype: in which matrix and convolution weights are held; see `floating`.

    Raises: ValueError in one line that names the file, the tensor, what was expected and what was found.
    """
    path = Path(path)
    manifest = _read_manifest(path)
    for name, entry in [*manifest.nets.items(), *manifest.tokenizers.items()]:
        if not (path / entry.file).is_file():
            raise ValueError(
                f"{path / entry.file} is missing ({MANIFEST} lists it as {name!r}); {COPY_AGAIN}"
            )
    nets = {name: _read_net(path, entry, device, dtype) for name, entry in manifest.nets.items()}
    tokenizers = {name: _read_tokenizer(path, entry) for name, entry in manifest.tokenizers.items()}
    card = (path / CARD).read_text("utf-8") if (path / CARD).is_file() else ""
    return Folder(Parts(nets, tokenizers), manifest.system, manifest.about, card, manifest.fingerprint)


def strict_json(kind: type[T], data: object, *, where: str) -> T:
    """`from_json` that also refuses unknown keys: a misspelled setting must not be ignored."""
    value = from_json(kind, data, where=where)
    _no_extra(data, to_json(value, kind), where)
    return value


def _no_extra(data: object, known: object, where: str) -> None:
    if isinstance(data, Mapping) and isinstance(known, Mapping):
        for key, value in data.items():
            if key not in known:
                raise ValueError(f"{where}: {unknown('setting', str(key), list(known))}")
            _no_extra(value, known[key], f"{where}: {key}" if ": " not in where else f"{where}.{key}")
    elif isinstance(data, list | tuple) and isinstance(known, list | tuple):
        for i, (a, b) in enumerate(zip(data, known, strict=False)):
            _no_extra(a, b, f"{where}.{i}")


def _read_manifest(path: Path) -> Manifest:
    file = path / MANIFEST
    try:
        data = json.loads(file.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"no system at {path}: there is no {MANIFEST}; give the folder of a saved system"
        ) from None
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror or error}") from None
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); {COPY_AGAIN}") from None
    version = data.get("version") if isinstance(data, dict) else None
    if isinstance(version, int) and version > VERSION:
        raise ValueError(
            f"{file} has format version {version}; this sfumato {__version__} reads {VERSION}: update it"
        )
    return strict_json(Manifest, data, where=str(file))


def _read_net(path: Path, entry: NetEntry, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    file = path / entry.file
    if entry.kind not in NETS:
        raise ValueError(f"{path / MANIFEST}: {unknown('network', entry.kind, list(NETS))}")
    kind = NETS[entry.kind]
    config = strict_json(kind.config, entry.config, where=f"{path / MANIFEST}: {entry.file} config")
    state = read_safetensors(file)
    net = parameter_free(kind.net, config)
    assign(net, floating(net, state, dtype), where=str(file))
    _check_digest(file, entry)
    # Convolutions are faster with the channels last, on CPUs above all.
    net.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return net.eval()


def _read_tokenizer(path: Path, entry: FileEntry) -> Tokenizer:
    file = path / entry.file
    _check_digest(file, entry)
    try:
        return Tokenizer.from_json(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _check_digest(file: Path, entry: FileEntry) -> None:
    """Last of the checks, for the others say more about what is wrong."""
    found = sha256(file)
    if found != entry.sha256:
        raise ValueError(
            f"{file} was changed or damaged: its SHA-256 starts {found[:12]}, "
            f"{MANIFEST} expects {entry.sha256[:12]}; {COPY_AGAIN}"
        )


@contextlib.contextmanager
def staging(path: Path) -> Iterator[Path]:
    """A new folder beside `path`, removed afterwards whatever happens."""
    new = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        new.chmod(0o755)  # mkdtemp makes it private
        yield new
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _replace(new: Path, path: Path) -> None:
    """Move the finished folder into place; the old one goes only when the new one is there."""
    old = new.with_name(f"{new.name}.old")
    if path.exists():
        os.rename(path, old)
    try:
        os.rename(new, path)
    except BaseException:  # Ctrl-C too
        if old.exists():
            os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _fill(path: Path, folder: Folder, dtype: torch.dtype | None) -> Manifest:
    nets, tokenizers = {}, {}
    for name, net in folder.parts.nets.items():
        file = f"{name}.safetensors"
        write_safetensors(path / file, net.state_dict(), dtype)
        config: Any = net.config
        nets[name] = NetEntry(
            kind=NETS.tag(net), config=to_json(config), file=file, sha256=sha256(path / file)
        )
    for name, tokenizer in folder.parts.tokenizers.items():
        file = "tokenizer.json" if len(folder.parts.tokenizers) == 1 else f"{name}.tokenizer.json"
        (path / file).write_text(tokenizer.to_json(), "utf-8")
        tokenizers[name] = FileEntry(file=file, sha256=sha256(path / file))
    manifest = Manifest(
        format="sfumato-system",
        version=VERSION,
        sfumato=__version__,
        about=dict(folder.about),
        system=dict(folder.system),
        nets=nets,
        tokenizers=tokenizers,
    )
    (path / CARD).write_text(folder.card, "utf-8")
    (path / MANIFEST).write_text(json.dumps(to_json(manifest), indent=1) + "\n", "utf-8")
    return manifest
