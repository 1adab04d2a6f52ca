"""The NIH ChestX-ray14 release (Wang et al., CVPR 2017) as it lies on disk: films, labels, splits and boxes, checked
before any work."""

import math
import os
import re
from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from lib.data import reading
from lib.data.release import CLASSES, FINDINGS, NO_FINDING, Release, ReleaseError, problem_frame

_ALIASES = {"Infiltrate": "Infiltration", "Pleural Thickening": "Pleural_Thickening"}
_HEADER = "Image Index|Finding Labels|Follow-up #|Patient ID|Patient Age|Patient Gender|View Position".split("|")
_COLUMNS = dict(zip("image labels follow_up patient age sex view".split(), _HEADER))
_YEARS = {"": 1.0, "Y": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}
_OLDEST = 120


def read_release(
    root: str | Path, *, validation_fraction: float = 0.1, seed: int = 0, on_missing: Literal["error", "skip"] = "error"
) -> Release:
    """Read and check a release in NIH layout.

    Expects `Data_Entry_2017*.csv` (either header generation), `train_val_list.txt`, `test_list.txt`, the films in
    `images/`, `images_*/` or `images_*/images/`, and, if there is one, `BBox_List_2017*.csv`. No film is opened.

    Parameters
    ----------
    validation_fraction : float in (0, 1)
        Share of the films of train_val_list.txt, approximately, whose patients become the validation split.
    seed : int
        Of the draw of validation patients.
    on_missing : 'error' or 'skip'
        What to do where one part names a film that another part lacks: a film without its file, a listed film without a
        row in Data_Entry, a box for an unknown film. 'skip' goes on without them and notes each in `problems`. Films in
        neither list are always left out and noted.

    Returns
    -------
    Release
        Repaired and noted: label aliases, repeated labels, impossible ages, repeated lines and boxes; boxes that reach
        past their film are clipped.

    Raises
    ------
    ReleaseError
        Missing, empty or malformed files, unknown labels, 'No Finding' beside a finding, paths in Image Index, repeated
        films, films or patients on both sides of the split, empty splits, boxes without area or wholly outside their
        film.
    """
    advice = "give the folder that holds Data_Entry_2017*.csv, the two lists and images/"
    root = reading.open_root(root, advice, on_missing, validation_fraction=validation_fraction)
    problems: list[tuple[str, str, str]] = []

    entry_file = reading.find_file(root, "Data_Entry_2017*.csv")
    films = read_entries(entry_file, problems)
    known = set(films["image"])
    films["split"] = _assign_lists(root, films["image"], entry_file, on_missing, problems)
    films = _locate(root, films[films["split"] != ""], on_missing, problems)
    _require_disjoint_patients(films, root)
    films["split"] = _draw_validation(films, validation_fraction, seed)
    films = reading.film_frame(films.reset_index(drop=True))
    _require_splits(films, root)

    box_file = reading.find_file(root, "BBox_List_2017*.csv", required=False)
    if box_file is None:
        detail = "not in the release: everything that needs boxes is unavailable"
        problems.append(("no boxes", "BBox_List_2017.csv", detail))
    boxes = read_boxes(box_file, films, known, on_missing, problems) if box_file else reading.box_frame([])

    release = Release(root, films, boxes, problem_frame(problems))
    positives = pd.DataFrame(release.targets, columns=CLASSES).groupby(films["split"]).sum().T.unstack()
    absent = [
        ("class without positives", name, f"no {split} film has it") for split, name in positives.index[positives == 0]
    ]
    return replace(release, problems=problem_frame(problems + absent))


