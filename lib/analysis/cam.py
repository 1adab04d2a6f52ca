"""Class activation maps of a classifier whose head is global average pooling followed by one linear layer.

For such a head the gradient of logit ``c`` with respect to feature map ``k`` is the constant ``W[c, k] / (h w)``, so
CAM and the gradient based variants below are closed forms of (feature maps, head weights) and need no backward pass;
`model_cams` has the same methods, and those that perturb the film, for any layer of any classifier. Three separate
steps: the raw signed map at the size of the feature maps, its normalisation to [0, 1], and its resampling to the film.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def class_activation_maps(
    maps: Tensor, weights: Tensor, method: str = "cam", features: Tensor | None = None, *, eps: float = 0.0
) -> Tensor:
    """Raw maps of all classes at once, ``L_c = sum_k w_k A_k`` (CAM: Zhou et al.; the class is the one whose row of the
    head is used).

    Parameters
    ----------
    maps : float (B, F, h, w)
        Feature maps that the pooling sees. May be signed.
    weights : float (C, F)
        Weight of the linear head, one row a class.
    method : a key of `METHODS`
        With ``g = W / (h w)`` and ``S_k = sum_xy A_k``: 'cam' ``w = W``; 'grad' (mean gradient) ``w = g``; 'gradpp'
        ``w = h w relu(g) a``, ``a = g^2 / (2 g^2 + S g^3)``, 0 where the denominator or g is 0; 'xgrad' ``w = sum(g A)
        / S``, which is g, 0 where S is 0; 'hires' ``sum_k g_k A_k`` element by element; 'layer' ``sum_k relu(g_k)
        A_k``.
    features : 0 or 1, (F,) or (C, F), optional
        Channels whose weighted maps are summed (FS-CAM: Li et al., eq. 5). The weights are those of all channels
        together.
    eps : float
        Added to the denominator of 'gradpp' (pytorch-grad-cam uses 1e-6, which outweighs g^2 for a pooled head); the
        exact form is 0.

    Returns
    -------
    float (B, C, h, w), signed, in the precision of ``maps``, on their device.

    Raises
    ------
    ValueError
        Shapes that do not fit, an unknown method, a mask of other values, or a NaN or infinity in the maps or weights.
    """
    _check(maps, weights, method, eps)
    batch, _, height, width = maps.shape
    chosen = METHODS[method](maps, weights.to(maps), eps)
    if features is not None:
        chosen = chosen * feature_mask(features, *weights.shape).to(chosen)
    raw = chosen @ maps.flatten(2)
    return _finite(raw.reshape(batch, len(weights), height, width), maps, weights)


@torch.no_grad()
def channel_contributions(maps: Tensor, weights: Tensor, method: str = "cam", *, eps: float = 0.0) -> Tensor:
    """What each channel adds to the sum of a raw map, ``S[b, c, f] = sum_xy w^{f,c} A^f`` (the terms of Li et al., eq.
    3 and 4).

    Parameters
    ----------
    maps, weights, method, eps
        As for `class_activation_maps`.

    Returns
    -------
    float (B, C, F), signed, in the precision of ``maps``. Its sum over F is the sum over (h, w) of the raw map.

    Raises
    ------
    ValueError
        As `class_activation_maps`.
    """
    _check(maps, weights, method, eps)
    return _finite(METHODS[method](maps, weights.to(maps), eps) * _sums(maps), maps, weights)


@torch.no_grad()
def pair_maps(
    maps: Tensor, weights: Tensor, rows: Tensor, classes: Tensor, method: str = "cam", *, eps: float = 0.0
) -> Tensor:
    """Raw maps of the wanted (film, class) pairs only; pair ``p`` equals ``class_activation_maps(...)[rows[p],
    classes[p]]``.

    Parameters
    ----------
    maps, weights, method, eps
        As for `class_activation_maps`.
    rows, classes : integer (P,)
        Film (index into the batch) and class (row of ``weights``) of each pair.

    Returns
    -------
    float (P, h, w), signed.
    """
    _check(maps, weights, method, eps)
    rows, classes = torch.as_tensor(rows), torch.as_tensor(classes)
    if rows.ndim != 1 or rows.shape != classes.shape:
        raise ValueError(
            f"rows and classes must be two lists of one length, got shapes {tuple(rows.shape)} and "
            f"{tuple(classes.shape)}"
        )
    for name, index, size in (("rows", rows, len(maps)), ("classes", classes, len(weights))):
        if len(index) and not (0 <= int(index.min()) and int(index.max()) < size):
            raise ValueError(f"{name} must lie in 0..{size - 1}, got {int(index.min())}..{int(index.max())}")
    height, width = maps.shape[2:]
    weights = weights.to(maps)
    raw = maps.new_empty((len(rows), height, width))
    for row in rows.unique().tolist():
        here = torch.nonzero(rows == row).flatten()
        film = maps[row : row + 1]
        chosen = weights[classes[here].to(weights.device)]
        found = METHODS[method](film, chosen, eps) @ film.flatten(2)
        raw[here.to(raw.device)] = found.reshape(len(here), height, width)
    return _finite(raw, maps, weights)


@torch.no_grad()
def normalise(raw: Tensor, rectify: bool = True) -> Tensor:
    """Each map to [0, 1] at its own size: negatives to 0 (unless ``rectify`` is False), then min-max.

    A map without contrast (zero, constant, or constant up to rounding: what is left of it after the rectifier has a
    range of at most 8 machine epsilons of its largest magnitude) becomes zeros. Min-max removes a positive floor.

    Parameters
    ----------
    raw : float (..., h, w)
    rectify : bool
        False: min-max of the signed map.

    Returns
    -------
    float (..., h, w), same dtype.
    """
    low, high = torch.aminmax(raw.flatten(-2), dim=-1)
    if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
        bad = torch.nonzero(~(torch.isfinite(low) & torch.isfinite(high)))[0].tolist()
        raise ValueError(f"map {bad} holds NaN or infinite values")
    if rectify:
        raw, low, high = raw.clamp(min=0), low.clamp(min=0), high.clamp(min=0)
    magnitude = torch.maximum(low.abs(), high.abs())
    half = high / 2 - low / 2  # halves: high - low of a signed map may overflow
    flat = half * 2 <= 8 * torch.finfo(raw.dtype).eps * magnitude
    half = torch.where(flat, torch.ones_like(half), half)[..., None, None]
    scaled = (raw / 2 - low[..., None, None] / 2) / half
    return torch.where(flat[..., None, None], torch.zeros_like(raw), scaled).clamp(0, 1)


def resize(maps: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Bilinear resampling of (..., h, w) to (..., H, W), pixel centres at halves (``align_corners=False``), like cv2's
    INTER_LINEAR."""
    size = (size, size) if isinstance(size, int) else tuple(size)
    lead = maps.shape[:-2]
    out = F.interpolate(maps.reshape(1, -1, *maps.shape[-2:]), size=size, mode="bilinear", align_corners=False)
    return out.reshape(*lead, *size)


