"""`jarm serve`: a reward model behind HTTP."""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import pathlib
import socket
from collections.abc import Mapping
from typing import Any

from jarm.core.checks import INT32, Check, between, check_fields, one_of
from jarm.core.status import JarmError
from jarm.core.streams import say
from jarm.export.aggregate import read_aggregate
from jarm.export.functions import TextScorer
from jarm.export.model import load_model
from jarm.export.server import make_app, warming

TOKEN = "JARM_TOKEN"
"""Environment variable of the token that requests have to carry: in a command line, others could read it."""
CLIENTS = 512
"""Requests at a time; more are answered by 503."""
_CHECKS: Mapping[str, Check] = {
    "aggregate": lambda _, text: read_aggregate(text),
    "dtype": one_of("float32", "bfloat16"),
    "port": between(0, 65535),
    "batch_tokens": between(1, INT32),
    "wait_ms": between(0, 10_000),
    "most_waiting": between(1, INT32),
}


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """Settings of `jarm serve`.

    Example:
      >>> ServeConfig(model="out/model", port=70000)
      Traceback (most recent call last):
      jarm.core.status.JarmError: `port` is 70000: give at least 0 and at most 65535.

    Attributes:
      model: folder of a reward model, as `jarm train` writes it.
      llm: folder of the language model, or its id on the hub; by default the name that the embeddings came with.
      aggregate: in the place of the model's own: "mean", "worst", "lower:C" or "quantile:LEVEL".
      dtype: of the language model, "float32" or "bfloat16"; by default that of the training embeddings.
      host: address to listen on; another than this machine's own needs a token, in the variable JARM_TOKEN.
      port: to listen on; 0 for any that is free.
      batch_tokens: tokens of texts, about, that are scored together.
      wait_ms: milliseconds that a text waits for others.
      most_waiting: largest number of texts that wait; a request for more is answered by 429.
    """

    model: str
    llm: str | None = None
    aggregate: str | None = None
    dtype: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    batch_tokens: int = 16384
    wait_ms: float = 2.0
    most_waiting: int = 4096

    def __post_init__(self) -> None:
        check_fields(self, _CHECKS)


def serve(config: ServeConfig) -> None:
    """Serve rewards until the process is told to stop.

    Raises:
      JarmError: the model or the language model is at fault, packages are missing, or the address is open to others and
        there is no token.
    """
    token = os.environ.get(TOKEN, "").strip() or None
    if token is not None and not (token.isascii() and token.isprintable()):
        raise JarmError(f"{TOKEN} holds letters that no request can carry: take a token of plain letters and digits.")
    if token is None and not _is_loopback(config.host):
        raise JarmError(
            f"{config.host} can be reached from other machines, and no token is asked for: set {TOKEN}, or leave "
            "--host at 127.0.0.1."
        )
    try:
        import uvicorn
    except ImportError as error:
        raise JarmError("A server needs 'uvicorn': install `jarm-jax[serve]`.") from error
    model = load_model(config.model).with_aggregate(config.aggregate)
    batching: dict[str, Any] = {
        "budget": config.batch_tokens,
        "wait": config.wait_ms / 1000,
        "most": config.most_waiting,
    }
    with _bound(config.host, config.port) as listening:
        embed = model.embedder(config.llm, config.dtype)
        score = TextScorer(model, embed=embed, **batching)
        score(["a"], ["a"])  # compiles what the first request needs
        app = make_app(score, token=token, name=pathlib.Path(config.model).name)
        host, port = listening.getsockname()[:2]
        say(f"{config.model} at http://{host}:{port}: POST /get_reward, POST /score, GET /health, /metrics")
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", limit_concurrency=CLIENTS))
        with warming(embed):
            server.run([listening])


def _bound(host: str, port: int) -> socket.socket:
    """A socket at an address.

    Raises:
      JarmError: the address is taken, or none of this machine's.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise JarmError(
            f"Cannot listen at {host}, port {port} ({getattr(error, 'strerror', None) or error}): give another --port "
            "or --host."
        ) from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
