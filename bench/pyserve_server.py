"""pyserve as an application embeds it, with producers in the process or an upstream.

python pyserve_server.py [UPSTREAM_URL] [--uvloop]
"""

from __future__ import annotations

from events import DONE
from server_loop import Append, run, serve

import pyserve
from pyserve.routes.context import CONTEXT

#: Streams that clients may have started with a POST.
MOST_POSTED = 10_000


class Sessions:
    """pyserve's sessions as the producer sees them."""

    def __init__(self, manager: pyserve.StreamSessionManager) -> None:
        self._manager = manager
        self._sessions: list[pyserve.StreamSession] = []

    def create(self, count: int) -> list[Append]:
        self._sessions = [self._manager.create_or_replace(f"s{number}") for number in range(count)]
        return [session.append for session in self._sessions]

    def position(self) -> int:
        return self._sessions[0].total_size

    def end(self) -> None:
        for session in self._sessions:
            session.append(DONE)
            session.finalize()

    def drop(self) -> None:
        posted = self._manager.lookup(f"s{number}" for number in range(MOST_POSTED))
        for session in {*self._sessions, *posted}:
            self._manager.evict_and_cancel(session.conversation_id)
        self._sessions = []


async def main(upstream_url: str | None = None) -> None:
    # The bench's upstream knows one answer, a stream: it is not asked for its health.
    app = pyserve.create_app(pyserve.Config(upstream=upstream_url, health_interval_s=0))
    await serve(app, Sessions(app[CONTEXT].manager))


if __name__ == "__main__":
    run(main)
