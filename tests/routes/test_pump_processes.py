"""Processes that end, or fork, while their pump has readers: no hang, no crash, not a word."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import serving
from process import environment

from pyserve import _core

pytestmark = pytest.mark.skipif(not hasattr(_core, "SocketPump"), reason="there is no pump here")

SETUP = """
import asyncio, os, socket, sys, threading, time
from fake_upstream import token
from serving import request_bytes, serving, texts_of, until
from pyserve import ForkedProcessError, _core
from pyserve.app import deliveries_of

async def serve():
    "A server with readers that wait and readers that are blocked; all of it is kept."
    global server, session, readers, stack
    stack = serving()
    server = await stack.__aenter__()
    session = server.manager.create_or_replace("c")
    while session.total_size < 2_000_000:
        session.append(token("x" * 900))
    for _ in range(3):
        connection = await server.connect(receive_buffer_bytes=4096)
        await connection.send(request_bytes("GET", "/v1/stream/c"))
    target = f"/v1/stream/c?from={session.total_size}"
    readers = [await server.open("GET", target) for _ in range(5)]
    session.append(token("seen"))
    for reader in readers:
        await reader.read_until(b"\\n\\n")
    assert session.snapshot().readers == 8

"""

ENDINGS = {
    "asyncio.run ends and cancels the handlers": """
        asyncio.run(serve())
    """,
    "the script ends, the loop was never closed": """
        loop = asyncio.new_event_loop()
        loop.run_until_complete(serve())
    """,
    "everything is in a cycle": """
        loop = asyncio.new_event_loop()
        loop.run_until_complete(serve())
        loop.own = [server, session, readers, stack, deliveries_of(server.manager).pump, loop]
    """,
    "the pump is let go first": """
        loop = asyncio.new_event_loop()
        loop.run_until_complete(serve())
        deliveries_of(server.manager).close()
    """,
    "sys.exit in a callback": """
        async def main():
            await serve()
            asyncio.get_running_loop().call_soon(sys.exit)
            await asyncio.Event().wait()
        asyncio.run(main())
    """,
    "a thread appends to the end": """
        loop = asyncio.new_event_loop()
        loop.run_until_complete(serve())
        def produce():
            while True:
                session.append_event("x" * 1000)
        threading.Thread(target=produce, daemon=True).start()
        while session.total_size < 4_000_000:
            time.sleep(0.001)
    """,
    "an atexit hook ends the session": """
        import atexit
        loop = asyncio.new_event_loop()
        loop.run_until_complete(serve())
        atexit.register(session.cancel)
    """,
    "os._exit": """
        loop = asyncio.new_event_loop()
        loop.run_until_complete(serve())
        os._exit(0)
    """,
}


def run(script: str) -> tuple[int, str, str]:
    """The exit status of a process of its own, and all it said."""
    ended = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", SETUP + textwrap.dedent(script)],
        env=environment(PYTHONPATH=str(Path(serving.__file__).parent)),
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    return ended.returncode, ended.stdout, ended.stderr


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS)
def test_a_process_with_attached_readers_exits(ending: str) -> None:
    assert run(ending) == (0, "", "")


@pytest.mark.parametrize("ending", list(ENDINGS.values())[:3], ids=list(ENDINGS)[:3])
def test_a_process_with_attached_readers_exits_from_uvloop(ending: str) -> None:
    pytest.importorskip("uvloop")
    on_uvloop = ending.replace("asyncio.run(", "uvloop.run(").replace("asyncio.new", "uvloop.new")
    assert run("import uvloop\n" + textwrap.dedent(on_uvloop)) == (0, "", "")


FORK = """
loop = asyncio.new_event_loop()
loop.run_until_complete(serve())
pump = deliveries_of(server.manager).pump
wakeup = _core.Wakeup()
ours, theirs = socket.socketpair()
delivery = pump.attach(session._core, session.total_size, ours.fileno(), wakeup, 1)
USES = {
    "attach": lambda: pump.attach(session._core, 0, ours.fileno(), wakeup, 1),
    "detach": lambda: pump.detach(delivery),
    "collect": lambda: pump.collect(),
}
child = os.fork()
if child == 0:
    for name, use in USES.items():
        try:
            use()
        except ForkedProcessError:
            print(name, "is refused")
    fresh = _core.SocketPump(write_timeout_s=1, coalesce_s=0)
    own = _core.StreamSessionManager(
        max_session_bytes=1 << 20, max_total_bytes=1 << 20, ttl_s=1, heartbeat_interval_s=1
    ).create_or_replace("", "c")
    own.finalize("completed")
    fresh.attach(own, 0, ours.fileno(), wakeup, 1)
    print("its own pump sends", theirs.recv(100))
    LEAVE
_, status = os.waitpid(child, 0)
print("the child's exit is", os.waitstatus_to_exitcode(status))

async def go_on():
    session.append(token("after"))
    session.finalize()
    for reader in readers:
        start = int(reader.headers["x-stream-offset"])
        assert texts_of(await reader.read_to_end(), start) == ["seen", "after"]
        assert reader.end == "clean"
    assert delivery.outcome == "end"
    for connection in server.connections[:3]:
        connection.close()
    await stack.__aexit__(None, None, None)
    print("the parent goes on")

loop.run_until_complete(go_on())
loop.close()
"""

LEAVINGS = {
    "interpreter's end": "sys.exit()",
    "objects let go": "del pump, server, session, readers, delivery, fresh, USES; stack = None; "
    "import gc; gc.collect(); sys.stdout.flush(); os._exit(0)",
}


@pytest.mark.parametrize("leave", LEAVINGS.values(), ids=LEAVINGS)
def test_a_forked_child_is_refused_the_pump_and_the_parent_goes_on(leave: str) -> None:
    status, told, errors = run(FORK.replace("LEAVE", leave))
    assert errors == ""
    assert told.splitlines() == [
        "attach is refused",
        "detach is refused",
        "collect is refused",
        r"its own pump sends b'10\r\n: end completed\n\r\n'",
        "the child's exit is 0",
        "the parent goes on",
    ]
    assert status == 0
