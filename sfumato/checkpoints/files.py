"""Weight files: safetensors, and .pt/.ckpt without executing what they pickle."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

__all__ = [
    "COPY_AGAIN",
    "read_metadata",
    "read_pickled",
    "read_safetensors",
    "read_tensors",
    "read_weights",
    "sha256",
    "write_safetensors",
]

COPY_AGAIN = "copy or download it again"
PICKLED = (".pt", ".pth", ".ckpt", ".bin")


def read_weights(path: str | Path) -> dict[str, object]:
    """Content of a weights file: name -> tensor, or the mapping that a .pt, .pth, .ckpt or .bin holds.

    Raises: ValueError in one line for any other ending, and as `read_safetensors` and `read_pickled` do.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".safetensors":
        return dict(read_safetensors(path))
    if suffix in PICKLED:
        return read_pickled(path)
    raise ValueError(
        f"{path}: unknown weights file ending {suffix!r}; allowed: .safetensors, {', '.join(PICKLED)}"
    )


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Content of a file of nothing but tensors, floating ones in float32.

    Raises: ValueError in one line as `read_weights` does, or naming what is no tensor.
    """
    state: dict[str, Tensor] = {}
    for name, v in read_weights(path).items():
        if not isinstance(v, Tensor):
            raise ValueError(
                f"{path}: {name!r} is a {type(v).__name__}; expected a mapping of names to tensors"
            )
        state[name] = v.float() if v.is_floating_point() else v
    return state


def read_safetensors(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Name -> tensor, with the dtypes of the file.

    Raises: ValueError in one line with the path if the file is missing, cut short or not safetensors.
    """
    path = _existing(path)
    try:
        return load_file(path, device=str(device))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: {_damage(path, error)}; {COPY_AGAIN}") from None


def read_metadata(path: str | Path) -> dict[str, str]:
    """What the header of a safetensors file says besides its tensors; errors as of `read_safetensors`."""
    path = _existing(path)
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: {_damage(path, error)}; {COPY_AGAIN}") from None


def read_pickled(path: str | Path) -> dict[str, object]:
    """The mapping that torch.save wrote, by torch's restricted unpickler: tensors and plain containers.

    argparse's Namespace and torch's ParameterDict count as such: training scripts keep arguments and learned
    words in them.

    Raises: ValueError in one line with the path if the file is missing, damaged, no mapping, or holds any
    object that would have to be imported.
    """
    path = _existing(path)
    try:
        with torch.serialization.safe_globals([Namespace, nn.ParameterDict]):
            data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: {_refused(error)}") from None
    except (RuntimeError, OSError, EOFError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: not a readable torch file ({_first_line(error)}); {COPY_AGAIN}") from None
    if not isinstance(data, Mapping):
        raise ValueError(f"{path}: holds a {type(data).__name__}; expected a mapping of names to tensors")
    return dict(data)


def write_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> None:
    """Write tensors, floating ones as `dtype` if it is given; shared memory is written once per name.

    Raises: OSError if the file cannot be written.
    """
    plain = {name: _storable(v, dtype) for name, v in tensors.items()}
    try:
        save_file(plain, path, metadata={"format": "pt"})
    except SafetensorError as error:  # how the library tells of a full disk
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
    Path(path).chmod(0o644)  # the library makes it private


def sha256(path: str | Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _storable(v: Tensor, dtype: torch.dtype | None) -> Tensor:
    v = v.detach().to("cpu", dtype if dtype and v.is_floating_point() else v.dtype)
    return v.clone(memory_format=torch.contiguous_format)


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if path.is_file():
        return path
    what = "is a folder" if path.is_dir() else "is missing"
    raise ValueError(f"weights file {path} {what}; expected a file there: {COPY_AGAIN}")


def _damage(path: Path, error: Exception) -> str:
    """Why a safetensors file cannot be read: its header says how long it must be."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            return f"the file is cut short or not safetensors: {size} bytes do not hold its header"
        try:
            header = json.loads(file.read(length))
            end = max((v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return "not a safetensors file: its header is not JSON"
    if size < 8 + length + end:
        return f"the file is cut short: it has {size} bytes, its header expects {8 + length + end}"
    return f"not a readable safetensors file ({_first_line(error)})"


def _refused(error: Exception) -> str:
    named = re.search(r"GLOBAL (\S+)", str(error))
    if named is None:
        return f"not a readable torch file ({_first_line(error)}); {COPY_AGAIN}"
    what = named[1].rstrip(".")
    return (
        f"refused: it holds a {what}, and making one runs code; convert it to safetensors where you trust it"
    )


def _first_line(error: Exception) -> str:
    """The first sentence of an error, without the advice that follows it."""
    text = (str(error).strip().splitlines() or [""])[0].split(". ")[0].rstrip(".")
    return text if " " in text else type(error).__name__
