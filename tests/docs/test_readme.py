"""What the README shows is what happens."""

from __future__ import annotations

import asyncio
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_upstream import DONE, FakeUpstream, stream
from needs import needs
from process import Server
from process import pyserve as serve
from serving import serving

import pyserve
from pyserve.config import settings_table
from pyserve.routes.proxy import GET_ROUTES, POST_ROUTES

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
DOCS = README + "".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
EXAMPLE = ROOT / "examples" / "embed_aiohttp.py"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_the_table_of_settings_is_that_of_the_config() -> None:
    shown = re.search(r"<!-- settings:.*?-->\n(.*?)\n<!-- end", README, re.DOTALL)
    assert shown is not None
    assert shown[1] == settings_table()


def test_every_route_is_documented() -> None:
    app = pyserve.create_app(pyserve.Config(demo=True))
    # Passed-through routes stand for each other: the table names some of them and says so.
    passed_through = re.search(r"^\| (.*)\| passed through to the upstream", README, re.MULTILINE)
    assert passed_through is not None

    for resource in app.router.resources():
        path = re.sub(r"{\w+}", "<id>", resource.canonical)
        is_file_of_the_page = (ROOT / "pyserve" / "web" / path.lstrip("/")).exists()
        if path not in GET_ROUTES + POST_ROUTES and not is_file_of_the_page:
            assert f"{path}`" in DOCS or f"{path}?" in DOCS, f"{path} is in no document"


def test_the_embedding_shown_is_the_example() -> None:
    (shown,) = [block for block in blocks("python") if "pyserve.setup" in block]
    assert shown in EXAMPLE.read_text()


async def test_the_python_client_runs_as_shown() -> None:
    (shown,) = [block for block in blocks("python") if "pyserve.client" in block]
    chunks = [
        b'data: {"choices":[{"delta":{"content":"%s"}}]}\n\n' % word for word in (b"All ", b"of it")
    ]
    async with FakeUpstream() as upstream, serving(upstream=upstream.url) as server:
        upstream.play(stream(*chunks, DONE))
        program = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            shown.replace("http://127.0.0.1:8000", server.url),
            stdout=subprocess.PIPE,
        )
        output, _ = await program.communicate()
    assert output == b"All of itcompleted None\n"


@pytest.fixture
def demo_url() -> Iterator[str]:
    with serve("--demo") as server:
        yield server.url


def normalised(output: str, epoch: str) -> str:
    """Without what differs from run to run: the epoch and the clock."""
    output = re.sub(r'"created":\d+', '"created":0', output.replace(epoch, "EPOCH"))
    return output.replace("\r", "")


@needs("curl")
def test_the_console_run_gives_the_output_shown(demo_url: str) -> None:
    (shown_epoch,) = set(re.findall(r"^id: ([0-9a-z]+)-", README, re.MULTILINE))
    epoch = shown_epoch
    runs = [
        re.match(r"(.*)\n((?:.*\n)*)", run)
        for block in blocks("console")
        for run in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]
    ]
    assert len(runs) == 4
    for run in runs:
        assert run is not None
        command, shown = run.groups()
        command = command.replace("http://127.0.0.1:8000", demo_url).replace(shown_epoch, epoch)
        done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
        if begun := re.search(r"^id: ([0-9a-z]+)-", done.stdout, re.MULTILINE):
            epoch = begun[1]
        assert normalised(done.stdout, epoch).rstrip() == normalised(shown, shown_epoch).rstrip()


@needs("curl")
def test_the_embedding_example_survives_its_reader() -> None:
    with Server([sys.executable, EXAMPLE, "0"], listening=r"Running on (http://\S+)") as server:
        url = server.url
        cut = f"curl -sN -X POST {shlex.quote(url + '/count/hello')} | head -n 4"
        first = subprocess.run(cut, shell=True, capture_output=True, text=True, check=False)
        assert first.stdout.startswith("data: 1 bottles\nretry: 1000\nid: ")
        event_id = re.findall(r"^id: (\S+)$", first.stdout, re.MULTILINE)[-1]
        read_on = f"curl -sN '{url}/llm/v1/stream/hello?from={event_id}' | head -n 2"
        rest = subprocess.run(read_on, shell=True, capture_output=True, text=True, check=False)
        assert rest.stdout.startswith("data: 2 bottles\nid: ")


@needs("curl")
@pytest.mark.parametrize("target", ["/count/" + "x" * 300, "/count/%00", "/count/c?from=zzz"])
def test_the_embedding_example_answers_bad_requests_in_the_usual_shape(target: str) -> None:
    with Server([sys.executable, EXAMPLE, "0"], listening=r"Running on (http://\S+)") as server:
        command = ["curl", "-s", "-X", "POST", "-w", "%{http_code}", server.url + target]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("400")
    assert '"reason":"invalid_' in done.stdout
