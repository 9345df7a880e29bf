from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field

import pytest
import torch
from safetensors.torch import load_file, save_file

from sfumato.checkpoints import native
from sfumato.checkpoints.native import Folder, Parts, read_folder, strict_json, write_folder
from sfumato.nets.text import TextTransformer, TextTransformerConfig


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy to damage."""
    return shutil.copytree(tiny_folder, tmp_path / "system")


def rewrite(folder, **changes):
    """Change the first network's tensors, and make the manifest agree as far as digests go."""
    path = folder / "text.safetensors"
    save_file(load_file(path) | changes, path)
    edit(folder, lambda m: m["nets"]["text"].update(sha256=native.sha256(path)))


def edit(folder, change):
    path = folder / "system.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def refused(folder, said):
    with pytest.raises(ValueError, match=said) as error:
        read_folder(folder)
    assert "\n" not in str(error.value)


def test_round_trip(tiny_system, tiny_folder):
    back = read_folder(tiny_folder)
    assert back.about["name"] == "tiny"
    assert back.card.startswith("# tiny")
    for name, net in tiny_system.parts.nets.items():
        assert not back.parts.nets[name].training
        assert all(torch.equal(v, back.parts.nets[name].state_dict()[k]) for k, v in net.state_dict().items())
    texts = ["red heart", ""]
    assert torch.equal(
        back.parts.tokenizers["text"](texts)[0], tiny_system.parts.tokenizers["text"](texts)[0]
    )


def test_files_of_a_checkpoint(tiny_folder):
    assert sorted(p.name for p in tiny_folder.iterdir()) == [
        "MODEL_CARD.md",
        "autoencoder.safetensors",
        "denoiser.safetensors",
        "system.json",
        "text.safetensors",
        "tokenizer.json",
    ]
    manifest = json.loads((tiny_folder / "system.json").read_text())
    assert (manifest["format"], manifest["version"]) == ("sfumato-system", 1)
    assert "sfumato." not in json.dumps(manifest["system"])  # tags, no import paths


def test_half_precision_on_disk_is_float32_in_memory(tiny_system, tmp_path):
    folder = Folder(tiny_system.parts, {})
    write_folder(tmp_path / "half", folder, dtype=torch.float16)
    assert {v.dtype for v in load_file(tmp_path / "half" / "text.safetensors").values()} == {torch.float16}
    weights = read_folder(tmp_path / "half").parts.nets["text"].state_dict()
    assert {v.dtype for v in weights.values()} == {torch.float32}
    whole = tiny_system.parts.nets["text"].state_dict()
    # float16 keeps 11 bits: half a unit in the last place is 2^-11 relative.
    assert all(torch.allclose(weights[k], v, rtol=2**-11, atol=1e-7) for k, v in whole.items())


def test_fingerprint_is_of_what_shapes_pictures(tiny_system, tmp_path):
    def written(name, system, about):
        return write_folder(tmp_path / name, Folder(tiny_system.parts, system, about))

    first = written("a", {"x": 1}, {"name": "a"})
    assert written("b", {"x": 1}, {"name": "b"}) == first
    assert written("c", {"x": 2}, {"name": "a"}) != first
    assert read_folder(tmp_path / "b").fingerprint == first


