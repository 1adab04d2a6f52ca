"""The RSNA Pneumonia Detection Challenge release (2018, stage 2) as it lies on disk: DICOM films, boxes, detailed
classes."""

import hashlib
import os
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from lib.data.release import (
    FILM_COLUMNS,
    NO_FINDING,
    PNEUMONIA,
    Release,
    ReleaseError,
    box_fault,
    box_frame,
    clip_box,
    problem_frame,
)
from lib.data.rows import find_file, read_lines, require, some

FILMS = "stage_2_train_images"
LABELS = "stage_2_train_labels.csv"
DETAILS = "stage_2_detailed_class_info.csv"
LABEL_COLUMNS = ("patientId", "x", "y", "width", "height", "Target")
DETAIL_COLUMNS = ("patientId", "class")
OPACITY, NORMAL, NEITHER = "Lung Opacity", "Normal", "No Lung Opacity / Not Normal"
RSNA_COLUMNS = (*FILM_COLUMNS, "detail")
_DTYPES = {name: "str" for name in RSNA_COLUMNS} | {"age": float, "follow_up": int}


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
    header's PatientID is the same id).

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
        What to do with a patient who has no DICOM file, or none of the detailed classes. 'skip' goes on without that
        film, or without its detailed class, and notes it in `problems`. Films without a row in the labels are always
        left out and noted.

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
    for name, value in (("validation_fraction", validation_fraction), ("test_fraction", test_fraction)):
        if not 0 < value < 1:
            raise ValueError(f"{name} is {value}; it must lie between 0 and 1, both excluded")
    if on_missing not in ("error", "skip"):
        raise ValueError(f"on_missing is {on_missing!r}; it must be 'error' or 'skip'")
    root = Path(root).expanduser().resolve()
    if not root.is_dir():
        raise ReleaseError(f"{root} is not a folder; give the folder that holds {LABELS} and {FILMS}/")
    problems: list[tuple[str, str, str]] = []

    label_file = find_file(root, LABELS)
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
    films = pd.DataFrame(
        {
            "image": [f"{patient}.dcm" for patient in kept],
            "patient": kept,
            "age": np.nan,
            "sex": "",
            "view": "",
            "follow_up": 0,
            "labels": [PNEUMONIA if targets[p] else NO_FINDING if details.get(p) == NORMAL else "" for p in kept],
            "split": draw_splits(
                kept, is_positive, test_fraction=test_fraction, validation_fraction=validation_fraction, seed=seed
            ),
            "path": [paths[patient] for patient in kept],
            "detail": [details.get(patient, "") for patient in kept],
        }
    )
    problems += [
        ("box left out", f"{p}.dcm", "its film is left out")
        for p in dict.fromkeys(p for p, *_ in boxes)
        if p not in paths
    ]
    rows = [(f"{patient}.dcm", PNEUMONIA, *corners) for patient, *corners in boxes if patient in paths]
    return Release(root, films.astype(_DTYPES)[list(RSNA_COLUMNS)], box_frame(rows), problem_frame(problems))


def draw_splits(names, labels, *, test_fraction: float, validation_fraction: float, seed: int) -> np.ndarray:
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
    lines = read_lines(path)
    if len(lines) < 2:
        raise ReleaseError(f"{path} has no rows; copy it again from the release")
    header = lines[0][1]
    unknown, absent = [name for name in header if name not in columns], [name for name in columns if name not in header]
    if unknown or absent or len(header) > len(columns):
        faults = [f"unknown columns {some(map(repr, unknown))}"] * bool(unknown) + [
            f"no columns {some(map(repr, absent))}"
        ] * bool(absent)
        raise ReleaseError(
            f"{path} has {' and '.join(faults) or 'a column twice'} in its first line; the columns are "
            f"{', '.join(columns)}"
        )
    rows, faults = [], []
    for number, cells in lines[1:]:
        row = dict(zip(header, cells))
        if len(cells) != len(header):
            faults.append(f"row {number} has {len(cells)} cells, not {len(header)}")
        elif not row["patientId"] or "/" in row["patientId"] or "\\" in row["patientId"]:
            faults.append(
                f"row {number}: patientId {row['patientId']!r} is not the name of a film (without folder and .dcm)"
            )
        else:
            rows.append((number, row))
    return rows, faults


