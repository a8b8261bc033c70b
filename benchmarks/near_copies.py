"""What exact greedy selection is worth where a pool repeats itself: log det of batches from pools with near-copies.

    python -m benchmarks.near_copies --out benchmarks/results/near_copies.jsonl

A pool has 10,000 listed pairs of Gaussian features, F = 64: 10,000 / c distinct pairs and c - 1 near-copies of each,
both ends moved by 1 % of a standard deviation; c = 1 is the smooth pool. Batches of 256 by chance, by the released rule
(one shot, a PyTorch port), by exact greedy, and by greedy that passes over near-copies (cosine of .98 and more), which
may run out of pairs. Log det of .01 I + the information of the batch, float64, and how many of the distinct pairs were
selected; mean and standard error over seeds, and paired differences from the released rule.

`--learn 30`: whether that is worth anything to a reward model. The built-in data, every training response there c times
with 1 % of noise, 8 rounds of 50 pairs from *all* pairs within prompts, heads fitted as by default: the Spearman on
test prompts, mean over rounds, of 30 paired seeds.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from benchmarks import timing

RIDGE = 1e-2


def pool(pairs: int, copies: int, width: int, seed: int) -> tuple[Any, Any, Any]:
    """Features of both ends `[2 M, F]`, rewards `[2 M]`, and which distinct pair each of the M is a copy of."""
    import numpy as np

    rng = np.random.default_rng(seed)
    origin = np.repeat(np.arange(-(-pairs // copies)), copies)[:pairs]
    ends = rng.standard_normal((origin[-1] + 1, 2, width))[origin]
    if copies > 1:
        ends = ends + 0.01 * rng.standard_normal(ends.shape)
    order = rng.permutation(pairs)
    features = ends[order].reshape(-1, width).astype(np.float32)
    head = rng.standard_normal(width).astype(np.float32) * np.float32(1.5 / np.sqrt(2 * width))
    return features, features @ head, origin[order]


@functools.cache
def greedy_of(k: int) -> Any:
    import jax

    from jarm.design.criteria import D_OPTIMAL
    from jarm.design.greedy import greedy

    return jax.jit(functools.partial(greedy, D_OPTIMAL, k=k))


def batches(features: Any, rewards: Any, k: int, seed: int) -> dict[str, Any]:
    """Places `[k]` in the list of the pairs that each way selects."""
    import jax.numpy as jnp
    import numpy as np
    import torch

    from benchmarks import baselines
    from jarm.core.base import Limits
    from jarm.design.spaces import listed_space

    pairs = len(features) // 2
    x = torch.from_numpy(features[0::2] - features[1::2])
    margin = torch.from_numpy(rewards[0::2] - rewards[1::2])
    space = listed_space(jnp.arange(2 * pairs).reshape(-1, 2), jnp.ones(2 * pairs, bool))
    run = greedy_of(k)
    prior = RIDGE * jnp.eye(features.shape[1])
    guards = {"exact greedy": Limits(), "exact greedy, no near-copies": Limits(similarity=0.98)}
    chosen = {name: run(features, rewards, space, prior, limits=limits)[0] for name, limits in guards.items()}
    return {
        "random": np.random.default_rng(seed).permutation(pairs)[:k],
        "released rule, one shot": baselines.released_dopt(x, margin, k, 1000).numpy(),
        **{name: np.asarray(each.pairs[each.valid, 0]) // 2 for name, each in chosen.items()},
    }


def learn(copies: int, seeds: int) -> list[dict[str, Any]]:
    """Spearman of rules on built-in data whose training responses are there `copies` times."""
    import numpy as np

    from jarm import CompareConfig, TrainTest, evaluate, prepare, synthetic
    from jarm.runs.config import PAPER
    from jarm.runs.programs import Program

    benchmark = synthetic()
    train, rng = benchmark.train, np.random.default_rng(0)
    embeddings = np.repeat(train.store[train.rows], copies, axis=1)
    if copies > 1:
        embeddings = embeddings + (0.01 * rng.standard_normal(embeddings.shape)).astype(embeddings.dtype)
    prompts, responses, width = embeddings.shape
    train = dataclasses.replace(
        train,
        store=embeddings.reshape(-1, width),
        rows=np.arange(prompts * responses).reshape(prompts, responses),
        mask=np.repeat(train.mask, copies, axis=1),
        gold=np.repeat(train.gold, copies, axis=1),
        attributes={},
    )
    loop = CompareConfig(**PAPER, candidates=0).loop()
    data, hparams, scale = prepare(loop, TrainTest(train=train, test=benchmark.test).train)
    program, head = Program(loop), loop.head.head()
    curves: dict[str, list[float]] = {"random": [], "dopt": [], "greedy_dopt": []}
    for seed in range(seeds):
        for rule, values in curves.items():
            (result,) = program(rule, [(seed, hparams)], data)
            assert not result.failure, result.failure
            found = evaluate(head, result.params, benchmark.test, noise=float(hparams.noise), scale=scale)
            values.append(float(np.mean(found["spearman"][1:])))
    rows = []
    for rule, values in curves.items():
        row: dict[str, Any] = {"name": "near_copies_learning", "side": rule}
        row["sizes"] = {"copies": copies, "prompts": prompts, "responses": responses, "seeds": seeds}
        lead = {f"against_{other}": np.array(values) - np.array(curves[other]) for other in ("random", "dopt")}
        for each, of in {"spearman": np.array(values), **lead}.items():
            row |= {each: float(of.mean()), f"{each}_error": float(of.std(ddof=1) / seeds**0.5)}
        rows.append(row)
    return rows


def main() -> None:
    options = timing.start(pairs=10_000, copies=[1, 2, 5, 10, 50], width=64, k=256, seeds=10, learn=0)
    if options.learn:
        for copies in options.copies:
            save(learn(copies, options.learn), options.out)
        return
    import numpy as np

    from benchmarks import referee

    for copies in options.copies:
        rows = []
        sizes = {"M": options.pairs, "copies": copies, "F": options.width, "k": options.k, "seeds": options.seeds}
        found: dict[str, list[tuple[float, int]]] = {}
        for seed in range(options.seeds):
            features, rewards, origin = pool(options.pairs, copies, options.width, seed)
            x, v = features[0::2] - features[1::2], referee.fisher_weight(rewards[0::2] - rewards[1::2])
            for name, picks in batches(features, rewards, options.k, seed).items():
                assert len(np.unique(picks)) == len(picks)
                value = referee.log_det(x, v, RIDGE * np.eye(options.width), picks)
                found.setdefault(name, []).append((value, len(np.unique(origin[picks]))))
        released = np.array(found["released rule, one shot"])[:, 0]
        for name, values in found.items():
            log_det, distinct = np.array(values).T
            lead = log_det - released
            row = {"name": "near_copies", "side": name, "sizes": sizes, "seeds_ahead": int((lead > 0).sum())}
            for each, of in {"log_det": log_det, "against_released": lead, "distinct": distinct}.items():
                row |= {each: float(of.mean()), f"{each}_error": float(of.std(ddof=1) / len(of) ** 0.5)}
            rows.append(row)
        save(rows, options.out)


def save(rows: Sequence[dict[str, Any]], out: pathlib.Path | None) -> None:
    for row in rows:
        print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
    if out:
        made = {"commit": timing.commit(), "command": timing.command(), "versions": timing.versions()}
        with open(out, "a") as file:
            file.writelines(json.dumps(row | made) + "\n" for row in rows)


if __name__ == "__main__":
    main()
