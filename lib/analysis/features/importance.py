"""The importance of each feature for each class (Li et al., eq. 3 and 4), and what can be read from it.

The importance matrix (`ImportanceMatrix`, features x classes) gives the principal features (`select_features`) and,
further down, what the paper's five uses of it are made of (`findings`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from torch import Tensor

# ---- importance matrix


@dataclass(frozen=True)
class Importance:
    """Importance of F features for C classes: the mean over films of the spatial sum of the weighted feature.

    Attributes
    ----------
    all, own, sd : float64 (F, C)
        `all` over all films (eq. 3), with the standard deviation `sd`; `own` over the films of the class (eq. 4), NaN
        for a class without any.
    n, n_own : int64 (C,)
        Films behind a column of `all` and of `own`.
    """

    all: np.ndarray
    own: np.ndarray
    sd: np.ndarray
    n: np.ndarray
    n_own: np.ndarray

    @property
    def contrast(self) -> np.ndarray:
        """Mean over the class's films minus the mean over all other films, float64 (F, C); NaN where there are none of
        either."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return (self.own - self.all) * (self.n / (self.n - self.n_own))


class ImportanceMatrix:
    """Importance matrices of all classes (Li et al., eq. 3 and 4) over a stream of films, sums in float64.

    With `cam.channel_contributions` for all classes at once, both cost one forward pass.

    Parameters
    ----------
    classes : sequence of str
    """

    def __init__(self, classes: Sequence[str]):
        self.classes = list(classes)
        self._all = None

    def update(self, contributions: Tensor, targets: ArrayLike, correct: ArrayLike | None = None) -> None:
        """Take in some more films.

        Parameters
        ----------
        contributions : float (B, C, F)
            Of `cam.channel_contributions`.
        targets : int (B,) or 0/1 (B, C)
            The film's class, or its labels.
        correct : bool (B, C), optional
            Films that count for a class (A45: the correctly classified, see `correct_predictions`). Default all.

        Raises
        ------
        ValueError
            Shapes that do not fit, targets out of range, NaN or infinite contributions.
        """
        n_classes = len(self.classes)
        if contributions.ndim != 3 or contributions.shape[1] != n_classes:
            raise ValueError(f"need contributions (B, {n_classes}, F), got shape {tuple(contributions.shape)}")
        labels = _labels(targets, n_classes)
        kept = np.ones(labels.shape, bool) if correct is None else np.asarray(torch.as_tensor(correct).cpu(), bool)
        if len(labels) != len(contributions) or kept.shape != labels.shape:
            found = f"{len(labels)} targets and a choice of shape {kept.shape}"
            raise ValueError(f"{len(contributions)} films come with {found}")
        if not torch.isfinite(contributions).all():
            film, c, feature = torch.nonzero(~torch.isfinite(contributions))[0].tolist()
            where = f"of feature {feature} in film {film} of the batch"
            raise ValueError(f"class {self.classes[c]!r}: NaN or infinite contribution {where}")
        if self._all is None:
            self._all, self._squares, self._own = np.zeros((3, n_classes, contributions.shape[2]))
            self._n, self._n_own = np.zeros((2, n_classes), dtype=np.int64)
        device = "cpu" if contributions.device.type == "mps" else contributions.device  # MPS has no float64
        values = contributions.detach().to(device).double().transpose(0, 1)
        chosen = np.stack([kept, kept & labels], axis=1).T.astype(np.float64)
        weights = torch.as_tensor(chosen, device=device)  # (C, 2, B)
        sums = torch.bmm(weights, values).cpu().numpy()
        self._all += sums[:, 0]
        self._own += sums[:, 1]
        self._squares += torch.bmm(weights[:, :1], values.square())[:, 0].cpu().numpy()
        self._n += kept.sum(axis=0)
        self._n_own += (kept & labels).sum(axis=0)

    def result(self) -> Importance:
        """The matrices; a column without films is NaN."""
        if self._all is None:
            raise ValueError("no film has been seen yet: call update with the contributions of some films")
        with np.errstate(invalid="ignore", divide="ignore"):
            mean, own = self._all.T / self._n, self._own.T / self._n_own
            sd = np.sqrt(np.maximum(self._squares.T / self._n - mean**2, 0))
        return Importance(mean, own, sd, self._n.copy(), self._n_own.copy())


def correct_predictions(logits: ArrayLike, targets: ArrayLike) -> np.ndarray:
    """Films that are classified correctly, bool (B, C): the largest logit at the target (B,), or each logit's sign as
    its label (B, C)."""
    logits = np.asarray(torch.as_tensor(logits).cpu())
    labels = _labels(targets, logits.shape[1])
    if np.ndim(targets) == 1:
        return np.repeat(labels[np.arange(len(labels)), logits.argmax(axis=1)][:, None], logits.shape[1], axis=1)
    return (logits > 0) == labels


