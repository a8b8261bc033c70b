"""Other packages that select, measured by `jarm bench` beside the rules of jarm where they are installed."""

from __future__ import annotations

import dataclasses
import functools
import gc
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jarm.acquisition.optimal_design import prior_information
from jarm.core.base import Belief, HParams, PairSpace

Run = Callable[[], np.ndarray]
OUTCOMES = 2048
"""Configurations of labels that BatchBALD samples, as many as `batch_bald` of jarm follows."""
DENSE = 20_000
"""Most pairs for what holds a number for each two of them."""


@dataclasses.dataclass(frozen=True)
class Peer:
    """A rule of another package.

    Attributes:
      name: what it is called in tables: "package: rule".
      module: what has to be importable, the module within its package that is used.
      like: the rule of jarm that does the same or nearest.
      make: `(belief, listed space, k) -> run`; `run()` returns the chosen pairs `[k, 2]`. What is done before a caller
        would have its features in hand is done in `make`.
    """

    name: str
    module: str
    like: str
    make: Callable[[Belief, PairSpace, int], Run]


def installed(peer: Peer) -> bool:
    """Whether it can be found; of a module within a package, whether that package can be imported, too."""
    try:
        return importlib.util.find_spec(peer.module) is not None
    except Exception:  # whatever the package raises as it is imported: then it is of no use here
        return False


def differences(belief: Belief, space: PairSpace) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The listed pairs `[M, 2]`, x = phi_i - phi_j of each `[M, F]`, and x of the labelled pairs `[labels, F]`."""
    assert space.pairs is not None
    pairs, phi = np.asarray(space.pairs), np.asarray(belief.features)
    known = np.asarray(belief.labelled_features)[: int(belief.num_labelled)]
    return pairs, phi[pairs[:, 0]] - phi[pairs[:, 1]], known[:, 0] - known[:, 1]


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


def bmdal(method: str, *, informed: bool = False) -> Callable[[Belief, PairSpace, int], Run]:
    """A method of bmdal_reg, float64: on x, the labelled pairs first; or, `informed`, on sqrt(v) x, whitened by the
    prior of `greedy_dopt`, noise variance 1, so that it starts where the rules of jarm start.
    """

    def make(belief: Belief, space: PairSpace, k: int) -> Run:
        torch = _torch()
        np.Inf = np.inf  # type: ignore[attr-defined]  # noqa: NPY201  its last release says so; NumPy 2 dropped it
        from bmdal_reg.bmdal import selection
        from bmdal_reg.bmdal.feature_data import TensorFeatureData
        from bmdal_reg.bmdal.feature_maps import IdentityFeatureMap
        from bmdal_reg.bmdal.features import Features

        pairs, pool, known = differences(belief, space)
        if informed:
            prior = jax.jit(prior_information, static_argnums=3)(HParams(), belief, space, k)
            factor = np.linalg.cholesky(np.asarray(prior, np.float64))
            pool = np.linalg.solve(factor, scaled_differences(belief, space)[1].T).T
            known = np.zeros_like(pool[:1])
        data = [TensorFeatureData(torch.from_numpy(each.astype(np.float64, order="C"))) for each in (pool, known)]
        chosen = getattr(selection, f"{method}SelectionMethod")

        def run() -> np.ndarray:
            with torch.no_grad():
                both = [Features(IdentityFeatureMap(n_features=pool.shape[1]), each) for each in data]
                found = chosen(*both, sel_with_train=not informed, noise_sigma=float(informed), verbosity=0)
                return pairs[found.select(k).numpy()]

        return run

    return make


def batchbald(joint: bool, outcomes: int = OUTCOMES) -> Callable[[Belief, PairSpace, int], Run]:
    """BatchBALD of batchbald_redux, float64, exact while 2^picks <= `outcomes` and sampled from there; or its BALD."""

    def make(belief: Belief, space: PairSpace, k: int) -> Run:
        torch = _torch()
        import tqdm
        from batchbald_redux import batchbald, joint_entropy

        for module in (batchbald, joint_entropy):
            module.tqdm = functools.partial(tqdm.tqdm, disable=True)
        gc.freeze()  # it collects garbage in every step, which takes long where much else is loaded
        margins = torch.from_numpy(member_margins(belief, space).T.astype(np.float64))
        logs = torch.nn.functional.logsigmoid(torch.stack([margins, -margins], dim=2))
        pairs = np.asarray(space.pairs)

        def run() -> np.ndarray:
            with torch.no_grad():
                if joint:
                    found = batchbald.get_batchbald_batch(logs, k, outcomes, dtype=torch.double)
                else:
                    found = batchbald.get_bald_batch(logs, k, dtype=torch.double)
            return pairs[found.indices]

        return run

    return make


def logistic_regression(belief: Belief, space: PairSpace) -> tuple[Any, np.ndarray, np.ndarray]:
    """scikit-learn's, with the head that has the rewards of the belief; x of the labelled pairs, and their labels."""
    from sklearn.linear_model import LogisticRegression

    _, _, known = differences(belief, space)
    phi, r = np.asarray(belief.features, np.float64), np.asarray(belief.rewards, np.float64)
    head = np.linalg.lstsq(phi - phi.mean(axis=0), r - r.mean(), rcond=None)[0]
    # A label of either kind, whatever the belief holds: what is fitted is replaced.
    known = np.concatenate([known, np.stack([head, -head])]).astype(np.float64)
    labels = (known @ head > 0).astype(int)
    model = LogisticRegression().fit(known, labels)
    model.coef_, model.intercept_ = head[None], np.zeros(1)
    return model, known, labels


