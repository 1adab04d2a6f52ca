"""The RSNA Pneumonia Detection Challenge release (2018, stage 2) as it lies on disk: DICOM films, boxes, detailed
classes."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from lib.data import reading
from lib.data.release import NO_FINDING, PNEUMONIA, Release, ReleaseError, problem_frame

FILMS = "stage_2_train_images"
LABELS = "stage_2_train_labels.csv"
DETAILS = "stage_2_detailed_class_info.csv"
LABEL_COLUMNS = ("patientId", "x", "y", "width", "height", "Target")
DETAIL_COLUMNS = ("patientId", "class")
OPACITY, NORMAL, NEITHER = "Lung Opacity", "Normal", "No Lung Opacity / Not Normal"


def read_rsna(
    root: str | Path,
    *,
    validation_fraction: float,
    seed: int,
    test_fraction: float = 0.1,
    on_missing: Literal["error", "skip"] = "error",
) -> Release:
    """Read and check a release in RSNA layout.

    Expects `stage_2_train_labels.csv`, the films `stage_2_train_images/<patientId>.dcm` and, if there is one,
    `stage_2_detailed_class_info.csv`. Both csv files hold one row a box, so that a patient with three boxes stands
    there three times: rows are gathered by patient before anything is divided. A patient is one film (the DICOM
    header's PatientID is the same id). '.dcm' may be in capitals.

    No film is opened: that takes minutes, and the store opens each anyway. So age is NaN and sex and view are '',
    though the DICOM headers have them.

    The release labels films, not splits. Here `test_fraction` of the patients (Nam & Lee divide 9:1) and then
    `validation_fraction` of the others are drawn, Target 0 and Target 1 apart, by `draw_splits`.

    Parameters
    ----------
    validation_fraction, test_fraction : float in (0, 1)
    seed : int
        Of the draw.
    on_missing : 'error' or 'skip'
        What to do with a patient who has no DICOM file (a link that leads to none counts as missing), or none of the
        detailed classes. 'skip' goes on without that film, or without its detailed class, and notes it in `problems`,
        unless all patients lack it. Films without a row in the labels are always left out and noted.

    Returns
    -------
    Release
        `films` has one column more, `detail`: 'Lung Opacity', 'Normal', 'No Lung Opacity / Not Normal', or '' where it
        is not known. `labels` is 'Pneumonia' for Target 1, 'No Finding' for class Normal, and '' for the films between,
        which are neither; the classes are NIH's. Boxes are of class Pneumonia, in the pixels of the 1024 x 1024 films;
        those that reach past their film are clipped, and noted.

    Raises
    ------
    ReleaseError
        Missing, empty or malformed files, unknown columns, targets or classes, Target 1 without a box or 0 with one, a
        patient with two targets or two classes, boxes without area or outside their film, too few patients to divide.
    """
    fractions = {"validation_fraction": validation_fraction, "test_fraction": test_fraction}
    advice = f"give the folder that holds {LABELS} and {FILMS}/"
    root = reading.open_root(root, advice, on_missing, **fractions)
    problems: list[tuple[str, str, str]] = []

    label_file = reading.find_file(root, LABELS)
    targets, boxes = _read_labels(label_file, problems)
    details = _read_details(root, label_file, targets, on_missing, problems)
    paths = _locate(root, label_file, targets, on_missing, problems)

    kept = [patient for patient in targets if patient in paths]
    is_positive = np.array([targets[patient] for patient in kept], np.int64)
    for target in (0, 1):
        found = np.count_nonzero(is_positive == target)
        if found < 3:
            raise ReleaseError(
                f"{root}: {found} patients have Target {target} and a film; train, val and test need one each: 3 at "
                "least"
            )
    columns = {
        "image": [f"{patient}.dcm" for patient in kept],
        "patient": kept,
        "labels": [PNEUMONIA if targets[p] else NO_FINDING if details.get(p) == NORMAL else "" for p in kept],
        "split": draw_splits(kept, is_positive, **fractions, seed=seed),
        "path": [paths[patient] for patient in kept],
        "detail": [details.get(patient, "") for patient in kept],
    }
    boxless = dict.fromkeys(f"{patient}.dcm" for patient, *_ in boxes if patient not in paths)
    problems += reading.notes("box left out", boxless, "its film is left out")
    rows = [(f"{patient}.dcm", PNEUMONIA, *corners) for patient, *corners in boxes if patient in paths]
    return Release(root, reading.film_frame(columns), reading.box_frame(rows), problem_frame(problems))


def draw_splits(
    names: Sequence[str], labels: Sequence, *, test_fraction: float, validation_fraction: float, seed: int
) -> np.ndarray:
    """Divide films at random into train, val and test, each label on its own, so that all labels are in every split.

    Films take their places in the order of a hash of (seed, name): the split depends on neither the order of the films
    nor, but for a film or so at its borders, on whether some of them are missing.

    Parameters
    ----------
    names : (N,) unique names
    labels : (N,) one label a film, each of at least 3 films
    test_fraction : share of each label's films that becomes test, in (0, 1)
    validation_fraction : share of the others that becomes val, in (0, 1)

    Returns
    -------
    object (N,) of 'train', 'val' and 'test'; at least one film of each label in each.

    Raises
    ------
    ValueError
        A label of fewer than 3 films.
    """
    labels = np.asarray(labels)
    keys = np.array([hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=16).digest() for name in names])
    splits = np.full(len(labels), "train", object)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if len(rows) < 3:
            raise ValueError(f"label {label} has {len(rows)} films; train, val and test need one each")
        rows = rows[np.argsort(keys[rows])]
        n_test = min(max(round(test_fraction * len(rows)), 1), len(rows) - 2)
        n_val = min(max(round(validation_fraction * (len(rows) - n_test)), 1), len(rows) - n_test - 1)
        splits[rows[:n_test]] = "test"
        splits[rows[n_test : n_test + n_val]] = "val"
    return splits


# ---- files


def _read_rows(path: Path, columns: tuple[str, ...]) -> tuple[list[tuple[int, dict[str, str]]], list[str]]:
    """((row number, cells by column) of every row, faults of the others). Columns may stand in any order, but must be
    these."""
    header, lines = reading.read_table(path)
    unknown, absent = [name for name in header if name not in columns], [name for name in columns if name not in header]
    if unknown or absent or len(header) > len(columns):
        named = (("unknown columns", unknown), ("no columns", absent))
        fault = " and ".join(f"{what} {reading.some(map(repr, names))}" for what, names in named if names)
        raise ReleaseError(
            f"{path} has {fault or 'a column twice'} in its first line; the columns are {', '.join(columns)}"
        )
    rows, faults = [], []
    for number, cells in lines:
        row = dict(zip(header, cells))
        if len(cells) != len(header):
            faults.append(f"row {number} has {len(cells)} cells, not {len(header)}")
        elif not row["patientId"].isprintable() or set(row["patientId"]) <= {"."} or set("/\\") & set(row["patientId"]):
            name = reading.cut(repr(row["patientId"]))
            faults.append(f"row {number}: patientId {name} is not the name of a film (without folder and .dcm)")
        else:
            rows.append((number, row))
    return rows, faults


def _read_labels(path: Path, problems: list) -> tuple[dict[str, int], list[tuple]]:
    """(target of every patient, in the order of the file; patient, x1, y1, x2, y2 of every box)."""
    rows, faults = _read_rows(path, LABEL_COLUMNS)
    targets: dict[str, int] = {}
    first: dict[str, int] = {}
    spellings: dict[str, str] = {}
    boxes: dict[tuple, None] = {}
    for number, row in rows:
        patient, *sides, target = (row[name] for name in LABEL_COLUMNS)
        fault = None
        if (other := spellings.setdefault(reading.spelling(patient), patient)) != patient:
            fault = f"patientId {patient!a} and {other!a} in row {first[other]} are one in two spellings"
        elif target not in ("0", "1"):
            fault = f"Target {reading.cut(repr(target))} of {patient} is neither 0 nor 1"
        elif targets.setdefault(patient, int(target)) != int(target):
            fault = f"{patient} has Target {target}, but Target {targets[patient]} in row {first[patient]}"
        elif target == "1":
            fault = _add_box(number, patient, sides, boxes, problems)
        elif any(sides):
            fault = f"{patient} has a box ({', '.join(sides)}), but Target 0"
        elif patient in first:
            detail = f"row {number}: Target 0 stands in row {first[patient]} already"
            problems.append(("row repeated", f"{patient}.dcm", detail))
        if fault:
            faults.append(f"row {number}: {fault}")
        first.setdefault(patient, number)
    reading.require(faults, path, "Correct or remove these rows.")
    return targets, list(boxes)


def _add_box(number: int, patient: str, sides: list[str], boxes: dict[tuple, None], problems: list) -> str | None:
    """Add a row's box to `boxes`, clipped to its film; returns what is wrong with it, or None."""
    if not any(sides):
        return f"{patient} has Target 1, but no box"
    box, image = f"box {', '.join(sides)} of {patient}", f"{patient}.dcm"
    try:
        numbers = reading.numbers(sides)
    except ValueError:
        return f"the {box} is not four numbers"
    fault = reading.box_fault(*numbers, f"the {box}")
    if fault:
        return fault
    key = (patient, *reading.clip_box(numbers, box, image, number, problems))
    if key in boxes:
        problems.append(("box repeated", image, f"row {number}: used once"))
    boxes[key] = None
    return None


def _read_details(
    root: Path, label_file: Path, targets: dict[str, int], on_missing: str, problems: list
) -> dict[str, str]:
    """Detailed class of every patient that has one."""
    path = reading.find_file(root, DETAILS, required=False)
    if path is None:
        detail = "not in the release: no film is known to be normal, so none is labelled 'No Finding'"
        problems.append(("no detailed classes", DETAILS, detail))
        return {}
    rows, faults = _read_rows(path, DETAIL_COLUMNS)
    details: dict[str, str] = {}
    first: dict[str, int] = {}
    unlabelled: dict[str, None] = {}
    for number, row in rows:
        patient, name = row["patientId"], row["class"]
        fault = None
        if name not in (OPACITY, NORMAL, NEITHER):
            known = f"{OPACITY!r}, {NORMAL!r} and {NEITHER!r}"
            fault = f"unknown class {reading.cut(repr(name))} of {patient}; the classes are {known}"
        elif patient not in targets:
            unlabelled[f"{patient}.dcm"] = None
        elif details.setdefault(patient, name) != name:
            fault = f"{patient} is {name!r}, but {details[patient]!r} in row {first[patient]}"
        elif (name == OPACITY) != (targets[patient] == 1):
            fault = f"{patient} is {name!r}, but has Target {targets[patient]} in {label_file.name}"
        if fault:
            faults.append(f"row {number}: {fault}")
        first.setdefault(patient, number)
    reading.require(faults, path, "Correct or remove these rows.")
    stray = f"in {path.name} but not in {label_file.name}: left out"
    problems += reading.notes("class without a label", unlabelled, stray)
    absent = [patient for patient in targets if patient not in details]
    fault = f"of the {len(targets)} patients of {label_file} are not in {path.name}"
    cure = "Take both files from the same release"
    reading.require_all(absent, len(targets), on_missing, fault, cure, "their detailed class")
    problems += reading.notes("no detailed class", [f"{patient}.dcm" for patient in absent], f"not in {path.name}")
    return details


def _locate(root: Path, label_file: Path, targets: dict[str, int], on_missing: str, problems: list) -> dict[str, str]:
    """Path of every labelled patient's film."""
    folder = root / FILMS
    if not folder.is_dir():
        raise ReleaseError(f"{root} has no folder {FILMS}; unpack {FILMS}.zip of the release there")
    found = reading.find_films(root, [folder], [".dcm"], problems)
    missing = [f"{patient}.dcm" for patient in targets if patient not in found]
    fault = f"of the {len(targets)} patients of {label_file} have no film in {folder}"
    cure = "Complete the download (a link must lead to its film)"
    reading.require_all(missing, len(targets), on_missing, fault, cure, "these patients")
    problems += reading.notes("film missing", missing, "no such file: left out")
    strangers = [f"{patient}.dcm" for patient in sorted(found.keys() - targets.keys())]
    problems += reading.notes("film without a label", strangers, f"not in {label_file.name}: left out")
    return {patient: path for patient, path in found.items() if patient in targets}
