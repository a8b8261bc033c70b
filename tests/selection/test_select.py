"""`jarm.select` against float64 NumPy written from the formulas, which tries every pair at every step."""

import dataclasses
import itertools
import json
from fractions import Fraction

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from marks import nightly, sampled, slow

import jarm
from jarm.core.status import JarmError
from jarm.design.bound import design_bound
from jarm.design.criteria import D_OPTIMAL
from jarm.design.exchange import exchange
from jarm.design.fisher import space_information
from jarm.design.greedy import GreedyInfo, greedy
from jarm.selection import candidates, engine, result
from jarm.selection.arguments import whole
from jarm.selection.explain import certify
from jarm.testing.tracing import count_compilations, quick_jit

QUICK = {
    "jit_greedy": quick_jit(greedy, static_argnames=("k",)),
    "jit_space_information": quick_jit(space_information),
    "jit_exchange": quick_jit(exchange),
    "jit_design_bound": quick_jit(design_bound, static_argnames=("k",)),
}
N, F, K = 24, 3, 6
SIZES = {"even": [4] * 6, "ragged": [5, 1, 4, 6, 3, 5], "skewed": [14, 2, 3, 1, 2, 2]}


@pytest.fixture(autouse=True)
def _quickly(monkeypatch):
    for name, program in QUICK.items():
        monkeypatch.setattr(engine, name, program)


@pytest.fixture
def on_device(monkeypatch):
    """The programs of large problems; others write pairs out on the host."""
    monkeypatch.setattr(engine, "WRITTEN_OUT", 0)


def problem(seed, sizes="ragged"):
    """Features, rewards, and prompts in any order."""
    rng = np.random.default_rng(seed)
    prompts = rng.permutation(np.repeat(np.arange(6), SIZES[sizes]))
    return rng.normal(size=(N, F)), 1.5 * rng.normal(size=N), prompts, rng


def pairs_of(space, prompts):
    """Every pair of a space, by definition."""
    if not isinstance(space, str):
        return np.unique(np.sort(space, axis=1), axis=0)
    pairs = np.array(list(itertools.combinations(range(N), 2)))
    if space == "all":
        return pairs
    same = prompts[pairs[:, 0]] == prompts[pairs[:, 1]]
    return pairs[{"within": same, "cross": ~same}[space]]


def fisher(margin):
    return 1 / (2 + np.exp(margin) + np.exp(-margin))


def bald(margin, q):
    """H(E p) - E H(p) by quadrature on a grid, p = sigmoid(margin + sqrt(q) z)."""
    z = np.linspace(-9, 9, 4001)
    share = np.exp(-np.square(z) / 2) / np.exp(-np.square(z) / 2).sum()
    p = 1 / (1 + np.exp(-(margin[:, None] + np.sqrt(q)[:, None] * z)))

    def entropy(p):
        return -p * np.log(np.maximum(p, 1e-300)) - (1 - p) * np.log(np.maximum(1 - p, 1e-300))

    return entropy(p @ share) - entropy(p) @ share


def gains_of(criterion, information, x, margin, targets=None, target_margins=None):
    """What each pair would add, from the definition of the criterion."""
    v = np.ones(len(x)) if criterion == "d-unweighted" else fisher(margin)
    grown = information + v[:, None, None] * x[:, :, None] * x[:, None, :]
    inverse, inverses = np.linalg.inv(information), np.linalg.inv(grown)
    if criterion.startswith("d"):
        return np.linalg.slogdet(grown)[1] - np.linalg.slogdet(information)[1]
    if criterion == "a":
        return np.trace(inverse) - np.trace(inverses, axis1=1, axis2=2)
    if criterion == "v":
        return np.einsum("tf,mfg,tg->mt", targets, inverse - inverses, targets).mean(axis=1)
    q = np.einsum("mf,fg,mg->m", x, inverse, x)
    if criterion == "bald":
        return bald(margin, q)
    of_targets, c = fisher(target_margins), x @ inverse @ targets.T
    h = np.einsum("tf,fg,tg->t", targets, inverse, targets)
    rho2 = v[:, None] * of_targets * c**2 / ((1 + v * q)[:, None] * (1 + of_targets * h))
    return (-0.5 * np.log1p(-rho2)).mean(axis=1)


def check(batch, features, rewards, prompts, start, pairs, *, criterion="d", banned=(), cost=None, **options):
    """Replay: each choice gains (for its cost) as much as the best of all pairs that were allowed then."""
    features, rewards = np.float64(features), np.float64(rewards)
    targets = {name: options[name] for name in ("targets", "target_margins") if name in options}
    x, margin = features[pairs[:, 0]] - features[pairs[:, 1]], rewards[pairs[:, 0]] - rewards[pairs[:, 1]]
    price = np.ones(len(pairs)) if cost is None else cost
    banned = {tuple(sorted(pair)) for pair in np.asarray(banned).tolist()}
    left = np.array([tuple(pair) not in banned for pair in pairs.tolist()])
    place = {tuple(pair): at for at, pair in enumerate(pairs.tolist())}
    information, chosen = start.copy(), []
    for pick, gain in zip(batch.pairs.tolist(), batch.gains, strict=True):
        at = place[tuple(pick)]
        allowed = left.copy()
        for row, (i, j) in enumerate(pairs.tolist()):
            used = [b for b in chosen if {i, j} & set(b)]
            touched = {prompts[i], prompts[j]} if prompts is not None else set()
            for end in (i, j):
                allowed[row] &= sum(end in b for b in used) < options.get("per_response", 99)
            for prompt in touched:
                allowed[row] &= sum(prompt in {prompts[b[0]], prompts[b[1]]} for b in chosen) < options.get(
                    "per_prompt", 99
                )
            for other in chosen:
                there = features[other[0]] - features[other[1]]
                cosine = abs(x[row] @ there) / np.sqrt(x[row] @ x[row] * (there @ there))
                allowed[row] &= cosine < options.get("similarity", 2)
        assert allowed[at], f"{pick} was not allowed"
        gains = gains_of(criterion, information, x, margin, **targets)
        np.testing.assert_allclose(gain, gains[at], rtol=1e-5, atol=1e-9)
        best = (gains / price)[allowed].max()
        assert best - gains[at] / price[at] <= 1e-5 * best
        v = 1.0 if criterion == "d-unweighted" else fisher(margin[at])
        information = information + v * np.outer(x[at], x[at])
        left[at] = False
        chosen.append(tuple(pick))
    return information


