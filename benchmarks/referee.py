"""The float64 referee of picks, and rank-one greedy D-optimal selection in plain NumPy.

Everything here takes pairs as features: x `[M, F]` differences of the last layer's features, v `[M]` Fisher weights.
"""

from __future__ import annotations

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
