"""A llama.cpp of pyserve's own: started for one GGUF file, watched, started again when it dies.

The child listens on a free loopback port, another one after each restart, behind a random key:
without one llama.cpp lets any web page in this machine's browsers use it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
import shutil
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec

import aiohttp

from pyserve.errors import ConfigError, MissingExtraError
from pyserve.model_config import ModelConfig

log = logging.getLogger("pyserve.llama")

# llama.cpp ends within milliseconds of a SIGTERM unless something hangs.
_STOP_TIMEOUT_S = 5.0
_FIRST_RESTART_DELAY_S = 0.5
_LONGEST_RESTART_DELAY_S = 30.0
# A child that served this long has recovered: the next death starts the delays anew.
_STEADY_AFTER_S = 60.0
_HEALTH_POLL_S = 0.05
_HEALTH_TIMEOUT_S = 2.0
_LOG_LINES_TOLD = 5

# llama.cpp names no percentage while it loads; these lines come in this order (tried with b11549).
_LOAD_STEPS = [
    re.compile(pattern)
    for pattern in (
        r"loading model\b",
        r"llama_model_loader|load_model: loading model",
        r"threadpool init|llama_context",
        r"initializing, n_slots",
        r"model loaded",
        r"listening on",
    )
]

# An error of llama.cpp's (timestamp, E, text) or of llama_child's.
_ERROR = re.compile(r"(?:^[\d.]+ E|error loading model:|^error:) +(.+)")

# A line longer than this is taken in pieces.
_LONGEST_LINE_BYTES = 64 * 1024

Progress = Callable[[float], None]


@dataclass
class LocalModel:
    """Where a supervised llama.cpp listens, None while it is being started; and its key."""

    url: str | None
    key: str


class _Child:
    """One llama.cpp process."""

    def __init__(self, process: asyncio.subprocess.Process, on_progress: Progress) -> None:
        self.process = process
        self._on_progress = on_progress
        self._last_lines: list[str] = []
        self._first_error = ""
        self._reading = asyncio.create_task(self._read_log(), name="llama.cpp log")

    async def _read_log(self) -> None:
        """Pass llama.cpp's own lines to the log and tell the load's progress."""
        assert self.process.stderr is not None
        step = 0
        async for line in _lines(self.process.stderr):
            log.debug("%s", line)
            self._last_lines = [*self._last_lines[1 - _LOG_LINES_TOLD :], line]
            if not self._first_error and (found := _ERROR.search(line)):
                self._first_error = found[1]
            for done, pattern in enumerate(_LOAD_STEPS[step:], step + 1):
                if pattern.search(line):
                    step = done
                    self._on_progress(done / len(_LOAD_STEPS))

    async def wait(self) -> int:
        """Wait for its end; returns its exit status."""
        status = await self.process.wait()
        await self._reading
        return status

    @property
    def first_error(self) -> str:
        """Why it could not start: what comes after the first error only follows from it."""
        return self._first_error or "\n".join(self._last_lines)

    @property
    def last_words(self) -> str:
        """What it said before its end."""
        return "\n".join(self._last_lines)

    async def stop(self) -> None:
        """End it: kindly, then surely."""
        with suppress(ProcessLookupError):
            self.process.terminate()
        try:
            async with asyncio.timeout(_STOP_TIMEOUT_S):
                await self.process.wait()
        except TimeoutError:
            self.process.kill()
            await self.process.wait()
        await self._reading


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """Lines that aren't empty, of any length."""
    rest = b""
    while block := await stream.read(_LONGEST_LINE_BYTES):
        *lines, rest = (rest + block).split(b"\n")
        if len(rest) > _LONGEST_LINE_BYTES:
            lines, rest = [*lines, rest], b""
        for line in lines:
            if line.strip():
                yield line.decode(errors="replace").rstrip()
    if rest.strip():
        yield rest.decode(errors="replace").rstrip()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def _wait_healthy(url: str) -> None:
    timeout = aiohttp.ClientTimeout(total=_HEALTH_TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout) as http:
        while True:
            with suppress(aiohttp.ClientError, TimeoutError):
                async with http.get(f"{url}/health") as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(_HEALTH_POLL_S)