LISTED = np.array([[j, i] if (i + j) % 2 else [i, j] for i, j in itertools.combinations(range(N), 2)])[::3]
CASES = [
    ("within", "even", False),
    ("within", "ragged", True),
    ("within", "skewed", True),
    ("cross", "ragged", True),
    ("all", "ragged", False),
    ("listed", "ragged", False),
    ("listed", "ragged", True),
]


@pytest.mark.parametrize(("space", "sizes", "limited"), sampled(CASES, *CASES[::2]))
def test_each_choice_is_the_best_of_every_pair(space, sizes, limited, monkeypatch, on_device):
    check_each_choice(space, sizes, limited, monkeypatch)


@pytest.mark.parametrize(("space", "sizes", "limited"), CASES)
def test_each_choice_on_the_host_is_the_best_of_every_pair(space, sizes, limited, monkeypatch):
    with count_compilations() as compiled:
        check_each_choice(space, sizes, limited, monkeypatch)
    assert not compiled


def check_each_choice(space, sizes, limited, monkeypatch):
    if sizes == "skewed":
        monkeypatch.setattr(candidates, "PADDING", 1)  # then a list takes less room than a grid
    for seed in range(3):
        features, rewards, prompts, rng = problem(seed, sizes)
        offered = rng.permutation(LISTED) if space == "listed" else space
        past, exclude = (
            rng.permutation(pairs_of("all", prompts))[:5],
            pairs_of("all", prompts)[rng.permutation(276)[:9]],
        )
        options = {"per_prompt": 3, "per_response": 2, "similarity": 0.97} if limited else {}
        pairs = pairs_of(offered, prompts)
        costs, cost = None, None
        if limited and space == "listed":
            costs = rng.uniform(1, 3, len(offered))
            order = np.lexsort(np.sort(offered, axis=1).T[::-1])
            cost = costs[order]
        elif limited:
            costs = rng.uniform(1, 3, N)
            cost = costs[pairs].sum(axis=1)
        batch = jarm.select(
            features,
            rewards,
            space=offered,
            k=K,
            prompts=prompts,
            prior_precision=0.7,
            labelled=past[:, ::-1],
            exclude=exclude,
            costs=costs,
            **options,
        )
        assert batch.pairs.shape == (K, 2)
        assert batch.pairs.dtype == np.int64
        x, v = features[past[:, 0]] - features[past[:, 1]], fisher(rewards[past[:, 0]] - rewards[past[:, 1]])
        start = 0.7 * np.eye(F) + (v[:, None] * x).T @ x
        banned = np.concatenate([past, exclude])
        end = check(batch, features, rewards, prompts, start, pairs, banned=banned, cost=cost, **options)
        report = batch.report
        np.testing.assert_allclose(report.log_det_before, np.linalg.slogdet(start)[1], rtol=1e-6)
        np.testing.assert_allclose(report.log_det_after, np.linalg.slogdet(end)[1], rtol=1e-6)
        np.testing.assert_allclose(batch.gains.sum(), report.log_det_after - report.log_det_before, rtol=1e-10)
        assert report.held == len({tuple(p) for p in pairs.tolist()} - {tuple(sorted(p)) for p in banned.tolist()})
        assert 0 <= report.certificate.gap < 1e-5
        assert report.certificate.uncovered == 0
        assert report.status == "Complete."
        if limited:
            place = {tuple(pair): at for at, pair in enumerate(pairs.tolist())}
            paid = [cost[place[tuple(pair)]] for pair in batch.pairs.tolist()]
            np.testing.assert_allclose([reason.cost for reason in batch.why], paid, rtol=1e-6)
            np.testing.assert_allclose(report.cost, sum(paid), rtol=1e-6)
        else:
            assert report.cost is None
        assert sum(report.per_response.values()) == 2 * K
        assert report.per_response == {n: int((batch.pairs == n).sum()) for n in np.unique(batch.pairs)}
        touched = [{int(prompts[i]), int(prompts[j])} for i, j in batch.pairs.tolist()]
        assert report.per_prompt == {p: sum(p in some for some in touched) for p in set().union(*touched)}
        assert list(report.per_prompt.values()) == sorted(report.per_prompt.values(), reverse=True)


@pytest.mark.parametrize("criterion", sampled(["d-unweighted", "a", "v", "epig", "bald"], "v"))
def test_each_criterion_is_what_it_says(criterion, on_device):
    check_criterion(criterion)


@pytest.mark.parametrize("criterion", ["d-unweighted", "a", "v", "epig"])
def test_each_criterion_is_what_it_says_on_the_host(criterion):
    check_criterion(criterion)


