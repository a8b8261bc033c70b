"""Each criterion against its definition in float64; what rises and what falls; bounds that hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import bald64, d_optimal64, epig64, fisher64, mutual_information64, v_optimal64

from jarm.design.criteria import BALD, D_OPTIMAL, D_UNWEIGHTED, Numbers, a_optimal, epig, v_optimal
from jarm.design.mutual_information import LOGISTIC_MASSES, LOGISTIC_SCALES, mutual_information
from jarm.testing.tracing import quick_jit

F, G, N = 4, 6, 12


def criteria(targets, margins):
    few = targets[: F - 1]
    own, own_few, own_margins = (jnp.asarray(each, jnp.float32) for each in (targets, few, margins))
    return {
        "d": (D_OPTIMAL, d_optimal64()),
        "unweighted": (D_UNWEIGHTED, d_optimal64(weighted=False)),
        "a": (a_optimal(F), v_optimal64(np.eye(F), np.ones(F))),
        "v few": (v_optimal(own_few), v_optimal64(few, np.full(F - 1, 1 / (F - 1)))),
        "v many": (v_optimal(own, jnp.arange(1.0, 1.0 + G)), v_optimal64(targets, np.arange(1.0, 1.0 + G))),
        "epig": (epig(own, own_margins), epig64(targets, margins)),
        "bald": (BALD, bald64()),
    }


NAMES = ("d", "unweighted", "a", "v few", "v many", "epig", "bald")


def whitened(criterion, features, rewards, information):
    """What a pass knows of responses, by NumPy in float64, then rounded."""
    inverse = np.linalg.inv(np.linalg.cholesky(information))
    targets = np.zeros((0, F)) if criterion.targets is None else np.float64(criterion.targets)
    y, z = features @ inverse.T, targets @ inverse.T
    rounded = (jnp.asarray(each, jnp.float32) for each in (rewards, y, y @ z.T))
    return Numbers(*rounded), jnp.asarray((z**2).sum(axis=1), jnp.float32)


@quick_jit
def matrix_of_pairs(scorer_stats, h, criterion):
    """The gain of each response with each, by `pair`, and what `tile` makes of them."""
    scorer = criterion.scorer(scorer_stats, h, gains=True)
    pairs = jax.vmap(jax.vmap(scorer.pair, in_axes=(None, 0)), in_axes=(0, None))(scorer.stats, scorer.stats)
    return pairs, scorer.tile(scorer.stats, scorer.stats)


@pytest.mark.parametrize("name", NAMES)
def test_gains_are_their_definitions_and_tiles_are_their_pairs(name):
    """Priors small and large, rewards near and 200 apart (where weights have no factors)."""
    first, second = np.triu_indices(N, 1)
    for seed in range(12):
        rng = np.random.default_rng(seed)
        features, rewards = rng.normal(size=(N, F)), rng.normal(size=N) * [0.1, 1, 4][seed % 3]
        rewards[0] += 200 * (seed % 2)
        targets, margins = rng.normal(size=(G, F)).astype(np.float32), rng.normal(size=G).astype(np.float32)
        root = rng.normal(size=(F, F))
        information = 10 ** rng.uniform(-3, 3) * (root @ root.T + 0.3 * np.eye(F))
        criterion, reference = criteria(targets, margins)[name]
        pairs, tile = matrix_of_pairs(*whitened(criterion, features, rewards, information), criterion)
        expected = reference.gains(information, features[first] - features[second], rewards[first] - rewards[second])
        floor = 2e-7 if name in ("bald", "epig") else 1e-6 * expected.max()
        np.testing.assert_allclose(np.asarray(pairs)[first, second], expected, rtol=2e-5, atol=floor)
        np.testing.assert_allclose(np.asarray(tile)[first, second], expected, rtol=2e-5, atol=5 * floor)
        np.testing.assert_allclose(pairs, pairs.T, rtol=1e-5, atol=floor)


def test_small_information_about_targets_keeps_its_digits():
    """Correlations of 1e-4 and of all but 1: a product of 1 - rho^2 alone would round the first away."""
    rng = np.random.default_rng(0)
    targets, margins = rng.normal(size=(G, F)).astype(np.float32), np.zeros(G, np.float32)
    features, rewards = rng.normal(size=(N, F)), np.zeros(N)
    first, second = np.triu_indices(N, 1)
    features[1] = features[0] + targets[0]
    for prior, rtol in ((1e7, 1e-5), (1e-4, 1e-4)):
        criterion, reference = criteria(targets, margins)["epig"]
        pairs, _ = matrix_of_pairs(*whitened(criterion, features, rewards, prior * np.eye(F)), criterion)
        expected = reference.gains(prior * np.eye(F), features[first] - features[second], np.zeros(len(first)))
        np.testing.assert_allclose(np.asarray(pairs)[first, second], expected, rtol=rtol)


def test_epig_is_v_optimal_to_first_order():
    """Of a strong prior: with weights v_t / (2 T (1 + v_t h_t))."""
    rng = np.random.default_rng(1)
    targets, margins = rng.normal(size=(G, F)), rng.normal(size=G)
    x, pair_margins = rng.normal(size=(20, F)), rng.normal(size=20)
    information = 1e5 * np.eye(F)
    weights = fisher64(margins) / (2 * G * (1 + fisher64(margins) * (targets**2).sum(axis=1) / 1e5))
    ours = epig64(targets, margins).gains(information, x, pair_margins)
    np.testing.assert_allclose(ours, v_optimal64(targets, weights).gains(information, x, pair_margins), rtol=1e-4)


MARGINS = np.array([0, 0.01, 0.1, 0.3, 0.5, 1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 30, 60, 100, 300], np.float32)
VARIANCES = np.concatenate([[0], 10 ** np.arange(-8, 4.01, 0.125), [0.4999, 0.5, 0.5001]]).astype(np.float32)
VARIANCES.sort()


@pytest.mark.slow
def test_mutual_information_against_a_dense_quadrature():
    """1e-6 of the value up to a variance of 1/2, 2e-7 nats above: float32, quadrature and mixture together."""
    margins, variances = np.meshgrid(MARGINS, VARIANCES)
    ours = np.asarray(mutual_information(jnp.asarray(margins), jnp.asarray(variances)), np.float64)
    # Row by row, for a step that suits the variance.
    exact = np.stack([mutual_information64(MARGINS, np.full(len(MARGINS), q, np.float64)) for q in VARIANCES])
    error = np.abs(ours - exact)
    assert (ours >= -1e-7).all()
    assert (ours <= np.log(2) + 1e-6).all()
    # The reference itself has 1e-16 of a logarithm, so of margins it resolves no less than this.
    near = (variances <= 0.5) & (exact > 1e-9)
    assert (error[near] <= 1e-6 * exact[near]).all(), (error / exact)[near].max()
    assert error.max() <= 2e-7, error.max()
    np.testing.assert_allclose(ours[0], 0, atol=0)
    # Half the Fisher weight times the variance, while that is small.
    small = np.asarray(mutual_information(jnp.asarray(MARGINS[:13]), jnp.full(13, 1e-6)))
    np.testing.assert_allclose(small, fisher64(np.float64(MARGINS[:13])) * 5e-7, rtol=2e-6)


def test_mutual_information_rises_with_the_variance():
    """So that BALD gains never rise as a batch grows: in float64 everywhere, in float32 but for rounding (2e-7 nats).

    Near proof: dI/dq has the sign of E_w[(t - m)(t - logit E p)], w the density proportional to v(t) N(t; m, q).
    """
    margins = np.concatenate([np.arange(0, 12, 0.25), np.arange(12, 30.1, 2)])
    variances = 10 ** np.arange(-4, 4.001, 0.05)
    exact = np.stack([mutual_information64(margins, np.full(len(margins), q)) for q in variances])
    rises = np.diff(exact, axis=0)
    assert (rises > -1e-15).all()
    assert (rises[exact[1:] > 1e-9] > 0).all()
    ours = np.asarray(mutual_information(*(jnp.asarray(a, jnp.float32) for a in np.meshgrid(margins, variances))))
    fall = np.maximum.accumulate(ours, axis=0) - ours
    assert fall.max() <= 2e-7, fall.max()
    near = variances <= 0.5
    assert (fall[near] <= 1e-6 * ours[near]).all()


def test_information_falls_with_the_margin():
    margins = np.arange(0, 20, 0.25)
    for q in (1e-3, 0.1, 1, 10, 1000):
        assert (np.diff(mutual_information64(margins, np.full(len(margins), q))) < 1e-15).all()


def test_the_normal_mixture_is_the_gauss_rule_of_the_logistic_law():
    """A logistic number is normal with a standard deviation of twice a Kolmogorov number: eight points in its log."""
    x = np.linspace(np.log(0.12), np.log(5), 4001)
    k, j = np.exp(x), np.arange(1, 60)[:, None]
    odd = (2 * j - 1) ** 2 * np.pi**2 / 8
    low = np.sqrt(2 * np.pi) * ((2 * odd / k**4 - 1 / k**2) * np.exp(-odd / k**2)).sum(axis=0)
    high = 8 * k * ((-1.0) ** (j - 1) * j**2 * np.exp(-2 * j**2 * k**2)).sum(axis=0)
    mass = np.maximum(np.where(k < 0.8, low, high) * k, 0)
    mass /= mass.sum()
    # Moments by orthogonal polynomials: the rule is exact for those of degree up to 15.
    basis = [np.ones_like(x)]
    own_x = np.log(np.array(LOGISTIC_SCALES) / 2)
    own = [np.ones(8)]
    for _ in range(7):
        new, new_own = x * basis[-1], own_x * own[-1]
        for old, old_own in zip(basis, own, strict=True):
            share = (mass * new * old).sum() / (mass * old**2).sum()
            new, new_own = new - share * old, new_own - share * old_own
        basis.append(new)
        own.append(new_own)
    masses = np.array(LOGISTIC_MASSES)
    for a in range(8):
        for b in range(8):
            exact = (mass * basis[a] * basis[b]).sum()
            scale = np.sqrt((mass * basis[a] ** 2).sum() * (mass * basis[b] ** 2).sum())
            np.testing.assert_allclose((masses * own[a] * own[b]).sum(), exact, atol=1e-6 * scale)


@quick_jit
def ceilings(rest, z, shrunk, bound, thresholds):
    """Of several thresholds."""
    return jax.vmap(lambda each: v_optimal(jnp.eye(F)).ceiling(rest, z, shrunk, bound, each))(thresholds)


def test_the_ceiling_of_v_optimal_gains_holds():
    """Against pairs that are as bad as they may be, and mostly by less than a factor of 1.5."""
    spare = [least / most for least, most in map(least_ceiling_and_attack, range(30))]
    assert np.min(spare) >= 1 - 1e-5, spare
    assert np.median(spare) < 1.5, spare


def least_ceiling_and_attack(seed):
    """The least bound that is certified, and the most that a pair attains: the longest pairs allowed, then climbing."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(F, F)) * 10 ** rng.uniform(-1, 1, F)[:, None]
    bound = 10 ** rng.uniform(-2, 2)
    picks = rng.normal(size=(rng.integers(1, 6), F))
    picks *= np.sqrt(bound * rng.uniform(0.3, 1, len(picks)) / (picks**2).sum(axis=1))[:, None]
    left = np.linalg.inv(np.eye(F) + picks.T @ picks)
    worths = ((picks @ z.T) ** 2).sum(axis=1) / (1 + (picks**2).sum(axis=1))
    rest = worths.max() * rng.uniform(0.1, 1)

    def longest(u):
        """The largest multiple of each vector that was worth no more than `rest`, and is not too far."""
        unit = u / np.sqrt((u**2).sum(axis=1))[:, None]
        along = ((unit @ z.T) ** 2).sum(axis=1)
        square = np.where(along > rest, rest / np.maximum(along - rest, 1e-300), np.inf)
        return np.sqrt(np.minimum(square, bound))[:, None] * unit

    def now(u):
        return ((u @ left @ z.T) ** 2).sum(axis=1) / (1 + ((u @ left) * u).sum(axis=1))

    u = longest(rng.normal(size=(4000, F)))
    for step in 0.5 ** np.arange(12):
        u = u[np.argsort(-now(u))[:100]]
        u = longest(np.concatenate([u, np.repeat(u, 20, axis=0) + step * rng.normal(size=(2000, F)) * np.sqrt(bound)]))
    thresholds = rest * 10 ** np.linspace(0, 3, 121)
    arrays = (jnp.asarray(each, jnp.float32) for each in (rest, z, np.eye(F) - left, bound, thresholds))
    certified = np.isfinite(np.asarray(ceilings(*arrays)))
    assert certified[-1]
    assert (np.diff(certified.astype(int)) >= 0).all()
    # A ceiling below `rest` is not looked for.
    return thresholds[certified].min(), max(now(u).max(), rest)
