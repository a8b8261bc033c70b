"""Active reward modelling as one would write it in PyTorch: the protocol of `jarm compare`, round after round.

MLPs of 3 x 64 GELU units without output bias, AdamW, early stopping; random candidates of the pair space, never the
labelled ones; the released rules, and greedy D-optimal selection in NumPy. Labels and budgets are those of jarm, random
draws are its own. Only the test Spearman is computed.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from typing import Any

import numpy as np
import torch

from benchmarks import baselines, referee


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What a run is; as the options of `jarm compare` of the same names."""

    pairs: str = "within"
    rounds: int = 8
    batch: int = 50
    initial: int = 50
    candidates: int = 5000
    noise: float = 2.0
    steps: int = 1000
    members: int = 1
    holdout: float = 0.2
    folds: int = 1
    check_every: int = 10
    patience: int = 5
    learning_rate: float = 1e-3
    weight_decay: float = 10.0
    prior: float = 0.1
    prior_mix: float = 1.0
    chunk: int | None = None
    released: bool = True  # one-shot rules by autograd of log det, as released; or else by their closed form


class Head(torch.nn.Module):
    """The reward head. Kernels start LeCun-normal, that of the output at a tenth of it, as in jarm."""

    def __init__(self, d: int, width: int = 64):
        super().__init__()
        self.hidden = torch.nn.ModuleList([torch.nn.Linear(d, width), *(torch.nn.Linear(width, width) for _ in "ab")])
        self.out = torch.nn.Linear(width, 1, bias=False)
        for layer in self.hidden:
            torch.nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            torch.nn.init.zeros_(layer.bias)
        torch.nn.init.normal_(self.out.weight, std=0.1 * width**-0.5)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Last hidden layer, `[n, F]`."""
        for layer in self.hidden:
            x = torch.nn.functional.gelu(layer(x))
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rewards `[n]`."""
        return self.out(self.features(x))[:, 0]


