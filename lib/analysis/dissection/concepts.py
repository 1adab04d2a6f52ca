"""Pathology-related concepts of single channels (Khakzar et al., sections 3.2 and 4, after Bau et al.).

Three steps over the annotated films: the threshold of each channel over the whole set (`quantile.StreamingQuantile`),
the connected components of the thresholded maps that meet a box (`components.count_concepts`), and their totals per
film (`concept_totals`).
"""

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from lib.analysis.dissection.components import count_concepts
from lib.analysis.dissection.quantile import StreamingQuantile, Thresholds, batch_thresholds
from lib.analysis.inference import Output, layer_maps


@dataclass(frozen=True)
class Dissection:
    """`rows` (N,) of the films, `counts` int32 (N, F): components of film n in channel c that touch a box; `thresholds`
    of the channels."""

    rows: np.ndarray
    counts: np.ndarray
    thresholds: Thresholds


def dissect(
    outputs: Iterable[Output],
    boxes: Mapping[int, np.ndarray],
    *,
    layer: str,
    q: float,
    image_size: int,
    resolution: str = "image",
    connectivity: int = 8,
    rounding: str = "outward",
    reading: str = "paper",
) -> Dissection:
    """Concepts of every channel on the annotated films (Khakzar et al., sections 3.2 and 4), from one pass over the
    outputs.

    The thresholds need all films before the first component can be counted. So the maps wait in an unnamed scratch
    file, which goes with the process, and are read back a few films at a time: memory holds one batch, and the largest
    q of the values.

    Parameters
    ----------
    outputs : iterable of Output
        Of the annotated films only, with float32 maps of `layer`. Films without an entry in `boxes` are passed over.
    boxes : mapping of film row to array (K, 4)
        Boxes of every class in pixels of the films that the model sees.
    layer : str
    q : float
        P(A >= tau) = q over all annotated films, per channel.
    image_size, resolution, connectivity, rounding
        See `components.count_concepts`.
    reading : {'paper', 'imba'}
        'imba' counts as the authors' code does, for parity: thresholds of each batch's upsampled maps, masks cut by the
        boxes before their contours, holes among them, are counted, dead channels included. The result then depends on
        the batch size.

    Raises
    ------
    ValueError
        No annotated film, or maps that are not finite.
    OSError
        No space for the scratch file.
    """
    if not boxes:
        raise ValueError(
            "no annotated film: the release has no boxes on the chosen films (see BBox_List_2017.csv and `annotated`)"
        )
    if reading not in ("paper", "imba"):
        raise ValueError(f"reading is {reading!r}: 'paper' or 'imba'")
    imba = reading == "imba"
    enlarge_to = image_size if imba else None
    quantile, rows, counts = StreamingQuantile(q, len(boxes), layer, enlarge_to), [], []

    options = {"resolution": resolution, "connectivity": connectivity, "rounding": rounding}
    options |= {"clip": imba, "counting": "contours" if imba else "components"}

    def count(maps: torch.Tensor, films: list[int], limits: Thresholds) -> np.ndarray:
        usable, own = None if imba else limits.usable, [boxes[row] for row in films]
        return count_concepts(maps, limits.tau, own, image_size, usable=usable, **options)

    with tempfile.TemporaryFile() as scratch:
        shape = None
        for output in outputs:
            kept = [position for position, row in enumerate(np.asarray(output.rows).tolist()) if row in boxes]
            if not kept:
                continue
            maps = layer_maps(output, layer)[kept].float().cpu().contiguous()
            shape = maps.shape[1:]
            quantile.update(maps)
            films = np.asarray(output.rows)[kept].tolist()
            rows += films
            if imba:
                counts.append(count(maps, films, batch_thresholds(maps, q, layer, enlarge_to)))
            else:
                maps.numpy().tofile(scratch)
        thresholds = quantile.result()
        scratch.seek(0)
        size, few = int(np.prod(shape)), 16
        for start in range(0, 0 if imba else len(rows), few):
            films = rows[start : start + few]
            maps = torch.from_numpy(np.fromfile(scratch, np.float32, len(films) * size).reshape(len(films), *shape))
            counts.append(count(maps, films, thresholds))
    return Dissection(np.array(rows), np.concatenate(counts), thresholds)


def concept_records(dissection: Dissection, films: pd.DataFrame, pairs: pd.DataFrame | None = None) -> pd.DataFrame:
    """image, patient, disjoint, unique: a row per annotated film, or with `pairs` (of `box_pairs`) one per pair, its
    class too."""
    chosen = films.loc[dissection.rows, ["image", "patient"]].reset_index(drop=True)
    records = pd.concat([chosen, concept_totals(dissection.counts)], axis=1)
    return records if pairs is None else records.merge(pairs[["image", "class"]], on="image")


def concept_totals(counts: np.ndarray) -> pd.DataFrame:
    """Per film: ``disjoint``, the concepts of all channels, and ``unique``, the channels with at least one; from counts
    (B, F)."""
    counts = np.asarray(counts)
    return pd.DataFrame({"disjoint": counts.sum(axis=1), "unique": (counts > 0).sum(axis=1)})
