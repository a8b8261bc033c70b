import json

import jax.numpy as jnp
import numpy as np
import pytest

import jarm.core.files
from jarm.core.files import described, existing_file, fingerprint, plain, replace_text
from jarm.core.status import JarmError


def test_only_a_file_is_an_existing_file(tmp_path):
    path = tmp_path / "a"
    with pytest.raises(JarmError, match="does not exist"):
        existing_file(path)
    with pytest.raises(JarmError, match="is a folder"):
        existing_file(tmp_path)
    replace_text(path, "x")
    assert existing_file(str(path)) == path


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "a"
    for text in ("one", "two and more"):
        replace_text(path, text)
        assert path.read_text() == text
    assert [each.name for each in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("whole", [1 << 26, 0], ids=["whole", "sampled"])
def test_a_fingerprint_sees_size_and_content(tmp_path, monkeypatch, whole):
    monkeypatch.setattr(jarm.core.files, "WHOLE", whole)
    contents = [bytes(1 << 17), bytes((1 << 17) + 1), bytes((1 << 17) - 1) + b"x", b"x" + bytes((1 << 17) - 1)]
    found = set()
    for place, content in enumerate(contents):
        path = tmp_path / str(place)
        path.write_bytes(content)
        found.add(fingerprint(path))
    assert len(found) == len(contents)
    assert described(table=path) == {
        "table": path.name,
        "table_bytes": 1 << 17,
        "table_fingerprint": fingerprint(path),
    }


def test_plain_values_are_json():
    values = [jnp.float32(0.5), np.int64(3), np.float32("nan"), float("inf"), np.bool_(True), "text", None]
    assert [plain(value) for value in values] == [0.5, 3, None, None, True, "text", None]
    assert json.dumps([plain(value) for value in values], allow_nan=False)