def read_entries(path: Path, problems: list) -> pd.DataFrame:
    """The rows of Data_Entry: image, labels, follow_up, patient, age, sex, view; what is repaired is added to
    `problems`. Raises ReleaseError for the rows that cannot be used."""
    header, lines = reading.read_table(path)
    # The released header names two columns in one, 'OriginalImage[Width,Height]'; split at its comma it still has one
    # cell per value.
    names = ["Patient Gender" if name == "Patient Sex" else name for name in header]
    absent = [name for name in _HEADER if name not in names]
    if absent:
        raise ReleaseError(
            f"{path} lacks the columns {', '.join(absent)} in its first line; it has {', '.join(filter(None, header))}"
        )
    place = {key: names.index(name) for key, name in _COLUMNS.items()}

    rows, faults, seen = [], [], {}
    for number, cells in lines:
        if len(cells) <= max(place.values()):
            faults.append(f"row {number} has {len(cells)} cells, too few")
            continue
        row = {key: cells[column] for key, column in place.items()}
        image, patient, follow_up = row["image"], row["patient"], row["follow_up"].removesuffix(".0")
        labels, label_fault = _parse_labels(row["labels"], image, problems)
        fault = _name_fault(image)
        if not fault and image in seen:
            fault = f"{image} is there already, in row {seen[image]}"
        if not fault and not patient:
            fault = f"{image} has no Patient ID"
        fault = fault or label_fault
        if not fault and not follow_up.isdigit():
            fault = f"Follow-up # {row['follow_up']!r} of {image} is not a number"
        if fault:
            faults.append(f"row {number}: {fault}")
            continue
        seen[image] = number
        # '00000001' and '1' are one patient: a zero-padded id must not carry a patient across the split unseen.
        patient = patient.lstrip("0") or "0" if patient.isdigit() else patient
        age = _parse_age(row["age"], image, problems)
        rows.append(row | {"labels": labels, "follow_up": int(follow_up), "age": age, "patient": patient})
    reading.require(faults, path, "Correct or remove these rows.")
    return pd.DataFrame(rows)


def _name_fault(name: str) -> str | None:
    """What is wrong with an Image Index, or None."""
    if "/" in name or "\\" in name:
        return f"Image Index {name!r} has a path in it; write the bare file name"
    if not name.lower().endswith(".png") or len(name) < 5:
        return f"Image Index {name!r} is not the name of a .png file"
    return None


def _parse_labels(text: str, image: str, problems: list) -> tuple[str, str | None]:
    """(labels as the release has them, what is wrong with them or None)."""
    if text in CLASSES:
        return text, None
    said = [name.strip() for name in text.split("|")]
    problems += [("label alias", image, f"{name} read as {_ALIASES[name]}") for name in said if name in _ALIASES]
    names = [_ALIASES.get(name, name) for name in said]
    for name in names:
        if name not in CLASSES:
            return text, f"unknown label {name!r} of {image}; the labels are {', '.join(CLASSES)}"
    if len(set(names)) < len(names):
        problems.append(("label repeated", image, text))
        names = list(dict.fromkeys(names))
    if NO_FINDING in names and len(names) > 1:
        return text, f"{image} is labelled 'No Finding' and a finding at once ({text})"
    return "|".join(names), None


def _parse_age(text: str, image: str, problems: list) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([YMWD]?)", text.upper())
    age = float(match[1]) * _YEARS[match[2]] if match else math.nan
    if not age <= _OLDEST:
        problems.append(("age impossible", image, f"{text!r} read as unknown"))
        return math.nan
    return age


def read_list(path: Path, problems: list) -> list[str]:
    """The film names of a list, one a line, each once; repeated lines are added to `problems`."""
    lines = reading.read_lines(path)
    faults = [f"row {number}: {fault}" for number, cells in lines if (fault := _name_fault(cells[0]))]
    reading.require(faults, path, "One film name a line.")
    if not lines:
        raise ReleaseError(f"{path} is empty; copy it again from the release")
    counts = Counter(cells[0] for _, cells in lines)
    again = [f"{name} stands there {count} times, used once" for name, count in counts.items() if count > 1]
    problems += [("line repeated", path.name, detail) for detail in again]
    return list(counts)


def read_names(path: str | Path, known: Collection[str]) -> set[str]:
    """The films of a list of another's making, one a line: folders before a name, and what follows it on its line
    (labels, say), are left out.

    ReleaseError where no name is among `known`: such a list would silently say nothing about any film.
    """
    path = Path(path)
    lines = reading.read_lines(path)
    faults = [f"row {number} does not begin with a film name" for number, cells in lines if not cells[0]]
    reading.require(faults, path, "One film name a line.")
    if not lines:
        raise ReleaseError(f"{path} is empty; it must name one film a line")
    names = [cells[0].split()[0] for _, cells in lines]
    bare = {name.rsplit("/", 1)[-1] for name in names}
    if bare.isdisjoint(known):
        raise ReleaseError(
            f"{path} names no film of this release; it begins with {names[0]!r}, the release has {min(known)!r}"
        )
    return bare


