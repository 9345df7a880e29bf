"""The report on DiT at toy size: its plan, its cells from the command line, and what it finds in curves."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from sfumato import cli
from sfumato.core.config import from_json, to_json
from sfumato.diffusion.schedules import Discrete, Flow
from sfumato.diffusion.weights import EDMWeight
from sfumato.evaluation.measures import Proportion
from sfumato.nets.dit import DiT
from sfumato.reports import running
from sfumato.reports.cost import Cost
from sfumato.reports.findings import correlation, findings, images_to
from sfumato.reports.plan import BASELINE, IMPROVEMENTS, PARTS, Plan, cells
from sfumato.reports.running import Outcome
from sfumato.training.history import read_log
from sfumato.training.recipe import Recipe
from sfumato.training.signals import Stopped

TINY = [
    *("report", "dit-designs", "--recipe", "toy-scenes", "--designs", "adaln_zero", "cross"),
    *("--sizes", "XS", "--patches", "16", "--improvements", "flow", "--images", "16", "--seeds", "1"),
    *("--validations", "2", "--validation.share", "0.2", "--validation.pictures", "4", "--device", "cpu"),
    *("--protocol.pictures", "2", "--protocol.steps", "1", "--protocol.train", "10"),
]
TOY = Plan(recipe="toy-scenes", images=48, device="cpu")


def changed(flag, *values):
    """TINY with other values of a flag."""
    at = TINY.index(flag)
    end = next((i for i in range(at + 1, len(TINY)) if TINY[i].startswith("--")), len(TINY))
    return [*TINY[: at + 1], *values, *TINY[end:]]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A folder in which a report of designs was stopped after its first cell, and made again, with --out."""
    folder = tmp_path_factory.mktemp("report")
    trained, real = [], running.train
    stop = {"after": 1}

    def train(recipe):
        if len(trained) == stop["after"]:
            raise Stopped(15)
        trained.append(recipe.folder.as_posix())
        return real(recipe)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(running, "train", train)
        codes = [cli.main(TINY)]
        stop["after"] = -1
        codes.append(cli.main([*TINY, "--out", "docs"]))
        again = len(trained)
        codes.append(cli.main([*TINY]))
    assert codes == [75, 0, 0]
    assert len(trained) == again  # a finished report trains nothing
    return folder, trained


def test_a_stopped_report_goes_on_and_runs_no_cell_twice(done):
    place = "runs/report-dit-designs"
    assert done[1] == [
        *(f"{place}/designs/{name}-0" for name in ("adaln_zero", "cross")),
        f"{place}/scaling/XS-16-0",
        *(f"{place}/improvements/{name}-0" for name in ("baseline", "flow")),
    ]


def test_the_numbers_are_those_of_the_runs(done):
    numbers = json.loads((done[0] / "docs/dit-designs.json").read_text())
    assert len(numbers["cells"]) == len(numbers["costs"]) == 5
    for cell in numbers["cells"]:
        log = done[0] / f"runs/report-dit-designs/{cell['part']}/{cell['name'].replace('/', '-')}-0/log.jsonl"
        rows = [row for row in read_log(log) if "validation/velocity" in row]
        assert cell["images"] == [row["images"] for row in rows]
        assert cell["losses"] == [row["validation/loss"] for row in rows]
        assert cell["velocities"] == [row["validation/velocity"] for row in rows]
        assert set(cell["joint"]) == ({"seen", "combinations"} if cell["part"] == "designs" else set())
    found = numbers["findings"]
    assert {row["name"] for row in found["designs"]} == {"adaln_zero", "cross"}
    assert all(row["joint"]["seen"]["total"] == 2 for row in found["designs"])
    assert found["target"] == next(c["velocities"][-1] for c in numbers["cells"] if c["name"] == BASELINE)


def test_designs_get_equal_compute(done):
    numbers = json.loads((done[0] / "docs/dit-designs.json").read_text())
    gflop = {cost["name"]: cost["gflop"] for cost in numbers["costs"] if cost["part"] == "designs"}
    images = {row["name"]: row["images"] for row in numbers["findings"]["designs"]}
    assert gflop["cross"] > gflop["adaln_zero"]
    assert images == {"adaln_zero": 16, "cross": 12}  # 16 / 1.03 in whole batches of 4


