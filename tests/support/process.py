"""Real processes: ``pyserve serve`` and what else a test starts, with their output collected."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 20.0

LISTENING = r"listening on (http://\S+)"


class Process:
    """A running command. Its output, stderr included, is read as it comes."""

    def __init__(
        self,
        command: Sequence[str | Path],
        env: Mapping[str, str] | None = None,
        *,
        folder: Path | None = None,
    ) -> None:
        self._popen = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=None if env is None else dict(env),
            cwd=folder,
        )
        self.pid = self._popen.pid
        self._output = ""
        self._ended = False
        self._news = threading.Condition()
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._popen.kill()
        self.wait()

    def _read(self) -> None:
        assert self._popen.stdout is not None
        with self._popen.stdout as lines:
            for line in lines:
                with self._news:
                    self._output += line
                    self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    @property
    def output(self) -> str:
        """What it has written so far."""
        with self._news:
            return self._output

    def wait_for(self, pattern: str, timeout_s: float = START_TIMEOUT_S) -> re.Match[str]:
        """The first match of `pattern` in the output, waited for."""

        def found() -> re.Match[str] | None:
            return re.search(pattern, self._output, re.MULTILINE)

        with self._news:
            self._news.wait_for(lambda: self._ended or found(), timeout_s)
            match = found()
            assert match, f"no {pattern!r} in the output:\n{self._output}"
            return match

    def send(self, stop_signal: signal.Signals) -> None:
        self._popen.send_signal(stop_signal)

    def wait(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Wait for the end; returns the exit status, all output is there."""
        status = self._popen.wait(timeout_s)
        self._reading.join(timeout_s)
        return status

    def stop(self, stop_signal: signal.Signals = signal.SIGTERM) -> int:
        self.send(stop_signal)
        return self.wait()


class Server(Process):
    """A process that serves HTTP; made when it has said where."""

    def __init__(
        self,
        command: Sequence[str | Path],
        env: Mapping[str, str] | None = None,
        *,
        listening: str = LISTENING,
    ) -> None:
        super().__init__(command, env)
        try:
            self.url = self.wait_for(listening)[1]
        except BaseException:
            self.__exit__()
            raise


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without pyserve's settings, and with `changes`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYSERVE_")}
    return kept | changes


def pyserve_command(*arguments: str | Path) -> list[str | Path]:
    return [sys.executable, "-m", "pyserve.cli", *arguments]


@contextmanager
def pyserve(*arguments: str | Path, env: Mapping[str, str] | None = None) -> Iterator[Server]:
    """``pyserve serve ARGUMENTS`` on a free port; stopped by SIGTERM, which must succeed."""
    command = pyserve_command("serve", "--port", "0", *arguments)
    with Server(command, env or environment()) as server:
        yield server
        assert server.stop() == 0, server.output
        assert "Traceback" not in server.output, server.output
