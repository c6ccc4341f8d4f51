"""Real parts that many tests share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import aiohttp
import pytest
from llama import llama_server
from process import Server, pyserve
from tiny_gguf import write_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture(scope="session")
def llama(tiny_model: Path) -> Iterator[Server]:
    """One llama.cpp for all tests; each leaves its slots free."""
    with llama_server(tiny_model) as server:
        yield server


@pytest.fixture(scope="session")
def served_llama(llama: Server) -> Iterator[Server]:
    """pyserve with its defaults in front of llama.cpp."""
    with pyserve("--upstream", llama.url) as server:
        yield server


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """A client that never reuses a connection, so that closing an answer closes it."""
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(force_close=True), timeout=aiohttp.ClientTimeout(total=None)
    ) as session:
        yield session


@pytest.fixture
def tell(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Print a figure that people want to see although the test passes."""

    def print_uncaptured(line: str) -> None:
        with capsys.disabled():
            print(f"\n    {line}")

    return print_uncaptured
