import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jarm.core.status import JarmError
from jarm.evaluation.annotators import AnnotatorConfig, annotate, preference, reward_scale, solve_noise

pytestmark = pytest.mark.core

N = 400
RNG = np.random.default_rng(0)
GOLD = RNG.normal(size=N).astype(np.float32)
LENGTHS = RNG.normal(size=N).astype(np.float32)
FIRST, SECOND = RNG.permutation(np.stack(np.triu_indices(N, 1)), axis=1)[:, :6000]
PAIRS = np.stack([FIRST, SECOND], axis=1).astype(np.int32)
GAP = np.float64(GOLD)[FIRST] - GOLD[SECOND]
LONGER = np.float64(LENGTHS)[FIRST] - LENGTHS[SECOND]


@functools.partial(jax.jit, static_argnums=1)
def ask(key, config, noise, pairs, gold, lengths):
    return annotate(key, config, noise, pairs, gold, lengths)


def answers(config, noise=1.0, seed=0, pairs=PAIRS, gold=GOLD, lengths=LENGTHS):
    labels, wrong = ask(jax.random.key(seed), config, jnp.float32(noise), jnp.asarray(pairs), gold, lengths)
    assert (labels.dtype, wrong.dtype) == (jnp.float32, bool)
    return np.asarray(labels), np.asarray(wrong)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.float64(x)))


@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0, 10.0])
def test_bradley_terry_errs_as_often_as_its_formula_says(noise):
    labels, wrong = answers(AnnotatorConfig(), noise)
    chance = sigmoid(-noise * np.abs(GAP))
    error = np.sqrt((chance * (1 - chance)).sum())
    assert abs(wrong.sum() - chance.sum()) < 4 * error
    np.testing.assert_array_equal(wrong, (labels == 1) != (GAP > 0))
    # Near ties err more than clear cases: by the formula in each quarter of the gaps.
    for quarter in np.array_split(np.argsort(np.abs(GAP)), 4):
        own = chance[quarter]
        assert abs(wrong[quarter].sum() - own.sum()) < 4 * np.sqrt((own * (1 - own)).sum()) + 1e-9


@pytest.mark.parametrize("noise", [-1.0, np.inf])
@pytest.mark.parametrize("kind", ["perfect", "bradley_terry"])
def test_without_noise_the_larger_gold_wins(kind, noise):
    labels, wrong = answers(AnnotatorConfig(kind), noise)
    np.testing.assert_array_equal(labels, GAP > 0)
    assert not wrong.any()


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.4])
def test_flips_do_not_look_at_the_gap(rate):
    _, wrong = answers(AnnotatorConfig("flip", flip_rate=rate))
    for half in np.array_split(np.argsort(np.abs(GAP)), 2):
        assert abs(wrong[half].mean() - rate) <= 4 * np.sqrt(rate * (1 - rate) / len(half))


def test_length_bias():
    config = AnnotatorConfig(length_bias=0.7)
    labels, _ = answers(config, 0.5)
    chance = sigmoid(0.5 * GAP + 0.7 * LONGER)
    assert abs(labels.sum() - chance.sum()) < 4 * np.sqrt((chance * (1 - chance)).sum())
    labels, wrong = answers(AnnotatorConfig("perfect", length_bias=0.7))
    np.testing.assert_array_equal(labels, GAP + 0.7 * LONGER > 0)
    np.testing.assert_array_equal(wrong, (GAP + 0.7 * LONGER > 0) != (GAP > 0))  # wrong by gold, whatever the reason


def test_one_key_has_one_opinion_of_each_pair():
    config = AnnotatorConfig()
    labels, wrong = answers(config, 0.5)
    again, _ = answers(config, 0.5)
    np.testing.assert_array_equal(labels, again)
    # In any order, in any batch, and either way round.
    shuffle = np.random.default_rng(1).permutation(len(PAIRS))
    shuffled, _ = answers(config, 0.5, pairs=PAIRS[shuffle])
    np.testing.assert_array_equal(shuffled, labels[shuffle])
    mirror, wrong_mirror = answers(config, 0.5, pairs=PAIRS[:, ::-1])
    np.testing.assert_array_equal(mirror, 1 - labels)
    np.testing.assert_array_equal(wrong_mirror, wrong)
    # Another key is another annotator: opinions agree as often as two independent draws do.
    other, _ = answers(config, 0.5, seed=1)
    chance = sigmoid(0.5 * GAP)
    agree = chance**2 + (1 - chance) ** 2
    assert abs((other == labels).sum() - agree.sum()) < 4 * np.sqrt((agree * (1 - agree)).sum())


def test_less_noise_only_corrects_answers():
    """Opinions are fixed, so an annotator with less noise errs on fewer of the same pairs, and on no other."""
    wrong = [answers(AnnotatorConfig(), noise)[1] for noise in (0.2, 1.0, 5.0)]
    assert (wrong[0] >= wrong[1]).all()
    assert (wrong[1] >= wrong[2]).all()


@pytest.mark.parametrize("kind", ["perfect", "flip", "bradley_terry"])
def test_ties_are_a_coin_and_half_of_them_wrong(kind):
    config = AnnotatorConfig(kind, flip_rate=0.2 if kind == "flip" else None)
    labels, wrong = answers(config, gold=np.zeros(N, np.float32))
    for share in (labels.mean(), wrong.mean()):
        assert abs(share - 0.5) < 4 * np.sqrt(0.25 / len(PAIRS))


