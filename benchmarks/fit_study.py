"""How a head should be fitted to few noisy labels: held-out loss and ranking of ways to stop.

    python -m benchmarks.fit_study --data synthetic
    python -m benchmarks.fit_study --data TABLE.parquet --embeddings X.npy --target COLUMN

Random within-prompt pairs of the training prompts, labelled by the Bradley-Terry annotator (beta = 2); on the test
prompts the expected loss of such labels over within-prompt pairs (nats), and the within-prompt Spearman correlation.
The best that can be had is the row `oracle`. `--raw 1` leaves embeddings as they are, not standardised.
"""

from __future__ import annotations

import functools
import json
import statistics

from benchmarks import timing

HEAD = "mlp:64,64,64"
TWO_HALVES = {"members": 1, "holdout": 0.5, "folds": 2}
SEEDS = {50: 24, 100: 16, 200: 12, 450: 8}
WAYS = {
    "1 head, 1,000 steps, no decay (released)": (
        HEAD,
        {"members": 1, "holdout": 0.0, "steps": 1000},
        {"weight_decay": 0.0},
    ),
    "1 head, best on a fifth held out": (HEAD, {"members": 1}, {}),
    "1 head, steps found on two halves": (HEAD, TWO_HALVES, {}),
    "4 heads, a fifth each (default)": (HEAD, {}, {}),
    "4 heads, a quarter each": (HEAD, {"holdout": 0.25}, {}),
    "4 heads, steps found on two halves": (HEAD, TWO_HALVES | {"members": 4}, {}),
    "default, lr 3e-4": (HEAD, {}, {"learning_rate": 3e-4}),
    "default, lr 3e-3": (HEAD, {}, {"learning_rate": 3e-3}),
    "default, weight decay 1": (HEAD, {}, {"weight_decay": 1.0}),
    "default, weight decay 3": (HEAD, {}, {"weight_decay": 3.0}),
    "default, weight decay 30": (HEAD, {}, {"weight_decay": 30.0}),
    "linear, ridge 1": ("linear", {"members": 1}, {"ridge": 1.0}),
    "linear, ridge 10": ("linear", {"members": 1}, {"ridge": 10.0}),
    "linear, ridge 100": ("linear", {"members": 1}, {"ridge": 100.0}),
}


def main() -> None:
    options = timing.start(data="synthetic", embeddings="", target="", labels=list(SEEDS), ways=[""], raw=0)

    import jax
    import jax.numpy as jnp
    import numpy as np

    from jarm.core.base import HParams, Labelled
    from jarm.core.status import check
    from jarm.data.datasets import load
    from jarm.design.spaces import pair_space, sample_pairs
    from jarm.evaluation.annotators import AnnotatorConfig, annotate
    from jarm.evaluation.metrics import evaluate, reference_lines
    from jarm.loop.config import LoopConfig
    from jarm.loop.device_table import prepare
    from jarm.reward.config import FitConfig, HeadConfig
    from jarm.reward.fit import make_fit

    table = {"embeddings": options.embeddings, "target": options.target} if options.embeddings else {}
    train, test = load(options.data, **table, standardise=not options.raw)
    annotator = AnnotatorConfig()
    device_table, _, scale = prepare(LoopConfig(annotator=annotator), train)
    rows, gold = device_table.embeddings.reshape(-1, device_table.embeddings.shape[2]), device_table.gold.reshape(-1)
    space = pair_space("within", device_table.mask.shape[1], device_table.mask.reshape(-1))

    @functools.partial(jax.jit, static_argnames="n")
    def labelled(key: jax.Array, n: int) -> Labelled:
        key_pairs, key_answers = jax.random.split(key)
        pairs, valid = sample_pairs(key_pairs, space, n)
        answers, _ = annotate(key_answers, annotator, jnp.float32(2.0), pairs, gold, device_table.lengths.reshape(-1))
        return Labelled(pairs[:, 0], pairs[:, 1], answers, jnp.ones(n), valid)

    def judge(name: str, n: int, nll: list[float], spearman: list[float], steps: list[int]) -> None:
        def error(values: list[float]) -> float:
            return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0

        row = {
            "name": "fit_study",
            "data": str(options.data).rsplit("/", 1)[-1] + (f":{options.target}" if options.target else ""),
            "standardised": not options.raw,
            "way": name,
            "labels": n,
            "seeds": len(nll),
            "nll": statistics.mean(nll),
            "nll_error": error(nll),
            "nll_worst": max(nll),
            "spearman": statistics.mean(spearman),
            "spearman_error": error(spearman),
            "steps": statistics.mean(steps),
            "commit": timing.commit(),
        }
        print(
            f"{n:5} {name:42} nll {row['nll']:.3f} +- {row['nll_error']:.3f} worst {row['nll_worst']:.2f}  spearman "
            f"{row['spearman']:.3f} +- {row['spearman_error']:.3f}  steps {row['steps']:.0f}",
            flush=True,
        )
        if options.out:
            with open(options.out, "a") as file:
                file.write(json.dumps(row) + "\n")

    oracle = reference_lines(test, noise=2.0, scale=scale)["oracle"]
    judge("oracle", 0, [oracle["nll"]], [1.0], [0])
    judge("constant", 0, [float(np.log(2))], [0.0], [0])
    for n in map(int, options.labels):
        for name, (text, config, hparams) in WAYS.items():
            if not any(part in name for part in options.ways):
                continue
            head = HeadConfig.parse(text).head()
            fit = make_fit(head, FitConfig(**config))
            keys = jax.random.split(jax.random.key(n), SEEDS.get(n, 5))
            found = [fit(jax.random.fold_in(key, 1), HParams(**hparams), rows, labelled(key, n)) for key in keys]
            check(np.array([info.status for _, info in found]), name)
            params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params for params, _ in found))
            metrics = evaluate(head, params, test, noise=2.0, scale=scale)
            judge(
                name,
                n,
                [float(value) for value in metrics["nll"]],
                [float(value) for value in metrics["spearman"]],
                [int(info.steps[0]) for _, info in found],
            )


if __name__ == "__main__":
    main()
