"""Commands that judge reward models: by benchmarks and labels, and against each other."""

from __future__ import annotations

from typing import Annotated

import tyro

from jarm.commands.options import built_by
from jarm.core.compiled import keep_compiled
from jarm.core.streams import show
from jarm.report.judging import diff_text, evaluation_text
from jarm.studies.diff import DiffConfig, diff
from jarm.studies.evaluate import EvaluateConfig, evaluate


def evaluate_command(config: Annotated[EvaluateConfig, tyro.conf.OmitArgPrefixes, built_by(EvaluateConfig)]) -> None:
    """Measure a saved reward model: by RewardBench 1 or 2, by labelled pairs, or by scores of responses.

    jarm evaluate --model out/model --data rewardbench2.parquet --embeddings out/rewardbench2 --out out/rb2.json

    jarm evaluate --model out/model --data pairs.parquet --llm models/SmolLM2-135M-Instruct --out out/pairs.json
    """
    keep_compiled()
    show(f"{evaluation_text(evaluate(config))}\n\n{config.out}")


def diff_command(config: Annotated[DiffConfig, tyro.conf.OmitArgPrefixes, built_by(DiffConfig)]) -> None:
    """Compare two saved reward models on the same responses: how far apart, and where most.

    jarm diff --a out/model --b out/other --data answers.jsonl --embeddings out/embeddings --out out/diff.json
    """
    keep_compiled()
    show(f"{diff_text(diff(config))}\n\n{config.out}")
