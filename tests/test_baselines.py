"""The baselines against formulas, and the referee against mistakes."""

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


def test_rank_one_trace_tries_every_pair_at_every_step():
    x, v = pairs(25)
    prior, target = 0.3 * np.eye(4), x.T @ (v[:, None] * x)
    picks, gains = referee.rank_one_trace(x, v, prior, target, 8)
    chosen = []
    for pick, gain in zip(picks, gains, strict=True):
        left = [m for m in range(25) if m not in chosen]
        values = [referee.trace(x, v, prior, target, np.array([*chosen, m])) for m in left]
        before = np.trace(target @ np.linalg.inv(prior + (x[chosen].T * v[chosen]) @ x[chosen]))
        assert pick == left[int(np.argmin(values))]
        np.testing.assert_allclose(gain, before - min(values), rtol=1e-8)
        chosen.append(pick)
    assert referee.judge_trace(picks, x, v, prior, target)["wrong"] == 0
    assert referee.judge_trace(picks[[0, 0]], x, v, prior, target)["wrong"] == 1
    assert referee.judge_trace(picks[::-1], x, v, prior, target)["wrong"] > 0


def responses(n=14, width=4, seed=0):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, width))
    return features, features @ rng.normal(size=width)


@pytest.mark.parametrize("block", [4, 5, 14, 20])
def test_parts_of_a_space_hold_every_pair_once(block):
    features, rewards = responses()
    every = np.array(list(itertools.combinations(range(14), 2)))
    x = features[every[:, 0]] - features[every[:, 1]]
    v = referee.fisher_weight(rewards[every[:, 0]] - rewards[every[:, 1]])
    wanted = {tuple(pair): value for pair, value in zip(every.tolist(), v * np.square(x).sum(axis=1), strict=True)}
    for parts in (referee.all_parts(block), referee.listed_parts(every, block)):
        found = {}
        for leverage, first, second in parts(features, rewards):
            for value, i, j in np.broadcast(leverage, first, second):
                if value > -np.inf:
                    assert (i, j) not in found
                    found[int(i), int(j)] = value
        assert found.keys() == wanted.keys()
        np.testing.assert_allclose([found[pair] for pair in wanted], list(wanted.values()), rtol=1e-9)
    third = sorted(wanted.values())[-3]
    assert referee.count_above(third, features, rewards, referee.listed_parts(every, block)) == 2
    assert referee.within_pairs(6, 3).tolist() == [[0, 1], [0, 2], [1, 2], [3, 4], [3, 5], [4, 5]]


def test_judge_in_space_counts_mistakes_and_recounts_certificates():
    features, rewards = responses()
    every, prior, k = np.array(list(itertools.combinations(range(14), 2))), 0.3 * np.eye(4), 12
    x = features[every[:, 0]] - features[every[:, 1]]
    v = referee.fisher_weight(rewards[every[:, 0]] - rewards[every[:, 1]])
    places, gains = referee.rank_one_greedy(x, v, prior, k)
    picks = every[places]
    # A shortlist of 30 made before the first pick: no pair outside can gain more than the 31st gains then.
    ceilings = np.full(k, np.sort(np.log1p(v * np.square(x).sum(axis=1) / 0.3))[-31] * (1 + 1e-9))
    fresh = np.arange(k) == 0

    def judged(picks=picks, ceilings=ceilings, kept=30, parts=None):
        certificate = {"ceilings": ceilings, "fresh": fresh, "kept": kept}
        parts = parts or referee.all_parts(5)
        return referee.judge_in_space(picks, features, rewards, prior, parts, range(k), **certificate)

    whole = judged()
    assert whole == judged(parts=referee.listed_parts(every, 7))
    assert (whole["picks"], whole["wrong"], whole["worst_gap"]) == (k, 0, 0.0)
    assert (whole["passes_checked"], whole["most_above"], whole["excess"]) == (1, 30, 0.0)
    np.testing.assert_allclose(whole["least_margin"], min(gains[1:]) / ceilings[0])
    assert judged(kept=29)["excess"] > 0
    assert judged(ceilings=ceilings * 0.9)["excess"] > 0.05
    assert judged(picks[::-1])["wrong"] > 0
    assert judged(picks[np.r_[0, 0, 2:k]])["wrong"] > 0
    # The code of a pair of many responses does not fit into 32 bits.
    many = np.concatenate([features, np.zeros((100_000, 4))]), np.concatenate([rewards, np.zeros(100_000)])
    moved = referee.listed_parts(100_000 + every)
    shifted = tuple(np.roll(each, 100_000, axis=0) for each in many)
    found = referee.judge_in_space((100_000 + picks).astype(np.int32), *shifted, prior, moved, [0, k - 1])
    assert found["wrong"] == 0


@pytest.mark.parametrize("size", [40, 47])
def test_bare_products_are_the_largest_of_all(size):
    from benchmarks import every_pair

    features, _ = every_pair.problem(size, 6)
    largest = (features @ features.T).max()
    for found in (every_pair.bare_products(features, "all", 13), every_pair.numpy_products(features, 13)):
        np.testing.assert_allclose(found, largest, rtol=1e-6)
    prompts = features[:40].reshape(4, 10, 6)
    found = every_pair.bare_products(features[:40], "within")
    np.testing.assert_allclose(found, np.einsum("pif,pjf->pij", prompts, prompts).max(), rtol=1e-6)


def test_pools_with_near_copies():
    from benchmarks import near_copies

    features, rewards, origin = near_copies.pool(20, 5, 6, 0)
    assert np.bincount(origin).tolist() == [5, 5, 5, 5]
    x = features[0::2] - features[1::2]
    apart = np.linalg.norm(x[:, None] - x[None], axis=2)
    same = origin[:, None] == origin[None]
    assert apart[same].max() < 0.15 < 1 < apart[~same].min()
    assert len(rewards) == 40
    assert len(np.unique(near_copies.pool(20, 1, 6, 0)[2])) == 20


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
    # The kernel counts pages in batches per core, and under pressure takes back pages of libraries meanwhile: 49.87 to
    # 50.13 MB were seen for these 50.
    assert timing.resident_growth(allocate, 50) == pytest.approx(50e6, rel=0.1)


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
def test_torch_loop_labels_new_pairs_and_learns(torch_loop, rule, monkeypatch):
    rng = np.random.default_rng(0)
    direction = rng.normal(size=6)
    embeddings = rng.normal(size=(2, 30, 6, 6)).astype(np.float32)
    train, test = ((each, each @ direction) for each in embeddings)
    labelled = []
    choose = torch_loop.choose

    def choose_and_record(rule, heads, embeddings, candidates, *rest):
        chosen = choose(rule, heads, embeddings, candidates, *rest)
        labelled.append(candidates[chosen])
        return chosen

    monkeypatch.setattr(torch_loop, "choose", choose_and_record)
    protocol = torch_loop.Protocol(rounds=2, batch=20, initial=40, candidates=200, steps=60, members=2)
    result = torch_loop.run(rule, 0, train, test, protocol)
    assert len(result["spearman"]) == 3
    assert result["spearman"][-1] > 0.5
    pairs = np.concatenate(labelled)
    assert len(np.unique(pairs, axis=0)) == len(pairs) == 40
    assert (pairs[:, 0] // 6 == pairs[:, 1] // 6).all()
