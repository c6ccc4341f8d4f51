"""``pyserve serve --model``: a llama.cpp of its own, from the first start to every kind of end."""

from __future__ import annotations

import asyncio
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import pytest
from llama import chat, new_conversation
from process import Process, Server, environment, pyserve, pyserve_command

#: What fits one slot of --model's default context.
LONG = 3000

#: How long a process may take to end, or a dead one to be replaced.
PATIENCE_S = 20.0

needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@contextmanager
def serving(model: Path, **env: str) -> Iterator[Server]:
    with pyserve("--model", model, "--max-session-bytes", "8MiB", env=environment(**env)) as server:
        yield server


def child_of(server: Server) -> int:
    """The pid of its llama.cpp."""
    (pid,) = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    return int(pid)


async def ask(http: aiohttp.ClientSession, server: Server) -> str:
    body = chat(10, stream=False)
    async with http.post(f"{server.url}/v1/chat/completions", json=body) as answer:
        assert answer.status == 200, await answer.text()
        return (await answer.json())["choices"][0]["message"]["content"]


async def wait_ready(http: aiohttp.ClientSession, server: Server) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            async with http.get(f"{server.url}/ready") as answer:
                if answer.status == 200:
                    return
            await asyncio.sleep(0.05)


async def test_a_gguf_file_is_loaded_and_served(
    tiny_model: Path, http: aiohttp.ClientSession
) -> None:
    with serving(tiny_model) as server:
        assert server.output.startswith(f"Loading {tiny_model.name}\n")
        async with http.get(f"{server.url}/ready") as answer:
            assert answer.status == 200
        async with http.get(f"{server.url}/v1/models") as answer:
            assert (await answer.json())["data"][0]["id"] == tiny_model.stem
        assert await ask(http, server)


def test_a_terminal_shows_how_far_the_load_is(tiny_model: Path) -> None:
    controller, terminal = pty.openpty()
    command = pyserve_command("serve", "--port", "0", "--model", tiny_model)
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    shown = b""
    while b"listening on" not in shown:
        shown += os.read(controller, 4096)
    process.terminate()
    assert process.wait(PATIENCE_S) == 0
    os.close(controller)
    percents = [int(text[-3:]) for text in shown.split(b"%")[:-1]]
    assert percents == sorted(set(percents))
    assert len(percents) >= 3
    assert percents[-1] == 100


@needs_proc
async def test_a_killed_llama_cpp_fails_its_stream_and_is_started_again(
    tiny_model: Path, http: aiohttp.ClientSession
) -> None:
    with serving(tiny_model) as server:
        killed = child_of(server)
        url = f"{server.url}/v1/chat/completions"
        headers = {"X-Conversation-Id": new_conversation()}
        async with http.post(url, json=chat(LONG), headers=headers) as answer:
            await answer.content.readuntil(b"\n\n")
            os.kill(killed, signal.SIGKILL)
            log = await answer.read()
        assert log.endswith(b"\n\n: end failed upstream_lost\n")
        assert b'"reason":"upstream_lost"' in log
        assert b"[DONE]" not in log

        server.wait_for("llama.cpp ended with status -9, starting it again")
        await wait_ready(http, server)
        assert child_of(server) != killed
        assert await ask(http, server)


@needs_proc
@pytest.mark.parametrize("stop_signal", [signal.SIGTERM, signal.SIGKILL])
def test_llama_cpp_ends_with_pyserve_however_that_ends(
    tiny_model: Path, stop_signal: signal.Signals
) -> None:
    command = pyserve_command("serve", "--port", "0", "--model", tiny_model)
    with Server(command, environment()) as server:
        child = os.pidfd_open(child_of(server))
        server.stop(stop_signal)
        ended, _, _ = select.select([child], [], [], PATIENCE_S)
        os.close(child)
        assert ended


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"not a model", "is not a GGUF file"),
        (b"GGUF\x03\x00\x00\x00" + b"\xff" * 64, "number of tensors is -1"),
        ("half", "model is corrupted or incomplete"),
        (None, "there is no file"),
    ],
    ids=["another file", "a broken head", "half a download", "no file"],
)
def test_a_model_that_cannot_be_loaded_is_one_clear_error(
    tiny_model: Path, tmp_path: Path, content: bytes | str | None, complaint: str
) -> None:
    model = tmp_path / "broken.gguf"
    if content == "half":
        content = tiny_model.read_bytes()[: tiny_model.stat().st_size // 2]
    if content is not None:
        model.write_bytes(content)
    with Process(pyserve_command("serve", "--model", model), environment()) as process:
        assert process.wait() == 1
    lines = process.output.removeprefix(f"Loading {model.name}\n").splitlines()
    assert len(lines) == 1, process.output
    assert lines[0].startswith("Error: ")
    assert str(model) in lines[0]
    assert complaint in lines[0]


FAKE_LLAMA_SERVER = f"""\
#!{sys.executable}
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        authorized = self.headers["Authorization"] == "Bearer " + os.environ["LLAMA_API_KEY"]
        content = json.dumps([authorized, arguments])
        answer = json.dumps({{"choices": [{{"message": {{"content": content}}}}]}}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

HTTPServer(("127.0.0.1", int(arguments["--port"])), Handler).serve_forever()
"""


async def test_a_llama_server_on_path_is_preferred(
    tiny_model: Path, tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    llama_server = tmp_path / "llama-server"
    llama_server.write_text(FAKE_LLAMA_SERVER)
    llama_server.chmod(0o755)
    with serving(tiny_model, PATH=f"{tmp_path}:{os.environ['PATH']}") as server:
        content = await ask(http, server)
        assert content.startswith("[true, ")  # the key that keeps others away
        assert f'"--model": "{tiny_model}"' in content
        assert '"--parallel": "2"' in content


def test_a_stop_signal_ends_the_load(tiny_model: Path, tmp_path: Path) -> None:
    llama_server = tmp_path / "llama-server"
    llama_server.write_text("#!/bin/sh\necho loading model >&2\nexec sleep 60\n")
    llama_server.chmod(0o755)
    env = environment(PATH=f"{tmp_path}:{os.environ['PATH']}")
    command = pyserve_command("serve", "--port", "0", "--model", tiny_model)
    with Process(command, env) as process:
        process.wait_for("Loading tiny.gguf")
        assert process.stop() == 0
        assert "Traceback" not in process.output
