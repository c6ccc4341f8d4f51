"""Every limit and default of pyserve: name with unit, default, and why it is that.

The command line's options, the environment variables and the table in the README are made from the
fields of :class:`Config`, so a setting is written down once, here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

from pyserve.errors import ConfigError

Unit = Literal["", "seconds", "milliseconds", "bytes", "tokens"]
Ui = Literal["pyserve", "upstream"]

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB


def _setting(default: Any, description: str, *, minimum: float | None = None) -> Any:
    return field(default=default, metadata={"description": description, "minimum": minimum})


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of one pyserve, checked when it is made.

    Raises:
        ConfigError: a value out of its range, or more than one source of generations.
    """

    # --- the process
    host: str = _setting("127.0.0.1", "Address to listen on.")
    port: int = _setting(8000, "Port to listen on; 0 takes a free one.", minimum=0)
    drain_timeout_s: float = _setting(
        30.0, "How long running generations may go on after a stop signal.", minimum=0.0
    )

    # --- where generations come from (at most one; none: only an embedder's own producers)
    upstream: str | None = _setting(
        None, "URL of an OpenAI-compatible server (llama-server, vLLM, ...) to stream from."
    )
    upstream_key_file: Path | None = _setting(
        None, "File that holds the upstream's API key. PYSERVE_UPSTREAM_KEY holds the key itself."
    )
    model: Path | None = _setting(
        None, "A GGUF file: pyserve starts and supervises a llama.cpp of its own for it."
    )
    model_context_tokens: int = _setting(
        8192, "Context of --model, shared by its slots.", minimum=64
    )
    model_slots: int = _setting(2, "Generations that --model runs at once.", minimum=1)
    demo: bool = _setting(False, "Stream a short tour of pyserve; needs no model.")

    # --- the page
    ui: Ui = _setting(
        "pyserve",
        "The page at /: pyserve's own, or the upstream's (llama.cpp's web UI) passed through.",
    )

    # --- the log of a session
    max_session_bytes: int = _setting(
        32 * MIB,
        "Bytes kept of one stream; beyond it the oldest events go. llama.cpp sends about 290 bytes"
        " a token, so the default holds some 115,000 tokens.",
        minimum=4 * KIB,  # an error event must fit
    )
    max_total_bytes: int = _setting(
        1 * GIB,
        "Memory for all streams together. Finished ones go first, oldest first; when only live ones"
        " are left a new one is refused.",
        minimum=64 * KIB,
    )
    session_ttl_s: float = _setting(
        300.0, "How long a stream can be read again after its end.", minimum=0.0
    )
    heartbeat_interval_s: float = _setting(
        1.0,
        "Silence after which a live stream gets a ': ping' line. llama.cpp's page expects one each"
        " second.",
        minimum=0.01,
    )

    # --- the upstream's time limits
    status_grace_s: float = _setting(
        2.0,
        "How long a POST's status is held back so that an early upstream error has its own status.",
        minimum=0.0,
    )
    upstream_connect_timeout_s: float = _setting(
        10.0, "Until the upstream has accepted the connection.", minimum=0.01
    )
    upstream_first_byte_timeout_s: float = _setting(
        300.0, "Until its first byte: it may be reading a long prompt.", minimum=0.01
    )
    upstream_idle_timeout_s: float = _setting(
        60.0, "Between two reads of a stream that has begun.", minimum=0.01
    )

    # --- the readers
    write_timeout_s: float = _setting(
        30.0, "A reader that takes nothing for this long is disconnected.", minimum=0.01
    )
    coalesce_ms: float = _setting(
        0.0,
        "Least time between two sends of a live stream to those whom the pump serves, for fewer"
        " packets; 0 sends each event at once while there is room.",
        minimum=0.0,
    )
    send_buffer_bytes: int = _setting(
        128 * KIB,
        "Kernel send buffer of a reader; without a bound one that stalls holds about 4 MB.",
        minimum=4 * KIB,
    )
    max_body_bytes: int = _setting(
        32 * MIB, "Largest request body; pictures in prompts are large.", minimum=1 * KIB
    )
    body_idle_timeout_s: float = _setting(
        30.0, "A request body of which nothing comes for this long is given up.", minimum=0.01
    )

    def __post_init__(self) -> None:
        for setting in settings():
            value = getattr(self, setting.name)
            setting.check(value)
            if setting.type is Path and value is not None:
                object.__setattr__(self, setting.name, Path(value))  # a string is a path, too
        if self.port > 65535:
            raise ConfigError(f"port is {self.port}, the largest is 65535")
        if self.max_total_bytes < self.max_session_bytes:
            raise ConfigError(
                f"max_total_bytes ({self.max_total_bytes}) is less than"
                f" max_session_bytes ({self.max_session_bytes})"
            )
        sources = [name for name in ("upstream", "model", "demo") if getattr(self, name)]
        if len(sources) > 1:
            raise ConfigError(f"only one source of generations is possible, not {sources}")
        if self.ui == "upstream" and not (self.upstream or self.model):
            raise ConfigError(
                "ui is 'upstream', which needs an upstream or a model that has a page"
            )
        if self.upstream is not None:
            _check_url(self.upstream)
        if self.model is not None and not self.model.is_file():
            raise ConfigError(f"model: there is no file {self.model}")


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a bracket left open, a port that is none
        usable = False
    if not usable:
        raise ConfigError(f"upstream must be an http:// or https:// URL, not {url!r}")
    if parts.query or parts.fragment or parts.username:
        raise ConfigError("upstream must be a plain URL, without user, query or fragment")