def _labels(targets: ArrayLike, n_classes: int) -> np.ndarray:
    targets = np.asarray(torch.as_tensor(targets).cpu())
    if targets.ndim == 1:
        good = (targets >= 0) & (targets < n_classes) & (targets == np.floor(targets))
        if not good.all():
            raise ValueError(f"targets must be classes 0..{n_classes - 1}, got {targets[~good][0]}")
        return targets[:, None] == np.arange(n_classes)
    if targets.ndim != 2 or targets.shape[1] != n_classes or not ((targets == 0) | (targets == 1)).all():
        wanted = f"classes (B,) or labels 0 and 1 of shape (B, {n_classes})"
        raise ValueError(f"targets must be {wanted}, got shape {targets.shape}")
    return targets == 1


def select_features(importance: ArrayLike, ratio: float, by: str = "value") -> np.ndarray:
    """The principal features of each class: the top ``k = max(1, ceil(ratio F))`` of its column.

    Parameters
    ----------
    importance : float (F, C)
        A column of NaN (a class without films) selects nothing.
    ratio : float in (0, 1]
        5 % in the paper, 20 % for MNIST, 25 % for ImageNet.
    by : {'value', 'abs_diff'}
        The largest importance, or (A46) the largest ``|importance - mean over the classes|``. Ties go to the lower
        feature.

    Returns
    -------
    bool (F, C); its complement is ``~mask``.
    """
    importance = _matrix(importance)
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must lie in (0, 1], got {ratio}")
    if by not in ("value", "abs_diff"):
        raise ValueError(f"unknown order {by!r}; choose value or abs_diff")
    defined = ~np.isnan(importance).any(axis=0)
    if by == "abs_diff":
        if defined.sum() < 2:
            raise ValueError("abs_diff compares classes and needs at least two with films")
        importance = np.abs(importance - importance[:, defined].mean(axis=1, keepdims=True))
    k = max(1, int(np.ceil(round(ratio * len(importance), 9))))  # 0.07 * 100 is 7.000000000000001
    top = np.argsort(-importance, axis=0, kind="stable")[:k]
    mask = np.zeros(importance.shape, dtype=bool)
    np.put_along_axis(mask, top, True, axis=0)
    return mask & defined


def principal_by_reading(importance: Importance, ratio: float) -> dict[str, np.ndarray]:
    """The principal features, bool (F, C) of `select_features`, by each reading of a feature's importance.

    Equation 3 averages over all films, most of which lack a rare class; equation 4 over the films of the class; the
    contrast is what those add beyond the others.
    """
    readings = {"eq. 3, all films": importance.all, "eq. 4, films of the class": importance.own}
    readings["contrast"] = importance.contrast
    return {name: select_features(matrix, ratio) for name, matrix in readings.items()}


def combined_mask(masks: np.ndarray, selected: int | None = None) -> np.ndarray:
    """One mask (F,) for all films, which may not depend on a film's true class (A49): of more than two classes the
    union of their masks, else that of class `selected` (default the last, the positive one)."""
    mask = masks.any(axis=1) if masks.shape[1] > 2 else masks[:, -1 if selected is None else selected]
    if not mask.any():
        raise ValueError("the mask selects no feature: the classes it is made of have no films")
    return mask


def _matrix(importance: ArrayLike) -> np.ndarray:
    importance = np.asarray(importance, dtype=np.float64)
    if importance.ndim != 2 or not importance.size:
        raise ValueError(f"need an importance matrix (features, classes), got shape {importance.shape}")
    missing = np.isnan(importance)
    if np.isinf(importance).any() or (missing.any(axis=0) != missing.all(axis=0)).any():
        raise ValueError("the importance matrix holds infinite values, or NaN in a part of a column")
    return importance


# ---- what the matrix tells


