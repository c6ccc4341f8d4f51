"""What every test of the routes has."""

import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack

import pytest
from fake_upstream import FakeUpstream
from serving import Serve, Server, serving

from pyserve import _core


@pytest.fixture
async def upstream() -> AsyncIterator[FakeUpstream]:
    async with FakeUpstream() as fake:
        yield fake


@pytest.fixture(params=["pump", "python"])
def delivery_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """By whom a log's bytes are sent: a module that uses this runs twice."""
    if request.param == "python":
        monkeypatch.delattr(_core, "SocketPump", raising=False)
    elif not hasattr(_core, "SocketPump"):
        pytest.skip("there is no pump on this platform")
    return request.param


@pytest.fixture
async def serve(upstream: FakeUpstream) -> AsyncIterator[Serve]:
    """Starts a pyserve in front of the fake upstream, with settings of one's own."""
    async with AsyncExitStack() as stack:

        async def start(**settings: object) -> Server:
            return await stack.enter_async_context(serving(**{"upstream": upstream.url} | settings))

        yield start


@pytest.fixture
async def server(serve: Serve) -> Server:
    """pyserve in front of the fake upstream."""
    return await serve()


@pytest.fixture(autouse=True)
def _nothing_breaks(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Whatever a client or an upstream does, nothing is logged as an error, no traceback least."""
    yield
    broken = [
        record.getMessage()
        for record in caplog.get_records("call")
        if record.levelno >= logging.ERROR or record.exc_info
    ]
    assert not broken
