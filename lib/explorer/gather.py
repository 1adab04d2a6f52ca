"""What the page holds: every trained run's maps of the boxed films with their scores, its channels, and the matrices of
notebook 09, as plain values.

One forward pass a run, and nothing is read but weights, films and 09's tables: a map and the scores under it cannot be
of two trainings.
"""

import base64
from collections.abc import Iterable, Iterator

import cv2
import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from lib.analysis import cam, changes
from lib.analysis.alignment import pooled_maps
from lib.analysis.comparison import BASELINE
from lib.analysis.dissection.concepts import Dissection, concept_totals, dissect
from lib.analysis.features.survey import evenly
from lib.analysis.inference import Output, layer_maps
from lib.analysis.localization import METRICS, pixel_boxes, soft_overlap
from lib.data.release import film_boxes
from lib.figures.style import BOX, FILM_GREY, HEAT, YELLOW, loss_styles
from lib.records import read_table
from lib.runs import OpenStudy, Subject
from lib.state import is_trained, require_trained
from lib.tables.names import display

SIDE = 256  # of the films' pictures, pixels
CHANNELS, FILMS = 3, 5  # a finding's channels, and the films of each
MATRIX = ("iobb", "ior", "iobb_minmax", "hit", "auprc", "empty")  # of 09's records, behind those of its predictions


def gather(data: OpenStudy, *, films: bool, most: int) -> dict:
    """Everything that the page of a study shows, as values that JSON has; NaN is None.

    Parameters
    ----------
    data : OpenStudy
        Its trained runs are taken, each with every seed; the others are left out.
    films : bool
        Whether the pixels of real films go in; those of simulated ones always do.
    most : int
        Films with boxes, at least 1; of more, as many are taken, evenly spread over the release's order.

    Returns
    -------
    dict
        study, data, size (side of the films that the models see, pixels), pixels (whether they are in), n_boxed, films
        (with their boxes in shares of the side), groups (a task, backbone and seed: its pairs, its runs, a run a loss,
        and 09's matrix where it ran), and the names and colours that the figures use. Maps are as in `packed`.

    Raises
    ------
    TrainingError
        No run of the study is trained.
    ReleaseError
        No film that is analysed has a box.
    """
    runs = [run for run in data.study.every_run if is_trained(run)]
    if not runs:
        require_trained(data.study.every_run[0])
    subjects, groups = [data.subject(run) for run in runs], {}
    boxed = np.unique(np.concatenate([subject.pairs["row"] for subject in subjects]))
    shown = evenly(boxed, most)
    for subject in tqdm(subjects, "explore", unit="run", leave=False):
        run, pairs = subject.run, subject.pairs[subject.pairs["row"].isin(shown)].reset_index(drop=True)
        if not len(pairs):
            continue  # of few films, some may have boxes for another task alone
        named = {"task": run.task, "backbone": run.backbone, "seed": run.seed}
        own = named | {"pairs": _pairs(subject, pairs, shown), "runs": [], "matrix": None}
        group = groups.setdefault(tuple(named.values()), own)
        group["runs"].append({"loss": run.loss} | _run(subject, pairs, shown))
        if run.loss == BASELINE and subject.path("trunk_head.parquet").is_file():
            group["matrix"] = _matrix(subject)
    styles = loss_styles(list(dict.fromkeys(run.loss for run in runs)))
    names = dict.fromkeys(name for run in runs for name in (run.task, run.backbone))
    return {
        **{"study": data.study.study, "data": data.label, "size": data.study.image_size, "n_boxed": len(boxed)},
        **{"pixels": films or data.exact, "films": _films(subjects[0], shown, films or data.exact)},
        **{"groups": list(groups.values()), "baseline": BASELINE, "names": {name: display(name) for name in names}},
        "losses": {name: {"label": display(name), "color": style["color"]} for name, style in styles.items()},
        "colors": {"box": BOX, "region": YELLOW, "ground": FILM_GREY},
        "heat": _base64(np.round(255 * HEAT(np.linspace(0, 1, 256)) / [1, 1, 1, HEAT(1.0)[3]]), np.uint8),
    }


def packed(maps: Tensor) -> dict:
    """Maps (..., h, w) in [0, 1], in 16 bits: grid, [h, w], and cells, base64 of little-endian unsigned integers in C
    order, 65,535 for 1."""
    return {"grid": list(maps.shape[-2:]), "cells": _base64(np.round(65535 * maps.double().numpy()), "<u2")}


def _base64(values: np.ndarray, dtype: str | type) -> str:
    return base64.b64encode(values.astype(dtype).tobytes()).decode()


def _plain(values: Iterable) -> list:
    """Nested lists of numbers to six digits, None for NaN."""
    listed = np.asarray(values).tolist()
    return [_plain(v) if isinstance(v, list) else None if v != v else float(f"{v:.6g}") for v in listed]


def _films(subject: Subject, shown: np.ndarray, pixels: bool) -> list[dict]:
    films = {name: {"image": name, "boxes": []} for name in subject.films.loc[shown, "image"]}
    boxes = film_boxes(subject.release.boxes, 1)
    for name, kind, *corners in boxes[boxes["image"].isin(films)].itertuples(index=False):
        films[name]["boxes"].append([kind, *_plain(corners)])
    for film, image in zip(films.values(), subject.images(shown, SIDE) if pixels else ()):
        encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 85])[1]
        film["pixels"] = "data:image/jpeg;base64," + _base64(encoded, np.uint8)
    return list(films.values())


