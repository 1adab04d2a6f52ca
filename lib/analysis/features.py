"""The lens of the integrated feature analysis (Li et al.): streams films through the CAM family, the common scale and the importance matrix.

Where the head pools the layer and is linear, all classes and gradient methods cost one forward pass; any other layer goes by
`model_cams.model_cams`, with one backward pass for each class and choice of features.
"""
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from scipy import special
from torch import Tensor, nn

from lib.analysis import cam, consistency
from lib.analysis.activations import ActivationDistribution, linear_scale, s_cam, tanh_scale
from lib.analysis.inference import Output, is_pooled, predict, stream
from lib.analysis.integrated import Importance, ImportanceMatrix
from lib.analysis.model_cams import Cams, model_cams
from lib.analysis.statistics import patient_replicates

ALL = {"all": None}
GRADIENT = ("grad", "hires", "gradpp", "xgrad")  # the four that the paper has numbers for
CLOSED = (*GRADIENT, "cam", "layer")  # those that need no further forward pass
_NO_FILMS = "there are no films: the split, or what was chosen from it, is empty"
_BLOCK = 2**20  # weights of replicates at a time, float64 (8 MiB)


@dataclass(frozen=True)
class Survey:
    """What one pass over many films leaves: of each method its `importance` and the `distribution` of its class activations; of the films
    their `rows` (N,) and `logits` float32 (N, M)."""

    importance: Mapping[str, Importance]
    distribution: Mapping[str, ActivationDistribution]
    rows: np.ndarray
    logits: np.ndarray


def film_cams(model: nn.Module, batches: Iterable, layer: str, methods: Sequence[str], *, masks: Mapping[str, Mapping[str, Tensor] | None] = ALL,
              token_grid: Sequence[int] = (), classes: Sequence[int] | None = None,
              progress: bool = False) -> Iterator[tuple[object, Output, dict[tuple[str, str], Cams]]]:
    """The batches one by one, each with the outputs of the model and the raw maps of every method.

    Parameters
    ----------
    model : nn.Module
        Gives logits (B, M).
    batches : iterable
        With fields `rows` (B,) and `images` (B, channels, S, S), on the model's device.
    layer : str
        Module whose maps are read.
    methods : sequence of str
        Of `model_cams.METHODS`.
    masks : mapping of a name to (mapping of method to 0/1 (F,) or (C, F), or None)
        Channels that make up the maps (FS-CAM, eq. 5), under any number of names; None: all channels.
    token_grid : (rows, columns), optional
        See `inference.stream`.
    classes : sequence of int, optional
        Outputs to explain; all of them by default.
    progress : bool
        Show a progress bar over the films of the perturbation methods.

    Yields
    ------
    batch, Output, dict of (method, name of the mask) to Cams

    Raises
    ------
    ValueError
        No films; a layer, method or mask that `model_cams` or `cam.feature_mask` refuses.
    """
    head, output = getattr(model, "head", None), None
    for batch in batches:
        [output] = stream(model, [batch], [layer], token_grid)
        chosen = list(range(output.logits.shape[1])) if classes is None else list(classes)
        maps, found = output.maps[layer], {}
        n_features = maps.shape[1]
        weights = head.weight.detach().to(maps)[chosen] if is_pooled(output, layer, head) else None
        for method in methods:
            kept = {name: None if mask is None else cam.feature_mask(mask[method], len(chosen), n_features).to(maps) for name, mask in masks.items()}
            if weights is not None and method in cam.METHODS:
                terms = cam.channel_contributions(maps, weights, method)
                for name, mask in kept.items():
                    raw = cam.class_activation_maps(maps, weights, method, features=mask)
                    found[method, name] = Cams(raw, terms if mask is None else terms * mask, output.logits)
                continue
            # Every choice of features asks for the classes once more, so all share one forward pass, or the passes of a perturbation method.
            ones = maps.new_ones(len(chosen), n_features)
            together = torch.cat([ones if mask is None else ones * mask for mask in kept.values()])
            # One seed per film: noise belongs to the film, not to its place in a batch.
            cams = model_cams(model, batch.images, layer, chosen * len(kept), method, together, token_grid=token_grid,
                              seed=np.asarray(batch.rows).tolist(), progress=progress)
            for name, raw, terms in zip(kept, cams.maps.chunk(len(kept), 1), cams.contributions.chunk(len(kept), 1)):
                found[method, name] = Cams(raw, terms, cams.logits)
        yield batch, output, found
    if output is None:
        raise ValueError(_NO_FILMS)


def _bias(head: nn.Linear) -> Tensor:
    return head.weight.detach().new_zeros(head.out_features) if head.bias is None else head.bias.detach()


