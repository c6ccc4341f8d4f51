"""The demo: a small OpenAI-compatible server inside this process, which needs no model.

It listens on a free loopback port and is used like any other upstream, so that what people try with
the demo is what they get with a real one. It answers every request with a short tour of pyserve, at
the pace of a person reading, and says in every answer that it is a demo.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import orjson
from aiohttp import web

MODEL = "pyserve-demo"

#: Words a second: brisk reading.
WORDS_PER_SECOND = 12.0

TOUR = """\
This is pyserve's demo: no model is running, these words were written by people.

Everything you read here comes out of a log. The generation writes to it; your connection only \
reads it. Reload this page now, in the middle of the sentence: the text goes on where it was, \
because what was written before is still there and the generation never noticed that you left.

Open a second tab on the same conversation, and both follow. Pull the network cable, wait, plug \
it in again: your browser sends the id of the last event it saw, and the stream continues with \
the next one, not a character lost or doubled.

Press Stop, and the generation ends for everyone who is watching, wherever it was: the upstream's \
connection is closed at once, so that its slot is free for somebody else.

To see it with a model, start pyserve with --model FILE.gguf, or put it in front of the server \
that you have with --upstream URL. Nothing else changes.
"""

_ids = itertools.count(1)


def _chunk(answer_id: str, delta: dict[str, str], finish_reason: str | None = None) -> bytes:
    chunk = {
        "id": answer_id,
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": MODEL,
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}],
    }
    return b"data: " + orjson.dumps(chunk) + b"\n\n"


def _words() -> Iterator[str]:
    return (word + " " for word in TOUR.replace("\n", " \n").split(" ") if word)


async def _chat(request: web.Request) -> web.StreamResponse:
    try:
        body = orjson.loads(await request.read())
    except orjson.JSONDecodeError:
        return _error(400, "The request body is not valid JSON")
    answer_id = f"chatcmpl-demo-{next(_ids)}"
    if not body.get("stream"):
        return web.Response(body=_whole_answer(answer_id), content_type="application/json")
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    with suppress(ConnectionError):  # stopped
        await response.write(_chunk(answer_id, {"role": "assistant", "content": ""}))
        for word in _words():
            await asyncio.sleep(1 / WORDS_PER_SECOND)
            await response.write(_chunk(answer_id, {"content": word}))
        await response.write(_chunk(answer_id, {}, "stop") + b"data: [DONE]\n\n")
    return response


def _whole_answer(answer_id: str) -> bytes:
    message = {"role": "assistant", "content": TOUR}
    answer: dict[str, Any] = {
        "id": answer_id,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": MODEL,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
    }
    return orjson.dumps(answer)


def _error(status: int, message: str) -> web.Response:
    body = {"error": {"code": status, "message": message, "type": "invalid_request_error"}}
    return web.Response(status=status, body=orjson.dumps(body), content_type="application/json")


async def _models(_request: web.Request) -> web.Response:
    model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "pyserve"}
    body = orjson.dumps({"object": "list", "data": [model]})
    return web.Response(body=body, content_type="application/json")


async def _health(_request: web.Request) -> web.Response:
    return web.Response(body=b'{"status":"ok"}', content_type="application/json")


@asynccontextmanager
async def demo_server() -> AsyncIterator[str]:
    """Run the demo server; yields its URL."""
    app = web.Application()
    app.router.add_post("/v1/chat/completions", _chat)
    app.router.add_get("/v1/models", _models)
    app.router.add_get("/health", _health)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        yield f"http://127.0.0.1:{port}"
    finally:
        await runner.cleanup()
