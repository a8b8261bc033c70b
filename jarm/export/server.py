"""Rewards over HTTP: the form in which OpenRLHF asks for them, and one like vLLM's, with health and metrics."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import json
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from jarm.core.messages import brief
from jarm.core.status import JarmError, printable
from jarm.core.streams import say
from jarm.core.version import __version__
from jarm.export.batcher import Busy, Scores
from jarm.export.functions import TextScorer, answer_of

if TYPE_CHECKING:
    from jarm.embedding.embedder import Embedder

MOST_BYTES = 16 << 20
"""Largest body of a request."""
MEMORY = 1000
"""Texts over which the drift is averaged, about."""
Answer = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


class Refusal(Exception):
    """A request that cannot be answered: a status and a sentence."""

    def __init__(self, status: int, said: str):
        super().__init__(said)
        self.status = status


class Drift:
    """How far the inputs of late are from the training embeddings: the mean, in standard deviations of each number.

    0 for texts like those of the training, up to about .03 by chance; running means over about `MEMORY` texts.

    Example:
      >>> drift = Drift(np.zeros(2), np.ones(2))
      >>> drift.add(np.full((5000, 2), 3.0))
      >>> round(drift.value, 2)
      3.0
    """

    def __init__(self, mean: np.ndarray, deviation: np.ndarray):
        self._mean, self._deviation = np.asarray(mean, np.float64), np.asarray(deviation, np.float64)
        self._sum, self._weight = np.zeros(len(mean)), 0.0

    def add(self, embeddings: np.ndarray) -> None:
        """Count embeddings `[n, d]`; none change nothing."""
        if not len(embeddings):
            return
        keep = (1 - 1 / MEMORY) ** len(embeddings)
        rows = (np.asarray(embeddings, np.float64) - self._mean) / self._deviation
        self._sum = keep * self._sum + (1 - keep) * rows.mean(axis=0)
        self._weight = keep * self._weight + (1 - keep)

    @property
    def value(self) -> float:
        """Root mean square over the numbers of an embedding; 0 before any text."""
        return float(np.sqrt(np.mean((self._sum / self._weight) ** 2))) if self._weight else 0.0


class _Metrics:
    """Counters and gauges, as Prometheus reads them."""

    def __init__(self, score: TextScorer):
        import prometheus_client as prometheus

        self._text, self.registry = prometheus.generate_latest, prometheus.CollectorRegistry()
        own = self.registry
        self.requests = prometheus.Counter(
            "jarm_requests", "Requests by path and status.", ["path", "status"], registry=own
        )
        self.texts = prometheus.Counter("jarm_texts", "Texts scored.", registry=own)
        self.seconds = prometheus.Histogram("jarm_request_seconds", "Seconds by path.", ["path"], registry=own)
        waiting = prometheus.Gauge("jarm_waiting_texts", "Texts that wait.", registry=own)
        waiting.set_function(lambda: score.batcher.waiting)
        if score.model.mean is not None and score.model.deviation is not None:
            drift = Drift(score.model.mean, score.model.deviation)
            gauge = prometheus.Gauge(
                "jarm_input_drift", "Mean of late inputs, in deviations of the training embeddings.", registry=own
            )
            gauge.set_function(lambda: drift.value)
            score.watch = drift.add

    def text(self) -> bytes:
        """All of them."""
        return self._text(self.registry)


class _Service:
    """Answers to the requests for rewards."""

    def __init__(self, score: TextScorer, name: str, metrics: _Metrics):
        self.score, self.name, self.metrics = score, name, metrics

    async def scored(self, texts: list[Any]) -> Scores:
        """Wait for the scores of texts, while other requests are served."""
        most = self.score.batcher.most
        if most is not None and len(texts) > most:
            raise Refusal(413, f"{len(texts):,} texts are more than the {most:,} that may wait.")
        found = await asyncio.wrap_future(self.score.batcher.submit(texts))
        self.metrics.texts.inc(len(texts))
        return found

    async def get_reward(self, body: dict[str, Any]) -> dict[str, Any]:
        """As OpenRLHF asks."""
        if body.get("query") == [] == body.get("prompts"):  # what is left for a server where there are several
            return answer_of(np.zeros(0), np.zeros(0))
        queries, prompts = _texts(body, "query"), _texts(body, "prompts")
        return answer_of(*await self.scored(await asyncio.to_thread(self.score.texts, queries, prompts)))

    async def score_pairs(self, body: dict[str, Any]) -> dict[str, Any]:
        """As vLLM answers."""
        prompts, responses = _texts(body, "text_1"), _texts(body, "text_2")
        if len(prompts) == 1:
            prompts *= len(responses)
        if len(prompts) != len(responses):
            counts = f"`text_1` has {len(prompts)} texts and `text_2` {len(responses)}"
            raise Refusal(400, f"{counts}: give one prompt, or one for each response.")
        rewards, deviations = await self.scored(list(zip(prompts, responses, strict=True)))
        data = [
            {"index": at, "object": "score", "score": float(reward), "deviation": float(deviation)}
            for at, (reward, deviation) in enumerate(zip(rewards, deviations, strict=True))
        ]
        return {
            "id": f"score-{uuid.uuid4().hex}",
            "object": "list",
            "model": self.name,
            "created": int(time.time()),
            "data": data,
        }


def make_app(score: TextScorer, *, token: str | None = None, name: str = "jarm") -> Any:
    """An ASGI application.

    | path | in | out |
    |---|---|---|
    | `POST /get_reward` | `query`, `prompts` lists of texts, `labels` | `rewards`, `scores` in [0, 1], `extra_logs` |
    | `POST /score` | `text_1` a prompt or several, `text_2` responses | `data` with a `score` each, as vLLM's |
    | `GET /health` | | 200 |
    | `GET /metrics` | | Prometheus |

    Args:
      score: the reward model.
      token: that requests for rewards have to carry as `Authorization: Bearer TOKEN`; None asks for none.
      name: of the model, in answers.

    Raises:
      JarmError: Starlette or the client of Prometheus is not installed.
    """
    try:
        from starlette.applications import Starlette
        from starlette.responses import JSONResponse, PlainTextResponse
        from starlette.routing import Route

        metrics = _Metrics(score)
    except ImportError as error:
        raise JarmError(f"A server needs '{error.name}': install `jarm-jax[serve]`.") from error
    service = _Service(score, name, metrics)

    async def health(request: Any) -> Any:
        return JSONResponse({"status": "ok", "model": name, "jarm": __version__})

    async def metric_text(request: Any) -> Any:
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4")

    async def refused(request: Any, error: Any) -> Any:
        known = ", ".join([*(f"POST {path}" for path in posts), *(f"GET {path}" for path in gets)])
        said = f"{error.detail}: this server has {known}."
        return JSONResponse({"error": said}, error.status_code, headers=error.headers)

    posts = {"/get_reward": service.get_reward, "/score": service.score_pairs}
    gets = {"/health": health, "/metrics": metric_text}
    return Starlette(
        routes=[
            *(
                Route(path, _answering(path, answer, token, metrics), methods=["POST"])
                for path, answer in posts.items()
            ),
            *(Route(path, handle) for path, handle in gets.items()),
        ],
        exception_handlers={404: refused, 405: refused},
    )


def _answering(path: str, answer: Answer, token: str | None, metrics: _Metrics) -> Callable[[Any], Awaitable[Any]]:
    """What handles the requests of a path: every fault of a request is a status and a sentence."""
    from starlette.requests import ClientDisconnect
    from starlette.responses import JSONResponse

    async def handle(request: Any) -> Any:
        start, status = time.monotonic(), 200
        try:
            _authorise(request, token)
            found = await answer(await _body(request))
        except (Refusal, JarmError) as error:
            status = error.status if isinstance(error, Refusal) else 429 if isinstance(error, Busy) else 400
            found = {"error": printable(str(error))}
        except ClientDisconnect:
            status, found = 499, {"error": "The client has gone."}
        except Exception as error:
            status, found = 500, {"error": "The server failed, and its log says how."}
            say(f"jarm: {path} failed: {type(error).__name__}: {error}")
        metrics.requests.labels(path, str(status)).inc()
        metrics.seconds.labels(path).observe(time.monotonic() - start)
        return JSONResponse(found, status, headers={"Retry-After": "1"} if status == 429 else None)

    return handle


def _authorise(request: Any, token: str | None) -> None:
    """Refuse a request without the token, as `Bearer TOKEN`, or as the password of a URL such as `http://:TOKEN@HOST`."""
    if token is None:
        return
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    if kind == "Basic":
        with contextlib.suppress(ValueError):
            given = base64.b64decode(given).decode().partition(":")[2]
    if not hmac.compare_digest(given.encode(), token.encode()):
        raise Refusal(401, "The request carries no valid token: send `Authorization: Bearer TOKEN`.")


async def _body(request: Any) -> dict[str, Any]:
    """The JSON object of a request."""
    if int(request.headers.get("content-length") or 0) > MOST_BYTES:
        raise Refusal(413, f"The request has more than {MOST_BYTES >> 20} MiB: send fewer texts at a time.")
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MOST_BYTES:
            raise Refusal(413, f"The request has more than {MOST_BYTES >> 20} MiB: send fewer texts at a time.")
        parts.append(part)
    try:
        body = await asyncio.to_thread(json.loads, b"".join(parts))
    except (ValueError, RecursionError) as error:
        raise Refusal(400, "The request is no JSON: send an object.") from error
    if not isinstance(body, dict):
        raise Refusal(400, "The request is no JSON object: send one with the fields of this path.")
    return body


def _texts(body: dict[str, Any], name: str) -> list[str]:
    """A list of texts; one text is a list of one."""
    given = body.get(name)
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise Refusal(400, f"`{name}` is no list of texts: give one or more.")
    return texts


@contextlib.contextmanager
def warming(embed: Embedder) -> Iterator[None]:
    """Compile what texts of other lengths and numbers need in a thread of its own, while requests are served."""
    stop, shapes = threading.Event(), embed.shapes

    def work() -> None:
        since = time.monotonic()
        try:
            for count, length in shapes:
                if stop.is_set():
                    return
                embed.warm(count, length)
        except Exception as error:
            say(f"jarm: not all {len(shapes)} shapes of texts could be compiled ahead ({brief(error)}).")
        else:
            say(f"all {len(shapes)} shapes of texts are compiled, after {time.monotonic() - since:.0f} s.")

    say(f"compiling {len(shapes)} shapes of texts meanwhile, up to {embed.max_length:,} tokens")
    thread = threading.Thread(target=work, daemon=True, name="jarm-warming")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(GRACE)
