"""Processes of the bench: started, talked to in lines, their CPU time and memory read."""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from points import Point

BENCH = Path(__file__).parent
ROOT = BENCH.parent
PROGRAMS = ROOT / "build" / "bench"

PATIENCE_S = 90.0


class BenchError(Exception):
    """A server or the load client failed; no figure of that run counts."""


def rss_bytes(pid: int | str = "self") -> int:
    """Memory that a process occupies."""
    pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


class Program:
    """A running command that is spoken to in lines. What it complains about goes into the error
    that ends the bench."""

    def __init__(self, *command: object, python: bool = False) -> None:
        words = [str(word) for word in command]
        self._name = " ".join(words)
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115
        self._popen = subprocess.Popen(
            [sys.executable, *words] if python else words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            bufsize=0,
        )
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._input, self._output = self._popen.stdin, self._popen.stdout
        self._pending = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._input.close()
        self._popen.terminate()
        try:
            self._popen.wait(5)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
        self._output.close()
        self._complaints.close()

    def _fail(self, why: str) -> BenchError:
        self._complaints.seek(0)
        said = self._complaints.read().decode(errors="replace")[-3000:]
        return BenchError(f"{self._name}: {why}\n{said}")

    def read_line(self, pattern: str = "") -> str:
        """The next line that `pattern` is found in."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            line, found, rest = self._pending.partition(b"\n")
            if not found:
                self._pending += self._read(deadline - time.monotonic())
                continue
            self._pending = rest
            if re.search(pattern, text := line.decode(errors="replace")):
                return text

    def _read(self, timeout_s: float) -> bytes:
        if not select.select([self._output], [], [], max(0, timeout_s))[0]:
            raise self._fail(f"silent for {PATIENCE_S:.0f} s")
        block = os.read(self._output.fileno(), 65536)
        if not block:
            raise self._fail(f"ended with status {self._popen.wait()}")
        return block

    def read_to_end(self) -> str:
        """All of its output; it must succeed."""
        said = self._output.read().decode()
        if self._popen.wait() != 0:
            raise self._fail(f"ended with status {self._popen.returncode}")
        return said

    def read_json(self) -> dict[str, Any]:
        """The next line that is an object."""
        answer: dict[str, Any] = json.loads(self.read_line("^{"))
        return answer

    def command(self, *words: object) -> dict[str, Any]:
        """Send a command; returns its answer."""
        self._input.write(" ".join(map(str, words)).encode() + b"\n")
        return self.read_json()

    def listening_port(self) -> int:
        """The port that the program says it listens on, on whichever output."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            if select.select([self._output], [], [], 0.02)[0]:
                self._pending += self._read(0)
            said = self._pending + os.pread(self._complaints.fileno(), 1 << 20, 0)
            if found := re.search(rb"listening on http://\S+:(\d+)", said):
                return int(found[1])
        raise self._fail("does not listen")

    @property
    def cpu_s(self) -> float:
        """User and system time of the process, in all its threads."""
        return time.clock_gettime((~self._popen.pid << 3) | 2)  # CPUCLOCK_SCHED of <linux/time.h>

    @property
    def rss_bytes(self) -> int:
        """Memory that it occupies."""
        return rss_bytes(self._popen.pid)

    @property
    def descriptors(self) -> int:
        """File descriptors that it holds."""
        return sum(1 for _ in Path(f"/proc/{self._popen.pid}/fd").iterdir())


class Contestant:
    """A running server, as one run of a point sees it."""

    def __init__(self, measured: Sequence[Program], port: int) -> None:
        #: Whose CPU time and memory count.
        self.measured = measured
        self.port = port
        #: Memory before any reader came: what one has used is not always given back.
        self.idle_rss_bytes = sum(program.rss_bytes for program in measured)

    def prepare(self, point: Point) -> list[object]:
        """Make the streams of one run; returns how the load client reads them."""
        raise NotImplementedError

    def go(self) -> None:
        """Let the events come; all readers are attached."""

    def finish(self) -> dict[str, object]:
        """Drop the streams; returns what the server says about itself."""
        return {}


def read_streams(*options: object) -> Program:
    """Start the load client."""
    return Program(PROGRAMS / "load_client", *options)


def findings_of(client: Program) -> dict[str, Any]:
    """What a load client found; it must have found no error."""
    found = client.read_json()
    if found["errors"]:
        raise BenchError("the load client: " + "; ".join(found["errors"]))
    return found
