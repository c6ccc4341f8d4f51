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

from pyserve.errors import ConfigError
from pyserve.model_config import check_url

Unit = Literal["", "seconds", "milliseconds", "bytes", "tokens"]
Ui = Literal["pyserve", "upstream"]
HighestPriority = Literal["high", "normal"]

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

NO_PAGE = "ui is 'upstream', which needs an upstream or a model that has a page"


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
    max_connections: int = _setting(
        0,
        "Requests answered at once, open streams included; more get 503. 0: any number.",
        minimum=0,
    )
    admin_key_file: Path | None = _setting(
        None,
        "File that holds the key of /admin, which does not exist without one. PYSERVE_ADMIN_KEY"
        " holds the key itself.",
    )

    # --- where generations come from (at most one that takes any model's name; named ones are
    # models of their own; none: only an embedder's own producers)
    upstream: str | None = _setting(
        None,
        "URL of an OpenAI-compatible server (llama-server, vLLM, ...) to stream from. NAME=URL, any"
        " number of times, for requests that name this model.",
    )
    upstream_key_file: Path | None = _setting(
        None, "File that holds the upstream's API key. PYSERVE_UPSTREAM_KEY holds the key itself."
    )
    model: Path | None = _setting(
        None,
        "A GGUF file: pyserve starts and supervises a llama.cpp of its own for it. NAME=FILE as"
        " with --upstream.",
    )
    model_context_tokens: int = _setting(
        8192, "Context of --model, shared by its slots.", minimum=64
    )
    model_slots: int = _setting(2, "Generations that --model runs at once.", minimum=1)
    demo: bool = _setting(False, "Stream a short tour of pyserve; needs no model.")

    # --- who waits for whom
    max_queue: int = _setting(
        1000, "Generations that wait for a slot, over all models; more get 429.", minimum=0
    )
    max_waiting_per_owner: int = _setting(
        500, "Of those, one owner's: nobody fills the queue alone. 0: as many as fit.", minimum=0
    )
    max_running_per_owner: int = _setting(
        0, "One owner's generations that run at once, over all models. 0: any number.", minimum=0
    )
    max_priority: HighestPriority = _setting(
        "normal", "The highest that a request may ask for; it gets normal if it asks for none."
    )
    ageing_s: float = _setting(
        30.0,
        "Wait after which a request counts as one priority higher, so that none starves.",
        minimum=0.01,
    )
    request_timeout_s: float = _setting(
        0.0, "Longest time for one generation, its wait for a slot included. 0: any.", minimum=0.0
    )
    abandon_after_s: float = _setting(
        0.0, "A generation that nobody reads for this long is stopped. 0: never.", minimum=0.0
    )

    # --- the models
    health_interval_s: float = _setting(
        5.0,
        "How often each model's upstream is asked for its health; each second while it is ill."
        " 0: never, it counts as well.",
        minimum=0.0,
    )
    unhealthy_wait_s: float = _setting(
        30.0,
        "How long those who wait already go on waiting when their model falls ill. New ones get 503"
        " at once.",
        minimum=0.0,
    )
    model_load_timeout_s: float = _setting(
        600.0, "Until a new version has loaded and answered its warm-up.", minimum=0.01
    )
    model_drain_timeout_s: float = _setting(
        300.0,
        "How long generations may go on at a version that was swapped or removed.",
        minimum=0.0,
    )

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
        if self.ui == "upstream" and self.demo:
            raise ConfigError(NO_PAGE)
        if self.upstream is not None:
            check_url(self.upstream, "upstream")
        if self.model is not None and not self.model.is_file():
            raise ConfigError(f"model: there is no file {self.model}")


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
    "HighestPriority": str,
}

_CHOICES: dict[str, tuple[str, ...]] = {
    "Ui": get_args(Ui),
    "HighestPriority": get_args(HighestPriority),
}


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
