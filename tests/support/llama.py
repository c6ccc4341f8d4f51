"""The real llama.cpp server with the tiny model, and what tests ask of it."""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
from process import Server, environment
from tiny_gguf import foreign_tokens

SLOTS = 4

#: What one slot holds; a generation of so many tokens takes seconds.
SLOT_CONTEXT_TOKENS = 8192
LONG = SLOT_CONTEXT_TOKENS - 256

# One look takes llama.cpp away from its tokens.
_SLOT_POLL_S = 0.002

_ids = itertools.count(1)


def llama_command(model: Path) -> list[str | Path]:
    """Starts llama.cpp on a free port: one thread, 4 slots."""
    return [
        *(sys.executable, "-m", "pyserve.producers.llama_child"),
        *("--model", model),
        *("--port", "0"),
        *("--threads", "1"),
        *("--parallel", str(SLOTS)),
        *("--ctx-size", str(SLOTS * SLOT_CONTEXT_TOKENS)),
    ]


@contextmanager
def llama_server(model: Path) -> Iterator[Server]:
    """It runs, and ends well."""
    with Server(llama_command(model), environment()) as server:
        yield server
        assert server.stop() == 0, server.output


def new_conversation() -> str:
    """A conversation id that no other test uses."""
    return f"conversation {next(_ids)} / 日本"


def chat(max_tokens: int, *, seed: int = 1, stream: bool = True) -> dict[str, Any]:
    """A chat request of exactly `max_tokens` tokens, many of which are not ASCII."""
    return {
        "messages": [{"role": "user", "content": "bado kele"}],
        "max_tokens": max_tokens,
        "seed": seed,
        "stream": stream,
        "logit_bias": [[token, 4] for token in foreign_tokens()],
    }


async def busy_slots(http: aiohttp.ClientSession, llama_url: str) -> int:
    """How many slots generate or read a prompt."""
    async with http.get(f"{llama_url}/slots") as answer:
        return sum(slot["is_processing"] for slot in await answer.json())


async def wait_busy_slots(http: aiohttp.ClientSession, llama_url: str, wanted: int) -> None:
    """Return when exactly `wanted` slots are busy."""
    async with asyncio.timeout(30):
        while await busy_slots(http, llama_url) != wanted:  # noqa: ASYNC110
            await asyncio.sleep(_SLOT_POLL_S)
