"""What may be said about a model, in Python, in ``pyserve.toml`` and as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pyserve import ConfigError, ModelConfig
from pyserve.config_file import read_config_file
from pyserve.model_config import model_from_dict

UPSTREAM = "http://127.0.0.1:9"


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "some.gguf"
    path.touch()
    return path


@pytest.mark.parametrize("name", ["a", "qwen3-4b", "org/model:tag", "a.b_c+d@e"])
def test_a_name_may_be_what_people_call_models(name: str) -> None:
    assert ModelConfig(name, upstream=UPSTREAM).name == name


@pytest.mark.parametrize("name", ["", " ", "a b", "/a", "-a", "a\n", "ü", "x" * 256, None, 5])
def test_any_other_name_is_refused(name: Any) -> None:
    with pytest.raises(ConfigError, match="a model's name"):
        ModelConfig(name, upstream=UPSTREAM)


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"upstream": None}, "needs one of upstream .*, file .* and demo"),
        ({"demo": True}, "needs one of upstream, file and demo, has upstream and demo"),
        ({"upstream": "127.0.0.1"}, "m: upstream must be an http:// or https:// URL"),
        ({"upstream": None, "file": "/nowhere.gguf"}, "m: there is no file /nowhere.gguf"),
        ({"slots": 0}, "slots must be a whole number from 1 on, not 0"),
        ({"slots": True}, "slots must be a whole number"),
        ({"slots": 1.5}, "slots must be a whole number"),
        ({"context_tokens": 63}, "context_tokens must be a whole number from 64 on"),
        ({"context_tokens": None}, "context_tokens must be"),
        ({"gpu_layers": -1}, "gpu_layers must be a whole number from 0 on"),
        ({"cache_type_k": "q3"}, "cache_type_k is 'q3', not one of f32, f16"),
        ({"warm_up": None}, "warm_up must be a text"),
        ({"device": "a b"}, "device must be a device's name"),
        ({"device": 0}, "device must be a text"),
        ({"params": []}, "params must be a table"),
        ({"params": {"stream": True}}, "params cannot hold stream"),
        ({"params": {"model": "x"}}, "params cannot hold model"),
        ({"version": ""}, "version must be"),
        ({"version": 2}, "version must be"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_refused_with_the_model_s_name(
    wrong: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint) as raised:
        ModelConfig("m", **{"upstream": UPSTREAM, **wrong})
    assert "m: " in str(raised.value)


def test_a_key_is_not_shown() -> None:
    assert "sk-secret" not in repr(ModelConfig("m", upstream=UPSTREAM, key="sk-secret"))


# --- from a table


def test_an_unknown_key_is_refused_and_a_similar_one_suggested() -> None:
    with pytest.raises(ConfigError, match="there is no key 'slot', did you mean 'slots'"):
        model_from_dict({"name": "m", "upstream": UPSTREAM, "slot": 4})
    with pytest.raises(ConfigError, match=r"there is no key 'zzz'$"):
        model_from_dict({"name": "m", "zzz": 4})


def test_a_swap_takes_over_what_it_does_not_say(gguf: Path) -> None:
    old = ModelConfig("m", "1", file=gguf, slots=3, context_tokens=4096, params={"top_k": 1})
    new = model_from_dict({"slots": 5}, beside=old, version="2")
    assert (new.name, new.version, new.file, new.slots) == ("m", "2", gguf, 5)
    assert (new.context_tokens, new.params) == (4096, {"top_k": 1})


def test_a_swap_to_another_source_forgets_the_old_one_and_its_key(gguf: Path) -> None:
    old = ModelConfig("m", upstream=UPSTREAM, key="sk-secret", upstream_model="theirs", slots=3)
    new = model_from_dict({"file": str(gguf)}, beside=old)
    assert (new.upstream, new.key, new.upstream_model, new.file) == (None, None, None, gguf)
    assert new.slots == 3


# --- pyserve.toml


def write(folder: Path, text: str) -> Path:
    path = folder / "pyserve.toml"
    path.write_text(text)
    return path


def test_a_file_holds_settings_and_models(gguf: Path) -> None:
    file = read_config_file(
        write(
            gguf.parent,
            """
            port = 9000
            max_session_bytes = "1MiB"
            upstream_key_file = "the.key"
            [[models]]
            name = "local"
            file = "some.gguf"
            slots = 4
            params = { temperature = 0.5 }
            [[models]]
            name = "far"
            upstream = "http://127.0.0.1:9"
            """,
        )
    )
    assert file.settings == {
        "port": 9000,
        "max_session_bytes": "1MiB",
        "upstream_key_file": str(gguf.parent / "the.key"),
    }
    local, far = file.models
    assert (local.name, local.file, local.slots) == ("local", gguf, 4)
    assert local.params == {"temperature": 0.5}
    assert (far.name, far.upstream) == ("far", UPSTREAM)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("prot = 1", "settings: there is no key 'prot', did you mean 'port'?"),
        ("[[model]]", "model must be a single value"),
        ("models = 5", r"models are tables: \[\[models\]\]"),
        ("[[models]]\nfile = 'some.gguf'", "a model needs a name"),
        ("[[models]]\nname = 'm'\nfiel = 'x'", "model m: there is no key 'fiel', .* 'file'"),
        ("[[models]]\nname = 'm'\nfile = 'none.gguf'", "m: there is no file .*none.gguf"),
        ("port = ", "is not TOML: Invalid value"),
        ("port = [1]", "port must be a single value"),
    ],
)
def test_a_wrong_file_is_one_clear_error_that_names_it(
    tmp_path: Path, text: str, complaint: str
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=complaint) as raised:
        read_config_file(path)
    assert str(raised.value).startswith(str(path))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"x.toml cannot be read: No such file"):
        read_config_file(tmp_path / "x.toml")
