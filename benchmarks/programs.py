"""The main programs of jarm at any size, for `tests/test_lowering.py` to lower and `benchmarks/aot.py` to compile.

A program is a jitted function and its arguments, of which only shapes, types and shardings are known, so that a machine
without an accelerator can lower and compile for one.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from jarm.acquisition.registry import RULES, get_rule
from jarm.core.base import HParams, Labelled, PairSpace, Selection
from jarm.core.types import AnyMesh
from jarm.design.bound import design_bound
from jarm.design.criteria import D_OPTIMAL
from jarm.design.exchange import exchange
from jarm.design.greedy import greedy
from jarm.design.spaces import listed_space, pair_space
from jarm.design.top import top_pairs
from jarm.evaluation.annotators import AnnotatorConfig
from jarm.evaluation.scoring import Constants, evaluate_chunk
from jarm.llm.config import LayerConfig, ModelConfig, read_config
from jarm.llm.model import abstract_params, embed_tokens, prefill
from jarm.llm.sharding import DATA, MODEL, sharding_of, split_config
from jarm.loop.device_table import DeviceTable
from jarm.reward.config import FitConfig, HeadConfig
from jarm.reward.fit import make_fit
from jarm.runs.config import CompareConfig
from jarm.runs.programs import jit_runs
from jarm.testing.conformance import BATCH, make_case


class Program(NamedTuple):
    """A jitted function, and the shapes of its arguments."""

    function: Any
    args: tuple[Any, ...]

    def on(self, mesh: AnyMesh) -> Program:
        """The same with every argument that has no sharding whole on each device of a mesh."""
        whole = NamedSharding(mesh, PartitionSpec())

        def placed(leaf: Any) -> jax.ShapeDtypeStruct:
            sharding = getattr(leaf, "sharding", None)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding or whole)

        return self._replace(args=jax.tree.map(placed, self.args))


def floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def integers(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def flags(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bool_)


def keys(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32")).dtype)


def numbers(*shape: int) -> HParams:
    """Hyperparameters."""
    return jax.tree.map(lambda _: floats(*shape), HParams())


def device_table(prompts: int, responses: int, width: int) -> DeviceTable:
    """A training table with gold rewards of which float32 leaves something out."""
    each = floats(prompts, responses)
    return DeviceTable(
        floats(prompts, responses, width), flags(prompts, responses), each, each, floats(), floats(), gold_rest=each
    )


# ---- Runs, fits and evaluations


def run(config: CompareConfig, table: tuple[int, int, int], runs: int = 1, mesh: AnyMesh | None = None) -> Program:
    """Whole runs of `jarm compare`, `runs` under vmap on each device of a mesh."""
    loop = config.loop()
    if config.per_prompt == "auto":
        loop = dataclasses.replace(loop, per_prompt=1)
    mesh = AbstractMesh((1,), ("runs",)) if mesh is None else mesh
    each, total = NamedSharding(mesh, PartitionSpec("runs")) if mesh.size > 1 else None, runs * mesh.size
    many = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=each), (keys(total), numbers(total))
    )
    return Program(jit_runs(loop, runs, mesh), (*many, device_table(*table), integers()))


def rule(name: str, kind: str = "listed") -> Program:
    """A rule on a case of the conformance suite."""
    case = make_case(kind)
    return Program(jax.jit(functools.partial(get_rule(name), k=BATCH)), (keys(), case.hparams, case.belief, case.space))


def fit(
    head: str, members: int = 4, responses: int = 2000, width: int = 128, labels: int = 450, **options: Any
) -> Program:
    """A fit of some heads to labelled pairs; options are those of `FitConfig`."""
    config = FitConfig(members=members, **options)
    labelled = Labelled(integers(labels), integers(labels), floats(labels), floats(labels), flags(labels))
    run_fit = make_fit(HeadConfig.parse(head).head(), config)
    return Program(run_fit, (keys(), numbers(), floats(responses, width), labelled))


def evaluation(head: str, heads: int = 9, members: int = 4, table: tuple[int, int, int] = (100, 20, 128)) -> Program:
    """A chunk of an evaluation, in its form for accelerators."""
    made, (prompts, responses, width) = HeadConfig.parse(head).head(), table
    one = jax.eval_shape(lambda key: made.init(key, width), keys())
    params = jax.tree.map(lambda leaf: floats(heads, members, *leaf.shape), one)
    constants = Constants(floats(), floats(), floats(3, responses + 1, responses + 1))
    function = functools.partial(evaluate_chunk, head=made, annotator=AnnotatorConfig(), batched_heads=True)
    gold = floats(prompts, responses)
    chunk = floats(*table), gold, flags(prompts, responses), gold, gold
    return Program(jax.jit(function), (params, floats(heads), constants, *chunk))


# ---- Designs over pairs


def space(kind: str, responses: int, width: int = 10, labels: int = 500) -> PairSpace:
    """A pair space of some responses; a list holds as many pairs as responses."""
    if kind == "listed":
        listed = functools.partial(listed_space, width=width)
        return jax.eval_shape(listed, integers(responses, 2), flags(responses))
    described = functools.partial(pair_space, kind, width)
    return jax.eval_shape(described, flags(responses), integers(labels, 2))


def batch(
    kind: str, responses: int, features: int = 64, k: int = 256, mesh: AnyMesh | None = None, **options: Any
) -> Program:
    """An exact greedy batch."""
    function = functools.partial(greedy, D_OPTIMAL, k=k, mesh=mesh, **options)
    arrays = floats(responses, features), floats(responses), space(kind, responses), floats(features, features)
    return Program(jax.jit(function), arrays)


def bound(kind: str, responses: int, features: int = 64, k: int = 256, mesh: AnyMesh | None = None) -> Program:
    """A bound on any batch."""
    arrays = floats(responses, features), floats(responses), space(kind, responses), floats(features, features)
    return Program(jax.jit(functools.partial(design_bound, D_OPTIMAL, k=k, mesh=mesh)), arrays)


def swaps(kind: str, responses: int, features: int = 64, k: int = 256, mesh: AnyMesh | None = None) -> Program:
    """A batch improved by swaps."""
    start = Selection(integers(k, 2), floats(k), flags(k), integers())
    arrays = floats(responses, features), floats(responses), space(kind, responses), floats(features, features), start
    return Program(jax.jit(functools.partial(exchange, D_OPTIMAL, mesh=mesh)), arrays)


def one_pass(responses: int, features: int = 64, k: int = 256) -> Program:
    """One pass over all pairs, for the k longest differences."""

    def longest(x: Any, rewards: Any, pairs: PairSpace) -> Selection:
        return top_pairs(lambda margin, distance: distance, rewards, x, pairs, k)

    return Program(jax.jit(longest), (floats(responses, features), floats(responses), space("all", responses)))


# ---- Language models


def embedding(
    config: ModelConfig,
    texts: int = 8,
    length: int = 32,
    dtype: str = "bfloat16",
    mesh: AnyMesh | None = None,
) -> Program:
    """A batch of texts through a language model; a mesh splits the texts, and parameters by its model axis."""
    config, params = _model(config, dtype, mesh)
    by_text = None if mesh is None else NamedSharding(mesh, PartitionSpec(DATA))
    tokens = jax.ShapeDtypeStruct((texts, length), jnp.int32, sharding=by_text)
    lengths = jax.ShapeDtypeStruct((texts,), jnp.int32, sharding=by_text)
    return Program(jax.jit(functools.partial(embed_tokens, config=config)), (params, tokens, lengths))


def continued(config: ModelConfig, texts: int = 8, length: int = 32, dtype: str = "bfloat16") -> Program:
    """Prefixes, and texts that continue them."""
    params = abstract_params(config, dtype)

    def both(params: Any, *given: Any) -> Any:
        first, first_lengths, rest, lengths, group = given
        prefix = prefill(params, first, first_lengths, config=config)
        return embed_tokens(params, rest, lengths, config=config, prefix=prefix, group=group)

    shapes = integers(2, length), integers(2), integers(texts, length), integers(texts), integers(texts)
    return Program(jax.jit(both), (params, *shapes))


def _model(config: ModelConfig, dtype: str, mesh: AnyMesh | None) -> tuple[ModelConfig, Any]:
    if mesh is None:
        return config, abstract_params(config, dtype)
    config = split_config(config, mesh)

    def placed(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        name = ".".join(str(entry.key) for entry in path)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding_of(name, leaf.shape, mesh))

    return config, jax.tree_util.tree_map_with_path(placed, abstract_params(config, dtype))


def smollm2() -> ModelConfig:
    """The shape of SmolLM2-135M."""
    tiny = read_config(FAMILIES / "smollm2")
    sizes = {"vocab": 49_152, "width": 576, "mlp_width": 1536, "heads": 9, "kv_heads": 3, "head_dim": 64}
    sizes |= {"max_positions": 8192, "attention_scale": 64**-0.5}
    (rope,) = {layer.rope for layer in tiny.layers}
    assert rope is not None
    layers = (LayerConfig(None, dataclasses.replace(rope, width=64)),) * 30
    return dataclasses.replace(tiny, layers=layers, **sizes)


# ---- The table


FAMILIES = pathlib.Path(__file__).parents[1] / "tests" / "fixtures" / "llm"
"""A tiny checkpoint of every family."""
SIZES = {"rounds": 2, "batch": 10, "initial": 20, "candidates": 400}
TABLE = (40, 6, 16)
MLP = {"head": "mlp:8", "metric": "none", "first": "random", "rules": "random,dopt"}
"""The learner of the papers, with few rules."""
SHORT = ("run: default", "run: default, vmap", "greedy: all, 5,000", "fit: mlp", "decoder")
"""Programs that CI compiles for a TPU."""


def table(mesh: Callable[[tuple[int, ...], tuple[str, ...]], AnyMesh]) -> dict[str, Callable[[], Program]]:
    """Names of the main programs -> what makes them.

    Args:
      mesh: `(shape, names of axes) -> mesh` of all devices, at least 4; -1 is what is left for an axis.
    """
    runs, design = functools.partial(mesh, (-1,), ("runs",)), functools.partial(mesh, (-1,), ("design",))
    few, paper = CompareConfig(**SIZES), CompareConfig(**SIZES, **MLP)
    programs: dict[str, Callable[[], Program]] = {
        "run: default": lambda: run(CompareConfig(), (200, 10, 128)),
        "run: default, vmap": lambda: run(CompareConfig(), (200, 10, 128), 4),
        "run: few rules": lambda: run(dataclasses.replace(few, rules="random,greedy_dopt"), TABLE),
        "run: small": lambda: run(few, TABLE),
        "run: small, vmap": lambda: run(few, TABLE, 2),
        "run: small, mesh": lambda: run(few, TABLE, 1, runs()).on(runs()),
        "run: mlp": lambda: run(paper, TABLE),
        "run: mlp, vmap": lambda: run(paper, TABLE, 2),
        "fit: laplace": lambda: fit("laplace"),
        "fit: laplace, evidence": lambda: fit("laplace", evidence=True),
        "fit: linear": lambda: fit("linear"),
        "fit: mlp": lambda: fit("mlp:64,64,64"),
        "fit: mlp, batches": lambda: fit("mlp:8", batch_size=16),
        "fit: mlp, classification": lambda: fit("mlp:8", loss="classification"),
        "evaluate: laplace": lambda: evaluation("laplace"),
        "evaluate: mlp": lambda: evaluation("mlp:8"),
        "bound: all": lambda: bound("all", 600, 16, 32),
        "exchange: all": lambda: swaps("all", 600, 16, 32),
        "greedy: all, mesh": lambda: batch("all", 600, 16, 32, design()).on(design()),
        "bound: all, mesh": lambda: bound("all", 600, 16, 32, design()).on(design()),
        "exchange: all, mesh": lambda: swaps("all", 600, 16, 32, design()).on(design()),
        "decoder": lambda: embedding(smollm2(), 16, 512),
        "decoder: float32": lambda: embedding(smollm2(), 16, 512, "float32"),
        "decoder: behind prefixes": lambda: continued(read_config(FAMILIES / "llama")),
    }
    for kind in ("within", "cross", "all", "listed"):
        for size, shape in ((600, (16, 32)), (5_000, (64, 256)), (100_000, (64, 256))):
            programs[f"greedy: {kind}, {size:,}"] = functools.partial(batch, kind, size, *shape)
    for name in RULES:
        programs[f"rule: {name}"] = functools.partial(rule, name)
    for folder in sorted(path for path in FAMILIES.iterdir() if path.is_dir()):
        programs[f"model: {folder.name}"] = lambda folder=folder: embedding(read_config(folder))
    for name, family, shape in (
        ("texts split", "bert", (-1, 1)),
        ("model split", "gemma2", (-1, 4)),
        ("both split", "llama", (-1, 2)),
    ):
        programs[f"model: {name}"] = functools.partial(_split, family, functools.partial(mesh, shape, (DATA, MODEL)))
    return programs


def _split(family: str, mesh: Callable[[], AnyMesh]) -> Program:
    made = mesh()
    return embedding(read_config(FAMILIES / family), 4 * made.shape[DATA], mesh=made).on(made)