def read_boxes(path: Path, films: pd.DataFrame, known: set[str], on_missing: str, problems: list) -> pd.DataFrame:
    """The table `Release.boxes` of a box list.

    Parameters
    ----------
    films : image and labels of the films that are kept
    known : names of the films that Data_Entry has
    on_missing : see `read_release`
    problems : list of (kind, item, detail), added to
    """
    lines = reading.read_lines(path)
    if not lines:
        raise ReleaseError(f"{path} is empty; copy it again from the release, or remove it to work without boxes")
    header = lines[0][1]
    # Read by position: the header is 'Bbox [x,y,w,h],,,' and its empty tail has no values beneath it.
    if header[:2] != ["Image Index", "Finding Label"] or len(header) < 6 or not header[2].startswith("Bbox"):
        raise ReleaseError(
            f"{path} must begin with 'Image Index,Finding Label,Bbox [x,y,w,h]'; it begins with {','.join(header)!r}"
        )
    labels = dict(zip(films["image"], films["labels"]))
    boxes, faults, aliases = {}, [], Counter()
    for number, cells in lines[1:]:
        try:
            image, said = cells[:2]
            x, y, w, h = sides = [float(cell) for cell in cells[2:6]]
        except ValueError:
            faults.append(f"row {number} is not a film, a label and four numbers")
            continue
        name = _ALIASES.get(said, said)
        if said in _ALIASES:
            aliases[said] += 1
        box = f"box {x:g}, {y:g}, {w:g}, {h:g} of {image}"
        fault = _name_fault(image)
        if fault is None and name not in FINDINGS:
            fault = f"unknown label {name!r}; the labels are {', '.join(FINDINGS)}"
        fault = fault or reading.box_fault(x, y, w, h, box)
        if fault is None and image not in known and on_missing == "error":
            fault = (
                f"{image} is not in Data_Entry (skip_bad_films: true, that is on_missing='skip', goes on without "
                "its boxes)"
            )
        if fault:
            faults.append(f"row {number}: {fault}")
        elif image not in labels:
            where = "its film is left out" if image in known else "not in Data_Entry"
            problems.append(("box left out", image, f"row {number}: {where}"))
        elif (key := (image, name, *reading.clip_box(sides, box, image, number, problems))) in boxes:
            problems.append(("box repeated", image, f"row {number}: {name}, used once"))
        else:
            boxes[key] = None
            if name not in labels[image].split("|"):
                detail = f"row {number}: {name}, but the film is labelled {labels[image]}"
                problems.append(("box without its label", image, detail))
    reading.require(faults, path, "Correct or remove these rows.")
    counts = [f"{alias} read as {_ALIASES[alias]} in {count} rows" for alias, count in aliases.items()]
    problems += [("label alias", path.name, detail) for detail in counts]
    return reading.box_frame(list(boxes))


def _assign_lists(root: Path, images: pd.Series, entry_file: Path, on_missing: str, problems: list) -> pd.Series:
    """'train' (for train_val_list.txt), 'test', or '' for films in neither list."""
    lists = {"train": "train_val_list.txt", "test": "test_list.txt"}
    train_val, test = (read_list(root / name, problems) for name in lists.values())
    both = sorted(set(train_val) & set(test))
    if both:
        raise ReleaseError(
            f"{root}: {len(both)} films are in train_val_list.txt and in test_list.txt: {reading.some(both)}. "
            "Remove them from one of the two."
        )
    listed = dict.fromkeys(train_val, "train") | dict.fromkeys(test, "test")
    known = set(images)
    unknown = [name for name in listed if name not in known]
    fault = f"films of train_val_list.txt and test_list.txt have no row in {entry_file}"
    cure = "Take lists and csv from the same release"
    reading.require_all(unknown, on_missing, fault, cure, "these films")
    problems += reading.notes("listed film without a row", unknown, f"not in {entry_file.name}: left out")
    split = images.map(listed).fillna("")
    unlisted = "in neither train_val_list.txt nor test_list.txt: left out"
    problems += reading.notes("film in no list", images[split == ""], unlisted)
    return split


