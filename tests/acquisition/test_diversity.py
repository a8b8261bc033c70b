"""Rules of diversity, coresets and the other optimal designs, against float64 references that try every pair."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import sampled

from jarm.acquisition import coreset, diversity, optimal_design
from jarm.acquisition.diversity import candidates, make_points
from jarm.acquisition.registry import get_rule
from jarm.core.status import Status
from jarm.design.spaces import listed_space
from jarm.testing.conformance import BATCH, SPACES, check_batch, make_case
from jarm.testing.references import differences64, information64, list_pairs, weights64
from jarm.testing.tracing import quick_jit

jitted = functools.cache(functools.partial(quick_jit, static_argnames="k"))


def call(rule, case, seed=0, k=BATCH):
    return jitted(rule)(jax.random.key(seed), case.hparams, case.belief, case.space, k=k)


def believing(case, **changes):
    return case._replace(belief=dataclasses.replace(case.belief, **changes))


def known64(case):
    known = np.float64(case.belief.labelled_features)[: int(case.belief.num_labelled)]
    return known[:, 0] - known[:, 1]


def apart64(x, y):
    """The smaller of |x - y| and |x + y|, each with each."""
    return np.sqrt(np.minimum(*(np.square(x[:, None] + sign * y[None]).sum(2) for sign in (1, -1))))


def same_pairs(batch, pairs, picks):
    assert {tuple(pair) for pair in np.asarray(batch.pairs).tolist()} == {tuple(pair) for pair in pairs[picks].tolist()}


def farthest64(x, centres, k, *, clusters):
    """Farthest first; with clusters, in the one of largest sum of squares."""
    centres, picks, gains = list(centres), [], []
    for _ in range(k):
        away = apart64(x, np.array(centres)) if centres else np.sqrt(np.square(x).sum(1))[:, None]
        near, owner = away.min(1), away.argmin(1)
        near[picks] = 0
        sizes = [np.square(near[owner == c]).sum() for c in range(max(1, len(centres)))]
        inside = owner == np.argmax(sizes) if clusters else np.ones(len(x), bool)
        picks.append(int(np.where(inside, near, -1).argmax()))
        gains.append(near[picks[-1]])
        centres.append(x[picks[-1]])
    return np.array(picks), np.array(gains)


@pytest.mark.parametrize(
    ("rule", "kind"),
    sampled(
        [(diversity.k_centre, kind) for kind in SPACES] + [(diversity.lcmd, "cross"), (diversity.lcmd, "listed")],
        *[(diversity.k_centre, "within"), (diversity.lcmd, "cross")],
    ),
)
def test_farthest_first(rule, kind):
    for seed in range(4):
        for labels in (3, 0):
            case = believing(make_case(kind, seed), num_labelled=jnp.int32(labels))
            pairs = list_pairs(case.space)
            x = differences64(np.float64(case.belief.features), pairs)
            picks, gains = farthest64(x, known64(case), BATCH, clusters=rule is diversity.lcmd)
            batch = call(rule, case)
            same_pairs(batch, pairs, picks)
            np.testing.assert_allclose(batch.gains, np.sort(gains)[::-1], rtol=1e-4)


@pytest.mark.parametrize("rule", [diversity.badge, diversity.kmeans_pp])
def test_seeds_are_drawn_by_squared_distance(rule):
    """Batches of two, against the probabilities of every first and every second draw."""
    case = make_case("within", 1)
    pairs, draws = list_pairs(case.space), 6000
    x, centres = differences64(np.float64(case.belief.features), pairs), known64(case)
    if rule is diversity.badge:
        rewards, known = np.float64(case.belief.rewards), np.float64(case.belief.labelled_rewards)[:3]
        x *= 1 / (1 + np.exp(np.abs(rewards[pairs[:, 0]] - rewards[pairs[:, 1]])))[:, None]
        centres = centres / (1 + np.exp(np.abs(known[:, 0] - known[:, 1])))[:, None]
    near, between = apart64(x, centres).min(1), apart64(x, x)
    after = np.minimum(near[None, :], between)  # [chosen, other]
    np.fill_diagonal(after, 0)
    first = np.square(near) / np.square(near).sum()
    second = np.square(after) / np.square(after).sum(1, keepdims=True)
    included = first + first @ second

    keys = jax.random.split(jax.random.key(7), draws)
    batches = quick_jit(jax.vmap(lambda key: rule(key, case.hparams, case.belief, case.space, 2)))(keys)
    place = {tuple(pair): index for index, pair in enumerate(pairs.tolist())}
    picks = np.array([[place[tuple(pair)] for pair in both] for both in np.asarray(batches.pairs).tolist()])
    counts = np.bincount(picks.ravel(), minlength=len(pairs))
    deviation = np.sqrt(draws * included * (1 - included))
    assert (np.abs(counts - draws * included) < 4.5 * deviation).all()
    for (a, b), gains in zip(picks[:50], np.asarray(batches.gains)[:50], strict=True):
        orders = [np.sort([near[a], after[a, b]])[::-1], np.sort([near[b], after[b, a]])[::-1]]
        assert any(np.allclose(gains, order, rtol=1e-4) for order in orders)


def test_a_response_of_no_pair_costs_nothing_and_a_list_need_not_be_in_order():
    """A short list in a long table is looked at through the responses that it holds."""
    case = make_case("listed", 2)
    short = case.space.pairs[:: len(case.space.pairs) // 9][::-1]
    size = case.belief.features.shape[0]
    assert 2 * len(short) < size
    space = dataclasses.replace(case.space, pairs=short.at[1].set(size))
    pairs = list_pairs(space)
    for rule in (diversity.k_centre, coreset.coreset):
        check_batch(call(rule, case._replace(space=space)), space, BATCH)
    picks, gains = farthest64(
        differences64(np.float64(case.belief.features), pairs), known64(case), BATCH, clusters=False
    )
    batch = call(diversity.k_centre, case._replace(space=space))
    same_pairs(batch, pairs, picks)
    np.testing.assert_allclose(batch.gains, gains, rtol=1e-4)


def test_large_spaces_are_looked_at_through_a_sample(monkeypatch):
    monkeypatch.setattr(diversity, "CANDIDATES", 60)
    for kind, count in (("cross", 60), ("within", 36)):
        space = make_case(kind).space
        some = quick_jit(candidates, static_argnames="k")(jax.random.key(0), space, k=BATCH)
        listed = {tuple(pair) for pair in np.asarray(some.pairs).tolist() if pair[0] < 24}
        offered = {tuple(pair) for pair in list_pairs(space).tolist()}
        assert len(some.pairs) == count
        assert listed <= offered
        assert len(listed) == min(count, len(offered))


def test_pairs_of_equal_features_come_last():
    case = make_case("listed")
    phi = case.belief.features.at[1].set(case.belief.features[0]).at[3].set(case.belief.features[2])
    pairs = np.array([[0, 1], [2, 3], [0, 2], [4, 5], [6, 7], [8, 10], [11, 12], [1, 3]])
    # As many pairs as the list of `make_case` has, so that nothing is compiled again.
    padded = np.concatenate([pairs, np.full((len(case.space.pairs) - len(pairs), 2), 24)])
    space = listed_space(jnp.asarray(padded, jnp.int32), jnp.ones(24, bool), 4)
    for rule in (diversity.k_centre, diversity.lcmd, diversity.badge, coreset.coreset):
        batch = call(rule, believing(case._replace(space=space), features=phi))
        assert batch.status == Status.OK
        assert not {(0, 1), (2, 3)} & {tuple(pair) for pair in np.asarray(batch.pairs).tolist()}
        fewer = dataclasses.replace(space, pairs=space.pairs.at[2].set(24))
        batch = call(rule, believing(case._replace(space=fewer), features=phi))
        assert batch.status == Status.UNINFORMATIVE
        assert batch.valid.all()


def gram64(x):
    return x.T @ x


def prior64(case, mean, past, *, mix):
    width = len(mean)
    labels = int(case.belief.num_labelled) + BATCH
    shape = (1 - mix) * np.trace(mean) / width * np.eye(width) + mix * mean
    return past + float(case.hparams.prior_weight) * labels * shape


def greedy64(x, v, prior, worth):
    """Grow a batch by trying every pair that is left with `worth(A before, A after)`."""
    picks, gains = [], []
    for _ in range(BATCH):
        tried = np.array([worth(prior, prior + v[n] * np.outer(x[n], x[n])) for n in range(len(x))])
        tried[picks] = -np.inf
        picks.append(int(tried.argmax()))
        gains.append(tried.max())
        prior = prior + v[picks[-1]] * np.outer(x[picks[-1]], x[picks[-1]])
    return np.array(picks), np.array(gains)


def within64(case):
    """Mean over the responses of the outer product of their features less the mean of their prompt."""
    phi, eligible = (np.asarray(each) for each in (case.belief.features, case.space.eligible))
    prompts = [np.float64(phi[at : at + 4][eligible[at : at + 4]]) for at in range(0, len(phi), 4)]
    return sum(gram64(rows - rows.mean(axis=0)) for rows in prompts) / eligible.sum()


def log_det(before, after):
    return np.linalg.slogdet(after)[1] - np.linalg.slogdet(before)[1]


@pytest.mark.parametrize("name", sampled(["apo", "greedy_apo", "adpo", "a_opt", "bait", "v_opt"], "apo", "v_opt"))
def test_optimal_designs(name):
    for seed in range(3):
        case = make_case("cross", seed)
        pairs, rho = list_pairs(case.space), float(case.hparams.prior_mix)
        phi, rewards = np.float64(case.belief.features), np.float64(case.belief.rewards)
        x, v, past = differences64(phi, pairs), weights64(rewards, pairs), np.float64(case.belief.labelled_information)
        mean, plain = information64(phi, rewards, pairs) / len(pairs), gram64(x) / len(pairs)
        of_labels = prior64(case, plain, gram64(known64(case)), mix=0)
        if name == "apo":
            leverage = (x * np.linalg.solve(of_labels, x.T).T).sum(1)
            picks = np.argsort(-leverage)[:BATCH]
            gains = leverage[picks]
        else:
            trace = {"a_opt": np.eye(5), "bait": mean, "v_opt": within64(case)}.get(name)
            v = np.ones(len(x)) if name == "greedy_apo" else v
            mix = 0 if name == "adpo" else rho
            start = of_labels if name == "greedy_apo" else prior64(case, mean, past, mix=mix)

            def fall(before, after, trace=trace):
                return np.trace(trace @ (np.linalg.inv(before) - np.linalg.inv(after)))

            picks, gains = greedy64(x, v, start, log_det if trace is None else fall)
        batch = call(get_rule(name), case)
        same_pairs(batch, pairs, picks)
        np.testing.assert_allclose(batch.gains, np.sort(gains)[::-1], rtol=2e-4)


@pytest.mark.parametrize("rule", [optimal_design.apo, diversity.lcmd, coreset.coreset])
def test_units_of_features_do_not_matter(rule):
    case = make_case("cross", 4)
    belief = case.belief
    scaled = believing(
        case,
        features=1024 * belief.features,
        labelled_features=1024 * belief.labelled_features,
        labelled_information=1024**2 * belief.labelled_information,
    )
    assert (call(rule, case).pairs == call(rule, scaled).pairs).all()


def test_sensitivities_are_those_of_clusters_without_the_pair():
    case = make_case("listed", 3)
    points = make_points(case.belief, case.space)
    centres, owner = quick_jit(coreset.clusters)(jax.random.key(0), points)
    found = np.asarray(quick_jit(coreset.sensitivities)(points, centres, owner))
    alive, owner, centres = np.asarray(points.valid), np.asarray(owner), np.float64(centres)
    pairs = np.asarray(points.pairs)[alive]
    x, owner = differences64(np.float64(case.belief.features), pairs), owner[alive]
    away = apart64(x, centres)
    spread = np.sqrt(np.square(away[np.arange(len(x)), owner]).mean())
    for n in range(len(x)):
        total = 1.0
        for c in set(owner):
            members = np.flatnonzero(owner == c)
            others = members[members != n]
            if not len(others):
                continue
            if c == owner[n]:
                towards = np.where(np.square(x[n] - centres[c]).sum() < np.square(x[n] + centres[c]).sum(), 1, -1)
                centre = (len(members) * centres[c] - towards * x[n]) / len(others)
                away_n = np.sqrt(np.square(centre - towards * x[n]).sum())
            else:
                away_n = away[n, c]
            total += len(others) * np.exp(-coreset.RADIUS / spread * away_n)
        np.testing.assert_allclose(found[alive][n], len(x) / total, rtol=1e-3)
    # Means up to sign: what is left of a cluster points both ways alike.
    for c in set(owner):
        members = x[owner == c]
        aligned = members * np.where(members @ centres[c] < 0, -1, 1)[:, None]
        np.testing.assert_allclose(aligned.mean(0), centres[c], atol=1e-4)


def test_a_coreset_is_drawn_by_sensitivity():
    """Batches of one: expected counts are sums over the draws, as each clusters anew."""
    case, draws = make_case("listed", 5), 3000
    points = make_points(case.belief, case.space)

    def one(key):
        _, key_seeds, _ = jax.random.split(jax.random.clone(key), 3)
        m = jnp.where(points.valid, coreset.sensitivities(points, *coreset.clusters(key_seeds, points)), 0)
        return m / m.sum(), coreset.coreset(key, case.hparams, case.belief, case.space, 1).pairs[0]

    shares, picks = quick_jit(jax.vmap(one))(jax.random.split(jax.random.key(3), draws))
    shares = np.float64(shares)
    found = (np.asarray(points.pairs)[None] == np.asarray(picks)[:, None]).all(2)
    counts, deviation = found.sum(0), np.sqrt((shares * (1 - shares)).sum(0))
    assert (found.sum(1) == 1).all()
    assert (np.abs(counts - shares.sum(0)) <= 4.5 * deviation).all()


def test_a_coreset_stands_for_the_whole_space():
    """Weighted sums over batches are, on average, sums over the space; the lightest are those likeliest drawn."""
    rng, k, draws = np.random.default_rng(0), 4, 20_000
    m, value = rng.gamma(1, size=12), rng.normal(2, 1, 12)
    tickets = np.log(m) + rng.gumbel(size=(draws, 12))
    order = np.argsort(-tickets, axis=1)
    left_out = np.take_along_axis(tickets, order[:, k : k + 1], axis=1)
    weights = np.asarray(jax.vmap(coreset.drawn_weights)(jnp.asarray(m[order[:, :k]]), jnp.asarray(left_out[:, 0])))
    sums = (weights * value[order[:, :k]]).sum(axis=1)
    assert abs(sums.mean() - value.sum()) < 4 * sums.std() / np.sqrt(draws)
    case = make_case("listed", 5)
    drawn = quick_jit(coreset.coreset, static_argnums=4)(jax.random.key(0), case.hparams, case.belief, case.space, k)
    np.testing.assert_allclose(drawn.weights.mean(), 1, rtol=1e-6)
    assert (np.diff(drawn.gains) <= 0).all()
    assert (np.diff(drawn.weights) >= 0).all()
    assert drawn.weights[0] < drawn.weights[-1]