def check_criterion(criterion):
    for seed in range(2):
        features, rewards, prompts, rng = problem(seed)
        of_pairs = pairs_of("all", prompts)[rng.permutation(276)[:5]]
        targets = features[of_pairs[:, 0]] - features[of_pairs[:, 1]]
        about = {"targets": targets, "target_margins": rewards[of_pairs[:, 0]] - rewards[of_pairs[:, 1]]}
        past = of_pairs[:2]
        x = features[past[:, 0]] - features[past[:, 1]]
        v = np.ones(2) if criterion == "d-unweighted" else fisher(rewards[past[:, 0]] - rewards[past[:, 1]])
        start = 2 * np.eye(F) + (v[:, None] * x).T @ x
        given = {"targets": of_pairs} if criterion in ("v", "epig") else {}
        options = {"space": "within", "prompts": prompts, "k": K, "prior_precision": 2, "labelled": past}
        batch = jarm.select(features, rewards, **options, criterion=criterion, **given)
        pairs = pairs_of("within", prompts)
        check(
            batch, features, rewards, None, start, pairs, criterion=criterion, banned=past, **(about if given else {})
        )
        assert batch.report.certificate.gap < 1e-5
    if criterion == "v":
        same = jarm.select(features, rewards, **options, criterion="v", targets=targets)
        np.testing.assert_array_equal(same.pairs, batch.pairs)
        own = jarm.select(features, rewards, **options, criterion=jarm.v_optimal(jnp.float32(targets)))
        np.testing.assert_array_equal(own.pairs, batch.pairs)
        assert own.report.criterion == "of the caller"


@pytest.mark.parametrize("size", [1 << 16, 5])
def test_v_without_targets_is_about_rankings_within_prompts(size, monkeypatch):
    """The mean variance of a reward less that of its prompt, whether prompts are read together or some at a time."""
    monkeypatch.setattr("jarm.selection.request._CHUNK", size)
    features, rewards, prompts, rng = problem(4)
    order = rng.permutation(len(features))
    features, prompts = features[order] + 30, prompts[order]
    means = np.array([features[prompts == prompt].mean(axis=0) for prompt in prompts])
    options = {"space": "all", "prompts": prompts, "k": K, "prior_precision": 2, "criterion": "v"}
    batch = jarm.select(features, rewards, **options)
    check(
        batch, features, rewards, None, 2 * np.eye(F), pairs_of("all", prompts), criterion="v", targets=features - means
    )


@pytest.mark.parametrize(
    ("space", "criterion"), [("cross", "d"), nightly("listed", "d"), nightly("within", "d-unweighted")]
)
def test_the_default_prior_is_the_mean_of_the_space(space, criterion, on_device):
    features, rewards, prompts, _ = problem(3)
    offered = LISTED if space == "listed" else space
    pairs, past = pairs_of(offered, prompts), np.array([[3, 1], [7, 20]])

    def information(some):
        x, margin = features[some[:, 0]] - features[some[:, 1]], rewards[some[:, 0]] - rewards[some[:, 1]]
        return ((fisher(margin) if criterion == "d" else np.ones(len(x)))[:, None] * x).T @ x

    start = information(past) + 0.1 * (2 + K) * information(pairs) / len(pairs)
    batch = jarm.select(features, rewards, space=offered, k=K, prompts=prompts, labelled=past, criterion=criterion)
    np.testing.assert_allclose(batch.report.log_det_before, np.linalg.slogdet(start)[1], rtol=1e-5)
    # It has no scale: features in other units, the same batch.
    scaled = jarm.select(
        1e4 * features, rewards, space=offered, k=K, prompts=prompts, labelled=past, criterion=criterion
    )
    np.testing.assert_array_equal(scaled.pairs, batch.pairs)
    np.testing.assert_allclose(scaled.gains, batch.gains, rtol=1e-4)


@pytest.mark.parametrize("space", sampled(["within", "cross", "listed"], "cross"))
def test_names_and_order_of_responses_do_not_matter(space):
    features, rewards, prompts, rng = problem(4)
    old = rng.permutation(N)
    new = np.argsort(old)
    offered = LISTED if space == "listed" else space
    past = np.array([[0, 5], [9, 2]])
    batch = jarm.select(features, rewards, space=offered, k=K, prompts=prompts, labelled=past)
    renamed = jarm.select(
        features[old],
        rewards[old],
        space=space if isinstance(offered, str) else new[LISTED],
        k=K,
        prompts=[f"prompt {p}" for p in prompts[old]],
        labelled=new[past],
    )
    np.testing.assert_array_equal(np.sort(new[batch.pairs], axis=1), renamed.pairs)
    np.testing.assert_allclose(batch.gains, renamed.gains, rtol=1e-5)
    assert [reason.prompts for reason in renamed.why] == [
        tuple(dict.fromkeys(f"prompt {prompts[old[n]]}" for n in pair)) for pair in renamed.pairs
    ]
    by_value = [("set", p) for p in prompts], [np.array(p) for p in prompts], [jnp.asarray(p) for p in prompts]
    for same in by_value:
        again = jarm.select(features, rewards, space=offered, k=K, prompts=same, labelled=past, per_prompt=K)
        np.testing.assert_array_equal(again.pairs, batch.pairs)


