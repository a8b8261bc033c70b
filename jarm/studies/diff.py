"""`jarm diff`: where two saved reward models differ on the same responses."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jarm.core.checks import Check, at_least, check_fields
from jarm.core.files import make_folder, plain_tree, there, write_whole
from jarm.core.status import JarmError, printable
from jarm.data.rows import rows_of_texts
from jarm.data.store import canonical
from jarm.data.texts import Texts
from jarm.export.aggregate import read_aggregate
from jarm.export.model import load_model
from jarm.report.clusters import clustered_mean, spearman_within
from jarm.report.disagreement import Distance, agreement, reward_distance, widest
from jarm.studies.score import member_rewards, open_for, texts_for

LONGEST = 300
"""Characters of a text that are shown."""
DIFF_CHECKS: Mapping[str, Check] = {"aggregate": lambda _, text: read_aggregate(text), "show": at_least(0)}
"""Option of `jarm diff` -> the check of its values."""


@dataclasses.dataclass(frozen=True)
class DiffConfig:
    """Settings of `jarm diff`.

    Example:
      >>> DiffConfig(a="out/model", b="out/other", data="answers.jsonl", embeddings="out/embeddings").show
      5

    Attributes:
      a: folder of a reward model, as `jarm train` writes it.
      b: folder of another.
      data: a Parquet or JSONL file of responses, in any layout that `jarm embed` reads.
      embeddings: a store that has the texts, or an .npy with one row for each response.
      embeddings_b: those that the second model reads, where it was trained on others.
      aggregate: in the place of the models' own: "mean", "worst", "lower:C" or "quantile:LEVEL".
      prompt_column: column of the prompts, where it is not `prompt`.
      response_columns: columns of the responses, where they have none of the usual names.
      show: largest number of pairs that are shown with their texts, each of another prompt.
      out: JSON file of the results; a new one.
    """

    a: str
    b: str
    data: str
    embeddings: str
    embeddings_b: str | None = None
    aggregate: str | None = None
    prompt_column: str | None = None
    response_columns: tuple[str, ...] = ()
    show: int = 5
    out: pathlib.Path = pathlib.Path("out/diff.json")

    def __post_init__(self) -> None:
        check_fields(self, DIFF_CHECKS)


def diff(config: DiffConfig) -> dict[str, Any]:
    """Compare two reward models on the responses of a file, and write the results.

    Prompts with one response, which say nothing of a difference, are left out.

    Args:
      config: the settings.

    Returns:
      What the file of results holds: `distance` and `correlation` as of `reward_distance`; `agreement`, `pairs` and
      `tied` as of `agreement`; `spearman` within prompts and `spearman_undefined`, prompts without; `differ`, the pairs
      that the models see most differently, with `width` in standard deviations of rewards within prompts; and sizes.

    Raises:
      JarmError: a model, the data or the embeddings are at fault, do not go together, no prompt has two responses, or
        the file is there already.

    Example:
      >>> import tempfile
      >>> from jarm.export.model import RewardModel
      >>> from jarm.reward.config import HeadConfig
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> for name, kernel in {"a": [[1.0], [0.0]], "b": [[-2.0], [0.0]]}.items():
      ...     params = {"out": {"kernel": np.array([kernel], np.float32)}}
      ...     RewardModel(HeadConfig(hidden=()), params, np.zeros(1, np.float32)).save(folder / name)
      >>> rows = [{"prompt": "2 + 2?", "response": text} for text in ("4", "5")]
      >>> _ = (folder / "answers.jsonl").write_text("\\n".join(map(json.dumps, rows)))
      >>> np.save(folder / "answers.npy", np.array([[3.0, 0.0], [1.0, 0.0]]))
      >>> places = (str(folder / name) for name in ("a", "b", "answers.jsonl", "answers.npy"))
      >>> found = diff(DiffConfig(*places, out=folder / "diff.json"))
      >>> round(found["distance"], 3), found["agreement"]["mean"], found["differ"][0]["first"]
      (1.0, 0.0, {'place': 'line 1', 'text': '4', 'a': 3.0, 'b': -6.0})
    """
    if there(config.out):
        raise JarmError(f"{config.out} stands there already, and stays: give another --out.")
    texts, (a, b) = _read(config)
    _, prompts = texts.prompts()
    several = np.bincount(prompts)[prompts] > 1
    if not several.any():
        raise JarmError(f"{config.data}: every prompt has one response, so there is no pair to compare: give others.")
    kept = np.flatnonzero(several)
    _, own = np.unique(prompts[kept], return_inverse=True)
    distance = reward_distance(a[kept], b[kept], own)
    spearman = spearman_within(a[kept], b[kept], own)
    known = np.flatnonzero(np.isfinite(spearman))
    summary = plain_tree(
        {
            "a": config.a,
            "b": config.b,
            "data": pathlib.Path(config.data).name,
            "responses": len(kept),
            "prompts": len(spearman),
            "prompts_of_one": int((~several).sum()),
            "distance": distance.distance,
            "correlation": distance.correlation,
            **agreement(a[kept], b[kept], own),
            "spearman": clustered_mean(spearman[known], known, bounds=(-1.0, 1.0)),
            "spearman_undefined": len(spearman) - len(known),
            "differ": _differ(config, texts, distance, kept, own, {"a": a, "b": b}),
        }
    )
    make_folder(config.out.parent)
    write_whole(config.out, json.dumps(summary, indent=1) + "\n")
    return summary


def _read(config: DiffConfig) -> tuple[Texts, list[np.ndarray]]:
    """The responses, and the `[n]` float64 rewards of each model."""
    models = [load_model(folder) for folder in (config.a, config.b)]
    places = [config.embeddings, config.embeddings_b or config.embeddings]
    stores = [open_for(model, place) for model, place in zip(models, places, strict=True)]
    texts = texts_for(stores, config.data, config.prompt_column, config.response_columns)
    rewards = []
    for model, place, store in zip(models, places, stores, strict=True):
        aggregate = model.with_aggregate(config.aggregate).aggregate
        members = member_rewards(model, store, rows_of_texts(config.data, texts, store, place))
        rewards.append(aggregate(members).astype(np.float64))
    return texts, rewards


def _differ(
    config: DiffConfig,
    texts: Texts,
    distance: Distance,
    kept: np.ndarray,
    prompts: np.ndarray,
    rewards: Mapping[str, np.ndarray],
) -> list[dict[str, Any]]:
    """The pairs that are seen most differently, with their texts."""

    def side(at: int) -> dict[str, Any]:
        place = texts.places[at].removeprefix(f"{config.data}, ")
        text = shortened(texts.columns["response"][at])
        return {"place": place, "text": text, **{name: float(values[at]) for name, values in rewards.items()}}

    pairs, widths = widest(distance.a, distance.b, prompts, config.show)
    return [
        {
            "prompt": shortened(texts.columns["prompt"][first]),
            "width": width,
            "first": side(first),
            "second": side(second),
        }
        for (first, second), width in zip(kept[pairs].tolist(), widths.tolist(), strict=True)
    ]


def shortened(text: Any, longest: int = LONGEST) -> str:
    """A text, or messages as JSON, in one line that a terminal shows and does not obey; the middle of a long one cut.

    Example:
      >>> shortened("one, two, three, four", 12)
      'one, t … four'
    """
    line = text if isinstance(text, str) else canonical(text)
    if len(line) > longest:
        line = f"{line[: longest // 2]} … {line[-(longest // 2 - 2) :]}"
    return printable(line)
