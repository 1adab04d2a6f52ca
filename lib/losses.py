"""The four losses of Khakzar et al., eq. 1 and 2, as one weighted binary cross-entropy.

    l = -[ w+ y log p + w- (1 - y) log(1 - p) ],    p = sigmoid(z)

w+ = positive * (1 - p)^gamma and w- = negative * p^gamma, so a loss is three numbers per class: the constants
`positive` and
`negative`, and the focusing exponent `gamma` (0 for the two losses without focusing).

To add a loss of this form, add one branch to `loss_weights` and its name to `LOSSES`.
"""

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import logsigmoid

LOSSES = ("bce", "wbce", "focal", "cb_focal")
SCALES = ("none", "global", "pair")


@dataclass(frozen=True)
class LossWeights:
    """What eq. 2 makes of the class counts: `positive` and `negative`, float64 of shape (M,), the exponent `gamma`, and
    the constant `scale` by which the printed weights were multiplied (1 unless one constant rescales all classes).

    With `batch_scheme`, a WBCE scheme, `imbalance_loss` counts each batch anew; `positive` and `negative` then serve
    the classes that have one label only in the batch.
    """

    positive: np.ndarray
    negative: np.ndarray
    gamma: float
    scale: float = 1.0
    batch_scheme: str | None = None


def loss_weights(
    loss, n_positive, n_negative, *, alpha=0.25, gamma=2.0, beta=0.9999, scheme="paper", scale="global", counts="train"
):
    """Constants of a loss from the training set's class counts (Khakzar et al., eq. 2).

    Parameters
    ----------
    loss : {'bce', 'wbce', 'focal', 'cb_focal'}
    n_positive, n_negative : array_like of int, shape (M,)
        Films of the training set with and without each class, whatever `counts` says.
    alpha, gamma, beta : float
        Focal balance in [0, 1], focusing exponent >= 0, effective-number base in [0, 1).
    scheme : {'paper', 'pos_weight'}
        WBCE only. 'paper' is w+ = N-/N, w- = N+/N; 'pos_weight' is w+ = N-/N+, w- = 1, the same ratio at another
        magnitude.
    scale : {'global', 'none', 'pair'}
        CB-Focal only. Its printed weights are of order 1e-4, where Adam's L2 decay of 1e-6 rivals the gradient.
        'global' multiplies them by ONE constant that makes the mean over classes of (w+ + w-)/2 equal 1; 'none' leaves
        them; 'pair' makes each class's two weights sum to 1, which changes the balance BETWEEN classes.
    counts : {'train', 'batch'}
        WBCE only. 'batch': N+ and N- are those of the targets that the loss is called with, as in the authors' code, so
        a film's weight depends on the films beside it (and, with several processes, on how many there are). A class
        with one label only in the batch takes the smallest N-/N+ of the training set's classes that have both labels (1
        where no class has).

    Returns
    -------
    LossWeights

    Raises
    ------
    ValueError
        Unknown name, negative counts, or a number out of its range.

    Warns
    -----
    UserWarning
        A class with one label only. CB-Focal: the weight of the absent side is set to 0 (it would be 0/0, and never
        applies in training). WBCE with the training set's counts: the side that is there has weight 0 by the formula,
        so the class is not learned.
    """
    n_positive, n_negative = (
        np.atleast_1d(np.asarray(n_positive, np.float64)),
        np.atleast_1d(np.asarray(n_negative, np.float64)),
    )
    if (
        n_positive.shape != n_negative.shape
        or not ((n_positive >= 0) & (n_negative >= 0) & (n_positive + n_negative > 0)).all()
    ):
        raise ValueError(
            f"class counts must be two arrays of equal shape, not negative, with a film in each class: {n_positive}, "
            f"{n_negative}"
        )
    if not (0 <= alpha <= 1 and gamma >= 0 and 0 <= beta < 1):
        raise ValueError(f"need 0 <= alpha <= 1, gamma >= 0, 0 <= beta < 1: alpha={alpha}, gamma={gamma}, beta={beta}")
    ones = np.ones_like(n_positive)
    if loss == "bce":
        return LossWeights(ones, ones, 0.0)
    if loss == "focal":
        return LossWeights(alpha * ones, (1 - alpha) * ones, gamma)

    if loss == "wbce" and scheme not in ("paper", "pos_weight"):
        raise ValueError(f"wbce scheme must be 'paper' or 'pos_weight', not {scheme!r}")
    if loss == "wbce" and counts not in ("train", "batch"):
        raise ValueError(f"wbce counts must be 'train' or 'batch', not {counts!r}")
    if loss == "wbce" and counts == "batch":
        both = (n_positive > 0) & (n_negative > 0)
        ratio = (n_negative[both] / n_positive[both]).min() if both.any() else 1.0
        positive, negative = (ratio / (1 + ratio), 1 / (1 + ratio)) if scheme == "paper" else (ratio, 1.0)
        return LossWeights(positive * ones, negative * ones, 0.0, batch_scheme=scheme)

    one_sided = np.flatnonzero((n_positive == 0) | (n_negative == 0)).tolist()
    if one_sided and loss in LOSSES:
        effect = (
            "the absent label gets weight 0"
            if loss == "cb_focal"
            else "WBCE gives the label that is there weight 0: they are not learned"
        )
        warnings.warn(f"{loss}: outputs {one_sided} have training films of one label only; {effect}", stacklevel=2)
    if loss == "wbce":
        if scheme == "paper":
            total = n_positive + n_negative
            return LossWeights(n_negative / total, n_positive / total, 0.0)
        return LossWeights(np.divide(n_negative, n_positive, out=np.zeros_like(ones), where=n_positive > 0), ones, 0.0)
    if loss == "cb_focal":
        positive, negative = _inverse_effective_number(n_positive, beta), _inverse_effective_number(n_negative, beta)
        if scale == "none":
            return LossWeights(positive, negative, gamma)
        if scale == "global":
            constant = 2 / (positive + negative).mean()
            return LossWeights(constant * positive, constant * negative, gamma, float(constant))
        if scale == "pair":
            total = positive + negative
            return LossWeights(positive / total, negative / total, gamma)
        raise ValueError(f"cb_focal scale must be one of {SCALES}, not {scale!r}")
    raise ValueError(f"unknown loss {loss!r}: choose from {LOSSES}")


