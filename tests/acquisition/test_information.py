"""Rules of information against float64 references that list every pair, configuration and quadrature point."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from marks import sampled

from jarm.acquisition import batch_bald as batches
from jarm.acquisition.information import TARGETS, divergence
from jarm.acquisition.registry import get_rule
from jarm.acquisition.stochastic import mixed, pair_noise
from jarm.acquisition.uncertainty import max_diff
from jarm.core.status import Status
from jarm.design.spaces import listed_space, sample_pairs, subset
from jarm.testing.conformance import BATCH, check_batch, make_case
from jarm.testing.references import information64, list_pairs, weights64
from jarm.testing.tracing import quick_jit

jitted = functools.cache(functools.partial(quick_jit, static_argnames="k"))


def call(rule, case, k=BATCH, seed=0, **numbers):
    rule = get_rule(rule) if isinstance(rule, str) else rule
    hparams = dataclasses.replace(case.hparams, **{name: jnp.float32(value) for name, value in numbers.items()})
    return jitted(rule)(jax.random.key(seed), hparams, case.belief, case.space, k=k)


def margins64(case, pairs):
    members = np.float64(case.belief.member_rewards)
    return members[:, pairs[:, 0]] - members[:, pairs[:, 1]]


def entropy64(p):
    return scipy.special.entr(p) + scipy.special.entr(1 - p)


def bald64(p):
    """Of chances `[K, M]`."""
    return entropy64(p.mean(axis=0)) - entropy64(p).mean(axis=0)


def prior64(case, k=BATCH):
    """past + c n [(1 - rho) tr(Ibar)/F I + rho Ibar], n the labels after the batch."""
    phi, rewards, pairs = np.float64(case.belief.features), np.float64(case.belief.rewards), list_pairs(case.space)
    mean = information64(phi, rewards, pairs) / len(pairs)
    c, rho = float(case.hparams.prior_weight), float(case.hparams.prior_mix)
    shape = (1 - rho) * np.trace(mean) / len(mean) * np.eye(len(mean)) + rho * mean
    return np.float64(case.belief.labelled_information) + c * (int(case.belief.num_labelled) + k) * shape


def seen64(case, pairs):
    """Differences, margins and variances under the prior."""
    phi, rewards = np.float64(case.belief.features), np.float64(case.belief.rewards)
    x = phi[pairs[:, 0]] - phi[pairs[:, 1]]
    return x, rewards[pairs[:, 0]] - rewards[pairs[:, 1]], (x * np.linalg.solve(prior64(case), x.T).T).sum(axis=1)


GRID = np.linspace(-12, 12, 4001)
DENSITY = scipy.stats.norm.pdf(GRID) / scipy.stats.norm.pdf(GRID).sum()


def laplace64(margin, q):
    p = scipy.special.expit(margin[:, None] + np.sqrt(q)[:, None] * GRID[None, :])
    return entropy64(p @ DENSITY) - entropy64(p) @ DENSITY


def scores64(name, case):
    pairs = list_pairs(case.space)
    d = margins64(case, pairs)
    if name == "variance":
        return d.var(axis=0, ddof=1)
    if name == "variance_prob":
        return scipy.special.expit(d).var(axis=0, ddof=1)
    if name in ("bald", "softmax_bald", "power_bald"):
        score = bald64(scipy.special.expit(d))
        return np.log(score) if name == "power_bald" else score
    _, margin, q = seen64(case, pairs)
    if name == "bald_laplace":
        return laplace64(margin, q)
    if name == "softmax_dopt":
        return np.log1p(weights64(np.asarray(case.belief.rewards), pairs) * q)
    assert name == "eubo"
    rewards, alive = np.float64(case.belief.rewards), np.asarray(case.space.eligible)
    home = np.arange(24) // 4 if case.space.kind == "within" else np.zeros(24, int)
    level = np.array([rewards[alive & (home == own)].mean() for own in home])
    middle = (rewards - level)[pairs].mean(axis=1)
    return middle + np.abs(margin[:, None] + np.sqrt(q)[:, None] * GRID[None, :]) @ DENSITY / 2


# To compile little each has one space; that the spaces do the same is for the conformance suite.
ONE_SHOT = {
    "variance": "cross",
    "variance_prob": "within",
    "bald": "all",
    "bald_laplace": "within",
    "eubo": "within",
    "power_bald": "listed",
    "softmax_bald": "cross",
    "softmax_dopt": "all",
}


@pytest.mark.parametrize(("name", "kind"), sampled(ONE_SHOT.items(), *list(ONE_SHOT.items())[::3]))
def test_one_shot_rules_pick_the_largest_scores(name, kind):
    """Of those that draw, at temperature 0."""
    for seed in range(3):
        case = make_case(kind, seed)
        scores = scores64(name, case)
        batch = call(name, case, temperature=0.0)
        place = {tuple(pair): index for index, pair in enumerate(list_pairs(case.space).tolist())}
        own = scores[[place[tuple(pair)] for pair in np.asarray(batch.pairs).tolist()]]
        np.testing.assert_allclose(batch.gains, own, rtol=1e-4, atol=2e-5)
        np.testing.assert_allclose(own, np.sort(scores)[::-1][:BATCH], rtol=1e-6)


def test_members_that_hardly_disagree_keep_their_digits():
    """BALD of 1e-9 nats, far below the rounding of the two entropies of which it is the difference."""
    rng = np.random.default_rng(0)
    p = np.array([1e-6, 0.01, 0.3, 0.5])
    shift = p * 1e-4 * rng.normal(size=4)
    exact = shift**2 / (2 * p * (1 - p))
    np.testing.assert_allclose(divergence(jnp.float32(p), jnp.float32(shift)), exact, rtol=2e-4)
    case = make_case("listed")
    members = case.belief.rewards[None] + jnp.float32(1e-3 * rng.normal(size=(4, 24)))
    case = case._replace(belief=dataclasses.replace(case.belief, member_rewards=members))
    pairs = list_pairs(case.space)
    d = margins64(case, pairs)
    v = scipy.special.expit(d.mean(axis=0)) * scipy.special.expit(-d.mean(axis=0))
    expected = np.sort(v * d.var(axis=0) / 2)[::-1][:BATCH]
    np.testing.assert_allclose(call("bald", case).gains, expected, rtol=1e-2)


def replay(gain, pairs, picks):
    """Each choice given those before it: its gain in float64, and how far that is from the best."""
    place = {tuple(pair): index for index, pair in enumerate(pairs.tolist())}
    batch, gained, short = [], [], []
    for pick in np.asarray(picks).tolist():
        gains = gain(batch)
        gains[batch] = -np.inf
        own = place[tuple(pick)]
        batch.append(own)
        gained.append(gains[own])
        short.append(gains.max() - gains[own])
    return np.array(gained), np.array(short)


def test_greedy_bald_laplace_is_greedy():
    case = make_case("listed", 2)
    pairs, prior = list_pairs(case.space), prior64(case)
    phi, rewards = np.float64(case.belief.features), np.float64(case.belief.rewards)
    x, margin, _ = seen64(case, pairs)

    def gain(batch):
        information = prior + information64(phi, rewards, pairs[batch])
        return laplace64(margin, (x * np.linalg.solve(information, x.T).T).sum(axis=1))

    batch = call("greedy_bald_laplace", case)
    gained, short = replay(gain, pairs, batch.pairs)
    np.testing.assert_allclose(batch.gains, gained, rtol=1e-4)
    assert (short <= 1e-5).all()


@pytest.mark.slow
@pytest.mark.nightly
def test_epig_is_greedy_for_its_targets_among_its_candidates(monkeypatch):
    monkeypatch.setattr("jarm.acquisition.information.CANDIDATES", 100)
    case = make_case("cross", 1)
    keys = jax.random.split(jax.random.key(0))
    targets, _ = sample_pairs(keys[0], case.space, TARGETS)
    offered, information = list_pairs(subset(keys[1], case.space, 100)), prior64(case)
    assert len(offered) == 100
    x, _, _ = seen64(case, offered)
    t, _, _ = seen64(case, np.asarray(targets))
    v, u = (weights64(np.asarray(case.belief.rewards), np.asarray(each)) for each in (offered, targets))
    chosen, gains = [], []
    for _ in range(BATCH):
        inverse = np.linalg.inv(information)
        q, h = (np.einsum("nf,fg,ng->n", each, inverse, each) for each in (x, t))
        rho = v[:, None] * u[None] * (x @ inverse @ t.T) ** 2 / ((1 + v * q)[:, None] * (1 + u * h)[None])
        worth = -0.5 * np.log1p(-rho).mean(axis=1)
        worth[chosen] = -np.inf
        chosen.append(int(worth.argmax()))
        gains.append(worth.max())
        information = information + v[chosen[-1]] * np.outer(x[chosen[-1]], x[chosen[-1]])
    run = quick_jit(lambda key, belief: get_rule("epig")(key, case.hparams, belief, case.space, BATCH))
    batch = run(jax.random.key(0), case.belief)
    check_batch(batch, case.space, BATCH)
    np.testing.assert_allclose(batch.gains, np.sort(gains)[::-1], rtol=1e-3)
    assert set(map(tuple, batch.pairs.tolist())) == set(map(tuple, offered[chosen].tolist()))


def joint64(p):
    """Mutual information of a member and the labels of all pairs, chances `[K, b]`: every configuration, one by one."""
    chances = np.ones((len(p), 1))
    for own in p.T:
        chances = np.concatenate([chances * own[:, None], chances * (1 - own)[:, None]], axis=1)
    return scipy.special.entr(chances.mean(axis=0)).sum() - scipy.special.entr(chances).sum(axis=1).mean()


def joint_gains64(p, batch):
    before = joint64(p[:, batch])
    return np.array([joint64(p[:, [*batch, c]]) - before for c in range(p.shape[1])])


def test_batch_bald_is_greedy_in_the_joint_information():
    for seed in range(3):
        case = make_case("listed", seed)
        pairs = list_pairs(case.space)
        p = scipy.special.expit(margins64(case, pairs))
        batch = call("batch_bald", case)
        gained, short = replay(lambda batch, p=p: joint_gains64(p, batch), pairs, batch.pairs)
        np.testing.assert_allclose(batch.gains, gained, rtol=1e-3, atol=2e-6)
        assert (short <= 2e-6).all()


def test_batch_bald_with_fewer_configurations_than_there_are(monkeypatch):
    """512 that stand for up to 2,048: gains are nearly those of all of them, and the batch is nearly as good."""
    rng = np.random.default_rng(0)
    members, count, k = 6, 40, 12
    p = scipy.special.expit(0.8 * rng.normal(size=(members, count)) + rng.normal(size=count))
    chosen = []
    for _ in range(k):
        gains = joint_gains64(p, chosen)
        gains[chosen] = -np.inf
        chosen.append(int(gains.argmax()))
    monkeypatch.setattr(batches, "CONFIGURATIONS", 512)
    own, gains = quick_jit(functools.partial(batches.joint_bald, k=k))(jnp.float32(p.T), jnp.float32(bald64(p)))
    assert len(set(own.tolist())) == k
    exact = np.diff([joint64(p[:, own[:b]]) for b in range(k + 1)])
    np.testing.assert_allclose(gains, exact, atol=0.02 * exact[0])
    assert exact.sum() >= 0.99 * joint64(p[:, chosen])
    assert gains.sum() <= np.log(members)


def test_thinning_keeps_the_mass_and_what_is_likely():
    rng = np.random.default_rng(1)
    joint, extend = batches.start_joint(16, 3), quick_jit(batches.extend_joint)
    for _ in range(7):
        p = rng.uniform(0.02, 0.2, 3)
        likeliest = (np.asarray(joint.mass) * (np.asarray(joint.posterior) @ (1 - p))).max()
        joint = extend(joint, jnp.float32(p))
        np.testing.assert_allclose(joint.mass.sum(), 1, rtol=1e-5)
        np.testing.assert_allclose(joint.posterior.sum(axis=1), 1, rtol=1e-5)
        np.testing.assert_allclose(joint.mass.max(), likeliest, rtol=1e-5)
        # What labels are expected to tell of the members is nothing.
        np.testing.assert_allclose(joint.mass @ joint.posterior, 1 / 3, atol=0.02)


def test_a_saturated_batch_is_filled_up_by_bald():
    """Members that are sure of different labels: a few pairs tell them apart, log K nats, and no other adds to that."""
    case = make_case("listed")
    case = case._replace(belief=dataclasses.replace(case.belief, member_rewards=300 * case.belief.member_rewards))
    k = 12
    batch = call("batch_bald", case, k=k)
    check_batch(batch, case.space, k)
    np.testing.assert_allclose(batch.gains.sum(), np.log(4), rtol=1e-3)
    empty = np.asarray(batch.gains) == 0
    assert empty[-6:].all()
    bald = {
        tuple(pair): score for pair, score in zip(list_pairs(case.space).tolist(), scores64("bald", case), strict=True)
    }
    filled = [bald[tuple(pair)] for pair in np.asarray(batch.pairs)[empty].tolist()]
    assert (np.diff(filled) <= 1e-5).all()


@pytest.mark.parametrize("kind", ["within", "listed"])
def test_bal_pm_adds_the_entropy_of_prompts(kind):
    """With labelled pairs that are still in the pool, and 3 neighbours of 5 in place of 13."""
    case = make_case(kind, 4)
    pairs, phi = list_pairs(case.space), np.float64(case.belief.features)
    alive = np.asarray(case.space.eligible)
    points = np.array([phi[4 * p : 4 * p + 4][alive[4 * p : 4 * p + 4]].mean(axis=0) for p in range(6)])
    apart = np.linalg.norm(points[:, None] - points[None], axis=2)
    reach = np.sort(apart, axis=1)[:, -1]  # 5 others, fewer than 13: the furthest
    near = np.zeros(6)
    for i, j in [(1, 0), (4, 7), (3, 22)]:
        for end in (i, j):
            near += 0.5 * (apart[:, end // 4] < reach - 1e-9)
    uncertain = bald64(scipy.special.expit(margins64(case, pairs)))

    def gain(batch):
        now = near.copy()
        for end in pairs[batch].ravel() // 4:
            now += 0.5 * (apart[:, end] < reach - 1e-9)
        h = np.log(2 * reach + 1e-4) - scipy.special.digamma(now + 1)
        return uncertain + 0.01 * h[pairs // 4].mean(axis=1)

    batch = call("bal_pm", case)
    gained, short = replay(gain, pairs, batch.pairs)
    np.testing.assert_allclose(batch.gains, gained, rtol=1e-4)
    assert (short <= 1e-6).all()


def test_bal_pm_makes_passes_as_it_needs(monkeypatch):
    """With a shortlist of one pair beside the batch the choice is the same."""
    monkeypatch.setattr(batches, "ENTROPY_WEIGHT", 0.3)
    case = make_case("listed", 1)

    def run(shortlist):
        monkeypatch.setattr(batches, "default_shortlist", lambda space: shortlist)
        rule = lambda key, belief: batches.bal_pm(key, case.hparams, belief, case.space, BATCH)  # noqa: E731
        return quick_jit(rule)(jax.random.key(0), case.belief)

    assert (run(1).pairs == run(200).pairs).all()


@pytest.mark.slow
def test_the_noise_of_pairs_is_gumbel_noise():
    """Over a square of indices, as rules walk it: its distribution, and no echo along rows, columns or keys."""
    i, j = jnp.meshgrid(jnp.arange(300), 1000 + jnp.arange(400), indexing="ij")
    seeds = jax.random.bits(jax.random.key(3), (3, 2), jnp.uint32)
    noise = [np.asarray(pair_noise(seed, i, j)) for seed in seeds]
    assert (noise[0] == pair_noise(seeds[0], j, i)).all()
    for each in noise:
        assert scipy.stats.kstest(each.ravel(), "gumbel_r").pvalue > 1e-3
        uniform = np.exp(-np.exp(-each))
        for a, b in ((each[1:], each[:-1]), (each[:, 1:], each[:, :-1]), (each[1:, 1:], each[:-1, :-1])):
            assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.015
        # The largest of each row, as a top-k sees it: uniform over the columns.
        counts = np.bincount(uniform.argmax(axis=1) // 40, minlength=10)
        assert scipy.stats.chisquare(counts).pvalue > 1e-3
    for a, b in itertools.combinations(noise, 2):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.015
    assert np.isfinite(pair_noise(seeds[0], jnp.arange(1 << 16), jnp.int32(0)[None])).all()


def test_pairs_are_drawn_with_the_chances_of_their_scores():
    """Batches of one: over many keys, pairs come up in proportion to exp(score / T), and to score^(1 / T)."""
    case = make_case("listed")
    few = listed_space(case.space.pairs[:8], case.space.eligible, 4)
    case = case._replace(space=few)
    pairs, score = list_pairs(few), scores64("bald", case)
    for name, temperature, weight in (
        ("softmax_bald", 0.2, np.exp(score / 0.2)),
        ("power_bald", 0.5, score**2),
    ):
        hparams = dataclasses.replace(case.hparams, temperature=jnp.float32(temperature))
        draw = quick_jit(jax.vmap(lambda key, name=name, h=hparams: get_rule(name)(key, h, case.belief, few, 1)))
        drawn = np.asarray(draw(jax.random.split(jax.random.key(5), 4000)).pairs)[:, 0]
        counts = (drawn[:, None] == pairs[None]).all(axis=2).sum(axis=0)
        assert scipy.stats.chisquare(counts, weight / weight.sum() * len(drawn)).pvalue > 1e-3


@pytest.mark.slow
@pytest.mark.nightly
def test_a_mixture_keeps_the_best_and_draws_the_rest():
    case = make_case("cross")
    plain = call("greedy_dopt", case)
    none, half, whole = (call("epsilon_greedy_dopt", case, epsilon=share) for share in (0, 0.5, 1))
    assert (none.pairs == plain.pairs).all()
    np.testing.assert_allclose(none.gains, plain.gains)
    assert (half.pairs[:3] == plain.pairs[:3]).all()
    assert (np.asarray(half.gains) > 0).sum() == 3
    assert (whole.gains == 0).all()
    for batch in (none, half, whole):
        check_batch(batch, case.space, BATCH)


def test_a_mixture_of_any_rule():
    """On average a share epsilon, whatever the batch; distinct, best first and complete where all pairs are taken."""
    case, rule = make_case("listed"), mixed(max_diff)
    few = case._replace(space=listed_space(case.space.pairs[:8], case.space.eligible, 4))
    hparams = dataclasses.replace(case.hparams, epsilon=jnp.float32(0.3))
    count = len(list_pairs(few.space))
    many = quick_jit(jax.vmap(lambda key: rule(key, hparams, few.belief, few.space, count)))
    batches_drawn = many(jax.random.split(jax.random.key(0), 500))
    assert (batches_drawn.status == Status.OK).all()
    assert np.isclose((batches_drawn.gains == 0).sum(axis=1).mean(), 0.3 * count, atol=0.1)
    for pairs in np.asarray(batches_drawn.pairs):
        assert set(map(tuple, pairs.tolist())) == set(map(tuple, list_pairs(few.space).tolist()))
    check_batch(call(rule, few, k=count + 3, epsilon=0.3), few.space, count + 3)
