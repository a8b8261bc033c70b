"""`jarm train`: a reward model from labelled pairs or from scores, with what it is worth on other prompts.

Pairs are recorded ones (`jarm.data.pairs`), or drawn within the prompts of a table with scores. The model is fitted on
the training prompts; accuracy, loss and calibration are those of pairs of test prompts.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jarm.core.base import HParams, Labelled
from jarm.core.checks import INT32, Check, between, check_fields
from jarm.core.settings import make_key
from jarm.core.status import JarmError, check
from jarm.core.streams import say
from jarm.core.tables import ResponseTable
from jarm.data.metric import read_metric, within_metric
from jarm.data.pairs import PairSplit, PairTable, load_pairs
from jarm.data.standardise import standardised
from jarm.data.tables import load_table
from jarm.export.aggregate import read_aggregate
from jarm.export.card import model_card
from jarm.export.model import RewardModel, refuse_taken
from jarm.report.held_out import calibrate, held_out
from jarm.reward.config import FIT_CHECKS, FitConfig, HeadConfig, unread
from jarm.reward.fit import make_fit
from jarm.runs.config import CompareConfig, documented_by

CURVE = (1 / 8, 1 / 4, 1 / 2)
"""Shares of the training pairs that the learning curve has beside all of them."""
ROWS = 1 << 22
"""Numbers of the embeddings that are read at a time."""
TRAIN_CHECKS: Mapping[str, Check] = {
    "members": FIT_CHECKS["members"],
    "metric": lambda _, text: read_metric(text),
    "head": lambda _, text: HeadConfig.parse(text),
    "aggregate": lambda _, text: read_aggregate(text),
    "max_pairs": between(1, INT32),
    "seed": between(0, INT32),
}
"""Option of `jarm train` -> the check of its values."""


@documented_by(CompareConfig, HParams, FitConfig)
@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of `jarm train`.

    Example:
      >>> TrainConfig(data="pairs.parquet", embeddings="out/embeddings", metric="sharp")
      Traceback (most recent call last):
      jarm.core.status.JarmError: Cannot read the metric 'sharp': write 'none', 'within:ALPHA' or 'within:ALPHA:RANK'.

    Attributes:
      data: a Parquet or JSONL file of pairs (columns `chosen` and `rejected`, or two responses with `--label` or
        `--votes`), or, with `--target`, a table of responses with scores.
      embeddings: a store that has the texts, or an .npy: of a table one row per response, of pairs the first and the
        second response of each row.
      target: column of scores; pairs are then drawn within prompts, and the higher score is preferred.
      prompt_column: column of the prompts of pairs, where it is not `prompt`.
      response_columns: two columns of responses, where they are not `chosen` and `rejected`.
      label: column of labels of pairs: the probability that the first response is preferred.
      votes: columns of votes for the first response, for the second and, if there is one, for a tie.
      split: column of `train` or `test`; by default `split`, if the data have it, else a hash of the prompt decides.
      metric: map of the embeddings: "none", "within:ALPHA" or "within:ALPHA:RANK".
      head: reward head: "laplace", "linear", or "mlp" with the widths of its layers.
      evidence: whether a laplace head chooses its prior variance by the evidence of the labels.
      aggregate: how the model makes one reward of those of its members: "mean", "worst", "lower:C" (C standard
        deviations below the mean) or "quantile:LEVEL".
      max_pairs: largest number of pairs that are drawn from scores, for training and for the test each.
      seed: of the draws and of the heads.
      out: folder of the model; a new one.
    """

    data: str
    embeddings: str
    target: str | None = None
    prompt_column: str | None = None
    response_columns: tuple[str, ...] = ()
    label: str | None = None
    votes: tuple[str, ...] = ()
    split: str | None = None
    standardise: bool = True
    metric: str = "within:2:128"
    head: str = "laplace"
    members: int = 4
    prior_variance: float = float(HParams().prior_variance)
    evidence: bool = True
    weight_decay: float = float(HParams().weight_decay)
    ridge: float = float(HParams().ridge)
    aggregate: str = "mean"
    max_pairs: int = 20_000
    seed: int = 0
    out: pathlib.Path = pathlib.Path("out/model")

    def __post_init__(self) -> None:
        check_fields(self, TRAIN_CHECKS)
        refuse_both(self)
        self.hparams()

    def hparams(self) -> HParams:
        """The traced numbers."""
        return HParams(prior_variance=self.prior_variance, weight_decay=self.weight_decay, ridge=self.ridge)


def refuse_both(config: Any) -> None:
    """Refuse a config with options of scores and of pairs.

    Raises:
      JarmError: it has `target`, and an option that only tables of pairs have.
    """
    of_pairs = [name for name in ("label", "votes", "prompt_column", "response_columns") if getattr(config, name)]
    if config.target is not None and of_pairs:
        raise JarmError(
            f"`target` is for tables of responses with scores, and `{of_pairs[0]}` for tables of pairs: leave one "
            "of the two out."
        )


