"""The losses that a run can be trained with: the four of Khakzar et al., eq. 1 and 2, and any other.

    l = -[ w+ y log p + w- (1 - y) log(1 - p) ],    p = sigmoid(z)

w+ = positive * (1 - p)^gamma and w- = negative * p^gamma, so each of the four is three numbers per class: the constants
`positive` and `negative`, and the focusing exponent `gamma` (0 for the two losses without focusing); see `weighted`.

To add a loss of any form, write a function of (n_positive, n_negative, run) that returns a `Criterion`, and name it in
`LOSSES`.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn.functional import logsigmoid

SCALES = ("none", "global", "pair")


@dataclass(frozen=True)
class Criterion:
    """A loss on logits and targets, and the constants that go on a run's record.

    Parameters
    ----------
    element : callable
        Of logits, float32 or float64 (B, M), and targets in [0, 1], (B, M); gives the loss of every element, (B, M).
    constants : dict
        What eq. 2 makes of the class counts, as `weighted` has it; empty for a loss of another form.
    """

    element: Callable[[Tensor, Tensor], Tensor]
    constants: dict[str, Any] = field(default_factory=dict)

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss of each element, (B, M), at least float32: half precision ends below the weight of a rare class.

        The paper prints a sum over the films; the mean is the same loss at another learning rate.
        """
        if logits.shape != targets.shape:
            raise ValueError(f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} differ in shape")
        return self.element(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)


def weighted(
    positive: np.ndarray, negative: np.ndarray, gamma: float = 0.0, scale: float = 1.0, batch_scheme: str | None = None
) -> Criterion:
    """The weighted binary cross-entropy of eq. 1. Finite for logits up to +-700.

    Parameters
    ----------
    positive, negative : ndarray of float64, (M,)
    gamma : float
        Focusing exponent. The gradient also flows through p inside the focusing factors.
    scale : float
        The constant by which the printed weights were multiplied, for the record (1 unless one rescales all classes).
    batch_scheme : {'paper', 'pos_weight'}, optional
        Weighs the targets of each batch by their own counts, as `wbce` says; `positive` and `negative` then serve the
        classes that have one label only in the batch.
    """

    def element(logits: Tensor, targets: Tensor) -> Tensor:
        w_pos, w_neg = (
            torch.as_tensor(side, dtype=logits.dtype, device=logits.device) for side in (positive, negative)
        )
        if batch_scheme:
            n_positive = targets.to(w_pos).sum(0)
            n_negative = len(targets) - n_positive
            both = (n_positive > 0) & (n_negative > 0)
            if batch_scheme == "paper":
                w_pos = torch.where(both, n_negative / len(targets), w_pos)
                w_neg = torch.where(both, n_positive / len(targets), w_neg)
            else:
                w_pos = torch.where(both, n_negative / n_positive, w_pos)
        log_p, log_q = logsigmoid(logits), logsigmoid(-logits)
        if gamma:
            # exp(gamma log q) instead of (1 - p)^gamma: its gradient stays finite where p rounds to 0 or 1.
            w_pos, w_neg = w_pos * torch.exp(gamma * log_q), w_neg * torch.exp(gamma * log_p)
        return -(w_pos * targets * log_p + w_neg * (1 - targets) * log_q)

    constants = {"positive": positive.tolist(), "negative": negative.tolist()}
    return Criterion(element, constants | {"gamma": gamma, "scale": scale, "batch_scheme": batch_scheme})


def bce(n_positive: np.ndarray, n_negative: np.ndarray, run: Any) -> Criterion:
    """Plain binary cross-entropy: every label counts alike."""
    return weighted(np.ones_like(n_positive), np.ones_like(n_positive))


def wbce(n_positive: np.ndarray, n_negative: np.ndarray, run: Any) -> Criterion:
    """Binary cross-entropy weighted by the class counts.

    `run.wbce_scheme` 'paper' is w+ = N-/N, w- = N+/N; 'pos_weight' is w+ = N-/N+, w- = 1, the same ratio at another
    magnitude. With `run.wbce_counts` 'batch', N+ and N- are those of the targets that the loss is called with, as in
    the authors' code, so a film's weight depends on the films beside it (and, with several processes, on how many there
    are); a class with one label only in the batch takes the smallest N-/N+ of the training set's classes that have both
    labels (1 where no class has).
    """
    scheme, counts, ones = run.wbce_scheme, run.wbce_counts, np.ones_like(n_positive)
    if scheme not in ("paper", "pos_weight"):
        raise ValueError(f"wbce scheme must be 'paper' or 'pos_weight', not {scheme!r}")
    if counts not in ("train", "batch"):
        raise ValueError(f"wbce counts must be 'train' or 'batch', not {counts!r}")
    if counts == "batch":
        both = (n_positive > 0) & (n_negative > 0)
        ratio = (n_negative[both] / n_positive[both]).min() if both.any() else 1.0
        positive, negative = (ratio / (1 + ratio), 1 / (1 + ratio)) if scheme == "paper" else (ratio, 1.0)
        return weighted(positive * ones, negative * ones, batch_scheme=scheme)
    _warn_one_sided("wbce", n_positive, n_negative, "WBCE gives the label that is there weight 0: they are not learned")
    if scheme == "paper":
        return weighted(n_negative / (n_positive + n_negative), n_positive / (n_positive + n_negative))
    return weighted(np.divide(n_negative, n_positive, out=0 * ones, where=n_positive > 0), ones)


