"""OpenAI's SDKs try again by themselves when an answer has not begun; what comes of that."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai
import pytest
from aiohttp import web
from cutting_proxy import Cut, CuttingProxy
from gate import Gate

if TYPE_CHECKING:
    from conftest import Generation

pytestmark = pytest.mark.asyncio(loop_scope="module")

NODE_SCRIPT = Path(__file__).parent / "ask" / "ask.mjs"

needs_node = pytest.mark.skipif(
    "CI" not in os.environ
    and not (shutil.which("node") and (NODE_SCRIPT.parents[1] / "node_modules").exists()),
    reason="needs Node and its packages: make test-python",
)

TOKENS = 50

BODY: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "bado kele"}],
    "max_tokens": TOKENS,
    "stream": True,
}

Headers = dict[str, str]
#: Returns the text so far, and the name of the error that the application gets.
Ask = Callable[[str, Headers], Awaitable[tuple[str, str | None]]]


async def ask_python(base_url: str, headers: Headers) -> tuple[str, str | None]:
    def ask() -> tuple[str, str | None]:
        text = ""
        try:
            with openai.OpenAI(base_url=base_url, api_key="unused") as client:
                for chunk in client.chat.completions.create(**BODY, extra_headers=headers):
                    text += chunk.choices[0].delta.content or ""
        except Exception as error:
            return text, type(error).__name__
        return text, None

    return await asyncio.to_thread(ask)


async def ask_async_python(base_url: str, headers: Headers) -> tuple[str, str | None]:
    text = ""
    try:
        async with openai.AsyncOpenAI(base_url=base_url, api_key="unused") as client:
            stream: Any = await client.chat.completions.create(**BODY, extra_headers=headers)
            async for chunk in stream:
                text += chunk.choices[0].delta.content or ""
    except Exception as error:
        return text, type(error).__name__
    return text, None


async def ask_node(base_url: str, headers: Headers) -> tuple[str, str | None]:
    process = await asyncio.create_subprocess_exec(
        *("node", NODE_SCRIPT, base_url, json.dumps(BODY), json.dumps(headers)),
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    told = json.loads(output)
    return told["text"], told["error"]


every_sdk = pytest.mark.parametrize(
    "ask",
    [
        pytest.param(ask_python, id="python"),
        pytest.param(ask_async_python, id="async python"),
        pytest.param(ask_node, id="node", marks=needs_node),
    ],
)


def headers_of(generation: Generation, key: str | None) -> Headers:
    # What header values may hold for these clients.
    generation.id = generation.id.encode("ascii", "ignore").decode().strip()
    named = {"X-Conversation-Id": generation.id}
    return named | ({"Idempotency-Key": key} if key else {})


def refusal(status: int, kind: str) -> web.Response:
    error = {"code": status, "type": kind, "message": "Not now"}
    return web.json_response({"error": error}, status=status)


@every_sdk
async def test_a_refusal_is_retried_and_leaves_the_key_free(
    ask: Ask, gated: Gate, wire: CuttingProxy, generation: Generation
) -> None:
    gated.refusals += [
        refusal(429, "rate_limit_error"),
        refusal(503, "unavailable_error"),
    ]
    answer = await ask(f"{wire.url}/v1", headers_of(generation, "a key"))
    assert answer == (await generation.text(), None)
    assert len(answer[0].split()) > TOKENS // 2
    assert gated.generations == 3


@every_sdk
async def test_an_answer_lost_before_it_began_is_not_generated_twice_with_a_key(
    ask: Ask, gated: Gate, wire: CuttingProxy, generation: Generation
) -> None:
    wire.cuts.append(Cut(after=b"HTTP/1.1 200"))
    answer = await ask(f"{wire.url}/v1", headers_of(generation, "a key"))
    assert answer == (await generation.text(), None)
    assert gated.generations == 1
    assert len(wire.requests) == 2


async def test_without_a_key_it_is_replaced_by_a_new_one(
    gated: Gate, wire: CuttingProxy, generation: Generation
) -> None:
    wire.cuts.append(Cut(after=b"HTTP/1.1 200"))
    answer = await ask_async_python(f"{wire.url}/v1", headers_of(generation, None))
    assert answer == (await generation.text(), None)
    assert gated.generations == 2


@every_sdk
async def test_an_answer_cut_in_the_middle_is_had_whole_by_asking_again_with_its_key(
    ask: Ask, gated: Gate, wire: CuttingProxy, generation: Generation
) -> None:
    wire.cuts.append(Cut(after=5000))
    headers = headers_of(generation, "a key")
    text, error = await ask(f"{wire.url}/v1", headers)
    assert error is not None
    again = await ask(f"{wire.url}/v1", headers)
    assert again == (await generation.text(), None)
    assert text
    assert again[0].startswith(text)
    assert again[0] != text
    assert gated.generations == 1
