"""An upstream that writes Markdown, as models do, at the pace it is given."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import orjson
from aiohttp import web

TEXT = """\
## How a stream survives its reader

The generation writes to a **log**; whoever reads it *only reads*. A reader that comes back says \
how far it came, in bytes, and goes on with the next event: `from=mwnvo2uk-19114` is enough.

1. Ask for an answer under a name of your own.
2. Read until the connection breaks, and keep the last event's id.
3. Attach again at that id; nothing is lost, and nothing comes twice.

| what ends | what is told |
| --- | --- |
| the generation | `: end completed` and a clean end |
| the connection | nothing: it just breaks |

In Python that is a loop of a few lines:

```python
async def follow(client, name):
    position = 0
    async for event in client.attach(name, position):
        position = event.offset
        print(event.text, end="")
```

> A connection never owns a generation. Stop it, and it ends for everyone who reads it.

Words in other scripts are cut anywhere, too: naïve, Straße, цвет, 日本語, عين and 🦙 arrive whole.

"""


def words(count: int) -> list[str]:
    """The first so many tokens: words with the space behind them."""
    pieces = [piece + " " for piece in TEXT.split(" ")]
    pieces[-1] = pieces[-1][:-1]
    return list(itertools.islice(itertools.cycle(pieces), count))


class PacedUpstream:
    """What :func:`paced_upstream` yields."""

    def __init__(self, tokens_per_s: float) -> None:
        self.url = ""
        self._tokens_per_s = tokens_per_s

    async def models(self, _request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "org/paced-7b-instruct.gguf"}]})

    async def health(self, _request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """A chat completion of `max_tokens` tokens."""
        asked = orjson.loads(await request.read())
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        clock = asyncio.get_running_loop().time
        start = clock()
        for number, word in enumerate(words(asked["max_tokens"])):
            await asyncio.sleep(start + number / self._tokens_per_s - clock())
            chunk = {"choices": [{"index": 0, "delta": {"content": word}}]}
            await response.write(b"data: " + orjson.dumps(chunk) + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response


@asynccontextmanager
async def paced_upstream(tokens_per_s: float) -> AsyncIterator[PacedUpstream]:
    """Listen on a free port."""
    upstream = PacedUpstream(tokens_per_s)
    app = web.Application()
    app.router.add_get("/v1/models", upstream.models)
    app.router.add_get("/health", upstream.health)
    app.router.add_post("/v1/chat/completions", upstream.complete)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        upstream.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield upstream
    finally:
        await runner.cleanup()
