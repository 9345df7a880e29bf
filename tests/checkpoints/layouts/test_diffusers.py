"""Folders of diffusers: recorded outputs, its own classes on what we write, whole pipelines."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sfumato
from sfumato.checkpoints import foreign
from sfumato.checkpoints.layouts import LAYOUTS
from sfumato.core.random import Noise
from sfumato.core.types import Conditioning, Inputs
from sfumato.nets.autoencoder import Autoencoder, AutoencoderConfig
from sfumato.nets.dit import DiT, DiTConfig
from sfumato.nets.presets import AUTOENCODERS

diffusers = pytest.importorskip("diffusers")

GOLDEN = Path(__file__).parents[2] / "golden"
CLOSE = {"rtol": 0, "atol": 1e-5}  # outputs of order 1; float32 sums in another order
NET = DiTConfig(
    width=48,
    depth=2,
    heads=4,
    num_classes=7,
    out_channels=8,
    time_shift=1.0,
    norm2_eps=1e-5,
    position_base=4,
)
VAE = AutoencoderConfig(
    channels=16, mults=(1, 2), blocks=1, norm_groups=8, z_channels=4, embed_dim=4, attention_levels=(1,)
)


def near(expected):
    """The same of the largest output: recorded ones are not of order 1."""
    return {"rtol": 0, "atol": CLOSE["atol"] * max(1.0, float(expected.abs().max()))}


def randomized(net):
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.15)
    return net.eval()


def renamed(name: str, renames: dict[str, str]) -> str:
    for old, new in renames.items():
        name = name.replace(old, new)
    return name


def folder(tmp_path: Path, **config: object) -> Path:
    """The recorded net in diffusers' names, as its save_pretrained writes it."""
    original = load_file(GOLDEN / "dit/dit_model.safetensors")
    state = {}
    for name, value in original.items():
        key = name.replace("blocks.", "transformer_blocks.")
        if key.startswith(("t_embedder", "y_embedder")):
            where = "timestep_embedder.linear_" if key.startswith("t_") else "class_embedder.embedding_table."
            which = {"0": "1.", "2": "2."}.get(key.split(".")[2], "") if key.startswith("t_") else ""
            for i in range(3):
                state[f"transformer_blocks.{i}.norm1.emb.{where}{which}{key.split('.')[-1]}"] = value.clone()
        elif "qkv" in key:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                state[key.replace("attn.qkv", f"attn1.to_{letter}")] = part.contiguous()
        elif key != "pos_embed":
            renames = {
                "attn.proj": "attn1.to_out.0",
                "mlp.fc1": "ff.net.0.proj",
                "mlp.fc2": "ff.net.2",
                "final_layer.adaLN_modulation.1": "proj_out_1",
                "adaLN_modulation.1": "norm1.linear",
                "final_layer.linear": "proj_out_2",
                "x_embedder": "pos_embed",
            }
            state[renamed(key, renames)] = value
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    told = {"_class_name": "DiTTransformer2DModel", "num_attention_heads": 4, "sample_size": 8, **config}
    (tmp_path / "config.json").write_text(json.dumps(told))
    return tmp_path


@torch.no_grad()
def test_both_conventions_are_the_recorded_ones(tmp_path):
    io = load_file(GOLDEN / "dit/diffusers_io.safetensors")
    x, t, cond = io["in.x"], io["in.t"], Conditioning(label=io["in.y"])
    net = sfumato.load_nets(folder(tmp_path))["net"]
    assert net.config.convention == "diffusers"
    torch.testing.assert_close(net(x, t, cond), io["out.out"], **near(io["out.out"]))
    large = net(io["in.x16"], t[:2], Conditioning(label=io["in.y"][:2]))
    torch.testing.assert_close(large, io["out.out_16x16"], **near(io["out.out_16x16"]))
    net = sfumato.load_nets(tmp_path, config={"norm_eps": 1e-6, "downscale_freq_shift": 0})["net"]
    assert net.config.convention == "original"
    other = io["out.out_norm_eps_1e-6_freqshift0"]
    torch.testing.assert_close(net(x, t, cond), other, **near(other))


@torch.no_grad()
def test_diffusers_reads_what_we_write(tmp_path):
    net = randomized(DiT(NET))
    sfumato.save_nets({"net": net}, tmp_path / "a", layout="dit-diffusers")
    theirs = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "a").eval()
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 6, 7])
    expected = theirs(x, timestep=t, class_labels=y).sample
    assert expected.std() > 0.05
    torch.testing.assert_close(net(x, t, Conditioning(label=y)), expected, **CLOSE)
    again = sfumato.load_nets(tmp_path / "a")["net"]
    assert again.config == NET
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in net.state_dict().items())


