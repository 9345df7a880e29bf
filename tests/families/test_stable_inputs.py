"""U-Nets that read more than text: the pictures of diffusers' pipelines, with the same noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import sfumato
from sfumato.core.image import from_pil, to_float
from sfumato.core.random import Noise
from sfumato.core.types import Inputs
from sfumato.systems.start import FromImage
from tests.families.test_stable import NEGATIVES, SEEDS, TEXTS, pipeline, single

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

SIZE = 16
CLASSES = {
    "inpaint": ("StableDiffusionInpaintPipeline", 9),
    "edit": ("StableDiffusionInstructPix2PixPipeline", 8),
    "depth": ("StableDiffusionDepth2ImgPipeline", 5),
    "x4": ("StableDiffusionUpscalePipeline", 7),
    "unclip": ("StableUnCLIPImg2ImgPipeline", 4),
    "variation": ("StableDiffusionImageVariationPipeline", 4),
}
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 1e-4, "beta_end": 0.02}


def picture(seed: int = 0, size: int = SIZE) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8))


def mask() -> Image.Image:
    """White on the left, not along the borders of cells."""
    image = Image.new("L", (SIZE, SIZE), 0)
    image.paste(255, (0, 0, 9, SIZE))
    return image


def built(kind: str, path: Path, base: str = "ddim") -> Any:
    """A tiny pipeline with random weights, in memory and in the folder."""
    name, channels = CLASSES[kind]
    base = diffusers.StableDiffusionPipeline.from_pretrained(pipeline(path, base))
    torch.manual_seed(1)
    more = {"num_class_embeds": 1000} if kind == "x4" else {}
    if kind == "unclip":
        more = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 64}
    unet = diffusers.UNet2DConditionModel.from_config({**base.unet.config, "in_channels": channels, **more})
    parts: dict[str, Any] = {"vae": base.vae, "unet": unet, "scheduler": base.scheduler}
    if kind != "variation":
        parts |= {"tokenizer": base.tokenizer, "text_encoder": base.text_encoder}
    if kind in ("inpaint", "edit", "variation"):
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    if kind == "depth":
        parts |= {"depth_estimator": None, "feature_extractor": None}
    if kind == "x4":
        parts["low_res_scheduler"] = diffusers.DDPMScheduler(**BETAS)
    if kind in ("unclip", "variation"):
        shape = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "image_size": SIZE}
        tower = transformers.CLIPVisionConfig(
            **shape, num_attention_heads=1, patch_size=8, projection_dim=32 if kind == "unclip" else 64
        )
        parts["image_encoder"] = transformers.CLIPVisionModelWithProjection(tower)
        sizes = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
        parts["feature_extractor"] = transformers.CLIPImageProcessor(**sizes)
    if kind == "unclip":
        parts["image_noising_scheduler"] = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
        from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import (
            StableUnCLIPImageNormalizer,
        )

        parts["image_normalizer"] = StableUnCLIPImageNormalizer(32)
        torch.nn.init.normal_(parts["image_normalizer"].mean)
        torch.nn.init.uniform_(parts["image_normalizer"].std, 0.5, 2.0)
    for part in ("unet", "image_encoder"):
        for p in parts[part].parameters() if part in parts else ():
            torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.1)
    pipe = getattr(diffusers, name)(**parts)
    pipe.save_pretrained(path / "q")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def theirs(
    kind: str, pipe: Any, monkeypatch: pytest.MonkeyPatch, strength: float = 1.0, steps: int = 20
) -> torch.Tensor:
    """What diffusers draws in [0, 1], with our streams of noise."""
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    told = Noise(SEEDS).fork("base/conditioning")
    walk: dict[str, Any] = {"num_inference_steps": steps, "generator": generators, "output_type": "pt"}
    text: dict[str, Any] = {"prompt": TEXTS, "negative_prompt": NEGATIVES}
    both = [picture(), picture(1)]
    images = torch.stack([from_pil(p).float() / 127.5 - 1 for p in both])
    # A posterior has no noise here: we begin with its mean.
    monkeypatch.setattr(
        "diffusers.models.autoencoders.vae.DiagonalGaussianDistribution.sample",
        lambda self, generator=None: self.mean,
    )
    if kind == "inpaint":
        return pipe(**text, image=both, mask_image=mask(), **walk, height=SIZE, width=SIZE, strength=strength)
    if kind == "edit":
        return pipe(**text, image=images, image_guidance_scale=1.5, guidance_scale=7.5, **walk)
    if kind == "depth":
        near = torch.stack([from_pil(p).float().mean(0) for p in both])
        return pipe(**text, image=images, depth_map=near, strength=strength, **walk)
    shapes = {"x4": (2, 3, SIZE, SIZE), "unclip": (2, 32)}
    if kind in shapes:
        noise, real = told(torch.zeros(shapes[kind])), diffusers.utils.torch_utils.randn_tensor
        monkeypatch.setattr(
            f"{type(pipe).__module__}.randn_tensor",
            lambda shape, **k: noise if tuple(shape) == tuple(noise.shape) else real(shape, **k),
        )
    if kind == "x4":
        return pipe(**text, image=images, noise_level=30, guidance_scale=9.0, **walk)
    if kind == "unclip":
        pixels = pipe.feature_extractor(images=both, return_tensors="pt").pixel_values
        return pipe(**text, image=pixels, noise_level=40, guidance_scale=10.0, **walk)
    return pipe(image=both, guidance_scale=7.5, height=SIZE, width=SIZE, **walk)


def ours(kind: str, system: sfumato.System, strength: float = 1.0, steps: int = 20) -> torch.Tensor:
    images = torch.stack([to_float(from_pil(p)) for p in (picture(), picture(1))])
    told: dict[str, Any] = {"image": images, "size": (SIZE, SIZE), "strength": strength}
    given: dict[str, Any] = {"steps": round(steps * strength)}
    if kind == "inpaint":
        told["mask"] = (from_pil(mask().convert("RGB"))[:1].float() / 255).expand(2, 1, SIZE, SIZE)
        given |= {"start": FromImage(blend=False)} if strength < 1 else {}
    if kind == "depth":
        told["hint"], given["start"] = images, FromImage()
    if kind == "x4":
        told = {"low_res": images, "aug": torch.full((2,), 0.03), "size": (2 * SIZE, 2 * SIZE)}
    if kind == "unclip":
        told["aug"] = torch.full((2,), 0.04)
    inputs = Inputs(n=2, text=TEXTS, negative=NEGATIVES, **told)
    if kind == "variation":
        inputs = Inputs(n=2, **told)
    return (system.run(inputs, system.resolve(**given), seed=SEEDS).low_res + 1) / 2


@pytest.mark.parametrize(
    ("kind", "strength"),
    [(k, 1.0) for k in CLASSES if k != "depth"] + [("inpaint", 0.6), ("depth", 0.8)],
)
def test_pictures_are_those_of_diffusers(
    kind: str, strength: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = built(kind, tmp_path)
    system = sfumato.load(tmp_path / "q")
    found = ours(kind, system, strength)
    expected = theirs(kind, pipe, monkeypatch, strength).images
    assert expected.std() > 0.05
    if kind == "inpaint":  # ours keeps the caller's own pixels beside the mask, which diffusers decodes
        found, expected = found[..., :9], expected[..., :9]
    # 20 guided steps amplify the rounding of float32.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", [k for k in CLASSES if k != "variation"])
def test_folders_are_written_for_diffusers(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = built(kind, tmp_path)
    system = sfumato.load(tmp_path / "q")
    sfumato.save(system, tmp_path / "again", layout="unet-diffusers")
    index = json.loads((tmp_path / "again/model_index.json").read_text())
    assert index["_class_name"] == CLASSES[kind][0]
    absent = {"depth_estimator": None, "feature_extractor": None} if kind == "depth" else {}
    again = getattr(diffusers, CLASSES[kind][0]).from_pretrained(tmp_path / "again", **absent)
    again.set_progress_bar_config(disable=True)
    for part in ("unet", "vae", "image_encoder", "image_normalizer"):
        if (net := getattr(pipe, part, None)) is not None:
            state = getattr(again, part).state_dict()
            assert all(torch.equal(v, state[name]) for name, v in net.state_dict().items())
    before, after = (theirs(kind, p, monkeypatch, steps=2).images for p in (pipe, again))
    assert torch.equal(before, after)
    sfumato.save(system, tmp_path / "native")
    assert torch.equal(ours(kind, sfumato.load(tmp_path / "native"), steps=2), ours(kind, system, steps=2))


@pytest.mark.parametrize(("kind", "layout"), [("inpaint", "sd1-compvis"), ("depth", "sd2-compvis")])
def test_single_files_with_more_channels(kind: str, layout: str, tmp_path: Path) -> None:
    """The files of inpainting and depth have the names of text to image; one channel tells them apart."""
    built(kind, tmp_path)
    folder = sfumato.load(tmp_path / "q")
    single(folder, layout, tmp_path / "words/model.safetensors")
    config = {"num_heads": 4, "parameterization": "eps"}
    system = sfumato.load(tmp_path / "words/model.safetensors", config=config)
    assert [c.kind for c in system.config.stages[0].conditioners] == ["clip_text", kind]
    if layout == "sd1-compvis":
        found, expected = (ours(kind, s, steps=3) for s in (system, folder))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    else:  # without being told it tries the net, with black in the channel of depth
        found = sfumato.load(tmp_path / "words/model.safetensors", config={"num_heads": 4})
        assert ", as found." in found.about.summary


@pytest.mark.parametrize(("kind", "layout"), [("x4", "sd2-compvis"), ("unclip", "sd2-unclip-compvis")])
def test_single_files_of_the_upscaler_and_of_unclip(kind: str, layout: str, tmp_path: Path) -> None:
    """They predict v, with the schedule, scale and size of the published ones; no moments are in them."""
    built(kind, tmp_path, "v")
    path, shape = tmp_path / "q", (4, 96, 96)
    if kind == "x4":
        shape = (4, 128, 128)
        change(path / "scheduler/scheduler_config.json", **BETAS)
        change(path / "vae/config.json", scaling_factor=0.08333)
    else:
        change(path / "model_index.json", image_normalizer=[None, None])
    folder = sfumato.load(path)
    single(folder, layout, tmp_path / "words/model.safetensors")
    system = sfumato.load(tmp_path / "words/model.safetensors", config={"num_head_channels": 16})
    stage, expected = (s.config.stages[0] for s in (system, folder))
    assert (stage.schedule, stage.parameterization, stage.shape) == (expected.schedule, "v", shape)
    assert stage.defaults == expected.defaults
    # The projection lies transposed in the file, so its sums have another order; guidance of 10 amplifies it.
    torch.testing.assert_close(ours(kind, system, steps=3), ours(kind, folder, steps=3), rtol=0, atol=1e-4)


def change(file: Path, **more: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | more))


def test_what_a_system_is_told_has_to_be_given(tmp_path: Path) -> None:
    built("inpaint", tmp_path)
    system = sfumato.load(tmp_path / "q")
    with pytest.raises(
        ValueError, match=r"fills holes in a picture: give an image and a mask \(1 = repaint\)"
    ):
        system.generate("red heart", steps=1)
    image = system.generate("red heart", image=picture(), mask=mask(), steps=2)[0]
    assert np.array_equal(np.asarray(image)[:, 9:], np.asarray(picture())[:, 9:])
    options = system.resolve(image=picture(), mask=mask(), strength=0.5)["base"]
    assert options.start == FromImage(blend=False)
    assert system.resolve(image=picture(), mask=mask())["base"].start.kind == "noise"
