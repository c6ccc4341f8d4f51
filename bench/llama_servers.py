"""llama.cpp with a tiny model: alone, and behind ``pyserve serve``."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from points import Point
from processes import ROOT, Contestant, Program, findings_of, read_streams

sys.path.append(str(ROOT / "tests" / "support"))

_COMPLETIONS = "/v1/chat/completions"
_STREAM = "/v1/stream?conv_id=s{}"

#: How far before the end of a log a reader comes back.
_BYTES_BEHIND = 3000


class Llama(Contestant):
    """Generates for the first reader of each stream; the tokens are the same in every run."""

    def prepare(self, point: Point) -> list[object]:
        body = json.dumps(
            {
                "messages": [{"role": "user", "content": "bado kele"}],
                "max_tokens": point.events,
                "stream": True,
                "seed": 1,
            }
        )
        foreign = ["--foreign", "--events", 0, "--leave-after", 0]
        post = ["--post", _COMPLETIONS, "--body", body, "--header", "X-Conversation-Id: s{}"]
        if point.way == "generate":
            return [*foreign, "--get", f"{_STREAM}&from=0", *post]
        with read_streams("--foreign", "--port", self.port, *post) as client:
            log_bytes = findings_of(client)["body_bytes"]
        position = log_bytes - _BYTES_BEHIND if point.way == "reattach" else 0
        return [*foreign, "--get", f"{_STREAM}&from={position}"]


@contextmanager
def llama_server(slots: int) -> Iterator[tuple[Program, int]]:
    """llama.cpp on one thread; its port."""
    from tiny_gguf import write_tiny_model

    with tempfile.TemporaryDirectory(prefix="pyserve-bench-") as directory:
        context_tokens = 16384
        model = write_tiny_model(Path(directory) / "tiny.gguf", context_length=context_tokens)
        command = [
            *("-m", "pyserve.producers.llama_child", "--model", model, "--port", 0),
            *("--threads", 1, "--parallel", slots, "--ctx-size", slots * context_tokens),
        ]
        with Program(*command, python=True) as server:
            yield server, server.listening_port()


@contextmanager
def pyserve_before_llama(llama_port: int) -> Iterator[tuple[Program, int]]:
    """``pyserve serve`` with llama.cpp as its upstream; its port."""
    upstream = f"http://127.0.0.1:{llama_port}"
    command = ["-m", "pyserve.cli", "serve", "--port", "0", "--upstream", upstream]
    with Program(*command, python=True) as server:
        yield server, server.listening_port()
