"""The .npz files of the ADM evaluator: pictures as arr_0, and statistics of a reference set."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from sfumato.evaluation.metrics.frechet import Gaussian

__all__ = ["PictureFile", "read_pictures", "read_statistics", "write_statistics"]

PICTURES = "arr_0"
NAMES = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
PROTOCOL = "protocol"


def read_pictures(path: Path) -> np.ndarray | None:
    """(N, H, W, 3) uint8, mapped and not read where the file allows; None if it holds statistics alone.

    Raises: ValueError in one line if the file is no .npz, or its pictures are of another kind.
    """
    if PICTURES not in _names(path):
        return None
    array = _mapped(path)
    if array.dtype != np.uint8:
        hint = "; they hold NaN" if array.dtype.kind == "f" and np.isnan(array).any() else ""
        raise ValueError(f"{path}: {PICTURES} is {array.dtype}, pictures are uint8 in 0..255{hint}")
    if array.ndim != 4 or array.shape[3] != 3 or not len(array):
        raise ValueError(f"{path}: {PICTURES} has shape {array.shape}; pictures are (N, height, width, 3)")
    return array


def read_statistics(path: Path) -> tuple[dict[str, Gaussian], Mapping[str, object] | None]:
    """Gaussians by feature, and the protocol by which sfumato made them; None in files of other programs.

    Raises: ValueError in one line if the file is no .npz, or its statistics are damaged.
    """
    found: dict[str, Gaussian] = {}
    held = _names(path)
    with np.load(path, allow_pickle=False) as file:
        for feature, (mean, cov) in NAMES.items():
            if mean in held and cov in held:
                mu, sigma = (
                    torch.from_numpy(np.asarray(file[name], dtype=np.float64)) for name in (mean, cov)
                )
                if sigma.shape != (len(mu), len(mu)) or not bool(
                    mu.isfinite().all() and sigma.isfinite().all()
                ):
                    raise ValueError(
                        f"{path}: {mean} {tuple(mu.shape)} and {cov} {tuple(sigma.shape)} are damaged"
                    )
                found[feature] = Gaussian(mu, sigma)
        protocol = json.loads(str(file[PROTOCOL])) if PROTOCOL in held else None
    return found, protocol


class PictureFile:
    """Writes pictures as the ADM evaluator reads them, batch by batch and whole or not at all.

    Args:
        shape: (N, height, width).
    """

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        self.path, self.shape = path, shape
        self._part = path.with_name(f".{path.name}.{os.getpid()}.part")

    def __enter__(self) -> PictureFile:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._archive = zipfile.ZipFile(self._part, "w")
        self._file = self._archive.open(f"{PICTURES}.npy", "w", force_zip64=True)
        header = {"descr": "|u1", "fortran_order": False, "shape": (*self.shape, 3)}
        np.lib.format.write_array_header_1_0(self._file, header)
        return self

    def add(self, pixels: Tensor) -> None:
        """The next pictures, (B, 3, H, W) uint8."""
        self._file.write(pixels.permute(0, 2, 3, 1).contiguous().numpy().tobytes())

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        self._archive.close()
        if kind is None:
            os.replace(self._part, self.path)
        self._part.unlink(missing_ok=True)


def write_statistics(path: Path, found: Mapping[str, Gaussian], protocol: Mapping[str, object]) -> None:
    """Write Gaussians under the names of the ADM evaluator, with how they were made."""
    arrays: dict[str, np.ndarray] = {
        name: v.numpy()
        for feature, names in NAMES.items()
        if feature in found
        for name, v in zip(names, (found[feature].mean, found[feature].cov), strict=True)
    }
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays, **{PROTOCOL: np.array(json.dumps(protocol))})
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _names(path: Path) -> set[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no .npz file ({error})") from None


def _mapped(path: Path) -> np.ndarray:
    """The pictures, in place if stored as they are: 50,000 may be more than the memory holds."""
    name = f"{PICTURES}.npy"
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo(name)
        if entry.compress_type == zipfile.ZIP_STORED:
            with path.open("rb") as file:
                return _in_place(file, entry.header_offset, path)
    try:
        with np.load(path, allow_pickle=False) as loaded:
            return np.asarray(loaded[PICTURES])
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: {PICTURES} cannot be read ({error})") from None


def _in_place(file: BinaryIO, offset: int, path: Path) -> np.ndarray:
    file.seek(offset + 26)  # of the local header: lengths of the name and of the extra field
    lengths = file.read(4)
    file.seek(offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little"))
    try:
        version = np.lib.format.read_magic(file)
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, fortran, dtype = read(file)
        if dtype.hasobject:
            raise ValueError("it holds Python objects")
        return np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran else "C")
    except ValueError as error:
        raise ValueError(f"{path}: {PICTURES} cannot be read ({error})") from None
