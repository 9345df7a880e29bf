"""Runs that are killed, stopped, or find no space, and go on later; prints counts and what went wrong.

    python tests/training/dying.py exact toy-dit           # SIGTERM after 17 of 40 steps, then a new process
    python tests/training/dying.py signals toy-dit         # SIGTERM and Ctrl-C in each part of a run
    python tests/training/dying.py kills toy-dit           # SIGKILL at random moments
    python tests/training/dying.py terms toy-dit           # SIGTERM at random moments
    python tests/training/dying.py boundaries toy-dit      # SIGKILL before each operation on files of a save
    python tests/training/dying.py full toy-dit            # from each operation of a save on: no space left
    python tests/training/dying.py locked toy-dit          # from each operation of a save on: read-only

With --whole the last three walk through all operations of a run, from its first file to its last.

Beside the toy recipes there is "latents", toy-dit on latents. Every run is taken up until it is finished and
must then equal the undisturbed one bit for bit: weights, averages, optimizers, log, previews and what it
publishes. A run is the command line in a process of its own; processes are forked, so that the imports happen
once.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from intercepted import NEED_SPACE, intercept

STEPS, STOP, BATCH = 40, 17, 4  # of "exact"
CADENCE = {"images": 16, "log-every": 12, "preview-every": 8, "validate-every": 8, "save-every": 8, "keep": 1}
EXACT = {"images": STEPS * BATCH, "log-every": BATCH, "preview-every": 0, "save-every": 0}
# The first stage's critic learns, and is listened to, before the first checkpoint.
OWN = {
    "toy-autoencoder": ["--task.discriminator-start=4", "--task.adversarial-start=4"],
    "latents": [f"--task.net.{k}" for k in ("in-channels=4", "out-channels=4", "patch=2")],
}
BASES = {"toy-lora": ("toy-dit", "init"), "latents": ("toy-autoencoder", "autoencoder")}
# Where a signal comes: in which call of what. What is asked for the second time is so in a run that goes on.
PARTS = {
    "reading the data": ("sfumato.training.run:open_folder", 1),
    "encoding latents": ("sfumato.training.latents:_Encoding._encoded", 1),
    "a step in the warm-up": ("sfumato.training.step:Step.__call__", 1),
    "a later step": ("sfumato.training.step:Step.__call__", 4),
    "a preview": ("sfumato.training.preview:PreviewFiles.__call__", 1),
    "a validation": ("sfumato.training.validation:Validation.__call__", 1),
    "saving": ("torch:save", 1),
    "publishing": ("sfumato.training.run:write_folder", 1),
    "taking up": ("sfumato.training.state:_read", 1),
}
CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}


def pictures(folder: Path) -> Path:
    """Ten captioned pictures of 16x16, two of them held out."""
    import torch

    from sfumato.core.png import save_png

    rows = []
    for i in range(10):
        image = torch.full((3, 16, 16), 255, dtype=torch.uint8)
        image[:, 2 : 5 + i, i : i + 4] = torch.tensor([25 * i, 90, 200], dtype=torch.uint8).view(3, 1, 1)
        save_png(folder / f"{i}.png", image)
        rows.append({"file_name": f"{i}.png", "text": f"bar {i}", "split": "held_out" if i > 7 else "train"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def begin(args: list[str], said: Path, prepare: Callable[[], object]) -> int:
    """The process number of a child that runs the command line, and says what it says to a file."""
    if (child := os.fork()) != 0:
        return child
    code = 1
    try:
        file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
        from sfumato.cli import main

        prepare()
        code = main(args)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(child: int) -> int:
    """Exit code of a child; that of a signal is negative."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kept(out: Path) -> int:
    """Images at the newest checkpoint of a run that is complete as far as names tell; -1 if there is none."""
    return max((int(path.parent.name) for path in out.glob("checkpoints/[0-9]*/manifest.json")), default=-1)


def result(out: Path) -> dict[str, object]:
    """All that a run has come to, but for seconds and dates: names to bytes or numbers."""
    import torch
    from safetensors import safe_open

    from sfumato.training.state import Checkpoints

    found: dict[str, object] = {}

    def walk(value, name):
        if isinstance(value, dict | list):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                walk(item, f"{name}/{key}")
        elif not name.endswith("/seconds"):
            found[name] = value.numpy().tobytes() if isinstance(value, torch.Tensor) else value

    walk(Checkpoints(out / "checkpoints").load(), "")
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    found["log"] = [{k: v for k, v in row.items() if "second" not in k} for row in rows]
    for path in (*out.glob("[!.]*/*.safetensors"), *out.glob("*.safetensors")):
        with safe_open(path, "pt") as file:  # its metadata are in an order of chance
            walk(file.metadata(), str(path.relative_to(out)))
            walk({name: file.get_tensor(name) for name in file.keys()}, str(path.relative_to(out)))  # noqa: SIM118
    return found | {path.name: path.read_bytes() for path in out.glob("previews/*")}


