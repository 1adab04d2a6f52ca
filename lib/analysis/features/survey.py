"""Films streamed through the CAM family (Li et al.): one pass leaves the importance matrices and the distribution of
class activations.

Where the head pools the layer and is linear, all classes and gradient methods cost one forward pass; any other layer
goes by `model_cams.model_cams`, with one backward pass for each class and choice of features.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from lib.analysis import cam
from lib.analysis.features.importance import Importance, ImportanceMatrix
from lib.analysis.features.scale import ActivationDistribution, common_scale, s_cam
from lib.analysis.inference import LensError, Output, is_pooled, stream
from lib.analysis.model_cams import GRADIENT_METHODS, Cams, model_cams, passes_per_film

ALL = {"all": None}
GRADIENT = ("grad", "hires", "gradpp", "xgrad")  # the four that the paper has numbers for
CLOSED = (*GRADIENT, *(method for method in cam.METHODS if method not in GRADIENT))  # no further forward pass
SLOW = ("score", "smooth_gradpp", "ss", "is")  # those that perturb the film
KEPT_BYTES = 2 * 2**30  # of maps that wait for their second look; of a film of 15 classes at 14 x 14, 70 kB
NO_FILMS = "there are no films: the split, or what was chosen from it, is empty"


@dataclass(frozen=True)
class View:
    """A model at one layer, and the films that it can be shown.

    Attributes
    ----------
    model : nn.Module
        Gives logits (B, M).
    layer : str
        Module whose maps are read.
    batches : function of film rows (N,)
        Gives these films in order, in batches with fields `rows` (B,) and `images` (B, channels, S, S), on the model's
        device.
    targets : 0/1 (N_all, C)
        Labels, by film row.
    classes : sequence of str
    token_grid : (rows, columns), optional
        See `inference.stream`.
    """

    model: nn.Module
    layer: str
    batches: Callable[[np.ndarray], Iterable]
    targets: np.ndarray
    classes: Sequence[str]
    token_grid: Sequence[int] = ()

    def methods(self, rows: np.ndarray) -> tuple[str, ...]:
        """Those of `CLOSED` that the layer allows, seen on the first of these films: 'cam' only where the head pools it
        and is linear."""
        outputs = stream(self.model, self.batches(rows[:1]), [self.layer], self.token_grid)
        pooled = all(is_pooled(output, self.layer, getattr(self.model, "head", None)) for output in outputs)
        anywhere = [method for method in GRADIENT_METHODS if method != "cam"]
        return tuple(method for method in CLOSED if pooled or method in anywhere)


@dataclass(frozen=True)
class Survey:
    """What is known of many films after one pass or two.

    Attributes
    ----------
    importance : mapping of method to Importance
    rows : int (N,)
        Of the films.
    logits : float32 (N, M)
    distribution : mapping of method to ActivationDistribution
        Of the class activations, where they were counted.
    percentiles : mapping of method to float64 (2, C)
        Their P10 and P90, exact.
    """

    importance: Mapping[str, Importance]
    rows: np.ndarray
    logits: np.ndarray
    distribution: Mapping[str, ActivationDistribution] = field(default_factory=dict)
    percentiles: Mapping[str, np.ndarray] = field(default_factory=dict)

    def scales(self, kind: str = "tanh", bounds: str = "pixels") -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Alpha and beta of all classes, float64 (C,), by method, see `scale.common_scale`. `bounds`: P10 and P90 of
        all 'pixels', or of the films' extremes, 'image_extremes' (A41)."""
        if bounds not in ("pixels", "image_extremes"):
            raise ValueError(f"unknown bounds {bounds!r}; choose pixels or image_extremes")
        ends = self.percentiles
        if bounds == "image_extremes":
            ends = {method: found.image_extremes() for method, found in self.distribution.items()}
        return {method: common_scale(*pair, kind) for method, pair in ends.items()}

    def confidence(self, selected: int) -> np.ndarray:
        """Of each film in class `selected`, float64 (N,) in [0, 1]."""
        return 1 / (1 + np.exp(-self.logits[:, selected].astype(np.float64)))

    def spread(self, selected: int, n: int) -> np.ndarray:
        """Places (n,) among the films, from the surest of class `selected` to the least sure, evenly by rank."""
        order = np.argsort(-self.logits[:, selected])
        return order[np.linspace(0, len(order) - 1, n).round().astype(int)]