def survey(model: nn.Module, batches: Iterable, targets: np.ndarray, classes: Sequence[str], layer: str, methods: Sequence[str] = GRADIENT, *,
           size: int | None = None, token_grid: Sequence[int] = (), progress: bool = False) -> Survey:
    """One pass over films: importance matrices, logits and, where `size` is given, the distribution of class activations.

    Parameters
    ----------
    model, batches, layer, methods, token_grid, progress
        As in `film_cams`.
    targets : 0/1 (N_all, C)
        Labels, by film row.
    classes : sequence of str
    size : int, optional
        Side of the films in pixels: maps are resampled to it before their values are counted (the paper's order). Default: none are counted.

    Raises
    ------
    ValueError
        As `film_cams`; labels that do not fit the classes or the model's outputs.
    """
    matrices = {method: ImportanceMatrix(classes) for method in methods}
    distributions = {method: ActivationDistribution(classes, size) for method in methods if size}
    rows, logits = [], []
    for batch, output, cams in film_cams(model, batches, layer, methods, token_grid=token_grid, progress=progress):
        rows.append(np.asarray(batch.rows))
        logits.append(output.logits.cpu().numpy())
        for (method, _), found in cams.items():
            matrices[method].update(found.contributions, targets[rows[-1]])
            if size:
                distributions[method].update(found.maps)
    return Survey({method: matrix.result() for method, matrix in matrices.items()}, distributions, np.concatenate(rows), np.concatenate(logits))


def common_scale(distribution: ActivationDistribution, kind: str = "tanh", bounds: str = "pixels") -> tuple[np.ndarray, np.ndarray]:
    """alpha and beta of each class, float64 (C,) (eq. 2). `kind`: 'tanh' or 'linear'; `bounds`: 'pixels' or 'image_extremes' (A40, A41).

    A class whose activations do not vary between the bounds has NaN in both.
    """
    if kind not in ("tanh", "linear") or bounds not in ("pixels", "image_extremes"):
        raise ValueError(f"no common scale {kind!r} with bounds {bounds!r}: choose tanh or linear, and pixels or image_extremes")
    low, high = distribution.percentiles((10, 90)).value if bounds == "pixels" else distribution.image_extremes()
    varies = high > low
    scale = tanh_scale if kind == "tanh" else linear_scale
    alpha, beta = (np.full(len(low), np.nan) for _ in range(2))
    if varies.any():
        names = [name for name, good in zip(distribution.classes, varies) if good]
        alpha[varies], beta[varies] = scale(low[varies], high[varies], classes=names)
    return alpha, beta


def pictures(cams: Mapping[str, Cams], size: int, scales: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None, *, selected: int = 0,
             kind: str = "tanh") -> dict[str, np.ndarray]:
    """Maps of one class as they are drawn, by method, float (B, size, size).

    `cams` : of `film_cams` for that class alone. `scales` : of `common_scale`; the maps are then in [-1, 1], where a linear scale is cut off.
    None: each map on its own scale, [0, 1].
    """
    drawn = {}
    for method, found in cams.items():
        if scales is None:
            maps = cam.resize(cam.normalise(found.maps), size)
        else:
            alpha, beta = (values[selected] for values in scales[method])
            maps = s_cam(found.maps, alpha, beta, size, kind=kind).clamp(-1, 1)
        drawn[method] = maps[:, 0].cpu().numpy()
    return drawn


def activation_sums(model: nn.Module, batches: Iterable, layer: str, selected: int, scales: Mapping[str, tuple[np.ndarray, np.ndarray]], size: int, *,
                    kind: str = "tanh", features: Mapping[str, np.ndarray] | None = None, token_grid: Sequence[int] = (),
                    progress: bool = False) -> pd.DataFrame:
    """Sum of the class activations of each film for one class, by method and scale, with the class's logit (sec. III-B).

    Parameters
    ----------
    selected : int
        Output whose maps are summed.
    scales : mapping of method to (alpha, beta)
        Of `common_scale`; the methods to look at.
    features : mapping of method to 0/1 (F,), optional
        Besides the maps of all features those of these alone, on the same scale.

    Returns
    -------
    DataFrame
        A row per film, method, features ('all', 'principal') and scale ('individual', 'common_raw', 'common_tanh'): row, method, features, scale,
        activation (NaN on a scale of NaN), logit.
    """
    masks, parts = _named(features), []
    for batch, output, cams in film_cams(model, batches, layer, list(scales), masks=masks, token_grid=token_grid, classes=[selected],
                                           progress=progress):
        logit = output.logits[:, selected].cpu().numpy()
        for (method, label), found in cams.items():
            alpha, beta = (values[selected] for values in scales[method])
            sums = consistency.class_totals(found.maps, alpha, beta, size, kind=kind)
            for scale, name in (("individual", "individual"), ("raw", "common_raw"), ("scaled", "common_tanh")):
                parts.append(pd.DataFrame({"row": np.asarray(batch.rows), "method": method, "features": label, "scale": name,
                                           "activation": sums[scale][:, 0], "logit": logit}))
    return pd.concat(parts, ignore_index=True)


