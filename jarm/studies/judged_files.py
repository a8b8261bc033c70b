"""Files of pairs, of items with chosen and rejected responses, and of scored responses, read for a reward model.

The layout is recognised by the columns: `--target` means scored responses; lists in both columns of responses, items as
in RewardBench 2; two columns of responses, pairs; and pairs with `subset` and `id`, RewardBench 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jarm.core.messages import nearest
from jarm.core.status import JarmError
from jarm.data.arrow import is_list, is_messages, is_number, is_text
from jarm.data.pairs import SPLIT, pair_labels
from jarm.data.prompts import Prompts, on_test_side
from jarm.data.readers import Columns, read_columns
from jarm.data.rows import rows_of_texts
from jarm.data.sources import CHOSEN, Source
from jarm.data.store import EmbeddingStore
from jarm.data.tables import whole_table
from jarm.data.texts import Texts
from jarm.export.model import RewardModel
from jarm.report.rewardbench import TIES, ties_ids
from jarm.studies.judged import ItemCase, Judged, PairCase, TableCase, characters
from jarm.studies.score import member_rewards, open_for, refuse_other, texts_for
from jarm.studies.train import drawn_pairs

BENCH = {"prompt", "chosen", "rejected", "subset", "id"}
"""Columns of RewardBench 1."""
SUBSET = "subset"


def read_judged(config: Any, model: RewardModel) -> Judged:
    """The file of an `EvaluateConfig`, with the rewards of a model for its responses.

    Raises:
      JarmError: the file or the embeddings are at fault, do not go together, or do not go with the model.
    """
    sides = config.response_columns or CHOSEN
    wanted = [*sides, *config.votes, config.label, config.subset or SUBSET, config.split or SPLIT, "id", "num_correct"]
    columns = read_columns(config.data, [name for name in wanted if name is not None])
    for column in (config.subset, config.split):
        if column is not None and column not in columns.names:
            known = ", ".join(columns.names)
            raise JarmError(f"{config.data} has no column {column!r}{nearest(column, columns.names)}: it has {known}.")
    if config.target is not None:
        return _read_table(config, model, columns)
    store = open_for(model, config.embeddings)
    texts = texts_for([store], config.data, config.prompt_column, config.response_columns)
    lists = len(sides) == 2 and not texts.places.columns and all(_holds_lists(columns, side) for side in sides)
    if not lists and len(texts.places.columns) != 2:
        raise JarmError(
            f"{config.data} is read as {texts.layout}, which does not say what is better: name two columns of "
            "responses (`--response-columns`), or a column of scores (`--target`)."
        )
    rewards = _aggregated(config, model, store, rows_of_texts(config.data, texts, store, config.embeddings))
    return (_read_items if lists else _read_pairs)(config, columns, texts, rewards)


def _aggregated(config: Any, model: RewardModel, store: Any, rows: np.ndarray) -> np.ndarray:
    """`[n]` float64, the reward of each response."""
    aggregate = model.with_aggregate(config.aggregate).aggregate
    return aggregate(member_rewards(model, store, rows)).astype(np.float64)


def _holds_lists(columns: Columns, name: str) -> bool:
    kind = columns.table[name].type if name in columns.table.column_names else pa.null()
    return is_list(kind) and not is_messages(kind)


def _read_pairs(config: Any, columns: Columns, texts: Texts, rewards: np.ndarray) -> PairCase:
    """Pairs, those without votes left out."""
    label = pair_labels(config.data, columns, texts.places.columns, config.label, config.votes).astype(np.float64)
    own = config.label is None and not config.votes
    bench = own and set(columns.names) >= BENCH and texts.places.columns == CHOSEN
    prompts, kept = _units(config, columns, texts, np.arange(0, len(rewards), 2))
    kept = _some(config, kept[np.isfinite(label[kept])])
    subsets = _subsets(config, columns)
    said = f"{'RewardBench 1' if bench else 'Pairs'} ({texts.layout}): {len(kept):,} pairs"
    return PairCase(
        layout="rewardbench" if bench else "pairs",
        read_as=said + _of_subsets(subsets, kept),
        rewards=rewards,
        lengths=_lengths(texts),
        prompts=prompts,
        subsets=subsets,
        units=kept,
        places=_places(columns, columns.table.num_rows),
        label=label,
    )


def _read_items(config: Any, columns: Columns, texts: Texts, rewards: np.ndarray) -> ItemCase:
    """Items, the chosen responses of each before the rejected ones."""
    if config.label is not None or config.votes:
        raise JarmError(f"{config.data} holds lists of responses, which have no labels: leave `--label` out.")
    chosen, rejected = config.response_columns or CHOSEN
    right = np.asarray(pc.list_value_length(columns.table[chosen]).combine_chunks()).astype(np.int64)
    sizes = right + np.asarray(pc.list_value_length(columns.table[rejected]).combine_chunks()).astype(np.int64)
    starts = np.cumsum(sizes) - sizes
    if "num_correct" in columns.names:
        right = _num_correct(config.data, columns, sizes)
    items = np.repeat(np.arange(len(sizes)), sizes)
    correct = np.arange(len(items)) - starts[items] < right[items]
    prompts, kept = _units(config, columns, texts, starts)
    kept = _some(config, kept)
    subsets, ids = _subsets(config, columns), _texts(config.data, columns, "id") if "id" in columns.names else None
    if subsets is not None and ids is None and any(subsets[unit].lower() == TIES for unit in kept):
        raise JarmError(
            f"{config.data} has the subset Ties and no column `id`, which says what belongs together there: give the "
            "file as RewardBench 2 has it."
        )
    ties = np.zeros(len(sizes), bool)
    if subsets is not None and ids is not None:
        ties[kept] = [subsets[unit].lower() == TIES for unit in kept]
    own = np.flatnonzero(ties)
    return ItemCase(
        layout="rewardbench-2",
        read_as=f"RewardBench 2 ({texts.layout}, as lists): {len(kept):,} items" + _of_subsets(subsets, kept),
        rewards=rewards,
        lengths=_lengths(texts),
        prompts=prompts,
        subsets=subsets,
        units=kept,
        places=_places(columns, len(sizes)),
        items=items,
        correct=correct,
        ties=ties,
        ids=ties_ids([ids[unit] for unit in own], right[own], config.data) if ids and len(own) else None,
    )


def _read_table(config: Any, model: RewardModel, columns: Columns) -> TableCase:
    """Prompts with two scored responses or more, and pairs as `jarm train` draws them."""
    whole = whole_table(
        config.data, config.embeddings, config.target, split=config.split, allow_leakage=config.side == "all"
    )
    if isinstance(whole.table.store, EmbeddingStore):
        refuse_other(model, whole.table.store)
    on_side = _on_side(config, whole.is_test)
    several = whole.table.mask.sum(axis=1) > 1
    kept = _some(config, np.flatnonzero(several & on_side))
    table, row = whole.table.take(kept), whole.row[kept]
    pairs = drawn_pairs(table, config.max_pairs, np.random.default_rng(config.seed))
    if not len(pairs):
        raise JarmError(f"{config.data}: no prompt has two responses of different {config.target}: give others.")
    rewards = np.zeros(table.mask.shape)
    rewards[table.mask] = _aggregated(config, model, table.store, table.rows[table.mask])
    unit = "rows" if columns.lines is None else "lines"
    numbers = row if columns.lines is None else columns.lines[row]
    subsets = _table_subsets(config, _subsets(config, columns), row, table.mask)
    length, single = table.attributes.get("length"), int((on_side & ~several).sum())
    said = f"{int(table.mask.sum()):,} responses to {len(kept):,} prompts, with scores in {config.target}"
    left = f" Prompts with one response, left out: {single:,}." if single else ""
    return TableCase(
        layout="responses",
        read_as=said + _of_subsets(subsets, np.arange(len(kept))) + left,
        rewards=rewards.reshape(-1),
        lengths=None if length is None else length.reshape(-1).astype(np.float64),
        prompts=np.arange(len(kept)),
        subsets=subsets,
        units=np.arange(len(kept)),
        places=[{unit: places[real].tolist()} for places, real in zip(numbers, table.mask, strict=True)],
        table=table,
        pairs=pairs,
    )


def _units(config: Any, columns: Columns, texts: Texts, firsts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Prompt of each unit, given its first response; and the units of the side that is wanted."""
    ids, code = texts.prompts(firsts)
    if config.side == "all":
        return code, np.arange(len(code))
    prompts = Prompts(code, list(dict.fromkeys(ids)), np.full(code.max() + 1, -1))
    is_test = on_test_side(config.data, columns.table, prompts, config.split, at=Source(config.data, columns).at)
    return code, np.flatnonzero(_on_side(config, is_test)[code])


