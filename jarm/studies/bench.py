"""Run time, memory and quality of acquisition rules against the number of candidate pairs: `jarm bench`."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jarm.acquisition.optimal_design import prior_information
from jarm.acquisition.registry import RULES, get_rule, needs_ensemble
from jarm.core.base import Belief, HParams, PairSpace
from jarm.core.files import plain, replace_text
from jarm.core.status import JarmError, Status
from jarm.design.fisher import fisher_weight, pair_information
from jarm.design.spaces import KINDS, pair_space, subset
from jarm.runs.records import provenance
from jarm.studies.peers import PEERS, Peer, installed

WIDTH = 10
"""Responses a prompt."""


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """Settings of a benchmark of selection; the defaults take about five minutes.

    Attributes:
      rules: rules to measure, separated by commas, as `jarm compare` takes them; "all" of `jarm rules`.
      pairs: "listed" (as many random pairs of `responses`), or every pair "within", "cross" or "all".
      sizes: candidate pairs, separated by commas; of spaces that are not listed, about as many.
      responses: among which listed pairs are drawn.
      batch: pairs chosen.
      width: features a response.
      members: heads in the ensemble.
      labelled: pairs labelled before.
      turns: runs of each rule, in turn with the others.
      limit: seconds; a rule that takes longer is timed once, and left out of larger sizes.
      peers: measure other packages that are installed, too (listed pairs only).
      cores: processor cores to use; 0 for all.
      out: folder for bench.jsonl, to which rows are appended; bench.md and bench.png show the last of each rule and
        size that has the same settings.
    """

    rules: str = "all"
    pairs: str = "listed"
    sizes: str = "1000,10000,100000"
    responses: int = 5000
    batch: int = 256
    width: int = 64
    members: int = 5
    labelled: int = 256
    turns: int = 5
    limit: float = 20.0
    peers: bool = True
    cores: int = 0
    out: pathlib.Path = pathlib.Path("out/bench")

    def check(self) -> None:
        """Refuse what cannot be measured.

        Raises:
          JarmError: a setting is out of its range.
        """
        if self.pairs not in ("listed", *KINDS):
            raise JarmError(f"There is no pair space {self.pairs!r}: choose from listed, {', '.join(KINDS)}.")
        for name in ("responses", "batch", "width", "members", "turns"):
            if getattr(self, name) < 1:
                raise JarmError(f"`--{name} {getattr(self, name)}`: give at least 1.")
        held = self.responses * (self.responses - 1) // 2
        if self.pairs == "listed" and max(self.counts()) > held:
            raise JarmError(f"{self.responses:,} responses have no more than {held:,} pairs: raise `--responses`.")
        if min(self.counts()) < self.batch:
            raise JarmError(f"`--sizes {self.sizes}` cannot fill a batch of {self.batch}: give larger ones.")
        alone = [name for name in self.rule_names() if self.members < 2 and needs_ensemble(name)]
        if alone and self.rules != "all":
            raise JarmError(f"Rule {alone[0]!r} looks at how members differ: give `--members 2` or more.")

    def counts(self) -> list[int]:
        """The numbers of candidate pairs."""
        try:
            return [int(each) for each in self.sizes.split(",")]
        except ValueError:
            raise JarmError(f"`--sizes {self.sizes}` is not a list of numbers such as 1000,10000.") from None

    def rule_names(self) -> list[str]:
        """The rules to measure."""
        names = list(RULES) if self.rules == "all" else [name.strip() for name in self.rules.split(",") if name.strip()]
        for name in names:
            get_rule(name)
        return list(dict.fromkeys(names))


class Problem(NamedTuple):
    """What every side chooses from.

    Attributes:
      belief, space, hparams: for the rules of jarm.
      prior: `[F, F]` float64, from which every batch is judged.
    """

    belief: Belief
    space: PairSpace
    hparams: HParams
    prior: np.ndarray


def make_problem(config: BenchConfig, count: int) -> Problem:
    """Gaussian features, members that agree on most, and about `count` candidate pairs."""
    rng = np.random.default_rng(0)
    size = {
        "listed": config.responses,
        "within": 2 * count / (WIDTH - 1),
        "cross": (2 * count) ** 0.5 + WIDTH / 2,
        "all": (2 * count) ** 0.5 + 1,
    }[config.pairs]
    size = max(2, round(size / WIDTH)) * WIDTH
    features = rng.standard_normal((size, config.width), np.float32)
    heads = rng.standard_normal((config.width, 1)) + 0.5 * rng.standard_normal((config.width, config.members))
    # Margins of a standard deviation of about 1.5.
    members = (features @ heads * 1.5 / np.sqrt(2 * config.width)).astype(np.float32)
    rewards = members.mean(axis=1)
    ends = rng.integers(0, size, (config.labelled, 2))
    known, known_rewards = features[ends], rewards[ends]
    weight = fisher_weight(jnp.asarray(known_rewards[:, 0] - known_rewards[:, 1]))
    past = pair_information(jnp.asarray(known[:, 0]), jnp.asarray(known[:, 1]), weight)
    belief = Belief(
        features=jnp.asarray(features),
        rewards=jnp.asarray(rewards),
        member_rewards=jnp.asarray(members.T),
        labelled_information=past,
        num_labelled=jnp.int32(config.labelled),
        labelled_features=jnp.asarray(known),
        labelled_rewards=jnp.asarray(known_rewards),
    )
    alive, labelled = jnp.ones(size, bool), jnp.asarray(ends, jnp.int32)
    if config.pairs == "listed":
        space = subset(jax.random.key(0), pair_space("all", WIDTH, alive), count)
    else:
        space = pair_space(config.pairs, WIDTH, alive, labelled)
    hparams = jax.tree.map(jnp.float32, HParams())
    prior = jax.jit(prior_information, static_argnums=3)(hparams, belief, space, config.batch)
    return Problem(belief, space, hparams, np.asarray(prior, np.float64))


@dataclasses.dataclass(frozen=True)
class _Side:
    """One way to choose a batch, ready to run."""

    name: str
    run: Callable[[], Any]
    compile_s: float = 0.0
    temp_bytes: int | None = None
    result: list[Any] = dataclasses.field(default_factory=list)


def _side_of(name: str, problem: Problem, k: int) -> _Side:
    rule = get_rule(name)
    given = (jax.random.key(0), problem.belief, problem.space, problem.hparams)
    begin = time.perf_counter()
    compiled = jax.jit(lambda key, belief, space, hparams: rule(key, hparams, belief, space, k)).lower(*given).compile()
    seconds = time.perf_counter() - begin
    memory = compiled.memory_analysis()
    size = None if memory is None else memory.temp_size_in_bytes + memory.output_size_in_bytes
    return _Side(name, lambda: jax.block_until_ready(compiled(*given)), seconds, size)


def _side_of_peer(peer: Peer, problem: Problem, k: int) -> _Side:
    return _Side(peer.name, peer.make(problem.belief, problem.space, k))


def quality(problem: Problem, pairs: np.ndarray) -> float:
    """log det of the information with a batch, above that of the prior, in nats; float64."""
    phi, r = (np.asarray(each, np.float64) for each in (problem.belief.features, problem.belief.rewards))
    x, margin = phi[pairs[:, 0]] - phi[pairs[:, 1]], r[pairs[:, 0]] - r[pairs[:, 1]]
    weight = 1 / (2 + np.exp(margin) + np.exp(-margin))
    return float(
        np.linalg.slogdet(problem.prior + (weight[:, None] * x).T @ x)[1] - np.linalg.slogdet(problem.prior)[1]
    )


def bench(config: BenchConfig) -> list[dict[str, Any]]:
    """Measure rules in turn, size after size; rows are appended to `bench.jsonl` as sizes are done.

    Returns:
      The rows, one for each rule and size: processor and wall seconds (median, and the extremes of the turns), seconds
      to compile, temporaries of the compiled program, and log det of the batch.

    Raises:
      JarmError: a setting is wrong, a rule failed, or the folder cannot be written.
    """
    config.check()
    if config.cores:
        pin(config.cores)
    names, slow, stopped = config.rule_names(), set(), False
    if config.members < 2:
        names = [name for name in names if not needs_ensemble(name)]
    try:
        config.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JarmError(f"The folder {config.out} cannot be used ({error}): give another --out.") from error
    for count in config.counts():
        problem = make_problem(config, count)
        sides: dict[str, Callable[[], _Side]] = {
            name: functools.partial(_side_of, name, problem, config.batch) for name in names if name not in slow
        }
        if config.peers and config.pairs == "listed":
            sides |= {
                peer.name: functools.partial(_side_of_peer, peer, problem, config.batch)
                for peer in PEERS
                if installed(peer) and peer.name not in slow
            }
        found, stopped = _measure(sides, problem, config, count)
        slow |= {row["rule"] for row in found if row["wall_s"] > config.limit}
        with open(config.out / "bench.jsonl", "a") as file:
            file.writelines(json.dumps(row, default=plain) + "\n" for row in found)
        if stopped:
            break
    rows = _like(config)
    replace_text(config.out / "bench.md", table(rows) + "\n")
    if stopped:
        raise JarmError(f"Stopped; what was measured is in {config.out}, and `--rules` measures what is missing.")
    return rows


def _like(config: BenchConfig) -> list[dict[str, Any]]:
    """The last row of each rule and size in the folder that was measured with the same settings."""
    latest: dict[tuple[str, int], dict[str, Any]] = {}
    wanted = {"pairs": config.pairs, "batch": config.batch, "features": config.width, "members": config.members}
    wanted |= {"cores": _cores()}
    for line in (config.out / "bench.jsonl").read_text().splitlines():
        row = json.loads(line)
        if all(row[name] == value for name, value in wanted.items()):
            latest[row["rule"], row["candidates"]] = row
    return list(latest.values())


def _cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _measure(
    sides: dict[str, Callable[[], _Side]], problem: Problem, config: BenchConfig, count: int
) -> tuple[list[dict[str, Any]], bool]:
    """A row for each side, and whether it was stopped by hand before all turns were run."""
    ready, quick, times = [], [], {}
    stopped = False
    try:
        for name, make in sides.items():
            try:
                side = make()
                side.run()  # not counted: caches are cold
                first = _timed(side)
            except Exception as error:
                if name not in {peer.name for peer in PEERS}:
                    raise
                print(f"{name} is left out: {type(error).__name__}: {error}", flush=True)
                continue
            ready.append(side)
            times[name] = [first]
            if first[1] <= config.limit:
                quick.append(side)
            print(f"{count:>12,}  {name:<26} {first[0]:10.4f} s", flush=True)
        for _ in range(config.turns - 1):
            for side in quick:
                times[side.name].append(_timed(side))
    except KeyboardInterrupt:
        stopped = True
    rows = []
    for side in ready:
        result = side.result[-1]
        pairs = np.asarray(result.pairs)[np.asarray(result.valid)] if hasattr(result, "pairs") else np.asarray(result)
        status = int(getattr(result, "status", Status.OK))
        cpu, wall = (sorted(each) for each in zip(*times[side.name], strict=True))
        rows.append(
            {
                "rule": side.name,
                "family": family_of(side.name),
                "pairs": config.pairs,
                "candidates": count,
                "batch": config.batch,
                "features": config.width,
                "members": config.members,
                "responses": int(problem.belief.rewards.shape[0]),
                "cores": _cores(),
                "cpu_s": statistics.median(cpu),
                "cpu_low_s": cpu[0],
                "cpu_high_s": cpu[-1],
                "wall_s": statistics.median(wall),
                "turns": len(cpu),
                "compile_s": round(side.compile_s, 3),
                "temp_bytes": side.temp_bytes,
                "log_det": quality(problem, pairs),
                "chosen": len(pairs),
                "status": Status(status).name,
                **provenance(),
            }
        )
    return rows, stopped


FAMILIES = {
    "uncertainty": "baselines",
    "optimal_design": "optimal design",
    "information": "information",
    "batch_bald": "information",
    "stochastic": "chance",
    "diversity": "diversity",
    "coreset": "diversity",
    "intervals": "intervals",
    "duels": "duels",
}
"""Families of rules, as in docs/rules.md, by the module they stand in."""


def family_of(name: str) -> str:
    """The family of a rule; what is not of jarm is one of its own."""
    if name not in RULES:
        return "other packages" if ": " in name else "yours"
    return FAMILIES[RULES[name].rule.__module__.rpartition(".")[2]]


def _timed(side: _Side) -> tuple[float, float]:
    """Processor and wall seconds; the result is kept."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = side.run()
    took = time.process_time() - cpu, time.perf_counter() - wall
    side.result[:] = [result]
    return took


