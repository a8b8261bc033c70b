"""Run time, memory and quality of acquisition rules against the number of candidate pairs: `jarm bench`."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jarm.acquisition.optimal_design import prior_information
from jarm.acquisition.registry import RULES, get_rule, needs_ensemble
from jarm.core.base import Belief, HParams, PairSpace
from jarm.core.checks import INT32, Check, at_least, between, check_fields, named
from jarm.core.files import append_whole, is_sealed, make_folder, plain, sealed, write_whole
from jarm.core.interrupts import STOP, Stopped, ahead
from jarm.core.memory import refuse_too_large
from jarm.core.outside import checked, integer, maybe, number, parse_json, string, struct
from jarm.core.settings import make_key
from jarm.core.status import JarmError, Status
from jarm.core.streams import say
from jarm.design.fisher import fisher_weight, pair_information
from jarm.design.spaces import KINDS, pair_space, subset
from jarm.report.markdown import escaped
from jarm.runs.config import as_text, known_names, numbers, parts
from jarm.runs.records import provenance

WIDTH = 10
"""Responses per prompt."""


_CHECKS: Mapping[str, Check] = {
    "rules": known_names,
    "pairs": named("pair space", ("listed", *KINDS)),
    "sizes": numbers,
    **dict.fromkeys(("responses", "batch", "width", "members", "turns"), between(1, INT32)),
    **dict.fromkeys(("labelled", "cores"), between(0, INT32)),
    "limit": at_least(0),
}


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """Settings of a benchmark of selection; the defaults take about five minutes.

    Attributes:
      rules: rules to measure, separated by commas, as for `jarm compare`; "all" for those of `jarm rules`.
      pairs: "listed" (random pairs of `responses`), or every pair "within", "cross" or "all".
      sizes: numbers of candidate pairs, separated by commas; approximate for spaces that are not listed.
      responses: number of responses from which listed pairs are drawn.
      batch: pairs chosen.
      width: features per response.
      members: heads in the ensemble.
      labelled: pairs labelled before.
      turns: runs of each rule, in turn with the others.
      limit: seconds; a rule that takes longer is timed once, and left out of larger sizes.
      cores: processor cores to use; 0 for all.
      out: folder for bench.jsonl, to which rows are appended; bench.md and bench.png show the latest row of each rule
        and size with the same settings.
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
    cores: int = 0
    out: pathlib.Path = pathlib.Path("out/bench")

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", as_text("rules", self.rules))
        object.__setattr__(self, "sizes", as_text("sizes", self.sizes))
        check_fields(self, _CHECKS)
        max_pairs = self.responses * (self.responses - 1) // 2
        if self.pairs == "listed" and max(self.counts()) > max_pairs:
            raise JarmError(f"{self.responses:,} responses have no more than {max_pairs:,} pairs: raise `--responses`.")
        if min(self.counts()) < self.batch:
            raise JarmError(f"`--sizes {self.sizes}` cannot fill a batch of {self.batch}: give larger ones.")
        alone = [name for name in self.rule_names() if self.members < 2 and needs_ensemble(name)]
        if alone and self.rules != "all":
            raise JarmError(f"Rule {alone[0]!r} looks at how members differ: give `--members 2` or more.")

    def counts(self) -> list[int]:
        """The numbers of candidate pairs."""
        return list(numbers("`sizes`", self.sizes))

    def rule_names(self) -> list[str]:
        """The rules to measure."""
        return list(RULES) if self.rules == "all" else parts("`rules`", self.rules)


class Problem(NamedTuple):
    """The inputs of every side.

    Attributes:
      belief, space, hparams: arguments of a rule.
      information: `[F, F]` float64, prior information, from which every batch is judged.
    """

    belief: Belief
    space: PairSpace
    hparams: HParams
    information: np.ndarray


@dataclasses.dataclass(frozen=True)
class Peer:
    """Another package's way to choose pairs, to be measured beside the rules.

    Attributes:
      name: in tables, "package: rule".
      make: `(belief, listed space, k) -> run`; `run()` returns the chosen pairs `[k, 2]`. `make` does the work of a
        caller before selection, such as the features of pairs; only `run` is timed.
    """

    name: str
    make: Callable[[Belief, PairSpace, int], Callable[[], np.ndarray]]


