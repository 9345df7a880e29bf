"""Stopping a run from outside: SIGTERM and Ctrl-C become one exception, raised where nothing can be lost."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

from sfumato.core.world import World

__all__ = ["Stop", "Stopped"]

LOGGER = logging.getLogger(__name__)
SIGNALS = (signal.SIGTERM, signal.SIGINT)
Handler = Callable[[int, FrameType | None], object] | int | None


class Stopped(BaseException):
    """A signal asked for the end, and everything is saved; like KeyboardInterrupt no error.

    Attributes:
        signum: the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class Stop:
    """Receives SIGTERM and SIGINT while it is open as a context manager.

    The first signal is remembered; `check` raises it, and so does the signal itself inside `interruptible`.
    The second one stops at once: SIGINT with KeyboardInterrupt, SIGTERM by ending the process. What a signal
    would have done before is restored at the end; a signal that was ignored stays ignored. Outside the main
    thread, where Python receives no signals, nothing is changed.

    All of the run asks here, and nowhere else, whether it is to stop.

    Attributes:
        alone: whether this process may stop for itself; else all must agree first, see `agree`.
    """

    def __init__(self) -> None:
        self.alone = True
        self.signum: int | None = None
        self._raising = False
        self._before: dict[signal.Signals, Handler] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if (handler := signal.getsignal(number)) is not signal.SIG_IGN:
                    self._before[number] = handler
                    signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def check(self) -> None:
        """Raise Stopped if a signal came, unless others have to be asked."""
        if self.signum is not None and self.alone:
            raise Stopped(self.signum)

    def agree(self, world: World) -> None:
        """Raise Stopped on all processes if a signal came to one of them; all must call."""
        if signum := world.most(self.signum or 0):
            raise Stopped(signum)

    def interruptible(self) -> Interruptible:
        """A context in which a signal raises Stopped at once; for work that may be dropped half-way."""
        return Interruptible(self)

    def open(self, raising: bool) -> None:
        """Begin or end a part in which a signal raises Stopped at once."""
        self._raising = raising
        if raising:
            self.check()

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        if signal.SIGTERM in self._before:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if signal.SIGINT in self._before:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        LOGGER.info(
            "%s: stopping as soon as all is saved; once more to stop at once", signal.Signals(signum).name
        )
        if self._raising and self.alone:
            raise Stopped(signum)


class Interruptible:
    """See Stop.interruptible; a class, for the exception it lets through would close a generator."""

    def __init__(self, stop: Stop) -> None:
        self._stop = stop

    def __enter__(self) -> None:
        self._stop.open(True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.open(False)
