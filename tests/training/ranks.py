"""Runs in one process and in several, side by side; each is forked, so that the imports happen once.

    python tests/training/ranks.py FOLDER SCENARIO ...

A scenario is NAME:RECIPE:PROCESSES:PARALLEL[:FROM]; with FROM it goes on from an early checkpoint of that
scenario. Started by torchrun it is one of the processes itself, and number 1 kills itself once after --kill
images. Runs are left in FOLDER/NAME, and in FOLDER/NAME-RANK.jsonl each step.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import sys
import traceback
from dataclasses import replace
from pathlib import Path

from dying import ended, pictures

STEPS, BATCH = 6, 6


def recipe(name: str, data: Path, out: Path, images: int):
    """A toy recipe that shows often and logs every step."""
    from sfumato.families import RECIPES

    toy = RECIPES[name]()
    cadence = {"log_every": 4, "preview_every": 8, "save_every": 8, "keep": 1}
    trainer = replace(toy.trainer, images=images, device="cpu", quiet=True, **cadence)
    return replace(toy, data=replace(toy.data, path=data), trainer=trainer, out=out)


def processes(size: int, work) -> list[int]:
    """Exit codes of `size` processes that do `work(rank)` as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(size):
        if (child := os.fork()) == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            code = 1
            try:
                work(rank)
                code = 0
            except Exception:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        children.append(child)
    return [ended(child) for child in children]


def record(path: Path) -> None:
    """Write down the rows of every batch that this process takes, and the numbers of every step."""
    from sfumato.training.step import Step

    take = Step.__call__

    def taken(step, batch, images, **named):
        outcome = take(step, batch, images, **named)
        numbers = {name: value.double().mean().item() for name, value in outcome.metrics.items()}
        with path.open("a") as file:
            file.write(json.dumps({"images": images, "rows": batch.index.tolist(), **numbers}) + "\n")
        return outcome

    Step.__call__ = taken


def die(images: int) -> None:
    """Kill this process in the step that begins with so many images, if it has not been started again."""
    from sfumato.training.step import Step

    take = Step.__call__

    def taken(step, batch, at, **named):
        if at == images and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return take(step, batch, at, **named)

    Step.__call__ = taken


def same_words(folder: Path) -> None:
    """Let all runs have one tokenizer: learned again, equally frequent pairs may come in another order."""
    from sfumato.training.jobs import denoiser, first_stage

    learn = denoiser.vocabulary_of

    def learned(place, *sizes, **options):
        kept, own = folder / f"tokenizer-{'-'.join(options)}.json", place.out / "tokenizer.json"
        if place.world.leads and kept.exists():
            own.write_text(kept.read_text())
        found = learn(place, *sizes, **options)
        if place.world.leads and not kept.exists():
            kept.write_text(own.read_text())
        return found

    denoiser.vocabulary_of = first_stage.vocabulary_of = learned


def scenario(folder: Path, text: str, kill: int | None) -> None:
    """Run one."""
    from sfumato.training.run import train

    name, toy, size, parallel, *source = text.split(":")
    whole = recipe(toy, pictures(folder / "data"), folder / name, STEPS * BATCH)
    trainer = replace(
        whole.trainer, batch=BATCH, log_every=BATCH, save_every=2 * BATCH, keep=9, parallel=parallel
    )
    trainer = replace(trainer, posthoc=replace(trainer.posthoc, sigma_rel=(0.1,), every=20, dtype="fp32"))
    task = whole.task
    for part in ("init", "embedder", "autoencoder"):  # of a run of this folder
        if getattr(task, part, None) is not None:
            task = replace(task, **{part: folder / getattr(task, part).name})
    if source:
        kept = folder / source[0]
        shutil.copytree(kept, folder / name)
        for late in sorted((folder / name / "checkpoints").iterdir())[1:]:
            shutil.rmtree(late)

    def work(rank: int) -> None:
        record(folder / f"{name}-{rank}.jsonl")
        train(replace(whole, task=task, trainer=trainer))

    if "RANK" in os.environ:
        if kill is not None and os.environ["RANK"] == "1":
            die(kill)
        work(int(os.environ["RANK"]))
        return
    codes = processes(int(size), work)
    if any(codes):
        raise SystemExit(f"{text} ended with {codes}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("scenarios", nargs="+")
    parser.add_argument("--kill", type=int)
    args = parser.parse_args()
    same_words(args.folder)
    for one in args.scenarios:
        scenario(args.folder, one, args.kill)
