"""Tables made of formulas: nothing to download, and favourable to no rule.

Real embeddings show every one of its mechanisms: a spectrum that falls as a power law, topics of unequal size, prompts
whose responses vary a lot or hardly, responses that nearly repeat another one, a reward with an offset for each prompt,
and a weak pull of length. `docs/data.md` lists the ways in which real data are harder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from jarm.core.checks import INT32, Check, at_least, between, check_fields
from jarm.core.memory import refuse_too_large
from jarm.core.status import JarmError
from jarm.core.tables import ResponseTable, TrainTest

_CHECKS: Mapping[str, Check] = {
    **dict.fromkeys(("train", "test", "width", "topics", "terms"), between(1, INT32)),
    **dict.fromkeys(("responses", "test_responses"), between(2, INT32)),
    **dict.fromkeys(("between", "copies", "outliers", "products", "length_pull", "lead", "unseen"), between(0, 1)),
    **dict.fromkeys(("spread", "copy_noise", "far", "frequency", "offset", "huge"), at_least(0)),
}


@dataclasses.dataclass(frozen=True)
class SyntheticConfig:
    """Sizes and mechanisms of the synthetic tables.

    Attributes:
      train, test: numbers of prompts to label, and of prompts for evaluation.
      responses, test_responses: responses per prompt in each.
      width: d of the embeddings.
      power: exponent a of the spectrum; the k-th principal direction has a variance proportional to k ** -a.
      topics: clusters of prompts; topic t = 1, 2, ... is drawn in proportion to 1 / t.
      between: share of the embeddings' variance that lies between prompts, half of it between topics.
      spread: standard deviation of the log of a prompt's own scale of variation; 0 makes prompts alike.
      copies: share of the responses that nearly repeat another response of their prompt.
      copy_noise: distance of a copy from its source, relative to the distance of a response from its prompt's centre.
      outliers: share of the responses whose embedding is replaced by a far one, independent of their gold.
      far: distance of an outlier from its prompt's centre, relative to the distance of other responses.
      terms: number of sinusoids in the teacher, and of products.
      frequency: standard deviation of a sinusoid's argument, in radians; larger is harder.
      products: share of the products in gold's within-prompt variance.
      offset: standard deviation of the prompts' offsets, in within-prompt standard deviations of gold.
      length_pull: correlation of log length with gold, within prompts.
      lead: share of the first principal direction in gold's within-prompt variance.
      unseen: share of gold's within-prompt variance that the embeddings do not show; near-copies have the same.
      huge: coordinates that are 30 + 10 times as large as they were, as some of hidden states are.

    Raises:
      JarmError: a size is too small to form a pair or larger than memory, or a share lies outside [0, 1].
    """

    train: int = 200
    test: int = 100
    responses: int = 10
    test_responses: int = 20
    width: int = 32
    power: float = 1.0
    topics: int = 20
    between: float = 0.3
    spread: float = 0.3
    copies: float = 0.2
    copy_noise: float = 0.1
    outliers: float = 0.0
    far: float = 2.0
    terms: int = 16
    frequency: float = 0.5
    products: float = 0.2
    offset: float = 0.5
    length_pull: float = 0.3
    lead: float = 0.0
    unseen: float = 0.0
    huge: int = 0

    def __post_init__(self) -> None:
        check_fields(self, _CHECKS, "SyntheticConfig.{}")
        if self.lead + self.unseen >= 1:
            raise JarmError(
                f"SyntheticConfig.lead + unseen = {self.lead + self.unseen:g} leave nothing of gold to the teacher: "
                "lower them to less than 1 together."
            )
        for R in (self.responses, self.test_responses):
            if round(self.copies * R) >= R:
                raise JarmError(
                    f"SyntheticConfig.copies = {self.copies} leaves no original among {R} responses: lower it."
                )
        numbers = self.width * (self.train * self.responses + self.test * self.test_responses)
        refuse_too_large(f"SyntheticConfig: a table of {numbers:,} numbers", 24 * numbers, "take fewer prompts")


_ISOTROPIC = SyntheticConfig(power=0.0, topics=1, spread=0.0, copies=0.0)

VARIANTS: Mapping[str, SyntheticConfig] = MappingProxyType(
    {
        "default": SyntheticConfig(),
        "isotropic": _ISOTROPIC,
        "outliers": dataclasses.replace(_ISOTROPIC, outliers=0.15),
        "hidden": SyntheticConfig(
            width=128, power=0.75, between=0.7, spread=0.25, copies=0.1, lead=0.1, unseen=0.4, offset=1.0, huge=3
        ),
    }
)
"""Named settings. `isotropic`: all pairs are about equally informative, so selection gains little.
`outliers`: the pairs that optimal designs prefer are uninformative, so these are expected to lose to random.
`hidden`: like hidden states of a decoder: a few huge coordinates, a slow power law, gold that they tell in part."""


def synthetic(seed: int = 0, config: SyntheticConfig = VARIANTS["default"]) -> TrainTest:
    """Tables of prompts in topics, responses around prompts, and gold from a teacher that no head can equal.

    Embedding `e_pi = m_t(p) + c_p + s_p n_pi` in principal coordinates, then rotated; gold
    `g_pi = a sum_j sin(f u_j.e + b_j) + b sum_j (v_j.e)(w_j.e) + o_p`, and shares of it by `lead` and `unseen`.
    `docs/data.md` explains every term.

    Args:
      seed: seed of every draw, the teacher included.
      config: sizes and mechanisms.

    Returns:
      Train and test tables with the same topics and teacher, and other prompts. Embeddings have unit variance per
      coordinate, on average, but for `huge` ones; gold has unit variance within the training prompts. Attributes:
      `length` (characters), `position` (index in the prompt) and `prompt_cosine` (cosine to the prompt's centre).

    Example:
      >>> train, test = synthetic(0, SyntheticConfig(train=50, width=8))
      >>> train.shape, test.shape  # prompts, responses per prompt, width
      ((50, 10, 8), (100, 20, 8))
      >>> sorted(train.attributes), round(float(train.gold.var(axis=1).mean()), 3)
      (['length', 'position', 'prompt_cosine'], 1.0)
    """
    rng = np.random.default_rng(seed)
    world = _World.draw(rng, config)
    train = _Draw.draw(rng, config, world, config.train, config.responses)
    test = _Draw.draw(rng, config, world, config.test, config.test_responses)
    told = 1 - config.lead - config.unseen
    shares = [told * (1 - config.products), told * config.products, config.lead, config.unseen]
    scales = np.sqrt(shares) / [_within(part) for part in train.parts]
    scales /= _within(train.gold(scales))
    seeded = {"source": "synthetic", "seed": seed, **dataclasses.asdict(config)}
    return TrainTest(
        train=_table(rng, config, world, train, scales, {**seeded, "split": "train"}),
        test=_table(rng, config, world, test, scales, {**seeded, "split": "test"}),
    )


class _World(NamedTuple):
    """Common to train and test: spectrum `[d]`, topics `[topics, d]`, a rotation `[d, d]`, and the teacher."""

    deviation: np.ndarray
    topics: np.ndarray
    rotation: np.ndarray
    axes: np.ndarray
    phase: np.ndarray

    @classmethod
    def draw(cls, rng: np.random.Generator, config: SyntheticConfig) -> _World:
        d = config.width
        variance = np.arange(1, d + 1, dtype=np.float64) ** -config.power
        deviation = np.sqrt(variance / variance.mean())
        return cls(
            deviation=deviation,
            topics=np.sqrt(config.between / 2) * deviation * rng.standard_normal((config.topics, d)),
            rotation=np.linalg.qr(rng.standard_normal((d, d)))[0],
            # The teacher's axes are isotropic, as a random network's, whatever the spectrum.
            axes=rng.standard_normal((3, d, config.terms)) / np.sqrt(d),
            phase=rng.uniform(-np.pi / 4, np.pi / 4, config.terms),
        )


class _Draw(NamedTuple):
    """Prompts in principal coordinates: centres `[P, d]`, embeddings `[P, R, d]`, and the parts of gold `[P, R]`.

    They are the teacher's sinusoids and products, the first principal coordinate, and what embeddings do not show.
    """

    centre: np.ndarray
    embedding: np.ndarray
    source: np.ndarray
    parts: tuple[np.ndarray, ...]

    @classmethod
    def draw(cls, rng: np.random.Generator, config: SyntheticConfig, world: _World, P: int, R: int) -> _Draw:
        d = config.width
        frequency = 1 / np.arange(1, config.topics + 1)
        topic = rng.choice(config.topics, size=P, p=frequency / frequency.sum())
        own = np.sqrt(config.between / 2) * world.deviation * rng.standard_normal((P, d))
        centre = world.topics[topic] + own
        normal = rng.standard_normal((P, R, d))
        source = _sources(rng, P, R, round(config.copies * R))
        copied = (source != np.arange(R))[..., None]
        jitter = config.copy_noise * rng.standard_normal((P, R, d)) * copied
        normal = np.take_along_axis(normal, source[..., None], axis=1) + jitter
        scale = np.sqrt(1 - config.between) * np.exp(config.spread * rng.standard_normal((P, 1, 1)))
        embedding = centre[:, None] + scale * world.deviation * normal
        sine, left, right = world.axes
        sines = np.sin(config.frequency * embedding @ sine + world.phase).sum(axis=-1)
        products = ((embedding @ left) * (embedding @ right)).sum(axis=-1)
        # The teacher has scored the texts; the embedder now misunderstands some of them.
        lost = rng.random((P, R, 1)) < config.outliers
        elsewhere = config.far * scale * world.deviation * rng.standard_normal((P, R, d))
        first = embedding[..., 0]
        embedding = np.where(lost, centre[:, None] + elsewhere, embedding)
        unseen = rng.standard_normal((P, R)) if config.unseen else np.zeros((P, R))
        return cls(centre, embedding, source, (sines, products, first, np.take_along_axis(unseen, source, axis=1)))

    def gold(self, scales: np.ndarray) -> np.ndarray:
        return sum(scale * part for scale, part in zip(scales, self.parts, strict=True))


def _sources(rng: np.random.Generator, P: int, R: int, copies: int) -> np.ndarray:
    """Response that each one repeats, `[P, R]`: itself, except for `copies` random ones, which repeat an original."""
    source = np.tile(np.arange(R), (P, 1))
    order = rng.permuted(source, axis=1)
    repeated = np.take_along_axis(order, rng.integers(copies, R, size=(P, copies)), axis=1)
    np.put_along_axis(source, order[:, :copies], repeated, axis=1)
    return source


def _within(values: np.ndarray) -> np.ndarray:
    """Root mean within-prompt variance of `[P, R]` values; 1 where nothing varies."""
    deviation = np.sqrt(values.var(axis=1).mean())
    return np.where(deviation > 0, deviation, 1.0)


def _table(
    rng: np.random.Generator,
    config: SyntheticConfig,
    world: _World,
    draw: _Draw,
    scales: np.ndarray,
    provenance: Mapping[str, object],
) -> ResponseTable:
    P, R, d = draw.embedding.shape
    value = draw.gold(scales)
    offset = config.offset * rng.standard_normal((P, 1))
    noise = np.take_along_axis(rng.standard_normal((P, R)), draw.source, axis=1)
    pull = config.length_pull * (value - value.mean(axis=1, keepdims=True))
    length = np.exp(6 + 0.5 * (pull + np.sqrt(1 - config.length_pull**2) * noise))
    norms = np.linalg.norm(draw.embedding, axis=-1) * np.linalg.norm(draw.centre, axis=-1)[:, None]
    cosine = (draw.embedding @ draw.centre[..., None])[..., 0] / norms
    embedding = (draw.embedding @ world.rotation).reshape(P * R, d)
    embedding[:, : config.huge] = 30 + 10 * embedding[:, : config.huge]
    return ResponseTable(
        store=embedding.astype(np.float32),
        rows=np.arange(P * R).reshape(P, R),
        mask=np.ones((P, R), dtype=bool),
        gold=_narrow(value + offset),
        attributes={
            "length": np.rint(length).astype(np.float32),
            "position": np.tile(np.arange(R, dtype=np.float32), (P, 1)),
            "prompt_cosine": cosine.astype(np.float32),
        },
        provenance=dict(provenance),
    )


def _narrow(gold: np.ndarray) -> np.ndarray:
    """Gold as float32, unless offsets leave that too few digits for differences, whose deviation is 1."""
    narrow = gold.astype(np.float32)
    return narrow if np.spacing(np.abs(narrow).max()) < 1e-4 else gold
