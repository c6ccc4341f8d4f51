"""The command line."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import socket
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
from aiohttp import web
from aiohttp.http import HttpProcessingError

from pyserve.app import create_app, drain
from pyserve.commands import COMMANDS
from pyserve.config import GIB, KIB, MIB, Config, Setting, format_size, settings
from pyserve.errors import ConfigError, MissingExtraError
from pyserve.process import fastest_loop, raise_descriptor_limit

log = logging.getLogger("pyserve")

_ACCESS_LOG_FORMAT = '%a "%r" %s %b %Tf s %{X-Request-Id}o'

# Responses end within SHUTDOWN_DRAIN_S or are reset; this is for what else a handler does then.
_HANDLER_TIMEOUT_S = 1.0

# Longer than the 60 s that proxies keep an idle connection; aiohttp's own default is an hour.
_KEEPALIVE_TIMEOUT_S = 75.0

_SERVE_EPILOG = """\
\b
Examples:
  pyserve serve                                       a demo that needs no model
  pyserve serve --model qwen3-4b.gguf                 llama.cpp, started and supervised
  pyserve serve --upstream http://127.0.0.1:8080      in front of a llama-server you run
  PYSERVE_UPSTREAM_KEY=sk-... pyserve serve --upstream https://api.openai.com

\b
Then, in another terminal:
  curl -N http://127.0.0.1:8000/v1/chat/completions -H 'X-Conversation-Id: hello' \\
       -d '{"stream": true, "messages": [{"role": "user", "content": "Hi"}]}'
  curl -N http://127.0.0.1:8000/v1/stream/hello       read it again, from anywhere
  curl -X DELETE http://127.0.0.1:8000/v1/stream/hello     stop it
"""


_SIZE_UNITS = {"": 1, "kib": KIB, "mib": MIB, "gib": GIB}


class ByteSize(click.ParamType[int]):
    """A number of bytes, or with a unit: 4096, 64KiB, 32MiB, 1GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse `value`; fails with a message that shows the forms."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"([0-9]+)\s*([KMG]iB)?", str(value), re.IGNORECASE)
        if match is None:
            self.fail(f"{value!r} is not a size such as 4096, 64KiB, 32MiB or 1GiB", param, ctx)
        return int(match[1]) * _SIZE_UNITS[(match[2] or "").lower()]


def _option(setting: Setting) -> click.Option:
    keywords: dict[str, Any] = {
        "default": setting.default,
        "help": setting.description,
        "envvar": setting.environment_variable,
        "show_default": setting.default is not None,
        "show_envvar": True,
    }
    if setting.type is bool:
        keywords |= {"is_flag": True}
    elif setting.choices:
        keywords |= {"type": click.Choice(setting.choices)}
    elif setting.unit == "bytes":
        keywords |= {"type": ByteSize(), "default": format_size(setting.default)}
    elif setting.type is Path:
        keywords |= {"type": click.Path(path_type=Path), "metavar": "FILE"}
    else:
        keywords |= {"type": setting.type}
    if setting.unit in ("seconds", "milliseconds", "tokens"):
        keywords |= {"metavar": setting.unit.upper()}
    return click.Option([setting.option, setting.name], **keywords)


@click.group()
@click.version_option(package_name="pyserve")
def main() -> None:
    """LLM token streams that survive the reader."""


class _BadRequestsInOneLine(logging.Filter):
    """aiohttp logs a traceback for what its parser refuses: anyone could fill the log with them."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep the line, drop the traceback."""
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, HttpProcessingError):
            record.exc_info = None
            record.levelno, record.levelname = logging.INFO, "INFO"
            record.msg = f"{record.msg}: {type(error).__name__}"
        return True


def _serve(verbose: bool, **values: Any) -> None:
    """Serve resumable streams in front of an LLM.

    The stream of a POST with an X-Conversation-Id goes on when its reader leaves, and can be read
    again, from any byte, by anyone who knows the id.
    """
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    logging.getLogger("aiohttp.server").addFilter(_BadRequestsInOneLine())
    if not (values["upstream"] or values["model"] or values["demo"]):
        values["demo"] = True
    raise_descriptor_limit()
    try:
        with asyncio.Runner(loop_factory=fastest_loop()) as runner:
            runner.run(_run(Config(**values)))
    except (ConfigError, MissingExtraError) as error:
        raise click.ClickException(str(error)) from error


main.add_command(
    click.Command(
        "serve",
        callback=_serve,
        help=_serve.__doc__,
        epilog=_SERVE_EPILOG,
        params=[
            *map(_option, settings()),
            click.Option(["--verbose", "-v"], is_flag=True, help="Log llama.cpp's lines, too."),
        ],
    )
)
for command in COMMANDS:
    main.add_command(command)


class _LoadBar:
    """A progress bar that appears with the first news and goes with the last."""

    def __init__(self, label: str) -> None:
        self._bar = click.progressbar(length=100, label=label)
        self._shown_percent = 0

    def __call__(self, share: float) -> None:
        percent = int(share * 100)
        if percent <= self._shown_percent:
            return
        self._bar.update(percent - self._shown_percent)
        self._shown_percent = percent
        if percent >= 100:
            self._bar.render_finish()


class _StopSignals:
    """SIGINT and SIGTERM: the first asks to stop, a second one to stop at once."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.asked_again = asyncio.Event()
        loop = asyncio.get_running_loop()
        for stop_signal in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(stop_signal, self._on_signal)

    def _on_signal(self) -> None:
        (self.asked_again if self.asked.is_set() else self.asked).set()


async def _run_until(event: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Run `work` until it is done or `event` is set; tells whether it got done."""
    working = asyncio.create_task(work)
    waiting = asyncio.create_task(event.wait())
    await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    done = working.done()
    if not done:
        working.cancel()
    with suppress(asyncio.CancelledError):
        await working
    return done


async def _run(config: Config) -> None:
    stop = _StopSignals()
    label = f"Loading {config.model.name}" if config.model else ""
    app = create_app(config, on_load_progress=_LoadBar(label))
    runner = web.AppRunner(
        app,
        access_log_format=_ACCESS_LOG_FORMAT,
        keepalive_timeout=_KEEPALIVE_TIMEOUT_S,
        shutdown_timeout=_HANDLER_TIMEOUT_S,
    )
    try:
        if not await _run_until(stop.asked, runner.setup()):
            return
        site = web.TCPSite(runner, config.host, config.port)
        try:
            await site.start()
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {config.host}:{config.port}: {_reason(error)}"
            ) from error
        _tell_start(config, runner)
        await stop.asked.wait()
        await site.stop()
        log.info("stopping; running generations have %g s to finish", config.drain_timeout_s)
        await _run_until(stop.asked_again, drain(app, config.drain_timeout_s))
    finally:
        await runner.cleanup()


def _reason(error: OSError) -> str:
    """The system's words; asyncio puts its own around them."""
    if error.errno is None or isinstance(error, socket.gaierror):
        return str(error.strerror)
    return os.strerror(error.errno)


def _tell_start(config: Config, runner: web.AppRunner) -> None:
    if config.demo:
        click.echo("DEMO: no model is running. Give --model FILE.gguf or --upstream URL for one.")
    host, port = runner.addresses[0][:2]
    click.echo(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}")


if __name__ == "__main__":
    main()
