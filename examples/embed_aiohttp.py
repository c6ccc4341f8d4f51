"""An aiohttp service of one's own, whose async generator becomes a resumable stream.

python examples/embed_aiohttp.py
curl -N -X POST http://127.0.0.1:8080/count/hello        interrupt it with Ctrl-C ...
curl -N 'http://127.0.0.1:8080/llm/v1/stream/hello'      ... it went on; read it from anywhere
curl -X DELETE http://127.0.0.1:8080/llm/v1/stream/hello     stop it
"""

import asyncio
import sys
from collections.abc import AsyncIterator

from aiohttp import web

import pyserve


async def count() -> AsyncIterator[str]:
    """Stands for whatever you stream: a model, an agent, a long query."""
    for number in range(1, 61):
        yield f"{number} bottles"
        await asyncio.sleep(0.5)


async def produce(session: pyserve.StreamSession) -> None:
    with session:
        async for text in count():
            session.append_event(text)


async def start(request: web.Request) -> web.StreamResponse:
    session = request.app[MANAGER].create_or_replace(
        request.match_info["name"], on_cancel=lambda: task.cancel()
    )
    task = asyncio.create_task(produce(session))
    return await pyserve.stream_response(request, session)


MANAGER = web.AppKey("manager", pyserve.StreamSessionManager)

app = web.Application()
app[MANAGER] = pyserve.setup(app, prefix="/llm")
app.router.add_post("/count/{name}", start)

if __name__ == "__main__":
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]) if len(sys.argv) > 1 else 8080)