def _locate(root: Path, films: pd.DataFrame, on_missing: str, problems: list) -> pd.DataFrame:
    """Films with their paths. Each folder is listed once: 112,120 single look-ups would cost minutes on a network
    disk."""
    parents = [root / "images", *sorted(root.glob("images_*"))]
    folders = [folder for parent in parents for folder in (parent, parent / "images") if folder.is_dir()]
    if not folders:
        raise ReleaseError(
            f"{root} has no folder of films; put them in images/, or in images_001/images/ to images_012/images/ as "
            "released"
        )
    paths: dict[str, str] = {}
    for folder in folders:
        with os.scandir(folder) as entries:
            found = {entry.name: entry.path for entry in entries if entry.name.lower().endswith(".png")}
        if again := len(found.keys() & paths.keys()):
            where = folder.relative_to(root).as_posix()
            problems.append(("film found twice", where, f"{again} films are in an earlier folder too, which is used"))
        paths = found | paths
    films = films.assign(path=films["image"].map(paths))
    missing = list(films["image"][films["path"].isna()])
    where = reading.some((folder.relative_to(root).as_posix() for folder in folders), 12)
    fault = f"of {len(films)} films are missing from {where} under {root}"
    reading.require_all(missing, on_missing, fault, "Complete the download", "these films")
    problems += reading.notes("film missing", missing, "no such file: left out")
    return films.dropna(subset="path")


def _require_disjoint_patients(films: pd.DataFrame, root: Path) -> None:
    sides = films.groupby("patient")["split"].nunique()
    both = list(sides.index[sides > 1])
    if both:
        patients, names = reading.some(both), reading.some(films["image"][films["patient"].isin(both)])
        raise ReleaseError(
            f"{root}: {len(both)} patients are on both sides of the split (patient {patients}; films {names}). "
            "Move all films of a patient to train_val_list.txt or all to test_list.txt."
        )


def _require_splits(films: pd.DataFrame, root: Path) -> None:
    for split, name in (("train", "train_val_list.txt"), ("val", "train_val_list.txt"), ("test", "test_list.txt")):
        if split not in set(films["split"]):
            raise ReleaseError(
                f"{root}: the {split} split is empty; {name} must name films that are on disk, from more than one "
                "patient"
            )


def _draw_validation(films: pd.DataFrame, fraction: float, seed: int) -> pd.Series:
    """Splits with patients of 'train' moved to 'val' until about `fraction` of the films are there.

    Patients are drawn at random, but where two patients or more have a class, both sides keep a positive film of it if
    possible: first one patient for each class, rarest class first, then patients in random order for whom there is
    still room. Depends on seed and patients, not on the order of the rows.
    """
    pool = films[films["split"] == "train"]
    if pool.empty:
        return films["split"]
    order = np.random.default_rng(seed).permutation(np.sort(pool["patient"].unique()))
    sizes = pool.groupby("patient").size().loc[order].to_numpy()
    positives = pool["labels"].str.get_dummies("|").groupby(pool["patient"]).max().loc[order].to_numpy()
    room = max(1, round(fraction * len(pool)))
    left, chosen = positives.sum(axis=0), np.zeros(len(order), bool)

    def movable(i: int) -> bool:  # never the last patient, nor the last one of a class
        return not chosen[i] and chosen.sum() < len(order) - 1 and bool(np.all(left[positives[i] > 0] > 1))

    def move(i: int) -> None:
        nonlocal room, left
        chosen[i], room, left = True, room - sizes[i], left - positives[i]

    for column in np.argsort(left, kind="stable"):
        candidates = [i for i in np.flatnonzero(positives[:, column]) if movable(i)]
        if candidates and not positives[chosen, column].any():
            # The first drawn for whom there is room, else the first drawn.
            move(min(candidates, key=lambda i: sizes[i] > max(room, 1)))
    for i in range(len(order)):
        if sizes[i] <= room and movable(i):
            move(i)
    return films["split"].mask(films["patient"].isin(order[chosen]) & (films["split"] == "train"), "val")
