"""What jarm is compared with must itself be right: the baselines against formulas, the referee against mistakes."""

import itertools

import numpy as np
import pytest

from benchmarks import referee, timing


def pairs(m=60, width=4, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(m, width))
    return x, referee.fisher_weight(x @ rng.normal(size=width))


def test_weight_and_leverages_from_the_formula():
    x, v = pairs()
    p = 1 / (1 + np.exp(-np.linspace(-9, 9, 7)))
    np.testing.assert_allclose(referee.fisher_weight(np.linspace(-9, 9, 7)), p * (1 - p), rtol=1e-9)
    past = np.diag([1.0, 2.0, 3.0, 4.0])
    inverse = np.linalg.inv(sum(w * np.outer(row, row) for w, row in zip(v, x, strict=True)) + past)
    np.testing.assert_allclose(referee.leverages(x, v, past), [w * r @ inverse @ r for w, r in zip(v, x, strict=True)])
    np.testing.assert_allclose(referee.leverages(x, v).sum(), 4)


def test_rank_one_greedy_tries_every_pair_at_every_step():
    x, v = pairs(30)
    prior = 0.3 * np.eye(4)
    picks, gains = referee.rank_one_greedy(x, v, prior, 9)
    chosen = []
    for pick, gain in zip(picks, gains, strict=True):
        left = [m for m in range(30) if m not in chosen]
        values = [referee.log_det(x, v, prior, np.array([*chosen, m])) for m in left]
        before = referee.log_det(x, v, prior, np.array(chosen, int))
        assert pick == left[int(np.argmax(values))]
        np.testing.assert_allclose(gain, max(values) - before, rtol=1e-8)
        chosen.append(pick)


def test_judge_of_greedy_counts_near_ties_and_mistakes():
    x, v = pairs(30)
    prior = 0.3 * np.eye(4)
    picks, _ = referee.rank_one_greedy(x, v, prior, 5)
    assert referee.judge_greedy(picks, x, v, prior) == {"picks": 5, "near_ties": 0, "wrong": 0, "worst_gap": 0.0}

    # A twin that is worse by 1e-8 may be taken for the best pair; a repeated or a poor pick may not.
    twin = np.concatenate([x, (1 - 1e-8) * x[picks[:1]]]), np.append(v, v[picks[0]])
    judged = referee.judge_greedy(np.array([30]), *twin, prior)
    assert (judged["near_ties"], judged["wrong"]) == (1, 0)
    assert 0 < judged["worst_gap"] < 1e-6
    assert referee.judge_greedy(picks[[0, 0]], x, v, prior)["wrong"] == 1
    assert referee.judge_greedy(picks[::-1], x, v, prior)["wrong"] > 0


def test_judge_of_top_counts_near_ties_and_mistakes():
    scores = np.array([5.0, 4.0, 3.0, 3.0 - 1e-9, 1.0])
    assert referee.judge_top(np.array([2, 0, 1]), scores) == {"picks": 3, "near_ties": 0, "wrong": 0}
    assert referee.judge_top(np.array([0, 1, 3]), scores) == {"picks": 3, "near_ties": 1, "wrong": 0}
    assert referee.judge_top(np.array([0, 1, 4]), scores) == {"picks": 3, "near_ties": 0, "wrong": 1}
    assert referee.judge_top(np.array([0, 1, 1]), scores) == {"picks": 3, "near_ties": 0, "wrong": 1}


def test_sides_alternate_and_results_are_kept():
    calls = []
    sides = [timing.Side(name, lambda name=name: calls.append(name) or name) for name in ("a", "b")]
    cpu, wall = timing.alternate(sides, turns=3, at_least_s=0.0)
    assert calls == ["a", "a", "b", "b", *itertools.chain(*[("a", "b")] * 3)]
    assert sides[1].result == "b"
    assert {name: len(times) for name, times in cpu.items()} == {"a": 3, "b": 3} == {k: len(t) for k, t in wall.items()}


def test_rows_have_what_a_reader_needs(capsys):
    side = timing.jax_side("jarm", lambda x: x @ x, np.ones((8, 8), np.float32))
    rows = timing.compare("product", [side, timing.Side("other", dict)], sizes={"n": 8}, turns=2, at_least_s=0.001)
    assert rows[0]["ratio_median"] == rows[0]["ratio_low"] == rows[0]["ratio_high"] == 1
    assert rows[0]["temp_bytes"] >= 256
    assert rows[0]["compile_s"] > 0
    assert rows[1]["ratio_low"] <= rows[1]["ratio_median"] <= rows[1]["ratio_high"]
    assert {"device", "cores", "versions", "commit", "command", "cpu_s", "wall_s", "outcome"} <= rows[0].keys()
    assert "| product | n=8 | other |" in capsys.readouterr().out


