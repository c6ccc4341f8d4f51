"""pyserve.js: its own tests under plain Node, and its types."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
WEB = HERE.parents[1] / "pyserve" / "web"
NODE = shutil.which("node")

pytestmark = pytest.mark.skipif(
    NODE is None and os.environ.get("CI") != "true", reason="node is not installed"
)


def _run(*command: str | Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYSERVE_")}
    environment |= {"PYSERVE_PYTHON": sys.executable, "NODE_NO_WARNINGS": "1"}
    done = subprocess.run(
        [str(word) for word in command], cwd=HERE, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", sorted(path.name for path in HERE.glob("*.test.mjs")))
def test_what_pyserve_js_promises_holds_under_node(name: str) -> None:
    _run(NODE or "node", "--test", HERE / name)


def test_the_types_hold_for_pyserve_js_and_for_who_uses_it() -> None:
    compiler = HERE / "node_modules" / "typescript" / "bin" / "tsc"
    if not compiler.exists() and os.environ.get("CI") != "true":
        pytest.skip("npm install has not been run in tests/web")
    _run(NODE or "node", compiler, "-p", HERE)


def test_every_export_has_a_declaration_and_the_other_way_round() -> None:
    code = (WEB / "pyserve.js").read_text()
    exported = set(re.findall(r"^export (?:async )?(?:function|class|const) (\w+)", code, re.M))
    for names in re.findall(r"^export const \{(.+?)\}", code, re.M):
        exported |= {name.strip() for name in names.split(",")}
    types = (WEB / "pyserve.d.ts").read_text()
    declared = set(re.findall(r"^export (?:function|class|const) (\w+)", types, re.M))
    assert exported == declared
