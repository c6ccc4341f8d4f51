"""Whether an upstream can be given work, from looking at it again and again.

::

    unknown ──► well ◄──► ill          what a look at it found
                 └──► suspect          a connection was lost: the next look, at once, decides
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Literal

from pyserve.producers.upstream import Upstream

log = logging.getLogger("pyserve")

HealthState = Literal["unknown", "well", "suspect", "ill"]

# Who waits for an upstream to come back waits no longer than this for it to be noticed.
_LONGEST_ILL_INTERVAL_S = 1.0


class Health:
    """What is known of one upstream."""

    def __init__(
        self, name: str, upstream: Upstream, interval_s: float, on_change: Callable[[], None]
    ) -> None:
        """`interval_s` 0: nobody looks, and it counts as well."""
        self._name = name
        self._upstream = upstream
        self._interval_s = interval_s
        self._on_change = on_change
        self._look_again = asyncio.Event()
        self.state: HealthState = "unknown" if interval_s else "well"
        #: Why it is ill: a reason of errors.REASONS.
        self.ailment: str | None = None
        self.was_well = not interval_s
        #: What llama.cpp tells when it becomes well.
        self.total_slots: int | None = None

    @property
    def is_polled(self) -> bool:
        """Whether the state is more than a guess."""
        return self._interval_s > 0

    def suspect(self) -> None:
        """A connection failed. Nothing is sent there until a look, which is due now."""
        if self.is_polled and self.state == "well":
            self._set("suspect")
            self._look_again.set()

    async def look(self) -> bool:
        """Ask it; whether it is well."""
        ailment = await self._upstream.ask_health()
        if not self.is_polled:
            return ailment is None
        if ailment is not None:
            self.ailment = ailment.reason
            self._set("ill")
            return False
        if self.state != "well":
            # It may be another process, with other slots.
            self.total_slots = await self._upstream.read_total_slots()
            self.ailment = None
            self._set("well")
        return True

    def _set(self, state: HealthState) -> None:
        if state == self.state:
            return
        if state == "ill":
            log.warning("%s is not healthy: %s", self._name, self.ailment)
        elif state == "well" and self.was_well:
            log.info("%s is healthy again", self._name)
        self.state = state
        self.was_well = self.was_well or state == "well"
        self._on_change()

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            self._look_again.clear()
            await self.look()
            interval_s = self._interval_s
            if self.state == "ill":
                interval_s = min(interval_s, _LONGEST_ILL_INTERVAL_S)
            try:
                async with asyncio.timeout(interval_s):
                    await self._look_again.wait()
            except TimeoutError:
                pass
