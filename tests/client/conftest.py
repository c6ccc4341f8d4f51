"""A pyserve in this process, a proxy in front of it that cuts, and a client that is impatient."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from cutting_proxy import CuttingProxy, cutting_proxy
from fake_upstream import FakeUpstream
from serving import Server, serving

from pyserve.client import Client

MakeClient = Callable[..., Client]

#: Short times: a test should not wait for what it has arranged itself.
IMPATIENT: dict[str, Any] = {
    "first_delay_s": 0.01,
    "max_delay_s": 0.05,
    "give_up_after_s": 5.0,
    "stall_timeout_s": 5.0,
}


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    """Sessions are made through its manager; heartbeats come fast."""
    async with serving(heartbeat_interval_s=0.05) as running:
        yield running


@pytest.fixture
async def upstream() -> AsyncIterator[FakeUpstream]:
    async with FakeUpstream() as scripted:
        yield scripted


@pytest.fixture
async def generating(upstream: FakeUpstream) -> AsyncIterator[Server]:
    """A server in front of `upstream`."""
    async with serving(heartbeat_interval_s=0.05, upstream=upstream.url) as running:
        yield running


@pytest.fixture
async def proxy(server: Server) -> AsyncIterator[CuttingProxy]:
    async with cutting_proxy(server.runner.addresses[0][:2]) as cutting:
        yield cutting


@pytest.fixture
async def make_client() -> AsyncIterator[MakeClient]:
    """``make_client(url, ...)``; closed at the end of the test."""
    async with AsyncExitStack() as stack:
        clients = []

        def make(url: str, **changes: Any) -> Client:
            clients.append(Client(url, **(IMPATIENT | changes)))
            return clients[-1]

        yield make
        for client in clients:
            stack.push_async_callback(client.close)


@pytest.fixture
def client(proxy: CuttingProxy, make_client: MakeClient) -> Client:
    """Of `server`, through `proxy`."""
    return make_client(proxy.url)
