"""A text tower that is not trained: its captions are read once, and the run is the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sfumato.checkpoints.native import read_folder
from sfumato.families import RECIPES
from sfumato.nets.lora import LoraConfig
from sfumato.nets.text import TextTransformer
from sfumato.training.history import read_log
from sfumato.training.recipe import Recipe
from sfumato.training.run import train

FREE = {"lora": {"lora": LoraConfig(rank=2)}, "full": {"freeze_text": True}}


def toy(pictures: Path, out: Path, name: str = "toy-dit", **task) -> Recipe:
    recipe = RECIPES[name]()
    trainer = replace(recipe.trainer, device="cpu", quiet=True, images=16, log_every=4, preview_every=0)
    data = replace(recipe.data, path=pictures)
    return replace(recipe, data=data, trainer=trainer, task=replace(recipe.task, **task), out=out)


@pytest.fixture
def base(pictures, tmp_path) -> Path:
    train(toy(pictures, tmp_path / "base"))
    return tmp_path / "base"


@pytest.fixture
def encoded(base, monkeypatch) -> list[int]:
    """The number of captions of each call of a text tower, after the base was trained."""
    calls: list[int] = []
    forward = TextTransformer.forward
    monkeypatch.setattr(
        TextTransformer, "forward", lambda self, ids, mask: calls.append(len(ids)) or forward(self, ids, mask)
    )
    return calls


def losses(run: Path) -> list[float]:
    return [row["denoiser/loss"] for row in read_log(run / "log.jsonl")]


@pytest.mark.parametrize("kind", FREE)
def test_the_losses_are_those_without_a_cache_and_the_tower_stays(kind, base, pictures, tmp_path, encoded):
    runs = {}
    for cache in (True, False):
        recipe = toy(pictures, tmp_path / f"{cache}", init=base, cache=cache, **FREE[kind])
        encoded.clear()
        system = train(recipe)
        runs[cache] = list(encoded)
        before, after = (read_folder(path).parts.nets for path in (base / "system", system))
        assert all(
            torch.equal(v, after["text"].state_dict()[k]) for k, v in before["text"].state_dict().items()
        )
        assert any(
            not torch.equal(v, after["denoiser"].state_dict()[k])
            for k, v in before["denoiser"].state_dict().items()
        )
    # One sample through all of it before training; then 12 captions and "" once, or in each of 4 steps.
    assert runs == {True: [1, 13], False: [1, *[4, 1] * 4]}
    # Rows of a batch of another size round differently.
    assert losses(tmp_path / "True") == pytest.approx(losses(tmp_path / "False"), rel=1e-5)


def test_a_trained_tower_is_not_cached(base, pictures, tmp_path, encoded):
    for name, task in {"all": {}, "adapted": {"lora_text": LoraConfig(rank=1)}}.items():
        encoded.clear()
        system = train(toy(pictures, tmp_path / name, init=base, **task))
        assert encoded == [1, *[4, 1] * 4]
        assert not (tmp_path / name / "texts").exists()
        before, after = (read_folder(path).parts.nets["text"] for path in (base / "system", system))
        assert any(not torch.equal(v, after.state_dict()[k]) for k, v in before.state_dict().items())


def test_only_what_changed_is_read_again(base, pictures, tmp_path, encoded):
    recipe = toy(pictures, tmp_path / "run", init=base, freeze_text=True)
    train(recipe)
    longer = replace(recipe, trainer=replace(recipe.trainer, images=24))
    encoded.clear()
    train(longer)
    assert encoded == [1]
    rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    rows[3]["text"] = "edited"
    (pictures / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    encoded.clear()
    train(replace(longer, trainer=replace(recipe.trainer, images=32)))
    assert encoded == [1, 1]


def test_another_tower_reads_everything_again(base, pictures, tmp_path, encoded):
    recipe = toy(pictures, tmp_path / "run", init=base, freeze_text=True)
    train(recipe)
    (old,) = (tmp_path / "run" / "texts").iterdir()
    train(toy(pictures, tmp_path / "other", init=base))  # its tower has learned more
    encoded.clear()
    train(replace(recipe, task=replace(recipe.task, init=tmp_path / "other")), force=True)
    assert encoded == [1, 13]
    assert not old.exists()


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({"freeze_text": True}, "freeze_text needs init"),
        ({"freeze_text": True, "init": Path("x"), "lora_text": LoraConfig()}, "freeze_text leaves the text"),
    ],
)
def test_settings_that_exclude_each_other(task, said):
    with pytest.raises(ValueError, match=said):
        replace(RECIPES["toy-dit"]().task, **task)


@pytest.mark.parametrize("task", [{"freeze_text": True}, {"lora_text": LoraConfig()}])
def test_a_system_without_a_tower_is_one_line(task, pictures, tmp_path):
    rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    rows = [row | {"label": i % 3} for i, row in enumerate(rows)]
    (pictures / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(toy(pictures, tmp_path / "base", "toy-classes"))
    recipe = toy(pictures, tmp_path / "run", "toy-classes", init=tmp_path / "base", **task)
    with pytest.raises(ValueError, match=f"task.{next(iter(task))} is about a text tower") as error:
        train(recipe)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("run/checkpoints/0*"))
