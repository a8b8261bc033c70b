"""Every rule of the registry passes the same checks; a new entry is checked without another line here."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import greedy_shortfall, leverages64

from jarm.acquisition.check import check_selection
from jarm.acquisition.registry import NEEDS, RULES, get_rule
from jarm.core.base import Selection
from jarm.core.status import JarmError, Status
from jarm.design.top import top_pairs
from jarm.testing.conformance import BATCH, CHECKS, SPACES, call_rule, check_batch, check_rule, make_case
from jarm.testing.references import information64, list_pairs

# Some rules are others with another prior, weight, target or scale.
TWINS = (
    "greedy_dopt_blind",
    "adpo",
    "greedy_apo",
    "a_opt",
    "kmeans_pp",
    *(name for name in RULES if "marginal" in name),
)
# Rules that invert no information matrix, which collapsed features would make singular.
NO_METRIC = (
    "random",
    "then_random",
    "entropy",
    "max_diff",
    "variance",
    "variance_prob",
    "bald",
    "batch_bald",
    "bal_pm",
)
NO_METRIC += tuple(name for name in RULES if RULES[name].rule.__module__.endswith(("duels", "intervals")))
NO_METRIC += ("power_bald", "softmax_bald")


def call(name, case, seed=0):
    return call_rule(get_rule(name), case, jax.random.key(seed))


def believing(case, **changes):
    return case._replace(belief=dataclasses.replace(case.belief, **changes))


# A rule that draws, and one that scores each pair alone.
CORE = ("random", "dopt")


# One of each kind: of those that users are told to try first, and of each engine.
OFTEN = ("random", "entropy", "dopt", "pa_dopt", "greedy_dopt", "bait", "v_opt", "badge", "epig", "batch_bald", "drts")


# One test per rule and space, so that a program is compiled once; the list is the shortest.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name not in OFTEN) + [pytest.mark.core] * (name in CORE))
        for name in RULES
    ],
)
def test_rule(name):
    check_rule(get_rule(name), spaces=("listed",), checks=tuple(check for check in CHECKS if check != "vmap"))
    the_entry_names_the_inputs(name, "listed")
    collapsed_features_are_a_status(name, "listed")


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["within", "cross", "all"])
@pytest.mark.parametrize("name", RULES)
def test_rule_elsewhere(name, kind):
    if name in TWINS and kind != "within":
        return
    # Under vmap a rule is another program, and one space stands for all.
    check_rule(get_rule(name), spaces=(kind,), checks=tuple(c for c in CHECKS if c != "vmap" or kind == "within"))
    collapsed_features_are_a_status(name, kind)
    if kind == "within":
        the_entry_names_the_inputs(name, kind)


def scores64(name, case):
    """Scores of every pair by the formula, in float64."""
    phi, rewards = np.float64(case.belief.features), np.float64(case.belief.rewards)
    pairs = list_pairs(case.space)
    gap = np.abs(rewards[pairs[:, 0]] - rewards[pairs[:, 1]])
    if name in ("entropy", "max_diff"):
        return pairs, gap if name == "max_diff" else -gap
    given = None if name == "xtx" else rewards
    metric = information64(phi, given, pairs) + (
        np.float64(case.belief.labelled_information) if name == "pa_dopt" else 0
    )
    return pairs, leverages64(phi, given, pairs, metric)


@pytest.mark.parametrize("kind", ["listed", *(pytest.param(kind, marks=pytest.mark.slow) for kind in SPACES[:3])])
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


@pytest.mark.parametrize("kind", ["within", pytest.param("cross", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["greedy_dopt", pytest.param("greedy_dopt_blind", marks=pytest.mark.slow)])
def test_greedy_rules_start_from_their_prior(name, kind):
    """A0 = past + c n [(1 - rho) tr(Ibar)/F I + rho Ibar], n the labels after the batch; then every pair every step."""
    case = make_case(kind, 3)
    phi, rewards = np.float64(case.belief.features), np.float64(case.belief.rewards)
    pairs = list_pairs(case.space)
    mean = information64(phi, rewards, pairs) / len(pairs)
    c, rho, width = float(case.hparams.prior_weight), float(case.hparams.prior_mix), phi.shape[1]
    labels = int(case.belief.num_labelled) + BATCH
    prior = c * labels * ((1 - rho) * np.trace(mean) / width * np.eye(width) + rho * mean)
    if name == "greedy_dopt":
        prior += np.float64(case.belief.labelled_information)
    batch = call(name, case)
    short, gained = greedy_shortfall(phi, rewards, pairs, prior, np.asarray(batch.pairs))
    assert (short <= 1e-6 * gained).all()
    np.testing.assert_allclose(batch.gains, gained, rtol=1e-4)


def the_entry_names_the_inputs(name, kind):
    entry, changed = RULES[name], set()
    for seed in range(4):
        case = make_case(kind, seed)
        belief, plain = case.belief, call(name, case)
        labelled = belief.labelled_features.at[:, 0].add(jnp.arange(5.0, dtype=jnp.float32) ** 2)
        disagreement = (belief.member_rewards - belief.rewards[None])[:, ::-1]
        changes = [
            ("key", 1, case),
            ("labelled", 0, believing(case, labelled_information=100 * jnp.eye(5), labelled_features=labelled)),
            ("ensemble", 0, believing(case, member_rewards=belief.rewards[None] + 3 * disagreement)),
        ]
        for number, value in (("prior_weight", 7), ("beta", 0), ("beta", 3), ("temperature", 40), ("epsilon", 1)):
            hparams = dataclasses.replace(case.hparams, **{number: jnp.float32(value)})
            changes.append((number, 0, case._replace(hparams=hparams)))
        for need, key, other in changes:
            batch = call(name, other, seed=key)
            if (batch.gains != plain.gains).any() | (batch.pairs != plain.pairs).any():
                changed.add(need)
    assert changed == set(entry.needs)
    assert set(entry.needs) <= set(NEEDS)
    assert entry.summary
    assert entry.cost


def collapsed_features_are_a_status(name, kind):
    case = make_case(kind)
    for row in (np.zeros(5), [0.1, 0.7, -3.3, 1e3, 1e-3]) if name not in NO_METRIC else ():
        flat = believing(
            case,
            features=jnp.tile(jnp.float32(row), (24, 1)),
            labelled_information=jnp.zeros((5, 5)),
            labelled_features=jnp.zeros((5, 2, 5)),
        )
        assert call(name, flat).status in (Status.SINGULAR, Status.UNINFORMATIVE)


@pytest.mark.parametrize("name", ["xtx", "dopt", "pa_dopt", "greedy_dopt"])
def test_fewer_pairs_than_features(name):
    """M <= F: every pair has leverage one, so ranks are noise; the batch is distinct, complete and finite."""
    alive = np.isin(np.arange(24), [0, 1, 2, 3])
    case = make_case("within", eligible=alive)
    assert len(list_pairs(case.space)) == 5  # (0, 1) is labelled
    case = believing(case, labelled_information=jnp.zeros((5, 5)))
    check_batch(call(name, case), case.space, BATCH)
    if name != "greedy_dopt":
        case = make_case("cross", eligible=np.isin(np.arange(24), [0, 4, 8]))  # three pairs, of rank two
        leverage = call(name, believing(case, labelled_information=jnp.zeros((5, 5)))).gains
        np.testing.assert_allclose(leverage.sum(), 2, atol=1e-3)


@pytest.mark.parametrize("name", ["xtx", "dopt", "pa_dopt", "entropy", "max_diff"])
def test_a_copy_of_a_response_leaves_scores_alone_but_for_the_pool(name):
    """A copy scores as its original: one-shot rules ignore that one of the two is enough."""
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


def furthest(key, hparams, belief, space, k):
    return top_pairs(lambda margin, _: jnp.abs(margin), belief.rewards, None, space, k)


def mirrored(key, hparams, belief, space, k):
    best = furthest(key, hparams, belief, space, k)
    return dataclasses.replace(best, pairs=best.pairs[:, ::-1])


def repeats(key, hparams, belief, space, k):
    best = furthest(key, hparams, belief, space, k)
    return dataclasses.replace(best, pairs=best.pairs.at[1].set(best.pairs[0]))


def repeats_labels(key, hparams, belief, space, k):
    nothing = jnp.full_like(space.excluded, space.eligible.shape[0])
    return furthest(key, hparams, belief, dataclasses.replace(space, excluded=nothing), k)


def looks_at_order(key, hparams, belief, space, k):
    places = jnp.arange(belief.rewards.shape[0], dtype=jnp.float32)
    return top_pairs(lambda margin, _: -jnp.abs(margin), places**1.5, None, space, k)


def swallows_nan(key, hparams, belief, space, k):
    rewards = jnp.nan_to_num(belief.rewards)
    return top_pairs(lambda margin, _: -jnp.abs(margin), rewards, None, space, k)


def looks_at_the_level(key, hparams, belief, space, k):
    return top_pairs(lambda margin, _: -jnp.abs(margin), belief.rewards**2, None, space, k)


def half_precision(key, hparams, belief, space, k):
    best = furthest(key, hparams, belief, space, k)
    return dataclasses.replace(best, gains=best.gains.astype(jnp.float16))


def worst_first(key, hparams, belief, space, k):
    best = furthest(key, hparams, belief, space, k)
    return Selection(best.pairs[::-1], best.gains[::-1], best.valid, best.status)


def no_number(key, hparams, belief, space, k):
    return top_pairs(lambda margin, _: jnp.log(margin), belief.rewards, None, space, k)


@pytest.mark.parametrize(
    ("rule", "check", "complaint"),
    [
        (no_number, "batch", "not a number"),
        (mirrored, "batch", "not in the space"),
        (repeats, "batch", "picked twice"),
        (repeats_labels, "batch", "not in the space|wanted"),
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


def old_order(key, belief, space, k, hparams):
    return top_pairs(lambda margin, _: margin, belief.rewards, None, space, k)


def pairs_as_text(key, hparams, belief, space, k):
    batch = top_pairs(lambda margin, _: margin, belief.rewards, None, space, k)
    return dataclasses.replace(batch, pairs="0, 1")


def test_arguments_and_results_of_another_kind_are_named():
    for use in (check_rule, get_rule):
        with pytest.raises(
            JarmError, match=r"'old_order' takes `belief` too early: the order is \(key, hparams, belief"
        ):
            use(old_order)
    case = make_case("within")
    batch = pairs_as_text(None, case.hparams, case.belief, case.space, 2)
    with pytest.raises(JarmError, match="Rule 'mine' returned pairs as a str: return an array of"):
        check_selection(batch, case.space, 2, "mine")

    def count_last(key, hparams, belief, space, count):
        return top_pairs(lambda margin, _: -jnp.abs(margin), belief.rewards, None, space, count)

    check_rule(count_last, spaces=("listed",), checks=("batch",))


def test_an_unknown_rule_is_answered_with_the_nearest_name():
    assert get_rule("dopt") is RULES["dopt"].rule
    assert get_rule(no_number) is no_number
    with pytest.raises(JarmError, match="no rule 'greedy_dop': did you mean 'greedy_dopt'"):
        get_rule("greedy_dop")
    with pytest.raises(JarmError, match="no rule 'zzz': choose from random, "):
        get_rule("zzz")


@pytest.mark.slow
def test_a_rule_of_a_file(tmp_path):
    path = tmp_path / "mine.py"
    lines = [
        "from __future__ import annotations",
        "import dataclasses",
        "from jarm.acquisition.uncertainty import entropy",
        "@dataclasses.dataclass",
        "class Settings:",
        "    scale: float = 1.0",
        "def mine(*args, **kw):",
        "    return entropy(*args, **kw)",
        "def raises(key, hparams, belief, space, k):",
        "    return 1 if belief.rewards.mean() > 0 else 2",
        "def few(key, belief):",
        "    return None",
        "def three(a, b, c):",
        "    return None",
        "def empty(*args):",
        "    return [args]",
        "def old(key, belief, space, k, hparams):",
        "    return entropy(key, hparams, belief, space, k)",
    ]
    path.write_text("\n".join(lines))
    rule = get_rule(f"{path}:mine")
    assert rule is get_rule(f"{path}:mine")
    check_rule(rule, spaces=("within",), checks=("batch",))
    for name, complaint in (
        ("raises", "raises TracerBoolConversionError"),
        ("few", r"takes `belief` too early: the order is \(key, hparams, belief, space, k\)"),
        ("three", r"takes 3 arguments, \(a, b, c\), and a rule is called with \(key, hparams, belief, space, k\)"),
        ("empty", "returned list, not a jarm.Selection"),
    ):
        with pytest.raises(JarmError, match=f"Rule '{name}' of .*mine.py {complaint}"):
            check_rule(get_rule(f"{path}:{name}"), spaces=("within",), checks=("batch",))
    with pytest.raises(JarmError, match=r"mine\.py has no function 'other'; it has Settings, empty, few, mine, old"):
        get_rule(f"{path}:other")
    with pytest.raises(JarmError, match=r"Rule 'old' .* the order is \(key, hparams, belief, space, k\)"):
        get_rule(f"{path}:old")
    with pytest.raises(JarmError, match=r"There is no file .*yours\.py to take a rule from"):
        get_rule(f"{tmp_path}/yours.py:mine")
    for text, error in (("import nowhere_at_all", "ModuleNotFoundError"), ("raise SystemExit(3)", "SystemExit: 3")):
        broken = tmp_path / f"broken{len(text)}.py"
        broken.write_text(text)
        with pytest.raises(JarmError, match=rf"broken\d+\.py does not run: {error}"):
            get_rule(f"{broken}:mine")
