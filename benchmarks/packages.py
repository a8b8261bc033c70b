"""Rules of other packages, for those that are installed, beside the rules of jarm.

    python -m benchmarks.packages --cores 1 --rules dopt,greedy_dopt,bait

Options are those of `jarm bench`; listed pairs only. `benchmarks.peers` measures them workload by workload.
"""

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
import tyro

from benchmarks.referee import fisher_weight, rank_one_trace
from jarm.acquisition.optimal_design import prior_information
from jarm.core.base import Belief, HParams, PairSpace
from jarm.studies.bench import BenchConfig, Peer, bench, table

Run = Callable[[], np.ndarray]
OUTCOMES = 2048
"""Configurations of labels that BatchBALD samples; `batch_bald` of jarm follows the same number."""
DENSE = 20_000
"""Largest number of pairs for a package that holds a pairs x pairs matrix."""


@dataclasses.dataclass(frozen=True)
class Package(Peer):
    """A rule of another package.

    Attributes:
      module: the module within its package that has to be importable.
      like: the same or the nearest rule of jarm.
    """

    module: str = ""
    like: str = ""


def installed(package: Package) -> bool:
    """Whether the module can be found and the package around it can be imported."""
    try:
        return importlib.util.find_spec(package.module) is not None
    except Exception:  # of the package, as it is imported
        return False


def available() -> list[Package]:
    """The packages that are installed."""
    return [package for package in PACKAGES if installed(package)]


def differences(belief: Belief, space: PairSpace) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The listed pairs `[M, 2]`, x = phi_i - phi_j of each `[M, F]`, and x of the labelled pairs `[labels, F]`."""
    assert space.pairs is not None
    pairs, phi = np.asarray(space.pairs), np.asarray(belief.features)
    labelled = np.asarray(belief.labelled_features)[: int(belief.num_labelled)]
    return pairs, phi[pairs[:, 0]] - phi[pairs[:, 1]], labelled[:, 0] - labelled[:, 1]


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

        pairs, pool, labelled = differences(belief, space)
        if informed:
            prior = jax.jit(prior_information, static_argnums=3)(HParams(), belief, space, k)
            factor = np.linalg.cholesky(np.asarray(prior, np.float64))
            pool = np.linalg.solve(factor, scaled_differences(belief, space)[1].T).T
            labelled = np.zeros_like(pool[:1])
        data = [TensorFeatureData(torch.from_numpy(each.astype(np.float64, order="C"))) for each in (pool, labelled)]
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
        gc.freeze()  # the package collects garbage in every step, slowly where much else is loaded
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
    """scikit-learn's model with the weights that give the belief its rewards; x of the labelled pairs, and labels."""
    from sklearn.linear_model import LogisticRegression

    _, _, labelled = differences(belief, space)
    phi, r = np.asarray(belief.features, np.float64), np.asarray(belief.rewards, np.float64)
    head = np.linalg.lstsq(phi - phi.mean(axis=0), r - r.mean(), rcond=None)[0]
    # A label of each kind, whatever the belief holds; the fitted weights are replaced below.
    labelled = np.concatenate([labelled, np.stack([head, -head])]).astype(np.float64)
    labels = (labelled @ head > 0).astype(int)
    model = LogisticRegression().fit(labelled, labels)
    model.coef_, model.intercept_ = head[None], np.zeros(1)
    return model, labelled, labels


def skactiveml(strategy: str) -> Callable[[Belief, PairSpace, int], Run]:
    """A query strategy of scikit-activeml; the classifier is fitted."""

    def make(belief: Belief, space: PairSpace, k: int) -> Run:
        from skactiveml import pool
        from skactiveml.classifier import SklearnClassifier

        pairs, x, _ = differences(belief, space)
        model, labelled, labels = logistic_regression(belief, space)
        fitted = SklearnClassifier(model, classes=[0, 1]).fit(labelled, labels)
        fitted.estimator_.coef_, fitted.estimator_.intercept_ = model.coef_, model.intercept_
        # The two rows that `logistic_regression` adds are no labelled pairs.
        inputs = np.concatenate([x, labelled[:-2]])
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
    model, labelled, labels = logistic_regression(belief, space)
    learner = ActiveLearner(model, X_training=labelled[:-2], y_training=labels[:-2])
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


def v_greedy(belief: Belief, space: PairSpace, k: int) -> Run:
    """V-optimal greedy in NumPy, float64, two products of all pairs a pick: the same pairs as `v_opt`, by gain."""
    phi, prompt_of, eligible = (np.asarray(each) for each in (belief.features, space.prompt_of, space.eligible))
    prompts, of_prompt = np.unique(prompt_of[eligible], return_inverse=True)
    z = phi[eligible].astype(np.float64)
    sums = np.zeros((len(prompts), z.shape[1]))
    np.add.at(sums, of_prompt, z)
    z -= (sums / np.bincount(of_prompt)[:, None])[of_prompt]
    pairs, x, _ = differences(belief, space)
    v = fisher_weight(np.asarray(belief.rewards, np.float64)[pairs] @ [1, -1])
    prior = np.asarray(jax.jit(prior_information, static_argnums=3)(HParams(), belief, space, k), np.float64)

    def run() -> np.ndarray:
        picks, gains = rank_one_trace(x.astype(np.float64), v, prior, z.T @ z / len(z), k)
        return pairs[picks[np.argsort(-gains, kind="stable")]]

    return run


def _torch() -> Any:
    """PyTorch, on the cores that this process may use."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    return torch


def _allow(pairs: int) -> None:
    """Refuse a matrix that would fill the memory."""
    if pairs > DENSE:
        raise MemoryError(f"it holds a number for each two of {pairs:,} pairs")


_BMDAL, _BALD, _SKACTIVE = "bmdal_reg.bmdal.selection", "batchbald_redux.batchbald", "skactiveml.pool"
PACKAGES: tuple[Package, ...] = (
    Package("bmdal_reg: MaxDet", bmdal("MaxDet", informed=True), _BMDAL, "greedy_dopt"),
    Package("bmdal_reg: BAIT", bmdal("BaitFeatureSpace", informed=True), _BMDAL, "bait"),
    Package("bmdal_reg: MaxDist", bmdal("MaxDist"), _BMDAL, "k_centre"),
    Package("bmdal_reg: k-means++", bmdal("Kmeanspp"), _BMDAL, "kmeans_pp"),
    Package("bmdal_reg: LCMD", bmdal("LargestClusterMaxDist"), _BMDAL, "lcmd"),
    Package("batchbald_redux: BALD", batchbald(joint=False), _BALD, "bald"),
    Package("batchbald_redux: BatchBALD", batchbald(joint=True), _BALD, "batch_bald"),
    Package("scikit-activeml: Badge", skactiveml("Badge"), _SKACTIVE, "badge"),
    Package("scikit-activeml: CoreSet", skactiveml("CoreSet"), _SKACTIVE, "k_centre"),
    Package("scikit-activeml: UncertaintySampling", skactiveml("UncertaintySampling"), _SKACTIVE, "entropy"),
    Package("modAL: ranked batch", ranked_batch, "modAL.batch", "k_centre"),
    Package("apricot: facility location", facility_location, "apricot", "lcmd"),
    Package("NumPy: V-optimal greedy", v_greedy, "numpy", "v_opt"),
    Package("BoTorch: EUBO", eubo, "botorch.acquisition.preference", "eubo"),
)


def main() -> None:
    config = tyro.cli(BenchConfig, description=__doc__)
    print(f"\n{table(bench(config, available()))}")


if __name__ == "__main__":
    main()
