"""The model card of a reward model: `README.md` of its folder, as the Hugging Face hub reads it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jarm.core.status import printable
from jarm.core.version import __version__
from jarm.export.model import RewardModel

ASKED = (
    ("pooling", "pooling"),
    ("layer", "layer"),
    ("template", "text, with \x1e where a chat template puts the two together"),
    ("max_length", "largest number of tokens"),
    ("keep", "end of longer texts that stays"),
    ("normalize", "scaled to length 1"),
)
"""Entry of `made_by` -> its name on the card."""


def model_card(
    model: RewardModel, *, pipeline: str | None = None, library: str = "jarm", remarks: Sequence[str] = ()
) -> str:
    """The card of a model, or of an export of it.

    Args:
      model: with its training summary.
      pipeline: task of the hub, such as `text-classification`; None for none.
      library: program that loads the folder.
      remarks: sentences on this export.

    Example:
      >>> from jarm.reward.config import HeadConfig
      >>> import numpy as np
      >>> params = {"out": {"kernel": np.ones((1, 2, 1), np.float32)}}
      >>> print(model_card(RewardModel(HeadConfig(hidden=()), params, np.zeros(1, np.float32))).splitlines()[1])
      library_name: jarm
    """
    made, trained = model.made_by or {}, model.training
    head = {"library_name": library, "tags": ["reward-model"], "pipeline_tag": pipeline}
    if "/" in str(made.get("model", "")):
        head |= {"base_model": made["model"]}
    front = [
        f"{key}: {json.dumps(value) if isinstance(value, list) else value}" for key, value in head.items() if value
    ]
    lines = ["---", *front, "---", "# Reward model", ""]
    lines += [
        f"A reward model made by jarm {__version__}: {model.members} {model.head} head{'s' * (model.members > 1)} on "
        f"embeddings of {model.width:,} numbers, one reward by the {model.aggregate} of members. Rewards are logits: "
        "the difference of two is the log odds that the first response is preferred.",
        "",
        *(f"- {remark}" for remark in remarks),
        *([""] if remarks else []),
        "## Texts and embeddings",
        "",
        *_made(made),
        "",
        "## Training",
        "",
        *_trained(trained),
        "",
        "## Not for",
        "",
        "- comparing responses to different prompts: it was trained on pairs that share one, so that what differs "
        "between prompts was never asked about;",
        "- texts that are unlike those of its training, or put together in another way than the one above;",
        "- absolute judgements, such as safe or unsafe, without labels that set the threshold.",
    ]
    return "\n".join(lines) + "\n"


def _made(made: Mapping[str, Any]) -> list[str]:
    if not made:
        return ["How its embeddings were made is not known: they came as an array."]
    rows = [f"- {name}: `{_code(made[key])}`" for key, name in ASKED if key in made]
    return [f"- model: `{_code(made.get('model'))}`, weights {made.get('weights')}", *rows]


def _code(value: Any) -> str:
    return printable(json.dumps(value, ensure_ascii=False)).replace("`", "'")[:500]


def _trained(trained: Mapping[str, Any]) -> list[str]:
    if "distilled_from" in trained:
        return [
            f"- a linear model fitted to the rewards of a {trained['distilled_from']} head"
            + (f", which had {trained['labels']:,} labels ({trained['labels_by']})" if "labels" in trained else ""),
            f"- its rewards rank texts as that head's to a correlation of "
            f"{trained['rank_correlation']:.3f} (Spearman); how right it is was not measured: `jarm evaluate` does",
        ]
    if "accuracy" not in trained:
        return ["Nothing is recorded."]
    accuracy, length = trained["accuracy"], trained["length"]
    curve = ", ".join(f"{row['accuracy']:.3f} from {row['labels']:,}" for row in trained["curve"])
    return [
        f"- {trained['labels']:,} labels ({trained['labels_by']}) of {trained['prompts']['train']:,} prompts in "
        f"`{_code(trained['data'])}`",
        f"- accuracy on {trained['test_pairs']:,} pairs of {trained['prompts']['test']:,} other prompts: "
        f"{_share(accuracy)}; preferring the longer response: {_share(length) if length else 'not known'}",
        f"- loss {trained['nll']:.3f} nats, calibration error {trained['calibration_error']:.3f}, after a temperature "
        f"of {trained['temperature']:.2f} that was set on other prompts of the same held-out pairs",
        f"- fits on fewer labels: {curve or 'none'}",
    ]


def _share(found: Mapping[str, float | None]) -> str:
    mean, low, high = (found[name] for name in ("mean", "low", "high"))
    if mean is None or math.isnan(mean):
        return "not known"
    if low is None or high is None or math.isnan(low):
        return f"{mean:.3f} (of too few prompts for an interval)"
    return f"{mean:.3f} ({low:.3f} to {high:.3f})"