def _pairs(subject: Subject, pairs: pd.DataFrame, shown: np.ndarray) -> list[dict]:
    """film, class, and whole, the boxes in whole pixels as the scores count them."""
    place, run = pd.Index(shown).get_indexer(pairs["row"]).tolist(), subject.run
    listed = [{"film": film, "class": name, "whole": []} for film, name in zip(place, pairs["class"])]
    whole, owners = pixel_boxes(list(pairs["boxes"]), run.image_size, rounding=run.box_rounding)
    for box, owner in zip(whole.tolist(), owners):
        listed[owner]["whole"].append(box)
    return listed


def _run(subject: Subject, pairs: pd.DataFrame, shown: np.ndarray) -> dict:
    run, (layer, q), rows, seen = subject.run, subject.dissection, subject.regions["row"].to_numpy(), []
    options = {"resolution": run.concept_resolution, "connectivity": run.connectivity, "reading": run.concept_reading}
    options |= {"layer": layer, "q": q, "image_size": run.image_size, "rounding": run.box_rounding}
    dissection = dissect(_watched(subject, rows, seen), dict(zip(rows, subject.regions["boxes"])), **options)
    cams, peaks, logits = (torch.cat(parts) for parts in zip(*seen))
    at, outputs = pd.Index(rows).get_indexer(pairs["row"]), pairs["output"].tolist()
    raw = cams[at, outputs]
    maps = cam.normalise(raw)
    scores = soft_overlap(maps, list(pairs["boxes"]), run.image_size, rounding=run.box_rounding)
    scores["p"] = torch.sigmoid(logits.double()[at, outputs]).numpy()
    # What was the floor and what the top of the rectified map: with these the losses share one scale.
    low, high = (_plain(edge) for edge in raw.clamp(min=0).flatten(1).aminmax(dim=1))
    return {
        **packed(maps),
        **{name: _plain(scores[name]) for name in (*METRICS, "p")},
        **{"low": low, "high": high, "channels": _channels(subject, dissection, peaks.numpy(), shown)},
    }


def _watched(subject: Subject, rows: np.ndarray, seen: list) -> Iterator[Output]:
    """The outputs that a dissection reads; meanwhile `seen` takes the maps of every class, each channel's peak and the
    logits, batch by batch."""
    layer, head = subject.dissection[0], subject.model.head
    for output in subject.outputs(rows, *{subject.layer, layer}):
        pooled = pooled_maps(output, subject.layer, head)
        cams = cam.class_activation_maps(pooled, head.weight, subject.run.cam_method)
        seen.append((cams.cpu(), layer_maps(output, layer).amax((2, 3)).cpu(), output.logits.cpu()))
        yield output


def _channels(subject: Subject, dissection: Dissection, peaks: np.ndarray, shown: np.ndarray) -> dict:
    """The channels that hold a concept more often on films with boxes of a finding than on the others (for 'all'
    findings: most often), and the shown films on which each peaks highest."""
    (layer, _), rows, holds = subject.dissection, dissection.rows, dissection.counts > 0
    boxes, images, findings = subject.release.boxes, subject.films.loc[rows, "image"], []
    kinds = (pd.crosstab(boxes["image"], boxes["class"]) > 0).loc[images].assign(all=True)
    for name in ["all", *kinds.columns[:-1]]:
        own = kinds[name].to_numpy()
        inside, outside, n, rest = holds[own].sum(0), holds[~own].sum(0), int(own.sum()), int((~own).sum())
        if not n or not rest and name != "all":
            continue
        first = np.argsort(outside / max(1, rest) - inside / n, kind="stable")[:CHANNELS]
        shares = {"inside": inside[first].tolist(), "n": n, "outside": outside[first].tolist(), "rest": rest}
        findings.append({"name": name, "channels": first.tolist()} | shares)
    ids, at = np.unique([finding["channels"] for finding in findings]), pd.Index(rows).get_indexer(shown)
    tops = np.argsort(-peaks[at][:, ids], axis=0, kind="stable")[:FILMS].T
    needed, where = np.unique(shown[tops], return_inverse=True)
    maps = torch.cat([layer_maps(o, layer)[:, ids].cpu() for o in subject.outputs(needed, layer, batch_size=8)])
    maps = maps[where.reshape(tops.shape), np.arange(len(ids))[:, None]]
    low, high = (edge.double().numpy() for edge in maps.flatten(2).aminmax(dim=2))
    levels = (dissection.thresholds.tau[ids, None] - low) / np.maximum(high - low, 1e-30)
    return {
        **packed(cam.normalise(maps, rectify=False)),
        **{"layer": layer, "findings": findings, "ids": ids.tolist(), "films": tops.tolist(), "levels": _plain(levels)},
        "counts": dissection.counts[at[tops], ids[:, None]].tolist(),
        "totals": concept_totals(dissection.counts[at]).to_numpy().tolist(),
    }


def _matrix(subject: Subject) -> dict:
    tables = [read_table(subject.path(f"trunk_head{part}.parquet")) for part in ("", "_predictions")]
    table = changes.pair_means(*tables, MATRIX)
    metrics = [{"label": display(name), "values": _plain(part)} for name, part in table.groupby("metric", sort=False)]
    trunks = table.index.unique("trunk")
    return {"trunks": list(map(display, trunks)), "heads": list(map(display, table.columns)), "metrics": metrics}
