from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

from sfumato.checkpoints.native import Parts, strict_json
from sfumato.core.config import to_json
from sfumato.diffusion.schedules import Discrete, Flow
from sfumato.systems.conditioning import InpaintConfig, LabelConfig, LowResConfig, TokenTextConfig
from sfumato.systems.config import EmbeddingsConfig, LatentsConfig, StageConfig, SystemConfig
from sfumato.systems.system import assemble, load_system

FULL = SystemConfig(
    stages=(
        StageConfig(
            name="prior",
            schedule=Discrete(formula="cosine"),
            parameterization="x0",
            codec=EmbeddingsConfig(mean=(0.5,)),
            shape=(8,),
            emits="image_embed",
        ),
        StageConfig(
            name="base",
            schedule=Discrete(formula="scaled_linear", start=0.00085, end=0.012),
            parameterization="eps",
            learned_var=True,
            conditioners=(TokenTextConfig(), LabelConfig(num_classes=10), InpaintConfig()),
            codec=LatentsConfig(std=(5.49,)),
            shape=(4, 8, 8),
        ),
        StageConfig(
            name="up",
            net="upsampler",
            schedule=Flow(shift=3.0),
            parameterization="v",
            conditioners=(LowResConfig(schedule=Flow(), aug=0.1),),
            shape=(3, 32, 32),
        ),
    )
)


def test_settings_are_json_and_back():
    data = json.loads(json.dumps(to_json(FULL)))
    assert strict_json(SystemConfig, data, where="f") == FULL


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("schedule", "kind"), "flw", r"f: stages\.2\.schedule.*'flw'"),
        (
            ("parameterization",),
            "speed",
            r"f: stages\.2.*unknown parameterization 'speed'; allowed: .*flow",
        ),
        (("conditioners", 0, "kind"), "lores", r"stages\.2\.conditioners\.0.*'lores'"),
        (("codec", "kind"), "pixel", r"stages\.2\.codec.*'pixel'"),
        (("shape",), [3, 32], r"stages\.2.*shape \(3, 32\): expected \(channels, height, width\)"),
        (("shpae",), [3], r"stages\.2: unknown setting 'shpae'; did you mean 'shape'\?"),
        (("name",), "base", r"expected at least one, each with a name of its own"),
    ],
)
def test_a_wrong_setting_is_located(path, value, said):
    data = to_json(FULL)
    place = data["stages"][2]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ValueError, match=said) as error:
        strict_json(SystemConfig, data, where="f")
    assert "\n" not in str(error.value)


def test_a_system_has_stages():
    with pytest.raises(ValueError, match="expected at least one"):
        SystemConfig(stages=())


def test_parts_must_be_there_and_fit(tiny_system):
    nets, tokenizers = dict(tiny_system.parts.nets), tiny_system.parts.tokenizers
    headless = {k: v for k, v in nets.items() if k != "denoiser"}
    confused = nets | {"autoencoder": nets["denoiser"]}

    def refused(said, parts):
        with pytest.raises(ValueError, match=said):
            assemble(tiny_system.config, parts)

    refused(
        "unknown network part 'denoiser'; allowed: autoencoder, text",
        Parts(headless, tokenizers),
    )
    refused("unknown tokenizer part 'text'", Parts(nets))
    refused(
        "network 'autoencoder' is a DiT; the codec needs an Autoencoder",
        Parts(confused, tokenizers),
    )


def test_tokenizer_and_tower_must_belong_together(tiny_system):
    text = tiny_system.parts.nets["text"]
    small = type(text)(replace(text.config, vocab_size=10))
    parts = Parts({**tiny_system.parts.nets, "text": small}, tiny_system.parts.tokenizers)
    with pytest.raises(ValueError, match="embeds 10; they do not belong together"):
        assemble(tiny_system.config, parts)


def test_a_folder_of_parts_is_no_system(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "s")
    data = json.loads((folder / "system.json").read_text())
    data["system"] = {}
    (folder / "system.json").write_text(json.dumps(data))
    with pytest.raises(
        ValueError, match="holds denoiser, text, autoencoder but no stages, so it cannot draw"
    ):
        load_system(folder)
