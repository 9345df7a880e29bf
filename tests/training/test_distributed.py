"""Several processes give what one gives: losses, averages, order; shards go to any number of processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sfumato.training.log import read_log

RANKS = Path(__file__).with_name("ranks.py")
# Means over processes are rounded differently than those over a batch.
CLOSE = {"rel": 1e-6, "abs": 1e-6}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Processes beside processes, and threads in each, would be too many."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def run(folder: Path, *scenarios: str, fails: bool = False) -> str:
    done = subprocess.run(
        [sys.executable, str(RANKS), str(folder), *scenarios], capture_output=True, text=True, timeout=300
    )
    assert (done.returncode != 0) is fails, done.stderr
    return done.stderr


def steps(folder: Path, name: str) -> list[dict[str, object]]:
    """What a run did step by step: the numbers of process 0, and the rows that all together took."""
    parts = [
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(folder.glob(f"{name}-*.jsonl"))
    ]
    return [
        {**step[0], "rows": [row for part in step for row in part["rows"]]}
        for step in zip(*parts, strict=True)
    ]


def assert_equal_runs(folder: Path, one: str, other: str, *, after: int = 0) -> None:
    mine, theirs = steps(folder, one)[after:], steps(folder, other)
    assert len(mine) == len(theirs) > 3
    for a, b in zip(mine, theirs, strict=True):
        assert a.pop("rows") == b.pop("rows")
        assert a == pytest.approx(b, **CLOSE)
        assert {"denoiser/loss", "denoiser/lr", "denoiser/grad_norm"} < a.keys()
    assert_equal_weights(folder, one, other, CLOSE["abs"])


def assert_equal_weights(folder: Path, one: str, other: str, error: float) -> None:
    files = [p for kind in ("system", "averages") for p in (folder / one / kind).glob("*.safetensors")]
    assert files
    for path in files:
        pair = load_file(path), load_file(folder / other / path.relative_to(folder / one))
        assert pair[0].keys() == pair[1].keys()
        for key, tensor in pair[0].items():
            assert float((tensor.double() - pair[1][key].double()).abs().max()) <= error, (path, key)


def test_two_processes_equal_one_and_any_number_takes_up_what_they_have_saved(tmp_path):
    run(
        tmp_path,
        "one:toy-dit:1:replicate",
        "ddp:toy-dit:2:replicate",
        "fsdp:toy-dit:2:shard",
        "down:toy-dit:1:shard:fsdp",
        "up:toy-dit:3:shard:fsdp",
        "changed:toy-dit:2:replicate:fsdp",
        "back:toy-dit:2:shard:ddp",
    )
    for name in ("ddp", "fsdp"):
        assert_equal_runs(tmp_path, "one", name)
    for name in ("down", "up", "changed", "back"):
        assert_equal_runs(tmp_path, "one", name, after=2)
    assert len(list((tmp_path / "fsdp").glob("checkpoints/*36/shards/*.safetensors"))) == 2
    previews = [(tmp_path / name / "previews" / "000000000036.png").read_bytes() for name in ("one", "ddp")]
    assert previews[0] == previews[1]


def test_a_clip_compares_the_pairs_of_all_processes(tmp_path):
    run(tmp_path, "clip1:toy-clip:1:replicate", "clip2:toy-clip:2:replicate")
    one, two = (load_file(tmp_path / name / "system/clip.safetensors") for name in ("clip1", "clip2"))
    for key, tensor in one.items():
        error = (tensor.double() - two[key].double()).abs()
        if key.endswith("qkv.bias"):  # that of the keys changes no softmax: its gradient is rounding alone
            error = torch.cat([error.chunk(3)[i] for i in (0, 2)])
        # Adam divides by gradients that are small; a wrong gradient moves weights by 1e-3 and more.
        assert float(error.max()) <= 1e-5, key


def test_adapters_unets_and_both_phases_of_an_autoencoder_train_in_two_processes(tmp_path):
    run(
        tmp_path,
        "toy-dit:toy-dit:1:replicate",
        "lora1:toy-lora:1:replicate",
        "lora2:toy-lora:2:replicate",
        "unet1:toy-unet:1:replicate",
        "unet2:toy-unet:2:shard",
        "gan:toy-autoencoder:2:replicate",
    )
    assert_equal_runs(tmp_path, "lora1", "lora2")
    assert_equal_runs(tmp_path, "unet1", "unet2")
    assert "discriminator/loss" in read_log(tmp_path / "gan" / "log.jsonl")[-1]


def test_a_process_that_is_killed_and_started_again_by_torchrun_changes_nothing(tmp_path):
    run(tmp_path, "whole:toy-dit:2:shard")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"]
    command += [str(RANKS), str(tmp_path), "fallen:toy-dit:2:shard", "--kill=18"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "process 1 of 2 did not come" in done.stderr
    first, *rest = [json.loads(row) for row in (tmp_path / "fallen-0.jsonl").read_text().splitlines()][2:]
    assert [first["images"], rest[0]["images"]] == [12, 12]  # back to the checkpoint after 12 images
    assert_equal_weights(tmp_path, "whole", "fallen", 0.0)


SCRIPT = """
import sys, time
from pathlib import Path
from ranks import processes
from sfumato.core.world import Echo, joined
folder = Path(sys.argv[1])
def work(rank):
    {work}
