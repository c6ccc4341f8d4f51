"""A process that ends with live sessions ends: no hang, no crash, not a word on stderr."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

SETUP = """
import asyncio, os, sys, threading, time
from pyserve import Config, StreamSessionManager, _core

manager = StreamSessionManager()
calls = []
session = manager.create_or_replace("live", on_cancel=lambda: calls.append(1), on_end=calls.append)
session.append_event("a")
session.append("data: unfinished")
reader = session.read_from()

async def read_all(reader):
    return [block async for block in reader]
"""

ENDINGS = {
    "the end of the script": "",
    "sys.exit": "sys.exit(0)",
    "a cycle through the manager": "manager.own = [manager, session, calls]",
    "names deleted in any order": "del manager; del session; del reader",
    "a core waiter": """
        wakeup = _core.Wakeup()
        reader.read_ready()
        assert reader._core_reader.notify_when_readable(wakeup, 1)
    """,
    "asyncio.run cancels waiting readers": """
        async def main():
            for _ in range(3):
                asyncio.create_task(read_all(session.read_from()))
            await asyncio.sleep(0)
            assert session.snapshot().readers == 4
        asyncio.run(main())
    """,
    "the manager's own task runs": """
        async def main():
            asyncio.create_task(manager.run())
            await asyncio.sleep(0)
        asyncio.run(main())
    """,
    "a generation runs": """
        from pyserve.producers.generation import Generations
        async def produce(session, begin):
            begin()
            await asyncio.Event().wait()
        async def main():
            generation = Generations(manager).start(
                "c", produce, owner="", dialect="openai", tag=b"", grace_until=1e9)
            await generation.wait_settled()
        asyncio.run(main())
    """,
    "a loop that is never closed": """
        loop = asyncio.new_event_loop()
        task = loop.create_task(read_all(session.read_from()))
        loop.call_soon(loop.stop)
        loop.run_forever()
        task.cancel()
        loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
        loop.run_until_complete(asyncio.sleep(0))
        import warnings
        warnings.simplefilter("ignore", ResourceWarning)
    """,
    "a daemon thread appends": """
        session.append("\\n\\n")
        def produce():
            while True:
                session.append_event("x" * 1000)
        threading.Thread(target=produce, daemon=True).start()
        while session.total_size < 100_000:
            time.sleep(0.001)
    """,
    "hooks refer to everything": """
        other = manager.create_or_replace("other", on_end=lambda s: (manager, session, reader, s))
    """,
    "an atexit hook stops the session": """
        import atexit
        def stop():
            assert session.cancel()
            assert len(calls) == 2
        atexit.register(stop)
    """,
}


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS)
def test_a_process_with_live_sessions_exits(ending: str) -> None:
    script = SETUP + textwrap.dedent(ending)
    ended = subprocess.run(
        [sys.executable, "-X", "dev", "-c", script],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