def test_the_original_convention_is_not_written_as_diffusers(tmp_path):
    with pytest.raises(
        ValueError, match=r"diffusers' class computes time_shift 1\.0, this DiT 0\.0: .*other pictures"
    ):
        sfumato.save_nets(
            {"net": DiT(DiTConfig(width=32, depth=1, heads=2, num_classes=3))},
            tmp_path / "a",
            layout="dit-diffusers",
        )
    assert not (tmp_path / "a").exists()


def test_copies_that_differ_are_refused(tmp_path):
    path = folder(tmp_path) / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state["transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.bias"][0] += 1
    save_file(state, path)
    with pytest.raises(
        ValueError, match=r"linear_2\.bias.*cannot become 'time\.2\.bias': they should be copies"
    ):
        sfumato.load_nets(tmp_path)


@pytest.mark.parametrize("name", ["activation_fn", "norm_type", "attention_bias"])
def test_another_kind_of_transformer_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match=rf"{name} .* is not supported for a DiT; allowed"):
        sfumato.load_nets(folder(tmp_path, **{name: "other"}))


@torch.no_grad()
def test_first_stage_both_ways(tmp_path):
    theirs = diffusers.AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_num_groups=8,
    ).eval()
    randomized(theirs)
    theirs.save_pretrained(tmp_path / "a")
    vae = sfumato.load_nets(tmp_path / "a")["vae"]
    assert vae.config == VAE
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    posterior = theirs.encode(x).latent_dist
    torch.testing.assert_close(vae.encode(x).mean, posterior.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        vae.decode(posterior.mean), theirs.decode(posterior.mean).sample, rtol=1e-5, atol=1e-5
    )
    sfumato.save_nets({"vae": vae}, tmp_path / "b", layout="vae-diffusers", config={"scaling_factor": 0.5})
    again = diffusers.AutoencoderKL.from_pretrained(tmp_path / "b")
    assert again.config.scaling_factor == 0.5
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in theirs.state_dict().items())


def test_first_stage_of_older_files_and_of_latent_diffusion(tmp_path):
    """The old names of the attention, and the names of CompVis, are the same net."""
    vae = randomized(Autoencoder(VAE))
    sfumato.save_nets({"vae": vae}, tmp_path / "a", layout="vae-diffusers")
    path = tmp_path / "a/diffusion_pytorch_model.safetensors"
    older = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    old = {renamed(name, older): value for name, value in load_file(path).items()}
    assert any("proj_attn" in key for key in old)
    save_file(old, path)
    again = sfumato.load_nets(tmp_path / "a")["vae"]
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in vae.state_dict().items())
    wide = Autoencoder(AutoencoderConfig(channels=32, mults=(1, 2), blocks=1, attention_levels=(1,)))
    sfumato.save_nets({"vae": wide}, tmp_path / "a.ckpt.pt", layout="vae-compvis")
    state = torch.load(tmp_path / "a.ckpt.pt")
    assert state["decoder.up.1.attn.1.proj_out.weight"].shape == (64, 64, 1, 1)
    assert state["decoder.up.0.block.0.nin_shortcut.weight"].shape == (32, 64, 1, 1)
    torch.save({"state_dict": state | {"loss.logvar": torch.zeros(())}}, tmp_path / "b.pt")
    again = sfumato.load_nets(tmp_path / "b.pt")["vae"]
    assert again.config == wide.config
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in wide.state_dict().items())


