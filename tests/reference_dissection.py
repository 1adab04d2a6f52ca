"""Thresholds by sorting and components by flood fill, from the definitions; one map at a time."""
import math

import numpy as np
import torch
import torch.nn.functional as F


def quantile(values, q):
    """(1 - q)-quantile of a flat array, linear between order statistics, in float64, then rounded to float32."""
    ordered = np.sort(np.asarray(values, dtype=np.float64).ravel())
    rank = (len(ordered) - 1) * (1 - q)
    lower = math.floor(rank)
    upper = min(lower + 1, len(ordered) - 1)
    return np.float32(ordered[lower] + (ordered[upper] - ordered[lower]) * (rank - lower))


def enlarged(maps, size):
    """float32 (B, F, h, w) as torch enlarges it: its kernel for contiguous maps, which it takes for every large output."""
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
                        if y * size < (py + 1) * height and (y + 1) * size > py * height and x * size < (px + 1) * width \
                                and (x + 1) * size > px * width:
                            cells[y, x] = True
    return cells


def concepts(mask, boxes, connectivity=8, clip=False):
    """Components of `mask` with a pixel in `boxes` (both boolean, same shape)."""
    if clip:
        mask = mask & boxes
    steps = [(-1, 0), (1, 0), (0, -1), (0, 1)] + ([(-1, -1), (-1, 1), (1, -1), (1, 1)] if connectivity == 8 else [])
    unseen, found = {tuple(p) for p in np.argwhere(mask)}, 0
    while unseen:
        stack, touches = [unseen.pop()], False
        while stack:
            y, x = stack.pop()
            touches |= bool(boxes[y, x])
            for dy, dx in steps:
                if (y + dy, x + dx) in unseen:
                    unseen.remove((y + dy, x + dx))
                    stack.append((y + dy, x + dx))
        found += touches
    return found


def count(maps, tau, masks, size, resolution, connectivity=8, clip=False):
    """(B, F) counts; `masks` are boolean box masks at the resolution."""
    values = (enlarged(maps, size) if resolution == "image" else maps) >= torch.as_tensor(tau)[None, :, None, None]
    return np.array([[concepts(mask.numpy(), masks[b], connectivity, clip) for mask in film] for b, film in enumerate(values)])
