"""The report on unCLIP at toy size, its figures computed a second time from embeddings and pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import sfumato
from sfumato import cli
from sfumato.checkpoints.native import read_folder
from sfumato.core.image import from_pil, to_float, to_uint8
from sfumato.core.types import Inputs
from sfumato.data.datasets import ImageFolder
from sfumato.data.transforms import CenterCrop
from sfumato.evaluation.openmoji import captioned
from sfumato.systems.algebra import Space, difference, slerp

COUNT = 6
RUNS = {
    "clip": "toy-clip",
    "prior": "toy-clip-prior",
    "ar-prior": "toy-ar-prior",
    "decoder": "toy-unclip-decoder",
    "upsampler": "toy-unclip-upsampler",
    "others": "toy-glide",
}


@pytest.fixture(scope="module")
def done(pictures, runs, tmp_path_factory):
    """Folder of the report, the flags that made it, and a function path of a run by its flag."""
    out, found = tmp_path_factory.mktemp("unclip"), runs(**RUNS)
    asked = ["--data", str(pictures), "--pictures", str(COUNT), "--batch", "4", "--seed", "3", *found]
    args = ["report", "unclip", *asked, "--device", "cpu", "--out", str(out)]
    assert cli.main(args) == 0
    return out, args, lambda flag: Path(found[found.index(f"--{flag}") + 1]) / "system"


@pytest.fixture(scope="module")
def space(done):
    """The decoder and its upsampler, as a user joins them."""
    return Space(sfumato.cascade(*(sfumato.load(done[2](flag)) for flag in ("decoder", "upsampler"))))


def true(pictures, side, split="held_out"):
    """All true pictures (N, 3, side, side), the rows whose captions are drawn, and the captions."""
    folder = ImageFolder(pictures, transform=CenterCrop(side))
    rows = captioned(folder, split)[:COUNT]
    return folder.images(), rows, [folder.texts[i] for i in rows]


def expected(clip, pictures, made):
    """The figures of pictures uint8 that were drawn for the captions."""
    parts = read_folder(clip).parts
    net, rows = parts.nets["clip"], true(pictures, 16)[1]
    with torch.no_grad():
        seen = F.normalize(net.see(to_float(made)), dim=1)
        real = F.normalize(net.see(to_float(true(pictures, 16)[0])), dim=1)
        said = F.normalize(net.text(parts.tokenizers["tokenizer"](true(pictures, 16)[2])[0]).embedding, dim=1)
    apart = (made[:, None].double() - true(pictures, made.shape[-1])[0].double()).square().flatten(2).sum(2)
    return {
        "cosine, text": pytest.approx(float((seen * said).sum(1).mean()), abs=1e-5),
        "cosine, picture": pytest.approx(float((seen * real[rows]).sum(1).mean()), abs=1e-5),
        "top-1, CLIP": int(((seen @ real.T).argmax(1) == torch.tensor(rows)).sum()),
        "top-1, pixels": int((apart.argmin(1) == torch.tensor(rows)).sum()),
    }


def test_retrieval_by_clip(done, pictures, figures):
    out, _, at = done
    found = figures(out / "unclip.json", "clip")
    parts = read_folder(at("clip")).parts
    for split in ("train", "held_out"):
        all_, rows, texts = true(pictures, 16, split)
        ids = parts.tokenizers["tokenizer"](texts)[0]
        with torch.no_grad():
            table = F.normalize(parts.nets["clip"].see(to_float(all_[rows])), dim=1)
            table = table @ F.normalize(parts.nets["clip"].text(ids).embedding, dim=1).T
        for name, scores in (("text", table), ("picture", table.T)):
            order = scores.argsort(1, descending=True)
            for k in (1, 5):
                hit = (order[:, :k] == torch.arange(COUNT)[:, None]).any(1).double().mean()
                assert found[split, None][f"{name}@{k}"] == pytest.approx(float(hit))


def test_what_the_decoder_is_fed(done, space, pictures, figures):
    out, _, at = done
    found, texts = figures(out / "unclip.json", "priors"), true(pictures, 16)[2]
    told = Inputs(n=COUNT, text=texts)
    fed = {
        "text embedding": space.texts(texts),
        "diffusion prior": sfumato.load(at("prior")).run(told, seed=3).image_embed,
        "autoregressive prior": sfumato.load(at("ar-prior")).run(told, seed=3).image_embed,
        "the picture's own": space.pictures(to_float(true(pictures, 16)[0][true(pictures, 16)[1]])),
    }
    assert [name for name, _ in found] == list(fed)
    for name, z in fed.items():
        made = to_uint8(space.decode(z, texts=texts, seed=3))
        assert made.shape[-1] == 32
        assert found[name, None] == expected(at("clip"), pictures, made)
    assert len({figure["cosine, text"] for figure in found.values()}) == 4  # no row is another's


def test_a_prior_of_the_report_is_that_of_the_whole_cascade(done, pictures, figures):
    out, _, at = done
    found, texts = figures(out / "unclip.json", "priors"), true(pictures, 16)[2]
    systems = [sfumato.load(at(flag)) for flag in ("prior", "decoder", "upsampler")]
    whole = sfumato.cascade(*systems)
    prior = whole.run(Inputs(n=COUNT, text=texts), only=[whole.stages[0].name], seed=3).image_embed
    made = to_uint8(Space(sfumato.cascade(*systems[1:])).decode(prior, texts=texts, seed=3))
    assert found["diffusion prior", None] == expected(at("clip"), pictures, made)


def test_other_systems(done, pictures, figures):
    out, _, at = done
    texts = true(pictures, 16)[2]
    made = torch.stack([from_pil(p) for p in sfumato.load(at("others")).generate(texts, seed=3)])
    found = figures(out / "unclip.json", "others")
    assert found == {("toy-glide", None): {"side": 16, **expected(at("clip"), pictures, made)}}


def test_grids(done, space, pictures):
    out, _, _ = done
    with Image.open(out / "unclip-algebra-sheet.png") as picture:
        sheet = from_pil(picture)
    side, tall = 34, 4 * 34 - 2 + 6
    assert tuple(sheet.shape) == (3, 3 * tall - 6, 6 * side - 2)

    def cell(grid, row, column):
        top, left = grid * tall + row * side, column * side
        return sheet[:, top : top + 32, left : left + 32]

    small, rows, texts = true(pictures, 16)
    z = space.pictures(to_float(small[rows]))
    assert torch.equal(cell(0, 1, 0), true(pictures, 32)[0][rows[1]])
    others = to_uint8(space.decode(z[1].expand(5, -1), seed=3))
    assert torch.equal(cell(0, 1, 3), others[2])
    assert torch.equal(cell(1, 2, 2), to_uint8(space.decode(slerp(z[2:3], z[3:4], 0.4), seed=3))[0])
    moved = difference(z[:1], space.texts(texts[1:2]), space.texts(texts[:1]), 0.5)
    assert torch.equal(cell(2, 0, 5), to_uint8(space.decode(moved, seed=3))[0])


def test_the_same_command_measures_nothing_again_and_others_may_be_added(done, runs, capsys):
    out, args, _ = done
    before = json.loads((out / "unclip.json").read_text())
    files = {path: path.stat().st_mtime_ns for path in (out / "unclip-cells").iterdir()}
    more = runs(others="toy-imagen-base")[1]
    assert cli.main([*args, more]) == 2  # a path that no flag takes
    at = args.index("--others") + 2
    assert cli.main([*args[:at], more, *args[at:]]) == 0
    after = {path: path.stat().st_mtime_ns for path in (out / "unclip-cells").iterdir()}
    assert files.items() <= after.items()
    assert len(after) == len(files) + 1
    assert "| toy-imagen-base | 8 |" in capsys.readouterr().out
    numbers = json.loads((out / "unclip.json").read_text())
    assert numbers["cells"][:-1] == before["cells"]
    assert (out / "unclip.md").read_text().count("## ") == 4


@pytest.mark.parametrize("flag", RUNS)
def test_a_missing_run_is_one_line(flag, done, tmp_path, capsys):
    args = list(done[1])
    args[args.index(f"--{flag}") + 1] = str(tmp_path / "none")
    recipe = {
        "decoder": "openmoji-unclip-decoder",
        "upsampler": "openmoji-unclip-upsampler",
        "others": "RECIPE",
    }
    assert cli.main(args) == 2
    err = capsys.readouterr().err
    assert f"at {tmp_path}/none; run `sfumato train {recipe.get(flag, f'openmoji-{flag}')}`" in err
    assert err.count("\n") == 1


def test_a_system_that_draws_no_pictures_is_refused(done, capsys):
    args, at = list(done[1]), done[2]
    args[args.index("--others") + 1] = str(at("prior"))
    assert cli.main(args) == 2
    assert "makes no pictures" in capsys.readouterr().err
