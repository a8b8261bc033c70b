"""The contract on one page: the records that flow through jarm, and the protocols of its parts.

Text is embedded once; a `ResponseTable` holds what came of it. A round fits heads to the `Labelled` pairs, forms a
`Belief`, and a `Rule` picks the next batch from a `PairSpace`, which describes candidate pairs without building them.
Failure is data: a `Status` travels with the result and is raised only at the edge, by `check`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

from jarm.core.pytree import record, static
from jarm.core.types import Array, Bool, Float, Int, Params, PRNGKey


@record
class Labelled:
    """Labelled pairs at fixed capacity L: indices into the N responses, and what the annotator said.

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


@record
class PairSpace:
    """Candidate pairs as a description. Response n belongs to prompt n // width, or to `prompt[n]`.

    Attributes:
      kind: `within` (pairs of one prompt), `cross` (prompts differ), `all` (either), `listed` (`pairs`).
      width: R, responses a prompt, padding included.
      eligible: `[N]` bool, responses that may be in a pair.
      excluded: `[L, 2]` int32 pairs never to be offered, each with its smaller index first and in lexicographic
        order; unused places hold N. Made by `jarm.design.spaces.exclude`.
      pairs: `[M, 2]` int32, smaller index first, for `listed`; else None. A pair with an index of N or more is padding.
      costs: `[M]` of each listed pair, otherwise `[N]` of each response, of which a pair costs the sum; positive, any
        unit (seconds, tokens, money). None where all pairs cost the same. Only greedy selection looks at them.
      prompt: `[N]` int32 in 0 .. N - 1, for prompts of unequal size without padding; not for `within`, which walks a
        grid. None where response n belongs to prompt n // width.
    """

    kind: str = static()
    width: int = static()
    eligible: Bool[Array, "N"]
    excluded: Int[Array, "L 2"]
    pairs: Int[Array, "M 2"] | None = None
    costs: Float[Array, "c"] | None = None
    prompt: Int[Array, "N"] | None = None


@record
class Limits:
    """What a batch may hold, beside being pairs of its space; None where there is no such limit.

    Attributes:
      per_prompt: most pairs with a response of any one prompt.
      per_response: most pairs with any one response.
      similarity: a pair is left out where the cosine between its feature difference and that of a pair of the batch is
        at least this, in either direction: a near-copy.
    """

    per_prompt: Int[Array, ""] | int | None = None
    per_response: Int[Array, ""] | int | None = None
    similarity: Float[Array, ""] | float | None = None


@record
class Belief:
    """What a rule may look at.

    Attributes:
      features: `[N, F]` last hidden layer of the ensemble's first head, one row a response.
      rewards: `[N]` mean reward over the ensemble; the margin of a pair is their difference.
      member_rewards: `[K, N]` rewards of every member of the ensemble.
      labelled_information: `[F, F]` Fisher information of the pairs labelled so far, under the current head.
      num_labelled: scalar int32, how many pairs are labelled so far.
      labelled_features: `[L, 2, F]` features of the ends of the labelled pairs; the first `num_labelled` rows count.
      labelled_rewards: `[L, 2]` mean rewards of these ends.
    """

    features: Float[Array, "N F"]
    rewards: Float[Array, "N"]
    member_rewards: Float[Array, "K N"]
    labelled_information: Float[Array, "F F"]
    num_labelled: Int[Array, ""]
    labelled_features: Float[Array, "L 2 F"]
    labelled_rewards: Float[Array, "L 2"]


@record
class Selection:
    """A batch of pairs, best first.

    Attributes:
      pairs: `[k, 2]` int32, smaller index first.
      gains: `[k]` float32, what the rule gave each pair when it chose it; units are the rule's.
      valid: `[k]` bool; false where the space ran out of pairs, and then the pair is (0, 0).
      status: scalar int32 `Status`.
      weights: `[k]` float32, positive, what each label is to weigh in the loss; None for 1.
    """

    pairs: Int[Array, "k 2"]
    gains: Float[Array, "k"]
    valid: Bool[Array, "k"]
    status: Int[Array, ""]
    weights: Float[Array, "k"] | None = None


@record
class HParams:
    """Numbers of an experiment that are traced, so that a sweep over them compiles once.

    Attributes:
      learning_rate: step size of Adam.
      weight_decay: decoupled weight decay of Adam: a step shrinks the weights by learning_rate * weight_decay.
      ridge: L2 penalty of a linear head, in units of one label's negative log-likelihood per squared weight.
      label_smoothing: share by which labels are drawn towards 1/2 in training.
      noise: beta of the annotator: P(first preferred) = sigmoid(beta * gold difference / scale).
      prior_weight: c of the greedy prior (see `jarm.acquisition.optimal_design`).
      prior_mix: rho of the greedy prior: 0 a ridge, 1 the shape of the pool's information.
      beta: half-width of the intervals of interval rules, in standard deviations over the ensemble.
      temperature: of rules that draw their batch: 0 takes the best, larger is closer to random.
      epsilon: share of a mixed batch that is drawn at random.
    """

    learning_rate: Float[Array, ""] | float = 1e-3
    weight_decay: Float[Array, ""] | float = 10.0
    ridge: Float[Array, ""] | float = 1.0
    label_smoothing: Float[Array, ""] | float = 0.0
    noise: Float[Array, ""] | float = 2.0
    prior_weight: Float[Array, ""] | float = 0.1
    prior_mix: Float[Array, ""] | float = 1.0
    beta: Float[Array, ""] | float = 1.0
    temperature: Float[Array, ""] | float = 1.0
    epsilon: Float[Array, ""] | float = 0.1


@dataclasses.dataclass(frozen=True)
class RewardHead:
    """A small reward model on frozen embeddings: `reward = features(params, e) @ weights(params)`, no bias.

    Attributes:
      init: `(key, d) -> params`.
      features: `(params, e[..., d]) -> [..., F]`.
      weights: `params -> [F]`.
      linear: whether `features` is the identity, so that the fit is convex.
    """

    init: Callable[[PRNGKey, int], Params]
    features: Callable[[Params, Float[Array, "*batch d"]], Float[Array, "*batch F"]]
    weights: Callable[[Params], Float[Array, "F"]]
    linear: bool = False

    def rewards(self, params: Params, embeddings: Float[Array, "*batch d"]) -> Float[Array, "*batch"]:
        """Rewards of one head, `[..., d] -> [...]`."""
        return self.features(params, embeddings) @ self.weights(params)


class FitInfo(NamedTuple):
    """What a fit reports of each member.

    Attributes:
      train_nll, valid_nll: `[K]` mean loss, in nats, of the labels trained on and of those held out.
      steps: `[K]` int32 optimiser steps of the parameters that are kept.
      status: scalar int32 `Status`.
    """

    train_nll: Float[Array, "K"]
    valid_nll: Float[Array, "K"]
    steps: Int[Array, "K"]
    status: Int[Array, ""]


@runtime_checkable
class Fit(Protocol):
    """Fit K heads to labelled pairs; `warm` are the parameters to start from, or None for fresh ones."""

    def __call__(
        self,
        key: PRNGKey,
        hparams: HParams,
        embeddings: Float[Array, "N d"],
        labelled: Labelled,
        warm: Params | None = None,
    ) -> tuple[Params, FitInfo]:
        """Parameters with a leading axis K, and what became of each member."""
        ...


@runtime_checkable
class Rule(Protocol):
    """An acquisition rule: pick k pairs of a space. Pure, jittable, fixed shapes; k is a Python int."""

    def __call__(self, key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
        """The batch."""
        ...