def _batch(embeddings: torch.Tensor, pairs: np.ndarray, labels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of all first, then of all second responses, and labels."""
    return embeddings[torch.from_numpy(pairs.T.reshape(-1))], torch.from_numpy(labels.astype(np.float32))


def _loss(head: Head, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    first, second = head(batch[0]).chunk(2)
    return torch.nn.functional.binary_cross_entropy_with_logits(first - second, batch[1])


def fit(
    embeddings: torch.Tensor, pairs: np.ndarray, labels: np.ndarray, rng: np.random.Generator, protocol: Protocol
) -> tuple[list[Head], int]:
    """An ensemble by full batches, stopped when the mean held-out loss has not fallen for `patience` looks.

    Returns the heads, and how many steps all of them took.

    With one fold, member k trains without part k of the pairs, and is kept as it was at the best look. With more, as
    many heads find the number of steps, each without its own part, and fresh members take it on all pairs.
    """
    rates = {"lr": protocol.learning_rate, "weight_decay": protocol.weight_decay}

    def begin(start: dict[str, torch.Tensor]) -> tuple[Head, torch.optim.Optimizer]:
        head = Head(embeddings.shape[1])
        head.load_state_dict(start)
        return head, torch.optim.AdamW(head.parameters(), **rates, fused=True)  # fused: its fastest form here

    def advance(
        head: Head, optimiser: torch.optim.Optimizer, batch: tuple[torch.Tensor, torch.Tensor], steps: int
    ) -> None:
        for _ in range(steps):
            optimiser.zero_grad()
            _loss(head, batch).backward()
            optimiser.step()

    def kept(head: Head) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in head.state_dict().items()}

    starts = [kept(Head(embeddings.shape[1])) for _ in range(protocol.members)]
    deal = rng.permutation(len(pairs)) % round(1 / protocol.holdout)
    searchers = []
    for fold in range(protocol.members if protocol.folds == 1 else protocol.folds):
        held = deal == fold % (deal.max() + 1)
        parts = [_batch(embeddings, pairs[rows], labels[rows]) for rows in (~held, held)]
        searchers.append((*begin(starts[fold % protocol.members]), *parts))
    best, best_loss, best_steps, steps = starts, np.inf, 0, 0
    while steps < protocol.steps and steps - best_steps < protocol.check_every * protocol.patience:
        for head, optimiser, train, _ in searchers:
            advance(head, optimiser, train, protocol.check_every)
        steps += protocol.check_every
        with torch.no_grad():
            losses = [_loss(head, valid).item() for head, _, _, valid in searchers]
        now = np.average(losses, weights=[len(valid[1]) for *_, valid in searchers])
        if now < best_loss:
            best_loss, best_steps = now, steps
            if protocol.folds == 1:
                best = [kept(head) for head, *_ in searchers]
    members = [begin(start) for start in best]
    taken = steps * len(searchers)
    if protocol.folds > 1:
        everything = _batch(embeddings, pairs, labels)
        for head, optimiser in members:
            advance(head, optimiser, everything, best_steps)
        taken += best_steps * len(members)
    return [head for head, _ in members], taken


@torch.no_grad()
def spearman(heads: list[Head], embeddings: torch.Tensor, gold_ranks: torch.Tensor) -> float:
    """Mean over prompts of the rank correlation within a prompt; ties, which hardly occur, are broken by position."""
    flat = embeddings.flatten(0, 1)
    rewards = torch.stack([head(flat) for head in heads]).mean(dim=0)
    ranks = rewards.reshape(gold_ranks.shape).argsort(dim=1).argsort(dim=1)
    n = ranks.shape[1]
    return float((1 - 6 * (ranks - gold_ranks).square().sum(dim=1) / (n * (n * n - 1))).float().mean())


def choose(
    rule: str,
    heads: list[Head],
    embeddings: torch.Tensor,
    candidates: np.ndarray,
    past: np.ndarray,
    rng: np.random.Generator,
    protocol: Protocol,
) -> np.ndarray:
    """Indices of the batch among the candidates: features of the first head, margins of the mean of all, as jarm."""
    k = protocol.batch
    if rule == "random":
        return rng.choice(len(candidates), k, replace=False)
    with torch.no_grad():
        features = heads[0].features(embeddings)
        rewards = torch.stack([head(embeddings) for head in heads]).mean(dim=0)
    first, second, past_first, past_second = (torch.from_numpy(each) for each in (*candidates.T, *past.T))
    x, past_x = features[first] - features[second], features[past_first] - features[past_second]
    margin, past_margin = rewards[first] - rewards[second], rewards[past_first] - rewards[past_second]
    if rule in ("entropy", "max_diff"):
        return torch.topk(margin.abs(), k, largest=rule == "max_diff").indices.numpy()
    if rule == "xtx" and protocol.released:
        return baselines.released_xtx(x, k, protocol.chunk).numpy()
    if rule == "dopt" and protocol.released:
        return baselines.released_dopt(x, margin, k, protocol.chunk).numpy()
    if rule == "pa_dopt" and protocol.released:
        return baselines.released_pa_dopt(x, margin, past_x, past_margin, k, protocol.chunk).numpy()
    if rule == "xtx":
        return baselines.closed_form_xtx(x, k).numpy()
    if rule in ("dopt", "pa_dopt"):
        labelled = (past_x, past_margin) if rule == "pa_dopt" else None
        return baselines.closed_form_dopt(x, margin, k, labelled).numpy()
    if rule != "greedy_dopt":
        raise ValueError(f"no rule {rule!r} here")
    x, past_x = x.numpy(), past_x.numpy()
    v, past_v = referee.fisher_weight(margin.numpy()), referee.fisher_weight(past_margin.numpy())
    mean = x.T @ (v[:, None] * x) / len(x)
    ridge = np.trace(mean) / len(mean) * np.eye(len(mean), dtype=np.float32)
    shape = (1 - protocol.prior_mix) * ridge + protocol.prior_mix * mean
    information = past_x.T @ (past_v[:, None] * past_x) + protocol.prior * (len(past) + k) * shape
    # As jarm: a mean of fewer directions than features still has an inverse.
    information += 4 * np.finfo(np.float32).eps * np.trace(information) * np.eye(len(mean), dtype=np.float32)
    return referee.rank_one_greedy(x, v, information, k)[0]


def all_pairs(prompts: int, width: int, kind: str) -> np.ndarray:
    """Every pair of a space without padding, `[M, 2]`."""
    n = prompts * width
    if kind == "within":
        inside = np.stack(np.triu_indices(width, 1), axis=1)
        return (np.arange(prompts)[:, None, None] * width + inside).reshape(-1, 2)
    pairs = np.stack(np.triu_indices(n, 1), axis=1)
    return pairs if kind == "all" else pairs[pairs[:, 0] // width != pairs[:, 1] // width]


def run(
    rule: str, seed: int, train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray], protocol: Protocol
) -> dict[str, Any]:
    """One rule, one seed. `train` and `test` are embeddings `[P, R, d]` and gold `[P, R]`; every mask is true.

    Returns:
      `spearman` after the initial labels and after each batch, Adam `steps` of all heads, and processor seconds to
      `fit`, `select`, `evaluate`.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    prompts, width = train[1].shape
    embeddings, test_embeddings = torch.from_numpy(train[0].reshape(prompts * width, -1)), torch.from_numpy(test[0])
    gold = train[1].reshape(-1) / train[1].std()
    test_ranks = torch.from_numpy(test[1]).argsort(dim=1).argsort(dim=1)
    left = all_pairs(prompts, width, protocol.pairs)
    pairs, labels = np.zeros((0, 2), np.int64), np.zeros(0)
    seconds = {"fit": 0.0, "select": 0.0, "evaluate": 0.0}
    history, steps = [], 0

    def label(chosen: np.ndarray) -> None:
        nonlocal left, pairs, labels
        new = left[chosen]
        p = 1 / (1 + np.exp(-protocol.noise * (gold[new[:, 0]] - gold[new[:, 1]])))
        pairs, labels = np.concatenate([pairs, new]), np.append(labels, rng.random(len(new)) < p)
        left = np.delete(left, chosen, axis=0)

    label(rng.choice(len(left), protocol.initial, replace=False))
    for round_ in range(protocol.rounds + 1):
        marks = [time.process_time()]
        heads, taken = fit(embeddings, pairs, labels, rng, protocol)
        steps += taken
        marks.append(time.process_time())
        history.append(spearman(heads, test_embeddings, test_ranks))
        marks.append(time.process_time())
        if round_ < protocol.rounds:
            offered = rng.permutation(len(left))[: protocol.candidates]
            label(offered[choose(rule, heads, embeddings, left[offered], pairs, rng, protocol)])
        marks.append(time.process_time())
        for part, (begin, end) in zip(("fit", "evaluate", "select"), itertools.pairwise(marks), strict=True):
            seconds[part] += end - begin
    return {"spearman": history, "steps": steps, **seconds}
