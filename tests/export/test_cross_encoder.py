"""Reward models as CrossEncoders: the same scores in sentence-transformers, or a refusal."""

import dataclasses
import json

import numpy as np
import pytest
from fixtures.tiny import CHAT, write_checkpoint
from reward_models import PROMPTS, RESPONSES, chats, model_on

from jarm.core.status import JarmError
from jarm.export.aggregate import read_aggregate
from jarm.export.cross_encoder import write_cross_encoder
from jarm.export.layers import member_layers, reward_layers, rewards_of


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu", "tanh"])
def test_layers_are_the_members_side_by_side(tmp_path, activation):
    folder = write_checkpoint(tmp_path / "llama", "llama")
    model = model_on(folder, head=f"mlp:6,3:{activation}", members=3, chat=False)
    embeddings = np.random.default_rng(1).normal(size=(5, model.width)).astype(np.float32)
    members = rewards_of(member_layers(model), embeddings)
    np.testing.assert_allclose(members.T, model.member_scores(embeddings), rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(rewards_of(reward_layers(model), embeddings)[:, 0], members.mean(axis=1), rtol=1e-12)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"head": "mlp:6:gelu_tanh"}, "gelu_tanh has none of its own: train with one of gelu, relu, silu, tanh"),
        ({"aggregate": "worst"}, r"the worst of 2 members, and layers can only average"),
        ({"layer": (1,)}, r"these embeddings are of layer 1 of \d: use `--to onnx`"),
    ],
)
def test_what_it_cannot_hold_is_refused_with_the_ways_out(tmp_path, change, said):
    folder = write_checkpoint(tmp_path / "llama", "llama", chat=CHAT)
    aggregate = read_aggregate(change.pop("aggregate", "mean"))
    model = dataclasses.replace(model_on(folder, **change), aggregate=aggregate)
    with pytest.raises(JarmError, match=said):
        write_cross_encoder(model, tmp_path / "out", str(folder))
    assert not (tmp_path / "out").exists()


@pytest.mark.sentence_transformers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("case", "made"),
    [
        ("llama", {"head": "mlp:6,3", "members": 3}),
        ("gemma3", {"head": "linear", "chat": False, "pooling": ("mean",)}),
        ("qwen2", {"head": "mlp:5:silu", "chat": False, "template": "{prompt}\n\n{response}", "normalize": True}),
        ("bert", {"head": "mlp:6:tanh", "chat": False, "pooling": ("mean",)}),
        ("llama", {"head": "linear", "chat": False, "max_length": 7}),  # keeps the end of longer texts
        ("gpt2", {"head": "mlp:6", "no_pad": True}),
        ("bert", {"head": "mlp:6:relu", "chat": False, "pooling": ("cls",), "max_length": 9}),
    ],
)
def test_scores_there_are_the_rewards(tmp_path, case, made):
    from sentence_transformers import CrossEncoder

    folder = write_checkpoint(tmp_path / case, case, eos=case == "bert", chat=CHAT)
    if made.pop("no_pad", False):
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": None, "bos_token": "</s>"}))
    template = made.get("template", "{prompt}{response}")
    chat = made.get("chat", True)
    model = model_on(folder, **made)
    write_cross_encoder(model, tmp_path / "out", str(folder))
    rewards = model.score_texts(PROMPTS, RESPONSES, llm=str(folder))
    there = CrossEncoder(str(tmp_path / "out"), device="cpu")
    texts = [template.format(prompt=p, response=r) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    if chat:
        texts = [there.tokenizer.apply_chat_template(each, tokenize=False) for each in chats()]
    scores = there.predict([(text, "") for text in texts])
    np.testing.assert_allclose(scores, rewards, rtol=1e-5, atol=2e-5)
