"""The league of rules: its statistics, apart from the runs."""

import importlib.util
import pathlib
import sys

import numpy as np
from scipy import stats

PATH = pathlib.Path(__file__).parents[1] / "experiments" / "league.py"
spec = importlib.util.spec_from_file_location("league", PATH)
league = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = league  # dataclasses look themselves up there
spec.loader.exec_module(league)


def records(rules, seeds):
    rng = np.random.default_rng(0)
    for rule, gain in rules.items():
        for seed in range(seeds):
            for t in range(3):
                batch = {f"batch_{name}": gain + t if t else None for name in league.DESCRIPTIONS}
                spearman = 0.5 + 0.1 * t + gain + 0.01 * seed + 1e-4 * rng.normal()
                line = {"kind": "run", "rule": rule, "seed": seed, "round": t, "labels": 50 * (t + 1), **batch}
                yield {**line, "spearman": spearman, "spearman_share": 1.0}


def test_gains_are_paired_and_what_predicts_them_is_found():
    rules = {"random": 0.0, "good": 0.05, "better": 0.08, "bad": -0.05, "worse": -0.07, "bad_marginal": -0.2}
    rows = league.league(list(records(rules, 6)), 4)
    assert [row["rule"] for row in rows] == ["better", "good", "random", "bad", "worse", "bad_marginal"]
    np.testing.assert_allclose(rows[0]["alone"].mean, 0.08, atol=1e-3)
    assert rows[0]["simultaneous"].low < rows[0]["alone"].low
    assert rows[0]["fresh"].seeds == 2
    text = league.markdown(rows)
    assert "| mean_gold_gap | +1.00 |" in text
    assert "**+0.080" in text


def test_rank_correlation_shares_ranks():
    rng = np.random.default_rng(1)
    for _ in range(20):
        x, y = rng.integers(0, 4, 15).astype(float), rng.normal(size=15)
        np.testing.assert_allclose(league.rank_correlation(x, y), stats.spearmanr(x, y).statistic, rtol=1e-9)
    assert np.isnan(league.rank_correlation(np.ones(5), np.arange(5.0)))
