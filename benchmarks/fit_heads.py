"""(c) Fitting one reward head, against PyTorch; and whether to batch several heads.

    python -m benchmarks.fit_heads --out benchmarks/results/fit_heads.jsonl
    python -m benchmarks.fit_heads --parts batching --cores all --out benchmarks/results/fit_heads.jsonl

`work`: the very same work, 384-64-64-64-1 and 2048-64-64-64-1, exact GELU: full-batch Adam from the same start, both
ends of every pair scored in one product, no response in two pairs. The floor is the arithmetic of the matrix products
(forward, and backward but for the gradient of the embeddings) at the rate of one large product.

`stopping`: random within-prompt pairs of the synthetic benchmark, ten responses a prompt, embeddings of unit norm:
AdamW stopped early on a fifth of the pairs, or where two halves say, or the released 1,000 steps without decay. The
outcome is the expected loss of a label on the pairs of the test prompts (constant: 0.693), averaged over seeds; both
sides start alike, and look at what they hold out equally often.

`batching`: K heads one by one and by vmap, on the same pairs and on their own.

`accelerator` (only if asked for): `--members` heads for each of `--seeds` seeds by vmap, against PyTorch one head after
another on the same device; with `--cores all`, since processor time says nothing there.

The PyTorch side is the best of its forms tried: inputs gathered once, both ends in one call, fused Adam, one thread.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable
from typing import Any

from benchmarks import timing

WIDTHS = [384, 2048]
LABELS = [100, 200, 450, 1000, 3000, 10_000]
LEARNING_RATE, WEIGHT_DECAY, LOOK, PATIENCE = 1e-3, 10.0, 5, 5  # the defaults of jarm


def torch_head(params: Any) -> Any:
    """The head in PyTorch, with the parameters of jarm's."""
    import numpy as np
    import torch

    layers = [*(params["hidden"][i] for i in range(3)), params["out"]]
    stack: list[Any] = []
    for layer in layers:
        kernel = torch.from_numpy(np.array(layer["kernel"]).T.copy())
        linear = torch.nn.Linear(*kernel.shape[::-1], bias="bias" in layer)
        linear.weight = torch.nn.Parameter(kernel)
        if "bias" in layer:
            linear.bias = torch.nn.Parameter(torch.from_numpy(np.array(layer["bias"])))
        stack += [linear, torch.nn.GELU()]
    return torch.nn.Sequential(*stack[:-1])


def torch_loss(head: Any, rows: Any, labels: Any) -> Any:
    """Bradley-Terry loss of pairs whose first ends are the first half of the rows."""
    import torch

    first, second = head(rows)[:, 0].chunk(2)
    return torch.nn.functional.binary_cross_entropy_with_logits(first - second, labels)


def torch_steps(params: Any, rows: Any, labels: Any, steps: int, decay: float) -> Any:
    """A head after so many steps on all pairs."""
    import torch

    head = torch_head(params).to(rows.device)
    optimiser = torch.optim.AdamW(head.parameters(), lr=LEARNING_RATE, weight_decay=decay, fused=True)
    for _ in range(steps):
        optimiser.zero_grad()
        torch_loss(head, rows, labels).backward()
        optimiser.step()
    return head