class Training(NamedTuple):
    """Pairs as arrays.

    Attributes:
      embeddings: `[n, r]` float32, as the table reads them.
      first, second: `[M]` rows of `embeddings`.
      label: `[M]`.
      prompt: `[M]` number of each pair's prompt.
    """

    embeddings: np.ndarray
    first: np.ndarray
    second: np.ndarray
    label: np.ndarray
    prompt: np.ndarray


def train(config: TrainConfig) -> dict[str, Any]:
    """Fit a reward model, measure it on other prompts, and write its folder.

    Args:
      config: the settings.

    Returns:
      What the model was trained on and how well it does, as in its `config.json`.

    Raises:
      JarmError: the data, the settings or the folder are at fault; the message says which and what to do.

    Example:
      >>> import json, tempfile
      >>> from jarm.export.model import load_model
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> rows = [{"prompt": f"p{p}", "chosen": "yes, sir", "rejected": "no"} for p in range(40)]
      >>> _ = (folder / "pairs.jsonl").write_text("\\n".join(map(json.dumps, rows)))
      >>> e = np.random.default_rng(0).normal(size=(80, 3)) + [[2, 0, 0], [0, 0, 0]] * 40
      >>> np.save(folder / "pairs.npy", e)
      >>> names = {"data": str(folder / "pairs.jsonl"), "embeddings": str(folder / "pairs.npy")}
      >>> found = train(TrainConfig(**names, metric="none", out=folder / "model"))
      >>> found["accuracy"]["mean"] > 0.5, load_model(folder / "model").score(e).shape
      (True, (80,))
    """
    refuse_taken(pathlib.Path(config.out))
    if remark := unread(config):
        say(remark)
    pairs = read_pairs(config)
    if config.standardise:
        pairs = pairs.with_tables(standardised(pairs.tables))
    if found := read_metric(config.metric):
        pairs = pairs.with_tables(within_metric(pairs.tables, found))
    training, test = training_of(pairs.train), training_of(_unmapped(pairs.test))
    fit = _fitter(config, training)
    everything = np.ones(len(training.first), bool)
    params, info = fit(everything)
    model = _model(config, pairs.train.table, params, training)
    temperature, scaled = calibrate(_margins(model, test), test.label, test.prompt)
    lengths = _length(pairs.test)
    summary = {
        "data": pathlib.Path(config.data).name,
        "head": config.head,
        "metric": config.metric,
        "labels": len(training.first),
        "test_pairs": len(test.first),
        "prompts": {"train": len(np.unique(training.prompt)), "test": len(np.unique(test.prompt))},
        "left_out": {why: count + pairs.test.left_out[why] for why, count in pairs.train.left_out.items()},
        "ties": {"train": int((training.label == 0.5).sum()), "test": int((test.label == 0.5).sum())},
        "labels_by": f"scores of {config.target}" if config.target else "recorded pairs",
        "train_nll": float(np.mean(info.train_nll)),
        "temperature": temperature,
        **held_out(scaled, test.label, test.prompt),
        "length": None if lengths is None else held_out(lengths, test.label, test.prompt)["accuracy"],
        "curve": _curve(config, fit, training, pairs.train.table, test),
    }
    model = dataclasses.replace(model.scaled(1 / temperature), training=summary)
    model.save(config.out, model_card(model))
    return summary


def read_pairs(config: TrainConfig) -> PairSplit:
    """The pairs that a config names: recorded ones, or pairs drawn within prompts from scores."""
    if config.target is None:
        return recorded_pairs(config)
    tables = load_table(config.data, config.embeddings, config.target, split=config.split)
    rng = np.random.default_rng(config.seed)
    sides = [drawn_pairs(table, config.max_pairs, rng) for table in tables]
    for which, side in zip(("train", "test"), sides, strict=True):
        if not len(side):
            raise JarmError(
                f"{config.data}: no {which} prompt has two responses of different {config.target}: give others."
            )
    return PairSplit(*sides)


def recorded_pairs(config: Any) -> PairSplit:
    """The pairs of a file, by the options of `jarm train` that say how it is read."""
    return load_pairs(
        config.data,
        config.embeddings,
        prompt=config.prompt_column,
        responses=config.response_columns,
        label=config.label,
        votes=config.votes,
        split=config.split,
    )