def allocate(megabytes):
    return lambda: np.ones((megabytes, 1_000_000), np.uint8).sum()


def test_growth_of_resident_memory():
    # A busy system may reclaim pages of the child while it is measured: one of three undisturbed looks is enough.
    assert any(50e6 < timing.resident_growth(allocate, 50) < 70e6 for _ in range(3))


@pytest.fixture
def torch_pairs():
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (300, 8), "past_x": (20, 8), "head": (8,)}
    return {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("rule", ["xtx", "dopt", "pa_dopt"])
def test_torch_rules_pick_the_largest_leverages(rule, torch_pairs):
    from benchmarks import baselines

    x, past_x, head = torch_pairs["x"], torch_pairs["past_x"], torch_pairs["head"]
    pairs, past = (x, x @ head), (past_x, past_x @ head)
    x, past_x, head = (each.double().numpy() for each in (x, past_x, head))
    v = np.ones(len(x)) if rule == "xtx" else referee.fisher_weight(x @ head)
    past_v = referee.fisher_weight(past_x @ head)
    information = past_x.T @ (past_v[:, None] * past_x) if rule == "pa_dopt" else 0.0
    scores = referee.leverages(x, v, information)

    released = getattr(baselines, f"released_{rule}")
    arguments = {"xtx": pairs[:1], "dopt": pairs, "pa_dopt": (*pairs, *past)}[rule]
    closed = {
        "xtx": lambda: baselines.closed_form_xtx(pairs[0], 16),
        "dopt": lambda: baselines.closed_form_dopt(*pairs, 16),
        "pa_dopt": lambda: baselines.closed_form_dopt(*pairs, 16, past),
    }[rule]
    for picks in (released(*arguments, 16), released(*arguments, 16, chunk=7), closed()):
        judged = referee.judge_top(picks.numpy(), scores)
        assert judged["wrong"] == 0, judged


@pytest.fixture
def torch_loop():
    torch = pytest.importorskip("torch")
    from benchmarks import torch_loop

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch_loop
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("kind", "count"), [("within", 9), ("cross", 27), ("all", 36)])
def test_torch_loop_lists_every_pair_of_a_space_once(torch_loop, kind, count):
    pairs = torch_loop.all_pairs(3, 3, kind)
    assert len({tuple(pair) for pair in pairs.tolist()}) == len(pairs) == count
    assert (pairs[:, 0] < pairs[:, 1]).all()
    assert kind == "all" or ((pairs[:, 0] // 3 == pairs[:, 1] // 3) == (kind == "within")).all()


def test_torch_loop_spearman_is_that_of_scipy(torch_loop):
    import torch
    from scipy.stats import spearmanr

    torch.manual_seed(0)
    heads = [torch_loop.Head(5, 8) for _ in "ab"]
    embeddings, gold = torch.randn(4, 7, 5), torch.randn(4, 7)
    rewards = sum(head(embeddings.flatten(0, 1)) for head in heads).reshape(4, 7).detach()
    expected = np.mean([spearmanr(a, b).statistic for a, b in zip(rewards, gold, strict=True)])
    ranks = gold.argsort(dim=1).argsort(dim=1)
    np.testing.assert_allclose(torch_loop.spearman(heads, embeddings, ranks), expected, rtol=1e-5)


@pytest.mark.parametrize("rule", ["random", "entropy", "max_diff", "xtx", "dopt", "pa_dopt", "greedy_dopt"])
def test_torch_loop_buys_new_pairs_and_learns(torch_loop, rule, monkeypatch):
    rng = np.random.default_rng(0)
    direction = rng.normal(size=6)
    embeddings = rng.normal(size=(2, 30, 6, 6)).astype(np.float32)
    train, test = ((each, each @ direction) for each in embeddings)
    bought = []
    choose = torch_loop.choose

    def choose_and_tell(rule, heads, embeddings, candidates, *rest):
        chosen = choose(rule, heads, embeddings, candidates, *rest)
        bought.append(candidates[chosen])
        return chosen

    monkeypatch.setattr(torch_loop, "choose", choose_and_tell)
    protocol = torch_loop.Protocol(rounds=2, batch=20, initial=40, pool=200, steps=60, members=2)
    result = torch_loop.run(rule, 0, train, test, protocol)
    assert len(result["spearman"]) == 3
    assert result["spearman"][-1] > 0.5
    pairs = np.concatenate(bought)
    assert len(np.unique(pairs, axis=0)) == len(pairs) == 40
    assert (pairs[:, 0] // 6 == pairs[:, 1] // 6).all()
