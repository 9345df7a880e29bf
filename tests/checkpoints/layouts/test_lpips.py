"""LPIPS from files of the published layouts, against a functional version that shares no code with ours."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sfumato.checkpoints.layouts.lpips import heads_map, read_lpips, squeeze_map, vgg_map
from sfumato.nets.perceptual import PerceptualConfig, PerceptualNet, SqueezeConfig, SqueezePerceptualNet

VGG_CONVS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # places in torchvision's `features`
VGG_POOLS, VGG_TAPS = (4, 9, 16, 23), (3, 8, 15, 22, 29)
FIRES = (3, 4, 6, 7, 9, 10, 11, 12)
SQUEEZE_POOLS, SQUEEZE_TAPS = (2, 5, 8), (1, 4, 7, 9, 10, 11, 12)
PUBLISHED_SQUEEZE = (64, 128, 256, 384, 384, 512, 512)


def vgg(widths=(3, 4, 5, 6, 7)):
    """State of a VGG-16 with narrow stages, as torchvision names it, with its classifier."""
    state, cin = {}, 3
    for i in VGG_CONVS:
        width = widths[sum(pool < i for pool in VGG_POOLS)]
        state[f"features.{i}.weight"] = torch.randn(width, cin, 3, 3) / (3 * cin**0.5)
        state[f"features.{i}.bias"] = 0.1 * torch.randn(width)
        cin = width
    return state | {
        f"classifier.{i}.{n}": torch.zeros(1) for i in (0, 3, 6) for n in ("weight", "bias")
    }, widths


def squeeze(narrow=8):
    """State of a SqueezeNet 1.1 with its channels divided by `narrow`."""
    sizes = [(s // narrow, e // narrow) for s, e in SqueezeConfig().fires]
    cin = 64 // narrow
    state = {"features.0.weight": torch.randn(cin, 3, 3, 3) / 5, "features.0.bias": 0.1 * torch.randn(cin)}
    for i, (between, out) in zip(FIRES, sizes, strict=True):
        for name, rows, columns, kernel in (
            ("squeeze", between, cin, 1),
            ("expand1x1", out, between, 1),
            ("expand3x3", out, between, 3),
        ):
            state[f"features.{i}.{name}.weight"] = torch.randn(rows, columns, kernel, kernel) / (
                kernel * columns**0.5
            )
            state[f"features.{i}.{name}.bias"] = 0.1 * torch.randn(rows)
        cin = 2 * out
    state |= {"classifier.1.weight": torch.zeros(1), "classifier.1.bias": torch.zeros(1)}
    return state, tuple(w // narrow for w in PUBLISHED_SQUEEZE)


def heads(widths):
    return {f"lin{i}.model.1.weight": torch.rand(1, w, 1, 1) for i, w in enumerate(widths)}


def published(state, linear, x, y):
    """LPIPS layer by layer over the numbering of torchvision's `features`."""

    def taps(image):
        squeezing = "features.3.squeeze.weight" in state
        pools, wanted = (SQUEEZE_POOLS, SQUEEZE_TAPS) if squeezing else (VGG_POOLS, VGG_TAPS)
        h = (image - torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)) / torch.tensor(
            [0.458, 0.448, 0.450]
        ).view(1, 3, 1, 1)
        found = []
        for i in range(wanted[-1] + 1):

            def conv(name, h, i=i, **options):
                return F.conv2d(
                    h, state[f"features.{i}{name}.weight"], state[f"features.{i}{name}.bias"], **options
                )

            if i in pools:
                h = F.max_pool2d(h, 3, 2, ceil_mode=True) if squeezing else F.max_pool2d(h, 2, 2)
            elif f"features.{i}.squeeze.weight" in state:
                middle = conv(".squeeze", h).relu()
                h = torch.cat(
                    [conv(".expand1x1", middle).relu(), conv(".expand3x3", middle, padding=1).relu()], 1
                )
            elif f"features.{i}.weight" in state:
                h = conv("", h, stride=2) if squeezing else conv("", h, padding=1)
            else:
                h = h.relu()
            if i in wanted:
                found.append(h)
        return found

    total = 0
    for i, (a, b) in enumerate(zip(taps(x), taps(y), strict=True)):
        p, q = (h / (torch.sqrt(torch.sum(h**2, dim=1, keepdim=True)) + 1e-10) for h in (a, b))
        total = total + F.conv2d((p - q) ** 2, linear[f"lin{i}.model.1.weight"]).mean([2, 3])
    return total[:, 0]


