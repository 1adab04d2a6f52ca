"""What a lens shows where nothing was learnt: networks whose weights are drawn anew, and how alike two maps are.

A map that stays the same while the network is made random from the top down is a picture of the film or of the
architecture, not of what was learnt (Adebayo et al. 2018; for chest films Arun et al. 2021). The same likeness between
the maps of two seeds is a lens's repeatability, between those of two backbones its reproducibility.
"""

import copy
from collections.abc import Iterator

import numpy as np
import pandas as pd
import scipy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

OTHER_FILM = "another film"  # whose map a map is held against
WINDOW, SIGMA = 11, 1.5  # of the Gaussian window of SSIM, pixels
C1, C2 = 0.01**2, 0.03**2  # its constants, for values in [0, 1]


@torch.no_grad()
def cascade(model: nn.Module, fresh: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model with its stages drawn anew, one more each time, from the head down.

    Parameters
    ----------
    model : nn.Module
        With a `head` and a `trunk`, whose children are the stages; it is left as it is.
    fresh : nn.Module
        The same architecture before training: where the weights and statistics of a randomised stage come from.

    Yields
    ------
    stage : str
        'none' first, then 'head' and the children of the trunk that have weights, from the last to the first.
    model : nn.Module
        One and the same at every step, in evaluation mode: use it before the next step.
    """
    changed = copy.deepcopy(model).eval()
    yield "none", changed
    stages = ["head", *(f"trunk.{name}" for name, _ in reversed(list(model.trunk.named_children())))]
    drawn = fresh.state_dict()
    for stage in stages:
        names = [name for name in drawn if name.startswith(f"{stage}.")]
        if names:
            own = changed.state_dict()
            for name in names:
                own[name].copy_(drawn[name])
            yield stage, changed


def likeness(a: Tensor, b: Tensor) -> pd.DataFrame:
    """How alike maps are, pair by pair.

    Parameters
    ----------
    a, b : float (P, H, W)
        Signed maps at one size, at least `WINDOW` pixels a side.

    Returns
    -------
    DataFrame, one row a pair
        ssim : mean structural similarity (Wang et al. 2004; Gaussian window of 11 pixels, sigma 1.5, windows wholly
        within the map) of the positive parts, each divided by its maximum. rank : Spearman's correlation of the signed
        values over the pixels; NaN where a map is constant.

    Raises
    ------
    ValueError
        Maps of different shapes, smaller than the window, or with NaN or infinite values.
    """
    a, b = (torch.as_tensor(maps).detach().cpu().double() for maps in (a, b))
    if a.shape != b.shape or a.ndim != 3 or min(a.shape[1:]) < WINDOW:
        raise ValueError(
            f"need two arrays of maps (P, H, W), at least {WINDOW} pixels a side, got {tuple(a.shape)} and "
            f"{tuple(b.shape)}"
        )
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ValueError("a map holds NaN or infinite values")
    ranks = [
        _rank_correlation(one, other) for one, other in zip(a.flatten(1).numpy(), b.flatten(1).numpy(), strict=True)
    ]
    return pd.DataFrame({"ssim": _ssim(_unit(a), _unit(b)).numpy(), "rank": ranks})


def _unit(maps: Tensor) -> Tensor:
    maps = maps.clamp(min=0)
    top = maps.amax((1, 2), keepdim=True)
    return maps / torch.where(top > 0, top, torch.ones_like(top))


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    ranks = np.stack([scipy.stats.rankdata(values) for values in (a, b)])
    ranks -= ranks.mean(axis=1, keepdims=True)
    spread = np.sqrt((ranks**2).sum(axis=1)).prod()
    return float(ranks[0] @ ranks[1] / spread) if spread > 0 else np.nan


def _ssim(a: Tensor, b: Tensor) -> Tensor:
    window = torch.exp(-((torch.arange(WINDOW, dtype=a.dtype) - WINDOW // 2) ** 2) / (2 * SIGMA**2))
    window /= window.sum()

    def blurred(maps: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(maps[:, None], window[None, None, :, None]), window[None, None, None, :])[:, 0]

    mean_a, mean_b = blurred(a), blurred(b)
    var_a, var_b = blurred(a * a) - mean_a**2, blurred(b * b) - mean_b**2
    both = blurred(a * b) - mean_a * mean_b
    brightness = (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)
    structure = (2 * both + C2) / (var_a + var_b + C2)
    return (brightness * structure).mean((1, 2))
