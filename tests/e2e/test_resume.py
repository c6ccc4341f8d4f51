"""Generations of a real llama.cpp, cut anywhere and resumed in every way, byte for byte."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest
from expected_log import expected_log
from llama import SLOTS, chat, new_conversation
from process import Server, pyserve
from tap import Tap, tap
from yarl import URL

SOAK = bool(os.environ.get("PYSERVE_SOAK"))

TOKENS = 300

# Three pieces of at most so much leave something for the last one: 300 events of 290 bytes.
LARGEST_PIECE_BYTES = 25_000

LOSSES = (aiohttp.ClientPayloadError, aiohttp.ClientConnectionError)

pytestmark = [pytest.mark.timeout(600 if SOAK else 60)]


def sha256(log: bytes) -> str:
    return hashlib.sha256(log).hexdigest()


class Client:
    """Somebody who reads one stream over several connections, each cut by himself."""

    def __init__(self, http: aiohttp.ClientSession, server_url: str, rng: random.Random) -> None:
        self.http = http
        self.rng = rng
        self.conversation_id = new_conversation()
        self.epoch = ""
        self.start = 0  #: the offset of ...
        self.received = b""  #: ... what came without a gap
        self._post_url = f"{server_url}/v1/chat/completions"
        path = quote(self.conversation_id, safe="")
        self.url = URL(f"{server_url}/v1/stream/{path}", encoded=True)

    @property
    def offset(self) -> int:
        """Where he goes on."""
        return self.start + len(self.received)

    def piece_bytes(self) -> int:
        """How much of it to read before the next cut: often little, seldom much."""
        return int(LARGEST_PIECE_BYTES ** self.rng.uniform(0, 1))

    @asynccontextmanager
    async def post(self, seed: int) -> AsyncIterator[aiohttp.ClientResponse]:
        headers = {"X-Conversation-Id": self.conversation_id}
        body = chat(TOKENS, seed=seed)
        async with self.http.post(self._post_url, json=body, headers=headers) as answer:
            assert answer.status == 200
            self.epoch = answer.headers["X-Stream-Epoch"]
            self.start = int(answer.headers["X-Stream-Offset"])
            yield answer

    @asynccontextmanager
    async def resume(self, way: str) -> AsyncIterator[aiohttp.ClientResponse]:
        """Go on by ``offset``, ``id`` or ``header``. Who counts events forgets half of one."""
        params, headers = {"from": str(self.offset)}, {}
        if way != "offset":
            event_id = self._forget_half_event()
            params = {"from": event_id}
            if way == "header":
                params, headers = {"from": "0"}, {"Last-Event-ID": event_id}
        async with self.http.get(self.url.with_query(params), headers=headers) as answer:
            assert answer.status in (200, 400)
            if answer.status == 200:
                assert answer.headers["X-Stream-Offset"] == str(self.offset)
                assert answer.headers["X-Stream-Epoch"] == self.epoch
            yield answer

    def _forget_half_event(self) -> str:
        """Keep whole events only; returns the id of the last one, or of where he began."""
        whole, blank_line, _ = self.received.rpartition(b"\n\n")
        self.received = whole + blank_line
        here = f"{self.epoch}-{self.offset}"
        if whole:
            assert whole.endswith(f"\nid: {here}".encode())
        return here

    async def read_piece(self, answer: aiohttp.ClientResponse) -> None:
        """Take some bytes and cut the connection, every second time inside a character."""
        await self._take(answer, self.piece_bytes())
        if self.rng.random() < 0.5:
            while not answer.content.at_eof() and self.received[-1:] < b"\xc0":
                await self._take(answer, 1)
        answer.close()

    async def _take(self, answer: aiohttp.ClientResponse, count: int) -> None:
        try:
            self.received += await answer.content.readexactly(count)
        except asyncio.IncompleteReadError as over:
            self.received += over.partial

    async def look_up(self) -> dict[str, Any]:
        url = self.url.with_path("/v1/streams/lookup")
        async with self.http.post(url, json={"conversation_ids": [self.conversation_id]}) as answer:
            (found,) = await answer.json()
            return found


async def run_many(count: int, one: Callable[[int], Awaitable[None]]) -> None:
    """Run `one` for each number below `count`, as many at once as llama.cpp has slots."""
    slots = asyncio.Semaphore(SLOTS)

    async def wait_and_run(number: int) -> None:
        async with slots:
            await one(number)

    async with asyncio.TaskGroup() as group:
        for number in range(count):
            group.create_task(wait_and_run(number))


async def test_three_cuts_and_three_ways_to_resume_give_the_whole_log(
    served_llama: Server, http: aiohttp.ClientSession, tell: Callable[[str], None]
) -> None:
    count = 200 if SOAK else 12
    figures: Counter[str] = Counter()

    async def cut_and_resume(number: int) -> None:
        client = Client(http, served_llama.url, random.Random(number))
        async with client.post(number) as answer:
            await client.read_piece(answer)
        ways = ["offset", "id", "header"]
        client.rng.shuffle(ways)
        for way in ways:
            async with client.resume(way) as answer:
                figures["resumed live"] += not (await client.look_up())["is_done"]
                if way is ways[-1]:
                    client.received += await answer.read()
                else:
                    await client.read_piece(answer)
                    figures["cut inside a character"] += client.received[-1] >= 0xC0

        async with http.get(client.url) as answer:
            whole = await answer.read()
        assert sha256(client.received) == sha256(whole)
        assert whole.count(b'"delta":{"content":"') == TOKENS
        assert b"\ndata: [DONE]\n" in whole
        assert whole.endswith(b"\n\n: end completed\n")
        figures["exact"] += 1
        figures["bytes"] += len(whole)

    await run_many(count, cut_and_resume)
    tell(f"{count} generations, three cuts each: {dict(figures)}")
    assert figures["exact"] == count
    assert figures["resumed live"]
    assert figures["cut inside a character"]


class LossyClient(Client):
    """One whose log drops its prefix: he keeps all runs he got, and knows when he lost some."""

    def __init__(self, http: aiohttp.ClientSession, server_url: str, rng: random.Random) -> None:
        super().__init__(http, server_url, rng)
        self.runs: list[tuple[int, bytes]] = []
        self.figures: Counter[str] = Counter()

    async def read_until(self, answer: aiohttp.ClientResponse, *, end: bool) -> bool:
        """Read a piece or to the `end`; False if the connection was reset."""
        try:
            if end:
                async for block in answer.content.iter_any():
                    self.received += block
            else:
                await self.read_piece(answer)
        except LOSSES:
            self.figures["reset"] += 1
            return False
        return True

    async def stay_away(self, missed_bytes: float) -> None:
        """Return when so much has come that he hasn't read, or all."""
        while True:
            found = await self.look_up()
            if found["is_done"] or found["total_bytes"] >= self.offset + missed_bytes:
                return
            await asyncio.sleep(0.002)

    async def read_or_start_over(self, answer: aiohttp.ClientResponse, *, end: bool) -> bool:
        """Read from where he is, after a loss from the earliest; False if he was reset."""
        if answer.status == 200:
            self.figures["exact"] += 1
            return await self.read_until(answer, end=end)
        error = (await answer.json())["error"]
        assert error["reason"] == "offset_lost"
        assert error["first_offset"] > self.offset
        assert error["epoch"] == self.epoch
        self.figures["lost"] += 1
        self.runs.append((self.start, self.received))
        async with self.http.get(self.url.with_query({"from": "earliest"})) as answer:
            assert answer.status == 200
            self.start, self.received = int(answer.headers["X-Stream-Offset"]), b""
            return await self.read_until(answer, end=end)

    def check(self, log: bytes) -> None:
        """All runs are the log's bytes, and each begins where an event does."""
        self.runs.append((self.start, self.received))
        assert self.offset == len(log)
        for start, run in self.runs:
            assert start == 0 or log[:start].endswith(b"\n\n")
            assert sha256(run) == sha256(log[start : start + len(run)])


