"""Acquisition rules of jarm beside the packages that offer the same or the nearest, workload by workload.

    python -m benchmarks.peers --out benchmarks/results/peers.jsonl
    python -m benchmarks.peers --only S14 S15

Every pair has two responses of its own, features N(0, 1), unless the workload says otherwise; the batch is 256, there
are 256 labelled pairs and 5 members. Peers get the points that their interface asks for ready made
(`benchmarks.packages`), the rules of S1 to S7 the features of both ends of every pair, and jarm the features of
responses and indices of pairs. All have the rewards; priors are part of what is timed for jarm and NumPy, and ready
made for `bmdal_reg`. Peers that are not installed, and code that is in no package index, are represented by processor
seconds measured before on another day (`peer_cpu_s_from_spec`), beside which stands what jarm needs now. Where a peer
takes more than `SLOW` seconds both sides run once, elsewhere `--turns` times.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from benchmarks import timing

SLOW = 5.0


@dataclasses.dataclass(frozen=True)
class Workload:
    """A selection problem and its sides.

    Attributes:
      name: id of the workload.
      rule: of jarm, or `METRIC`.
      peers: name in `benchmarks.packages.PACKAGES` or `others` -> processor seconds measured before, or None.
      absent: the same for code that is in no package index.
      pairs, width, k, members, labels: sizes.
      prompts: of 10 responses each, for every pair within prompts; 0 for `pairs` listed pairs.
      responses: in any pair; 0 for two to each pair.
      same: whether all sides have to pick the same pairs.
    """

    name: str
    rule: str
    peers: dict[str, float | None] = dataclasses.field(default_factory=dict)
    absent: dict[str, float] = dataclasses.field(default_factory=dict)
    pairs: int = 10_000
    width: int = 64
    k: int = 256
    members: int = 5
    labels: int = 256
    prompts: int = 0
    responses: int = 0
    same: bool = False


RELEASED, CHUNKS, CLOSED = "released rule", "released rule, chunks of 1000", "torch, closed form"
RANK_ONE, EXACT = "NumPy, rank-one greedy", "batchbald_redux: BatchBALD, 10,000 samples"
METRIC, ROWS = "x^T A^-1 x, A given", "NumPy, row by row"
BADGE, CORE_SET = "scikit-activeml: Badge", "scikit-activeml: CoreSet"
AUF = {"double_ts": 3.4, "drts": 0.54, "max_min_lcb": 0.60, "info_gain": 0.22, "ids": 0.18}
AUF |= {"infomax": 0.0067, "delta_ucb": 0.0012}

WORKLOADS = [
    Workload("S14", "batch_bald", {EXACT: 203.0}, k=32, members=20),
    Workload("S14", "batch_bald", {EXACT: 12.9}, k=10, members=20, same=True),
    Workload("S14", "batch_bald", {EXACT: 2.4}, k=10, members=20, pairs=1000, same=True),
    Workload("S15", "bald", {"batchbald_redux: BALD": 1.9}, members=20, same=True),
    Workload("S1", "dopt", {RELEASED: 0.37, CHUNKS: 0.25}, same=True),
    Workload("S3", "pa_dopt", {"released past-aware rule": 0.45}, labels=1000, same=True),
    Workload("S4", "dopt", {RELEASED: 0.80}, pairs=20_000, same=True),
    Workload("S5", "dopt", {CHUNKS: 6.8}, width=256, same=True),
    Workload("S6", "dopt", {CLOSED: 0.0056}, same=True),
    Workload("S6", "dopt", {CLOSED: 0.033}, pairs=20_000, width=128, same=True),
    Workload("S6", "dopt", {CLOSED: 0.082}, pairs=100_000, same=True),
    Workload("S6", "dopt", {CLOSED: 1.89}, pairs=100_000, width=512, same=True),
    Workload("S7", "greedy_dopt", {RANK_ONE: 0.034}, same=True),
    Workload("S7", "greedy_dopt", {RANK_ONE: 0.26}, pairs=20_000, width=128, same=True),
    Workload("S7", "greedy_dopt", {RANK_ONE: 0.52}, pairs=100_000, same=True),
    Workload("S7", "greedy_dopt", {RANK_ONE: 6.7}, pairs=100_000, width=512, same=True),
    Workload("S8", "greedy_dopt", {"bmdal_reg: MaxDet": 0.51}, same=True),
    Workload("S8", "greedy_dopt", {"bmdal_reg: MaxDet": 6.0}, pairs=100_000, same=True),
    Workload("S9", "bait", {"bmdal_reg: BAIT": 0.27}, same=True),
    Workload("S9", "bait", {"bmdal_reg: BAIT": 12.3}, pairs=100_000, same=True),
    Workload("S10", "lcmd", {"bmdal_reg: LCMD": 0.13}),
    Workload("S10", "lcmd", {"bmdal_reg: LCMD": 1.5}, pairs=100_000),
    Workload("S10", "kmeans_pp", {"bmdal_reg: k-means++": 0.13}),
    Workload("S10", "kmeans_pp", {"bmdal_reg: k-means++": 1.6}, pairs=100_000),
    Workload("S10", "k_centre", {"bmdal_reg: MaxDist": 0.08}),
    Workload("S11, S12", "badge", {BADGE: 0.62}, {"BADGE of its authors": 0.80}),
    Workload("S11", "badge", {BADGE: None}, {"BADGE of its authors": 6.6}, pairs=100_000),
    Workload("S12", "k_centre", {CORE_SET: 0.36}),
    Workload("S12", "entropy", {"scikit-activeml: UncertaintySampling": 0.027}, same=True),
    Workload("S13", "k_centre", {"modAL: ranked batch": 0.45}, pairs=9_800, k=32, labels=200),
    Workload("S16", "lcmd", {"apricot: facility location": 2.5}, pairs=5_000, width=25, k=100),
    Workload("S16", "lcmd", {"apricot: facility location": 4.7}),
    Workload("S17", "greedy_dopt", {"submodlib: LogDeterminant": 0.022}, pairs=500, k=50, same=True),
    Workload("S17", "greedy_dopt", {"submodlib: LogDeterminant": 0.32}, pairs=2_000, k=100, same=True),
    Workload("S18", "coreset", {}, {"lrcoresets of the released rules": 0.051}),
    Workload("S18", "coreset", {}, {"lrcoresets of the released rules": 0.090}, pairs=20_000),
    Workload("S19", "apo", {}, {"APO of its authors": 0.38}),
    Workload("S19", "apo", {}, {"APO of its authors": 1.6}, pairs=20_000),
    Workload("S19", "apo", {}, {"APO of its authors": 1.4}, width=512),
    Workload("S20", METRIC, {ROWS: 0.30}, {"rewarduq": 2.7}, width=1024, same=True),
    Workload("S20", METRIC, {ROWS: 0.66}, {"rewarduq": 11.5}, width=1024, pairs=20_000, same=True),
    *[Workload("S21", rule, {}, {"AUF": s}, prompts=2000, k=2000, width=8) for rule, s in AUF.items()],
    Workload("S22", "batch_bald", {}, {"APReL: MI": 4.3}, responses=50, pairs=1225, width=8, members=50, k=10),
    Workload("S22", "greedy_dopt", {}, {"APReL: DPP": 5.0}, responses=50, pairs=1225, width=8, members=50, k=10),
    Workload("S24", "eubo", {"BoTorch: EUBO": 0.41}, width=8, labels=25),
    Workload("S24", "eubo", {"BoTorch: EUBO": 8.7}, width=8, labels=100),
    Workload("S24", "eubo", {"BoTorch: EUBO": 64.5}, width=8, labels=250),
]


def problem(work: Workload) -> tuple[Any, Any]:
    """Belief and pair space; margins have a standard deviation of about 1.5, and members agree on most."""
    import jax.numpy as jnp
    import numpy as np

    from jarm.core.base import Belief, PairSpace
    from jarm.design.fisher import fisher_weight, pair_information
    from jarm.design.spaces import pair_space

    rng = np.random.default_rng(0)
    size = work.responses or 10 * work.prompts or 2 * work.pairs
    features = rng.standard_normal((size, work.width), np.float32)
    heads = rng.standard_normal((work.width, 1)) + 0.5 * rng.standard_normal((work.width, work.members))
    heads = (heads * 1.5 / np.sqrt(2 * work.width)).astype(np.float32)
    known = rng.standard_normal((work.labels, 2, work.width), np.float32)
    members, known_rewards = features @ heads, (known @ heads).mean(axis=-1)
    weight = fisher_weight(jnp.asarray(known_rewards[:, 0] - known_rewards[:, 1]))
    belief = Belief(
        features=jnp.asarray(features),
        rewards=jnp.asarray(members.mean(axis=1)),
        member_rewards=jnp.asarray(members.T),
        labelled_information=pair_information(jnp.asarray(known[:, 0]), jnp.asarray(known[:, 1]), weight),
        num_labelled=jnp.int32(work.labels),
        labelled_features=jnp.asarray(known),
        labelled_rewards=jnp.asarray(known_rewards),
    )
    alive = jnp.ones(size, bool)
    if work.prompts:
        return belief, pair_space("within", 10, alive)
    if work.responses:
        return belief, pair_space("all", 1, alive)
    pairs = jnp.arange(size, dtype=jnp.int32).reshape(-1, 2)
    return belief, PairSpace("listed", 1, alive, jnp.zeros((0, 2), jnp.int32), pairs=pairs)


def others() -> dict[str, Callable[..., Callable[[], Any]]]:
    """Sides that are in no package, by the contract of `jarm.studies.bench.Peer`."""
    import numpy as np
    import torch

    from benchmarks import baselines, packages, referee
    from jarm.core.base import HParams

    torch.set_num_threads(len(timing.os.sched_getaffinity(0)))

    def optimal(rule: Callable[..., Any], chunk: int | None = None, past: bool = False) -> Callable[..., Any]:
        def make(belief: Any, space: Any, k: int) -> Callable[[], Any]:
            pairs, first, second, margin = ends_of(belief, space)
            first, second, margin = torch.from_numpy(first), torch.from_numpy(second), torch.from_numpy(margin)
            known, known_rewards = (
                torch.from_numpy(np.array(belief.labelled_features)),
                torch.from_numpy(np.array(belief.labelled_rewards)),
            )
            options = {} if rule is baselines.closed_form_dopt else {"chunk": chunk}

            def run() -> Any:
                labelled = (known[:, 0] - known[:, 1], known_rewards[:, 0] - known_rewards[:, 1]) if past else ()
                return pairs[rule(first - second, margin, *labelled, k, **options).numpy()]

            return run

        return make

    def ends_of(belief: Any, space: Any) -> tuple[Any, Any, Any, Any]:
        pairs, features, rewards = (np.array(each) for each in (space.pairs, belief.features, belief.rewards))
        first, second = pairs.T
        return pairs, features[first], features[second], rewards[first] - rewards[second]

    def rank_one(belief: Any, space: Any, k: int) -> Callable[[], Any]:
        pairs, first, second, margin = ends_of(belief, space)
        past, labels = np.asarray(belief.labelled_information), len(belief.labelled_features)

        def run() -> Any:
            x, v = first - second, referee.fisher_weight(margin)
            prior = past + HParams().prior_weight * (labels + k) / len(x) * (x.T @ (v[:, None] * x))
            return pairs[referee.rank_one_greedy(x, v, prior, k)[0]]

        return run

    def prior_of(belief: Any, space: Any, k: int) -> Any:
        import jax

        from jarm.acquisition.optimal_design import prior_information

        return np.asarray(jax.jit(prior_information, static_argnums=3)(HParams(), belief, space, k))

    def row_by_row(belief: Any, space: Any, k: int) -> Callable[[], Any]:
        pairs, first, second, _ = ends_of(belief, space)
        inverse = np.linalg.inv(np.asarray(belief.labelled_information) + np.eye(first.shape[1], dtype=np.float32))

        def run() -> Any:
            x = first - second
            score = np.einsum("mf,mf->m", x @ inverse, x)
            best = np.argpartition(-score, k)[:k]
            return pairs[best[np.argsort(-score[best])]]

        return run

    def submodlib(belief: Any, space: Any, k: int) -> Callable[[], Any]:
        from submodlib import LogDeterminantFunction

        pairs, s = packages.scaled_differences(belief, space)
        white = np.linalg.solve(np.linalg.cholesky(prior_of(belief, space, k).astype(float)), s.T).T

        def run() -> Any:
            kernel = white @ white.T
            found = LogDeterminantFunction(n=len(s), mode="dense", lambdaVal=1.0, sijs=kernel)
            return pairs[[place for place, _ in found.maximize(budget=k, optimizer="LazyGreedy", show_progress=False)]]

        return run

    return {
        RELEASED: optimal(baselines.released_dopt),
        CHUNKS: optimal(baselines.released_dopt, 1000),
        "released past-aware rule": optimal(baselines.released_pa_dopt, past=True),
        CLOSED: optimal(baselines.closed_form_dopt),
        RANK_ONE: rank_one,
        ROWS: row_by_row,
        EXACT: packages.batchbald(True, 10_000),
        "submodlib: LogDeterminant": submodlib,
    }


def joint_information(belief: Any, batch: Any, samples: int = 200_000) -> float:
    """Mutual information between member and labels of a batch, nats, float64, from the same samples for every side."""
    import numpy as np

    rng = np.random.default_rng(1)
    rewards = np.asarray(belief.member_rewards, np.float64)
    margin = rewards[:, batch[:, 0]] - rewards[:, batch[:, 1]]
    yes, no = -np.logaddexp(0, -margin), -np.logaddexp(0, margin)
    member = rng.integers(0, len(margin), samples)
    label = rng.random((samples, len(batch))) < np.exp(yes[member])
    logs = label @ yes.T + ~label @ no.T
    return float((logs[np.arange(samples), member] - np.logaddexp.reduce(logs, axis=1)).mean() + np.log(len(margin)))


def judge(sides: list[timing.Side], work: Workload, belief: Any) -> None:
    """Number of picks shared with jarm, and in the same place; joint information of the labels of a small batch."""
    import numpy as np

    own = np.asarray(sides[0].result.pairs)
    for side in sides:
        picks = own if side is sides[0] else np.asarray(side.result)
        if side is not sides[0]:
            side.outcome["picks_of_jarm"] = len({*map(tuple, own.tolist())} & {*map(tuple, picks.tolist())})
            side.outcome["in_the_same_place"] = int((own == picks).all(axis=1).sum())
            side.outcome["should_be_the_same"] = work.same
        if work.rule == "batch_bald":
            side.outcome["joint_information"] = joint_information(belief, picks)


def ours(work: Workload, belief: Any, space: Any) -> timing.Side:
    """A rule of jarm; its inputs are arguments of the program."""
    import jax
    import numpy as np

    from jarm.acquisition.registry import get_rule
    from jarm.core.base import HParams
    from jarm.core.linalg import inverse_factor
    from jarm.design.fisher import fisher_weight, pair_information
    from jarm.design.top import top_pairs

    if work.rule == METRIC:
        whiten, _ = inverse_factor(belief.labelled_information + np.eye(work.width, dtype=np.float32))

        def metric(whiten: Any, belief: Any, space: Any) -> Any:
            return top_pairs(lambda _, q: q, belief.rewards, belief.features, space, work.k, whiten=whiten)

        return timing.jax_side("jarm: top_pairs", metric, whiten, belief, space)

    def run(key: Any, belief: Any, space: Any) -> Any:
        if work.rule == "pa_dopt":  # the peer sums what the labelled pairs tell, too
            weight = fisher_weight(belief.labelled_rewards[:, 0] - belief.labelled_rewards[:, 1])
            past = pair_information(belief.labelled_features[:, 0], belief.labelled_features[:, 1], weight)
            belief = dataclasses.replace(belief, labelled_information=past)
        return get_rule(work.rule)(key, HParams(), belief, space, work.k)

    return timing.jax_side(f"jarm: {work.rule}", run, jax.random.key(0), belief, space)


def measure(work: Workload, turns: int) -> None:
    """One row per side."""
    from benchmarks.packages import available

    makers: dict[str, Any] = {package.name: package.make for package in available()} | others()
    belief, space = problem(work)
    sides = [ours(work, belief, space)]
    absent = dict(work.absent)
    for name, seconds in work.peers.items():
        try:
            side = timing.Side(name, makers[name](belief, space, work.k))
        except Exception as error:
            print(f"{name} is left out: {type(error).__name__}: {error}")
            absent |= {name: seconds} if seconds else {}
            continue
        if seconds:
            side.outcome["peer_cpu_s_from_spec"] = seconds
        sides.append(side)
    sides[0].outcome |= {f"peer_cpu_s_from_spec, {name}": seconds for name, seconds in absent.items()}
    sizes = {"M": work.pairs, "F": work.width, "k": work.k, "K": work.members, "L": work.labels}
    if work.prompts:
        sizes = {"P": work.prompts, "R": 10, "k": work.k, "K": work.members}
    long = max((seconds or 0 for seconds in work.peers.values()), default=0) > SLOW
    timing.compare(
        f"{work.name} {work.rule}",
        sides,
        sizes=sizes,
        turns=1 if long else turns,
        warm=not long,
        after=functools.partial(judge, sides, work, belief),
    )


def main() -> None:
    options = timing.start(only=["all"])
    for work in WORKLOADS:
        if {"all", *work.name.split(", ")} & set(options.only):
            measure(work, options.turns)


if __name__ == "__main__":
    main()