def train_test_difference(train: Importance, test: Importance, classes: Sequence[str]) -> pd.DataFrame:
    """Overfitting (sec. VI-A): how far the columns of eq. 3 differ between training and test films.

    Returns
    -------
    DataFrame
        One row a class: class, n_train, n_test; difference, ``sum |train - test| / sum |train|``; by_chance, the value
        expected of that where only the choice of films differs (independent films, normal means: too small where
        patients have several films); correlation (Pearson) of the two columns. NaN where a class has no films, or a
        column no contrast.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        size = np.abs(train.all).sum(axis=0)
        size = np.where(size > 0, size, np.nan)
        error = np.sqrt(train.sd**2 / train.n + test.sd**2 / test.n)
        a, b = (matrix.all - matrix.all.mean(axis=0) for matrix in (train, test))
        return pd.DataFrame(
            {
                "class": list(classes),
                "n_train": train.n,
                "n_test": test.n,
                "difference": np.abs(train.all - test.all).sum(axis=0) / size,
                "by_chance": np.sqrt(2 / np.pi) * error.sum(axis=0) / size,
                "correlation": (a * b).sum(axis=0) / np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0)),
            }
        )


def robust_z(values: ArrayLike) -> np.ndarray:
    """``(v - median) / (1.4826 MAD)`` along axis 0, float64; where more than half of the values agree, the mean
    absolute deviation x 1.2533."""
    values = np.asarray(values, dtype=np.float64)
    away = values - np.median(values, axis=0)
    spread = 1.4826 * np.median(np.abs(away), axis=0)
    spread = np.where(spread == 0, 1.2533 * np.abs(away).mean(axis=0), spread)
    return np.divide(away, spread, out=np.where(np.isnan(away), np.nan, 0.0), where=spread != 0)


def confounder_candidates(importance: ArrayLike, classes: Sequence[str], top: int = 3) -> pd.DataFrame:
    """Features to look at as possible confounders: extreme in the column of a class, and important for that class
    alone.

    `Importance.contrast` suits this best: what a feature adds on the films of the class and not on the others.

    Returns
    -------
    DataFrame
        `top` rows a class with films, the most extreme first: class, feature, importance, robust_z (within the column),
        share (of the column's positive total), selectivity (its share here over the sum of its shares in all classes; 1
        = positive for this class alone).
    """
    importance = _matrix(importance)
    z, share = robust_z(importance), _shares(importance)
    total = np.nansum(share, axis=1)
    rows = []
    for c, name in enumerate(classes):
        if np.isnan(importance[:, c]).any():
            continue
        for f in np.argsort(-z[:, c], kind="stable")[:top]:
            selectivity = share[f, c] / total[f] if total[f] > 0 else np.nan
            rows.append((name, int(f), importance[f, c], z[f, c], share[f, c], selectivity))
    return pd.DataFrame(rows, columns=["class", "feature", "importance", "robust_z", "share", "selectivity"])


def film_distances(contributions: Tensor, targets: ArrayLike, importance: ArrayLike) -> np.ndarray:
    """Outlier films: ``1 - cosine`` of a film's contributions to a class it belongs to and the class's column, float64
    (B, C) in [0, 2].

    NaN for classes the film does not belong to, and where either vector is zero or undefined. A film that the column
    was averaged over pulls it towards itself; the only film of a class has distance 0.

    Parameters
    ----------
    contributions : float (B, C, F)
    targets : int (B,) or 0/1 (B, C)
    importance : float (F, C)
        `Importance.own`.
    """
    values, columns = contributions.detach().cpu().double().numpy(), _matrix(importance).T
    size = np.linalg.norm(values, axis=2) * np.linalg.norm(columns, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = np.einsum("bcf,cf->bc", values, columns) / size
    return np.where(_labels(targets, len(columns)), np.clip(1 - cosine, 0, 2), np.nan)


def carriers(importance: ArrayLike, share: float = 0.8) -> np.ndarray:
    """The fewest features whose positive importance adds up to at least `share` of a class's positive total, bool (F,
    C).

    Their number, ``.sum(axis=0)``, is how many features carry the class. None where nothing is positive.
    """
    shares = np.nan_to_num(_shares(_matrix(importance)))
    order = np.argsort(-shares, axis=0, kind="stable")
    ranked = np.take_along_axis(shares, order, axis=0)
    short = ranked.cumsum(axis=0) - ranked < share * (1 - 1e-12)  # the sum before a feature
    mask = np.zeros(shares.shape, dtype=bool)
    np.put_along_axis(mask, order, short & (ranked > 0), axis=0)
    return mask


def participation(importance: ArrayLike) -> np.ndarray:
    """Effective number of features of each class, ``1 / sum share^2`` of the positive importance, float64 (C,) in 1..F;
    NaN without any."""
    squared = (_shares(_matrix(importance)) ** 2).sum(axis=0)
    return 1 / np.where(squared > 0, squared, np.nan)


def overlap(masks: np.ndarray) -> np.ndarray:
    """Jaccard index of the feature sets (F, C) of each two classes, float64 (C, C); NaN for two empty sets."""
    counts = masks.astype(np.float64)
    both, size = counts.T @ counts, counts.sum(axis=0)
    either = size[:, None] + size - both
    return np.divide(both, either, out=np.full(both.shape, np.nan), where=either > 0)


def chance_overlap(masks: np.ndarray) -> float:
    """Jaccard index expected of two sets of features drawn at random, as large as the largest of `masks` (F, C)."""
    n, k = len(masks), int(masks.sum(axis=0).max())
    return sum(comb(k, both) * comb(n - k, k - both) / comb(n, k) * both / (2 * k - both) for both in range(k + 1))


def redundancy(importance: ArrayLike) -> np.ndarray:
    """Largest ``|importance|`` of each feature in any class as a share of that column's largest, float64 (F,) in [0,
    1].

    Features below a small share, 1 % say, matter to no class; ``np.argsort(..., kind="stable")`` is the order in which
    to prune.
    """
    size = np.abs(_matrix(importance))
    size = size[:, ~np.isnan(size[0])]
    if not size.size:
        raise ValueError("no class has films: there is no importance to prune by")
    largest = size.max(axis=0)
    return np.divide(size, largest, out=np.zeros_like(size), where=largest > 0).max(axis=1)


def _shares(importance: np.ndarray) -> np.ndarray:
    """Positive part of each column over its sum; 0 without any, NaN for a class without films."""
    positive = np.maximum(importance, 0)
    total = positive.sum(axis=0)
    return np.divide(positive, total, out=np.where(np.isnan(positive), np.nan, 0.0), where=total != 0)
