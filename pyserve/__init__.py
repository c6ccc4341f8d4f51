"""Resumable LLM token streams for aiohttp."""

from pyserve.app import create_app, error_middleware, setup
from pyserve.config import Config
from pyserve.delivery import stream_response
from pyserve.errors import (
    ApiError,
    ConfigError,
    EventTooLargeError,
    EventUnfinishedError,
    ForkedProcessError,
    MemoryBudgetError,
    MissingExtraError,
    PyserveError,
    SessionEndedError,
)
from pyserve.inference_server import InferenceServer
from pyserve.model_config import ModelConfig
from pyserve.positions import EARLIEST, START, Position
from pyserve.sessions import SessionReader, StreamSession, StreamSessionManager

__all__ = [
    "EARLIEST",
    "START",
    "ApiError",
    "Config",
    "ConfigError",
    "EventTooLargeError",
    "EventUnfinishedError",
    "ForkedProcessError",
    "InferenceServer",
    "MemoryBudgetError",
    "MissingExtraError",
    "ModelConfig",
    "Position",
    "PyserveError",
    "SessionEndedError",
    "SessionReader",
    "StreamSession",
    "StreamSessionManager",
    "create_app",
    "error_middleware",
    "setup",
    "stream_response",
]
