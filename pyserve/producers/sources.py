"""From what is said about a model to a server that can be asked: started here, or elsewhere."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from pyserve.config import Config
from pyserve.errors import ConfigError
from pyserve.model_config import ModelConfig
from pyserve.producers.demo import demo_server
from pyserve.producers.local import Progress, local_model
from pyserve.producers.upstream import Upstream


@asynccontextmanager
async def running_upstream(
    model: ModelConfig, config: Config, on_progress: Progress
) -> AsyncIterator[Upstream]:
    """The model's upstream, which lives as long as this context. A file is loaded when it is
    entered, a server elsewhere may be anything yet.

    Raises:
        ConfigError, MissingExtraError: it cannot be started.
    """
    async with AsyncExitStack() as stack:
        if model.file is not None:
            local = await stack.enter_async_context(local_model(model, on_progress))
            upstream = Upstream(lambda: local.url, config, local.key)
        elif model.demo:
            demo_url = await stack.enter_async_context(demo_server())
            upstream = Upstream(lambda: demo_url, config)
        else:
            key = read_key(model.key_file, model.key or "", "the upstream's key")
            upstream = Upstream(lambda: model.upstream, config, key)
        await upstream.open()
        stack.push_async_callback(upstream.close)
        yield upstream


def read_key(path: Path | None, given: str, what: str) -> str | None:
    """A key out of a file, else the one that is `given`; None if that is empty.

    Raises:
        ConfigError: it cannot be read, or cannot stand in a header.
    """
    key = given
    if path is not None:
        try:
            key = path.read_text()
        except OSError as error:
            raise ConfigError(f"{what} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError:
            raise ConfigError(f"{what} is not in a text file") from None
    key = key.strip()
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"{what} holds characters that a header cannot carry")
    return key or None
