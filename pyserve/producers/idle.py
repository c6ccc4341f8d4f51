"""How long an upstream may be silent, at a price that each token can pay."""

from __future__ import annotations

import asyncio


class IdleWatch:
    """Expires `deadline` when one wait takes `timeout_s`.

    A timeout that is moved for every read costs as much as the read. Here a wait only notes when it
    began; a timer that was set some time ago looks at that, and is set again for when it could be
    due. close() it.
    """

    def __init__(self, deadline: asyncio.Timeout, timeout_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._deadline = deadline
        self._timeout_s = timeout_s
        self._waiting_since: float | None = None
        self._timer = self._loop.call_later(timeout_s, self._look)

    def begin_wait(self) -> None:
        """From now on time counts."""
        self._waiting_since = self._loop.time()

    def end_wait(self) -> None:
        """Until the next wait it doesn't."""
        self._waiting_since = None

    def _look(self) -> None:
        now = self._loop.time()
        due = self._timeout_s + (now if self._waiting_since is None else self._waiting_since)
        if due <= now:
            self._deadline.reschedule(now)
        else:
            self._timer = self._loop.call_at(due, self._look)

    def close(self) -> None:
        """Look no more."""
        self._timer.cancel()
