"""Runs that are killed and taken up again, in processes of their own; prints counts and what went wrong.

    python tests/training/dying.py boundaries toy-dit           # SIGKILL before every operation on a file
    python tests/training/dying.py kills toy-dit --count 30     # SIGKILL at random moments
    python tests/training/dying.py terms toy-dit --count 10     # SIGTERM at random moments

Every run is resumed until it is finished and must then equal the undisturbed one bit for bit. Processes are
forked, so that the imports happen once.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

OPERATIONS = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync")


def intercept(patch: Callable[[object, str, object], None], act: Callable[[str], None]) -> None:
    """Call `act(what)` before every operation that changes files, and between two halves of a write.

    Args:
        patch: sets an attribute, such as MonkeyPatch.setattr.
    """
    from sfumato.checkpoints import native
    from sfumato.training import durable

    def before(name, do):
        def acted(*args, **named):
            act(name)
            return do(*args, **named)

        return acted

    for name in OPERATIONS:
        patch(os, name, before(name, getattr(os, name)))
    patch(native, "write_safetensors", before("weights", native.write_safetensors))
    opening, sending = io.open, durable.Sink.write

    def opened(file, mode="r", *args, **named):
        if mode[0] in "wax":
            act("open")
        return opening(file, mode, *args, **named)

    def halved(sink, data):
        half = len(data) // 2
        act("write")
        sending(sink, bytes(data[:half]))
        sink.flush()
        act("rest of a write")
        sending(sink, bytes(data[half:]))
        return len(data)

    patch(io, "open", opened)
    patch(durable.Sink, "write", halved)


def pictures(folder: Path) -> Path:
    """Eight captioned pictures of 16x16."""
    import torch

    from sfumato.core.png import save_png

    for i in range(8):
        image = torch.full((3, 16, 16), 255, dtype=torch.uint8)
        image[:, 2 : 5 + i, i : i + 4] = torch.tensor([30 * i, 90, 200], dtype=torch.uint8).view(3, 1, 1)
        save_png(folder / f"{i}.png", image)
        (folder / f"{i}.txt").write_text(f"bar {i}")
    return folder


def recipe(name: str, data: Path, out: Path, images: int) -> object:
    """A toy recipe that saves and shows often, and logs every step."""
    from sfumato.families import RECIPES

    toy = RECIPES[name]()
    cadence = {"log_every": 4, "preview_every": 8, "save_every": 8, "keep": 1}
    trainer = replace(toy.trainer, images=images, device="cpu", quiet=True, **cadence)
    return replace(toy, data=replace(toy.data, path=data), trainer=trainer, out=out)


def begin(what: object, act: Callable[[str], None] | None = None) -> int:
    """The process number of a child that runs a recipe: exit code 0, 75 when stopped, 2 after an error."""
    if (child := os.fork()) != 0:
        return child
    code = 2
    try:
        from sfumato.training.run import train
        from sfumato.training.signals import Stopped

        if act is not None:
            intercept(setattr, act)
        try:
            train(what)
            code = 0
        except Stopped:
            code = 75
        except Exception as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def ended(child: int) -> int:
    """Exit code of a child; that of a signal is negative."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def result(out: Path) -> dict[str, object]:
    """All that a run has come to, but for seconds and dates: names to bytes or numbers."""
    import torch

    from sfumato.training.state import Checkpoints

    state = Checkpoints(out / "checkpoints").load()
    assert state is not None
    del state["seconds"]
    found: dict[str, object] = {}

    def walk(value, name):
        if isinstance(value, dict | list):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                walk(item, f"{name}/{key}")
        else:
            found[name] = value.numpy().tobytes() if isinstance(value, torch.Tensor) else value

    walk(state, "")
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    found["log"] = [{k: v for k, v in row.items() if "second" not in k} for row in rows]
    for pattern in ("system/*.safetensors", "previews/*"):
        found |= {str(path.relative_to(out)): path.read_bytes() for path in out.glob(pattern)}
    return found


class Trial:
    """An undisturbed run, and what others must come to.

    Attributes:
        operations: on files, of the undisturbed run.
        seconds: that it took.
        died: processes that were ended by a signal.
        wrong: what went wrong, a line each.
    """

    def __init__(self, name: str, place: Path, images: int) -> None:
        self.make = lambda out: recipe(name, self.data, out, images)
        self.place, self.data = place, pictures(place / "data")
        tally = place / "operations"
        began = time.monotonic()
        assert ended(begin(self.make(place / "whole"), lambda what: _append(tally))) == 0
        self.seconds = time.monotonic() - began
        self.operations = tally.stat().st_size
        self.expected = result(place / "whole")
        self.died, self.wrong = 0, list[str]()

    def check(self, label: str, out: Path, *, clean: int = 0) -> None:
        """Finish the run in a folder, compare it, and remove it.

        Args:
            clean: exit code of a process before this one, or 0.
        """
        code = ended(begin(self.make(out)))
        if code != 0:
            self.wrong.append(f"{label}: the resumed run ended with {code}")
        elif (found := result(out)) != self.expected:
            keys = found.keys() | self.expected.keys()
            names = sorted(k for k in keys if found.get(k) != self.expected.get(k))
            self.wrong.append(f"{label}: {', '.join(names[:5])} differ")
        elif left := [p.name for p in (*out.glob(".*"), *out.glob("*/.*"))]:
            self.wrong.append(f"{label}: {', '.join(left)} left behind")
        if clean not in (0, 75, -signal.SIGKILL):
            self.wrong.append(f"{label}: it had ended with {clean}")
        shutil.rmtree(out)

    def boundary(self, number: int) -> None:
        """Die before one operation on a file, by its number."""
        seen = 0

        def act(what: str) -> None:
            nonlocal seen
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

        out = self.place / f"boundary-{number}"
        self.died += (code := ended(begin(self.make(out), act))) == -signal.SIGKILL
        self.check(f"boundary {number}", out, clean=code)

    def moment(self, number: int, seed: int, signum: signal.Signals) -> None:
        """Get a signal at up to three random moments."""
        draw, out = random.Random(f"{seed}/{number}"), self.place / f"moment-{number}"
        for _ in range(draw.randint(1, 3)):
            child = begin(self.make(out))
            time.sleep(draw.uniform(0, self.seconds))
            os.kill(child, signum)
            code = ended(child)
            self.died += code != 0
            if code not in (0, 75, -signum):  # SIGTERM before the handler, or after it, ends at once
                self.wrong.append(f"moment {number}: it ended with {code}")
        if not out.exists():
            out.mkdir()
        self.check(f"moment {number}", out)


def _append(tally: Path) -> None:
    """Count to a file, for the count must outlive a fork; by a call that is not intercepted."""
    descriptor = os.open(tally, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, b".")
    os.close(descriptor)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("how", choices=["boundaries", "kills", "terms"])
    parser.add_argument("recipe")
    parser.add_argument("--count", type=int, help="how many, chosen at random; all boundaries if not given")
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(args.recipe, Path(folder), args.images)
        if args.how == "boundaries":
            numbers = list(range(trial.operations))
            if args.count is not None:
                numbers = sorted(random.Random(args.seed).sample(numbers, args.count))
            for number in numbers:
                trial.boundary(number)
        else:
            numbers = list(range(10 if args.count is None else args.count))
            for number in numbers:
                signum = signal.SIGKILL if args.how == "kills" else signal.SIGTERM
                trial.moment(number, args.seed, signum)
    counts = {"operations": trial.operations, "tried": len(numbers), "died": trial.died}
    print(json.dumps(counts | {"wrong": trial.wrong}))


if __name__ == "__main__":
    main()
