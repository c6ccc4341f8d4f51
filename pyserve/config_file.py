"""``pyserve.toml``: the settings by their names, and a table ``[[models]]`` for each model.

::

    port = 8000
    max_session_bytes = "16MiB"

    [[models]]
    name = "qwen"
    file = "models/qwen3-4b.gguf"      # relative to this file
    slots = 4
    params = { temperature = 0.6 }

    [[models]]
    name = "gpt"
    upstream = "https://api.openai.com"
    key_file = "openai.key"
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyserve.config import settings
from pyserve.errors import ConfigError
from pyserve.model_config import ModelConfig, check_keys, model_from_dict

#: Read when nothing else is named and it is there.
DEFAULT_PATH = Path("pyserve.toml")


@dataclass(frozen=True)
class ConfigFile:
    """What a file says: settings as they stand there, unchecked, and models, checked."""

    settings: dict[str, Any] = field(default_factory=dict)
    models: list[ModelConfig] = field(default_factory=list)


def read_config_file(path: Path) -> ConfigFile:
    """Read and check a file.

    Raises:
        ConfigError: it cannot be read, is no TOML, or holds what nobody knows; names the file.
    """
    try:
        return _parse(tomllib.loads(path.read_text()), path.parent)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _parse(told: dict[str, Any], folder: Path) -> ConfigFile:
    kinds = {setting.name: setting.type for setting in settings()}
    check_keys(told, [*kinds, "models"], "settings")
    tables = told.pop("models", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ConfigError("models are tables: [[models]]")
    for name, value in told.items():
        if isinstance(value, (dict, list)):
            raise ConfigError(f"{name} must be a single value; a model is a table [[models]]")
        if kinds[name] is Path:
            told[name] = str(folder / str(value))
    return ConfigFile(told, [model_from_dict(table, folder=folder) for table in tables])
