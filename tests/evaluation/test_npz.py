"""Files of the ADM evaluator, read and written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.evaluation.metrics.frechet import Gaussian
from sfumato.evaluation.npz import PictureFile, read_pictures, read_statistics, write_statistics


def test_pictures_are_written_for_numpy_and_read_in_place(tmp_path: Path) -> None:
    pixels = torch.randint(256, (7, 3, 5, 6), dtype=torch.uint8)
    with PictureFile(tmp_path / "new/x.npz", (7, 5, 6)) as file:
        for part in pixels.split(3):
            file.add(part)
    expected = pixels.permute(0, 2, 3, 1).numpy()
    with np.load(tmp_path / "new/x.npz") as arrays:
        assert arrays.files == ["arr_0"]
        np.testing.assert_array_equal(arrays["arr_0"], expected)
    found = read_pictures(tmp_path / "new/x.npz")
    assert isinstance(found, np.memmap)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_pictures_of_numpy(tmp_path: Path, save) -> None:
    array = np.random.default_rng(0).integers(256, size=(4, 5, 6, 3), dtype=np.uint8)
    save(tmp_path / "x.npz", array, np.arange(4))
    np.testing.assert_array_equal(read_pictures(tmp_path / "x.npz"), array)


def test_an_interrupted_file_is_not_left_behind(tmp_path: Path) -> None:
    def interrupted() -> None:
        with PictureFile(tmp_path / "x.npz", (2, 1, 1)) as file:
            file.add(torch.zeros(1, 3, 1, 1, dtype=torch.uint8))
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_statistics_of_the_adm_evaluator(tmp_path: Path) -> None:
    mu, sigma = np.arange(3, dtype=np.float32), np.eye(3)
    np.savez(tmp_path / "x.npz", mu=mu, sigma=sigma, mu_s=mu[:2], sigma_s=sigma[:2, :2])
    assert read_pictures(tmp_path / "x.npz") is None
    found, protocol = read_statistics(tmp_path / "x.npz")
    assert protocol is None
    assert found["pool"].mean.dtype == torch.float64
    assert found["pool"].cov.shape == (3, 3)
    assert found["spatial"].mean.tolist() == [0, 1]


def test_statistics_with_their_protocol(tmp_path: Path) -> None:
    found = {"pool": Gaussian(torch.randn(3).double(), torch.eye(3).double())}
    write_statistics(tmp_path / "x.npz", found, {"size": [4, 4]})
    again, protocol = read_statistics(tmp_path / "x.npz")
    assert protocol == {"size": [4, 4]}
    assert list(again) == ["pool"]
    assert torch.equal(again["pool"].mean, found["pool"].mean)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), "arr_0 is float32, pictures are uint8"),
        (np.full((2, 4, 4, 3), np.nan, np.float32), "they hold NaN"),
        (np.zeros((2, 3, 4, 4), np.uint8), r"arr_0 has shape \(2, 3, 4, 4\); pictures are"),
        (np.zeros((0, 4, 4, 3), np.uint8), "arr_0 has shape"),
        (np.zeros((4, 4, 3), np.uint8), "arr_0 has shape"),
    ],
)
def test_other_arrays(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.savez(tmp_path / "x.npz", array)
    with pytest.raises(ValueError, match=message):
        read_pictures(tmp_path / "x.npz")


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no file"):
        read_pictures(tmp_path / "x.npz")
    (tmp_path / "x.npz").write_text("hello")
    with pytest.raises(ValueError, match=r"is no .npz file"):
        read_pictures(tmp_path / "x.npz")
    np.savez(tmp_path / "y.npz", np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match=r"arr_0 cannot be read"):
        read_pictures(tmp_path / "y.npz")
    np.savez(tmp_path / "z.npz", mu=np.zeros(3), sigma=np.full((3, 3), np.nan))
    with pytest.raises(ValueError, match="are damaged"):
        read_statistics(tmp_path / "z.npz")
