"""Connected components of thresholded maps that meet a box, native or enlarged to the film (Khakzar et al., section 4).

A mask is held as the runs of its rows; runs that touch in neighbouring rows are joined. Few cells of a map reach the
threshold, and only around these is it enlarged. OpenCV's contours, which count holes too, are there for comparison with
the authors' code alone.
"""

from collections.abc import Iterator, Sequence

import cv2
import numpy as np
import torch
from torch import Tensor

from lib.analysis.bilinear import compiled, fma, taps
from lib.analysis.cam import resize
from lib.analysis.localization import pixel_boxes


def count_concepts(
    maps: Tensor,
    tau: np.ndarray,
    boxes: Sequence,
    image_size: int,
    *,
    resolution: str = "image",
    connectivity: int = 8,
    clip: bool = False,
    counting: str = "components",
    rounding: str = "outward",
    usable: np.ndarray | None = None,
) -> np.ndarray:
    """Connected components of ``A >= tau`` that share at least one pixel with the union of the film's boxes, for every
    film and channel.

    The full mask is labelled, then tested: a component that a box cuts, or that two boxes touch, counts once.

    Parameters
    ----------
    maps : float32 (B, F, h, w)
    tau : float (F,)
        Thresholds, from `StreamingQuantile`.
    boxes : sequence of B arrays (K, 4)
        All boxes of each film, of any class: x1, y1, x2, y2 in pixels at ``image_size``, x2 and y2 exclusive.
    image_size : int
        Side of the film in pixels.
    resolution : {'image', 'native'}
        'image': the maps are enlarged bilinearly to the film before the threshold (in float32, as torch does it).
        'native': the mask of the map itself; a box covers every cell that one of its pixels lies in.
    connectivity : {8, 4}
    clip : bool
        The mask is multiplied by the boxes before it is labelled (the authors' code): a component that boxes cut counts
        several times.
    counting : {'components', 'contours'}
        'contours': one more for every hole of such a component, as the authors' code counts (OpenCV, RETR_TREE). It
        labels every channel's whole map, about a hundred times slower.
    rounding : {'outward', 'trunc'}
        See `localization.pixel_boxes`.
    usable : bool (F,), optional
        Channels to count; the others give 0. Default all, as in the authors' code, which counts a dead channel as one
        concept.

    Returns
    -------
    int32 (B, F)

    Raises
    ------
    ValueError
        Shapes that do not fit, an unknown option, maps that are not float32 (counts from bfloat16 differ), NaN or
        infinity above tau.
    """
    maps = float32_maps(maps)
    batch, channels, height, width = maps.shape
    tau = np.ascontiguousarray(tau, dtype=np.float32)
    usable = np.ones(channels, dtype=bool) if usable is None else np.ascontiguousarray(usable, dtype=bool)
    if tau.shape != (channels,) or usable.shape != (channels,):
        given = f"tau {tau.shape} and usable {usable.shape}"
        raise ValueError(f"need one threshold for each of {channels} channels, got {given}")
    if np.isnan(tau[usable]).any():
        raise ValueError(f"tau of channel {int(np.flatnonzero(np.isnan(tau) & usable)[0])} is NaN")
    if len(boxes) != batch:
        raise ValueError(f"need one list of boxes a film: {batch} films, {len(boxes)} lists")
    for name, given, known in (
        ("connectivity", connectivity, (4, 8)),
        ("resolution", resolution, ("image", "native")),
        ("counting", counting, ("components", "contours")),
    ):
        if given not in known:
            raise ValueError(f"{name} must be {known[0]!r} or {known[1]!r}, got {given!r}")
    if counting == "contours" and connectivity == 4:
        raise ValueError("contours are those of 8-connected components; connectivity must be 8")
    values, counts, reach = maps.numpy(), np.zeros((batch, channels), dtype=np.int32), int(connectivity == 8)
    pieces, film = pixel_boxes(boxes, image_size, rounding=rounding)
    grid = (image_size, image_size)
    if resolution == "native":  # the cells that at least one pixel of a box lies in
        grid, sides = (height, width), np.array([width, height])
        pieces = np.concatenate([pieces[:, :2] * sides // image_size, -(-pieces[:, 2:] * sides // image_size)], axis=1)
    inside = _running(pieces, film, batch, *grid)
    if counting == "contours":
        bad = _count_contours(maps, tau, usable, inside, clip, counts)
    elif resolution == "native":
        flat = values.reshape(batch, channels, height * width)
        bad = _count_native(flat, width, tau, usable, inside, reach, clip, counts)
    else:
        # Cells whose corners are all below this cannot reach tau, not even through rounding.
        level = tau.astype(np.float64)
        level = np.nextafter((level - 1e-6 * np.abs(level) - 1e-44).astype(np.float32), np.float32(-np.inf))
        cells = *taps(height, image_size), *taps(width, image_size)
        bad = _count_image(values, tau, level, usable, inside, reach, clip, *cells, counts)
    if bad >= 0:
        where = f"channel {bad % channels} of film {bad // channels} of the batch"
        raise ValueError(f"NaN or infinite activation in {where}")
    return counts


def enlarged(maps: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    """Maps of one film (F, h, w) enlarged bilinearly to ``size``, some at a time: the first channel, and float32 (<=
    64, size, size)."""
    for first in range(0, len(maps), 64):
        yield first, resize(maps[first : first + 64], size)


def _count_contours(
    maps: Tensor, tau: np.ndarray, usable: np.ndarray, inside: np.ndarray, clip: bool, counts: np.ndarray
) -> int:
    """As `_count_native`: the outer outlines and the holes of the components that meet the boxes; ``inside`` tells the
    resolution."""
    level = torch.from_numpy(tau)[:, None, None]
    for film, own in enumerate(maps):
        within = np.diff(inside[film], axis=1).astype(bool)
        if not within.any():
            continue
        finite = torch.isfinite(own).flatten(1).all(dim=1).numpy()
        if not finite[usable].all():
            return film * len(tau) + int(np.flatnonzero(usable & ~finite)[0])
        for first, part in enlarged(own, len(within)) if within.shape != own.shape[1:] else [(0, own)]:
            masks = (part >= level[first : first + len(part)]).numpy()
            for channel in np.flatnonzero(masks.any(axis=(1, 2)) & usable[first : first + len(part)]):
                mask = (masks[channel] & within if clip else masks[channel]).view(np.uint8)
                _, labels = cv2.connectedComponents(mask, connectivity=8)
                met = np.setdiff1d(labels[within], 0)
                outlines, _ = cv2.findContours(mask, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
                # The points of an outline, a hole's too, are pixels of the component that it bounds.
                owners = [labels[y, x] for x, y in (outline[0, 0] for outline in outlines)]
                counts[film, first + channel] = np.isin(owners, met).sum()
    return -1


@compiled
def _running(pieces, film, batch, height, width):
    """int32 (B, height, width + 1): how many covered pixels of a row lie left of each column; a run meets the boxes
    where it grows."""
    inside = np.zeros((batch, height, width + 1), np.int32)
    for k in range(len(pieces)):
        for y in range(pieces[k, 1], pieces[k, 3]):
            for x in range(pieces[k, 0], pieces[k, 2]):
                inside[film[k], y, x + 1] = 1
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                inside[b, y, x + 1] += inside[b, y, x]
    return inside


@compiled
def _components(n_runs, row, start, end, touches, parent, reach):
    """Components among runs sorted by row and column that hold a run which touches a box; ``touches`` and ``parent``
    are overwritten."""
    if n_runs == 1:
        return int(touches[0])
    first = 0
    for r in range(n_runs):
        parent[r] = r
        above = row[r] - 1
        while first < r and (row[first] < above or (row[first] == above and end[first] + reach <= start[r])):
            first += 1
        other = first
        while other < r and row[other] == above and start[other] < end[r] + reach:
            a = other
            while parent[a] != a:
                parent[a] = parent[parent[a]]
                a = parent[a]
            b = r
            while parent[b] != b:
                parent[b] = parent[parent[b]]
                b = parent[b]
            if a != b:
                a, b = min(a, b), max(a, b)
                parent[b] = a
                touches[a] |= touches[b]
            other += 1
    total = 0
    for r in range(n_runs):
        total += parent[r] == r and touches[r]
    return total


@compiled
def _add_run(n_runs, row, start, end, touches, y, begin, stop, inside, clip):
    """Append pixels [begin, stop) of row ``y`` to the runs, cut to the boxes with ``clip``; ``inside`` as from
    `_running`."""
    if not clip:
        row[n_runs] = y
        start[n_runs] = begin
        end[n_runs] = stop
        touches[n_runs] = inside[stop] > inside[begin]
        return n_runs + 1
    x = begin
    while x < stop:
        if inside[x + 1] == inside[x]:
            x += 1
            continue
        row[n_runs] = y
        start[n_runs] = x
        touches[n_runs] = True
        while x < stop and inside[x + 1] > inside[x]:
            x += 1
        end[n_runs] = x
        n_runs += 1
    return n_runs


@compiled
def _at_least(values, level, flags, words, index):
    """Positions of the values not below ``level`` (NaN is found too); returns how many. ``words`` is ``flags`` read
    eight at a time."""
    n = len(values)
    for i in range(n):
        flags[i] = not (values[i] < level)
    found = 0
    for word in range(len(words)):
        if words[word]:
            for i in range(8 * word, 8 * word + 8):
                index[found] = i
                found += flags[i]
    return found


@compiled
def _count_native(values, width, tau, usable, inside, reach, clip, counts):
    """Fill ``counts``; return -1, or film * channels + channel of the first map with a value that is not finite."""
    batch, channels, n = values.shape
    row, start, end, parent = np.empty((4, n // width * (width // 2 + 1)), np.int32)
    touches = np.empty(len(row), np.bool_)
    flags = np.zeros(-(-n // 8) * 8, np.uint8)
    words = flags.view(np.uint64)
    index = np.empty(len(flags) + 8, np.int32)
    for film in range(batch):
        if inside[film, :, -1].max() == 0:
            continue
        for channel in range(channels):
            if not usable[channel]:
                continue
            found = _at_least(values[film, channel], tau[channel], flags, words, index)
            if found == 0:
                continue
            n_runs, k = 0, 0
            while k < found:
                first = index[k]
                y = first // width
                length = 0
                while k < found and index[k] == first + length and index[k] < (y + 1) * width:
                    if not np.isfinite(values[film, channel, index[k]]):
                        return film * channels + channel
                    k += 1
                    length += 1
                begin = first - y * width
                n_runs = _add_run(n_runs, row, start, end, touches, y, begin, begin + length, inside[film, y], clip)
            counts[film, channel] = _components(n_runs, row, start, end, touches, parent, reach)
    return -1


@compiled
def _count_image(
    values, tau, level, usable, inside, reach, clip, y_low, y_high, y_start, x_low, x_high, x_start, counts
):
    """As `_count_native`, on the enlarged maps.

    A cell is the square between four native points; its pixels are interpolated from these alone. A cell without a
    point at ``level`` (just below tau) is skipped. Along a row of a cell the map is a straight line, so its two ends
    tell where it crosses tau.
    """
    batch, channels, height, width = values.shape
    size = inside.shape[1]
    n = height * width
    row, start, end, parent = np.empty((4, size * (size // 2 + 1)), np.int32)
    touches = np.empty(len(row), np.bool_)
    flags = np.zeros(-(-n // 8) * 8, np.uint8)
    words = flags.view(np.uint64)
    index = np.empty(len(flags) + 8, np.int32)
    active = np.zeros((height, width), np.bool_)
    row_active = np.zeros(height, np.bool_)
    top, bottom = np.empty((2, size), np.float32)
    cells = np.empty(width, np.int64)
    slack = np.empty(width, np.float32)
    for film in range(batch):
        if inside[film, :, -1].max() == 0:
            continue
        for channel in range(channels):
            if not usable[channel]:
                continue
            a = values[film, channel]
            threshold, floor = tau[channel], level[channel]
            flat = a.reshape(n)
            found = _at_least(flat, floor, flags, words, index)
            if found == 0:
                continue
            for k in range(found):
                if not np.isfinite(flat[index[k]]):
                    return film * channels + channel
                y = index[k] // width
                x = index[k] - y * width
                for up in range(max(y - 1, 0), y + 1):
                    row_active[up] = True
                    for left in range(max(x - 1, 0), x + 1):
                        active[up, left] = True
            n_runs = 0
            for y in range(height):
                if not row_active[y]:
                    continue
                row_active[y] = False
                below = min(y + 1, height - 1)
                n_cells = 0
                for x in range(width):
                    if not active[y, x]:
                        continue
                    active[y, x] = False
                    if x_start[x] == x_start[x + 1]:
                        continue
                    beside = min(x + 1, width - 1)
                    tl, tr, bl, br = a[y, x], a[y, beside], a[below, x], a[below, beside]
                    for i in range(x_start[x], x_start[x + 1]):
                        top[i] = fma(tl, x_low[i], tr * x_high[i])
                        bottom[i] = fma(bl, x_low[i], br * x_high[i])
                    cells[n_cells] = x
                    # Where the step from pixel to pixel exceeds what rounding can move, a row of the cell rises or
                    # falls strictly.
                    largest = max(abs(tl), abs(tr), abs(bl), abs(br))
                    slack[n_cells] = np.float32(1e-6 * (x_start[x + 1] - x_start[x])) * max(largest, np.float32(1e-30))
                    n_cells += 1
                for j in range(y_start[y], y_start[y + 1]):
                    up, down = y_low[j], y_high[j]
                    begin, stop = -1, -1
                    for k in range(n_cells):
                        first, last = x_start[cells[k]], x_start[cells[k] + 1] - 1
                        low = fma(top[first], up, bottom[first] * down)
                        high = fma(top[last], up, bottom[last] * down)
                        if slack[k] < abs(high - low) < np.inf:
                            if low < threshold and high < threshold:
                                continue
                            i, until = first, last + 1
                            if low < threshold:  # rises: from the crossing of the line step to the first pixel at tau
                                i = first + int((last - first) * ((threshold - low) / (high - low)))
                                while fma(top[i], up, bottom[i] * down) >= threshold:
                                    i -= 1
                                while fma(top[i], up, bottom[i] * down) < threshold:
                                    i += 1
                            elif high < threshold:  # falls
                                until = first + int((last - first) * ((threshold - low) / (high - low)))
                                while fma(top[until], up, bottom[until] * down) < threshold:
                                    until -= 1
                                while fma(top[until], up, bottom[until] * down) >= threshold:
                                    until += 1
                            if i != stop:
                                if begin >= 0:
                                    n_runs = _add_run(
                                        n_runs, row, start, end, touches, j, begin, stop, inside[film, j], clip
                                    )
                                begin = i
                            stop = until
                            continue
                        for i in range(first, last + 1):
                            if fma(top[i], up, bottom[i] * down) >= threshold:
                                if i != stop:
                                    if begin >= 0:
                                        n_runs = _add_run(
                                            n_runs, row, start, end, touches, j, begin, stop, inside[film, j], clip
                                        )
                                    begin = i
                                stop = i + 1
                    if begin >= 0:
                        n_runs = _add_run(n_runs, row, start, end, touches, j, begin, stop, inside[film, j], clip)
            counts[film, channel] = _components(n_runs, row, start, end, touches, parent, reach)
    return -1


def float32_maps(maps: Tensor) -> Tensor:
    """The maps of a layer (B, F, h, w), contiguous on the CPU; ValueError unless they are float32."""
    maps = torch.as_tensor(maps)
    if maps.ndim != 4 or maps.dtype != torch.float32:
        given = f"{maps.dtype} {tuple(maps.shape)}"
        raise ValueError(f"maps must be float32 (B, F, h, w), got {given}; counts need full precision features")
    return maps.detach().cpu().contiguous()
