from __future__ import annotations

import argparse
import errno
import fractions
import hashlib
import json
import pickle

import pytest
import torch

from sfumato.checkpoints.files import (
    read_metadata,
    read_pickled,
    read_safetensors,
    read_weights,
    sha256,
    write_safetensors,
)


class Trap:
    """Unpickling it runs code; nothing of ours may."""

    sprung = False

    def __reduce__(self):
        return (_spring, ())


def _spring():
    Trap.sprung = True
    return {}


def test_safetensors_round_trip_and_cast(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {"w": torch.randn(3, 4), "step": torch.tensor(7), "t": torch.randn(4, 2).T}
    write_safetensors(path, tensors, torch.float16)
    back = read_safetensors(path)
    assert back["w"].dtype == torch.float16
    assert back["step"].dtype == torch.int64
    assert torch.equal(back["w"], tensors["w"].half())
    assert torch.equal(back["t"], tensors["t"].half())
    assert read_weights(path).keys() == tensors.keys()


def test_a_file_that_does_not_fit_is_an_os_error(tmp_path):
    """A limit on the size of files stands in for a full disk, which the library reports in the same way."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            write_safetensors(tmp_path / "a.safetensors", {"a": torch.zeros(50_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.errno == errno.EFBIG


def test_tensors_that_share_memory_are_written(tmp_path):
    shared = torch.randn(4)
    write_safetensors(tmp_path / "a.safetensors", {"a": shared, "b": shared})
    assert torch.equal(read_safetensors(tmp_path / "a.safetensors")["b"], shared)


@pytest.mark.parametrize("ending", [".pt", ".ckpt", ".bin"])
def test_torch_files_are_read(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    torch.save({"state_dict": {"w": torch.ones(2)}, "step": 3}, path)
    assert torch.equal(read_weights(path)["state_dict"]["w"], torch.ones(2))


def test_no_pickle_is_executed(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"w": torch.ones(2), "trap": Trap()}, path)
    with pytest.raises(ValueError, match=r"a\.pt: refused: it holds .*convert it to safetensors"):
        read_pickled(path)
    path.write_bytes(pickle.dumps({"trap": Trap()}, protocol=2))
    with pytest.raises(ValueError, match=r"a\.pt: "):
        read_pickled(path)
    assert not Trap.sprung


def test_foreign_objects_are_named(tmp_path):
    torch.save({"when": fractions.Fraction(1, 2)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"fractions\.Fraction"):
        read_pickled(tmp_path / "a.pt")


def test_arguments_of_a_training_script_are_read(tmp_path):
    torch.save({"args": argparse.Namespace(lr=1)}, tmp_path / "a.pt")
    assert read_pickled(tmp_path / "a.pt")["args"].lr == 1


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_safetensors_cut_short(tmp_path, keep):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"w": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"a\.safetensors: the file is cut short.*download it again$"):
        read_safetensors(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"not safetensors, but long enough for one", "cut short or not safetensors"),
        (b"\x02" + b"\0" * 7 + b"[]", "JSON"),
    ],
)
def test_not_safetensors(tmp_path, content, said):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read_safetensors(path)


LIES = {
    "a shape of more bytes": {"w": ("F32", [100], [0, 16])},
    "a shape of fewer bytes": {"w": ("F32", [2], [0, 16])},
    "bytes that others have": {"w": ("F32", [4], [0, 16]), "v": ("F32", [4], [0, 16])},
    "a gap": {"w": ("F32", [2], [8, 16])},
    "backwards": {"w": ("F32", [4], [16, 0])},
    "more than there is": {"w": ("F32", [2**40], [0, 2**42])},
    "an unknown kind": {"w": ("X32", [4], [0, 16])},
    "a negative length": {"w": ("F32", [-4], [0, 16])},
}


@pytest.mark.parametrize("lie", sorted(LIES))
def test_headers_that_lie_are_one_line(tmp_path, lie):
    entries = {n: {"dtype": d, "shape": s, "data_offsets": o} for n, (d, s, o) in LIES[lie].items()}
    header = json.dumps(entries).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 16)
    for read in (read_safetensors, read_metadata):
        with pytest.raises(ValueError, match=r"a\.safetensors: .*; copy or download it again$") as error:
            read(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [0, 10, 300])
def test_torch_files_cut_short(tmp_path, keep):
    path = tmp_path / "a.pt"
    torch.save({"w": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"a\.pt: not a readable torch file .*; copy") as error:
        read_pickled(path)
    assert "\n" not in str(error.value)


def test_a_list_is_no_state(tmp_path):
    torch.save([torch.ones(2)], tmp_path / "a.pt")
    with pytest.raises(ValueError, match="holds a list; expected a mapping"):
        read_pickled(tmp_path / "a.pt")


def test_missing_and_unknown_files(tmp_path):
    with pytest.raises(ValueError, match=r"weights file .*a\.safetensors is missing"):
        read_weights(tmp_path / "a.safetensors")
    (tmp_path / "b.pt").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        read_weights(tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"unknown weights file ending '\.gguf'; allowed: \.safeten"):
        read_weights(tmp_path / "a.gguf")


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 100_000)
    assert sha256(tmp_path / "a") == hashlib.sha256(b"x" * 100_000).hexdigest()
