"""From a CLIP to an autoregressive prior, and to an unCLIP that draws with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import sfumato
from sfumato.core.image import to_float
from sfumato.core.types import Inputs
from sfumato.families import RECIPES
from sfumato.systems.algebra import Space
from sfumato.training.batches import open_folder
from sfumato.training.history import read_log
from sfumato.training.recipe import Recipe
from sfumato.training.run import train


def toy(name: str, pictures: Path, out: Path, **task: object) -> Recipe:
    """A toy of 16 images, of which those that need a CLIP find it beside them."""
    recipe = RECIPES[name]()
    if hasattr(recipe.task, "clip"):
        task = {"clip": out / "toy-clip", **task}
    settings = replace(recipe.trainer, images=16, preview_every=16, device="cpu", quiet=True)
    data = replace(recipe.data, path=pictures)
    return replace(recipe, task=replace(recipe.task, **task), data=data, trainer=settings, out=out / name)


def test_a_prior_is_trained_validated_saved_and_put_before_a_decoder(pictures, tmp_path):
    train(toy("toy-clip", pictures, tmp_path))
    recipe = toy("toy-ar-prior", pictures, tmp_path)
    validation = replace(recipe.validation, share=0.3)
    system = sfumato.load(train(replace(recipe, validation=validation)))
    rows = read_log(tmp_path / "toy-ar-prior/log.jsonl")
    assert any(row.get("validation/loss", 0) > 0 for row in rows)
    assert (tmp_path / "toy-ar-prior/best/system.json").is_file()
    assert list((tmp_path / "toy-ar-prior/previews").iterdir())

    # What it draws is within the range of the embeddings of its data.
    (stage,) = system.stages
    assert stage.emits == "image_embed"
    drawn = system.run(Inputs(n=2, text=["red bar 0", "blue bar 2"]), seed=5).image_embed
    net = stage.denoiser.net
    seen = (drawn - net.quantizer.mean) @ net.quantizer.axes.mT
    low, width = net.quantizer.low[1:], net.quantizer.width[1:]
    assert bool((seen > low - 1e-4).all() and (seen < low + 8 * width + 1e-4).all())

    train(toy("toy-unclip-decoder", pictures, tmp_path))
    whole = sfumato.cascade(system, sfumato.load(tmp_path / "toy-unclip-decoder/system"))
    space = Space(whole)
    folder = open_folder(recipe.data)
    embedded = space.pictures(to_float(folder.images(range(len(folder)))))
    cosine = F.cosine_similarity(embedded, space.texts(list(folder.texts)))
    for end in (0, 8):  # of the range of token 0, a pair of the data each; some were held out
        assert float((net.quantizer.low[0] + end * net.quantizer.width[0] - cosine).abs().min()) < 1e-4
    (picture,) = whole.generate("red bar", seed=5)
    assert picture.size == (16, 16)
    torch.testing.assert_close(space.drawn_by_prior(["red bar 0"], seed=5), drawn[:1])


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            {"dim": 9},
            r"have shape \(12, 8\) and this prior is for \(12, 9\): set dim to the width of its CLIP",
        ),
        ({"text_dim": 15}, r"reads cond.tokens of shape \(8, 15\) for each picture and got \(8, 16\)"),
    ],
)
def test_a_clip_of_another_width_is_one_line(shape, message, pictures, tmp_path):
    train(toy("toy-clip", pictures, tmp_path))
    net = replace(RECIPES["toy-ar-prior"]().task.net, **shape)
    with pytest.raises(ValueError, match=message) as error:
        train(toy("toy-ar-prior", pictures, tmp_path, net=net))
    assert "\n" not in str(error.value)