def _read_labels(path: Path, problems: list) -> tuple[dict[str, int], list[tuple]]:
    """(target of every patient, in the order of the file; patient, x1, y1, x2, y2 of every box)."""
    rows, faults = _read_rows(path, LABEL_COLUMNS)
    targets: dict[str, int] = {}
    first: dict[str, int] = {}
    boxes: dict[tuple, None] = {}
    for number, row in rows:
        patient, target, sides = row["patientId"], row["Target"], [row[side] for side in ("x", "y", "width", "height")]
        fault = None
        if target not in ("0", "1"):
            fault = f"Target {target!r} of {patient} is neither 0 nor 1"
        elif targets.setdefault(patient, int(target)) != int(target):
            fault = f"{patient} has Target {target}, but Target {targets[patient]} in row {first[patient]}"
        elif target == "0" and any(sides):
            fault = f"{patient} has a box ({', '.join(sides)}), but Target 0"
        if fault is None and target == "0" and patient in first:
            problems.append(
                ("row repeated", f"{patient}.dcm", f"row {number}: Target 0 stands in row {first[patient]} already")
            )
        if fault is None and target == "1":
            fault = _add_box(number, patient, sides, boxes, problems)
        if fault:
            faults.append(f"row {number}: {fault}")
        first.setdefault(patient, number)
    require(faults, path, "Correct or remove these rows.")
    return targets, list(boxes)


def _add_box(number: int, patient: str, sides: list[str], boxes: dict[tuple, None], problems: list) -> str | None:
    """Add a row's box to `boxes`, clipped to its film; returns what is wrong with it, or None."""
    if not any(sides):
        return f"{patient} has Target 1, but no box"
    text = f"box {', '.join(sides)} of {patient}"
    try:
        x, y, w, h = map(float, sides)
    except ValueError:
        return f"the {text} is not four numbers"
    fault = box_fault(x, y, w, h, f"the {text}")
    if fault:
        return fault
    corners = clip_box(x, y, w, h)
    if corners != (x, y, x + w, y + h):
        problems.append(("box clipped", f"{patient}.dcm", f"row {number}: the {text} reaches past its film"))
    if (patient, *corners) in boxes:
        problems.append(("box repeated", f"{patient}.dcm", f"row {number}: used once"))
    boxes[(patient, *corners)] = None
    return None


def _read_details(
    root: Path, label_file: Path, targets: dict[str, int], on_missing: str, problems: list
) -> dict[str, str]:
    """Detailed class of every patient that has one."""
    path = find_file(root, DETAILS, required=False)
    if path is None:
        problems.append(
            (
                "no detailed classes",
                DETAILS,
                "not in the release: no film is known to be normal, so none is labelled 'No Finding'",
            )
        )
        return {}
    rows, faults = _read_rows(path, DETAIL_COLUMNS)
    details: dict[str, str] = {}
    first: dict[str, int] = {}
    unlabelled: dict[str, None] = {}
    for number, row in rows:
        patient, name = row["patientId"], row["class"]
        if name not in (OPACITY, NORMAL, NEITHER):
            faults.append(
                f"row {number}: unknown class {name!r} of {patient}; the classes are {OPACITY!r}, {NORMAL!r} and "
                f"{NEITHER!r}"
            )
        elif patient not in targets:
            unlabelled[patient] = None
        elif details.setdefault(patient, name) != name:
            faults.append(f"row {number}: {patient} is {name!r}, but {details[patient]!r} in row {first[patient]}")
        elif (name == OPACITY) != (targets[patient] == 1):
            faults.append(
                f"row {number}: {patient} is {name!r}, but has Target {targets[patient]} in {label_file.name}"
            )
        first.setdefault(patient, number)
    require(faults, path, "Correct or remove these rows.")
    problems += [
        ("class without a label", f"{p}.dcm", f"in {path.name} but not in {label_file.name}: left out")
        for p in unlabelled
    ]
    absent = [patient for patient in targets if patient not in details]
    if absent and on_missing == "error":
        raise ReleaseError(
            f"{len(absent)} of the {len(targets)} patients of {label_file} are not in {path.name}: {some(absent)}. "
            "Take both files from the same "
            "release, or set skip_bad_films: true (on_missing='skip') to go on without their detailed class."
        )
    problems += [("no detailed class", f"{p}.dcm", f"not in {path.name}") for p in absent]
    return details


def _locate(root: Path, label_file: Path, targets: dict[str, int], on_missing: str, problems: list) -> dict[str, str]:
    """Path of every labelled patient's film. The folder is listed once: 26,684 single look-ups would cost minutes on a
    network disk."""
    folder = root / FILMS
    if not folder.is_dir():
        raise ReleaseError(f"{root} has no folder {FILMS}; unpack {FILMS}.zip of the release there")
    with os.scandir(folder) as entries:
        found = {entry.name.removesuffix(".dcm"): entry.path for entry in entries if entry.name.endswith(".dcm")}
    missing = [patient for patient in targets if patient not in found]
    if missing and on_missing == "error":
        raise ReleaseError(
            f"{len(missing)} of the {len(targets)} patients of {label_file} have no film in {folder}: "
            f"{some([f'{p}.dcm' for p in missing])}. "
            "Complete the download, or set skip_bad_films: true (on_missing='skip') to go on without these patients."
        )
    problems += [("film missing", f"{patient}.dcm", "no such file: left out") for patient in missing]
    problems += [
        ("film without a label", f"{p}.dcm", f"not in {label_file.name}: left out")
        for p in sorted(found)
        if p not in targets
    ]
    return {patient: path for patient, path in found.items() if patient in targets}
