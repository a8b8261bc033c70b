"""Fit reward heads to labelled pairs: Newton's method for linear heads, early-stopped AdamW for the others.

A response is scored once, however many pairs it is in, and padding costs little where the device can branch.
"""

from __future__ import annotations

import jax
import jax.flatten_util
import jax.numpy as jnp

from jarm.core.base import Fit, FitInfo, HParams, Labelled, RewardHead
from jarm.core.status import JarmError
from jarm.core.types import Array, Float, Params, PRNGKey
from jarm.reward.config import FitConfig
from jarm.reward.early_stopping import _early_stopped
from jarm.reward.losses import bradley_terry, smooth
from jarm.reward.newton import newton
from jarm.reward.training import Pairs, _over, weighted_mean


def make_fit(head: RewardHead, config: FitConfig = FitConfig()) -> Fit:
    """Make the function that fits `config.members` heads to labelled pairs.

    It minimises the weighted mean loss of the pairs early-stopped, with decoupled weight decay; or, for a linear head,
    the weighted sum with `ridge / 2 |w|^2` added, exactly. `FitInfo.valid_nll` is the held-out loss at the number of
    steps taken, the leave-one-out loss of a linear head, or NaN if nothing is held out.

    Args:
      head: the head to fit.
      config: the static part of the fit.

    Returns:
      `fit(key, hparams, embeddings, labelled, warm=None) -> (params, info)`, params with a leading axis K. It is pure:
      jit, scan, map and vmap it as you like. A warm start has seen the pairs that it is about to hold out.

    Raises:
      JarmError: an ensemble of linear heads that would all be equal.
    """
    if head.linear and config.members > 1 and config.ensemble == "init":
        raise JarmError("All members of a linear ensemble would be equal: set FitConfig.ensemble to 'bootstrap'.")
    linear_ensemble = head.linear and config.members > 1
    bootstrap = config.ensemble == "bootstrap" or (config.ensemble == "auto" and linear_ensemble)
    in_turn = config.batching == "map" or (config.batching == "auto" and jax.default_backend() == "cpu")
    members = config.members
    fit_all = _newton if head.linear else _early_stopped

    @jax.jit
    def fit(
        key: PRNGKey,
        hparams: HParams,
        embeddings: Float[Array, "N d"],
        labelled: Labelled,
        warm: Params | None = None,
    ) -> tuple[Params, FitInfo]:
        hparams = jax.tree.map(lambda number: jnp.asarray(number, jnp.float32), hparams)
        weight = jnp.where(labelled.mask, labelled.weight, 0.0)
        pairs = Pairs(labelled.first, labelled.second, smooth(labelled.label, hparams.label_smoothing), weight)
        key_start, key_weight, key_fit = jax.random.split(key, 3)
        if warm is None:
            warm = jax.vmap(lambda key: head.init(key, embeddings.shape[1]))(jax.random.split(key_start, members))
        weights = jnp.tile(weight, (members, 1))
        if bootstrap:
            weights *= jax.random.poisson(key_weight, 1.0, weights.shape).astype(jnp.float32)
        params, info = fit_all(head, config, in_turn, key_fit, hparams, warm, embeddings, pairs, weights)
        return params, info._replace(status=info.status.max())

    return fit


def _newton(
    head: RewardHead,
    config: FitConfig,
    in_turn: bool,
    key: PRNGKey,
    hparams: HParams,
    starts: Params,
    embeddings: Float[Array, "N d"],
    pairs: Pairs,
    weights: Float[Array, "K L"],
) -> tuple[Params, FitInfo]:
    """Linear members, exactly."""
    del key
    x, label, ends = embeddings[pairs.first] - embeddings[pairs.second], pairs.label, 1
    if config.loss == "classification":  # each response against nothing, with the label of its place
        x = jnp.concatenate([embeddings[pairs.first], embeddings[pairs.second]])
        label, ends = jnp.concatenate([label, 1 - label]), 2

    def one(xs: tuple[Params, Float[Array, "L"]]) -> tuple[Params, FitInfo]:
        start, weight = xs[0], jnp.tile(xs[1], ends)
        ridge, (_, unravel) = jnp.asarray(hparams.ridge), jax.flatten_util.ravel_pytree(start)
        found = newton(x, label, weight, ridge, head.weights(start), steps=config.newton_steps)
        train_nll = ends * weighted_mean(bradley_terry(found.margin, label), weight)
        valid_nll = ends * weighted_mean(bradley_terry(found.margin_left_out, label), jnp.tile(pairs.weight, ends))
        return unravel(found.weights), FitInfo(train_nll, valid_nll, found.steps, found.status)

    # Hessians at the precision of their type: on some accelerators a plain product has a third of its digits.
    with jax.default_matmul_precision("highest"):
        return _over(in_turn, one, (starts, weights))
