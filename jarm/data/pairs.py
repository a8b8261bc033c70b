"""Tables of labelled pairs: chosen and rejected responses, or two responses with votes or a label."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jarm.core.files import PathLike, described
from jarm.core.messages import listed, nearest
from jarm.core.status import JarmError
from jarm.core.tables import Origin, ResponseTable, TrainTest
from jarm.data.arrow import is_number
from jarm.data.prompts import Prompts, on_test_side
from jarm.data.readers import Columns, read_columns, refuse_nonfinite
from jarm.data.rows import open_embeddings, rows_of_texts
from jarm.data.sources import CHOSEN, Source
from jarm.data.store import EmbeddingStore
from jarm.data.tables import stated
from jarm.data.texts import Texts, extra_fields, read_texts

SPLIT = "split"


@dataclasses.dataclass(frozen=True)
class PairTable:
    """M labelled pairs of the responses of a table.

    Attributes:
      table: P prompts with up to R distinct responses each, without gold rewards; N = P * R.
      first, second: `[M]` int64, responses by index into the N.
      label: `[M]` float32 in [0, 1], the share of votes, or probability, that `first` is preferred.
      row: `[M]` int64, row of each pair in its file, from 0.
      left_out: why pairs of these prompts are not among them -> how many.
    """

    table: ResponseTable
    first: np.ndarray
    second: np.ndarray
    label: np.ndarray
    row: np.ndarray
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.first)

    @property
    def prompt(self) -> np.ndarray:
        """`[M]` number of each pair's prompt in the table, from 0; that of `first` where they have two."""
        return self.first // self.table.rows.shape[1]

    def take(self, pairs: np.ndarray) -> PairTable:
        """Some of the pairs, by index or a boolean mask, of the same table."""
        return dataclasses.replace(
            self, **{name: getattr(self, name)[pairs] for name in ("first", "second", "label", "row")}
        )


class PairSplit(NamedTuple):
    """Pairs to train on, and pairs of other prompts for evaluation."""

    train: PairTable
    test: PairTable

    def with_tables(self, tables: TrainTest) -> PairSplit:
        """The same pairs, of tables that were standardised or mapped."""
        return PairSplit(*(dataclasses.replace(side, table=of) for side, of in zip(self, tables, strict=True)))

    @property
    def tables(self) -> TrainTest:
        """The two tables of responses."""
        return TrainTest(self.train.table, self.test.table)


