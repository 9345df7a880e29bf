"""The report on cascades and guides at toy size, its figures computed a second time from the pictures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import sfumato
from sfumato import cli
from sfumato.checkpoints.native import read_folder
from sfumato.core.image import from_pil, to_float
from sfumato.data.datasets import ImageFolder
from sfumato.data.transforms import CenterCrop
from sfumato.diffusion.constraints import Dynamic, Static
from sfumato.diffusion.guidance import CFG
from sfumato.evaluation.metrics.manifold import manifold
from sfumato.evaluation.openmoji import captioned

COUNT = 8
RUNS = {
    "base": "toy-imagen-base",
    "upsampler": "toy-imagen-upsampler",
    "adm": "toy-adm",
    "classifier": "toy-classifier",
    "glide": "toy-glide",
    "noised-clip": "toy-noised-clip",
}
SWEPT = [
    *("--guidance", "1", "9", "--levels", "0", "0.6", "--classifier-scales", "0", "50"),
    *("--cfg-scales", "1", "4", "--clip-scales", "0", "40"),
]


@pytest.fixture(scope="module")
def done(pictures, runs, tmp_path_factory):
    """Folder of the report, the flags that made it, and a function path of a run by its flag."""
    out, found = tmp_path_factory.mktemp("cascades"), runs(**RUNS)
    asked = [
        *("--data", str(pictures), "--pictures", str(COUNT), "--batch", "3", "--seed", "5"),
        *found,
        *SWEPT,
    ]
    args = ["report", "cascades", *asked, "--device", "cpu", "--out", str(out)]
    assert cli.main(args) == 0
    return out, args, lambda flag: Path(found[found.index(f"--{flag}") + 1]) / "system"


def told(pictures, split="train"):
    """All true pictures (N, 3, 16, 16), the rows whose captions are drawn, and the captions."""
    folder = ImageFolder(pictures)
    rows = captioned(folder, split)[:COUNT]
    return folder, folder.images(), rows, [folder.texts[i] for i in rows]


def hits(made, true, rows):
    """Pictures that are nearest to their own."""
    apart = (made[:, None].double() - true.double()).square().flatten(2).sum(2)
    return int((apart.argmin(1) == torch.tensor(rows)).sum())


def drawn(system, texts=None, **request):
    return torch.stack([from_pil(p) for p in system.generate(texts, seed=5, **request)])


def small(pictures, side):
    """As the data of a smaller system, by Pillow as training prepares them."""
    return ImageFolder(pictures, transform=CenterCrop(side)).images()


def test_thresholds(done, pictures, figures):
    out, _, at = done
    _, _, rows, texts = told(pictures)
    found, true = figures(out / "cascades.json", "thresholds"), small(pictures, 8)
    assert set(found) == {("true pictures", None), *((n, x) for n in ("static", "dynamic") for x in (1, 9))}
    assert found["true pictures", None] == {"saturated": pytest.approx(_saturated(true[rows]))}
    base = sfumato.load(at("base"))
    for (name, x), threshold in ((("static", 9), Static()), (("dynamic", 1), Dynamic())):
        options = base.resolve(guidance=CFG(float(x)))
        options = {k: replace(v, threshold=threshold) for k, v in options.items()}
        made = drawn(base, texts, options=options)
        assert found[name, x] == {
            "saturated": pytest.approx(_saturated(made)),
            "top-1": hits(made, true, rows),
        }
    assert found["static", 9]["saturated"] > found["dynamic", 9]["saturated"]


def _saturated(pixels):
    return sum(int((pixels == v).sum()) for v in (0, 255)) / pixels.numel()


def test_noise_on_what_is_enlarged(done, pictures, figures):
    out, _, at = done
    _, true, rows, texts = told(pictures)
    found = figures(out / "cascades.json", "aug")
    real = to_float(true[rows])
    little = F.interpolate(real, scale_factor=0.5, mode="bilinear", antialias=True)
    base, upsampler = sfumato.load(at("base")), sfumato.load(at("upsampler"))
    enlarged = to_float(drawn(upsampler, texts, low_res=little, aug=0.6))
    whole = drawn(sfumato.cascade(base, upsampler), texts, aug=0.6)
    assert found["upsampler", 0.6] == {
        "PSNR": pytest.approx(_psnr(enlarged, real)),
        "top-1": hits(whole, true, rows),
    }
    plain = F.interpolate(little, scale_factor=2.0, mode="bilinear")
    assert found["bilinear", None] == {"PSNR": pytest.approx(_psnr(plain, real))}
    assert found["upsampler", 0]["PSNR"] != found["upsampler", 0.6]["PSNR"]


def _psnr(made, real):
    errors = ((made.clamp(-1, 1) - real) / 2).double().square().flatten(1).mean(1)
    return float((-10 * errors.log10()).mean())


def test_the_scale_of_the_classifier(done, pictures, figures):
    out, _, at = done
    folder, true, rows, _ = told(pictures, "held_out")
    asked = torch.tensor(folder.labels)[rows]
    found = figures(out / "cascades.json", "classifier")
    guided = sfumato.guided(sfumato.load(at("adm")), at("classifier"), scale=50.0)
    made = drawn(guided, label=asked.tolist())
    fake, real = (to_float(v).flatten(1) for v in (made, true))
    spread = manifold(real[rows], fake)
    nearest = (fake[:, None] - real).square().sum(2).argmin(1)
    right = int((torch.tensor(folder.labels)[nearest] == asked).sum())
    assert found["classifier", 50] == {
        "precision": spread.precision,
        "recall": spread.recall,
        "asked class": right,
    }
    assert set(found) == {("classifier", 0), ("classifier", 50)}


def test_guidance_by_clip_raises_what_it_goes_by(done, pictures, figures):
    out, _, at = done
    _, true, rows, texts = told(pictures)
    found = figures(out / "cascades.json", "clip")
    glide = sfumato.load(at("glide"))
    parts = read_folder(at("noised-clip")).parts
    ids, mask = parts.tokenizers["clip"](texts)
    for key, system in (
        (("classifier-free", 4), glide),
        (("CLIP", 40), sfumato.guided(glide, at("noised-clip"))),
    ):
        made = drawn(system, texts, guidance=float(key[1]))
        with torch.no_grad():
            seen = parts.nets["clip_image"](to_float(made), torch.zeros(COUNT))
            said = parts.nets["clip_text"](ids, mask.sum(1))
        score = 100 * float(F.cosine_similarity(seen, said).mean())
        assert found[key] == {"top-1": hits(made, true, rows), "CLIP score": pytest.approx(score, abs=1e-4)}
    assert found["CLIP", 40]["CLIP score"] > found["CLIP", 0]["CLIP score"]
    assert found["CLIP", 0] == found["classifier-free", 1]  # both are off


def test_the_same_command_measures_nothing_again(done, capsys):
    out, args, _ = done
    files = {path: path.stat().st_mtime_ns for path in (out / "cascades-cells").iterdir()}
    assert len(files) == 5 + 2 + 2 + 4
    before = (out / "cascades.json").read_bytes()
    assert cli.main(args) == 0
    assert {path: path.stat().st_mtime_ns for path in (out / "cascades-cells").iterdir()} == files
    assert (out / "cascades.json").read_bytes() == before
    assert f"{out}/cascades.md" in capsys.readouterr().out.splitlines()


def test_pages_have_every_part(done):
    text = (done[0] / "cascades.md").read_text()
    assert "CLIP guidance optimizes it" in text
    for part, count in (("thresholds", 5), ("aug", 2), ("classifier", 2), ("clip", 4)):
        with Image.open(done[0] / f"cascades-{part}-sheet.png") as sheet:
            side = 8 if part == "thresholds" else 16
            assert sheet.size == (8 * (side + 2) - 2, count * (side + 6) - 6)
        assert f"(cascades-{part}-sheet.png)" in text


def test_features_of_a_perceptual_net(done, runs, capsys):
    out, args, _ = done
    more = runs(perceptual="toy-perceptual")
    assert cli.main([*args, *more, "--parts", "classifier", "--classifier-scales", "0"]) == 0
    assert "Features: spatial means of the perceptual net" in capsys.readouterr().out
    numbers = json.loads((out / "cascades.json").read_text())
    assert len(numbers["cells"]) == 1  # measured anew, and the others stay known
    assert len(numbers["earlier"]) == 14


@pytest.mark.parametrize("flag", RUNS)
def test_a_missing_run_is_one_line(flag, done, tmp_path, capsys):
    args = list(done[1])
    args[args.index(f"--{flag}") + 1] = str(tmp_path / "none")
    recipe = {"base": "imagen-base", "upsampler": "imagen-upsampler", "glide": "glide-fill"}.get(flag, flag)
    part = {"base": "thresholds", "upsampler": "aug", "glide": "clip", "noised-clip": "clip"}
    assert cli.main([*args, "--parts", part.get(flag, "classifier")]) == 2
    err = capsys.readouterr().err
    assert f"there is nothing trained at {tmp_path}/none; run `sfumato train openmoji-{recipe}`" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            ["--data", "nowhere"],
            "there are no pictures at nowhere; `sfumato data openmoji nowhere` writes them",
        ),
        (["--pictures", "0"], "pictures is 0"),
        (["--parts", "claps"], "claps"),
        (["--pictures", "3", "--parts", "classifier"], "neighborhoods of 5 need more samples"),
    ],
)
def test_mistakes_are_one_line(change, said, done, capsys):
    assert cli.main([*done[1], *change]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
