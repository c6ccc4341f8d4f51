"""Build an sdist and from it a wheel, install that into an empty environment, and let it serve.

Whatever a checkout hides (a file that no package holds, an undeclared dependency, an import from
the working directory) shows here. Needs nothing but the standard library and `build`.
"""

import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import venv
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
READY = "listening on http://127.0.0.1:"
CONVERSATION = "smoke"
DEADLINE_S = 60


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="pyserve-smoke-") as folder:
        pyserve = install(build_wheel(Path(folder)), Path(folder))
        server = subprocess.Popen(
            [pyserve, "serve", "--demo", "--port", "0"],
            cwd=folder,
            env=clean_environment(),
            stdout=subprocess.PIPE,
            text=True,
        )
        # However it hangs, it ends: the pipe closes, and so does the connection.
        watchdog = threading.Timer(DEADLINE_S, server.kill)
        watchdog.start()
        try:
            talk_to(server)
        finally:
            server.kill()
            server.wait()
            watchdog.cancel()
    print("wheel smoke test: ok")


def build_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, CHECKOUT]
    build = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if build.returncode:
        sys.exit(build.stdout)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    """Return the console script of an environment that holds `wheel` and its dependencies."""
    venv.create(folder / "venv", with_pip=True)
    scripts = folder / "venv" / "bin"
    command = [scripts / "python", "-m", "pip", "install", "--quiet", wheel]
    subprocess.run(command, cwd=folder, env=clean_environment(), check=True)
    return scripts / "pyserve"


def clean_environment() -> dict[str, str]:
    """This environment without what points back at the checkout."""
    hidden = ("PYTHONPATH", "VIRTUAL_ENV", "PYSERVE_")
    return {name: value for name, value in os.environ.items() if not name.startswith(hidden)}


def talk_to(server: subprocess.Popen[str]) -> None:
    stream = read_event_with_id(port_of(server))
    server.send_signal(signal.SIGTERM)
    status = server.wait()
    assert status == 0, f"SIGTERM: exit status {status} after {stream!r}"


def port_of(server: subprocess.Popen[str]) -> int:
    assert server.stdout is not None
    for line in server.stdout:
        if line.startswith(READY):
            return int(line.removeprefix(READY))
    raise AssertionError(f"ended without '{READY}PORT'")


def read_event_with_id(port: int) -> bytes:
    """Start a stream, read its first event, and stop it, so that nothing is left to drain."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    body = {"model": "demo", "stream": True, "messages": [{"role": "user", "content": "Hello"}]}
    headers = {"Content-Type": "application/json", "X-Conversation-Id": CONVERSATION}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    response = connection.getresponse()
    assert response.status == 200, f"{response.status}: {response.read()!r}"
    seen = b""
    while not seen.endswith(b"\n\n"):
        line = response.readline()
        assert line, f"the stream ended within its first event: {seen!r}"
        seen += line
    assert b"\nid: " in seen, f"an event without an id: {seen!r}"

    other = http.client.HTTPConnection("127.0.0.1", port)
    other.request("DELETE", f"/v1/stream/{CONVERSATION}")
    assert other.getresponse().status == 204
    other.close()
    connection.close()
    return seen


if __name__ == "__main__":
    main()
