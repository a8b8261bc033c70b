"""Metrics of reward models on test prompts.

Functions take one prompt and are batched outside; `evaluate` walks a memory-mapped test set in chunks.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jarm.core.base import RewardHead
from jarm.core.columns import dense_ranks, halves, nearest_zero
from jarm.core.status import JarmError
from jarm.core.tables import ResponseTable, check_embeddings
from jarm.core.types import Array, Params
from jarm.evaluation.annotators import AnnotatorConfig, RewardScale
from jarm.evaluation.ranking import subset_cdf
from jarm.evaluation.scoring import OFFSETS, Constants, evaluate_chunk, score_chunk

CALIBRATED = ("nll", "brier", "calibration_error")
"""Metrics that compare probabilities, and so need the annotator's."""
BEST_OF = (5, 10, 30, 50, 100, 300, 500)
"""Sizes n of best-of-n that are reported where prompts have more responses."""


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


class _Target(NamedTuple):
    """The column in the place of gold, `[P, R]` float64, measured from a value of it that the means get back."""

    values: np.ndarray
    origin: float
    mask: np.ndarray

    def of(self, prompts: slice) -> tuple[np.ndarray, ...]:
        """Gold, mask, rest and order of some prompts, as the kernels take them."""
        values = self.values[prompts]
        near, rest = halves(values)
        return near, self.mask[prompts], rest, dense_ranks(values)


def _means(
    sums: dict[str, np.ndarray], target: _Target, best_of: tuple[int, ...], calibrated: bool
) -> dict[str, np.ndarray]:
    prompts = len(target.values)

    def over(total: np.ndarray, count: np.ndarray) -> np.ndarray:
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)

    means = {
        "spearman": over(sums["spearman"], sums["spearman_defined"]),
        "spearman_undefined": prompts - sums["spearman_defined"].astype(np.int64),
        "spearman_share": over(sums["spearman_defined"], sums["rankable"]),
    }
    for i, n in enumerate(best_of):
        defined = sums["best_defined"][..., i]
        means[f"best_of_{n}"] = over(sums["best"][..., i], defined) + target.origin
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
    table: ResponseTable,
    column: str,
    annotator: AnnotatorConfig,
    noise: float | None,
    scale: float | None,
    best_of: tuple[int, ...] | None,
) -> tuple[_Target, tuple[int, ...], Constants]:
    """Checked arguments: the column in the place of gold, the n of best-of-n, and the constants of the metrics."""
    if isinstance(scale, RewardScale) and scale.column != annotator.column:
        raise JarmError(
            f"`scale` is the unit of {scale.column!r}, by which the annotator of the labels answers, and `annotator` "
            f"answers by {annotator.column!r}: give the annotator of the labels (`annotator=config.annotator`)."
        )
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
    gold = np.asarray(table.column(column), np.float64)
    origin = nearest_zero(gold[table.mask])
    return _Target(np.where(table.mask, gold - origin, 0), origin, table.mask), best_of, constants


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
      scale: unit of gold differences, as in the labels (`annotators.reward_scale`, `prepare`).
      best_of: the n of best-of-n; by default `best_of_sizes(table)`.
      chunk_bytes: about how much memory to take beyond the parameters, not counting pages of a memory-mapped file that
        the system keeps in its cache.
      batched_heads: whether the K heads of a model are one batched product; by default not on a CPU, where that is
        slower.

    Returns:
      Name -> `[H]`; counts are integers.

    Raises:
      JarmError: the table has no gold rewards (or no column `column`), no responses, an n of `best_of` is below 1, or
        `scale` is that of another column than `annotator` answers by, or an embedding is NaN, infinite or too large.

    Example:
      >>> import jax, jarm
      >>> train, test = jarm.synthetic(seed=0)
      >>> head = jarm.HeadConfig(hidden=()).head()
      >>> params = jax.tree.map(lambda leaf: leaf[None, None], head.init(jax.random.key(0), 32))  # H = K = 1
      >>> metrics = jarm.evaluate(head, params, test, best_of=(1,))  # a fresh linear head predicts 0 everywhere
      >>> metrics["pair_accuracy"].tolist(), metrics["spearman_undefined"].tolist()
      ([0.5], [100])
    """
    target, best_of, constants = _prepare(table, column, annotator, None, scale, best_of)
    batched_heads = jax.default_backend() != "cpu" if batched_heads is None else batched_heads
    leaves = jax.tree.leaves(params)
    widest = max(leaf.shape[-1] for leaf in leaves) * (leaves[0].shape[1] if batched_heads else 1)
    size = chunk_size(table.shape, widest, chunk_bytes)

    def read(prompts: slice) -> tuple[np.ndarray, ...]:
        return table.embeddings(prompts), *target.of(prompts)

    unbiased = dataclasses.replace(annotator, length_bias=0.0, column="gold")
    noises = jnp.broadcast_to(jnp.asarray(0 if noise is None else noise, jnp.float32), leaves[0].shape[:1])
    kernel = functools.partial(
        evaluate_chunk, params, noises, constants, head=head, annotator=unbiased, batched_heads=batched_heads
    )
    sums = _in_chunks(kernel, read, len(table.rows), size)
    if not np.isfinite(sums["nll"]).all():  # a model that failed, or an input of which every model fails
        for start in range(0, len(table.rows), size):
            some = slice(start, start + size)
            check_embeddings(table.embeddings(some), table.mask[some], start)
    return _means(sums, target, best_of, _has_odds(annotator, column, noise, scale))


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
    target, best_of, constants = _prepare(table, column, annotator, noise, scale, best_of)
    size = chunk_size((*table.mask.shape, 1), 1, chunk_bytes)

    def read(prompts: slice) -> tuple[np.ndarray, ...]:
        return _margins(scores[prompts], table.mask[prompts]), *target.of(prompts)

    kernel = functools.partial(
        score_chunk, constants, annotator=dataclasses.replace(annotator, length_bias=0.0, column="gold")
    )
    sums = _in_chunks(kernel, read, len(table.rows), size)
    means = _means(sums, target, best_of, _has_odds(annotator, column, noise, scale))
    return {name: value.item() for name, value in means.items()}


def _margins(scores: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Scores as float32; of those in float64, what a prompt's have in common is left out first, which has no effect."""
    scores = np.asarray(scores)
    if scores.dtype == np.float64:
        nearest = np.abs(np.where(mask, scores, np.inf)).argmin(axis=1)[:, None]
        common = np.take_along_axis(scores, nearest, axis=1)
        scores = scores - np.where(np.isfinite(common), common, 0)
    return scores.astype(np.float32)


