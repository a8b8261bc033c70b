"""Two checkouts of jarm, before and after a change: the same work by each, in turn, every time in a new process.

    python -m benchmarks.two_trees --before ../old --after . --out two_trees.jsonl
    python -m benchmarks.two_trees --before . --after .    # how far a tree is from itself

Processor time on one pinned core, compile time apart. Each part runs in a process of its own, one tree after the other
(before, after, after, before, ...), so that no part finds anything compiled and the two times of a ratio lie side by
side. The instrument is this file on both sides; only `jarm` comes from the checkout. Ratios are after / before of one
repeat. Noise is the largest ratio of a side's own times. A part is slower or faster if its median ratio is beyond the
noise of both sides and all ratios agree on the side of 1; its results are the same if picks and counts are equal and
losses agree to 1e-5.

Parts: `pass` over all pairs of 5,000 responses, F = 64, as `top_pairs` makes it; `greedy`, 500 of these pairs,
D-optimal; `select`, the first two calls of `jarm.select` on them; `run`, the loop on the built-in data, default head;
`fit`, a step of AdamW, and a linear fit, on 450 labels; `import`, `python -c "import jarm"`. `--tiny` takes sizes that
only show that everything works.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import json
import math
import os
import pathlib
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from benchmarks import every_pair, fit_heads, timing

FULL = {"N": 5000, "F": 64, "k": 500, "keep": 1524, "labels": 450, "d": 384, "steps": 200, "rounds": 8, "turns": 5}
TINY = {"N": 60, "F": 6, "k": 5, "keep": 20, "labels": 12, "d": 8, "steps": 3, "rounds": 1, "turns": 1}
SIDES = ("before", "after")

PLACES = {
    "jarm.design.criteria jarm.objectives": "D_OPTIMAL Numbers",
    "jarm.design.passes jarm.tiles": "best_pairs",
    "jarm.design.greedy jarm.greedy": "greedy",
    "jarm.design.spaces jarm.data.pairs": "pair_space",
    "jarm.core.base jarm.base": "HParams Labelled",
    "jarm.reward.config jarm.fit": "FitConfig",
    "jarm.reward.fit jarm.fit": "make_fit",
    "jarm.reward.heads jarm.heads": "linear_head mlp_head",
    "jarm": "LoopConfig load make_loop prepare select",
}
"""Where a name may be, the newest module first."""


def api(name: str) -> Any:
    """A function or class of jarm, whichever layout the checkout has."""
    places = next(modules for modules, names in PLACES.items() if name in names.split())
    for place in places.split():
        try:
            return getattr(importlib.import_module(place), name)
        except AttributeError:
            continue
        except ModuleNotFoundError as error:
            if not str(error.name).startswith("jarm"):
                raise
    raise ImportError(f"This checkout has no `{name}` in {places}: add its place to PLACES.")


def digest(integers: Any) -> str:
    import numpy as np

    return f"{zlib.crc32(np.asarray(integers, np.int64).tobytes()):08x}"


def timed(f: Callable[..., Any], *args: Any, turns: int, of: int = 1) -> tuple[dict[str, Any], Any]:
    """Seconds of a compiled function after two runs that do not count, divided by `of`; and its result."""
    begin = time.process_time()
    side = timing.jax_side("", f, *args)
    compile_s = time.process_time() - begin
    cpu, wall = (statistics.median(each[""]) / of for each in timing.alternate([side], turns=turns, at_least_s=0.2))
    return {"cpu_s": cpu, "wall_s": wall, "compile_s": compile_s, "temp_bytes": side.temp_bytes}, side.result


def candidates_of(sizes: SimpleNamespace) -> tuple[Any, Any, Any]:
    import jax.numpy as jnp

    features, rewards = map(jnp.asarray, every_pair.problem(sizes.N, sizes.F))
    return features, rewards, api("pair_space")("all", 1, jnp.ones(sizes.N, bool))


def measure_pass(sizes: SimpleNamespace) -> dict[str, Any]:
    import jax.numpy as jnp

    def one_pass(features: Any, rewards: Any, space: Any) -> Any:
        numbers = api("Numbers")(rewards, features, features[:, :0])
        return api("best_pairs")(api("D_OPTIMAL").scorer(numbers, jnp.zeros(0)), space, sizes.keep)

    found, best = timed(one_pass, *candidates_of(sizes), turns=sizes.turns)
    return {"one pass": found | {"outcome": {"picks": digest(best.pairs), "best": float(best.scores[0])}}}


def measure_greedy(sizes: SimpleNamespace) -> dict[str, Any]:
    import jax.numpy as jnp

    def choose(*inputs: Any) -> Any:
        return api("greedy")(api("D_OPTIMAL"), *inputs, sizes.k)

    found, (selection, info) = timed(choose, *candidates_of(sizes), jnp.eye(sizes.F), turns=sizes.turns)
    return {"greedy": found | {"outcome": {"picks": digest(selection.pairs), "passes": int(info.passes)}}}


def measure_select(sizes: SimpleNamespace) -> dict[str, Any]:
    features, rewards = every_pair.problem(sizes.N, sizes.F)
    select, found = api("select"), {}
    for call in ("first", "second"):
        cpu, wall = time.process_time(), time.perf_counter()
        batch = select(features, rewards, space="all", k=sizes.k)
        taken = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
        found[f"select, {call} call"] = taken | {"outcome": {"picks": digest(batch.pairs)}}
    return found


def measure_run(sizes: SimpleNamespace) -> dict[str, Any]:
    import jax

    names = {field.name for field in dataclasses.fields(api("LoopConfig"))}
    config = api("LoopConfig")(**{"candidates" if "candidates" in names else "pool": 5000}, rounds=sizes.rounds)
    data, hparams, _ = api("prepare")(config, api("load")("synthetic").train)
    run = api("make_loop")(config).run
    found, (state, records) = timed(run, jax.random.key(0), hparams, data, turns=sizes.turns)
    outcome = {"picks": digest(state.labelled.first), "train_nll": float(records.fit.train_nll.mean())}
    return {"run of the loop": found | {"outcome": outcome}}


def measure_fit(sizes: SimpleNamespace) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    embeddings, first, second, label = map(jnp.asarray, fit_heads.noise(sizes.labels, sizes.d))
    ones = jnp.ones(sizes.labels)
    labelled = api("Labelled")(first.astype(jnp.int32), second.astype(jnp.int32), label, ones, ones > 0)
    hparams = jax.tree.map(jnp.float32, api("HParams")())
    adamw = api("mlp_head")(), api("FitConfig")(members=1, holdout=0.0, steps=sizes.steps), sizes.steps
    newton, found = (api("linear_head")(), api("FitConfig")(members=1), 1), {}
    for name, (head, config, of) in {"a step of AdamW": adamw, "Newton fit": newton}.items():
        fit, inputs = api("make_fit")(head, config), (jax.random.key(0), hparams, embeddings, labelled)
        taken, (_, info) = timed(fit, *inputs, turns=sizes.turns, of=of)
        found[name] = taken | {"outcome": {"steps": int(info.steps[0]), "train_nll": float(info.train_nll[0])}}
    return found


def measure_import(sizes: SimpleNamespace) -> dict[str, Any]:
    """A copy is imported, once to write its bytecode and then to be timed, so that the checkout stays clean."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command, seconds = [sys.executable, "-c", "import jarm; print(jarm.__file__)"], []
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(sizes.tree / "jarm", f"{folder}/jarm", ignore=shutil.ignore_patterns("__pycache__"))
        for _ in range(1 + sizes.turns):
            begin, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            file = subprocess.check_output(command, cwd=folder, env=environment, text=True)
            end = resource.getrusage(resource.RUSAGE_CHILDREN)
            assert file.startswith(folder), file
            seconds.append((sum(end[:2]) - sum(begin[:2]), time.perf_counter() - wall))  # user and system
    cpu, wall = map(statistics.median, zip(*seconds[1:], strict=True))
    return {"import jarm": {"cpu_s": cpu, "wall_s": wall, "outcome": {}}}


