"""Folders of diffusers' UNet2DModel beside diffusers itself, on small random nets."""

from __future__ import annotations

import json

import diffusers
import pytest
import torch

import sfumato
from sfumato.checkpoints.layouts import LAYOUTS
from sfumato.core.types import Conditioning, Inputs

TYPES = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
DDPM = {"attention_head_dim": None, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1}
CASES = {
    "as google's": ({**DDPM, "norm_eps": 1e-6}, "fixed_large"),
    "classes, heads": ({"attention_head_dim": 8, "num_class_embeds": 5}, "fixed_small"),
    "no attention in the middle": (
        {"add_attention": False, "resnet_time_scale_shift": "scale_shift"},
        "fixed_small",
    ),
}
SEEDS = [5, 6]


def made(**changes):
    torch.manual_seed(0)
    shape = {"sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
    net = diffusers.UNet2DModel(**{**shape, **TYPES, **changes})
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return net.eval()


def generators():
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_net_and_walks_are_those_of_diffusers(case, tmp_path):
    """1e-5 for the net, 1e-4 for pictures of 5 steps; diffusers' tables are float32."""
    changes, variance = CASES[case]
    net = made(**changes)
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=50, variance_type=variance)
    pipeline = diffusers.DDPMPipeline(net, scheduler)
    pipeline.save_pretrained(tmp_path)
    system = sfumato.load(tmp_path)
    ours = system.parts.nets["net"]
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([3, 47]), torch.tensor([1, 4])
    told = "num_class_embeds" in changes
    expected = net(x, t, **({"class_labels": y} if told else {})).sample
    torch.testing.assert_close(
        ours(x, t, Conditioning(label=y if told else None)), expected, rtol=1e-5, atol=1e-5
    )
    assert system.stages[0].defaults.steps == 50
    (tmp_path / "again").mkdir()
    sfumato.save_nets({"net": ours}, tmp_path / "again", layout="unet2d-diffusers", config={"sample_size": 8})
    again = diffusers.UNet2DModel.from_pretrained(tmp_path / "again", low_cpu_mem_usage=False).eval()
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), net.parameters(), strict=True))
    if told:
        return
    ways = [("ddpm", pipeline, {}, {})]
    ways += [
        ("ddim", diffusers.DDIMPipeline(net, scheduler), {"eta": eta}, {"knobs": {"eta": eta}})
        for eta in (0.0, 0.6)
    ]
    for sampler, theirs, args, request in ways:
        theirs.set_progress_bar_config(disable=True)
        drawn = theirs(
            batch_size=2, num_inference_steps=5, generator=generators(), output_type="np", **args
        ).images
        done = system.run(
            Inputs(n=2), system.resolve(steps=5, sampler=sampler, **request), seed=SEEDS
        ).low_res
        expected = torch.from_numpy(drawn).permute(0, 3, 1, 2) * 2 - 1
        torch.testing.assert_close(done, expected, rtol=0, atol=1e-4)


def test_the_oldest_folders_have_no_subfolders_and_other_names(tmp_path):
    """google/ddpm-*: all lies beside model_index.json, attention is query, key, value."""
    net = made(**DDPM)
    net.save_pretrained(tmp_path, safe_serialization=False)
    file = tmp_path / "diffusion_pytorch_model.bin"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = torch.load(file, weights_only=True)
    for new, name in old.items():
        state = {key.replace(f".{new}.", f".{name}."): v for key, v in state.items()}
    torch.save(state, file)
    index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}
    index |= {"scheduler": ["diffusers", "DDPMScheduler"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    scheduler = {"_class_name": "DDPMScheduler", "variance_type": "fixed_large"}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(scheduler))
    system = sfumato.load(tmp_path)
    assert dict(system.stages[0].defaults.knobs) == {"variance": "large"}
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([7])
    with torch.no_grad():
        torch.testing.assert_close(
            system.parts.nets["net"](x, t, Conditioning()), net(x, t).sample, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"downsample_type": "resnet"},
            "downsample_type resnet is not supported for a UNet2DModel; allowed: conv",
        ),
        ({"layers_per_block": 2}, "the config says layers_per_block 2, the tensors say 1"),
        ({"sample_size": None}, "output channels, size None; a system draws"),
    ],
)
def test_a_config_that_is_not_the_net_s_is_one_line(changes, message, tmp_path):
    made(**DDPM).save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=message) as error:
        sfumato.load(tmp_path)
    assert "\n" not in str(error.value)


def test_google_s_configuration_is_the_preset():
    """ddpm-cifar10-32: 35.7 million parameters."""
    from sfumato.nets.presets import UNETS

    part = LAYOUTS["unet2d-diffusers"].parts[0]
    told = part.published(UNETS["ddpm-cifar10"](), {"sample_size": 32})
    assert told["block_out_channels"] == [128, 256, 256, 256]
    assert told["down_block_types"] == ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"]
    assert (told["attention_head_dim"], told["downsample_padding"], told["freq_shift"]) == (None, 0, 1)
