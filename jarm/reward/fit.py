"""Fit reward heads to labelled pairs: Newton's method for linear and laplace heads, early-stopped AdamW for others."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jarm.core.base import Fit, FitInfo, HParams, Labelled, RewardHead
from jarm.core.settings import as_key
from jarm.core.status import JarmError
from jarm.core.types import AnyKey, Array, Float, Params
from jarm.reward.config import FitConfig
from jarm.reward.early_stopping import fit_by_descent
from jarm.reward.laplace import fit_by_laplace
from jarm.reward.losses import smooth
from jarm.reward.newton import fit_by_newton
from jarm.reward.training import FitParts, FitProblem, Pairs


def make_fit(head: RewardHead, config: FitConfig = FitConfig()) -> Fit:
    """Make the function that fits `config.members` heads to labelled pairs.

    An MLP minimises the weighted mean loss of the pairs by AdamW with decoupled weight decay, stopped early. A linear
    head minimises the weighted sum plus `ridge / 2 |w|^2`, exactly; a laplace head the same with the ridge
    1 / `prior_variance`, and its members are draws of the posterior around that minimum (`jarm.reward.laplace`).
    `FitInfo.valid_nll` is the held-out loss at the number of steps taken, the leave-one-out loss of a linear or laplace
    head, or NaN where nothing is held out.

    A response is scored once, however many pairs it is in. A fit of one's own, given to
    `make_loop(config, fit)`, may close over `ResponseTable.column(name).reshape(-1)`, whose N rows `labelled.first` and
    `labelled.second` index as they index the embeddings.

    Args:
      head: the head to fit.
      config: the static part of the fit.

    Returns:
      `fit(key, hparams, embeddings, labelled, warm=None) -> (params, info)`, params with a leading axis K. It is pure:
      jit, scan, map and vmap it as you like. A warm start has seen the pairs that the fit then holds out.

    Raises:
      JarmError: an ensemble of linear heads that would all be equal, or a laplace head with another ensemble than
        `auto` or another loss than `bradley_terry`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jarm.core.base import HParams, Labelled
      >>> from jarm.reward.heads import linear_head
      >>> embeddings = jnp.eye(4)  # 4 responses, d = 4
      >>> first, second = jnp.array([0, 2]), jnp.array([1, 3])
      >>> labelled = Labelled(first, second, jnp.array([1.0, 0.0]), jnp.ones(2), jnp.ones(2, bool))
      >>> fit = make_fit(linear_head(), FitConfig(members=1))
      >>> params, info = fit(jax.random.key(0), HParams(), embeddings, labelled)
      >>> params["out"]["kernel"].shape  # K, d, 1
      (1, 4, 1)
      >>> print(jnp.sign(params["out"]["kernel"]).ravel())
      [ 1. -1. -1.  1.]
    """
    is_laplace = head.prior_precision is not None
    wanted = {"ensemble": "auto", "loss": "bradley_terry"}
    other = {name: getattr(config, name) for name, value in wanted.items() if getattr(config, name) != value}
    if is_laplace and other:
        cure = " and ".join(f"`{name}` at {wanted[name]!r} and not {value!r}" for name, value in other.items())
        raise JarmError(
            f"Members of a laplace head are draws of its Bradley-Terry posterior: leave {cure}, or take another head."
        )
    linear_ensemble = head.linear and config.members > 1 and not is_laplace
    if linear_ensemble and config.ensemble == "init":
        raise JarmError("All members of a linear ensemble would be equal: set FitConfig.ensemble to 'bootstrap'.")
    bootstrap = config.ensemble == "bootstrap" or (config.ensemble == "auto" and linear_ensemble)
    members, method = config.members, fit_by_laplace if is_laplace else fit_by_newton if head.linear else fit_by_descent
    forms = {way: functools.partial(method, FitParts(head, config, way == "map")) for way in ("map", "vmap")}

    @jax.jit
    def fit(
        key: AnyKey,
        hparams: HParams,
        embeddings: Float[Array, "N d"],
        labelled: Labelled,
        warm: Params | None = None,
    ) -> tuple[Params, FitInfo]:
        key, hparams = as_key(key), hparams.as_float32()
        weight = jnp.where(labelled.mask, labelled.weight, 0.0)
        pairs = Pairs(labelled.first, labelled.second, smooth(labelled.label, hparams.label_smoothing), weight)
        key_start, key_weight, key_fit = jax.random.split(key, 3)
        if warm is None:
            warm = jax.vmap(lambda key: head.init(key, embeddings.shape[1]))(jax.random.split(key_start, members))
        weights = jnp.tile(weight, (members, 1))
        if bootstrap:
            weights *= jax.random.poisson(key_weight, 1.0, weights.shape, jnp.int32).astype(jnp.float32)
        problem = FitProblem(hparams, warm, embeddings, pairs, weights)
        if config.batching == "auto":  # where the program runs decides, and not where it is traced
            params, info = jax.lax.platform_dependent(key_fit, problem, cpu=forms["map"], default=forms["vmap"])
        else:
            params, info = forms[config.batching](key_fit, problem)
        return params, info._replace(status=info.status.max())

    return fit
