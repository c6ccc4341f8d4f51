"""Two owners at one server: a heavy one asks for everything at once, a light one now and then."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp
import numpy as np
from fairness_server import OWNER_HEADER
from metrics import Run
from points import Point
from processes import PATIENCE_S, BenchError, Contestant

LIGHT_TOKENS = 16

_COMPLETIONS = "/v1/chat/completions"
_TOKEN = b'"content":"'
_DONE = b"data: [DONE]"


@dataclass(frozen=True)
class Generation:
    """In seconds since the heavy owner came."""

    asked_s: float
    first_token_s: float
    done_s: float

    @property
    def waited_ms(self) -> float:
        """For its first token."""
        return 1000 * (self.first_token_s - self.asked_s)


class Owners:
    """Both of them, from the moment when the heavy one comes."""

    def __init__(self, http: aiohttp.ClientSession) -> None:
        self._http = http
        self._began = time.perf_counter()

    async def ask(self, point: Point) -> Run:
        """All generations of one run. The light owner comes while the heavy one has any left."""
        async with asyncio.TaskGroup() as group:
            heavy = [
                group.create_task(self._generate(f"heavy-{number}", "heavy", point.events))
                for number in range(point.readers)
            ]
            light: list[asyncio.Task[Generation]] = []
            while not light or not all(task.done() for task in heavy):
                await asyncio.sleep((len(light) + 1) / point.rate - self._now())
                work = self._generate(f"light-{len(light)}", "light", LIGHT_TOKENS)
                light.append(group.create_task(work))
        return _told([task.result() for task in light], [task.result() for task in heavy])

    def _now(self) -> float:
        return time.perf_counter() - self._began

    async def _generate(self, name: str, owner: str, tokens: int) -> Generation:
        body = {
            "messages": [{"role": "user", "content": "bado kele"}],
            "max_tokens": tokens,
            "stream": True,
            "seed": 1,
        }
        headers = {OWNER_HEADER: owner, "X-Conversation-Id": name}
        arrived_s: list[float] = []
        last = b""
        asked_s = self._now()
        async with self._http.post(_COMPLETIONS, json=body, headers=headers) as answer:
            async for line in answer.content:
                if _TOKEN in line:
                    arrived_s.append(self._now())
                elif line.startswith(b"data:"):
                    last = line
        if answer.status != 200 or len(arrived_s) != tokens or not last.startswith(_DONE):
            raise BenchError(f"{name}: {answer.status}, {len(arrived_s)} of {tokens} tokens")
        return Generation(asked_s, arrived_s[0], self._now())


def run_once(server: Contestant, point: Point) -> Run:
    """One run of both owners.

    Raises:
        BenchError: one of them did not get all of its tokens.
    """
    return asyncio.run(_run(f"http://127.0.0.1:{server.port}", point))


async def _run(url: str, point: Point) -> Run:
    # Each generation has a connection: an idle one would keep a thread of llama.cpp's from others.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as http:
        try:
            return await Owners(http).ask(point)
        except* (BenchError, aiohttp.ClientError, TimeoutError) as failed:
            raise BenchError(f"the owners' client: {failed.exceptions[0]!r}") from failed


def _told(light: Sequence[Generation], heavy: Sequence[Generation]) -> Run:
    return {
        "light_first_token_ms": _quantiles(light),
        "heavy_first_token_ms": _quantiles(heavy),
        "seconds": max(each.done_s for each in heavy),
        "light": [[each.asked_s, each.waited_ms] for each in light],
    }


def _quantiles(generations: Sequence[Generation]) -> dict[str, float]:
    waited_ms = [each.waited_ms for each in generations]
    shares = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {name: float(np.quantile(waited_ms, share)) for name, share in shares.items()}
