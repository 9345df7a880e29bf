"""T5's tokenizer by transformers, and IF's captions by diffusers with stand-ins for what it imports."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
import torch

from sfumato.text.t5 import t5_tokenizer, tidy
from sfumato.text.tokenizers import Tokenizer

transformers = pytest.importorskip("transformers")

CAPTIONS = [
    "A Red  Heart,blue. ",
    "see https://x.com/abc and www.foo.org/bar!",
    "<b>Bold</b> @nick, #123 (sale) [x] by <person>",
    "dash \u2013 em \u2014 \u00abquote\u00bb \u2018a\u2019 \u4e16\u754c",
    'a cat holding a sign that says "very deep learning"',
    "img_12.png free download page 12 jc6640 100x200 px",
    "3.5 ratio, 1,000 things... and so on",
    "100%20free shipping worldwide free shipping",
    "rainbow-colored cat : painted",
    "a 192.168.0.1 address, a 1234567 number",
    "-a cat-",
    "",
]


@pytest.fixture
def words(tmp_path):
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("\u2581", -3.0)]
    pieces += [(c, -4.0) for c in "abcdehlrtu,"] + [("\u2581red", -1.0), ("\u2581heart", -1.5)]
    made = transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=12)
    made.save_pretrained(tmp_path)
    return made


def test_ids_and_masks_are_those_of_transformers(words, tmp_path):
    ours = t5_tokenizer(tmp_path)
    assert ours.context == 12
    texts = ["red heart", "", "a heart, a red heart, a heart, red", "\u00e9"]
    wanted = words(texts, padding="max_length", truncation=True, max_length=12, return_tensors="pt")
    for made in (ours, Tokenizer.from_json(ours.to_json())):
        ids, mask = made(texts)
        assert torch.equal(ids, wanted.input_ids)
        assert torch.equal(mask, wanted.attention_mask.bool())


def test_captions_are_tidied_as_by_diffusers(words, tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    from diffusers.pipelines.deepfloyd_if import pipeline_if

    def soup(text, features):
        return SimpleNamespace(text=re.sub(r"<[^<>]*>", "", text))

    monkeypatch.setattr(pipeline_if, "BeautifulSoup", soup, raising=False)
    monkeypatch.setattr(pipeline_if, "ftfy", SimpleNamespace(fix_text=str), raising=False)
    pipe = SimpleNamespace(bad_punct_regex=pipeline_if.IFPipeline.bad_punct_regex)
    wanted = CAPTIONS
    for _ in range(2):  # the pipeline does so
        wanted = [pipeline_if.IFPipeline._clean_caption(pipe, text) for text in wanted]
    normalizer = tidy(t5_tokenizer(tmp_path))._engine.normalizer
    own = t5_tokenizer(tmp_path)._engine.normalizer
    assert [normalizer.normalize_str(text) for text in CAPTIONS] == [
        own.normalize_str(text) if own is not None else text for text in wanted
    ]


def test_if_reads_77_ids(words, tmp_path):
    ids, mask = tidy(t5_tokenizer(tmp_path))(["RED heart"])
    assert ids.shape == (1, 77)
    assert ids[0, :4].tolist() == [*words("red heart").input_ids, 0]
    assert mask.sum() == 3


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "holds no T5 vocabulary"),
        ({"spiece.model": "x"}, "has its vocabulary as spiece.model; write tokenizer.json"),
        ({"tokenizer.json": "{"}, "cannot be read"),
        (
            {
                "tokenizer.json": json.dumps(
                    {"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}
                )
            },
            "is not T5's: it lacks <pad> or </s>",
        ),
    ],
    ids=["nothing", "sentencepiece", "damaged", "another"],
)
def test_what_is_no_tokenizer_is_one_line(files, said, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=said) as error:
        t5_tokenizer(tmp_path)
    assert "\n" not in str(error.value)