def load_pairs(
    data: PathLike,
    embeddings: PathLike,
    *,
    prompt: str | None = None,
    responses: Sequence[str] = (),
    label: str | None = None,
    votes: Sequence[str] = (),
    split: str | None = None,
) -> PairSplit:
    """Read a table with one pair of responses per row, and the embeddings of its texts.

    Columns `chosen` and `rejected` are pairs whose first response is preferred. Other two columns need a label: a
    column of numbers in [0, 1], 1 where the first is preferred, or columns of votes for the first, for the second and,
    as a third, for a tie, which counts half. Pairs with no votes, and pairs of equal embeddings, are left out.

    Args:
      data: `.parquet` or `.jsonl`.
      embeddings: folder of an `EmbeddingStore`, whose rows are found by the texts; or `.npy` `(2 n, d)`, the first and
        the second response of each row.
      prompt: column of the prompts, where it is not `prompt`; without one, the common beginning of the two responses.
      responses: the two columns of responses, where they are not `chosen` and `rejected`.
      label: column of labels.
      votes: two or three columns of votes.
      split: column of `train` or `test`; by default `split` if the table has it, else a hash puts about a quarter of
        the prompts in the test set.

    Returns:
      Training pairs and test pairs, of different prompts, with `length` (characters) as an attribute of their tables.

    Raises:
      JarmError: a file or a column is missing or damaged, labels are out of range, texts are missing from the store, or
        a side has no pair that could be learnt from.

    Example:
      >>> import json, pathlib, tempfile
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> rows = [{"prompt": f"p{p}", "chosen": "yes, sir", "rejected": "no"} for p in range(8)]
      >>> _ = (folder / "pairs.jsonl").write_text("\\n".join(map(json.dumps, rows)))
      >>> np.save(folder / "pairs.npy", np.arange(48.0).reshape(16, 3))  # chosen, rejected, chosen, rejected, ...
      >>> train, test = load_pairs(folder / "pairs.jsonl", folder / "pairs.npy")
      >>> len(train) + len(test), train.label[0]
      (8, np.float32(1.0))
    """
    name = str(data)
    columns = read_columns(data, [*([label] if label else []), *votes, split or SPLIT])
    store = open_embeddings(embeddings)
    extra = extra_fields(store.template) if isinstance(store, EmbeddingStore) else []
    texts = read_texts([data], prompt=prompt, responses=responses, extra=extra, as_given=True)
    if len(texts.places.columns) != 2:
        raise JarmError(
            f"{name} is read as {texts.layout}, and a pair has two columns of responses: name them "
            "(`--response-columns first second`); a table with scores is for `jarm compare --target`."
        )
    labels = pair_labels(name, columns, texts.places.columns, label, tuple(votes))
    rows = rows_of_texts(name, texts, store, embeddings)
    if not isinstance(store, EmbeddingStore):
        refuse_nonfinite(store, str(embeddings))
    ids, code = texts.prompts(range(0, len(texts.places), 2))
    prompts = Prompts(code, list(dict.fromkeys(ids)), np.full(code.max() + 1, -1))
    if split is not None and split not in columns.names:
        raise JarmError(
            f"{name} has no column {split!r}{nearest(split, columns.names)}: it has {', '.join(columns.names)}."
        )
    is_test = on_test_side(name, columns.table, prompts, split, at=Source(name, columns).at)
    whole = _pair_table(prompts, rows, labels, texts, store)
    number = np.zeros(whole.table.mask.shape, np.int64)
    number.reshape(-1)[np.stack([whole.first, whole.second], 1).reshape(-1)] = np.arange(len(texts.places))
    again = functools.partial(_texts, data, prompt, tuple(responses), tuple(extra))
    origin = Origin(name, texts.places.counted[0], texts.places.rows[number], number, prompts.ids, again)
    table = dataclasses.replace(_stated(whole.table, data, embeddings, store, rows), origin=origin)
    whole = dataclasses.replace(whole, table=table)
    unlabelled = ~np.isfinite(whole.label)
    left_out = {"without votes": unlabelled, "of equal embeddings": _equal(whole) & ~unlabelled}
    sides = PairSplit(_side(whole, ~is_test, left_out, "train"), _side(whole, is_test, left_out, "test"))
    for which, side in zip(("train", "test"), sides, strict=True):
        if not len(side):
            raise JarmError(
                f"{name} has no {which} pair left: of {len(labels):,} pairs {int(unlabelled.sum()):,} have no votes, "
                f"and {int(left_out['of equal embeddings'].sum()):,} have responses of equal embeddings; give others, "
                "or a column `split` with pairs on both sides."
            )
    return sides


def pair_labels(
    name: str, columns: Columns, responses: tuple[str, ...], label: str | None, votes: tuple[str, ...]
) -> np.ndarray:
    """`[M]` float32, share of the votes for the first response of each row; NaN where there are none.

    Args:
      name: the table, for messages.
      columns: its columns, those of the label and of the votes among them.
      responses: names of the two columns of responses.
      label, votes: as of `load_pairs`.

    Raises:
      JarmError: a column is missing or holds what is no label, or nothing says which response is preferred.
    """
    if label is not None and votes:
        raise JarmError("A pair has a label or votes, not both: leave `--label` or `--votes` out.")
    at = Source(name, columns).at

    def place(row: int) -> str:
        return at(row).removeprefix(f"{name}, ")

    if label is not None:
        found = _numbers(name, columns, label)
        bad = np.flatnonzero(~((found >= 0) & (found <= 1)))
        if bad.size:
            raise JarmError(
                f"{name}: {label} is {found[bad[0]]:g} in {listed(bad, place=place)}; write the "
                "probability that the first response is preferred, from 0 to 1."
            )
        return found.astype(np.float32)
    if votes:
        if len(votes) not in (2, 3):
            raise JarmError(
                f"`--votes` names {len(votes)} columns: name those for the first, the second and, if any, a tie."
            )
        counts = np.stack([_numbers(name, columns, column) for column in votes])
        bad = np.flatnonzero(~(counts >= 0).all(axis=0) | ~np.isfinite(counts).all(axis=0))
        if bad.size:
            raise JarmError(f"{at(int(bad[0]))}: votes are {counts[:, bad[0]].tolist()}; write counts from 0.")
        total = counts.sum(axis=0)
        won = counts[0] + (0.5 * counts[2] if len(votes) == 3 else 0)
        return np.divide(won, total, out=np.full(len(total), np.nan), where=total > 0).astype(np.float32)
    if responses != CHOSEN:
        raise JarmError(
            f"{name} does not say which of {' and '.join(responses)} is preferred: name a column of labels (`--label`) "
            "or columns of votes (`--votes`)."
        )
    return np.ones(len(columns.table), np.float32)


