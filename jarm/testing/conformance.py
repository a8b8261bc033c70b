"""The conformance suite of acquisition rules: `check_rule` runs it on a rule of jarm or of your own."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jarm.core.base import Belief, HParams, PairSpace, Rule, Selection
from jarm.core.settings import make_key
from jarm.core.signature import check_signature, with_named_k
from jarm.core.status import Status
from jarm.core.types import PRNGKey
from jarm.design.spaces import listed_space, pair_space
from jarm.testing.references import information64, list_pairs
from jarm.testing.tracing import count_compilations, quick_jit

PROMPTS, WIDTH, FEATURES, MEMBERS, BATCH = 6, 4, 5, 4, 6
"""Sizes of the cases; WIDTH responses per prompt."""
SIZE = PROMPTS * WIDTH
SPACES = ("within", "cross", "all", "listed")
"""Kinds of pair space."""


class Case(NamedTuple):
    """Arguments of a rule, beside the key and k."""

    belief: Belief
    space: PairSpace
    hparams: HParams


def make_case(kind: str, seed: int = 0, *, eligible: np.ndarray | None = None) -> Case:
    """A small case without ties: 6 prompts of 4 responses, 5 features, 4 members, 3 labelled pairs.

    Args:
      kind: one of `SPACES`.
      seed: of the numbers.
      eligible: `[24]` bool; by default all responses but one.
    """
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(SIZE, FEATURES)).astype(np.float32)
    members = features @ rng.normal(size=(FEATURES, MEMBERS)) + 0.1 * rng.normal(size=(SIZE, MEMBERS))
    rewards = members.mean(axis=1)
    labelled = np.array([[1, 0], [4, 7], [3, 22]])
    belief = Belief(
        features=jnp.asarray(features),
        rewards=jnp.asarray(rewards, jnp.float32),
        member_rewards=jnp.asarray(members.T, jnp.float32),
        labelled_information=jnp.asarray(information64(features, rewards, labelled), jnp.float32),
        num_labelled=jnp.int32(len(labelled)),
        # With room for further labels, as in the loop.
        labelled_features=jnp.zeros((5, 2, FEATURES), jnp.float32).at[: len(labelled)].set(features[labelled]),
        labelled_rewards=jnp.zeros((5, 2), jnp.float32).at[: len(labelled)].set(rewards[labelled].astype("f4")),
    )
    allowed = jnp.asarray(np.arange(SIZE) != 9 if eligible is None else eligible)
    if kind == "listed":
        pairs = np.array(list(itertools.combinations(range(SIZE), 2)))
        space = listed_space(jnp.asarray(rng.permutation(pairs)[:60], jnp.int32), allowed, WIDTH)
    else:
        space = pair_space(kind, WIDTH, allowed, jnp.asarray(labelled, jnp.int32))
    hparams = jax.tree.map(jnp.float32, HParams(prior_mix=0.3))
    return Case(belief, space, hparams)


_jitted: Callable[..., Callable[..., Selection]] = functools.cache(lambda rule: quick_jit(rule, static_argnames="k"))


def call_rule(rule: Rule, case: Case, key: PRNGKey | None = None) -> Selection:
    """A batch of `BATCH` pairs, compiled once per rule and kind of space; the key is that of seed 0 by default."""
    key = make_key(0) if key is None else key
    return _jitted(rule)(key, case.hparams, case.belief, case.space, k=BATCH)


def _set(pairs: Any) -> set[tuple[int, int]]:
    return {(int(i), int(j)) for i, j in np.asarray(pairs)}


def _expect(holds: Any, fault: str) -> None:
    """An assertion that `python -O` keeps."""
    if not holds:
        raise AssertionError(fault)


def check_batch(selection: Selection, space: PairSpace, k: int) -> None:
    """Assert that a batch holds k distinct pairs of the space, smaller index first, or all of a smaller space.

    Raises:
      AssertionError: the first violation, in one sentence.
    """
    offered = _set(list_pairs(space))
    pairs, valid, gains = (np.asarray(field) for field in (selection.pairs, selection.valid, selection.gains))
    types = [field.dtype.name for field in (selection.pairs, selection.gains, selection.valid, selection.status)]
    _expect(types == ["int32", "float32", "bool", "int32"], f"types {types} are not those of a Selection")
    _expect((pairs.shape, gains.shape, valid.shape) == ((k, 2), (k,), (k,)), "shapes are not those of a Selection")
    _expect(int(selection.status) != Status.NONFINITE, "a score is not a number, or infinite")
    expected = min(k, len(offered))
    _expect(valid.sum() == expected, f"{valid.sum()} pairs picked, {expected} wanted of a space of {len(offered)}")
    _expect(valid[:expected].all(), "valid pairs do not come first")
    _expect((pairs[~valid] == 0).all(), "an invalid pair is not (0, 0)")
    chosen = _set(pairs[valid])
    _expect(len(chosen) == expected, "a pair was picked twice")
    _expect(chosen <= offered, f"pairs {sorted(chosen - offered)} are not in the space")
    status = Status.OK if expected == k else Status.EXHAUSTED
    _expect(int(selection.status) == status, f"status {int(selection.status)} where {status!r} is due")
    _expect(np.isfinite(gains).all(), "a gain is not finite")
    _expect((np.diff(gains[valid]) <= 1e-4 * np.abs(gains).max()).all(), "the batch is not best first")


def _check_batch(rule: Rule, kind: str) -> None:
    """A full batch; from a space with fewer pairs all of them, and EXHAUSTED."""
    case = make_case(kind)
    selection = call_rule(rule, case)
    _expect(isinstance(selection, Selection), f"it returned {type(selection).__name__}, not a Selection")
    check_batch(selection, case.space, BATCH)
    # A few responses, a labelled pair among them; for the list, the ends of its first pair.
    ends = {"within": [4, 5, 6, 7], "cross": [0, 3, 21, 22], "all": [0, 1, 2]}
    few = make_case(kind, eligible=np.isin(np.arange(SIZE), ends.get(kind, np.ravel(list_pairs(case.space)[0]))))
    assert 0 < len(list_pairs(few.space)) < BATCH
    check_batch(call_rule(rule, few), few.space, BATCH)


def _check_same_key(rule: Rule, kind: str) -> None:
    """The same key gives the same batch, jitted or not, and a second call compiles nothing."""
    case = make_case(kind)
    once = call_rule(rule, case)
    other = make_case(kind, seed=1)
    with count_compilations() as compiled:
        jax.block_until_ready(_jitted(rule)(make_key(1), other.hparams, *other[:2], k=BATCH))
    _expect(not compiled, f"a second call compiled {compiled}")
    again = call_rule(rule, case)
    _expect(jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), once, again)), "two calls differ")


def _check_vmap(rule: Rule, kind: str) -> None:
    """`vmap` over keys and beliefs gives each batch as it is alone."""
    cases = [make_case(kind, seed) for seed in (0, 1)]
    if kind == "listed":  # one list for both: the space is not batched
        cases[1] = cases[1]._replace(space=cases[0].space)
    beliefs = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[case.belief for case in cases])
    space, hparams = cases[0].space, cases[0].hparams
    both = quick_jit(jax.vmap(lambda key, belief: rule(key, hparams, belief, space, BATCH)))(
        jax.random.split(make_key(0)), beliefs
    )
    for place, case in enumerate(cases):
        alone = call_rule(rule, case, key=jax.random.split(make_key(0))[place])
        _expect((both.pairs[place] == alone.pairs).all(), "a batch under vmap differs from the same batch alone")
        _expect(np.allclose(both.gains[place], alone.gains, rtol=1e-4, atol=1e-5), "gains under vmap differ")


def _check_symmetry(rule: Rule, kind: str) -> None:
    """For deterministic rules: a common shift changes nothing, and renaming the responses renames the picks."""
    case = make_case(kind)
    plain = call_rule(rule, case)
    if not (call_rule(rule, case, make_key(1)).pairs == plain.pairs).all():
        return
    belief = case.belief
    shifted = dataclasses.replace(
        belief,
        rewards=belief.rewards + 3,
        member_rewards=belief.member_rewards + 3,
        features=belief.features - 2,
        labelled_features=belief.labelled_features - 2,
        labelled_rewards=belief.labelled_rewards + 3,
    )
    _expect(
        _set(call_rule(rule, case._replace(belief=shifted)).pairs) == _set(plain.pairs), "a common shift changes picks"
    )

    # Permute prompts, and responses within them.
    rng = np.random.default_rng(5)
    old = np.concatenate([p * WIDTH + rng.permutation(WIDTH) for p in rng.permutation(PROMPTS)])
    new = np.argsort(old)
    renamed = dataclasses.replace(
        belief,
        features=belief.features[old],
        rewards=belief.rewards[old],
        member_rewards=belief.member_rewards[:, old],
    )
    with_padding = np.append(new, SIZE)
    eligible = case.space.eligible[old]
    if case.space.pairs is None:
        space = pair_space(kind, WIDTH, eligible, jnp.asarray(with_padding[case.space.excluded], jnp.int32))
    else:
        # A list may be in any order, and so may the ends of its pairs.
        listed = with_padding[np.minimum(case.space.pairs, SIZE)][::-1, ::-1]
        space = listed_space(jnp.asarray(listed, jnp.int32), eligible, WIDTH)
    picked = call_rule(rule, Case(renamed, space, case.hparams))
    expected = {(min(pair), max(pair)) for pair in _set(new[plain.pairs])}
    _expect(_set(picked.pairs) == expected, "renaming the responses does not rename the picks")


def _check_failure(rule: Rule, kind: str) -> None:
    """A NaN or an infinity in an input of the rule becomes a status."""
    case = make_case(kind)
    plain = call_rule(rule, case)
    chosen = int(plain.pairs[0, 0])  # its features and rewards enter any rule that uses them
    for value in (np.nan, np.inf):
        for field in ("features", "rewards"):
            leaf = getattr(case.belief, field)
            broken = dataclasses.replace(case.belief, **{field: leaf.at[chosen].set(value)})
            if field == "rewards":
                broken = dataclasses.replace(broken, member_rewards=broken.member_rewards.at[:, chosen].set(value))
            result = call_rule(rule, case._replace(belief=broken))
            unused = bool((result.pairs == plain.pairs).all() & (result.gains == plain.gains).all())
            _expect(unused or int(result.status) == Status.NONFINITE, f"{value} in {field} passes silently")
    # A response outside all pairs may hold anything.
    outside = int(np.flatnonzero(~np.asarray(case.space.eligible))[0])
    broken = dataclasses.replace(
        case.belief,
        features=case.belief.features.at[outside].set(np.nan),
        rewards=case.belief.rewards.at[outside].set(np.nan),
        member_rewards=case.belief.member_rewards.at[:, outside].set(np.nan),
    )
    result = call_rule(rule, case._replace(belief=broken))
    _expect((result.pairs == plain.pairs).all(), "a response that is not eligible changes the batch")
    _expect(int(result.status) == Status.OK, "a response that is not eligible spoils the batch")


def _check_constant(rule: Rule, kind: str) -> None:
    """Equal rewards of all responses still give a full batch of distinct pairs."""
    case = make_case(kind)
    flat = dataclasses.replace(
        case.belief,
        rewards=jnp.zeros_like(case.belief.rewards),
        member_rewards=jnp.zeros_like(case.belief.member_rewards),
    )
    check_batch(call_rule(rule, case._replace(belief=flat)), case.space, BATCH)


def _check_line(rule: Rule, kind: str) -> None:
    """Features on a line still give a full batch: inverses need a jitter that scales with the matrix."""
    case = make_case(kind)
    slopes = jnp.arange(1.0, FEATURES + 1, dtype=jnp.float32)
    belief = dataclasses.replace(
        case.belief,
        features=case.belief.features[:, :1] * slopes[None, :],
        labelled_features=case.belief.labelled_features[:, :, :1] * slopes[None, None, :],
        labelled_information=jnp.zeros((FEATURES, FEATURES), jnp.float32),
    )
    check_batch(call_rule(rule, case._replace(belief=belief)), case.space, BATCH)


def _check_margins(rule: Rule, kind: str) -> None:
    """Margins of 400, where p (1 - p) is zero in float32, still give a full batch."""
    case = make_case(kind)
    signs = jnp.where(jnp.arange(SIZE, dtype=jnp.int32) % 3 == 0, 200.0, -200.0)
    belief = dataclasses.replace(
        case.belief,
        rewards=signs + case.belief.rewards,
        member_rewards=signs[None] + case.belief.member_rewards,
    )
    check_batch(call_rule(rule, case._replace(belief=belief)), case.space, BATCH)


CHECKS: dict[str, Callable[[Rule, str], None]] = {
    "batch": _check_batch,
    "same_key": _check_same_key,
    "vmap": _check_vmap,
    "symmetry": _check_symmetry,
    "failure": _check_failure,
    "constant": _check_constant,
    "line": _check_line,
    "margins": _check_margins,
}
"""The checks of every rule: name -> `(rule, kind of space)`, which asserts."""


def check_rule(rule: Rule, *, spaces: tuple[str, ...] = SPACES, checks: tuple[str, ...] = tuple(CHECKS)) -> None:
    """Run the conformance suite on a rule of your own.

    Args:
      rule: `(key, hparams, belief, space, k) -> Selection`.
      spaces: kinds of pair space, of `SPACES`.
      checks: names of `CHECKS`.

    Raises:
      AssertionError: one sentence with the check, the space and the failure.
      JarmError: its arguments are not those of a rule.

    Example:
      >>> import jax.numpy as jnp
      >>> from jarm import top_pairs
      >>> from jarm.testing.conformance import check_rule
      >>> def ties(key, hparams, belief, space, k):
      ...     return top_pairs(lambda margin, _: -jnp.abs(margin), belief.rewards, None, space, k)
      >>> check_rule(ties, spaces=("listed",), checks=("batch",))  # passes; without options, a minute or less
      >>> def without_abs(key, hparams, belief, space, k):
      ...     return top_pairs(lambda margin, _: jnp.sqrt(margin), belief.rewards, None, space, k)
      >>> check_rule(without_abs, spaces=("listed",), checks=("batch",))
      Traceback (most recent call last):
      AssertionError: batch on a space of 'listed' pairs: a score is not a number, or infinite
    """
    check_signature(rule, repr(getattr(rule, "__name__", rule)))
    rule = with_named_k(rule)
    for name in checks:
        for kind in spaces:
            try:
                CHECKS[name](rule, kind)
            except AssertionError as error:
                raise AssertionError(f"{name} on a space of {kind!r} pairs: {error}") from None
