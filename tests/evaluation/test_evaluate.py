"""The evaluation around the formulas: sets, protocols, statistics, pairs, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sfumato.core.config import to_json
from sfumato.core.image import to_pil
from sfumato.core.png import save_png
from sfumato.evaluation.evaluate import (
    Instruments,
    Result,
    differences,
    evaluate,
    nets_of,
    open_reference,
)
from sfumato.evaluation.features import FeatureNet
from sfumato.evaluation.metrics.frechet import Moments, frechet_distance
from sfumato.evaluation.metrics.kernel import kernel_distance
from sfumato.evaluation.metrics.manifold import manifold
from sfumato.evaluation.metrics.pairs import ssim
from sfumato.evaluation.npz import PictureFile, write_statistics
from sfumato.evaluation.pictures import Folder, Generated, Pictures, Reconstructed, open_pictures

INCEPTION = ("fid", "fid_inf", "sfid", "kid", "is", "prdc")


def tools(net: FeatureNet, *metrics: str, batch: int = 7) -> Instruments:
    return Instruments(metrics, {"inception": net}, batch=batch)


def saved(path: Path, pixels: torch.Tensor) -> Path:
    with PictureFile(path, (len(pixels), *pixels.shape[2:])) as file:
        for part in pixels.split(8):
            file.add(part)
    return path


@pytest.fixture
def samples(tmp_path: Path) -> Pictures:
    pixels = torch.randint(40, 256, (40, 3, 16, 16), dtype=torch.uint8)
    found = open_pictures(saved(tmp_path / "samples.npz", pixels))
    assert found is not None
    return found


def figures(result: Result) -> dict[str, float]:
    return {f.name: f.value for f in result.figures}


def test_figures_are_those_of_the_formulas(inception: FeatureNet, pictures: Path, samples: Pictures) -> None:
    instruments = tools(inception, *INCEPTION)
    found = figures(evaluate(samples, open_reference(pictures, samples.size, instruments), instruments))
    a, b = inception(samples(range(40))), inception(Folder(pictures)(range(30)))

    def gaussian(x: torch.Tensor):
        moments = Moments(x.shape[1])
        moments.update(x)
        return moments.gaussian()

    assert found["fid"] == pytest.approx(frechet_distance(gaussian(a["pool"]), gaussian(b["pool"])), rel=1e-6)
    assert found["sfid"] == pytest.approx(
        frechet_distance(gaussian(a["spatial"]), gaussian(b["spatial"])), rel=1e-6
    )
    assert found["kid"] == pytest.approx(kernel_distance(a["pool"], b["pool"]).mean, rel=1e-6)
    near = manifold(b["pool"], a["pool"])
    assert [found[n] for n in ("precision", "recall", "density", "coverage")] == pytest.approx(
        [near.precision, near.recall, near.density, near.coverage]
    )
    p = a["logits"].double().softmax(1).numpy()
    assert found["is"] == pytest.approx(np.exp((p * np.log(p / p.mean(0))).sum(1).mean()), rel=1e-6)
    assert found["fid_inf"] < found["fid"]


def test_batches_change_nothing(inception: FeatureNet, pictures: Path, samples: Pictures) -> None:
    results = []
    for batch in (40, 3):
        instruments = tools(inception, *INCEPTION, batch=batch)
        results.append(evaluate(samples, open_reference(pictures, samples.size, instruments), instruments))
    assert figures(results[0]) == pytest.approx(figures(results[1]), rel=1e-6)
    assert differences(*(r.protocol for r in results)) == []
    assert results[0].protocol["samples"]["pixels"] == results[1].protocol["samples"]["pixels"]


def test_the_digest_tells_sets_apart_but_not_orders(inception: FeatureNet, tmp_path: Path) -> None:
    pixels = torch.randint(256, (20, 3, 16, 16), dtype=torch.uint8)
    other = pixels.clone()
    other[3, 0, 0, 0] += 1
    digests = []
    for i, variant in enumerate((pixels, pixels.flip(0), other)):
        set_ = open_pictures(saved(tmp_path / f"{i}.npz", variant))
        instruments = tools(inception, "is")
        result = evaluate(set_, open_reference(None, (16, 16), instruments), instruments)
        digests.append(result.protocol["samples"]["pixels"])
    assert digests[0] == digests[1] != digests[2]


def test_statistics_stand_for_the_reference(
    inception: FeatureNet, pictures: Path, samples: Pictures, tmp_path: Path
) -> None:
    instruments = tools(inception, "fid", "fid_inf", "sfid")
    reference = open_reference(pictures, samples.size, instruments)
    file = tmp_path / "statistics.npz"
    made = {"size": [16, 16], "inception": inception.protocol}
    write_statistics(file, reference.summary.gaussians, made)
    again = open_reference(file, samples.size, instruments)
    expected, found = (figures(evaluate(samples, r, instruments)) for r in (reference, again))
    assert found == pytest.approx(expected, rel=1e-9)
    with np.load(file) as arrays:  # the names of the ADM evaluator
        assert arrays["mu"].shape == (5,)
        assert arrays["sigma_s"].shape == (3, 3)
    with pytest.raises(ValueError, match="holds statistics of pool, spatial alone, and kid needs more"):
        open_reference(file, samples.size, tools(inception, "kid"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": [32, 32]}, r"size: \[32, 32\], \[16, 16\]"),
        (
            {"inception": {"file": "toy.pth", "sha256": "00", "preparation": "x"}},
            "inception.sha256: 00, abab",
        ),
    ],
)
def test_statistics_of_another_protocol(
    inception: FeatureNet, pictures: Path, tmp_path: Path, change: dict, message: str
) -> None:
    instruments = tools(inception, "fid")
    reference = open_reference(pictures, (16, 16), instruments)
    file = tmp_path / "statistics.npz"
    write_statistics(
        file, reference.summary.gaussians, {"size": [16, 16], "inception": inception.protocol, **change}
    )
    with pytest.raises(ValueError, match=f"was made by another protocol .*{message}"):
        open_reference(file, (16, 16), instruments)


def test_samples_of_a_system_depend_on_their_seeds_alone(
    inception: FeatureNet, pictures: Path, tiny_system: object
) -> None:
    texts = Folder(pictures).texts
    sets = [Generated(tiny_system, 6, 5, texts, {"steps": 2}, batch) for batch in (2, 6)]
    assert torch.equal(sets[0](range(6)), sets[1](range(6)))
    assert torch.equal(sets[0](range(2, 5)), sets[0](range(6))[2:5])
    assert sets[0].protocol["seed"] == 5
    assert sets[0].protocol["options"]["base"]["steps"] == 2
    picture = tiny_system.generate(texts[3], seed=8, steps=2)[0]
    assert np.array_equal(np.asarray(to_pil(sets[0](range(3, 4))[0])), np.asarray(picture))


def test_pairs(inception: FeatureNet, pictures: Path, tiny_system: object) -> None:
    mean = lambda image, original: (image - original).abs().flatten(1).mean(1)  # noqa: E731
    metrics = ("psnr", "ssim", "lpips", "fid")
    instruments = replace(tools(inception, *metrics), lpips=(mean, {"trunk": "0", "heads": "1"}))
    reference = open_reference(pictures, (16, 16), instruments)
    decoded = Reconstructed(tiny_system, reference.pictures)
    result = evaluate(decoded, reference, instruments)
    image, original = (v.float() / 127.5 - 1 for v in (decoded(range(30)), Folder(pictures)(range(30))))
    found = figures(result)
    assert found["ssim"] == pytest.approx(float(ssim(image, original).mean()), rel=1e-9)
    assert found["lpips"] == pytest.approx(float(mean(image, original).mean()), rel=1e-5)
    error = ((image - original) / 2).square().flatten(1).mean(1)
    assert found["psnr"] == pytest.approx(float((-10 * error.log10()).mean()), rel=1e-5)
    low, high = next((f.low, f.high) for f in result.figures if f.name == "psnr")
    assert low < found["psnr"] < high


def test_few_samples_are_warned_of(inception: FeatureNet, pictures: Path, tmp_path: Path) -> None:
    few = open_pictures(saved(tmp_path / "few.npz", torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8)))
    instruments = tools(inception, "fid")
    result = evaluate(few, open_reference(pictures, (16, 16), instruments), instruments)
    assert result.figures[0].note.startswith("4 pictures for 5 dimensions: far too high")


@pytest.mark.parametrize(
    ("metric", "n", "message"),
    [
        ("fid", 1, "covariance of 1 samples does not exist"),
        ("fid_inf", 19, "give at least 20"),
        ("kid", 1, "at least 2 samples each"),
        ("prdc", 5, "neighborhoods of 5 need more samples"),
        ("psnr", 4, "there are 4 for 30 of the reference"),
        ("clip_score", 4, "clip_score needs captions"),
    ],
)
def test_too_few_samples(
    inception: FeatureNet, pictures: Path, tmp_path: Path, metric: str, n: int, message: str
) -> None:
    few = open_pictures(saved(tmp_path / "few.npz", torch.randint(256, (n, 3, 16, 16), dtype=torch.uint8)))
    instruments = tools(inception, metric)
    with pytest.raises(ValueError, match=message):
        evaluate(few, open_reference(pictures, (16, 16), instruments), instruments)


def test_sizes_and_modes(pictures: Path, tmp_path: Path) -> None:
    save_png(pictures / "30.png", torch.zeros(1, 16, 16, dtype=torch.uint8))  # gray
    assert Folder(pictures)(range(29, 31)).shape == (2, 3, 16, 16)
    save_png(pictures / "31.png", torch.zeros(3, 24, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"30.png \(16x16\) and .*31.png \(32x24\)"):
        Folder(pictures)(range(30, 32))
    assert Folder(pictures, (16, 16))(range(30, 32)).shape == (2, 3, 16, 16)
    with pytest.raises(ValueError, match=r"00.png is 16x16, smaller than the samples of 32x32"):
        Folder(pictures, (32, 32))
    file = saved(tmp_path / "x.npz", torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"has pictures of 8x8, the samples are 16x16"):
        open_pictures(file, (16, 16))


def test_features_that_are_not_finite(inception: FeatureNet, samples: Pictures) -> None:
    broken = replace(inception, features=lambda pixels: {"logits": torch.full((len(pixels), 4), torch.nan)})
    instruments = tools(broken, "is")
    with pytest.raises(ValueError, match="logits: not finite"):
        evaluate(samples, open_reference(None, (16, 16), instruments), instruments)


def test_unknown_metrics_and_missing_references(inception: FeatureNet) -> None:
    with pytest.raises(ValueError, match=r"unknown metric 'fd'; .*allowed: clip_score, copies"):
        nets_of(["fd"])
    with pytest.raises(ValueError, match=r"fid needs a reference; give --reference DIR"):
        open_reference(None, (16, 16), tools(inception, "is", "fid"))
    assert nets_of(["fid", "kd_dinov2", "clip_score", "psnr"]) == ["inception", "dinov2", "clip"]


def test_protocols_that_differ() -> None:
    a = {"samples": {"n": 5, "system": "x", "options": {"steps": 2}}, "sfumato": "1"}
    b = {"samples": {"n": 6, "system": "y", "options": {"steps": 2}}, "sfumato": "1", "nets": {}}
    assert differences(a, b) == ["nets: None, {}", "samples.n: 5, 6"]
    nets = [{"nets": {"clip": {"file": file, "sha256": digest}}} for file, digest in ("ax", "bx", "by")]
    assert differences(nets[0], nets[1]) == []
    assert differences(nets[1], nets[2]) == ["nets.clip.sha256: x, y"]


def test_results_are_json(inception: FeatureNet, samples: Pictures) -> None:
    instruments = tools(inception, "is")
    result = evaluate(samples, open_reference(None, (16, 16), instruments), instruments)
    data = json.loads(json.dumps(to_json(result)))
    assert data["protocol"]["nets"]["inception"]["sha256"] == "ab" * 32
    assert data["figures"][0]["name"] == "is"
    assert any(line.startswith("is  ") for line in result.lines())
    assert isinstance(instruments.nets["inception"].net, nn.Identity)