def pin(cores: int) -> None:
    """Keep this process, with the threads that it has, to so many cores, where the system can."""
    if not hasattr(os, "sched_setaffinity"):
        return
    available = sorted(os.sched_getaffinity(0))
    if not 0 < cores <= len(available):
        raise JarmError(f"`--cores {cores}`: give 1 to {len(available)}, or 0 for all.")
    # Threads that NumPy started when it was imported, too.
    tasks = pathlib.Path("/proc/self/task")
    for task in [int(each.name) for each in tasks.iterdir()] if tasks.exists() else [0]:
        os.sched_setaffinity(task, available[-cores:])


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown: a line for each rule, a column of processor milliseconds for each size; quality at the last."""
    sizes = sorted({row["candidates"] for row in rows})
    by_rule: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        by_rule.setdefault(row["rule"], {})[row["candidates"]] = row
    lines = [
        f"| rule | {' | '.join(f'{size:,} pairs, ms' for size in sizes)} | compile s | MB | log det, nats |",
        "|---|" + "--:|" * (len(sizes) + 3),
    ]
    for rule, cells in by_rule.items():
        last = cells[max(cells)]
        shown = [_range(cells[size]) if size in cells else "-" for size in sizes]
        size = last["temp_bytes"]
        memory = "-" if size is None else f"{size / 1e6:.3g}"
        lines.append(f"| {rule} | {' | '.join(shown)} | {last['compile_s']:.1f} | {memory} | {last['log_det']:.1f} |")
    return "\n".join(lines)


def _range(row: dict[str, Any]) -> str:
    middle, low, high = (1e3 * row[name] for name in ("cpu_s", "cpu_low_s", "cpu_high_s"))
    return f"{middle:.3g} ({low:.3g} to {high:.3g})"
