"""Tables with cached embeddings: the built-in ones, the published layout, or a table of responses beside an array.

Embeddings stay on disk, memory-mapped; everything that would spoil an experiment later (wrong shapes, NaN, prompts
without a pair) is one sentence here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jarm.core.checks import settle
from jarm.core.columns import refuse_ties, smallest
from jarm.core.files import PathLike, described
from jarm.core.messages import nearest
from jarm.core.status import JarmError
from jarm.core.tables import ResponseTable, TrainTest
from jarm.data.metric import read_metric, within_metric
from jarm.data.readers import open_npy, read_columns, refuse_nonfinite
from jarm.data.standardise import standardised
from jarm.data.synthetic import VARIANTS, synthetic
from jarm.data.tables import attribute_names, check_sides, load_table, stated


def load(
    data: PathLike,
    *,
    embeddings: PathLike | None = None,
    target: str | None = None,
    attributes: str | Sequence[str] | None = None,
    gen: str | None = None,
    emb: str | None = None,
    task: str | None = None,
    seed: int = 0,
    standardise: bool = True,
    metric: str = "none",
    validate: bool = True,
    allow_leakage: bool = False,
) -> TrainTest:
    """The tables that `data` names: `synthetic`, `synthetic:VARIANT`, a folder, or a `.parquet` or `.jsonl` table.

    Args:
      data: a folder is read by `load_published`, a table by `load_table`.
      embeddings: required for a table: the `.npy` of its rows or the store that has its texts.
      target: for a table: the column of its gold scores; without one the tables have no gold, and all prompts are in
        the training table, unless a column `split` says otherwise.
      attributes: for a table: further columns of numbers to read as attributes; names, or a text with commas between.
      gen, emb, task: for a folder: the setting, if the folder holds several.
      seed: seed of the synthetic tables.
      standardise: whether embeddings are given mean 0 and variance 1 in each dimension, as `standardised` does.
      metric: map of the embeddings after that: `none`; or `within:ALPHA` or `within:ALPHA:RANK`, as `within_metric`.
      validate: whether to read all embeddings once in search of NaN and infinities.
      allow_leakage: for a table: whether one prompt may be in the training and in the test set, under two ids.

    Raises:
      JarmError: the data are missing, damaged, or of a kind that the options do not fit; or the responses of every test
        prompt have equal scores, so that nothing could be measured.

    Example:
      >>> train, test = load("synthetic")
      >>> train.shape, test.shape  # prompts, responses per prompt, width of an embedding
      ((200, 10, 32), (100, 20, 32))
    """
    standardise = settle("`standardise`", standardise, bool)
    mapped_by = read_metric(settle("`metric`", metric, str))
    validate = settle("`validate`", validate, bool)
    allow_leakage = settle("`allow_leakage`", allow_leakage, bool)
    embeddings = settle("`embeddings`", embeddings, str | os.PathLike | None)
    name = str(data)
    columns = attribute_names(name, () if attributes is None else attributes)
    table_options = {
        "embeddings": embeddings,
        "target": target,
        "attributes": columns or None,
        "allow_leakage": allow_leakage or None,
    }
    folder_options = {"gen": gen, "emb": emb, "task": task}
    if name == "synthetic" or name.startswith("synthetic:"):
        _refuse(name, "a built-in data set", table_options | folder_options)
        variant = name.partition(":")[2] or "default"
        if variant not in VARIANTS:
            raise JarmError(
                f"The synthetic tables have no variant {variant!r}{nearest(variant, VARIANTS)}: "
                f"use one of {', '.join(VARIANTS)}."
            )
        tables = synthetic(seed, VARIANTS[variant])
    elif os.path.isdir(name):
        _refuse(name, "a folder in the published layout", table_options)
        tables = load_published(name, gen, emb, task, validate=validate)
    else:
        _refuse(name, "a table", folder_options)
        if embeddings is None:
            read_columns(name, [])  # a file that is no table comes first
            raise JarmError(
                f"{name} is a table without embeddings: give the .npy of its rows, or their store (`--embeddings`)."
            )
        tables = load_table(
            name, embeddings, target, attributes=columns, validate=validate, allow_leakage=allow_leakage
        )
    gold, mask = tables.test.gold, tables.test.mask
    if gold is not None:  # or else no metric is defined
        refuse_ties(gold, mask, "within", where=f" of the test prompts of {name}")
    tables = standardised(tables) if standardise else tables
    return tables if mapped_by is None else within_metric(tables, mapped_by)


def load_published(
    directory: PathLike,
    gen: str | None = None,
    emb: str | None = None,
    task: str | None = None,
    *,
    validate: bool = True,
) -> TrainTest:
    """Read `embd_{gen}_{emb}_{task}_{split}.npy`, (P, R, d), and `reward_{...}.npy`, (P, R, 1), for train and test.

    The layout of Shen, Sun and Ton (arXiv 2502.04354). Embeddings are memory-mapped and never copied.

    Args:
      directory: folder of the four files of a setting.
      gen, emb, task: the generating model, the embedding model and the task; each may be omitted if the folder has only
        one.
      validate: whether to read all embeddings once in search of NaN and infinities.

    Raises:
      JarmError: no setting or several fit, a file is missing or damaged, shapes disagree, or a value is not finite.
    """
    directory = Path(directory)
    if not os.path.isdir(directory):
        raise JarmError(f"{directory} is not a folder: check the path.")
    names = (re.fullmatch(r"embd_(.+)_(?:train|test)\.npy", path.name) for path in directory.iterdir())
    settings = sorted({match[1] for match in names if match})
    fitting = [setting for setting in settings if _fits(setting, gen, emb, task)]
    if len(fitting) != 1:
        found = "no files embd_{gen}_{emb}_{task}_{split}.npy" if not settings else f"settings {', '.join(settings)}"
        cure = "check the path" if not settings else "choose one by gen, emb and task"
        raise JarmError(f"{directory} holds {found}, of which {len(fitting)} fit: {cure}.")
    (setting,) = fitting
    train, test = (_published_split(directory, setting, split, validate) for split in ("train", "test"))
    if train.shape[2] != test.shape[2]:
        raise JarmError(
            f"{directory}, {setting}: train embeddings are {train.shape[2]} wide and test embeddings "
            f"{test.shape[2]}: embed both with one model."
        )
    return check_sides(TrainTest(train, test), str(directory))


def _published_split(directory: Path, setting: str, split: str, validate: bool) -> ResponseTable:
    paths = [directory / f"{kind}_{setting}_{split}.npy" for kind in ("embd", "reward")]
    embeddings, rewards = (open_npy(path) for path in paths)
    if embeddings.ndim != 3:
        raise JarmError(f"{paths[0]} has shape {embeddings.shape}: the layout wants (prompts, responses, width).")
    P, R, d = embeddings.shape
    if rewards.shape not in ((P, R, 1), (P, R)):
        raise JarmError(
            f"{paths[1]} has shape {rewards.shape} where the embeddings' {embeddings.shape} wants {(P, R, 1)}: "
            f"score the responses that were embedded."
        )

    gold = smallest(np.array(rewards, np.float64)).reshape(P, R)
    refuse_nonfinite(gold.reshape(-1), str(paths[1]), R)
    store = embeddings.reshape(P * R, d)
    if validate:
        refuse_nonfinite(store, str(paths[0]), R)
    table = ResponseTable(
        store=store,
        rows=np.arange(P * R).reshape(P, R),
        mask=np.ones((P, R), bool),
        gold=gold,
        attributes={"position": np.tile(np.arange(R, dtype=np.float32), (P, 1))},
        provenance={
            "source": "published",
            "setting": setting,
            **described(embeddings=paths[0], rewards=paths[1]),
            "dtype": str(store.dtype),
        },
    )
    return stated(table, split)


def _refuse(name: str, kind: str, options: dict[str, Any]) -> None:
    given = [option for option, value in options.items() if value is not None]
    if given:
        raise JarmError(f"{name} is {kind}, which takes no {' or '.join(given)}: leave that out.")


def _fits(setting: str, gen: str | None, emb: str | None, task: str | None) -> bool:
    """Whether the names can be read out of `gen_emb_task`; each of the three may itself contain underscores."""
    parts = (r".+" if part is None else re.escape(part) for part in (gen, emb, task))
    return re.fullmatch("_".join(parts), setting) is not None
