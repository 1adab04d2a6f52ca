"""Thresholds by sorting and components by flood fill, from the definitions, one map at a time; and the maps and boxes
to try them on."""

import math

import numpy as np
import torch
import torch.nn.functional as F

BOXES = [
    [(10.3, 20.2, 60.7, 80.1)],
    [(5, 5, 30, 30), (20, 20, 70, 50.5)],
    [],
    [(-10, -10, 106, 20), (90, 90, 200, 200)],
    [(40, 40, 40, 60)],
]


def features(shape, seed=0, sparse=True):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(shape, generator=generator)
    smooth = F.avg_pool2d(noise, 3, 1, 1) + 0.2 * noise
    return smooth.relu() if sparse else smooth


def channels(maps):
    return maps.transpose(0, 1).flatten(1)


def quantile(values, q):
    """(1 - q)-quantile of a flat array, linear between order statistics, in float64, then rounded to float32."""
    ordered = np.sort(np.asarray(values, dtype=np.float64).ravel())
    rank = (len(ordered) - 1) * (1 - q)
    lower = math.floor(rank)
    upper = min(lower + 1, len(ordered) - 1)
    return np.float32(ordered[lower] + (ordered[upper] - ordered[lower]) * (rank - lower))


def quantiles(maps, q):
    """Of each channel of maps (B, F, h, w), float32 (F,)."""
    return np.array([quantile(channel, q) for channel in channels(maps).numpy()])


def enlarged(maps, size):
    """float32 (B, F, h, w) as torch enlarges it: its kernel for contiguous maps, which it takes for every large
    output."""
    return F.interpolate(maps.contiguous(), size=(size, size), mode="bilinear", align_corners=False)


def box_cells(boxes, size, height, width):
    """Cells of which a touched pixel of a box covers a part."""
    cells = np.zeros((height, width), dtype=bool)
    for x1, y1, x2, y2 in boxes:
        if x2 <= x1 or y2 <= y1:
            continue
        for py in range(max(math.floor(y1), 0), min(math.ceil(y2), size)):
            for px in range(max(math.floor(x1), 0), min(math.ceil(x2), size)):
                for y in range(height):
                    for x in range(width):
                        if (
                            y * size < (py + 1) * height
                            and (y + 1) * size > py * height
                            and x * size < (px + 1) * width
                            and (x + 1) * size > px * width
                        ):
                            cells[y, x] = True
    return cells


def concepts(mask, boxes, connectivity=8, clip=False, counting="components"):
    """Components of `mask` with a pixel in `boxes` (both boolean, same shape); 'contours' adds the holes of each."""
    if clip:
        mask = mask & boxes
    boxed = set(map(tuple, np.argwhere(boxes).tolist()))
    met = [
        pixels
        for pixels in flooded(map(tuple, np.argwhere(mask).tolist()), connectivity)
        if not boxed.isdisjoint(pixels)
    ]
    return len(met) if counting == "components" else sum(1 + holes(pixels, *mask.shape) for pixels in met)


def flooded(unseen, connectivity):
    """The connected parts of a set of pixels."""
    steps = [(-1, 0), (1, 0), (0, -1), (0, 1)] + ([(-1, -1), (-1, 1), (1, -1), (1, 1)] if connectivity == 8 else [])
    unseen, parts = set(unseen), []
    while unseen:
        stack = [unseen.pop()]
        parts.append(set(stack))
        while stack:
            y, x = stack.pop()
            for dy, dx in steps:
                if (y + dy, x + dx) in unseen:
                    unseen.remove((y + dy, x + dx))
                    parts[-1].add((y + dy, x + dx))
                    stack.append((y + dy, x + dx))
    return parts


def holes(pixels, height, width):
    """Parts of the plane that an 8-connected component shuts off; it cannot shut off what the margin around the map
    joins."""
    plane = {(y, x) for y in range(-1, height + 1) for x in range(-1, width + 1)}
    return len(flooded(plane - pixels, 4)) - 1


def count(maps, tau, masks, size, resolution, connectivity=8, clip=False, counting="components"):
    """(B, F) counts; `masks` are boolean box masks at the resolution."""
    values = (enlarged(maps, size) if resolution == "image" else maps) >= torch.as_tensor(tau)[None, :, None, None]
    return np.array(
        [
            [concepts(mask.numpy(), masks[b], connectivity, clip, counting) for mask in film]
            for b, film in enumerate(values)
        ]
    )