def test_preference_is_a_probability_even_at_huge_gaps():
    gap = jnp.float32([-1e6, -200, 0, 200, 1e6])
    for config in (AnnotatorConfig(), AnnotatorConfig("perfect"), AnnotatorConfig("flip", flip_rate=0.0)):
        np.testing.assert_allclose(preference(config, jnp.float32(3), gap, jnp.zeros(5)), [0, 0, 0.5, 1, 1], atol=1e-30)


@pytest.mark.parametrize("pairs", ["cross", "all"])
def test_the_solved_noise_is_for_the_pairs_that_are_asked_about(pairs):
    """Prompt offsets make pairs across prompts easier, so that they need more noise for as many errors."""
    rng = np.random.default_rng(3)
    gold = (rng.normal(size=(30, 6)) + rng.normal(size=(30, 1)) * 9).astype(np.float32)
    mask = rng.random((30, 6)) < 0.8
    noise = solve_noise(0.2, gold, mask, 1.0, pairs=pairs)
    flat, real, prompt = np.float64(gold).reshape(-1), mask.reshape(-1), np.arange(180) // 6
    first, second = np.triu_indices(180, 1)
    keep = real[first] & real[second] & ((prompt[first] != prompt[second]) | (pairs == "all"))
    chance = sigmoid(-noise * np.abs(flat[first] - flat[second])[keep])
    assert abs(chance.mean() - 0.2) < 0.01
    assert noise < solve_noise(0.2, gold, mask, 1.0)


@pytest.mark.parametrize("rate", [0.02, 0.25, 0.45])
@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_the_solved_noise_gives_the_wanted_error(rate, scale):
    """On all pairs within prompts, ragged ones included, and as the annotator then really errs."""
    rng = np.random.default_rng(3)
    gold = (rng.normal(size=(60, 10)) * rng.gamma(2, size=(60, 1)) + rng.normal(size=(60, 1)) * 9).astype(np.float32)
    mask = rng.random((60, 10)) < 0.8
    noise = solve_noise(rate, gold, mask, scale)
    first, second = np.triu_indices(10, 1)
    both = mask[:, first] & mask[:, second]
    gap = np.abs(np.float64(gold)[:, first] - gold[:, second])[both] / scale
    chance = sigmoid(-noise * gap)
    assert abs(chance.mean() - rate) < 0.01
    ends = np.stack([np.arange(60)[:, None] * 10 + first, np.arange(60)[:, None] * 10 + second], axis=-1)[both]
    _, wrong = answers(
        AnnotatorConfig(flip_rate=rate), noise, pairs=ends.astype(np.int32), gold=jnp.asarray(gold.reshape(-1) / scale),
        lengths=jnp.zeros(600),
    )  # fmt: skip
    assert abs(wrong.mean() - rate) < 0.01 + 4 * np.sqrt(rate / len(ends))


def test_reward_scale():
    gold, mask = np.array([[1.0, 3.0], [5.0, 1e9]], np.float32), np.array([[True, True], [True, False]])
    assert reward_scale(AnnotatorConfig(), gold, mask) == pytest.approx(np.std([1, 3, 5]))
    assert reward_scale(AnnotatorConfig(scale=6.0), gold, mask) == 6.0
    tiny = np.array([[1.0, 3.0], [5.0, 7.0]]) * 1e-300  # their squares are 0
    assert reward_scale(AnnotatorConfig(), tiny, mask) == pytest.approx(np.std([1, 3, 5]) * 1e-300, rel=1e-12, abs=0)
    with pytest.raises(JarmError, match="All gold rewards are equal"):
        reward_scale(AnnotatorConfig(), np.ones((2, 2), np.float32), mask)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"kind": "bradley"}, "no annotator 'bradley'"),
        ({"kind": "flip"}, "needs a share of wrong answers"),
        ({"flip_rate": 0.5}, r"not in \[0, 0.5\)"),
        ({"flip_rate": -0.1}, r"not in \[0, 0.5\)"),
        ({"scale": "sd"}, "neither 'std' nor a positive number"),
        ({"scale": 0.0}, "not a positive number"),
        ({"scale": -1.0}, "not a positive number"),
        ({"scale": float("nan")}, "scale is nan: give a finite number"),
        ({"length_bias": float("nan")}, "length_bias is nan: give a finite number"),
        ({"column": ""}, "column is empty: give text"),
    ],
)
def test_bad_annotators_are_named(settings, complaint):
    with pytest.raises(JarmError, match=complaint):
        AnnotatorConfig(**settings)


def test_a_rate_that_no_noise_reaches_is_named():
    gold, mask = np.ones((3, 4), np.float32), np.ones((3, 4), bool)
    with pytest.raises(JarmError, match="cannot be reached"):
        solve_noise(0.5, gold, mask, 1.0)
    with pytest.raises(JarmError, match="gold rewards are equal in every pair"):
        solve_noise(0.2, gold, mask, 1.0)
    with pytest.raises(JarmError, match="values of 'help' are equal in every pair"):
        solve_noise(0.2, gold, mask, 1.0, column="help")