@pytest.mark.parametrize(("make", "side"), [(vgg, 32), (squeeze, 37), (squeeze, 38)])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_give_the_published_distance(tmp_path, make, side, suffix):
    state, widths = make()
    linear = heads(widths)
    trunk, head = save(tmp_path / f"trunk{suffix}", state), save(tmp_path / f"heads{suffix}", linear)
    net = read_lpips(trunk, head)
    x, y = torch.rand(2, 2, 3, side, side + 3) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(net(x, y), published(state, linear, x, y), rtol=1e-5, atol=1e-7)


def save(path, state):
    if path.suffix == ".pth":
        torch.save(state, path)
    else:
        from safetensors.torch import save_file

        save_file(state, path)
    return path


@pytest.mark.parametrize("kind", ["vgg", "squeeze"])
def test_published_names_and_shapes_go_both_ways(kind):
    """The nets' own defaults are the published ones: 26 and 50 tensors of these shapes."""
    with torch.device("meta"):
        net = PerceptualNet(PerceptualConfig()) if kind == "vgg" else SqueezePerceptualNet(SqueezeConfig())
        state, widths = vgg((64, 128, 256, 512, 512)) if kind == "vgg" else squeeze(1)
        linear = heads(widths)
    names = (vgg_map if kind == "vgg" else squeeze_map)(net.config) + heads_map(len(widths))
    features = {n: v for n, v in state.items() if n.startswith("features.")}
    ours = names.load(state | linear, where="f")
    constants = {"trunk.shift", "trunk.scale"}
    assert {n: v.shape for n, v in ours.items()} == {
        n: v.shape for n, v in net.state_dict().items() if n not in constants
    }
    back = names.save(ours, where="net")
    assert {n: v.shape for n, v in back.items()} == {n: v.shape for n, v in (features | linear).items()}
    count = sum(v.numel() for v in features.values())
    assert count == (14_714_688 if kind == "vgg" else 722_496)


def test_mistakes_are_one_line_and_name_the_file(tmp_path):
    state, widths = vgg()
    trunk, head = save(tmp_path / "t.pth", state), save(tmp_path / "h.pth", heads(widths))

    def refused(said, one=trunk, two=head):
        with pytest.raises(ValueError, match=said) as error:
            read_lpips(one, two)
        assert "\n" not in str(error.value)

    refused(
        r"t\.pth has no tensor 'features\.0\.weight'; give the VGG-16",
        save(tmp_path / "xt.pth", heads(widths)),
    )
    alex = {n: v for n, v in state.items() if not n.startswith("features.28")}
    refused(r"2 missing: 'features\.28\.weight', 'features\.28\.bias'", save(tmp_path / "a.pth", alex))
    refused(
        r"has no weight 'features\.24\.weight'",
        save(tmp_path / "b.pth", {n: v for n, v in state.items() if ".24." not in n}),
    )
    refused(r"h6\.pth: 1 missing: 'lin4\.model\.1\.weight'", two=save(tmp_path / "h6.pth", heads(widths[:4])))
    refused(
        r"tensor 'weights\.4' has shape \(9,\), expected \(7,\)",
        two=save(tmp_path / "h7.pth", heads((3, 4, 5, 6, 9))),
    )
    refused(r"e\.pth: 'epoch' is a int", save(tmp_path / "e.pth", state | {"epoch": 3}))
    refused("is missing", tmp_path / "none.pth")
