"""Rotary positions: one entry of `ROPE_TYPES` for each kind of scaling."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jarm.core.status import JarmError, printable
from jarm.core.types import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotation of queries and keys by position: angles position * frequency, one for each pair of numbers of a head.

    Attributes:
      kind: type of scaling, an entry of `ROPE_TYPES`.
      theta: base of the frequencies, theta ** (-2 j / width) before scaling.
      width: leading numbers of a head that are rotated.
      max_positions: positions that the model was trained for.
      parameters: name and value of the parameters of the type.
    """

    kind: str
    theta: float
    width: int
    max_positions: int
    parameters: tuple[tuple[str, Any], ...] = ()


Frequencies = tuple[np.ndarray | Array, float]


def _exponents(rope: Rope) -> np.ndarray:
    # In float32, the arithmetic in which the published models were trained.
    return np.arange(0, rope.width, 2, dtype=np.float32) / np.float32(rope.width)


def _plain(rope: Rope) -> np.ndarray:
    return np.float32(1) / np.float32(rope.theta) ** _exponents(rope)


def _default(rope: Rope, lengths: Array) -> Frequencies:
    return _plain(rope), 1.0


def _linear(rope: Rope, lengths: Array, *, factor: float) -> Frequencies:
    return _plain(rope) / np.float32(factor), 1.0


def _dynamic(rope: Rope, lengths: Array, *, factor: float) -> Frequencies:
    stretch = factor * jnp.maximum(lengths, rope.max_positions) / rope.max_positions - (factor - 1)
    theta = rope.theta * stretch ** (rope.width / (rope.width - 2))
    return 1.0 / theta[:, None] ** _exponents(rope)[None], 1.0


