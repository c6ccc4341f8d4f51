"""The pump as it is, with a test looking over its shoulder."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from serving import until

from pyserve import _core


class PumpSpy:
    """What every pump that is made from now on was given."""

    def __init__(self) -> None:
        self.deliveries: list[_core.Delivery] = []
        #: Called right after each hand-over, before the handler hears of it.
        self.on_attached: Callable[[_core.Delivery], object] = lambda _delivery: None

    @property
    def outcomes(self) -> list[str]:
        """How the deliveries stand, in the order of their hand-over."""
        return [delivery.outcome for delivery in self.deliveries]

    async def attached(self, count: int = 1) -> _core.Delivery:
        """The delivery with this number, counted from 1, waited for."""
        await until(lambda: len(self.deliveries) >= count)
        return self.deliveries[count - 1]


def spy_on_pump(monkeypatch: pytest.MonkeyPatch) -> PumpSpy:
    """Watch all hand-overs until the end of the test."""
    spy = PumpSpy()

    class SpiedPump(_core.SocketPump):
        def attach(
            self,
            session: _core.StreamSession,
            offset: int,
            socket: int,
            done: _core.Wakeup,
            token: int,
        ) -> _core.Delivery:
            delivery = super().attach(session, offset, socket, done, token)
            spy.deliveries.append(delivery)
            spy.on_attached(delivery)
            return delivery

    monkeypatch.setattr(_core, "SocketPump", SpiedPump)
    return spy


async def until_blocked(delivery: _core.Delivery) -> None:
    """Wait until the client's and the kernel's buffers are full."""
    looks: list[int] = []

    def is_steady() -> bool:
        looks.append(delivery.sent_bytes)
        return looks[-1] > 0 and len(looks) > 25 and looks[-25:] == [looks[-1]] * 25

    await until(is_steady)


def wait_until_over(delivery: _core.Delivery) -> None:
    """Hold this thread, the event loop's, until the pump is done."""
    while delivery.outcome == "running":
        os.sched_yield()


def refuse_hand_overs(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on no pump gets a descriptor of its own."""

    class RefusingPump(_core.SocketPump):
        def attach(self, *_args: object) -> _core.Delivery:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(_core, "SocketPump", RefusingPump)


def pump_threads() -> int:
    """How many pumps run in this process."""
    names = []
    for task in Path("/proc/self/task").iterdir():
        try:
            names.append((task / "comm").read_text().strip())
        except FileNotFoundError:  # it has just ended
            continue
    return names.count("pyserve-pump")


def open_descriptors() -> dict[str, str]:
    """This process's descriptors and what they are."""
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found[entry.name] = str(entry.readlink())
        except FileNotFoundError:  # the listing's own
            continue
    return found
