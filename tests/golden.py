"""Golden values: numbers that a change of names or places must not move.

    python tests/golden.py OUT.json            writes the values of `small()`, about a minute
    python tests/golden.py OUT.json --full     also those of `full()`, several minutes
    python tests/golden.py --compare A B       largest differences by group; 1 if anything differs by more than 1e-6

`tests/golden.json`, which `tests/test_golden.py` compares with, is remade by `python tests/golden.py tests/golden.json`
where results are meant to change, or versions do. `--full` reads the table of real answers in the folder that
`JARM_SHARED_DATA` names, and has no committed values: record before a change and after, and compare.

Conditions: XLA and BLAS split products by the number of cores, so the command takes one core for itself, before NumPy
and JAX count them; it needs no `taskset`. It runs on the CPU, keeps no compiled programs, and takes the jarm that it
lies beside. Without `--full`, XLA optimises little, since compiling takes most of the time; so values of `small()` are
to be compared with those of the same command. On the same processor, with the same versions of what computes, values
are then the same to the last digit. On another processor sums are in another order, a fit stops elsewhere, and what
depends on it differs: so a file says what it was made on, and `robust` which of its values hold anywhere. (With the
instructions of an older processor, XLA_FLAGS=--xla_cpu_max_isa=SSE4_2, the selections moved by 6e-7 at most and other
robust values by 6e-5; the linear head's best-of-20 by .01, because its fit ends within a tolerance.)

Names of values are paths, the group first. A value is a list of numbers, texts, or None where a number is not finite.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
import tempfile

if __name__ == "__main__":
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    if "--full" not in sys.argv and "XLA_FLAGS" not in os.environ:  # half of the time goes into compiling
        os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np

import jarm
from jarm import CompareConfig, SweepConfig
from jarm.cli import main as command
from jarm.data.store import EmbeddingStore, key_of
from jarm.data.writer import StoreWriter
from jarm.runs.config import PAPER

RULES = "random,dopt,greedy_dopt"
SIZES = {
    **{name: value for name, value in PAPER.items() if name != "head"},
    "rules": RULES,
    "seeds": 2,
    "rounds": 2,
    "batch": 10,
    "initial": 20,
    "candidates": 400,
    "steps": 60,
    "members": 3,
    "noise_free": "no",
}
CASES = (
    {"name": "all", "pairs": "all", "candidates": 0},
    {"name": "cross", "pairs": "cross", "prompts": 30},
    {"name": "mlp", "head": "mlp:12,8", "warm_start": True, "batch_size": 16, "holdout": 0.2, "folds": 1},
    {"name": "bootstrap", "head": "mlp:8", "ensemble": "bootstrap", "weight_decay": 1.0, "label_smoothing": 0.1},
    {"name": "classification", "head": "mlp:8", "loss": "classification"},
    {"name": "flip", "annotator": "flip", "flip_rate": 0.2, "gold_scale": "2"},
    {"name": "solved", "flip_rate": 0.25, "length_bias": 0.5},
    {"name": "outliers", "data": "synthetic:outliers", "standardise": False, "best_of": "2,5"},
)
"""Settings of `full()` that go through options which the others leave alone."""
TOOK = "seconds"
NOT_VALUES = ("line", "kind", "rule", "seed", "round", "source", "message", "device", "versions", "commit", "config")
"""Columns of a record that are its key, or depend on when and where it was made; as do those that begin with `TOOK`."""
JUMPING = ("spearman", "best_of", "pair_accuracy", "calibration_error", "fit_steps")
"""Beginnings of columns that another order of sums may change by a whole step."""
TOLERANCE, ELSEWHERE = 1e-6, 1e-3
"""Differences, relative to max(1, |value|), that are rounding: on the same processor, and on another."""


def small():
    """Values of everything that is quick.

    Returns:
      name -> list of numbers and texts.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        values = selections() | store(folder / "store")
        jarm.compare(CompareConfig(**SIZES, head="mlp:16", out=folder / "mlp"))
        # At noise 2 the sweep's runs are those of a comparison with that head.
        base = CompareConfig(**SIZES, head="linear", out=folder / "linear")
        jarm.sweep(SweepConfig(base, {"noise": [0.5, 2.0]}))
        return values | records("mlp", folder / "mlp") | records("linear", folder / "linear", "noise")