def _require_llama() -> None:
    if shutil.which("llama-server") is None and find_spec("xllamacpp") is None:
        raise MissingExtraError("llama", "--model without a llama-server on PATH")


def _llama_options(config: ModelConfig) -> list[str]:
    options = {
        "--model": config.file,
        "--alias": config.name,
        "--ctx-size": config.context_tokens,
        "--parallel": config.slots,
        "--n-gpu-layers": config.gpu_layers,
        "--device": config.device,
        "--cache-type-k": config.cache_type_k,
        "--cache-type-v": config.cache_type_v,
    }
    return [str(word) for pair in options.items() if pair[1] is not None for word in pair]


class _Supervisor:
    def __init__(self, config: ModelConfig, on_progress: Progress) -> None:
        self._config = config
        self._on_progress = on_progress
        self.model = LocalModel(None, secrets.token_urlsafe(24))
        self._child: _Child | None = None

    async def start(self) -> None:
        """Start llama.cpp and wait until the model is loaded.

        Raises:
            ConfigError: the model cannot be loaded, with llama.cpp's own words.
        """
        # A new port each time: the last one may be a stranger's by now, who must not get the key.
        port = _free_port()
        child = await self._spawn(port)
        url = f"http://127.0.0.1:{port}"
        exited = asyncio.create_task(child.process.wait())
        loaded = asyncio.create_task(_wait_healthy(url))
        try:
            await asyncio.wait({exited, loaded}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            exited.cancel()
            loaded.cancel()
        if child.process.returncode is not None:
            await child.wait()
            raise ConfigError(f"llama.cpp cannot load {self._config.file}: {child.first_error}")
        self.model.url = url
        self._on_progress(1.0)

    async def _spawn(self, port: int) -> _Child:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # nothing out of the folder one happens to stand in
            "-m",
            "pyserve.producers.llama_child",
            *("--host", "127.0.0.1"),
            *("--port", str(port)),
            *_llama_options(self._config),
            env={
                **os.environ,
                "LLAMA_API_KEY": self.model.key,
                "PYSERVE_PARENT_PID": str(os.getpid()),
            },
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            # A Ctrl-C in the terminal is for pyserve, which lets generations finish first.
            start_new_session=True,
        )
        self._child = _Child(process, self._on_progress)
        return self._child

    async def keep_alive(self) -> None:
        """Start the child again whenever it ends, with growing delays, until cancelled."""
        clock = asyncio.get_running_loop().time
        delay_s = _FIRST_RESTART_DELAY_S
        while True:
            started = clock()
            assert self._child is not None
            status = await self._child.wait()
            self.model.url = None
            if clock() - started > _STEADY_AFTER_S:
                delay_s = _FIRST_RESTART_DELAY_S
            log.error(
                "llama.cpp ended with status %d, starting it again in %.1f s; its last words:\n%s",
                status,
                delay_s,
                self._child.last_words,
            )
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 2, _LONGEST_RESTART_DELAY_S)
            try:
                await self.start()
            except (ConfigError, OSError) as error:
                log.error("%s", error)

    async def stop(self) -> None:
        """End llama.cpp, if it was started."""
        if self._child is not None:
            await self._child.stop()


@asynccontextmanager
async def local_model(config: ModelConfig, on_progress: Progress) -> AsyncIterator[LocalModel]:
    """Run llama.cpp for ``config.file``; entered when the model is loaded.

    `on_progress` is called with the share of the load that is done, 0 to 1.

    Raises:
        MissingExtraError: there is neither ``llama-server`` nor the extra ``llama``.
        ConfigError: the model cannot be loaded.
    """
    _require_llama()
    supervisor = _Supervisor(config, on_progress)
    try:
        await supervisor.start()
        keeping = asyncio.create_task(supervisor.keep_alive(), name="llama.cpp supervisor")
        try:
            yield supervisor.model
        finally:
            keeping.cancel()
            with suppress(asyncio.CancelledError):
                await keeping
    finally:
        await supervisor.stop()
