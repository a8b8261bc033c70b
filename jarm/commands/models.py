"""Commands about models: embed with a language model, train a reward model, score with it."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import tyro

from jarm.commands.options import built_by
from jarm.core.compiled import keep_compiled
from jarm.core.streams import show
from jarm.data.pairs import left_out_text
from jarm.embedding.config import EmbedConfig
from jarm.embedding.embed import embed
from jarm.report.statistics import interval
from jarm.studies.score import ScoreConfig, score
from jarm.studies.train import TrainConfig, train


def embed_command(config: Annotated[EmbedConfig, tyro.conf.OmitArgPrefixes, built_by(EmbedConfig)]) -> None:
    """Embed prompts and responses with a language model, once, into a store.

    Stop it at any time, with Control-C or without warning: the same command goes on where it was.

    jarm embed --model HuggingFaceTB/SmolLM2-135M --input responses.jsonl --out out/embeddings
    """
    keep_compiled()
    if config.template is not None:  # as shells pass it on
        config = dataclasses.replace(config, template=config.template.replace("\\n", "\n").replace("\\t", "\t"))
    summary = embed(config)
    if config.show or jax.process_index():
        return
    show(
        f"{summary.distinct:,} distinct of {summary.texts:,} texts; {summary.embedded:,} embedded now, "
        f"{summary.distinct - summary.embedded:,} were there."
    )
    if summary.embedded:
        show(
            f"{summary.embedded / summary.seconds:,.1f} texts/s, {summary.tokens / summary.seconds:,.0f} tokens/s, "
            f"{summary.waste:.1%} padding, {summary.seconds:,.0f} s"
        )
    if summary.truncated:
        show(f"{summary.truncated:,} texts were longer than --max-length, or than the model allows, and were cut.")
    if summary.same_texts:
        show(
            f"{summary.same_texts:,} of {summary.distinct:,} distinct texts are the same tokens as another, with the "
            f"same embedding: {summary.same_pairs:,} of {summary.pairs:,} pairs within prompts, and all pairs of "
            f"{summary.same_prompts:,} of {summary.prompts:,} prompts, are left without a difference."
        )
    if summary.empty_responses:
        show(f"{summary.empty_responses:,} responses are empty; they were embedded as any other.")
    for store in summary.stores:
        show(store)


def train_command(config: Annotated[TrainConfig, tyro.conf.OmitArgPrefixes, built_by(TrainConfig)]) -> None:
    """Fit a reward model to labelled pairs or to scores, measure it on other prompts, and save it.

    jarm train --data pairs.parquet --embeddings out/embeddings --out out/model
    """
    keep_compiled()
    found = train(config)
    accuracy, length = found["accuracy"], found["length"]
    show(
        f"{found['labels']:,} labels of {found['prompts']['train']:,} prompts. On {found['test_pairs']:,} pairs of "
        f"{found['prompts']['test']:,} other prompts: accuracy {accuracy['mean']:.3f} "
        f"{interval(accuracy['low'], accuracy['high'])}"
        + (f" (the majority of votes: {found['majority']:.3f})" if found["majority"] < 1 else "")
        + (f", the longer response {length['mean']:.3f}" if length else "")
        + f", loss {found['nll']:.3f} nats, calibration error {found['calibration_error']:.3f}."
    )
    if said := left_out_text(found["left_out"]):
        show(f"{said[0].upper()}{said[1:]}.")
    if ties := sum(found["ties"].values()):
        show(f"{ties:,} pairs have the label 1/2: they teach, and take no part in accuracy.")
    if not accuracy["low"] > 0.5:
        show("That it is better than chance is not shown: its rewards are not to be trusted as log odds.")
    for row in found["curve"]:
        show(f"{row['labels']:>9,} labels  accuracy {row['accuracy']:.3f}")
    show(f"\n{config.out}")


def score_command(config: Annotated[ScoreConfig, tyro.conf.OmitArgPrefixes, built_by(ScoreConfig)]) -> None:
    """Score responses with a saved reward model, and rank those to one prompt.

    jarm score --model out/model --data answers.jsonl --embeddings out/embeddings --out out/scores.jsonl
    """
    keep_compiled()
    found = score(config)
    show(
        f"{found['responses']:,} responses to {found['prompts']:,} prompts; the best of each is {found['best_of']:.2f} "
        f"logits above its mean.\n\n{config.out}"
    )