MEASURES = (measure_pass, measure_greedy, measure_select, measure_run, measure_fit, measure_import)
PARTS = {measure.__name__.removeprefix("measure_"): measure for measure in MEASURES}


def child(part: str, tree: pathlib.Path, sizes: Mapping[str, int]) -> None:
    """Measure one part with the `jarm` of one checkout; the last line printed is what was found."""
    timing.pin()
    if part != "import":
        sys.path.insert(0, str(tree))
        file = str(importlib.import_module("jarm").__file__)
        assert pathlib.Path(file).is_relative_to(tree), file
    found = PARTS[part](SimpleNamespace(**sizes, tree=tree))
    print(json.dumps({"measures": found, "versions": timing.versions(), "device": timing.device()}))


def start_child(part: str, tree: pathlib.Path, tiny: bool) -> dict[str, Any]:
    """What a new process measures, which keeps no compiled programs; and the commit, with a + if `jarm` differs."""
    command = [sys.executable, "-m", "benchmarks.two_trees", "--child", part, "--before", str(tree)]
    environment = {"JAX_PLATFORMS": "cpu", **os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    read = functools.partial(subprocess.check_output, text=True)
    with tempfile.TemporaryDirectory() as folder:
        if not (tree / "jarm/core/version.py").exists():  # it asks for the version of a distribution `jarm`
            (info := pathlib.Path(folder, "jarm-0.1.0.dist-info")).mkdir()
            (info / "METADATA").write_text("Metadata-Version: 2.1\nName: jarm\nVersion: 0.1.0\n", encoding="utf-8")
            environment["PYTHONPATH"] = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
        found = read(command + ["--tiny"] * tiny, cwd=pathlib.Path(__file__).parents[1], env=environment)
    head = read(["git", "rev-parse", "--short", "HEAD"], cwd=tree).strip()
    changed = read(["git", "--no-optional-locks", "status", "--porcelain", "--", "jarm"], cwd=tree).strip()
    return {**json.loads(found.splitlines()[-1]), "commit": head + "+" * bool(changed)}


def same(outcomes: Sequence[Mapping[str, Any]]) -> bool:
    """Whether all outcomes are like the first."""

    def close(a: Any, b: Any) -> bool:
        return math.isclose(a, b, rel_tol=1e-5) if isinstance(a, float) else bool(a == b)

    return all(close(first, own[name]) for own in outcomes for name, first in outcomes[0].items())


def rows_of(name: str, repeats: Sequence[Mapping[str, Any]], sizes: Mapping[str, int]) -> list[dict[str, Any]]:
    """Rows of one measure, before and after; the outcome holds the times of all repeats."""
    found = {side: [repeat[side]["measures"][name] for repeat in repeats] for side in SIDES}
    agree = same([one["outcome"] for own in found.values() for one in own])
    rows = []
    for side, own in found.items():
        times = {key: [one.get(key, 0.0) for one in own] for key in ("cpu_s", "compile_s", "wall_s")}
        row = timing.row(
            f"two trees, {name}",
            side,
            sizes=sizes,
            cpu=statistics.median(times["cpu_s"]),
            wall=statistics.median(times.pop("wall_s")),
            outcome={**own[0]["outcome"], "same": agree, **times},
            ratios=[mine / one["cpu_s"] for mine, one in zip(times["cpu_s"], found["before"], strict=True)],
            turns=len(repeats),
            compile_s=statistics.median(times["compile_s"]),
            temp_bytes=own[0].get("temp_bytes"),
        )
        rows.append(row | {key: repeats[0][side][key] for key in ("versions", "device", "commit")})
    return rows


def line(name: str, before: Sequence[float], after: Sequence[float], agree: bool) -> str:
    """A line of the table: medians, ratios with their range, noise of both sides, and the verdict."""
    ratios = sorted(own / other for own, other in zip(after, before, strict=True))
    ratio, noise = statistics.median(ratios), [max(times) / min(times) for times in (before, after)]
    verdict = "within noise" if len(ratios) > 2 else "too few repeats"
    if len(ratios) > 2 and max(ratio, 1 / ratio) > max(noise) and (ratios[0] > 1 or ratios[-1] < 1):
        verdict = "slower" if ratio > 1 else "faster"
    medians = [f"{statistics.median(times) * 1e3:.4g}" for times in (before, after)]
    ranged = f"{ratio:.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
    cells = [name, *medians, ranged, *(f"{each:.3f}" for each in noise), verdict, "yes" if agree else "NO"]
    return "| " + " | ".join(cells) + " |"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows, in pairs, as a Markdown table, with a line of its own for what compiling takes."""
    lines = ["| part | before, ms | after, ms | after / before | noise before | noise after | verdict | same results |"]
    lines.append("|---|--:|--:|--:|--:|--:|---|---|")
    for before, after in zip(rows[::2], rows[1::2], strict=True):
        for key, what in (("cpu_s", ""), ("compile_s", ": compiling")):
            if before[key]:
                name = before["name"].removeprefix("two trees, ") + what
                lines.append(line(name, before["outcome"][key], after["outcome"][key], after["outcome"]["same"]))
    return "\n".join(lines)


def measure_trees(part: str, trees: Mapping[str, pathlib.Path], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one part, measured in turn."""
    repeats = []
    for repeat in range(options.repeats):
        turn = SIDES if repeat % 2 == 0 else SIDES[::-1]
        repeats.append({side: start_child(part, trees[side], options.tiny) for side in turn})
        print(f"{part}: {repeat + 1} of {options.repeats}", file=sys.stderr, flush=True)
    names = repeats[0]["before"]["measures"]
    return [row for name in names for row in rows_of(name, repeats, TINY if options.tiny else FULL)]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--before", type=pathlib.Path, required=True, help="a checkout of jarm")
    parser.add_argument("--after", type=pathlib.Path, default=pathlib.Path(), help="another (default: this folder)")
    parser.add_argument("--repeats", type=int, default=5, help="processes for each part and side")
    parser.add_argument("--parts", default=",".join(PARTS), help="what to measure, separated by commas")
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that everything works")
    parser.add_argument("--out", type=pathlib.Path, help="JSON lines are appended here (default: only printed)")
    parser.add_argument("--child", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    trees = {side: getattr(options, side).resolve() for side in SIDES}
    if options.child:
        return child(options.child, trees["before"], TINY if options.tiny else FULL)
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(unknown)}: choose from {', '.join(PARTS)}.")
    rows = []
    for part in parts:
        found = measure_trees(part, trees, options)
        if options.out:
            with open(options.out, "a") as file:
                file.writelines(json.dumps(row) + "\n" for row in found)
        rows += found
    print(table(rows))


if __name__ == "__main__":
    main()
