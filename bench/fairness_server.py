"""pyserve in front of an upstream, with or without knowing who asks.

python fairness_server.py UPSTREAM_URL [--common-owner]

Prints ``{"port": N}`` and serves until standard input ends.
"""

from __future__ import annotations

import asyncio
import json
import sys

from aiohttp import web

import pyserve

COMMON_OWNER = "--common-owner"
OWNER_HEADER = "X-User"


def owner_by_header(request: web.Request) -> str:
    return request.headers.get(OWNER_HEADER, "")


def common_owner(_request: web.Request) -> str:
    """All requests are one owner's, among whose own the queue is first come, first served."""
    return "everybody"


async def main(upstream_url: str, *options: str) -> None:
    app = pyserve.create_app(
        pyserve.Config(upstream=upstream_url),
        authenticate=common_owner if COMMON_OWNER in options else owner_by_header,
    )
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(json.dumps({"port": runner.addresses[0][1]}), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
