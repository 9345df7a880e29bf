from __future__ import annotations

import io
import json
import logging

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from sfumato.checkpoints.native import Folder, Parts, read_folder, write_folder
from sfumato.nets.perceptual import PerceptualConfig, PerceptualNet
from sfumato.training.ema import PowerAverage, gamma_of
from sfumato.training.posthoc import PostHoc, PostHocConfig, Profile, export, fit, reconstruct

BATCH, TOTAL = 8, 2400
FULL = PostHocConfig(sigma_rel=(0.05, 0.10), every=80, dtype="fp32")


class Walker(nn.Module):
    """Weights on a random walk, a buffer that counts, and a weight that half precision cannot hold."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64))
        self.large = nn.Parameter(torch.full((2,), 1e6))
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))

    @torch.no_grad()
    def step(self) -> None:
        self.weight += 0.05 * torch.randn(64)
        self.count += 1


def walk(run, config=FULL, widths=(), *, total=TOTAL):
    """Random walk with snapshots in `run`; returns the net and directly tracked averages."""
    torch.manual_seed(3)
    net = Walker()
    posthoc = PostHoc({"net": net}, config, run)
    direct = {width: PowerAverage({"net": net}, width) for width in widths}
    for before in range(0, total, BATCH):
        net.step()
        posthoc.update(before, before + BATCH, total)
        for average in direct.values():
            average.update(before, before + BATCH)
    return net, direct


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 0.003), ("fp16", 0.003)])
def test_reconstruction_is_the_average_that_was_tracked_directly(tmp_path, dtype, tolerance):
    widths = (0.06, 0.075, 0.15, 0.2)
    config = PostHocConfig(sigma_rel=(0.05, 0.10), every=80, dtype=dtype)
    _, direct = walk(tmp_path, config, widths)
    # What is left is the profile that 2 * 30 snapshots cannot express: 0.24 % at most in this walk.
    scale = direct[0.06].modules["net"].weight - direct[0.2].modules["net"].weight
    for width in widths:
        made = reconstruct(tmp_path, width)
        assert made.error < 0.01
        off = made.modules["net"]["weight"] - direct[width].modules["net"].weight
        # Against what is at stake, the distance between a narrow and a wide average.
        assert float(off.norm() / scale.norm()) < tolerance
        assert made.modules["net"]["weight"].dtype == torch.float32


def test_a_tracked_average_comes_back_itself(tmp_path):
    _, direct = walk(tmp_path, widths=(0.05, 0.10))
    for width in (0.05, 0.10):
        made = reconstruct(tmp_path, width)
        # The square of the profile's error, 1e-14 or so, is what is left of rounding in float64.
        assert made.error < 1e-6
        torch.testing.assert_close(
            made.modules["net"]["weight"], direct[width].modules["net"].weight, rtol=1e-5, atol=1e-6
        )


def test_an_earlier_end_uses_nothing_that_came_later(tmp_path):
    walk(tmp_path / "long")
    walk(tmp_path / "short", total=TOTAL // 2)
    a = reconstruct(tmp_path / "long", 0.15, images=TOTAL // 2).modules["net"]
    b = reconstruct(tmp_path / "short", 0.15).modules["net"]
    assert all(torch.equal(a[name], b[name]) for name in ("weight", "large", "count"))
    assert int(a["count"]) == TOTAL // 2 // BATCH


def test_coefficients_are_those_of_least_squares_on_a_fine_grid():
    tracked = [Profile(t, gamma_of(s)) for t in (100, 200, 300, 400) for s in (0.05, 0.10)]
    wanted = Profile(400, gamma_of(0.14))
    n = 80_000
    t = (np.arange(n) + 0.5) * 400 / n

    def values(p):
        return np.where(t < p.images, (p.gamma + 1) * (t / p.images) ** p.gamma / p.images, 0)

    matrix, target = np.stack([values(p) for p in tracked], 1), values(wanted)
    expected = np.linalg.lstsq(matrix, target, rcond=None)[0]
    coefficients, error = fit(tracked, wanted)
    np.testing.assert_allclose(coefficients, expected, rtol=0, atol=1e-6)
    left = np.linalg.norm(matrix @ expected - target) / np.linalg.norm(target)
    assert error == pytest.approx(left, rel=1e-5)
    assert coefficients.sum() == pytest.approx(1, abs=0.03)  # constant weights are their own average


def test_snapshots_hold_half_precision_but_for_what_does_not_fit_and_buffers(tmp_path):
    net, _ = walk(tmp_path, PostHocConfig(sigma_rel=(0.1,), every=1600), total=2402)
    files = sorted(p.name for p in (tmp_path / "averages").iterdir())
    assert files == ["000000001600-0.100000.safetensors", "000000002408-0.100000.safetensors"]
    with safe_open(tmp_path / "averages" / files[1], "pt") as file:
        kinds = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
        assert json.loads(file.metadata()["sfumato-average"])["buffers"] == ["net.count"]
    assert kinds == {"net.weight": torch.float16, "net.large": torch.float32, "net.count": torch.int64}
    made = reconstruct(tmp_path, 0.1).modules["net"]
    assert torch.equal(made["count"], net.count)
    torch.testing.assert_close(made["large"], net.large.detach(), rtol=1e-5, atol=0)


def test_a_resumed_run_writes_the_same_snapshots_and_forgets_those_it_takes_back(tmp_path):
    walk(tmp_path / "whole", total=400)
    torch.manual_seed(3)
    net = Walker()
    first = PostHoc({"net": net}, FULL, tmp_path / "parts")
    for before in range(0, 216, BATCH):
        if before == 184:
            kept = {"net": {k: v.clone() for k, v in net.state_dict().items()}, "posthoc": _copied(first)}
            generator = torch.get_rng_state()
        net.step()
        first.update(before, before + BATCH, 216)
    assert len(list((tmp_path / "parts" / "averages").iterdir())) == 6  # at 80, 160 and the end
    net.load_state_dict(kept["net"])
    torch.set_rng_state(generator)
    second = PostHoc({"net": net}, FULL, tmp_path / "parts")
    second.load_state_dict(kept["posthoc"], 184)
    assert len(list((tmp_path / "parts" / "averages").iterdir())) == 4
    for before in range(184, 400, BATCH):
        net.step()
        second.update(before, before + BATCH, 400)
    whole, parts = (
        {p.name: p.read_bytes() for p in (tmp_path / n / "averages").iterdir()} for n in ("whole", "parts")
    )
    assert len(whole) == 10
    assert whole == parts


def _copied(posthoc):
    """The state as a checkpoint would give it back."""
    file = io.BytesIO()
    torch.save(posthoc.state_dict(), file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def test_nothing_tracked_writes_and_removes_nothing(tmp_path):
    kept = tmp_path / "averages" / "000000000099-0.100000.safetensors"
    kept.parent.mkdir()
    kept.write_bytes(b"somebody else's")
    walk(tmp_path, PostHocConfig(), total=40)
    assert [p.name for p in kept.parent.iterdir()] == [kept.name]


def test_an_export_is_the_runs_system_with_the_averages_weights(tmp_path):
    net = PerceptualNet(PerceptualConfig(widths=(4,), convs=(1,)))
    write_folder(tmp_path / "system", Folder(Parts({"perceptual": net}), {}, card="# card\n"))
    posthoc = PostHoc({"perceptual": net}, PostHocConfig(sigma_rel=(0.1,), every=4), tmp_path)
    with torch.no_grad():
        net.weights[0].mul_(3)
    posthoc.update(0, 4, 4)
    out = read_folder(export(tmp_path, 0.1, tmp_path / "out"))
    torch.testing.assert_close(out.parts.nets["perceptual"].weights[0], torch.full((4,), 3.0))
    assert "sigma_rel 0.1" in out.card
    PostHoc({"trunk": net.trunk}, PostHocConfig(sigma_rel=(0.1,), every=4), tmp_path).update(0, 4, 4)
    with pytest.raises(ValueError, match="are of trunk, and its system has no such net, only perceptual"):
        export(tmp_path, 0.1, tmp_path / "out")


def test_widths_out_of_reach_are_said_to_be(tmp_path, caplog):
    walk(tmp_path, total=400)
    with caplog.at_level(logging.WARNING):
        assert reconstruct(tmp_path, 0.01).error > 0.1
    assert "sigma_rel 0.01 at 400 images" in caplog.text


def test_mistakes_are_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"no snapshots in .*sigma-rel 0\.05 0\.1"):
        reconstruct(tmp_path, 0.1)
    walk(tmp_path, total=400)
    with pytest.raises(ValueError, match=r"no snapshot at 170 images; the nearest of 5 is 160"):
        reconstruct(tmp_path, 0.1, images=170)
    (tmp_path / "averages" / "000000000080-0.050000.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"000000000080-0\.050000\.safetensors is not a snapshot"):
        reconstruct(tmp_path, 0.1)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"sigma_rel": (0.05, 0.5)}, "sigma_rel is 0.5"),
        ({"sigma_rel": (0.1, 0.1)}, "names a width twice"),
        ({"every": 0}, "every is 0"),
    ],
)
def test_impossible_settings_are_refused(bad, said):
    with pytest.raises(ValueError, match=said):
        PostHocConfig(**bad)
