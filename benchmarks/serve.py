"""`jarm serve` under many clients: texts a second, waiting times, and memory, against one request after the other.

    python -m benchmarks.serve --llm FOLDER [--clients 64] [--requests 512]

Server and clients are one process and talk over a socket. Every request has one text, of 4 to 120 words at random; each
answer is compared with the reward of the same text scored alone. Times without compilation: all lengths are sent once
before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import resource
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tyro
import uvicorn

from jarm.core.compiled import keep_compiled
from jarm.embedding.config import EmbedConfig
from jarm.embedding.embedder import texts_of
from jarm.embedding.job import read_job
from jarm.export.functions import TextScorer
from jarm.export.model import RewardModel
from jarm.export.server import make_app
from jarm.reward.config import HeadConfig

WORDS = [
    "what",
    "a",
    "reward",
    "model",
    "says",
    "of",
    "the",
    "answer",
    "that",
    "you",
    "would",
    "rather",
    "have",
    "read",
    "in",
    "the",
    "end",
    "is",
    "a",
    "number",
]


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured.

    Attributes:
      llm: folder of a language model.
      clients: that ask at the same time.
      requests: of one text each.
      turns: repetitions of both ways, in turn.
      seed: of the texts.
    """

    llm: str
    clients: int = 64
    requests: int = 512
    turns: int = 3
    seed: int = 0


def random_model(llm: str) -> RewardModel:
    """A reward model on the embeddings of a language model, with random weights."""
    job = read_job(EmbedConfig(llm, ("texts",)), texts_of([], []))
    (made_by,) = job.made_by().values()
    rng, width = np.random.default_rng(0), job.width
    kernel = (rng.normal(size=(4, width, 1)) / np.sqrt(width)).astype(np.float32)
    return RewardModel(HeadConfig(hidden=()), {"out": {"kernel": kernel}}, np.zeros(4, np.float32), made_by=made_by)


@contextlib.contextmanager
def served(score: TextScorer, **options: Any) -> Iterator[int]:
    """The port of a server; `options` of `make_app`."""
    server = uvicorn.Server(uvicorn.Config(make_app(score, **options), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def ask(port: int, text: str) -> tuple[float, float]:
    """Reward of a text, and the seconds that it took."""
    start = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request("POST", "/score", json.dumps({"text_1": "Say something.", "text_2": text}))
    answer = connection.getresponse()
    found = json.loads(answer.read())
    connection.close()
    if answer.status != 200:
        raise RuntimeError(found)
    return found["data"][0]["score"], time.monotonic() - start


def measure(config: Config) -> list[dict[str, float]]:
    """A row for each number of clients and turn."""
    rng = np.random.default_rng(config.seed)
    texts = [" ".join(rng.choice(WORDS, rng.integers(4, 120))) for _ in range(config.requests)]
    model = random_model(config.llm)
    expected = model.score_texts(["Say something."] * len(texts), texts, llm=config.llm)
    rows = []
    with served(TextScorer(model, config.llm)) as port:
        for clients in (1, config.clients):  # compiles what the batches of each need
            with ThreadPoolExecutor(clients) as pool:
                list(pool.map(lambda text: ask(port, text), texts))
        for turn in range(config.turns):
            for clients in (1, config.clients):
                start = time.monotonic()
                with ThreadPoolExecutor(clients) as pool:
                    found = list(pool.map(lambda text: ask(port, text), texts))
                seconds = time.monotonic() - start
                rewards, waits = np.array(found).T
                rows.append(
                    {
                        "turn": turn,
                        "clients": clients,
                        "texts_per_second": len(texts) / seconds,
                        "p50_ms": 1000 * float(np.median(waits)),
                        "p99_ms": 1000 * float(np.quantile(waits, 0.99)),
                        "largest_difference": float(np.abs(rewards - expected).max()),
                        "lost": len(texts) - len(found),
                        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                    }
                )
    return rows


if __name__ == "__main__":
    keep_compiled()
    for row in measure(tyro.cli(Config)):
        print(json.dumps(row), flush=True)