def consistency_table(sums: pd.DataFrame, patients: Mapping[int, str], n_replicates: int, seed: int = 0) -> pd.DataFrame:
    """Correlation of activation sums with logits, a row per method, features and scale, with the interval over patients of the chosen one.

    `sums` : of `activation_sums`. `patients` : of each film row. Columns: method, features, scale, pearson, spearman, normal, chosen ('pearson' or
    'spearman', by the rule of `consistency.consistency`; '' where neither exists), n, ci_low, ci_high (95 %; NaN for fewer than two patients), note.
    """
    rows = []
    for (method, label, scale), part in sums.groupby(["method", "features", "scale"], sort=False):
        if part["activation"].isna().all():
            rows.append((method, label, scale, np.nan, np.nan, False, "", len(part), np.nan, np.nan, "the class has no common scale"))
            continue
        found = consistency.consistency(part["activation"], part["logit"])
        low, high = _interval(part, patients, found.used, n_replicates, seed)
        rows.append((method, label, scale, found.pearson, found.spearman, found.normal, found.used, found.n, low, high, found.note))
    names = ["method", "features", "scale", "pearson", "spearman", "normal", "chosen", "n", "ci_low", "ci_high", "note"]
    return pd.DataFrame(rows, columns=names)


def _interval(part: pd.DataFrame, patients: Mapping[int, str], used: str, n_replicates: int, seed: int) -> tuple[float, float]:
    """Percentile interval of the correlation `used`; ranks are taken anew in every replicate, a film drawn twice counting as two."""
    draws = patient_replicates([patients[row] for row in part["row"]], n_replicates, seed)
    if not n_replicates or not used or draws.counts.shape[1] < 2:
        return np.nan, np.nan
    values = [part[name].to_numpy(np.float64) for name in ("activation", "logit")]
    groups = [np.unique(value, return_inverse=True)[1] for value in values]
    starts = [np.searchsorted(np.sort(group), np.arange(group.max() + 1)) for group in groups]
    values = [(value - value.mean()) / value.std() for value in values]
    drawn, step = [], max(1, _BLOCK // len(part))
    for start in range(0, n_replicates, step):
        weights = draws.counts[start:start + step, draws.patient].astype(np.float64)
        pair = values
        if used == "spearman":
            shares = [np.add.reduceat(weights[:, np.argsort(group, kind="stable")], first, axis=1) for group, first in zip(groups, starts)]
            pair = [(share.cumsum(1) - share / 2)[:, group] for share, group in zip(shares, groups)]
        drawn.append(_weighted_correlation(*pair, weights))
    drawn = np.concatenate(drawn)
    drawn = drawn[np.isfinite(drawn)]
    return tuple(np.percentile(drawn, [2.5, 97.5])) if len(drawn) else (np.nan, np.nan)


def _weighted_correlation(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Pearson correlation under each row of weights (R, N), of x and y (N,) or (R, N); NaN where one of them is constant."""
    total = weights.sum(1, keepdims=True)
    away = [value - (weights * value).sum(1, keepdims=True) / total for value in (x, y)]
    squares = [(weights * value**2).sum(1) for value in away]
    size = [(weights * value**2).sum(1) for value in (x, y)]
    constant = np.logical_or(*(square <= 1e-24 * whole for square, whole in zip(squares, size)))
    return np.where(constant, np.nan, (weights * away[0] * away[1]).sum(1) / np.sqrt(np.where(constant, 1, squares[0] * squares[1])))


def masking_effect(model: nn.Module, batches: Iterable, layer: str, selected: int, methods: Sequence[str], *,
                   features: Mapping[str, np.ndarray] | None = None, softmax: bool = False, token_grid: Sequence[int] = ()) -> pd.DataFrame:
    """Confidence in one class before and after the film is multiplied by its map (sec. III-A), for the CAM and the FS-CAM of each method.

    Returns
    -------
    DataFrame
        A row per method and features ('all', 'principal'): method, features, metric ('average_increase', 'average_drop'), value in %, n, n_zero.
    """
    seen: dict[tuple[str, str], list[np.ndarray]] = {}
    for batch, output, cams in film_cams(model, batches, layer, methods, masks=_named(features), token_grid=token_grid, classes=[selected]):
        before, done = _confidence(output.logits.cpu().numpy(), selected, softmax), []
        for key, found in cams.items():
            unit = cam.normalise(found.maps[:, 0])
            # Behind a pooled linear head several methods give one map: what has been asked of the model is not asked again.
            after = next((answer for asked, answer in done if torch.allclose(asked, unit, rtol=0, atol=1e-6)), None)
            if after is None:
                films = SimpleNamespace(rows=batch.rows, images=consistency.masked_films(batch.images, found.maps[:, 0]))
                after = _confidence(predict(model, [films]), selected, softmax)
                done.append((unit, after))
            seen.setdefault(key, []).append(np.stack([before, after]))
    rows = []
    for (method, label), parts in seen.items():
        effect = consistency.increase_and_drop(*np.concatenate(parts, axis=1))
        rows += [(method, label, "average_increase", effect.increase, effect.n, 0),
                 (method, label, "average_drop", effect.drop, effect.n - effect.n_zero, effect.n_zero)]
    return pd.DataFrame(rows, columns=["method", "features", "metric", "value", "n", "n_zero"])


def _confidence(logits: np.ndarray, selected: int, softmax: bool) -> np.ndarray:
    logits = logits.astype(np.float64)
    return special.softmax(logits, axis=1)[:, selected] if softmax else special.expit(logits[:, selected])


def _named(features: Mapping[str, np.ndarray] | None) -> dict:
    return ALL if features is None else {**ALL, "principal": features}


def logits_with(model: nn.Module, batches: Iterable, layer: str, masks: Mapping[Hashable, np.ndarray], *,
                token_grid: Sequence[int] = ()) -> dict[Hashable, np.ndarray]:
    """Logits float32 (N, M) of some features only: the others are set to zero at the layer, and the forward pass goes on (sec. III-C).

    `masks` : under any names 0/1 (F,), or (M, F) with a choice for each logit. For a layer that is pooled and followed by one linear layer all
    cost one forward pass; elsewhere each different choice costs one. ValueError: no films, or masks that do not fit.
    """
    head, parts = getattr(model, "head", None), {name: [] for name in masks}
    output = None
    for batch in batches:
        [output] = stream(model, [batch], [layer], token_grid)
        maps, n_outputs = output.maps[layer], output.logits.shape[1]
        pooled = maps.mean((2, 3)) if is_pooled(output, layer, head) else None
        for name, mask in masks.items():
            mask = cam.feature_mask(mask, n_outputs, maps.shape[1])
            if pooled is not None:
                logits = consistency.masked_logits(pooled, head.weight.detach(), _bias(head), mask).cpu().numpy()
            else:
                choices, which = np.unique(np.atleast_2d(mask.cpu().numpy()), axis=0, return_inverse=True)
                passes = []
                for choice in choices:
                    with consistency.masked_layer(model, layer, choice, axis=-1 if len(token_grid) else 1):
                        passes.append(predict(model, [batch]))
                logits = np.stack(passes)[np.broadcast_to(which.reshape(-1), n_outputs), :, np.arange(n_outputs)].T
            parts[name].append(logits)
    if output is None:
        raise ValueError(_NO_FILMS)
    return {name: np.concatenate(part) for name, part in parts.items()}


def importance_frame(train: Survey, test: Survey, classes: Sequence[str]) -> pd.DataFrame:
    """The importance matrices as a table: class, feature, method, and `train`, `test` (eq. 3), `train_own`, `test_own` (eq. 4)."""
    parts = []
    for method, here in train.importance.items():
        n_features, n_classes = here.all.shape
        there = test.importance[method]
        parts.append(pd.DataFrame({"class": np.repeat(list(classes), n_features), "feature": np.tile(np.arange(n_features), n_classes),
                                   "method": method, "train": here.all.T.ravel(), "test": there.all.T.ravel(),
                                   "train_own": here.own.T.ravel(), "test_own": there.own.T.ravel()}))
    return pd.concat(parts, ignore_index=True)


def selected_output(name: str, classes: Sequence[str], targets: Mapping[str, np.ndarray]) -> int:
    """Index of the class `name`, once it is known to be there and to have films: `targets` are 0/1 (N, C) by split.

    Raises
    ------
    ValueError
        No such class, or a split without a film of it.
    """
    if name not in classes:
        raise ValueError(f"there is no class {name!r} to look at; feature_class must be one of {', '.join(classes)}")
    for split, labels in targets.items():
        if not labels[:, list(classes).index(name)].any():
            raise ValueError(f"no {split} film has {name}: choose another class with feature_class")
    return list(classes).index(name)
