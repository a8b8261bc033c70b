"""Reward functions as each program calls them, with a double in the place of the language model."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from fixtures.tiny import CHAT, write_checkpoint
from reward_models import PROMPTS, RESPONSES, chats, model_on

from jarm.core.status import JarmError
from jarm.embedding.embedder import Frame
from jarm.export.batcher import Batcher, Busy
from jarm.export.functions import TextScorer, openrlhf_function, response_in, trl_function, verl_function
from jarm.export.model import RewardModel
from jarm.reward.config import HeadConfig


class Double:
    """Embeddings that tell which texts they are of: letters of the prompt and of the response, and calls so far."""

    max_length, ends = 100, ("</s>",)

    def __init__(self, frame=None):
        self.said, self.calls = frame, []

    def __call__(self, prompts, responses):
        self.calls.append(len(prompts))
        if any(response == "bad" for response in responses):
            raise JarmError("a bad text")

        def size(text):
            return len(text) if isinstance(text, str) else sum(len(each["content"]) for each in text)

        return np.array([[size(p), size(r)] for p, r in zip(prompts, responses, strict=True)], np.float32)

    def whole(self, texts):
        return np.array([[len(text), 0] for text in texts], np.float32)

    @property
    def frame(self):
        return self.said

    @property
    def chat(self):
        return self.said is not None


def model(members=2):
    """Reward: letters of the response, plus a hundredth of those of the prompt; members differ by 2."""
    kernel = np.array([[[0.01], [1.0]]] * members, np.float32)
    offset = np.linspace(-1, 1, members).astype(np.float32)
    return RewardModel(HeadConfig(hidden=()), {"out": {"kernel": kernel}}, offset)


def test_trl_gets_floats_of_texts_and_of_messages_and_nan_for_what_is_no_text():
    metrics, extras = {}, {}
    reward = trl_function(model(), embed=Double(), name="mine")
    assert reward.__name__ == "mine"
    found = reward(
        prompts=["ab", [{"role": "user", "content": "abcd"}], "ab", "ab"],
        completions=["xyz", [{"role": "assistant", "content": "x"}], None, [{"role": "assistant", "content": None}]],
        log_metric=metrics.__setitem__,
        log_extra=extras.__setitem__,
        trainer_state=None,
        completion_ids=None,
    )
    np.testing.assert_allclose(found, [3.02, 1.04, np.nan, np.nan], rtol=1e-6)
    assert metrics == {"mine/deviation": 1.0}
    np.testing.assert_allclose(extras["mine_deviation"], [1, 1, np.nan, np.nan])
    assert np.isnan(reward(["a"], [None])).all()
    for odd in (("ab", "xyz"), (["ab"], ["x", "y"])):
        with pytest.raises(JarmError, match="a list of prompts and a list of as many completions"):
            reward(*odd)
    assert np.isnan(reward(["ab"], [["x"]])).all()
    with pytest.raises(JarmError, match="has 2 messages, and this reward model was trained on plain texts"):
        reward([[{"role": "user", "content": "a"}] * 2], ["b"])


def test_verl_gets_a_number_or_a_list_and_has_to_give_the_prompt():
    compute_score = verl_function(model(), embed=Double())
    assert compute_score("data", "xyz", None, {"prompt": "ab"}) == pytest.approx(3.02)
    found = compute_score(
        data_sources=["d"] * 2,
        solution_strs=["x", "xy"],
        ground_truths=[None] * 2,
        extra_infos=np.array([{"prompt": "ab"}] * 2, object),  # as verl has it
    )
    np.testing.assert_allclose(found, [1.02, 2.02], rtol=1e-6)
    with pytest.raises(JarmError, match="verl hands none over: write it into the column `extra_info`"):
        compute_score("data", "xyz", None, {})


def test_openrlhf_calls_from_many_threads_are_scored_together():
    embed = Double()
    reward_func = openrlhf_function(model(), embed=embed, wait=0.1)
    with ThreadPoolExecutor(32) as pool:
        queries = [f"ab{'x' * n}</s>" for n in range(64)]
        found = list(pool.map(lambda query: reward_func([query], ["ab"], [""]), queries))
    np.testing.assert_allclose([each["rewards"][0] for each in found], np.arange(64) + 0.02, rtol=1e-5)
    scores = np.array([float(each["scores"][0]) for each in found])
    assert ((scores >= 0.5) & (scores <= 1)).all()
    assert found[0]["extra_logs"]["deviation"] == pytest.approx([1.0])
    assert sum(embed.calls) == 64
    assert len(embed.calls) < 32


def test_queries_under_a_chat_template_are_closed_as_it_closes_them():
    score = TextScorer(model(), embed=Double(Frame("|a:", "|", left=True, right=True)))
    queries = ["u:hi|a: yes </s>", "u:hi|a:yes|</s>", "u:hi|a:yes|\n", "u:hi|yes"]
    prompts = ["u:hi|a:", "u:hi|a:", "u:hi|a:", "u:hi|"]  # the last without the whole generation prompt
    assert score.texts(queries, prompts) == ["u:hi|a:yes|"] * 4
    with pytest.raises(JarmError, match=r"A prompt ends with 'hi', and the chat template .* writes '\|a:'"):
        score.texts(["hi yes"], ["hi"])


def test_a_query_without_its_prompt_is_refused():
    assert response_in("<s>ab c</s></s>", "ab", ["</s>"]) == " c"
    with pytest.raises(JarmError, match="The query 'xy' does not begin with its prompt 'ab'"):
        response_in("xy", "ab")


def test_a_bad_text_fails_alone():
    score = TextScorer(model(), embed=Double(), wait=0.1)
    good, bad = score.batcher.submit([("ab", "xyz")]), score.batcher.submit([("ab", "bad")])
    assert good.result()[0][0] == pytest.approx(3.02)
    with pytest.raises(JarmError, match="a bad text"):
        bad.result()
    assert score(["a"], ["b"])[0].shape == (1,)


def test_what_is_over_the_queue_is_refused_and_the_rest_is_scored():
    begun, go = threading.Event(), threading.Event()

    def slow(texts):
        begun.set()
        go.wait(10)
        return np.arange(len(texts), dtype=float), np.zeros(len(texts))

    with Batcher(slow, most=3, budget=1) as batcher:
        first = batcher.submit(["a"])
        begun.wait(10)
        later = [batcher.submit(["a"]) for _ in range(3)]
        with pytest.raises(Busy, match=r"3 texts wait, and 1 more are over the 3 that may"):
            batcher.submit(["a"])
        go.set()
        assert [len(each.result()[0]) for each in (first, *later)] == [1] * 4
        assert batcher.waiting == 0
    with pytest.raises(JarmError, match="was closed"):
        batcher.submit(["a"])


def test_a_request_of_more_than_may_wait_is_scored_where_none_waits():
    with Batcher(lambda texts: (np.zeros(len(texts)), np.zeros(len(texts))), most=3) as batcher:
        assert len(batcher.submit(["a"] * 9).result()[0]) == 9


def test_requests_that_were_given_up_are_not_scored():
    calls, begun, go = [], threading.Event(), threading.Event()

    def slow(texts):
        calls.append(len(texts))
        begun.set()
        go.wait(10)
        return np.zeros(len(texts)), np.zeros(len(texts))

    with Batcher(slow, budget=1) as batcher:
        batcher.submit(["a"])
        begun.wait(10)
        assert batcher.submit(["a"]).cancel()
        go.set()
    assert calls == [1]


def test_a_batch_holds_its_budget_and_a_larger_request_goes_alone():
    calls = []

    def count(texts):
        calls.append(len(texts))
        time.sleep(0.02)
        return np.zeros(len(texts)), np.zeros(len(texts))

    with Batcher(count, budget=4, wait=0.05) as batcher:
        futures = [batcher.submit(["a"] * n) for n in (2, 2, 7, 1)]
        for future in futures:
            future.result()
    assert calls == [4, 7, 1]


def test_queries_of_a_real_chat_template_are_the_texts_of_training(tmp_path):
    folder = write_checkpoint(tmp_path / "llama", "llama", chat=CHAT)
    trained = model_on(folder)
    score = TextScorer(trained, str(folder))
    prompts = [f"<s>u:{prompt}|a:" for prompt in PROMPTS[:2]]
    queries = [prompt + response + "</s>" for prompt, response in zip(prompts, RESPONSES, strict=False)]
    expected = trained.score_texts(PROMPTS[:2], RESPONSES[:2], llm=str(folder))
    np.testing.assert_allclose(score.queries(queries, prompts)[0], expected, rtol=1e-5, atol=1e-5)
    messages = chats()[:2]
    found = trl_function(trained, str(folder))([each[:1] for each in messages], [each[1:] for each in messages])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