def full(folder):
    """Values of `small()`, of `jarm compare` as it stands, on built-in and on real data, of all rules, and of sweeps.

    Args:
      folder: where the runs are written; what is in it already is not run again.
    """
    values = small()
    paper = [word for name, value in PAPER.items() for word in (f"--{name}", value)]
    run("compare", *paper, "--out", str(folder / "defaults"))
    values |= records("defaults", folder / "defaults")
    if "JARM_SHARED_DATA" not in os.environ:
        raise SystemExit("Set JARM_SHARED_DATA to the folder of the real table.")
    table = pathlib.Path(os.environ["JARM_SHARED_DATA"]) / "alpaca_eval_200x20.parquet"
    arrays = table.with_name(f"{table.stem}_minilm_mean.npy")
    real = ["--data", str(table), "--embeddings", str(arrays), "--target", "golden_logit"]
    run("compare", *paper, *real, "--seeds", "2", "--rules", RULES, "--out", str(folder / "real"))
    values |= records("real", folder / "real")
    jarm.compare(CompareConfig(**SIZES | {"rules": "all"}, head="mlp:16", out=folder / "rules"))
    values |= records("rules", folder / "rules")
    noise = folder / "noise.toml"
    options = "".join(f'{name} = "{value}"\n' for name, value in PAPER.items() if name != "rules")
    noise.write_text(f'{options}rules = "{RULES}"\nseeds = 3\nrounds = 4\n\n[grid]\nnoise = [0.5, 1, 2, 5]\n')
    run("sweep", str(noise), "--out", str(folder / "noise"))
    values |= records("noise", folder / "noise", "noise")
    base = CompareConfig(**SIZES, head="linear", out=folder / "options")
    jarm.sweep(SweepConfig(base, {"case": CASES}))
    return values | records("options", folder / "options", "case")


def run(*arguments):
    """A command of jarm, which has to succeed."""
    if command(list(arguments)):
        raise SystemExit(f"jarm {' '.join(arguments)} failed.")


def records(group, folder, *axes):
    """Columns of a folder's records, each a list over rounds, by rule, seed and axes, in whatever order they were run.

    Args:
      group: first part of the names.
      folder: where `records.jsonl` is.
      axes: of a sweep; columns that tell runs apart.
    """
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    keys = ("rule", "seed", *axes)
    values = {}
    for line in sorted(lines, key=lambda line: line.get("round", 0)):
        place = [f"{key}={line[key]}" for key in keys if line.get(key) is not None]
        for column, value in line.items():
            if column not in (*NOT_VALUES, *axes) and not column.startswith(TOOK):
                values.setdefault("/".join([group, *place, column]), []).append(value)
    return dict(sorted(values.items()))