def test_the_page_has_every_row_and_its_pictures(done):
    text = (done[0] / "docs/dit-designs.md").read_text()
    for start in ("| adaln_zero |", "| cross |", "| XS/16 |", "| baseline |", "| flow |"):
        assert text.count(start) == 1
    for part in PARTS:
        assert f"(dit-designs-{part}.png)" in text
        with Image.open(done[0] / f"docs/dit-designs-{part}.png") as picture:
            assert picture.size == (960, 600)


def test_a_cell_of_other_settings_is_not_taken_for_finished(done, monkeypatch, capsys):
    monkeypatch.chdir(done[0])
    assert cli.main(changed("--validation.share", "0.3")) == 2
    assert "holds a run of another recipe (validation.share: 0.2 -> 0.3)" in capsys.readouterr().err
    scored = []
    monkeypatch.setattr(running, "_scored", lambda folder, cell, plan: scored.append(cell.name) or ({}, {}))
    monkeypatch.setattr(running, "write_whole", lambda path, data: None)  # the fixture's folder stays
    assert cli.main([*changed("--protocol.pictures", "3"), "--parts", "designs"]) == 0
    assert scored == ["adaln_zero", "cross"]


def test_a_report_is_made_again_where_its_runs_are_gone(done, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(done[0] / "docs", "docs")
    before = Path("docs/dit-designs.json").read_text()
    assert cli.main([*TINY, "--out", "docs"]) == 0
    assert not Path("runs").exists()
    assert json.loads(Path("docs/dit-designs.json").read_text())["cells"] == json.loads(before)["cells"]


def test_a_dry_run_lists_and_trains_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*TINY, "--parts", "designs", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| designs/adaln_zero, seed 0 | 17,520 | ")
    assert lines[3].startswith("| designs/cross, seed 0 | 16,560 | ")
    assert lines[-1].startswith("2 cells, about ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["report", "dit"], "unknown report 'dit'"),
        (changed("--sizes", "XXS"), "unknown size 'XXS'"),
        (changed("--improvements", "ropes"), "unknown improvement 'ropes'; did you mean 'rope'?"),
        (changed("--recipe", "toy-unet"), "recipe 'toy-unet' trains no DiT"),
        (changed("--images", "0"), "images is 0"),
        ([*TINY, "--parts", "designs", "designs"], "parts ('designs', 'designs'): name at least"),
    ],
    ids=["report", "size", "improvement", "recipe", "images", "parts"],
)
def test_mistakes_are_one_line(args, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(args) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_whole_plan():
    found = cells(TOY)
    count = 4 + 9 + 1 + len(IMPROVEMENTS)
    assert len(found) == 2 * count
    assert len({cell.recipe.folder for cell in found}) == len(found)
    assert [cell.seed for cell in found] == [0] * count + [1] * count
    assert {cell.recipe.trainer.images for cell in found} == {48}
    sizes = {cell.name for cell in found if cell.part == "scaling"}
    assert sizes == {f"{size}/{patch}" for size in "SML" for patch in (2, 4, 8)}


def test_the_latents_of_all_cells_are_shared():
    found = cells(Plan(runs=Path("there")))
    assert {cell.recipe.task.latents for cell in found} == {Path("there/latents")}


def test_an_improvement_is_one_change_of_the_baseline():
    tasks = {cell.name: cell.recipe.task for cell in cells(replace(TOY, parts=("improvements",), seeds=1))}
    plain = tasks.pop(BASELINE)
    assert plain.schedule == Discrete()
    assert [plain.net.qk_norm, plain.net.shared_modulation, plain.learned_var] == [False] * 3
    for name in ("qk_norm", "rope", "swiglu", "shared_modulation"):
        assert tasks[name] == replace(plain, net=replace(plain.net, **{name: True}))
    assert tasks["registers"] == replace(plain, net=replace(plain.net, registers=4))
    assert tasks["flow"] == replace(plain, schedule=Flow(multiplier=1000.0), prediction="flow")
    assert (tasks["clean"].prediction, tasks["clean"].objective.weight) == ("x0", EDMWeight(sigma_data=1.0))
    assert tasks["logit_normal"].objective.times.kind == "logit_normal"
    assert tasks["learned_sigma"].net.out_channels == 6
    both = tasks["combined"]
    assert (both.net.rope, both.net.registers, both.prediction) == (True, 4, "x0")
    assert both.schedule == tasks["flow"].schedule
    assert both.objective.times == tasks["logit_normal"].objective.times
    assert not both.learned_var


def test_every_cell_has_a_net():
    for cell in cells(replace(TOY, seeds=1)):
        assert isinstance(DiT(cell.recipe.task.net), DiT)
        assert from_json(Recipe, json.dumps(to_json(cell.recipe))) == cell.recipe


def outcome(part, name, seed, curve):
    images, losses = zip(*curve, strict=True)
    joint = {"seen": Proportion.of(seed, 10)} if part == "designs" else {}
    nearest = {split: Proportion.of(share.hits + 1, 10) for split, share in joint.items()}
    return Outcome(
        part=part,
        name=name,
        seed=seed,
        images=images,
        losses=losses,
        velocities=losses,
        joint=joint,
        nearest=nearest,
        identity="",
    )


def test_images_to_a_loss_lie_between_two_points():
    assert images_to(0.5, [10, 20, 30], [1.0, 0.6, 0.4]) == pytest.approx(25)
    assert images_to(1.0, [10, 20], [1.0, 0.6]) == 10
    assert images_to(0.3, [10, 20], [1.0, 0.6]) is None
    assert images_to(0.5, [10, 20, 30], [0.6, 0.4, 0.8]) == pytest.approx(15)  # the first time counts


def test_what_curves_show():
    ran = [
        outcome("improvements", BASELINE, 0, [(10, 1.0), (20, 0.5)]),
        outcome("improvements", BASELINE, 1, [(10, 1.0), (20, 0.3)]),
        outcome("improvements", "slow", 0, [(10, 1.0), (20, 0.45)]),
        outcome("improvements", "slow", 1, [(10, 1.0), (20, 0.45)]),
        outcome("improvements", "fast", 0, [(10, 0.4), (20, 0.7)]),
        outcome("improvements", "fast", 1, [(10, 0.6), (20, 0.2)]),
        outcome("designs", "cross", 0, [(10, 0.2)]),
        outcome("designs", "cross", 1, [(10, 0.4)]),
        outcome("scaling", "S/2", 0, [(10, 0.1)]),
        outcome("scaling", "S/8", 0, [(10, 0.3)]),
        outcome("scaling", "L/8", 0, [(10, 0.2)]),
    ]
    costs = {(one.part, one.name): Cost(7, 3.0, 1.0) for one in ran}
    sizes = {"S/2": Cost(100, 100.0, 1.0), "S/8": Cost(100, 1.0, 1.0), "L/8": Cost(900, 10.0, 1.0)}
    costs |= {("scaling", name): cost for name, cost in sizes.items()}
    found = findings(TOY, ran, costs)
    assert found.target == pytest.approx(0.4)
    assert [(row.name, row.reached) for row in found.improvements] == [
        ("fast", 2),
        (BASELINE, 1),
        ("slow", 0),
    ]
    assert found.improvements[0].needed == pytest.approx((10 + 15) / 2)
    assert found.improvements[2].needed is None
    (cross,) = found.designs
    assert (cross.loss, cross.low, cross.high) == pytest.approx((0.3, 0.2, 0.4))
    assert (cross.joint["seen"].hits, cross.joint["seen"].total) == (1, 20)
    assert [row.name for row in found.scaling] == ["S/8", "L/8", "S/2"]
    assert found.by_gflop == pytest.approx(-1)
    assert found.by_parameters == pytest.approx(0)


def test_a_correlation_needs_three_points_that_differ():
    assert correlation([1, 2], [3, 4]) is None
    assert correlation([1, 1, 1], [1, 2, 3]) is None
    assert correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1)