def test_reasons_are_their_formulas():
    features, rewards, prompts, _ = problem(5)
    past = np.array([[0, 1], [2, 3], [4, 5], [11, 6]])
    # Response 20 and 21 differ as the labelled 11 and 6 do, the other way round.
    features[20] = features[6] + 0.5
    features[21] = features[11] + 0.5
    rewards[20] = rewards[21]
    batch = jarm.select(
        features, rewards, space=[[20, 21], [7, 9]], k=2, prompts=prompts, labelled=past, prior_precision=1
    )
    x = features[past[:, 0]] - features[past[:, 1]]
    start = np.eye(F) + (fisher(rewards[past[:, 0]] - rewards[past[:, 1]])[:, None] * x).T @ x
    covariance = np.linalg.inv(start)
    for reason in batch.why:
        own, margin = features[reason.first] - features[reason.second], rewards[reason.first] - rewards[reason.second]
        sd = np.sqrt(own @ covariance @ own)
        cosine = np.abs(x @ covariance @ own) / (sd * np.sqrt(np.einsum("lf,fg,lg->l", x, covariance, x)))
        p = 1 / (1 + np.exp(-margin))
        expected = [margin, sd, p, p * (1 - p) * sd, cosine.argmax(), cosine.max()]
        got = [reason.margin, reason.margin_sd, reason.p, reason.p_sd, reason.nearest, reason.cosine]
        np.testing.assert_allclose(got, expected, rtol=1e-6)
        ends = 1 / (1 + np.exp(-(margin + 1.959964 * sd * np.array([-1, 1]))))
        np.testing.assert_allclose([reason.p_low, reason.p_high], ends, rtol=1e-6)
        assert set(reason.prompts) == {int(prompts[reason.first]), int(prompts[reason.second])}
    copy = next(reason for reason in batch.why if reason.first == 20)
    assert copy.nearest == 3
    np.testing.assert_allclose(copy.cosine, 1, rtol=1e-9)
    fresh = jarm.select(features, rewards, space=[[20, 21], [7, 9]], k=2)
    assert all(reason.nearest is None and reason.cosine is None and reason.prompts == () for reason in fresh.why)
    assert fresh.report.per_prompt == {}


@pytest.mark.parametrize("space", sampled(["all", "listed"], "listed"))
def test_of_many_excluded_pairs_those_that_matter_are_left_out(space, monkeypatch, on_device):
    """Passes leave out a few; the batch is as if all were left out, also where nearly everything is excluded."""
    monkeypatch.setattr(engine, "CAPACITY", 64)
    monkeypatch.setattr(engine, "FIRST_EXCLUDED", 64)
    features, rewards, prompts, rng = problem(6)
    offered = LISTED if space == "listed" else space
    pairs = rng.permutation(pairs_of(offered, prompts))
    for count in (20, K):
        exclude = pairs[count:]
        batch = jarm.select(
            features, rewards, space=offered, k=K, prompts=prompts, exclude=exclude, prior_precision=0.01
        )
        check(batch, features, rewards, None, 0.01 * np.eye(F), np.array(sorted(map(tuple, pairs))), banned=exclude)
        assert batch.report.held == count
    # What is labelled or excluded twice, either way round, or outside of the space, counts once, or not at all.
    again = np.concatenate([exclude, exclude[:, ::-1]])
    twice = jarm.select(features, rewards, space=offered, k=K, prompts=prompts, exclude=again, prior_precision=0.01)
    np.testing.assert_array_equal(twice.pairs, batch.pairs)
    assert twice.report.held == count


@pytest.mark.core
def test_without_rewards_every_pair_is_a_toss_up(on_device):
    features, _, prompts, _ = problem(7)
    options = {"space": "within", "prompts": prompts, "k": K}
    plain = jarm.select(features, **options, prior_precision=1)
    zeros = jarm.select(features, np.full(N, 3.0), **options, prior_precision=1)
    unweighted = jarm.select(features, **options, prior_precision=4, criterion="d-unweighted")
    np.testing.assert_array_equal(plain.pairs, zeros.pairs)
    np.testing.assert_array_equal(plain.pairs, unweighted.pairs)
    np.testing.assert_allclose(plain.gains, unweighted.gains, rtol=1e-6)
    assert all(reason.p == 0.5 for reason in plain.why)


class Tensor:
    """What PyTorch's tensors look like to NumPy."""

    def __init__(self, values, *, grad=False):
        self.values, self.grad = values, grad

    def __array__(self, dtype=None, copy=None):
        if self.grad:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad.")
        return self.values


def test_whatever_numpy_can_read_is_taken_and_not_changed(tmp_path, on_device):
    features, rewards, prompts, _ = problem(8)
    features, rewards = np.round(8 * features), np.round(4 * rewards) / 4  # exact in every type
    past = np.array([[0, 5], [9, 2]])
    wide = np.repeat(features, 2, axis=1)[:, ::2]
    assert not wide.flags.c_contiguous
    mapped = np.lib.format.open_memmap(tmp_path / "features.npy", "w+", np.float16, (N, F))
    mapped[:] = features
    mapped.flush()
    batch = jarm.select(features, rewards, space="within", k=K, prompts=prompts, labelled=past)
    kinds = [
        np.float32(features),
        np.float16(features),
        features.astype(ml_dtypes.bfloat16),
        features.astype(np.int8),
        features.tolist(),
        wide,
        np.asfortranarray(features),
        np.load(tmp_path / "features.npy", mmap_mode="r"),
        jnp.asarray(features),
        jnp.asarray(features, jnp.bfloat16),
        Tensor(np.float32(features)),
        features + 2.0**30,
    ]
    for kind in kinds:
        copied = [
            np.array(each) for each in (kind.values if isinstance(kind, Tensor) else kind, rewards, prompts, past)
        ]
        same = jarm.select(
            kind, jnp.float32(rewards), space="within", k=K, prompts=prompts.tolist(), labelled=past.tolist()
        )
        np.testing.assert_array_equal(same.pairs, batch.pairs)
        np.testing.assert_allclose(same.gains, batch.gains, rtol=1e-6)
        for before, after in zip(
            copied, (kind.values if isinstance(kind, Tensor) else kind, rewards, prompts, past), strict=True
        ):
            np.testing.assert_array_equal(before, np.asarray(after))
    with pytest.raises(JarmError, match=r"features cannot be read as a NumPy array .*requires grad.*detach"):
        jarm.select(Tensor(features, grad=True), rewards, space="all", k=K)


