"""Rules by intervals and by duels against float64 references written from the formulas, duel by duel."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import sampled

from jarm.acquisition import duels, intervals
from jarm.acquisition.contrib import intervals as published
from jarm.acquisition.registry import get_rule
from jarm.core.base import Belief, HParams
from jarm.core.status import Status
from jarm.design.spaces import listed_space, pair_space
from jarm.testing.conformance import call_rule, check_batch, make_case
from jarm.testing.references import list_pairs
from jarm.testing.tracing import quick_jit

MANY = 20  # several turns of each prompt
jitted = functools.cache(functools.partial(quick_jit, static_argnames="k"))


def call(rule, case, k=MANY, seed=0, **numbers):
    hparams = dataclasses.replace(case.hparams, **{name: jnp.float32(value) for name, value in numbers.items()})
    return jitted(rule)(jax.random.key(seed), hparams, case.belief, case.space, k=k)


class Reference:
    """Margins, widths and members of a case in float64; `beta` 1."""

    def __init__(self, case, marginal=False):
        self.pairs = list_pairs(case.space)
        self.mean = np.float64(case.belief.rewards)
        self.members = np.float64(case.belief.member_rewards)
        self.home = np.arange(len(self.mean)) // case.space.width
        self.margin = self.mean[:, None] - self.mean[None, :]
        apart = np.std(self.members[:, :, None] - self.members[:, None, :], axis=0, ddof=1)
        alone = np.std(self.members, axis=0, ddof=1)
        self.width = alone[:, None] + alone[None, :] if marginal else apart
        self.inside = np.zeros((len(self.mean), len(self.mean)), bool)
        self.inside[tuple(self.pairs.T)] = True
        self.inside |= self.inside.T
        upper = np.where(self.inside, self.margin + self.width, np.inf)
        self.candidate = upper.min(axis=1) >= 0
        lower = np.where(self.inside, self.margin - self.width, np.inf)
        among = np.where(self.candidate[None, :], lower, np.inf).min(axis=1)
        self.floor = np.where(among < np.inf, among, lower.min(axis=1))

    def open(self, which):
        return which[self.candidate[which]] if self.candidate[which].any() else which


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gap(ref):
    return sigmoid(ref.margin + ref.width) - sigmoid(ref.margin - ref.width)


# A program for each rule and kind of space takes a second to compile; the conformance suite has every combination.
SCORED = [
    ("infomax", "within", False),
    ("infomax", "all", False),
    ("delta_ucb", "cross", False),
    ("delta_ucb", "listed", False),
    ("infomax", "listed", True),
    ("delta_ucb", "within", True),
]


@pytest.mark.parametrize(("name", "kind", "marginal"), SCORED)
def test_pairs_of_the_largest_scores(name, kind, marginal):
    rule = get_rule(name + "_marginal" * marginal)
    for seed in range(3):
        case = make_case(kind, seed)
        ref = Reference(case, marginal)
        table = gap(ref) if name == "infomax" else np.abs(ref.margin) + ref.width
        batch = call(rule, case)
        check_batch(batch, case.space, MANY)
        own = table[tuple(np.asarray(batch.pairs).T)]
        np.testing.assert_allclose(own, np.sort(table[tuple(ref.pairs.T)])[::-1][:MANY], rtol=1e-5)
        np.testing.assert_allclose(batch.gains, own, rtol=1e-4)


@pytest.mark.parametrize(("kind", "marginal"), [("within", False), ("listed", True)])
def test_delta_quantile_takes_the_best_of_its_window(kind, marginal):
    rule = get_rule("delta_quantile" + "_marginal" * marginal)
    k = 4
    for seed in range(3):
        case = make_case(kind, seed)
        ref = Reference(case, marginal)
        gaps = (np.abs(ref.margin) + ref.width)[tuple(ref.pairs.T)]
        share = max(0.05, k / len(gaps))
        start = int(max(0, 0.05 - share / 2) * len(gaps))
        window = np.argsort(-gaps)[start : start + int(np.ceil(share * len(gaps) - 1e-5))]
        if marginal:
            value = ref.mean + np.std(ref.members, axis=0, ddof=1)
        else:
            alive = np.unique(ref.pairs) if kind == "listed" else np.flatnonzero(np.asarray(case.space.eligible))
            groups = ref.home if kind == "within" else np.zeros_like(ref.home)
            value = np.zeros(len(ref.mean))
            for group in np.unique(groups):
                here, live = groups == group, alive[groups[alive] == group]
                apart = ref.members[:, here] - ref.members[:, live].mean(axis=1, keepdims=True)
                value[here] = ref.mean[here] - ref.mean[live].mean() + np.std(apart, axis=0, ddof=1)
        better = np.where(ref.margin[tuple(ref.pairs.T)] > 0, *ref.pairs.T)
        order = window[np.lexsort([-gaps[window], -value[better[window]]])][:k]
        batch = call(rule, case, k=k)
        assert np.asarray(batch.pairs).tolist() == ref.pairs[order].tolist()


def regret_for_information(ref, i, partners):
    margin, width = ref.margin[i, partners], ref.width[i, partners]
    short = max(0, (sigmoid(width - margin) - 0.5).max())
    p = sigmoid(margin)
    return (short + p - 0.5) ** 2 / np.log(1 + 4 * (p * (1 - p) * width) ** 2)


def favourites(ref, which):
    return {int(which[reward[which].argmax()]) for reward in ref.members}


def max_min_lcb(ref, i, able, j, partners):
    able, partners = ref.open(able), ref.open(partners)
    return i == able[ref.floor[able].argmax()] and j == partners[(ref.margin - ref.width)[i, partners].argmin()]


def rucb(ref, i, able, j, partners):
    return i in ref.open(able) and j == partners[(ref.margin + ref.width)[partners, i].argmax()]


def ids(ref, i, able, j, partners):
    return i == able[ref.mean[able].argmax()] and j == partners[regret_for_information(ref, i, partners).argmin()]


def info_gain(ref, i, able, j, partners):
    return i in favourites(ref, able) and j == partners[gap(ref)[i, partners].argmax()]


def baits(ref, i, able, j, partners):
    apart = np.std(ref.members - ref.members[:, [i]], axis=0)
    return i in favourites(ref, able) and j == partners[apart[partners].argmax()]


def drts(ref, i, able, j, partners):
    return i in favourites(ref, able) and j in {int(partners[reward[partners].argmin()]) for reward in ref.members}


def double_ts(ref, i, able, j, partners):
    others = favourites(ref, np.append(partners, i)) - {i}
    return i in favourites(ref, able) and j in (others or partners)


def eets(ref, i, able, j, partners):
    for m, reward in enumerate(ref.members):
        others = [r for n, r in enumerate(ref.members) if n != m and r[partners].max() > r[i]]
        if i == able[reward[able].argmax()] and j in {partners[r[partners].argmax()] for r in others or [reward]}:
            return True
    return False


def greedy(ref, i, able, j, partners):
    return i == able[ref.mean[able].argmax()] and j == partners[ref.mean[partners].argmax()]


def best_of_four(ref, i, able, j, partners):
    return i == able[ref.mean[able].argmax()]  # prompts have four responses


REPLAYS = [
    (intervals.max_min_lcb, max_min_lcb, "within"),
    (intervals.max_min_lcb, max_min_lcb, "listed"),
    (published.max_min_lcb_marginal, max_min_lcb, "cross"),
    (intervals.rucb, rucb, "all"),
    (published.rucb_marginal, rucb, "within"),
    (intervals.ids, ids, "listed"),
    (published.ids_marginal, ids, "within"),
    (intervals.info_gain, info_gain, "cross"),
    (duels.double_ts, double_ts, "within"),
    (duels.eets, eets, "cross"),
    (duels.baits, baits, "all"),
    (duels.drts, drts, "listed"),
    (duels.boltzmann, greedy, "cross"),
    (duels.pilaf, greedy, "within"),
    (duels.best_of_four, best_of_four, "within"),
]


@pytest.mark.parametrize(
    ("rule", "right", "kind"), sampled(REPLAYS, *REPLAYS[::4]), ids=lambda value: getattr(value, "__name__", value)
)
def test_each_duel_is_one_the_formula_allows(rule, right, kind):
    """Given the pairs before it; an anchor is used again only when all prompts that still hold pairs were used."""
    for seed in range(3):
        case = make_case(kind, seed)
        ref = Reference(case, rule.__name__.endswith("_marginal"))
        batch = call(rule, case, seed=seed, temperature=0)
        check_batch(batch, case.space, MANY)
        left, turns = ref.inside.copy(), np.zeros(6, int)
        for pick in np.asarray(batch.pairs).tolist():
            anchors = []
            for i, j in (pick, pick[::-1]):
                able = np.flatnonzero((ref.home == ref.home[i]) & left.any(axis=1))
                if right(ref, i, able, j, np.flatnonzero(left[i])):
                    anchors.append(ref.home[i])
            assert anchors, f"no end of {pick} is a first response"
            if len(set(anchors)) == 1 and kind == "within":
                holding = np.unique(ref.home[left.any(axis=1)])
                assert turns[anchors[0]] == turns[holding].min()
                turns[anchors[0]] += 1
            left[tuple(pick)] = left[tuple(pick[::-1])] = False


def test_a_list_that_holds_pairs_twice_ends():
    case = make_case("listed")
    space = dataclasses.replace(case.space, pairs=jnp.tile(case.space.pairs[:10], (6, 1)))
    batch = call(duels.drts, case._replace(space=space))
    check_batch(batch, space, MANY)
    assert (batch.valid.sum(), batch.status) == (10, Status.EXHAUSTED)


def test_duels_reach_the_last_responses_where_they_fill_no_prompt():
    case = make_case("listed")
    last = case.space.size - 1
    width = next(width for width in range(3, last) if case.space.size % width > 1)
    space = listed_space(jnp.array([[last - 1, last]]), case.space.eligible.at[-2:].set(True), width)
    batch = call(duels.drts, case._replace(space=space), k=1)
    assert batch.pairs.tolist() == [[last - 1, last]]


@pytest.mark.parametrize("name", ["boltzmann", "pilaf"])
def test_responses_are_drawn_in_proportion(name):
    """One prompt of four: frequencies of the six pairs in 20,000 duels, by the softmax formulas."""
    mean, b = np.array([0.0, 0.5, 1.0, 2.0]), 1.6
    belief = Belief(
        features=jnp.zeros((4, 1)),
        rewards=jnp.float32(mean),
        member_rewards=jnp.float32(mean)[None],
        labelled_information=jnp.zeros((1, 1)),
        num_labelled=jnp.int32(0),
        labelled_features=jnp.zeros((0, 2, 1)),
        labelled_rewards=jnp.zeros((0, 2)),
    )
    space, hparams = pair_space("within", 4, jnp.ones(4, bool)), HParams(temperature=jnp.float32(b))
    rule, draws = getattr(duels, name), 20_000
    keys = jax.random.split(jax.random.key(0), draws)
    pairs = np.asarray(jax.jit(jax.vmap(lambda key: rule(key, hparams, belief, space, 1).pairs[0]))(keys))
    up, down = (1 / b, 1 / b) if name == "boltzmann" else (1 / b + 1, 1 / b - 1)
    first, second = np.exp(up * mean), np.exp(down * mean)
    chance = np.zeros((4, 4))
    for i in range(4):
        for j in range(4):
            if i != j:
                chance[min(i, j), max(i, j)] += first[i] / first.sum() * second[j] / (second.sum() - second[i])
    found = np.zeros((4, 4))
    np.add.at(found, tuple(pairs.T), 1 / draws)
    assert (np.abs(found - chance) < 4.5 * np.sqrt(0.25 / draws)).all()


def test_an_interval_ignores_what_members_share_and_the_published_one_does_not():
    """The level of a member is nothing a comparison could tell; marginal intervals take it for doubt."""
    case = make_case("within")
    level = 50 * jnp.arange(4.0)[:, None]
    lifted = case._replace(belief=dataclasses.replace(case.belief, member_rewards=case.belief.member_rewards + level))
    np.testing.assert_allclose(call(intervals.infomax, lifted).gains, call(intervals.infomax, case).gains, rtol=1e-3)
    # Every response has an sd of about 50 times that of 0 to 3.
    assert (call(published.delta_ucb_marginal, lifted).gains > 100).all()
    assert (call(published.delta_ucb_marginal, case).gains < 30).all()


def one_prompt():
    """Four responses to one prompt, each the favourite of one of four members."""
    case = make_case("within")
    members = jnp.eye(4) + 0.1 * jnp.arange(4.0)[None, :]
    few = {"features": case.belief.features[:4], "rewards": members.mean(axis=0), "member_rewards": members}
    return case._replace(
        belief=dataclasses.replace(case.belief, **few), space=pair_space("within", 4, jnp.ones(4, bool))
    )


@pytest.mark.parametrize("name", ["double_ts", "eets"])
def test_every_member_is_drawn_as_often(name):
    case = one_prompt()
    draw = quick_jit(jax.vmap(lambda key: get_rule(name)(key, case.hparams, case.belief, case.space, 1).pairs[0]))
    pairs = np.asarray(draw(jax.random.split(jax.random.key(1), 600)))
    counts = np.array([(pairs == pair).all(axis=1).sum() for pair in itertools.combinations(range(4), 2)])
    assert counts.sum() == 600
    assert np.abs(counts - 100).max() < 40  # 4.4 standard deviations


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_intervals_are_as_wide_as_beta_says(beta):
    case = make_case("listed")
    hparams = dataclasses.replace(case.hparams, beta=jnp.float32(beta))
    pairs, members = list_pairs(case.space), np.float64(case.belief.member_rewards)
    apart = members[:, pairs[:, 0]] - members[:, pairs[:, 1]]
    margin = np.float64(case.belief.rewards)[pairs] @ [1, -1]
    widest = np.sort(np.abs(margin) + beta * apart.std(axis=0, ddof=1))[::-1]
    gains = call_rule(get_rule("delta_ucb"), case._replace(hparams=hparams)).gains
    np.testing.assert_allclose(gains, widest[: len(gains)], rtol=1e-5)


def test_rewards_too_large_to_square_are_a_status():
    case = make_case("within")
    huge = dataclasses.replace(case.belief, member_rewards=1e25 * case.belief.member_rewards)
    for name in ("baits", "max_min_lcb"):
        assert call_rule(get_rule(name), case._replace(belief=huge)).status == Status.NONFINITE
