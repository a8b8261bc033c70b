"""From the number of a response back to its file, row, prompt and text."""

import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jarm.core.status import JarmError
from jarm.core.tables import Place, ResponseTable
from jarm.data.pairs import load_pairs
from jarm.data.tables import load_table
from jarm.studies.recorded import shuffled

ROWS = [
    {"prompt": f"p{p % 5}", "response": f"text {p}", "score": float(p), "split": "test" if p % 5 > 2 else "train"}
    for p in range(12)
]


def written(folder, form, rows):
    np.save(folder / "rows.npy", np.random.default_rng(0).normal(size=(24, 3)))
    path = folder / f"rows.{form}"
    if form == "jsonl":
        path.write_text("\n\n".join(map(json.dumps, rows)))  # every other line is empty
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_every_response_leads_back_to_its_row(tmp_path, form):
    path = written(tmp_path, form, ROWS)
    np.save(tmp_path / "own.npy", np.load(tmp_path / "rows.npy")[:12])
    for table in load_table(path, tmp_path / "own.npy", "score"):
        table = pickle.loads(pickle.dumps(table.take(np.arange(len(table.rows))[::-1])))
        real = np.flatnonzero(table.mask)
        for n, place in zip(real, table.where(real), strict=True):
            row = int(table.gold.reshape(-1)[n])  # the score tells the row
            said = ROWS[row]
            unit, number = ("line", 2 * row + 1) if form == "jsonl" else ("row", row)
            assert place == Place(str(path), unit, number, said["prompt"], said["prompt"], said["response"])


def test_lists_of_responses_and_pairs_too(tmp_path):
    rows = [{"prompt": f"p{p}", "responses": ["a", f"b{p}"], "score": [0.0, 1.0]} for p in range(12)]
    train, _ = load_table(written(tmp_path, "jsonl", rows), tmp_path / "rows.npy", "score")
    place = train.where(3)[0]
    assert (place.response, place.prompt) == (f"b{(place.row - 1) // 2}", f"p{(place.row - 1) // 2}")
    rows = [{"prompt": f"p{p}", "chosen": f"c{p}", "rejected": f"r{p}"} for p in range(12)]
    train, _ = load_pairs(written(tmp_path, "jsonl", rows), tmp_path / "rows.npy")
    for first, second in zip(train.first, train.second, strict=True):
        won, lost = train.table.where([first, second])
        row = (won.row - 1) // 2
        assert (won.prompt_id, won.response, lost.response, lost.row) == (f"p{row}", f"c{row}", f"r{row}", won.row)


def test_shuffled_responses_lead_back_to_their_own(tmp_path):
    rows = [{"prompt": f"p{p % 4}", "chosen": f"c{p}", "rejected": f"r{p}"} for p in range(12)]
    train, _ = load_pairs(written(tmp_path, "jsonl", rows), tmp_path / "rows.npy")
    moved = shuffled(train)
    assert (moved.first != train.first).any()
    assert moved.table.where(moved.first) == train.table.where(train.first)
    assert moved.table.where(moved.second) == train.table.where(train.second)


def test_what_is_not_there_is_refused(tmp_path):
    train, _ = load_table(written(tmp_path, "jsonl", ROWS * 2), tmp_path / "rows.npy", "score")
    with pytest.raises(JarmError, match=r"The table has no response 99: give numbers p \* 6 \+ r"):
        train.where([0, 99])
    with pytest.raises(JarmError, match=r"The table has no response 0\.5"):
        train.where(0.5)
    with pytest.raises(JarmError, match="does not come from a file of responses"):
        ResponseTable(np.eye(2), np.array([[0, 1]]), np.ones((1, 2), bool)).where(0)