def test_rounds_of_a_campaign_share_their_programs(on_device):
    """The past grows, the head changes, responses come and go, batches differ: after the first nothing is compiled."""
    features, rewards, prompts, rng = problem(9)
    past = np.zeros((0, 2), int)
    for number in range(5):
        left = np.r_[: N - number]
        with count_compilations() as compiled:
            batch = jarm.select(
                features[left] + 0.1 * number,
                rewards[left] * (1 + number),
                space="within",
                k=4 - number // 3,
                prompts=prompts[left],
                labelled=past[(past < N - number).all(axis=1)],
                exclude=rng.permutation(pairs_of("all", prompts))[:number] % (N - number - 1) + [[0, 1]],
            )
        assert not compiled or number == 0, (number, compiled)
        assert not {tuple(p) for p in batch.pairs.tolist()} & {tuple(p) for p in past.tolist()}
        past = np.concatenate([past, batch.pairs])


@pytest.mark.parametrize("space", sampled(["within", "cross", "all", "listed"], "listed"))
@pytest.mark.parametrize("criterion", sampled(["d", "v"], "d"))
def test_the_host_and_a_device_choose_the_same(space, criterion, monkeypatch):
    """Also where limits, costs, equal features and labelled pairs bear on the batch, for sizes that share a program."""
    for seed in range(4):
        rng = np.random.default_rng(seed)
        size = 60 - seed
        features, rewards, prompts = rng.normal(size=(size, F)), rng.normal(size=size), rng.permutation(size) // 4
        features[5:9] = features[4]
        listed = rng.permutation(np.stack(np.triu_indices(size, 1), axis=1))[:900]
        given = {
            "space": listed if space == "listed" else space,
            "k": 7 + seed,
            "prompts": prompts,
            "labelled": listed[:5],
            "criterion": criterion,
            "costs": rng.uniform(1, 2, 900 if space == "listed" else size),
            **{"per_prompt": 2, "per_response": 1, "similarity": 0.99},
        }
        host = jarm.select(features, rewards, **given)
        with monkeypatch.context() as patch:
            patch.setattr(engine, "WRITTEN_OUT", 0)
            device = jarm.select(features, rewards, **given)
        np.testing.assert_array_equal(device.pairs, host.pairs)
        np.testing.assert_allclose(device.gains, host.gains, rtol=1e-5)  # their priors are sums of other precision
        assert device.report.held == host.report.held
        assert host.report.certificate == result.Certificate(gap=0.0, uncovered=0, passes=1)


@pytest.mark.parametrize("device", [False, nightly(True)])
def test_near_copies_are_told_at_any_scale(device, monkeypatch):
    """Batches without near-copies are the same, whatever the unit of the features."""
    if device:
        monkeypatch.setattr(engine, "WRITTEN_OUT", 0)
    features, rewards, _, _ = problem(19)
    given = {"space": "all", "k": 5, "similarity": 0.8}
    pairs = [jarm.select(features * scale, rewards, **given).pairs for scale in (1.0, 1e-12, 1e10)]
    np.testing.assert_array_equal(pairs[1:], [pairs[0]] * 2)
    x = np.diff(features[pairs[0]], axis=1)[:, 0]
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    assert np.abs(x @ x.T - np.eye(5)).max() < 0.8


@pytest.mark.parametrize("scales", [(1e-8, 1, 1e8), nightly((1e8, 1e-8, 1)), nightly((1e8, 1e8, 1e8))])
def test_choices_of_the_host_keep_their_digits_where_features_span_many(scales):
    features = problem(14)[0] * scales
    batch = jarm.select(features, space="all", k=K, prior_precision=1.0)
    pairs = pairs_of("all", None)
    for at in range(K):
        with_each = [np.concatenate([batch.pairs[:at], pair[None]]) for pair in pairs]
        gains = np.array([exact_gains(features, some, 1.0)[-1] for some in with_each])
        left = ~candidates.is_among(pairs, batch.pairs[:at])
        np.testing.assert_allclose(batch.gains[at], gains[left].max(), rtol=1e-9)


@pytest.mark.parametrize(
    "own",
    [
        dataclasses.replace(D_OPTIMAL, gain=lambda worth: worth),
        slow(dataclasses.replace(D_OPTIMAL, weight=lambda margin: 1 + 0 * margin)),
    ],
)
def test_a_criterion_with_a_part_of_ones_own_is_not_taken_for_another(own):
    features, rewards, _, _ = problem(18)
    given = {"space": "all", "k": 3, "prior_precision": 1.0}
    batch, plain = (jarm.select(features, rewards, **given, criterion=each) for each in (own, "d"))
    x, margin = np.diff(features[batch.pairs], axis=1)[:, 0], np.diff(rewards[batch.pairs], axis=1)[:, 0]
    information, gains = np.eye(F), []
    for own_x, v in zip(x, np.asarray(own.weight(jnp.float32(margin))), strict=True):
        q = fisher(margin[len(gains)]) * own_x @ np.linalg.solve(information, own_x)
        gains.append(float(own.gain(q)))
        information = information + v * np.outer(own_x, own_x)
    np.testing.assert_allclose(batch.gains, gains, rtol=1e-5)
    assert (batch.gains != plain.gains).any()