def skactiveml(strategy: str) -> Callable[[Belief, PairSpace, int], Run]:
    """A query strategy of scikit-activeml; the classifier is fitted."""

    def make(belief: Belief, space: PairSpace, k: int) -> Run:
        from skactiveml import pool
        from skactiveml.classifier import SklearnClassifier

        pairs, x, _ = differences(belief, space)
        model, known, labels = logistic_regression(belief, space)
        fitted = SklearnClassifier(model, classes=[0, 1]).fit(known, labels)
        fitted.estimator_.coef_, fitted.estimator_.intercept_ = model.coef_, model.intercept_
        # The two rows that `logistic_regression` adds are no labelled pairs.
        inputs = np.concatenate([x, known[:-2]])
        answers = np.concatenate([np.full(len(x), np.nan), labels[:-2]])
        given = {} if strategy == "CoreSet" else {"clf": fitted, "fit_clf": False}

        def run() -> np.ndarray:
            return pairs[getattr(pool, strategy)(random_state=0).query(inputs, answers, batch_size=k, **given)]

        return run

    return make


def ranked_batch(belief: Belief, space: PairSpace, k: int) -> Run:
    """Ranked batches of modAL: uncertainty and distance from what is labelled or chosen."""
    from modAL.batch import uncertainty_batch_sampling
    from modAL.models import ActiveLearner

    pairs, x, _ = differences(belief, space)
    model, known, labels = logistic_regression(belief, space)
    learner = ActiveLearner(model, X_training=known[:-2], y_training=labels[:-2])
    learner.estimator.coef_, learner.estimator.intercept_ = model.coef_, model.intercept_
    return lambda: pairs[uncertainty_batch_sampling(learner, x, n_instances=k)[0]]


def facility_location(belief: Belief, space: PairSpace, k: int) -> Run:
    """Facility location of apricot, lazy greedy, on its similarities (largest squared distance less the distance)."""
    from apricot import FacilityLocationSelection

    pairs, x, _ = differences(belief, space)
    _allow(len(x))
    return lambda: pairs[FacilityLocationSelection(k, metric="euclidean", optimizer="lazy").fit(x).ranking]


def eubo(belief: Belief, space: PairSpace, k: int) -> Run:
    """Analytic EUBO of BoTorch for every pair: a Gaussian process of the labelled pairs, answered as the mean would."""
    torch = _torch()
    from botorch.acquisition.preference import AnalyticExpectedUtilityOfBestOption
    from botorch.models.pairwise_gp import PairwiseGP

    labels, phi = int(belief.num_labelled), np.asarray(belief.features, np.float64)
    ends = np.asarray(belief.labelled_features, np.float64)[:labels].reshape(2 * labels, -1)
    order = np.argsort(-np.asarray(belief.labelled_rewards)[:labels], axis=1) + 2 * np.arange(labels)[:, None]
    model = PairwiseGP(torch.from_numpy(ends), torch.from_numpy(order))
    utility = AnalyticExpectedUtilityOfBestOption(model)
    pairs = np.asarray(space.pairs)
    offered = torch.from_numpy(phi[pairs])

    def run() -> np.ndarray:
        with torch.no_grad():
            found = torch.cat([utility(chunk) for chunk in offered.split(1000)])
        return pairs[torch.topk(found, k).indices.numpy()]

    return run


def _torch() -> Any:
    """PyTorch, on the cores that this process may use."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    return torch


def _allow(pairs: int) -> None:
    """Refuse what would fill the memory."""
    if pairs > DENSE:
        raise MemoryError(f"it holds a number for each two of {pairs:,} pairs")


_BMDAL, _BALD, _SKACTIVE = "bmdal_reg.bmdal.selection", "batchbald_redux.batchbald", "skactiveml.pool"
PEERS: tuple[Peer, ...] = (
    Peer("bmdal_reg: MaxDet", _BMDAL, "greedy_dopt", bmdal("MaxDet", informed=True)),
    Peer("bmdal_reg: BAIT", _BMDAL, "bait", bmdal("BaitFeatureSpace", informed=True)),
    Peer("bmdal_reg: MaxDist", _BMDAL, "k_centre", bmdal("MaxDist")),
    Peer("bmdal_reg: k-means++", _BMDAL, "kmeans_pp", bmdal("Kmeanspp")),
    Peer("bmdal_reg: LCMD", _BMDAL, "lcmd", bmdal("LargestClusterMaxDist")),
    Peer("batchbald_redux: BALD", _BALD, "bald", batchbald(joint=False)),
    Peer("batchbald_redux: BatchBALD", _BALD, "batch_bald", batchbald(joint=True)),
    Peer("scikit-activeml: Badge", _SKACTIVE, "badge", skactiveml("Badge")),
    Peer("scikit-activeml: CoreSet", _SKACTIVE, "k_centre", skactiveml("CoreSet")),
    Peer("scikit-activeml: UncertaintySampling", _SKACTIVE, "entropy", skactiveml("UncertaintySampling")),
    Peer("modAL: ranked batch", "modAL.batch", "k_centre", ranked_batch),
    Peer("apricot: facility location", "apricot", "lcmd", facility_location),
    Peer("BoTorch: EUBO", "botorch.acquisition.preference", "eubo", eubo),
)