@torch.no_grad()
def film_maps(
    raw: Tensor,
    size: int | tuple[int, int],
    order: str = "normalise_first",
    rectify: bool = True,
    quantise: bool = False,
) -> Tensor:
    """Raw maps as they are laid over the film: in [0, 1] and at its size.

    Parameters
    ----------
    raw : float (..., h, w)
        Signed maps at native size.
    size : int or (int, int)
        Of the film, in pixels.
    order : {'normalise_first', 'resize_first'}
        `normalise` at native size and then `resize`, whose maximum may be less than 1; or the other way round.
    rectify : bool
        See `normalise`.
    quantise : bool
        Each normalised value cut to 8 bits, ``floor(255 x) / 255``, as a map that was stored as an image; before the
        resampling where that comes last.

    Returns
    -------
    float (..., H, W), same dtype.
    """
    if order not in ("normalise_first", "resize_first"):
        raise ValueError(f"order must be 'normalise_first' or 'resize_first', got {order!r}")
    unit = normalise(raw if order == "normalise_first" else resize(raw, size), rectify)
    if quantise:
        unit = (unit * 255).floor() / 255
    return resize(unit, size).clamp(0, 1) if order == "normalise_first" else unit


def feature_mask(features: Tensor, n_classes: int, n_features: int) -> Tensor:
    """`features` as a tensor, (F,) or (C, F), after a check of its shape and that it holds nothing but 0 and 1."""
    mask = torch.as_tensor(features)
    if tuple(mask.shape) not in ((n_features,), (n_classes, n_features)):
        raise ValueError(
            f"features must be a mask ({n_features},) or ({n_classes}, {n_features}), got shape {tuple(mask.shape)}"
        )
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError("features must be a mask of 0 and 1, one entry a channel; it holds other values")
    return mask