def _inverse_effective_number(counts, beta):
    """(1 - beta) / (1 - beta^n), 0 where n = 0. expm1 keeps the digits that 1 - beta^n loses for small n."""
    if beta == 0:
        return (counts > 0).astype(np.float64)
    effective = -np.expm1(counts * np.log(beta))
    return np.divide(1 - beta, effective, out=np.zeros_like(counts), where=counts > 0)


def _batch_weights(targets, positive, negative, scheme):
    """WBCE weights from the targets of a batch; for a class that has one label only there, `positive` and
    `negative`."""
    n_positive = targets.sum(0).to(positive)
    n_negative = len(targets) - n_positive
    both = (n_positive > 0) & (n_negative > 0)
    if scheme == "paper":
        return torch.where(both, n_negative / len(targets), positive), torch.where(
            both, n_positive / len(targets), negative
        )
    return torch.where(both, n_negative / n_positive, positive), negative


def imbalance_loss(logits, targets, weights, reduction="mean"):
    """The weighted binary cross-entropy of eq. 1 on logits.

    Parameters
    ----------
    logits : Tensor, float, shape (B, M)
    targets : Tensor, float in [0, 1], shape (B, M)
        WBCE with `counts='batch'` weighs them by their own sums over the B films.
    weights : LossWeights
    reduction : {'mean', 'sum', 'none'}
        Over all B x M elements. The paper prints a sum; the mean is the same loss at another learning rate.

    Returns
    -------
    Tensor
        Scalar, or (B, M) for 'none'. Finite for logits up to +-700. The gradient also flows through p inside the
        focusing factors.
    """
    if logits.shape != targets.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} differ in shape")
    positive = torch.as_tensor(weights.positive, dtype=logits.dtype, device=logits.device)
    negative = torch.as_tensor(weights.negative, dtype=logits.dtype, device=logits.device)
    if weights.batch_scheme:
        positive, negative = _batch_weights(targets, positive, negative, weights.batch_scheme)
    log_p, log_q = logsigmoid(logits), logsigmoid(-logits)
    if weights.gamma:
        # exp(gamma log q) instead of (1 - p)^gamma: its gradient stays finite where p rounds to 0 or 1.
        positive = positive * torch.exp(weights.gamma * log_q)
        negative = negative * torch.exp(weights.gamma * log_p)
    loss = -(positive * targets * log_p + negative * (1 - targets) * log_q)
    if reduction == "none":
        return loss
    if reduction in ("mean", "sum"):
        return getattr(loss, reduction)()
    raise ValueError(f"reduction must be 'mean', 'sum' or 'none', not {reduction!r}")