def _numbers(name: str, columns: Columns, column: str) -> np.ndarray:
    if column not in columns.names:
        raise JarmError(
            f"{name} has no column {column!r}{nearest(column, columns.names)}: it has {', '.join(columns.names)}."
        )
    values = columns.table[column]
    if not (is_number(values.type) or str(values.type) == "bool"):
        raise JarmError(f"{name}: column {column!r} holds {values.type}, not numbers: give one of numbers.")
    if values.null_count:
        row = int(np.flatnonzero(np.asarray(values.is_null()))[0])
        where = Source(name, columns).at(row)
        raise JarmError(f"{where}: {column} is missing; write a number, or leave the pair out.")
    return np.asarray(values.to_pylist(), np.float64)


def _pair_table(prompts: Prompts, rows: np.ndarray, labels: np.ndarray, texts: Texts, store: Any) -> PairTable:
    """All pairs; each distinct text of a prompt is one response."""
    code = np.repeat(prompts.code, 2)
    distinct, where = np.unique(code * len(store) + rows, return_inverse=True)
    of = distinct // len(store)
    counts = np.bincount(of, minlength=len(prompts.ids))
    slot = np.arange(len(distinct)) - np.searchsorted(of, of)
    width = int(counts.max())
    mask = np.arange(width) < counts[:, None]
    places = np.zeros(mask.shape, np.int64)
    places[of, slot] = distinct % len(store)
    length = np.zeros(mask.shape, np.float32)
    length[of[where], slot[where]] = [len(each) if isinstance(each, str) else 0 for each in texts.columns["response"]]
    index = (of * width + slot)[where]
    return PairTable(
        ResponseTable(store, places, mask, attributes={"length": length}),
        first=index[::2],
        second=index[1::2],
        label=labels,
        row=np.arange(len(labels)),
    )


def _texts(data: PathLike, prompt: str | None, responses: Sequence[str], extra: Sequence[str]) -> tuple[Any, Any]:
    """Prompts and responses of a table of pairs, one for each response."""
    columns = read_texts([data], prompt=prompt, responses=responses, extra=extra, as_given=True).columns
    return columns["prompt"], columns["response"]


def left_out_text(left_out: Mapping[str, int]) -> str:
    """Why pairs were left out, and how many; empty where none was.

    Example:
      >>> left_out_text({"without votes": 1200, "of equal embeddings": 0})
      'left out: 1,200 pairs without votes'
    """
    said = ", ".join(f"{count:,} {'pair' if count == 1 else 'pairs'} {why}" for why, count in left_out.items() if count)
    return f"left out: {said}" if said else ""


def _equal(pairs: PairTable) -> np.ndarray:
    """`[M]` whether the two responses of each pair have equal embeddings, as equal texts do."""
    alike = np.arange(pairs.table.mask.size) if pairs.table.alike is None else pairs.table.alike.reshape(-1)
    return alike[pairs.first] == alike[pairs.second]


def _side(pairs: PairTable, prompts: np.ndarray, left_out: Mapping[str, np.ndarray], name: str) -> PairTable:
    """The pairs of some prompts, `[P]` bool, but for those left out, `[M]` bool by reason; and their table."""
    width = pairs.table.rows.shape[1]
    number, here = np.cumsum(prompts) - 1, prompts[pairs.prompt]
    own = pairs.take(here & ~np.any(list(left_out.values()), axis=0))
    moved = (number[own.prompt] - own.prompt) * width
    return dataclasses.replace(
        own,
        table=stated(pairs.table.take(prompts), name),
        first=own.first + moved,
        second=own.second + moved,
        left_out={why: int((here & which).sum()) for why, which in left_out.items()},
    )


def _stated(table: ResponseTable, data: PathLike, embeddings: PathLike, store: Any, rows: np.ndarray) -> ResponseTable:
    """The table with its provenance."""
    made = {"source": "pairs", **described(table=data), "dtype": str(store.dtype)}
    if isinstance(store, EmbeddingStore):
        made |= {
            "embeddings": store.path.name,
            "embeddings_fingerprint": store.fingerprint(rows),
            "embedded_by": dict(store.meta.made_by),
        }
    else:
        made |= described(embeddings=embeddings)
    return dataclasses.replace(table, provenance=made)