def selections():
    """Pairs, gains and certificates of ten batches by `jarm.select`."""
    rng = np.random.default_rng(20250204)
    size, width = 150, 6
    features, rewards = rng.normal(size=(size, width)), 1.5 * rng.normal(size=size)
    prompts = rng.permutation(np.repeat(np.arange(30), rng.permutation(np.repeat([2, 4, 9], 10))))
    listed = np.array(np.triu_indices(size, 1)).T[rng.permutation(size * (size - 1) // 2)[:400]]
    past, exclude = listed[rng.permutation(400)[:12]], listed[rng.permutation(400)[:15]]
    costs, directions = rng.uniform(1, 3, size), rng.normal(size=(7, width))
    square = rng.normal(size=(width, width))
    within, across = {"space": "within", "prompts": prompts}, {"space": "cross", "prompts": prompts}
    # Each kind of space, criterion and limits is a program to compile, a bound another: some cases share theirs.
    cases = {
        "within": within | {"k": 12, "bound": True},
        "past": within | {"k": 12, "labelled": past, "exclude": exclude, "prior_precision": square @ square.T},
        "swapped": within | {"k": 12, "swaps": 20, "prior_precision": 0.3},
        "limited": within | {"k": 12, "per_prompt": 2, "per_response": 1, "similarity": 0.6, "costs": costs},
        "cross": across | {"k": 8, "labelled": past, "exclude": exclude},
        "listed": {"space": listed, "k": 10, "costs": rng.uniform(1, 3, len(listed)), "labelled": past},
        "a": {"space": listed, "k": 8, "criterion": "a", "prior_precision": 0.5},
        "v": {"space": "all", "k": 8, "criterion": "v", "targets": past[:5], "exclude": exclude},
        "epig": within | {"k": 6, "criterion": "epig", "targets": directions, "prior_precision": 1.0},
        "bald": {"space": listed[:30], "k": 40, "criterion": "bald", "labelled": past, "allow_fewer": True},
    }
    values = {}
    for name, options in cases.items():
        batch = jarm.select(features, rewards, **{"bound": False} | options)
        values |= batch_values(f"select/{name}", batch)
    return values


def batch_values(name, batch):
    """Numbers of a batch and of its report."""
    report = batch.report
    values = {
        "pairs": batch.pairs.reshape(-1).tolist(),
        "gains": batch.gains.tolist(),
        "margin": [reason.margin for reason in batch.why],
        "margin_sd": [reason.margin_sd for reason in batch.why],
        "nearest": [reason.nearest for reason in batch.why],
        "cosine": [reason.cosine for reason in batch.why],
        "report": [report.held, report.log_det_before, report.log_det_after, report.cost],
        "bound": [report.upper, report.efficiency],
        "certificate": list(vars(report.certificate).values()) if report.certificate else [None],
        "swaps": list(vars(report.swaps).values()) if report.swaps else [None],
    }
    return {f"{name}/{part}": value for part, value in values.items()}


def store(folder):
    """Keys, rows and files of stores that two writers have appended to, in every type."""
    rng = np.random.default_rng(7)
    texts, rows = [f"text {n} \N{SNOWMAN}" for n in range(20)], rng.normal(size=(20, 8)).astype(np.float32)
    values = {}
    for dtype in ("bfloat16", "float16", "float32"):
        path = folder / dtype
        for some in (slice(0, 12), slice(8, 20)):  # four of them twice
            with StoreWriter(path, 8, {"model": "golden"}, dtype=dtype, shard_bytes=256) as writer:
                writer.append([key_of(text) for text in texts[some]], rows[some])
        opened = EmbeddingStore(path)
        read = np.ascontiguousarray(opened.rows([key_of(text) for text in texts]))
        files = [file for file in sorted(path.iterdir()) if file.name.startswith(("shard", "journal"))]
        values |= {
            f"store/{dtype}/keys": list(opened.keys),
            f"store/{dtype}/shape": list(read.shape),
            f"store/{dtype}/rows": [digits(read.tobytes())],
            f"store/{dtype}/files": [f"{file.name} {digits(file.read_bytes())}" for file in files],
        }
    return values


def digits(data):
    """The SHA-256 of some bytes."""
    return hashlib.sha256(data).hexdigest()


def made_on():
    """What decides the last digits: versions of what computes, its flags, and the processor."""
    names = ("jax", "jaxlib", "numpy", "optax")
    return {name: importlib.metadata.version(name) for name in names} | {
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "processor": _processor("model name") or platform.processor(),
        "features": " ".join(sorted(_processor("flags").split())),
    }


def _processor(name):
    """A line of /proc/cpuinfo, empty where there is none."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def robust(name):
    """Whether a value is the same to `ELSEWHERE` on any processor.

    Of the selections that is all but what says how they were found; of the linear head the runs in which no choice
    depends on a fit, but for numbers that jump where two rewards change places; of the MLP nothing.
    """
    group, rule, *_, last = name.split("/")
    if group == "select":
        return last not in ("certificate", "bound", "swaps")
    chosen = rule in [f"rule={each}" for each in RULES.split(",")[1:]]
    return group == "store" or (group == "linear" and not chosen and not last.startswith(JUMPING))


def difference(a, b):
    """Largest absolute difference of two values, and largest relative to max(1, |a|); infinite where one lacks any."""
    if len(a) != len(b):
        return np.inf, np.inf
    absolute = relative = 0.0
    for one, other in zip(a, b, strict=True):
        if one == other:
            continue
        if isinstance(one, str | None) or isinstance(other, str | None):
            return np.inf, np.inf
        absolute = max(absolute, abs(one - other))
        relative = max(relative, abs(one - other) / max(1, abs(one)))
    return absolute, relative


def differing(a, b, tolerance=TOLERANCE):
    """Names of values that differ by more than that relative to max(1, |value|), or that only one has."""
    common = [name for name in a if name in b]
    alone = sorted(a.keys() ^ b.keys())
    return alone + [name for name in common if difference(a[name], b[name])[1] > tolerance]


def compared(a, b):
    """A line for each group with its largest differences, and one for each value that only one has."""
    lines = []
    for group in dict.fromkeys(name.split("/")[0] for name in [*a, *b]):
        names = [name for name in a if name in b and name.split("/")[0] == group]
        found = {name: difference(a[name], b[name]) for name in names}
        numbers = sum(len(a[name]) for name in names)
        absolute, relative = (max((each[i] for each in found.values()), default=0.0) for i in (0, 1))
        where = max(found, key=lambda name: found[name][1]) if relative else "all equal"
        lines.append(f"{group:<10} {numbers:>7,} values  absolute {absolute:.2e}  relative {relative:.2e}  {where}")
    lines += [f"only in the first:  {name}" for name in a if name not in b]
    return lines + [f"only in the second: {name}" for name in b if name not in a]


def read(path):
    """What they were made on, and the values of a file."""
    both = json.loads(pathlib.Path(path).read_text())
    return both["made_on"], both["values"]


def write(path, values):
    """A file of values, one a line."""
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in values.items())
    pathlib.Path(path).write_text(f'{{"made_on": {json.dumps(made_on(), indent=1)},\n"values": {{\n{lines}\n}}}}\n')


def main():
    """The command; see the docstring of the module."""
    parser = argparse.ArgumentParser(description="Record golden values, or compare two recordings.")
    parser.add_argument("out", nargs="?", help="file to write the values to")
    parser.add_argument("--full", action="store_true", help="also whole comparisons, several minutes")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two files of values")
    given = parser.parse_args()
    if bool(given.out) == bool(given.compare):
        parser.error("give a file to write to, or --compare and two files")
    if given.compare:
        (first, a), (second, b) = map(read, given.compare)
        if first != second:
            print("made on different machines or versions")
        print("\n".join(compared(a, b)))
        names = differing(a, b)
        print(f"{len(names):,} values differ by more than {TOLERANCE:g}" if names else "the same")
        return 1 if names else 0
    print(f"jarm of {pathlib.Path(jarm.__file__).parent}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        write(given.out, full(pathlib.Path(folder)) if given.full else small())
    return 0


if __name__ == "__main__":
    sys.exit(main())
