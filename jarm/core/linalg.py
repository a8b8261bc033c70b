"""Small positive (semi)definite algebra with a status: Cholesky, log det, whitening. Products at highest precision.

Some accelerators run a float32 product in reduced precision by default. Information matrices are sums of many small
terms, and their Cholesky fails long before an answer looks wrong, so every product here asks for full precision.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jarm.core.status import Status
from jarm.core.types import Array, Float, Int

HIGHEST = jax.lax.Precision.HIGHEST


def matmul(a: Float[Array, "*a"], b: Float[Array, "*b"]) -> Float[Array, "*c"]:
    """`a @ b` at the highest precision the device has for its type."""
    return jnp.matmul(a, b, precision=HIGHEST)


def jitter(matrix: Float[Array, "F F"]) -> Float[Array, "F F"]:
    """Add 4 eps tr(matrix) to the diagonal: the smallest ridge that float arithmetic does not lose.

    An absolute jitter would vanish beside a matrix of large trace; this one scales with it and is zero for zero.
    """
    size = matrix.shape[0]
    scale = 4 * jnp.finfo(matrix.dtype).eps * jnp.trace(matrix)
    return matrix + scale * jnp.eye(size, dtype=matrix.dtype)


def cholesky(matrix: Float[Array, "F F"]) -> tuple[Float[Array, "F F"], Int[Array, ""]]:
    """Lower Cholesky factor and a status: SINGULAR, with a factor of NaN, where the matrix is not positive definite.

    `slogdet` returns a finite number for an indefinite matrix; this status cannot be missed.

    Example:
      >>> factor, status = cholesky(jnp.diag(jnp.array([4.0, 9.0])))
      >>> jnp.diagonal(factor).tolist(), Status(int(status)).name
      ([2.0, 3.0], 'OK')
      >>> Status(int(cholesky(jnp.diag(jnp.array([1.0, -1.0])))[1])).name
      'SINGULAR'
    """
    factor = jnp.linalg.cholesky(matrix)
    good = jnp.isfinite(factor).all() & (jnp.diagonal(factor) > 0).all()
    return factor, jnp.where(good, jnp.int32(Status.OK), jnp.int32(Status.SINGULAR))


def inverse_factor(matrix: Float[Array, "F F"]) -> tuple[Float[Array, "F F"], Int[Array, ""]]:
    """`W = L^-1` with `matrix = L L^T`, so that `x^T matrix^-1 x = |W x|^2`; and the status of the Cholesky."""
    factor, status = cholesky(matrix)
    identity = jnp.eye(matrix.shape[0], dtype=matrix.dtype)
    return jax.scipy.linalg.solve_triangular(factor, identity, lower=True), status


def grown_root(root: Float[Array, "F F"], rows: Float[Array, "k F"]) -> Float[Array, "F F"]:
    """Triangular R with R^T R = root^T root + rows^T rows: small terms keep digits that the sum would lose."""
    both = jnp.concatenate([rows, root])
    # Large rows first: otherwise the reflections round small rows as the sum would.
    order = jnp.argsort(-jnp.abs(both).max(axis=1))
    return jnp.linalg.qr(both[order], mode="r")


def log_det(matrix: Float[Array, "F F"]) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """`log det matrix` by Cholesky, and its status; NaN where the matrix is not positive definite."""
    factor, status = cholesky(matrix)
    return 2 * jnp.log(jnp.diagonal(factor)).sum(), status


def square_sum(x: Float[Array, "*n F"]) -> Float[Array, "*n"]:
    """|x|^2 over the last axis, by a product with ones: on a CPU an XLA sum takes three times as long."""
    return matmul(jnp.square(x), jnp.ones(x.shape[-1], x.dtype))


def distances(rows: Float[Array, "r F"], columns: Float[Array, "c F"]) -> Float[Array, "r c"]:
    """Squared distances of each row from each column, by one product; rounding may leave some below 0."""
    return square_sum(rows)[:, None] + square_sum(columns)[None, :] - 2 * matmul(rows, columns.T)
