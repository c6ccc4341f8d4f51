"""A pyserve command as a person runs it: a process, with what it has written so far."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Self

from process import environment, pyserve_command

PATIENCE_S = 15.0


class Output:
    """One of its outputs, read as it comes."""

    def __init__(self, stream: asyncio.StreamReader) -> None:
        self.raw = b""
        self._stream = stream
        self._news = asyncio.Condition()
        self._reading = asyncio.create_task(self._read())

    @property
    def text(self) -> str:
        return self.raw.decode()

    async def _read(self) -> None:
        ended = False
        while not ended:
            try:
                block = await self._stream.read(65536)
            except OSError:  # how a terminal ends
                block = b""
            ended = not block
            async with self._news:
                self.raw += block
                self._news.notify_all()

    async def wait_for(self, text: str) -> None:
        """Until it has written `text`."""
        async with asyncio.timeout(PATIENCE_S), self._news:
            await self._news.wait_for(lambda: text in self.text or self._reading.done())
        assert text in self.text

    async def end(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            await self._reading


class Command:
    """What :func:`run` yields."""

    def __init__(self, process: asyncio.subprocess.Process, out: Output, err: Output) -> None:
        self._process = process
        self.out = out
        self.err = err

    def interrupt(self) -> None:
        """Ctrl-C."""
        self._process.send_signal(signal.SIGINT)

    async def exit_status(self) -> int:
        """Wait for its end. No traceback is ever shown."""
        async with asyncio.timeout(PATIENCE_S):
            status = await self._process.wait()
        await self.out.end()
        await self.err.end()
        assert "Traceback" not in self.err.text
        return status

    async def kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()
        await self.out.end()
        await self.err.end()

    async def finished(self) -> Self:
        """The same, with exit status 0."""
        assert await self.exit_status() == 0, self.err.text
        return self


@asynccontextmanager
async def run(
    *arguments: str, terminal: bool = False, stdin: bytes = b"", **variables: str
) -> AsyncIterator[Command]:
    """``pyserve ARGUMENTS``; with `terminal` its stdout is one."""
    ours, theirs = os.openpty() if terminal else (-1, asyncio.subprocess.PIPE)
    process = await asyncio.create_subprocess_exec(
        *map(str, pyserve_command(*arguments)),
        stdin=asyncio.subprocess.PIPE,
        stdout=theirs,
        stderr=asyncio.subprocess.PIPE,
        env=environment(**variables),
    )
    assert process.stdin is not None
    assert process.stderr is not None
    transport = None
    stdout = process.stdout
    if terminal:
        os.close(theirs)
        loop = asyncio.get_running_loop()
        stdout = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(stdout)
        transport, _ = await loop.connect_read_pipe(lambda: protocol, os.fdopen(ours, "rb", 0))
    assert stdout is not None
    command = Command(process, Output(stdout), Output(process.stderr))
    process.stdin.write(stdin)
    process.stdin.close()
    try:
        yield command
    finally:
        await command.kill()
        if transport is not None:
            transport.close()