def _oracle_log_odds(
    gold: np.ndarray, annotator: AnnotatorConfig, noise: float | None, scale: float | None
) -> np.ndarray:
    if annotator.kind == "bradley_terry" and noise is not None and scale is not None and 0 <= noise < np.inf:
        return gold * (noise / scale)
    # Certain of every order, however small the difference: e**-64 is below the resolution of float32.
    return 64 * dense_ranks(gold)


def reference_lines(
    table: ResponseTable,
    *,
    column: str = "gold",
    annotator: AnnotatorConfig = AnnotatorConfig(),
    noise: float | None = None,
    scale: float | None = None,
    best_of: tuple[int, ...] | None = None,
    scores: Mapping[str, np.ndarray] | None = None,
) -> dict[str, dict[str, float]]:
    """The metrics of scores without labels: the oracle, the mean response, every attribute of the table, and others.

    The oracle knows gold rewards, and so the annotator's label probabilities: its `nll` is the smallest possible, 0 but
    for ties where the annotator is perfect. (No reward has the odds of an annotator who `flip`s, so there the oracle
    has no `nll`.) The mean response is a constant prediction: best-of-n is the mean gold reward, Spearman is undefined,
    `nll` is log 2. Attributes are baseline scores, with the sign that they have; they are not log odds, so they have no
    `nll`, `brier` or `calibration_error`. Without `noise` and `scale` no line has these three, as for `evaluate`.

    Args:
      table, column, annotator, noise, scale, best_of: as for `evaluate`.
      scores: name -> `[P, R]` further scores, such as those of `jarm.evaluation.ceiling.linear_scores`, measured as
        attributes are.

    Returns:
      `oracle`, `mean response`, the name of an attribute or of further scores -> metrics.
    """
    target, *_ = _prepare(table, column, annotator, noise, scale, best_of)

    def measure(scores: np.ndarray) -> dict[str, float]:
        return evaluate_scores(
            scores, table, column=column, annotator=annotator, noise=noise, scale=scale, best_of=best_of
        )

    def ordinal(scores: np.ndarray) -> dict[str, float]:
        return {name: value for name, value in measure(dense_ranks(scores)).items() if name not in CALIBRATED}

    oracle = ordinal(target.values)
    if annotator.kind != "flip" and _has_odds(annotator, column, noise, scale):
        odds = _oracle_log_odds(target.values, annotator, noise, scale)
        oracle |= {name: value for name, value in measure(odds).items() if name in CALIBRATED}
    return {
        "oracle": oracle,
        "mean response": measure(np.zeros(table.mask.shape, np.float32)),
        **{name: ordinal(values) for name, values in {**table.attributes, **(scores or {})}.items()},
    }
