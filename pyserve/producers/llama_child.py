"""llama.cpp's HTTP server as a child process that ends with its parent.

Run as ``python -m pyserve.producers.llama_child --model FILE.gguf --port N``. It becomes the
``llama-server`` on PATH where there is one, and otherwise runs the one in the `xllamacpp`
package: same flags, same environment variable ``LLAMA_API_KEY``. Progress and errors are
llama.cpp's lines on stderr; while the model loads, ``GET /health`` answers 503.

Exit status: 0 after SIGTERM or SIGINT (the signal itself while the model loads), 1 with a last
line on stderr that says what failed, 2 for arguments that make no sense.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

GGUF_MAGIC = b"GGUF"

PR_SET_PDEATHSIG = 1
"""From <sys/prctl.h>: the signal a process gets when the thread that started it ends."""

PARENT_POLL_S = 1.0
"""How often the parent is looked for. Only systems without PR_SET_PDEATHSIG depend on it."""


class MissingLlamaError(ImportError):
    """The optional package that holds llama.cpp is not installed."""

    def __init__(self) -> None:
        super().__init__(
            "--model needs llama.cpp: pip install 'pyserve[llama]', or put llama-server on PATH"
        )


class StartError(Exception):
    """llama.cpp could not start; the message is for the person who started it."""


def main(argv: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(arguments)
    parent = int(os.environ.get("PYSERVE_PARENT_PID", os.getppid()))
    _die_with_parent()
    if os.getppid() != parent:  # it ended before the kernel was told
        sys.exit("error: the process that started this one has ended")
    if llama_server := shutil.which("llama-server"):
        os.execv(llama_server, [llama_server, *arguments])  # what the kernel was told stays told
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's handler would wait for the load
    try:
        _server = _start(options)  # serves until it is deleted
    except (MissingLlamaError, StartError) as error:
        sys.exit(f"error: {error}")
    _stop_on_signals()
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_S)
    _leave()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pyserve.producers.llama_child", allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", "-m", type=Path, required=True, metavar="FILE.gguf")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=8080, help="0: a free one, named in the log (default: 8080)")
    add("--alias", "-a", help="the model's name in answers (default: its path)")
    add("--ctx-size", "-c", type=int, default=0, metavar="TOKENS", help="0: the model's own")
    add("--parallel", "-np", type=int, default=-1, metavar="SLOTS", help="-1: llama.cpp's choice")
    add("--threads", "-t", type=int, default=-1, metavar="N", help="-1: one for each core")
    add("--n-gpu-layers", "-ngl", type=int, default=-1, metavar="N", help="-1: as many as fit")
    add("--device", "-dev", metavar="NAME", help="where to run; only llama-server knows it")
    add("--cache-type-k", "-ctk", default="f16", metavar="TYPE", help="of the cache's keys")
    add("--cache-type-v", "-ctv", default="f16", metavar="TYPE", help="of the cache's values")
    add("--metrics", action="store_true", help="serve GET /metrics")
    add("--no-ui", action="store_true", help="do not serve llama.cpp's own page")
    return parser


def _start(options: argparse.Namespace) -> Any:
    """Load the model and return the running server. Its HTTP side answers while it loads."""
    try:
        xllamacpp = import_module("xllamacpp")  # not `import`: it comes without types
    except ModuleNotFoundError as error:
        raise MissingLlamaError from error

    _check_model_file(options.model)
    if options.device:
        raise StartError("--device needs a llama-server on PATH: xllamacpp chooses by itself")
    params = xllamacpp.CommonParams()
    params.model.path = str(options.model)
    params.hostnames = [options.host]
    params.port = options.port
    params.n_ctx = options.ctx_size
    params.n_parallel = options.parallel
    params.cpuparams.n_threads = options.threads
    params.n_gpu_layers = options.n_gpu_layers
    params.cache_type_k = _cache_type(xllamacpp, options.cache_type_k)
    params.cache_type_v = _cache_type(xllamacpp, options.cache_type_v)
    params.endpoint_metrics = options.metrics
    params.ui = not options.no_ui
    if options.alias:
        params.model_alias = {options.alias}
    if key := os.environ.get("LLAMA_API_KEY"):
        params.api_keys = [key]
    try:
        return xllamacpp.Server(params)
    except RuntimeError as error:  # it names no cause: that went to stderr before
        raise StartError(
            f"llama.cpp could not serve {options.model} on {options.host}:{options.port};"
            " its own messages above say why"
        ) from error


def _cache_type(xllamacpp: Any, name: str) -> Any:
    known = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{name.upper()}", None)
    if known is None:
        raise StartError(f"{name!r} is no type of cache")
    return known


def _check_model_file(path: Path) -> None:
    """Name the usual mistakes in one line instead of llama.cpp's ten."""
    try:
        with path.open("rb") as file:
            magic = file.read(len(GGUF_MAGIC))
    except OSError as error:
        raise StartError(f"cannot read the model {path}: {error.strerror}") from error
    if magic != GGUF_MAGIC:
        raise StartError(f"{path} is not a GGUF file")


def _die_with_parent() -> None:
    """Have the kernel kill this process with its parent, however that one ends.

    SIGKILL, since there is nothing to save and llama.cpp may be busy. Counted from the thread
    that started this process, so a supervisor starts it from one that lives as long as itself.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _stop_on_signals() -> None:
    """Leave on SIGTERM and SIGINT.

    Called after loading, not before: while llama.cpp loads, Python can run no handler, and the
    default action ends the process at once. llama.cpp's own handlers would end only its loop.
    """

    def stop(_signal: int, _frame: FrameType | None) -> NoReturn:
        _leave()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)


def _leave() -> NoReturn:
    """End the process without winding llama.cpp down.

    Its destructor waits up to 30 s for a response that is still streaming. The kernel closes the
    sockets now, in the middle of a chunk, which is what tells a client that it has not got all.
    """
    os._exit(0)


if __name__ == "__main__":
    main()
