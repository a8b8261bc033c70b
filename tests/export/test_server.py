"""`jarm serve` over real sockets, with a double in the place of the language model."""

import base64
import http.client
import json
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from fixtures.tiny import write_checkpoint
from reward_models import model_on
from test_functions import Double, model

from benchmarks.serve import served
from jarm.cli import main
from jarm.core.status import JarmError
from jarm.export.functions import TextScorer
from jarm.export.server import Drift
from jarm.studies.serve import ServeConfig, serve


def asked(port, path, body=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    connection.request("GET" if body is None else "POST", path, data, headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, json.loads(text) if answer.headers["content-type"].startswith("application/json") else text


def test_the_request_of_openrlhf_gets_its_answer():
    with served(TextScorer(model(), embed=Double())) as port:
        # As `openrlhf` 0.11 sends it, and reads it: lists of one length.
        request = {"query": ["abxyz</s>", "abx"], "prompts": ["ab", "ab"], "labels": ["", ""]}
        status, answer = asked(port, "/get_reward", request)
    assert status == 200
    assert set(answer) == {"rewards", "scores", "extra_logs"}
    np.testing.assert_allclose(answer["rewards"], [3.02, 1.02], rtol=1e-6)
    np.testing.assert_allclose(answer["scores"], 1 / (1 + np.exp(-np.array([3.02, 1.02]))), rtol=1e-6)
    assert answer["extra_logs"]["deviation"] == pytest.approx([1, 1])


def test_another_path_or_method_is_refused_as_all_else():
    with served(TextScorer(model(), embed=Double())) as port:
        for status, said, answer in (
            (404, "Not Found: this server has POST /get_reward", asked(port, "/rewards")),
            (404, "Not Found", asked(port, "/rewards", {})),
            (405, "Method Not Allowed: ", asked(port, "/score")),
            (405, "Method Not Allowed: ", asked(port, "/health", {})),
        ):
            assert answer[0] == status
            assert answer[1]["error"].startswith(said)


def test_a_score_like_that_of_vllm_health_and_metrics():
    with served(TextScorer(model(), embed=Double()), name="mine") as port:
        status, answer = asked(port, "/score", {"model": "mine", "text_1": "ab", "text_2": ["x", "xy"]})
        assert status == 200
        assert [each["score"] for each in answer["data"]] == pytest.approx([1.02, 2.02])
        assert [each["index"] for each in answer["data"]] == [0, 1]
        assert asked(port, "/health")[1]["status"] == "ok"
        metrics = asked(port, "/metrics")[1]
    assert 'jarm_requests_total{path="/score",status="200"} 1.0' in metrics
    assert "jarm_texts_total 2.0" in metrics
    assert "jarm_waiting_texts 0.0" in metrics


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/score", b"{", 400, "The request is no JSON: send an object."),
        ("/score", b"[1]", 400, "The request is no JSON object: send one with the fields of this path."),
        ("/score", b"[" * 10**5, 400, "The request is no JSON: send an object."),
        ("/score", {"text_1": "a"}, 400, "`text_2` is no list of texts: give one or more."),
        ("/score", {"text_1": "a", "text_2": [3]}, 400, "`text_2` is no list of texts: give one or more."),
        (
            "/score",
            {"text_1": ["a", "b"], "text_2": ["c"] * 3},
            400,
            "`text_1` has 2 texts and `text_2` 3: give",
        ),
        ("/score", {"text_1": "a", "text_2": "bad"}, 400, "a bad text"),
        ("/score", {"text_1": "a", "text_2": ["b"] * 9}, 413, "9 texts are more than the 8 that may wait."),
        ("/get_reward", {"query": ["ab"], "prompts": ["x"]}, 400, "The query 'ab' does not begin with its prompt 'x'"),
        ("/get_reward", {"query": ["ab"], "prompts": ["a", "b"]}, 400, "There are 1 queries and 2 prompts"),
    ],
)
def test_bad_requests_get_a_status_and_a_sentence(path, body, status, said):
    with served(TextScorer(model(), embed=Double(), most=8)) as port:
        found, answer = asked(port, path, body)
        assert found == status
        assert answer["error"].startswith(said)
        assert asked(port, "/health")[0] == 200


def test_a_token_is_asked_for_where_there_is_one():
    with served(TextScorer(model(), embed=Double()), token="secret") as port:
        body = {"text_1": "a", "text_2": "b"}
        assert asked(port, "/score", body)[0] == 401
        assert asked(port, "/score", body, Authorization="Bearer wrong")[0] == 401
        assert asked(port, "/score", body, Authorization="Bearer secret")[0] == 200
        basic = base64.b64encode(b":secret").decode()  # of http://:secret@HOST, as OpenRLHF can be told
        assert asked(port, "/score", body, Authorization=f"Basic {basic}")[0] == 200
        assert asked(port, "/score", body, Authorization="Basic !")[0] == 401
        assert asked(port, "/health")[0] == 200


def test_nothing_asked_gets_nothing_and_a_failure_is_counted():
    embed = Double()
    with served(TextScorer(model(), embed=embed)) as port:
        status, answer = asked(port, "/get_reward", {"query": [], "prompts": [], "labels": []})
        assert (status, answer["rewards"]) == (200, [])
        embed.ends = None  # a bug of ours
        assert asked(port, "/get_reward", {"query": ["ab"], "prompts": ["a"]})[0] == 500
        assert 'jarm_requests_total{path="/get_reward",status="500"} 1.0' in asked(port, "/metrics")[1]


def test_64_clients_at_once_get_each_their_own():
    embed = Double()
    with served(TextScorer(model(), embed=embed, wait=0.02)) as port, ThreadPoolExecutor(64) as pool:

        def ask(n):
            return asked(port, "/score", {"text_1": "ab", "text_2": ["x" * n, "x"]})

        found = list(pool.map(ask, range(256)))
    assert [status for status, _ in found] == [200] * 256
    np.testing.assert_allclose([each["data"][0]["score"] for _, each in found], np.arange(256) + 0.02, rtol=1e-5)
    assert len(embed.calls) < 128


def test_drift_is_the_mean_in_deviations_of_the_training():
    rng = np.random.default_rng(0)
    drift = Drift(np.full(50, 3.0), np.full(50, 2.0))
    assert drift.value == 0
    for _ in range(400):
        drift.add(3 + 2 * rng.normal(size=(10, 50)))
    assert drift.value < 0.06
    for _ in range(400):
        drift.add(5 + 2 * rng.normal(size=(10, 50)))
    assert drift.value == pytest.approx(1, abs=0.1)


def test_an_address_that_others_reach_needs_a_token(monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("JARM_TOKEN", raising=False)
    with pytest.raises(JarmError, match=r"0\.0\.0\.0 can be reached from other machines, and no token is asked for"):
        serve(ServeConfig(str(tmp_path), host="0.0.0.0"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        model().save(tmp_path / "model")
        with pytest.raises(JarmError, match=f"Cannot listen at 127.0.0.1, port {port} "):
            serve(ServeConfig(str(tmp_path / "model"), port=port))
    assert main(["serve", "--model", str(tmp_path)]) == 1
    assert "holds no reward model of jarm" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_serves_a_model_until_it_is_told_to_stop(tmp_path):
    folder = write_checkpoint(tmp_path / "llama", "llama")
    trained = model_on(folder, chat=False)
    trained.save(tmp_path / "model")
    words = ["serve", "--model", str(tmp_path / "model"), "--llm", str(folder), "--port", "0"]
    process = subprocess.Popen([sys.executable, "-m", "jarm.cli", *words], stderr=subprocess.PIPE, text=True)
    try:
        said = next(line for line in process.stderr if " at http://" in line)
        port = int(said.partition("http://")[2].partition(":")[2].partition(":")[0])
        _, answer = asked(port, "/score", {"text_1": "ab", "text_2": ["c", "de"]})
        expected = trained.score_texts(["ab", "ab"], ["c", "de"], llm=str(folder))
        np.testing.assert_allclose([each["score"] for each in answer["data"]], expected, rtol=1e-5, atol=1e-5)
        assert asked(port, "/score", {"text_1": "a", "text_2": "\ud800"})[1]["error"].endswith("or leave it out.")
        assert "shapes of texts meanwhile, up to" in next(process.stderr)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) is not None
        process.stderr.close()


@pytest.mark.parametrize("token", ["s\u00e9cret", "a\tb"])
def test_a_token_that_no_request_can_carry_is_refused(monkeypatch, tmp_path, token):
    monkeypatch.setenv("JARM_TOKEN", token)
    with pytest.raises(JarmError, match="JARM_TOKEN holds letters that no request can carry"):
        serve(ServeConfig(str(tmp_path)))
