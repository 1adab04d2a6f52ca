"""The authors' training augmentation, which the paper does not describe: more than crop, flip and jitter.

A film is cropped at random in size and shape, transposed, mirrored, shifted, scaled and rotated, made brighter or
darker, and loses a few squares. The first steps take uint8 films on the CPU, so that every device trains on the same
pixels; the squares are cut after normalisation, where 0 is the mean. All draws are passed in: a film's `DRAWS` numbers
of `batches.film_draws`, used in the order below.

The steps and their ranges are those of imba-explain (configs/_base_/datasets/nih_class_dataset.py) and of
albumentations' defaults. What differs: films come from the store at its size, not at 280 pixels; the centre is the
film's own, not half a pixel beside it; levels are rounded, not cut; holes keep their share of the film at other sizes
than 224.
"""

import cv2
import numpy as np
import torch

ATTEMPTS = 10  # at a crop that fits into the film; then the whole film is taken
HOLES = (2, 8)  # at least, at most
# crop (area and shape of each attempt, then its place), transpose, flip, affine (whether, angle, scale, dx, dy),
# brightness (whether, brightness, contrast), holes (whether, how many, their places)
_PARTS = (2 * ATTEMPTS, 2, 1, 1, 5, 3, 2, 2 * HOLES[1])
DRAWS = sum(_PARTS)


def _split(draws: np.ndarray) -> list[np.ndarray]:
    if draws.ndim != 2 or draws.shape[1] != DRAWS:
        raise ValueError(f"draws are {draws.shape}; they must be (B, {DRAWS}): film_draws(seed, epoch, rows, DRAWS)")
    return np.split(draws, np.cumsum(_PARTS)[:-1], axis=1)


def augmented_crops(images: np.ndarray, rows: np.ndarray, draws: np.ndarray, size: int, jitter: float) -> np.ndarray:
    """Films after every step but the holes.

    1. Crop of a share of the area in [0.08, 1] and of an aspect ratio in [3/4, 4/3] (its logarithm is uniform), resized
    bilinearly.
    2. Transposed with probability 1/2. 3. Mirrored with probability 1/2.
    4. With probability 1/2 shifted by up to 1/16 of the side each way, scaled by 0.9 to 1.1 and rotated by up to 45
    degrees about the
       centre, bilinearly; what comes in from outside is the film reflected.
    5. With probability 1/2 x -> clip(c x + b, 0, 1) for x in [0, 1], c in [1 - jitter, 1 + jitter], b in [-jitter,
    jitter], to the nearest
       of 256 levels. (The paper's recipe, as we read it, turns the contrast about the film's mean.)

    Parameters
    ----------
    images : uint8 (N, H, H)
    rows : int (B,)
        Of `images`.
    draws : float (B, DRAWS) in [0, 1)
    size : int
        Side of the result in pixels.
    jitter : float in [0, 1)
        0.1 in the authors' code; 0 switches step 5 off.

    Returns
    -------
    uint8 (B, size, size)
    """
    crop, place, transpose, flip, affine, tone, _, _ = _split(draws)
    top, left, height, width = _crop_windows(crop, place, images.shape[1])
    levels = np.arange(256)
    films = np.empty((len(rows), size, size), np.uint8)
    for i, row in enumerate(np.asarray(rows).tolist()):
        film = images[row, top[i] : top[i] + height[i], left[i] : left[i] + width[i]]
        film = cv2.resize(film, (size, size), interpolation=cv2.INTER_LINEAR)
        if transpose[i, 0] < 0.5:
            film = cv2.transpose(film)
        if flip[i, 0] < 0.5:
            film = cv2.flip(film, 1)
        if affine[i, 0] < 0.5:
            angle, scale, dx, dy = (2 * affine[i, 1:] - 1) * (45, 0.1, size / 16, size / 16)
            matrix = cv2.getRotationMatrix2D(((size - 1) / 2, (size - 1) / 2), angle, 1 + scale)
            matrix[:, 2] += dx, dy
            film = cv2.warpAffine(film, matrix, (size, size), borderMode=cv2.BORDER_REFLECT_101)
        if jitter and tone[i, 0] < 0.5:
            brightness, contrast = jitter * (2 * tone[i, 1:] - 1)
            film = cv2.LUT(film, np.rint(np.clip((1 + contrast) * levels + 255 * brightness, 0, 255)).astype(np.uint8))
        films[i] = film
    return films


def _crop_windows(
    crop: np.ndarray, place: np.ndarray, side: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """top, left, height, width of each film's crop, int64 (B,): the first attempt that fits, else the whole film."""
    area = (0.08 + 0.92 * crop[:, :ATTEMPTS]) * side**2
    ratio = (4 / 3) ** (2 * crop[:, ATTEMPTS:] - 1)
    whole = np.full((len(crop), 1), side)
    width = np.hstack([np.rint(np.sqrt(area * ratio)).astype(np.int64), whole])
    height = np.hstack([np.rint(np.sqrt(area / ratio)).astype(np.int64), whole])
    width, height = np.maximum(width, 1), np.maximum(height, 1)
    first = ((width <= side) & (height <= side)).argmax(axis=1)
    width, height = width[np.arange(len(crop)), first], height[np.arange(len(crop)), first]
    top, left = (place * (side + 1 - np.stack([height, width], axis=1))).astype(np.int64).T
    return top, left, height, width


def cut_holes(images: torch.Tensor, draws: np.ndarray) -> None:
    """Set 2 to 8 squares of a film to 0, with probability 1/2, in place; they may overlap.

    Parameters
    ----------
    images : float (B, C, S, S)
        Normalised, so that 0 is the mean. A square's side is 20 pixels at 224, and in proportion at other sizes.
    draws : float (B, DRAWS) in [0, 1)
        The ones that `augmented_crops` had.
    """
    *_, holes, places = _split(draws)
    size = images.shape[-1]
    side = max(1, round(size * 20 / 224))
    corners = (places.reshape(len(places), HOLES[1], 2) * (size - side + 1)).astype(np.int64)
    number = np.where(holes[:, 0] < 0.5, HOLES[0] + (holes[:, 1] * (HOLES[1] - HOLES[0] + 1)).astype(np.int64), 0)
    for film, many, those in zip(images, number.tolist(), corners.tolist(), strict=True):
        for y, x in those[:many]:
            film[:, y : y + side, x : x + side] = 0
