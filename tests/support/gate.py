"""A gate between pyserve and llama.cpp: all passes as it is, but streams only as far as allowed.

So a test says how much of a real generation is there at which moment, however fast the model is.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from aiohttp import hdrs, web

_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "host", "content-length"}


class Gate:
    """What :func:`gate` yields."""

    def __init__(self, upstream_url: str) -> None:
        self.url = ""
        #: How many generations were asked for, refused ones included.
        self.generations = 0
        #: Answers for the next generations, instead of asking the upstream.
        self.refusals: deque[web.Response] = deque()
        #: By path: what to make of the upstream's JSON.
        self.rewrites: dict[str, Callable[[Any], Any]] = {}
        self._upstream_url = upstream_url
        self._allowed: float = float("inf")
        self._opened = asyncio.Condition()
        self._http: aiohttp.ClientSession

    def hold(self, after_events: int) -> None:
        """Let so many events of each stream pass."""
        self._allowed = after_events

    async def open(self, after_events: float = float("inf")) -> None:
        """Let more of them pass, or all."""
        async with self._opened:
            self._allowed = after_events
            self._opened.notify_all()

    async def pass_on(self, request: web.Request) -> web.StreamResponse:
        """One request, asked of the upstream with the same words."""
        if request.method == hdrs.METH_POST and request.path.endswith("/completions"):
            self.generations += 1
            if self.refusals:
                return self.refusals.popleft()
        async with self._http.request(
            request.method,
            self._upstream_url + request.raw_path,
            headers=_end_to_end(request.headers),
            data=await request.read(),
            allow_redirects=False,
        ) as answer:
            if request.path in self.rewrites:
                return web.json_response(self.rewrites[request.path](await answer.json()))
            response = web.StreamResponse(status=answer.status, headers=_end_to_end(answer.headers))
            await response.prepare(request)
            if answer.content_type == "text/event-stream":
                await self._pass_events(answer, response)
            else:
                await response.write(await answer.read())
            return response

    async def _pass_events(
        self, answer: aiohttp.ClientResponse, response: web.StreamResponse
    ) -> None:
        passed = 0
        event = b""
        async for line in answer.content:
            event += line
            if line != b"\n":
                continue
            async with self._opened:
                await self._opened.wait_for(lambda: passed < self._allowed)  # noqa: B023
            await response.write(event)
            passed, event = passed + 1, b""


def _end_to_end(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower() not in _HOP_BY_HOP}


@asynccontextmanager
async def gate(upstream_url: str) -> AsyncIterator[Gate]:
    """Listen on a free port for pyserve, in front of `upstream_url`."""
    app = web.Application(client_max_size=2**25)
    the_gate = Gate(upstream_url)
    app.router.add_route("*", "/{path:.*}", the_gate.pass_on)
    # Who leaves a stream that is held is noticed at once, and llama.cpp's slot is free.
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
    await runner.setup()
    async with aiohttp.ClientSession(
        auto_decompress=False,
        skip_auto_headers=[hdrs.ACCEPT_ENCODING, hdrs.USER_AGENT, hdrs.CONTENT_TYPE],
        connector=aiohttp.TCPConnector(force_close=True, limit=0),
        timeout=aiohttp.ClientTimeout(total=None),
    ) as the_gate._http:
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            the_gate.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            yield the_gate
        finally:
            await runner.cleanup()
