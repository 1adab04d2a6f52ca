"""What selected features and maps suffice for (Li et al., sec. III): forward passes with some features only (Table II),
and of films behind their maps (Table IV)."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from scipy import special
from torch import Tensor, nn

from lib.analysis.cam import feature_mask, normalise, resize
from lib.analysis.features.importance import combined_mask
from lib.analysis.features.survey import NO_FILMS, View, film_cams, with_principal
from lib.analysis.inference import is_pooled, named_module, predict, stream
from lib.analysis.metrics import classification_metrics


def masked_logits(pooled: Tensor, weights: Tensor, bias: Tensor, features: ArrayLike) -> Tensor:
    """Logits (B, C) of some features only, for a head that pools and is linear: ``(im pooled) W^T + b`` (Li et al.,
    sec. III-C).

    Parameters
    ----------
    pooled : float (B, F)
        Spatial means of the feature maps.
    weights, bias : float (C, F), (C,)
    features : 0 or 1, (F,) or (C, F)
        One mask for all logits, or one for each (the transpose of what `importance.select_features` gives); ``~mask``
        for the others.
    """
    if pooled.ndim != 2 or weights.ndim != 2 or pooled.shape[1] != weights.shape[1] or bias.shape != weights.shape[:1]:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (pooled, weights, bias))
        raise ValueError(f"need pooled features (B, F), weights (C, F) and bias (C,), got {shapes}")
    mask = feature_mask(features, *weights.shape).to(pooled)
    return pooled @ (weights.to(pooled) * mask).T + bias.to(pooled)


@contextmanager
def masked_layer(model: nn.Module, layer: str, features: ArrayLike, axis: int = 1) -> Iterator[None]:
    """Within the context the output of `layer` is multiplied by the mask, and every forward pass of `model` continues
    from there.

    Parameters
    ----------
    model : nn.Module
    layer : str
        Dotted name of a module whose output is one tensor.
    features : 0 or 1, (F,)
    axis : int
        Of the features in that output: 1 for maps (B, F, h, w), -1 for tokens (B, T, F).

    Raises
    ------
    ValueError
        No such module, an output without these features, or a layer that no forward pass came through.
    """
    module = named_module(model, layer)
    mask = torch.as_tensor(features)
    if mask.ndim != 1:
        raise ValueError(f"the mask of a layer must be a list, one entry a feature, got shape {tuple(mask.shape)}")
    mask = feature_mask(mask, 1, len(mask))
    used = False

    def multiply(module, inputs, output):
        nonlocal used
        used = True
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        if not isinstance(output, Tensor) or not -output.ndim <= axis < output.ndim or output.shape[axis] != len(mask):
            raise ValueError(f"layer {layer!r} gives {shape}, which has no {len(mask)} features along axis {axis}")
        lead = [1] * output.ndim
        lead[axis] = len(mask)
        return output * mask.to(output).reshape(lead)

    handle = module.register_forward_hook(multiply)
    try:
        yield
    finally:
        handle.remove()
    if not used:
        raise ValueError(f"no forward pass went through layer {layer!r} within the context: nothing was masked")


def masked_films(films: Tensor, raw: Tensor, *, threshold: float | None = None, rectify: bool = True) -> Tensor:
    """Films (B, K, H, W) times their class activation maps in [0, 1], at the films' size; for `increase_and_drop`.

    Parameters
    ----------
    films : float (B, K, H, W)
        As the model sees them. Where the map is 0 the film becomes 0: in films normalised by ImageNet's mean, a
        mid-grey.
    raw : float (B, h, w)
        Signed map of each film. Min-max by film at its own size (without contrast: zeros), then resampled.
    threshold : float, optional
        Values of the mask below it become 0. The text speaks of thresholded maps, the authors' code has none (A48);
        default none.
    rectify : bool
        Negative evidence to 0 before the min-max, as in the usual CAM. False: min-max of the signed map.
    """
    if films.ndim != 4 or raw.ndim != 3 or len(films) != len(raw):
        found = f"{tuple(films.shape)} and {tuple(raw.shape)}"
        raise ValueError(f"need films (B, K, H, W) and one map (B, h, w) each, got {found}")
    mask = resize(normalise(raw, rectify), tuple(films.shape[2:])).to(films)
    if threshold is not None:
        mask = torch.where(mask >= threshold, mask, torch.zeros_like(mask))
    return films * mask[:, None]


class IncreaseDrop(NamedTuple):
    """`increase` and `drop` in %, higher and lower is better; the films `n` behind the increase; those left out of the
    drop, `n_zero`."""

    increase: float
    drop: float
    n: int
    n_zero: int


def increase_and_drop(original: ArrayLike, masked: ArrayLike) -> IncreaseDrop:
    """Average increase and drop of the confidence in the selected class when films are masked by their maps (Li et al.,
    sec. III-A).

    ``increase = 100 / N #{Y < O}`` and ``drop = 100 / N sum max(0, Y - O) / Y``, with Y and O the confidence in the
    original and the masked film. Films with Y = 0 are left out of the drop.

    Parameters
    ----------
    original, masked : float (N,) in [0, 1]
        Y and O.

    Raises
    ------
    ValueError
        No films, lengths that differ, or values that are no confidences.
    """
    y, o = np.asarray(original, dtype=np.float64), np.asarray(masked, dtype=np.float64)
    if y.ndim != 1 or y.shape != o.shape or not len(y):
        raise ValueError(f"need two confidences of each film, got shapes {y.shape} and {o.shape}")
    for name, values in (("original", y), ("masked", o)):
        bad = ~((values >= 0) & (values <= 1))
        if bad.any():
            raise ValueError(
                f"{name}: film {int(bad.argmax())} has {values[bad][0]}, but a confidence lies in 0..1: "
                "take the sigmoid or softmax of the logits"
            )
    kept = y > 0
    drop = 100 * np.mean(np.maximum(y[kept] - o[kept], 0) / y[kept]) if kept.any() else np.nan
    return IncreaseDrop(float(100 * np.mean(o > y)), float(drop), len(y), int((~kept).sum()))


def masking_effect(
    view: View,
    rows: np.ndarray,
    selected: int,
    methods: Sequence[str],
    features: Mapping[str, np.ndarray] | None = None,
) -> pd.DataFrame:
    """Confidence in one class before and after the film is multiplied by its map (sec. III-A), for the CAM and the
    FS-CAM of each method.

    Returns
    -------
    DataFrame
        A row per method and features ('all', 'principal'): method, features, metric ('average_increase',
        'average_drop'), value in %, n, n_zero.
    """
    seen: dict[tuple[str, str], list[np.ndarray]] = {}
    masks = with_principal(features)
    for batch, output, cams in film_cams(view, rows, methods, masks=masks, classes=[selected]):
        before, done = _confidence(output.logits.cpu().numpy(), selected), []
        for key, found in cams.items():
            unit = normalise(found.maps[:, 0])
            # Behind a pooled linear head several methods give one map: what has been asked of the model is not asked
            # again.
            after = next((answer for asked, answer in done if torch.allclose(asked, unit, rtol=0, atol=1e-6)), None)
            if after is None:
                films = SimpleNamespace(rows=batch.rows, images=masked_films(batch.images, found.maps[:, 0]))
                after = _confidence(predict(view.model, [films]), selected)
                done.append((unit, after))
            seen.setdefault(key, []).append(np.stack([before, after]))
    found = []
    for (method, label), parts in seen.items():
        effect = increase_and_drop(*np.concatenate(parts, axis=1))
        found += [
            (method, label, "average_increase", effect.increase, effect.n, 0),
            (method, label, "average_drop", effect.drop, effect.n - effect.n_zero, effect.n_zero),
        ]
    return pd.DataFrame(found, columns=["method", "features", "metric", "value", "n", "n_zero"])


def _confidence(logits: np.ndarray, selected: int) -> np.ndarray:
    return special.expit(logits[:, selected].astype(np.float64))


def logits_with(view: View, rows: np.ndarray, masks: Mapping[Hashable, np.ndarray]) -> dict[Hashable, np.ndarray]:
    """Logits float32 (N, M) of some features only: the others are set to zero at the layer, and the forward pass goes
    on (sec. III-C).

    `masks` : under any names 0/1 (F,), or (M, F) with a choice for each logit. For a layer that is pooled and followed
    by one linear layer all cost one forward pass; elsewhere each different choice costs one. ValueError: no films, or
    masks that do not fit.
    """
    model, layer, grid, output = view.model, view.layer, view.token_grid, None
    head, parts = getattr(model, "head", None), {name: [] for name in masks}
    for batch in view.batches(rows):
        [output] = stream(model, [batch], [layer], grid)
        maps, n_outputs = output.maps[layer], output.logits.shape[1]
        pooled = maps.mean((2, 3)) if is_pooled(output, layer, head) else None
        for name, mask in masks.items():
            mask = feature_mask(mask, n_outputs, maps.shape[1])
            if pooled is not None:
                bias = maps.new_zeros(n_outputs) if head.bias is None else head.bias.detach()
                logits = masked_logits(pooled, head.weight.detach(), bias, mask).cpu().numpy()
            else:
                choices, which = np.unique(np.atleast_2d(mask.cpu().numpy()), axis=0, return_inverse=True)
                passes = []
                for choice in choices:
                    with masked_layer(model, layer, choice, axis=-1 if len(grid) else 1):
                        passes.append(predict(model, [batch]))
                logits = np.stack(passes)[np.broadcast_to(which.reshape(-1), n_outputs), :, np.arange(n_outputs)].T
            parts[name].append(logits)
    if output is None:
        raise ValueError(NO_FILMS)
    return {name: np.concatenate(part) for name, part in parts.items()}


def principal_and_others(masks: np.ndarray, exclusive: bool) -> dict[str, np.ndarray]:
    """The choices of features of Table II for `logits_with`: 'all', 'principal', 'non_principal'.

    Parameters
    ----------
    masks : bool (F, C)
        Of `importance.select_features`.
    exclusive : bool
        Whether a film has one class: then all outputs keep the union of the classes' features (A49). Else every output
        is a question of its own and keeps its own.
    """
    mask = combined_mask(masks) if exclusive else masks.T
    return {"all": np.ones_like(mask), "principal": mask, "non_principal": ~mask}


def masked_performance(
    view: View,
    rows: np.ndarray,
    logits: Mapping[str, np.ndarray],
    choices: Mapping[str, np.ndarray],
    selected: int,
    patients: Sequence,
    exclusive: bool,
    n_replicates: int,
) -> pd.DataFrame:
    """What a model can do for one class with each of several choices of features (Table II).

    Parameters
    ----------
    logits : mapping of a name to float (N, M)
        Of `logits_with`, of these films and choices.
    choices : mapping of a name to 0/1 (F,) or (M, F)
        Such as of `principal_and_others`.
    selected : int
        The class.
    patients : (N,)
        Of the films `rows`.
    exclusive : bool
        As in `principal_and_others`.

    Returns
    -------
    DataFrame
        A row a choice: class, features (its name), n_features (of the output that keeps most), n; auroc with its
        interval over patients; accuracy, over classes where a film has one, of the one output where there is one. Of
        several independent labels a rare one is nearly always right, so there is none.
    """
    table, classes, targets = [], view.classes, view.targets[rows]
    for name, values in logits.items():
        found = classification_metrics(values, targets, classes, patients, n_replicates=n_replicates)
        score = found.set_index("class").loc[classes[selected], ["auroc", "auroc_ci_low", "auroc_ci_high"]].to_dict()
        if exclusive:
            score["accuracy"] = (values.argmax(1) == targets.argmax(1)).mean()
        elif len(classes) == 1:
            score["accuracy"] = ((values[:, 0] > 0) == targets[:, 0]).mean()
        kept = {"features": name, "n_features": np.atleast_2d(choices[name]).sum(1).max(), "n": len(targets)}
        table.append({"class": classes[selected], **kept, **score})
    return pd.DataFrame(table)
