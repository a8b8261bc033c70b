"""What is compiled, how often, and how much memory the compiled programs take (XLA's own figure)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jarm.core.base import HParams
from jarm.design.criteria import D_OPTIMAL
from jarm.design.fisher import fisher_weight, space_information
from jarm.design.greedy import greedy
from jarm.design.spaces import pair_space, sample_pairs, subset
from jarm.design.top import top_pairs
from jarm.testing.conformance import make_case
from jarm.testing.tracing import count_compilations, count_traces

MIB = 1 << 20
N, WIDTH, F = 3000, 10, 64
TILE = 1 << 16  # 0.25 MiB for each float32 array over a tile

# 3,000 responses across prompts are 4.5 million pairs: 17 MiB for one number a pair, 34 for a 3,000 x 3,000 array, 1.1
# GiB for their features. A program needs instead, about: two copies of the features (0.73 MiB each) and six arrays
# over a tile (0.25 MiB each) or, for the best pairs, the scores of two blocks (1 MiB each) and the maxima of 21 (1.3
# MiB). Greedy has the shortlist beside it: 1,536 pairs x 64 features, 0.4 MiB, four times, and what orders it.
BUDGETS = {"information": 4 * MIB, "best": 5 * MIB, "batch": 8 * MIB}


def temporaries(function, *args):
    return jax.jit(function).lower(*args).compile().memory_analysis().temp_size_in_bytes


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    features = jnp.asarray(rng.normal(size=(N, F)), jnp.float32)
    space = pair_space("cross", WIDTH, jnp.ones(N, bool), jnp.zeros((500, 2), jnp.int32))
    return features, features[:, 0], space


def best(features, rewards, space):
    score = lambda margin, distance: fisher_weight(margin) * distance  # noqa: E731
    return top_pairs(score, rewards, features, space, 256, whiten=jnp.eye(F), tile=TILE)


def information(features, rewards, space):
    return space_information(features, rewards, space, tile=TILE)


def batch(features, rewards, space):
    return greedy(D_OPTIMAL, features, rewards, space, jnp.eye(F), 256, tile=TILE)


@pytest.mark.slow
@pytest.mark.parametrize("program", [best, information, batch])
def test_scoring_every_pair_takes_the_memory_of_a_tile(program, problem):
    assert temporaries(program, *problem) < BUDGETS[program.__name__]


@pytest.mark.slow
def test_exact_greedy_over_200_million_pairs_takes_30_megabytes():
    """One number a pair would be 763 MiB; the features, of which there are four copies, are 4.9."""
    size = 20_000
    space = pair_space("all", WIDTH, jnp.ones(size, bool))
    features, rewards = jax.ShapeDtypeStruct((size, F), jnp.float32), jax.ShapeDtypeStruct((size,), jnp.float32)
    assert temporaries(batch, features, rewards, space) < 30 * MIB


@pytest.mark.slow
def test_twice_the_responses_take_no_more_than_twice_the_memory(problem):
    features, rewards, _ = problem
    half = pair_space("cross", WIDTH, jnp.ones(N // 2, bool), jnp.zeros((500, 2), jnp.int32))
    small = temporaries(best, features[: N // 2], rewards[: N // 2], half)
    assert temporaries(best, *problem) <= 2 * small


def test_within_prompts_no_matrix_a_prompt_is_held(problem):
    features, rewards, _ = problem
    space = pair_space("within", WIDTH, jnp.ones(N, bool), jnp.zeros((500, 2), jnp.int32))
    # An F x F matrix for each of 300 prompts would be 4.7 MiB alone.
    assert temporaries(information, features, rewards, space) < 4.5 * MIB


def test_drawing_pairs_takes_memory_for_those_drawn(problem):
    _, _, space = problem
    # 2,000 pairs: 4,064 draws a time, beside what was found, sorted by three keys: under forty arrays of 6,064 int32.
    assert temporaries(lambda key: sample_pairs(key, space, 2000), jax.random.key(0)) < MIB
    assert temporaries(lambda key: subset(key, space, 2000), jax.random.key(0)) < MIB


@pytest.mark.parametrize("kind", ["within", "listed"])
def test_engines_compile_once_for_all_values(kind):
    """Other features, priors, masks and exclusions of the same shapes: nothing is traced or compiled again."""
    run, traces = count_traces(functools.partial(greedy, D_OPTIMAL))
    engine = jax.jit(functools.partial(run, k=6, shortlist=1))
    first, second = (make_case(kind, seed) for seed in (0, 1))
    priors = jnp.eye(5), 3 * jnp.eye(5)
    jax.block_until_ready(engine(first.belief.features, first.belief.rewards, first.space, priors[0]))
    assert len(traces) == 1
    with count_compilations() as compiled:
        jax.block_until_ready(engine(second.belief.features, second.belief.rewards, second.space, priors[1]))
    assert not compiled
    assert len(traces) == 1


def test_the_counters_count():
    run, traces = count_traces(lambda x: x + 1)
    jitted = jax.jit(run)
    with count_compilations() as compiled:
        jitted(np.float32(1))
        jitted(np.float32(2))
    assert len(compiled) == len(traces) == 1
    with count_compilations() as compiled:
        jitted(np.ones(2, np.float32))
    assert len(compiled) == 1
    assert len(traces) == 2


def test_hparams_are_traced_leaves():
    leaves = jax.tree.leaves(HParams())
    assert len(leaves) == len(HParams.__dataclass_fields__)
