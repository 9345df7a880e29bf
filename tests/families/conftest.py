from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import pre_tokenizers

from sfumato.core.png import save_png

COLORS = {"red": (255, 0, 0), "green": (0, 160, 0), "blue": (0, 0, 255)}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Twelve captioned pictures of 16x16: a coloured bar, which wanders, on white; blue ones are held out."""
    folder = tmp_path / "pictures"
    rows = []
    for i, (name, color) in enumerate(item for _ in range(4) for item in COLORS.items()):
        image = torch.full((3, 16, 16), 255, dtype=torch.uint8)
        image[:, 2 : 4 + i, i : i + 4] = torch.tensor(color, dtype=torch.uint8).view(3, 1, 1)
        save_png(folder / f"{i}.png", image)
        split = "held_out" if name == "blue" else "train"
        row = {"file_name": f"{i}.png", "text": f"{name} bar {i}", "concept": name, "split": split}
        rows.append(row | {"label": name})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


MERGES = ["r e", "re d</w>", "h e", "a r", "he ar", "hear t</w>"]


def randomized(net: torch.nn.Module, seed: int) -> torch.nn.Module:
    """The same with random weights, with which outputs are of order 1."""
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.1, generator=generator)
    return net.eval()


@pytest.fixture(scope="session")
def tiny_stable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder of Stable Diffusion with tiny random nets, as diffusers writes it."""
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("stable")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{c}</w>" for c in alphabet), *(m.replace(" ", "") for m in MERGES)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), "utf-8")
    (path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n", "utf-8")
    files = str(path / "vocab.json"), str(path / "merges.txt")
    words = transformers.CLIPTokenizer(*files, pad_token="<|endoftext|>", model_max_length=77)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
    )
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            eos_token_id=2,
        )
    )
    diffusers.StableDiffusionPipeline(
        vae=randomized(vae, 0),
        text_encoder=randomized(text, 1),
        tokenizer=words,
        unet=randomized(unet, 2),
        scheduler=diffusers.DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            clip_sample=False,
            set_alpha_to_one=False,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(path / "p")
    return path / "p"