def torch_stopped(params: Any, embeddings: Any, ends: Any, labels: Any, seed: int) -> Any:
    """The best head on a fifth held out, looked at every few steps."""
    import copy

    import numpy as np
    import torch

    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))
    held, kept = order.tensor_split([round(0.2 * len(order))])
    valid, train = ((embeddings[ends[:, rows].reshape(-1)], labels[rows]) for rows in (held, kept))
    head = torch_head(params)
    optimiser = torch.optim.AdamW(head.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    best, best_nll, stale = head, float("inf"), 0
    while stale < PATIENCE:
        for _ in range(LOOK):
            optimiser.zero_grad()
            torch_loss(head, *train).backward()
            optimiser.step()
        with torch.no_grad():
            nll = torch_loss(head, *valid).item()
        stale += 1
        if nll < best_nll:
            best, best_nll, stale = copy.deepcopy(head), nll, 0
    return best


def flops(width: int, rows: int, steps: int) -> float:
    """Operations of the matrix products of full-batch steps."""
    return 2.0 * rows * steps * (2 * width * 64 + 3 * (2 * 64 * 64 + 64))


def steps_for(labels: int) -> int:
    """Enough steps to time, few enough to wait for."""
    return max(5, min(100, 60_000 // labels))


def pairs_of(first: Any, second: Any, labels: Any) -> Any:
    """Labelled pairs at full capacity."""
    import jax.numpy as jnp

    from jarm.core.base import Labelled

    n = len(labels)
    return Labelled(
        jnp.asarray(first, jnp.int32),
        jnp.asarray(second, jnp.int32),
        jnp.asarray(labels, jnp.float32),
        jnp.ones(n, jnp.float32),
        jnp.ones(n, bool),
    )


def noise(n: int, width: int, seed: int = 0) -> tuple[Any, Any, Any, Any]:
    """Normal embeddings `[2 n, width]` and random labels of n pairs that share no response."""
    import numpy as np

    rng = np.random.default_rng(seed)
    embeddings = rng.standard_normal((2 * n, width), np.float32) / np.float32(width**0.5)
    first, second = rng.permutation(2 * n).reshape(2, n)
    return embeddings, first, second, (rng.random(n) < 0.5).astype(np.float32)


def torch_work(width: int, n: int) -> Callable[[], Any]:
    """The side of PyTorch, inputs prepared."""
    import jax
    import numpy as np
    import torch

    from jarm.reward.heads import mlp_head

    torch.set_num_threads(len(timing.os.sched_getaffinity(0)))
    embeddings, first, second, labels = noise(n, width)
    rows = torch.from_numpy(embeddings[np.concatenate([first, second])])
    params = mlp_head().init(jax.random.key(0), width)
    return functools.partial(torch_steps, params, rows, torch.from_numpy(labels), steps_for(n), 0.0)


def same_work(widths: list[int], labels: list[int]) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jarm.core.base import HParams
    from jarm.reward.config import FitConfig
    from jarm.reward.fit import make_fit
    from jarm.reward.heads import mlp_head

    rate, head = timing.gemm_rate(), mlp_head()
    hparams = HParams(jnp.float32(LEARNING_RATE), jnp.float32(0))
    for width, n in itertools.product(widths, labels):
        embeddings, first, second, answers = noise(n, width)
        params = jax.tree.map(lambda leaf: leaf[None], head.init(jax.random.key(0), width))
        fit = make_fit(head, FitConfig(members=1, holdout=0.0, steps=steps_for(n)))
        ours = timing.jax_side(
            "jarm", fit, jax.random.key(0), hparams, embeddings, pairs_of(first, second, answers), params
        )
        theirs = timing.Side("PyTorch", torch_work(width, n))
        theirs.rss_growth_bytes = timing.resident_growth(torch_work, width, n)
        fitted, info = ours.run()
        rows = embeddings[np.concatenate([first, second])]
        rewards = np.asarray(head.rewards(jax.tree.map(lambda leaf: leaf[0], fitted), rows))
        with_torch = theirs.run()(__import__("torch").from_numpy(rows)).detach().numpy()[:, 0]
        floor = flops(width, 2 * n, steps_for(n)) / rate
        ours.outcome = {
            "train_nll": float(info.train_nll[0]),
            "rewards_apart": float(np.abs(rewards - with_torch).max() / np.abs(with_torch).max()),
            "floor_s": floor,
        }
        sizes = {"width": width, "labels": n, "steps": steps_for(n)}
        rows_out = timing.compare("same work", [ours, theirs], sizes=sizes)
        print(f"times the floor: {rows_out[0]['cpu_s'] / floor:.2f}")


def stopping(widths: list[int], labels: list[int], seeds: int) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch

    from jarm.core.base import HParams
    from jarm.data.synthetic import SyntheticConfig, synthetic
    from jarm.design.spaces import pair_space, sample_pairs
    from jarm.evaluation.annotators import AnnotatorConfig, annotate
    from jarm.evaluation.metrics import evaluate
    from jarm.loop.config import LoopConfig
    from jarm.loop.device_table import prepare
    from jarm.reward.config import FitConfig
    from jarm.reward.fit import make_fit
    from jarm.reward.heads import mlp_head

    torch.set_num_threads(len(timing.os.sched_getaffinity(0)))
    head = mlp_head()
    hparams = HParams(jnp.float32(LEARNING_RATE), jnp.float32(WEIGHT_DECAY))
    for width in widths:
        train, test = synthetic(0, SyntheticConfig(train=2000, test=100, width=width))
        norm = np.sqrt(np.mean(np.sum(train.store**2, axis=1)))
        for table in (train, test):
            table.store[:] /= norm
        device_table, _, scale = prepare(LoopConfig(), train)
        embeddings = device_table.embeddings.reshape(-1, width)
        gold, lengths = device_table.gold.reshape(-1), device_table.lengths.reshape(-1)
        tensor = torch.from_numpy(np.array(embeddings))
        space = pair_space("within", device_table.mask.shape[1], device_table.mask.reshape(-1))
        for n in labels:
            drawn = []
            for seed in range(seeds):
                key_pairs, key_answers, key_start, key_fit = jax.random.split(jax.random.key(seed), 4)
                pairs, _ = sample_pairs(key_pairs, space, n)
                answers, _ = annotate(key_answers, AnnotatorConfig(), jnp.float32(2), pairs, gold, lengths)
                drawn.append((np.asarray(pairs), answers, head.init(key_start, width), key_fit))

            def ours(name: str, config: FitConfig, hparams: HParams, drawn: Any = drawn, e: Any = embeddings) -> Any:
                inputs = [
                    (key, hparams, e, pairs_of(*pairs.T, answers), jax.tree.map(lambda leaf: leaf[None], start))
                    for pairs, answers, start, key in drawn
                ]
                begin = time.perf_counter()
                fit = jax.jit(make_fit(head, config)).lower(*inputs[0]).compile()
                seconds, memory = time.perf_counter() - begin, fit.memory_analysis()
                size = memory.temp_size_in_bytes + memory.output_size_in_bytes
                return timing.Side(name, lambda: jax.block_until_ready([fit(*one)[0] for one in inputs]), seconds, size)

            def theirs(name: str, run: Callable[..., Any], drawn: Any = drawn) -> timing.Side:
                inputs = [
                    (start, torch.from_numpy(pairs.T.copy()).long(), torch.from_numpy(np.array(answers)), seed)
                    for seed, (pairs, answers, start, _) in enumerate(drawn)
                ]
                return timing.Side(name, lambda: [run(*given) for given in inputs])

            def released(start: Any, ends: Any, answers: Any, seed: int, tensor: Any = tensor) -> Any:
                return torch_steps(start, tensor[ends.reshape(-1)], answers, 1000, 0.0)

            def stopped(start: Any, ends: Any, answers: Any, seed: int, tensor: Any = tensor) -> Any:
                return torch_stopped(start, tensor, ends, answers, seed)

            a_fifth = FitConfig(members=1, check_every=LOOK, patience=PATIENCE)
            sides = [
                ours("jarm, stopped on a fifth", a_fifth, hparams),
                theirs("PyTorch, stopped on a fifth", stopped),
                ours("jarm, steps found on two halves", FitConfig(members=1, folds=2, holdout=0.5), hparams),
            ]
            if n <= 450:
                steps = FitConfig(members=1, holdout=0.0, steps=1000)
                sides.append(ours("jarm, 1,000 steps", steps, HParams(jnp.float32(LEARNING_RATE), jnp.float32(0))))
                sides.append(theirs("PyTorch, 1,000 steps (released)", released))
            for side in sides:
                heads = side.run()
                if isinstance(heads[0], torch.nn.Module):
                    heads = [jax_params(each) for each in heads]
                metrics = evaluate(
                    head, jax.tree.map(lambda *leaves: jnp.stack(leaves), *heads), test, noise=2.0, scale=scale
                )
                side.outcome = {
                    "nll": float(metrics["nll"].mean()),
                    "nll_error": float(metrics["nll"].std(ddof=1) / seeds**0.5),
                    "spearman": float(metrics["spearman"].mean()),
                }
            sizes = {"width": width, "labels": n, "seeds": seeds}
            timing.compare("stopping", sides, sizes=sizes, turns=3)


def jax_params(module: Any) -> Any:
    """Parameters of jarm's head from PyTorch's, with a leading axis of one member."""
    linear = [layer for layer in module if hasattr(layer, "weight")]
    kernels = [layer.weight.detach().numpy().T[None] for layer in linear]
    biases = [layer.bias.detach().numpy()[None] for layer in linear[:-1]]
    hidden = {i: {"kernel": kernels[i], "bias": biases[i]} for i in range(3)}
    return {"hidden": hidden, "out": {"kernel": kernels[3]}}


def batching(widths: list[int], labels: list[int]) -> None:
    import jax
    import jax.numpy as jnp

    from jarm.core.base import HParams
    from jarm.reward.config import FitConfig
    from jarm.reward.fit import make_fit
    from jarm.reward.heads import mlp_head

    head = mlp_head()
    hparams = HParams(jnp.float32(LEARNING_RATE), jnp.float32(WEIGHT_DECAY))
    for width, n, members in itertools.product(widths, labels, (1, 5, 10)):
        embeddings, *given = noise(n, width)
        shared = pairs_of(*given)
        # Own data: every member has its own pairs of the same responses.
        own = jax.tree.map(
            lambda *leaves: jnp.stack(leaves), *(pairs_of(*noise(n, width, k)[1:]) for k in range(members))
        )
        keys = jax.random.split(jax.random.key(0), members)
        for data in ("shared", "own"):
            sides = []
            for name, how in (("one by one", "map"), ("vmap", "vmap")):
                config = FitConfig(members=members if data == "shared" else 1, holdout=0.0, steps=10, batching=how)
                fit = make_fit(head, config)
                if data == "shared":
                    sides.append(timing.jax_side(name, fit, jax.random.key(0), hparams, embeddings, shared))
                    continue

                def each(xs: Any, fit: Any = fit, embeddings: Any = embeddings) -> Any:
                    return fit(xs[0], hparams, embeddings, xs[1])

                over = functools.partial(jax.lax.map, each) if how == "map" else jax.vmap(each)
                sides.append(timing.jax_side(name, over, (keys, own)))
            sizes = {"width": width, "labels": n, "members": members, "data": data, "steps": 10}
            timing.compare("batching members", sides, sizes=sizes)


def accelerator(widths: list[int], labels: list[int], members: int, seeds: int) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch

    from jarm.core.base import HParams
    from jarm.reward.config import FitConfig
    from jarm.reward.fit import make_fit
    from jarm.reward.heads import mlp_head

    place = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = True  # as jax does by default
    head, hparams, steps = mlp_head(), HParams(jnp.float32(LEARNING_RATE), jnp.float32(0)), 100
    for width, n in itertools.product(widths, labels):
        fit = make_fit(head, FitConfig(members=members, holdout=0.0, steps=steps, batching="vmap"))
        embeddings, *_ = noise(n, width)
        answered = [noise(n, width, seed)[1:] for seed in range(seeds)]
        labelled = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(pairs_of(*each) for each in answered))
        keys = jax.random.split(jax.random.key(0), (seeds, members))
        starts = jax.vmap(jax.vmap(lambda key, d=width: head.init(key, d)))(keys)
        run = jax.vmap(fit, in_axes=(0, None, None, 0, 0))
        arguments = (jax.random.split(jax.random.key(1), seeds), hparams, jnp.asarray(embeddings), labelled, starts)
        ours = timing.jax_side("jarm, all heads at once", run, *arguments)
        on_host = jax.tree.map(np.asarray, starts)
        given = [
            (
                torch.from_numpy(embeddings[np.concatenate([first, second])]).to(place),
                torch.from_numpy(answers).to(place),
            )
            for first, second, answers in answered
        ]

        def one_by_one(on_host: Any = on_host, given: Any = given) -> Any:
            heads = [
                torch_steps(jax.tree.map(lambda leaf, s=s, k=k: leaf[s, k], on_host), *given[s], steps, 0.0)
                for s, k in itertools.product(range(seeds), range(members))
            ]
            if place == "cuda":
                torch.cuda.synchronize()
            return heads

        theirs = timing.Side("PyTorch, one after another", one_by_one)
        _, info = ours.run()
        ours.outcome = {"train_nll": float(info.train_nll.mean())}
        losses = [torch_loss(one, *given[i // members]).item() for i, one in enumerate(theirs.run())]
        theirs.outcome = {"train_nll": float(np.mean(losses))}
        sizes = {"width": width, "labels": n, "members": members, "seeds": seeds, "steps": steps}
        timing.compare("many heads", [ours, theirs], sizes=sizes, turns=3)


def main() -> None:
    options = timing.start(
        parts=["work", "stopping", "batching"],
        widths=WIDTHS,
        labels=LABELS,
        stopping_labels=[100, 450, 1000],
        seeds=6,
        members=64,
    )
    if "work" in options.parts:
        same_work(options.widths, options.labels)
    if "stopping" in options.parts:
        stopping(options.widths, options.stopping_labels, options.seeds)
    if "batching" in options.parts:
        batching(options.widths, [50, 450, 2000])
    if "accelerator" in options.parts:
        accelerator(options.widths, options.labels, options.members, options.seeds)


if __name__ == "__main__":
    main()