def drawn_pairs(table: ResponseTable, most: int, rng: np.random.Generator) -> PairTable:
    """Pairs of responses to one prompt with different gold rewards and embeddings, the first of them at random.

    Args:
      table: with gold rewards.
      most: largest number of pairs; more are sampled without replacement.
      rng: chance of the draw.
    """
    width, gold = table.mask.shape[1], table.column("gold")
    upper = np.stack(np.triu_indices(width, 1))
    alike = np.arange(table.mask.size).reshape(table.mask.shape) if table.alike is None else table.alike
    real = table.mask[:, upper[0]] & table.mask[:, upper[1]]
    tied = real & (gold[:, upper[0]] == gold[:, upper[1]])
    same = real & ~tied & (alike[:, upper[0]] == alike[:, upper[1]])
    prompt, column = np.nonzero(real & ~tied & ~same)
    left_out = {
        "of equal scores": int(tied.sum()),
        "of equal embeddings": int(same.sum()),
        "beyond --max-pairs": max(0, len(prompt) - most),
    }
    if len(prompt) > most:
        kept = np.sort(rng.choice(len(prompt), most, replace=False))
        prompt, column = prompt[kept], column[kept]
    ends = upper[:, column]
    ends = np.where(rng.random(len(prompt)) < 0.5, ends, ends[::-1])
    first, second = prompt * width + ends[0], prompt * width + ends[1]
    higher = gold.reshape(-1)[first] > gold.reshape(-1)[second]
    return PairTable(table, first, second, higher.astype(np.float32), np.arange(len(first)), left_out)


def training_of(pairs: PairTable) -> Training:
    """The pairs as arrays, of the responses that exist."""
    count, width, size = pairs.table.shape
    used = np.zeros(count * width, bool)
    used[pairs.first] = used[pairs.second] = True
    number = np.cumsum(used) - 1
    rows, step = list[np.ndarray](), max(1, ROWS // (width * pairs.table.store.shape[1]))
    for start in range(0, count, step):
        some = slice(start, start + step)
        rows.append(pairs.table.embeddings(some).reshape(-1, size)[used[start * width : (start + step) * width]])
    return Training(
        np.concatenate(rows), number[pairs.first], number[pairs.second], pairs.label.astype(np.float32), pairs.prompt
    )


def _fitter(config: TrainConfig, training: Training) -> Any:
    """`keep [M] bool -> (params, info)`, the fit of some of the pairs; compiled once."""
    head = HeadConfig.parse(config.head)
    fit = make_fit(head.head(), FitConfig(members=config.members, evidence=head.laplace and config.evidence))
    embeddings = jnp.asarray(training.embeddings)
    first, second, label = (jnp.asarray(each) for each in (training.first, training.second, training.label))

    def some(keep: np.ndarray) -> tuple[Any, Any]:
        labelled = Labelled(
            jnp.asarray(first, jnp.int32),
            jnp.asarray(second, jnp.int32),
            label,
            jnp.ones(len(label), jnp.float32),
            jnp.asarray(keep),
        )
        params, info = fit(make_key(config.seed), config.hparams(), embeddings, labelled)
        check(info.status)
        return jax.tree.map(np.asarray, params), jax.tree.map(np.asarray, info)

    return some


def _model(config: TrainConfig, table: ResponseTable, params: Any, training: Training) -> RewardModel:
    """The model of fitted parameters, 0 for the average training response."""
    head, params = HeadConfig.parse(config.head), dict(params)
    params.pop("prior_precision", None)  # of laplace heads
    made_by = table.provenance.get("embedded_by")
    model = RewardModel(
        HeadConfig(hidden=()) if head.laplace else head,
        params,
        np.zeros(len(params["out"]["kernel"]), np.float32),
        made_by=made_by,
        aggregate=read_aggregate(config.aggregate),
    )
    offset = model.member_scores(training.embeddings).mean(axis=1, dtype=np.float64)
    return dataclasses.replace(
        model,
        offset=offset.astype(np.float32),
        mean=table.mean,
        deviation=table.deviation,
        metric=table.metric,
    )


def _unmapped(pairs: PairTable) -> PairTable:
    """The pairs with embeddings as they are stored, which a model takes."""
    return dataclasses.replace(pairs, table=dataclasses.replace(pairs.table, mean=None, deviation=None, metric=None))


def _margins(model: RewardModel, test: Training) -> np.ndarray:
    """`[M]` rewards of the first responses less those of the second, in logits; embeddings as they are stored."""
    scores = model.score(test.embeddings).astype(np.float64)
    return scores[test.first] - scores[test.second]


def _length(pairs: PairTable) -> np.ndarray | None:
    """Margins that prefer the longer response; None where lengths are not known."""
    lengths = pairs.table.attributes.get("length")
    if lengths is None:
        return None
    flat = lengths.reshape(-1).astype(np.float64)
    return np.sign(flat[pairs.first] - flat[pairs.second])


def _curve(
    config: TrainConfig, fit: Any, training: Training, table: ResponseTable, test: Training
) -> list[dict[str, Any]]:
    """Held-out accuracy of fits on pairs of a part of the training prompts."""
    prompts = np.unique(training.prompt)
    order = np.random.default_rng(config.seed).permutation(prompts)
    found = []
    for share in CURVE:
        kept = np.isin(training.prompt, order[: max(1, round(share * len(order)))])
        try:
            params, _ = fit(kept)
        except JarmError as error:
            say(f"no fit on {int(kept.sum())} labels: {error}")
            continue
        margins = _margins(_model(config, table, params, training), test)
        found.append(
            {"labels": int(kept.sum()), "accuracy": held_out(margins, test.label, test.prompt)["accuracy"]["mean"]}
        )
    return found