# Paced, a reader who is there keeps up. At llama.cpp's full speed even he is reset.
@pytest.mark.parametrize(
    ("cap_bytes", "pause_s"), [(4096, 0), (4096, 0.001), (8192, 0.001), (16384, 0.001)]
)
async def test_a_log_that_drops_its_prefix_answers_exactly_or_tells_the_loss(
    llama: Server,
    http: aiohttp.ClientSession,
    tell: Callable[[str], None],
    cap_bytes: int,
    pause_s: float,
) -> None:
    count = 50 if SOAK else 4
    figures: Counter[str] = Counter()

    async def cut_and_resume(server: Server, wire: Tap, seed: int) -> None:
        rng = random.Random(seed)
        client = LossyClient(http, server.url, rng)
        async with client.post(seed) as answer:
            client.figures["begun late"] += client.start > 0
            await client.read_or_start_over(answer, end=False)
        for way in rng.sample(["offset", "id", "header"], 3):
            await client.stay_away(rng.uniform(0, 2 * cap_bytes))
            async with client.resume(way) as answer:
                await client.read_or_start_over(answer, end=False)
        over = False
        while not over:
            async with client.resume("offset") as answer:
                over = await client.read_or_start_over(answer, end=True)

        connection = wire.find(f'"seed": {seed},')
        await connection.client_left_at
        events = connection.answer_body().removesuffix(b"\n\n").split(b"\n\n")
        client.check(expected_log((event + b"\n" for event in events), client.epoch))
        figures.update(client.figures)

    async with tap(llama.url, pause_s=pause_s) as wire:
        limits = ("--max-session-bytes", str(cap_bytes), "--heartbeat-interval", "60")
        with pyserve("--upstream", wire.url, *limits) as server:
            await run_many(count, lambda i: cut_and_resume(server, wire, cap_bytes + i))
    tell(f"cap {cap_bytes}, pause {pause_s} s: {dict(figures)}")
    assert figures["lost"]
    assert figures["exact"] > count or not pause_s  # more than the POSTs
