"""What one would use instead of jarm, in PyTorch: the released rules, written from their formula, and better forms.

The released D-optimal rule scores pair m by the gradient of log det(sum_m w_m v_m x_m x_m^T + 1e-6 I) with respect to
w_m at w = 1, and takes the top k. Like the released code these ports make the M x F x F products and let autograd do
the rest. Heads are given by their last layer: features of the first and second responses `[M, F]` and weights `[F]`.
"""

from __future__ import annotations

from typing import Any

import torch

JITTER = 1e-6


def _weighted_sum(x: torch.Tensor, weights: tuple[torch.Tensor, ...], chunk: int | None) -> torch.Tensor:
    """sum_m weight_m x_m x_m^T from explicit outer products, scaled by one factor of the weight after the other."""
    total = torch.zeros(x.shape[1], x.shape[1])
    for rows, *factors in zip(*(array.split(chunk or len(x)) for array in (x, *weights)), strict=True):
        outer = rows[:, :, None] * rows[:, None, :]
        for factor in factors:
            outer = outer * factor[:, None, None]
        total = total + outer.sum(dim=0)
    return total


def _gradient_scores(
    x: torch.Tensor, v: torch.Tensor | None, past: torch.Tensor | None, chunk: int | None
) -> torch.Tensor:
    selection = torch.ones(len(x), requires_grad=True)
    information = _weighted_sum(x, (selection,) if v is None else (v, selection), chunk)
    information = information + JITTER * torch.eye(x.shape[1])
    if past is not None:
        information = information + past
    return torch.autograd.grad(torch.logdet(information), selection)[0]


def _fisher_weight(margin: torch.Tensor) -> torch.Tensor:
    p = torch.sigmoid(margin)
    return p * (1 - p)


def released_xtx(x: torch.Tensor, k: int, chunk: int | None = None) -> torch.Tensor:
    """Indices of the k pairs of the released X^T X rule: all Fisher weights 1."""
    return torch.topk(_gradient_scores(x, None, None, chunk), k).indices


def released_dopt(x: torch.Tensor, margin: torch.Tensor, k: int, chunk: int | None = None) -> torch.Tensor:
    """Indices of the k pairs of the released D-optimal rule."""
    return torch.topk(_gradient_scores(x, _fisher_weight(margin), None, chunk), k).indices


def released_pa_dopt(
    x: torch.Tensor,
    margin: torch.Tensor,
    past_x: torch.Tensor,
    past_margin: torch.Tensor,
    k: int,
    chunk: int | None = None,
) -> torch.Tensor:
    """As `released_dopt`, with the information of the labelled pairs in the determinant."""
    past = _weighted_sum(past_x, (_fisher_weight(past_margin),), chunk)
    return torch.topk(_gradient_scores(x, _fisher_weight(margin), past, chunk), k).indices


def closed_form_dopt(
    x: torch.Tensor, margin: torch.Tensor, k: int, past: tuple[torch.Tensor, torch.Tensor] | None = None
) -> torch.Tensor:
    """The same picks without autograd: leverages v x^T M^-1 x by one product and one triangular solve."""
    scaled = _fisher_weight(margin).sqrt()[:, None] * x
    information = scaled.T @ scaled
    if past is not None:
        past_x, past_margin = past
        information += past_x.T @ (_fisher_weight(past_margin)[:, None] * past_x)
    information.diagonal().add_(JITTER)
    factor = torch.linalg.cholesky(information)
    white = torch.linalg.solve_triangular(factor, scaled.T, upper=False)
    return torch.topk(white.square().sum(dim=0), k).indices


def gemm_dopt(xp: Any, x: Any, margin: Any, k: int, past: tuple[Any, Any] | None = None) -> Any:
    """The same by one general product with the inverse, v sum_f (x M^-1)_f x_f, in NumPy or in PyTorch (`xp`)."""

    def weight(margin: Any) -> Any:
        p = 1 / (1 + xp.exp(-margin))
        return p * (1 - p)

    v = weight(margin)
    information = x.T @ (v[:, None] * x)
    if past is not None:
        past_x, past_margin = past
        information = information + past_x.T @ (weight(past_margin)[:, None] * past_x)
    scores = v * xp.einsum("mf,mf->m", x @ xp.linalg.inv(information), x)
    return torch.topk(scores, k).indices if xp is torch else xp.argpartition(-scores, k)[:k]


def closed_form_xtx(x: torch.Tensor, k: int) -> torch.Tensor:
    """`released_xtx` without autograd."""
    information = x.T @ x
    information.diagonal().add_(JITTER)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(information), x.T, upper=False)
    return torch.topk(white.square().sum(dim=0), k).indices
