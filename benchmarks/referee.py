"""The float64 referee of picks, and rank-one greedy selection in plain NumPy. Nothing here uses code of jarm.

Pairs come as features, x `[M, F]` differences of the last layer's features and v `[M]` Fisher weights; or, in spaces
too large for that, as features and rewards of responses, whose pairs are gone through part by part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

NEAR = 1e-6
"""Two candidates whose scores differ by less than this share of the larger are a near-tie."""


def fisher_weight(margin: np.ndarray) -> np.ndarray:
    """v = p (1 - p), p = sigmoid(margin)."""
    decay = np.exp(-np.abs(margin))
    return decay / (1 + decay) ** 2


def leverages(x: np.ndarray, v: np.ndarray, past: np.ndarray | float = 0.0) -> np.ndarray:
    """v_m x_m^T (sum v x x^T + past)^-1 x_m, `[M]` float64."""
    x, v = x.astype(np.float64), v.astype(np.float64)
    factor = np.linalg.cholesky(x.T @ (v[:, None] * x) + past)
    return v * np.square(np.linalg.solve(factor, x.T)).sum(axis=0)


def judge_top(picks: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
    """How many of the k picks are among the k best scores, are near-ties with the k-th best, or are neither."""
    picks, k = np.asarray(picks), len(picks)
    order = np.argsort(-scores, kind="stable")
    last = scores[order[k - 1]]
    strange = picks[~np.isin(picks, order[:k])]
    near = int((scores[strange] >= last * (1 - NEAR)).sum())
    repeated = k - len(np.unique(picks))
    return {"picks": k, "near_ties": near, "wrong": len(strange) - near + repeated}


def judge_greedy(picks: np.ndarray, x: np.ndarray, v: np.ndarray, prior: np.ndarray) -> dict[str, Any]:
    """Replay greedy picks in float64: at each step, was the pick the best of all pairs that were left?

    A pick that is not the best is a near-tie where its gain log(1 + v x^T A^-1 x) is within `NEAR` of the best, and
    wrong otherwise; `worst_gap` is the largest such relative difference. Gains are taken given the picks so far, so
    one near-tie does not make all that follows look different.
    """
    s = np.sqrt(v.astype(np.float64))[:, None] * x.astype(np.float64)
    inverse = np.linalg.inv(prior.astype(np.float64))
    leverage = np.einsum("mf,fg,mg->m", s, inverse, s, optimize=True)
    near = wrong = 0
    worst = 0.0
    for pick in np.asarray(picks):
        best = leverage.max()
        gap = 1 - np.log1p(leverage[pick]) / np.log1p(best) if leverage[pick] >= 0 else 1.0
        if leverage[pick] < best:
            near, wrong = (near + 1, wrong) if gap <= NEAR else (near, wrong + 1)
            worst = max(worst, float(gap))
        direction = inverse @ s[pick]
        growth = 1 + s[pick] @ direction
        leverage -= np.square(s @ direction) / growth
        leverage[pick] = -np.inf
        inverse -= np.outer(direction, direction) / growth
    return {"picks": len(picks), "near_ties": near, "wrong": wrong, "worst_gap": worst}


def rank_one_greedy(x: np.ndarray, v: np.ndarray, prior: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Greedy D-optimal selection with one matrix-vector product of all pairs a pick, in the type of x.

    Gain log(1 + q), q = v x^T A^-1 x; after a pick with s = sqrt(v) x and u = A^-1 s / sqrt(1 + q), every q falls by
    (s_m . u)^2 and A^-1 by u u^T.

    Returns:
      Indices `[k]` in the order of choice, and gains `[k]` in nats.
    """
    s = np.sqrt(v)[:, None] * x
    inverse = np.linalg.inv(prior).astype(x.dtype)
    leverage = np.einsum("mf,mf->m", s @ inverse, s)
    fall = np.empty_like(leverage)
    picks, gains = np.empty(k, np.int64), np.empty(k, x.dtype)
    for step in range(k):
        pick = picks[step] = leverage.argmax()
        gains[step] = np.log1p(leverage[pick])
        direction = inverse @ s[pick] / np.sqrt(1 + leverage[pick])
        np.matmul(s, direction, out=fall)
        np.square(fall, out=fall)
        np.subtract(leverage, fall, out=leverage)
        leverage[pick] = -np.inf
        inverse -= np.outer(direction, direction)
    return picks, gains


def log_det(x: np.ndarray, v: np.ndarray, prior: np.ndarray, picks: np.ndarray) -> float:
    """log det of the prior plus the information of the picks, float64."""
    chosen, weight = x[picks].astype(np.float64), v[picks].astype(np.float64)
    return float(np.linalg.slogdet(prior.astype(np.float64) + chosen.T @ (weight[:, None] * chosen))[1])


