"""The contract on one page: the records that flow through jarm, and the protocols of its parts.

Text is embedded once; a `ResponseTable` holds what came of it. A round fits heads to the `Labelled` pairs, forms a
`Belief`, and a `Rule` picks the next batch from a `PairSpace`, which describes candidate pairs without building them.
Failure is data: a `Status` travels with the result and is raised only at the edge, by `check`.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar, dataclass_transform, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from jarm.core.types import Array, Bool, Float, Int, Params, PRNGKey

C = TypeVar("C", bound=type)


def static(**kwargs: Any) -> Any:
    """A field of a `record` that is part of the program, not of the data: hashable, never traced."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


@dataclass_transform(frozen_default=True, field_specifiers=(static, dataclasses.field))
def record(cls: C) -> C:
    """A frozen dataclass that is a pytree; fields made by `static` belong to its structure."""
    frozen: Any = dataclasses.dataclass(frozen=True)(cls)
    frozen.__no_type_check__ = True  # vmap and tree_map rebuild records with batched or abstract leaves
    return jax.tree_util.register_dataclass(frozen)


class Status(enum.IntEnum):
    """What went wrong, from harmless to worst, so that statuses combine by `max`. `message` names the cure."""

    OK = 0
    EXHAUSTED = 1
    LIMITED = 2
    UNINFORMATIVE = 3
    FULL = 4
    SINGULAR = 5
    DIVERGED = 6
    NONFINITE = 7
    BROKEN_RULE = 8
    BROKEN_SCORES = 9
    NO_RULE = 10

    @property
    def message(self) -> str:
        """One sentence: what is wrong, and what to do."""
        return _MESSAGES[self]


_MESSAGES = {
    Status.OK: "All is well.",
    Status.EXHAUSTED: (
        "The pair space holds fewer unlabelled pairs than the batch asks for: label fewer pairs per round, "
        "run fewer rounds, or widen the space (`--pairs all`)."
    ),
    Status.SINGULAR: (
        "An information matrix is not positive definite in float32: raise the prior of the rule (`--prior-weight`, "
        "where it has one) or the penalty of a linear head (`--ridge`), or check the features for an exploding "
        "direction."
    ),
    Status.DIVERGED: "The fit of a reward head ended at a loss that is not finite: lower the learning rate.",
    Status.NONFINITE: (
        "Rewards, gold rewards or features are missing, NaN or infinite, or a label is not in [0, 1]: check the "
        "embeddings and the labels (without gold rewards, call `init`, `ask` and `tell`), then lower the learning rate."
    ),
    Status.NO_RULE: "The index of the rule is not one of `LoopConfig.rules`: count them from 0.",
    Status.LIMITED: (
        "The limits on picks a prompt, picks a response or near-copies leave fewer pairs than the batch asks for: "
        "raise them, or label fewer pairs."
    ),
    Status.UNINFORMATIVE: (
        "Some pairs of the batch would teach nothing, because every pair that is left has equal features at both ends: "
        "check the features for copies or a head that has collapsed, or label fewer pairs."
    ),
    Status.BROKEN_RULE: (
        "A rule returned a pair twice, one that is not in its space or has the larger index first, or fewer pairs than "
        "there are: `jarm rules --check` says which."
    ),
    Status.BROKEN_SCORES: (
        "A rule made a score, a gain or a weight that is NaN or infinite, or a weight that is not positive, of numbers "
        "that are finite: `jarm rules --check` says where."
    ),
    Status.FULL: "More answers were told than the budget has room for: configure more rounds or a larger batch.",
}


class JarmError(ValueError):
    """Something the user gave, or a computation on it, is wrong; the message says where and what to do."""


def check(status: Int[Array, "..."] | np.ndarray | int, where: str = "") -> None:
    """Raise `JarmError` with the message of the worst status; do nothing if all are OK."""
    worst = Status(int(np.max(np.asarray(status))))
    if worst is not Status.OK:
        raise JarmError(f"{where}: {worst.message}" if where else worst.message)


@dataclasses.dataclass(frozen=True)
class ResponseTable:
    """P prompts with R responses each, as rows of one embedding array that may lie on disk.

    Responses are indices into `store`, so that a ragged table, a split of a table, or a store in which equal texts
    share a row all cost no copy. A table lives on the host; `embeddings` gathers what is asked for.

    Attributes:
      store: `[n, d]` embeddings, any float type, possibly memory-mapped.
      rows: `[P, R]` int, the row of `store` of each response; any valid row where `mask` is false.
      mask: `[P, R]` bool, true where a response exists.
      gold: `[P, R]` float32 gold rewards (arbitrary units, larger is better), or None; 0 where `mask` is false.
      mean, deviation: `[d]` float32, what embeddings are standardised by as they are read, or None.
      attributes: name -> `[P, R]` float32 scores that use no reward model (length, position, ...).
      provenance: what made it: names, paths, settings.
    """

    store: np.ndarray
    rows: np.ndarray
    mask: np.ndarray
    gold: np.ndarray | None = None
    mean: np.ndarray | None = None
    deviation: np.ndarray | None = None
    attributes: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(P, R, d)`."""
        return (*self.rows.shape, self.store.shape[1])

    def embeddings(self, prompts: slice | np.ndarray = slice(None)) -> np.ndarray:
        """Embeddings of some prompts, `[p, R, d]` float32, zero where `mask` is false."""
        rows, mask = self.rows[prompts], self.mask[prompts]
        gathered = np.asarray(self.store[rows.reshape(-1)], dtype=np.float32).reshape(*rows.shape, -1)
        if self.mean is not None:
            gathered -= self.mean
        if self.deviation is not None:
            gathered /= self.deviation
        return gathered if mask.all() else np.where(mask[..., None], gathered, np.float32(0))

    def take(self, prompts: np.ndarray) -> ResponseTable:
        """The table of some prompts (indices or a boolean mask `[P]`); embeddings are shared, not copied."""
        return dataclasses.replace(
            self,
            rows=self.rows[prompts],
            mask=self.mask[prompts],
            gold=None if self.gold is None else self.gold[prompts],
            attributes={name: ruler[prompts] for name, ruler in self.attributes.items()},
        )


class TrainTest(NamedTuple):
    """A table to label pairs of, and a table of other prompts to evaluate on; R may differ, d may not."""

    train: ResponseTable
    test: ResponseTable


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


def worst(*statuses: Int[Array, ""]) -> Int[Array, ""]:
    """The worst of several statuses."""
    return jnp.stack([jnp.asarray(status, jnp.int32) for status in statuses]).max()