@dataclass(frozen=True)
class Setting:
    """One field of :class:`Config`, as its documentation and the command line see it."""

    name: str
    type: type
    default: Any
    description: str
    minimum: float | None
    choices: tuple[str, ...] = ()

    @property
    def unit(self) -> Unit:
        """The unit, which is also the end of the name."""
        for suffix, unit in _UNITS.items():
            if self.name.endswith(suffix):
                return unit
        return ""

    @property
    def option(self) -> str:
        """The command line option; seconds are named by its help only."""
        return "--" + self.name.removesuffix("_s").replace("_", "-")

    @property
    def environment_variable(self) -> str:
        """The environment variable."""
        return "PYSERVE_" + self.name.upper()

    def check(self, value: Any) -> None:
        """Raise ConfigError if `value` is none of the choices, below the minimum or not a finite
        number."""
        if self.choices and value not in self.choices:
            raise ConfigError(f"{self.name} is {value!r}, not one of {', '.join(self.choices)}")
        if self.minimum is None:
            return
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"{self.name} must be a number, not {value!r}")
        if not self.minimum <= value < float("inf"):
            raise ConfigError(f"{self.name} is {value}, the smallest is {self.minimum:g}")


_UNITS: dict[str, Unit] = {
    "_s": "seconds",
    "_ms": "milliseconds",
    "_bytes": "bytes",
    "_tokens": "tokens",
}

_BASE_TYPES: dict[str, type] = {
    "str": str,
    "str | None": str,
    "int": int,
    "float": float,
    "bool": bool,
    "Path | None": Path,
    "Ui": str,
}

_CHOICES: dict[str, tuple[str, ...]] = {"Ui": get_args(Ui)}


def settings() -> Iterator[Setting]:
    """All settings in their order."""
    for item in dataclasses.fields(Config):
        yield Setting(
            name=item.name,
            type=_BASE_TYPES[str(item.type)],
            default=item.default,
            description=item.metadata["description"],
            minimum=item.metadata["minimum"],
            choices=_CHOICES.get(str(item.type), ()),
        )


def format_size(size_bytes: int) -> str:
    """A size in the largest unit that fits it whole, such as ``32MiB``."""
    for unit, factor in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if size_bytes % factor == 0:
            return f"{size_bytes // factor}{unit}"
    return str(size_bytes)


def settings_table() -> str:
    """The README's table of settings, in Markdown."""
    lines = ["| option | variable | default | |", "| --- | --- | --- | --- |"]
    for setting in settings():
        default = "" if setting.default in (None, False) else setting.default
        if setting.unit == "bytes":
            default = format_size(setting.default)
        elif setting.unit == "seconds":
            default = f"{setting.default:g} s"
        elif setting.unit == "milliseconds":
            default = f"{setting.default:g} ms"
        lines.append(
            f"| `{setting.option}` | `{setting.environment_variable}` | {default} |"
            f" {setting.description} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(settings_table())
