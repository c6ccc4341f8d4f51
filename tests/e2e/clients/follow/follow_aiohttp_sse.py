"""PyPI `aiohttp-sse-client` and its fork `aiohttp-sse-client2`: reconnect by themselves, with
Last-Event-ID, after a clean end only; a lost connection is an exception of aiohttp's.
"""

import asyncio
import json
import sys
from datetime import timedelta
from importlib import import_module

import aiohttp


async def main(package: str, url: str) -> None:
    client = import_module(f"{package}.client")
    headers = {}
    # Without a timeout of one's own aiohttp ends every answer after five minutes.
    timeout = aiohttp.ClientTimeout(total=None, sock_read=5)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        while True:
            try:
                async with client.EventSource(
                    url, session=session, headers=headers, reconnection_time=timedelta(seconds=0.1)
                ) as source:
                    async for event in source:
                        tell(id=event.last_event_id, data=event.data)
                        headers["Last-Event-ID"] = event.last_event_id
            except aiohttp.ClientError:
                await asyncio.sleep(0.1)  # lost: go on behind the last event
            except ConnectionAbortedError:
                return tell(end=204)  # "wrong response status: 204": all is read
            except ConnectionError:
                return tell(end=404)  # a status of 400 or more


def tell(**what: object) -> None:
    print(json.dumps(what), flush=True)


asyncio.run(main(*sys.argv[1:]))