def focal(n_positive: np.ndarray, n_negative: np.ndarray, run: Any) -> Criterion:
    """Focal loss: `run.alpha` and 1 - alpha in front of the factors with exponent `run.gamma`."""
    ones = np.ones_like(n_positive)
    return weighted(run.alpha * ones, (1 - run.alpha) * ones, run.gamma)


def cb_focal(n_positive: np.ndarray, n_negative: np.ndarray, run: Any) -> Criterion:
    """Class-balanced Focal loss: the inverse effective numbers of films, of base `run.beta`.

    The printed weights are of order 1e-4, where Adam's L2 decay of 1e-6 rivals the gradient. `run.cb_scale` 'global'
    multiplies them by ONE constant that makes the mean over classes of (w+ + w-)/2 equal 1; 'none' leaves them; 'pair'
    makes each class's two weights sum to 1, which changes the balance BETWEEN classes.
    """
    if run.cb_scale not in SCALES:
        raise ValueError(f"cb_focal scale must be one of {SCALES}, not {run.cb_scale!r}")
    _warn_one_sided("cb_focal", n_positive, n_negative, "the absent label gets weight 0")  # 0/0, and never applies
    positive, negative = (_inverse_effective_number(counts, run.beta) for counts in (n_positive, n_negative))
    if run.cb_scale == "pair":
        return weighted(positive / (positive + negative), negative / (positive + negative), run.gamma)
    constant = 2 / (positive + negative).mean() if run.cb_scale == "global" else 1.0
    return weighted(constant * positive, constant * negative, run.gamma, float(constant))


class Loss(NamedTuple):
    """A loss as tables and figures print it, and the function that makes it from the class counts."""

    label: str
    make: Callable[[np.ndarray, np.ndarray, Any], Criterion]


LOSSES = {
    "bce": Loss("BCE", bce),
    "wbce": Loss("WBCE", wbce),
    "focal": Loss("Focal", focal),
    "cb_focal": Loss("CB-Focal", cb_focal),
}


def make_loss(name: str, n_positive: ArrayLike, n_negative: ArrayLike, run: Any) -> Criterion:
    """The loss `name` for a training set.

    Parameters
    ----------
    name : a key of LOSSES
    n_positive, n_negative : array_like of int, (M,)
        Films of the training set with and without each class; the functions of `LOSSES` get them as float64.
    run : lib.params.Run
        Or anything with the attributes that the losses read: alpha in [0, 1], gamma >= 0, beta in [0, 1), wbce_scheme,
        wbce_counts, cb_scale.

    Raises
    ------
    ValueError
        Unknown name, negative counts, or a number out of its range.

    Warns
    -----
    UserWarning
        A class with one label only. CB-Focal: the weight of the absent side is set to 0. WBCE with the training set's
        counts: the side that is there has weight 0 by the formula, so the class is not learned.
    """
    if name not in LOSSES:
        raise ValueError(f"unknown loss {name!r}: choose from {', '.join(LOSSES)}")
    n_positive, n_negative = (np.atleast_1d(np.asarray(side, np.float64)) for side in (n_positive, n_negative))
    fit = n_positive.shape == n_negative.shape
    if not (fit and ((n_positive >= 0) & (n_negative >= 0) & (n_positive + n_negative > 0)).all()):
        raise ValueError(
            f"class counts must be two arrays of equal shape, not negative, with a film in each class: {n_positive}, "
            f"{n_negative}"
        )
    if not (0 <= run.alpha <= 1 and run.gamma >= 0 and 0 <= run.beta < 1):
        given = f"alpha={run.alpha}, gamma={run.gamma}, beta={run.beta}"
        raise ValueError(f"need 0 <= alpha <= 1, gamma >= 0, 0 <= beta < 1: {given}")
    return LOSSES[name].make(n_positive, n_negative, run)


def _inverse_effective_number(counts: np.ndarray, beta: float) -> np.ndarray:
    """(1 - beta) / (1 - beta^n), 0 where n = 0. expm1 keeps the digits that 1 - beta^n loses for small n."""
    if beta == 0:
        return (counts > 0).astype(np.float64)
    effective = -np.expm1(counts * np.log(beta))
    return np.divide(1 - beta, effective, out=np.zeros_like(counts), where=counts > 0)


def _warn_one_sided(loss: str, n_positive: np.ndarray, n_negative: np.ndarray, effect: str) -> None:
    outputs = np.flatnonzero((n_positive == 0) | (n_negative == 0)).tolist()
    if outputs:
        warnings.warn(f"{loss}: outputs {outputs} have training films of one label only; {effect}", stacklevel=4)
