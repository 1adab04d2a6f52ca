"""Where a change between two losses lives: in the trunk, whose features they are, or in the head that reads them.

The head of every loss is refitted on the frozen, pooled features of every loss's trunk, by the loss's own objective and
to convergence. What each pair of trunk and head gives, and how a change is split between them, is `changes`.

A refitted head is free to put a prior into its bias, where training leaves it in the weights, so the maps of refitted
heads are read with their bias, ``sum_k w_k A_k + c``, whose mean over the positions is the logit.

The simplest rival to both parts changes neither: BCE's own logits and maps plus one constant a class (`prior_shift`).
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from scipy.optimize import brentq, minimize
from scipy.special import expit
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from lib.analysis.alignment import align
from lib.analysis.comparison import BASELINE
from lib.analysis.inference import LensError, Output, layer_maps

TOLERANCE = 1e-6  # of the largest gradient of the objective, in whitened coordinates, as a share of that at the start
ENTRIES_A_THREAD = 2**22  # of the features
TRAINED = "trained"  # stands where a head's objective does, for the head as training left it


def require_losses(losses: Iterable[str], run: str) -> None:
    """`LensError` where there is nothing to compare: `run` is no run of BCE, or none of another loss is trained.

    `losses` : those of the trained runs that differ from `run`, <task>-<backbone>-<loss>, in the loss alone.
    """
    stem, _, loss = run.rpartition("-")
    if loss != BASELINE:
        raise LensError(f"{run}: changes are split against BCE, so open its run: -p loss {BASELINE}")
    if not set(losses) - {BASELINE}:
        raise LensError(
            f"no run of another loss than BCE is trained beside {run}: train {stem}-wbce, say, with 01_train"
        )


class Refit(NamedTuple):
    """A head, and how far it is from the optimum.

    Attributes
    ----------
    head : nn.Linear
        float32, on the CPU.
    objective : float
        Its value at the end.
    gradient : float
        Largest entry of the gradient at the end as a share of that at the start, in whitened coordinates.
    iterations : int
    separated : int
        Classes whose training films it tells apart without an error, as one that learns them by heart does.
    """

    head: nn.Linear
    objective: float
    gradient: float
    iterations: int
    separated: int


def pooled_features(outputs: Iterable[Output], layer: str) -> np.ndarray:
    """Spatial means of the maps of `layer`, float64 (N, F), in the order of the outputs."""
    return np.concatenate([layer_maps(output, layer).double().mean((2, 3)).cpu().numpy() for output in outputs])


def refit_heads(
    features: ArrayLike,
    targets: ArrayLike,
    criteria: Mapping[str, Callable[[Tensor, Tensor], Tensor]],
    *,
    weight_decay: float,
    max_iterations: int = 3000,
) -> dict[str, Refit]:
    """The linear heads that minimise each of several losses on frozen features.

    ``mean over films and classes of criterion(X W^T + c, Y)  +  weight_decay / 2 (|W|^2 + |c|^2)``, the objective of
    training (its L2 term is Adam's, of the head), by L-BFGS in float64 from zero. BCE and WBCE are convex, so the start
    does not matter; with focusing the loss is not, and the start is part of the definition.

    Parameters
    ----------
    features : (N, F)
        Of the training films.
    targets : (N, M), 0 or 1
    criteria : dict of callable
        Loss of every element from logits and targets (N, M), see `losses.Criterion`, by its name.
    weight_decay : float
        At least 0; that of training divided by the constant in front of its loss.
    max_iterations : int

    Returns
    -------
    dict of Refit, by the names of `criteria`

    Raises
    ------
    ValueError
        Features or targets that are not finite, or of different lengths.
    """
    x, y = np.asarray(features, dtype=np.float64), np.asarray(targets, dtype=np.float64)
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise ValueError(f"need features (N, F) and targets (N, M), got {x.shape} and {y.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("features or targets hold NaN or infinite values")
    # Threads with little to do wait for each other, on busy cores longer than they work.
    with threadpool_limits(min(torch.get_num_threads(), 1 + x.size // ENTRIES_A_THREAD)):
        basis, mean = _whitening(x)
        arrays = [torch.from_numpy(array) for array in ((x - mean) @ basis, y, basis, mean)]
        return {name: _refit(*arrays, criterion, weight_decay, max_iterations) for name, criterion in criteria.items()}


def _refit(
    inputs: Tensor, labels: Tensor, basis: Tensor, mean: Tensor, criterion: Callable, weight_decay: float, steps: int
) -> Refit:
    shape = (labels.shape[1], basis.shape[1] + 1)

    def head(flat: Tensor) -> tuple[Tensor, Tensor]:
        weight = flat.reshape(shape)[:, :-1] @ basis.T
        return weight, flat.reshape(shape)[:, -1] - weight @ mean

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        point = torch.from_numpy(flat).requires_grad_()
        white = point.reshape(shape)
        weight, bias = head(point)
        loss = criterion(inputs @ white[:, :-1].T + white[:, -1], labels).mean()
        loss = loss + weight_decay / 2 * (weight.square().sum() + bias.square().sum())
        loss.backward()
        return loss.item(), point.grad.numpy()

    start = np.zeros(shape[0] * shape[1])
    steepest = np.abs(objective(start)[1]).max()
    options = {"maxiter": steps, "maxfun": 2 * steps, "maxcor": 20, "ftol": 0.0, "gtol": TOLERANCE * steepest}
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    linear = nn.Linear(len(basis), shape[0])
    weight, bias = head(torch.from_numpy(found.x))
    linear.load_state_dict({"weight": weight.float(), "bias": bias.float()})
    share = float(np.abs(found.jac).max() / steepest) if steepest else 0.0
    white = torch.from_numpy(found.x).reshape(shape)
    logits, inf = inputs @ white[:, :-1].T + white[:, -1], torch.inf
    gaps = logits.where(labels > 0, inf).amin(0) - logits.where(labels == 0, -inf).amax(0)
    separated = int(((gaps > 0) & gaps.isfinite()).sum())  # a class of one label alone has nothing to tell apart
    return Refit(linear.requires_grad_(False), float(found.fun), share, int(found.nit), separated)


def _whitening(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A basis (F, F) in which the objective of a logistic head is about equally curved everywhere, and the mean (F,).

    A change of coordinates alone: the minimum is the same. Without it L-BFGS takes thousands of steps, because the
    variances of pooled features differ by many orders of magnitude. Small ones are not stretched in full: there the
    weight decay curves the objective, most of all where the films can be told apart and the loss is flat.
    """
    mean = x.mean(axis=0)
    variance, vectors = np.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    floor = 1e-3 * variance.max() or 1.0
    return vectors / np.sqrt(np.maximum(variance, 0) + floor), mean


def on_cpu(outputs: Iterable[Output]) -> list[Output]:
    """The outputs, kept in the memory of the CPU to be read more than once."""
    return [
        Output(output.rows, output.logits.cpu(), {name: maps.cpu() for name, maps in output.maps.items()})
        for output in outputs
    ]


def with_head(output: Output, layer: str, head: nn.Linear) -> Output:
    """The output of the same trunk with another head: its maps, and the logits that `head` makes of `layer`'s means."""
    means = layer_maps(output, layer).mean((2, 3))
    return Output(output.rows, nn.functional.linear(means, head.weight.to(means), head.bias.to(means)), output.maps)


def align_heads(
    outputs: Sequence[Output], pairs: pd.DataFrame, heads: Mapping[str, nn.Linear], *, layer: str, **options
) -> pd.DataFrame:
    """`alignment.align` of one trunk's maps by each of several heads, with their biases; `head` names the head.

    `options` are those of `align` but `shift`, which the bias is: it adds to the map what it adds to the logit.
    """
    tables = []
    for name, head in heads.items():
        bare = copy.deepcopy(head).requires_grad_(False)
        bare.bias.zero_()
        changed = (with_head(output, layer, bare) for output in outputs)
        tables.append(
            align(changed, pairs, bare, layer=layer, shift=head.bias.detach().cpu(), **options).assign(head=name)
        )
    return pd.concat(tables, ignore_index=True)


def predict_heads(
    features: np.ndarray,
    films: pd.DataFrame,
    targets: np.ndarray,
    classes: Sequence[str],
    heads: Mapping[str, nn.Linear],
) -> pd.DataFrame:
    """What each of several heads makes of one trunk's features, as records.

    Parameters
    ----------
    features : (N, F)
    films : DataFrame
        image, patient of the N films.
    targets : (N, M)
    classes : sequence of str
    heads : dict of nn.Linear

    Returns
    -------
    DataFrame
        image, patient, class, target, logit (float32), head; a row a film, class and head.
    """
    rows = films[["image", "patient"]].loc[films.index.repeat(len(classes))]
    rows = rows.assign(**{"class": list(classes) * len(films)}, target=np.ravel(targets))
    tables = []
    for name, head in heads.items():
        weight, bias = (part.detach().cpu().double().numpy() for part in (head.weight, head.bias))
        tables.append(rows.assign(logit=(features @ weight.T + bias).astype(np.float32).ravel(), head=name))
    return pd.concat(tables, ignore_index=True)


def prior_shift(logits: ArrayLike, probabilities: ArrayLike) -> np.ndarray:
    """The constant for each class that, added to one run's logits, gives another's mean probability.

    It minimises the cross-entropy of ``sigmoid(logits + shift)`` against the other run's probabilities, whose
    derivative is the difference of the two means. For WBCE in the paper's scheme it is near log(N- / N+), by which its
    weights move the optimal odds; the focal losses have no closed form. What maps become of it: `alignment.align`'s
    `shift`.

    Parameters
    ----------
    logits : (N, M)
        Of the run that is shifted, on validation films.
    probabilities : (N, M)
        Of the other run, on the same films.

    Returns
    -------
    float64 (M,)

    Raises
    ------
    ValueError
        Shapes that differ, or a mean probability of 0 or 1, which no finite constant gives.
    """
    logits, probabilities = np.asarray(logits, dtype=np.float64), np.asarray(probabilities, dtype=np.float64)
    if logits.ndim != 2 or logits.shape != probabilities.shape:
        raise ValueError(f"need two arrays (N, M), got {logits.shape} and {probabilities.shape}")
    means = probabilities.mean(axis=0)
    if not ((means > 0) & (means < 1)).all():
        raise ValueError(f"class {int(np.argmin((means > 0) & (means < 1)))} has a mean probability of 0 or 1")
    # The mean of sigmoid(z + shift) lies between those of the least and the largest z alone.
    odds = np.log(means / (1 - means))
    low, high = odds - logits.max(axis=0) - 1, odds - logits.min(axis=0) + 1
    return np.array(
        [
            brentq(lambda shift, z=z, mean=mean: expit(z + shift).mean() - mean, a, b, xtol=1e-10)
            for z, mean, a, b in zip(logits.T, means, low, high, strict=True)
        ]
    )


def odds_shift(constants: Mapping) -> np.ndarray | None:
    """The constants that class weights without focusing add to the optimal log-odds, ``log(w+ / w-)``, float64 (M,).

    `constants` : those of the loss, see `losses.Criterion`. None where there is no such form: with focusing, with
    weights that follow the batch, a weight of 0, a loss of one's own.
    """
    if not constants or constants["gamma"] or constants["batch_scheme"]:
        return None
    with np.errstate(divide="ignore"):
        shift = np.log(constants["positive"]) - np.log(constants["negative"])
    return shift if np.isfinite(shift).all() else None
