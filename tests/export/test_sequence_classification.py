"""Reward models as sequence classification models of transformers: the same scores there, or a refusal."""

import dataclasses
import json

import numpy as np
import pytest
from fixtures.tiny import CHAT, write_checkpoint
from reward_models import PROMPTS, RESPONSES, chats, model_on

from jarm.core.status import JarmError
from jarm.embedding.embedder import job_of
from jarm.export.aggregate import read_aggregate
from jarm.export.sequence_classification import write_sequence_classification


def scores_there(folder, texts):
    """Scores as programs of reinforcement learning compute them: padded on the right, no special tokens added."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    there, report = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, output_loading_info=True, dtype=torch.float32
    )
    assert not any(report.values()), report
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not isinstance(texts[0], str):
        texts = [tokenizer.apply_chat_template(each, tokenize=False) for each in texts]
    batch = tokenizer(text=texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
    with torch.no_grad():
        return there.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0].numpy()


@pytest.mark.slow  # needs torch
@pytest.mark.parametrize("case", ["llama", "qwen2", "gemma3", "gpt2", "gpt_neox", "phi3"])
def test_scores_there_are_the_rewards_but_for_the_stated_constant(tmp_path, case):
    folder = write_checkpoint(tmp_path / case, case, chat=CHAT)
    model = model_on(folder)
    found = write_sequence_classification(model, tmp_path / "out", str(folder))
    rewards = model.score_texts(PROMPTS, RESPONSES, llm=str(folder))
    np.testing.assert_allclose(
        scores_there(tmp_path / "out", chats()) + found["constant"], rewards, rtol=1e-5, atol=1e-5 * np.ptp(rewards)
    )
    assert f"plus {found['constant']:.6g}" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow  # needs torch
@pytest.mark.parametrize("pad", ["</s>", None])
def test_a_pad_token_that_ends_texts_is_replaced(tmp_path, pad):
    folder = write_checkpoint(tmp_path / "llama", "llama", bos=False)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["pad_token"] = pad
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    model = model_on(folder, chat=False)
    found = write_sequence_classification(model, tmp_path / "out", str(folder))
    assert found["pad_token_id"] not in (2, None)
    rewards = model.score_texts(PROMPTS, RESPONSES, llm=str(folder))
    texts = [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    np.testing.assert_allclose(scores_there(tmp_path / "out", texts) + found["constant"], rewards, rtol=2e-5, atol=1e-4)
    # With the old token, the end of the last text would be skipped.
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps({**config, "pad_token_id": 2}))
    assert abs(scores_there(tmp_path / "out", texts) + found["constant"] - rewards)[2] > 0.1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"head": "mlp:6"}, r"one linear layer, and this head is mlp:6:gelu .*--distil"),
        ({"aggregate": "worst"}, r"the worst of 2 members, and layers can only average"),
        ({"pooling": ("mean",)}, r"here embeddings are the mean of layer \d of \d"),
        ({"layer": (1,)}, r"here embeddings are the last of layer 1 of \d"),
        ({"normalize": True}, "here embeddings are mapped or scaled after the pooling"),
        (
            {"chat": False, "template": "{prompt}\n\n{response}"},
            r"trained on '\{prompt\}\\n\\n\{response\}', with 1 sp",
        ),
        ({"chat": False}, r"'\{prompt\}\{response\}', with 1 special tokens around it: embed with `--template chat`"),
    ],
)
def test_what_it_cannot_hold_is_refused_with_the_ways_out(tmp_path, change, said):
    folder = write_checkpoint(tmp_path / "llama", "llama", chat=CHAT)
    aggregate = read_aggregate(change.pop("aggregate", "mean"))
    model = dataclasses.replace(model_on(folder, **change), aggregate=aggregate)
    with pytest.raises(JarmError, match=said):
        write_sequence_classification(model, tmp_path / "out", str(folder))
    assert not (tmp_path / "out").exists()


def test_encoders_and_unknown_embeddings_are_refused(tmp_path):
    folder = write_checkpoint(tmp_path / "bert", "bert")
    model = model_on(folder, chat=False, pooling=("mean",))
    assert job_of(model.made_by, str(folder)).model.encoder
    with pytest.raises(JarmError, match="the language model is a bert, and only decoders"):
        write_sequence_classification(model, tmp_path / "out", str(folder))
    with pytest.raises(JarmError, match=r"came from an \.npy: train on a store"):
        write_sequence_classification(dataclasses.replace(model, made_by=None), tmp_path / "out", str(folder))
