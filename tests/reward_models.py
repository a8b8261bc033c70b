"""Random reward models on the embeddings of tiny checkpoints, and texts for them."""

import numpy as np

from jarm.embedding.config import EmbedConfig
from jarm.embedding.embedder import texts_of
from jarm.embedding.job import read_job
from jarm.export.model import RewardModel
from jarm.reward.config import HeadConfig

PROMPTS = ["what now", "a", "tell me of the sea"]
RESPONSES = ["nothing", "bc", "no </s>"]  # the last ends with the token that ends texts


def model_on(folder, *, head="linear", members=2, chat=True, **made):
    """A random reward model on the embeddings that a checkpoint makes."""
    template = "chat" if chat else made.pop("template", "{prompt}{response}")
    job = read_job(EmbedConfig(str(folder), ("texts",), template=template, **made), texts_of([], []))
    (made_by,) = job.made_by().values()
    rng, d, head = np.random.default_rng(0), job.width, HeadConfig.parse(head)
    sizes = [d, *head.hidden]

    def array(*shape):
        return rng.normal(size=shape).astype(np.float32)

    params = {"out": {"kernel": array(members, sizes[-1], 1)}}
    if head.hidden:
        params["hidden"] = {
            at: {"kernel": array(members, sizes[at], sizes[at + 1]), "bias": array(members, sizes[at + 1])}
            for at in range(len(head.hidden))
        }
    maps = {"mean": 3 * array(d), "deviation": np.exp(array(d))}
    return RewardModel(head, params, array(members), made_by=made_by, **maps)


def chats():
    return [
        [{"role": "user", "content": p}, {"role": "assistant", "content": r}]
        for p, r in zip(PROMPTS, RESPONSES, strict=True)
    ]
