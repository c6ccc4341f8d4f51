"""The bench's compiled programs, built once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "bench"


@pytest.fixture(scope="session")
def programs() -> Path:
    """Where they are; as `make bench` builds them."""
    if sys.platform != "linux":
        pytest.skip("the bench's programs use epoll")
    tools = Path(sys.executable).parent
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"

    def cmake(*arguments: str | Path) -> None:
        subprocess.run([tools / "cmake", *arguments], check=True, env=os.environ | {"PATH": path})

    options = ["-DCMAKE_BUILD_TYPE=Release", "-DPYSERVE_NATIVE_BENCH=ON", "--log-level=WARNING"]
    cmake("-G", "Ninja", "-S", ROOT, "-B", BUILD, *options)
    cmake("--build", BUILD, "--target", "bare_server", "load_client")
    return BUILD