def test_writing_replaces_a_system_and_nothing_else(tiny_system, tmp_path):
    write_folder(tmp_path / "s", Folder(tiny_system.parts, {"x": 1}))
    write_folder(tmp_path / "s", Folder(Parts(), {"x": 2}))
    assert read_folder(tmp_path / "s").system == {"x": 2}
    assert not (tmp_path / "s" / "text.safetensors").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="exists and is no sfumato system; choose a new folder"):
        write_folder(tmp_path / "mine", Folder(Parts(), {}))
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_a_write_that_fails_leaves_the_old_one(tiny_system, tmp_path, monkeypatch):
    write_folder(tmp_path / "s", Folder(Parts(), {"x": 1}))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(native, "write_safetensors", full)
    with pytest.raises(ValueError, match=r"cannot write .*: No space left on device"):
        write_folder(tmp_path / "s", Folder(tiny_system.parts, {"x": 2}))
    assert read_folder(tmp_path / "s").system == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_a_network_without_a_tag_cannot_be_saved(tmp_path):
    class Mine(TextTransformer):
        pass

    net = Mine(TextTransformerConfig(vocab_size=4, context=2, width=4, depth=1, heads=1))
    with pytest.raises(ValueError, match=r"no tag for network Mine: list it in sfumato\.nets\.NETS"):
        write_folder(tmp_path / "s", Folder(Parts({"mine": net}), {}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", ["text.safetensors", "tokenizer.json"])
def test_a_file_is_missing(folder, file):
    (folder / file).unlink()
    refused(folder, rf"{file} is missing \(system\.json lists it as 'text'\); copy or download it again")


def test_no_system_there(tmp_path):
    refused(tmp_path, r"no system at .*: there is no system\.json")
    refused(tmp_path / "nowhere", "no system at .*nowhere")


def test_a_weights_file_cut_short(folder):
    path = folder / "denoiser.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(folder, r"denoiser\.safetensors: the file is cut short: it has \d+ bytes, its header expects \d+")


def test_a_tensor_of_the_wrong_shape(folder):
    rewrite(folder, positions=torch.ones(3, 16))
    refused(folder, r"text\.safetensors: tensor 'positions' has shape \(3, 16\), expected \(8, 16\)")


def test_nan_in_the_weights(folder):
    rewrite(folder, positions=torch.full((8, 16), torch.nan))
    refused(folder, r"text\.safetensors: tensor 'positions' has 128 values that are NaN or infinite")


@pytest.mark.parametrize("file", ["text.safetensors", "tokenizer.json"])
def test_a_changed_byte_is_noticed(folder, file):
    path = folder / file
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    refused(folder, rf"{file} was changed or damaged: its SHA-256 starts \w{{12}}, system\.json expects")


def test_an_unknown_network_tag(folder):
    edit(folder, lambda m: m["nets"]["text"].update(kind="text_transfomer"))
    refused(folder, r"system\.json: unknown network 'text_transfomer'; did you mean 'text_transformer'\?")


def test_a_misspelled_setting(folder):
    edit(folder, lambda m: m["nets"]["text"]["config"].update(depht=3))
    refused(folder, r"text\.safetensors config: unknown setting 'depht'; did you mean 'depth'\?")


def test_a_setting_of_the_wrong_type(folder):
    edit(folder, lambda m: m["nets"]["text"]["config"].update(depth="deep"))
    refused(folder, r"config: depth: .*valid integer.*\(got 'deep'\)")


def test_a_file_name_that_leaves_the_folder(folder):
    edit(folder, lambda m: m["nets"]["text"].update(file="../secret.safetensors"))
    refused(folder, "must be a plain name inside the folder")


def test_a_newer_format(folder):
    edit(folder, lambda m: m.update(version=2))
    refused(folder, r"has format version 2; this sfumato .* reads 1: update it")


def test_not_json(folder):
    (folder / "system.json").write_text('{"format": ')
    refused(folder, r"system\.json is not JSON")
    (folder / "system.json").write_text("[]")
    refused(folder, r"system\.json: ")


@dataclass(frozen=True)
class Inner:
    depth: int = 1


@dataclass(frozen=True)
class Outer:
    parts: tuple[Inner, ...] = ()
    names: dict[str, int] = field(default_factory=dict)


def test_strict_json_looks_into_lists():
    good = {"parts": [{"depth": 2}], "names": {"any": 1}}
    assert strict_json(Outer, good, where="f").parts == (Inner(2),)
    with pytest.raises(ValueError, match=r"^f: parts\.0: unknown setting 'dept'; did you mean 'depth'\?"):
        strict_json(Outer, {"parts": [{"dept": 2}]}, where="f")
