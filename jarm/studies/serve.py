"""`jarm serve`: a reward model behind HTTP."""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import pathlib
from collections.abc import Mapping

from jarm.core.checks import INT32, Check, between, check_fields
from jarm.core.status import JarmError
from jarm.core.streams import say
from jarm.export.aggregate import read_aggregate
from jarm.export.functions import TextScorer
from jarm.export.model import load_model
from jarm.export.server import make_app

TOKEN = "JARM_TOKEN"
"""Environment variable of the token that requests have to carry: in a command line, others could read it."""
_CHECKS: Mapping[str, Check] = {
    "aggregate": lambda _, text: read_aggregate(text),
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
      host: address to listen on; another than this machine's own needs a token, in the variable JARM_TOKEN.
      port: to listen on; 0 for any that is free.
      batch_tokens: tokens of texts, about, that are scored together.
      wait_ms: milliseconds that a text waits for others.
      most_waiting: largest number of texts that wait; a request for more is answered by 429.
    """

    model: str
    llm: str | None = None
    aggregate: str | None = None
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
    token = os.environ.get(TOKEN) or None
    if token is None and not _is_loopback(config.host):
        raise JarmError(
            f"{config.host} can be reached from other machines, and no token is asked for: set {TOKEN}, or leave "
            "--host at 127.0.0.1."
        )
    try:
        import uvicorn
    except ImportError as error:
        raise JarmError("A server needs 'uvicorn': install `jarm-jax[serve]`.") from error
    model = load_model(config.model)
    if config.aggregate is not None:
        model = dataclasses.replace(model, aggregate=read_aggregate(config.aggregate))
    score = TextScorer(
        model, config.llm, budget=config.batch_tokens, wait=config.wait_ms / 1000, most=config.most_waiting
    )
    app = make_app(score, token=token, name=pathlib.Path(config.model).name)
    say(f"{config.model} at http://{config.host}:{config.port}: POST /get_reward, POST /score, GET /health, /metrics")
    uvicorn.run(app, host=config.host, port=config.port, log_level="warning")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
