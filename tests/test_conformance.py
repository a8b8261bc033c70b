"""Every rule of the registry is held to the same checks; a rule added there is checked without another line here."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jarm.acquisition.registry import NEEDS, RULES, get_rule
from jarm.base import JarmError, Selection, Status
from jarm.selection import top_pairs
from jarm.testing import (
    BATCH,
    CHECKS,
    SPACES,
    _jitted,
    check_batch,
    check_rule,
    greedy_shortfall,
    information64,
    leverages64,
    list_pairs,
    make_case,
)

# To compile less: under vmap a rule is another program, and one space stands for all; the blind greedy rule is
# `greedy_dopt` with another prior, and rules with published intervals are those with the others but for one line.
TWINS = {name for name in RULES if name == "greedy_dopt_blind" or name.endswith("_marginal")}
CASES = [(name, kind) for name in RULES for kind in SPACES if name not in TWINS or kind == "within"]
# To compile less: under vmap a rule is another program, and one space stands for all; some rules are others with
# another prior (`greedy_dopt`), target (`bait`) or scale (`badge`).
TWINS = ("greedy_dopt_blind", "adpo", "a_opt", "kmeans_pp")
# To compile less: under vmap a rule is another program, and one space stands for all; so it does for rules that are
# almost another: `greedy_dopt` with another prior, `softmax_bald` of a logarithm, `bald` with another score.
TWINS = ("greedy_dopt_blind", "power_bald", "variance_prob")
# another prior or weight (`greedy_dopt`), target (`bait`) or scale (`badge`).
TWINS = ("greedy_dopt_blind", "adpo", "greedy_apo", "a_opt", "kmeans_pp")
CASES = [(name, kind) for name in RULES for kind in SPACES if name not in TWINS or kind == "within"]
jitted = functools.cache(functools.partial(quick_jit, static_argnames="k"))


def call(name, case, k=BATCH, seed=0):
    return _jitted(get_rule(name))(jax.random.key(seed), case.belief, case.space, k=k, hparams=case.hparams)


def believing(case, **changes):
    return case._replace(belief=dataclasses.replace(case.belief, **changes))


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", RULES)
def test_rule(name, check):
    spaces = ("within",) if name in TWINS else ("cross",) if check == "vmap" else SPACES
    check_rule(get_rule(name), spaces=spaces, checks=(check,))


def scores64(name, case):
    """Scores of every pair by the formula of spec 3, in float64."""
    phi, rewards = np.float64(case.belief.features), np.float64(case.belief.rewards)
    pairs = list_pairs(case.space)
    gap = np.abs(rewards[pairs[:, 0]] - rewards[pairs[:, 1]])
    if name in ("entropy", "max_diff"):
        return pairs, gap if name == "max_diff" else -gap
    given = None if name == "xtx" else rewards
    metric = information64(phi, given, pairs) + (np.float64(case.belief.past) if name == "pa_dopt" else 0)
    return pairs, leverages64(phi, given, pairs, metric)


@pytest.mark.parametrize("kind", SPACES)
@pytest.mark.parametrize("name", ["entropy", "max_diff", "xtx", "dopt", "pa_dopt"])
def test_one_shot_rules_pick_the_largest_scores(name, kind):
    for seed in range(4):
        case = make_case(kind, seed)
        pairs, scores = scores64(name, case)
        batch = call(name, case)
        place = {tuple(pair): index for index, pair in enumerate(pairs.tolist())}
        own = scores[[place[tuple(pair)] for pair in np.asarray(batch.pairs).tolist()]]
        np.testing.assert_allclose(batch.gains, own, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(own, np.sort(scores)[::-1][:BATCH], rtol=1e-6)


@pytest.mark.parametrize(("name", "kind"), [case for case in CASES if "greedy_dopt" in case[0]])
@pytest.mark.parametrize(("name", "kind"), [case for case in CASES if case[0].startswith("greedy_dopt")])
def test_greedy_rules_start_from_their_prior(name, kind):
    """A0 = past + c n [(1 - rho) tr(Ibar)/F I + rho Ibar], n the labels after the batch; then every pair every step."""
    case = make_case(kind, 3)
    phi, rewards = np.float64(case.belief.features), np.float64(case.belief.rewards)
    pairs = list_pairs(case.space)
    mean = information64(phi, rewards, pairs) / len(pairs)
    c, rho, width = float(case.hparams.prior), float(case.hparams.prior_mix), phi.shape[1]
    labels = int(case.belief.labels) + BATCH
    prior = c * labels * ((1 - rho) * np.trace(mean) / width * np.eye(width) + rho * mean)
    if name == "greedy_dopt":
        prior += np.float64(case.belief.past)
    batch = call(name, case)
    short, gained = greedy_shortfall(phi, rewards, pairs, prior, np.asarray(batch.pairs))
    assert (short <= 1e-6 * gained).all()
    np.testing.assert_allclose(batch.gains, gained, rtol=1e-4)


@pytest.mark.parametrize("name", RULES)
def test_the_table_says_what_a_rule_looks_at(name):
    entry, changed = RULES[name], set()
    for seed in (0, 1):
        case = make_case("within", seed)
        belief, plain = case.belief, call(name, case)
        known = belief.known.at[:, 0].add(jnp.arange(5.0) ** 2)
        disagreement = (belief.member_rewards - belief.rewards[None])[:, ::-1]
        others = [
            ("key", 1, case),
            ("past", 0, believing(case, past=100 * jnp.eye(5), known=known)),
            ("ensemble", 0, believing(case, member_rewards=belief.rewards[None] + 3 * disagreement)),
        ]
        for number, value in (("prior", 7), ("beta", 0), ("beta", 3), ("temperature", 40), ("epsilon", 1)):
            hparams = dataclasses.replace(case.hparams, **{number: jnp.float32(value)})
            others.append((number, 0, case._replace(hparams=hparams)))
        for need, key, other in others:
            batch = call(name, other, seed=key)
            if (batch.gains != plain.gains).any() | (batch.pairs != plain.pairs).any():
                changed.add(need)
    assert changed == set(entry.needs)
    assert set(entry.needs) <= set(NEEDS)
    assert entry.summary
    assert entry.cost


# Rules that measure no pair by an information matrix, which collapsed features would make singular.
NO_METRIC = ("random", "entropy", "max_diff")
NO_METRIC += ("variance", "variance_prob", "bald", "batch_bald", "bal_pm", "power_bald", "softmax_bald")


@pytest.mark.parametrize(
    ("name", "kind"), [case for case in CASES if "F" in RULES[case[0]].cost and case[0] not in NO_METRIC]
)
def test_collapsed_features_are_a_status(name, kind):
    case = make_case(kind)
    for row in (np.zeros(5), [0.1, 0.7, -3.3, 1e3, 1e-3]):
        flat = believing(case, features=jnp.tile(jnp.float32(row), (24, 1)), past=jnp.zeros((5, 5)))
        assert call(name, flat).status in (Status.SINGULAR, Status.UNINFORMATIVE)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_rank_deficient_pool_still_has_a_batch(name, kind):
    """Features on a line: no inverse without a jitter that scales, no NaN with it."""
    case = make_case(kind)
    line = case.belief.features[:, :1] * jnp.arange(1.0, 6.0)[None, :]
    case = believing(case, features=line, past=jnp.zeros((5, 5)))
    check_batch(call(name, case), case.space, BATCH)


@pytest.mark.parametrize("name", ["xtx", "dopt", "pa_dopt", "greedy_dopt"])
def test_fewer_pairs_than_features(name):
    """M <= F: every pair has leverage one, ranks are noise, but the batch is still distinct, complete and finite."""
    alive = np.isin(np.arange(24), [0, 1, 2, 3])
    case = make_case("within", eligible=alive)
    assert len(list_pairs(case.space)) == 5  # (0, 1) is labelled
    case = believing(case, past=jnp.zeros((5, 5)))
    check_batch(call(name, case), case.space, BATCH)
    if name != "greedy_dopt":
        case = make_case("cross", eligible=np.isin(np.arange(24), [0, 4, 8]))  # three pairs, of rank two
        leverage = call(name, believing(case, past=jnp.zeros((5, 5)))).gains
        np.testing.assert_allclose(leverage.sum(), 2, atol=1e-3)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_huge_margins(name, kind):
    """|r| = 200: margins of 400, where p (1 - p) is zero in float32 and nothing may become NaN."""
    case = make_case(kind)
    signs = jnp.where(jnp.arange(24) % 3 == 0, 200.0, -200.0)
    case = believing(case, rewards=signs + case.belief.rewards, member_rewards=signs[None] + case.belief.member_rewards)
    check_batch(call(name, case), case.space, BATCH)


@pytest.mark.parametrize("name", ["xtx", "dopt", "pa_dopt", "entropy", "max_diff"])
def test_a_copy_of_a_response_leaves_scores_alone_but_for_the_pool(name):
    """A copy is scored as its original; one-shot rules do not see that one of the two is enough."""
    case = make_case("cross", eligible=np.arange(24) != 23)
    belief = case.belief
    copied = believing(
        case,
        features=belief.features.at[20].set(belief.features[21]),
        rewards=belief.rewards.at[20].set(belief.rewards[21]),
    )
    pairs, scores = scores64(name, copied)
    batch = call(name, copied)
    found = {tuple(pair): float(gain) for pair, gain in zip(batch.pairs.tolist(), batch.gains, strict=True)}
    table = {tuple(pair): score for pair, score in zip(pairs.tolist(), scores, strict=True)}
    for i in range(20):
        assert table.get((i, 20)) == table.get((i, 21))
        if (i, 20) in found and (i, 21) in found:
            np.testing.assert_allclose(found[i, 20], found[i, 21], rtol=1e-5)


def furthest(key, belief, space, k, hparams):
    return top_pairs(lambda margin, _: jnp.abs(margin), belief.rewards, None, space, k)


def mirrored(key, belief, space, k, hparams):
    best = furthest(key, belief, space, k, hparams)
    return dataclasses.replace(best, pairs=best.pairs[:, ::-1])


def repeats(key, belief, space, k, hparams):
    best = furthest(key, belief, space, k, hparams)
    return dataclasses.replace(best, pairs=best.pairs.at[1].set(best.pairs[0]))


def buys_again(key, belief, space, k, hparams):
    nothing = jnp.full_like(space.excluded, space.eligible.shape[0])
    return furthest(key, belief, dataclasses.replace(space, excluded=nothing), k, hparams)


def looks_at_order(key, belief, space, k, hparams):
    places = jnp.arange(belief.rewards.shape[0], dtype=jnp.float32)
    return top_pairs(lambda margin, _: -jnp.abs(margin), places**1.5, None, space, k)


def swallows_nan(key, belief, space, k, hparams):
    rewards = jnp.nan_to_num(belief.rewards)
    return top_pairs(lambda margin, _: -jnp.abs(margin), rewards, None, space, k)


def looks_at_the_level(key, belief, space, k, hparams):
    return top_pairs(lambda margin, _: -jnp.abs(margin), belief.rewards**2, None, space, k)


def half_precision(key, belief, space, k, hparams):
    best = furthest(key, belief, space, k, hparams)
    return dataclasses.replace(best, gains=best.gains.astype(jnp.float16))


def worst_first(key, belief, space, k, hparams):
    best = furthest(key, belief, space, k, hparams)
    return Selection(best.pairs[::-1], best.gains[::-1], best.valid, best.status)


@pytest.mark.parametrize(
    ("rule", "check", "complaint"),
    [
        (mirrored, "batch", "not in the space"),
        (repeats, "batch", "picked twice"),
        (buys_again, "batch", "not in the space|wanted"),
        (half_precision, "batch", "float16"),
        (worst_first, "batch", "best first|valid pairs"),
        (looks_at_order, "symmetry", "renaming"),
        (looks_at_the_level, "symmetry", "shift"),
        (swallows_nan, "failure", "silently"),
    ],
)
def test_the_checks_catch_a_bad_rule(rule, check, complaint):
    with pytest.raises(AssertionError, match=f"{check} on a space of 'within' pairs: .*({complaint})"):
        check_rule(rule, spaces=("within",), checks=(check,))


def test_an_unknown_rule_is_answered_with_the_nearest_name():
    assert get_rule("dopt") is RULES["dopt"].rule
    with pytest.raises(JarmError, match="no rule 'greedy_dop': did you mean 'greedy_dopt'"):
        get_rule("greedy_dop")
    with pytest.raises(JarmError, match="no rule 'zzz': choose from random, "):
        get_rule("zzz")


def test_a_rule_of_a_file(tmp_path):
    path = tmp_path / "mine.py"
    lines = [
        "from jarm.acquisition.uncertainty import entropy",
        "def mine(*args, **kw):",
        "    return entropy(*args, **kw)",
    ]
    path.write_text("\n".join(lines))
    rule = get_rule(f"{path}:mine")
    assert rule is get_rule(f"{path}:mine")
    check_rule(rule, spaces=("within",), checks=("batch",))
    with pytest.raises(JarmError, match=r"mine\.py has no function 'other'; it has mine\."):
        get_rule(f"{path}:other")
    with pytest.raises(JarmError, match=r"There is no file .*yours\.py for the rule 'mine'"):
        get_rule(f"{tmp_path}/yours.py:mine")
    broken = tmp_path / "broken.py"
    broken.write_text("import nowhere_at_all\n")
    with pytest.raises(JarmError, match=r"broken\.py does not run: ModuleNotFoundError"):
        get_rule(f"{broken}:mine")