def test_published_first_stage_both_ways():
    shapes = json.loads(gzip.decompress((GOLDEN / "layouts/vae_kl_f8_diffusers.json.gz").read_bytes()))
    shapes = {key: tuple(shape) for key, shape in shapes.items()}
    (part,) = LAYOUTS["vae-diffusers"].parts
    config = part.config(part.settings(shapes, {}))
    assert config == AUTOENCODERS["kl-f8"]()
    with torch.device("meta"):
        net = Autoencoder(config)
    ours = part.names(config).load({k: torch.empty(s, device="meta") for k, s in shapes.items()}, where="f8")
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in net.state_dict().items()}
    back = part.names(config).save(ours, where="f8")
    assert {k: tuple(v.shape) for k, v in back.items()} == shapes


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kl-f8", "kl-f4-x4"])
@torch.no_grad()
def test_first_stage_at_published_size(name, scaled, tmp_path):
    widths = {"kl-f8": (128, 256, 512, 512), "kl-f4-x4": (128, 256, 512)}[name]
    theirs = diffusers.AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=2,
        latent_channels=4,
    )
    scaled(theirs).save_pretrained(tmp_path)
    vae = sfumato.load_nets(tmp_path)["vae"]
    x = torch.rand(1, 3, 128, 128) * 2 - 1
    posterior = theirs.encode(x).latent_dist
    z = torch.randn_like(posterior.mean)
    pairs = [(vae.encode(x).mean, posterior.mean), (vae.decode(z), theirs.decode(z).sample)]
    for ours, wanted in pairs:
        error = (ours - wanted).norm() / wanted.norm()
        assert error < 1e-4, f"{error:.2e}"
        print(f"{name}: {error:.2e}")


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A whole pipeline of tiny random nets, written by diffusers."""
    sfumato.save_nets({"net": randomized(DiT(NET))}, tmp_path / "net", layout="dit-diffusers")
    transformer = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "net")
    sfumato.save_nets({"vae": randomized(Autoencoder(VAE))}, tmp_path / "vae", layout="vae-diffusers")
    vae = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae")
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    labels = {i: f"class {i}" for i in range(7)}
    path = tmp_path / "p"
    diffusers.DiTPipeline(transformer, vae, scheduler).save_pretrained(path)
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(
        json.dumps(index | {"id2label": labels})
    )  # as published ones have it
    return path


def drawn(path: Path, seeds: list[int], labels: list[int], monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """What diffusers draws from the noise of our seeds, (B, 3, H, W) in [0, 1]."""
    noise = Noise(seeds)(torch.zeros(len(seeds), 4, 8, 8))
    module = "diffusers.pipelines.dit.pipeline_dit.randn_tensor"
    monkeypatch.setattr(module, lambda *args, **kwargs: noise)
    pipe = diffusers.DiTPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    # The pipeline takes 1000 for the null class whatever the net has.
    null = pipe.transformer.config.num_embeds_ada_norm
    tensor = torch.tensor

    def corrected(data: object, *args: object, **kwargs: object) -> torch.Tensor:
        return tensor(
            [null if v == 1000 else v for v in data] if isinstance(data, list) else data, *args, **kwargs
        )

    monkeypatch.setattr(torch, "tensor", corrected)
    out = pipe(class_labels=labels, num_inference_steps=5, output_type="pt", guidance_scale=3.0).images
    monkeypatch.undo()
    return out


def test_a_pipeline_draws_the_same_pictures(pipeline, tmp_path, monkeypatch):
    expected = drawn(pipeline, [3, 4], [1, 5], monkeypatch)
    system = sfumato.load(pipeline)
    assert system.config.stages[0].conditioners[0].names[5] == "class 5"

    def pictures(system: sfumato.System) -> torch.Tensor:
        options = system.resolve(steps=5, guidance=3.0)
        inputs = Inputs(n=2, label=torch.tensor([1, 5]))
        return (system.run(inputs, options, seed=3).low_res + 1) / 2

    ours = pictures(system)
    assert ours.std() > 0.05
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-4)  # five guided steps amplify rounding
    sfumato.save(system, tmp_path / "again", layout="dit-diffusers")
    torch.testing.assert_close(
        drawn(tmp_path / "again", [3, 4], [1, 5], monkeypatch), expected, rtol=0, atol=1e-6
    )
    sfumato.save(system, tmp_path / "native")
    assert torch.equal(pictures(sfumato.load(tmp_path / "native")), ours)


@pytest.mark.parametrize(("layout", "name"), [("dit", "a.safetensors"), ("dit-diffusers", "a")])
def test_a_write_that_fails_leaves_what_was_there(layout, name, tmp_path, monkeypatch):
    plain = DiTConfig(width=16, depth=1, heads=2, num_classes=3, out_channels=8)
    net = DiT(NET if layout == "dit-diffusers" else plain)
    sfumato.save_nets({"net": net}, tmp_path / name, layout=layout)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def full(path, tensors, dtype):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(foreign, "write_safetensors", full)
    with pytest.raises(ValueError, match=rf"cannot write .*{name}: No space left on device"):
        sfumato.save_nets({"net": net}, tmp_path / name, layout=layout)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