def _llama3(
    rope: Rope,
    lengths: Array,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> Frequencies:
    plain = _plain(rope)
    turns = original_max_position_embeddings * plain / np.float32(2 * math.pi)  # within the original context
    share = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
    return ((1 - share) * plain / factor + share * plain).astype(np.float32), 1.0


def _yarn(
    rope: Rope,
    lengths: Array,
    *,
    factor: float,
    original_max_position_embeddings: int,
    attention_factor: float | None = None,
    beta_fast: float | None = None,
    beta_slow: float | None = None,
    mscale: float | None = None,
    mscale_all_dim: float | None = None,
    truncate: bool = True,
) -> Frequencies:
    def dimension(turns: float) -> float:
        """Index of the frequency that makes this many turns within the original context."""
        return (
            rope.width * math.log(original_max_position_embeddings / (turns * 2 * math.pi)) / 2 / math.log(rope.theta)
        )

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    low, high = dimension(beta_fast or 32.0), dimension(beta_slow or 1.0)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.width - 1)
    index = np.arange(rope.width // 2, dtype=np.float32)
    slowed = np.clip((index - low) / (high - low if high != low else 0.001), 0, 1)
    plain = _plain(rope)
    if attention_factor is None:
        if mscale and mscale_all_dim:
            attention_factor = magnitude(mscale) / magnitude(mscale_all_dim)
        else:
            attention_factor = magnitude(1.0)
    return (plain / factor * slowed + plain * (1 - slowed)).astype(np.float32), attention_factor


def _longrope(
    rope: Rope,
    lengths: Array,
    *,
    short_factor: tuple[float, ...],
    long_factor: tuple[float, ...],
    original_max_position_embeddings: int,
    factor: float | None = None,
    attention_factor: float | None = None,
) -> Frequencies:
    # The length of each text alone decides, so that its embedding does not depend on its batch.
    short, long = (np.asarray(one, np.float32) for one in (short_factor, long_factor))
    chosen = jnp.where((lengths > original_max_position_embeddings)[:, None], long[None], short[None])
    if factor is None:
        factor = rope.max_positions / original_max_position_embeddings
    if attention_factor is None:
        grown = 1 + math.log(factor) / math.log(original_max_position_embeddings) if factor > 1 else 1.0
        attention_factor = math.sqrt(grown)
    return _plain(rope)[None] / chosen, attention_factor


_TRAINED = ("original_max_position_embeddings",)
# Kind -> its function, the parameters it needs, and those it may have.
ROPE_TYPES: dict[str, tuple[Callable[..., Frequencies], tuple[str, ...], tuple[str, ...]]] = {
    "default": (_default, (), ()),
    "linear": (_linear, ("factor",), ()),
    "dynamic": (_dynamic, ("factor",), ()),
    "llama3": (_llama3, ("factor", "low_freq_factor", "high_freq_factor", *_TRAINED), ()),
    "yarn": (
        _yarn,
        ("factor", *_TRAINED),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (_longrope, ("short_factor", "long_factor", *_TRAINED), ("factor", "attention_factor")),
}


def make_rope(parameters: Mapping[str, Any] | None, head_dim: int, max_positions: int, *, partial: bool) -> Rope:
    """Read `rope_parameters` of a config; unknown, missing and ignored parameters are refused by name.

    Args:
      parameters: as transformers 5 normalises them: `rope_type`, `rope_theta` and the parameters of the type.
      head_dim: numbers in a head.
      max_positions: the config's `max_position_embeddings`.
      partial: whether the family rotates a part of the head (`partial_rotary_factor`).

    Raises:
      JarmError: no parameters, an unknown type, or parameters that the type does not have.
    """
    given = {name: value for name, value in (parameters or {}).items() if value is not None}
    if not given.get("rope_theta"):
        raise JarmError(
            "The config has no `rope_parameters` with a `rope_theta`: take the model's complete config.json."
        )
    theta, kind = float(given.pop("rope_theta")), given.pop("rope_type", given.get("type", "default"))
    given.pop("type", None)
    if kind not in ROPE_TYPES:
        raise JarmError(f"Unknown rope_type '{printable(kind)[:80]}': jarm knows {', '.join(ROPE_TYPES)}.")
    share = float(given.pop("partial_rotary_factor", 1.0))
    if share != 1 and not partial:
        raise JarmError(
            f"This family rotates whole heads, but the config says partial_rotary_factor = {share}: drop it."
        )
    _, needed, optional = ROPE_TYPES[kind]
    missing = [name for name in needed if name not in given]
    unknown = [name for name in given if name not in (*needed, *optional)]
    if missing or unknown:
        problem = f"lacks {', '.join(missing)}" if missing else f"has unknown {printable(', '.join(unknown))[:200]}"
        raise JarmError(f"rope_type '{kind}' {problem}: see `rope_parameters` in the model's config.json.")
    if not 0 < share <= 1 or int(head_dim * share) < 1:
        raise JarmError(f"No share of a head of {head_dim} is rotated by partial_rotary_factor = {share}.")
    width = int(head_dim * share)
    for name in ("short_factor", "long_factor"):
        if name in given and len(given[name]) != (width + 1) // 2:
            raise JarmError(
                f"`{name}` has {len(given[name])} numbers, but {width} rotary numbers per head need half of them."
            )
    frozen = tuple((name, _frozen(name, value)) for name, value in sorted(given.items()))
    rope = Rope(kind, theta, width, max_positions, frozen)
    if not _computes(rope):
        raise JarmError(f"rope_type '{kind}' with these parameters gives no finite frequencies: see `rope_parameters`.")
    return rope


@functools.lru_cache(maxsize=64)
def _computes(rope: Rope) -> bool:
    """Whether frequencies are finite, of short texts and of long ones."""
    function, _, _ = ROPE_TYPES[rope.kind]
    try:
        with np.errstate(all="ignore"):
            found = function(rope, jnp.array([1, 2 * rope.max_positions]), **dict(rope.parameters))
        return all(bool(np.isfinite(np.asarray(each, np.float64)).all()) for each in found)
    except (ArithmeticError, ValueError, TypeError):
        return False


def _frozen(name: str, value: Any) -> Any:
    # JSON writes 8 and 8.0 alike.
    if isinstance(value, (list, tuple)):
        return tuple(map(float, value))
    return value if isinstance(value, bool) else int(value) if name in _TRAINED else float(value)


def rotary_tables(
    rope: Rope, lengths: Int[Array, "B"], positions: int
) -> tuple[Float[Array, "rows T half"], Float[Array, "rows T half"]]:
    """Cosine and sine of position * frequency in float32; one row for all texts, or B if their lengths matter."""
    function, _, _ = ROPE_TYPES[rope.kind]
    frequencies, factor = function(rope, lengths, **dict(rope.parameters))
    rows = jnp.atleast_2d(jnp.asarray(frequencies, jnp.float32))
    angles = jnp.arange(positions, dtype=jnp.float32)[None, :, None] * rows[:, None, :]
    return factor * jnp.cos(angles), factor * jnp.sin(angles)


def rotate(
    x: Float[Array, "B T H D"], cos: Float[Array, "rows T half"], sin: Float[Array, "rows T half"]
) -> Float[Array, "B T H D"]:
    """Rotate each pair (x_j, x_{j + half}) by its angle, in float32; numbers behind the rotary ones stay."""
    half = cos.shape[-1]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    first, second, rest = jnp.split(x.astype(jnp.float32), [half, 2 * half], axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
    return rotated.astype(x.dtype)
