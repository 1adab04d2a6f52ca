"""Batches on any device. Order and augmentation are functions of (seed, epoch, film), not of history, ranks, batch size
or device."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from lib.data.augment import DRAWS, augmented_crops, cut_holes
from lib.data.store import Store

MEAN = (0.485, 0.456, 0.406)  # ImageNet, per channel, of images in [0, 1]
STD = (0.229, 0.224, 0.225)
JITTER = 0.1
Device = torch.device | str
_AHEAD = 2  # batches gathered while one is consumed
_TOGETHER = 8  # films that a CPU works on at a time, so that they stay in its cache


@dataclass
class Batch:
    """Films and their targets.

    Attributes
    ----------
    rows : int64 (B,), rows of the store, on the CPU
    images : float32 (B, 3, S, S), channels_last, normalised by ImageNet's mean and standard deviation
    targets : float32 (B, M)
    """

    rows: torch.Tensor
    images: torch.Tensor
    targets: torch.Tensor


def training_batches(
    store: Store,
    rows: np.ndarray,
    targets: np.ndarray,
    *,
    image_size: int,
    batch_size: int,
    seed: int,
    epoch: int,
    device: Device = "cpu",
    rank: int = 0,
    world_size: int = 1,
    jitter: float = JITTER,
    flip: bool = True,
    augmentation: str = "paper",
) -> Iterator[Batch]:
    """Shuffled, augmented batches of one epoch.

    Each film is cropped at random from store.size to image_size, mirrored with probability 1/2, and jittered in
    brightness and contrast: x -> clip(c (x - m) + m + b, 0, 1) for x in [0, 1], m the mean of the crop, c in [1 -
    jitter, 1 + jitter], b in [-jitter, jitter]. A film's draws depend on (seed, epoch, row) alone, the order on (seed,
    epoch) and `rows`.

    Parameters
    ----------
    rows : int (n,)
        Rows of the store to train on.
    targets : (N, M)
        Of every film of the store; row i belongs to film i.
    batch_size : int
        Of all ranks together; a multiple of world_size, at least 2 films a rank, because batch normalisation needs two.
    rank, world_size : int
        Rank r takes films r, r + world_size, ... of each global batch. The last batch is cut to a multiple of
        world_size, so that every rank has equally many films, and left out where that is fewer than 2 a rank:
        `count_batches` says how many there are.
    jitter : float in [0, 1)
        0 switches it off.
    flip : bool
        False: no film is mirrored, for classes that a mirror changes, such as digits. Crops and jitter stay the same.
    augmentation : 'paper' or 'imba'
        As above, or the authors' own, see `augment`.

    Raises
    ------
    ValueError
        At the call, before any batch: parameters out of range, rows that are not in the store, targets of another
        length.
    """
    rows = _check(store, rows, targets, image_size)
    if image_size > store.size:
        text = f"exceeds the {store.size} pixels of the store; build the store at image_size or larger"
        raise ValueError(f"image_size {image_size} {text}")
    if not 0 <= jitter < 1:
        raise ValueError(f"jitter is {jitter}; it must be at least 0 and below 1")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}; it must be at least 0 and below world_size ({world_size})")
    if seed < 0 or epoch < 0:
        raise ValueError(f"seed and epoch are {seed} and {epoch}; neither may be negative")
    if augmentation not in ("paper", "imba"):
        raise ValueError(f"augmentation is {augmentation!r}; it must be 'paper' or 'imba'")
    if augmentation == "imba" and not flip:
        raise ValueError(
            "augmentation 'imba' transposes and turns films; for classes that a mirror changes it must be 'paper'"
        )
    n_batches = count_batches(len(rows), batch_size, world_size)
    if n_batches == 0:
        raise ValueError(
            f"{len(rows)} training films make no batch for {world_size} processes; at least 2 each are needed"
        )

    order = rows[np.random.default_rng((seed, epoch)).permutation(len(rows))]

    def gather(batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        films = order[batch * batch_size : (batch + 1) * batch_size]
        films = films[rank : len(films) - len(films) % world_size : world_size]
        if augmentation == "imba":
            draws = film_draws(seed, epoch, films, DRAWS)
            return films, augmented_crops(store.images, films, draws, image_size, jitter), draws
        draws = film_draws(seed, epoch, films, 5)
        steps = store.size - image_size + 1
        top, left = (draws[:, :2] * steps).astype(np.int64).T
        mirrored = (draws[:, 2] < 0.5) & flip
        return films, gather_crops(store.images, films, top, left, mirrored, image_size), draws[:, 3:]

    def finish(films: np.ndarray, crops: np.ndarray, draws: np.ndarray) -> Batch:
        shifts = torch.from_numpy((jitter * (2 * draws - 1)).astype(np.float32)).to(device)

        def grey(images: torch.Tensor, part: slice) -> torch.Tensor:
            if jitter and augmentation == "paper":
                return _jitter(images, brightness=shifts[part, 0], contrast=1 + shifts[part, 1])
            return images.float() / 255

        batch = _batch(films, crops, grey, targets, image_size, device)
        if augmentation == "imba":
            cut_holes(batch.images, draws)
        return batch

    return _stream(n_batches, gather, finish)


def evaluation_batches(
    store: Store, rows: np.ndarray, targets: np.ndarray, *, image_size: int, batch_size: int, device: Device = "cpu"
) -> Iterator[Batch]:
    """Batches of whole films resized to image_size (antialiased bilinear), in the order of `rows`, none left out, not
    augmented.

    A film's pixels do not depend on batch_size; where image_size equals store.size they are the stored ones.
    Parameters as `training_batches`.
    """
    rows = _check(store, rows, targets, image_size)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")

    def gather(batch: int) -> tuple[np.ndarray, np.ndarray]:
        films = rows[batch * batch_size : (batch + 1) * batch_size]
        return films, np.asarray(store.images[films])

    def grey(images: torch.Tensor, part: slice) -> torch.Tensor:
        images = images.float() / 255
        if image_size == store.size:
            return images
        return F.interpolate(images[:, None], (image_size, image_size), mode="bilinear", antialias=True)[:, 0]

    def finish(films: np.ndarray, crops: np.ndarray) -> Batch:
        return _batch(films, crops, grey, targets, image_size, device)

    return _stream(-(-len(rows) // batch_size), gather, finish)


def count_batches(n_films: int, batch_size: int, world_size: int = 1) -> int:
    """Number of batches of an epoch of `training_batches`, equal on every rank."""
    if world_size < 1 or batch_size % world_size or batch_size < 2 * world_size:
        raise ValueError(
            f"batch_size is {batch_size}; it must be a multiple of the {world_size} processes, with at least 2 films "
            "for each"
        )
    full, rest = divmod(n_films, batch_size)
    return full + (rest >= 2 * world_size)


def gather_crops(
    images: np.ndarray, rows: np.ndarray, top: np.ndarray, left: np.ndarray, flip: np.ndarray, size: int
) -> np.ndarray:
    """Crops at (top, left) of the given rows of `images` (N, H, W), mirrored where `flip`, as one uint8 array (B, size,
    size)."""
    crops = np.empty((len(rows), size, size), np.uint8)
    for crop, row, y, x, mirrored in zip(crops, rows.tolist(), top.tolist(), left.tolist(), flip.tolist()):
        window = images[row, y : y + size, x : x + size]
        crop[...] = window[:, ::-1] if mirrored else window
    return crops


def film_draws(seed: int, epoch: int, rows: np.ndarray, n: int) -> np.ndarray:
    """n uniform draws in [0, 1) for each film, float64 (B, n): a hash (splitmix64) of seed, epoch, row and the number
    of the draw."""
    epoch_key = _splitmix64(_splitmix64(np.array([seed], np.uint64)) ^ np.uint64(epoch))
    film_key = _splitmix64(epoch_key ^ _splitmix64(np.asarray(rows).astype(np.uint64)))
    bits = _splitmix64(film_key[:, None] + np.arange(1, n + 1, dtype=np.uint64))
    return (bits >> np.uint64(11)) * 2.0**-53


def _splitmix64(x: np.ndarray) -> np.ndarray:
    # Steele, Lea & Flood 2014; uint64 arrays wrap around silently, which is meant.
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _check(store: Store, rows: np.ndarray, targets: np.ndarray, image_size: int) -> np.ndarray:
    rows = np.asarray(rows)
    if not np.issubdtype(rows.dtype, np.integer) and len(rows):
        raise ValueError(
            f"rows are {rows.dtype}; they must be integers, such as Store.rows gives (np.flatnonzero turns a mask "
            "into rows)"
        )
    rows = rows.astype(np.int64)
    if image_size < 1:
        raise ValueError(f"image_size is {image_size}; it must be at least 1 pixel")
    if len(targets) != len(store.images):
        raise ValueError(
            f"targets have {len(targets)} rows, the store has {len(store.images)} films; pass the targets of the whole "
            "release that the store was opened for, without its unreadable films: release.without(store.unreadable)"
        )
    if rows.ndim != 1 or (len(rows) and (rows.min() < 0 or rows.max() >= len(store.images))):
        raise ValueError(
            f"rows must be one-dimensional, each at least 0 and below the {len(store.images)} films of the store"
        )
    return rows


def _to_device(crops: np.ndarray, device: Device) -> torch.Tensor:
    images = torch.from_numpy(crops)
    if torch.device(device).type == "cuda":
        return images.pin_memory().to(device, non_blocking=True)
    return images.to(device)


def _jitter(images: torch.Tensor, brightness: torch.Tensor, contrast: torch.Tensor) -> torch.Tensor:
    # The mean comes from an integer sum, which is exact: a float sum may differ with the size of the batch.
    total = images.sum(2, dtype=torch.int32).sum(1, dtype=torch.int64)
    mean = (total.double() / (255 * images[0].numel())).float()
    offset = mean * (1 - contrast) + brightness
    return torch.addcmul(offset[:, None, None], images.float(), (contrast / 255)[:, None, None]).clamp_(0, 1)


def _batch(
    films: np.ndarray,
    crops: np.ndarray,
    grey: Callable[[torch.Tensor, slice], torch.Tensor],
    targets: np.ndarray,
    size: int,
    device: Device,
) -> Batch:
    """`grey` makes float32 (b, size, size) in [0, 1] of the uint8 films in a slice of the batch."""
    crops = _to_device(crops, device)
    scale = torch.tensor([1 / s for s in STD], device=crops.device)
    offset = torch.tensor([-m / s for m, s in zip(MEAN, STD, strict=True)], device=crops.device)
    if crops.device.type == "cpu":
        # NumPy asks for huge pages: to touch the memory for the first time would take twice as long as all else here.
        images = torch.from_numpy(np.empty((len(films), size, size, 3), np.float32))
        for start in range(0, len(films), _TOGETHER):
            part = slice(start, start + _TOGETHER)
            values = grey(crops[part], part)
            for channel in range(3):
                torch.addcmul(offset[channel], values, scale[channel], out=images[part, :, :, channel])
    else:
        images = torch.addcmul(offset, grey(crops, slice(None))[..., None], scale)
    chosen = torch.from_numpy(np.asarray(targets[films], np.float32)).to(device)
    # (B, S, S, 3) in memory, seen as (B, 3, S, S): that is channels_last, without a copy.
    return Batch(torch.from_numpy(films.copy()), images.permute(0, 3, 1, 2), chosen)


def _stream(n_batches: int, gather: Callable[[int], tuple], finish: Callable[..., Batch]) -> Iterator[Batch]:
    """finish(*gather(i)) for each batch in turn, with gather running up to `_AHEAD` batches ahead in a thread.

    Its exceptions are raised here. Closing the iterator early waits for at most one gather.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
    try:
        pending = deque(pool.submit(gather, batch) for batch in range(min(_AHEAD, n_batches)))
        for batch in range(n_batches):
            gathered = pending.popleft().result()
            if batch + _AHEAD < n_batches:
                pending.append(pool.submit(gather, batch + _AHEAD))
            yield finish(*gathered)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