@pytest.mark.slow
def test_fewer_pairs_only_where_that_is_asked_for():
    features, rewards, prompts, _ = problem(10)
    few = [[0, 1], [2, 3], [1, 0]]
    with pytest.raises(JarmError, match=r"holds 2 pairs .* k = 6 are asked for: .*allow_fewer"):
        jarm.select(features, rewards, space=few, k=K)
    batch = jarm.select(features, rewards, space=few, k=K, allow_fewer=True)
    assert len(batch.pairs) == 2
    assert batch.report.status == "The space holds no more than 2 of 6 pairs."
    assert batch.report.status in str(batch)
    with pytest.raises(JarmError, match="holds 0 pairs"):
        jarm.select(features, rewards, space=few, k=K, labelled=few, allow_fewer=True)
    with pytest.raises(JarmError, match="per_prompt=1 leaves no more than 5 of 6 pairs"):
        jarm.select(features, rewards, space="within", k=K, prompts=prompts, per_prompt=1)
    batch = jarm.select(features, rewards, space="within", k=K, prompts=prompts, per_prompt=1, allow_fewer=True)
    assert len(batch.pairs) == len(batch.why) == len(batch.gains) == 5
    assert max(batch.report.per_prompt.values()) == 1
    with pytest.raises(JarmError, match=r"per_response=1 and similarity=0.05 leave no more than \d of 6 pairs"):
        jarm.select(features, rewards, space=LISTED, k=K, per_response=1, similarity=0.05)
    line = np.zeros((N, F))
    line[:2] = [[1, 0, 0], [3, 0, 0]]
    with pytest.raises(JarmError, match="Only 1 of 2 pairs teach anything"):
        jarm.select(line, rewards, space=[[0, 1], [4, 5]], k=2, prior_precision=1)
    batch = jarm.select(line, rewards, space=[[0, 1], [4, 5]], k=2, prior_precision=1, allow_fewer=True)
    assert batch.pairs.tolist() == [[0, 1]]


FEATURES, REWARDS, PROMPTS, _ = problem(11)
BROKEN = FEATURES.copy()
BROKEN[[7, 9], 1] = np.nan, np.inf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": FEATURES[0]}, r"features has shape \(3,\)"),
        ({"features": FEATURES[:, :0]}, r"features has shape \(24, 0\)"),
        ({"features": [[1, 2], [3]]}, "features cannot be read"),
        ({"features": FEATURES * 1j}, "features holds complex128"),
        ({"features": np.array([["a", "b"]])}, "features holds <U1"),
        ({"features": BROKEN}, r"Row 7 of features is NaN or infinite, the first of 2 \(column 1\)"),
        ({"features": FEATURES * 1e30}, "features holds values"),
        ({"rewards": REWARDS[:-1]}, r"rewards has shape \(23,\)"),
        ({"rewards": np.where(np.arange(N) == 3, np.inf, REWARDS)}, "Row 3 of rewards"),
        ({"k": 0}, "k is 0"),
        ({"space": "wihtin"}, "wihtin.*'within'"),
        ({"space": "pairs"}, "'pairs'.*within, cross, all.*pairs"),
        ({"space": [[0, 1, 2]]}, "space has shape"),
        ({"space": [[0.5, 1]]}, "space has shape .* float64"),
        ({"space": [[0, 1], [3, 24]]}, r"Row 1 of space is \(3, 24\)"),
        ({"space": [[0, 1], [3, 3]]}, "Row 1 of space"),
        ({"space": []}, "holds 0 pairs"),
        ({"space": None}, "no space"),
        ({"space": "within", "prompts": np.arange(N)}, "holds 0 pairs"),
        ({"labelled": [[-1, 2]]}, "Row 0 of labelled"),
        ({"labelled": [0, 1]}, "labelled has shape"),
        ({"exclude": [[1, 1]]}, "Row 0 of exclude"),
        ({"k": 277}, "holds 276 pairs"),
        ({"space": "within"}, "give prompts="),
        ({"space": "cross"}, "give prompts="),
        ({"per_prompt": 2}, "per_prompt.*give prompts="),
        ({"prompts": PROMPTS[1:]}, "prompts has 23 entries"),
        ({"prompts": ["a"] * 9 + [None] * 15}, "prompt of response 9 is missing"),
        ({"prompts": np.where(np.arange(N) == 5, np.nan, 1.0)}, "prompt of response 5 is missing"),
        ({"prompts": [[1]] * N}, "prompt of response 0 is a list"),
        ({"prompts": {name: name for name in range(N)}}, "prompts is a dict"),
        ({"prompts": [1] * 9 + ["1"] * 15}, "prompt of response 9 is the text 1"),
        ({"criterion": "dopt"}, "criterion 'dopt'"),
        ({"criterion": "epic"}, "epic.*'epig'"),
        ({"criterion": "v", "prompts": None, "space": "all"}, "give targets=.*or prompts="),
        ({"criterion": "v", "prompts": np.arange(24), "space": "all"}, "no ranking within prompts to learn"),
        ({"criterion": "epig"}, "give targets="),
        ({"targets": FEATURES}, "targets"),
        ({"criterion": "v", "targets": FEATURES[:, :2]}, r"targets has shape \(24, 2\)"),
        ({"criterion": "v", "targets": [[2, 2]]}, "Row 0 of targets"),
        ({"features": np.ones((N, F))}, "No pair of the space would teach anything"),
        (
            {"features": np.ones((N, F)), "prior_precision": 1, "space": LISTED},
            "No pair of the space would teach anything",
        ),
        (
            {"rewards": 1e4 * np.arange(N)},
            r"No pair of the space would teach anything: rewards are up to 2.3e\+05 logits",
        ),
        ({"per_response": 0}, "per_response is 0"),
        ({"similarity": 1.5}, "similarity is 1.5"),
        ({"costs": np.zeros(N)}, "Entry 0 of costs is 0"),
        ({"costs": np.ones(5)}, "costs has 5 entries"),
        ({"costs": np.ones(5), "space": [[0, 1]], "k": 1}, "1 listed pairs"),
        ({"prior_precision": -1}, "prior_precision is -1"),
        ({"prior_precision": np.eye(2)}, r"prior_precision has shape \(2, 2\)"),
        ({"prior_precision": np.triu(np.ones((F, F)))}, "prior_precision is not symmetric"),
        ({"prior_precision": np.diag([1, 1, -1])}, "prior_precision is not positive definite"),
        ({"prior_precision": np.diag([1, 1, 0])}, "is not positive definite in float32"),
        (
            {"prior_precision": 1e-12 * np.eye(F) + np.ones((F, F))},
            "float32: give a larger prior_precision",
        ),
        ({"rewards": np.ma.masked_greater(REWARDS, 0)}, "rewards has masked entries"),
        ({"criterion": "D"}, "criterion 'D'.*'d'"),
        ({"swaps": -1}, "swaps is -1"),
        ({"swaps": 3, "criterion": "bald"}, "log det only"),
        ({"bound": True, "criterion": "a"}, "log det only"),
        ({"prior_precision": 0}, "prior_precision=0 the 0 labelled pairs tell of 0 of 3"),
        ({"prior_precision": 0, "labelled": [[0, 1], [2, 3]]}, "2 labelled pairs tell of 2 of 3"),
        (
            {"criterion": dataclasses.replace(D_OPTIMAL, weight=jnp.cos)},
            "give prior_precision",
        ),
    ],
)
@pytest.mark.core
def test_errors_say_what_is_wrong_and_what_to_do(change, message):
    with pytest.raises(JarmError, match=message):
        jarm.select(**{"features": FEATURES, "rewards": REWARDS, "space": "all", "k": 2} | change)


