"""Overlap with boxes from the definition: the map is resampled pixel by pixel, the union of the boxes is drawn, and
both are summed."""

import math

import numpy as np


def resized(native, size):
    """Bilinear, pixel centres at halves, float64, one pixel at a time."""
    height, width = native.shape
    out = np.zeros((size, size))
    for y in range(size):
        v = min(max((y + 0.5) * height / size - 0.5, 0.0), height - 1)
        y0 = int(v)
        y1 = min(y0 + 1, height - 1)
        for x in range(size):
            u = min(max((x + 0.5) * width / size - 0.5, 0.0), width - 1)
            x0 = int(u)
            x1 = min(x0 + 1, width - 1)
            top = native[y0, x0] * (1 - (u - x0)) + native[y0, x1] * (u - x0)
            bottom = native[y1, x0] * (1 - (u - x0)) + native[y1, x1] * (u - x0)
            out[y, x] = top * (1 - (v - y0)) + bottom * (v - y0)
    return out


def drawn(boxes, size, rounding="outward"):
    """Union mask: a pixel belongs to a box that it touches ('outward')."""
    mask = np.zeros((size, size), dtype=bool)
    for x1, y1, x2, y2 in boxes:
        if x2 <= x1 or y2 <= y1:
            continue
        if rounding == "trunc":
            x1, y1, x2, y2 = (int(min(max(v, 0), size)) for v in (x1, y1, x2, y2))
        for y in range(size):
            for x in range(size):
                if y + 1 > y1 and y < y2 and x + 1 > x1 and x < x2:
                    mask[y, x] = True
    return mask


def overlap(native, boxes, size, rounding="outward", threshold=None):
    """(iobb, ior, iou, box_area, cam_mass) of one pair."""
    cam, mask = resized(np.asarray(native, dtype=np.float64), size), drawn(boxes, size, rounding)
    if threshold is not None:
        cam = (cam >= threshold).astype(np.float64)
    inside, box, mass = (cam * mask).sum(), float(mask.sum()), cam.sum()
    iobb = inside / box if box else math.nan
    ior = inside / mass if mass and box else math.nan
    iou = inside / (box + mass - inside) if box else math.nan
    return iobb, ior, iou, box / size**2, mass / size**2


def hard_ious(unit_map, boxes, threshold, rounding="outward", inclusive=True):
    """(lesion, background, mean of both) of one map at film size, pixel by pixel; a union without a pixel gives NaN."""
    size = len(unit_map)
    mask = drawn(boxes, size, rounding)
    both = either = neither = 0
    for y in range(size):
        for x in range(size):
            value = unit_map[y][x]
            marked = value > threshold or (inclusive and value == threshold)
            both += marked and mask[y][x]
            either += marked or mask[y][x]
            neither += not marked and not mask[y][x]
    lesion = both / either if either else math.nan
    background = neither / (size * size - both) if size * size > both else math.nan
    return lesion, background, (lesion + background) / 2
