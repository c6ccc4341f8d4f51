"""Real llama.cpp behind a gate, pyserve in front of it, and a wire to pyserve that can be cut."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Literal

import aiohttp
import pytest
import pytest_asyncio
from cutting_proxy import CuttingProxy, cutting_proxy
from gate import Gate, gate
from llama import chat, new_conversation
from process import Server, pyserve
from serving import Event, events_of
from yarl import URL

TOKENS = 100


def fixture(scope: Literal["module", "function"]) -> Any:
    """In the one loop of a test file, whose tests are marked for it: so they share a server."""
    return pytest_asyncio.fixture(scope=scope, loop_scope="module")


@fixture(scope="module")
async def module_gate(llama: Server) -> AsyncIterator[Gate]:
    async with gate(llama.url) as the_gate:
        yield the_gate


@fixture(scope="module")
async def server(module_gate: Gate) -> AsyncIterator[Server]:
    """pyserve in front of the gate."""
    options = ("--ui", "upstream", "--drain-timeout", "0")
    with pyserve("--upstream", module_gate.url, *options) as served:
        yield served


@fixture(scope="function")
async def gated(module_gate: Gate) -> AsyncIterator[Gate]:
    """The gate, wide open, which it is left as."""
    module_gate.generations = 0
    yield module_gate
    module_gate.refusals.clear()
    module_gate.rewrites.clear()
    await module_gate.open()


@fixture(scope="function")
async def wire(server: Server) -> AsyncIterator[CuttingProxy]:
    """Between pyserve and a client."""
    url = URL(server.url)
    assert url.host is not None
    assert url.port is not None
    async with cutting_proxy((url.host, url.port)) as proxy:
        yield proxy


@fixture(scope="function")
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(force_close=True), timeout=aiohttp.ClientTimeout(total=None)
    ) as session:
        yield session


@dataclass
class Generation:
    """One conversation, and its answer in the making."""

    http: aiohttp.ClientSession
    server_url: str
    id: str

    def path(self) -> str:
        """Where it can be read."""
        return str(URL("/v1/stream").with_query(conv_id=self.id))

    async def start(self) -> None:
        """Ask for it and leave."""
        async with self.http.post(
            f"{self.server_url}/v1/chat/completions",
            json=chat(TOKENS),
            headers={"X-Conversation-Id": self.id},
        ) as answer:
            assert answer.status == 200

    async def log(self) -> bytes:
        """All of it, as soon as it is over."""
        async with self.http.get(self.server_url + self.path()) as answer:
            return await answer.read()

    async def events(self) -> list[Event]:
        """Its events, as soon as it is over."""
        return events_of(await self.log())

    async def text(self) -> str:
        """Its text, as soon as it is over."""
        chunks = [json.loads(e.data) for e in await self.events() if e.data != "[DONE]"]
        return "".join(each["choices"][0]["delta"].get("content") or "" for each in chunks)


@pytest.fixture
def generation(server: Server, http: aiohttp.ClientSession) -> Generation:
    return Generation(http, server.url, new_conversation())