def _on_side(config: Any, is_test: np.ndarray) -> np.ndarray:
    return np.ones_like(is_test) if config.side == "all" else is_test == (config.side == "test")


def _some(config: Any, units: np.ndarray) -> np.ndarray:
    if not len(units):
        side = "" if config.side == "all" else f" of the {config.side} side"
        raise JarmError(f"{config.data} has nothing to judge by{side}: give it prompts with several responses.")
    return units


def _subsets(config: Any, columns: Columns) -> list[str] | None:
    """The subset of each row; None without such a column."""
    column = config.subset or SUBSET
    return _texts(config.data, columns, column) if column in columns.names else None


def _texts(name: str, columns: Columns, column: str) -> list[str]:
    """A column of names, as text."""
    values = columns.table[column]
    if not (is_text(values.type) or pa.types.is_integer(values.type)):
        raise JarmError(f"{name}: column {column} holds {values.type}: give text or whole numbers.")
    if values.null_count:
        row = int(np.flatnonzero(np.asarray(values.is_null()))[0])
        raise JarmError(f"{Source(name, columns).at(row)}: {column} is missing; write it, or leave it out.")
    return [str(value) for value in values.to_pylist()]


def _num_correct(name: str, columns: Columns, sizes: np.ndarray) -> np.ndarray:
    """`[U]`, how many of the responses of each item are right: the first ones."""
    values = columns.table["num_correct"]
    if not is_number(values.type) or values.null_count:
        raise JarmError(f"{name}: num_correct has to be a whole number in each row: write it, or leave the column out.")
    found = np.asarray(values.to_pylist(), np.float64)
    bad = np.flatnonzero((found < 1) | (found >= sizes) | (found != np.floor(found)))
    if bad.size:
        raise JarmError(
            f"{Source(name, columns).at(int(bad[0]))}: num_correct is {found[bad[0]]:g}, and the row has "
            f"{sizes[bad[0]]} responses: give a whole number from 1 to one less."
        )
    return found.astype(np.int64)


def _table_subsets(config: Any, subsets: Sequence[str] | None, row: np.ndarray, mask: np.ndarray) -> list[str] | None:
    """The subset of each prompt, the same in all its rows."""
    if subsets is None:
        return None
    found = []
    for rows, real in zip(row, mask, strict=True):
        names = list(dict.fromkeys(subsets[at] for at in rows[real]))
        if len(names) > 1:
            raise JarmError(
                f"{config.data}, row {rows[real][0]}: responses to its prompt are in the subsets {names[0]!r} and "
                f"{names[1]!r}: give all of a prompt one."
            )
        found.append(names[0])
    return found


def _lengths(texts: Texts) -> np.ndarray:
    return np.array([characters(response) for response in texts.columns["response"]], np.float64)


def _places(columns: Columns, count: int) -> list[dict[str, Any]]:
    if columns.lines is None:
        return [{"row": at} for at in range(count)]
    return [{"line": int(line)} for line in columns.lines]


def _of_subsets(subsets: list[str] | None, units: np.ndarray) -> str:
    if subsets is None:
        return "."
    count = len({subsets[unit] for unit in units})
    return f" of {count:,} {'subset' if count == 1 else 'subsets'}."