def exact_gains(features, pairs, prior):
    """log(1 + q / 4) of each pair in turn, q = x^T A^-1 x in fractions."""
    A = [[Fraction(prior) * (i == j) for j in range(F)] for i in range(F)]
    gains = []
    for first, second in pairs:
        x = [
            Fraction(a) - Fraction(b) for a, b in zip(features[first].tolist(), features[second].tolist(), strict=True)
        ]
        rows = [[*row, each] for row, each in zip(A, x, strict=True)]
        for pivot in range(F):
            rows[pivot] = [each / rows[pivot][pivot] for each in rows[pivot]]
            for other in set(range(F)) - {pivot}:
                factor = rows[other][pivot]
                rows[other] = [a - factor * b for a, b in zip(rows[other], rows[pivot], strict=True)]
        gains.append(np.log1p(float(sum(a * row[-1] for a, row in zip(x, rows, strict=True)) / 4)))
        A = [[a + x[i] * x[j] / 4 for j, a in enumerate(row)] for i, row in enumerate(A)]
    return np.array(gains)


@pytest.mark.parametrize("scales", [(1e-8, 1, 1e8), (1e8, 1e-8, 1), (1e8, 1e8, 1e8)])
@pytest.mark.parametrize("prior", [1.0, 2.0**-20])
def test_gains_keep_their_digits_where_features_span_many(scales, prior, on_device):
    features = problem(14)[0] * scales
    batch = jarm.select(features, space="all", k=K, prior_precision=prior)
    exact = exact_gains(features, batch.pairs, prior)
    np.testing.assert_allclose(batch.gains, exact, rtol=1e-9)
    report = batch.report
    np.testing.assert_allclose(report.log_det_after, F * np.log(prior) + exact.sum(), rtol=1e-12)
    assert 0 <= report.certificate.gap < 1e-3
    assert "nan" not in str(batch)


def test_certain_answers_are_named_as_the_cause():
    features = problem(11)[0]
    rewards = np.where(np.arange(N) < 2, 0.0, 1e4 * np.arange(N))
    with pytest.raises(JarmError, match=r"Only 1 of 2 pairs teach anything: .* logits, so the answer is certain"):
        jarm.select(features, rewards, space="all", k=2, prior_precision=1)


@pytest.mark.parametrize("kind", sampled(["within", "cross", "all", "listed"], "within", "listed"))
@pytest.mark.parametrize("sizes", ["even", "skewed"])
def test_pairs_of_equal_features_are_never_offered(kind, sizes, on_device):
    features, rewards, prompts, rng = problem(15, sizes)
    features = features[rng.integers(0, 9, N)]
    pairs = rng.permutation(pairs_of("all", prompts))[:70] if kind == "listed" else pairs_of(kind, prompts)
    differ = (features[pairs[:, 0]] != features[pairs[:, 1]]).any(axis=1)
    banned = np.concatenate([pairs[~differ][:2], pairs[differ][:2]])
    batch = jarm.select(
        features,
        rewards,
        space=pairs if kind == "listed" else kind,
        prompts=prompts,
        k=K,
        exclude=banned,
        prior_precision=1,
    )
    assert batch.report.held == differ.sum() - 2
    assert batch.report.copies == (~differ).sum() > 2
    assert f"{batch.report.copies} pairs of responses with equal features" in str(batch)
    check(batch, features, rewards, prompts, np.eye(F), pairs[differ], banned=banned)


