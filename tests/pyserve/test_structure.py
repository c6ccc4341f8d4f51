"""What the design promises about the code itself, read from its syntax trees."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyserve.errors import ENDING_REASONS, REASONS

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "pyserve"

#: Rooms from the bottom up: each imports only from itself and from rooms further down.
FLOORS = [
    {"_core"},
    {"errors"},
    {"model_config", "positions", "process", "wakeups"},
    {"config"},
    {"config_file", "sessions", "client"},
    {"requests", "sender"},
    {"producers", "delivery"},
    {"scheduling"},
    {"jobs"},
    {"routes"},
    {"app"},
    {"commands", "inference_server"},
    {"cli"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

MODULES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_bytes()) for path in MODULES}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> Iterator[str]:
    """Every room of pyserve that a module imports, wherever in it."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            if node.module == "pyserve":
                yield from (alias.name for alias in node.names)
            elif node.module and node.module.startswith("pyserve."):
                yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("pyserve."):
                    yield alias.name.split(".")[1]
                else:
                    assert alias.name != "pyserve", f"{path}: imports the whole house"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return  # the public names, from everywhere
    assert room in FLOOR_OF, f"{room} has no floor: where does it belong?"
    for imported in imported_rooms(path):
        if imported != room:
            assert FLOOR_OF[imported] < FLOOR_OF[room], f"{room} imports {imported}"


def test_the_package_lists_public_names_and_nothing_else() -> None:
    tree = TREES[PACKAGE / "__init__.py"]
    kinds = {type(node) for node in tree.body}
    assert kinds <= {ast.Expr, ast.ImportFrom, ast.Assign}
    imported = {a.name for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names}
    (listed,) = [ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign)]
    assert imported == set(listed)


def test_only_the_bindings_know_python() -> None:
    knowing = {
        path.name
        for path in (ROOT / "csrc").iterdir()
        if re.search(r"#\s*include\s*[<\"](pybind11|Python\.h)|\bPy_|\bpy::", path.read_text())
    }
    assert knowing == {"bindings.cpp"}


def test_the_core_knows_no_json_and_no_http() -> None:
    for path in (ROOT / "csrc").iterdir():
        code = re.sub(r"//.*", "", path.read_text())
        assert not re.search(r"json|http", code, re.IGNORECASE), path.name


def calls_of(name: str) -> Iterator[tuple[Path, ast.Call]]:
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = node.func
                if getattr(called, "id", getattr(called, "attr", None)) == name:
                    yield path, node


def strings_in(node: ast.AST) -> set[str]:
    return {
        child.value
        for child in ast.walk(node)
        if isinstance(child, ast.Constant) and isinstance(child.value, str)
    }


def test_every_error_names_a_reason_of_the_list() -> None:
    named = 0
    for path, call in calls_of("ApiError"):
        where = f"{path.name}:{call.lineno}"
        assert call.args, where
        reason = call.args[0]
        if isinstance(reason, ast.Constant):
            assert reason.value in REASONS, where
            named += 1
        elif isinstance(reason, (ast.IfExp, ast.BoolOp)):
            values = (
                [reason.body, reason.orelse] if isinstance(reason, ast.IfExp) else reason.values
            )
            assert {v.value for v in values if isinstance(v, ast.Constant)} <= REASONS.keys(), where
    assert named > 10


def test_every_reason_is_used() -> None:
    used: set[str] = set()
    for path, tree in TREES.items():
        if path.name != "errors.py":
            used |= strings_in(tree)
    assert REASONS.keys() - used == set()
    assert ENDING_REASONS.keys() - used == {"cancelled"} - used


def test_nothing_passes_an_exceptions_text_to_a_client() -> None:
    for path, call in calls_of("ApiError"):
        told = [*call.args, *[keyword.value for keyword in call.keywords]]
        for node in (child for value in told for child in ast.walk(value)):
            if isinstance(node, ast.Call):
                called = getattr(node.func, "id", "")
                assert called not in ("str", "repr"), f"{path.name}:{call.lineno}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_can_be_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 600
    for node in ast.walk(TREES[path]):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno:
            assert node.end_lineno - node.lineno <= 60, f"{path.name}: {node.name}"