def make_problem(config: BenchConfig, count: int) -> Problem:
    """Gaussian features, members that agree on most pairs, and about `count` candidate pairs.

    Raises:
      JarmError: they are larger than memory.
    """
    rng = np.random.default_rng(0)
    size = {
        "listed": config.responses,
        "within": 2 * count / (WIDTH - 1),
        "cross": (2 * count) ** 0.5 + WIDTH / 2,
        "all": (2 * count) ** 0.5 + 1,
    }[config.pairs]
    size = max(2, round(size / WIDTH)) * WIDTH
    needed = 4 * size * (config.width + 2 * config.members) + 8 * count * (config.pairs == "listed")
    refuse_too_large(f"A problem of {count:,} candidate pairs", needed, "give smaller `sizes`, or less `width`")
    features = rng.standard_normal((size, config.width), np.float32)
    heads = rng.standard_normal((config.width, 1)) + 0.5 * rng.standard_normal((config.width, config.members))
    # Margins of a standard deviation of about 1.5.
    members = (features @ heads * 1.5 / np.sqrt(2 * config.width)).astype(np.float32)
    rewards = members.mean(axis=1)
    ends = rng.integers(0, size, (config.labelled, 2))
    labelled_features, labelled_rewards = jnp.asarray(features[ends]), jnp.asarray(rewards[ends])
    weight = fisher_weight(labelled_rewards[:, 0] - labelled_rewards[:, 1])
    belief = Belief(
        features=jnp.asarray(features),
        rewards=jnp.asarray(rewards),
        member_rewards=jnp.asarray(members.T),
        labelled_information=pair_information(labelled_features[:, 0], labelled_features[:, 1], weight),
        num_labelled=jnp.int32(config.labelled),
        labelled_features=labelled_features,
        labelled_rewards=labelled_rewards,
    )
    eligible = jnp.ones(size, bool)
    if config.pairs == "listed":
        space = subset(make_key(0), pair_space("all", WIDTH, eligible), count)
    else:
        space = pair_space(config.pairs, WIDTH, eligible, jnp.asarray(ends, jnp.int32))
    hparams = jax.tree.map(jnp.float32, HParams())
    prior = jax.jit(prior_information, static_argnums=3)(hparams, belief, space, config.batch)
    return Problem(belief, space, hparams, np.asarray(prior, np.float64))


@dataclasses.dataclass
class _Side:
    """One way to choose a batch, compiled, and its turns so far.

    Attributes:
      name, family: in the rows.
      run: chooses a batch.
      compile_s: seconds to compile `run`.
      temp_bytes: temporaries and outputs of the compiled program; None where unknown.
      times: processor and wall seconds of each turn.
      result: of the last turn, a `Selection` or pairs `[k, 2]`.
    """

    name: str
    family: str
    run: Callable[[], Any]
    compile_s: float = 0.0
    temp_bytes: int | None = None
    times: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    result: Any = None

    def time(self) -> None:
        """Run one turn."""
        wall, cpu = time.perf_counter(), time.process_time()
        result = self.run()
        self.times.append((time.process_time() - cpu, time.perf_counter() - wall))
        self.result = result


def _side_of_rule(name: str, problem: Problem, k: int) -> _Side:
    arguments = (make_key(0), problem.hparams, problem.belief, problem.space)
    begin = time.perf_counter()
    compiled = jax.jit(functools.partial(get_rule(name), k=k)).lower(*arguments).compile()
    seconds = time.perf_counter() - begin
    memory = compiled.memory_analysis()
    size = None if memory is None else memory.temp_size_in_bytes + memory.output_size_in_bytes
    return _Side(name, family_of(name), lambda: jax.block_until_ready(compiled(*arguments)), seconds, size)


def quality(problem: Problem, pairs: np.ndarray) -> float:
    """Rise of the log det of the information by a batch `[k, 2]`, in nats; float64."""
    phi, r = (np.asarray(each, np.float64) for each in (problem.belief.features, problem.belief.rewards))
    x, margin = phi[pairs[:, 0]] - phi[pairs[:, 1]], r[pairs[:, 0]] - r[pairs[:, 1]]
    weight = 1 / (2 + np.exp(margin) + np.exp(-margin))
    grown = problem.information + (weight[:, None] * x).T @ x
    return float(np.linalg.slogdet(grown)[1] - np.linalg.slogdet(problem.information)[1])


def bench(config: BenchConfig, peers: Sequence[Peer] = ()) -> list[dict[str, Any]]:
    """Measure rules in turn, size after size, and append rows to `bench.jsonl` after each size.

    Args:
      config: settings.
      peers: other packages, measured beside the rules where the pairs are listed; a peer that fails is left out.

    Returns:
      The rows, one per rule and size: processor and wall seconds (median, and the extremes of the turns), seconds to
      compile, temporaries of the compiled program, and log det of the batch.

    Raises:
      JarmError: a setting is wrong, a rule failed, or the folder cannot be written.
    """
    if config.cores:
        pin(config.cores)
    names = [name for name in config.rule_names() if config.members > 1 or not needs_ensemble(name)]
    everyone: list[str | Peer] = [*names, *(peers if config.pairs == "listed" else ())]
    try:
        make_folder(config.out)
    except OSError as error:
        raise JarmError(f"The folder {config.out} cannot be used ({error}): give another --out.") from error
    stopped = False
    _like(config)  # refuses a file that is not of measurements before any is made
    for count in config.counts():
        problem = make_problem(config, count)
        sides, stopped = _measure(everyone, problem, config, count)
        made = ({name: plain(value) for name, value in _row(side, problem, config, count).items()} for side in sides)
        append_whole(config.out / "bench.jsonl", b"".join(map(sealed, made)))
        if stopped:
            break
        slow = {side.name for side in sides if statistics.median(wall for _, wall in side.times) > config.limit}
        everyone = [each for each in everyone if _name(each) not in slow]
    rows = _like(config)
    write_whole(config.out / "bench.md", table(rows) + "\n")
    if stopped:
        raise Stopped(f"Stopped; finished measurements are in {config.out}, and `--rules` measures the others.")
    return rows