def test_the_certificate_is_the_worst_of_its_bounds():
    """Ceilings that are no bound are counted; of the others, and of pairs chosen later, the worst counts."""
    info = GreedyInfo(passes=np.int32(3), ceilings=np.float32([1.5, -np.inf, np.inf, 0.1]), fresh=np.zeros(4, bool))
    certificate = certify(info, np.array([2.0, 1.0, 1.0]), np.array([1.0, 1.1, 0.5]))
    assert (certificate.uncovered, certificate.passes) == (1, 3)
    np.testing.assert_allclose(certificate.gap, 0.1)
    none = certify(info, np.zeros(3), np.zeros(3))
    assert (none.gap, none.uncovered) == (0, 3)  # gains that underflow leave nothing to be relative to
    certificate = certify(info, np.array([1.0, 1.0, 1.0]), np.array([-np.inf, 0.5, 0.5]))
    np.testing.assert_allclose(certificate.gap, 0.5)


@pytest.mark.slow
def test_ceilings_of_a_space_larger_than_a_shortlist_certify_its_choices(on_device):
    rng = np.random.default_rng(14)
    features, rewards, prompts = rng.normal(size=(600, F)), rng.normal(size=600), np.arange(600) // 6
    options = {"space": "within", "prompts": prompts, "k": K, "prior_precision": 5}
    report = jarm.select(features, rewards, **options).report
    assert report.held == 1500  # 1,024 + K are shortlisted
    assert 0 <= report.certificate.gap <= 1.1e-5
    assert report.certificate.uncovered == 0
    report = jarm.select(features, rewards, **options, criterion="epig", targets=[[0, 9]]).report
    assert report.certificate.uncovered == report.certificate.passes == K
    assert report.certificate.gap < 1e-5


@pytest.mark.core
def test_numbers_that_are_not_whole_are_named():
    with pytest.raises(JarmError, match=r"k is 2\.5"):
        whole("k", 2.5)


@pytest.mark.slow
def test_no_batch_is_above_the_bound_and_swaps_only_help():
    """Against the best of all batches of 3 pairs of a list; limits hold after swaps, too."""
    features, rewards, prompts, rng = problem(13, "skewed")
    offered = rng.permutation(pairs_of("all", prompts))[:40]
    limits = {"per_prompt": 2, "per_response": 1}
    given = {"space": offered, "k": 3, "prior_precision": 0.25, "prompts": prompts, **limits}
    plain = jarm.select(features, rewards, **given)
    better = jarm.select(features, rewards, **given, swaps=20, bound=True)
    report = better.report
    assert (plain.report.upper, plain.report.efficiency, plain.report.swaps) == (None, None, None)
    assert plain.report.log_det_after <= report.log_det_after + 1e-9
    np.testing.assert_allclose(
        report.log_det_after - plain.report.log_det_after, report.swaps.gained if report.swaps.made else 0, atol=1e-4
    )
    assert (report.certificate is None) == (report.swaps.made > 0)
    assert report.log_det_after <= report.upper
    np.testing.assert_allclose(report.efficiency, np.exp((report.log_det_after - report.upper) / F))
    check(better, features, rewards, prompts, 0.25 * np.eye(F), better.pairs)  # in greedy order among themselves
    x, margin = (each[offered[:, 0]] - each[offered[:, 1]] for each in (features, rewards))
    scaled = np.sqrt(fisher(margin))[:, None] * x
    some = scaled[np.array(list(itertools.combinations(range(len(offered)), 3)))]
    best = np.linalg.slogdet(0.25 * np.eye(F) + some.transpose(0, 2, 1) @ some)[1].max()
    assert report.log_det_after <= best + 1e-9 <= report.upper + 2e-9
    assert max(report.per_prompt.values()) <= 2
    assert max(report.per_response.values()) == 1
    assert "swaps gained" in str(better)
    assert "D-efficiency" in str(better)


def test_a_batch_prints_and_goes_into_json(monkeypatch):
    monkeypatch.setattr(result, "SHOWN_ROWS", 4)
    features, rewards, prompts, rng = problem(12)
    named = [f"a rather long name of a prompt\n, number {p}" for p in prompts]
    options = {"costs": rng.uniform(1, 2, len(LISTED)), "per_prompt": 3, "per_response": 2, "similarity": 0.97}
    batch = jarm.select(features, rewards, space=LISTED, k=K, prompts=named, labelled=[[0, 1]], **options)
    lines = str(batch).splitlines()
    assert " ".join(lines[0].split()) == "first second gain p 95 % cost nearest label prompt"
    assert lines[5] == "... and 2 more"
    assert len(lines) == 1 + 4 + 1 + 3
    assert max(map(len, lines)) <= 120
    assert f"{batch.report.log_det_before:.2f} to {batch.report.log_det_after:.2f}" in lines[-3]
    rows = json.loads(json.dumps(batch.to_rows()))
    assert [row["rank"] for row in rows] == list(range(1, K + 1))
    assert [[row["first"], row["second"]] for row in rows] == batch.pairs.tolist()
    assert [row["gain"] for row in rows] == batch.gains.tolist()
    assert [row["prompts"] for row in rows] == [list(dict.fromkeys(named[n] for n in pair)) for pair in batch.pairs]
    plain = jarm.select(features, rewards, space=LISTED, k=K, prompts=list(np.int32(prompts)))
    assert json.dumps(plain.to_rows())
    assert "cost" not in str(plain)
