"""Other packages that select, measured by `jarm bench` beside the rules of jarm where they are installed."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable

import numpy as np

from jarm.base import Belief, PairSpace


@dataclasses.dataclass(frozen=True)
class Peer:
    """A rule of another package.

    Attributes:
      name: what it is called in tables: "package: rule".
      module: what has to be importable.
      like: the rule of jarm that does the same or nearest.
      make: `(belief, listed space, k) -> run`; `run()` returns the chosen pairs `[k, 2]`. What is done before a caller
        would have its features in hand is done in `make`.
    """

    name: str
    module: str
    like: str
    make: Callable[[Belief, PairSpace, int], Callable[[], np.ndarray]]


def installed(peer: Peer) -> bool:
    """Whether it can be imported."""
    return importlib.util.find_spec(peer.module) is not None


def scaled_differences(belief: Belief, space: PairSpace) -> tuple[np.ndarray, np.ndarray]:
    """The listed pairs `[M, 2]`, and sqrt(v) x of each, `[M, F]` float32."""
    assert space.pairs is not None
    pairs = np.asarray(space.pairs)
    phi, r = np.asarray(belief.features), np.asarray(belief.rewards)
    margin = r[pairs[:, 0]] - r[pairs[:, 1]]
    weight = 1 / (2 + np.exp(margin) + np.exp(-margin))
    return pairs, np.sqrt(weight)[:, None] * (phi[pairs[:, 0]] - phi[pairs[:, 1]])


def member_margins(belief: Belief, space: PairSpace) -> np.ndarray:
    """Margins of the listed pairs under each member, `[K, M]`."""
    assert space.pairs is not None
    pairs, rewards = np.asarray(space.pairs), np.asarray(belief.member_rewards)
    return rewards[:, pairs[:, 0]] - rewards[:, pairs[:, 1]]


PEERS: tuple[Peer, ...] = ()
