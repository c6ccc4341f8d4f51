"""What is said about one model: where it comes from, and how it is run.

The same words stand in a ``[[models]]`` table of ``pyserve.toml``, in the body of ``POST
/admin/models``, and in Python: the fields of :class:`ModelConfig`.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

from pyserve.errors import ConfigError

#: How llama.cpp keeps its cache: fewer bits hold longer contexts in the same memory.
CacheType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]

MAX_NAME_CHARS = 255

# A name stands in URLs and on command lines; "org/model:tag" is one, too.
_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._:/+@-]{{0,{MAX_NAME_CHARS - 1}}}")

# What an upstream is given by its options, not by a request's defaults.
_NOT_PARAMETERS = {"model", "messages", "prompt", "input", "stream"}


@dataclass(frozen=True)
class ModelConfig:
    """One version of a model. Exactly one of `upstream`, `file` and `demo` says where it is.

    Raises:
        ConfigError: a value that cannot work.
    """

    name: str
    version: str = "1"
    _: dataclasses.KW_ONLY

    #: URL of an OpenAI-compatible server, and its API key: a file that holds it, or itself.
    upstream: str | None = None
    key_file: Path | None = None
    key: str | None = field(default=None, repr=False)
    #: What the upstream calls the model, if not by our name.
    upstream_model: str | None = None
    #: A GGUF file: a llama.cpp is started for it, and supervised.
    file: Path | None = None
    #: The tour of pyserve, which needs no model.
    demo: bool = False

    #: Generations at once. None: what llama.cpp tells; as many as come where nothing tells.
    slots: int | None = None
    #: Asked for one token before a version serves; "" asks nothing.
    warm_up: str = "Hello"
    #: Parameters for requests that don't give them, such as ``{"temperature": 0.2}``.
    params: Mapping[str, Any] = field(default_factory=dict)

    # --- of a `file` only
    #: Context, shared by the slots.
    context_tokens: int = 8192
    #: Layers on the GPU. None: as many as fit.
    gpu_layers: int | None = None
    #: Where to run, as llama.cpp names its devices ("CUDA0"); needs ``llama-server`` on PATH.
    device: str | None = None
    cache_type_k: CacheType = "f16"
    cache_type_v: CacheType = "f16"

    def __post_init__(self) -> None:
        for name in ("file", "key_file"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, Path(getattr(self, name)))
        self._check_identity()
        self._check_source()
        self._check_options()

    def _check_identity(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"a model's name is letters, digits and any of ._:/+@- , not {self.name!r}"
            )
        if not isinstance(self.version, str) or not _NAME.fullmatch(self.version):
            raise ConfigError(f"{self.name}: version must be a short text, not {self.version!r}")

    def _check_source(self) -> None:
        given = [name for name in ("upstream", "file", "demo") if getattr(self, name)]
        if len(given) != 1:
            raise ConfigError(
                f"{self.name}: needs one of upstream, file and demo, has {' and '.join(given)}"
                if given
                else f"{self.name}: needs one of upstream (a URL), file (GGUF) and demo (true)"
            )
        if self.upstream is not None:
            check_url(self.upstream, f"{self.name}: upstream")
        if self.file is not None and not self.file.is_file():
            raise ConfigError(f"{self.name}: there is no file {self.file}")

    def _check_options(self) -> None:
        for name, least in (("slots", 1), ("context_tokens", 64), ("gpu_layers", 0)):
            value = getattr(self, name)
            if value is None and name != "context_tokens":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(
                    f"{self.name}: {name} must be a whole number from {least} on, not {value!r}"
                )
        for name in ("key", "device", "upstream_model"):
            if not isinstance(getattr(self, name), (str, type(None))):
                raise ConfigError(f"{self.name}: {name} must be a text")
        for name in ("cache_type_k", "cache_type_v"):
            if getattr(self, name) not in get_args(CacheType):
                choices = ", ".join(get_args(CacheType))
                raise ConfigError(
                    f"{self.name}: {name} is {getattr(self, name)!r}, not one of {choices}"
                )
        if not isinstance(self.warm_up, str):
            raise ConfigError(f"{self.name}: warm_up must be a text")
        if not isinstance(self.demo, bool):
            raise ConfigError(f"{self.name}: demo must be true or false")
        if self.device is not None and not re.fullmatch(r"[A-Za-z0-9_.,:]+", self.device):
            raise ConfigError(f"{self.name}: device must be a device's name")
        if not isinstance(self.params, Mapping) or not all(isinstance(k, str) for k in self.params):
            raise ConfigError(f"{self.name}: params must be a table")
        if wrong := sorted(_NOT_PARAMETERS & self.params.keys()):
            raise ConfigError(f"{self.name}: params cannot hold {wrong[0]}")

    @property
    def source(self) -> str:
        """Where it is, for people."""
        return str(self.upstream or self.file or "demo")


def check_url(url: object, what: str) -> None:
    """Raise ConfigError unless `url` is that of a server, and nothing more."""
    try:
        parts = urlsplit(url if isinstance(url, str) else "")
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a bracket left open, a port that is none
        usable = False
    if not usable:
        raise ConfigError(f"{what} must be an http:// or https:// URL, not {url!r}")
    if parts.query or parts.fragment or parts.username:
        raise ConfigError(f"{what} must be a plain URL, without user, query or fragment")


_KEYS = [item.name for item in dataclasses.fields(ModelConfig)]
_PATHS = ("file", "key_file")
_PARTS_OF_A_SOURCE = ("upstream", "key_file", "key", "upstream_model", "file")


def model_from_dict(
    given: Mapping[str, Any],
    *,
    beside: ModelConfig | None = None,
    version: str | None = None,
    folder: Path | None = None,
) -> ModelConfig:
    """A model as a table of TOML or an object of JSON says it.

    With `beside`, the version that it replaces, what is not said is as there, but for the source:
    one that is given takes the place of the other. `version` is taken where none is given. Paths
    that are relative are so to `folder`.

    Raises:
        ConfigError: an unknown key, with the one that was probably meant; or as ModelConfig.
    """
    check_keys(given, _KEYS, f"model {given['name']}" if "name" in given else "a model")
    values: dict[str, Any] = {}
    if beside is not None:
        values = {name: getattr(beside, name) for name in _KEYS}
        if any(given.get(name) for name in ("upstream", "file", "demo")):
            values |= dict.fromkeys(_PARTS_OF_A_SOURCE) | {"demo": False}
    elif not isinstance(given.get("name"), str):
        raise ConfigError("a model needs a name")
    if version is not None:
        values["version"] = version
    values |= given
    for name in _PATHS:
        path = values.get(name)
        if isinstance(path, str):
            values[name] = (folder or Path()) / path
        elif path is not None and not isinstance(path, Path):
            raise ConfigError(f"{values['name']}: {name} must be a path")
    return ModelConfig(**values)


def check_keys(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raise ConfigError for the first key that is not known, and suggest a similar one."""
    known = list(known)
    for key in given:
        if key not in known:
            similar = difflib.get_close_matches(key, known, n=1)
            hint = f", did you mean {similar[0]!r}?" if similar else ""
            raise ConfigError(f"{what}: there is no key {key!r}{hint}")