print(processes({size}, work))
"""


def script(folder: Path, work: str, size: int = 2) -> tuple[list[int], str]:
    """Exit codes and what is said by processes that do some work."""
    text = SCRIPT.format(work=work.strip().replace("\n", "\n    "), size=size)
    env = {**os.environ, "PYTHONPATH": str(RANKS.parent) + os.pathsep + os.environ.get("PYTHONPATH", "")}
    done = subprocess.run(
        [sys.executable, "-c", text, str(folder)], capture_output=True, text=True, timeout=120, env=env
    )
    return json.loads(done.stdout.splitlines()[-1]), done.stdout + done.stderr


def test_processes_gather_average_and_agree(tmp_path):
    codes, said = script(
        tmp_path,
        """
import torch
with joined("cpu", seconds=60) as world:
    assert (world.rank, world.size) == (rank, 3)
    assert world.gather(f"r{rank}") == ["r0", "r1", "r2"]
    assert world.together([i * i for i in world.share(7)], 7) == [i * i for i in range(7)]
    one, two = world.mean([torch.tensor(float(rank)), torch.full((2, 2), rank, dtype=torch.float64)])
    assert one == 1 and two.shape == (2, 2) and (two == 1).all()
    assert world.most(-rank) == 0
    assert world.lead(lambda: rank + 5) == 5
    for failing, fails in (("lead", lambda: int("x")), ("agree", lambda: int("x" if rank == 1 else "1"))):
        try:
            getattr(world, failing)(fails)
            raise SystemExit("it did not fail")
        except ValueError as error:
            tells = rank == (0 if failing == "lead" else 1)
            assert isinstance(error, Echo) is not tells
    assert world.agree(lambda: rank) == rank
    def refused():
        raise world.fail("refused")
    for failing, fails in (
        (1, lambda: world.agree(lambda: int("x" if rank == 1 else "1"))),
        (0, lambda: world.lead(lambda: int("x"))),
        (2, lambda: world.agree(lambda: rank) + int("x" if rank == 2 else "1")),
        (2, lambda: int("x" if rank == 2 else "1") + world.agree(lambda: rank)),
        (0, refused),
    ):
        try:
            world.agree(fails)
            raise SystemExit("it did not fail")
        except ValueError as error:
            assert isinstance(error, Echo) is (rank != failing)
    assert world.gather(rank) == [0, 1, 2]  # and nobody waits elsewhere
""",
        size=3,
    )
    assert codes == [0, 0, 0], said


def test_who_is_missing_is_said_after_the_time_out(tmp_path):
    codes, said = script(
        tmp_path,
        """
with joined("cpu", seconds=2) as world:
    if rank == 1:
        time.sleep(9)
        raise SystemExit
    world.most(rank)
""",
        size=3,
    )
    assert codes[0] == codes[2] == 1
    assert "ValueError: process 1 of 3 did not come" in said


def test_processes_that_see_different_data_or_a_batch_that_cannot_be_shared_are_refused(tmp_path):
    work = """
from dataclasses import replace
from dying import pictures
from ranks import recipe
from sfumato.training.run import train
toy = recipe("toy-dit", pictures(folder / f"data-{{rank if {apart} else 0}}"), folder / "run", 12)
if {apart} and rank == 1:
    told = folder / "data-1" / "metadata.jsonl"
    told.write_text("".join(told.read_text().splitlines(keepends=True)[1:]))
train(replace(toy, trainer=replace(toy.trainer, batch={batch})))
"""
    codes, said = script(tmp_path, work.format(apart=True, batch=4))
    assert codes == [1, 1]
    assert "process 0 has 10 pictures and process 1 has 9" in said
    codes, said = script(tmp_path, work.format(apart=False, batch=5))
    assert codes == [1, 1]
    assert "trainer.batch 5 cannot be shared equally by 2 processes" in said
    assert not (tmp_path / "run").exists()


def test_a_signal_to_one_process_stops_all_at_the_same_step_with_a_checkpoint(tmp_path):
    codes, said = script(
        tmp_path,
        """
import os, signal
from dying import pictures
from ranks import recipe
from sfumato.training.run import train
from sfumato.training.signals import Stopped
from sfumato.training.step import Step
take = Step.__call__
def taken(step, batch, at, **named):
    if rank == 1 and at == 4:
        os.kill(os.getpid(), signal.SIGTERM)
    return take(step, batch, at, **named)
Step.__call__ = taken
try:
    train(recipe("toy-dit", pictures(folder / "data"), folder / "run", 40))
except Stopped as stopped:
    assert stopped.signum == signal.SIGTERM
else:
    raise ValueError("it was not stopped")
""",
    )
    assert codes == [0, 0], said
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["000000000008"]


def test_pictures_are_shared_and_one_seed_is_one_picture(tmp_path):
    draw = """
from sfumato.cli import main
code = main(["generate", "red heart", "--n", "3", "--steps", "2", "--device", "cpu", "--grid", "--out",
             str(folder / "pictures")])
assert code == 0
"""
    for size in (1, 2):
        codes, said = script(tmp_path, draw.replace("pictures", f"by-{size}"), size=size)
        assert codes == [0] * size, said
        assert sum(line.endswith(".png") for line in said.splitlines()) == 4
    files = {path.name: path.read_bytes() for path in (tmp_path / "by-1").iterdir()}
    assert len(files) == 4
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "by-2").iterdir()}
