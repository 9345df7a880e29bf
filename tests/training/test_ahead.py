"""Batches that are read ahead are those that would be read, and nothing of the reading outlives the run."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch

from sfumato.training.ahead import ReadAhead, batches_ahead
from sfumato.training.batches import Batch, DataConfig, PictureBatches, on_device, open_folder, order_of
from sfumato.training.signals import Stop, Stopped

CPU = torch.device("cpu")
SOON = 30  # seconds in which a thread must have done its work, on a busy machine too


def readers() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("sfumato-reader")]


def numbered(images: int) -> Batch:
    return Batch(text=(str(images),) * 4, index=torch.arange(images, images + 4))


class Recorded:
    """Batches that remember which were read, and wait for leave to read one."""

    def __init__(self, broken=()) -> None:
        self.read, self.broken = [], broken
        self.begun = {position: threading.Event() for position in range(0, 64, 4)}
        self.leave = threading.Event()
        self.leave.set()

    def __call__(self, images: int) -> Batch:
        self.begun[images].set()
        assert self.leave.wait(SOON)
        self.read.append(images)
        if images in self.broken:
            raise ValueError(f"the batch at {images} is damaged")
        return numbered(images)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_same_batches(pictures, count):
    config = DataConfig(path=pictures, size=16, flip=True, shift=3)

    def batches() -> PictureBatches:
        folder = open_folder(config)
        return PictureBatches(folder, order_of(folder, config, 0, 5), 5, CPU)

    plain = batches()
    with ReadAhead(batches(), count, step=5, end=50) as ahead:
        for images in range(0, 50, 5):
            one, other = plain(images), ahead(images)
            assert torch.equal(one.images, other.images)
            assert one.images.stride() == other.images.stride()
            assert one.text == other.text


def test_batches_are_read_before_they_are_asked_for_but_no_more_than_that():
    recorded = Recorded()
    with ReadAhead(recorded, 2, step=4, end=64) as ahead:
        assert ahead(0).text[0] == "0"
        assert recorded.begun[8].wait(SOON)
        assert not recorded.begun[12].is_set()
        assert readers()
    assert recorded.read == [0, 4, 8]
    assert readers() == []


def test_nothing_is_read_beyond_the_end_of_the_run():
    recorded = Recorded()
    with ReadAhead(recorded, 3, step=4, end=6) as ahead:
        assert [ahead(0).text[0], ahead(4).text[0]] == ["0", "4"]
    assert recorded.read == [0, 4]


def test_an_error_is_raised_at_its_own_step_and_whenever_that_is_asked_for():
    with ReadAhead(Recorded(broken=(8,)), 3, step=4, end=64) as ahead:
        assert [ahead(0).text[0], ahead(4).text[0]] == ["0", "4"]
        for _ in range(2):
            with pytest.raises(ValueError, match="the batch at 8 is damaged"):
                ahead(8)
    assert readers() == []


def test_the_run_may_go_back():
    with ReadAhead(Recorded(), 2, step=4, end=64) as ahead:
        assert [ahead(at).text[0] for at in (0, 4, 8, 4, 8, 40)] == ["0", "4", "8", "4", "8", "40"]


def test_the_thread_ends_when_the_run_fails():
    def fail() -> None:
        with ReadAhead(Recorded(), 1, step=4, end=64) as ahead:
            ahead(0)
            assert readers()
            raise RuntimeError("the step failed")

    with pytest.raises(RuntimeError, match="the step failed"):
        fail()
    assert readers() == []


def test_a_signal_interrupts_the_waiting_for_a_batch():
    recorded = Recorded()
    recorded.leave.clear()

    def interrupt() -> None:
        assert recorded.begun[0].wait(SOON)
        os.kill(os.getpid(), signal.SIGTERM)

    killer = threading.Thread(target=interrupt)
    with Stop() as stop, ReadAhead(recorded, 1, step=4, end=64) as ahead:
        killer.start()
        with pytest.raises(Stopped), stop.interruptible():
            ahead(0)
        recorded.leave.set()
        assert ahead(0).text[0] == "0"
    killer.join()
    assert readers() == []


def test_how_many_unless_the_settings_say():
    assert batches_ahead(None, CPU) == 0
    assert batches_ahead(None, torch.device("cuda")) == 2
    assert [batches_ahead(n, CPU) for n in (0, 3)] == [0, 3]
    with pytest.raises(ValueError, match=r"data\.ahead is -1; it must be 0 batches or more"):
        DataConfig(ahead=-1)


def test_copies_to_cuda_are_made_from_pinned_memory_and_not_waited_for(monkeypatch):
    asked = []
    rows = torch.zeros(2, 3)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: asked.append("pinned") or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, **how: asked.append((device, how)) or self)
    on_device(rows, torch.device("cuda"))
    on_device(rows, CPU)
    assert asked == [
        "pinned",
        (torch.device("cuda"), {"non_blocking": True}),
        (CPU, {"non_blocking": False}),
    ]