class Trial:
    """An undisturbed run, and what others must come to.

    Attributes:
        operations: on files, of the undisturbed run; a character each, "s" in a save with one before it.
        seconds: that it took.
        ends: how often disturbed processes ended with which exit code; that of a signal is negative.
        wrong: what went wrong, a line each.
    """

    def __init__(self, name: str, place: Path, cadence: dict[str, int], flags: list[str]) -> None:
        self.place, self.said, self.data = place, place / "said", pictures(place / "data")
        self.cadence, self.ends, self.wrong = cadence, Counter[int](), list[str]()
        self.recipe, self.flags = "toy-dit", list[str]()
        base, field = BASES.get(name, (name, ""))
        self._warm(base)
        self.recipe = "toy-dit" if name == "latents" else name
        self.flags = [*OWN.get(name, []), *flags, *([f"--task.{field}={place / 'base'}"] if field else [])]
        tally, began = place / "operations", time.monotonic()
        code = self.run(place / "whole", functools.partial(_count_to, tally, place / "whole"))
        assert code == 0, self.said.read_text()
        self.seconds = time.monotonic() - began
        self.operations = tally.read_text()
        self.expected = result(place / "whole")

    def _warm(self, base: str) -> None:
        """A run in this process, so that its children find all that is imported on the way."""
        from sfumato.cli import main
        from sfumato.core import config

        config.TypeAdapter = functools.cache(config.TypeAdapter)  # half of what a toy run would take
        self.recipe, self.flags = base, OWN.get(base, [])
        with contextlib.redirect_stdout(None):
            assert main(self.args(self.place / "base")) == 0
        logging.getLogger().handlers.clear()  # they write where this process does
        self.flags = []

    def args(self, out: Path) -> list[str]:
        """Of the command line, for a run in a folder."""
        trainer = [f"--trainer.{key}={value}" for key, value in self.cadence.items()]
        held_out = ["--data.split=train", "--validation.split=held_out"]
        places = [f"--data.path={self.data}", f"--out={out}", "--trainer.device=cpu", "--trainer.quiet"]
        return ["train", self.recipe, *trainer, *held_out, *places, *self.flags]

    def run(self, out: Path, prepare: Callable[[], object] = lambda: None) -> int:
        """Exit code of a run in a child."""
        return ended(begin(self.args(out), self.said, prepare))

    def disturb(self, label: str, out: Path, prepare: Callable[[], object], *codes: int) -> int:
        """Exit code of a run that something happens to; all but these are wrong, and so is a traceback."""
        code = self.run(out, prepare)
        self.ends[code] += 1
        if code not in codes or "Traceback" in self.said.read_text():
            self.wrong.append(f"{label}: it ended with {code}: {self.said.read_text()[-500:]}")
        return code

    def check(self, label: str, out: Path, kept_before: int = -1) -> None:
        """Finish the run in a folder, compare it, and remove it.

        Args:
            kept_before: a checkpoint that must still be there, or a newer one.
        """
        if (now := kept(out)) < kept_before:
            self.wrong.append(
                f"{label}: the checkpoint at {kept_before} is lost, that at {now} is the newest"
            )
        if (code := self.run(out)) != 0:
            self.wrong.append(f"{label}: the resumed run ended with {code}: {self.said.read_text()[-500:]}")
        elif (found := result(out)) != self.expected:
            keys = found.keys() | self.expected.keys()
            names = sorted(k for k in keys if found.get(k) != self.expected.get(k))
            self.wrong.append(f"{label}: {', '.join(names[:5])} differ")
        elif left := [p.name for p in (*out.glob(".*"), *out.glob("*/.*"))]:
            self.wrong.append(f"{label}: {', '.join(left)} left behind")
        shutil.rmtree(out)

    def boundary(self, number: int, error: int | None) -> None:
        """From an operation on files on, by its number, all fail; with no error, the process dies there."""
        label, out, note = f"operation {number}", self.place / f"operation-{number}", self.place / "kept"
        note.write_text("-1")
        seen = 0

        def act(what: str) -> None:
            nonlocal seen
            seen += 1
            if seen <= number:
                return
            if seen == number + 1:
                _note(note, kept(out))
                if error is None:
                    os.kill(os.getpid(), signal.SIGKILL)
            if error == errno.EROFS or (error == errno.ENOSPC and what in NEED_SPACE):
                raise OSError(error, os.strerror(error))

        codes = (-signal.SIGKILL,) if error is None else (0, 2)
        code = self.disturb(label, out, lambda: intercept(act), *codes)
        said = self.said.read_text().splitlines()
        if code == 2 and (error is None or os.strerror(error) not in said[-1]):
            self.wrong.append(f"{label}: its last line is {said[-1]}")
        self.check(label, out, int(note.read_text()))

    def moment(self, number: int, seed: int, signum: signal.Signals) -> None:
        """Get a signal at one to three random moments before the end."""
        draw, out = random.Random(f"{seed}/{number}"), self.place / f"moment-{number}"
        out.mkdir()
        left = draw.randint(1, 3)
        while left > 0:
            child = begin(self.args(out), self.said, lambda: None)
            time.sleep(draw.uniform(0, self.seconds))
            os.kill(child, signum)
            code = ended(child)
            self.ends[code] += 1
            left -= 1
            if code == 0:  # it was faster than the undisturbed run, and is not to be counted
                self.seconds *= 0.9
                left = max(left, 1)
                shutil.rmtree(out)
                out.mkdir()
            elif code not in (75, -signum):  # SIGTERM before the handler, or after it, ends at once
                self.wrong.append(f"moment {number}: it ended with {code}")
        self.check(f"moment {number}", out)

    def part(self, name: str, signum: signal.Signals) -> None:
        """Get a signal in a part of a run; once there are weights, it must leave a checkpoint of them."""
        label, out = f"{signum.name} in {name}", self.place / "part"
        before = 8 if name == "taking up" else -1
        for where in ("a later step", name) if before > 0 else (name,):
            prepare = functools.partial(_signal_in, *PARTS[where], signum)
            self.disturb(label, out, prepare, CODES[signum])
        if (kept(out) < 0) is not (name in ("reading the data", "encoding latents")):
            self.wrong.append(f"{label}: its newest checkpoint is at {kept(out)}")
        out.mkdir(exist_ok=True)
        self.check(label, out, before)

    def exact(self) -> None:
        """Stop after a step by SIGTERM, and go on in a process that is not a fork of this one."""
        out = self.place / "parts"
        prepare = functools.partial(_signal_in, PARTS["a later step"][0], STOP + 1, signal.SIGTERM)
        self.disturb("exact", out, prepare, CODES[signal.SIGTERM])
        if kept(out) != STOP * BATCH:
            self.wrong.append(f"exact: stopped at {kept(out)} images")
        command = [sys.executable, "-m", "sfumato", *self.args(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            self.wrong.append(f"exact: the new process ended with {done.returncode}: {done.stderr[-500:]}")
        self.check("exact", out, STEPS * BATCH)


def _count_to(tally: Path, out: Path) -> None:
    """Count operations in a file, for the count must outlive a fork; by calls that are not intercepted."""
    from sfumato.training.trainer import Trainer

    save, saving = Trainer.save, False

    def saved(trainer):
        nonlocal saving
        saving = kept(out) >= 0
        save(trainer)
        saving = False

    def act(what):
        descriptor = os.open(tally, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(descriptor, b"s" if saving else b".")
        os.close(descriptor)

    Trainer.save = saved
    intercept(act)


def _note(path: Path, number: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_TRUNC)
    os.write(descriptor, str(number).encode())
    os.close(descriptor)


def _signal_in(what: str, call: int, signum: signal.Signals) -> None:
    """Have this process sent a signal when something is called for the nth time."""
    module, _, path = what.partition(":")
    place, (*outer, name) = import_module(module), path.split(".")
    for part in outer:
        place = getattr(place, part)
    do, calls = getattr(place, name), 0

    def called(*args, **named):
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signum)
        return do(*args, **named)

    setattr(place, name, called)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    hows = ["exact", "signals", "kills", "terms", "boundaries", "full", "locked"]
    parser.add_argument("how", choices=hows)
    parser.add_argument("recipe")
    parser.add_argument(
        "--count", type=int, help="how many, chosen at random; all if not given, or 30 moments"
    )
    parser.add_argument("--whole", action="store_true", help="all operations of a run, not of a save alone")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    exact, latents, began = args.how == "exact", args.recipe == "latents", time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        more = ["--trainer.posthoc.sigma-rel", "0.05", "0.1", "--trainer.posthoc.every=16"]
        trial = Trial(args.recipe, Path(folder), CADENCE | EXACT if exact else CADENCE, more)
        parts = [name for name in PARTS if latents or "latents" not in name]
        every = {"exact": [0], "signals": [(p, s) for p in parts for s in CODES]}
        walk = [i for i, what in enumerate(trial.operations) if args.whole or what == "s"]
        numbers = every.get(args.how, range(30) if args.how in ("kills", "terms") else walk)
        if args.count is not None:
            numbers = random.Random(args.seed).sample(list(numbers), args.count)
        for number in numbers:
            if exact:
                trial.exact()
            elif args.how == "signals":
                trial.part(*number)
            elif args.how in ("kills", "terms"):
                trial.moment(number, args.seed, signal.SIGKILL if args.how == "kills" else signal.SIGTERM)
            else:
                errors = {"boundaries": None, "full": errno.ENOSPC, "locked": errno.EROFS}
                trial.boundary(number, errors[args.how])
    counts = {"operations": len(trial.operations), "tried": len(numbers), "ends": dict(trial.ends)}
    print(json.dumps(counts | {"seconds": round(time.monotonic() - began), "wrong": trial.wrong}))


if __name__ == "__main__":
    main()
