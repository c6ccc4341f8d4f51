"""The command line."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
from aiohttp.http import HttpProcessingError

from pyserve.app import upstream_key
from pyserve.commands import COMMANDS
from pyserve.config import GIB, KIB, MIB, Config, Setting, format_size, settings
from pyserve.config_file import DEFAULT_PATH, ConfigFile, read_config_file
from pyserve.errors import ConfigError, MissingExtraError
from pyserve.inference_server import InferenceServer
from pyserve.model_config import ModelConfig
from pyserve.process import fastest_loop, raise_descriptor_limit

log = logging.getLogger("pyserve")

_SERVE_EPILOG = """\
\b
Examples:
  pyserve serve                                       a demo that needs no model
  pyserve serve --model qwen3-4b.gguf                 llama.cpp, started and supervised
  pyserve serve --upstream http://127.0.0.1:8080      in front of a llama-server you run
  PYSERVE_UPSTREAM_KEY=sk-... pyserve serve --upstream https://api.openai.com
  pyserve serve --model small=qwen3-4b.gguf --model large=qwen3-32b.gguf
  pyserve serve --config pyserve.toml                 settings and models in a file

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


class _Urls(click.ParamType[str]):
    """A URL, or NAME= and one; several in an environment variable have blanks between them."""

    name = "url"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Any text."""
        return str(value)


class _Files(_Urls):
    """A file, or NAME= and one; several in an environment variable are separated as in PATH."""

    name = "file"
    envvar_list_splitter = os.pathsep


_SOURCES: dict[str, _Urls] = {"upstream": _Urls(), "model": _Files()}


def _option(setting: Setting) -> click.Option:
    keywords: dict[str, Any] = {
        "default": setting.default,
        "help": setting.description,
        "envvar": setting.environment_variable,
        "show_default": setting.default is not None,
        "show_envvar": True,
    }
    if setting.name in _SOURCES:
        keywords |= {"type": _SOURCES[setting.name], "multiple": True, "default": ()}
        keywords |= {"metavar": f"[NAME=]{_SOURCES[setting.name].name.upper()}"}
    elif setting.type is bool:
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


def _read_config(ctx: click.Context, _param: click.Parameter, path: Path | None) -> ConfigFile:
    """What the file says stands in for what is not said otherwise."""
    if path is None:
        if not DEFAULT_PATH.is_file():
            return ConfigFile()
        path = DEFAULT_PATH
    try:
        file = read_config_file(path)
    except ConfigError as error:
        raise click.ClickException(str(error)) from error
    ctx.default_map = {
        name: [value] if name in _SOURCES else value for name, value in file.settings.items()
    }
    return file


def _serve(verbose: bool, config_file: ConfigFile, **values: Any) -> None:
    """Serve resumable streams in front of an LLM.

    The stream of a POST with an X-Conversation-Id goes on when its reader leaves, and can be read
    again, from any byte, by anyone who knows the id.
    """
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    logging.getLogger("aiohttp.server").addFilter(_BadRequestsInOneLine())
    raise_descriptor_limit()
    try:
        config, named = _sources(values, config_file.models)
        with asyncio.Runner(loop_factory=fastest_loop()) as runner:
            runner.run(_run(config, named))
    except (ConfigError, MissingExtraError) as error:
        raise click.ClickException(str(error)) from error


def _sources(values: dict[str, Any], models: list[ModelConfig]) -> tuple[Config, list[ModelConfig]]:
    """The settings, with the source that takes any name if there is one; and the named ones."""
    upstreams = dict(map(_named_upstream, values["upstream"]))
    files = dict(map(_named_file, values["model"]))
    for option, given in (("--upstream", upstreams), ("--model", files)):
        if len(given) < len(values[option.lstrip("-")]):
            raise ConfigError(f"{option}: only one source of generations may go without a name")
    values["upstream"], values["model"] = upstreams.pop("", None), files.pop("", None)
    if not (models or upstreams or files or values["upstream"] or values["model"]):
        values["demo"] = True
    config = Config(**values)
    key = upstream_key(config) if upstreams else None
    named = [
        *models,
        *(ModelConfig(name, upstream=url, key=key) for name, url in upstreams.items()),
        *(
            ModelConfig(
                name,
                file=Path(file),
                slots=config.model_slots,
                context_tokens=config.model_context_tokens,
            )
            for name, file in files.items()
        ),
    ]
    return config, named


def _named_upstream(value: str) -> tuple[str, str]:
    """The name, empty if there is none, and the URL, which may hold an equals sign, too."""
    name, equals, url = value.partition("=")
    return (name, url) if equals and "://" not in name else ("", value)


def _named_file(value: str) -> tuple[str, str]:
    name, equals, file = value.partition("=")
    return (name, file) if equals and not Path(value).exists() else ("", value)


main.add_command(
    click.Command(
        "serve",
        callback=_serve,
        help=_serve.__doc__,
        epilog=_SERVE_EPILOG,
        params=[
            click.Option(
                ["--config", "config_file"],
                type=click.Path(path_type=Path),
                metavar="FILE",
                callback=_read_config,
                is_eager=True,
                envvar="PYSERVE_CONFIG",
                show_envvar=True,
                help="Settings by their names, and [[models]]. By default ./pyserve.toml, if it is"
                " there.",
            ),
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


async def _run(config: Config, models: list[ModelConfig]) -> None:
    stop = _StopSignals()
    files = [model.file for model in models] + [config.model]
    label = f"Loading {', '.join(file.name for file in files if file is not None)}"
    server = InferenceServer(config, models=models, on_load_progress=_LoadBar(label))
    try:
        if not await _run_until(stop.asked, server.start()):
            return
        _tell_start(config, server)
        await stop.asked.wait()
        await server.stop_listening()
        log.info("stopping; running generations have %g s to finish", config.drain_timeout_s)
        await _run_until(stop.asked_again, server.drain(config.drain_timeout_s))
    finally:
        await server.stop(drain_timeout_s=0)


def _tell_start(config: Config, server: InferenceServer) -> None:
    if config.demo:
        click.echo("DEMO: no model is running. Give --model FILE.gguf or --upstream URL for one.")
    click.echo(f"listening on {server.url}")


if __name__ == "__main__":
    main()
