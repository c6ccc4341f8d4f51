"""OpenAI's own clients through pyserve: they notice neither it nor a silence."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from aiohttp import web
from process import Server, pyserve

TOKENS = 50

SILENCE_S = 5.0

NODE_SCRIPT = Path(__file__).parent / "node" / "ask.mjs"

needs_node = pytest.mark.skipif(
    "CI" not in os.environ
    and not (shutil.which("node") and (NODE_SCRIPT.parent / "node_modules").exists()),
    reason="needs Node and its packages: make test-python",
)


@dataclass
class Answer:
    """What an application gets."""

    text: str
    chunks: int


Question = dict[str, Any]
Ask = Callable[[str, Question], Awaitable[Answer]]

QUESTIONS: dict[str, Question] = {
    "chat": {"route": "chat", "max_tokens": TOKENS},
    "completions": {"route": "completions", "max_tokens": TOKENS},
    "responses": {"route": "responses", "max_output_tokens": TOKENS},
}


def complete(question: Question) -> Question:
    """With what its route needs besides."""
    prompts: dict[str, Any] = {
        "chat": {"messages": [{"role": "user", "content": "bado kele"}]},
        "completions": {"prompt": "bado kele"},
        "responses": {"input": "bado kele"},
    }
    return {"model": "tiny", "stream": True} | prompts[question["route"]] | question


def python_call(client: openai.OpenAI | openai.AsyncOpenAI, question: Question) -> Any:
    """Call the SDK; with the asynchronous client what comes back must be awaited."""
    body = dict(question)
    routes = {
        "chat": client.chat.completions,
        "completions": client.completions,
        "responses": client.responses,
    }
    create = routes[body.pop("route")].create
    conversation_id = body.pop("conversation_id", None)
    headers = {"X-Conversation-Id": conversation_id} if conversation_id else {}
    return create(**body, extra_headers=headers)


def piece_of(route: str, part: Any) -> str:
    """The piece of text in a chunk of a stream or in a whole answer."""
    if route == "completions":
        return part.choices[0].text
    if route == "responses":
        whole = getattr(part, "output_text", None)
        return whole or (part.delta if part.type == "response.output_text.delta" else "")
    choice = part.choices[0]
    return (choice.delta if hasattr(choice, "delta") else choice.message).content or ""


async def ask_python(base_url: str, question: Question) -> Answer:
    def ask() -> Answer:
        with openai.OpenAI(base_url=base_url, api_key="unused", max_retries=0) as client:
            answer = python_call(client, question)
            parts = list(answer) if question["stream"] else [answer]
        return Answer("".join(piece_of(question["route"], each) for each in parts), len(parts))

    return await asyncio.to_thread(ask)


async def ask_async_python(base_url: str, question: Question) -> Answer:
    async with openai.AsyncOpenAI(base_url=base_url, api_key="unused", max_retries=0) as client:
        answer = await python_call(client, question)
        parts = [each async for each in answer] if question["stream"] else [answer]
    return Answer("".join(piece_of(question["route"], each) for each in parts), len(parts))


async def ask_node(base_url: str, question: Question) -> Answer:
    process = await asyncio.create_subprocess_exec(
        *("node", str(NODE_SCRIPT), base_url, json.dumps(question)),
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0
    return Answer(**json.loads(output))


every_sdk = pytest.mark.parametrize(
    "ask",
    [
        pytest.param(ask_python, id="python"),
        pytest.param(ask_async_python, id="async python"),
        pytest.param(ask_node, id="node", marks=needs_node),
    ],
)
every_route = pytest.mark.parametrize("route", QUESTIONS)


async def read_log(http: aiohttp.ClientSession, server: Server, conversation_id: str) -> bytes:
    query = {"conv_id": conversation_id}
    async with http.get(f"{server.url}/v1/stream", params=query) as answer:
        return await answer.read()


def text_of(route: str, log: bytes) -> str:
    """The text that the events of a log hold."""
    events = map(json.loads, re.findall(rb"^data: (\{.*)$", log, re.MULTILINE))
    if route == "responses":
        return "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta")
    choices = [each["choices"][0] for each in events if each["choices"]]
    return "".join(c.get("text") or c.get("delta", {}).get("content") or "" for c in choices)


@every_sdk
@every_route
async def test_a_stream_with_a_conversation_id_reads_as_its_log(
    served_llama: Server, http: aiohttp.ClientSession, ask: Ask, route: str
) -> None:
    conversation_id = f"{ask.__name__} {route}"
    question = complete(QUESTIONS[route] | {"conversation_id": conversation_id})
    answer = await ask(f"{served_llama.url}/v1", question)
    assert answer.chunks >= TOKENS
    log = await read_log(http, served_llama, conversation_id)
    assert answer.text == text_of(route, log) != ""


@every_sdk
@every_route
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
async def test_without_a_conversation_id_an_sdk_gets_what_llama_cpp_says(
    llama: Server, served_llama: Server, ask: Ask, route: str, stream: bool
) -> None:
    question = complete(QUESTIONS[route] | {"stream": stream, "temperature": 0})
    through_pyserve = await ask(f"{served_llama.url}/v1", question)
    directly = await ask(f"{llama.url}/v1", question)
    assert through_pyserve == directly
    assert len(directly.text.split()) > TOKENS // 2
    assert directly.chunks >= (TOKENS if stream else 1)


def event_of(route: str, text: str) -> bytes:
    """One event of a stream."""
    if route == "responses":
        kind = "response.output_text.delta"
        return f'event: {kind}\ndata: {{"type":"{kind}","delta":"{text}"}}\n\n'.encode()
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    chunk = {"object": "chat.completion.chunk", "choices": [choice]}
    return f"data: {json.dumps(chunk)}\n\n".encode()


LAST = {
    "chat": b"data: [DONE]\n\n",
    "responses": b'event: response.completed\ndata: {"type":"response.completed"}\n\n',
}


async def answer_slowly(request: web.Request) -> web.StreamResponse:
    """Two words, each after a long silence; the model's name tells when the head is sent."""
    route = "responses" if request.path.endswith("responses") else "chat"
    head_is_late = (await request.json())["model"] == "late head"
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    if head_is_late:
        await asyncio.sleep(SILENCE_S)
    await response.prepare(request)
    if not head_is_late:
        await asyncio.sleep(SILENCE_S)
    await response.write(event_of(route, "two "))
    await asyncio.sleep(SILENCE_S)
    await response.write(event_of(route, "words") + LAST[route])
    return response


@asynccontextmanager
async def slow_upstream() -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_post("/v1/{route:.+}", answer_slowly)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


@needs_node
async def test_no_sdk_notices_silences_before_and_between_tokens(
    http: aiohttp.ClientSession,
) -> None:
    async with slow_upstream() as upstream_url:
        with pyserve("--upstream", upstream_url) as server:

            async def check(ask: Ask, route: str, model: str) -> None:
                conversation_id = f"{ask.__name__} {route} {model}"
                question = complete({"route": route, "model": model})
                question["conversation_id"] = conversation_id
                answer = await ask(f"{server.url}/v1", question)
                assert answer.text == "two words"
                log = await read_log(http, server, conversation_id)
                assert log.startswith(b": ping\n: ping\n")
                assert log.count(b": ping\n") >= 2 * (SILENCE_S - 1)

            async with asyncio.TaskGroup() as group:
                for ask in (ask_python, ask_async_python, ask_node):
                    for route in LAST:
                        for model in ("early head", "late head"):
                            group.create_task(check(ask, route, model))
