"""The demo: a small OpenAI-compatible server inside this process, which needs no model.

It listens on a free loopback port and is used like any other upstream, so that what people try with
the demo is what they get with a real one. It answers every request with a short tour of pyserve, at
the pace of a person reading, and says in every answer that it is a demo.

Where numpy is installed it has a second model, ``pyserve-ngram``: a real one, if a very small one,
that answers many requests in one batch. Who wants it names it.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import orjson
from aiohttp import web

from pyserve.errors import ApiError
from pyserve.producers.batch import Batcher, Token
from pyserve.producers.chat_answer import ChatAnswer, TextAnswer
from pyserve.producers.demo_text import NOTES, TOUR

if TYPE_CHECKING:
    from pyserve.producers.ngram import NgramModel, NgramRequest, NgramState

MODEL = "pyserve-demo"
NGRAM_MODEL = "pyserve-ngram"

#: Words a second: brisk reading.
WORDS_PER_SECOND = 12.0

_MAX_BATCH_SIZE = 16
_MAX_BATCH_WAIT_MS = 5.0
_ids = itertools.count(1)


class _AtReadingPace:
    """The n-gram model, slowed down: each step takes as long as a word takes to be read."""

    def __init__(self, model: NgramModel) -> None:
        self.start = model.start
        self._step = model.step

    def step(self, states: Sequence[NgramState]) -> Sequence[Token]:
        time.sleep(1 / WORDS_PER_SECOND)
        return self._step(states)


class _Demo:
    """Two models. Whatever they keep running ends with `stack`."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self._loading = asyncio.Lock()
        self._batcher: Batcher[NgramRequest, NgramState] | None = None
        self.models = [MODEL, NGRAM_MODEL] if find_spec("numpy") else [MODEL]

    async def answer(
        self, body: Mapping[str, Any], kind: type[ChatAnswer]
    ) -> tuple[ChatAnswer, AsyncGenerator[Token, None]]:
        """An answer, and the tokens that it is to be made of.

        Raises:
            ApiError: reason ``invalid_parameter``.
        """
        answer_id = f"chatcmpl-demo-{next(_ids)}"
        if body.get("model") == NGRAM_MODEL and NGRAM_MODEL in self.models:
            batcher = await self._load()
            from pyserve.producers.ngram import NgramRequest

            request = NgramRequest.from_chat(body)
            answer = kind(answer_id, NGRAM_MODEL, request.prompt_tokens)
            return answer, batcher.generate(request)
        pause_s = 1 / WORDS_PER_SECOND if body.get("stream") else 0
        return kind(answer_id, MODEL, prompt_tokens=0), _tour(pause_s)

    async def _load(self) -> Batcher[NgramRequest, NgramState]:
        """Not before somebody asks for it: most people come for the tour."""
        async with self._loading:
            if self._batcher is None:
                model = await asyncio.to_thread(_train)
                self._batcher = await self._stack.enter_async_context(
                    Batcher(
                        model, max_batch_size=_MAX_BATCH_SIZE, max_batch_wait_ms=_MAX_BATCH_WAIT_MS
                    )
                )
            return self._batcher


def _train() -> _AtReadingPace:
    from pyserve.producers.ngram import NgramModel

    return _AtReadingPace(NgramModel(TOUR + "\n" + NOTES))


async def _tour(pause_s: float) -> AsyncGenerator[Token, None]:
    for word in re.findall(r"\S+\s*", TOUR):
        await asyncio.sleep(pause_s)
        yield Token(word)
    yield Token("", "stop")


_DEMO = web.AppKey("demo", _Demo)


async def _chat(request: web.Request) -> web.StreamResponse:
    return await _answer(request, ChatAnswer)


async def _complete(request: web.Request) -> web.StreamResponse:
    return await _answer(request, TextAnswer)


async def _answer(request: web.Request, kind: type[ChatAnswer]) -> web.StreamResponse:
    try:
        body = _json_object(await request.read())
        if kind is TextAnswer:
            body["messages"] = [{"role": "user", "content": body.pop("prompt", None)}]
        answer, tokens = await request.app[_DEMO].answer(body, kind)
        async with aclosing(tokens):
            if body.get("stream"):
                options = body.get("stream_options")
                include_usage = isinstance(options, dict) and bool(options.get("include_usage"))
                return await _stream(request, answer.to_events(tokens, include_usage=include_usage))
            return web.Response(body=await answer.to_json(tokens), content_type="application/json")
    except ApiError as error:
        body_bytes = orjson.dumps(error.to_dict())
        return web.Response(status=error.status, body=body_bytes, content_type="application/json")


def _json_object(raw: bytes) -> dict[str, Any]:
    with suppress(orjson.JSONDecodeError):
        if isinstance(body := orjson.loads(raw), dict):
            return body
    raise ApiError("invalid_body")


async def _stream(request: web.Request, events: AsyncIterator[bytes]) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    with suppress(ConnectionError):  # stopped
        try:
            async for event in events:
                await response.write(event)
        except ApiError as error:
            await response.write(error.to_event("openai"))
    return response


async def _models(request: web.Request) -> web.Response:
    models = [
        {"id": name, "object": "model", "created": 0, "owned_by": "pyserve"}
        for name in request.app[_DEMO].models
    ]
    body = orjson.dumps({"object": "list", "data": models})
    return web.Response(body=body, content_type="application/json")


async def _health(_request: web.Request) -> web.Response:
    return web.Response(body=b'{"status":"ok"}', content_type="application/json")


@asynccontextmanager
async def demo_server() -> AsyncIterator[str]:
    """Run the demo server; yields its URL."""
    app = web.Application()
    app.router.add_post("/v1/chat/completions", _chat)
    app.router.add_post("/v1/completions", _complete)
    app.router.add_get("/v1/models", _models)
    app.router.add_get("/health", _health)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0)
    async with AsyncExitStack() as stack:
        app[_DEMO] = _Demo(stack)
        stack.push_async_callback(runner.cleanup)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        yield f"http://127.0.0.1:{port}"
