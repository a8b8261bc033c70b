"""`jarm.select`: which pairs to label next, for loops of your own. Plain arrays in, a small result out, no training."""

from __future__ import annotations

from typing import Any

from jarm.design.criteria import Criterion
from jarm.selection.engine import count_useful, grow, starting_information, upper_bound
from jarm.selection.explain import explain
from jarm.selection.request import read_request
from jarm.selection.result import SelectedBatch


def select(
    features: Any,
    rewards: Any = None,
    *,
    space: Any,
    k: Any,
    prompts: Any = None,
    prior_precision: Any = None,
    labelled: Any = None,
    exclude: Any = None,
    criterion: str | Criterion = "d",
    targets: Any = None,
    costs: Any = None,
    per_prompt: int | None = None,
    per_response: int | None = None,
    similarity: float | None = None,
    swaps: int = 0,
    bound: bool = False,
    allow_fewer: bool = False,
) -> SelectedBatch:
    """The k pairs of responses to label next: an exact greedy batch over every pair of a space.

    A batch grows one pair at a time, each the best of all pairs of the space given those before it, by default for
    log det of the information A = A0 + sum v x x^T: x the difference of two responses' features, v = p (1 - p) its
    Fisher weight, p = sigmoid(difference of rewards), A0 prior and labelled pairs. No pair is ever built.

    Args:
      features: `[N, F]` features of the responses, such as the last hidden layer of a reward head; for a linear head
        the embeddings. Anything that `numpy.asarray` takes.
      rewards: `[N]` rewards by the current head, in logits; None makes every pair a toss-up, v = 1/4.
      space: the candidate pairs: "within" prompts, "cross" (across prompts), "all", or `[M, 2]` indices.
      k: number of pairs to choose.
      prompts: `[N]` ids, compared by value: texts or whole numbers, of any library (or tuples of them); any number of
        responses each, in any order.
      prior_precision: a number lambda > 0 for lambda I, or `[F, F]`. None for .1 (L + k) Ibar, Ibar the mean of v x x^T
        over the space and L the number of labelled pairs: the prior weighs a tenth of as many average pairs.
      labelled: `[L, 2]` labelled pairs. Their information with the current features and rewards is added to the prior,
        and they are not offered again.
      exclude: `[E, 2]` further pairs not to offer.
      criterion: "d" (log det), "d-unweighted" (v = 1), "a" (trace of the inverse), "v" (mean variance of targets),
        "epig" (expected information about targets), "bald" (about the head), or a `jarm.Criterion`.
      targets: for "v" and "epig": `[T, 2]` integers, pairs of responses, or `[T, F]` floats, directions (of margin 0).
        "v" without them is about rankings within `prompts`: the mean variance of a reward less that of its prompt.
      costs: `[N]` costs of responses (a pair costs the sum of its two), or `[M]` of the listed pairs, which it is where
        M = N, positive, in any unit. The best pair is then the one of largest gain per cost.
      per_prompt: maximum number of pairs with a response of any one prompt.
      per_response: maximum number of pairs with any one response.
      similarity: leave out pairs whose feature difference has at least this cosine with one of the batch: near-copies.
      swaps: maximum number of swaps of a pair of the batch for one outside that raise log det further (Fedorov
        exchange).
      bound: whether to bound the log det of every batch of k pairs from above, for the D-efficiency of this one, at the
        price of another batch or more. Both `swaps` and `bound` are for "d" and "d-unweighted", and for jitted
        programs, which take seconds to compile.
      allow_fewer: return fewer pairs where there are no k, instead of raising.

    Returns:
      The batch: `pairs`, `gains`, `why` each was chosen, and a `report`. Inputs are not modified.

    Raises:
      JarmError: an argument is wrong, the space or the limits hold no k pairs, or pairs would teach nothing.

    Example:
      Six responses to two prompts with F = 2 features each; two pairs within prompts to label first.

      >>> import jarm, numpy as np
      >>> features = np.array([[0, 0], [1, 0], [3, 0], [0, 0], [0, 1], [0, 2]])
      >>> rewards = np.zeros(6)  # logits
      >>> batch = jarm.select(
      ...     features, rewards, space="within", prompts=list("aaabbb"), k=2, prior_precision=1
      ... )
      >>> batch.pairs.tolist()  # [k, 2]
      [[0, 2], [3, 5]]
      >>> batch.gains.round(2).tolist()  # nats of log det: log(1 + 9/4) and log(1 + 4/4)
      [1.18, 0.69]

    Source: Shen, Sun and Ton (arXiv 2502.04354), grown greedily; see docs/selection.md.
    """
    request = read_request(
        features,
        rewards,
        space=space,
        k=k,
        prompts=prompts,
        labelled=labelled,
        exclude=exclude,
        criterion=criterion,
        targets=targets,
        costs=costs,
        per_prompt=per_prompt,
        per_response=per_response,
        similarity=similarity,
        swaps=swaps,
        bound=bound,
        allow_fewer=allow_fewer,
    )
    information = starting_information(request, prior_precision)
    run = grow(request, information)
    count, status = count_useful(request, run.selection)
    upper = upper_bound(request, information, run)
    return explain(request, information, run, count, status, upper)
