"""The contract on one page: the records that flow through jarm, and the protocols of its parts.

    ResponseTable   prompts, responses and embeddings, on the host (`jarm.core.tables`)
        |
        |   Labelled   labelled pairs so far  <------------------------------------+
        v      v                                                                   |
    Fit             parameters of K members of a RewardHead, and FitInfo           |
        v                                                                   annotator: simulated,
    Belief          features, rewards, information of the labelled pairs    or people with a file
        v                                                                          |
    Rule            reads the Belief and a PairSpace, the candidate pairs          |
        v                                                                          |
    Selection       k pairs, their gains and a Status  ----------------------------+

Each arrow is a pure function of arrays of fixed shapes, and `HParams` are its numbers that a sweep varies. No arrow
builds the candidate pairs: a PairSpace describes them. Failure is data: a `Status` travels with each result, and
`jarm.core.status.check` raises it at the edge. `jarm.core.types` explains the axes N, R, F, K, L, M.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from jarm.core.checks import check_numbers
from jarm.core.pytree import record, static
from jarm.core.types import Array, Bool, Float, Int, Params, PRNGKey


@record
class Labelled:
    """Labelled pairs at fixed capacity L: indices into the N responses, and the answers of the annotator.

    Attributes:
      first, second: `[L]` int32; where `mask` is false they are 0.
      label: `[L]` float32 in [0, 1], the (soft) probability that `first` is preferred.
      weight: `[L]` float32, weight of the pair in the loss.
      mask: `[L]` bool, true for the labels so far.
    """

    first: Int[Array, "L"]
    second: Int[Array, "L"]
    label: Float[Array, "L"]
    weight: Float[Array, "L"]
    mask: Bool[Array, "L"]


@dataclasses.dataclass(frozen=True)
class RewardHead:
    """A small reward model on frozen embeddings: `reward = features(params, e) @ weights(params)`, no bias.

    Attributes:
      init: `(key, d) -> params`.
      features: `(params, e[..., d]) -> [..., F]`.
      weights: `params -> [F]`.
      linear: whether `features` is the identity, so that the fit is convex.
      prior_precision: `params -> scalar`, precision of the Gaussian prior of each weight, of a head whose members are
        draws of its Laplace posterior; None for other heads.
    """

    init: Callable[[PRNGKey, int], Params]
    features: Callable[[Params, Float[Array, "*batch d"]], Float[Array, "*batch F"]]
    weights: Callable[[Params], Float[Array, "F"]]
    linear: bool = False
    prior_precision: Callable[[Params], Float[Array, ""]] | None = None

    def rewards(self, params: Params, embeddings: Float[Array, "*batch d"]) -> Float[Array, "*batch"]:
        """Rewards of one head, `[..., d] -> [...]`."""
        return self.features(params, embeddings) @ self.weights(params)


class FitInfo(NamedTuple):
    """Report of a fit on each member.

    Attributes:
      train_nll, valid_nll: `[K]` mean loss, in nats, of the training and of the held-out labels.
      steps: `[K]` int32 optimiser steps of the parameters that are kept.
      status: scalar int32 `Status`.
    """

    train_nll: Float[Array, "K"]
    valid_nll: Float[Array, "K"]
    steps: Int[Array, "K"]
    status: Int[Array, ""]


@runtime_checkable
class Fit(Protocol):
    """Fit K heads to labelled pairs, from the parameters `warm` or, where it is None, from fresh ones."""

    def __call__(
        self,
        key: PRNGKey,
        hparams: HParams,
        embeddings: Float[Array, "N d"],
        labelled: Labelled,
        warm: Params | None = None,
    ) -> tuple[Params, FitInfo]:
        """Parameters with a leading axis K, and a report on each member."""
        ...


@record
class Belief:
    """Everything a rule may look at, beside the pair space.

    Attributes:
      features: `[N, F]` last hidden layer of the first head of the ensemble, one row per response.
      rewards: `[N]` mean reward over the ensemble; the margin of a pair is their difference.
      member_rewards: `[K, N]` rewards of each member of the ensemble.
      labelled_information: `[F, F]` Fisher information of the labelled pairs under the current head.
      num_labelled: scalar int32, number of labelled pairs.
      labelled_features: `[L, 2, F]` features of both ends of the labelled pairs, in the first `num_labelled` rows.
      labelled_rewards: `[L, 2]` mean rewards of these ends.
      prior_precision: precision of the Gaussian prior on each weight of the last layer, of a head that has one: rules
        that start from a prior information take it in the place of theirs. None for other heads.
      within_covariance: `[F, F]` mean outer product of features less the mean of their prompt, over all responses of
        the round; None where `features` are those of all of them, or no rule asks (`v_opt` does).
    """

    features: Float[Array, "N F"]
    rewards: Float[Array, "N"]
    member_rewards: Float[Array, "K N"]
    labelled_information: Float[Array, "F F"]
    num_labelled: Int[Array, ""]
    labelled_features: Float[Array, "L 2 F"]
    labelled_rewards: Float[Array, "L 2"]
    prior_precision: Float[Array, ""] | None = None
    within_covariance: Float[Array, "F F"] | None = None


@record
class PairSpace:
    """Candidate pairs as a description; `jarm.design.spaces` makes, counts, samples and walks them.

    Attributes:
      kind: `within` (pairs of one prompt), `cross` (pairs across prompts), `all` (both), or `listed` (`pairs`).
      width: R, responses per prompt, padding included.
      eligible: `[N]` bool, responses that may be in a pair.
      excluded: `[L, 2]` int32 pairs never to be offered, each with its smaller index first and in lexicographic
        order; unused places hold N. Made by `jarm.design.spaces.exclude`.
      pairs: `[M, 2]` int32, smaller index first, for `listed`; else None. A pair with an index of N or more is padding.
      costs: `[M]` of each listed pair, otherwise `[N]` of each response, and a pair costs the sum of its two; positive,
        any unit (seconds, tokens, money). None where all pairs cost the same. Only greedy selection looks at them.
      prompt: `[N]` int32 in 0 .. N - 1, for prompts of unequal size without padding; not for `within`, which walks a
        grid. None where response n belongs to prompt n // R. Read `prompt_of`, which covers both.
      alike: `[N]` int32, the same number for responses with equal embeddings, which are never paired: no label of such
        a pair would teach a head anything. Not for `listed`. None where all embeddings differ.
      per_prompt: scalar int32, largest number of pairs of a batch with a response of any one prompt; None for no limit.
        Only greedy selection looks at it (`Limits` has more).
    """

    kind: str = static()
    width: int = static()
    eligible: Bool[Array, "N"]
    excluded: Int[Array, "L 2"]
    pairs: Int[Array, "M 2"] | None = None
    costs: Float[Array, "c"] | None = None
    prompt: Int[Array, "N"] | None = None
    alike: Int[Array, "N"] | None = None
    per_prompt: Int[Array, ""] | None = None

    @property
    def size(self) -> int:
        """N, padding included."""
        return self.eligible.shape[0]

    @property
    def prompt_of(self) -> Int[Array, "N"]:
        """`[N]` int32, the prompt of each response."""
        return jnp.arange(self.size, dtype=jnp.int32) // self.width if self.prompt is None else self.prompt

    @property
    def num_prompts(self) -> int:
        """Static upper bound on the numbers of prompts: ceil(N / R), or N where `prompt` numbers them."""
        return -(-self.size // self.width) if self.prompt is None else self.size


@record
class Limits:
    """Limits on a batch beyond its pair space, for greedy selection; None is no limit.

    Limits are traced: another number compiles nothing, another choice of limits does.

    Attributes:
      per_prompt: largest number of pairs with a response of any one prompt; None for that of the space, if any.
      per_response: largest number of pairs with any one response.
      similarity: smallest cosine, in either direction, between feature differences of two pairs that makes them
        near-copies; a batch has only one of these.

    Example:
      >>> from jarm import Limits
      >>> Limits(per_prompt=2, similarity=0.95)
      Limits(per_prompt=2, per_response=None, similarity=0.95)
    """

    per_prompt: Int[Array, ""] | int | None = None
    per_response: Int[Array, ""] | int | None = None
    similarity: Float[Array, ""] | float | None = None


@record
class Selection:
    """A batch of pairs, best first.

    Attributes:
      pairs: `[k, 2]` int32, smaller index first.
      gains: `[k]` float32, gain of each pair when the rule chose it, in units of the rule.
      valid: `[k]` bool; false where the space ran out of pairs, and then the pair is (0, 0).
      status: scalar int32 `Status`.
      weights: `[k]` float32, positive, weight of each label in the loss; None for 1.
    """

    pairs: Int[Array, "k 2"]
    gains: Float[Array, "k"]
    valid: Bool[Array, "k"]
    status: Int[Array, ""]
    weights: Float[Array, "k"] | None = None


@runtime_checkable
class Rule(Protocol):
    """An acquisition rule: pick k pairs of a space. Pure, jittable, fixed shapes; k is a Python int."""

    def __call__(self, key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
        """The batch."""
        ...


RANGES = {
    "noise": (-math.inf, math.inf),
    "prior_variance": (1e-6, math.inf),
    **dict.fromkeys(("label_smoothing", "prior_mix", "epsilon"), (0, 1)),
}
"""Smallest and largest value of a hyperparameter; others are 0 or more."""


@record
class HParams:
    """Traced numbers of an experiment, so that a sweep over them compiles once. Flat: each part reads its own.

    Attributes:
      learning_rate: fit of an MLP: step size of Adam.
      weight_decay: fit of an MLP: decoupled weight decay of Adam; a step shrinks the weights by learning_rate *
        weight_decay.
      ridge: fit of a linear head: L2 penalty, in units of one label's negative log-likelihood per squared weight.
      prior_variance: fit of a laplace head: variance s2 of the prior on each weight, in squared logits, where the mean
        squared distance of an embedding from the mean of its prompt is 1. `make_fit` by itself knows no prompts, and
        takes it in units of the embeddings.
      label_smoothing: every fit: share by which labels are drawn towards 1/2 in training.
      noise: annotator: beta in P(first preferred) = sigmoid(beta * gold difference / scale).
      prior_weight: rules with a prior: its weight c (see `jarm.acquisition.optimal_design`), unless the head has one.
      prior_mix: rules with a prior: its shape rho, from 0, a ridge, to 1, the mean information of the candidates.
      beta: interval rules: half-width of the intervals, in standard deviations over the ensemble.
      temperature: rules that draw their batch: 0 takes the best pairs, larger is closer to random.
      epsilon: mixed rules: share of the batch that is drawn at random.

    Example:
      Two settings as one record, for one compiled function.

      >>> import jax
      >>> from jarm import HParams
      >>> settings = jax.tree.map(lambda *values: jnp.array(values), HParams(noise=1.0), HParams(noise=4.0))
      >>> jax.vmap(lambda hparams: hparams.noise * hparams.ridge)(settings).tolist()
      [1.0, 4.0]
    """

    learning_rate: Float[Array, ""] | float = 1e-3
    weight_decay: Float[Array, ""] | float = 10.0
    ridge: Float[Array, ""] | float = 1.0
    prior_variance: Float[Array, ""] | float = 0.1
    label_smoothing: Float[Array, ""] | float = 0.0
    noise: Float[Array, ""] | float = 2.0
    prior_weight: Float[Array, ""] | float = 0.1
    prior_mix: Float[Array, ""] | float = 1.0
    beta: Float[Array, ""] | float = 1.0
    temperature: Float[Array, ""] | float = 1.0
    epsilon: Float[Array, ""] | float = 0.1

    def __post_init__(self) -> None:
        check_numbers(self, RANGES, "The hyperparameter `{}`")

    def as_float32(self) -> HParams:
        """The same numbers as float32 arrays, whatever numbers they are."""
        return jax.tree.map(lambda number: jnp.asarray(number, jnp.float32), self)
