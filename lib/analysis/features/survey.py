"""Films streamed through the CAM family (Li et al.): one pass leaves the importance matrices and the distribution of
class activations.

Where the head pools the layer and is linear, all classes and gradient methods cost one forward pass; any other layer
goes by
`model_cams.model_cams`, with one backward pass for each class and choice of features.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from lib.analysis import cam
from lib.analysis.features.importance import Importance, ImportanceMatrix
from lib.analysis.features.scale import ActivationDistribution
from lib.analysis.inference import Output, is_pooled, stream
from lib.analysis.model_cams import Cams, model_cams

ALL = {"all": None}
GRADIENT = ("grad", "hires", "gradpp", "xgrad")  # the four that the paper has numbers for
CLOSED = (*GRADIENT, "cam", "layer")  # those that need no further forward pass
NO_FILMS = "there are no films: the split, or what was chosen from it, is empty"


@dataclass(frozen=True)
class Survey:
    """What one pass over many films leaves: of each method its `importance` and the `distribution` of its class
    activations; of the films their `rows` (N,) and `logits` float32 (N, M)."""

    importance: Mapping[str, Importance]
    distribution: Mapping[str, ActivationDistribution]
    rows: np.ndarray
    logits: np.ndarray


def film_cams(
    model: nn.Module,
    batches: Iterable,
    layer: str,
    methods: Sequence[str],
    *,
    masks: Mapping[str, Mapping[str, Tensor] | None] = ALL,
    token_grid: Sequence[int] = (),
    classes: Sequence[int] | None = None,
    progress: bool = False,
) -> Iterator[tuple[object, Output, dict[tuple[str, str], Cams]]]:
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
            cams = model_cams(
                model,
                batch.images,
                layer,
                chosen * len(kept),
                method,
                together,
                token_grid=token_grid,
                seed=np.asarray(batch.rows).tolist(),
                progress=progress,
            )
            for name, raw, terms in zip(kept, cams.maps.chunk(len(kept), 1), cams.contributions.chunk(len(kept), 1)):
                found[method, name] = Cams(raw, terms, cams.logits)
        yield batch, output, found
    if output is None:
        raise ValueError(NO_FILMS)


def survey(
    model: nn.Module,
    batches: Iterable,
    targets: np.ndarray,
    classes: Sequence[str],
    layer: str,
    methods: Sequence[str] = GRADIENT,
    *,
    size: int | None = None,
    token_grid: Sequence[int] = (),
    progress: bool = False,
) -> Survey:
    """One pass over films: importance matrices, logits and, where `size` is given, the distribution of class
    activations.

    Parameters
    ----------
    model, batches, layer, methods, token_grid, progress
        As in `film_cams`.
    targets : 0/1 (N_all, C)
        Labels, by film row.
    classes : sequence of str
    size : int, optional
        Side of the films in pixels: maps are resampled to it before their values are counted (the paper's order).
        Default: none are counted.

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
    return Survey(
        {method: matrix.result() for method, matrix in matrices.items()},
        distributions,
        np.concatenate(rows),
        np.concatenate(logits),
    )


def with_principal(features: Mapping[str, np.ndarray] | None) -> dict:
    return ALL if features is None else {**ALL, "principal": features}


def importance_frame(train: Survey, test: Survey, classes: Sequence[str]) -> pd.DataFrame:
    """The importance matrices as a table: class, feature, method, and `train`, `test` (eq. 3), `train_own`, `test_own`
    (eq. 4)."""
    parts = []
    for method, here in train.importance.items():
        n_features, n_classes = here.all.shape
        there = test.importance[method]
        parts.append(
            pd.DataFrame(
                {
                    "class": np.repeat(list(classes), n_features),
                    "feature": np.tile(np.arange(n_features), n_classes),
                    "method": method,
                    "train": here.all.T.ravel(),
                    "test": there.all.T.ravel(),
                    "train_own": here.own.T.ravel(),
                    "test_own": there.own.T.ravel(),
                }
            )
        )
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