def evenly(rows: np.ndarray, n: int) -> np.ndarray:
    """`n` of the rows, or all where there are fewer, evenly spaced, the first and the last included."""
    return rows[np.linspace(0, len(rows) - 1, min(n, len(rows))).astype(int)]


def film_cams(
    view: View,
    rows: np.ndarray,
    methods: Sequence[str],
    *,
    masks: Mapping[str, Mapping[str, Tensor] | None] = ALL,
    classes: Sequence[int] | None = None,
    progress: bool = False,
) -> Iterator[tuple[object, Output, dict[tuple[str, str], Cams]]]:
    """Films batch by batch, each batch with the outputs of the model and the raw maps of every method.

    Parameters
    ----------
    rows : int (N,)
        Of the films.
    methods : sequence of str
        Of `model_cams.METHODS`.
    masks : mapping of a name to (mapping of method to 0/1 (F,) or (C, F), or None)
        Channels that make up the maps (FS-CAM, eq. 5), under any number of names; None: all channels.
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
    model, layer, grid, output = view.model, view.layer, view.token_grid, None
    head = getattr(model, "head", None)
    for batch in view.batches(rows):
        [output] = stream(model, [batch], [layer], grid)
        chosen = list(range(output.logits.shape[1])) if classes is None else list(classes)
        maps, found = output.maps[layer], {}
        n_features = maps.shape[1]
        weights = head.weight.detach().to(maps)[chosen] if is_pooled(output, layer, head) else None
        for method in methods:
            kept = {
                name: None if mask is None else cam.feature_mask(mask[method], len(chosen), n_features).to(maps)
                for name, mask in masks.items()
            }
            if weights is not None and method in cam.METHODS:
                terms = cam.channel_contributions(maps, weights, method)
                for name, mask in kept.items():
                    raw = cam.class_activation_maps(maps, weights, method, features=mask)
                    found[method, name] = Cams(raw, terms if mask is None else terms * mask, output.logits)
                continue
            # Every choice of features asks for the classes once more, so all share one forward pass, or the passes of a
            # perturbation method.
            ones = maps.new_ones(len(chosen), n_features)
            together = torch.cat([ones if mask is None else ones * mask for mask in kept.values()])
            # One seed per film: noise belongs to the film, not to its place in a batch.
            options = {"token_grid": grid, "seed": np.asarray(batch.rows).tolist(), "progress": progress}
            cams = model_cams(model, batch.images, layer, chosen * len(kept), method, together, **options)
            for name, raw, terms in zip(kept, cams.maps.chunk(len(kept), 1), cams.contributions.chunk(len(kept), 1)):
                found[method, name] = Cams(raw, terms, cams.logits)
        yield batch, output, found
    if output is None:
        raise ValueError(NO_FILMS)


def survey(
    view: View,
    rows: np.ndarray,
    methods: Sequence[str] | None = None,
    *,
    size: int | None = None,
    progress: bool = False,
) -> Survey:
    """Importance matrices and logits of many films and, where `size` is given, the distribution of their class
    activations.

    Parameters
    ----------
    rows, methods, progress
        As in `film_cams`; by default the `View.methods`.
    size : int, optional
        Side of the films in pixels: maps are resampled to it before their values are counted (the paper's order).
        Default: none are counted.

    Exact percentiles take a second look at the maps: they are kept for it, as long as they take at most `KEPT_BYTES`;
    else the films go through the model twice.

    Raises
    ------
    ValueError
        As `film_cams`; labels that do not fit the classes or the model's outputs.
    """
    methods = view.methods(rows) if methods is None else methods
    matrices = {method: ImportanceMatrix(view.classes) for method in methods}
    first = {method: ActivationDistribution(view.classes, size) for method in methods if size}
    seen, logits, kept, room = [], [], [], KEPT_BYTES
    for batch, output, cams in film_cams(view, rows, methods, progress=progress):
        seen.append(np.asarray(batch.rows))
        logits.append(output.logits.cpu().numpy())
        maps = _raw(cams)
        for method, matrix in matrices.items():
            matrix.update(cams[method, "all"].contributions, view.targets[seen[-1]])
        for method, distribution in first.items():
            distribution.update(maps[method])
        room -= sum(found.nbytes for found in maps.values())
        if size and room >= 0:
            kept.append(maps)
        else:
            kept.clear()
    second = {method: found.second_pass((10, 90)) for method, found in first.items()}
    looks = kept or (_raw(cams) for _, _, cams in film_cams(view, rows, methods, progress=progress))
    for maps in looks if size else ():
        for method, exact in second.items():
            exact.update(maps[method])
    importance = {method: matrix.result() for method, matrix in matrices.items()}
    exact = {method: found.percentiles().value for method, found in second.items()}
    return Survey(importance, np.concatenate(seen), np.concatenate(logits), first, exact)


def _raw(cams):
    return {method: found.maps.cpu() for (method, _), found in cams.items()}


def with_principal(features: Mapping[str, np.ndarray] | None) -> dict:
    """`masks` of `film_cams`: all features and, where there are any, the principal ones."""
    return ALL if features is None else {**ALL, "principal": features}


def pictures(
    view: View,
    rows: np.ndarray,
    selected: int,
    scales: Mapping[str, tuple[np.ndarray, np.ndarray]],
    features: Mapping[str, np.ndarray],
    size: int,
    kind: str = "tanh",
    methods: Sequence[str] = GRADIENT,
) -> dict[tuple[str, str], np.ndarray]:
    """Maps of one class as they are drawn.

    Parameters
    ----------
    selected : int
        The class.
    scales : mapping of method to (alpha, beta)
        Of `Survey.scales`.
    features : mapping of method to 0/1 (F,)
        The principal ones.

    Returns
    -------
    dict of (kind of map, method) to float (N, size, size)
        '': each map on its own scale, [0, 1]. 'S-' and, of principal features, 'FS-S-': on the common scale, [-1, 1],
        where a linear scale is cut off.
    """
    drawn: dict[tuple[str, str], list[Tensor]] = {}
    for *_, cams in film_cams(view, rows, methods, masks=with_principal(features), classes=[selected]):
        for (method, label), found in cams.items():
            alpha, beta = (values[selected] for values in scales[method])
            own, common = cam.normalise(found.maps), s_cam(found.maps, alpha, beta, size, kind=kind).clamp(-1, 1)
            if label == "all":
                drawn.setdefault(("", method), []).append(cam.resize(own, size))
            drawn.setdefault(("S-" if label == "all" else "FS-S-", method), []).append(common)
    return {key: torch.cat(parts)[:, 0].cpu().numpy() for key, parts in drawn.items()}


def importance_frame(train: Survey, test: Survey, classes: Sequence[str]) -> pd.DataFrame:
    """The importance matrices as a table: class, feature, method, and `train`, `test` (eq. 3), `train_own`, `test_own`
    (eq. 4)."""
    parts = []
    for method, here in train.importance.items():
        n_features, n_classes = here.all.shape
        names = {"class": np.repeat(list(classes), n_features), "feature": np.tile(np.arange(n_features), n_classes)}
        there = test.importance[method]
        columns = {"train": here.all, "test": there.all, "train_own": here.own, "test_own": there.own}
        values = {name: matrix.T.ravel() for name, matrix in columns.items()}
        parts.append(pd.DataFrame({**names, "method": method, **values}))
    return pd.concat(parts, ignore_index=True)


def passes(view: View, n_features: int, methods: Sequence[str] = SLOW) -> pd.DataFrame:
    """Passes through the model that a method needs for one film, all classes together: a row a method, 'forward passes'
    and 'backward passes'."""
    cost = {method: passes_per_film(method, n_features, len(view.classes)) for method in methods}
    return pd.DataFrame(cost, index=["forward passes", "backward passes"]).T


def selected_output(name: str, classes: Sequence[str], targets: Mapping[str, np.ndarray]) -> int:
    """Index of the class `name`, once it is known to be there and to have films: `targets` are 0/1 (N, C) by split.

    Raises
    ------
    ValueError
        No such class, or a split without a film of it.
    """
    if name not in classes:
        raise LensError(f"there is no class {name!r} to look at; feature_class must be one of {', '.join(classes)}")
    selected = list(classes).index(name)
    for split, labels in targets.items():
        if not labels[:, selected].any():
            raise LensError(f"no {split} film has {name}: choose another class with feature_class")
    return selected
