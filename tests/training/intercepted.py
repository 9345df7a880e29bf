"""Operations on files, intercepted: what makes "at every file boundary" a matter of counting."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

OPERATIONS = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync")
NEED_SPACE = ("mkdir", "fsync", "open", "write", "rest of a write", "weights", "rest of weights")


class Halved(io.FileIO):
    """A file below Python's buffers, which writes in two halves and says so before each."""

    act: Callable[[str], None]

    def write(self, data) -> int:
        data = bytes(data)
        self.act("write")
        super().write(data[: len(data) // 2])
        self.act("rest of a write")
        super().write(data[len(data) // 2 :])
        return len(data)


def intercept(act: Callable[[str], None]) -> Callable[[], None]:
    """Call `act(what)` before every operation that changes files, and between two halves of each write.

    An error that it raises takes the operation's place. Safetensors files, which a library writes by itself,
    are cut to one half for the second call.

    Returns: ends it.
    """
    from sfumato.checkpoints import native

    opening, writing = io.open, native.write_safetensors
    undone = [(io, "open", opening), (native, "write_safetensors", writing)]

    def before(name, do):
        def acted(*args, **named):
            act(name)
            return do(*args, **named)

        return acted

    def opened(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None):
        if mode[0] not in "wax":
            return opening(file, mode, buffering, encoding, errors, newline)
        act("open")
        raw = Halved(file, mode.replace("b", ""))
        raw.act = act
        buffered = io.BufferedWriter(raw, buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

    def weights(path, *args):
        act("weights")
        writing(path, *args)
        whole = Path(path).read_bytes()
        os.truncate(path, len(whole) // 2)
        act("rest of weights")
        with opening(path, "wb") as file:
            file.write(whole)

    for name in OPERATIONS:
        undone.append((os, name, getattr(os, name)))
        setattr(os, name, before(name, getattr(os, name)))
    io.open, native.write_safetensors = opened, weights

    def end():
        for place, name, value in undone:
            setattr(place, name, value)

    return end
