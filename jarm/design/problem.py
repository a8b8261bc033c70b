"""The problem that greedy selection, exchange and the design bound share: a criterion on the pairs of a space."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jarm.core.base import Limits, PairSpace
from jarm.core.linalg import cholesky
from jarm.core.pytree import record, static
from jarm.core.status import JarmError, Status
from jarm.core.types import AnyMesh, Array, Bool, Float, Int
from jarm.design.criteria import Criterion
from jarm.design.fisher import centred
from jarm.design.passes import best_pairs
from jarm.design.scorer import Best, Scorer
from jarm.design.spaces import TILE, whitens_differences


@record
class Problem:
    """A criterion on the pairs of a space, from which engines start; see `make_problem`.

    Attributes:
      criterion: the worth of a pair.
      features: `[N, F]` centred, which changes no difference of a pair.
      rewards: `[N]` rewards, 0 where not eligible.
      space, limits: which pairs, and which batches of them.
      information: `[F, F]` the information to start from.
      root: `[F, F]` its triangular root R, R^T R = information; NaN where it is not positive definite.
      singular: scalar int32, SINGULAR where it is not, otherwise OK.
      targets: `[G, F]` targets of the criterion, G = 0 where it has none.
      prompt_of: `[N]` the prompt of each response, less than `prompts`.
      finite: scalar bool, whether features and rewards of all eligible responses are finite.
      whitens_late: whether passes whiten the differences of listed pairs, instead of all responses.
      mesh, tile: devices and tile of a pass, as `best_pairs` has them.
    """

    criterion: Criterion
    features: Float[Array, "N F"]
    rewards: Float[Array, "N"]
    space: PairSpace
    limits: Limits
    information: Float[Array, "F F"]
    root: Float[Array, "F F"]
    singular: Int[Array, ""]
    targets: Float[Array, "G F"]
    prompt_of: Int[Array, "N"]
    finite: Bool[Array, ""]
    prompts: int = static()
    whitens_late: bool = static()
    mesh: AnyMesh | None = static()
    tile: int = static()

    @property
    def size(self) -> int:
        """N, also the index that pads pairs."""
        return self.features.shape[0]

    @property
    def width(self) -> int:
        """F."""
        return self.features.shape[1]

    def ends(self, pairs: Int[Array, "m 2"]) -> tuple[Int[Array, "m"], Int[Array, "m"]]:
        """First and second responses; padding is a pair of one response with itself, whose difference is 0."""
        first, second = jnp.minimum(pairs, self.size - 1).T
        return first, second

    def differences(self, pairs: Int[Array, "m 2"]) -> Float[Array, "m F"]:
        """x, feature differences."""
        first, second = self.ends(pairs)
        return self.features[first] - self.features[second]

    def margins(self, pairs: Int[Array, "m 2"]) -> Float[Array, "m"]:
        """Differences of the rewards."""
        first, second = self.ends(pairs)
        return self.rewards[first] - self.rewards[second]

    def scaled_differences(self, pairs: Int[Array, "m 2"]) -> Float[Array, "m F"]:
        """sqrt(v) x, so that pairs add z^T z to the information."""
        return jnp.sqrt(self.criterion.weight(self.margins(pairs)))[:, None] * self.differences(pairs)

    def leverage_bound(self, y: Float[Array, "N F"]) -> Float[Array, ""]:
        """Upper bound on v |y_i - y_j|^2 of any pair."""
        return 4 * jnp.square(y).sum(axis=1).max() * self.criterion.weight(jnp.zeros((), jnp.float32))

    def best_pairs(
        self, scorer: Scorer, space: PairSpace, k: int, *, floor: Float[Array, ""] | float = -jnp.inf
    ) -> Best:
        """A pass over a space, on the devices of the problem."""
        return best_pairs(scorer, space, k, floor=floor, mesh=self.mesh, tile=self.tile)


def make_problem(
    criterion: Criterion,
    features: Float[Array, "N F"],
    rewards: Float[Array, "N"],
    space: PairSpace,
    information: Float[Array, "F F"],
    *,
    limits: Limits | None = None,
    mesh: AnyMesh | None = None,
    tile: int = TILE,
) -> Problem:
    """The problem of arrays of JAX or NumPy, of any number type; arguments as those of `jarm.design.greedy.greedy`."""
    features, rewards, information = (jnp.asarray(each, jnp.float32) for each in (features, rewards, information))
    space, limits = jax.tree.map(jnp.asarray, space), Limits() if limits is None else limits
    if limits.per_prompt is None:
        limits = dataclasses.replace(limits, per_prompt=space.per_prompt)
    if limits.similarity is not None:
        limits = dataclasses.replace(limits, similarity=jnp.asarray(limits.similarity, jnp.float32))
    width = features.shape[1]
    factor, singular = cholesky(information)
    finite = jnp.isfinite(rewards) & jnp.isfinite(features).all(axis=1)
    targets = criterion.targets
    return Problem(
        criterion=criterion,
        features=centred(features, space),
        rewards=jnp.where(space.eligible, rewards, 0),
        space=space,
        limits=limits,
        information=information,
        root=factor.T,
        singular=singular,
        targets=jnp.zeros((0, width), jnp.float32) if targets is None else jnp.asarray(targets, jnp.float32),
        prompt_of=space.prompt_of,
        finite=(finite | ~space.eligible).all(),
        prompts=space.num_prompts,
        # Ceilings of criteria with targets need whitened responses.
        whitens_late=targets is None and whitens_differences(space),
        mesh=mesh,
        tile=tile,
    )


def require_log_det(criterion: Criterion, method: str) -> None:
    """Refuse a criterion that is not a log determinant."""
    if not criterion.is_log_det:
        raise JarmError(f"{method} knows the log determinant only: use D_OPTIMAL or D_UNWEIGHTED.")


def whitener(root: Float[Array, "F F"]) -> Float[Array, "F F"]:
    """W = R^-T of a triangular root R of the information A = R^T R, so that x^T A^-1 x = |W x|^2."""
    return jax.scipy.linalg.solve_triangular(root.T, jnp.eye(root.shape[0], dtype=jnp.float32), lower=True)


def overflow(whiten: Float[Array, "F F"], best: Best) -> Int[Array, ""]:
    """NONFINITE where scores of a pass overflowed; a W that is NaN comes of singular information and is OK here."""
    return jnp.where(jnp.isnan(whiten).any() | (best.scores < jnp.inf).all(), Status.OK, Status.NONFINITE)


def near_copies(product: Array, square: Array, other: Array, similarity: Array | float) -> Array:
    """Whether the cosine of differences is at least `similarity`, in either direction.

    Args:
      product: x^T x' of two differences, of any shape.
      square, other: |x|^2 and |x'|^2, broadcast against `product`.
      similarity: the minimum cosine of a near-copy.
    """
    # Lengths, whose products neither overflow nor vanish where those of squares would.
    return (jnp.abs(product) >= similarity * (jnp.sqrt(square) * jnp.sqrt(other))) & (square > 0) & (other > 0)
