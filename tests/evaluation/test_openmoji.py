from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from sfumato.core.config import to_json
from sfumato.core.image import to_pil
from sfumato.core.png import save_png
from sfumato.evaluation.openmoji import PROMPTS, Protocol, References, evaluate, retrieval
from sfumato.systems.config import About

SIZE = 4
TONE = "dark skin tone"
# caption -> (grey level, split); "twin" looks exactly like "far".
SET = {
    "low": (60, "train"),
    "near": (70, "train"),
    "far": (190, "train"),
    "twin": (190, "train"),
    f"low {TONE}": (100, "train"),
    f"far {TONE}": (110, "train"),
    "held": (140, "held_out"),
    "other held": (150, "held_out"),
}


class Codec:
    """Pixels as latents; decoding is darker by 0.2, which is 0.1 on the [0, 1] scale: 20 dB."""

    factor = 1

    def encode(self, x, noise=None):
        assert noise is None  # the mean, not a sample
        return x

    def decode(self, z):
        return z - 0.2


class Oracle:
    """A system that answers from a table; captions outside it give the first picture of the set."""

    fingerprint = "0123456789abcdef"
    about = About(license="CC0-1.0", attribution="A. N. Artist")

    def __init__(self, answers):
        self.answers = answers
        self.asked = []
        stage = SimpleNamespace(pixels=(SIZE, SIZE), codec=Codec(), device=torch.device("cpu"))
        self.stages = (stage,)

    def generate(self, text, *, seed, batch, steps, guidance, sampler, world):
        self.asked.append((list(text), seed, batch, steps, guidance, sampler))
        return [to_pil(picture(self.answers.get(t, 60))) for t in text]


def picture(level):
    return torch.full((3, SIZE, SIZE), level, dtype=torch.uint8)


@pytest.fixture
def folder(tmp_path):
    rows = []
    for i, (text, (level, split)) in enumerate(SET.items()):
        save_png(tmp_path / f"{i}.png", picture(level))
        rows.append({"file_name": f"{i}.png", "text": text, "split": split})
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_figures_of_a_system_whose_answers_are_known(folder):
    right = {text: level for text, (level, _) in SET.items()}
    system = Oracle(
        right | {"near": 60, "held": 190}
    )  # a neighbour instead of "near", the far end for "held"
    result = evaluate(system, folder)
    assert result.references == 8
    assert (result.psnr_pictures, result.size, result.system) == (2, SIZE, "0123456789abcdef")
    assert result.psnr == pytest.approx(20.0, abs=1e-4)  # float32 pictures
    assert (result.training.top1.hits, result.training.top1.total) == (
        5,
        6,
    )  # "far" and "twin" are both right
    assert (result.training.top5.hits, result.training.top5.total) == (6, 6)
    assert (result.toneless.top1.hits, result.toneless.top1.total) == (3, 4)
    assert (result.held_out.top1.hits, result.held_out.top5.hits, result.held_out.top1.total) == (1, 2, 2)


def test_picture_i_of_each_kind_has_seed_i_in_an_order_that_hashes_decide(folder):
    system = Oracle({})
    protocol = Protocol(training=5, toneless=3, held_out=9, batch=2, steps=7, guidance=1.5, sampler="heun")
    result = evaluate(system, folder, protocol=protocol)
    seeds = [seed for _, seed, *_ in system.asked]
    assert seeds == [0, 2, 4, 0, 2, 0]
    assert {tuple(rest) for _, _, *rest in system.asked} == {(2, 7, 1.5, "heun")}
    texts = [text for part, *_ in system.asked[:3] for text in part]
    toneless = [text for part, *_ in system.asked[3:5] for text in part]
    assert len(texts) == 5
    assert toneless == [t for t in texts if TONE not in t][:3]
    again = Oracle({})
    assert evaluate(again, folder, protocol=protocol) == result
    assert again.asked == system.asked


def test_the_sheet_shows_all_prompts(folder, tmp_path):
    assert len(set(PROMPTS)) == 48
    told = []
    evaluate(Oracle({}), folder, sheet=tmp_path / "sheet.png", progress=lambda *step: told.append(step))
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (8 * (SIZE + 2) - 2, 6 * (SIZE + 2) - 2)
        assert sheet.info["Copyright"] == "A. N. Artist\nLicense: CC0-1.0"
    assert told[0] == ("references", 8, 8)
    assert told[-1] == ("prompts", 48, 48)


def test_the_result_is_json_and_text_with_its_protocol(folder):
    result = evaluate(Oracle({text: level for text, (level, _) in SET.items()}), folder)
    data = json.loads(json.dumps(to_json(result)))
    assert data["protocol"]["steps"] == 20
    assert data["training"]["top1"] == pytest.approx(
        {"hits": 6, "total": 6, "share": 1.0, "low": 0.6097, "high": 1.0}, abs=1e-4
    )
    text = "\n".join(result.lines())
    for part in ("0123456789abcdef", "euler, 20 steps, guidance 3", "20.00 dB", "100.0 % (2 of 2"):
        assert part in text


def test_retrieval_counts_the_nearest_five():
    references = References(torch.arange(10.0)[:, None], torch.arange(10), torch.zeros(0))
    found = retrieval(torch.tensor([[0.0], [2.4], [9.0]]), references, [0, 0, 0])
    assert found.top1.hits == 1
    assert found.top5.hits == 2


@pytest.mark.parametrize("column", ["split", "texts"])
def test_another_folder_is_refused_in_one_line(folder, column):
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        if column == "split":
            row["split"] = "train"
        else:
            del row["text"]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="is no OpenMoji folder") as error:
        evaluate(Oracle({}), folder)
    assert "\n" not in str(error.value)


def test_counts_below_one_are_refused():
    with pytest.raises(ValueError, match="held_out is 0"):
        Protocol(held_out=0)