def gradpp_terms(grads: Tensor, sums: Tensor, eps: float = 0.0) -> Tensor:
    """``a relu(g)`` with ``a = g^2 / (2 g^2 + S g^3)``, whose sum over a map is the weight of Grad++; shapes that
    broadcast."""
    positive = grads.clamp(min=0)
    if eps:
        squared = positive.square()
        numerator, denominator = squared, 2 * squared + sums * squared * positive + eps
    else:  # g^2 cancelled: it underflows for small heads
        numerator, denominator = torch.ones_like(positive), 2 + sums * positive
    return torch.where(denominator == 0, torch.zeros_like(denominator), numerator / denominator) * positive


def _sums(maps: Tensor) -> Tensor:
    return maps.sum(dim=(2, 3))[:, None, :]


def _head(maps: Tensor, weights: Tensor, eps: float) -> Tensor:
    return weights


def _gradient(maps: Tensor, weights: Tensor, eps: float) -> Tensor:
    return weights / (maps.shape[2] * maps.shape[3])


def _positive_gradient(maps: Tensor, weights: Tensor, eps: float) -> Tensor:
    return _gradient(maps, weights, eps).clamp(min=0)


def _xgrad(maps: Tensor, weights: Tensor, eps: float) -> Tensor:
    sums = _sums(maps)
    return torch.where(sums == 0, torch.zeros_like(sums), _gradient(maps, weights, eps))


def _gradpp(maps: Tensor, weights: Tensor, eps: float) -> Tensor:
    return maps.shape[2] * maps.shape[3] * gradpp_terms(_gradient(maps, weights, eps), _sums(maps), eps)


# The closed forms, see `class_activation_maps`: the weights of the channels, (C, F), or (B, C, F) where they depend on
# the film.
METHODS = {
    "cam": _head,
    "grad": _gradient,
    "gradpp": _gradpp,
    "xgrad": _xgrad,
    "hires": _gradient,
    "layer": _positive_gradient,
}


def _check(maps: Tensor, weights: Tensor, method: str, eps: float) -> None:
    if method not in METHODS:
        raise ValueError(f"unknown CAM method {method!r}; choose one of {', '.join(METHODS)}")
    if maps.ndim != 4 or weights.ndim != 2 or maps.shape[1] != weights.shape[1]:
        raise ValueError(
            f"need maps (B, F, h, w) and head weights (C, F), got {tuple(maps.shape)} and {tuple(weights.shape)}"
        )
    if not maps.is_floating_point():
        raise ValueError(f"maps must be floating point, got {maps.dtype}")
    if eps < 0:
        raise ValueError(f"eps must not be negative, got {eps}")


def _finite(raw: Tensor, maps: Tensor, weights: Tensor) -> Tensor:
    """A NaN or infinity in a map reaches every class of its film (0 times it is NaN), so the small result is checked,
    not the maps."""
    if torch.isfinite(raw).all():
        return raw
    bad = torch.nonzero(~torch.isfinite(maps).all(dim=-1).all(dim=-1))
    if len(bad):
        raise ValueError(
            f"feature maps hold NaN or infinite values, first in film {int(bad[0, 0])} of the batch, channel "
            f"{int(bad[0, 1])}"
        )
    bad = torch.nonzero(~torch.isfinite(weights))
    if len(bad):
        raise ValueError(
            f"head weights hold NaN or infinite values, first in class {int(bad[0, 0])}, channel {int(bad[0, 1])}"
        )
    raise ValueError(
        "the class activation maps overflow: the feature maps or head weights are too large for their precision"
    )
