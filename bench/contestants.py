"""The servers of the bench behind one face: started once for a point, measured in each round."""

from __future__ import annotations

import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from events import make_log
from fairness_server import COMMON_OWNER
from llama_servers import Llama, llama_server, pyserve_before_llama
from points import Point
from processes import BENCH, PROGRAMS, BenchError, Contestant, Program

UVLOOP = "--uvloop"
#: Of the llama.cpp that several owners share.
SLOTS = 4

_COMPLETIONS = "/v1/chat/completions"
_STREAM = "/v1/stream/s{}"


class BenchServer(Contestant):
    """A server of the bench, and where its events come from: itself, or an upstream."""

    def __init__(self, server: Program, port: int, upstream: Program | None = None) -> None:
        super().__init__([server], port)
        self._server = server
        self._upstream = upstream
        self._producer = upstream or server

    def prepare(self, point: Point) -> list[object]:
        self._producer.command("prepare", point.streams, point.events, point.rate)
        path = _STREAM
        if point.way != "live":
            position = self._producer.command("fill")["position"]
            if point.way == "reattach":
                path += f"?from={position}"
            else:
                self._producer.command("end")
        if self._upstream is None:
            return ["--get", path]
        return [
            *("--get", path, "--post", _COMPLETIONS, "--body", '{"stream": true, "messages": []}'),
            *("--header", "X-Conversation-Id: s{}"),
        ]

    def go(self) -> None:
        self._server.command("go")
        if self._upstream is not None:
            self._upstream.command("go")

    def finish(self) -> dict[str, object]:
        if self._upstream is not None:
            self._upstream.command("finish")
        return self._server.command("finish")


@contextmanager
def in_process(*command: str | Path, python: bool = False) -> Iterator[Contestant]:
    """A server that produces the events itself."""
    with Program(*command, python=python) as server:
        yield BenchServer(server, server.read_json()["port"])


@contextmanager
def behind_upstream(script: str, *options: str) -> Iterator[Contestant]:
    """A server that takes the events from an upstream over HTTP, one request for each stream."""
    with Program(PROGRAMS / "bare_server", "--upstream") as upstream:
        url = f"http://127.0.0.1:{upstream.read_json()['port']}"
        with Program(BENCH / script, url, *options, python=True) as server:
            yield BenchServer(server, server.read_json()["port"], upstream)


class FileServer(Contestant):
    """Serves the log as a file."""

    def __init__(self, server: Program, port: int, directory: Path) -> None:
        super().__init__([server], port)
        self._directory = directory

    def prepare(self, point: Point) -> list[object]:
        log = self._directory / f"log{point.events}"
        if not log.exists():
            log.write_bytes(make_log(point.events))
        return ["--get", f"/{log.name}"]


_NGINX_CONF = """
daemon off; master_process off; pid {directory}/pid; error_log stderr crit;
events {{ worker_connections 4096; }}
http {{
  access_log off; sendfile on; tcp_nopush on; default_type text/event-stream;
  client_body_temp_path {directory}; proxy_temp_path {directory}; fastcgi_temp_path {directory};
  uwsgi_temp_path {directory}; scgi_temp_path {directory};
  server {{ listen 127.0.0.1:{port}; root {directory}; }}
}}
"""


@contextmanager
def nginx() -> Iterator[Contestant]:
    """The same bytes as a static file."""
    with tempfile.TemporaryDirectory(prefix="pyserve-bench-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        port = _free_port()
        (directory / "conf").write_text(_NGINX_CONF.format(directory=name, port=port))
        with Program("nginx", "-c", directory / "conf", "-e", "stderr") as server:
            _wait_listening(port)
            yield FileServer(server, port, directory)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_listening(port: int) -> None:
    for _ in range(1000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.01)
    raise BenchError(f"nobody listens on port {port}")


@contextmanager
def llama_alone(point: Point) -> Iterator[Contestant]:
    """llama.cpp, read through its own resumable routes."""
    with llama_server(point.readers) as (server, port):
        yield Llama([server], port)


@contextmanager
def llama_behind_pyserve(point: Point) -> Iterator[Contestant]:
    """The same behind ``pyserve serve``."""
    with (
        llama_server(point.readers) as (server, llama_port),
        pyserve_before_llama(llama_port) as (pyserve, port),
    ):
        yield Llama([pyserve, server], port)


@contextmanager
def queue_of_llama() -> Iterator[Contestant]:
    """llama.cpp, whose slots those get who came first."""
    with llama_server(SLOTS) as (server, port):
        yield Contestant([server], port)


@contextmanager
def queue_of_pyserve(*options: str) -> Iterator[Contestant]:
    """pyserve decides who gets llama.cpp's slots."""
    with llama_server(SLOTS) as (_, llama_port):
        url = f"http://127.0.0.1:{llama_port}"
        with Program(BENCH / "fairness_server.py", url, *options, python=True) as server:
            yield Contestant([server], server.read_json()["port"])


Start = Callable[[Point], AbstractContextManager[Contestant]]

SERVERS: dict[str, Start] = {
    "pyserve": lambda _: in_process(BENCH / "pyserve_server.py", python=True),
    "pyserve+uvloop": lambda _: in_process(BENCH / "pyserve_server.py", UVLOOP, python=True),
    "aiohttp": lambda _: in_process(BENCH / "plain_aiohttp.py", python=True),
    "bare": lambda _: in_process(PROGRAMS / "bare_server"),
    "pyserve+upstream": lambda _: behind_upstream("pyserve_server.py"),
    "pyserve+upstream+uvloop": lambda _: behind_upstream("pyserve_server.py", UVLOOP),
    "aiohttp+upstream": lambda _: behind_upstream("plain_aiohttp.py"),
    "nginx": lambda _: nginx(),
    "llama.cpp": llama_alone,
    "pyserve+llama.cpp": llama_behind_pyserve,
    "fair queue": lambda _: queue_of_pyserve(),
    "common queue": lambda _: queue_of_pyserve(COMMON_OWNER),
    "llama.cpp's queue": lambda _: queue_of_llama(),
}
"""Every server by its name in the points."""
