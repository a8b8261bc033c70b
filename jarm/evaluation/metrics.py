"""Metrics of reward models on test prompts.

Functions take one prompt and are batched outside; `evaluate` walks a memory-mapped test set in chunks.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jarm.core.base import RewardHead
from jarm.core.status import JarmError
from jarm.core.tables import ResponseTable
from jarm.core.types import Array, Bool, Float, Params
from jarm.evaluation.annotators import AnnotatorConfig, preference
from jarm.evaluation.ranking import centred_ranks, correlation, expected_best, ranking, subset_cdf

BINS = 15
"""Bins of the calibration error."""
OFFSETS = 16
"""Partners of a response in the test pairs, where it has more than 32 others."""
CALIBRATED = ("nll", "brier", "calibration_error")
"""Metrics that compare probabilities, and so need the annotator's."""
BEST_OF = (5, 10, 30, 50, 100, 300, 500)
"""Sizes n of best-of-n that are reported where prompts have more responses."""


def pair_offsets(width: int) -> tuple[np.ndarray, np.ndarray]:
    """The within-prompt test pairs (i, i + o mod R): every pair if R <= 33, else those of 16 evenly spread offsets o.

    Returns:
      `[J, R]` int32 partner of each response under each offset; and `[J, R]` bool, false on the half of the offset R/2
      that repeats the other half.
    """
    half = width // 2
    offsets = np.arange(1, half + 1)
    if half > OFFSETS:
        offsets = np.round(np.linspace(1, (width - 1) // 2, OFFSETS)).astype(int)
    here = np.arange(width)
    once = (2 * offsets[:, None] != width) | (here < half)
    return ((here + offsets[:, None]) % width).astype(np.int32), once


class _Truth(NamedTuple):
    """One prompt's part of the metrics that no head changes; computed once for all heads."""

    gold: Float[Array, "R"]
    mask: Bool[Array, "R"]
    ranks: Float[Array, "R"]
    real: Bool[Array, "J R"]
    gap: Float[Array, "J R"]


class Constants(NamedTuple):
    """The annotator's noise, the scale of gold, and the order statistics of best-of-n."""

    noise: Float[Array, ""]
    scale: Float[Array, ""]
    cdfs: Float[Array, "n size k"]


@jax.vmap
def _truths(gold: Float[Array, "R"], mask: Bool[Array, "R"]) -> _Truth:
    partner, once = pair_offsets(gold.shape[0])
    real = jnp.asarray(once) & mask[None, :] & mask[partner]
    return _Truth(gold, mask, centred_ranks(ranking(gold, mask), mask), real, gold[None, :] - gold[partner])


def _score(
    annotator: AnnotatorConfig, constants: Constants, pred: Float[Array, "R"], truth: _Truth
) -> dict[str, Array]:
    """The metrics of one prompt under one head: values that may be NaN, and sums over pairs."""
    ranks = ranking(pred, truth.mask)
    wins = preference(annotator, constants.noise, truth.gap / constants.scale, jnp.zeros_like(truth.gap))
    partner, _ = pair_offsets(pred.shape[0])
    margin = pred[None, :] - pred[partner]
    # One exponential serves all metrics: confidence is the larger of p and 1 - p.
    decay = jnp.exp(-jnp.abs(margin))
    confidence = 1 / (1 + decay)
    agree = jnp.where(margin > 0, wins, jnp.where(margin < 0, 1 - wins, 0.5))
    over = jnp.where(truth.real, confidence - agree, 0)
    place = jnp.clip(jnp.floor((confidence - 0.5) * (2 * BINS)), 0, BINS - 1).astype(jnp.int32)
    untied = truth.real & (truth.gap != 0)
    right = (1 + jnp.sign(margin) * jnp.sign(truth.gap)) / 2
    loss = jnp.log1p(decay) + jnp.maximum(margin, 0) - wins * margin
    p = jnp.where(margin > 0, confidence, 1 - confidence)
    brier = (p - wins) ** 2 + wins * (1 - wins)
    total = functools.partial(jnp.sum, dtype=jnp.float32)
    return {
        "spearman": correlation(centred_ranks(ranks, truth.mask), truth.ranks),
        "rankable": (truth.ranks != 0).any().astype(jnp.int32),
        "best": jax.vmap(lambda cdf: expected_best(ranks, truth.gold, truth.mask, cdf))(constants.cdfs),
        "pairs": total(truth.real),
        "untied": total(untied),
        "right": total(jnp.where(untied, right, 0)),
        "nll": total(jnp.where(truth.real, loss, 0)),
        "brier": total(jnp.where(truth.real, brier, 0)),
        # One pass per bin: a scatter is faster, but adds in no fixed order on an accelerator.
        "over": jax.lax.map(lambda b: jnp.where(place == b, over, 0).sum(), jnp.arange(BINS)),
    }


def _sums(annotator: AnnotatorConfig, constants: Constants, pred: Array, truth: _Truth) -> dict[str, Array]:
    """Sums over the prompts of a chunk; of values that may be NaN, also how many are not."""
    each = jax.vmap(functools.partial(_score, annotator, constants))(pred, truth)
    sums = {}
    for name in ("spearman", "best"):
        values = each.pop(name)
        defined = ~jnp.isnan(values)
        sums[name] = jnp.where(defined, values, 0).sum(0)
        sums[name + "_defined"] = defined.sum(0, dtype=jnp.int32)
    return sums | {name: values.sum(0) for name, values in each.items()}


@functools.partial(jax.jit, static_argnames=("head", "annotator", "batched_heads"))
def evaluate_chunk(
    params: Params,
    noise: Float[Array, "H"],
    constants: Constants,
    embeddings: Float[Array, "p R d"],
    gold: Float[Array, "p R"],
    mask: Bool[Array, "p R"],
    *,
    head: RewardHead,
    annotator: AnnotatorConfig,
    batched_heads: bool,
) -> dict[str, Array]:
    """Sums of the metrics over a chunk of p prompts, under H models in turn: the compiled part of `evaluate`."""
    flat, truth = embeddings.reshape(-1, embeddings.shape[2]), _truths(gold, mask)

    def one(xs: tuple[Params, Float[Array, ""]]) -> dict[str, Array]:
        members, own = xs

        def rewards(member: Params) -> Array:
            return head.rewards(member, flat)

        each = jax.vmap(rewards)(members) if batched_heads else jax.lax.map(rewards, members)
        return _sums(annotator, constants._replace(noise=own), each.mean(0).reshape(mask.shape), truth)

    # Heads one after the other, so that memory does not grow with their number.
    with jax.default_matmul_precision("highest"):
        return jax.lax.map(one, (params, noise))


@functools.partial(jax.jit, static_argnames=("annotator",))
def _score_chunk(
    constants: Constants,
    scores: Float[Array, "p R"],
    gold: Float[Array, "p R"],
    mask: Bool[Array, "p R"],
    *,
    annotator: AnnotatorConfig,
) -> dict[str, Array]:
    sums = _sums(annotator, constants, scores, _truths(gold, mask))
    return {name: value[None] for name, value in sums.items()}


def _in_chunks(
    kernel: Callable[..., dict[str, Array]], read: Callable[[slice], tuple[np.ndarray, ...]], prompts: int, size: int
) -> dict[str, np.ndarray]:
    """Sum a kernel over chunks of prompts, all of one shape; the host reads a chunk while the device is busy."""

    def chunks() -> Iterator[dict[str, Array]]:
        for start in range(0, prompts, size):
            arrays = read(slice(start, min(start + size, prompts)))
            short = size - len(arrays[0])
            yield kernel(*(np.pad(a, [(0, short), *[(0, 0)] * (a.ndim - 1)]) if short else a for a in arrays))

    totals: dict[str, np.ndarray] = {}
    waiting: dict[str, Array] = {}
    for sums in itertools.chain(chunks(), [{}]):
        for name, value in waiting.items():
            totals[name] = totals.get(name, 0) + np.asarray(value, np.float64)
        waiting = sums
    return totals


def _means(
    sums: dict[str, np.ndarray], prompts: int, best_of: tuple[int, ...], calibrated: bool
) -> dict[str, np.ndarray]:
    def over(total: np.ndarray, count: np.ndarray) -> np.ndarray:
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)

    means = {
        "spearman": over(sums["spearman"], sums["spearman_defined"]),
        "spearman_undefined": prompts - sums["spearman_defined"].astype(np.int64),
        "spearman_share": over(sums["spearman_defined"], sums["rankable"]),
    }
    for i, n in enumerate(best_of):
        defined = sums["best_defined"][..., i]
        means[f"best_of_{n}"] = over(sums["best"][..., i], defined)
        means[f"best_of_{n}_undefined"] = prompts - defined.astype(np.int64)
    means["pair_accuracy"] = over(sums["right"], sums["untied"])
    if not calibrated:
        return means
    return means | {
        "nll": over(sums["nll"], sums["pairs"]),
        "brier": over(sums["brier"], sums["pairs"]),
        "calibration_error": over(np.abs(sums["over"]).sum(-1), sums["pairs"]),
    }


def best_of_sizes(table: ResponseTable) -> tuple[int, ...]:
    """The n worth reporting: the largest n that 90 % of the prompts have, and those of 5, 10, ..., 500 below it.

    Prompts with fewer than two responses do not count, unless there are no others.
    """
    counts = table.mask.sum(axis=1)
    several = counts[counts > 1]
    largest = int(np.sort(several)[several.size // 10]) if several.size else int(counts.max())
    return (*(n for n in BEST_OF if n < largest), largest)


def _has_odds(annotator: AnnotatorConfig, column: str, noise: Any, scale: float | None) -> bool:
    """Whether the annotator's label probabilities are known, as a function of the column `column`."""
    return annotator.column == column and (
        annotator.kind != "bradley_terry" or (noise is not None and scale is not None)
    )


def _prepare(
    table: ResponseTable, column: str, noise: float | None, scale: float | None, best_of: tuple[int, ...] | None
) -> tuple[np.ndarray, tuple[int, ...], Constants]:
    """Checked arguments: the column in the place of gold, the n of best-of-n, and the constants of the metrics."""
    if table.gold is None and column == "gold":
        raise JarmError("The test table has no gold rewards, so no metric can be computed: name a score column.")
    if not table.mask.any():
        raise JarmError("The test table has no responses: give it at least one prompt.")
    best_of = best_of_sizes(table) if best_of is None else best_of
    width = table.mask.shape[1]
    if best_of and min(best_of) < 1:
        raise JarmError(f"`best_of` holds {min(best_of)}, and no response is the best of so few: give 1 or more.")
    cdfs = np.stack([subset_cdf(n, width) for n in best_of]) if best_of else np.zeros((0, width + 1, width + 1))
    constants = Constants(
        jnp.float32(0 if noise is None else noise),
        jnp.float32(1 if scale is None else scale),
        jnp.asarray(cdfs, jnp.float32),
    )
    return table.column(column), best_of, constants


def chunk_size(shape: tuple[int, int, int], widest: int, chunk_bytes: int) -> int:
    """Prompts per chunk of about `chunk_bytes`, in equal shares.

    A response takes 4 (4d + 4 widest + 10 J) bytes: two chunks of embeddings in flight, each once as read and once as
    float32; the activations of one head, before and after a layer and inside its activation function; and J test pairs
    of ten numbers each.

    Args:
      shape: `(P, R, d)`.
      widest: width of the widest layer.
      chunk_bytes: memory to take.
    """
    prompts, R, d = shape
    response = 4 * (4 * d + 4 * widest + 10 * min(OFFSETS, max(R // 2, 1)))
    fits = min(max(chunk_bytes // (R * response), 1), prompts)
    return -(-prompts // -(-prompts // fits))


def evaluate(
    head: RewardHead,
    params: Params,
    table: ResponseTable,
    *,
    column: str = "gold",
    annotator: AnnotatorConfig = AnnotatorConfig(),
    noise: float | np.ndarray | None = None,
    scale: float | None = None,
    best_of: tuple[int, ...] | None = None,
    chunk_bytes: int = 256 << 20,
    batched_heads: bool | None = None,
) -> dict[str, np.ndarray]:
    """Metrics of H reward models, each the mean of K heads, on a test table that is read once, in chunks.

    * `spearman`: mean over prompts of the within-prompt correlation; `spearman_undefined`: prompts left out of it;
      `spearman_share`: prompts in it, of those where gold has a ranking (two responses or more, not all equal, no NaN).
      So `spearman * spearman_share` counts a prompt that a model leaves undefined as 0.
    * `best_of_{n}`: expected gold reward of the best-predicted of n responses; `best_of_{n}_undefined`: prompts with
      fewer responses, left out of it.
    * `pair_accuracy`: share of the pairs of `pair_offsets` ordered as by gold; ties of gold are left out, and predicted
      ties are half right.
    * With `p* = sigmoid(noise (gold difference) / scale)`, the annotator's probability to prefer the first response:
      `nll`: expected `-log p` of the label, in nats; `brier`: expected squared error of p; `calibration_error`:
      `sum_b |sum_{pairs in b} (confidence - p* of the predicted order)| / pairs` over 15 equal bins b of confidence
      `max(p, 1 - p)` in [.5, 1], which is the same whichever response comes first. These three are left out where `p*`
      is unknown: for a `bradley_terry` annotator where `noise` or `scale` is None, and for an annotator who answers by
      another column than `column`.

    Args:
      head: the reward head.
      params: leaves `[H, K, ...]`.
      table: test prompts with gold rewards.
      column: column of the table that takes the place of gold rewards in all metrics: an attribute.
      annotator: whose labels the models learn from; its length bias and its `scale` are ignored.
      noise: beta of a `bradley_terry` annotator, as in the labels, a number or `[H]`; negative or infinite for perfect
        labels.
      scale: unit of gold differences, as in the labels (`annotators.reward_scale`).
      best_of: the n of best-of-n; by default `best_of_sizes(table)`.
      chunk_bytes: about how much memory to take beyond the parameters, not counting pages of a memory-mapped file that
        the system keeps in its cache.
      batched_heads: whether the K heads of a model are one batched product; by default not on a CPU, where that is
        slower.

    Returns:
      Name -> `[H]`; counts are integers.

    Raises:
      JarmError: the table has no gold rewards (or no column `column`), no responses, or an n of `best_of` is below 1.

    Example:
      >>> import jax, jarm
      >>> train, test = jarm.synthetic(seed=0)
      >>> head = jarm.HeadConfig(hidden=()).head()
      >>> params = jax.tree.map(lambda leaf: leaf[None, None], head.init(jax.random.key(0), 32))  # H = K = 1
      >>> metrics = jarm.evaluate(head, params, test, best_of=(1,))  # a fresh linear head predicts 0 everywhere
      >>> metrics["pair_accuracy"].tolist(), metrics["spearman_undefined"].tolist()
      ([0.5], [100])
    """
    gold, best_of, constants = _prepare(table, column, None, scale, best_of)
    batched_heads = jax.default_backend() != "cpu" if batched_heads is None else batched_heads
    leaves = jax.tree.leaves(params)
    widest = max(leaf.shape[-1] for leaf in leaves) * (leaves[0].shape[1] if batched_heads else 1)
    size = chunk_size(table.shape, widest, chunk_bytes)

    def read(prompts: slice) -> tuple[np.ndarray, ...]:
        return table.embeddings(prompts), np.asarray(gold[prompts], np.float32), table.mask[prompts]

    unbiased = dataclasses.replace(annotator, length_bias=0.0, column="gold")
    noises = jnp.broadcast_to(jnp.asarray(0 if noise is None else noise, jnp.float32), leaves[0].shape[:1])
    kernel = functools.partial(
        evaluate_chunk, params, noises, constants, head=head, annotator=unbiased, batched_heads=batched_heads
    )
    sums = _in_chunks(kernel, read, len(gold), size)
    return _means(sums, len(gold), best_of, _has_odds(annotator, column, noise, scale))


def evaluate_scores(
    scores: np.ndarray,
    table: ResponseTable,
    *,
    column: str = "gold",
    annotator: AnnotatorConfig = AnnotatorConfig(),
    noise: float | None = None,
    scale: float | None = None,
    best_of: tuple[int, ...] | None = None,
    chunk_bytes: int = 256 << 20,
) -> dict[str, float]:
    """The metrics of `evaluate` for given scores `[P, R]`.

    `nll`, `brier` and `calibration_error` take scores as log odds; they are left out without `noise` and `scale`.
    """
    gold, best_of, constants = _prepare(table, column, noise, scale, best_of)
    size = chunk_size((*table.mask.shape, 1), 1, chunk_bytes)

    def read(prompts: slice) -> tuple[np.ndarray, ...]:
        return np.asarray(scores[prompts], np.float32), np.asarray(gold[prompts], np.float32), table.mask[prompts]

    kernel = functools.partial(
        _score_chunk, constants, annotator=dataclasses.replace(annotator, length_bias=0.0, column="gold")
    )
    sums = _in_chunks(kernel, read, len(gold), size)
    means = _means(sums, len(gold), best_of, _has_odds(annotator, column, noise, scale))
    return {name: value.item() for name, value in means.items()}


def _oracle_log_odds(
    gold: np.ndarray, annotator: AnnotatorConfig, noise: float | None, scale: float | None
) -> np.ndarray:
    if annotator.kind == "bradley_terry" and noise is not None and scale is not None and 0 <= noise < np.inf:
        return gold * np.float32(noise / scale)
    # Certain of every order, however small the difference: e**-64 is below the resolution of float32.
    return 64 * np.unique(gold, return_inverse=True)[1].reshape(gold.shape).astype(np.float32)


def reference_lines(
    table: ResponseTable,
    *,
    column: str = "gold",
    annotator: AnnotatorConfig = AnnotatorConfig(),
    noise: float | None = None,
    scale: float | None = None,
    best_of: tuple[int, ...] | None = None,
) -> dict[str, dict[str, float]]:
    """The metrics of scores without a reward model: the oracle, the mean response, and every attribute of the table.

    The oracle knows gold rewards, and so the annotator's label probabilities: its `nll` is the smallest possible, 0 but
    for ties where the annotator is perfect. (No reward has the odds of an annotator who `flip`s, so there the oracle
    has no `nll`.) The mean response is a constant prediction: best-of-n is the mean gold reward, Spearman is undefined,
    `nll` is log 2. Attributes are baseline scores, with the sign that they have; they are not log odds, so they have no
    `nll`, `brier` or `calibration_error`. Without `noise` and `scale` no line has these three, as for `evaluate`.

    Args:
      table, column, annotator, noise, scale, best_of: as for `evaluate`.

    Returns:
      `oracle`, `mean response` or the name of an attribute -> metrics.
    """
    gold, *_ = _prepare(table, column, noise, scale, best_of)

    def measure(scores: np.ndarray) -> dict[str, float]:
        return evaluate_scores(
            scores, table, column=column, annotator=annotator, noise=noise, scale=scale, best_of=best_of
        )

    def ordinal(scores: np.ndarray) -> dict[str, float]:
        return {name: value for name, value in measure(scores).items() if name not in CALIBRATED}

    oracle = ordinal(gold)
    if annotator.kind != "flip" and _has_odds(annotator, column, noise, scale):
        odds = _oracle_log_odds(np.asarray(gold, np.float32), annotator, noise, scale)
        oracle |= {name: value for name, value in measure(odds).items() if name in CALIBRATED}
    return {
        "oracle": oracle,
        "mean response": measure(np.zeros_like(gold)),
        **{name: ordinal(scores) for name, scores in table.attributes.items()},
    }
