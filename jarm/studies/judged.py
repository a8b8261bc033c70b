"""Files that say which responses are better, read in four layouts, and measures of scores against what they say.

A unit is what a file asks of a model once: a pair, an item of several responses, or a prompt with scored responses.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from typing import Any

import numpy as np

from jarm.core.tables import ResponseTable
from jarm.data.pairs import PairTable
from jarm.report.clusters import clustered_mean, spearman_within
from jarm.report.held_out import held_out, right_of
from jarm.report.rewardbench import TIES_BOUNDS, TiesIds, best_is_right, section_scores, ties_values

Row = dict[str, Any]
"""Measures by name; those with intervals are dictionaries of `mean`, `low` and `high`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged(abc.ABC):
    """What all layouts have.

    Attributes:
      layout: `rewardbench`, `rewardbench-2`, `pairs` or `responses`.
      read_as: what was recognised, in one sentence.
      rewards: `[n]` float64, of the model, in logits.
      lengths: `[n]` float64, characters of each response; None where they are not known.
      prompts: `[U]` number of each unit's prompt, the clusters of intervals.
      subsets: `[U]` names, or None.
      units: units that count, in the order of the file.
      places: `[U]` place of each unit in the file, as keys and values of its line.
    """

    layout: str
    read_as: str
    rewards: np.ndarray
    lengths: np.ndarray | None
    prompts: np.ndarray
    subsets: list[str] | None
    units: np.ndarray
    places: list[dict[str, Any]]

    def of_subset(self, name: str) -> np.ndarray:
        """The units of a subset."""
        assert self.subsets is not None
        return np.array([unit for unit in self.units if self.subsets[unit] == name])

    def names(self) -> list[str]:
        """The subsets, in order of first appearance."""
        return [] if self.subsets is None else list(dict.fromkeys(self.subsets[unit] for unit in self.units))

    def place(self, unit: int) -> dict[str, Any]:
        """Where a unit stands, and in which subset."""
        return {**self.places[unit], **({} if self.subsets is None else {"subset": self.subsets[unit]})}

    @abc.abstractmethod
    def measure(self, scores: np.ndarray, units: np.ndarray) -> Row:
        """Measures of the order of `[n]` scores on some units, with intervals over prompts."""

    @abc.abstractmethod
    def counts(self, units: np.ndarray) -> Row:
        """Sizes, and measures of the rewards that have no meaning for other scores."""

    def sections(self, scores: np.ndarray) -> Row:
        """Scores of sections, and `score`, the one number of a benchmark; empty where there are none."""
        return {}

    @abc.abstractmethod
    def lines(self) -> list[Row]:
        """One record per unit: its place, its rewards, and how right they are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairCase(Judged):
    """Pairs; the responses of unit u are 2 u and 2 u + 1.

    Attributes:
      label: `[U]` probability that the first response is preferred.
    """

    label: np.ndarray

    @property
    def strict(self) -> bool:
        """Whether a pair of equal rewards is wrong, as in RewardBench, and not half right."""
        return self.layout == "rewardbench"

    def _margins(self, scores: np.ndarray, units: np.ndarray) -> np.ndarray:
        return scores[2 * units] - scores[2 * units + 1]

    def measure(self, scores: np.ndarray, units: np.ndarray) -> Row:
        """`accuracy`, the share of votes for the response it prefers, over pairs whose label is not 1/2."""
        margins = self._margins(scores, units)
        if self.strict:
            return {"accuracy": clustered_mean((margins > 0).astype(float), self.prompts[units], bounds=(0.0, 1.0))}
        return {"accuracy": held_out(np.sign(margins), self.label[units], self.prompts[units])["accuracy"]}

    def counts(self, units: np.ndarray) -> Row:
        """Numbers of pairs, prompts and pairs of equal rewards; accuracy of the majority, loss, calibration error."""
        margins = self._margins(self.rewards, units)
        found = held_out(margins, self.label[units], self.prompts[units])
        return {
            "pairs": len(units),
            "prompts": len(np.unique(self.prompts[units])),
            "ties": int((margins == 0).sum()),
            **({} if found["majority"] == 1 else {"majority": found["majority"]}),
            "nll": found["nll"],
            "calibration_error": found["calibration_error"],
        }

    def sections(self, scores: np.ndarray) -> Row:
        """Of RewardBench 1; empty for other pairs."""
        if self.layout != "rewardbench" or self.subsets is None:
            return {}
        right = (self._margins(scores, self.units) > 0).astype(float)
        return dict(section_scores(right, [self.subsets[unit] for unit in self.units], self.prompts[self.units]))

    def lines(self) -> list[Row]:
        """With `right` the share of votes for the preferred one, 1/2 for equal rewards, None where the label is 1/2."""
        margins, label = self._margins(self.rewards, self.units), self.label[self.units]
        right = (margins > 0).astype(float) if self.strict else right_of(margins[None], label)[0]
        return [
            {
                **self.place(unit),
                "rewards": self.rewards[2 * unit : 2 * unit + 2].tolist(),
                "label": float(self.label[unit]),
                "right": None if self.label[unit] == 0.5 else float(right[at]),
            }
            for at, unit in enumerate(self.units.tolist())
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ItemCase(Judged):
    """Items of several responses of which some are right, as in RewardBench 2.

    Attributes:
      items: `[n]` unit of each response, ascending.
      correct: `[n]` bool.
      ties: `[U]` bool, items of the subset Ties.
      ids: those items by the numbers in their ids, counted among them; None without such a subset.
    """

    items: np.ndarray
    correct: np.ndarray
    ties: np.ndarray
    ids: TiesIds | None

    @functools.cached_property
    def _ties_units(self) -> np.ndarray:
        return np.flatnonzero(self.ties)

    def _of_ties(self, scores: np.ndarray) -> np.ndarray:
        """`[I]`, whose mean is the score of Ties."""
        assert self.ids is not None
        own = self.ties[self.items]
        return ties_values(scores[own], self.correct[own], np.searchsorted(self._ties_units, self.items[own]), self.ids)

    def measure(self, scores: np.ndarray, units: np.ndarray) -> Row:
        """`accuracy`: the mean over subsets of the share of right responses at the top, and of the score of Ties."""
        plain = units[~self.ties[units]]
        names = [] if self.subsets is None else list(dict.fromkeys(self.subsets[unit] for unit in plain))
        strata = np.zeros(len(plain), np.int64)
        if self.subsets is not None:
            strata = np.array([names.index(self.subsets[unit]) for unit in plain], np.int64)
        values, clusters = best_is_right(scores, self.correct, self.items)[plain], self.prompts[plain]
        if len(plain) < len(units):
            of_ties = self._of_ties(scores)
            values, strata = np.r_[values, of_ties], np.r_[strata, np.full(len(of_ties), len(names))]
            clusters = np.r_[clusters, -1 - np.arange(len(of_ties))]  # ids, each with the prompts of its two items
        size = int(strata.max()) + 1
        bounds = (0.0, 1.0) if size > 1 or len(plain) == len(units) else TIES_BOUNDS
        shares = np.full(size, 1 / size)
        return {"accuracy": clustered_mean(values, clusters, strata=strata, shares=shares, bounds=bounds)}

    def counts(self, units: np.ndarray) -> Row:
        """Numbers of items, prompts and responses."""
        return {
            "items": len(units),
            "prompts": len(np.unique(self.prompts[units])),
            "responses": int(np.isin(self.items, units).sum()),
        }

    def sections(self, scores: np.ndarray) -> Row:
        """The score: the mean of the subsets."""
        return {} if self.subsets is None else {"score": self.measure(scores, self.units)["accuracy"]}

    def lines(self) -> list[Row]:
        """With `right` the share of right responses at the top, or in Ties 1 where all are above all wrong ones."""
        shares = best_is_right(self.rewards, self.correct, self.items)
        starts = np.searchsorted(self.items, np.arange(len(self.places) + 1))
        found = []
        for unit in self.units.tolist():
            own = slice(starts[unit], starts[unit + 1])
            rewards, correct = self.rewards[own], self.correct[own]
            right = float(rewards[correct].min() > rewards[~correct].max()) if self.ties[unit] else shares[unit]
            line = {"rewards": rewards.tolist(), "correct": int(correct.sum()), "right": float(right)}
            found.append({**self.place(unit), **line})
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableCase(Judged):
    """Prompts with scored responses; response i is the i-th of the table's P * R.

    Attributes:
      table: with gold scores.
      pairs: pairs within prompts, the higher score preferred.
    """

    table: ResponseTable
    pairs: PairTable

    @functools.cached_property
    def _real(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the responses that exist: index, prompt and gold score."""
        real = np.flatnonzero(self.table.mask)
        gold = self.table.column("gold").reshape(-1)[real].astype(np.float64)
        return real, real // self.table.mask.shape[1], gold

    def _of(self, units: np.ndarray) -> PairTable:
        return self.pairs.take(np.isin(self.pairs.prompt, units))

    def _spearman(self, scores: np.ndarray, units: np.ndarray) -> np.ndarray:
        real, prompt, gold = self._real
        return spearman_within(scores[real], gold, prompt)[units]

    def _pick(self, scores: np.ndarray) -> np.ndarray:
        """`[P]` gold score of the response with the largest score; the mean of those tied there."""
        real, prompt, gold = self._real
        top = np.full(len(self.prompts), -np.inf)
        np.maximum.at(top, prompt, scores[real])
        picked = scores[real] == top[prompt]
        return np.bincount(prompt, picked * gold) / np.bincount(prompt, picked)

    def measure(self, scores: np.ndarray, units: np.ndarray) -> Row:
        """`accuracy` on pairs, `spearman` within prompts, and `best_of_n`, the gold score of each prompt's best."""
        pairs = self._of(units)
        margins, label = np.sign(scores[pairs.first] - scores[pairs.second]), pairs.label.astype(np.float64)
        right = np.where(margins == 0, 0.5, (margins > 0) == (label > 0.5))
        spearman = self._spearman(scores, units)
        known = np.isfinite(spearman)
        return {
            "accuracy": clustered_mean(right, pairs.prompt, bounds=(0.0, 1.0)),
            "spearman": clustered_mean(spearman[known], units[known], bounds=(-1.0, 1.0)),
            "best_of_n": clustered_mean(self._pick(scores)[units], units),
        }

    def counts(self, units: np.ndarray) -> Row:
        """Sizes; loss and calibration error on pairs; and the gold score of a random pick and of the best response."""
        pairs, (_, prompt, gold) = self._of(units), self._real
        margins = self.rewards[pairs.first] - self.rewards[pairs.second]
        found = held_out(margins, pairs.label.astype(np.float64), pairs.prompt) if len(pairs) else {}
        best = np.full(len(self.prompts), -np.inf)
        np.maximum.at(best, prompt, gold)
        return {
            "prompts": len(units),
            "responses": int(np.isin(prompt, units).sum()),
            "pairs": len(pairs),
            "nll": found.get("nll"),
            "calibration_error": found.get("calibration_error"),
            "spearman_undefined": int(np.isnan(self._spearman(self.rewards, units)).sum()),
            "random_of_n": float((np.bincount(prompt, gold) / np.bincount(prompt))[units].mean()),
            "oracle_of_n": float(best[units].mean()),
        }

    def lines(self) -> list[Row]:
        """With `right` the share of the prompt's pairs that are, and `picked` the gold score of the best of it."""
        width = self.table.mask.shape[1]
        margins = self.rewards[self.pairs.first] - self.rewards[self.pairs.second]
        right = np.where(margins == 0, 0.5, (margins > 0) == (self.pairs.label > 0.5))
        count = np.bincount(self.pairs.prompt, minlength=len(self.prompts))
        share = np.bincount(self.pairs.prompt, right, len(self.prompts)) / np.maximum(count, 1)
        picked, gold = self._pick(self.rewards), self.table.column("gold")
        return [
            {
                **self.place(unit),
                "rewards": self.rewards[unit * width : (unit + 1) * width][self.table.mask[unit]].tolist(),
                "scores": gold[unit][self.table.mask[unit]].tolist(),
                "right": float(share[unit]) if count[unit] else None,
                "picked": float(picked[unit]),
            }
            for unit in self.units.tolist()
        ]


def characters(response: Any) -> int:
    """Characters of a response; of messages, those of their contents.

    Example:
      >>> characters("four"), characters([{"role": "assistant", "content": "4"}, {"role": "user", "content": "?"}])
      (4, 2)
    """
    return len(response) if isinstance(response, str) else sum(len(message["content"]) for message in response)


def rows_of(judged: Judged) -> dict[str, Row]:
    """Measures of each subset, and of all units under the empty name; those of the lengths stand in `length`."""
    found = {}
    for name in ("", *judged.names()):
        units = judged.of_subset(name) if name else judged.units
        length = None if judged.lengths is None else judged.measure(judged.lengths, units)
        found[name] = {**judged.counts(units), **judged.measure(judged.rewards, units), "length": length}
    return found
