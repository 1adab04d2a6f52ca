"""The laboratory: what is measured of every run of a study and its companions, where doses are known and films can be
had without their lesions. What was measured is kept in the run's folder."""

import hashlib
import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from lib import records
from lib.analysis.alignment import align
from lib.analysis.dissection.causal import Readings, causal_summary, channel_readings
from lib.analysis.dissection.concepts import Dissection, concept_totals, dissect
from lib.analysis.inference import LensError, predict, stream
from lib.analysis.localization import box_mask
from lib.analysis.metrics import classification_metrics
from lib.data.batches import evaluation_batches
from lib.data.decoding import decode_film
from lib.data.phantom.films import film_without
from lib.data.release import NO_FINDING
from lib.params import Analysis, Run, load_study
from lib.runs import OpenStudy, Subject
from lib.state import require_trained

RANKED, PLACED = (
    ("auroc", "ap", "mean_probability"),
    ("iobb", "ior_zero", "empty", "iobb_minmax", "ior_minmax", "hit", "auprc"),
)


def doses(data: OpenStudy) -> list[OpenStudy]:
    """A study and its companions, opened, in the order of its file; the study alone where other runs are asked for than
    its file names."""
    given = {key: getattr(data.study, key) for key in data.changed - {"study"}}
    others = [] if "runs" in given else [load_study(name, **given) for name in data.study.companions]
    return [data, *(OpenStudy(study, changed=data.changed) for study in others)]


def dose_of(data: OpenStudy) -> dict[str, object]:
    """What a study gives its training: study, prevalence (the share of findings that is left), noise (whether labels
    are wrong), and of the true labels of the training films positives, the median count over the findings, and
    ratio, the median of films without over films with."""
    labels = data.release.targets[data.rows("train")]
    counts = np.delete(labels, data.release.classes.index(NO_FINDING), axis=1).sum(axis=0, dtype=np.int64)
    given = {"study": data.study.study, "prevalence": data.study.phantom_prevalence, "noise": data.study.label_noise}
    ratio = np.median((len(labels) - counts) / np.maximum(counts, 1))
    return given | {"films": len(labels), "positives": np.median(counts), "ratio": ratio}


def lesion_pairs(subject: Subject) -> tuple[pd.DataFrame, list[np.ndarray], np.ndarray]:
    """The pairs (film, finding) with boxes whose film can be had without the finding, all else equal to the pixel, and
    in whose boxes no other lesion has a pixel, so that nothing is left there to be seen.

    Returns
    -------
    pairs : DataFrame
        Those rows of `subject.pairs`.
    lesions : list of P arrays, bool (S, S)
    without : uint8 (P, size, size)
        The films without their lesion, as the store would hold them.

    Raises
    ------
    LensError
        There is no such pair.
    """
    root, films, size = subject.run.release_folder, subject.films, subject.store.size
    kept, lesions, without = [], [], []
    truth = subject.data.truth("lesions", subject.pairs["row"])
    for (index, pair), masks in zip(subject.pairs.iterrows(), truth, strict=True):
        lesion = masks.pop(pair["class"])
        inside = box_mask(pair["boxes"] * len(lesion) / subject.run.image_size, len(lesion))
        film, alone = film_without(root, films, pair["row"], pair["class"])
        if alone and not any((mask & inside).any() for mask in masks.values()):
            kept.append(index)
            lesions.append(lesion)
            without.append(decode_film(cv2.imencode(".png", film)[1].tobytes(), size))
    if not kept:
        raise LensError("no lesion of a test film can be taken out by itself: raise phantom_films")
    return subject.pairs.loc[kept].reset_index(drop=True), lesions, np.stack(without)


