"""Text towers of Stable Diffusion and SDXL against transformers, on tiny random weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import pre_tokenizers

from sfumato.checkpoints.foreign import read_foreign
from sfumato.conditioners.clip import ClipText, Tower
from sfumato.core.types import Inputs, Reading
from sfumato.nets.clip import CLIPText
from sfumato.text.clip import clip_files, clip_tokenizer
from sfumato.text.tokenizers import Tokenizer

transformers = pytest.importorskip("transformers")

TEXTS = ["a red heart", "cats, \u00e9t\u00e9 and more " * 30]


def words(folder: Path, pad: str) -> Path:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{c}</w>" for c in alphabet), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", "utf-8")
    said = {"pad_token": {"content": pad}, "model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(json.dumps(said), "utf-8")
    return folder


def tower(kind: str, folder: Path, width: int) -> tuple[torch.nn.Module, CLIPText]:
    config = transformers.CLIPTextConfig(
        vocab_size=514,
        hidden_size=width,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=2,
        projection_dim=20,
        eos_token_id=2,
    )
    theirs = getattr(transformers, kind)(config).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.2)
    theirs.save_pretrained(folder)
    ours = read_foreign(folder).nets["text_encoder"]
    assert isinstance(ours, CLIPText)
    return theirs, ours


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert float(b.std()) > 0.1
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_one_tower_with_and_without_its_last_blocks(tmp_path: Path) -> None:
    theirs, ours = tower("CLIPTextModel", tmp_path / "a", 24)
    tokenizer = clip_tokenizer(words(tmp_path / "w", "<|endoftext|>"))
    ids, _ = tokenizer(TEXTS)
    expected = theirs(ids, output_hidden_states=True)
    inputs = Inputs(n=2, text=TEXTS)
    cond = ClipText((Tower(tokenizer, ours),))(inputs)
    close(cond.tokens, expected.last_hidden_state)
    assert cond.pooled is None
    for skip in (1, 2):
        cond = ClipText((Tower(tokenizer, ours, skip),))(inputs)
        close(cond.tokens, theirs.final_layer_norm(expected.hidden_states[-1 - skip]))
    with pytest.raises(ValueError, match="skip is 3 for a text tower of 3 blocks; allowed: 0 to 2"):
        Tower(tokenizer, ours, 3)


@torch.no_grad()
def test_two_towers_as_sdxl_reads_them(tmp_path: Path) -> None:
    """Penultimate states without the norm, side by side; pooled of the second; zeros for no negative text."""
    one, ours1 = tower("CLIPTextModel", tmp_path / "a", 24)
    two, ours2 = tower("CLIPTextModelWithProjection", tmp_path / "b", 32)
    first = clip_tokenizer(words(tmp_path / "w1", "<|endoftext|>"))
    second = clip_tokenizer(words(tmp_path / "w2", "!"))
    towers = (Tower(first, ours1, 1, False), Tower(second, ours2, 1, False))
    text = ClipText(towers, pooled=True, zero_null=True)
    inputs = Inputs(n=2, text=TEXTS)
    cond = text(inputs)
    a = one(first(TEXTS)[0], output_hidden_states=True)
    b = two(second(TEXTS)[0], output_hidden_states=True)
    close(cond.tokens, torch.cat([a.hidden_states[-2], b.hidden_states[-2]], dim=2))
    close(cond.pooled, b.text_embeds)
    null = text.null(inputs, cond)
    assert null.tokens.shape == cond.tokens.shape
    assert not null.tokens.any()
    assert not null.pooled.any()
    negative = text.null(Inputs(n=2, text=TEXTS, negative=["dull", ""]), cond)
    close(negative.pooled, two(second(["dull", ""])[0]).text_embeds)
    empty = ClipText(towers, pooled=True).null(inputs, cond)
    close(empty.pooled[1:], two(second([""])[0]).text_embeds)


def test_tokenizers_pad_as_their_files_say(tmp_path: Path) -> None:
    """As transformers does, also after our files and through our own JSON."""
    for pad, number in (("!", 0), ("<|endoftext|>", 513)):
        folder = words(tmp_path / str(number), pad)
        theirs = transformers.CLIPTokenizer(
            str(folder / "vocab.json"), str(folder / "merges.txt"), pad_token=pad
        )
        expected = theirs(TEXTS, padding="max_length", truncation=True, max_length=77)["input_ids"]
        ours = clip_tokenizer(folder)
        assert ours(TEXTS)[0].tolist() == expected
        assert expected[0][-1] == number
        assert Tokenizer.from_json(ours.to_json())(TEXTS)[0].tolist() == expected
        again = tmp_path / f"again{number}"
        again.mkdir()
        for name, text in clip_files(ours).items():
            (again / name).write_text(text, "utf-8")
        read = transformers.CLIPTokenizer.from_pretrained(again)
        assert read(TEXTS, padding="max_length", truncation=True)["input_ids"] == expected
        assert clip_tokenizer(again)(TEXTS)[0].tolist() == expected


def test_a_padding_that_is_no_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pads with '<pad>', which it has no id for"):
        clip_tokenizer(words(tmp_path / "w", "<pad>"))


@torch.no_grad()
def test_words_weigh_and_blocks_are_left_out_on_request(tmp_path: Path) -> None:
    _, ours = tower("CLIPTextModel", tmp_path / "a", 24)
    tokenizer = clip_tokenizer(words(tmp_path / "w", "<|endoftext|>"))
    text = ClipText((Tower(tokenizer, ours),))
    plain = text(Inputs(text=["a b"])).tokens
    found = text(Inputs(text=["(a:1.5) b"], reading=Reading(weights=True)))
    weights = torch.ones(77, 1)
    weights[1] = 1.5
    scaled = plain * weights
    torch.testing.assert_close(found.tokens, scaled * (plain.mean() / scaled.mean()))
    assert not torch.allclose(found.tokens, scaled)
    own = ClipText((Tower(tokenizer, ours),), reading=Reading(weights=True))
    torch.testing.assert_close(own(Inputs(text=["(a:1.5) b"])).tokens, found.tokens)
    skipped = ClipText((Tower(tokenizer, ours, 1),))(Inputs(text=["a b"])).tokens
    torch.testing.assert_close(text(Inputs(text=["a b"], reading=Reading(skip=1))).tokens, skipped)
    with pytest.raises(ValueError, match="skip is 3 for a text tower of 3 blocks; allowed: 0 to 2"):
        text(Inputs(text=["a b"], reading=Reading(skip=3)))
