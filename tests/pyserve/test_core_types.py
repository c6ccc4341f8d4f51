"""pyserve/_core.pyi says what the extension is."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pyserve import _core

ROOT = Path(__file__).parents[2]
STUB = ROOT / "pyserve" / "_core.pyi"

# What a stub cannot say of a class made by pybind11: its metaclass, and that it has no constructor.
ALLOWED = r"""
pyserve\._core\.[A-Za-z]+
pyserve\._core\.[A-Za-z]+\.__init__
"""


def stub_functions() -> dict[str, ast.arguments]:
    """`Class.method` → its arguments, properties left out."""
    found = {}
    for made in ast.parse(STUB.read_text()).body:
        if isinstance(made, ast.ClassDef):
            for item in made.body:
                if isinstance(item, ast.FunctionDef) and not item.decorator_list:
                    found[f"{made.name}.{item.name}"] = item.args
    return found


STUB_FUNCTIONS = stub_functions()


def test_stubtest_finds_no_difference(tmp_path: Path) -> None:
    allowed = tmp_path / "allowed"
    allowed.write_text(ALLOWED)
    checked = subprocess.run(
        [
            *[sys.executable, "-m", "mypy.stubtest", "pyserve._core"],
            *["--allowlist", allowed, "--ignore-unused-allowlist"],
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def documented_parameters(function: object) -> list[tuple[str, bool]]:
    """Name and "has a default" of each parameter, as pybind11 writes them into the docstring."""
    signature = re.search(r"\((.*)\)(?: -> .*)?$", str(function.__doc__).split("\n")[0])
    assert signature, function.__doc__
    # Types and defaults hold commas too; names are what stands before a colon at depth 0.
    found, depth, parts = [], 0, [""]
    for character in signature[1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    for part in parts:
        name = part.strip().partition(":")[0].partition("=")[0].strip()
        if name and name not in ("*", "/"):
            found.append((name, " = " in part))
    return found


def stub_parameters(arguments: ast.arguments) -> list[tuple[str, bool]]:
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [False] * (len(positional) - len(arguments.defaults))
    defaults += [True] * len(arguments.defaults)
    found = [(item.arg, has) for item, has in zip(positional, defaults, strict=True)]
    for item, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        found.append((item.arg, default is not None))
    return found


@pytest.mark.parametrize("name", STUB_FUNCTIONS)
def test_a_functions_parameters_are_those_of_the_stub(name: str) -> None:
    class_name, _, method = name.partition(".")
    function = getattr(getattr(_core, class_name), method)
    documented, stubbed = documented_parameters(function), stub_parameters(STUB_FUNCTIONS[name])
    unnamed = [(re.sub(r"^arg\d+$", "", item), default) for item, default in documented[1:]]
    assert unnamed == stubbed[1:]


@pytest.mark.parametrize("name", ["SessionReader", "SessionSnapshot", "StreamSession", "Clock"])
def test_what_only_the_core_makes_cannot_be_made(name: str) -> None:
    with pytest.raises(TypeError, match="No constructor defined"):
        getattr(_core, name)()