def dissected(
    subject: Subject, pairs: pd.DataFrame, lesions: list[np.ndarray], without: np.ndarray
) -> tuple[Dissection, Readings, Readings]:
    """The dissection of a run on the annotated films, and its channels on the lesions of `lesion_pairs`: with them, and
    on the same films without."""
    run, (layer, q) = subject.run, subject.dissection
    boxes = dict(zip(subject.regions["row"], subject.regions["boxes"], strict=True))
    options = {"layer": layer, "image_size": run.image_size, "rounding": run.box_rounding}
    options |= {"resolution": run.concept_resolution, "connectivity": run.connectivity}
    dissection = dissect(subject.outputs(list(boxes), layer), boxes, q=q, **options)
    store, targets = replace(subject.store, images=without), subject.targets[pairs["row"]]
    batches = {"image_size": run.image_size, "batch_size": run.batch_size, "device": subject.device}
    films = evaluation_batches(store, np.arange(len(pairs)), targets, **batches)
    present, absent = (
        channel_readings(outputs, lesions, list(pairs["boxes"]), dissection.thresholds, **options)
        for outputs in (subject.outputs(pairs["row"], layer), stream(subject.model, films, [layer]))
    )
    return dissection, present, absent


def measure(subject: Subject, pairs: pd.DataFrame, lesions: list[np.ndarray], without: np.ndarray) -> pd.DataFrame:
    """Everything that is measured of one run, on the true labels of the test films.

    Parameters
    ----------
    subject : Subject
        Trained, or its `untrained`.
    pairs, lesions, without
        Of `lesion_pairs`.

    Returns
    -------
    DataFrame
        metric, value: auroc, ap and mean_probability, averaged over the classes; means over all pairs of the columns
        of `alignment.align`, and ior_zero, in which an empty map has IoR 0, so that runs are compared over the same
        pairs; disjoint and unique, means over the annotated films; and `causal.causal_summary`.
    """
    run, model, layer, rows = subject.run, subject.model, subject.layer, subject.rows("test")
    logits, patients = predict(model, subject.batches(rows)), subject.films.loc[rows, "patient"].to_numpy()
    ranked = classification_metrics(logits, subject.targets[rows], subject.classes, patients, n_replicates=0)
    ranked = ranked.set_index("class").loc["Average", list(RANKED)]
    options = {"layer": layer, "image_size": run.image_size, "method": run.cam_method, "rounding": run.box_rounding}
    aligned = align(subject.outputs(subject.pairs["row"].unique(), layer), subject.pairs, model.head, **options)
    aligned["ior_zero"] = aligned["ior"].where(aligned["empty"] == 0, 0.0)
    dissection, present, absent = dissected(subject, pairs, lesions, without)
    found = [ranked, aligned[list(PLACED)].mean(), concept_totals(dissection.counts).mean()]
    found = pd.concat([*found, pd.Series(causal_summary(present, absent))])
    return found.astype(float).rename_axis("metric").reset_index(name="value")


def measured(subject: Subject, *films) -> pd.DataFrame:
    """`measure` of a trained run, or what is kept of it: laboratory.csv in its folder stands as long as the weights do,
    the options of the lenses, and the code that measures."""
    path = subject.path("laboratory.csv")
    kind = f"{require_trained(subject.run)['weights'][subject.run.weights_path.name]}-{_code(subject.run)}"
    if path.is_file() and (kept := records.read_table(path))["of"].eq(kind).all():
        return kept.drop(columns="of")
    found = measure(subject, *films)
    records.write_table(found.assign(of=kind), path)
    return found


def _code(run: Run) -> str:
    """A digest of all code that measures, and of what it is told."""
    told = json.dumps({key: getattr(run, key) for key in Analysis.model_fields}, sort_keys=True)
    return hashlib.sha256(told.encode() + _modules()).hexdigest()[:16]


@lru_cache(maxsize=1)
def _modules() -> bytes:
    room = Path(__file__).parent
    paths = [Path(__file__), *(room / name for name in ("models.py", "runs.py"))]
    paths += [path for name in ("analysis", "data") for path in (room / name).rglob("*.py")]
    return b"".join(path.read_bytes() for path in sorted(paths))