def rank_one_trace(
    x: np.ndarray, v: np.ndarray, prior: np.ndarray, target: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Greedy selection by the fall of tr(target A^-1), with two matrix-vector products of all pairs a pick.

    Gain n / (1 + q), n = s^T A^-1 target A^-1 s; after a pick, with u as in `rank_one_greedy` and w = A^-1 target u,
    every n changes by -2 (s . u)(s . w) + (s . u)^2 (u^T target u).

    Returns:
      Indices `[k]` in the order of choice, and the falls of the trace `[k]`.
    """
    s = np.sqrt(v)[:, None] * x
    inverse, target = np.linalg.inv(prior).astype(x.dtype), target.astype(x.dtype)
    white = s @ inverse
    variance, numerator = np.einsum("mf,mf->m", white, s), np.einsum("mf,mf->m", white @ target, white)
    picks, gains = np.empty(k, np.int64), np.empty(k, x.dtype)
    for step in range(k):
        gain = numerator / (1 + variance)
        gain[picks[:step]] = -np.inf
        pick = picks[step] = gain.argmax()
        gains[step] = gain[pick]
        variance, numerator, inverse = _trace_update(s, inverse, target, variance, numerator, pick)
    return picks, gains


def _trace_update(
    s: np.ndarray, inverse: np.ndarray, target: np.ndarray, variance: np.ndarray, numerator: np.ndarray, pick: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    direction = inverse @ s[pick] / np.sqrt(1 + variance[pick])
    along = s @ direction
    numerator = numerator - 2 * along * (s @ (inverse @ (target @ direction)))
    numerator += np.square(along) * (direction @ target @ direction)
    return variance - np.square(along), numerator, inverse - np.outer(direction, direction)


def judge_trace(
    picks: np.ndarray, x: np.ndarray, v: np.ndarray, prior: np.ndarray, target: np.ndarray
) -> dict[str, Any]:
    """`judge_greedy` for the fall of tr(target A^-1)."""
    s = np.sqrt(v.astype(np.float64))[:, None] * x.astype(np.float64)
    target, inverse = target.astype(np.float64), np.linalg.inv(prior.astype(np.float64))
    white = s @ inverse
    variance, numerator = np.einsum("mf,mf->m", white, s), np.einsum("mf,mf->m", white @ target, white)
    picks, gaps = np.asarray(picks), []
    for step, pick in enumerate(picks):
        gain = numerator / (1 + variance)
        repeated = pick in picks[:step]
        gain[picks[:step]] = -np.inf
        gaps.append(1.0 if repeated else 1 - gain[pick] / gain.max())
        variance, numerator, inverse = _trace_update(s, inverse, target, variance, numerator, pick)
    return _of_gaps(np.array(gaps))


def _of_gaps(gaps: np.ndarray) -> dict[str, Any]:
    near = int(((gaps > 0) & (gaps <= NEAR)).sum())
    return {"picks": len(gaps), "near_ties": near, "wrong": int((gaps > NEAR).sum()), "worst_gap": float(gaps.max())}


def trace(x: np.ndarray, v: np.ndarray, prior: np.ndarray, target: np.ndarray, picks: np.ndarray) -> float:
    """tr(target A^-1), A the prior plus the information of the picks, float64."""
    chosen, weight = x[picks].astype(np.float64), v[picks].astype(np.float64)
    information = prior.astype(np.float64) + chosen.T @ (weight[:, None] * chosen)
    return float(np.trace(np.linalg.solve(information, target.astype(np.float64))))


Parts = Callable[[np.ndarray, np.ndarray], Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]]
"""`(y [N, F], rewards [N]) -> parts of a space`: leverages v |y_i - y_j|^2, and the i and the j they belong to."""


def all_parts(block: int = 512) -> Parts:
    """Every pair i < j, in square blocks."""

    def parts(y: np.ndarray, rewards: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        square = np.square(y).sum(axis=1)
        # v = e_i e_j / (e_i + e_j)^2 for e = exp(r): one exponential a response.
        power = np.exp(rewards - rewards.mean())
        assert 0 < power.min() <= power.max() < np.inf, "rewards are too far apart for the referee"
        for start in range(0, len(y), block):
            rows = np.arange(start, min(start + block, len(y)))
            for other in range(start, len(y), block):
                columns = np.arange(other, min(other + block, len(y)))
                total = power[rows, None] + power[columns]
                leverage = y[rows] @ (-2 * y[columns]).T
                leverage += square[rows, None]
                leverage += square[columns]
                leverage *= power[rows, None] * power[columns]
                leverage /= np.square(total, out=total)
                if start == other:
                    leverage[np.tril_indices(len(rows))] = -np.inf
                yield leverage, rows[:, None], columns[None, :]

    return parts


def listed_parts(pairs: np.ndarray, chunk: int = 1 << 16) -> Parts:
    """The pairs of a list `[M, 2]`, smaller index first."""

    def parts(y: np.ndarray, rewards: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        for start in range(0, len(pairs), chunk):
            first, second = pairs[start : start + chunk].T
            distance = np.square(y[first] - y[second]).sum(axis=1)
            yield fisher_weight(rewards[first] - rewards[second]) * distance, first, second

    return parts


def within_pairs(size: int, width: int) -> np.ndarray:
    """Every pair of responses of one prompt, `[M, 2]`."""
    one = np.stack(np.triu_indices(width, 1), axis=1)
    return (np.arange(0, size, width)[:, None, None] + one).reshape(-1, 2)


def judge_in_space(
    picks: np.ndarray,
    features: np.ndarray,
    rewards: np.ndarray,
    prior: np.ndarray,
    parts: Parts,
    steps: Iterable[int],
    *,
    ceilings: np.ndarray | None = None,
    fresh: Sequence[bool] | np.ndarray = (),
    kept: int = 0,
) -> dict[str, Any]:
    """At some steps of greedy D-optimal picks `[k, 2]`, the best of the whole space given the picks before.

    Args:
      picks: `[k, 2]`, smaller index first, in the order of choice.
      features, rewards, prior: `[N, F]`, `[N]`, `[F, F]`.
      parts: the space.
      steps: which steps to look at.
      ceilings, fresh, kept: a certificate. `[k]` what no pair outside the shortlist could gain, in nats; `[k]` whether
        a pick came right after a pass; and how many pairs the shortlist held, those picked before it included.

    Returns:
      As `judge_greedy`, of the steps looked at. With a certificate also `most_above`, the largest number of pairs that
      gain more than the ceiling right after one of `passes_checked` passes, and `excess`, by which share the best pair
      that the shortlist had no room for exceeds it; and `least_margin`, the smallest quotient of gain and ceiling of
      all picks that came later: they are certified from 1 up.
    """
    features, rewards = features.astype(np.float64), rewards.astype(np.float64)
    picks = np.asarray(picks, np.int64)  # the code of a pair of 100,000 responses does not fit into 32 bits
    x = features[picks[:, 0]] - features[picks[:, 1]]
    v = fisher_weight(rewards[picks[:, 0]] - rewards[picks[:, 1]])
    codes = picks[:, 0] * len(features) + picks[:, 1]
    information, wanted = prior.astype(np.float64).copy(), set(steps)
    gaps, counts, excesses, margins = [], [], [0.0], []
    for step in range(len(picks)):
        factor = np.linalg.cholesky(information)
        gain = np.log1p(v[step] * np.square(np.linalg.solve(factor, x[step])).sum())
        certified = ceilings is not None and ceilings[step] > 0
        if certified and not fresh[step]:
            margins.append(gain / ceilings[step])
        if step in wanted:
            ceiling = np.expm1(np.float64(ceilings[step])) if certified and fresh[step] else np.inf
            best, above = -np.inf, []
            for leverage, first, second in parts(np.linalg.solve(factor, features.T).T, rewards):
                above.append(leverage[leverage > ceiling])
                _strike(leverage, first, second, codes[:step], len(features))
                best = max(best, leverage.max())
            # Of the pick itself the two differ by float64's rounding.
            gap = 1 - gain / np.log1p(best)
            gaps.append(1.0 if codes[step] in codes[:step] else gap if gap > 1e-12 else 0.0)
            if ceiling < np.inf:
                found = np.sort(np.concatenate(above))[::-1]
                counts.append(len(found))
                excesses += [np.log1p(value) / ceilings[step] - 1 for value in found[kept : kept + 1]]
        information += v[step] * np.outer(x[step], x[step])
    result = _of_gaps(np.array(gaps))
    if ceilings is not None:
        result |= {"passes_checked": len(counts), "most_above": max(counts, default=0), "excess": float(max(excesses))}
        result["least_margin"] = float(min(margins, default=np.inf))
    return result


def _strike(leverage: np.ndarray, first: np.ndarray, second: np.ndarray, codes: np.ndarray, size: int) -> None:
    """-inf where a pair was picked before."""
    if leverage.ndim == 1:
        leverage[np.isin(first * size + second, codes)] = -np.inf
        return
    row, column = codes // size - first[0, 0], codes % size - second[0, 0]
    inside = (row >= 0) & (row < leverage.shape[0]) & (column >= 0) & (column < leverage.shape[1])
    leverage[row[inside], column[inside]] = -np.inf


def count_above(score: float, features: np.ndarray, rewards: np.ndarray, parts: Parts) -> int:
    """How many pairs of a space have a leverage above this, in the metric of the features."""
    every = parts(features.astype(np.float64), rewards.astype(np.float64))
    return sum(int((leverage > score).sum()) for leverage, *_ in every)
