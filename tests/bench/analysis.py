"""Speed of the analysis functions against the way it is usually done; each function returns dict(row, peer_name, ours,
peer, ratio).

``ours`` and ``peer`` are rates (units a second) or, for the quantile, seconds; ``ratio`` is above 1 where ours is
better. Both sides run in turns on one thread; processor time counts, the best of the repeats, because other work on the
machine only ever slows a run down.
"""

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from lib.analysis.cam import normalise
from lib.analysis.dissection.components import count_concepts
from lib.analysis.dissection.quantile import StreamingQuantile
from lib.analysis.localization import box_mask, soft_overlap
from tests.bench.timing import best_times, rates, show

IMAGE_SIZE = 224
CHANNELS = {28: 512, 14: 1024, 7: 2048}


def feature_maps(n_films, side, channels, seed=0):
    """Rectified maps with neighbours alike, float32 (B, F, h, w)."""
    noise = torch.randn(n_films, channels, side, side, generator=torch.Generator().manual_seed(seed))
    return (F.avg_pool2d(noise, 3, 1, 1) + 0.1 * noise).relu()


def film_boxes(n_films, seed=0):
    """One or two boxes a film, (B) lists of (x1, y1, x2, y2)."""
    generator = np.random.default_rng(seed)
    boxes = []
    for _ in range(n_films):
        corner = generator.uniform(0, 150, (generator.integers(1, 3), 2))
        boxes.append(np.concatenate([corner, corner + generator.uniform(20, 70, corner.shape)], axis=1))
    return boxes


def components(side, resolution, *, n_films=8, peer_films=1, q=0.01, repeats=3):
    """Concept counts in maps a second; peer: resize (image), threshold, cv2.findContours channel by channel."""
    channels = CHANNELS[side]
    maps, boxes = feature_maps(n_films, side, channels), film_boxes(n_films)
    stream = StreamingQuantile(q, n_films)
    stream.update(maps)
    tau = stream.result().tau

    def ours():
        count_concepts(maps, tau, boxes, IMAGE_SIZE, resolution=resolution)

    def peer():
        level = torch.from_numpy(tau)[:, None, None]
        for film in range(peer_films):
            values = maps[film]
            if resolution == "image":
                values = F.interpolate(
                    values[None], size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False
                )[0]
            masks = (values >= level).numpy().astype(np.uint8)
            for channel in masks:
                cv2.findContours(channel, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)

    time_ours, time_peer = best_times([ours, peer], repeats)
    rate, peer_rate = n_films * channels / time_ours, peer_films * channels / time_peer
    where = "native" if resolution == "native" else f"at {IMAGE_SIZE}"
    return {
        "row": f"components {side}x{side} {where} (maps/s)",
        "peer_name": "threshold + findContours per channel",
        "ours": rate,
        "peer": peer_rate,
        "ratio": rate / peer_rate,
    }


def streaming_quantile(*, n_films=440, channels=128, side=28, q=0.01, batch=16, repeats=2):
    """Seconds for the threshold of each channel; peer: torch.quantile on all maps at once, already laid out by
    channel."""
    maps = feature_maps(n_films, side, channels)
    by_channel = maps.transpose(0, 1).flatten(1).contiguous()

    def ours():
        stream = StreamingQuantile(q, n_films)
        for start in range(0, n_films, batch):
            stream.update(maps[start : start + batch])
        stream.result()

    time_ours, time_peer = best_times([ours, lambda: torch.quantile(by_channel, 1 - q, dim=1)], repeats)
    return {
        "row": f"exact quantile of {n_films} x {channels} x {side * side} (s)",
        "peer_name": "torch.quantile, all maps in memory",
        "ours": time_ours,
        "peer": time_peer,
        "ratio": time_peer / time_ours,
    }


def overlap(side=28, *, n_pairs=984, repeats=3):
    """Soft overlaps in pairs a second, and the largest difference; peer: resize each map to the film, multiply with the
    mask, sum."""
    maps, boxes = normalise(feature_maps(n_pairs, side, 1)[:, 0]), film_boxes(n_pairs)
    found = {}

    def ours():
        found["ours"] = soft_overlap(maps, boxes, IMAGE_SIZE)[["iobb", "ior"]].to_numpy()

    def peer():
        rows = []
        for cam, film in zip(maps, boxes, strict=True):
            full = F.interpolate(cam[None, None], size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False)[
                0, 0
            ]
            mask = torch.from_numpy(box_mask(film, IMAGE_SIZE))
            inside = (full * mask).sum()
            rows.append((float(inside / mask.sum()), float(inside / full.sum())))
        found["peer"] = np.array(rows)

    time_ours, time_peer = best_times([ours, peer], repeats)
    difference = float(np.abs(found["ours"] - found["peer"]).max())
    row = f"soft overlap {side}x{side} (pairs/s)"
    return rates(row, "resize + sum", n_pairs, time_ours, time_peer, largest_difference=difference)


def rows():
    """All rows of this file, about a minute."""
    for resolution in ("native", "image"):
        for side in CHANNELS:
            yield components(side, resolution)
    yield streaming_quantile()
    yield overlap()


if __name__ == "__main__":
    show(rows())