_ROW = struct(
    {
        **{name: string() for name in ("rule", "family", "pairs")},
        **{name: integer() for name in ("candidates", "batch", "features", "members")},
        **{name: number() for name in ("cpu_s", "cpu_low_s", "cpu_high_s", "wall_s", "compile_s")},
        **{name: maybe(number()) for name in ("cores", "temp_bytes", "log_det")},
    }
)


def _like(config: BenchConfig) -> list[dict[str, Any]]:
    """The latest row in the folder of each rule and size with the same settings."""
    latest: dict[tuple[str, int], dict[str, Any]] = {}
    wanted = {"pairs": config.pairs, "batch": config.batch, "features": config.width, "members": config.members}
    wanted["cores"] = _cores()
    path, cure = config.out / "bench.jsonl", "remove that line, or give another --out"
    for name in ("bench.md", "bench.png", "bench.svg"):
        if not path.is_file() and os.path.lexists(config.out / name):
            raise JarmError(
                f"{config.out / name} stands there without a bench.jsonl and may be yours: give another --out."
            )
    for line_number, line in enumerate(path.read_bytes().splitlines() if path.is_file() else (), 1):
        where = f"Line {line_number} of {path}"
        row = checked(parse_json(line, where, cure), _ROW, where, cure)
        if is_sealed(line) is False:
            raise JarmError(f"{where} is damaged, as its checksum shows: {cure}.")
        row.pop("line", None)
        if all(row[name] == value for name, value in wanted.items()):
            latest[row["rule"], row["candidates"]] = row
    return list(latest.values())


def _cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _name(side: str | Peer) -> str:
    return side if isinstance(side, str) else side.name


def _measure(
    everyone: Sequence[str | Peer], problem: Problem, config: BenchConfig, count: int
) -> tuple[list[_Side], bool]:
    """The sides with their times, and whether an interrupt ended the measurement before the last turn."""
    sides: list[_Side] = []
    try:
        for remark in ahead(_turns(everyone, problem, config, sides)):
            say(f"{count:>12,}  {remark}")
    except KeyboardInterrupt:
        return sides, True
    return sides, False


def _turns(everyone: Sequence[str | Peer], problem: Problem, config: BenchConfig, sides: list[_Side]) -> Iterator[str]:
    """Append sides to a list and run their turns; yields a remark on each."""
    for each in everyone:
        if STOP.is_set():
            raise KeyboardInterrupt
        try:
            if isinstance(each, Peer):
                side = _Side(each.name, "other packages", each.make(problem.belief, problem.space, config.batch))
            else:
                side = _side_of_rule(each, problem, config.batch)
            side.run()  # not counted: caches are cold
            side.time()
        except Exception as error:
            if not isinstance(each, Peer):
                raise
            yield f"{each.name} is left out: {type(error).__name__}: {error}"
            continue
        sides.append(side)
        yield f"{side.name:<26} {side.times[0][0]:10.4f} s"
    for _ in range(config.turns - 1):
        for side in sides:
            if side.times[0][1] <= config.limit:
                if STOP.is_set():
                    raise KeyboardInterrupt
                side.time()


def _row(side: _Side, problem: Problem, config: BenchConfig, count: int) -> dict[str, Any]:
    result = side.result
    pairs = np.asarray(result.pairs)[np.asarray(result.valid)] if hasattr(result, "pairs") else np.asarray(result)
    cpu, wall = (sorted(each) for each in zip(*side.times, strict=True))
    return {
        "rule": side.name,
        "family": side.family,
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
        "status": Status(int(getattr(result, "status", Status.OK))).name,
        **provenance(),
    }


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
"""Module of a rule -> its family in docs/rules.md."""


def family_of(name: str) -> str:
    """The family of a rule; "yours" for a rule of a file."""
    return FAMILIES[RULES[name].rule.__module__.rpartition(".")[2]] if name in RULES else "yours"


def pin(cores: int) -> None:
    """Keep this process and its threads to a number of cores, where the system can."""
    if not hasattr(os, "sched_setaffinity"):
        return
    available = sorted(os.sched_getaffinity(0))
    if not 0 < cores <= len(available):
        raise JarmError(f"`--cores {cores}`: give 1 to {len(available)}, or 0 for all.")
    # Includes the threads that NumPy started at import.
    tasks = pathlib.Path("/proc/self/task")
    for task in [int(each.name) for each in tasks.iterdir()] if tasks.exists() else [0]:
        os.sched_setaffinity(task, available[-cores:])


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown: a line per rule, processor milliseconds per size; the other columns are of the largest size."""
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
        lines.append(
            f"| {escaped(rule)} | {' | '.join(shown)} | {last['compile_s']:.1f} | {memory} | {last['log_det']:.1f} |"
        )
    return "\n".join(lines)


def _range(row: dict[str, Any]) -> str:
    middle, low, high = (1e3 * row[name] for name in ("cpu_s", "cpu_low_s", "cpu_high_s"))
    return f"{middle:.3g} ({low:.3g} to {high:.3g})"
