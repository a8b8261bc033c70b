"""Settings of a process change no answer: kinds of keys, widths of numbers, promotion of types."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jarm
from jarm.core.base import HParams
from jarm.core.settings import KEYS, as_key, make_key, narrowed
from jarm.core.status import JarmError
from jarm.core.tables import ResponseTable
from jarm.evaluation.annotators import AnnotatorConfig, annotate
from jarm.loop.config import LoopConfig
from jarm.loop.device_table import prepare
from jarm.loop.loop import make_loop
from jarm.reward.config import FitConfig, HeadConfig
from jarm.testing.conformance import make_case
from jarm.testing.tracing import quick_jit

pytestmark = pytest.mark.core
OTHERS = ("rbg", "unsafe_rbg")


@contextlib.contextmanager
def other_settings():
    """The three at once: what passes under all of them passes under each."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), jax.default_prng_impl("rbg"):
        yield


def words(key):
    return jax.random.key_data(key).tolist()


def kinds_of(seed):
    """Keys of a seed as users have them."""
    raw = [jax.random.key_data(jax.random.key(seed, impl=kind)) for kind in (KEYS, *OTHERS)]
    return [jax.random.key(seed, impl=kind) for kind in OTHERS] + raw + [np.asarray(raw[0]), np.asarray(raw[1])]


def test_key_of_any_kind_is_that_of_its_seed():
    expected = words(jax.random.key(7, impl=KEYS))
    assert [words(as_key(key)) for key in kinds_of(7)] == [expected] * 7
    with jax.default_prng_impl("rbg"):
        assert words(make_key(7)) == expected
        assert words(as_key(jax.random.key(7))) == expected
    # Keys that `rbg` splits are those that its first half would be split into.
    parts = jax.random.split(jax.random.key(7, impl="rbg"), 3)
    assert words(jax.vmap(as_key)(parts)) == words(jax.random.split(jax.random.key(7, impl=KEYS), 3))


def test_every_word_of_a_key_counts():
    data = np.array([1, 2, 3, 4], np.uint32)
    seen = {tuple(words(as_key(data + (np.arange(4) == place).astype(np.uint32)))) for place in (0, 1, 2, 3, 4)}
    assert len(seen) == 5


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (3, "is an int"),
        (None, "is a NoneType"),
        (np.zeros(2), "is a ndarray"),
        (np.zeros(3, np.uint32), r"has \(3,\) words"),
        (jnp.zeros((5, 2), jnp.uint32), r"has \(5, 2\) words"),
    ],
)
def test_no_key_is_refused(key, said):
    with pytest.raises(JarmError, match=rf"`key` {said}.*jax\.random\.key\(seed\)"):
        as_key(key)


def test_several_keys_are_refused():
    with pytest.raises(JarmError, match=r"holds keys of shape \(4,\), not one"):
        as_key(jax.random.split(make_key(0), 4))


def test_other_draws_of_a_key_are_refused():
    with jax.threefry_partitionable(False), pytest.raises(JarmError, match="jax_threefry_partitionable` is off"):
        as_key(make_key(0))


@pytest.mark.parametrize("kind", OTHERS)
def test_answer_to_a_pair_is_the_same_in_any_batch(kind):
    """A toss-up is answered by the key and the pair alone, whichever pairs are beside it."""
    pairs, equal = (
        jnp.stack([jnp.arange(24, dtype=jnp.int32), jnp.arange(1, 25, dtype=jnp.int32)], axis=1),
        jnp.zeros(25),
    )
    ask = functools.partial(annotate, config=AnnotatorConfig(), noise=jnp.float32(1), gold=equal, lengths=equal)
    together = ask(jax.random.key(5, impl=kind), pairs=pairs)[0]
    assert 0 < together.sum() < 24
    for batch in (pairs[::-1], pairs[7:10], pairs[20:]):
        labels = ask(jax.random.key(5, impl=kind), pairs=batch)[0]
        assert labels.tolist() == together[batch[:, 0]].tolist()
    assert together.tolist() == ask(jax.random.key(5, impl=KEYS), pairs=pairs)[0].tolist()


def test_rule_takes_keys_of_any_kind_and_plain_numbers():
    case = make_case("listed")
    rule = quick_jit(jarm.get_rule("random"), static_argnames="k")
    batches = [
        rule(key, HParams(), case.belief, case.space, k=4).pairs.tolist() for key in (make_key(3), *kinds_of(3)[:3])
    ]
    assert batches == batches[:1] * 4


def make_table():
    rng = np.random.default_rng(0)
    store, gold = rng.normal(size=(20, 3)).astype(np.float32), rng.normal(size=(5, 4)).astype(np.float32)
    return ResponseTable(store, np.arange(20).reshape(5, 4), np.ones((5, 4), bool), gold)


@pytest.mark.slow
@pytest.mark.nightly
def test_run_is_the_same_under_other_settings():
    """A loop with random draws, Adam, a user's rule of 64-bit results and keys of the default kind: equal records."""

    def farthest(key, hparams, belief, space, k):
        order = jnp.argsort(-jnp.abs(belief.features[space.pairs[:, 0], 0] - belief.features[space.pairs[:, 1], 0]))[:k]
        return jarm.Selection(space.pairs[order], jnp.zeros(k), jnp.ones(k, bool), jnp.int32(0))

    config = LoopConfig(
        rules=("random", farthest),
        rounds=1,
        batch=3,
        initial=6,
        candidates=9,
        head=HeadConfig((3,)),
        fit=FitConfig(members=2, steps=12),
    )

    def run():
        table, hparams, _ = prepare(config, make_table())
        jitted = quick_jit(make_loop(config).run)
        return [jax.device_get(jitted(jax.random.key(4), hparams, table, rule)[1]) for rule in (0, 1)]

    plain = run()
    with other_settings():
        other = run()
    assert all(int(records.status.max()) == 0 for records in plain)
    assert [leaf.dtype for leaf in jax.tree.leaves(plain)] == [leaf.dtype for leaf in jax.tree.leaves(other)]
    jax.tree.map(np.testing.assert_array_equal, plain, other)


@pytest.mark.parametrize("number", [np.float32, pytest.param(np.float64, marks=pytest.mark.slow)])
def test_select_is_the_same_under_other_settings(number):
    rng = np.random.default_rng(1)
    features, rewards = rng.normal(size=(8, 2)).astype(number), rng.normal(size=8).astype(number)
    pairs = [[0, 1], [2, 3], [4, 5], [6, 7], [0, 7]]
    plain = jarm.select(features, rewards, space=pairs, k=2, bound=False)
    with other_settings():
        other = jarm.select(features, rewards, space=pairs, k=2, bound=False)
    assert other.pairs.tolist() == plain.pairs.tolist()
    assert other.gains.tolist() == plain.gains.tolist()


def test_narrowed_leaves_other_types():
    with jax.enable_x64(True):
        found = narrowed({"a": jnp.arange(3), "b": jnp.ones(2), "c": jnp.ones(2, jnp.bfloat16), "d": 1.5, "e": None})
    assert [str(found[name].dtype) for name in "abc"] == ["int32", "float32", "bfloat16"]
    assert (found["d"], found["e"]) == (1.5, None)
