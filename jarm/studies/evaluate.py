"""`jarm evaluate`: how right a saved reward model is, by a file that says which responses are better."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from jarm.core.checks import INT32, Check, between, check_fields, one_of
from jarm.core.files import make_folder, plain_tree, there, write_whole
from jarm.core.status import JarmError
from jarm.core.streams import say
from jarm.export.aggregate import read_aggregate
from jarm.export.model import RewardModel, load_model
from jarm.studies.judged import rows_of
from jarm.studies.judged_files import read_judged
from jarm.studies.score import embedded_now, refuse_both_embedded
from jarm.studies.train import refuse_both

EVALUATE_CHECKS: Mapping[str, Check] = {
    "aggregate": lambda _, text: read_aggregate(text),
    "dtype": one_of("float32", "bfloat16"),
    "side": one_of("all", "train", "test"),
    "max_pairs": between(1, INT32),
    "seed": between(0, INT32),
}
"""Option of `jarm evaluate` -> the check of its values."""


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Settings of `jarm evaluate`.

    Example:
      >>> EvaluateConfig(model="out/model", data="rb2.jsonl", embeddings="out/rb2", side="held out")
      Traceback (most recent call last):
      jarm.core.status.JarmError: `side` is 'held out': choose one of all, train, test.

    Attributes:
      model: folder of a reward model, as `jarm train` writes it.
      data: a Parquet or JSONL file: RewardBench 1 or 2, pairs as `jarm train` reads them, or, with `--target`, a table
        of responses with scores.
      embeddings: a store that has the texts, or an .npy with one row for each response, those of one row of the file
        one behind the other; without one, the texts are embedded now, as the model's training texts were.
      llm: folder of the language model that embeds them, or its id on the hub; by default the one of the training.
      dtype: of the language model, "float32" or "bfloat16"; by default that of the training embeddings.
      target: column of scores; pairs are then drawn within prompts, and the higher score is preferred.
      aggregate: in the place of the model's own: "mean", "worst", "lower:C" or "quantile:LEVEL".
      prompt_column: column of the prompts, where it is not `prompt`.
      response_columns: two columns of responses, where they are not `chosen` and `rejected`.
      label: column of labels of pairs: the probability that the first response is preferred.
      votes: columns of votes for the first response, for the second and, if there is one, for a tie.
      subset: column of names; by default `subset`, if the data have it.
      side: "all" prompts, or those that `jarm train` would put on the "train" or "test" side of this file.
      split: column of `train` or `test`, for `side`; by default `split`, if the data have it, else a hash of the prompt
        decides.
      max_pairs: largest number of pairs that are drawn from scores.
      seed: of that draw.
      each: JSONL file with a line per pair, item or prompt; a new one. None writes none.
      out: JSON file of the results; a new one.
    """

    model: str
    data: str
    embeddings: str | None = None
    llm: str | None = None
    dtype: str | None = None
    target: str | None = None
    aggregate: str | None = None
    prompt_column: str | None = None
    response_columns: tuple[str, ...] = ()
    label: str | None = None
    votes: tuple[str, ...] = ()
    subset: str | None = None
    side: str = "all"
    split: str | None = None
    max_pairs: int = 20_000
    seed: int = 0
    each: pathlib.Path | None = None
    out: pathlib.Path = pathlib.Path("out/evaluation.json")

    def __post_init__(self) -> None:
        check_fields(self, EVALUATE_CHECKS)
        refuse_both(self)
        refuse_both_embedded(self)
        if self.split is not None and self.side == "all":
            raise JarmError("`split` chooses prompts for a `side`, and `side` is 'all': give 'train' or 'test'.")
        if self.each == self.out:
            raise JarmError(f"`each` and `out` are both {self.out}: give two files.")


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Measure a reward model by a file, write the results, and a line per unit if asked.

    Accuracy is the share of right pairs (RewardBench 1: reward of the chosen over that of the rejected; other pairs:
    share of votes for the response that the model prefers; equal rewards count half), or of right items (RewardBench
    2, and its score of the subset Ties). Intervals are of 95 % with prompts as clusters. Beside each measure stands
    that of preferring the longer response. Losses and calibration errors are those of the rewards as they are.

    Args:
      config: the settings.

    Returns:
      What the file of results holds: `layout`, `read_as`, `overall` and `subsets` with measures by name, `sections` and
      `score` of benchmarks, and the settings.

    Raises:
      JarmError: the model, the data or the embeddings are at fault, do not go together, or a file is there already.

    Example:
      >>> import tempfile
      >>> import numpy as np
      >>> from jarm.export.model import RewardModel
      >>> from jarm.reward.config import HeadConfig
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> params = {"out": {"kernel": np.array([[[1.0]]], np.float32)}}
      >>> RewardModel(HeadConfig(hidden=()), params, np.zeros(1, np.float32)).save(folder / "model")
      >>> row = {"prompt": "2 + 2?", "chosen": ["4"], "rejected": ["five", "22"], "subset": "Math", "id": "7"}
      >>> _ = (folder / "rb2.jsonl").write_text(json.dumps(row))
      >>> np.save(folder / "rb2.npy", np.array([[3.0], [3.0], [1.0]]))  # the chosen one, then the two others
      >>> places = (str(folder / name) for name in ("model", "rb2.jsonl", "rb2.npy"))
      >>> found = evaluate(EvaluateConfig(*places, out=folder / "evaluation.json"))
      >>> found["score"]["mean"], found["score"]["length"]["mean"]  # tied with a wrong one; the longest is wrong
      (0.5, 0.0)
    """
    for path in (config.out, config.each):
        if path is not None and there(path):
            raise JarmError(f"{path} stands there already, and stays: give another --{_option(config, path)}.")
    model = load_model(config.model)
    with tempfile.TemporaryDirectory() as folder:
        judged = read_judged(_embedded(config, model, pathlib.Path(folder)), model)
    name = pathlib.Path(config.data).name
    if config.side == "test" and model.training.get("data") == name:
        say(
            "The temperature of this model was set on these pairs, so that their loss and calibration flatter it: see "
            "what `jarm train` said."
        )
    if config.side == "all" and model.training.get("data") == name:
        say(f"The model was trained on a file {name}: `--side test` leaves out the prompts that it has seen in it.")
    rows = rows_of(judged)
    sections = judged.sections(judged.rewards)
    length = {} if judged.lengths is None else judged.sections(judged.lengths)
    scores = {section: {**found, "length": length.get(section)} for section, found in sections.items()}
    summary = plain_tree(
        {
            "layout": judged.layout,
            "read_as": judged.read_as,
            "score": scores.pop("score", None),
            "sections": scores,
            "overall": rows.pop(""),
            "subsets": rows,
            "settings": {
                "model": config.model,
                "data": name,
                "target": config.target,
                "aggregate": str(model.aggregate) if config.aggregate is None else config.aggregate,
                "side": config.side,
                **({} if config.llm is None else {"llm": config.llm}),
            },
        }
    )
    if config.each is not None:
        make_folder(config.each.parent)
        write_whole(config.each, "".join(json.dumps(line) + "\n" for line in judged.lines()))
    make_folder(config.out.parent)
    write_whole(config.out, json.dumps(summary, indent=1) + "\n")
    return summary


def _embedded(config: EvaluateConfig, model: RewardModel, folder: pathlib.Path) -> EvaluateConfig:
    """The settings with embeddings: where they have none, those of the texts, which are embedded now."""
    if config.embeddings is not None:
        return config
    _, parts = embedded_now(config, model)
    np.save(folder / "embeddings.npy", np.concatenate(list(parts)))
    return dataclasses.replace(config, embeddings=str(folder / "embeddings.npy"), llm=None, dtype=None)


def _option(config: EvaluateConfig, path: pathlib.Path) -> str:
    return "each" if path == config.each else "out"
