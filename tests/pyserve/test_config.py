"""Settings: each is described, has its unit in its name, and is checked when it is made."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from pyserve import Config, ConfigError
from pyserve.config import Setting, settings

SETTINGS = list(settings())
COUNTS = re.compile(r"(port|model_slots|max_(queue|connections|.*_per_owner))$")
WITH_MINIMUM = [setting for setting in SETTINGS if setting.minimum is not None]


def by_name(setting: Setting) -> str:
    return setting.name


def test_the_defaults_work_and_name_no_source() -> None:
    config = Config()
    assert (config.upstream, config.model, config.demo) == (None, None, False)


def test_the_defaults_are_those_of_the_contract() -> None:
    config = Config()
    assert config.max_session_bytes == 32 * 1024**2
    assert config.max_total_bytes == 1024**3
    assert config.session_ttl_s == 300
    assert config.heartbeat_interval_s == 1
    assert config.status_grace_s == 2
    assert config.upstream_first_byte_timeout_s == 300
    assert config.upstream_idle_timeout_s == 60


def test_every_field_is_a_setting() -> None:
    assert [s.name for s in SETTINGS] == [field.name for field in dataclasses.fields(Config)]


@pytest.mark.parametrize("setting", SETTINGS, ids=by_name)
def test_a_setting_describes_itself(setting: Setting) -> None:
    assert setting.description.endswith(".")
    assert re.fullmatch(r"--[a-z]+(-[a-z]+)*", setting.option)
    assert re.fullmatch(r"PYSERVE_[A-Z_]+", setting.environment_variable)
    assert setting.default is None or isinstance(setting.default, setting.type)


def test_no_two_settings_share_an_option_or_a_variable() -> None:
    assert len({s.option for s in SETTINGS}) == len(SETTINGS)
    assert len({s.environment_variable for s in SETTINGS}) == len(SETTINGS)


@pytest.mark.parametrize("setting", SETTINGS, ids=by_name)
def test_a_quantity_has_its_unit_in_its_name(setting: Setting) -> None:
    if setting.type is float:
        assert setting.unit in ("seconds", "milliseconds")
    elif setting.type is int and not COUNTS.match(setting.name):
        assert setting.unit in ("bytes", "tokens")
    else:
        assert setting.unit == ""


@pytest.mark.parametrize("setting", WITH_MINIMUM, ids=by_name)
def test_the_minimum_is_allowed_and_less_is_not(setting: Setting) -> None:
    # The log of one session must fit into the budget of all.
    room: dict[str, Any] = {"max_session_bytes": 4096} if "total" in setting.name else {}
    assert setting.minimum is not None
    Config(**{**room, setting.name: setting.minimum})
    with pytest.raises(ConfigError, match=rf"{setting.name} is .*smallest is"):
        Config(**{**room, setting.name: setting.minimum - 1})


@pytest.mark.parametrize("setting", WITH_MINIMUM, ids=by_name)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), "10", None, True])
def test_what_is_no_finite_number_is_refused(setting: Setting, value: Any) -> None:
    with pytest.raises(ConfigError, match=setting.name):
        Config(**{setting.name: value})


def test_one_session_may_not_be_larger_than_all_together() -> None:
    with pytest.raises(ConfigError, match="max_total_bytes"):
        Config(max_session_bytes=1024**2, max_total_bytes=1024**2 - 1)
    Config(max_session_bytes=1024**2, max_total_bytes=1024**2)


def test_a_port_is_at_most_65535() -> None:
    assert Config(port=65535).port == 65535
    assert Config(port=0).port == 0
    with pytest.raises(ConfigError, match="65535"):
        Config(port=65536)


def test_only_one_source_is_possible(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.touch()
    for sources in (
        {"upstream": "http://127.0.0.1:1", "demo": True},
        {"upstream": "http://127.0.0.1:1", "model": model},
        {"model": model, "demo": True},
    ):
        with pytest.raises(ConfigError, match="only one source"):
            Config(**sources)


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:8080", "https://api.openai.com/v1", "http://[::1]:8080/", "http://host/a/b"],
)
def test_an_upstream_is_a_plain_http_url(url: str) -> None:
    assert Config(upstream=url).upstream == url


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:8080",
        "localhost",
        "ftp://host",
        "file:///etc/passwd",
        "http://",
        "http:///v1",
        "http://user:secret@host",
        "http://user@host",
        "http://host/?a=b",
        "http://host/#f",
        "http://host:port",
        "http://host:99999",
        "http://[::1",
    ],
)
def test_any_other_upstream_is_refused_with_a_config_error(url: str) -> None:
    with pytest.raises(ConfigError):
        Config(upstream=url)


def test_a_model_must_be_a_file(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.gguf", tmp_path):
        with pytest.raises(ConfigError, match="there is no file"):
            Config(model=path)


def test_a_config_does_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().port = 1  # type: ignore[misc]
